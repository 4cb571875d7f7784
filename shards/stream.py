"""Reading for hard disks and networks: runs of neighbouring photos of a class, one request each.

Shards are class-major, and within a class photos lie in a seeded random order, so a run of neighbours is a random
sample of its class. The global batches of some consecutive steps form a window. A window draws classes uniformly,
reads a run of `run` photos from a random place of each (going on at the class's beginning after its end), and
hands the photos out shuffled. It is a pure function of (seed, window number): a resumed run reads its window
again. Every slot's class and photo are uniform, as in `shards.sampler`; but up to `run` photos of a class lie
together in a window.

Slots are dealt out to eight lanes, slot i to lane i mod 8, and a run stays within a lane, so that with 1, 2, 4 or 8
ranks every run is read by one rank alone, and the draws are the same for any number of ranks.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from shards.index import GroupIndex
from shards.reader import ShardReader
from shards.sampler import Draws, IndexedSampler, philox, uniforms

_LANES = 8
_KEY = 0xFFFFFFFFFFFFFFFF  # keeps the windows' random numbers apart from those of slots


@dataclass(frozen=True)
class StreamSettings:
    """How photos are read: `run` neighbours in a request, `window` photos of the global batch in memory.

    A seek and a request of 32 photos of 10 kB take 7 ms on a hard disk, 4,500 photos a second.
    """

    run: int = 32
    window: int = 4096


@dataclass(frozen=True)
class Window:
    """The samples of some steps. `label`, `row` (of the group's index) and `run` have shape [steps, batch size];
    a run r is `runs[r]`: group, and the rows it reads."""

    number: int
    label: np.ndarray
    row: np.ndarray
    run: np.ndarray
    runs: list[tuple[int, np.ndarray]]


def make_window(index: dict[int, GroupIndex], groups: np.ndarray, seed: int, number: int, run: int) -> Window:
    """Draw a window; `groups` int [steps, batch size] is the group of every slot."""
    random = philox(seed, _KEY, number)
    label, row, of_run = (np.empty(groups.shape, np.int64) for _ in range(3))
    lanes = np.broadcast_to(np.arange(groups.shape[1]) % _LANES, groups.shape)
    runs: list[tuple[int, np.ndarray]] = []
    for group in np.unique(groups):
        of_group = index[int(group)]
        by_lane = [np.flatnonzero((groups == group) & (lanes == lane)) for lane in range(min(_LANES, groups.shape[1]))]
        counts = [-(-len(slots) // run) for slots in by_lane]
        drawn = np.split(_draw_evenly(random, len(of_group.labels), sum(counts)), np.cumsum(counts)[:-1])
        for slots, count, of_lane in zip(by_lane, counts, drawn, strict=True):
            labels = of_group.labels[of_lane]
            first = of_group.starts[labels]
            photos = of_group.starts[labels + 1] - first
            start = (random(count) * photos).astype(np.int64)
            rows = first[:, None] + (start[:, None] + np.arange(run)) % photos[:, None]
            shuffled = np.argsort(random(count * run), kind="stable")[: len(slots)]
            label.ravel()[slots] = np.repeat(labels, run)[shuffled]
            row.ravel()[slots] = rows.ravel()[shuffled]
            of_run.ravel()[slots] = shuffled // run + len(runs)
            runs += [(int(group), np.unique(r)) for r in rows]
    return Window(number, label, row, of_run, runs)


def _draw_evenly(random: Callable[[int], np.ndarray], classes: int, count: int) -> np.ndarray:
    """`count` of so many classes, int64 [count]: each equally likely, none again before all have been drawn."""
    rounds = -(-count // classes)
    return np.concatenate([np.argsort(random(classes), kind="stable") for _ in range(rounds)])[:count]


class Stream:
    """Sampler and reader of the stream mode: windows are read ahead, photos come from memory.

    `schedule(step)` gives the groups of the global batch; `slots` are those of this rank. A photo that is not in
    memory (a replacement for one that could not be read) is read by itself.
    """

    def __init__(
        self,
        index: dict[int, GroupIndex],
        reader: ShardReader,
        schedule: Callable[[int], np.ndarray],
        slots: np.ndarray,
        batch_size: int,
        seed: int,
        settings: StreamSettings,
    ) -> None:
        self._index, self._reader, self._schedule, self._slots, self._seed = index, reader, schedule, slots, seed
        self._steps = max(1, settings.window // batch_size)
        self._run = settings.run
        self._single = IndexedSampler(index, seed)
        self._pool = ThreadPoolExecutor(reader.parallel, thread_name_prefix="stream")
        self._windows: dict[int, Window] = {}
        self._held: dict[tuple[int, int], tuple[int, Future[list[bytes]], int]] = {}

    def draw(self, step: int, slots: np.ndarray, groups: np.ndarray, attempt: int = 0) -> Draws:
        """The samples of some slots; a later attempt of a slot draws as the indexed mode does."""
        if attempt:
            return self._single.draw(step, slots, groups, attempt)
        number, place = divmod(step, self._steps)
        self._advance(number)
        window = self._windows[number]
        crop = uniforms(self._seed, step, slots)[:, 2:]
        return Draws(np.asarray(groups, np.int64), window.label[place, slots], window.row[place, slots], crop)

    def expect(self, groups: np.ndarray, rows: np.ndarray) -> None:
        """Nothing to do: windows are read ahead."""

    def read(self, group: int, row: int) -> bytes:
        """The JPEG in `row` of a group's index, from memory; raises `OSError` as `ShardReader.read` does."""
        held = self._held.get((group, row))
        if held is None:
            return self._reader.read(group, row)
        _, photos, position = held
        return self._reader.check(group, row, photos.result()[position])

    def place(self, group: int, row: int) -> str:
        """Where a photo lies, for messages."""
        return self._reader.place(group, row)

    def close(self) -> None:
        """Stop reading ahead and close the shards."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._windows.clear()
        self._held.clear()
        self._reader.close()

    def _advance(self, number: int) -> None:
        """Hold a window and the next one; drop those that no batch under way needs any more."""
        for wanted in (number, number + 1):
            if wanted not in self._windows:
                steps = range(wanted * self._steps, (wanted + 1) * self._steps)
                groups = np.stack([np.asarray(self._schedule(step)) for step in steps])
                self._windows[wanted] = make_window(self._index, groups, self._seed, wanted, self._run)
                self._load(self._windows[wanted])
        for old in [n for n in self._windows if n < number - 1 or n > number + 1]:
            del self._windows[old]
            self._held = {key: held for key, held in self._held.items() if held[0] != old}

    def _load(self, window: Window) -> None:
        requests = []
        for run in np.unique(window.run[:, self._slots]).tolist():
            group, rows = window.runs[run]
            index = self._index[group]
            broken = (np.diff(rows) != 1) | (np.diff(index.shard[rows].astype(np.int64)) != 0)
            requests += [(group, piece) for piece in np.split(rows, np.flatnonzero(broken) + 1)]
        requests.sort(key=lambda r: (r[0], int(r[1][0])))
        for group, rows in requests:
            photos = self._pool.submit(self._reader.read_run, group, int(rows[0]), len(rows))
            for position, row in enumerate(rows.tolist()):
                self._held[group, row] = (window.number, photos, position)
