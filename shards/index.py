"""The flat index: per group, arrays mapped into memory that tell where each photo of each class lies.

Derived from the sample tables and rebuilt when they change. 20 bytes a sample, shared by all processes of a
host through the page cache: 820 MB for 41 million photos.
"""

import errno
import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import pyarrow as pa

from shards.classes import ClassTable
from shards.console import JobError, is_systems, one_line
from shards.files import atomic_folder, named, read_bytes, read_table
from shards.layout import CLASSES, INDEX, group_name, shard_tables
from shards.locks import locked

_COLUMNS = {"shard": np.uint32, "offset": np.uint64, "size": np.uint32, "crc32": np.uint32}
INDEX_ARRAYS = ("starts", *_COLUMNS)
"""The names of a group's arrays; see `GroupIndex`."""

_TAIL = 8192  # bytes at a table's end: its footer, with the range of every column, and some of its checksums
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class GroupIndex:
    """Where the photos of one group lie, class by class.

    Photos of label c are the rows `starts[c]:starts[c + 1]` of `shard` (uint32: number in `shards`), `offset`
    (uint64, bytes from the tar's start), `size` (uint32, bytes of the JPEG) and `crc32` (uint32). Rows of a class
    in the same shard are in file order. `labels` (int64 [K]) are those that have photos.
    """

    group: int
    shards: list[Path]
    starts: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    crc32: np.ndarray
    labels: np.ndarray


def open_index(dataset: Path, classes: ClassTable) -> dict[int, GroupIndex]:
    """Map the index of a data set into memory, building it first where it is missing or out of date.

    A data set on a read-only disk without an index is read from its tables into memory. Raises `JobError` where tables
    or index are damaged or do not hold as many photos of each class as `classes` says.
    """
    tables = shard_tables(dataset)
    if not tables:
        raise JobError(f"{dataset}: no shards; run preprocessing/build_shards.py")
    folder = dataset / INDEX
    state = _state(tables)
    with locked(dataset / CLASSES):  # of several trainings that start together one builds it
        if not _is_current(folder, state):
            built = _gather_groups(tables, classes)
            for group, arrays in built.items():
                if fault := _fault(group, arrays, tables, classes):
                    raise JobError(
                        f"{dataset}: its sample tables do not fit {CLASSES} ({fault}); finish the command that was "
                        "changing the data set, or run shards/verify.py"
                    )
            try:
                _store(folder, state, built)
            except OSError as error:
                if error.errno not in _READ_ONLY:
                    raise
                return {g: _index(g, tables, arrays) for g, arrays in built.items()}
        mapped = {group: _map(folder, group) for group in classes.groups}
    for group, arrays in mapped.items():
        if fault := _fault(group, arrays, tables, classes):
            raise _damaged(folder, fault)
    return {group: _index(group, tables, arrays) for group, arrays in mapped.items()}


def build_index(dataset: Path, classes: ClassTable) -> None:
    """Write the index of a data set from its sample tables."""
    tables = shard_tables(dataset)
    _store(dataset / INDEX, _state(tables), _gather_groups(tables, classes))


def _gather_groups(tables: list[Path], classes: ClassTable) -> dict[int, dict[str, np.ndarray]]:
    return {g: gather(_of_group(tables, g), classes.count(g)) for g in classes.groups}


def _of_group(tables: list[Path], group: int) -> list[Path]:
    return [t for t in tables if t.parent.name == group_name(group)]


def _state(tables: list[Path]) -> str:
    digest = hashlib.sha256(" ".join(INDEX_ARRAYS).encode())
    for table in tables:
        with named(table), open(table, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL))
            digest.update(f"{table.name} {size}\n".encode())
            digest.update(file.read())
    return digest.hexdigest()


def _fault(group: int, arrays: dict[str, np.ndarray], tables: list[Path], classes: ClassTable) -> str | None:
    """What keeps a group's arrays from being those of these classes in these shards."""
    images = classes.of_group(group).images
    photos = int(images.sum())
    if not np.array_equal(arrays["starts"], np.concatenate([[0], np.cumsum(images)])):
        return f"group {group}: other numbers of photos a class"
    if any(len(arrays[name]) != photos for name in _COLUMNS):
        return f"group {group}: an array that is not of {photos} photos"
    if photos and (arrays["shard"].max() >= len(_of_group(tables, group)) or arrays["offset"].max() >= 1 << 63):
        return f"group {group}: a place outside the shards"
    return None


