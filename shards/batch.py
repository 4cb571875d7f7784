"""One rank's share of one step, from draws to pixels."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
import torch

from shards.console import JobError
from shards.sampler import Draws, crops

T = TypeVar("T")

_LOG = logging.getLogger(__name__)
_MAX_ATTEMPTS = 20
_TOLERATED_FAILURES = 20
_RECENT = 50_000


@dataclass
class Batch:
    """What the trainer sees. `images` uint8 [b, S, S, 3] RGB on the loader's device (else in pinned memory where
    there is a GPU); `labels` int64 [b] within each photo's group; `groups` int64 [b] (NumPy); `wait_seconds`: how
    long the trainer waited for this batch."""

    step: int
    images: torch.Tensor
    labels: torch.Tensor
    groups: np.ndarray
    wait_seconds: float


class Sampler(Protocol):
    """Slots of a step to samples: a pure function."""

    def draw(self, step: int, slots: np.ndarray, groups: np.ndarray, attempt: int = 0) -> Draws: ...


class Reader(Protocol):
    """Bytes of a sample, and where it lies; `expect` tells it what is read soon."""

    def expect(self, groups: np.ndarray, rows: np.ndarray) -> None: ...
    def read(self, group: int, row: int) -> bytes: ...
    def place(self, group: int, row: int) -> str: ...
    def close(self) -> None: ...


@dataclass
class Supply:
    """Where batches come from: what draws samples, what reads them, and their size in pixels.

    `failed` photos could not be read or decoded; each was replaced by the next draw of its slot. More than
    `max_bad_share` of those tried lately (the last 50,000 to 100,000), and more than 20, stop the job: a disk that
    fails after weeks is told as soon as one that fails at once.
    """

    sampler: Sampler
    reader: Reader
    photo_size: int
    max_bad_share: float = 0.01
    failed: int = 0
    _tried: list[int] = field(default_factory=lambda: [0, 0])  # of the present 50,000 and those before
    _bad: list[int] = field(default_factory=lambda: [0, 0])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, photos: int) -> None:
        """Count photos that could be used."""
        with self._lock:
            self._tried[0] += photos
            if self._tried[0] >= _RECENT:
                self._tried, self._bad = [0, self._tried[0]], [0, self._bad[0]]

    def fail(self, place: str, reason: Exception) -> None:
        """Count and log a photo that could not be used; raises `JobError` where there are too many."""
        with self._lock:
            self.failed += 1
            self._tried[0] += 1
            self._bad[0] += 1
            failed, tried = sum(self._bad), sum(self._tried)
        _LOG.warning("%s: %s; replaced by the next draw", place, reason)
        if failed > _TOLERATED_FAILURES and failed > self.max_bad_share * tried:
            forbidden = isinstance(reason, PermissionError)
            way_out = "allow this user to read them" if forbidden else "run shards/verify.py --repair on the data set"
            raise JobError(
                f"{place}: {reason}; {failed} of the last {tried:,} photos could not be used, more than "
                f"{self.max_bad_share:.1%}; {way_out}"
            )


class BatchPlan:
    """The samples of one rank's slots in one step: `labels`, `groups` int64 [b], `boxes` int64 [b, 4] as of `crops`."""

    def __init__(self, supply: Supply, step: int, slots: np.ndarray, groups: np.ndarray) -> None:
        self.step, self.slots = step, slots
        self._supply = supply
        drawn = supply.sampler.draw(step, slots, groups)
        self.groups, self.labels, self._rows = drawn.group, drawn.label, drawn.row
        self.boxes = crops(drawn.uniform, supply.photo_size)
        self._attempts = np.zeros(len(slots), np.int64)
        supply.reader.expect(self.groups, self._rows)

    def __len__(self) -> int:
        return len(self.slots)

    def encoded(self, i: int) -> bytes:
        """The JPEG of sample `i`; raises `OSError`."""
        return self._supply.reader.read(int(self.groups[i]), int(self._rows[i]))

    def use(self, i: int, use: Callable[[bytes], T]) -> T:
        """What `use` makes of sample `i`'s JPEG.

        Where the photo cannot be read, or `use` raises `OSError` or `ValueError`, the slot moves on to its next draw
        (law 1 of the design), with another label and box. Raises `JobError` where there are too many of these.
        """
        while True:
            try:
                return use(self.encoded(i))
            except (OSError, ValueError) as error:
                self._replace(i, error)

    def _replace(self, i: int, reason: Exception) -> None:
        supply = self._supply
        supply.fail(supply.reader.place(int(self.groups[i]), int(self._rows[i])), reason)
        self._attempts[i] += 1
        if self._attempts[i] > _MAX_ATTEMPTS:
            raise JobError(f"step {self.step}: {_MAX_ATTEMPTS} draws in a row could not be read; last: {reason}")
        one = slice(i, i + 1)
        drawn = supply.sampler.draw(self.step, self.slots[one], self.groups[one], int(self._attempts[i]))
        self.labels[i], self._rows[i] = drawn.label[0], drawn.row[0]
        self.boxes[one] = crops(drawn.uniform, supply.photo_size)
