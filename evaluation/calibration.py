"""What validation queries say about a checkpoint's answers: the best form of scores, and a confidence that is honest.

The form is the one trained with, unless another answers more queries rightly by two standard errors: to follow every
query that one form happens to have more costs as often as it gains (tests/benchmarks/RESULTS.md).

A network's probabilities are too sure of themselves; dividing its logits by one number, the temperature, before the
softmax mends most of that and changes no ranking (Guo et al. 2017, "On calibration of modern neural networks").
`calibration.json` in a checkpoint's folder keeps the outcome, and all programs that answer use it.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.measures import percent, reliability
from evaluation.ranking import RANKING_FORMS, RankingForm
from shards.console import JobError, format_count
from shards.files import atomic_write_json, read_bytes

CALIBRATION = "calibration.json"
TEMPERATURES = tuple(2 ** (step / 12) for step in range(-24, 49))  # 0.25 to 16, with 1 among them


@dataclass(frozen=True)
class Calibration:
    """The outcome on the `count` queries of the folder or list `queries`, whose photos have the fingerprint `photos`.

    `form` ranks; by form: `temperatures`, `lr_at_1` in percent, and the expected calibration
    error in points at temperature 1 and at the fitted one.
    """

    form: RankingForm
    temperatures: dict[RankingForm, float]
    queries: str
    count: int
    lr_at_1: dict[RankingForm, float]
    error_before: dict[RankingForm, float]
    error_after: dict[RankingForm, float]
    photos: str = ""

    def save(self, checkpoint: Path) -> None:
        """Write it into a checkpoint's folder; OSError where that cannot be written to."""
        atomic_write_json(checkpoint / CALIBRATION, asdict(self))

    @classmethod
    def load(cls, checkpoint: Path) -> Calibration | None:
        """The calibration in a checkpoint's folder, None where there is none; JobError for a file that is none."""
        path = checkpoint / CALIBRATION
        try:
            values: dict[str, Any] = json.loads(read_bytes(path))
            found = cls(**values)
            sound = found.form in RANKING_FORMS and found.form in found.temperatures and found.form in found.lr_at_1
            sound &= all(0 < t < np.inf for t in found.temperatures.values())
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, AttributeError) as error:
            raise JobError(f"{path}: no calibration ({error}); delete it and evaluate again") from error
        if not sound:
            raise JobError(f"{path}: no calibration (unknown form or temperature); delete it and evaluate again")
        return found

    def describe(self) -> str:
        """One line for the console."""
        first = {form: self.lr_at_1[form] for form in RANKING_FORMS if form in self.lr_at_1}
        lr = ", ".join(f"{form} {value:.1f}" for form, value in first.items())
        higher = ", ".join(form for form, value in first.items() if value > first[self.form])
        why = f"; not surely better: {higher}" if higher else ""
        return (
            f"fitted to {format_count(self.count, 'query')} of {self.queries}: {self.form} scores (LR@1 there within "
            f"25 m: {lr}{why}), temperature {self.temperatures[self.form]:.2f}"
        )


def temperature_of(calibration: Calibration | None, form: RankingForm) -> float | None:
    """What the logits are divided by before they become probabilities; None where nothing was calibrated."""
    return calibration.temperatures.get(form) if calibration else None


def fit(
    answers: dict[RankingForm, tuple[np.ndarray, np.ndarray]], queries: str, own: RankingForm, photos: str = ""
) -> Calibration:
    """Choose form and temperatures; `own` stays unless another form is surely better.

    `answers` by form: bool [Q], whether the first answer is right, and its confidence at each of `TEMPERATURES`,
    float [Q, T]. The temperature is the one under which what happened is likeliest, where one more answer of each kind,
    right and wrong, is counted (Platt 1999, "Probabilistic outputs for support vector machines", 2.2): by a few answers
    that are all right any confidence would be too low. Of equals it is the one nearest to 1.
    """
    temperatures: dict[RankingForm, float] = {}
    before: dict[RankingForm, float] = {}
    after: dict[RankingForm, float] = {}
    for form, (right, confidence) in answers.items():
        sure = confidence.astype(np.float64).clip(1e-6, 1 - 1e-6)
        count_right, count_wrong = np.count_nonzero(right), np.count_nonzero(~right)
        share = np.where(right, (count_right + 1) / (count_right + 2), 1 / (count_wrong + 2))[:, None]
        likelihood = (share * np.log(sure) + (1 - share) * np.log1p(-sure)).mean(axis=0)
        best = min(
            np.flatnonzero(~(likelihood < likelihood.max())).tolist(), key=lambda at: abs(np.log(TEMPERATURES[at]))
        )
        temperatures[form] = TEMPERATURES[best]
        after[form] = reliability(confidence[:, best], right)[1]
        before[form] = reliability(confidence[:, TEMPERATURES.index(1.0)], right)[1]
    first = {form: percent(right) for form, (right, _) in answers.items()}
    better = (form for form in answers if _is_surely_better(answers[form][0], answers[own][0]))
    form = max((own, *better), key=lambda form: first[form])
    count = len(next(iter(answers.values()))[0])
    return Calibration(form, temperatures, queries, count, first, before, after, photos)


def _is_surely_better(right: np.ndarray, than: np.ndarray) -> bool:
    """Whether answers to the same queries (bool [Q], right or not) are right more often than others by more than two
    standard errors of the difference, which only queries that one of both answers rightly make (McNemar 1947)."""
    gained, lost = np.count_nonzero(right & ~than), np.count_nonzero(than & ~right)
    return bool(gained - lost > 2 * math.sqrt(gained + lost))
