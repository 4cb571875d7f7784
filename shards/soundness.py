"""Whether one shard, or one group of the flat index, is what its sample tables say.

A tar follows from its table: the shard writer, given the table's keys and labels and the tar's photos, must write the
same tar, the same DALI index and the same offsets, sizes and checksums once more.
"""

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from shards.checksums import checksum
from shards.classes import ClassTable, grid_index
from shards.console import JobError, format_count, is_systems, one_line, printable
from shards.files import read_table
from shards.index import gather
from shards.layout import INDEX, SAMPLE_COLUMNS, SHARD_KINDS, group_name, shard_numbers
from shards.writer import TAR_BLOCK, ShardWriter

READ_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError)
"""What reading damaged Parquet or JSON raises."""

_LONGEST_KEY = 95
_LISTED_SAMPLES = 10
_LARGEST_PHOTO = 1 << 28
_COUNTED_FACTS = ("group", "number", "images", "jpeg_bytes", "tar_bytes")
_FROM_TAR = ("key", "label", "offset", "size", "crc32")


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the file (path in the data set), what is wrong with it, and the sample's key.

    `kind`: `damaged`, `missing`, or `extra` (does not belong to the data set).
    """

    file: str
    what: str
    sample: str = ""
    kind: Literal["damaged", "missing", "extra"] = "damaged"

    def __str__(self) -> str:
        return f"{printable(self.file)}: {f'sample {self.sample}: ' if self.sample else ''}{self.what}"


@dataclass
class ShardReport:
    """What was found in a shard: problems, images, bytes of its tar (on disk and by its table) and of its JPEGs, its
    labels with the images of each (both [K]), first and last key. `complete`: its table could be read."""

    stem: str
    problems: list[Problem] = field(default_factory=list)
    complete: bool = False
    images: int = 0
    tar_bytes: int = 0
    tar_bytes_by_table: int = 0
    jpeg_bytes: int = 0
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    images_per_label: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    first_key: str = ""
    last_key: str = ""


def check_shard(dataset: Path, stem: str, sums: dict[str, str] | None, classes: ClassTable | None) -> ShardReport:
    """Check tar, DALI index and sample table of the shard `stem` (path in the data set, without extension).

    `sums` are the checksums of the data set's files, if it has any; `classes` its class table, if that can be read.
    """
    report = ShardReport(stem)
    names = {kind: f"{stem}.{kind}" for kind in SHARD_KINDS}
    present = {kind: (dataset / name).is_file() for kind, name in names.items()}
    report.problems += [
        Problem(names[kind], "missing", kind="missing") for kind, is_there in present.items() if not is_there
    ]
    for kind in ("idx", "parquet"):
        if present[kind] and (problem := check_sum(dataset, names[kind], sums)):
            report.problems.append(problem)
            present[kind] = False
    if present["tar"]:
        report.tar_bytes = (dataset / names["tar"]).stat().st_size
    if not present["parquet"]:
        return report
    try:
        table, facts = read_sample_table(dataset / names["parquet"])
    except READ_ERRORS as error:
        report.problems.append(Problem(names["parquet"], f"not a sample table ({one_line(error)})"))
        return report
    _count(report, table, facts, classes)
    if present["tar"]:
        try:
            again = _check_tar(dataset / names["tar"], names["tar"], table, report)
        except OSError as error:
            report.problems.append(Problem(names["tar"], one_line(error)))
            return report
        if again is not None and facts["tar_bytes"] != again.position:
            what = f"notes a tar of {facts['tar_bytes']} bytes, but it is of {again.position}"
            report.problems.append(Problem(names["parquet"], what))
        if again is not None and present["idx"] and (dataset / names["idx"]).read_bytes() != again.dali_index():
            report.problems.append(Problem(names["idx"], "does not describe its tar"))
    return report


def check_sum(dataset: Path, name: str, sums: dict[str, str] | None) -> Problem | None:
    """The problem of a file that cannot be read or differs from its entry in `checksums.txt`, or None."""
    try:
        if sums is not None and name in sums and checksum(dataset / name) != sums[name]:
            return Problem(name, "differs from its checksum")
        with open(dataset / name, "rb") as file:
            file.read(1)
    except OSError as error:
        return Problem(name, one_line(error))
    return None


def read_sample_table(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    """A sample table and the facts kept with it; raises one of `READ_ERRORS` where it is something else."""
    table = read_table(path)
    table.validate(full=True)
    for column in SAMPLE_COLUMNS:
        if table.schema.field(column.name).type != column.type:
            raise ValueError(f"the column {column.name!r} is {table.schema.field(column.name).type}")
        if table[column.name].null_count:
            raise ValueError(f"the column {column.name!r} has empty fields")
    facts = json.loads(table.schema.metadata[b"shard"])
    if not isinstance(facts, dict) or not all(isinstance(facts.get(name), int) for name in _COUNTED_FACTS):
        raise ValueError("its facts are damaged")
    keys = table["key"].to_pylist()
    numbers = all(key.isascii() and key.isdigit() and len(key) <= _LONGEST_KEY for key in keys)
    if not numbers or any(a >= b for a, b in pairwise(keys)):
        raise ValueError("its keys are not ascending numbers")
    sizes = table["size"].to_numpy()
    if len(sizes) and not 0 < sizes.min() <= sizes.max() <= _LARGEST_PHOTO:
        raise ValueError(f"sizes from {sizes.min()} to {sizes.max()} bytes")
    return table, facts


def index_of_table(table: pa.Table) -> bytes:
    """The DALI index of the tar that a sample table describes."""
    with open(os.devnull, "wb") as nowhere:
        writer = ShardWriter(nowhere)
        for key, label, size in zip(*(table[name].to_pylist() for name in ("key", "label", "size")), strict=True):
            writer.add(key, label, bytes(size), **_blank_facts())
    return writer.dali_index()


def check_group_index(dataset: Path, group: int, tables: list[Path], labels: int) -> list[Problem]:
    """Compare the flat index of a group, byte for byte, with its sample tables (all of them, in order).

    `labels`: how many classes the group has. Nothing is said where a table has others: `check_shard` tells.
    """
    problems = []
    try:
        arrays = gather(tables, labels)
    except JobError:
        return []
    for name, values in arrays.items():
        file = f"{INDEX}/{group_name(group)}.{name}.npy"
        saved = io.BytesIO()
        np.save(saved, values)
        if not (dataset / file).is_file():
            problems.append(Problem(file, "missing", kind="missing"))
            continue
        try:
            if (dataset / file).read_bytes() != saved.getvalue():
                problems.append(Problem(file, "does not agree with the sample tables"))
        except OSError as error:
            problems.append(Problem(file, one_line(error)))
    return problems


@contextmanager
def damaged_tables_named(place: str) -> Iterator[None]:
    """Turn what reading a damaged Parquet file raises into a `JobError` that names the data set and the way out."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if is_systems(error):
            raise
        raise JobError(f"{place}: a table is damaged ({one_line(error)}); run shards/verify.py {place}") from None


