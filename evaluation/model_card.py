"""The model card of an exported checkpoint: what it is, how it is loaded, and how well it does."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from evaluation.localiser import Localiser
from evaluation.result_files import Row, recall_ns
from shards.console import JobError, format_count, printable
from shards.files import read_bytes


def model_card(localiser: Localiser, results: Path | None) -> str:
    """The card as Markdown; `results`, a results.json of evaluation/evaluate.py, fills its metrics.

    Raises JobError where that is something else, or has no score of this checkpoint.
    """
    config, classes = localiser.config, localiser.classes
    lines = [
        "---",
        "library_name: divide-and-classify",
        "tags: [visual-place-recognition, geolocation]",
        "---",
        "",
        f"# {config.backbone} with {config.head} heads",
        "",
        f"Names the place where a street photo was taken, among {len(classes):,} cells of {classes.M} m in "
        f"{len(classes.groups)} groups ({classes.crs}). Divide&Classify (ICCV 2023).",
        "",
        "```python",
        "from evaluation.localiser import Localiser",
        "",
        'localiser = Localiser.from_pretrained("THIS FOLDER OR REPOSITORY")',
        "```",
        "",
        f"Scores: {localiser.form}. Photos: shorter side {localiser.shorter_side} pixels, aspect kept.",
    ]
    if results is not None:
        try:
            rows = json.loads(read_bytes(results))["rows"]
            own = [row for row in rows if row.get("weights") == localiser.fingerprint and row["scored"]]
            lines += ["", *_table(own)] if own else []
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise JobError(f"--results {results}: no results.json of evaluation/evaluate.py ({error})") from error
        if not own:
            raise JobError(
                f"--results {results}: no score of {localiser.path} among {format_count(len(rows), 'row')}; "
                "evaluate that checkpoint and name its results.json"
            )
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Row]) -> list[str]:
    """The rows as a Markdown table, and what its columns mean."""
    ns = recall_ns(rows[0])
    head = ["queries", "scored", "scores", "metres", *(f"LR@{n}" for n in ns), f"chance LR@{ns[0]}"]
    lines = [head, ["---"] * len(head)]
    names = _short_names(row["queries"] for row in rows)
    for row in rows:
        values = [*(row[f"lr_at_{n}"] for n in ns), row["chance"][f"lr_at_{ns[0]}"]]
        name = printable(names[row["queries"]]).replace("|", "\\|") + (" (fitted)" if row["fitted"] else "")
        facts = [f"{row['scored']:,}", row["form"], f"{row['threshold_m']:g}"]
        lines.append([name, *facts, *(f"{value:.1f}" for value in values)])
    note = (
        "LR@N: percent of queries with one of the first N answers within the metres; chance: a random order of cells."
    )
    if any(row["fitted"] for row in rows):
        note += " Form of scores and confidence were chosen on the queries called fitted, which flatters them."
    return ["| " + " | ".join(line) + " |" for line in lines] + ["", note]


def _short_names(paths: Iterable[str]) -> dict[str, str]:
    """For each path its last parts, two or as many more as tell it from the others."""
    parts = {path: Path(path).parts for path in paths}
    count = 2
    while len({some[-count:] for some in parts.values()}) < len(set(parts.values())):
        count += 1
    return {path: str(Path(*some[-count:])) for path, some in parts.items()}
