"""The typed configuration of a training run, its presets, and the reading of the command line.

`--preset NAME` chooses the values to start from; every flag given beside it overrides one of them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import tyro

from shards.console import WrongArguments, flag_of
from shards.stream import StreamSettings
from training.backbones import BackboneName
from training.heads import HeadKind, ScoreForm
from training.one_voice import parse_arguments
from training.schedules import ScheduleName

LOWEST_RATE = 1e-6  # the paper's run ends when the model's rate is under it


@dataclass(frozen=True)
class TrainConfig:
    """Train a backbone and one margin head per group on a data set of shards.

    Saves and exits with 0 on SIGTERM and SIGUSR1 too; the same command with --resume goes on.

    python training/train.py --shards shards/city --val-queries val/queries --out runs/first

    accelerate launch --config_file launch/eight_gpus.yaml training/train.py --shards shards/city --out runs/first
    """

    shards: str = tyro.MISSING
    """Folder or URL of the data set that preprocessing/build_shards.py wrote."""
    out: Path = tyro.MISSING
    """Folder of the run: checkpoints, TensorBoard logs, configuration."""
    preset: str = "paper-b0"
    """Values to start from: paper-b0, paper-b5, fast-b0 (not measured on a GPU yet) or quickstart."""

    backbone: BackboneName = "efficientnet_b0"
    """Network that turns an image into a feature map."""
    weights: str = "imagenet"
    """Backbone weights to start from: imagenet, none, or the path of a weights file."""
    freeze_until: int = 5
    """Children of the backbone before this one keep their weights (batch-norm statistics go on); 0: none."""
    descriptor_dim: int = 0
    """Dimensions of the descriptor; 0: as many as the backbone has channels."""
    head: HeadKind = "AAMC"
    """Head: additive angular margin, large cosine margin, or a plain linear layer."""
    s: float = 100.0
    """Scale of the cosines of AAMC and LMCC."""
    m: float = 0.2
    """Margin of AAMC (radians) and LMCC (cosine)."""
    score_form: ScoreForm = "raw"
    """Scores that rank the classes: products with the weights as they are (of FC_CE its logits), or cosines."""

    schedule: ScheduleName = "sequential"
    """Train one group an epoch in turn, or all groups in every step."""
    iterations_per_epoch: int = 2000
    """Steps of an epoch."""
    epochs: int = 500
    """Epochs to train."""
    batch_size: int = 64
    """Images of a step, over all processes; batch norms see those of one process."""
    accumulate: int = 1
    """Parts that a process cuts its share of the batch into, to fit memory; the step is the same but for batch norms,
    which see a part at a time, and for what stochastic depth draws."""
    image_size: int = 224
    """Side of the training crops in pixels; queries get 256/224 of it as their shorter side."""

    colour_jitter: float = 0.0
    """Largest relative change of brightness, contrast and saturation; 0: none, as in the paper."""
    lr: float = 1e-4
    """Adam's learning rate for the model."""
    head_lr: float = 1e-2
    """Adam's learning rate for the heads."""
    lr_schedule: Literal["plateau", "cosine", "constant"] = "plateau"
    """plateau: cut the model's rate where the epoch's loss stalls; cosine: both rates fall to zero."""
    warmup_steps: int = 0
    """Steps over which both rates rise from zero (cosine and constant)."""
    patience: int = 10
    """Epochs without a lower loss before the plateau schedule cuts the model's rate."""
    plateau_factor: float = 0.1
    """Factor of that cut; the run ends when the model's rate is under 1e-6."""
    grad_clip: float = 0.0
    """Largest norm of the model's gradient, a step with one that is not finite is skipped; 0: no clipping."""
    ema: float = 0.0
    """Decay of a running average of all weights (and batch norms' statistics), which is then validated and saved;
    0: none."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp16"
    """Arithmetic of the model (fp16 becomes fp32 where there is no GPU); heads always compute in float32."""
    compile: bool = False
    """Compile the model with torch.compile."""
    channels_last: bool = False
    """Keep the model's weights in the channels-last memory format."""
    sync_bn: bool = False
    """Batch-norm statistics over the batch of all GPUs; every batch norm then waits for them (with --no-compile)."""
    offload_heads: bool = False
    """Keep heads and optimiser state of groups that are not being trained in main memory (sequential)."""
    shard_head: bool = False
    """Split every head's classes over the processes: for heads that do not fit on one."""
    head_sample_rate: float = 1.0
    """Share of the negative classes that a sharded head uses in a step."""
    cpu: bool = False
    """Train on the CPU even where there is a GPU."""

    seed: int = 0
    """Decides initial weights, the samples of every step, and stochastic depth."""
    decoder: Literal["auto", "cpu", "dali"] = "auto"
    """JPEG decoding: DALI, or a pool of CPU threads; auto takes DALI where there is a GPU."""
    read: Literal["indexed", "stream"] = "indexed"
    """indexed: single photos, exactly at random (SSD); stream: runs of neighbours (hard disk, network)."""
    stream_run: int = StreamSettings.run
    """Neighbouring photos of a class that --read stream reads in one request."""
    stream_window: int = StreamSettings.window
    """Photos of the global batches among which --read stream shuffles its runs; twice as many lie in memory."""
    threads: int = 0
    """Decoding threads of a process; 0: as many as it has cores."""

    val_queries: Path | None = None
    """Validation queries: a folder of photos named by UTM, or a list (.csv, .parquet) with their places; none: no LR@N
    during training."""
    val_every: int = 1
    """Epochs between validations."""
    val_batch_size: int = 64
    """Queries described at once."""
    save_every: int = 0
    """Steps between checkpoints besides the one at the end of each epoch; 0: none besides."""
    save_every_epochs: int = 1
    """Epochs between checkpoints; the last epoch and a new best are always saved."""
    keep: int = 2
    """Latest checkpoints to keep, besides the best."""
    resume: bool = False
    """Go on from the latest whole checkpoint in --out; start anew where there is none."""
    init_from: Path | None = None
    """Run or checkpoint whose weights to start from; heads are matched by cell."""
    nan_patience: int = 10
    """Steps in a row with a loss that is not finite before the run stops."""

    tracker: str = "tensorboard"
    """Tracker of Accelerate that gets the curves: tensorboard, wandb, mlflow, ... or none."""
    log_every: int = 50
    """Steps between entries in the tracker."""
    profile: bool = False
    """Profile steps 10 to 14 of this start; the trace goes to OUT/profile."""

    def __post_init__(self) -> None:
        _check(self)

    def to_json(self) -> dict[str, Any]:
        """The configuration as JSON values, paths as strings."""
        return {
            field.name: str(value) if isinstance(value := getattr(self, field.name), Path) else value
            for field in fields(self)
        }

    @staticmethod
    def from_json(values: dict[str, Any]) -> TrainConfig:
        """The configuration that `to_json` wrote; keys that this version does not know are left out."""
        known = {field.name: values[field.name] for field in fields(TrainConfig) if field.name in values}
        for name in ("out", "val_queries", "init_from"):
            if known.get(name) is not None:
                known[name] = Path(known[name])
        return TrainConfig(**known)


