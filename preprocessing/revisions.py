"""Revisions of a finished data set: photos that `--add` brought or `--retry-quarantined` got back, as new shards.

revisions/NNNNNN.parquet           planned samples: shard, label, place and source of each; it says "begun"
revisions/NNNNNN-classes.parquet   the class table from then on
revisions/NNNNNN-skipped.parquet   photos of cells with too few photos from then on
revisions/NNNNNN-bad.jsonl         photos that were set aside by their names, all until then

The first build is revision 1 and has no such files. New shards are written in a folder of their own and moved into
the data set when all of them are done, so readers never see half of a revision.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.photos import Bad
from preprocessing.plan import ShardTask, headings_and_timestamps
from preprocessing.sources import Source
from shards.classes import ClassTable
from shards.console import JobError, one_line
from shards.files import atomic_path, atomic_write_text, read_table
from shards.layout import REVISION_FILES, REVISIONS, SHARD_KINDS, shard_stem
from shards.plane import Places
from shards.soundness import READ_ERRORS

_STAGE = ".revision"
_ROW_GROUP = 1 << 20

PLANNED = pa.schema(
    [
        ("group", pa.int32()),
        ("number", pa.int32()),
        ("label", pa.int32()),
        ("east", pa.float64()),
        ("north", pa.float64()),
        ("heading", pa.float32()),
        ("timestamp", pa.string()),
        ("source", pa.large_string()),  # in memory; 41 million names are more bytes than a `string` column can have
    ]
)
SKIPPED_COLUMNS = pa.schema([PLANNED.field(name) for name in ("source", "east", "north", "heading", "timestamp")])


@dataclass(frozen=True)
class Revision:
    """What a revision brings: `samples` (columns `PLANNED`, in order of shard), of which source (None: those of the
    revisions before), and classes, skipped photos and bad names from then on. `photos`: how many were looked at."""

    number: int
    source: Source | None
    samples: pa.Table
    classes: ClassTable
    skipped: pa.Table
    bad: list[Bad]
    photos: int

    def save(self, out: Path) -> None:
        """Begin the revision: from here on it is finished before anything else is done with the data set."""
        stem = _stem(out, self.number)
        stem.parent.mkdir(exist_ok=True)
        self.classes.save(f"{stem}-classes.parquet")
        write_table(self.skipped, Path(f"{stem}-skipped.parquet"))
        write_bad(self.bad, Path(f"{stem}-bad.jsonl"))
        facts = {"photos": self.photos, "source": asdict(self.source) if self.source else None}
        write_table(self.samples.replace_schema_metadata({"revision": json.dumps(facts)}), Path(f"{stem}.parquet"))

    def withdraw(self, out: Path) -> None:
        """Undo `save`, and drop the shards that were gathered since; none of them may be published yet."""
        for name in self.files():
            (out / name).unlink()
        shutil.rmtree(stage(out), ignore_errors=True)

    def files(self) -> list[str]:
        """Its files below the data set's folder, the one that says "begun" first."""
        return [f"{_stem(Path(), self.number)}{name}" for name in reversed(REVISION_FILES)]

    @staticmethod
    def load(out: Path, number: int) -> "Revision":
        """Read a revision that `save` wrote; raises `JobError` where a file of it is lost or damaged."""
        stem = _stem(out, number)
        try:
            samples = read_table(f"{stem}.parquet").select(PLANNED.names)
            facts = json.loads(samples.schema.metadata[b"revision"])
            return Revision(
                number,
                Source(**facts["source"]) if facts["source"] else None,
                samples,
                ClassTable.load(f"{stem}-classes.parquet"),
                read_table(f"{stem}-skipped.parquet").select(SKIPPED_COLUMNS.names),
                read_bad(Path(f"{stem}-bad.jsonl")),
                facts["photos"],
            )
        except READ_ERRORS as error:
            raise JobError(
                f"{stem}.parquet: damaged, or a file beside it ({one_line(error)}); run shards/verify.py"
            ) from None

    def shards(self) -> list[tuple[int, int]]:
        """Group and number of every new shard, in order."""
        starts = self._starts()[:-1]
        return list(zip(*(self.samples[name].to_numpy()[starts].tolist() for name in ("group", "number")), strict=True))

    def tasks(self) -> Iterator[ShardTask]:
        """The new shards, in order of group and number."""
        names = ("source", "label", "east", "north", "heading", "timestamp")
        for (group, number), (first, last) in zip(self.shards(), pairwise(self._starts().tolist()), strict=True):
            columns = self.samples.slice(first, last - first).to_pydict()
            yield ShardTask(group, number, *(columns[name] for name in names))

    def _starts(self) -> np.ndarray:
        """The first sample of every new shard, and the end of the last, int64 [shards + 1]."""
        group, number = (self.samples[name].to_numpy() for name in ("group", "number"))
        begins = np.flatnonzero((np.diff(group) != 0) | (np.diff(number) != 0)) + 1
        return np.concatenate([[0], begins, [len(group)]]) if len(group) else np.zeros(1, np.int64)


