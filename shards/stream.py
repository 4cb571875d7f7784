"""Reading for hard disks and networks: runs of neighbouring photos of a class, one request each.

Shards are class-major, and within a class photos lie in a seeded random order, so a run of neighbours is a random
sample of its class. The global batches of some consecutive steps form a window: runs of `run` photos are read from
as many classes as it takes, and the photos handed out shuffled. Each round visits all classes of a group in a new
random order. A class goes on where its last run ended; its first run starts at a random photo. So every slot's class
and photo are uniform, as in `shards.sampler`, and classes and photos come up more evenly than there. Up to `run`
photos of a class share a window, so that larger windows mix better.
The first windows are smaller, each two thirds of the next, since the first batch waits for all of the first one, and a
disk reads each of them while the one before is used, at half as much again as that takes photos. A window is a
pure function of seed, schedule, number and settings: a resumed run counts the runs of those before, 0.7 s for each
100,000 steps of 64, and reads its window again.

Slots are dealt out to eight lanes, slot i to lane i mod 8, and a run stays within a lane, so that with 1, 2, 4 or 8
ranks every run is read by one rank alone, and the draws are the same for any number of ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from shards.index import GroupIndex
from shards.reader import ShardReader
from shards.sampler import ROUND_KEY, WINDOW_KEY, Draws, IndexedSampler, Schedule, philox, uniforms

_LANES = 8
_FIRST_WINDOW = 4096  # photos
_UNDER_WAY = 8  # at least as many batches as are drawn and not yet decoded


@dataclass(frozen=True)
class StreamSettings:
    """How photos are read: `run` neighbours in a request, up to `window` photos of the global batch shuffled.

    A seek and a request of 32 photos of 10 kB take 7 ms on a hard disk, 4,500 photos a second. A window and the next
    one lie in memory: at 65,536 photos of 10 kB 1.3 GB over all ranks.
    """

    run: int = 32
    window: int = 1 << 16


class WindowPlan:
    """The steps of each window: the first of `_FIRST_WINDOW` photos, the others half as large again, up to `window`."""

    def __init__(self, window: int, batch_size: int) -> None:
        sizes = [min(_FIRST_WINDOW, window)]
        while sizes[-1] < window:
            sizes.append(min(sizes[-1] * 3 // 2, window))
        steps = [max(1, size // batch_size) for size in sizes]
        self._first = np.concatenate([[0], np.cumsum(steps)])
        self._last = steps[-1]

    def steps(self, number: int) -> range:
        """The steps of a window."""
        known = min(number, len(self._first) - 2)
        later = (number - known) * self._last
        return range(int(self._first[known]) + later, int(self._first[known + 1]) + later)

    def find(self, step: int) -> tuple[int, int]:
        """The window that a step is in, and the step's place there."""
        number = int(np.searchsorted(self._first, step, side="right")) - 1
        if number > len(self._first) - 2:
            number += (step - int(self._first[-1])) // self._last
        return number, step - self.steps(number).start


@dataclass(frozen=True)
class Window:
    """The samples of some steps. `label`, `row` (of the group's index) and `run` have shape [steps, batch size];
    a run r is `runs[r]`: group, and the rows it reads."""

    label: np.ndarray
    row: np.ndarray
    run: np.ndarray
    runs: list[tuple[int, np.ndarray]]


