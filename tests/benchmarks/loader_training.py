"""Training's end-to-end rate beside the same training on random tensors that already lie on the device."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from accelerate.state import AcceleratorState

from shards.loader import Batch
from training.presets import PRESETS, TrainConfig
from training.trainer import Trainer


class OnDevice:
    """In the place of a trainer's loader: one batch of random images on the device, again and again."""

    failures = 0

    def __init__(self, trainer: Trainer) -> None:
        config, device = trainer.config, trainer.world.device
        self.groups = trainer.schedule(0)
        classes = np.array([len(trainer.classes.of_group(int(g))) for g in self.groups])
        labels = np.random.default_rng(0).integers(classes)
        shape = (config.batch_size, config.image_size, config.image_size, 3)
        self.images = torch.randint(256, shape, dtype=torch.uint8, device=device)
        self.labels = torch.from_numpy(labels).to(device)

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        for step in range(first_step, last_step):
            yield Batch(step, self.images, self.labels, self.groups, 0.0)

    def close(self) -> None:
        pass


def train(config: TrainConfig, *, synthetic: bool) -> tuple[float, float]:
    """Images a second of the run's second epoch, and the share of it spent waiting for data."""
    AcceleratorState._reset_state(reset_partial_state=True)
    shutil.rmtree(config.out, ignore_errors=True)
    trainer = Trainer(config)
    if synthetic:
        trainer.loader.close()
        trainer.loader = OnDevice(trainer)  # type: ignore[assignment]
    trainer.run()
    return trainer.timing.rate(), trainer.timing.wait_share()


def synthetic_rows(shards: Path, scratch: Path, rounds: int) -> list[dict[str, object]]:
    """Both trainings in turn: on a GPU EfficientNet-B0 at 224 pixels in bf16, on a CPU the quick start's network."""
    gpu = torch.cuda.is_available()
    config = replace(
        PRESETS["fast-b0" if gpu else "quickstart"], shards=str(shards), out=scratch / "run", weights="none",
        batch_size=512 if gpu else 64, iterations_per_epoch=100 if gpu else 40, epochs=2, tracker="none", keep=1,
    )  # fmt: skip
    measured: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for _ in range(rounds):
        for synthetic in measured:
            measured[synthetic].append(train(config, synthetic=synthetic))
    ours, on_device = (median(rate for rate, _ in measured[s]) for s in (False, True))
    waits = median(wait for _, wait in measured[False])
    device = torch.cuda.get_device_name() if gpu else "cpu"
    print(
        f"\n{config.preset} on {device}: {ours:,.0f} images/s end to end, {on_device:,.0f} on random tensors on the "
        f"device, ratio {ours / on_device:.3f}; {waits:.1%} of the time waiting for data"
    )
    rows: list[dict[str, object]] = [{"name": "training", "images_per_second": ours, "data_wait_share": waits}]
    rows.append({"name": "training-on-device", "images_per_second": on_device, "data_wait_share": 0.0})
    return [row | {"preset": config.preset, "device": device} for row in rows]
