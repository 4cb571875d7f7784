"""A head whose classes are split over the ranks, for cities with more cells than one device holds.

Model-parallel softmax as in PartialFC (An et al., CVPR 2022): descriptors and labels of all ranks are
gathered, every rank computes the logits of its own classes, and the ranks share one maximum, one sum and one
own logit a sample. Without sampling this is exact: the losses and gradients of one rank that holds all
classes.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training.heads import Head, HeadKind, MarginSoftmax


class ShardedHead(Head):
    """This rank's part of a head over `classes` cells: rank r of R holds classes r*C//R to (r+1)*C//R.

    `sample_rate` under 1 compares with that share of this rank's classes only, redrawn at every call from
    torch's generator (the trainer seeds it by seed, step and rank); the classes of the global batch are
    always among them.

    All ranks of the default process group must call it together, each with its own part of the batch. A loss
    that is the sum over all ranks gives the weight its whole gradient: nothing is left to reduce. Raises
    ValueError where there are fewer classes than ranks, or for a share that is not over 0 and at most 1.
    """

    def __init__(
        self,
        kind: HeadKind,
        dim: int,
        classes: int,
        s: float = 100.0,
        m: float = 0.2,
        sample_rate: float = 1.0,
    ) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        if classes < ranks:
            raise ValueError(f"{classes} classes cannot be split over {ranks} ranks")
        if not 0 < sample_rate <= 1:
            raise ValueError(f"a share of classes lies over 0 and at most 1, not {sample_rate}")
        super().__init__(kind, dim, classes, s, m, part=part_of(classes, rank, ranks))
        self.group = dist.group.WORLD
        self.sample_rate = sample_rate

    def losses_and_hits(
        self, descriptors: Tensor, labels: Tensor, sizes: list[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `Head.losses_and_hits`, of this rank's samples; `labels` number the classes of the whole head.

        Ranks may bring different numbers of samples: `sizes`, by rank. None asks them, which waits for the device. With
        sampling, hits count the classes compared with only.
        """
        if sizes is None:
            sizes = _sizes(labels, self.group)
        everyone = _GatherRows.apply(self.prepare(descriptors), sizes, self.group)
        all_labels = _gather_rows(labels, sizes, self.group)
        mine = (all_labels >= self.part.start) & (all_labels < self.part.stop)
        own = torch.where(mine, all_labels - self.part.start, 0)
        weight: Tensor = self.weight
        bias = self.bias
        if self.training and self.sample_rate < 1:
            chosen = self.choose(own, mine)
            weight = weight.index_select(0, chosen)
            bias = None if bias is None else bias.index_select(0, chosen)
            own = torch.searchsorted(chosen, own).clamp_max_(len(chosen) - 1)
        losses, hits = MarginSoftmax.apply(everyone, weight, bias, own, self.margin, mine, self.group)
        start = sum(sizes[: dist.get_rank(self.group)])
        return losses[start : start + len(labels)], hits[start : start + len(labels)]

    def choose(self, own: Tensor, mine: Tensor) -> Tensor:
        """Rows of this part to compare with, ascending: the labels `own` where `mine`, and random ones.

        At least as many as the global batch has samples, so that the labels always fit.
        """
        count = min(len(self.weight), max(round(self.sample_rate * len(self.weight)), len(own)))
        chance = torch.rand(len(self.weight), device=self.weight.device)
        chance.index_add_(0, own, mine.to(chance.dtype))
        return chance.topk(count).indices.sort().values


def part_of(classes: int, rank: int, ranks: int) -> range:
    """The classes that `rank` of `ranks` holds."""
    return range(classes * rank // ranks, classes * (rank + 1) // ranks)


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks, in rank order; every rank's gradient is a summand of the whole one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _gather_rows(rows, sizes, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total.split(ctx.sizes)[dist.get_rank(ctx.group)], None, None


def _sizes(labels: Tensor, group: dist.ProcessGroup | None) -> list[int]:
    mine = torch.tensor([len(labels)], device=labels.device)
    sizes = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, mine, group=group)
    return torch.cat(sizes).tolist()


def _gather_rows(rows: Tensor, sizes: list[int], group: dist.ProcessGroup | None) -> Tensor:
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    everyone = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(everyone, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(everyone, sizes, strict=True)])
