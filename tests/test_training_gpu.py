"""Training on a GPU: no waits within a step, the losses of the CPU, and the options that need one.

What several processes tell each other is tried on as many GPUs as there are, with one on NCCL's calls alone.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny import ROOT, arguments, assess_run, class_table, configure, train_here
from tiny_run import write_run
from torch.nn.parallel import DistributedDataParallel

from evaluation.localiser import Localiser
from shards.loader import choose_decoder
from training.distributed import World
from training.engine import Engine
from training.head_bank import HeadBank
from training.heads import Head
from training.interruption import Interruption
from training.model import GeoModel
from training.progress import Timing
from training.run_folder import read_losses
from training.schedules import make_schedule
from training.sharded_head import ShardedHead
from training.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

needs_dali = pytest.mark.skipif(choose_decoder("auto", torch.device("cuda")) != "dali", reason="needs NVIDIA DALI")
DECODERS = ["cpu", pytest.param("dali", marks=needs_dali)]


def train_on_gpu(shards: Path, out: Path, asked: Interruption | None = None, **values: Any) -> Trainer:
    settings = {"cpu": False, "decoder": "cpu", "lr": 1e-4, "head_lr": 1e-3, "iterations_per_epoch": 4, "epochs": 4}
    return train_here(configure(shards, out, **{**settings, **values}), asked)


@pytest.mark.parametrize("schedule", ["sequential", "joint"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_waits_for_the_device_only_for_its_losses(
    shards: Path, tmp_path: Path, schedule: str, precision: str
) -> None:
    options: dict[str, Any] = {"ema": 0.9, "colour_jitter": 0.2, "accumulate": 3}
    trainer = train_on_gpu(shards, tmp_path / "r", schedule=schedule, precision=precision, **options)
    images = torch.randint(256, (16, 32, 32, 3), dtype=torch.uint8, device="cuda")
    labels = torch.zeros(16, dtype=torch.int64, device="cuda")
    groups = trainer.schedule(0)
    trainer.engine.step(98, images, labels, groups)
    torch.cuda.set_sync_debug_mode("error")  # waiting for an event, as the losses do, is no error
    try:
        outcome = trainer.engine.step(99, images, labels, groups)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert outcome.finite


@pytest.mark.parametrize(
    ("options", "tolerance", "steps"),
    [
        ({}, 2e-2, 16),
        ({"channels_last": True}, 2e-2, 16),
        ({"offload_heads": True}, 2e-2, 16),
        ({"schedule": "joint", "precision": "bf16"}, 0.15, 16),
        ({"precision": "fp16"}, 5e-2, 1),  # the scaler may skip steps until its scale fits
        ({"schedule": "joint", "precision": "bf16", "compile": True, "channels_last": True}, 0.15, 16),
        pytest.param({"decoder": "dali"}, 0.15, 16, marks=needs_dali),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_the_losses_are_those_of_the_cpu(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    tolerance: float,
    steps: int,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    train_on_gpu(shards, tmp_path / "gpu", **options)
    plain = {"schedule": options.get("schedule", "sequential")}
    train_on_gpu(shards, tmp_path / "cpu", cpu=True, **plain)
    found, wanted = (read_losses(tmp_path / name) for name in ("gpu", "cpu"))
    assert len(found) == len(wanted)
    np.testing.assert_allclose(found[:steps], wanted[:steps], rtol=tolerance, atol=tolerance)  # some are near 0


@pytest.mark.parametrize("options", [{"precision": "fp16", "ema": 0.9}, {"offload_heads": True}])
def test_a_run_that_resumes_goes_on_with_the_losses_of_one_that_did_not_stop(
    shards: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    train_on_gpu(shards, tmp_path / "whole", **options)
    train_on_gpu(shards, tmp_path / "parts", **options, epochs=2)
    train_on_gpu(shards, tmp_path / "parts", **options, resume=True)
    np.testing.assert_allclose(read_losses(tmp_path / "parts"), read_losses(tmp_path / "whole"), rtol=2e-2, atol=2e-2)


def test_waiting_for_data_counts_only_while_the_device_stands_idle() -> None:
    timing = Timing(1, torch.device("cuda"))
    weights = torch.rand(8192, 8192, device="cuda")
    timing.begin_step()
    for _ in range(50):
        weights = weights @ weights
    timing.add(0.0)
    time.sleep(0.05)  # the device works on
    timing.begin_step()
    torch.cuda.synchronize()
    timing.add(0.05)
    assert timing.waited < 0.01
    torch.cuda.synchronize()
    time.sleep(0.05)
    timing.begin_step()
    torch.cuda.synchronize()
    timing.add(0.05)
    assert timing.waited == pytest.approx(0.05, abs=0.02)


def test_offloaded_heads_and_their_moments_leave_the_device_and_come_back(shards: Path, tmp_path: Path) -> None:
    bank = train_on_gpu(shards, tmp_path / "r", offload_heads=True, ema=0.9).engine.bank
    for group, head in bank.heads.items():
        bank.place([group])
        for other, optimizer in bank.optimizers.items():
            kind = "cuda" if other == group else "cpu"
            tensors = [*bank.heads[other].parameters(), *bank.averages[other].tensors.values()]
            tensors += [value for state in optimizer.state.values() for value in state.values()]
            assert {tensor.device.type for tensor in tensors} == {kind}
        assert next(head.parameters()).device.type == "cuda"


def test_a_head_is_exact_where_tf32_is_allowed_and_under_autocast() -> None:
    torch.manual_seed(0)
    exact = Head("AAMC", 256, 5000, 30.0, 0.2).double()
    head = Head("AAMC", 256, 5000, 30.0, 0.2)
    head.load_state_dict(exact.state_dict())
    descriptors = torch.nn.functional.normalize(torch.randn(64, 256), dim=1)
    labels = torch.randint(5000, (64,))
    wanted = exact(descriptors.double(), labels)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cuda", torch.float16):
            losses = head.cuda()(descriptors.cuda(), labels.cuda())
    finally:
        torch.set_float32_matmul_precision(before)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.cpu().double(), wanted, rtol=1e-5, atol=1e-4)


def test_answers_are_those_of_the_cpu(queries: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    first = []
    for device in ("cpu", "cuda"):
        localiser = Localiser.load(run, torch.device(device))
        described = localiser.describe(sorted(queries.iterdir()), batch_size=5)
        assert described.readable.all()
        (answers,) = localiser.answer(described.vectors, top_k=3).values()
        first.append(answers)
    np.testing.assert_array_equal(first[0].rows[:, 0], first[1].rows[:, 0])
    np.testing.assert_allclose(first[0].scores, first[1].scores, atol=2e-2)


@pytest.mark.parametrize("options", [{"precision": "fp32"}, {"precision": "bf16", "schedule": "joint", "ema": 0.5}])
def test_validation_on_the_device_has_the_recall_of_the_saved_checkpoint_on_the_cpu(
    shards: Path, queries: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    trainer = train_on_gpu(shards, tmp_path / "r", val_queries=queries, **options)
    one_query = 100 / len(list(queries.iterdir()))
    assert trainer.progress.best == pytest.approx(assess_run(tmp_path / "r", queries).recall[1], abs=1.1 * one_query)


def test_a_profile_holds_what_ran_on_the_device(shards: Path, tmp_path: Path) -> None:
    train_on_gpu(shards, tmp_path / "r", profile=True)
    (trace,) = (tmp_path / "r" / "profile").glob("*.pt.trace.json")
    assert "kernel" in {event.get("cat") for event in json.loads(trace.read_text())["traceEvents"]}


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_run_that_is_asked_to_stop_saves_and_goes_on(shards: Path, tmp_path: Path, decoder: str) -> None:
    asked = Interruption()
    asked.received = "SIGTERM"
    stopped = train_on_gpu(shards, tmp_path / "r", asked, decoder=decoder)
    assert stopped.progress.step == 0
    assert train_on_gpu(shards, tmp_path / "r", decoder=decoder, resume=True).progress.step == 16


def launch(words: list[str], processes: int) -> subprocess.Popen[str]:
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "--"]
    command += [str(ROOT / "training" / "train.py"), *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_process_that_gets_a_signal_while_photos_are_decoded_leaves_in_order(
    shards: Path, tmp_path: Path, decoder: str
) -> None:
    words = arguments(shards, tmp_path / "r", decoder=decoder, epochs=10_000, save_every_epochs=10_000)
    process = launch(words, 0)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("epoch "):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopped by SIGTERM" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "joint", "precision": "fp16"},
        {"shard_head": True, "grad_clip": 1.0},
        {"schedule": "joint", "shard_head": True, "head_sample_rate": 0.5, "accumulate": 2},
        {"schedule": "joint", "sync_bn": True, "ema": 0.5},
        {"precision": "bf16", "compile": True, "channels_last": True, "accumulate": 2},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_processes_on_all_gpus_train_validate_save_and_go_on(
    shards: Path, queries: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    processes = min(4, torch.cuda.device_count())
    if processes == 1:
        options = {name: value for name, value in options.items() if name != "head_sample_rate"}
    for epochs in (2, 4):
        words = arguments(shards, tmp_path / "r", val_queries=queries, epochs=epochs, resume=True, **options)
        process = launch(words, processes)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
    assert f"{processes} process" in out
    losses = read_losses(tmp_path / "r")
    assert len(losses) == 32
    assert np.isfinite(losses).all()


@pytest.fixture
def nccl(tmp_path: Path) -> Iterator[None]:
    """NCCL with this process alone: its calls are made, and what it refuses fails."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("nccl")