def _blank_facts() -> dict[str, None]:
    return {name: None for name in SAMPLE_COLUMNS.names if name not in _FROM_TAR}


def _count(report: ShardReport, table: pa.Table, facts: dict[str, Any], classes: ClassTable | None) -> None:
    """Fill the report's counts, and check the table against itself and the class table."""
    name, keys, labels = f"{report.stem}.parquet", table["key"].to_pylist(), table["label"].to_numpy()
    group, number = shard_numbers(report.stem)
    report.complete, report.images = True, len(table)
    report.jpeg_bytes = int(table["size"].to_numpy().sum())
    report.tar_bytes_by_table = facts["tar_bytes"]
    report.first_key, report.last_key = (keys[0], keys[-1]) if keys else ("", "")
    known = {"group": group, "number": number, "images": report.images, "jpeg_bytes": report.jpeg_bytes}
    for fact, value in known.items():
        if facts[fact] != value:
            report.problems.append(Problem(name, f"notes {fact} {facts[fact]}, but it is {value}"))
    if (labels < 0).any():
        report.problems.append(Problem(name, "negative labels"))
        return
    report.labels, report.images_per_label = np.unique(labels, return_counts=True)
    if classes is None:
        return
    cells = classes.of_group(group)
    foreign = labels >= len(cells)
    at = np.where(foreign, 0, labels)
    for axis, corner in (("east", cells.cell_east), ("north", cells.cell_north)):
        if len(corner):
            metres = table[axis].to_numpy()
            near = abs(metres - corner[at]) <= classes.M  # of what is a hair west or south of 0 the difference is M
            foreign |= ~near | (grid_index(np.where(near, metres, 0), classes.M) * classes.M != corner[at])
    whats = {int(row): f"lies outside the cell of its label {labels[row]}" for row in np.flatnonzero(foreign)}
    report.problems += _listed(name, keys, whats)


