"""Runs that answer well without training: every class's weight is the descriptor of a photo of its cell."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny import class_table, photo

from evaluation import evaluate
from evaluation.calibration import Calibration
from evaluation.ranking import RankingForm
from shards.classes import ClassTable
from shards.provenance import provenance
from training.checkpoint import Checkpoint, TrainingState, save_checkpoint
from training.heads import Head, HeadKind, ScoreForm
from training.model import GeoModel, to_input
from training.presets import TrainConfig

IMAGE_SIZE = 28  # queries are then read at 32 pixels, the size of the photos


def write_run(
    path: Path,
    classes: ClassTable | None = None,
    *,
    head: HeadKind = "AAMC",
    form: ScoreForm = "cosine",
    val_queries: Path | None = None,
    val_photos: str = "",
) -> Path:
    """Write a run with one checkpoint, whose heads know every class of `classes` (default: those of `tiny`)."""
    classes = classes or class_table()
    config = TrainConfig(
        shards="shards", out=path, backbone="small_cnn", weights="none", freeze_until=0, descriptor_dim=32,
        head=head, s=30.0, m=0.1, score_form=form, image_size=IMAGE_SIZE, precision="fp32",
        val_queries=val_queries,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GeoModel("small_cnn", "none", 0, 32).eval()
    heads = {}
    for group in classes.groups:
        some = classes.of_group(group)
        cells = zip(some.cell_east.tolist(), some.cell_north.tolist(), strict=True)
        photos = torch.stack([torch.from_numpy(photo(east, north, 32, 7)) for east, north in cells])
        heads[group] = Head(head, 32, len(some), 30.0, 0.1)
        with torch.no_grad():
            mean = model(to_input(photos)).mean(0)
            heads[group].weight.copy_(model(to_input(photos)) - 0.9 * mean)
    save_checkpoint(
        path,
        Checkpoint(
            model=model.state_dict(),
            heads={group: dict(head.state_dict()) for group, head in heads.items()},
            classes=classes,
            config=config.to_json(),
            training=TrainingState({}, {}),
            state={"step": 7} | ({"progress": {"val_photos": val_photos}} if val_photos else {}),
            provenance=provenance(),
        ),
    )
    return path


def store_calibration(run: Path, form: RankingForm, temperature: float) -> None:
    """Store a calibration with the run's checkpoint, as evaluate.py does."""
    folder = next(run.rglob("model.safetensors")).parent
    Calibration(form, {form: temperature}, "val", 1, {form: 50.0}, {form: 9.0}, {form: 1.0}).save(folder)


def evaluate_here(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit code of evaluate.py with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words), "--cpu", "--threads", "1"])
    return evaluate.main()
