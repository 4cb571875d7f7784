"""Where tensors are: steps, checkpoints and answers on a GPU that is only imagined (torch's fake tensors).

It refuses what would mix it with the CPU, and so does the imagined NCCL with tensors that are not on the GPU. No number
is computed, so that these tests need no GPU; torch's own part of a backward would, and is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny import class_table, configure
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from evaluation.ranking import RANKING_FORMS, ClassRanker
from shards.sampler import slots_of_rank
from training.batch_norms import averaged_batch_norms
from training.distributed import HostCopy, World
from training.engine import Engine
from training.head_bank import HeadBank
from training.heads import Head, HeadKind, MarginSoftmax, ScoreForm
from training.model import GeoModel, _scale_and_shift, to_input
from training.schedules import make_schedule
from training.scoring import classes_in_cache, rank_classes

GPU = torch.device("cuda", 0)
ALONE, SECOND = World(0, 1, GPU), World(1, 2, GPU)
CLASSES = class_table()
VECTORS = (9, 384)


class WorldOfTwo(World):
    """Two processes, of which the other has nothing to add."""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


class NoEvent:
    """A CUDA event without CUDA."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...


def zeros(copy: HostCopy) -> list[float]:
    """Numbers in place of those that a fake tensor does not have."""
    assert copy.values.device.type == "cpu"
    return [0.0] * copy.values.numel()


def moved(module: nn.Module, device: torch.device | str) -> nn.Module:
    """`Module.to` for fake tensors, which torch cannot swap: the parameters are new ones."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fresh = nn.Parameter(parameter.detach().to(device), requires_grad=parameter.requires_grad)
                part._parameters[name] = fresh
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(device)
    return module


@pytest.fixture(autouse=True)
def imagined(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "Event", NoEvent)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(HostCopy, "wait", zeros)
    monkeypatch.setattr(Tensor, "backward", lambda self: None)
    monkeypatch.setattr(Tensor, "__float__", lambda self: 1.0)
    monkeypatch.setattr(nn.Module, "to", moved)
    _scale_and_shift.cache_clear()
    with FakeTensorMode():
        yield
    _scale_and_shift.cache_clear()


def make_engine(world: World = ALONE, **values: Any) -> Engine:
    config = configure("shards", Path("run"), **{"cpu": False, **values})
    model = GeoModel(config.backbone, "none", config.freeze_until)
    model.to(GPU)
    return Engine(config, model, model, HeadBank(CLASSES, config, model.descriptor_dim, world), world)


def parameters_of_heads(engine: Engine) -> list[nn.Parameter]:
    return [parameter for head in engine.bank.heads.values() for parameter in head.parameters()]


def train(engine: Engine) -> None:
    slots = slots_of_rank(16, engine.world.rank, engine.world.size)
    images = torch.zeros(len(slots), 32, 32, 3, dtype=torch.uint8).to(GPU)
    labels = torch.zeros(len(slots), dtype=torch.int64).to(GPU)
    schedule = make_schedule(engine.config.schedule, CLASSES.groups, batch_size=16, iterations_per_epoch=1)
    for step in range(2):
        for parameter in [*engine.trained_parameters().values(), *parameters_of_heads(engine)]:
            parameter.grad = torch.zeros_like(parameter)
        assert engine.step(step, images, labels, schedule(step)[slots], want_norm=step == 1).finite


@pytest.mark.parametrize(
    "options",
    [
        {"head": "AAMC"},
        {"head": "LMCC"},
        {"head": "FC_CE"},
        {"schedule": "joint", "ema": 0.9, "colour_jitter": 0.2, "accumulate": 3},
        {"backbone": "efficientnet_b0", "freeze_until": 5, "image_size": 32},
        {"lr_schedule": "cosine", "warmup_steps": 2},
        {"grad_clip": 1.0},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_a_step_mixes_no_devices(options: dict[str, Any]) -> None:
    engine = make_engine(**options)
    train(engine)
    for parameter in [*engine.model.parameters(), *parameters_of_heads(engine)]:
        assert parameter.device == GPU


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of two processes, whose other one has nothing to add; as NCCL it takes tensors of its GPU only."""

    def reduce(tensor: Tensor, **_: Any) -> None:
        assert tensor.device == GPU

    def gather(everyone: list[Tensor], tensor: Tensor, **_: Any) -> None:
        assert {part.device for part in [*everyone, tensor]} == {GPU}

    def gather_objects(everyone: list[Any], value: Any) -> None:
        everyone[:] = [value] * len(everyone)

    def send_or_receive(operations: list[dist.P2POp]) -> list[Any]:
        assert {operation.tensor.device for operation in operations} == {GPU}
        return []

    class Operation:
        def __init__(self, operation: Any, tensor: Tensor, peer: int) -> None:
            self.tensor = tensor

    for name, value in {
        "all_reduce": reduce,
        "all_gather": gather,
        "all_gather_object": gather_objects,
        "batch_isend_irecv": send_or_receive,
        "P2POp": Operation,
        "get_rank": lambda *_: 1,
        "get_world_size": lambda *_: 2,
    }.items():
        monkeypatch.setattr(dist, name, value)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=object()))


@pytest.mark.usefixtures("nccl")
@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "sequential"},
        {"schedule": "joint", "ema": 0.9, "accumulate": 2},
        {"schedule": "joint", "shard_head": True, "ema": 0.9},
        {"schedule": "sequential", "shard_head": True, "head_sample_rate": 0.5, "grad_clip": 1.0},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_what_processes_tell_each_other_lies_on_the_gpu(options: dict[str, Any]) -> None:
    engine = make_engine(SECOND, **options)
    train(engine)
    engine.bank.collect()
    with engine.averaged(), averaged_batch_norms(engine.model, engine.world):
        pass


