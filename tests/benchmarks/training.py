"""What a head costs beside its three matrix products, and where a training step spends its time.

    python tests/benchmarks/training.py --quick [--json FILE]
    python tests/benchmarks/training.py [--shards DATASET] [--threads N] [--steps N]

`--quick` prints the heads only: forward and backward at batch 64, 1280 dimensions, 35,000 classes, in
milliseconds (median of runs made in turn) and peak bytes (the most that tensors made during forward and backward
held at one time: logits, temporaries and gradients; weight, descriptors and labels not counted). Rows: `head` is
ours (AAMC), `head-plain` the straightforward form by autograd, `three-matmuls` the logits and the two gradients
alone. Without `--quick` a step's parts follow for two backbones on the CPU, and with `--shards` what each option of a
step costs, and the images a second of training from photos on disk beside the reference's loop (on a GPU, if any).
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import paths  # noqa: F401
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timing import in_turn, peak_of_live_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from shards.console import JobError, entry, format_bytes
from shards.dataset import Dataset
from shards.loader import Loader
from shards.provenance import provenance
from training.backbones import BackboneName
from training.heads import Head
from training.model import GeoModel, to_input
from training.schedules import make_schedule

BATCH, DIM, CLASSES = 64, 1280, 35_000
S, M = 100.0, 0.2


class PlainHead(nn.Module):
    """AAMC the straightforward way: a normalised copy of the weight, one-hot labels, autograd for the rest."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, descriptors: Tensor, labels: Tensor) -> Tensor:
        """Loss of every sample, [B]."""
        cosine = F.linear(F.normalize(descriptors), F.normalize(self.weight))
        sine = (1.0 - cosine.square()).clamp(1e-9, 1.0).sqrt()
        penalised = cosine * math.cos(M) - sine * math.sin(M)
        penalised = torch.where(cosine > 0, penalised, cosine)
        one_hot = F.one_hot(labels, self.weight.shape[0])
        return F.cross_entropy(S * torch.where(one_hot == 1, penalised, cosine), labels, reduction="none")


def head_rows(rounds: int) -> list[dict[str, str | float | int]]:
    """Rows of the head table, each kind timed in turn `rounds` times after a warm-up."""
    torch.manual_seed(0)
    unit = F.normalize(torch.randn(BATCH, DIM))
    labels = torch.randint(CLASSES, (BATCH,))
    grad = torch.randn(BATCH, CLASSES) / CLASSES
    head = Head("AAMC", DIM, CLASSES, S, M)
    plain = PlainHead(head.weight)
    torch.testing.assert_close(head(unit, labels), plain(unit, labels), rtol=1e-4, atol=1e-3)

    def train(module: nn.Module) -> None:
        descriptors = unit.clone().requires_grad_()
        module(descriptors, labels).mean().backward()

    def three_matmuls() -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            return unit @ head.weight.T, grad.T @ unit, grad @ head.weight

    def clear() -> None:
        head.weight.grad = plain.weight.grad = None

    works: dict[str, Callable[[], object]] = {
        "head": lambda: train(head),
        "head-plain": lambda: train(plain),
        "three-matmuls": three_matmuls,
    }
    peaks = {name: peak_of_live_bytes(work, clear) for name, work in works.items()}
    times = in_turn(works, rounds, clear)
    return [{"name": name, "milliseconds": times[name], "peak_bytes": peaks[name]} for name in works]


def print_heads(rows: list[dict[str, str | float | int]]) -> None:
    """The table, and each kind's ratio to the matrix products."""
    time_of = {str(row["name"]): float(row["milliseconds"]) for row in rows}
    gradients = 4 * DIM * (CLASSES + BATCH)
    print(f"heads: batch {BATCH}, {DIM} dimensions, {CLASSES:,} classes, {torch.get_num_threads()} thread(s)")
    print(f"{'':>14} {'ms':>8} {'x matmuls':>10} {'peak':>10} {'beside gradients, in logits':>28}")
    for row in rows:
        copies = (int(row["peak_bytes"]) - gradients) / (4 * BATCH * CLASSES)
        ratio = float(row["milliseconds"]) / time_of["three-matmuls"]
        peak = format_bytes(int(row["peak_bytes"]))
        print(f"{row['name']:>14} {row['milliseconds']:8.1f} {ratio:10.2f} {peak:>10} {copies:28.2f}")
    print(f"head is {time_of['head-plain'] / time_of['head']:.2f} times as fast as head-plain")


def step_rows(shards: Path | None, threads: int) -> list[dict[str, str | float | None]]:
    """Median milliseconds of each part of a training step on the CPU, for two recipes."""
    paper = step_parts("efficientnet_b0", 224, 5, 8_750, 100.0, rounds=3)
    small = step_parts("small_cnn", 64, 0, 200, 30.0, rounds=15)
    for row, image_size in ((paper, 224), (small, 64)):
        row["data"] = None if shards is None else data_milliseconds(shards, image_size, threads)
        row["all_reduce"] = all_reduce_milliseconds(int(float(row["all_reduce_bytes"] or 0)))
    return [paper, small]


