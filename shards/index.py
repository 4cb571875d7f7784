"""The flat index: per group, arrays mapped into memory that tell where each photo of each class lies.

Derived from the sample tables and rebuilt when they change. 20 bytes a sample, shared by all processes of a
host through the page cache: 820 MB for 41 million photos.
"""

import hashlib
import mmap
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from shards.console import JobError
from shards.files import atomic_folder
from shards.layout import INDEX, group_name, shard_tables

_COLUMNS = {"shard": np.uint32, "offset": np.uint64, "size": np.uint32, "crc32": np.uint32}
_ARRAYS = ("starts", *_COLUMNS)


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


def open_index(dataset: Path, groups: list[int]) -> dict[int, GroupIndex]:
    """Map the index of a data set into memory, building it first where it is missing or out of date.

    A data set on a read-only disk without an index is read from its tables into memory.
    """
    tables = shard_tables(dataset)
    if not tables:
        raise JobError(f"{dataset}: no shards; run preprocessing/build_shards.py")
    folder = dataset / INDEX
    state = _state(tables)
    built: dict[int, dict[str, np.ndarray]] = {}
    if not _is_current(folder, state):
        built = {g: gather(_of_group(tables, g)) for g in groups}
        try:
            _store(folder, state, built)
        except PermissionError:
            return {g: _index(g, tables, arrays) for g, arrays in built.items()}
    return {g: _index(g, tables, _map(folder, g)) for g in groups}


def build_index(dataset: Path, groups: list[int]) -> None:
    """Write the index of a data set from its sample tables."""
    tables = shard_tables(dataset)
    _store(dataset / INDEX, _state(tables), {g: gather(_of_group(tables, g)) for g in groups})


def _of_group(tables: list[Path], group: int) -> list[Path]:
    return [t for t in tables if t.parent.name == group_name(group)]


def _state(tables: list[Path]) -> str:
    digest = hashlib.sha256(" ".join(_ARRAYS).encode())
    for table in tables:
        digest.update(f"{table.name} {table.stat().st_size}\n".encode())
        digest.update(table.read_bytes()[-64:])
    return digest.hexdigest()


def _is_current(folder: Path, state: str) -> bool:
    try:
        return (folder / "state").read_text() == state
    except FileNotFoundError:
        return False


def gather(tables: list[Path]) -> dict[str, np.ndarray]:
    """The arrays of a group's index, by name, from its sample tables (all of them, in order); see `GroupIndex`."""
    parts = [pq.read_table(t, columns=["label", "offset", "size", "crc32"]) for t in tables]
    shards = [np.full(len(part), number) for number, part in enumerate(parts)]
    columns = {name: [part[name].to_numpy() for part in parts] for name in ("label", "offset", "size", "crc32")}
    columns["shard"] = shards
    gathered = {name: np.concatenate([np.empty(0, np.int64), *values]) for name, values in columns.items()}
    label = gathered.pop("label").astype(np.int64)
    order = np.argsort(label, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(label, minlength=1))])
    return {"starts": starts} | {name: values[order].astype(_COLUMNS[name]) for name, values in gathered.items()}


def _store(folder: Path, state: str, groups: dict[int, dict[str, np.ndarray]]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with atomic_folder(folder) as partial:
            for group, arrays in groups.items():
                for name in _ARRAYS:
                    np.save(partial / f"{group_name(group)}.{name}.npy", arrays[name])
            (partial / "state").write_text(state)
    except OSError:
        if not _is_current(folder, state):  # else another host was faster
            raise


def _map(folder: Path, group: int) -> dict[str, np.ndarray]:
    try:
        arrays = {name: np.load(folder / f"{group_name(group)}.{name}.npy", mmap_mode="r") for name in _ARRAYS}
        for array in arrays.values():  # draws touch it at random: one pass now, not a seek for each on a hard disk
            array._mmap.madvise(mmap.MADV_WILLNEED)
        return {name: np.asarray(array) for name, array in arrays.items()}  # a memmap's elements are slow to get
    except (OSError, ValueError) as error:
        raise JobError(f"{folder}: damaged ({error}); delete that folder, it is rebuilt from the tables") from None


def _index(group: int, tables: list[Path], arrays: dict[str, np.ndarray]) -> GroupIndex:
    shards = [t.with_suffix(".tar") for t in _of_group(tables, group)]
    labels = np.flatnonzero(np.diff(arrays["starts"]))
    return GroupIndex(group, shards, **arrays, labels=labels)
