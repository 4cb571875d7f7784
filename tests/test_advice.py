"""Settings that are seldom meant are told at a run's start, and only those."""

import errno
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import ZONE, class_table, configure, train_here, write_queries

from shards.dataset import Dataset
from shards.layout import shard_tables
from shards.names import PhotoName, format_name
from shards.sample_photos import SamplePhotos
from training.advice import warnings_of
from training.distributed import World

ALONE = World(0, 1, torch.device("cpu"))


def told(tmp_path: Path, *, side: int = 4, photo_size: int = 32, begins: bool = True, **values: object) -> list[str]:
    """The warnings of a run on `side` x `side` cells in four groups."""
    config = configure("shards", tmp_path / "r", **{"epochs": 4, **values})
    return warnings_of(config, class_table(side), photo_size, ALONE, begins=begins)


def test_a_usual_run_is_told_nothing(tmp_path: Path) -> None:
    assert told(tmp_path) == []


@pytest.mark.parametrize(("epochs", "left"), [(1, 3), (3, 1), (4, 0), (9, 0)])
def test_epochs_that_leave_groups_without_training_are_told(tmp_path: Path, epochs: int, left: int) -> None:
    said = told(tmp_path, epochs=epochs)
    assert [f"{left} of 4 groups are never trained" in line for line in said] == [True] * bool(left)
    assert told(tmp_path, epochs=epochs, schedule="joint") == []


def test_random_weights_that_are_frozen_are_told_unless_others_take_their_place(tmp_path: Path) -> None:
    (said,) = told(tmp_path, freeze_until=3)
    assert "the first 3 children of the backbone keep random weights" in said
    assert "--freeze-until 0" in said
    assert told(tmp_path, freeze_until=3, begins=False) == []
    assert told(tmp_path, freeze_until=3, weights="imagenet") == []
    assert told(tmp_path, freeze_until=0) == []


def test_photos_smaller_than_the_crops_are_told(tmp_path: Path) -> None:
    (said,) = told(tmp_path, photo_size=24)
    assert "--image-size 32: enlarges the data set's photos of 24 pixels" in said
    assert told(tmp_path, photo_size=48) == []


def test_groups_of_a_single_class_are_told(tmp_path: Path) -> None:
    (said,) = told(tmp_path, side=2)
    assert "4 of 4 groups have a single class" in said
    assert told(tmp_path, side=3)[0].startswith("warning: 1 of 4 groups has a single class")
    (said,) = told(tmp_path, side=1)
    assert "a single class" in said
    assert "group" not in said


def test_a_training_prints_its_warnings_before_its_first_step_and_a_resumed_one_not_those_of_its_beginning(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few: dict[str, object] = {"epochs": 1, "iterations_per_epoch": 1, "freeze_until": 1}
    train_here(configure(shards, tmp_path / "r", **few))
    printed = capsys.readouterr().out
    assert printed.index("3 of 4 groups are never trained") < printed.index("sequential schedule")
    assert "keep random weights" in printed
    train_here(configure(shards, tmp_path / "r", resume=True, **few | {"epochs": 2}))
    printed = capsys.readouterr().out
    assert "2 of 4 groups are never trained" in printed
    assert "random weights" not in printed
    train_here(configure(shards, tmp_path / "r2", init_from=tmp_path / "r", **few))
    assert "random weights" not in capsys.readouterr().out


@pytest.mark.parametrize(("warmup", "warned"), [(8, True), (7, False)])
def test_a_warmup_as_long_as_the_run_is_told(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], warmup: int, warned: bool
) -> None:
    train_here(configure(shards, tmp_path / "r", epochs=1, lr_schedule="cosine", warmup_steps=warmup))
    assert ("warning: --warmup-steps 8 of 8 steps: the learning rate never gets" in capsys.readouterr().out) == warned


def test_windows_of_few_runs_for_many_classes_are_told(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream: dict[str, object] = {"read": "stream", "stream_run": 8, "epochs": 1}
    classes = max(Dataset.open(shards).classes.count(group) for group in range(4))
    train_here(configure(shards, tmp_path / "r", stream_window=8 * classes, **stream))
    assert "may be less accurate" not in capsys.readouterr().out
    train_here(configure(shards, tmp_path / "r2", stream_window=8 * classes - 8, **stream))
    assert (
        f"holds {classes - 1} runs of each group at a time where one has {classes} classes" in capsys.readouterr().out
    )
    train_here(configure(shards, tmp_path / "r3", stream_window=8 * classes, schedule="joint", **stream))
    assert "may be less accurate" in capsys.readouterr().out


def test_validation_queries_that_are_the_training_photos_are_told(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = [pq.read_table(table, columns=["east", "north"]) for table in shard_tables(shards)]
    east, north = (np.concatenate([table[axis].to_numpy() for table in tables]) for axis in ("east", "north"))
    photo = next(write_queries(tmp_path / "photo").iterdir())
    few: dict[str, object] = {"epochs": 1, "iterations_per_epoch": 1}
    for name, off, told in (("same", 0.0, True), ("others", 0.5, False)):
        (tmp_path / name).mkdir()
        for i, place in enumerate(zip((east + off).tolist(), north.tolist(), strict=True)):
            (tmp_path / name / format_name(PhotoName(*place, ZONE, "S", pano=str(i)))).hardlink_to(photo)
        train_here(configure(shards, tmp_path / f"run-{name}", val_queries=tmp_path / name, **few))
        assert ("100 of 100 queries that were compared lie at the very place" in capsys.readouterr().out) == told


def test_a_sample_table_that_cannot_be_read_keeps_no_training_from_its_validation(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "group-00-000000.parquet")

    monkeypatch.setattr(SamplePhotos, "_photos", refuse)
    train_here(configure(shards, tmp_path / "run", val_queries=write_queries(tmp_path / "queries"), epochs=1))
    assert "warning: group-00-000000.parquet: Permission denied" in capsys.readouterr().out
