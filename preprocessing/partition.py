"""Cuts the map into cells and deals the cells out to groups (Divide&Classify, ICCV 2023, section 3).

A class is a square cell of M metres. Its group is `(east_index mod N) * N + (north_index mod N)`, so two cells of
one group are at least M * (N - 1) metres apart and cells that touch never share a head.
"""

from dataclasses import dataclass

import numpy as np

from shards.classes import ClassTable, cell_index, group_of
from shards.console import JobError

_DENSE_CELLS = 1 << 26


@dataclass(frozen=True)
class Partition:
    """`classes`, and for each photo its row in them (int32 [n]; -1 where its cell has too few photos)."""

    classes: ClassTable
    row: np.ndarray


def make_partition(east: np.ndarray, north: np.ndarray, *, M: int, N: int, min_images: int, zone: int) -> Partition:
    """Deal photos at `east`, `north` (metres, float64 [n], finite) out to classes and groups.

    Cells with fewer than `min_images` photos are left out. Labels follow (cell east, cell north) within a group.
    """
    cell_east, cell_north = cell_index(east, M), cell_index(north, M)
    first_east, first_north = (int(c.min()) if len(c) else 0 for c in (cell_east, cell_north))
    rows = int(cell_north.max(initial=first_north)) - first_north + 1
    columns = int(cell_east.max(initial=first_east)) - first_east + 1
    if rows * columns >= 1 << 62:
        raise JobError("the photos' coordinates span more than any plane holds; check the names")
    cell_east -= first_east
    cell_east *= rows
    cell_east += cell_north
    cell_east -= first_north
    code = cell_east
    del cell_north
    if rows * columns <= _DENSE_CELLS:
        counts = np.bincount(code, minlength=rows * columns)
        codes = np.flatnonzero(counts)
        position = np.empty(rows * columns, np.int32)
        position[codes] = np.arange(len(codes), dtype=np.int32)
        of_photo = position[code]
        counts = counts[codes]
    else:
        codes, of_photo, counts = np.unique(code, return_inverse=True, return_counts=True)
    kept = np.flatnonzero(counts >= min_images)
    east_index, north_index = codes[kept] // rows + first_east, codes[kept] % rows + first_north
    group = group_of(east_index, north_index, N)
    order = np.argsort(group, kind="stable")
    group = group[order]
    classes = ClassTable(
        M,
        N,
        zone,
        group=group.astype(np.int32),
        label=(np.arange(len(group)) - np.searchsorted(group, group)).astype(np.int32),
        cell_east=east_index[order] * M,
        cell_north=north_index[order] * M,
        images=counts[kept][order].astype(np.int64),
    )
    row_of_cell = np.full(len(codes), -1, np.int32)
    row_of_cell[kept[order]] = np.arange(len(order), dtype=np.int32)
    return Partition(classes, row_of_cell[of_photo])
