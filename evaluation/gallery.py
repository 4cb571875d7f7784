"""Database images as descriptors, sorted by the cell that they were taken in."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from evaluation.localiser import Localiser
from shards import limits
from shards.cell_index import CellIndex
from shards.classes import grid_index
from shards.console import JobError, format_bytes, format_count, printable
from shards.dataset import Dataset
from shards.files import atomic_path
from shards.index import read_samples
from shards.layout import MANIFEST, shard_tables
from shards.names import BadName, parse_name
from shards.photo_list import is_list
from shards.store import is_url
from training.queries import Photo, Queries, SetAside, bring_into_zone, places_of_names, read_queries
from training.scoring import describe_batches

_PART = 1 << 16  # photos whose descriptors are written at once


@dataclass(frozen=True)
class Images:
    """Descriptors of K images: `vectors` float32 [K, D] of unit length, `east` and `north` float64 [K] in metres."""

    vectors: np.ndarray
    east: np.ndarray
    north: np.ndarray
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.vectors)


@dataclass(frozen=True)
class Gallery:
    """Images sorted by cell: class row c has `starts[c]:starts[c + 1]` (int64 [C + 1]); images of none are last.

    `firsts` int64: the first image of each cell of the grid, whether or not it is a class.
    """

    images: Images
    starts: np.ndarray
    firsts: np.ndarray

    @staticmethod
    def of(images: Images, index: CellIndex) -> Gallery:
        """Sort images into the cells of a class map."""
        classes = len(index.classes)
        rows = index.holding(images.east, images.north)
        rows = np.where(rows < 0, classes, rows)
        cells = np.stack([grid_index(images.east, index.classes.M), grid_index(images.north, index.classes.M)])
        order = np.lexsort((*cells, rows))
        starts = np.searchsorted(rows[order], np.arange(classes + 1))
        names = tuple(images.names[i] for i in order) if images.names else ()
        in_order = Images(np.ascontiguousarray(images.vectors[order]), images.east[order], images.north[order], names)
        firsts = np.flatnonzero(np.diff(cells[:, order], prepend=np.nan).any(axis=0))
        return Gallery(in_order, starts, firsts)

    @property
    def outside(self) -> int:
        """How many images lie in no class."""
        return len(self.images) - int(self.starts[-1])


@dataclass(frozen=True, slots=True)
class ShardPhoto:
    """A photo in a shard, by what its sample table says; opens as a file does."""

    dataset: Dataset
    tar: Path
    name: str
    offset: int
    size: int
    crc32: int

    def open(self, mode: Literal["rb"], /) -> BinaryIO:
        """Its JPEG; raises as `Dataset.jpeg` does."""
        return io.BytesIO(self.dataset.jpeg(self.tar, self.offset, self.size, self.crc32))


@dataclass(frozen=True)
class Describer:
    """Describes many photos by a checkpoint, `batch_size` at once, read by `threads`; `say` is told what is left out.

    With a folder `parts`, descriptors of many photos are kept there part by part, and read from there. Raises JobError
    where no photo can be described.
    """

    localiser: Localiser
    say: Callable[[str], None]
    batch_size: int = 32
    threads: int = 1

    def photos(self, photos: Queries, parts: Path | None = None) -> Images:
        """Descriptors of the photos of a folder or list that have a place."""
        source = photos.source
        vectors, readable, reasons = self._describe(photos.paths, f"describing {source}", parts)
        failures = [SetAside(photos.paths[i], reason) for i, reason in reasons.items()][:5]
        for aside in (*photos.set_aside[:5], *failures, *photos.unlocated(readable)[:5]):
            self.say(f"{aside.path}: left out: {aside.reason}")
        kept = np.flatnonzero(readable & photos.located)
        if left_out := len(photos) + len(photos.set_aside) - len(kept):
            self.say(f"{source}: {format_count(left_out, 'photo')} left out")
        if len(kept) == 0:
            raise JobError(f"{source}: no readable photo with coordinates{photos.advice}")
        names = tuple(photos.names[i] for i in kept)
        return Images(_rows(vectors, kept), photos.east[kept], photos.north[kept], names)

    def shards(self, dataset: Dataset, parts: Path | None = None) -> Images:
        """Descriptors of all photos in the shards of a data set; raises JobError for a damaged table of samples too."""
        columns = ["east", "north", "key", "offset", "size", "crc32"]
        tables = [(path.with_suffix(".tar"), read_samples(path, columns)) for path in shard_tables(dataset.path)]
        photos = [
            ShardPhoto(dataset, tar, f"{tar.stem}/{key}", *place)
            for tar, table in tables
            for key, *place in zip(*(table[name].to_pylist() for name in columns[2:]), strict=True)
        ]
        vectors, readable, reasons = self._describe(photos, f"describing {dataset.place}", parts)
        failures = dict.fromkeys(f"{photos[i].tar}: {reason}" for i, reason in reasons.items())
        kept = np.flatnonzero(readable)
        for reason in list(failures)[:5]:
            self.say(f"left out: {reason}")
        if failures:
            missing = format_count(len(photos) - len(kept), "photo")
            self.say(
                f"{dataset.place}: {missing} left out; mend them: python shards/verify.py {dataset.place} --repair"
            )
        if len(kept) == 0:
            raise JobError(f"{dataset.place}: no readable photo")
        east, north = (np.concatenate([table[axis].to_numpy() for _, table in tables])[kept] for axis in columns[:2])
        return Images(_rows(vectors, kept), east, north, tuple(photos[i].name for i in kept))

    def database(self, place: str, cache: Path) -> Images:
        """The database's descriptors: read from a file or from `cache`, or made of the photos of a folder, a list or a
        data set (in a folder or at a URL) and kept in `cache`."""
        path, classes = Path(place), self.localiser.classes
        if path.is_file() and not is_list(path):
            return read_descriptors(path, classes.zone, southern=classes.southern)
        source: Dataset | Queries
        if is_url(place) or (path / MANIFEST).exists():
            source = Dataset.open(place)
        else:
            source = self.localiser.list_queries(path)
        count = source.manifest.images if isinstance(source, Dataset) else len(source)
        _check_memory(place, count, self.localiser.model.descriptor_dim)
        fingerprint = _fingerprint(self.localiser, source)
        if (found := _read_arrays(cache, fingerprint)) is not None:
            self.say(f"{cache}: {len(found['descriptors']):,} descriptors made before")
            return Images(found["descriptors"], found["east"], found["north"], tuple(_read_texts(found["names"])))
        parts = cache.with_name(f"{cache.stem}-parts-{fingerprint[:16]}") if count > _PART else None
        if parts:
            parts.mkdir(exist_ok=True)
        images = self.shards(source, parts) if isinstance(source, Dataset) else self.photos(source, parts)
        _write_arrays(
            cache,
            {
                "descriptors": images.vectors,
                "east": images.east,
                "north": images.north,
                "names": _to_bytes(images.names),
                "fingerprint": np.array(fingerprint),
            },
        )
        for done in cache.parent.glob(f"{cache.stem}-parts-*"):
            shutil.rmtree(done)
        return images

    def _describe(
        self, photos: Sequence[Photo], title: str, parts: Path | None
    ) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """Descriptors float32 [K, D], bool [K] whether a photo could be read, and by number why one could not."""
        vectors = np.zeros((len(photos), self.localiser.model.descriptor_dim), np.float32)
        readable = np.zeros(len(photos), dtype=bool)
        reasons: dict[int, str] = {}
        for first in range(0, len(photos), _PART):
            part = slice(first, first + _PART)
            file = parts and parts / f"{first}.npz"
            found = _read_arrays(file) if file else None
            if found is None:
                failures: dict[int, str] = {}
                batches = read_queries(
                    photos[part],
                    shorter_side=self.localiser.shorter_side,
                    batch_size=self.batch_size,
                    threads=self.threads,
                    on_failure=failures.__setitem__,
                )
                bar = f"{title}, those from {first + 1:,} on of {len(photos):,}" if file else title
                model, device = self.localiser.model, self.localiser.device
                described = describe_batches(model, batches, len(photos[part]), device=device, title=bar)
                found = {
                    "vectors": described.vectors.numpy(),
                    "readable": described.readable,
                    "failed": np.array(list(failures), np.int64),
                    "reasons": _to_bytes(list(failures.values())),
                }
                if file:
                    _write_arrays(file, found)
            vectors[part], readable[part] = found["vectors"], found["readable"]
            reasons |= dict(zip((first + found["failed"]).tolist(), _read_texts(found["reasons"]), strict=True))
        return vectors, readable, reasons


def _rows(vectors: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """`vectors[kept]`, without a copy where that is all of them: of a million photos they are gigabytes."""
    return vectors if len(kept) == len(vectors) else vectors[kept]


def read_descriptors(path: Path, zone: int = 0, *, southern: bool = False) -> Images:
    """Descriptors that any model made: `.npz` with `descriptors` [K, D] and `names` [K], or `.npy` beside a `.txt`.

    Names carry UTM positions, which are brought into `zone` (0: as they are) and its hemisphere. Vectors are scaled to
    unit length. Raises JobError for anything else.
    """
    if path.suffix not in (".npz", ".npy"):
        what = "no descriptors (.npz, or .npy beside .txt), no folder or list (.csv, .parquet) of photos, no data set"
        raise JobError(f"{path}: {what}")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                vectors, names = file["descriptors"], _read_texts(file["names"])
        else:
            vectors = np.load(path, allow_pickle=False)
            names = path.with_suffix(".txt").read_text("utf-8-sig").rstrip().splitlines()
        vectors = vectors.astype(np.float32)
    except Exception as error:  # numpy and zipfile raise anything of a damaged file
        reason = "damaged, or no array of numbers" if "allow_pickle" in str(error) else error
        raise JobError(f"{path}: no descriptors with names ({reason})") from error
    if vectors.ndim != 2 or len(vectors) != len(names):
        raise JobError(f"{path}: descriptors of shape {list(vectors.shape)} for {len(names)} names; give each its name")
    if vectors.size == 0:
        raise JobError(f"{path}: holds no descriptors")
    places = places_of_names(names)
    for row in np.flatnonzero(np.isnan(places.east)):
        try:
            parse_name(names[row])
        except BadName as error:
            raise JobError(f"{path}: {printable(names[row])}: {error}") from error
    _, unfit = bring_into_zone(places, zone, southern)
    if unfit:
        first = min(unfit)
        raise JobError(f"{path}: {printable(names[first])}: {unfit[first]}")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(lengths).all():
        name = names[int(np.flatnonzero(~np.isfinite(lengths))[0])]
        raise JobError(f"{path}: the descriptor of {name} holds numbers that are not finite; make it again")
    vectors /= np.maximum(lengths, 1e-12)
    return Images(vectors, places.east, places.north, tuple(names))


def _check_memory(database: str, count: int, dim: int) -> None:
    """Raise JobError where the descriptors of so many photos, and their copy in a search, are more than the memory."""
    needed, memory = 2 * 4 * count * dim, limits.memory()
    if needed > memory:
        raise JobError(
            f"{database}: the descriptors of {count:,} photos and their copy for a search take {format_bytes(needed)} "
            f"of memory, and {format_bytes(memory)} may be used here, which holds {memory // (8 * dim):,}; name fewer "
            "photos: a folder of a part of the city, or a list (.csv, .parquet)"
        )


def _read_arrays(path: Path, fingerprint: str | None = None) -> dict[str, np.ndarray] | None:
    """The arrays of an .npz, None where it is not there, damaged or of another fingerprint."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file) if fingerprint is None or str(file["fingerprint"]) == fingerprint else None
    except Exception:  # numpy and zipfile raise anything of a damaged file
        return None


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with atomic_path(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _to_bytes(texts: Sequence[str]) -> np.ndarray:
    """Texts as JSON in an array of bytes, uint8: one of texts gives each the room of the longest."""
    return np.frombuffer(json.dumps(texts).encode(), np.uint8)


def _read_texts(array: np.ndarray) -> list[str]:
    """The texts of `_to_bytes`, or of an array of texts, as other programs and earlier versions write them."""
    if array.dtype == np.uint8:
        return [str(text) for text in json.loads(array.tobytes())]
    return array.astype(str).tolist()


def _fingerprint(localiser: Localiser, source: Dataset | Queries) -> str:
    """What a database's descriptors depend on: the model's weights, the list, and the photos' (or shards') names, sizes
    and times of change."""
    place = (source.path if isinstance(source, Dataset) else source.source).resolve()
    digest = hashlib.sha256(f"{place} {localiser.shorter_side}\n".encode())
    digest.update(localiser.fingerprint.partition("-")[0].encode())
    if isinstance(source, Dataset):
        files = {str(file): file for file in sorted(place.rglob("*"))}
    else:
        files = dict(zip(source.names, source.paths, strict=True))
        digest.update(place.read_bytes() if is_list(place) else b"")
    for name, file in files.items():
        try:
            status = file.stat()
        except (OSError, ValueError):  # a photo that is not there, or never can be
            continue
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "replace"))
    return digest.hexdigest()
