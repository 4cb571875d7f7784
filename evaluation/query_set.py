"""One checkpoint on one query set: answers of all processes brought together, and what is said about them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation.calibration import TEMPERATURES, Calibration, fit, temperature_of
from evaluation.localiser import Localiser
from evaluation.measures import (
    accuracy_by_group,
    chance_recall,
    error_quantiles,
    percent,
    recall_curve,
    reliability,
)
from evaluation.ranking import OWN_FORMS, RANKING_FORMS, Answers, RankingForm, first_rank
from shards.cell_index import CellIndex
from shards.classes import ClassTable
from training.distributed import World
from training.queries import Queries, SetAside
from training.scoring import RECALL_NS, THRESHOLD_METRES, cell_distances, recall_at

_LATENCY_QUERIES = 10


@dataclass(frozen=True)
class Settings:
    """How query sets are evaluated: N and threshold (metres) of LR@N, the forms of scores, and how photos are read."""

    ns: tuple[int, ...] = RECALL_NS
    threshold: float = THRESHOLD_METRES
    forms: tuple[RankingForm, ...] = OWN_FORMS
    batch_size: int = 32
    threads: int = 1


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of the slowest process, and milliseconds for one photo on its own (median)."""

    describe: float
    rank: float
    latency: float
    processes: int
    device: str


@dataclass(frozen=True)
class Outcome:
    """The answers of one checkpoint for the Q photos of a query set.

    `answers` by form; `distances` float32 [Q, K] by form, metres to the true position, NaN where it is unknown;
    `readable` and `scored` bool [Q]: decoded, and decoded with a known position; `near` int64 [Q], the number of
    classes that would answer a query (0 where its position is unknown).
    """

    checkpoint: str
    checkpoint_step: str
    weights: str
    classes: ClassTable
    index: CellIndex
    calibration: Calibration | None
    queries: Queries
    form: RankingForm
    answers: dict[RankingForm, Answers]
    distances: dict[RankingForm, np.ndarray]
    readable: np.ndarray
    scored: np.ndarray
    near: np.ndarray
    failures: tuple[SetAside, ...]
    timing: Timing
    settings: Settings

    @property
    def name(self) -> tuple[str, str]:
        """Checkpoint and query set as they were given."""
        return self.checkpoint, str(self.queries.source)

    @cached_property
    def fitted(self) -> bool:
        """Whether form and confidence were fitted to these same queries, which makes both look better than they are."""
        return self.calibration is not None and self.calibration.photos == self.queries.fingerprint()

    @property
    def own(self) -> Answers:
        """The answers by the row's main form."""
        return self.answers[self.form]

    @property
    def errors(self) -> np.ndarray:
        """Metres from the first answer of the main form to the true position, float32 [Q], NaN where unknown."""
        return self.distances[self.form][:, 0]

    @property
    def within_radius(self) -> np.ndarray:
        """bool [Q]: the true place lies in the circle around the first answer that is said to hold 68 %."""
        return self.scored & (self.errors <= self.own.uncertainty[:, 0])

    @property
    def right(self) -> np.ndarray:
        """bool [Q]: the first answer lies within the threshold."""
        return self.scored & (self.errors <= np.float32(self.settings.threshold))

    def recall(self, form: RankingForm) -> dict[int, float]:
        """LR@N in percent by a form of scores."""
        return recall_at(self.distances[form][self.scored], self.settings.ns, self.settings.threshold)

    def row(self) -> dict[str, Any]:
        """The row of the result table as JSON values; percent, metres, seconds."""
        scored, settings, queries = self.scored, self.settings, self.queries
        east, north = queries.east[scored], queries.north[scored]
        recalls = {form: _by_name(self.recall(form)) for form in self.answers}
        table, calibration_error = reliability(self.own.confidence[scored, 0], self.right[scored])
        seconds = self.timing.describe + self.timing.rank
        return {
            "checkpoint": self.checkpoint,
            "checkpoint_step": self.checkpoint_step,
            "weights": self.weights,
            "queries": str(queries.source),
            "form": self.form,
            "fitted": self.fitted,
            **recalls[self.form],
            "chance": _by_name(chance_recall(self.near[scored], len(self.classes), settings.ns)),
            "ceiling": percent(self.near[scored] > 0),
            "outside_every_class": percent(self.index.holding(east, north) < 0),
            **error_quantiles(self.errors[scored]),
            "forms": recalls,
            "threshold_m": settings.threshold,
            "classes": len(self.classes),
            "groups": len(self.classes.groups),
            "photos": len(queries) + len(queries.set_aside),
            "scored": int(scored.sum()),
            "unlocated": int((~queries.located & self.readable).sum()),
            "unreadable": int((~self.readable).sum()),
            "set_aside": len(queries.set_aside),
            "reprojected": queries.reprojected,
            "seconds": seconds,
            "describe_seconds": self.timing.describe,
            "rank_seconds": self.timing.rank,
            "queries_per_second": int(self.readable.sum()) / seconds,
            "latency_ms": self.timing.latency,
            "processes": self.timing.processes,
            "device": self.timing.device,
            "temperature": temperature_of(self.calibration, self.form),
            "calibration_error": calibration_error,
            "percent_within_radius": percent(self.within_radius[scored]),
            "calibration": [asdict(line) for line in table],
            "by_group": accuracy_by_group(self.index, east, north, self.own.rows[scored, 0], self.right[scored]),
            "curve": recall_curve(self.distances[self.form][scored], settings.ns),
        }


