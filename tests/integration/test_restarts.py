"""torchrun starts all processes again when one is killed, and the run goes on."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tiny import arguments, start_training, train, write_dataset

from training.checkpoint import checkpoint_step, list_checkpoints
from training.run_folder import read_losses

pytestmark = pytest.mark.slow


def process_of_rank(rank: int, launcher: psutil.Process) -> psutil.Process:
    """The training process of a rank among a launcher's children."""
    return next(child for child in launcher.children() if child.environ().get("RANK") == str(rank))


def wait_for_step(out: Path, step: int, launcher: subprocess.Popen[str]) -> None:
    """Wait until the run has a checkpoint of this step or a later one."""
    while not any(checkpoint_step(path) >= step for path in list_checkpoints(out)):
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.01)


def test_killed_ranks_are_started_again_and_the_losses_are_those_of_a_run_without_kills(tmp_path: Path) -> None:
    shards = write_dataset(tmp_path / "shards").path
    settings = {"schedule": "joint", "epochs": 6, "save_every": 4, "save_every_epochs": 6, "descriptor_dim": 16}
    words = arguments(shards, tmp_path / "r", resume=True, **settings)
    launcher = start_training(words, processes=2, restarts=2)
    for rank, step in ((0, 4), (1, 20)):
        wait_for_step(tmp_path / "r", step, launcher)
        process_of_rank(rank, psutil.Process(launcher.pid)).kill()
    out, err = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, err
    assert out.count("goes on from") == 2
    code, _, err = train(arguments(shards, tmp_path / "whole", **settings), processes=2)
    assert code == 0, err
    assert len(read_losses(tmp_path / "whole")) == 48
    assert read_losses(tmp_path / "r") == read_losses(tmp_path / "whole")
