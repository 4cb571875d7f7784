"""Signals to a training: it saves and leaves, and a resumed run goes on as if nothing had happened."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from tiny import arguments, configure, start_training, train_here

import training.engine as engine_module
import training.trainer as trainer_module
import training.validation as validation_module
from training.checkpoint import list_checkpoints, load_checkpoint
from training.interruption import Interruption
from training.run_folder import read_losses


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_leaves_with_0_and_the_run_goes_on_as_if_nothing_happened(
    shards: Path, tmp_path: Path, number: signal.Signals
) -> None:
    whole = train_here(configure(shards, tmp_path / "whole", epochs=6))
    process = start_training(arguments(shards, tmp_path / "r", epochs=6))
    while not list_checkpoints(tmp_path / "r"):
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert f"stopped by {number.name} after step" in out
    stopped = load_checkpoint(list_checkpoints(tmp_path / "r")[0]).state["step"]
    assert 0 < stopped < 48
    assert len(read_losses(tmp_path / "r")) == stopped
    train_here(configure(shards, tmp_path / "r", epochs=6, resume=True))
    assert read_losses(tmp_path / "r") == read_losses(whole.config.out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_during_the_start_leaves_with_0_and_a_line(
    shards: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = start_training(arguments(shards, tmp_path / "r"))
    while not catches(process.pid, signal.SIGUSR1):  # caught last; coverage catches SIGTERM before us
        time.sleep(0.005)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out == f"stopped by {number.name} before the first step: nothing to save\n"


def catches(process: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    (mask,) = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{process}/status").read_text())
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["last step of an epoch", "validation", "last validation", "saving"])
def test_an_epoch_that_a_signal_cut_at_its_end_ends_in_the_resumed_run_as_if_nothing_happened(
    shards: Path, queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    settings: dict[str, object] = {"epochs": 3, "val_queries": queries, "val_batch_size": 4, "keep": 9, "patience": 1}
    if moment == "last validation":  # of a run that its rate ends before the last epoch
        settings |= {"epochs": 30, "val_every": 30, "lr": 1.1e-6, "head_lr": 1e-9}
    whole = train_here(configure(shards, tmp_path / "whole", **settings))
    step, read, save = engine_module.Engine.step, validation_module.read_queries, trainer_module.save_run

    def ask() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    def step_and_ask(self, number, *batch, **options):
        outcome = step(self, number, *batch, **options)
        if number == 7 and moment == "last step of an epoch":
            ask()
        return outcome

    def read_and_ask(*of, **options):
        for count, batch in enumerate(read(*of, **options)):
            if count == 1 and moment.endswith("validation"):
                ask()
            yield batch

    def save_and_ask(*of, **options):
        if moment == "saving":
            ask()
        save(*of, **options)

    with monkeypatch.context() as patch, Interruption() as interruption:
        patch.setattr(engine_module.Engine, "step", step_and_ask)
        patch.setattr(validation_module, "read_queries", read_and_ask)
        patch.setattr(trainer_module, "save_run", save_and_ask)
        stopped = train_here(configure(shards, tmp_path / "r", **settings), interruption)
        assert interruption.received == "SIGTERM"
    if moment == "last validation":
        assert stopped.progress.step == whole.progress.step < 30 * 8
    else:
        assert stopped.progress.step == 8
    resumed = train_here(configure(shards, tmp_path / "r", resume=True, **settings))
    assert read_losses(tmp_path / "r") == read_losses(tmp_path / "whole")
    assert resumed.progress == whole.progress
    assert resumed.engine.rates.state_dict() == whole.engine.rates.state_dict()
    assert (tmp_path / "r" / "best.json").read_text() == (tmp_path / "whole" / "best.json").read_text()
