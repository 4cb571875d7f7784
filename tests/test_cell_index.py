"""Lookups on the grid of cells against brute force over all classes."""

import numpy as np
import pytest

from shards.cell_index import CellIndex
from shards.classes import ClassTable


def scattered(M: int, seed: int = 0) -> ClassTable:
    """Sixty cells scattered around the origin, so that some coordinates are negative."""
    rng = np.random.default_rng(seed)
    cells = np.unique(rng.integers(-8, 8, (60, 2)), axis=0) * M
    count = len(cells)
    group, label = np.zeros(count, np.int32), np.arange(count, dtype=np.int32)
    return ClassTable(M, 1, 10, group, label, cells[:, 0], cells[:, 1], np.ones(count, np.int64))


@pytest.mark.parametrize("M", [20, 15])
@pytest.mark.parametrize("radius", [5.0, 25.0, 100.0, 1e3, 1e7])
def test_counts_of_near_centres_are_those_of_brute_force(M: int, radius: float) -> None:
    classes = scattered(M)
    points = np.random.default_rng(1).uniform(-12 * M, 12 * M, (200, 2))
    apart = np.hypot(points[:, None, 0] - classes.center_east, points[:, None, 1] - classes.center_north)
    counts = CellIndex(classes).count_near(points[:, 0], points[:, 1], radius)
    np.testing.assert_array_equal(counts, (apart <= radius).sum(axis=1))


@pytest.mark.parametrize("radius", [0.0, 30.0, 1e3, 1e7])
def test_neighbours_are_those_of_brute_force(radius: float) -> None:
    classes = scattered(20)
    centers = classes.centers()
    apart = np.hypot(*(centers[:, None] - centers[None]).transpose(2, 0, 1))
    rows = np.arange(len(classes))[:, None]
    for row, (found,) in enumerate(CellIndex(classes).neighbours(rows, radius)):
        assert sorted(found[found >= 0]) == np.flatnonzero(apart[row] <= radius).tolist()


def test_points_are_held_by_their_own_cell_and_by_none_outside() -> None:
    classes = scattered(20)
    index = CellIndex(classes)
    inside = index.holding(classes.cell_east + 19.99, classes.cell_north + 0.0)
    np.testing.assert_array_equal(inside, np.arange(len(classes)))
    outside = index.holding(np.array([1e6, np.nan, -1e6]), np.array([0.0, 0.0, np.nan]))
    np.testing.assert_array_equal(outside, [-1, -1, -1])
