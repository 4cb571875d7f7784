"""One of several processes is killed or gets a signal: torchrun starts all again, or all save and leave."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tiny import arguments, start_training, train, write_dataset

from training.checkpoint import checkpoint_step, list_checkpoints, load_checkpoint
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


def test_a_signal_to_one_of_two_processes_stops_both_and_the_end_is_that_of_an_undisturbed_run(tmp_path: Path) -> None:
    shards = write_dataset(tmp_path / "shards").path
    settings = {"schedule": "joint", "epochs": 2, "iterations_per_epoch": 40, "ema": 0.9}
    code, _, err = train(arguments(shards, tmp_path / "whole", **settings), processes=2)
    assert code == 0, err
    words = arguments(shards, tmp_path / "r", resume=True, save_every=3, **settings)
    for rank, number, step in ((1, signal.SIGUSR1, 3), (0, signal.SIGTERM, 43)):
        launcher = start_training(words, processes=2)
        wait_for_step(tmp_path / "r", step, launcher)
        process_of_rank(rank, psutil.Process(launcher.pid)).send_signal(number)
        out, err = launcher.communicate(timeout=300)
        assert launcher.returncode == 0, err
        assert out.count("stopped by ") == 1
    code, out, err = train(words, processes=2)
    assert code == 0, err
    assert "goes on from" in out
    assert read_losses(tmp_path / "r") == read_losses(tmp_path / "whole")
    whole, ended = (load_checkpoint(list_checkpoints(tmp_path / name)[0]) for name in ("whole", "r"))
    for name, tensor in whole.model.items():
        assert torch.equal(tensor, ended.model[name]), name
    for name, tensor in whole.training.tensors.items():
        assert torch.equal(tensor, ended.training.tensors[name]), name
    own = [whole.training.tensors[f"average_batch_norms.{rank}"][0] for rank in range(2)]
    assert not torch.equal(*own)
    means = torch.cat([tensor for name, tensor in whole.model.items() if name.endswith("running_mean")])
    torch.testing.assert_close(means, (own[0] + own[1]) / 2, rtol=1e-5, atol=1e-6)