def _damaged(folder: Path, what: object) -> JobError:
    return JobError(f"{folder}: damaged ({what}); delete it, it is rebuilt from the tables")


def _is_current(folder: Path, state: str) -> bool:
    try:
        return read_bytes(folder / "state") == state.encode()
    except FileNotFoundError:
        return False
    except NotADirectoryError as error:
        raise _damaged(folder, one_line(error)) from None


def gather(tables: list[Path], labels: int) -> dict[str, np.ndarray]:
    """The arrays of a group's index, by name, from its sample tables (all of them, in order); see `GroupIndex`.

    `labels`: how many classes the group has. Raises `JobError` where a table is damaged or has other labels.
    """
    parts = [read_samples(t, ["label", "offset", "size", "crc32"]) for t in tables]
    shards = [np.full(len(part), number) for number, part in enumerate(parts)]
    columns = {name: [part[name].to_numpy() for part in parts] for name in ("label", "offset", "size", "crc32")}
    columns["shard"] = shards
    gathered = {name: np.concatenate([np.empty(0, np.int64), *values]) for name, values in columns.items()}
    label = gathered.pop("label").astype(np.int64)
    if tables:
        check_labels(tables[0].parent, label, labels)
    order = np.argsort(label, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(label, minlength=labels))])
    return {"starts": starts} | {name: values[order].astype(_COLUMNS[name]) for name, values in gathered.items()}


def check_labels(place: Path, label: np.ndarray, labels: int) -> None:
    """Raise `JobError` where photos in `place` have labels (int [n]) that a group of so many classes has not."""
    if len(label) and not 0 <= label.min() <= label.max() < labels:
        raise JobError(
            f"{place}: labels from {label.min()} to {label.max()}, where {CLASSES} has {labels} classes; "
            "run shards/verify.py"
        )


def read_samples(table: Path, columns: list[str], filters: list[tuple[str, str, Any]] | None = None) -> pa.Table:
    """Columns of a sample table, of the rows that pass the `filters` of `pq.read_table`; `JobError` for damage."""
    with damage_named(table):
        return read_table(table, columns, filters)


@contextmanager
def damage_named(table: Path) -> Iterator[None]:
    """Turn what reading a damaged or missing sample table raises into a `JobError` that names it and the way out."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        lost = isinstance(error, FileNotFoundError)
        if is_systems(error) and not lost:
            raise
        what = "missing" if lost else f"damaged ({one_line(error)})"
        raise JobError(f"{table}: {what}; run shards/verify.py --repair") from None


def _store(folder: Path, state: str, groups: dict[int, dict[str, np.ndarray]]) -> None:
    try:
        with atomic_folder(folder, replace=True) as partial:
            for group, arrays in groups.items():
                for name in INDEX_ARRAYS:
                    np.save(partial / f"{group_name(group)}.{name}.npy", arrays[name])
            (partial / "state").write_text(state)
    except OSError:
        if not _is_current(folder, state):  # else another host was faster
            raise


def _map(folder: Path, group: int) -> dict[str, np.ndarray]:
    try:
        with named(folder):
            return {name: _map_array(folder / f"{group_name(group)}.{name}.npy") for name in INDEX_ARRAYS}
    except (OSError, ValueError, TokenError) as error:
        if is_systems(error) and not isinstance(error, FileNotFoundError):
            raise
        raise _damaged(folder, one_line(error)) from None


def _map_array(path: Path) -> np.ndarray:
    """The array of a file of NumPy's, mapped into memory. A map of Python's own, as `np.load` makes it, keeps a
    descriptor each: a process may have too few for hundreds of groups."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        begin = file.tell()
        # Draws touch it at random: one pass now, not a seek for each on a hard disk.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    with pa.memory_map(str(path)) as mapped:
        return np.frombuffer(mapped.read_buffer(), dtype, math.prod(shape), begin)


def _index(group: int, tables: list[Path], arrays: dict[str, np.ndarray]) -> GroupIndex:
    shards = [t.with_suffix(".tar") for t in _of_group(tables, group)]
    labels = np.flatnonzero(np.diff(arrays["starts"]))
    return GroupIndex(group, shards, **arrays, labels=labels)
