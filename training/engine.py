"""One training step: forward, backward, gradients of all ranks, optimisers.

The step's loss is the sum of the per-sample losses over all ranks divided by the global batch size, whatever
share of the batch a rank holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from shards.sampler import slots_of_rank
from training.batch_norms import BufferGuard
from training.colour import change_colours, colour_changes
from training.distributed import HostCopy, World, to_device, trained_bytes
from training.head_bank import HeadBank
from training.model import to_input
from training.optimisers import Average, Rates, make_adam
from training.presets import TrainConfig
from training.schedules import parts_of_share


@dataclass(frozen=True)
class StepOutcome:
    """What a step did, over all ranks.

    `losses` and `hits` are sums per group over the step's samples, float64 [G] in the order of the bank's groups;
    `finite` False means that the step was skipped; `grad_norm` is the norm of the model's gradient where it was
    taken, `head_norms` those of this rank's heads' by group; `stop` says that it was skipped because some rank was
    asked to stop.
    """

    losses: np.ndarray
    hits: np.ndarray
    finite: bool
    grad_norm: float | None
    stop: bool
    head_norms: dict[int, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Sum of the losses of all samples."""
        return float(self.losses.sum())


class Engine:
    """Model, heads and optimisers, and how one step changes them.

    `model` is the bare model (its weights are what is saved); `wrapped` is what is trained: the same
    weights inside DDP or a compiled module.
    """

    def __init__(self, config: TrainConfig, model: nn.Module, wrapped: nn.Module, bank: HeadBank, world: World) -> None:
        self.config = config
        self.model = model
        self.wrapped = wrapped
        self.bank = bank
        self.world = world
        self.optimizer = make_adam(model.parameters(), config.lr)
        self.rates = Rates(config, self.optimizer)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16")
        self.average = Average(self._averaged_values(), config.ema) if config.ema else None
        self.guard = BufferGuard(model)
        self.position = {group: i for i, group in enumerate(bank.groups)}
        self.dtype = next(model.parameters()).dtype
        self.model_bytes = trained_bytes(model.parameters()) if world.size > 1 else 0
        self.bytes_reduced = 0

    def trained_parameters(self) -> dict[str, Tensor]:
        """The parameters of the model that are trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _averaged_values(self) -> dict[str, Tensor]:
        """What a running average is kept of: trained parameters, and the statistics of batch norms that fit them."""
        statistics = {name: b for name, b in self.model.named_buffers() if b.is_floating_point()}
        return self.trained_parameters() | statistics

    def has_finite_weights(self) -> bool:
        """Whether all weights of the model and of this rank's heads are finite."""
        parts = [self.model, *self.bank.heads.values()]
        return all(bool(p.isfinite().all()) for part in parts for p in part.parameters())

    def step(
        self,
        step: int,
        images: Tensor,
        labels: Tensor,
        groups: np.ndarray,
        *,
        asked_to_stop: bool = False,
        want_norm: bool = False,
    ) -> StepOutcome:
        """Train on this rank's samples of the global batch.

        `images` uint8 [b, S, S, 3] (or floating [b, 3, S, S], taken as normalised), `labels` int64 [b], `groups`
        int64 [b] of group ids on the host. A loss that is not finite on any rank skips the step on all of them, and so
        does a rank that is asked to stop, whatever its batch is.
        """
        seed_model_randomness(self.config.seed, step, self.world.rank, self.world.device)
        trained = self.bank.groups_of_step(groups)
        self.rates.apply(step, self.bank.optimizers.values())
        self.guard.remember()
        sums = self._forward_backward(self._to_input(images, step), labels, groups, asked_to_stop)
        totals = np.array(sums.wait())
        count = len(self.position)
        losses, hits, stop = totals[:count], totals[count : 2 * count], bool(totals[-1])
        if stop or not np.isfinite(losses).all():
            self._forget_gradients(trained)
            self.guard.restore()
            return StepOutcome(losses, hits, False, None, stop)
        self.bytes_reduced = self.model_bytes + self.bank.reduce_gradients(trained)
        finite, norm, head_norms = self._apply(trained, want_norm)
        return StepOutcome(losses, hits, finite, norm, stop, head_norms)

    def _forward_backward(self, images: Tensor, labels: Tensor, groups: np.ndarray, asked_to_stop: bool) -> HostCopy:
        """Gradients of this rank; returns the sums of all ranks: losses by group, hits by group, calls to stop."""
        count = len(self.position)
        places = to_device(torch.tensor([self.position[int(g)] for g in groups]), self.world.device)
        sums = torch.zeros(2 * count + 1, dtype=torch.float64, device=self.world.device)
        sums[-1].fill_(asked_to_stop)  # an assignment would copy a number of the host, and wait for the device
        parts = parts_of_share(self.config.batch_size, self.world.rank, self.world.size, self.config.accumulate)
        host: HostCopy | None = None
        begin = 0
        for number, part in enumerate(parts):
            last = part is parts[-1]
            with nullcontext() if last else self._without_reduction():
                cut = slice(begin, begin + len(part))
                begin = cut.stop
                descriptors = self.wrapped(images[cut])
                losses, hits = self.bank.losses(descriptors, labels[cut], groups[cut], number)
                sums.index_add_(0, places[cut], losses.detach().double())
                sums.index_add_(0, places[cut] + count, hits.double())
                if last:
                    host = HostCopy(self.world.sum(sums))
                loss = losses.sum() * (self.world.size / self.config.batch_size)
                self.scaler.scale(loss).backward()
        assert host is not None
        return host

    def _to_input(self, images: Tensor, step: int) -> Tensor:
        images = images if images.is_floating_point() else to_input(images, self.dtype)
        if not self.config.colour_jitter:
            return images
        slots = slots_of_rank(self.config.batch_size, self.world.rank, self.world.size)
        return change_colours(images, colour_changes(self.config.seed, step, slots, self.config.colour_jitter))

    def _without_reduction(self) -> AbstractContextManager[None]:
        no_sync = getattr(self.wrapped, "no_sync", None)
        return nullcontext() if no_sync is None else no_sync()

    def _apply(self, trained: list[int], want_norm: bool) -> tuple[bool, float | None, dict[int, float]]:
        """Step all optimisers; with --grad-clip skip the step where the model's gradient is not finite. (Without, the
        next loss tells; to look at each gradient would be to wait for the device.)

        Returns whether it was taken, and the norms of the gradients where they are wanted.
        """
        optimizers = [self.optimizer] + [self.bank.optimizers[group] for group in trained]
        for optimizer in optimizers:
            self.scaler.unscale_(optimizer)
        norm = None
        if self.config.grad_clip:
            norm = float(nn.utils.clip_grad_norm_(self.trained_parameters().values(), self.config.grad_clip))
        elif want_norm:
            gradients = [p.grad for p in self.trained_parameters().values() if p.grad is not None]
            norm = float(nn.utils.get_total_norm(gradients))
        head_norms = self.bank.gradient_norms(trained) if want_norm else {}
        if self.config.grad_clip and norm is not None and not math.isfinite(norm) and not self.scaler.is_enabled():
            self._forget_gradients(trained)
            self.guard.restore()
            return False, norm, head_norms
        for optimizer in optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        self._forget_gradients(trained)
        if self.average is not None:
            self.average.update()
            self.bank.update_averages(trained)
        return True, norm, head_norms

    def _forget_gradients(self, trained: list[int]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for group in trained:
            self.bank.optimizers[group].zero_grad(set_to_none=True)

    def start_averages(self) -> None:
        """Let the running averages, if any are kept, begin at the weights as they are."""
        if self.average is not None:
            self.average.restart()
            self.bank.start_averages()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this block model and heads hold the weights to evaluate: the running averages, if any are kept."""
        with self.averaged_model(), self.bank.averaged():
            yield

    def averaged_model(self) -> AbstractContextManager[None]:
        """`averaged` for the model alone; within it `average.tensors` are the values that training goes on with."""
        return nullcontext() if self.average is None else self.average.swapped_in()


def seed_model_randomness(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Make what the model draws in a step (stochastic depth) a function of seed, step and rank."""
    number = int(np.random.SeedSequence([seed, 2, step, rank]).generate_state(1, np.uint64)[0])
    # torch.manual_seed writes down the stack for each kind of device that is not there: 0.1 ms and more a step.
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
