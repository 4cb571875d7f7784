"""Validation queries that no class can answer are told before the training begins."""

from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from tiny import SOUTH, WEST, ZONE, class_table, configure, photo

from shards.console import JobError
from shards.names import PhotoName, format_name
from training.distributed import World
from training.interruption import Interruption
from training.validation import Validator


def validator(folder: Path, places: list[tuple[float, float]]) -> Validator:
    """Validation on photos taken so many metres east and north of the corner of 4 x 4 cells of 20 m."""
    folder.mkdir()
    for i, (east, north) in enumerate(places):
        name = format_name(PhotoName(WEST + east, SOUTH + north, ZONE, "S", pano=str(i)))
        (folder / name).write_bytes(simplejpeg.encode_jpeg(photo(i, i, 32, 0)))
    config = configure("shards", folder / "run", val_queries=folder)
    return Validator(config, class_table(), World(0, 1, torch.device("cpu")), 1, Interruption())


def test_queries_of_which_none_is_near_enough_to_a_class_are_an_error_with_the_distance(tmp_path: Path) -> None:
    beside = [(80 + 400.0, 40.0), (80 + 15.5, 30.0)]  # the centres of the last column lie 70 m east
    away = r"none of 2 validation queries lies within 25 m of a class's centre \(the nearest: 25\.5 m; UTM zone"
    with pytest.raises(JobError, match=away):
        validator(tmp_path / "q", beside)


def test_the_line_about_the_queries_says_how_many_no_class_can_answer(tmp_path: Path) -> None:
    some = validator(tmp_path / "q", [(10, 10), (30, 20), (94, 30), (-300, 0)])
    assert some.describe_set() == (
        "4 validation queries, 1 of them farther than 25 m from every class (LR@N is at most 75.0 %)"
    )
    assert validator(tmp_path / "all", [(10, 10), (10, 11)]).describe_set() == "2 validation queries"


def test_one_query_is_one_query(tmp_path: Path) -> None:
    assert validator(tmp_path / "q", [(10, 10)]).describe_set() == "1 validation query"


def test_how_many_are_near_enough_is_what_brute_force_says(tmp_path: Path) -> None:
    places = np.random.default_rng(0).uniform(-60, 140, (40, 2))
    centers = class_table().centers() - (WEST, SOUTH)
    far = (np.linalg.norm(np.round(places, 2)[:, None] - centers, axis=2).min(axis=1) > 25).sum()
    some = validator(tmp_path / "q", [(east, north) for east, north in places])
    assert f"{far} of them farther than 25 m" in some.describe_set()
