"""Where photos come from: a walk over a folder tree, cached beside the output."""

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.console import JobError, printable
from shards.files import atomic_path
from shards.photo_list import PathColumn
from shards.photo_tree import walk_photos
from shards.plane import Places

_BATCH = 100_000


@dataclass(frozen=True)
class Bad:
    """A photo that was set aside: its path relative to the source, a reason to count by, and what was seen.

    `sample`: what was planned for it (group, label, east, north, heading, timestamp); None where it was set aside
    before it had a label, by its name or its row in a list.
    """

    source: str
    reason: str
    detail: str = ""
    sample: dict[str, Any] | None = None

    def facts(self) -> dict[str, Any]:
        """The values as JSON, without those that are missing."""
        return {name: value for name, value in vars(self).items() if value is not None}


def list_reasons(counts: Counter[str]) -> str:
    """How many photos were set aside for each reason, in words, most first; "" for none."""
    return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())


def reasons_of(bad: Iterable[Bad]) -> str:
    """`list_reasons` of photos that were set aside."""
    return list_reasons(Counter(b.reason for b in bad))


@dataclass(frozen=True)
class Listing:
    """The photos of a source: `paths` (large_string [n], relative to the folder or URL `root`), those set aside
    already, how many other files there were, the time stamp of every folder (nanoseconds), what a list says of each
    photo (`places`, None where the names say it), and whether a walk found them just now (`fresh`), not a cache."""

    root: Path | str
    paths: pa.Array
    bad: list[Bad]
    others: int = 0
    folders: dict[str, int] = field(default_factory=dict)
    places: Places | None = None
    fresh: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def found(self) -> int:
        """How many photos there are, with those set aside."""
        return len(self.paths) + len(self.bad)


def list_photos(
    root: Path, cache: Path | None, progress: Callable[[int], None], *, as_recorded: bool = False
) -> Listing:
    """List the photos below `root`, from `cache` where no folder has changed since it was written, or in any case
    where `as_recorded`.

    `progress` is called with the number of photos found so far. Raises `JobError` where a folder cannot be read.
    """
    if not root.is_dir():
        what = "is a file, and no list (.csv, .parquet)" if root.exists() else "no such folder of photos"
        raise JobError(f"{root}: {what}")
    if cache is not None and (listing := load_listing(root, cache, as_recorded)) is not None:
        progress(len(listing))
        return listing
    paths = PathColumn()
    batch: list[str] = []
    bad: list[Bad] = []
    folders: dict[str, int] = {}
    others = 0
    for kind, path in walk_photos(root, folders):
        if kind == "photo":
            batch.append(path)
            if len(batch) == _BATCH:
                paths.add(pa.array(batch, pa.large_string()))
                batch.clear()
                progress(len(paths))
        elif kind == "other":
            others += 1
        else:
            bad.append(Bad(printable(path), kind))
    paths.add(pa.array(batch, pa.large_string()))
    progress(len(paths))
    return Listing(root, paths.array(), bad, others, folders, fresh=True)


def store_listing(listing: Listing, cache: Path) -> None:
    """Write the photos, then those set aside (with a reason), then the folders (with their time)."""
    bad, folders = listing.bad, listing.folders
    paths = [listing.paths, *(pa.array(part, pa.large_string()) for part in ([b.source for b in bad], list(folders)))]
    reasons = pa.chunked_array(
        [pa.nulls(len(listing), pa.string()), pa.array([b.reason for b in bad] + [None] * len(folders), pa.string())]
    )
    times = pa.chunked_array(
        [pa.nulls(len(listing) + len(bad), pa.int64()), pa.array(list(folders.values()), pa.int64())]
    )
    facts = {"root": _absolute(listing.root), "others": str(listing.others), "photos": str(len(listing))}
    table = pa.table({"path": pa.chunked_array(paths), "reason": reasons, "time": times})
    with atomic_path(cache) as partial:
        pq.write_table(table.replace_schema_metadata(facts), partial)


def _absolute(root: Path | str) -> str:
    return root if isinstance(root, str) else printable(str(root.resolve()))  # a folder above may not be UTF-8


def load_listing(root: Path | str, cache: Path, as_recorded: bool) -> Listing | None:
    """The cached listing, or None where there is none for this root, it is damaged, or a folder's time has changed."""
    try:
        file = pq.ParquetFile(cache)
        facts = file.schema_arrow.metadata or {}
        photos, others = int(facts[b"photos"]), int(facts[b"others"])
        if facts[b"root"].decode() != _absolute(root):
            return None
    except (OSError, KeyError, pa.ArrowInvalid):
        return None
    paths, rest = PathColumn(), []
    try:
        for batch in file.iter_batches(_BATCH):
            own = min(photos - len(paths), len(batch))
            paths.add(batch["path"].slice(0, own))
            rest += batch.slice(own).to_pylist()
    except (OSError, pa.ArrowInvalid):
        return None
    folders = {row["path"]: row["time"] for row in rest if row["time"] is not None}
    for folder, time in () if as_recorded else folders.items():
        try:
            status = os.stat(os.path.join(root, folder))
        except OSError:
            return None
        if not stat.S_ISDIR(status.st_mode) or status.st_mtime_ns != time:
            return None
    bad = [Bad(row["path"], row["reason"]) for row in rest if row["time"] is None]
    return Listing(root, paths.array(), bad, others, folders)