@torch.no_grad()
@pytest.mark.usefixtures("nccl")
def test_the_backward_of_a_head_in_parts_mixes_no_devices() -> None:
    head, group = Head("AAMC", 32, 10_000), dist.group.WORLD
    head.to(GPU)
    descriptors, labels = torch.zeros(16, 32, device=GPU), torch.zeros(16, dtype=torch.int64, device=GPU)
    saved, mine = Saved(), torch.zeros(16, dtype=torch.bool, device=GPU)
    losses, hits = MarginSoftmax.forward(saved, descriptors, head.weight, None, labels, head.margin, mine, group)
    found = MarginSoftmax.backward(saved, losses, hits)
    assert {gradient.device for gradient in found if gradient is not None} == {GPU}


class Saved:
    """What an autograd function keeps between forward and backward."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *_: Tensor) -> None: ...


@torch.no_grad()
@pytest.mark.parametrize("kind", ["AAMC", "LMCC", "FC_CE"])
def test_a_heads_backward_mixes_no_devices(kind: HeadKind) -> None:
    head = Head(kind, 32, 10_000)
    head.to(GPU)
    descriptors, labels = torch.zeros(16, 32, device=GPU), torch.zeros(16, dtype=torch.int64, device=GPU)
    saved = Saved()
    losses, hits = MarginSoftmax.forward(saved, descriptors, head.weight, head.bias, labels, head.margin)
    found = MarginSoftmax.backward(saved, losses, hits)
    assert {gradient.device for gradient in found if gradient is not None} == {GPU}


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_checkpoint_goes_to_the_cpu_and_comes_back(ema: float) -> None:
    engine = make_engine(schedule="joint", ema=ema)
    train(engine)
    heads, state = engine.bank.collect()
    saved = [*state.values(), *(tensor for head in heads.values() for tensor in head.values())]
    assert {tensor.device.type for tensor in saved} == {"cpu"}
    engine.bank.restore(heads, {name: t for name, t in state.items() if not name.endswith("average_updates")})
    states = [value for o in engine.bank.optimizers.values() for s in o.state.values() for value in s.values()]
    assert {value.device for value in states} == {GPU}
    train(engine)


def test_batch_norms_are_averaged_and_a_skipped_step_is_undone_on_the_device() -> None:
    engine = make_engine()
    with averaged_batch_norms(engine.model, WorldOfTwo(0, 2, GPU)) as own, engine.averaged():
        assert {statistics.device for statistics in [own, *engine.model.buffers()]} == {GPU}
    engine.guard.remember()
    engine.guard.restore()


def test_photos_are_described_on_the_device() -> None:
    model = GeoModel("small_cnn", "none", 0)
    model.to(GPU)
    described = model(to_input(torch.zeros(3, 32, 32, 3, dtype=torch.uint8).to(GPU)))
    assert described.device == GPU


@pytest.mark.parametrize("head", ["AAMC", "FC_CE"])
@pytest.mark.parametrize("form", ["raw", "cosine"])
def test_classes_are_ranked_on_the_device_for_descriptors_of_the_cpu(head: HeadKind, form: ScoreForm) -> None:
    bank = make_engine(head=head).bank
    rows, scores = rank_classes(torch.zeros(VECTORS), bank.blocks(form), device=GPU)
    assert {rows.device.type, scores.device.type} == {"cpu"}


def make_ranker(monkeypatch: pytest.MonkeyPatch, head: HeadKind = "AAMC", side: int = 4) -> ClassRanker:
    def found(tensor: Tensor) -> Tensor:
        """How many columns hold a class depends on numbers."""
        return torch.zeros(len(classes), 1, dtype=torch.int64, device=tensor.device)

    def counted(metres: Tensor, weights: Tensor) -> Tensor:
        """How many bins there are depends on numbers too."""
        assert metres.device == weights.device == GPU
        return torch.zeros(9, device=GPU)

    monkeypatch.setattr(torch, "nonzero", found)
    monkeypatch.setattr(torch, "bincount", counted)
    classes = class_table(side)
    heads = {group: Head(head, 32, classes.count(group)) for group in classes.groups}
    return ClassRanker(heads, classes, GPU)


@pytest.mark.parametrize("head", ["AAMC", "FC_CE"])
def test_answers_with_confidence_and_uncertainty_come_from_the_device(
    monkeypatch: pytest.MonkeyPatch, head: HeadKind
) -> None:
    ranker = make_ranker(monkeypatch, head)
    monkeypatch.setattr(Tensor, "numpy", lambda self: np.zeros(self.shape, np.int64))
    answers = ranker.rank(torch.zeros(9, 32), forms=RANKING_FORMS, top_k=3)
    assert {some.confidence.shape for some in answers.values()} == {(9, 3)}
    found = ranker.confidences(torch.zeros(9, 32), forms=RANKING_FORMS, temperatures=[0.5, 1.0], threshold=25.0)
    assert {confidence.shape for _, confidence in found.values()} == {(9, 2)}


def test_a_gpu_takes_a_groups_classes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ranker = make_ranker(monkeypatch, side=100)  # 2,500 classes a group
    assert classes_in_cache(256) < 2500
    assert [number for number, *_ in ranker.blocks(256)] == [0, 1, 2, 3]
