"""Photos of a cell out of the shards, to show beside an answer or to compare queries with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.cell_index import CellIndex
from shards.classes import ClassTable, grid_index
from shards.console import format_count, is_systems
from shards.dataset import Dataset
from shards.index import damage_named, read_samples
from shards.layout import shard_numbers, shard_tables

_FACTS = ("east", "north", "heading", "timestamp")
_PLACE = ("offset", "size", "crc32")
_COMPARED = 100


@dataclass(frozen=True)
class SamplePhoto:
    """A training photo: UTM metres, heading in degrees (NaN: unknown), and a timestamp ("": unknown).

    `read` gives its JPEG; raises OSError where it cannot be read or fails its checksum.
    """

    read: Callable[[], bytes]
    east: float
    north: float
    heading: float
    timestamp: str


class SamplePhotos:
    """A training photo of any cell of a data set, seen in about the direction of the query."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.tables: dict[int, list[Path]] = {}
        self.spans: dict[int, list[tuple[int, int]]] = {}
        self.cells = CellIndex(dataset.classes)
        for table in shard_tables(dataset.path):
            self.tables.setdefault(shard_numbers(table.stem)[0], []).append(table)

    def covers(self, classes: ClassTable) -> bool:
        """Whether the data set has cells of a class map."""
        rows = self.cells.find(classes.cell_east, classes.cell_north)
        return self.dataset.classes.shares_grid(classes) and bool((rows >= 0).any())

    @classmethod
    def open(cls, place: str) -> SamplePhotos:
        """The photos of the data set in a folder or at a URL; JobError where there is none."""
        return cls(Dataset.open(place))

    def of_cell(self, cell: tuple[int, int], M: int, heading: float | None = None) -> bytes | None:
        """A JPEG of the cell with this lower-left corner (metres) and side `M`; None where there is none.

        Of the cell's photos in one shard, the one whose heading (degrees) is next to `heading`. Raises OSError
        where a shard cannot be read or the photo fails its checksum, JobError for a damaged table.
        """
        for table, tar in self._photos(cell, M):
            headings = table["heading"].to_numpy().astype(np.float64)
            turn = np.abs((headings - (heading or 0.0) + 180) % 360 - 180)
            return self._read(table, tar, int(np.argmin(np.where(np.isfinite(turn), turn, 360))))
        return None

    def some_of_cell(self, cell: tuple[int, int], M: int, most: int) -> list[SamplePhoto]:
        """Up to `most` photos of the cell, spread evenly; raises JobError for a damaged table."""
        found = [(table, tar, i) for table, tar in self._photos(cell, M) for i in range(len(table))]
        spread = np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int)
        return [
            SamplePhoto(partial(self._read, table, tar, i), *(table[name][i].as_py() for name in _FACTS))
            for table, tar, i in (found[at] for at in spread)
        ]

    def familiar(self, east: np.ndarray, north: np.ndarray) -> str | None:
        """What to say of queries (their places, float64 [Q], metres in the plane of the classes) of which most seem to
        be training photos; None of others. Looks at 100 of them; raises as `of_cell` does."""
        some = np.linspace(0, len(east) - 1, min(len(east), _COMPARED)).astype(int)
        known = self._count_at(east[some], north[some])
        if known <= len(some) / 2:
            return None
        return (
            f"{known} of {format_count(len(some), 'query')} that were compared lie at the very place of a training "
            f"photo of {self.dataset.place}; where they are the same photos, LR@N tells nothing of new ones"
        )

    def _count_at(self, east: np.ndarray, north: np.ndarray) -> int:
        """How many of the points (float64 [Q], metres) are, to the centimetre, the place of a photo."""
        M = self.dataset.classes.M
        corners = np.stack([grid_index(axis, M) * M for axis in (east, north)], axis=1)
        count = 0
        for cell in np.unique(corners, axis=0):
            points = np.flatnonzero((corners == cell).all(axis=1))
            of_cell = [table for table, _ in self._photos((int(cell[0]), int(cell[1])), M)]
            places = [
                np.concatenate([table[axis].to_numpy() for table in of_cell] or [[]]) for axis in ("east", "north")
            ]
            apart = [abs(axis[points, None] - place) for axis, place in zip((east, north), places, strict=True)]
            count += int((np.maximum(*apart) < 0.01).any(axis=1).sum())
        return count

    def _read(self, table: pa.Table, tar: Path, i: int) -> bytes:
        try:
            return self.dataset.jpeg(tar, *(table[name][i].as_py() for name in _PLACE))
        except OSError as error:
            if is_systems(error):
                raise
            raise OSError(f"{tar}: {error}") from error

    def _photos(self, cell: tuple[int, int], M: int) -> Iterator[tuple[pa.Table, Path]]:
        """The cell's samples of each shard that has some, and the shard's tar."""
        classes = self.dataset.classes
        row = int(self.cells.find(*np.array(cell)))
        if classes.M != M or row < 0:
            return
        label = int(classes.label[row])
        group = int(classes.group[row])
        tables = self.tables.get(group, [])
        if group not in self.spans:
            self.spans[group] = [_labels_within(path) for path in tables]
        for path, (lowest, highest) in zip(tables, self.spans[group], strict=True):
            if lowest <= label <= highest:
                table = read_samples(path, [*_FACTS, *_PLACE], [("label", "==", label)])
                if len(table):
                    yield table, path.with_suffix(".tar")


def _labels_within(table: Path) -> tuple[int, int]:
    """The lowest and the highest label of a shard's samples, by the footer of its table."""
    with damage_named(table):
        facts = pq.read_metadata(table)
        label = facts.schema.names.index("label")
        spans = [facts.row_group(i).column(label).statistics for i in range(facts.num_row_groups)]
    if any(span is None or not span.has_min_max for span in spans):  # another program's table may tell nothing
        return 0, np.iinfo(np.int32).max
    return min((span.min for span in spans), default=0), max((span.max for span in spans), default=-1)
