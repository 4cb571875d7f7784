"""The results of an evaluation as files and as a table for the console."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from evaluation.query_set import Outcome
from shards.console import JobError
from shards.dataset import refuse_data_set
from shards.files import atomic_path, atomic_write_json, atomic_write_text

Row = dict[str, Any]


def prepare_folder(out: Path) -> None:
    """Make the folder for results; JobError for a file and for a data set or a folder in one."""
    if out.exists() and not out.is_dir():
        raise JobError(f"--out {out}: is a file; name a folder")
    refuse_data_set(out)
    out.mkdir(parents=True, exist_ok=True)


def write_json(path: Path, rows: Sequence[Row], **facts: Any) -> None:
    """`rows` and other facts as JSON; NaN becomes null."""
    atomic_write_json(path, without_nan({"rows": list(rows), **facts}))


def without_nan(value: Any) -> Any:
    """Nested lists and dicts with None in place of NaN and infinities, which JSON has no words for."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line a row; the other forms and chance as columns of their own, tables inside a row left out."""
    flat = [_flatten(row) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(flat)
    atomic_write_text(path, text.getvalue())


def _flatten(row: Row) -> Row:
    flat: Row = {}
    for name, value in row.items():
        if name == "forms":
            flat |= {f"{form}_{n}": recall for form, by_n in value.items() for n, recall in by_n.items()}
        elif name == "chance":
            flat |= {f"chance_{n}": chance for n, chance in value.items()}
        elif not isinstance(value, list | dict):
            flat[name] = value
    return {name: "" if value is None or value != value else value for name, value in flat.items()}


def write_predictions(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Every prediction as Parquet: one line a photo, with lists of its answers, best first, in metres and degrees."""
    with atomic_path(path) as partial, pq.ParquetWriter(partial, _SCHEMA) as writer:
        for outcome in outcomes:
            writer.write_table(predictions_table(outcome))


_SCHEMA = pa.schema(
    {
        "checkpoint": pa.string(), "queries": pa.string(), "photo": pa.string(), "form": pa.string(),
        "readable": pa.bool_(), "scored": pa.bool_(), "true_east": pa.float64(), "true_north": pa.float64(),
        "predicted_east": pa.float64(), "predicted_north": pa.float64(), "predicted_latitude": pa.float64(),
        "predicted_longitude": pa.float64(), "error_m": pa.float32(), "confidence": pa.float32(),
        "uncertainty_m": pa.float32(), "groups": pa.list_(pa.int32()), "labels": pa.list_(pa.int32()),
        "scores": pa.list_(pa.float32()), "distances_m": pa.list_(pa.float32()),
    }
)  # fmt: skip


def predictions_table(outcome: Outcome) -> pa.Table:
    """The table of one checkpoint and query set; what is unknown is null."""
    queries, answers, classes = outcome.queries, outcome.own, outcome.classes
    count = len(queries)
    first = answers.rows[:, 0]
    east, north = classes.center_east[first], classes.center_north[first]
    latitude, longitude = classes.to_latlon(east, north)
    unread = ~outcome.readable

    def known(values: np.ndarray) -> pa.Array:
        return pa.array(values, mask=unread | ~np.isfinite(values))

    def lists(values: np.ndarray) -> pa.Array:
        flat = pa.array(values.ravel(), mask=values.ravel() != values.ravel())
        return pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=pa.array(unread)).cast(pa.list_(flat.type))

    columns = {
        "checkpoint": [outcome.checkpoint] * count,
        "queries": [str(queries.source)] * count,
        "photo": queries.names,
        "form": [outcome.form] * count,
        "readable": outcome.readable,
        "scored": outcome.scored,
        "true_east": pa.array(queries.east, mask=~queries.located),
        "true_north": pa.array(queries.north, mask=~queries.located),
        "predicted_east": known(east),
        "predicted_north": known(north),
        "predicted_latitude": known(latitude),
        "predicted_longitude": known(longitude),
        "error_m": known(outcome.errors),
        "confidence": known(answers.confidence[:, 0]),
        "uncertainty_m": known(answers.uncertainty[:, 0]),
        "groups": lists(classes.group[answers.rows]),
        "labels": lists(classes.label[answers.rows]),
        "scores": lists(answers.scores),
        "distances_m": lists(outcome.distances[outcome.form]),
    }
    return pa.table(columns, schema=_SCHEMA)


def format_table(rows: Sequence[Row]) -> str:
    """The table for the console: LR@N of every form, then chance and ceiling, for each checkpoint and query set."""
    ns = recall_ns(rows[0])
    head = ["checkpoint", "queries", "scores", *(f"LR@{n}" for n in ns), "median m", "scored"]
    lines = [head]
    for row in rows:
        for i, (form, recall) in enumerate(row["forms"].items()):
            own = form == row["form"]
            lines.append(
                [
                    row["checkpoint"] if i == 0 else "",
                    row["queries"] if i == 0 else "",
                    f"{form} *" if own else form,
                    *(_number(recall[f"lr_at_{n}"]) for n in ns),
                    _number(row["median_error_m"]) if own else "",
                    f"{row['scored']:,} of {row['photos']:,}" if own else "",
                ]
            )
        lines.append(["", "", "chance", *(_number(row["chance"][f"lr_at_{n}"]) for n in ns), "", ""])
        lines.append(["", "", "ceiling", *(_number(row["ceiling"]) for _ in ns), "", ""])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "  ".join(
            cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    threshold = rows[0]["threshold_m"]
    note = f"LR@N in percent within {threshold:g} m; * the row's own scores; chance: a random order of the classes;"
    return "\n".join([line.rstrip() for line in text] + ["", f"{note} ceiling: queries that some class could answer"])


def recall_ns(row: Row) -> list[int]:
    """The N of a row's LR@N, ascending: JSON has them in the order of their names."""
    return sorted(int(name.removeprefix("lr_at_")) for name in row if name.startswith("lr_at_"))


def _number(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.1f}"
