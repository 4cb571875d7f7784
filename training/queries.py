"""Query photos: finding them, where they were taken, and decoding them in batches of one shape."""

from __future__ import annotations

import hashlib
import os
import stat
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

import numpy as np
import pyarrow as pa
from PIL import Image

from shards.console import JobError, one_line, printable
from shards.names import PHOTO_EXTENSIONS, parse_utm
from shards.photo_list import BACKSLASHES, GIVE_A_LIST, is_list, read_list
from shards.photo_tree import walk_photos
from shards.plane import Places, into_zone, join_at_equator, nowhere_in
from shards.upright import UnreadablePhoto, open_photo, upright_rgb

_MIDDLE = 4096  # bytes


@dataclass(frozen=True)
class SetAside:
    """A query photo that is not scored, and why."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{printable(str(self.path))}: {self.reason}"


@dataclass(frozen=True)
class Queries:
    """The query photos of a folder, sorted by path, or of a list, in its order.

    `paths` has Q entries, `names` the same below the folder, or as the list gives them; `east` and `north` are float64
    [Q], UTM metres in the zone of the class map, NaN for photos whose name or row holds no coordinates: those are
    predicted, and left out of the recall; `unplaced` says why, by number, for a list. `set_aside` lists photos that
    cannot be compared with the classes at all.
    """

    source: Path
    names: tuple[str, ...]
    paths: tuple[Path, ...]
    east: np.ndarray
    north: np.ndarray
    reprojected: int
    set_aside: tuple[SetAside, ...]
    unplaced: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def located(self) -> np.ndarray:
        """bool [Q]: whether the query's position is known."""
        return np.isfinite(self.east) & np.isfinite(self.north)

    def unlocated(self, readable: np.ndarray) -> list[SetAside]:
        """Those of the `readable` queries (bool [Q]) whose position is not known, with that reason."""
        rows = np.flatnonzero(readable & ~self.located).tolist()
        return [SetAside(self.paths[i], self.unplaced.get(i, "no coordinates in its name")) for i in rows]

    @property
    def advice(self) -> str:
        """What to add to a message where the names of a folder's photos tell no place at all; "" otherwise."""
        nameless = len(self) and not self.located.any() and not is_list(self.source)
        return f"; {GIVE_A_LIST}" if nameless else ""

    def fingerprint(self) -> str:
        """A hash of the located photos: the same wherever they lie, by whatever names or list they are given."""
        marks = [mark for i in np.flatnonzero(self.located) if (mark := _mark(self.paths[i])) is not None]
        return hashlib.sha256(repr(sorted(marks)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class QueryBatch:
    """Query photos of one shape: `indices` int64 [b] into the list read, `images` uint8 [b, H, W, 3] RGB."""

    indices: np.ndarray
    images: np.ndarray


def query_size(image_size: int) -> int:
    """Shorter side in pixels of a query for models trained at `image_size`: 256 for 224, as the reference."""
    return round(image_size * 256 / 224)


def find_photos(folder: Path, others: list[Path] | None = None) -> list[Path]:
    """All photos under `folder`, links followed, sorted by path; JobError where it cannot be read or holds none.
    `others` gets the files that are no photos by their names."""
    if not folder.is_dir():
        what = (
            "a file; name the folder of photos that holds it, or a list (.csv, .parquet)"
            if folder.exists()
            else "no such folder of photos"
        )
        raise JobError(f"{folder}: {what}")
    found: list[Path] = []
    rest = [] if others is None else others
    for kind, path in walk_photos(folder):
        (rest if kind == "other" else found).append(folder / path)
    if not found:
        raise JobError(f"{folder}: no photos found ({', '.join(PHOTO_EXTENSIONS)} in all folders below)")
    return sorted(found)


def list_queries(source: Path, zone: int, *, southern: bool = False) -> Queries:
    """The queries of a folder, whose names tell their place, or of a CSV or Parquet list, with UTM positions in `zone`
    (that of the class map; 0: unknown).

    A photo of a neighbouring zone is reprojected into `zone`, one from further away is set aside. `southern`: the class
    map lies south of the equator. Raises JobError where the source does not exist or holds no photos.
    """
    source = Path(source)
    return _of_list(source, zone, southern) if is_list(source) else _of_folder(source, zone, southern)


def _of_folder(folder: Path, zone: int, southern: bool) -> Queries:
    paths = find_photos(folder)
    names = [os.fsencode(path.relative_to(folder)).decode("utf-8", "backslashreplace") for path in paths]
    return _in_zone(folder, names, paths, places_of_names(names), zone, southern, {}, {})


def _of_list(file: Path, zone: int, southern: bool) -> Queries:
    """The photos of a list, their paths relative to its folder; rows whose place is of no use are kept, not located."""
    listed = read_list(file, zone, southern=southern)
    if not zone and "east" not in listed.table.column_names:
        raise JobError(f"{file}: the classes lie in no UTM zone, so that it must give east and north, not degrees")
    numbers = listed.numbers
    names = [path or f"{file.name}, row {numbers[row]}" for row, path in enumerate(listed.paths.to_pylist())]
    paths = [file.parent / name for name in names]
    words = {"no path": "no path", "zone mismatch": f"farther away than the zones beside {zone}, that of the classes"}
    unfit: dict[int, str] = {}
    unplaced: dict[int, str] = {}
    for reason, rows in listed.unusable.items():
        for row in np.flatnonzero(rows).tolist():
            if reason in words:
                unfit[row] = words[reason]
            else:
                unplaced[row] = f"{reason} ({listed.values(row, reason)})"
    _check_photos(file, [path for path, none in zip(paths, listed.unusable["no path"], strict=True) if not none])
    first: dict[str, int] = {}
    for row, name in enumerate(names):
        if row not in unfit and row not in unplaced and first.setdefault(name, row) != row:
            unfit[row] = f"named twice, in row {numbers[first[name]]} and again in row {numbers[row]}"
    return _in_zone(file, names, paths, listed.places, zone, southern, unfit, unplaced)


def _check_photos(file: Path, paths: Sequence[Path]) -> None:
    """Raise `JobError` where none of a list's photos is there."""
    if not paths:
        raise JobError(f"{file}: no row names a photo")
    if all(_size(path) is None for path in paths):
        first = str(paths[0])
        hint = f"; {BACKSLASHES}" if "\\" in first else ""
        raise JobError(
            f"{file}: none of its photos is there (the first: {printable(first)}{hint}); paths are relative to the "
            "list's folder, or absolute"
        )


def _size(path: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):  # ValueError: a NUL character in a list's path
        return None


def _mark(path: Path) -> tuple[int, int] | None:
    """Bytes of a photo and a checksum of some in its middle (photos without compression, such as BMP, are of one size);
    None where there is none to read."""
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):  # nobody may ever write into a pipe
            return None
        with path.open("rb") as file:
            file.seek(facts.st_size // 2)
            return facts.st_size, zlib.crc32(file.read(_MIDDLE))
    except (OSError, ValueError):
        return None


def places_of_names(names: Sequence[str]) -> Places:
    """Where photos were taken by their names; east and north are NaN where a name does not tell it."""
    return Places(*parse_utm(pa.array([name.encode("utf-8", "surrogatepass") for name in names], pa.large_binary())))


def _in_zone(
    source: Path,
    names: Sequence[str],
    paths: Sequence[Path],
    places: Places,
    zone: int,
    southern: bool,
    unfit: dict[int, str],
    unplaced: dict[int, str],
) -> Queries:
    """The queries but for the `unfit` (why, by row) and those that cannot be brought into `zone` (0: as they are)."""
    reprojected, elsewhere = bring_into_zone(places, zone, southern)
    unfit |= elsewhere
    kept = [row for row in range(len(names)) if row not in unfit]
    return Queries(
        source,
        tuple(names[row] for row in kept),
        tuple(paths[row] for row in kept),
        places.east[kept],
        places.north[kept],
        reprojected,
        tuple(SetAside(paths[row], reason) for row, reason in sorted(unfit.items())),
        {number: unplaced[row] for number, row in enumerate(kept) if row in unplaced},
    )


def bring_into_zone(places: Places, zone: int, southern: bool) -> tuple[int, dict[int, str]]:
    """Carry `places` of neighbouring zones and, near the equator, of the other hemisphere into the plane of `zone` in
    place (0: leave them as they are): how many of other zones, and why others cannot be compared, by row."""
    moves = into_zone(places, zone)
    if zone:
        join_at_equator(places, southern)
    far = {int(row): f"UTM zone {places.zones[row]}, the classes lie in zone {zone}" for row in moves.far}
    nowhere = f"{nowhere_in(zone)}{', that of the classes' if zone else ''}"
    return len(moves.carried), far | {int(row): nowhere for row in moves.nowhere}


def decode_query(photo: Path | BinaryIO, shorter_side: int) -> np.ndarray:
    """One query photo as uint8 [H, W, 3] RGB, upright by its EXIF tag, its shorter side `shorter_side` pixels.

    Aspect kept; PIL's bilinear filter with antialiasing and torchvision's rounding, as the reference. Raises
    `UnreadablePhoto` for a photo that cannot be decoded to its last row.
    """
    with open_photo(photo) as opened:
        image = upright_rgb(opened)
    width, height = image.size
    if min(width, height) != shorter_side:
        longer_side = int(shorter_side * max(width, height) / min(width, height))
        size = (shorter_side, longer_side) if width <= height else (longer_side, shorter_side)
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image)


class Photo(Protocol):
    """Anything that opens for reading as a `Path` does; raises `OSError` where it cannot."""

    def open(self, mode: Literal["rb"], /) -> BinaryIO: ...


def read_queries(
    photos: Sequence[Photo],
    *,
    shorter_side: int,
    batch_size: int,
    threads: int,
    on_failure: Callable[[int, str], None],
) -> Iterator[QueryBatch]:
    """Decode `photos` on a pool of threads and yield batches whose photos share one shape.

    Batches come as they fill; at most four batches of photos wait for partners of their shape. A photo that
    cannot be decoded is reported to `on_failure(index, reason)` and appears in no batch.
    """
    waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
    with ThreadPoolExecutor(max_workers=max(1, threads)) as pool:
        for index, decoded in _decode_in_order(pool, photos, shorter_side, ahead=2 * batch_size):
            if isinstance(decoded, str):
                on_failure(index, decoded)
                continue
            bucket = waiting.setdefault(decoded.shape, [])
            bucket.append((index, decoded))
            if len(bucket) == batch_size:
                yield _to_batch(waiting.pop(decoded.shape))
            elif sum(map(len, waiting.values())) >= 4 * batch_size:
                fullest = max(waiting, key=lambda shape: len(waiting[shape]))
                yield _to_batch(waiting.pop(fullest))
    for bucket in waiting.values():
        yield _to_batch(bucket)


def _decode_in_order(
    pool: ThreadPoolExecutor, photos: Sequence[Photo], shorter_side: int, ahead: int
) -> Iterator[tuple[int, np.ndarray | str]]:
    """Pixels, or the reason why a photo cannot be read, in the order of `photos`, `ahead` of them under way."""
    pending: deque[tuple[int, Future[np.ndarray | str]]] = deque()
    for index, photo in enumerate(photos):
        pending.append((index, pool.submit(_decode_or_reason, photo, shorter_side)))
        if len(pending) > ahead:
            first, future = pending.popleft()
            yield first, future.result()
    for first, future in pending:
        yield first, future.result()


def _decode_or_reason(photo: Photo, shorter_side: int) -> np.ndarray | str:
    try:
        if isinstance(photo, Path) and photo.exists() and not photo.is_file():
            return "not a regular file"  # nobody may ever write into a pipe
        with photo.open("rb") as file:
            try:
                return decode_query(file, shorter_side)
            except UnreadablePhoto as error:
                return one_line(error) if file.seek(0, os.SEEK_END) else "an empty file"
    except (OSError, ValueError) as error:  # ValueError: a NUL character in a list's path
        return one_line(error)


def _to_batch(bucket: list[tuple[int, np.ndarray]]) -> QueryBatch:
    return QueryBatch(
        np.array([index for index, _ in bucket], dtype=np.int64), np.stack([image for _, image in bucket])
    )
