"""Cells, classes and groups against the plain formulas of the method."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing.partition import make_partition
from shards.classes import grid_index
from shards.console import JobError

COORDINATES = st.one_of(
    st.floats(-900_000, 9_900_000, allow_nan=False),
    st.integers(-500_000, 500_000).map(float),
    st.integers(-30_000, 30_000).map(lambda i: math.nextafter(20.0 * i, -math.inf)),
)


def plain_cell(metres: float, M: int) -> int:
    """The cell's corner as the reference computes it."""
    return int(metres // M * M)


@given(COORDINATES, st.sampled_from([1, 7, 10, 20, 25]))
def test_a_cell_is_the_floor_of_the_exact_quotient(metres, M):
    assert grid_index(np.array([metres]), M)[0] * M == plain_cell(metres, M)


@settings(deadline=None)
@given(
    st.lists(st.tuples(COORDINATES, COORDINATES), min_size=1, max_size=60),
    st.sampled_from([10, 20]),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_classes_groups_and_labels_follow_the_plain_formulas(points, M, N, min_images):
    east, north = np.array(points).T
    made = make_partition(east, north, M=M, N=N, min_images=min_images, zone=10)

    cells = [(plain_cell(e, M), plain_cell(n, M)) for e, n in points]
    kept = sorted(c for c, count in Counter(cells).items() if count >= min_images)
    group_of = {c: (c[0] % (M * N) // M) * N + c[1] % (M * N) // M for c in kept}
    expected = {}
    for group in range(N * N):
        for label, cell in enumerate(c for c in kept if group_of[c] == group):
            expected[cell] = (group, label)

    table = made.classes
    found = {
        (int(e), int(n)): (int(g), int(label))
        for e, n, g, label in zip(table.cell_east, table.cell_north, table.group, table.label, strict=True)
    }
    assert found == expected
    assert [(int(g), int(label)) for g, label in zip(table.group, table.label, strict=True)] == sorted(
        expected.values()
    )
    for cell, row in zip(cells, made.row, strict=True):
        assert (row == -1) == (cell not in expected)
        if row >= 0:
            assert (table.cell_east[row], table.cell_north[row]) == cell
    assert table.images.tolist() == [
        Counter(cells)[e, n] for e, n in zip(table.cell_east, table.cell_north, strict=True)
    ]


def test_cells_that_touch_never_share_a_group():
    east, north = np.meshgrid(np.arange(-100.0, 100, 20) + 1, np.arange(-100.0, 100, 20) + 1)
    table = make_partition(east.ravel(), north.ravel(), M=20, N=2, min_images=1, zone=10).classes
    for group in table.groups:
        cells = table.of_group(group)
        apart = np.maximum(
            abs(cells.cell_east[:, None] - cells.cell_east), abs(cells.cell_north[:, None] - cells.cell_north)
        )
        assert apart[~np.eye(len(cells), dtype=bool)].min() >= 40


@pytest.mark.parametrize(("M", "middle"), [(20, 10.0), (25, 12.0)])
def test_a_class_predicts_the_middle_of_its_cell_by_integer_division(M, middle):
    table = make_partition(np.array([3.0]), np.array([2.0]), M=M, N=2, min_images=1, zone=10).classes
    assert table.centers().tolist() == [[middle, middle]]


def test_cells_far_apart_give_the_same_classes_as_near_ones():
    """A span too large for a dense table of cells takes the other way through the code."""
    east = np.array([0.0, 1, 9e8, 9e8 + 1])
    north = np.array([0.0, 1, 9e8, 9e8 + 1])
    table = make_partition(east, north, M=20, N=2, min_images=2, zone=10).classes
    assert table.cell_east.tolist() == [0, 9e8]
    assert table.images.tolist() == [2, 2]


def test_coordinates_beyond_any_plane_are_one_line() -> None:
    with pytest.raises(JobError, match="span more than any plane holds"):
        make_partition(np.array([0.0, 1e12]), np.array([0.0, 1e12]), M=20, N=2, min_images=1, zone=10)
