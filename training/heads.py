"""Margin heads: AAMC, LMCC and FC_CE, with a backward written by hand.

A head costs little more than its three matrix products (logits, gradient of the weight, gradient of the
descriptors). The weight is walked in blocks of classes that stay in cache: a block's norms are taken, its
product made and its gradient written while it is there, and no normalised copy of the weight ever exists. One
copy of the logits is kept for the backward, a row a class, which is how a block's product is fastest; everything
that depends on the label is a vector of one number a sample.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

HeadKind = Literal["AAMC", "LMCC", "FC_CE"]
ScoreForm = Literal["raw", "cosine"]

CPU_BLOCK = 2048  # classes; 2048 rows of 1280 floats are 10 MB
DEVICE_BLOCK = 8192  # on a GPU a block only bounds the temporary memory
NORM_FLOOR = 1e-12  # as torch.nn.functional.normalize
NO_PROBABILITY = -69.0  # its logarithm (1e-30): with less, a CPU would multiply denormal numbers, which takes it long


@dataclass(frozen=True)
class Margin:
    """What a head does to the cosines: all times `s`, and a penalty `m` on the label's own.

    `kind` "AAMC": radians added to the angle; "LMCC": subtracted from the cosine; "FC_CE": nothing (`s` is 1,
    `m` is 0).
    """

    kind: HeadKind
    s: float = 1.0
    m: float = 0.0

    @property
    def normalises(self) -> bool:
        """Whether the head works on cosines, not on raw dot products."""
        return self.kind != "FC_CE"

    def own_logit(self, cosine: Tensor) -> tuple[Tensor, Tensor]:
        """The logit of the label's own class and its derivative by the cosine; all [B]."""
        if self.kind != "AAMC":
            return self.s * (cosine - self.m), torch.full_like(cosine, self.s)
        cos_m, sin_m = math.cos(self.m), math.sin(self.m)
        sine_squared = 1.0 - cosine.square()
        sine = sine_squared.clamp_min(0.0).sqrt()
        # At cosine 1 the true slope is infinite; the floor keeps it finite and is far below any sine in
        # training.
        slope = cos_m + sin_m * cosine / sine_squared.clamp_min(torch.finfo(cosine.dtype).eps).sqrt()
        penalised = cosine > 0
        logit = torch.where(penalised, cosine * cos_m - sine * sin_m, cosine)
        return self.s * logit, self.s * torch.where(penalised, slope, torch.ones_like(slope))


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Plain float32 arithmetic: autocast off, and no TF32 in matrix products on a GPU."""
    with torch.autocast(device.type, enabled=False), _without_tf32() if device.type == "cuda" else nullcontext():
        yield


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Turn TF32 off for matrix products by torch's old setting and by that of 2.9 and later.

    Where the two disagree, torch raises as soon as the old one is read, as some products on a GPU do.
    """
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    if precision is not None:
        matmul.fp32_precision = "ieee"  # before the old setting is read, which fails where only this one allows TF32
    old = torch.get_float32_matmul_precision()
    if old != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if old != "highest":
            torch.set_float32_matmul_precision(old)
        if precision is not None:
            matmul.fp32_precision = precision


def _blocks(classes: Tensor) -> Iterator[slice]:
    size = CPU_BLOCK if classes.device.type == "cpu" else DEVICE_BLOCK
    for start in range(0, len(classes), size):
        yield slice(start, min(start + size, len(classes)))


