"""A run that is killed again and again, at any moment, ends as one that never was."""

import multiprocessing as mp
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tiny import configure, train_here

from training.run_folder import read_losses

pytestmark = pytest.mark.slow

KILLS = 20


def run(shards: Path, out: Path) -> None:
    train_here(configure(shards, out, epochs=6, iterations_per_epoch=20, save_every=2, resume=True, batch_size=8))


def test_twenty_kills_at_random_moments_leave_the_losses_bit_for_bit(shards: Path, tmp_path: Path) -> None:
    run(shards, tmp_path / "whole")
    processes = mp.get_context("forkserver")  # children start with everything imported: most of their time is training
    processes.set_forkserver_preload(["training.trainer"])
    moments = random.Random(0)
    rounds = 0
    for _ in range(KILLS):
        child = processes.Process(target=run, args=(shards, tmp_path / f"killed-{rounds}"))
        child.start()
        child.join(moments.uniform(0.1, 0.8))
        if child.exitcode is not None:
            assert child.exitcode == 0
            rounds += 1
        child.kill()
        child.join()
    for number in range(rounds + 1):
        out = tmp_path / f"killed-{number}"
        run(shards, out)
        assert read_losses(out) == read_losses(tmp_path / "whole")
        assert not [path.name for path in (out / "checkpoints").iterdir() if path.name.startswith(".")]
