"""Runs shard tasks on all cores, with progress, a clean Ctrl-C, and an early stop when too much is bad."""

import ctypes
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import cv2

from preprocessing.photos import Bad
from preprocessing.plan import ShardTask
from preprocessing.resize import Resizer
from preprocessing.shard_task import Monitor, ShardResult, Stopped, went_away, write_shard
from preprocessing.sources import Source
from shards.console import JobError
from shards.layout import SHARD_KINDS, shard_stem
from shards.mirror import scratch_folder
from shards.store import Store, answered
from shards.workers import ctrl_c_held_back, end_pool, finished, follow_parent

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """What every task of a build shares: shards go to the folder `out`, or to a `store` where there is one."""

    sources: tuple[Source, ...]
    out: Path
    resizer: Resizer
    store: Store | None = None

    @property
    def place(self) -> str:
        """Where shards go, for messages."""
        return self.store.url if self.store else str(self.out)

    def run(self, task: ShardTask, monitor: Monitor) -> ShardResult:
        """Write one shard; see `write_shard`. Into a store it goes when it is whole, its table last."""
        if self.store is None:
            if not self.out.is_dir():
                raise went_away(self.out)
            return write_shard(task, self.sources, self.out, self.resizer, monitor)
        with scratch_folder() as folder:
            result = write_shard(task, self.sources, folder, self.resizer, monitor)
            stem = shard_stem(task.group, task.number)
            for kind in SHARD_KINDS:
                self.store.put(folder / f"{stem}.{kind}", f"{stem}.{kind}")
        return result


@dataclass(frozen=True)
class Counts:
    """Photos seen so far by all workers: all, those set aside, and bytes read."""

    photos: int
    bad: int
    source_bytes: int


def run_tasks(
    job: Job, tasks: Iterator[ShardTask], workers: int, progress: Callable[[Counts], bool]
) -> Iterator[ShardResult]:
    """Yield the results of `tasks` as they finish.

    `progress` is called several times a second and returns whether to go on. Where it does not, and on Ctrl-C, the
    workers drop the shards they are at; `Stopped` is raised with what those had set aside. Raises `JobError` where
    a worker failed or was killed.
    """
    context = multiprocessing.get_context("spawn")
    stop = context.RawValue("b", 0)
    counters = [context.Value("q", 0) for _ in range(3)]  # read without their locks, which a killed worker may hold
    pool = ProcessPoolExecutor(workers, context, _start_worker, (job, stop, counters, answered, os.getpid()))
    running: set[Future[ShardResult]] = set()
    try:
        for task in tasks:
            with ctrl_c_held_back():
                running.add(pool.submit(_work, task))
            while len(running) >= 2 * workers:
                yield from _finished(pool, running, counters, progress)
        while running:
            yield from _finished(pool, running, counters, progress)
    except Stopped:
        stop.value = 1
        begun = [future for future in running if future.running() or future.done()]
        raise Stopped([bad for future in begun for bad in _set_aside(future)]) from None
    except BrokenProcessPool:
        raise JobError(
            "a worker process was killed (out of memory?); the same command goes on where it was, "
            "fewer --workers need less memory"
        ) from None
    finally:
        stop.value = 1
        end_pool(pool)


def _set_aside(future: Future[ShardResult]) -> list[Bad]:
    error = future.exception()
    if isinstance(error, Stopped):
        return error.bad
    return [] if error else future.result().bad


def _finished(
    pool: ProcessPoolExecutor,
    running: set[Future[ShardResult]],
    counters: list["Synchronized[int]"],
    progress: Callable[[Counts], bool],
) -> Iterator[ShardResult]:
    done = finished(pool, running, _POLL_SECONDS)
    if not progress(Counts(*(counter.get_obj().value for counter in counters))):
        raise Stopped([])
    running -= done
    for future in done:
        yield future.result()


@dataclass
class _Worker:
    job: Job
    stop: ctypes.c_byte
    counters: list["Synchronized[int]"]

    def monitor(self, source_bytes: int, is_bad: bool) -> bool:
        for counter, value in zip(self.counters, (1, is_bad, source_bytes), strict=True):
            if value:
                with counter.get_lock():
                    counter.get_obj().value += value
        return not self.stop.value


_worker: _Worker


def _start_worker(
    job: Job, stop: ctypes.c_byte, counters: list["Synchronized[int]"], answered_before: set[str], parent: int
) -> None:
    global _worker
    follow_parent(parent)
    cv2.setNumThreads(1)
    answered.update(answered_before)
    _worker = _Worker(job, stop, counters)


def _work(task: ShardTask) -> ShardResult:
    return _worker.job.run(task, _worker.monitor)
