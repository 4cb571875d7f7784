"""A run that goes on with other numbers of processes trains on the photos and crops of one that never stopped."""

import hashlib
import json
import multiprocessing as mp
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tiny import configure, train_here, write_dataset, write_queries

from shards.loader import Batch, Loader
from training.batch_norms import running_statistics
from training.head_bank import HeadBank
from training.scoring import QueryScores
from training.validation import Validator

pytestmark = pytest.mark.slow

BATCH, EPOCH = 10, 5  # three processes get 4, 3 and 3 slots
SIZES = (1, 2, 3, 1)


def become_rank(rank: int, size: int, port: int) -> None:
    """Let this process be one of `size`, as a launcher would."""
    if size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}


def train_and_record(rank: int, size: int, port: int, shards: Path, out: Path, epochs: int, settings: dict) -> None:
    """One process of a run; of every batch it trains on, what each slot got: group, label and a hash of the pixels."""
    become_rank(rank, size, port)
    original = Loader.batches

    def recorded(self: Loader, first_step: int, last_step: int) -> Iterator[Batch]:
        for batch in original(self, first_step, last_step):
            with (out.parent / f"{out.name}-slots.jsonl").open("a") as file:
                for slot, i in zip(range(rank, BATCH, size), range(len(batch.labels)), strict=True):
                    pixels = hashlib.sha256(batch.images[i].numpy().tobytes()).hexdigest()
                    file.write(
                        json.dumps([batch.step, slot, int(batch.groups[i]), int(batch.labels[i]), pixels]) + "\n"
                    )
            yield batch

    Loader.batches = recorded  # type: ignore[method-assign]
    options = {"batch_size": BATCH, "iterations_per_epoch": EPOCH, "lr_schedule": "constant", **settings}
    train_here(configure(shards, out, epochs=epochs, resume=True, **options))


def validate_and_record(rank: int, size: int, port: int, shards: Path, queries: Path, out: Path) -> None:
    """One process of a run; saves the statistics of its batch norms while it validates, and after the run."""
    become_rank(rank, size, port)
    original = Validator.validate
    statistics = []

    def recorded(self: Validator, model: nn.Module, bank: HeadBank) -> tuple[QueryScores | None, bool]:
        statistics.append(running_statistics(model))
        return original(self, model, bank)

    Validator.validate = recorded  # type: ignore[method-assign]
    options = {"batch_size": BATCH, "iterations_per_epoch": EPOCH, "schedule": "joint"}
    trainer = train_here(configure(shards, out, epochs=1, val_queries=queries, **options))
    torch.save([*statistics, running_statistics(trainer.engine.model)], out.parent / f"rank-{rank}.pt")


def run(size: int, *arguments: object, work: Callable[..., None] = train_and_record) -> None:
    """Train with `size` processes, to the end of all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = mp.get_context("forkserver")
    processes.set_forkserver_preload(["training.trainer"])
    children = [processes.Process(target=work, args=(rank, size, port, *arguments)) for rank in range(size)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0


def slots(out: Path) -> list[list]:
    """What was recorded, in the order of steps and slots."""
    return sorted(json.loads(line) for line in (out.parent / f"{out.name}-slots.jsonl").read_text().splitlines())


@pytest.mark.parametrize(("read", "schedule"), [("indexed", "joint"), ("stream", "sequential")])
def test_global_batches_after_a_resume_with_other_processes_are_those_of_an_undisturbed_run(
    tmp_path: Path, read: str, schedule: str
) -> None:
    shards = write_dataset(tmp_path / "shards").path
    settings = {"schedule": schedule, "read": read, "stream_run": 4, "stream_window": 70}  # windows of seven steps
    run(1, shards, tmp_path / "whole", len(SIZES), settings)
    for epochs, size in enumerate(SIZES, start=1):
        run(size, shards, tmp_path / "r", epochs, settings)
    whole = slots(tmp_path / "whole")
    assert [row[:2] for row in whole] == [[step, slot] for step in range(EPOCH * len(SIZES)) for slot in range(BATCH)]
    assert slots(tmp_path / "r") == whole
    assert len({row[4] for row in whole}) > len(whole) / 2  # crops differ, so equal pixels are equal draws


def test_batch_norms_are_those_over_all_processes_while_validating_and_each_ones_own_afterwards(tmp_path: Path) -> None:
    shards, queries = write_dataset(tmp_path / "shards").path, write_queries(tmp_path / "queries")
    run(3, shards, queries, tmp_path / "r", work=validate_and_record)
    together, own = zip(
        *(torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(3)), strict=True
    )
    for of_rank in together:
        torch.testing.assert_close(of_rank[0], torch.stack(own)[:, 0].mean(0))
        assert torch.equal(of_rank, together[0])
    assert not torch.equal(own[0], own[1])