_POSITIVE = (
    "iterations_per_epoch", "epochs", "batch_size", "accumulate", "image_size", "keep", "val_every", "val_batch_size",
    "nan_patience", "log_every", "patience", "save_every_epochs", "lr", "head_lr", "s", "stream_run", "stream_window",
)  # fmt: skip
_NOT_NEGATIVE = (
    "warmup_steps", "colour_jitter", "grad_clip", "freeze_until", "threads", "save_every", "descriptor_dim", "m",
    "seed",
)  # fmt: skip


def _check(config: TrainConfig) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise WrongArguments(f"{flag_of(field.name)} {value}: must be a finite number")
    for name in _POSITIVE:
        if getattr(config, name) <= 0:
            raise WrongArguments(f"{flag_of(name)} {getattr(config, name)}: must be more than 0")
    for name in _NOT_NEGATIVE:
        if getattr(config, name) < 0:
            raise WrongArguments(f"{flag_of(name)} {getattr(config, name)}: must be 0 or more")
    if config.seed >= 1 << 64:
        raise WrongArguments(f"--seed {config.seed}: must be under 2^64")
    if config.m >= math.pi / 2:
        raise WrongArguments(f"--m {config.m}: must be under pi/2, a right angle")
    if not 0 < config.plateau_factor < 1:
        raise WrongArguments(f"--plateau-factor {config.plateau_factor}: lies between 0 and 1, for example 0.1")
    if not 0 <= config.ema < 1:
        raise WrongArguments(f"--ema {config.ema}: a decay is at least 0 and under 1, for example 0.999")
    if config.colour_jitter > 1:
        raise WrongArguments(f"--colour-jitter {config.colour_jitter}: is at most 1, since more would invert colours")
    if not 0 < config.head_sample_rate <= 1:
        raise WrongArguments(f"--head-sample-rate {config.head_sample_rate}: a share lies over 0 and at most 1")
    if config.head_sample_rate < 1 and not config.shard_head:
        raise WrongArguments("--head-sample-rate needs --shard-head")
    if config.warmup_steps and config.lr_schedule == "plateau":
        raise WrongArguments("--warmup-steps needs --lr-schedule cosine or constant")
    if config.lr_schedule == "plateau" and config.lr < LOWEST_RATE:
        raise WrongArguments(
            f"--lr {config.lr}: the plateau schedule ends a run whose rate is under {LOWEST_RATE}; give more, or "
            "--lr-schedule constant"
        )
    if config.offload_heads and (config.schedule == "joint" or config.shard_head):
        raise WrongArguments("--offload-heads needs --schedule sequential and whole heads: others are always in use")


PRESETS: dict[str, TrainConfig] = {
    "paper-b0": TrainConfig(),
    "paper-b5": TrainConfig(preset="paper-b5", backbone="efficientnet_b5"),
    # Compilation and bf16 are what PyTorch advises for such a model; on a GPU nothing of it has been measured here.
    "fast-b0": TrainConfig(
        preset="fast-b0",
        schedule="joint",
        precision="bf16",
        compile=True,
        channels_last=True,
    ),
    "quickstart": TrainConfig(
        preset="quickstart",
        backbone="small_cnn",
        weights="none",
        freeze_until=0,
        descriptor_dim=512,
        s=20.0,
        m=0.1,
        score_form="cosine",
        schedule="joint",
        iterations_per_epoch=280,
        epochs=10,
        image_size=96,
        colour_jitter=0.2,
        lr=1e-3,
        head_lr=3e-3,
        lr_schedule="constant",
        ema=0.998,
        precision="fp32",
        channels_last=True,
    ),
}


def read_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The configuration that the command line asks for; `WrongArguments`, or an exit with 2, where it asks amiss."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--preset", nargs="?", default="paper-b0")
    preset = finder.parse_known_args(arguments)[0].preset
    if preset is not None and preset not in PRESETS:
        raise WrongArguments(f"--preset {preset}: is none of {', '.join(sorted(PRESETS))}")
    return parse_arguments(TrainConfig, arguments, default=PRESETS[preset or "paper-b0"])