def _check_tar(path: Path, name: str, table: pa.Table, report: ShardReport) -> ShardWriter | None:
    """Write the tar once more in memory, sample by sample, beside the one on disk; None where that is cut short."""
    keys, labels, sizes = (table[column].to_pylist() for column in ("key", "label", "size"))
    whats: dict[int, str] = {}
    blank = _blank_facts()
    sink = io.BytesIO()
    writer = ShardWriter(sink)
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for row, (key, label, size) in enumerate(zip(keys, labels, sizes, strict=True)):
            photo_end = TAR_BLOCK + size + -size % TAR_BLOCK
            frame = os.pread(file, photo_end + 2 * TAR_BLOCK, writer.position)
            if len(frame) < photo_end + 2 * TAR_BLOCK:
                report.problems += _listed(name, keys, whats)
                left = format_count(len(keys) - row)
                what = f"the file ends here, at byte {report.tar_bytes}; {left} samples are cut off"
                report.problems.append(Problem(name, what, key))
                return None
            writer.add(key, label, frame[TAR_BLOCK : TAR_BLOCK + size], **blank)
            expected = sink.getvalue()
            sink.seek(0)
            sink.truncate()
            if frame != expected:
                whats[row] = f"{_part(frame, expected, photo_end)} is damaged"
        end_at = writer.position
        writer.finish()
        end = os.pread(file, len(sink.getvalue()) + 1, end_at)
    finally:
        os.close(file)
    for column, what in (("crc32", "the photo fails its checksum"), ("offset", "the table's offset is wrong")):
        wrong = np.flatnonzero(table[column].to_numpy() != np.array(writer.columns[column], np.int64))
        whats |= {int(row): what for row in wrong}
    report.problems += _listed(name, keys, whats)
    if end != sink.getvalue():
        whole = len(end) == len(sink.getvalue())
        what = f"{report.tar_bytes} bytes long instead of {writer.position}"
        report.problems.append(Problem(name, "the end of the archive is damaged" if whole else what))
    return writer


def _part(frame: bytes, expected: bytes, photo_end: int) -> str:
    """The part of a sample in which its bytes first differ from what is expected."""
    at = next(i for i, (a, b) in enumerate(zip(frame, expected, strict=True)) if a != b)
    if at < TAR_BLOCK:
        return "the photo's tar header"
    if at < photo_end:
        return "the padding after the photo"
    return "the label's tar header" if at < photo_end + TAR_BLOCK else "the label"


def _listed(name: str, keys: list[str], whats: dict[int, str]) -> list[Problem]:
    """A problem for each sample, up to a number."""
    rows = sorted(whats)
    problems = [Problem(name, whats[row], keys[row]) for row in rows[:_LISTED_SAMPLES]]
    if len(rows) > _LISTED_SAMPLES:
        problems.append(Problem(name, f"{format_count(len(rows) - _LISTED_SAMPLES)} more samples like these"))
    return problems
