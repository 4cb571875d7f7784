"""What runs of neighbours cost where classes are many: heads trained on made-up descriptors in the order of `stream`.

    python tests/benchmarks/mixing.py [--classes 4000] [--steps 2500] [--seeds 0 1] [--json FILE]

A rendered city has some hundred classes, SF-XL 35,000 in a group, so that a window holds only a few of them. Here each
class is a random direction and its photos are that direction with fixed noise; behind a fixed random map, a small
network and a margin head learn to tell them apart. Every row differs in nothing but the order that photos come in:
single photos drawn class-uniformly, or windows of `shards.stream`. The accuracy is on photos that were not trained on.
"""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import paths  # noqa: F401
import torch
from torch import Tensor
from torch.nn import functional as F

from shards.files import atomic_write_json
from shards.index import GroupIndex
from shards.stream import WindowPlan, make_window
from training.heads import Head

DIM, PHOTOS, TEST_PHOTOS, BATCH, NOISE = 64, 48, 4, 64, 1.4
ORDERS = [(1, 0), (8, 4096), (32, 4096), (32, 8192), (32, 16384), (8, 65536), (16, 65536), (32, 65536)]  # run, window


class Photos:
    """Descriptors of photos, made from their numbers."""

    def __init__(self, classes: int) -> None:
        make = torch.Generator().manual_seed(0)
        self.classes = classes
        self.mix = torch.randn(DIM, DIM, generator=make) / DIM**0.5
        self.directions = F.normalize(torch.randn(classes, DIM, generator=make), dim=1)
        self.noise = torch.randn(classes, PHOTOS + TEST_PHOTOS, DIM, generator=make) * (NOISE / DIM**0.5)

    def __call__(self, labels: Tensor, photos: Tensor) -> Tensor:
        """float32 [n, DIM]."""
        return F.normalize(self.directions[labels] + self.noise[labels, photos], dim=1) @ self.mix


def batches(classes: int, run: int, window: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Labels and photos (int64 [BATCH] both) in the order of a mode: `run` 1 is that of single photos."""
    if run == 1:
        random = np.random.default_rng(seed)
        while True:
            yield random.integers(classes, size=BATCH), random.integers(PHOTOS, size=BATCH)
    none = np.zeros(1, np.uint32)
    group = GroupIndex(0, [], np.arange(classes + 1) * PHOTOS, none, none, none, none, np.arange(classes))
    plan, number, turns = WindowPlan(window, BATCH), 0, 0
    while True:
        steps = plan.steps(number)
        drawn = make_window({0: group}, np.zeros((len(steps), BATCH), int), seed, steps.start, run, {0: turns})
        yield from zip(drawn.label, drawn.row - group.starts[drawn.label], strict=True)
        number, turns = number + 1, turns + len(drawn.runs)


def accuracy(photos: Photos, run: int, window: int, seed: int, steps: int) -> float:
    """Percent of unseen photos that the head names, after so many steps with a falling rate."""
    torch.manual_seed(seed)
    trunk = torch.nn.Sequential(torch.nn.Linear(DIM, 256), torch.nn.ReLU(), torch.nn.Linear(256, DIM))
    head = Head("AAMC", DIM, photos.classes, 30.0, 0.1)
    optimiser = torch.optim.Adam(
        [{"params": trunk.parameters(), "lr": 1e-3}, {"params": head.parameters(), "lr": 1e-2}]
    )
    fall = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (1 - step / steps) / 0.3))
    for _, (labels, numbers) in zip(range(steps), batches(photos.classes, run, window, seed), strict=False):
        target = torch.from_numpy(labels)
        loss = head(trunk(photos(target, torch.from_numpy(numbers))), target).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        fall.step()
    with torch.inference_mode():
        target = torch.arange(photos.classes).repeat_interleave(TEST_PHOTOS)
        unseen = photos(target, PHOTOS + torch.arange(TEST_PHOTOS).repeat(photos.classes))
        named = torch.cat([head.scores(trunk(some), "cosine").argmax(1) for some in unseen.split(1024)])
    return float((named == target).float().mean() * 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=2500, help=f"of {BATCH} photos")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--json", type=Path, help="write the rows as JSON to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    photos, rows = Photos(arguments.classes), []
    for run, window in ORDERS:
        found = [accuracy(photos, run, window, seed, arguments.steps) for seed in arguments.seeds]
        name = "indexed" if run == 1 else f"stream K={run} W={window}"
        rows.append({"name": name, "accuracy": statistics.mean(found), "by_seed": found, **vars(arguments)})
        print(f"{name:22}{rows[-1]['accuracy']:7.1f} %   {', '.join(f'{a:.1f}' for a in found)}", flush=True)
    if arguments.json:
        atomic_write_json(arguments.json, [{k: v for k, v in row.items() if k != "json"} for row in rows])


if __name__ == "__main__":
    main()
