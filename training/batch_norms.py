"""The running statistics of batch norms: over all ranks, and as they were before a step that is skipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from training.distributed import World


def batch_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch-norm layers of a model that keep running statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]


def running_statistics(model: nn.Module) -> Tensor:
    """A copy of the running means (first row) and variances of all batch norms, float [2, numbers]."""
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    for layer in batch_norms(model):
        for row, statistics in zip(rows, _running(layer), strict=True):
            row.append(statistics)
    return torch.stack([torch.cat(row) for row in rows]) if rows[0] else torch.empty(2, 0)


@torch.no_grad()
def set_running_statistics(model: nn.Module, statistics: Tensor) -> None:
    """Put back what `running_statistics` took."""
    start = 0
    for layer in batch_norms(model):
        mean, variance = _running(layer)
        stop = start + len(mean)
        mean.copy_(statistics[0, start:stop])
        variance.copy_(statistics[1, start:stop])
        start = stop


@contextmanager
def averaged_batch_norms(model: nn.Module, world: World) -> Iterator[Tensor]:
    """Within this block the running statistics are those over all ranks, since each rank sees other samples.

    Gives this rank's own, as `running_statistics`, which come back at the end.
    """
    own = running_statistics(model)
    if world.size == 1 or not own.numel():
        yield own
        return
    set_running_statistics(model, _statistics(world.sum(_moments(own)) / world.size))
    try:
        yield own
    finally:
        set_running_statistics(model, own)


def statistics_over_ranks(of_ranks: list[Tensor]) -> Tensor:
    """The running statistics of all ranks' samples from those of each; all as `running_statistics` gives them."""
    return _statistics(torch.stack([_moments(own) for own in of_ranks]).mean(0))


def _moments(statistics: Tensor) -> Tensor:
    """Means and means of squares, which ranks may average, float64 [2, numbers]."""
    means, variances = statistics.double()
    return torch.stack([means, variances + means**2])


def _statistics(moments: Tensor) -> Tensor:
    return torch.stack([moments[0], moments[1] - moments[0] ** 2])


def _running(layer: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


class BufferGuard:
    """Keeps a copy of a model's buffers, so that a skipped step does not change batch norms."""

    def __init__(self, model: nn.Module) -> None:
        by_type: dict[torch.dtype, list[Tensor]] = {}  # a GPU copies tensors of one type at once, of several one by one
        for buffer in model.buffers():
            by_type.setdefault(buffer.dtype, []).append(buffer)
        self.pairs = [(buffers, [buffer.clone() for buffer in buffers]) for buffers in by_type.values()]

    @torch.no_grad()
    def remember(self) -> None:
        """Copy the buffers as they are now."""
        for buffers, copies in self.pairs:
            torch._foreach_copy_(copies, buffers)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the remembered values back."""
        for buffers, copies in self.pairs:
            torch._foreach_copy_(buffers, copies)
