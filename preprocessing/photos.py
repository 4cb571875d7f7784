"""Where photos come from: a walk over a folder tree, cached beside the output."""

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.console import JobError, describe_os_error, printable
from shards.files import atomic_path

PHOTO_EXTENSIONS = (".jpg", ".jpeg", ".png")
_BATCH = 100_000


@dataclass(frozen=True)
class Bad:
    """A photo that was set aside: its path relative to the source, a reason to count by, and what was seen."""

    source: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Listing:
    """The photos below `root`: `paths` (large_string [n], relative, in order of a sorted walk), those set aside by
    name, how many other files there were, and the time stamp of every folder (nanoseconds)."""

    root: Path
    paths: pa.Array
    bad: list[Bad]
    others: int
    folders: dict[str, int]

    def __len__(self) -> int:
        return len(self.paths)


def list_photos(root: Path, cache: Path | None, progress: Callable[[int], None]) -> Listing:
    """List the photos below `root`, from `cache` where no folder has changed since it was written.

    `progress` is called with the number of photos found so far. Raises `JobError` where a folder cannot be read.
    """
    if not root.is_dir():
        raise JobError(f"{root}: no such folder of photos")
    if cache is not None and (listing := _load(root, cache)) is not None:
        progress(len(listing))
        return listing
    chunks: list[pa.Array] = []
    batch: list[str] = []
    bad: list[Bad] = []
    folders: dict[str, int] = {}
    others = 0
    for kind, path in _walk(root, "", folders, set()):
        if kind == "photo":
            batch.append(path)
            if len(batch) == _BATCH:
                chunks.append(pa.array(batch, pa.large_string()))
                batch.clear()
                progress(len(chunks) * _BATCH)
        elif kind == "other":
            others += 1
        else:
            bad.append(Bad(printable(path), kind))
    chunks.append(pa.array(batch, pa.large_string()))
    paths = pa.concat_arrays(chunks)
    progress(len(paths))
    listing = Listing(root, paths, bad, others, folders)
    if cache is not None:
        _store(listing, cache)
    return listing


def _walk(root: Path, folder: str, folders: dict[str, int], above: set[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """Yield (kind, relative path) below a folder in sorted order, each link to a folder once on any way down."""
    here = root / folder
    try:
        status = here.stat()
        entries = sorted(os.scandir(here), key=lambda e: os.fsencode(e.name))
    except OSError as error:
        raise JobError(f"cannot list the photos: {describe_os_error(error)}") from None
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return
    folders[folder] = status.st_mtime_ns
    for entry in entries:
        path = f"{folder}/{entry.name}" if folder else entry.name
        try:
            if entry.is_dir():
                yield from _walk(root, path, folders, above | {identity})
                continue
            regular = entry.is_file()
        except OSError:
            regular = False
        if not entry.name.lower().endswith(PHOTO_EXTENSIONS) or entry.name.startswith("."):
            yield "other", path
        elif not regular:
            yield "not a regular file", path
        elif not _is_text(path):
            yield "name is not UTF-8", path
        else:
            yield "photo", path


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _store(listing: Listing, cache: Path) -> None:
    table = pa.table(
        {
            "path": pa.chunked_array(
                [
                    listing.paths,
                    pa.array([b.source for b in listing.bad], pa.large_string()),
                    pa.array(list(listing.folders), pa.large_string()),
                ]
            ),
            "reason": pa.chunked_array(
                [
                    pa.nulls(len(listing), pa.string()),
                    pa.array([b.reason for b in listing.bad], pa.string()),
                    pa.array(["folder"] * len(listing.folders), pa.string()),
                ]
            ),
            "time": pa.chunked_array(
                [
                    pa.nulls(len(listing) + len(listing.bad), pa.int64()),
                    pa.array(list(listing.folders.values()), pa.int64()),
                ]
            ),
        }
    )
    facts = {"root": str(listing.root.resolve()), "others": str(listing.others)}
    with atomic_path(cache) as partial:
        pq.write_table(table.replace_schema_metadata(facts), partial)


def _load(root: Path, cache: Path) -> Listing | None:
    """The cached listing, or None where there is none for this root or a folder's time has changed."""
    try:
        table = pq.read_table(cache)
        facts = table.schema.metadata or {}
        if facts[b"root"].decode() != str(root.resolve()):
            return None
    except (FileNotFoundError, KeyError, pa.ArrowInvalid):
        return None
    of_folder = table.filter(pc.equal(table["reason"], "folder"))
    folders = dict(zip(of_folder["path"].to_pylist(), of_folder["time"].to_pylist(), strict=True))
    for folder, time in folders.items():
        try:
            status = os.stat(root / folder)
        except OSError:
            return None
        if not stat.S_ISDIR(status.st_mode) or status.st_mtime_ns != time:
            return None
    photos = table.filter(pc.is_null(table["reason"]))["path"].combine_chunks()
    if isinstance(photos, pa.ChunkedArray):
        photos = pa.concat_arrays(photos.chunks) if photos.num_chunks else pa.array([], pa.large_string())
    others = table.filter(pc.and_(pc.is_valid(table["reason"]), pc.not_equal(table["reason"], "folder")))
    bad = [Bad(p, r) for p, r in zip(others["path"].to_pylist(), others["reason"].to_pylist(), strict=True)]
    return Listing(root, photos, bad, int(facts[b"others"]), folders)
