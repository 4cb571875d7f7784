"""The numbers of a run that its curves show, by the names that they bear there."""

from __future__ import annotations

import resource

import numpy as np
import torch

from training.engine import Engine, StepOutcome
from training.progress import Progress, Timing


def step_curves(engine: Engine, outcome: StepOutcome, groups_of_slots: np.ndarray, timing: Timing) -> dict[str, float]:
    """Of a step: losses, accuracies in percent, gradient norms, learning rates, speed, and peak bytes of memory.

    `groups_of_slots` int64 [global batch size] are the groups of the step's samples.
    """
    bank = engine.bank
    values = {"rate/model": engine.rates.model_rate, "speed/images_per_second": timing.rate()}
    values["speed/data_wait_share"] = timing.wait_share()
    values["speed/bytes_all_reduced"] = float(engine.bytes_reduced)
    for group, optimizer in bank.optimizers.items():
        values[f"rate/head-{group:02d}"] = float(optimizer.param_groups[0]["lr"])
    if outcome.finite:
        values["loss/all"] = outcome.loss / len(groups_of_slots)
        for group, loss, hits in zip(bank.groups, outcome.losses, outcome.hits, strict=True):
            if count := int(np.count_nonzero(groups_of_slots == group)):
                values[f"loss/group-{group:02d}"] = float(loss) / count
                values[f"accuracy/group-{group:02d}"] = 100 * float(hits) / count
    if outcome.grad_norm is not None:
        values["gradient_norm/model"] = outcome.grad_norm
    values |= {f"gradient_norm/head-{group:02d}": norm for group, norm in outcome.head_norms.items()}
    if engine.scaler.is_enabled():
        values["rate/fp16_scale"] = float(engine.scaler.get_scale())
    values["memory/host_peak_bytes"] = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    if engine.world.device.type == "cuda":
        values["memory/device_peak_bytes"] = float(torch.cuda.max_memory_allocated(engine.world.device))
    return values


def epoch_curves(progress: Progress) -> dict[str, float]:
    """Of the epoch whose sums `progress` holds: losses and accuracies in percent, and the steps skipped so far."""
    values = {f"epoch/loss/group-{g:02d}": progress.losses[g] / n for g, n in progress.counts.items()}
    values |= {f"epoch/accuracy/group-{g:02d}": 100 * progress.hits[g] / n for g, n in progress.counts.items()}
    return values | {
        "epoch/loss/all": progress.mean_loss(),
        "epoch/accuracy/all": progress.accuracy(),
        "epoch/skipped_steps": progress.skipped,
    }