class MarginSoftmax(torch.autograd.Function):
    """Cross-entropy over the classes of a head, with its margin; gradients by hand.

    With a process `group` the weight holds this rank's classes only, the descriptors and labels are the same
    on all its ranks, and `mine` marks the samples whose class is here (the labels of the others are any valid
    index). The losses, and the descriptors' gradient once summed over the ranks, are those of one rank
    holding all classes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        descriptors: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        margin: Margin,
        mine: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Losses [B] and hits [B] (bool: every other class scores lower, margin aside).

        `descriptors` [B, D] (unit length for a margin of cosines), `weight` [C, D], `bias` [C] or None,
        `labels` int64 [B]; one floating dtype, in which all is computed.
        """
        with full_precision(weight.device):
            logits = descriptors.new_empty(len(weight), len(descriptors))
            norms = weight.new_empty(len(weight)) if margin.normalises else None
            columns = descriptors.T.contiguous()
            for block in _blocks(weight):
                torch.mm(weight[block], columns, out=logits[block])
                if norms is not None:
                    torch.linalg.vector_norm(weight[block], dim=1, out=norms[block])
            inverse_norms = norms.clamp_min_(NORM_FLOOR).reciprocal_() if norms is not None else None
            if inverse_norms is not None:
                logits.mul_(inverse_norms[:, None] * margin.s)
            if bias is not None:
                logits.add_(bias[:, None])

            own = logits.gather(0, labels[None])
            # The label's own class leaves the logits and is treated apart, where its margin costs nothing and
            # its loss loses no digits: log(1 + exp(rest - own)) stays exact where the probability is nearly
            # 1.
            absent = torch.full_like(own, torch.finfo(own.dtype).min)
            logits.scatter_(0, labels[None], absent if mine is None else torch.where(mine, absent, own))
            plain = own[0] if mine is None else own[0] * mine
            best, rest = _log_sum_exp(logits)
            if group is not None:
                plain, best, rest = _over_ranks(plain, best, rest, group)
            cosine = plain / margin.s
            logit, slope = margin.own_logit(cosine)
            gap = rest - logit
            losses = torch.logaddexp(gap, torch.zeros_like(gap))
            log_total = torch.logaddexp(rest, logit)

        ctx.save_for_backward(
            descriptors, weight, bias, labels, mine, logits, inverse_norms, log_total, gap, cosine, slope
        )
        ctx.margin, ctx.group = margin, group
        hits = plain > best
        ctx.mark_non_differentiable(hits)
        return losses, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        descriptors, weight, bias, labels, mine, logits, inverse_norms, log_total, gap, cosine, slope = (
            ctx.saved_tensors
        )
        margin: Margin = ctx.margin
        with full_precision(weight.device):
            grad_losses = grad_losses.to(weight.dtype)
            if ctx.group is not None:
                grad_losses = grad_losses.clone()
                dist.all_reduce(grad_losses, group=ctx.group)
            grad_descriptors = torch.zeros_like(descriptors)
            grad_weight = torch.empty_like(weight)
            grad_bias = None if bias is None else torch.empty_like(bias)
            room, more = _room(logits), _room(logits)
            for block in _blocks(weight):
                rows = logits[block]
                grad = torch.sub(rows, log_total, out=room[: len(rows)])
                torch.threshold_(grad, NO_PROBABILITY, -torch.inf).exp_().mul_(grad_losses)
                if grad_bias is not None:
                    torch.sum(grad, dim=1, out=grad_bias[block])
                if inverse_norms is not None:
                    inverse = inverse_norms[block]
                    radial = torch.mul(grad, rows, out=more[: len(rows)]).sum(1).mul_(inverse.square())
                    grad.mul_(inverse[:, None] * margin.s)
                torch.mm(grad, descriptors, out=grad_weight[block])
                if inverse_norms is not None:  # the weight's normalisation takes away what points along the weight
                    grad_weight[block].addcmul_(weight[block], radial[:, None], value=-1)
                grad_descriptors.addmm_(grad.T, weight[block])

            # The label's own class: its probability less one is minus sigmoid(gap).
            own = -grad_losses * torch.sigmoid(gap) * slope
            if mine is not None:
                own = own * mine
            own_weight = weight[labels]
            if inverse_norms is not None:
                own_inverse = inverse_norms[labels][:, None]
                own_weight = own_weight * own_inverse
                tangent = (descriptors - cosine[:, None] * own_weight) * own_inverse
            else:
                tangent = descriptors
            grad_weight.index_add_(0, labels, own[:, None] * tangent)
            if grad_bias is not None:
                grad_bias.index_add_(0, labels, own)
            grad_descriptors.add_(own[:, None] * own_weight)
        return grad_descriptors, grad_weight, grad_bias, None, None, None, None


