"""Whole training steps of `training.py`: what the options of a step cost, and a run beside the reference's loop."""

from __future__ import annotations

import io
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from reference_loop import ReferenceLoop, write_photos

from shards.classes import ClassTable
from shards.dataset import Dataset
from training.assembly import make_accelerator, make_engine, make_world
from training.engine import Engine
from training.presets import PRESETS, TrainConfig
from training.schedules import make_schedule
from training.trainer import Trainer

OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "channels-last": {"channels_last": True},
    "compile": {"compile": True},
    "compile, channels-last": {"compile": True, "channels_last": True},
    "accumulate 4": {"accumulate": 4},
    "ema": {"ema": 0.999},
    "grad-clip": {"grad_clip": 1.0},
}


def option_rows(shards: Path, preset: str, image_size: int, rounds: int) -> list[dict[str, str | float]]:
    """Median milliseconds of a step of `preset` on the CPU with each option alone, the options in turn."""
    classes = Dataset.open(shards).classes
    options = {name: values for name, values in OPTIONS.items() if "compile" not in values or shutil.which("g++")}
    works: dict[str, Callable[[int], object]] = {}
    for name, values in options.items():
        works[name] = step_of(config_of(shards, preset, image_size, **values), classes)
    slow_adam = config_of(shards, preset, image_size)
    works["Adam not fused"] = step_of(slow_adam, classes, fused=False)
    taken: dict[str, list[float]] = {name: [] for name in works}
    for step in range(rounds + 2):
        for name, work in works.items():
            begin = time.perf_counter()
            work(step)
            if step > 1:  # the first ones compile and warm up
                taken[name].append(1e3 * (time.perf_counter() - begin))
    return [
        {"name": f"option-{preset}-{image_size}", "option": name, "milliseconds": statistics.median(values)}
        for name, values in taken.items()
    ]


def config_of(shards: Path, preset: str, image_size: int, **values: object) -> TrainConfig:
    """A preset for one process of the CPU, without options of a step but those of `values`."""
    plain = {"ema": 0.0, "weights": "none", "precision": "fp32", "channels_last": False, "compile": False, "cpu": True}
    settings = plain | {"image_size": image_size, "tracker": "none", "shards": shards, "out": Path("unused")} | values
    return replace(PRESETS[preset], **settings)  # type: ignore[arg-type]


def step_of(config: TrainConfig, classes: ClassTable, fused: bool = True) -> Callable[[int], object]:
    """A training step by its number, on random uint8 images that lie in memory."""
    engine = _engine(config, classes)
    if not fused:
        parameters = engine.optimizer.param_groups[0]["params"]
        engine.optimizer = torch.optim.Adam(parameters, lr=config.lr)
        for group, head in engine.bank.heads.items():
            engine.bank.optimizers[group] = torch.optim.Adam(head.parameters(), lr=config.head_lr)
    size = config.image_size
    images = torch.randint(0, 256, (config.batch_size, size, size, 3), dtype=torch.uint8)
    schedule = make_schedule(config.schedule, classes.groups, batch_size=config.batch_size, iterations_per_epoch=10**9)
    labels = torch.from_numpy(np.arange(config.batch_size) % min(classes.count(g) for g in classes.groups))
    return lambda step: engine.step(step, images, labels, schedule(0))


def _engine(config: TrainConfig, classes: ClassTable) -> Engine:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, config = make_accelerator(config)
    return make_engine(config, classes, accelerator, make_world(accelerator))


def end_to_end_rows(shards: Path, batch: int, steps: int, threads: int) -> list[dict[str, str | float]]:
    """Images a second of training B0 from photos on disk, ours and the reference's loop, epochs in turn.

    On a GPU where there is one, with `fast-b0` beside the paper's recipe; else on the CPU. The first round of each
    warms up, and so does the first epoch of each start of ours, in which a model is compiled.
    """
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    taken: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        classes = write_photos(shards, Path(folder) / "photos")
        workers = threads if gpu or threads > 1 else 0
        reference = ReferenceLoop(classes, batch=batch, steps=steps, workers=workers, device=device)
        for epoch in range(3):
            taken.setdefault("reference", []).append(reference.epoch(epoch))
            for preset in ("paper-b0", "fast-b0") if gpu else ("paper-b0",):
                settings = {
                    "weights": "none", "tracker": "none", "shards": shards, "threads": threads, "resume": True,
                    "batch_size": batch, "iterations_per_epoch": steps, "epochs": 2 * (epoch + 1),
                    "out": Path(folder) / preset,
                }  # fmt: skip
                AcceleratorState._reset_state(reset_partial_state=True)
                with redirect_stdout(io.StringIO()):
                    trainer = Trainer(replace(PRESETS[preset], **settings))  # type: ignore[arg-type]
                    trainer.run()
                taken.setdefault(preset, []).append(trainer.timing.rate())
    return [
        {"name": f"end-to-end-{name}", "device": device.type, "images_per_second": statistics.median(rates[1:])}
        for name, rates in taken.items()
    ]


def print_whole_steps(options: list[dict[str, str | float]], rates: list[dict[str, str | float]]) -> None:
    """Both tables."""
    print("\nwhole steps on the CPU, batch 64, ms")
    for row in options:
        print(f"{row['name']:>28} {row['option']:>24} {row['milliseconds']:10.1f}")
    reference = next(float(row["images_per_second"]) for row in rates if row["name"] == "end-to-end-reference")
    print("\nEfficientNet-B0, 224 pixels, from photos on disk")
    for row in rates:
        rate = float(row["images_per_second"])
        print(f"{row['name']:>28} {row['device']:>6} {rate:10.1f} images/s {rate / reference:6.2f} x the reference")