@pytest.mark.parametrize("sample_rate", [1.0, 0.9])
def test_a_head_in_parts_has_through_nccl_the_losses_of_a_whole_one(sample_rate: float) -> None:
    torch.manual_seed(0)
    whole = Head("AAMC", 64, 500, 30.0, 0.2).cuda()
    part = ShardedHead("AAMC", 64, 500, 30.0, 0.2, sample_rate=sample_rate).cuda()
    part.load_state_dict(whole.state_dict())
    descriptors, labels = torch.randn(16, 64, device="cuda"), torch.arange(16, device="cuda") * 7
    losses = [head.losses_and_hits(descriptors, labels)[0] for head in (whole, part)]
    for loss in losses:
        loss.sum().backward()
    if sample_rate == 1:
        torch.testing.assert_close(losses[1], losses[0])
        torch.testing.assert_close(part.weight.grad, whole.weight.grad)
    else:
        assert (losses[1] <= losses[0] + 1e-4).all()  # against fewer classes


@pytest.mark.usefixtures("nccl")
@pytest.mark.parametrize("options", [{}, {"channels_last": True, "compile": True}])
def test_a_step_goes_through_ddp(tmp_path: Path, options: dict[str, Any]) -> None:
    config = configure("shards", tmp_path, cpu=False, schedule="joint", accumulate=2, grad_clip=1.0, **options)
    model = GeoModel("small_cnn", "none", 0).cuda()
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    inner = torch.compile(model, dynamic=False) if config.compile else model
    wrapped = DistributedDataParallel(inner, broadcast_buffers=False, gradient_as_bucket_view=True)
    world = World(0, 1, torch.device("cuda", 0))
    engine = Engine(config, model, wrapped, HeadBank(class_table(), config, model.descriptor_dim, world), world)
    groups = make_schedule("joint", engine.bank.groups, batch_size=16, iterations_per_epoch=1)(0)
    images = torch.randint(256, (16, 32, 32, 3), dtype=torch.uint8, device="cuda")
    labels = torch.zeros(16, dtype=torch.int64, device="cuda")
    losses = [engine.step(step, images, labels, groups).loss for step in range(4)]
    assert losses[-1] < losses[0]
