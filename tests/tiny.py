"""A tiny data set and query folder for the tests of training: every class has a colour pattern of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from accelerate.state import AcceleratorState

from shards.classes import ClassTable
from shards.dataset import Dataset, Manifest
from shards.layout import CLASSES, FORMAT_VERSION, MANIFEST, sample_key, shard_stem
from shards.names import PhotoName, format_name
from shards.writer import ShardWriter, publish_shard
from training.checkpoint import load_for_evaluation
from training.heads import Head
from training.interruption import Interruption
from training.model import GeoModel
from training.presets import TrainConfig
from training.queries import list_queries, query_size
from training.scoring import QueryScores, assess_ranking, class_blocks, describe_queries, rank_classes
from training.trainer import Trainer

WEST, SOUTH, ZONE = 544000, 4180000, 10
ROOT = Path(__file__).resolve().parent.parent


def class_table(side: int = 4, M: int = 20, N: int = 2, shift: int = 0) -> ClassTable:
    """The classes of a square of `side` x `side` cells, its corner `shift` cells east of the usual place."""
    cells = [(WEST + (i + shift) * M, SOUTH + j * M) for i in range(side) for j in range(side)]
    cells.sort(key=lambda c: (c[0] // M % N * N + c[1] // M % N, c))
    group = np.array([e // M % N * N + n // M % N for e, n in cells], dtype=np.int32)
    label = np.array([int((group[:i] == group[i]).sum()) for i in range(len(cells))], dtype=np.int32)
    east, north = np.array(cells, dtype=np.int64).T
    return ClassTable(M, N, ZONE, group, label, east, north, np.full(len(cells), 10, dtype=np.int64))


def photo(east: int, north: int, size: int, seed: int) -> np.ndarray:
    """uint8 [size, size, 3]: a coarse pattern that depends on the cell, with noise that depends on `seed`."""
    pattern = np.random.default_rng([east, north]).integers(0, 256, (4, 4, 3))
    image = np.kron(pattern, np.ones((size // 4, size // 4, 1)))
    noise = np.random.default_rng([east, north, seed, 1]).normal(0, 20, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def write_dataset(path: Path, classes: ClassTable | None = None, *, size: int = 32, images: int = 10) -> Dataset:
    """Write a finished data set with `images` photos of `size` pixels for every class."""
    classes = classes or class_table()
    classes = replace(classes, images=np.full(len(classes), images, classes.images.dtype))
    for group in classes.groups:
        stem = path / shard_stem(group, 0)
        stem.parent.mkdir(parents=True)
        partial = stem.with_suffix(".partial")
        with partial.open("wb") as file:
            writer = ShardWriter(file)
            of_group = classes.of_group(group)
            for label, (east, north) in enumerate(zip(of_group.cell_east, of_group.cell_north, strict=True)):
                for i in range(images):
                    jpeg = simplejpeg.encode_jpeg(photo(int(east), int(north), size, i), quality=90)
                    facts = {"east": float(east), "north": float(north), "heading": 0.0, "timestamp": "", "source": ""}
                    writer.add(sample_key(label * images + i), label, jpeg, **facts)
            writer.finish()
        publish_shard(stem, partial, writer, {})
    classes.save(path / CLASSES)
    Manifest(
        FORMAT_VERSION, 0, classes.M, classes.N, 1, size, 90, "area", "simplejpeg", 0, classes.zone,
        len(classes.groups), len(classes), len(classes.groups), len(classes) * images, 0, 0, 0, "tiny",
    ).save(path / MANIFEST)  # fmt: skip
    return Dataset.open(path)


def write_queries(path: Path, classes: ClassTable | None = None, *, size: int = 32, each: int = 1) -> Path:
    """Write `each` query photos of every class, taken near the middle of its cell."""
    path.mkdir(parents=True)
    classes = classes or class_table()
    for row, (east, north) in enumerate(zip(classes.cell_east, classes.cell_north, strict=True)):
        for i in range(each):
            name = format_name(PhotoName(float(east) + 8, float(north) + 12, ZONE, "S", 37.7, -122.4, f"{row}-{i}"))
            jpeg = simplejpeg.encode_jpeg(photo(int(east), int(north), size, 1000 + i), quality=95)
            (path / name).write_bytes(jpeg)
    return path


TINY = {
    "backbone": "small_cnn",
    "weights": "none",
    "freeze-until": 0,
    "s": 30.0,
    "m": 0.1,
    "image-size": 32,
    "batch-size": 16,
    "lr": 1e-3,
    "head-lr": 1e-2,
    "precision": "fp32",
    "iterations-per-epoch": 8,
    "epochs": 2,
    "threads": 1,
    "tracker": "none",
}


def arguments(shards: Path, out: Path, **values: object) -> list[str]:
    """Command-line arguments of a tiny run; `values` override `TINY` (underscores for dashes, True for a flag)."""
    settings = {"shards": shards, "out": out, **TINY, **{k.replace("_", "-"): v for k, v in values.items()}}
    words: list[str] = []
    for name, value in settings.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def start_training(words: list[str], processes: int = 1, restarts: int = 0) -> subprocess.Popen[str]:
    """Start `training/train.py` on the CPU, under torchrun where there are several processes."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command += ["--max_restarts", str(restarts), "--"]
    settings = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, str(ROOT / "training" / "train.py"), *words],
        cwd=ROOT,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(words: list[str], processes: int = 1) -> tuple[int, str, str]:
    """Run `training/train.py` to its end: exit code, standard output, standard error."""
    process = start_training(words, processes)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def configure(shards: Path | str, out: Path, **values: object) -> TrainConfig:
    """The configuration of a tiny run in this process."""
    settings = {name.replace("-", "_"): value for name, value in TINY.items()}
    return TrainConfig(shards=str(shards), out=out, **{**settings, "cpu": True, **values})  # type: ignore[arg-type]


def train_here(config: TrainConfig, interruption: Interruption | None = None) -> Trainer:
    """Train in this process; Accelerate's state, of which there is one a process, is cleared first."""
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = Trainer(config, interruption)
    trainer.run()
    return trainer


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 64 MB; skips the test where this process may not mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, leave: int) -> None:
    """Fill a file system but for `leave` bytes by a file, DISK/other."""
    with (disk / "other").open("wb") as other:
        os.posix_fallocate(other.fileno(), 0, shutil.disk_usage(disk).free - leave)


def assess_run(out: Path, queries: Path) -> QueryScores:
    """How a run's best checkpoint does on a folder of queries, by raw scores of its whole heads."""
    weights = load_for_evaluation(out)
    config = TrainConfig.from_json(weights.config)
    model = GeoModel(config.backbone, "none", 0, config.descriptor_dim or None)
    model.load_state_dict(weights.model)
    heads = {}
    for group, tensors in weights.heads.items():
        heads[group] = Head(config.head, model.descriptor_dim, weights.classes.count(group))
        heads[group].load_state_dict(tensors)
    found = list_queries(queries, ZONE)
    side = query_size(config.image_size)
    described = describe_queries(
        model, found.paths, shorter_side=side, batch_size=5, device=torch.device("cpu"), threads=1
    )
    rows, _ = rank_classes(described.vectors, class_blocks(heads, weights.classes, "raw"))
    return assess_ranking(rows.numpy(), described.readable, weights.classes, found)
