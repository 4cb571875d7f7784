"""Where a run stands, and how fast it goes."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from training.engine import StepOutcome


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint, so that an epoch that was cut goes on with its sums.

    `losses`, `hits` and `counts` are the current epoch's sums by group; `latest` the last epoch's mean loss of
    every group that has been trained; `best` the best value so far of the quantity that picks the best checkpoint, and
    `val_photos` the fingerprint of the validation queries that it is of.
    """

    step: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    hits: dict[int, float] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    latest: dict[int, float] = field(default_factory=dict)
    best: float | None = None
    val_photos: str = ""
    skipped: int = 0

    def add(self, groups: list[int], groups_of_slots: np.ndarray, outcome: StepOutcome) -> None:
        """Add a step that was taken."""
        for i, group in enumerate(groups):
            count = int(np.count_nonzero(groups_of_slots == group))
            if count:
                self.losses[group] = self.losses.get(group, 0.0) + float(outcome.losses[i])
                self.hits[group] = self.hits.get(group, 0.0) + float(outcome.hits[i])
                self.counts[group] = self.counts.get(group, 0) + count

    def mean_loss(self) -> float:
        """Mean loss of the epoch's samples so far; NaN where every step was skipped."""
        total = sum(self.counts.values())
        return sum(self.losses.values()) / total if total else math.nan

    def accuracy(self) -> float:
        """Share of the epoch's samples whose own class scored highest, in percent."""
        total = sum(self.counts.values())
        return 100 * sum(self.hits.values()) / total if total else math.nan

    def mean_of_groups(self) -> float:
        """Mean over the groups of each one's loss in its latest epoch."""
        return sum(self.latest.values()) / len(self.latest)

    def end_epoch(self) -> None:
        """Remember the groups' mean losses and start new sums."""
        self.latest |= {group: self.losses[group] / count for group, count in self.counts.items()}
        self.losses, self.hits, self.counts = {}, {}, {}

    def to_json(self) -> dict[str, Any]:
        """As JSON values; the keys of the sums become strings."""
        return dict(vars(self))

    @staticmethod
    def from_json(values: dict[str, Any]) -> Progress:
        """What `to_json` wrote, after JSON."""
        sums = {
            name: {int(group): value for group, value in values[name].items()}
            for name in ("losses", "hits", "counts", "latest")
        }
        photos = values.get("val_photos", "")
        return Progress(**sums, step=values["step"], best=values["best"], val_photos=photos, skipped=values["skipped"])


class Timing:
    """Images a second and the share of the time spent waiting for data, since the epoch began.

    A GPU goes on with the step before while its process waits for data: only what it stands idle counts.
    """

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self.batch_size = batch_size
        self.on_gpu = device.type == "cuda"
        self.begun = time.monotonic()
        self.ended = self.begun
        self.steps = 0
        self.waited = 0.0
        self.step_begun: torch.cuda.Event | None = None
        self.step_ended: torch.cuda.Event | None = None

    def begin_step(self) -> None:
        """The data of a step have come."""
        if self.on_gpu:
            self.step_begun = _moment_on_gpu()

    def add(self, wait_seconds: float) -> None:
        """Count a step whose losses are known and which waited so long for its data."""
        if self.step_begun is not None and self.step_ended is not None:
            wait_seconds = min(wait_seconds, self.step_ended.elapsed_time(self.step_begun) / 1000)
        if self.on_gpu:
            self.step_ended = _moment_on_gpu()
        self.steps += 1
        self.waited += wait_seconds
        self.ended = time.monotonic()

    def rate(self) -> float:
        """Images of all ranks a second."""
        return self.steps * self.batch_size / max(self.ended - self.begun, 1e-9)

    def wait_share(self) -> float:
        """Share of the time spent waiting for data, 0 to 1."""
        return min(1.0, self.waited / max(self.ended - self.begun, 1e-9))


def _moment_on_gpu() -> torch.cuda.Event:
    """When the GPU is through with what it has been given so far."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
