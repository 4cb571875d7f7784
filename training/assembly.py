"""Putting a run's parts together: Accelerate, the model and its heads, the loader."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, parse_flag_from_env

from shards.classes import ClassTable
from shards.console import JobError, WrongArguments
from shards.dataset import Dataset
from shards.loader import Loader
from shards.sampler import Schedule
from shards.stream import StreamSettings
from training.checkpoint import list_checkpoints
from training.distributed import PATIENCE, World, check_gpus, join_after_restart, settle_buckets
from training.engine import Engine
from training.head_bank import HeadBank
from training.memory import keep_freed_memory
from training.model import GeoModel
from training.presets import TrainConfig


def make_accelerator(config: TrainConfig) -> tuple[Accelerator, TrainConfig]:
    """Accelerate's view of the machine, and the configuration that holds there: fp16 becomes fp32 without a GPU."""
    cpu = config.cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    if cpu and config.precision == "fp16":
        config = replace(config, precision="fp32")
    join_after_restart("gloo" if cpu else "nccl")
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=str(config.out),
        kwargs_handlers=[
            # Ranks keep their own batch-norm statistics; they are averaged before saving and validating.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    return accelerator, config


def make_world(accelerator: Accelerator) -> World:
    """This process among those of its launch; JobError where GPUs are missing."""
    check_gpus(accelerator.device)
    return World(accelerator.process_index, accelerator.num_processes, accelerator.device)


def check_against_world(config: TrainConfig, world: World, groups: int) -> None:
    """JobError for settings that this machine, number of processes or number of groups cannot serve."""
    if config.schedule == "joint" and config.batch_size < groups:
        raise JobError(
            f"--batch-size {config.batch_size}: less than one image for each of {groups} groups, which the joint "
            "schedule trains in every step"
        )
    if config.batch_size < world.size:
        raise JobError(f"--batch-size {config.batch_size}: less than one image for each of {world.size} processes")
    if config.read == "stream" and config.stream_run > config.stream_window:
        raise JobError(
            f"--stream-run {config.stream_run}: more photos than --stream-window {config.stream_window} holds"
        )
    if config.sync_bn and world.device.type != "cuda":
        raise JobError("--sync-bn needs GPUs")
    if config.sync_bn and config.compile and world.size > 1:
        raise JobError(
            "--sync-bn: each of its layers waits for the device, which cuts a compiled model into pieces that are "
            "compiled again and again; add --no-compile"
        )
    if config.head_sample_rate < 1 and world.size == 1:
        raise JobError("--head-sample-rate needs several processes: it samples the parts of a sharded head")


def make_engine(config: TrainConfig, classes: ClassTable, accelerator: Accelerator, world: World) -> Engine:
    """Model, heads and optimisers with their initial weights, on the device.

    JobError as `GeoModel` raises it, WrongArguments where the backbone has fewer children than --freeze-until.
    """
    torch.manual_seed(config.seed)
    # A run that goes on has the weights in its checkpoint; where it began from may be gone or out of reach by now.
    weights = "none" if config.resume and list_checkpoints(config.out) else config.weights
    try:
        model = GeoModel(config.backbone, weights, config.freeze_until, config.descriptor_dim or None)
    except ValueError as error:
        raise WrongArguments(f"--freeze-until {config.freeze_until}: {error}") from error
    if config.sync_bn:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(world.device)
    check_batch_norms(config, model, world)
    if world.device.type == "cpu":
        keep_freed_memory()
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    # DDP's GPU is that of the model. Accelerate would name it by the local rank, which is another where each process
    # sees only its own (Slurm's --gpus-per-task).
    os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        # Parts of a batch have two sizes at most: each gets code of its own, which beats one code for any size.
        wrapped = accelerator.prepare(torch.compile(model, dynamic=False) if config.compile else model)
    if world.device.type == "cpu":
        settle_buckets(wrapped)
    bank = HeadBank(classes, config, model.descriptor_dim, world)
    return Engine(config, model, wrapped, bank, world)


@torch.inference_mode()
def check_batch_norms(config: TrainConfig, model: GeoModel, world: World) -> None:
    """JobError where a part of a batch is one image and its feature map one pixel: one number has no variance."""
    share = config.batch_size // world.size
    if share // min(config.accumulate, share) > 1:
        return
    model.eval()
    features = model.backbone(torch.zeros(1, 3, config.image_size, config.image_size, device=world.device))
    model.train()
    if features.shape[2:].numel() == 1:
        raise JobError(
            f"--batch-size {config.batch_size}: leaves parts of one image, and --image-size {config.image_size} one "
            "pixel of it, too little for batch norms; use more images, a larger image, or a smaller --accumulate"
        )


def make_loader(
    config: TrainConfig, dataset: Dataset, schedule: Schedule, accelerator: Accelerator, world: World
) -> Loader:
    """The loader of this rank's share of every batch. JobError on every rank where a host's first has none."""
    make = partial(
        Loader,
        dataset,
        schedule,
        batch_size=config.batch_size,
        image_size=config.image_size,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        mode=config.read,
        stream=StreamSettings(config.stream_run, config.stream_window),
        decoder=config.decoder,
        threads=config.threads or None,
        device=world.device,
    )
    first = world.made_on(accelerator.is_local_main_process, make)  # it writes the index where there is none
    return first or make()


def make_profiler(config: TrainConfig) -> Any:
    """A profiler of the steps 10 to 14 after its start; its trace goes to OUT/profile."""
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=9, warmup=1, active=5, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(profile_folder(config.out))),
        record_shapes=True,
        profile_memory=True,
    )


def profile_folder(out: Path) -> Path:
    """Where the trace of `--profile` is."""
    return out / "profile"
