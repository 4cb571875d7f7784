"""How many workers there may be, and how the worker processes of a pool begin and end."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from shards import limits
from shards.console import NO_THREAD, JobError, lacks_thread

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1
_GRACE_SECONDS = 1.0
_POLL_SECONDS = 1.0
_PYTHON_CLOSES_THE_PIPE = sys.version_info >= (3, 12, 1) or (3, 11, 6) <= sys.version_info < (3, 12)


def cores_of_process() -> int:
    """The processors that this process may use, shared among this host's processes of a launch; at least 1."""
    return max(1, limits.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def follow_parent(parent: int) -> None:
    """End with the process `parent`, which started this one, however it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


@contextmanager
def ctrl_c_held_back() -> Iterator[None]:
    """Hold Ctrl-C back within this block: processes that start in it inherit that, and leave it to this process."""
    came = []  # filled where another thread, which does not block the signal, receives it
    before = signal.signal(signal.SIGINT, lambda *of: came.append(of))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def finished(pool: ProcessPoolExecutor, running: set[Future[T]], seconds: float) -> set[Future[T]]:
    """Those of `running` that are done, after a wait for one of up to so many seconds.

    Raises `JobError` where no further thread can be started: the pool's own thread then dies and no task would ever be
    done, or, from Python 3.12 on, says that the pool is broken.
    """
    done, _ = wait(running, seconds, FIRST_COMPLETED)
    if not done and _has_lost_its_thread(pool):
        done, _ = wait(running, 0)  # a thread that ended just now, since a worker was killed, has told all tasks so
        if not done:
            raise JobError(NO_THREAD)
    if any(_lacks_thread(task.exception()) for task in done):
        raise JobError(NO_THREAD)
    return done


def _lacks_thread(error: BaseException | None) -> bool:
    return isinstance(error, BrokenProcessPool) and lacks_thread(error.__cause__)


def run_tasks(tasks: Sequence[Callable[[], T]], workers: int) -> Iterator[T]:
    """Results of `tasks` as they finish, in this process or in several; raises `JobError` where one was killed."""
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from (task() for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, follow_parent, (os.getpid(),))
    try:
        waiting, running = iter(tasks), set[Future[T]]()
        while True:
            with ctrl_c_held_back():
                running |= {pool.submit(task) for task in islice(waiting, 2 * workers - len(running))}
            if not running:
                return
            done = finished(pool, running, _POLL_SECONDS)
            running -= done
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise JobError("a worker process was killed (out of memory?); fewer --workers need less memory") from None
    finally:
        end_pool(pool)


def end_pool(pool: ProcessPoolExecutor) -> None:
    """Drop what a pool has not begun and leave its workers a moment to end what they have; then they are killed.

    Do not cancel futures first: where a worker then dies, the pool's own thread fails and the process may wait for it
    for ever.
    """
    calls = vars(pool)["_call_queue"]  # Python has no other way to it
    killer = threading.Timer(_GRACE_SECONDS, _kill_children, (calls,))
    killer.daemon = True
    attended = not _has_lost_its_thread(pool)
    try:
        if attended:
            killer.start()
    except RuntimeError:  # no further thread can be started
        attended = False
    if not attended:
        _kill_children(calls)
    pool.shutdown(wait=attended, cancel_futures=True)
    killer.cancel()


def _has_lost_its_thread(pool: ProcessPoolExecutor) -> bool:
    thread = vars(pool)["_executor_manager_thread"]  # Python has no other way to it
    return thread is not None and not thread.is_alive()


def _kill_children(calls: Any) -> None:
    # Python 3.11.2, Debian 12's, waits for ever for the thread that puts a large task into a pipe which no worker reads
    # any more; closed, the pipe ends that thread. Later ones close it themselves (its issue 94777), and two threads
    # that close it at once may both do so, the second another file of the same number.
    if not _PYTHON_CLOSES_THE_PIPE:
        calls._reader.close()
    for process in multiprocessing.active_children():
        process.kill()
