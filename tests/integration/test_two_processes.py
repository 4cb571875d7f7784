"""Runs of several processes on the CPU, started as a user starts them."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tiny import ROOT, arguments, assess_run, class_table, train, write_dataset, write_queries

from shards.layout import CLASSES
from training.checkpoint import checkpoint_step, list_checkpoints, load_checkpoint, load_for_evaluation, training_values
from training.run_folder import read_losses

pytestmark = pytest.mark.slow

ACCELERATE_CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
use_cpu: true
mixed_precision: "no"
num_machines: 1
num_processes: 2
machine_rank: 0
main_training_function: main
rdzv_backend: static
same_network: true
main_process_port: {port}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return write_dataset(folder / "shards").path, write_queries(folder / "queries")


def test_two_processes_under_accelerate_launch_train_validate_and_save(data: tuple[Path, Path], tmp_path: Path) -> None:
    config = tmp_path / "cpu.yaml"
    config.write_text(ACCELERATE_CONFIG.format(port=20000 + os.getpid() % 20000))
    few = {"iterations_per_epoch": 2, "tracker": "tensorboard"}
    words = arguments(data[0], tmp_path / "r", val_queries=data[1], schedule="joint", epochs=4, **few)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "training/train.py"]
    done = subprocess.run(
        [*command, *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes on cpu" in done.stdout
    assert sum(line.startswith("epoch ") for line in done.stdout.splitlines()) == 4
    weights = load_for_evaluation(tmp_path / "r")
    assert sorted(weights.heads) == [0, 1, 2, 3]
    outcome = assess_run(tmp_path / "r", data[1])  # queries and heads of both processes
    curves = EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload()
    step = checkpoint_step(weights.path)
    for name, value in (("LR@1", outcome.recall[1]), ("median_error_m", np.median(outcome.distances[:, 0]))):
        (found,) = (point.value for point in curves.Scalars(f"val/{name}") if point.step == step)
        assert found == pytest.approx(value)


@pytest.mark.parametrize(
    ("before", "after", "settings"),
    [(2, 1, {}), (2, 1, {"shard_head": True, "ema": 0.9}), (1, 2, {"shard_head": True, "ema": 0.9}), (2, 3, {})],
)
def test_a_run_goes_on_with_fewer_or_more_processes_and_says_so(
    data: tuple[Path, Path], tmp_path: Path, before: int, after: int, settings: dict[str, object]
) -> None:
    rates = {"lr_schedule": "plateau", "warmup_steps": 0}
    words = arguments(data[0], tmp_path / "r", schedule="joint", **rates, **settings)
    code, _, err = train(words, processes=before)
    assert code == 0, err
    code, out, err = train([*words, "--resume", "--epochs", "3"], processes=after)
    assert code == 0, err
    assert f"{before} -> {after} processes" in out
    losses = read_losses(tmp_path / "r")
    assert len(losses) == 24
    assert sum(losses[16:]) < sum(losses[:8])  # it goes on from what it had learnt
    state = load_checkpoint(list_checkpoints(tmp_path / "r")[0]).training
    assert float(state.tensors["heads.3.adam.weight.step"]) == 24
    # The plateau schedule saw what all ranks lost on average.
    epochs = [sum(losses[first : first + 8]) / 8 for first in (0, 8, 16)]
    plateau = training_values(state)["rates"]
    assert plateau["best"] == pytest.approx(min(epochs), rel=1e-6)
    assert plateau["last_epoch"] == 3  # one step an epoch


@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (2, {"schedule": "joint", "shard_head": True, "batch_size": 9}),
        (2, {"shard_head": True, "head_sample_rate": 0.5, "accumulate": 2}),
        (4, {"schedule": "joint", "batch_size": 18}),
        (3, {"schedule": "joint", "read": "stream", "stream_run": 7, "stream_window": 50, "batch_size": 10}),
    ],
)
def test_nothing_hangs_where_samples_and_classes_do_not_divide_among_the_processes(
    tmp_path: Path, processes: int, settings: dict[str, object]
) -> None:
    shards = write_dataset(tmp_path / "shards", class_table(side=5), images=11).path
    code, out, err = train(arguments(shards, tmp_path / "r", **settings), processes=processes)
    assert code == 0, err
    assert f"{processes} processes on cpu" in out
    losses = read_losses(tmp_path / "r")
    assert len(losses) == 16
    assert all(math.isfinite(loss) for loss in losses)


def test_photos_that_any_process_replaced_are_named_and_counted(data: tuple[Path, Path], tmp_path: Path) -> None:
    shards = shutil.copytree(data[0], tmp_path / "shards")
    for tar in shards.glob("group-*/*.tar"):
        tar.chmod(0o644)
        offset, size = map(int, tar.with_suffix(".idx").read_text().split("\n")[1].split()[1:3])
        with tar.open("r+b") as file:  # one photo of forty
            os.pwrite(file.fileno(), b"damaged", offset + size // 2)
    code, out, err = train(arguments(shards, tmp_path / "r", epochs=4), processes=2)
    assert code == 0, err
    named = err.count("replaced by the next draw")
    assert f"replaced {named} samples that could not be read by other draws" in out


def test_an_error_of_all_processes_is_told_once(tmp_path: Path) -> None:
    shards = write_dataset(tmp_path / "shards", class_table(side=2)).path
    code, _, told = train(arguments(shards, tmp_path / "r", shard_head=True), processes=2)
    assert code == 1
    assert told.count("error: --shard-head: group 0 has 1 classes for 2 processes\n") == 1


def test_a_data_set_that_the_first_process_cannot_open_is_told_once(tmp_path: Path) -> None:
    shards = write_dataset(tmp_path / "shards", class_table(side=2), images=9).path
    class_table(side=2).save(shards / CLASSES)  # ten photos a class
    code, _, told = train(arguments(shards, tmp_path / "r"), processes=2)
    assert code == 1
    assert told.count("its sample tables do not fit classes.parquet") == 1
    assert "gloo" not in told  # no rank was left alone in a barrier


def test_three_processes_that_go_on_have_the_losses_of_three_that_never_stopped(
    data: tuple[Path, Path], tmp_path: Path
) -> None:
    for out, epochs in (("whole", 3), ("r", 1), ("r", 3)):
        code, _, err = train(arguments(data[0], tmp_path / out, epochs=epochs, resume=True), processes=3)
        assert code == 0, err
    assert len(read_losses(tmp_path / "r")) == 24
    assert read_losses(tmp_path / "r") == read_losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("place", "told_as"),
    [
        ("file/r", "file/r: Not a directory"),
        ("r", "r/checkpoints: File exists); there is none before it; mend that and go on"),
    ],
)
def test_a_folder_that_the_first_process_cannot_write_is_told_once(
    data: tuple[Path, Path], tmp_path: Path, place: str, told_as: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.json").write_text("{}")
    (tmp_path / "r" / "checkpoints").write_text("")  # a file where the folder should be
    code, _, told = train(arguments(data[0], tmp_path / place, resume=True), processes=2)
    assert code == 1
    assert (told.count("error: "), told.count(told_as)) == (1, 1)
    assert "gloo" not in told


def test_split_heads_start_from_the_rows_of_another_run(data: tuple[Path, Path], tmp_path: Path) -> None:
    code, _, err = train(arguments(data[0], tmp_path / "r", schedule="joint", epochs=1))
    assert code == 0, err
    still = {"epochs": 1, "iterations_per_epoch": 1, "lr": 1e-9, "head_lr": 1e-9, "lr_schedule": "constant"}
    words = arguments(data[0], tmp_path / "new", init_from=tmp_path / "r", schedule="joint", shard_head=True, **still)
    code, out, err = train(words, processes=2)
    assert code == 0, err
    assert "16 of 16 classes" in out
    old, new = (load_for_evaluation(tmp_path / name) for name in ("r", "new"))
    for group, head in old.heads.items():
        torch.testing.assert_close(new.heads[group]["weight"], head["weight"], atol=1e-6, rtol=0)


def test_wrong_arguments_are_told_once(tmp_path: Path) -> None:
    code, out, told = train([*arguments(tmp_path, tmp_path / "r"), "--no-such-flag"], processes=2)
    assert code == 1
    assert (out + told).count("Unrecognized options: --no") == 1
