"""What is said about a ranked query set beside LR@N: chance, ceiling, errors, calibration, groups, curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.cell_index import CellIndex
from shards.classes import grid_index, group_of

CURVE_METRES = (5, 10, 15, 20, 25, 30, 40, 50, 75, 100, 150, 200, 300, 500, 750, 1000)
RELIABILITY_BINS = 10


def chance_recall(near: np.ndarray, classes: int, ns: Sequence[int]) -> dict[int, float]:
    """Expected LR@N in percent of a random order of all classes; NaN without queries.

    `near` int64 [Q]: how many of the `classes` would answer each query. A random order misses with all N first
    places with probability (1 - k/C)(1 - k/(C-1))...(1 - k/(C-N+1)).
    """
    if len(near) == 0:
        return dict.fromkeys(ns, float("nan"))
    chances = {}
    for n in ns:
        left = classes - np.arange(min(n, classes))
        miss = np.prod(np.clip(1 - near[:, None] / left, 0, None), axis=1)
        chances[n] = float((1 - miss).mean() * 100)
    return chances


def percent(condition: np.ndarray) -> float:
    """Share of True in percent, NaN of nothing."""
    return float(condition.mean() * 100) if len(condition) else float("nan")


def error_quantiles(errors: np.ndarray) -> dict[str, float]:
    """Median, mean and tail of distances in metres [Q]; NaN of nothing."""
    if len(errors) == 0:
        return dict.fromkeys(
            ("median_error_m", "p75_error_m", "p90_error_m", "p95_error_m", "mean_error_m"), float("nan")
        )
    p50, p75, p90, p95 = np.percentile(errors.astype(np.float64), (50, 75, 90, 95))
    return {
        "median_error_m": float(p50),
        "p75_error_m": float(p75),
        "p90_error_m": float(p90),
        "p95_error_m": float(p95),
        "mean_error_m": float(errors.mean(dtype=np.float64)),
    }


@dataclass(frozen=True)
class ReliabilityBin:
    """Answers with a confidence from `low` to `high` percent: how many, mean confidence, percent that is right."""

    low: float
    high: float
    queries: int
    confidence: float | None
    right: float | None


def reliability(confidence: np.ndarray, right: np.ndarray) -> tuple[list[ReliabilityBin], float]:
    """The reliability table and the expected calibration error, in percent points (Guo et al. 2017, section 2).

    `confidence` float [Q] from 0 to 1, `right` bool [Q].
    """
    edges = np.linspace(0, 1, RELIABILITY_BINS + 1)
    which = np.clip((confidence * RELIABILITY_BINS).astype(int), 0, RELIABILITY_BINS - 1)
    table, gap = [], 0.0
    for i in range(RELIABILITY_BINS):
        inside = which == i
        count = int(inside.sum())
        mean = float(confidence[inside].mean(dtype=np.float64) * 100) if count else None
        hits = percent(right[inside]) if count else None
        table.append(ReliabilityBin(float(edges[i] * 100), float(edges[i + 1] * 100), count, mean, hits))
        if mean is not None and hits is not None:
            gap += abs(mean - hits) * count
    return table, gap / len(confidence) if len(confidence) else float("nan")


def accuracy_by_group(
    index: CellIndex, east: np.ndarray, north: np.ndarray, answered: np.ndarray, right: np.ndarray
) -> list[dict[str, Any]]:
    """One entry a group: its classes, the queries that lie in its cells, LR@1 of these, and the share of all answers.

    `east` and `north` float64 [Q] of the queries, `answered` int64 [Q] the table row of the first answer, `right` bool
    [Q]. A query's group follows from its position, whether or not its cell is a class.
    """
    classes = index.classes
    group_of_query = group_of(grid_index(east, classes.M), grid_index(north, classes.M), classes.N)
    group_of_answer = classes.group[answered]
    return [
        {
            "group": group,
            "classes": classes.count(group),
            "queries": int((group_of_query == group).sum()),
            "lr_at_1": percent(right[group_of_query == group]),
            "answers_share": percent(group_of_answer == group),
        }
        for group in classes.groups
    ]


def recall_curve(distances: np.ndarray, ns: Sequence[int]) -> dict[str, list[float]]:
    """LR@N in percent over distance thresholds: `metres` and one list for each N, from distances [Q, K] in metres."""
    curve: dict[str, list[float]] = {"metres": [float(m) for m in CURVE_METRES]}
    for n in ns:
        best = distances[:, :n].min(axis=1) if len(distances) else np.empty(0)
        curve[f"lr_at_{n}"] = [percent(best <= metres) for metres in CURVE_METRES]
    return curve
