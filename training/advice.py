"""What a run is warned of at its start: settings that it can serve and that are seldom meant."""

from __future__ import annotations

import os

from shards.classes import ClassTable
from shards.console import format_count
from training.distributed import World
from training.presets import TrainConfig


def warnings_of(config: TrainConfig, classes: ClassTable, photo_size: int, world: World, *, begins: bool) -> list[str]:
    """The warnings, a line each, for a training on `classes` whose photos have `photo_size` pixels a side.

    `begins`: its first weights are those that --weights names, not a checkpoint's.
    """
    found = (
        _launch(world),
        _stream(config, classes),
        _warmup(config),
        _frozen(config) if begins else None,
        _epochs(config, classes),
        _single_classes(classes),
        _enlarged(config, photo_size),
    )
    return [f"warning: {warning}" for warning in found if warning]


def _launch(world: World) -> str | None:
    """`accelerate launch --cpu --num_processes N` starts one process only; say so, and what starts N."""
    if world.size == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        return (
            "the launcher was asked for several processes and started one; on the CPU use "
            "accelerate launch --config_file launch/cpu.yaml --num_processes N training/train.py ... or "
            "torchrun --standalone --nproc_per_node N -- training/train.py ..."
        )
    return None


def _stream(config: TrainConfig, classes: ClassTable) -> str | None:
    """A window of few runs for a group's classes mixes photos badly; say so, and what mixes them better."""
    if config.read != "stream":
        return None
    groups = classes.groups
    at_once = len(groups) if config.schedule == "joint" else 1
    runs, most = config.stream_window // (config.stream_run * at_once), max(classes.count(g) for g in groups)
    if most <= runs:
        return None
    return (
        f"--read stream holds {format_count(runs, 'run')} of each group at a time where one has "
        f"{format_count(most, 'class')}: it may be less accurate than with --read indexed; a larger --stream-window "
        "or a smaller --stream-run mixes better"
    )


def _warmup(config: TrainConfig) -> str | None:
    steps = config.epochs * config.iterations_per_epoch
    if config.warmup_steps < steps:
        return None
    return (
        f"--warmup-steps {config.warmup_steps} of {format_count(steps, 'step')}: the learning rate never gets to --lr"
    )


def _frozen(config: TrainConfig) -> str | None:
    if config.weights != "none" or not config.freeze_until:
        return None
    return (
        f"--weights none: the first {config.freeze_until} children of the backbone keep random weights, since "
        f"--freeze-until is {config.freeze_until}; train them too with --freeze-until 0"
    )


def _epochs(config: TrainConfig, classes: ClassTable) -> str | None:
    groups = len(classes.groups)
    if config.schedule == "joint" or config.epochs >= groups:
        return None
    return (
        f"--epochs {config.epochs}: an epoch trains one group in turn, so that {groups - config.epochs} of {groups} "
        f"groups are never trained; give {groups} or more, or --schedule joint"
    )


def _single_classes(classes: ClassTable) -> str | None:
    if len(classes) == 1:
        return "the data set has a single class: there is nothing to tell it from"
    counts = [classes.count(group) for group in classes.groups]
    if not (alone := counts.count(1)):
        return None
    return (
        f"{alone} of {format_count(len(counts), 'group')} {'has' if alone == 1 else 'have'} a single class, which "
        "teaches nothing; build the data set with a smaller --N, or --N 1 for one group"
    )


def _enlarged(config: TrainConfig, photo_size: int) -> str | None:
    if config.image_size <= photo_size:
        return None
    return (
        f"--image-size {config.image_size}: enlarges the data set's photos of {photo_size} pixels, while queries are "
        f"read in full; train with --image-size {photo_size}, or build the data set with --image-size "
        f"{config.image_size}"
    )