def _log_sum_exp(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and logarithm of the sum of exponentials over the classes, [B] both."""
    parts = [logits[block] for block in _blocks(logits)]
    room = _room(logits)
    best = torch.stack([part.amax(0) for part in parts]).amax(0)
    sums = [torch.sub(part, best, out=room[: len(part)]).exp_().sum(0) for part in parts]
    return best, best + torch.stack(sums).sum(0).log()


def _room(logits: Tensor) -> Tensor:
    """Memory for a block of what is computed from the logits."""
    return torch.empty_like(logits[next(_blocks(logits))])


def _over_ranks(plain: Tensor, best: Tensor, rest: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    highest = best.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack([plain, (rest - highest).exp()])
    dist.all_reduce(sums, group=group)
    return sums[0], highest, highest + sums[1].log()


class Head(nn.Module):
    """A classifier over the cells of one group: `weight` [classes, dim], and `bias` [classes] for FC_CE.

    Divide&Classify, section 3; `s` and `m` as its reference sets them (FC_CE ignores both). With a `part` (a range of
    the classes) the parameters are those rows of the whole head's, initial values included. Raises ValueError for an
    unknown kind, no classes, or a scale or margin that is out of range.
    """

    bias: Tensor | None

    def __init__(
        self,
        kind: HeadKind,
        dim: int,
        classes: int,
        s: float = 100.0,
        m: float = 0.2,
        part: range | None = None,
    ) -> None:
        super().__init__()
        if kind not in ("AAMC", "LMCC", "FC_CE"):
            raise ValueError(f"head {kind!r} is none of AAMC, LMCC, FC_CE")
        if dim < 1 or classes < 1:
            raise ValueError(f"a head needs at least one dimension and one class, not {dim} and {classes}")
        if not s > 0 or not 0 <= m < math.pi / 2:
            raise ValueError(f"a head needs a scale s > 0 and a margin 0 <= m < pi/2, not s={s} and m={m}")
        self.margin = Margin(kind) if kind == "FC_CE" else Margin(kind, s, m)
        self.dim, self.classes = dim, classes
        self.part = range(classes) if part is None else part
        self.weight = nn.Parameter(torch.empty(len(self.part), dim))
        self.register_parameter("bias", nn.Parameter(torch.empty(len(self.part))) if kind == "FC_CE" else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier-uniform for AAMC and LMCC, the initial values of `nn.Linear` for FC_CE."""
        bound = math.sqrt(6 / (self.dim + self.classes)) if self.bias is None else 1 / math.sqrt(self.dim)
        self._draw(self.weight, bound)
        if self.bias is not None:
            self._draw(self.bias, bound)

    def _draw(self, parameter: Tensor, bound: float) -> None:
        """Uniform rows; other parts' are drawn and dropped, so that a split changes no initial value."""
        for start in range(0, self.classes, DEVICE_BLOCK):
            stop = min(start + DEVICE_BLOCK, self.classes)
            rows = parameter.new_empty(stop - start, *parameter.shape[1:]).uniform_(-bound, bound)
            first, last = max(start, self.part.start), min(stop, self.part.stop)
            if first < last:
                parameter[first - self.part.start : last - self.part.start] = rows[first - start : last - start]

    def forward(self, descriptors: Tensor, labels: Tensor) -> Tensor:
        """The loss of every sample, [B] in the weight's dtype (float32), under any autocast.

        `descriptors` [B, dim] of any floating dtype (its gradient comes back in it), `labels` int64 [B].
        """
        return self.losses_and_hits(descriptors, labels)[0]

    def losses_and_hits(self, descriptors: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of `forward` and, for free, which samples score best on their own class (bool [B])."""
        prepared = self.prepare(descriptors)
        losses, hits = MarginSoftmax.apply(prepared, self.weight, self.bias, labels, self.margin)
        return losses, hits

    def prepare(self, descriptors: Tensor) -> Tensor:
        """Descriptors [B, dim] in the weight's dtype, of unit length where the head works on cosines."""
        with full_precision(self.weight.device):
            descriptors = descriptors.to(self.weight.dtype)
            return F.normalize(descriptors, dim=1, eps=NORM_FLOOR) if self.margin.normalises else descriptors

    @torch.no_grad()
    def scores(self, descriptors: Tensor, form: ScoreForm = "raw", classes: slice = slice(None)) -> Tensor:
        """Scores [B, classes] to rank cells by, in the weight's dtype; `descriptors` [B, dim]. `classes`: only these.

        "raw": dot product with the weight as it is (for FC_CE the logits, bias included), which the reference ranks by;
        "cosine": cosine of the descriptor and the weight. ValueError for another form.
        """
        if form not in ("raw", "cosine"):
            raise ValueError(f"scores {form!r} are neither raw nor cosine")
        with full_precision(self.weight.device):
            descriptors, weight = descriptors.to(self.weight.dtype), self.weight[classes]
            if form == "raw":
                return F.linear(descriptors, weight, None if self.bias is None else self.bias[classes])
            norms = torch.linalg.vector_norm(weight, dim=1).clamp_min(NORM_FLOOR)
            return F.linear(F.normalize(descriptors, dim=1, eps=NORM_FLOOR), weight).div_(norms)

    def extra_repr(self) -> str:
        """Kind, size and margin, as `print(head)` shows them."""
        margin = self.margin
        return f"{margin.kind}, dim={self.dim}, classes={self.classes}, s={margin.s}, m={margin.m}"