def count_runs(groups: np.ndarray, run: int) -> dict[int, np.ndarray]:
    """How many runs a window reads for each of its `groups` (int [steps, batch size]), by lane, int64 [lanes]."""
    lanes = np.arange(groups.shape[1]) % _LANES
    slots = {int(g): np.bincount(lanes, np.count_nonzero(groups == g, axis=0)) for g in np.unique(groups)}
    return {group: -(-of_lanes.astype(np.int64) // run) for group, of_lanes in slots.items()}


def make_window(
    index: dict[int, GroupIndex], groups: np.ndarray, seed: int, first_step: int, run: int, turns: Mapping[int, int]
) -> Window:
    """Draw a window; `groups` int [steps, batch size] is the group of every slot, `turns` says how many runs of each
    group the windows before it have read."""
    random = philox(seed, WINDOW_KEY, first_step)
    label, row, of_run = (np.empty(groups.shape, np.int64) for _ in range(3))
    lanes = np.broadcast_to(np.arange(groups.shape[1]) % _LANES, groups.shape)
    runs: list[tuple[int, np.ndarray]] = []
    for group, counts in count_runs(groups, run).items():
        by_lane = [np.flatnonzero((groups == group) & (lanes == lane)) for lane in range(len(counts))]
        ends = np.cumsum(counts)
        labels_drawn, rows_drawn = _take_turns(index[group], seed, group, turns[group] + np.arange(ends[-1]), run)
        for slots, first, last in zip(by_lane, ends - counts, ends, strict=True):
            shuffled = np.argsort(random((last - first) * run), kind="stable")[: len(slots)]
            label.ravel()[slots] = np.repeat(labels_drawn[first:last], run)[shuffled]
            row.ravel()[slots] = rows_drawn[first:last].ravel()[shuffled]
            of_run.ravel()[slots] = shuffled // run + len(runs)
            runs += [(group, np.unique(r)) for r in rows_drawn[first:last]]
    return Window(label, row, of_run, runs)


def _take_turns(
    of_group: GroupIndex, seed: int, group: int, turns: np.ndarray, run: int
) -> tuple[np.ndarray, np.ndarray]:
    """Labels int64 [n] and rows int64 [n, run] of the runs at these consecutive turns of a group's classes."""
    key, classes = ROUND_KEY - group, len(of_group.labels)
    rounds, places = np.divmod(turns, classes)
    orders = [np.argsort(philox(seed, key, int(r) + 1)(classes), kind="stable") for r in np.unique(rounds)]
    chosen = np.stack(orders)[rounds - rounds[0], places]
    labels = of_group.labels[chosen]
    first = of_group.starts[labels]
    photos = of_group.starts[labels + 1] - first
    begun = (philox(seed, key, 0)(classes)[chosen] * photos).astype(np.int64)
    rows = begun[:, None] + rounds[:, None] * run + np.arange(run)
    return labels, first[:, None] + rows % photos[:, None]


@dataclass(frozen=True)
class _Held:
    """A window in memory: by group and row, the run that a photo is read with, and its place there."""

    window: Window
    photos: dict[tuple[int, int], tuple[Future[list[bytes]], int]]


class Stream:
    """Sampler and reader of the stream mode: windows are read ahead, photos come from memory.

    `schedule(step)` gives the groups of the global batch; `slots` are those of this rank. A photo that is not in
    memory (a replacement for one that could not be read) is read by itself.
    """

    def __init__(
        self,
        index: dict[int, GroupIndex],
        reader: ShardReader,
        schedule: Schedule,
        slots: np.ndarray,
        batch_size: int,
        seed: int,
        settings: StreamSettings,
    ) -> None:
        self._index, self._reader, self._schedule, self._slots, self._seed = index, reader, schedule, slots, seed
        self._plan = WindowPlan(settings.window, batch_size)
        self._run = settings.run
        self._single = IndexedSampler(index, seed)
        self._pool = ThreadPoolExecutor(reader.parallel, thread_name_prefix="stream")
        self._drawing = ThreadPoolExecutor(1, thread_name_prefix="window")
        self._held: dict[int, Future[_Held]] = {}
        self._counted, self._turns = 0, Counter[int]()  # of the windows before `_counted`
        self._closed = False

    def draw(self, step: int, slots: np.ndarray, groups: np.ndarray, attempt: int = 0) -> Draws:
        """The samples of some slots; a later attempt of a slot draws as the indexed mode does."""
        if attempt:
            return self._single.draw(step, slots, groups, attempt)
        number, place = self._plan.find(step)
        oldest, _ = self._plan.find(max(0, step - _UNDER_WAY))
        window = self._advance(oldest, number).window
        crop = uniforms(self._seed, step, slots)[:, 2:]
        return Draws(np.asarray(groups, np.int64), window.label[place, slots], window.row[place, slots], crop)

    def expect(self, groups: np.ndarray, rows: np.ndarray) -> None:
        """Nothing to do: windows are read ahead."""

    def read(self, group: int, row: int) -> bytes:
        """The JPEG in `row` of a group's index, from memory; raises `OSError` as `ShardReader.read` does."""
        for window in tuple(self._held.values()):
            if window.done() and (found := window.result().photos.get((group, row))) is not None:
                photos, position = found
                return self._reader.check(group, row, photos.result()[position])
        return self._reader.read(group, row)

    def place(self, group: int, row: int) -> str:
        """Where a photo lies, for messages."""
        return self._reader.place(group, row)

    def close(self) -> None:
        """Stop reading ahead and close the shards."""
        self._closed = True
        for pool in (self._drawing, self._pool):
            pool.shutdown(wait=False, cancel_futures=True)
        self._reader.close()  # first, since the threads may be waiting for a silent server
        for pool in (self._drawing, self._pool):
            pool.shutdown(wait=True)
        self._held.clear()

    def _advance(self, oldest: int, number: int) -> _Held:
        """Hold a window and, soon, the next one; drop those before the oldest that a batch under way needs."""
        for wanted in (number, number + 1):
            if wanted not in self._held:
                self._held[wanted] = self._drawing.submit(self._hold, wanted)
        for old in [n for n in self._held if not oldest <= n <= number + 1]:
            del self._held[old]
        return self._held[number].result()

    def _hold(self, number: int) -> _Held:
        """Draw a window and ask for its photos."""
        first_step, turns = self._plan.steps(number).start, self._turns_before(number)
        window = make_window(self._index, self._groups(number), self._seed, first_step, self._run, turns)
        requests = []
        for run in np.unique(window.run[:, self._slots]).tolist():
            group, rows = window.runs[run]
            index = self._index[group]
            broken = (np.diff(rows) != 1) | (np.diff(index.shard[rows].astype(np.int64)) != 0)
            requests += [(group, piece) for piece in np.split(rows, np.flatnonzero(broken) + 1)]
        requests.sort(key=lambda r: (r[0], int(r[1][0])))
        held = _Held(window, {})
        for group, rows in requests:
            photos = self._pool.submit(self._reader.read_run, group, int(rows[0]), len(rows))
            held.photos.update(((group, row), (photos, position)) for position, row in enumerate(rows.tolist()))
        return held

    def _groups(self, number: int) -> np.ndarray:
        """The groups of a window's slots, int [steps, batch size]."""
        return np.stack([np.asarray(self._schedule(step)) for step in self._plan.steps(number)])

    def _turns_before(self, number: int) -> Counter[int]:
        """How many runs of each group the windows before one read: a function of the schedule alone."""
        if number < self._counted:
            self._counted, self._turns = 0, Counter()
        while self._counted < number:
            if self._closed:
                raise CancelledError
            self._turns.update({g: int(n.sum()) for g, n in count_runs(self._groups(self._counted), self._run).items()})
            self._counted += 1
        return self._turns
