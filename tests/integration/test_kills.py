"""A run that is killed again and again, at any moment, ends as one that never was."""

import multiprocessing as mp
import random
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tiny import configure, train_here

from training.checkpoint import checkpoint_step, list_checkpoints
from training.run_folder import read_losses

pytestmark = pytest.mark.slow

KILLS, SAVE_EVERY = 20, 2


def run(shards: Path, out: Path) -> None:
    settings = {"epochs": 6, "iterations_per_epoch": 20, "save_every": SAVE_EVERY, "batch_size": 8}
    train_here(configure(shards, out, resume=True, **settings))


def latest_step(out: Path) -> int:
    """The step of the latest checkpoint, 0 where there is none."""
    return max((checkpoint_step(path) for path in list_checkpoints(out)), default=0)


def test_twenty_kills_at_random_moments_leave_the_losses_bit_for_bit(shards: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "whole")
    processes = mp.get_context("forkserver")  # children start with everything imported: most of their time is training
    processes.set_forkserver_preload(["training.trainer"])
    moments = random.Random(0)
    rounds = 0
    killed_at: list[int] = []
    while len(killed_at) < KILLS:
        out = tmp_path / f"killed-{rounds}"
        child = processes.Process(target=run, args=(shards, out))
        goal = latest_step(out) + SAVE_EVERY * moments.randrange(5)  # so that a slow machine is killed in training too
        child.start()
        while child.is_alive() and latest_step(out) < goal:
            time.sleep(0.005)
        child.join(moments.uniform(0.0, 0.3))
        if child.exitcode is None:
            child.kill()
            child.join()
        if child.exitcode == -signal.SIGKILL:
            killed_at.append(latest_step(out))
        else:
            assert child.exitcode == 0
            rounds += 1
    assert len(set(killed_at)) > KILLS / 3
    for number in range(rounds + 1):
        out = tmp_path / f"killed-{number}"
        run(shards, out)
        assert read_losses(out) == read_losses(tmp_path / "whole")
        assert not [path.name for path in (out / "checkpoints").iterdir() if path.name.startswith(".")]
