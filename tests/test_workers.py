"""Worker processes end with the process that started them."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from shards.console import JobError
from shards.workers import ctrl_c_held_back, end_pool, finished

POOL = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from shards.workers import follow_parent

context = multiprocessing.get_context("spawn")
pool = ProcessPoolExecutor(1, context, follow_parent, (os.getpid(),))
print(pool.submit(os.getpid).result(), flush=True)
time.sleep(60)
"""


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or before it was read
        return False


def end(*processes: int) -> bool:
    """Whether the processes all end within 20 s.

    The system is asked: of a pool's worker that the pool's own thread has just reaped, `Process.is_alive` may still
    say yes.
    """
    deadline = time.monotonic() + 20
    while any(map(runs, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(runs, processes))


BROKEN = """
import multiprocessing, os, signal, time
from concurrent.futures import ProcessPoolExecutor
from shards.workers import end_pool

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    worker = pool.submit(os.getpid).result()
    tasks = [pool.submit(time.sleep, 600), *(pool.submit(len, bytes(1 << 20)) for _ in range(4))]
    while not tasks[1].running():
        time.sleep(0.01)
    os.kill(worker, signal.SIGKILL)
    end_pool(pool)
    print(all(task.done() for task in tasks))
"""


def test_a_pool_whose_worker_is_killed_ends_also_where_a_large_task_is_on_its_way_to_it(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n", done.stderr


CLOSED = """
import multiprocessing, os, time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from shards.workers import end_pool

closed, close = Counter(), Connection._close

def slowly(self):
    closed[self._handle] += 1
    time.sleep(0.2)
    close(self)

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    pool.submit(os.getpid).result()
    pool.submit(time.sleep, 600)
    reader = vars(pool)["_call_queue"]._reader.fileno()
    Connection._close = slowly
    end_pool(pool)
    print(closed[reader])
"""


def test_the_pipe_of_a_pool_whose_workers_are_killed_is_closed_once(tmp_path):
    script = tmp_path / "closed.py"
    script.write_text(CLOSED)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "1\n", done.stderr
    assert "Traceback" not in done.stderr


def test_an_idle_worker_ends_when_its_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", POOL], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    assert runs(worker)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert end(worker)


def test_ctrl_c_that_is_held_back_comes_after_the_block_also_where_another_thread_takes_it():
    ended, done = threading.Event(), threading.Event()
    threading.Thread(target=done.wait).start()

    def press() -> None:
        with ctrl_c_held_back():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            ended.set()

    with pytest.raises(KeyboardInterrupt):
        press()
    assert ended.is_set()
    done.set()


def test_a_pool_whose_thread_could_start_no_other_is_one_line_and_its_workers_end(monkeypatch):
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("multiprocessing.queues.Queue._start_thread", refuse)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    task = pool.submit(os.getpid)
    workers = list(vars(pool)["_processes"])
    vars(pool)["_executor_manager_thread"].join(10)
    with pytest.raises(JobError, match="no further thread can be started; allow more processes"):
        finished(pool, {task}, 0.05)
    end_pool(pool)
    assert workers
    assert end(*workers)


def test_a_pool_whose_worker_is_killed_while_its_tasks_are_looked_at_has_not_lost_its_thread(monkeypatch):
    def none_yet(running: set, *_: object) -> tuple[set, set]:
        monkeypatch.undo()
        os.kill(worker, signal.SIGKILL)
        vars(pool)["_executor_manager_thread"].join(10)
        return set(), running

    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    worker = pool.submit(os.getpid).result()
    task = pool.submit(time.sleep, 600)
    monkeypatch.setattr("shards.workers.wait", none_yet)
    assert finished(pool, {task}, 0.05) == {task}
    assert isinstance(task.exception(), BrokenProcessPool)
    end_pool(pool)


def test_a_pool_ends_where_no_thread_can_be_started_that_would_end_it(monkeypatch):
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    assert pool.submit(int, "7").result() == 7
    monkeypatch.setattr("threading.Timer.start", refuse)
    workers = [worker.pid for worker in multiprocessing.active_children() if worker.pid]
    end_pool(pool)
    assert workers
    assert end(*workers)