def _by_name(recall: dict[int, float]) -> dict[str, float]:
    return {f"lr_at_{n}": value for n, value in recall.items()}


def evaluate_set(
    localiser: Localiser, checkpoint: str, queries: Queries, form: RankingForm, settings: Settings, world: World
) -> Outcome | None:
    """Answer all queries, each rank its share; the outcome on rank 0, None on the others. All ranks must call it."""
    mine = np.arange(world.rank, len(queries), world.size)
    paths = [queries.paths[i] for i in mine]
    forms = tuple(dict.fromkeys((form, *settings.forms)))
    begun = time.perf_counter()
    title = f"{localiser.path.name}, {queries.source}" if world.is_main else None
    described = localiser.describe(
        paths, batch_size=settings.batch_size, threads=settings.threads, title=title and f"{title}: describing"
    )
    described_at = time.perf_counter()
    vectors = described.vectors
    answers = localiser.answer(
        vectors if described.readable.any() else torch.zeros(len(paths), localiser.model.descriptor_dim),
        forms=forms,
        top_k=max(settings.ns),
        radii_of=first_rank,
        threshold=settings.threshold,
        title=title and f"{title}: ranking",
    )
    seconds = (described_at - begun, time.perf_counter() - described_at)
    everyone = world.gather((mine, answers, described.readable, described.failures, seconds))
    if not world.is_main:
        return None
    readable = np.zeros(len(queries), dtype=bool)
    for indices, _, part, _, _ in everyone:
        readable[indices] = part
    merged = {form: _merge([(part[0], part[1][form]) for part in everyone], len(queries)) for form in forms}
    slowest = np.max([part[4] for part in everyone], axis=0)
    latency = _latency(localiser, [path for path, ok in zip(queries.paths, readable, strict=True) if ok])
    return Outcome(
        checkpoint=checkpoint,
        checkpoint_step=localiser.path.name,
        weights=localiser.fingerprint,
        classes=localiser.classes,
        index=localiser.index,
        calibration=localiser.calibration,
        queries=queries,
        form=form,
        answers=merged,
        distances={
            form: cell_distances(some.rows, localiser.classes, queries.east, queries.north)
            for form, some in merged.items()
        },
        readable=readable,
        scored=readable & queries.located,
        near=_count_near(localiser, queries, settings.threshold),
        failures=tuple(failure for part in everyone for failure in part[3]),
        timing=Timing(float(slowest[0]), float(slowest[1]), latency, world.size, localiser.device.type),
        settings=settings,
    )


def calibrate(localiser: Localiser, queries: Queries, settings: Settings, world: World) -> Calibration | None:
    """Form and temperatures from validation queries, each rank ranking its share; None where none is answered rightly.

    An answer is right within 25 m, whatever the threshold of `settings`: all programs that answer use what is fitted
    here. All ranks must call it, and all get the same.
    """
    located = np.flatnonzero(queries.located)[world.rank :: world.size]
    paths = [queries.paths[i] for i in located]
    title = f"{localiser.path.name}, {queries.source}" if world.is_main else None
    described = localiser.describe(
        paths, batch_size=settings.batch_size, threads=settings.threads, title=title and f"{title}: describing"
    )
    kept = located[described.readable]
    own: dict[RankingForm, tuple[np.ndarray, np.ndarray]] = {}
    if len(kept):
        found = localiser.ranker.confidences(
            described.vectors[torch.from_numpy(described.readable)],
            forms=RANKING_FORMS,
            temperatures=TEMPERATURES,
            threshold=THRESHOLD_METRES,
            title=title and f"{title}: calibrating",
        )
        east, north = queries.east[kept], queries.north[kept]
        for form, (rows, confidence) in found.items():
            errors = cell_distances(rows[:, None], localiser.classes, east, north)[:, 0]
            own[form] = (errors <= np.float32(THRESHOLD_METRES), confidence)
    everyone = [part for part in world.gather(own) if part]
    fitted = None
    if world.is_main and everyone:
        answers = {
            form: (np.concatenate([p[form][0] for p in everyone]), np.concatenate([p[form][1] for p in everyone]))
            for form in RANKING_FORMS
        }
        if any(right.any() for right, _ in answers.values()):
            fitted = fit(answers, str(queries.source), localiser.trained_form, queries.fingerprint())
    return world.gather(fitted)[0]


def _merge(parts: Sequence[tuple[np.ndarray, Answers]], count: int) -> Answers:
    """The answers of all ranks in the order of the queries."""
    columns = []
    for name in ("rows", "scores", "confidence", "uncertainty"):
        some = getattr(parts[0][1], name)
        column = np.zeros((count, some.shape[1]), some.dtype)
        for indices, answers in parts:
            column[indices] = getattr(answers, name)
        columns.append(column)
    return Answers(*columns)


def _count_near(localiser: Localiser, queries: Queries, threshold: float) -> np.ndarray:
    near = np.zeros(len(queries), np.int64)
    located = queries.located
    near[located] = localiser.index.count_near(queries.east[located], queries.north[located], threshold)
    return near


def _latency(localiser: Localiser, paths: Sequence[Path]) -> float:
    """Median milliseconds from file to answer for one photo at a time; NaN without photos."""
    times = []
    for path in paths[:_LATENCY_QUERIES]:
        begun = time.perf_counter()
        localiser.answer(localiser.describe([path], batch_size=1).vectors, radii_of=first_rank)
        times.append(1000 * (time.perf_counter() - begun))
    return float(np.median(times)) if times else float("nan")
