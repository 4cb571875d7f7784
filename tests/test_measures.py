"""Chance, calibration, groups and curves against cases worked by hand or by enumeration."""

from itertools import permutations

import numpy as np
import pytest
from tiny import SOUTH, WEST, class_table

from evaluation.measures import accuracy_by_group, chance_recall, error_quantiles, recall_curve, reliability
from shards.cell_index import CellIndex


@pytest.mark.parametrize("near", [0, 1, 2, 5])
def test_chance_is_the_share_of_all_orders_of_the_classes_that_answer(near: int) -> None:
    orders = list(permutations(range(5)))
    for n in (1, 2, 5, 9):
        hits = sum(any(row < near for row in order[:n]) for order in orders)
        assert chance_recall(np.array([near]), 5, [n])[n] == pytest.approx(100 * hits / len(orders))


def test_chance_is_the_mean_over_the_queries_and_nothing_of_none() -> None:
    assert chance_recall(np.array([1, 3]), 4, [1])[1] == pytest.approx(50)
    assert np.isnan(chance_recall(np.array([], np.int64), 4, [1])[1])


def test_calibration_compares_confidence_with_the_share_that_is_right() -> None:
    confidence = np.array([0.95, 0.95, 1.0, 0.25, 0.0], np.float32)
    table, error = reliability(confidence, np.array([True, False, False, False, True]))
    assert [line.queries for line in table] == [1, 0, 1, 0, 0, 0, 0, 0, 0, 3]
    assert [line.low for line in table] == pytest.approx(range(0, 100, 10))
    assert [line.high for line in table] == pytest.approx(range(10, 110, 10))
    assert table[9].right == pytest.approx(100 / 3)
    assert table[9].confidence == pytest.approx(100 * 2.9 / 3)
    assert table[1].right is None
    assert error == pytest.approx((100 + 3 * (290 / 3 - 100 / 3) + 25) / 5, rel=1e-5)


def test_error_quantiles_are_those_of_their_names_and_of_nothing_unknown() -> None:
    errors = np.append(np.arange(100.0), 1050)  # of 101 values the p-th quantile is the p-th
    assert list(error_quantiles(np.random.default_rng(0).permutation(errors)).values()) == [50, 75, 90, 95, 6000 / 101]
    assert all(np.isnan(value) for value in error_quantiles(np.array([])).values())


def test_groups_are_those_of_the_cells_that_queries_lie_in() -> None:
    classes = class_table()
    east = WEST + np.array([5.0, 5.0, 25.0])
    north = SOUTH + np.array([5.0, 25.0, 5.0])
    table = accuracy_by_group(CellIndex(classes), east, north, np.array([0, 0, 0]), np.array([True, False, True]))
    first = WEST // 20 % 2 * 2 + SOUTH // 20 % 2
    assert [line["queries"] for line in table] == [1, 1, 1, 0]
    assert table[first]["lr_at_1"] == 100
    assert table[int(classes.group[0])]["answers_share"] == 100


def test_the_curve_counts_the_best_of_the_first_n_answers() -> None:
    curve = recall_curve(np.array([[30.0, 4.0], [12.0, 90.0]]), [1, 2])
    at = dict(zip(curve["metres"], zip(curve["lr_at_1"], curve["lr_at_2"], strict=True), strict=True))
    assert at[5] == (0, 50)
    assert at[15] == (50, 100)
    assert at[30] == (100, 100)