def photo_table(names: pa.Array, places: Places, rows: np.ndarray) -> pa.Table:
    """Photos as a table of `SKIPPED_COLUMNS`: their `names` as samples (large_string [k]), and `rows` (int [k]) of
    `places`."""
    headings, timestamps = headings_and_timestamps(places, rows)
    columns = {"source": names, "east": places.east[rows], "north": places.north[rows]}
    return pa.table({**columns, "heading": headings, "timestamp": timestamps}, SKIPPED_COLUMNS)


def revisions(out: Path) -> list[Revision]:
    """The revisions that a data set has begun or finished, oldest first."""
    numbers = sorted(int(path.stem) for path in (out / REVISIONS).glob("[0-9]*.parquet") if path.stem.isdigit())
    return [Revision.load(out, number) for number in numbers]


def retried(later: Iterable[Revision]) -> frozenset[str]:
    """The samples that retries among the revisions `later` than a shard brought. Written again, that shard leaves them
    out: their photos are sound now, and each sample is in one shard."""
    return frozenset(
        sample for revision in later if revision.source is None for sample in revision.samples["source"].to_pylist()
    )


def stage(out: Path) -> Path:
    """The folder in which the shards of an unfinished revision are gathered."""
    return out / _STAGE


def publish(out: Path, shards: Iterable[tuple[int, int]]) -> None:
    """Move staged shards into the data set, each with its table last; what was moved before stays."""
    for group, number in shards:
        stem = shard_stem(group, number)
        (out / stem).parent.mkdir(parents=True, exist_ok=True)
        if (stage(out) / f"{stem}.parquet").exists():
            for kind in SHARD_KINDS:
                if (stage(out) / f"{stem}.{kind}").exists():
                    os.replace(stage(out) / f"{stem}.{kind}", out / f"{stem}.{kind}")
    shutil.rmtree(stage(out), ignore_errors=True)


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file, whole or not at all; text is `string` in it, of which no row group has too much."""
    text = pa.large_string()
    fields = [field.with_type(pa.string()) if field.type == text else field for field in table.schema]
    stored = pa.schema(fields, table.schema.metadata)
    with atomic_path(path) as partial, pq.ParquetWriter(partial, stored) as writer:
        for first in range(0, max(len(table), 1), _ROW_GROUP):
            rows = np.arange(first, min(first + _ROW_GROUP, len(table)))
            writer.write_table(table.take(pa.array(rows)).cast(stored))  # a slice's text would keep its large offsets


def write_bad(bad: list[Bad], path: Path) -> None:
    """Write photos that were set aside, a line of JSON each, whole or not at all."""
    atomic_write_text(path, "".join(json.dumps(b.facts(), ensure_ascii=True) + "\n" for b in bad))


def read_bad(path: Path) -> list[Bad]:
    """Read photos that `write_bad` wrote; raises `JobError` where the file holds anything else."""
    try:
        lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
        return [Bad(**facts) for facts in lines]
    except (ValueError, TypeError) as error:
        raise JobError(f"{path}: damaged ({one_line(error)}); run shards/verify.py --repair") from None


def count_bad(path: Path) -> int:
    """How many photos `write_bad` wrote; 0 where there is no such file, as before a data set is finished."""
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _stem(out: Path, number: int) -> Path:
    return out / REVISIONS / f"{number:06d}"
