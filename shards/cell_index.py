"""Which class centres lie near a point, looked up on the grid of cells."""

from __future__ import annotations

import numpy as np

from shards.classes import ClassTable, grid_index

_CHUNK = 1 << 22


class CellIndex:
    """A class table that can be asked for the classes around points or around other classes."""

    def __init__(self, classes: ClassTable) -> None:
        self.classes = classes
        self.first_east = int(classes.cell_east.min())
        self.first_north = int(classes.cell_north.min())
        self.columns = int(classes.cell_east.max() - self.first_east) // classes.M + 1
        self.rows = int(classes.cell_north.max() - self.first_north) // classes.M + 1
        keys = self._keys(classes.cell_east, classes.cell_north)
        self.order = np.argsort(keys, kind="stable")
        self.sorted_keys = keys[self.order]

    def find(self, cell_east: np.ndarray, cell_north: np.ndarray) -> np.ndarray:
        """Table rows of the classes whose cells have these lower-left corners (int64 metres, any shape); -1: none."""
        keys = self._keys(cell_east, cell_north)
        at = np.minimum(np.searchsorted(self.sorted_keys, keys), len(self.sorted_keys) - 1)
        return np.where((self.sorted_keys[at] == keys) & (keys >= 0), self.order[at], -1)

    def holding(self, east: np.ndarray, north: np.ndarray) -> np.ndarray:
        """Table row of the class whose cell holds each point (float64 [Q], metres); -1 outside, or for NaN."""
        known = np.isfinite(east) & np.isfinite(north)
        cells = [grid_index(np.where(known, v, 0), self.classes.M) * self.classes.M for v in (east, north)]
        return np.where(known, self.find(*cells), -1)

    def count_near(self, east: np.ndarray, north: np.ndarray, radius: float) -> np.ndarray:
        """How many class centres lie at most `radius` metres from each point (float64 [Q]): int64 [Q].

        Distances in float32, as LR@N takes them.
        """
        M = self.classes.M
        counts = np.empty(len(east), np.int64)
        step = max(1, _CHUNK // (min(self._width(radius), self.columns) * min(self._width(radius), self.rows)))
        for first in range(0, len(east), step):
            part = slice(first, first + step)
            cell_east = self._cells_around(east[part], radius, self.first_east, self.columns)
            cell_north = self._cells_around(north[part], radius, self.first_north, self.rows)
            rows = self.find(cell_east[:, :, None], cell_north[:, None, :])
            delta_east = (cell_east + M // 2 - east[part, None])[:, :, None]
            delta_north = (cell_north + M // 2 - north[part, None])[:, None, :]
            distances = np.sqrt(delta_east**2 + delta_north**2).astype(np.float32)
            counts[part] = ((rows >= 0) & (distances <= np.float32(radius))).sum(axis=(1, 2))
        return counts

    def _width(self, radius: float) -> int:
        """How many cells in a row can have their centres within `radius` metres of a point."""
        return 2 * (int(np.ceil(radius / self.classes.M)) + 1) + 1

    def _cells_around(self, points: np.ndarray, radius: float, first: int, count: int) -> np.ndarray:
        """Edges, int64 [Q or 1, n] metres, of the cells along an axis that can lie within `radius` of points [Q].

        Where these are more than the `count` cells of the map, which begin at `first`: of the latter.
        """
        M, width = self.classes.M, self._width(radius)
        if width > count:
            return first + np.arange(count, dtype=np.int64)[None] * M
        return (np.floor(points / M).astype(np.int64)[:, None] + np.arange(-(width // 2), width // 2 + 1)) * M

    def neighbours(self, rows: np.ndarray, radius: float) -> np.ndarray:
        """int64 [..., J]: rows of the classes whose centres lie within `radius` metres of those of `rows` [...].

        The class itself is among them; places of no class hold -1.
        """
        east, north = self._offsets(radius)
        return self.find(
            self.classes.cell_east[rows][..., None] + east, self.classes.cell_north[rows][..., None] + north
        )

    def most_neighbours(self, radius: float) -> int:
        """How many cells' centres can lie within `radius` metres of a cell's own, itself among them."""
        return len(self._offsets(radius)[0])

    def _offsets(self, radius: float) -> tuple[np.ndarray, np.ndarray]:
        """Metres east and north (int64 [J] both) from a cell to those whose centres lie within `radius` metres."""
        M = self.classes.M
        reaches = [min(int(radius // M), cells - 1) for cells in (self.columns, self.rows)]
        steps = [np.arange(-reach, reach + 1, dtype=np.int64) * M for reach in reaches]
        east, north = (grid.ravel() for grid in np.meshgrid(*steps, indexing="ij"))
        near = np.hypot(east, north) <= radius
        return east[near], north[near]

    def _keys(self, cell_east: np.ndarray, cell_north: np.ndarray) -> np.ndarray:
        """One number a cell of the bounding box, -1 outside of it."""
        M = self.classes.M
        column, row = (cell_east - self.first_east) // M, (cell_north - self.first_north) // M
        inside = (column >= 0) & (column < self.columns) & (row >= 0) & (row < self.rows)
        return np.where(inside, column * self.rows + row, -1)
