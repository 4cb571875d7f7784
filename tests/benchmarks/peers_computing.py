"""Heads and a whole training step: this project's, CosPlace's and arcface_torch's; rows of `peers.py`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from timing import in_turn, peak_of_live_bytes
from torch import Tensor, nn
from torch.nn import functional as F
from whole_steps import config_of, step_of

from shards.classes import ClassTable
from shards.console import JobError
from training.heads import Head

BATCH, DIM, CLASSES, STEP_CLASSES = 64, 1280, 35_000, 8_750
S, M = 100.0, 0.2
SIZE = 224
ROUNDS, STEP_ROUNDS = 9, 4
CLOSE = 1e-3  # differences of losses, and of gradients in norm, that float32 explains
Loss = Callable[[Tensor, Tensor], Tensor]  # of descriptors and labels: the batch's mean
Kind = Literal["LMCC", "AAMC"]


def head_rows(code: dict[str, list[Any]]) -> list[dict[str, object]]:
    """Time, memory, loss and gradients of our head and those of the peers in `code`, those of a kind in turn."""
    torch.manual_seed(0)
    labels = torch.randint(CLASSES, (BATCH,))
    noise = F.normalize(torch.randn(BATCH, DIM))
    rows: list[dict[str, object]] = []
    with ExitStack() as stack:
        if "arcface" in code:
            stack.enter_context(one_process())
        kinds: tuple[Kind, ...] = ("LMCC", "AAMC")
        for kind in kinds:
            head = Head(kind, DIM, CLASSES, S, M)
            near = F.normalize(head.weight.detach()[labels])
            descriptors = noise + 0.26 * near  # cosine with their own class 0.25: all have a margin and a loss
            losses = {"ours": our_head(head)}
            if "cosplace" in code and kind == "LMCC":
                (cosface_loss,) = code["cosplace"]
                losses["cosplace"] = cosplace_head(cosface_loss, head.weight)
            if "arcface" in code:
                margin_losses, partial_fc = code["arcface"]
                losses["arcface"] = arcface_head(margin_losses, partial_fc, head.weight, kind)
            if len(losses) > 1:
                rows += compared(losses, kind, descriptors, labels)
    return rows


def compared(
    losses: dict[str, tuple[nn.Module, Loss]], kind: Kind, descriptors: Tensor, labels: Tensor
) -> list[dict[str, object]]:
    """Rows of heads that are the same function; raises `JobError` where they are not."""

    def train(loss: Loss) -> None:
        loss(descriptors.clone().requires_grad_(), labels.clone()).backward()

    def clear() -> None:
        for module, _ in losses.values():
            module.zero_grad(set_to_none=True)

    rows: list[dict[str, object]] = []
    our_loss, our_gradients = loss_and_gradients(*losses["ours"], descriptors, labels)
    for name in losses:
        value, gradients = loss_and_gradients(*losses[name], descriptors, labels)
        apart = max(float((g - o).norm() / o.norm()) for g, o in zip(gradients, our_gradients, strict=True))
        if abs(value - our_loss) > CLOSE * our_loss or (kind == "LMCC" and apart > CLOSE):
            raise JobError(
                f"{name}'s {kind}: loss {value}, ours {our_loss}; gradients {apart} apart: not the same head"
            )
        rows.append({"name": f"head-{name}", "head": kind, "loss": value, "gradients_apart": apart})
    works: dict[str, Callable[[], object]] = {name: partial(train, loss) for name, (_, loss) in losses.items()}
    peaks = {name: peak_of_live_bytes(work, clear) for name, work in works.items()}
    times = in_turn(works, ROUNDS, clear)
    return [
        row | {"milliseconds": times[name], "peak_bytes": peaks[name]} for row, name in zip(rows, losses, strict=True)
    ]


def loss_and_gradients(
    module: nn.Module, loss: Loss, descriptors: Tensor, labels: Tensor
) -> tuple[float, tuple[Tensor, ...]]:
    """The loss, and its gradients by the descriptors and the module's weight."""
    leaf = descriptors.clone().requires_grad_()
    value = loss(leaf, labels.clone())
    return value.item(), torch.autograd.grad(value, (leaf, *module.parameters()))


def our_head(head: Head) -> tuple[nn.Module, Loss]:
    return head, lambda descriptors, labels: head(descriptors, labels).mean()


def cosplace_head(cosface_loss: Any, weight: Tensor) -> tuple[nn.Module, Loss]:
    head = cosface_loss.MarginCosineProduct(weight.shape[1], len(weight), s=S, m=M)
    head.weight.data.copy_(weight.detach())
    criterion = nn.CrossEntropyLoss()
    return head, lambda descriptors, labels: criterion(head(descriptors, labels), labels)


def arcface_head(margin_losses: Any, partial_fc: Any, weight: Tensor, kind: Kind) -> tuple[nn.Module, Loss]:
    """Within `one_process`; its module returns the batch's mean loss."""
    margins = {"AAMC": (1.0, M, 0.0), "LMCC": (1.0, 0.0, M)}
    head = partial_fc.PartialFC_V2(margin_losses.CombinedMarginLoss(S, *margins[kind]), weight.shape[1], len(weight))
    head.weight.data.copy_(weight.detach())
    return head, head


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone, and `.cuda()` of a tensor that leaves it where it is."""
    real = torch.Tensor.cuda
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
        torch.Tensor.cuda = _stays  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            torch.Tensor.cuda = real  # type: ignore[method-assign]
            dist.destroy_process_group()


def _stays(tensor: Tensor) -> Tensor:
    return tensor


def step_rows(network: Any, cosface_loss: Any) -> list[dict[str, object]]:
    """Images a second of whole steps: CosPlace's by itself, then both in turn."""
    theirs = cosplace_step(network, cosface_loss)
    theirs()
    plain = in_turn({"cosplace": theirs}, STEP_ROUNDS, lambda: None)["cosplace"]
    numbers = np.arange(STEP_CLASSES)
    classes = ClassTable(20, 1, 10, 0 * numbers, numbers, 20 * numbers, 0 * numbers, 0 * numbers + 10)
    step = step_of(config_of(Path("unused"), "paper-b0", SIZE, head="LMCC", batch_size=BATCH, s=S, m=M), classes)
    steps = iter(range(1_000_000))

    def ours() -> None:
        step(next(steps))

    ours()
    theirs()
    times = in_turn({"ours": ours, "cosplace": theirs}, STEP_ROUNDS, lambda: None)
    measured = [("ours", "kept", times["ours"]), ("cosplace", "kept", times["cosplace"]), ("cosplace", "plain", plain)]
    return [
        {"name": f"step-{name}", "memory": memory, "images_per_second": 1e3 * BATCH / milliseconds}
        for name, memory, milliseconds in measured
    ]


def cosplace_step(network: Any, cosface_loss: Any) -> Callable[[], None]:
    """A step of its training on the CPU; the weights are random where it would download them."""
    network.get_pretrained_torchvision_model = lambda name: getattr(torchvision.models, name.lower())(weights=None)
    model = network.GeoLocalizationNet("EfficientNet_B0", DIM).train()
    classifier, criterion = cosface_loss.MarginCosineProduct(DIM, STEP_CLASSES, s=S, m=M), nn.CrossEntropyLoss()
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-5), torch.optim.Adam(classifier.parameters(), lr=0.01)]
    images, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.arange(BATCH)

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = criterion(classifier(model(images), labels), labels)
        loss.backward()
        loss.item()
        for optimizer in optimizers:
            optimizer.step()

    return step
