"""Optimisers, learning rates and the running average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from training.presets import LOWEST_RATE, TrainConfig


def make_adam(parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Adam:
    """Adam as the reference uses it (torch's defaults), one fused kernel a step; frozen parameters stay out."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.Adam(trained, lr=rate, fused=True)


class Rates:
    """The learning rates of model and heads, as `--lr-schedule` says.

    plateau: the model's rate is cut where an epoch's mean loss stalls, the heads' stay (the reference).
    cosine, constant: a warm-up factor, then a half cosine to zero or 1, on both; a function of the step alone.
    """

    def __init__(self, config: TrainConfig, model_optimizer: torch.optim.Optimizer) -> None:
        self.config = config
        self.model_optimizer = model_optimizer
        self.plateau: ReduceLROnPlateau | None = None
        if config.lr_schedule == "plateau":
            self.plateau = ReduceLROnPlateau(model_optimizer, patience=config.patience, factor=config.plateau_factor)

    @property
    def model_rate(self) -> float:
        """The model's current learning rate."""
        return float(self.model_optimizer.param_groups[0]["lr"])

    @property
    def exhausted(self) -> bool:
        """Whether the plateau schedule has cut the model's rate below 1e-6, where the paper's run ends."""
        return self.plateau is not None and self.model_rate < LOWEST_RATE

    def factor(self, step: int) -> float:
        """The factor on both base rates in the given step of a cosine or constant schedule."""
        warmup = self.config.warmup_steps
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.config.lr_schedule == "constant":
            return 1.0
        total = self.config.epochs * self.config.iterations_per_epoch
        progress = min((step - warmup) / max(1, total - warmup), 1.0)
        return 0.5 * (1.0 + math.cos(math.pi * progress))

    def apply(self, step: int, head_optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Set the rates of the given step."""
        if self.plateau is not None:
            return
        factor = self.factor(step)
        _set_rate(self.model_optimizer, self.config.lr * factor)
        for optimizer in head_optimizers:
            _set_rate(optimizer, self.config.head_lr * factor)

    def ends_after(self, mean_loss: float) -> bool:
        """Whether an epoch of this mean loss would exhaust the rate; changes nothing."""
        if self.plateau is None:
            return False
        state, rate = self.plateau.state_dict(), self.model_rate
        self.plateau.step(mean_loss)
        ends = self.exhausted
        self.plateau.load_state_dict(state)
        _set_rate(self.model_optimizer, rate)
        return ends

    def end_epoch(self, mean_loss: float) -> None:
        """Tell the plateau schedule the epoch's mean loss over all ranks."""
        if self.plateau is not None:
            self.plateau.step(mean_loss)

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs."""
        return {} if self.plateau is None else dict(self.plateau.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state; one of another kind of schedule is left aside."""
        if self.plateau is not None and state:
            kept = {key: value for key, value in state.items() if key not in ("patience", "factor")}
            self.plateau.load_state_dict(kept)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


class Average:
    """A running average of tensors: average <- decay * average + (1 - decay) * value after every step.

    `values` are the tensors, by name, that training changes in place; `tensors` their averages. Early on the decay is
    (1 + n) / (10 + n) where that is smaller, so that the random start fades at once.
    """

    def __init__(self, values: dict[str, Tensor], decay: float) -> None:
        self.values = values
        self.decay = decay
        self.restart()

    def restart(self) -> None:
        """Begin at the current values."""
        self.updates = 0
        self.tensors = {name: value.detach().clone() for name, value in self.values.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the current values."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(list(self.tensors.values()), list(self.values.values()), 1 - decay)

    def to(self, device: torch.device) -> None:
        """Move the averages to a device."""
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Take up a saved average that has seen `updates` values."""
        self.updates = updates
        for name, average in self.tensors.items():
            average.copy_(tensors[name])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within this block values and averages change places."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.tensors.items():
            kept = self.values[name].clone()
            self.values[name].copy_(average)
            average.copy_(kept)
