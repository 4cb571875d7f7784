"""Builds that are killed, started twice, stopped or run out of disk."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import HERE, SETTINGS
from photos import write_photos
from test_build import COMMAND, contents
from tiny import fill, small_disk

from preprocessing.build import assemble, build, build_share
from preprocessing.engine import Job, run_tasks
from preprocessing.plan import ShardTask
from preprocessing.resize import Resizer
from preprocessing.shard_run import Machinery
from preprocessing.sources import Source
from shards.console import JobError
from shards.layout import shard_tables
from shards.workers import _GRACE_SECONDS


def start(source: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "--source", str(source), "--out", str(out), *more],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """Photos that take a second or so to build, and the bytes of an undisturbed build."""
    source = tmp_path_factory.mktemp("big") / "photos"
    write_photos(source, cells=64, per_cell=40, size=512)
    done = start(source, source.parent / "out")
    printed, _ = done.communicate()
    assert done.returncode == 0, printed
    return source, contents(source.parent / "out")


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_ends_with_the_bytes_of_an_undisturbed_run(big, tmp_path):
    source, expected = big
    rng = np.random.default_rng(0)
    kills = rounds = 0
    finished: dict[Path, int] = {}
    while kills < 20:
        out = tmp_path / str(rounds)
        process = start(source, out)
        time.sleep(rng.uniform(0.2, 1.8))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
        assert {t: t.stat().st_mtime_ns for t in finished} == finished
        finished = {t: t.stat().st_mtime_ns for t in shard_tables(out)}
        for table in finished:
            pq.read_table(table)
        if process.returncode == 0:
            assert contents(out) == expected
            rounds += 1
            finished = {}
    last = start(source, out)
    printed, _ = last.communicate()
    assert last.returncode == 0, printed
    assert contents(out) == expected
    assert {t: t.stat().st_mtime_ns for t in finished} == finished


@pytest.mark.slow
def test_a_second_command_beside_a_build_is_refused_and_the_build_ends_as_if_alone(big, tmp_path):
    source, expected = big
    out = tmp_path / "out"
    process = start(source, out)
    while not list(out.glob("group-*/.*.partial")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    commands = (build, assemble, partial(build_share, index=0, count=2))
    for command in commands:
        with pytest.raises(JobError, match="another command is at work"):
            command(Source.of(source), out, SETTINGS, Machinery(1))
    process.send_signal(signal.SIGCONT)
    process.communicate()
    assert process.returncode == 0
    assert contents(out) == expected


@pytest.mark.slow
def test_a_task_that_runs_is_not_started_twice_and_a_killed_one_is_done_by_its_second_run(big, tmp_path):
    place, expected = big
    source, out = Source.of(place), tmp_path / "out"
    process = start(place, out, "--task-index", "0", "--task-count", "2")
    while not list(out.glob("group-*/.*.partial")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGSTOP)
    with pytest.raises(JobError, match="task 0 of 2 is at work already"):
        build_share(source, out, SETTINGS, HERE, index=0, count=2)
    assert list(out.glob("group-*/.*.partial"))  # the shard that the stopped one is at
    assert build_share(source, out, SETTINGS, HERE, index=1, count=2) == 1
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    with pytest.raises(JobError, match=r"1 of 2 shards missing .* run task 0 of 2 again"):
        assemble(source, out, SETTINGS, HERE, count=2)
    build_share(source, out, SETTINGS, HERE, index=0, count=2)
    assemble(source, out, SETTINGS, HERE, count=2)
    assert contents(out) == expected


@pytest.mark.slow
def test_ctrl_c_ends_the_build_with_a_summary_and_the_command_goes_on(big, tmp_path):
    source, expected = big
    process = start(source, tmp_path / "out")
    while not list((tmp_path / "out").glob("group-*/.*.partial")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on from there" in printed
    assert "Traceback" not in printed
    assert not list((tmp_path / "out").glob("group-*/.*.partial"))
    again = start(source, tmp_path / "out")
    again.communicate()
    assert contents(tmp_path / "out") == expected


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_workers_that_hang(big, tmp_path):
    process = start(big[0], tmp_path / "out")
    while not list((tmp_path / "out").glob("group-*/.*.partial")):
        assert process.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    assert len(workers) == 2
    for worker in workers:
        os.kill(int(worker), signal.SIGSTOP)  # as one that waits for a disk that is gone
    os.kill(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on from there" in printed
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
    assert _GRACE_SECONDS <= 1  # of the two seconds that Ctrl-C may take


class Killed(Job):
    """The workers at its tasks are killed as soon as its folder is there."""

    def run(self, task, monitor):
        while not self.out.is_dir():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


def test_workers_that_are_killed_after_ctrl_c_while_tasks_wait_are_no_error_of_a_thread(tmp_path, monkeypatch):
    def press(counts):
        (tmp_path / "killed").mkdir()
        raise KeyboardInterrupt

    errors: list[object] = []
    monkeypatch.setattr(threading, "excepthook", errors.append)
    task = ShardTask(0, 0, [], [], [], [], [], [])
    with pytest.raises(KeyboardInterrupt):
        list(run_tasks(Killed((), tmp_path / "killed", Resizer(64, 90)), iter([task] * 9), 2, press))
    assert not errors
    assert not multiprocessing.active_children()


class KilledWhileItCounts(Job):
    """The first worker is killed while it holds the lock of a counter."""

    def run(self, task, monitor):
        monitor.__self__.counters[0].get_lock().acquire()
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_while_it_counts_is_no_hang(tmp_path):
    def hangs(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(30)
    try:
        task = ShardTask(0, 0, [], [], [], [], [], [])
        job = KilledWhileItCounts((), tmp_path, Resizer(64, 90))
        with pytest.raises(JobError, match="a worker process was killed"):
            list(run_tasks(job, iter([task] * 3), 2, lambda counts: True))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
def test_sigterm_to_all_processes_of_a_build_ends_it_as_ctrl_c_does_and_the_command_goes_on(big, tmp_path):
    command = big[0], tmp_path / "out", "--N", "8", "--workers", "2"
    process = start(*command)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < 3:  # multiprocessing's own, and workers
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)  # so that more tasks wait than workers begin, which are still at their imports
    os.killpg(process.pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on from there" in printed
    assert "Traceback" not in printed
    again = start(*command)
    printed, _ = again.communicate()
    assert again.returncode == 0, printed


@pytest.mark.slow
def test_a_full_disk_is_one_clear_line_and_leaves_nothing_half_written(big, tmp_path):
    source, _ = big
    limit = "import resource, sys, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); "
    limit += (
        f"sys.argv = {[str(c) for c in COMMAND[1:]]} + sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = tmp_path / "limited.py"
    script.write_text(f"if __name__ == '__main__':\n    {limit}\n")
    done = subprocess.run(
        [sys.executable, script, "--source", source, "--out", tmp_path / "out"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert re.search(r"/out/group-\d\d/group-\d\d-000000\.tar: File too large", done.stderr)
    assert "Traceback" not in done.stderr
    assert not shard_tables(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tar"))


@pytest.mark.slow
def test_a_build_that_filled_its_disk_goes_on_once_there_is_room(big, tmp_path):
    source, expected = big
    with small_disk(tmp_path / "disk") as disk:
        room = int(0.9 * sum(len(data) for data in expected.values()))
        fill(disk, leave=room)
        full = start(source, disk / "out")
        printed, _ = full.communicate()
        assert full.returncode == 1
        (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert re.search(r"/out/group-\d\d/group-\d\d-000000\.\w+: No space left on device; free some space", line)
        assert "Traceback" not in printed
        done = {table: table.stat().st_mtime_ns for table in shard_tables(disk / "out")}
        files = {path.with_suffix("") for path in (disk / "out").glob("group-*/*")}
        assert files == {table.with_suffix("") for table in done}
        (disk / "other").unlink()
        again = start(source, disk / "out")
        printed, _ = again.communicate()
        assert again.returncode == 0, printed
        assert {table: table.stat().st_mtime_ns for table in done} == done
        assert contents(disk / "out") == expected
