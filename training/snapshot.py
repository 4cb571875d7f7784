"""Between a run in memory and its checkpoints on disk."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from shards.console import JobError, flag_of
from shards.provenance import provenance
from training.batch_norms import (
    averaged_batch_norms,
    running_statistics,
    set_running_statistics,
    statistics_over_ranks,
)
from training.checkpoint import (
    Checkpoint,
    TrainingState,
    drop_old,
    list_checkpoints,
    load_latest,
    mark_best,
    save_checkpoint,
    training_state,
    training_values,
)
from training.engine import Engine
from training.presets import TrainConfig
from training.progress import Progress
from training.run_folder import LossFile

HEAD_STATE = "heads."
_STARTS_FROM = ("weights", "init_from")
_FIXED_BY_CHECKPOINT = ("backbone", "head", "descriptor_dim", "freeze_until")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def resume_latest(engine: Engine, say: Callable[[str], None]) -> Progress | None:
    """Take up the latest whole checkpoint of the run's folder, and say what changed; None where there is none.

    Raises JobError for a checkpoint of another class map or model, CheckpointError where none is whole.
    """
    config = engine.config
    found = load_latest(config.out)
    if found is None:
        say(f"{config.out}: no checkpoint yet, starts anew")
        return None
    path, saved, passed_over = found
    for reason in passed_over:
        say(f"passed over: {reason}")
    if "progress" not in saved.state:
        raise JobError(
            f"{path}: holds weights without a training's state, as imported ones do; "
            f"start a new run with --init-from {config.out}"
        )
    before = TrainConfig.from_json(saved.config)
    _check_fits(path, saved, before, engine)
    _restore(saved, before, engine)
    progress = Progress.from_json(saved.state["progress"])
    if metric := saved.state.get("best_by"):  # a kill may have come before the mark
        best = float(progress.best or 0.0)
        engine.world.made_on(engine.world.is_main, lambda: mark_best(config.out, path, metric, best))
    if (before.val_queries is None) != (config.val_queries is None):  # LR@1 and loss are no two values of one measure
        progress.best = None
    say(f"goes on from {path} after step {progress.step:,}")
    for name in _changed_fields(before, config):
        if name in _STARTS_FROM:
            say(f"{flag_of(name)} has no effect: the run goes on from its own weights")
        elif name != "resume":
            values = [json.dumps(of.to_json()[name]) for of in (before, config)]
            say(f"changed since then: {flag_of(name)} {' -> '.join(values)}")
    if not np.array_equal(saved.classes.images, engine.bank.classes.images):
        then, now = int(saved.classes.images.sum()), int(engine.bank.classes.images.sum())
        say(f"changed since then: the data set, {then:,} -> {now:,} photos; from here on others are drawn")
    if saved.state["world_size"] != engine.world.size:
        say(f"changed since then: {saved.state['world_size']} -> {engine.world.size} processes")
    return progress


def _changed_fields(before: TrainConfig, now: TrainConfig) -> list[str]:
    """The names of the fields that two configurations differ in."""
    return [field.name for field in fields(now) if getattr(before, field.name) != getattr(now, field.name)]


def _check_fits(path: Path, saved: Checkpoint, before: TrainConfig, engine: Engine) -> None:
    if saved.classes.fingerprint() != engine.bank.classes.fingerprint():
        raise JobError(
            f"{path}: a checkpoint of another class map than {engine.config.shards}; "
            f"start a new run with --init-from {engine.config.out} to carry its weights over"
        )
    for name in _changed_fields(before, engine.config):
        if name in _FIXED_BY_CHECKPOINT:
            raise JobError(
                f"{path}: was trained with {flag_of(name)} {getattr(before, name)}, not "
                f"{getattr(engine.config, name)}; give that, or another --out"
            )


def _restore(saved: Checkpoint, before: TrainConfig, engine: Engine) -> None:
    values = training_values(saved.training)
    engine.model.load_state_dict(saved.model | values["raw"])
    statistics = values.get("batch_norms", [])
    if statistics:
        own = len(statistics) == engine.world.size
        set_running_statistics(
            engine.model, statistics[engine.world.rank] if own else statistics_over_ranks(statistics)
        )
    engine.optimizer.load_state_dict(values["model_optimizer"])
    for parameter, moments in engine.optimizer.state.items():  # fused Adam pairs memory, not elements
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = torch.empty_like(parameter).copy_(moments[name])
    engine.rates.load_state_dict(values["rates"])
    for group in engine.optimizer.param_groups:
        if before.lr_schedule != engine.config.lr_schedule:
            group["lr"] = engine.config.lr
        elif before.lr != engine.config.lr:
            group["lr"] *= engine.config.lr / before.lr
    if values["scaler"] and engine.scaler.is_enabled():
        engine.scaler.load_state_dict(values["scaler"])
    if engine.average is not None:
        average = {name: saved.model[name] for name in engine.average.tensors}
        engine.average.load(average, values["average_updates"])
        averages = values.get("average_batch_norms", [])
        if len(averages) == engine.world.size:
            with engine.averaged_model():
                set_running_statistics(engine.model, averages[engine.world.rank])
    tensors = {
        name.removeprefix(HEAD_STATE): tensor
        for name, tensor in saved.training.tensors.items()
        if name.startswith(HEAD_STATE)
    }
    engine.bank.restore(saved.heads, tensors)


def save_run(engine: Engine, progress: Progress, losses: LossFile | None, *, best_by: str | None = None) -> None:
    """Write the losses and a checkpoint of the run as it is, mark it as the best one by `best_by`, drop old ones.

    All ranks must call it; rank 0 writes. JobError where that fails, naming the last whole checkpoint.
    """
    world, out = engine.world, engine.config.out
    heads, head_state = engine.bank.collect()
    # Each rank's own; the saved model holds those over all ranks.
    statistics = {"batch_norms": world.gather(running_statistics(engine.model).cpu()) if world.size > 1 else []}

    def write() -> None:
        try:
            if losses is not None:
                losses.flush()
            path = save_checkpoint(out, _checkpoint(engine, progress, heads, head_state, statistics, best_by))
            if best_by is not None:
                mark_best(out, path, best_by, float(progress.best or 0.0))
            drop_old(out, engine.config.keep, progress.step)
        except (OSError, SafetensorError) as error:
            whole = list_checkpoints(out)
            kept = f"the last whole one is {whole[0]}" if whole else "there is none before it"
            reason, remedy = _refusal(error, out)
            raise JobError(
                f"the checkpoint after step {progress.step} cannot be saved ({reason}); {kept}; "
                f"{remedy} and go on with --resume"
            ) from error

    with engine.averaged_model(), averaged_batch_norms(engine.model, world) as own:
        if world.size > 1 and engine.average is not None:
            statistics["average_batch_norms"] = world.gather(own.cpu())
        world.made_on(world.is_main, write)


def _refusal(error: OSError | SafetensorError, out: Path) -> tuple[str, str]:
    """What kept a file of the run folder `out` from being written, and the way out."""
    if isinstance(error, OSError):
        number, place = error.errno, error.filename or out
    else:
        found = re.search(r"(?:os error|code:) (\d+)", str(error))
        number, place = int(found[1]) if found else None, out
    reason = f"{place}: {os.strerror(number)}" if number else str(error)
    if not out.exists():
        return reason, "bring the folder back"
    return reason, "free some space" if number in _FULL else "mend that"


def _checkpoint(
    engine: Engine,
    progress: Progress,
    heads: dict[int, dict[str, Tensor]],
    head_state: dict[str, Tensor],
    statistics: dict[str, list[Tensor]],
    best_by: str | None,
) -> Checkpoint:
    """What is saved, within `averaged_model` of the run's engine."""
    own = training_state(
        {
            "model_optimizer": engine.optimizer.state_dict(),
            "rates": engine.rates.state_dict(),
            "scaler": engine.scaler.state_dict(),
            "raw": {} if engine.average is None else engine.average.tensors,
            "average_updates": 0 if engine.average is None else engine.average.updates,
        }
        | statistics
    )
    tensors = own.tensors | {f"{HEAD_STATE}{name}": tensor for name, tensor in head_state.items()}
    return Checkpoint(
        model=engine.model.state_dict(),
        heads=heads,
        classes=engine.bank.classes,
        config=engine.config.to_json(),
        training=TrainingState(tensors, own.values),
        state={
            "step": progress.step,
            "world_size": engine.world.size,
            "progress": progress.to_json(),
            "best_by": best_by,
        },
        provenance=provenance(),
    )
