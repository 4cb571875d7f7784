"""Training on a GPU: no waits within a step, the losses of the CPU, and the options that need one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import configure, train_here
from tiny_run import write_run

from evaluation.localiser import Localiser
from training.heads import Head
from training.run_folder import read_losses
from training.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def train_on_gpu(shards: Path, out: Path, **values: object) -> Trainer:
    settings = {"cpu": False, "decoder": "cpu", "lr": 1e-4, "head_lr": 1e-3, "iterations_per_epoch": 4, "epochs": 4}
    return train_here(configure(shards, out, **{**settings, **values}))


@pytest.mark.parametrize("schedule", ["sequential", "joint"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_waits_for_the_device_only_for_its_losses(
    shards: Path, tmp_path: Path, schedule: str, precision: str
) -> None:
    options = {"ema": 0.9, "colour_jitter": 0.2, "accumulate": 3}
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
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_the_losses_are_those_of_the_cpu(
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, object],
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
    shards: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    train_on_gpu(shards, tmp_path / "whole", **options)
    train_on_gpu(shards, tmp_path / "parts", **options, epochs=2)
    train_on_gpu(shards, tmp_path / "parts", **options, resume=True)
    np.testing.assert_allclose(read_losses(tmp_path / "parts"), read_losses(tmp_path / "whole"), rtol=2e-2, atol=2e-2)


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