def step_parts(
    backbone: BackboneName, image_size: int, freeze_until: int, classes: int, s: float, rounds: int
) -> dict[str, str | float | None]:
    """Forward, backward and optimiser of one step at batch 64, and the bytes that its gradients hold."""
    torch.manual_seed(0)
    model = GeoModel(backbone, "none", freeze_until).to(memory_format=torch.channels_last)
    head = Head("AAMC", model.descriptor_dim, classes, s, M)
    trained = [p for p in (*model.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-4, fused=True)
    images = torch.randint(0, 256, (BATCH, image_size, image_size, 3), dtype=torch.uint8)
    labels = torch.randint(classes, (BATCH,))
    parts: dict[str, list[float]] = {"forward": [], "backward": [], "optimiser": []}
    for round_number in range(rounds + 1):
        moments = [time.perf_counter()]
        loss = head(model(to_input(images)), labels).mean()
        moments.append(time.perf_counter())
        loss.backward()
        moments.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        moments.append(time.perf_counter())
        if round_number:  # the first one warms up
            for name, before, after in zip(parts, moments, moments[1:], strict=False):
                parts[name].append(1e3 * (after - before))
    row: dict[str, str | float | None] = {"name": f"step-{backbone}-{image_size}"}
    row |= {name: statistics.median(values) for name, values in parts.items()}
    row["all_reduce_bytes"] = sum(p.numel() * p.element_size() for p in trained)
    return row


def data_milliseconds(shards: Path, image_size: int, threads: int, batches: int = 20) -> float:
    """Milliseconds that the CPU loader takes for a batch of 64 when nothing else runs."""
    dataset = Dataset.open(shards)
    schedule = make_schedule("joint", dataset.classes.groups, batch_size=BATCH, iterations_per_epoch=batches)
    loader = Loader(
        dataset,
        schedule,
        batch_size=BATCH,
        image_size=image_size,
        seed=0,
        decoder="cpu",
        threads=threads,
        device=torch.device("cpu"),
    )
    try:
        moments = []
        for _ in loader.batches(0, batches + 4):  # the first ones are prefetched and warm up
            moments.append(time.perf_counter())
    finally:
        loader.close()
    return 1e3 * (moments[-1] - moments[3]) / batches


def all_reduce_milliseconds(count_of_bytes: int) -> float:
    """Median milliseconds that two processes of this machine take to sum so many bytes over gloo."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_all_reduce, args=(count_of_bytes, folder), nprocs=2)
        return float((Path(folder) / "milliseconds").read_text())


def _all_reduce(rank: int, count_of_bytes: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    gradients = torch.ones(count_of_bytes // 4)
    taken = []
    for _ in range(6):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(gradients)
        taken.append(1e3 * (time.perf_counter() - start))
    if rank == 0:
        (Path(folder) / "milliseconds").write_text(str(statistics.median(taken[1:])))
    dist.destroy_process_group()


def print_steps(rows: list[dict[str, str | float | None]]) -> None:
    """Milliseconds by part; the data part runs beside the others in training."""
    columns = ("data", "forward", "backward", "all_reduce", "optimiser")
    print(f"\na step's parts, ms: CPU, batch {BATCH}, {torch.get_num_threads()} thread(s), all-reduce of 2 processes")
    print(f"{'':>26}" + "".join(f"{column:>12}" for column in columns) + f"{'all-reduced':>14}{'images/s':>10}")
    for row in rows:
        cells = "".join("-".rjust(12) if row[c] is None else f"{float(row[c] or 0):12.1f}" for c in columns)
        computing = sum(float(row[part] or 0) for part in ("forward", "backward", "optimiser"))
        moved = format_bytes(float(row["all_reduce_bytes"] or 0))
        print(f"{row['name']:>26}{cells}{moved:>14}{BATCH / computing * 1e3:10.0f}")
    if any(row["data"] is None for row in rows):
        print("data: name a data set by --shards to measure the loader, the options of a step, and whole epochs")


def main() -> None:
    """Read the arguments, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the heads, within 50 seconds on one core")
    parser.add_argument("--json", type=Path, help="file for the rows, a list of objects")
    parser.add_argument("--shards", type=Path, help="data set to train on (not with --quick)")
    parser.add_argument("--steps", type=int, help="steps of an end-to-end epoch (default: 4, on a GPU 200)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.threads < 1:
        raise JobError(f"--threads {arguments.threads}: at least 1")
    torch.set_num_threads(arguments.threads)
    versions = provenance()
    rows: list[dict] = list(head_rows(rounds=9))
    print_heads(rows)
    if not arguments.quick:
        parts = step_rows(arguments.shards, arguments.threads)
        print_steps(parts)
        rows += parts
        if arguments.shards is not None:
            from whole_steps import end_to_end_rows, option_rows, print_whole_steps

            options = option_rows(arguments.shards, "quickstart", 96, rounds=10)
            # Four batches are decoded before an epoch begins: all of a short one, which a GPU would not wait for.
            steps = arguments.steps or (200 if torch.cuda.is_available() else 4)
            rates = end_to_end_rows(arguments.shards, BATCH, steps, arguments.threads)
            print_whole_steps(options, rates)
            rows += [*options, *rates]
    print(f"\n{' '.join(sys.argv)}: torch {torch.__version__}, commit {versions.get('commit')}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    entry(main)
