"""Cuts the map into cells and deals the cells out to groups (Divide&Classify, ICCV 2023, section 3).

A class is a square cell of M metres. Its group is `(east_index mod N) * N + (north_index mod N)`, so two cells of
one group are at least M * (N - 1) metres apart and cells that touch never share a head.
"""

from dataclasses import dataclass

import numpy as np

from shards.classes import ClassTable, grid_index, group_of, number_within
from shards.console import JobError

_DENSE_CELLS = 1 << 26


@dataclass(frozen=True)
class Partition:
    """`classes`, and for each photo its row in them (int32 [n]; -1 where its cell has too few photos)."""

    classes: ClassTable
    row: np.ndarray


@dataclass(frozen=True)
class CellBox:
    """A box of cells, `columns` from west to east and `rows` from south to north, that numbers them in this order."""

    first_east: int
    first_north: int
    columns: int
    rows: int

    @staticmethod
    def around(east_index: np.ndarray, north_index: np.ndarray) -> "CellBox":
        """The box that holds cells (int64 [n] both, by their position in the grid of cells).

        Raises `JobError` where it has more of them than can be numbered.
        """
        first_east, first_north = (int(index.min()) if len(index) else 0 for index in (east_index, north_index))
        columns = int(east_index.max(initial=first_east)) - first_east + 1
        rows = int(north_index.max(initial=first_north)) - first_north + 1
        if columns * rows >= 1 << 62:
            raise JobError("the photos' coordinates span more than any plane holds; check the names")
        return CellBox(first_east, first_north, columns, rows)

    @property
    def cells(self) -> int:
        """How many cells the box has."""
        return self.columns * self.rows

    def codes(self, east_index: np.ndarray, north_index: np.ndarray) -> np.ndarray:
        """The numbers of cells in the box, int64 [n], ascending with (east, north). They take the place of
        `east_index`, since 41 million photos leave no memory to waste."""
        code = east_index
        code -= self.first_east
        code *= self.rows
        code += north_index
        code -= self.first_north
        return code

    def indices(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the cells with these numbers lie in the grid of cells, int64 [n] both."""
        return codes // self.rows + self.first_east, codes % self.rows + self.first_north


def make_classes(
    east_index: np.ndarray, north_index: np.ndarray, images: np.ndarray, *, M: int, N: int, zone: int
) -> tuple[ClassTable, np.ndarray]:
    """Classes of cells (int64 [n] all three, ascending with (east, north)), labelled from 0 in each group in this
    order; and which of the cells each of them is, int64 [n]."""
    group = group_of(east_index, north_index, N)
    order = np.argsort(group, kind="stable")
    group = group[order]
    classes = ClassTable(
        M,
        N,
        zone,
        group=group.astype(np.int32),
        label=number_within(group).astype(np.int32),
        cell_east=east_index[order] * M,
        cell_north=north_index[order] * M,
        images=images[order].astype(np.int64),
    )
    return classes, order


def make_partition(east: np.ndarray, north: np.ndarray, *, M: int, N: int, min_images: int, zone: int) -> Partition:
    """Deal photos at `east`, `north` (metres, float64 [n], finite) out to classes and groups.

    Cells with fewer than `min_images` photos are left out. Labels follow (cell east, cell north) within a group.
    """
    cell_east, cell_north = grid_index(east, M), grid_index(north, M)
    box = CellBox.around(cell_east, cell_north)
    code = box.codes(cell_east, cell_north)
    del cell_east, cell_north
    if box.cells <= _DENSE_CELLS:
        counts = np.bincount(code, minlength=box.cells)
        codes = np.flatnonzero(counts)
        position = np.empty(box.cells, np.int32)
        position[codes] = np.arange(len(codes), dtype=np.int32)
        of_photo = position[code]
        counts = counts[codes]
    else:
        codes, of_photo, counts = np.unique(code, return_inverse=True, return_counts=True)
    kept = np.flatnonzero(counts >= min_images)
    classes, order = make_classes(*box.indices(codes[kept]), counts[kept], M=M, N=N, zone=zone)
    row_of_cell = np.full(len(codes), -1, np.int32)
    row_of_cell[kept[order]] = np.arange(len(order), dtype=np.int32)
    return Partition(classes, row_of_cell[of_photo])
