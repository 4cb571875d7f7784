"""The HTML report: one file that holds everything, works offline and loads nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.pages import map_cells, map_corner, read_page, to_script
from evaluation.query_set import Outcome
from evaluation.result_files import Row
from evaluation.thumbnails import data_url, thumbnails
from shards.console import JobError, in_words
from shards.files import atomic_write_text
from shards.names import BadName, parse_name
from shards.sample_photos import SamplePhotos
from training.queries import Queries

GALLERY = 12
_THUMBNAIL_BYTES = 11_000_000
_GALLERY_PIXELS = 256
_ANSWERS_SHOWN = 5


def write_report(
    path: Path,
    outcomes: Sequence[Outcome],
    rows: Sequence[Row],
    facts: dict[str, Any],
    samples: SamplePhotos | None,
    warn: Callable[[str], None],
) -> None:
    """Write the report of `outcomes`, whose result table is `rows`, to `path`.

    `samples` illustrate mistakes with a photo of the cell that was answered and of the true one, and `warn` is told
    which cannot be read. Under 20 MB for 10,000 queries: thumbnails share a budget.
    """
    data = report_data(outcomes, rows, facts, samples, warn)
    page = read_page("report")
    parts = {"style": page.css, "script": page.js, "data": to_script(data)}
    atomic_write_text(path, re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], page.html))


def report_data(
    outcomes: Sequence[Outcome],
    rows: Sequence[Row],
    facts: dict[str, Any],
    samples: SamplePhotos | None,
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """Everything that the page shows. Coordinates are metres from a corner of the first class map."""
    classes = outcomes[0].classes
    corner = map_corner(classes)
    sets: dict[str, Any] = {}
    cells: dict[str, Any] = {}
    answers = []
    query_sets = {(str(o.queries.source), o.classes.zone): o.queries for o in outcomes}
    total = sum(len(queries) for queries in query_sets.values())
    for (folder, zone), queries in query_sets.items():
        budget = _THUMBNAIL_BYTES * len(queries) // max(total, 1)
        sets[_name(folder, zone)] = _query_set(queries, corner, budget)
    for outcome in outcomes:
        key = _name(str(outcome.queries.source), outcome.classes.zone)
        cells.setdefault(outcome.classes.fingerprint(), map_cells(outcome.classes, corner))
        galleries = _galleries(outcome)
        shown = sorted({i for some in galleries.values() for i in some})
        large = sets[key]["large"]
        for i in shown:
            if i not in large and (url := data_url(outcome.queries.paths[i], _GALLERY_PIXELS)):
                large[i] = url
        pictures = {i: _cell_photos(outcome, i, samples, warn) for i in shown}
        answers.append(
            {
                "set": key,
                "cells": outcome.classes.fingerprint(),
                **_answers(outcome),
                **{name: [{"i": i, **pictures[i]} for i in some] for name, some in galleries.items()},
            }
        )
    return {
        "rows": list(rows),
        "answers": answers,
        "sets": sets,
        "cells": cells,
        "problems": facts.get("problems", []),
        "provenance": facts["provenance"],
    }


def _name(folder: str, zone: int) -> str:
    return f"{folder} in zone {zone}"


def _query_set(queries: Queries, corner: tuple[int, int], budget: int) -> dict[str, Any]:
    return {
        "photos": list(queries.names),
        "east": _rounded(queries.east - corner[0], 1),
        "north": _rounded(queries.north - corner[1], 1),
        "thumbs": thumbnails(queries.paths, budget),
        "large": {},
    }


def _answers(outcome: Outcome) -> dict[str, Any]:
    own = outcome.own
    return {
        "readable": outcome.readable.astype(int).tolist(),
        "right": outcome.right.astype(int).tolist(),
        "error": _rounded(np.where(outcome.readable, outcome.errors.astype(np.float64), np.nan), 1),
        "confidence": _rounded(own.confidence[:, 0] * 100.0, 1),
        "uncertainty": _rounded(own.uncertainty[:, 0].astype(np.float64), 1),
        "top": own.rows[:, :_ANSWERS_SHOWN].tolist(),
    }


def _rounded(values: np.ndarray, digits: int) -> list[float | None]:
    return [round(v, digits) if v == v else None for v in values.astype(np.float64).tolist()]


def _galleries(outcome: Outcome) -> dict[str, list[int]]:
    """Which photos each gallery shows, the most telling first."""
    wrong = np.flatnonzero(outcome.scored & ~outcome.right)
    right = np.flatnonzero(outcome.right)
    confidence = outcome.own.confidence[:, 0]
    return {
        "confident": wrong[np.argsort(-confidence[wrong], kind="stable")][:GALLERY].tolist(),
        "farthest": wrong[np.argsort(-outcome.errors[wrong], kind="stable")][:GALLERY].tolist(),
        "successes": right[np.argsort(-confidence[right], kind="stable")][:GALLERY].tolist(),
    }


def _cell_photos(outcome: Outcome, i: int, samples: SamplePhotos | None, warn: Callable[[str], None]) -> dict[str, str]:
    """A photo of the answered cell and, for a mistake, one of the true cell, as far as the shards have them."""
    classes = outcome.classes
    rows = {"answer": int(outcome.own.rows[i, 0])}
    if not outcome.right[i]:
        east, north = outcome.queries.east[i : i + 1], outcome.queries.north[i : i + 1]
        rows["truth"] = int(outcome.index.holding(east, north)[0])
    heading = _heading(outcome.queries.paths[i])
    photos = {}
    for name, row in rows.items():
        cell = None if row < 0 else (int(classes.cell_east[row]), int(classes.cell_north[row]))
        try:
            jpeg = samples.of_cell(cell, classes.M, heading) if samples and cell else None
        except (JobError, OSError) as error:
            warn(f"the report lacks photos of cells: {in_words(error)}")
            jpeg = None
        photos[name] = data_url(jpeg, 160) if jpeg else ""
    return photos


def _heading(path: Path) -> float | None:
    try:
        return parse_name(path.name).heading
    except BadName:
        return None
