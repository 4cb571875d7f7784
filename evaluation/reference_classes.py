"""The class order of the public reference code, rebuilt from the names of its training photos.

It puts each group's cells into a Python set in the order of its sorted paths and takes them out in the set's order,
which follows the hashes of the pairs of integers and the order of insertion; groups stand in the order of their first
kept cell.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
from tqdm import tqdm

from shards.classes import ClassTable
from shards.console import JobError
from shards.names import BadName, parse_name

PythonHashing = Literal["3.8+", "3.7"]
Cell = tuple[int, int]


class _OldPair(tuple[int, int]):
    """A pair of integers with the hash that tuples had before Python 3.8 (Objects/tupleobject.c of 3.7)."""

    __slots__ = ()

    def __hash__(self) -> int:
        mask = (1 << 64) - 1
        value, multiplier = 0x345678, 1000003
        for left, number in zip((1, 0), self, strict=True):
            value = ((value ^ (hash(number) & mask)) * multiplier) & mask
            multiplier += 82520 + 2 * left
        value = (value + 97531) & mask
        return value - (1 << 64) if value >> 63 else value


def reference_groups(
    paths: Sequence[str], M: int, N: int, min_images: int, hashing: PythonHashing = "3.8+"
) -> tuple[list[int], list[list[Cell]], Counter[Cell]]:
    """Group ids in the reference's order, the cells of each in the order of its head, and photos by cell.

    `paths` are those of the training photos relative to their root, with folders; only those that its glob finds
    count: names in lower-case `.jpg`, nothing hidden. Cells are lower-left corners in metres. Raises JobError for a
    path without coordinates where the reference reads them: between the first `@` signs of the whole path.
    """
    pair = _OldPair if hashing == "3.7" else tuple
    cells: list[Cell] = []
    known: dict[Cell, Cell] = {}  # one tuple for all photos of a cell: 5 GB less for 41 million
    found = sorted(_found_by_glob(paths))
    for path in tqdm(found, "photos into cells", unit=" photos", unit_scale=True, delay=5):
        fields = path.split("@", 3)
        try:
            east, north = float(fields[1]), float(fields[2])
            cell = (int(east // M * M), int(north // M * M))
            cells.append(known.setdefault(cell, cell))
        except (IndexError, ValueError, OverflowError):
            raise JobError(f"{path}: no @EAST@NORTH@ in this training path") from None
    images = Counter(cells)
    groups: dict[int, set[Cell]] = {}
    for cell in cells:
        if images[cell] >= min_images:
            group = cell[0] % (M * N) // M * N + cell[1] % (M * N) // M
            groups.setdefault(group, set()).add(pair(cell))  # type: ignore[arg-type]
    if not groups:
        raise JobError(f"no cell of {M} m has {min_images} of the {len(cells)} training photos")
    return list(groups), [[(cell[0], cell[1]) for cell in some] for some in groups.values()], images


def _found_by_glob(paths: Sequence[str]) -> list[str]:
    names = [path.removeprefix("./").lstrip("/") for path in paths]
    root = os.path.commonpath([os.path.dirname(min(names)), os.path.dirname(max(names))])  # may itself be hidden
    return [name for name in names if name.endswith(".jpg") and "/." not in f"/{name[len(root) :]}"]


def reference_table(
    paths: Sequence[str], M: int, N: int, min_images: int, hashing: PythonHashing = "3.8+"
) -> tuple[list[int], ClassTable]:
    """The group ids in the reference's order of heads, and the class table whose labels are its class numbers."""
    order, cells, images = reference_groups(paths, M, N, min_images, hashing)
    by_group = dict(zip(order, cells, strict=True))
    rows = [(group, label, cell) for group in sorted(order) for label, cell in enumerate(by_group[group])]
    corners = np.array([cell for _, _, cell in rows], np.int64)
    zone, band = _zone_and_band(paths)
    table = ClassTable(
        M,
        N,
        zone,
        np.array([group for group, _, _ in rows], np.int32),
        np.array([label for _, label, _ in rows], np.int32),
        corners[:, 0],
        corners[:, 1],
        np.array([images[cell] for _, _, cell in rows], np.int64),
        southern="" < band < "N",
    )
    return order, table


def _zone_and_band(paths: Sequence[str]) -> tuple[int, str]:
    """The UTM zone and band letter of the first name that has them; 0 and "" where none has."""
    for path in paths:
        try:
            name = parse_name(path)
        except BadName:
            continue
        if name.zone:
            return name.zone, name.band
    return 0, ""
