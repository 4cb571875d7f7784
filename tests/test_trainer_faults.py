"""What must not spoil a run: losses that are not finite, a full disk, a second training in the same folder."""

import json
import os
import resource
import signal
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import configure, fill, small_disk, train_here
from tiny_run import write_run

import training.engine as engine_module
import training.trainer as trainer_module
from shards.console import JobError
from shards.locks import LOCK
from training.checkpoint import best_checkpoint, list_checkpoints
from training.run_folder import lock_run, read_losses
from training.trainer import Trainer

Failing = Callable[[int], bool]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Failing], None]:
    """Makes the losses of chosen steps NaN."""

    def install(fails: Failing) -> None:
        original = engine_module.Engine.step

        def step(self, step, images, labels, groups, **options):
            images = images.permute(0, 3, 1, 2).float() / 255
            return original(self, step, images * float("nan") if fails(step) else images, labels, groups, **options)

        monkeypatch.setattr(engine_module.Engine, "step", step)

    return install


def test_a_step_that_is_not_finite_is_skipped_and_counted(
    shards: Path, tmp_path: Path, failing: Callable[[Failing], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(lambda step: step == 3)
    trainer = train_here(configure(shards, tmp_path / "r"))
    assert trainer.progress.skipped == 1
    assert np.flatnonzero(np.isnan(read_losses(tmp_path / "r"))).tolist() == [3]
    assert "skipped 1 step whose loss was not finite" in capsys.readouterr().out


def test_many_such_steps_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(
    shards: Path, tmp_path: Path, failing: Callable[[Failing], None]
) -> None:
    failing(lambda step: step >= 10)
    with pytest.raises(JobError, match=r"4 steps in a row.*last good checkpoint is .*step-00000008"):
        train_here(configure(shards, tmp_path / "r", nan_patience=4))


def test_such_steps_in_a_row_are_counted_over_epochs_and_no_checkpoint_is_saved_among_them(
    shards: Path, tmp_path: Path, failing: Callable[[Failing], None]
) -> None:
    failing(lambda step: step >= 10)
    with pytest.raises(JobError, match=r"12 steps in a row.*last good checkpoint is .*step-00000008"):
        train_here(configure(shards, tmp_path / "r", nan_patience=12, epochs=4))


def test_a_run_of_which_every_step_was_skipped_has_failed(
    shards: Path, tmp_path: Path, failing: Callable[[Failing], None]
) -> None:
    failing(lambda step: True)
    with pytest.raises(JobError, match="no step of this start had a finite loss"):
        train_here(configure(shards, tmp_path / "r", nan_patience=99))


def test_weights_that_are_not_finite_are_never_saved_nor_called_the_best(
    shards: Path, queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = engine_module.Engine.step

    def spoil(self, step, *batch, **options):
        if step == 12:
            with torch.no_grad():
                self.model.projection.bias.fill_(float("nan"))
        return original(self, step, *batch, **options)

    monkeypatch.setattr(engine_module.Engine, "step", spoil)
    config = configure(shards, tmp_path / "r", nan_patience=99, val_queries=queries)
    with pytest.raises(
        JobError, match=r"weights after step 16 are not finite .*last good checkpoint is .*step-00000008"
    ):
        train_here(config)
    assert [path.name for path in list_checkpoints(config.out)] == ["step-00000008"]
    assert best_checkpoint(config.out) == list_checkpoints(config.out)[0]


def test_a_last_step_that_is_skipped_costs_no_sound_weights(
    shards: Path, tmp_path: Path, failing: Callable[[Failing], None]
) -> None:
    failing(lambda step: step == 15)
    train_here(configure(shards, tmp_path / "r"))
    assert list_checkpoints(tmp_path / "r")[0].name == "step-00000016"


@contextmanager
def small_files(folder: Path) -> Iterator[Path]:
    """A folder; whatever limit this process then sets on the size of files is taken back."""
    folder.mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield folder
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("place", [small_disk, small_files])
def test_a_disk_that_fills_up_while_saving_leaves_the_previous_checkpoint_whole(
    shards: Path, tmp_path: Path, place: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    with place(tmp_path / "disk") as folder:
        out = folder / "r"
        train_here(configure(shards, out, epochs=1, descriptor_dim=64))
        whole = {path: path.read_bytes() for path in sorted(list_checkpoints(out)[0].iterdir())}
        if place is small_files:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        else:
            fill(folder, leave=200_000)
        with pytest.raises(JobError, match=r"cannot be saved .*last whole one is .*step-00000008; free some space"):
            train_here(configure(shards, out, resume=True, descriptor_dim=64))
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000008"]
        assert {path: path.read_bytes() for path in sorted(list_checkpoints(out)[0].iterdir())} == whole
        if place is small_disk:
            (folder / "other").unlink()
            assert train_here(configure(shards, out, resume=True, descriptor_dim=64)).progress.step == 16


def test_a_run_folder_is_not_overwritten(shards: Path, tmp_path: Path) -> None:
    config = configure(shards, tmp_path / "r", epochs=1)
    train_here(config)
    with pytest.raises(JobError, match=r"already holds a run \(up to step-00000008\)"):
        Trainer(config)
    foreign = tmp_path / "other"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("")
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / ".config.json.7-0a1b2c3d.partial").write_text("{")  # what a kill at the first file leaves
    assert train_here(configure(shards, killed, epochs=1)).progress.step == 8
    assert not list(killed.glob(".config*"))
    with pytest.raises(JobError, match="holds files that are no run"):
        Trainer(configure(shards, foreign))
    with pytest.raises(JobError, match="is a file"):
        Trainer(configure(shards, foreign / "thesis.tex"))
    with pytest.raises(JobError, match="lies in a data set"):
        Trainer(configure(shards, shards / "runs" / "r"))


def test_a_second_training_is_kept_out_of_a_run_until_the_first_is_gone_however_it_ends(
    shards: Path, tmp_path: Path
) -> None:
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        lock = lock_run(tmp_path / "r")
        os.write(writer, str(lock is not None).encode())
        signal.pause()
    try:
        assert os.read(reader, 10) == b"True"
        held = rf"process {child} on \S+ is training there now; wait .*another --out$"
        with pytest.raises(JobError, match=held):
            train_here(configure(shards, tmp_path / "r"))
        assert [path.name for path in (tmp_path / "r").iterdir()] == [LOCK]
        (tmp_path / "r" / "config.json").write_text("{}")  # begun, and no checkpoint yet
        for resume in (False, True):
            with pytest.raises(JobError, match=held):
                train_here(configure(shards, tmp_path / "r", resume=resume))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with pytest.raises(JobError, match=r"already holds a run \(without a checkpoint\)"):
        train_here(configure(shards, tmp_path / "r", epochs=1))
    (tmp_path / "r" / "config.json").unlink()
    train_here(configure(shards, tmp_path / "r", epochs=1))


def test_a_run_that_came_and_went_while_another_started_is_not_overwritten(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = configure(shards, tmp_path / "r", epochs=1)
    original = trainer_module.lock_run

    def lock_after_another_run(out: Path) -> TextIO | None:
        monkeypatch.setattr(trainer_module, "lock_run", original)
        train_here(late)
        return original(out)

    monkeypatch.setattr(trainer_module, "lock_run", lock_after_another_run)
    with pytest.raises(JobError, match=r"already holds a run \(up to step-00000008\)"):
        train_here(late)


def test_a_run_does_not_start_from_weights_that_are_not_finite(shards: Path, tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path / "other") / "checkpoints" / "step-00000007"
    heads = load_file(checkpoint / "heads.safetensors")
    heads["0.weight"][1, 2] = float("inf")
    save_file(heads, checkpoint / "heads.safetensors")
    listing = json.loads((checkpoint / "files.json").read_text())
    listing["files"]["heads.safetensors"]["crc32"] = zlib.crc32((checkpoint / "heads.safetensors").read_bytes())
    (checkpoint / "files.json").write_text(json.dumps(listing))
    with pytest.raises(JobError, match=r"step-00000007: weight holds numbers that are not finite"):
        train_here(configure(shards, tmp_path / "r", init_from=checkpoint))
