"""The folder of a run: opening it, its list of losses, and starting weights from another run."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from torch import nn

from shards.cell_index import CellIndex
from shards.classes import ClassTable
from shards.console import JobError, format_count, last_line
from shards.dataset import refuse_data_set
from shards.files import atomic_write_json, atomic_write_text, is_partial, remove_partials
from shards.locks import LOCK, try_lock
from shards.provenance import provenance
from training.checkpoint import EvaluationWeights, list_checkpoints, load_for_evaluation
from training.head_bank import HeadBank
from training.presets import TrainConfig

CONFIG = "config.json"
LOSSES = "losses.txt"


def check_run_folder(out: Path, resume: bool) -> None:
    """JobError where `out` is no place for this run: another run without `--resume`, one that is being trained now, a
    file, a foreign folder."""
    if out.exists() and not out.is_dir():
        raise JobError(f"--out {out}: is a file; name a folder")
    if not out.is_dir() or all(path.name == LOCK or is_partial(path.name) for path in out.iterdir()):
        refuse_data_set(out)
        return
    if not (out / CONFIG).exists() and not (out / "checkpoints").is_dir():
        raise JobError(f"--out {out}: holds files that are no run; name an empty folder")
    if not resume:
        with suppress(OSError), (out / LOCK).open("r+") as file:
            if try_lock(file, byte=os.getpid()) is False:  # one of its own: several processes may ask at once
                raise _held(out, file)
        steps = [path.name for path in list_checkpoints(out)[:1]]
        state = f"up to {steps[0]}" if steps else "without a checkpoint"
        raise JobError(f"--out {out}: already holds a run ({state}); give --resume to go on, or another --out")


def lock_run(out: Path) -> TextIO | None:
    """Keep other trainings out of `out`, which is created, until the returned file is closed or this process ends.

    None on a file system that has no locks. JobError where another process has the run; it is named.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = (out / LOCK).open("a+")
    locked = try_lock(file)
    if locked is False:
        with file:
            raise _held(out, file)
    if locked is None:
        file.close()
        return None
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except OSError as error:
        error.filename = str(out / LOCK)  # a full disk's error names no file
        raise
    return file


def _held(out: Path, file: TextIO) -> JobError:
    file.seek(0)
    holder = file.read(200).strip() or "another process"
    return JobError(f"--out {out}: {holder} is training there now; wait for its end or stop it, or give another --out")


def begin_run(out: Path, config: TrainConfig, first_step: int) -> LossFile:
    """Clear what a killed process left half-written, record configuration and origin, and open the list of losses."""
    remove_partials(out)
    atomic_write_json(out / CONFIG, config.to_json())
    atomic_write_json(out / "provenance.json", provenance())
    return LossFile(out, first_step)


class LossFile:
    """RUN/losses.txt: one line a step, the step and the batch's mean loss (`nan` for a skipped step)."""

    def __init__(self, out: Path, first_step: int) -> None:
        self.path = out / LOSSES
        self.waiting: list[str] = []
        kept = []
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if line.split(" ")[0].isdigit() and int(line.split(" ")[0]) < first_step]
        atomic_write_text(self.path, "".join(f"{line}\n" for line in kept))

    def add(self, step: int, loss: float) -> None:
        """Add a step's loss with all its digits."""
        self.waiting.append(f"{step} {loss!r}\n")

    def flush(self) -> None:
        """Write the lines added since the last time. OSError, with the file's name, where they cannot be."""
        lines, self.waiting = self.waiting, []
        try:
            with self.path.open("a") as file:
                file.writelines(lines)
        except OSError as error:
            error.filename = str(self.path)
            raise


def read_losses(out: Path) -> list[float]:
    """The losses of a run's steps, in order."""
    return [float(line.split(" ")[1]) for line in (out / LOSSES).read_text().splitlines()]


def start_from(other: Path, model: nn.Module, bank: HeadBank, classes: ClassTable) -> str:
    """Take the model's weights, and the head's rows of every cell that both class maps have, from another run.

    Returns what was taken, in words. JobError where the model does not fit, or a weight is not finite.
    """
    weights = load_for_evaluation(other)
    for tensors in (weights.model, *weights.heads.values()):
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise JobError(f"{weights.path}: {name} holds numbers that are not finite; name another checkpoint")
    try:
        model.load_state_dict(weights.model)
    except RuntimeError as error:
        raise JobError(f"{weights.path}: its model is another one ({last_line(error)})") from error
    taken = _copy_rows(weights, bank, classes)
    return f"starts from {weights.path}: the model, and {taken:,} of {format_count(len(classes), 'class')}"


@torch.no_grad()
def _copy_rows(weights: EvaluationWeights, bank: HeadBank, classes: ClassTable) -> int:
    theirs = weights.classes
    if not theirs.shares_grid(classes):
        return 0
    cells = CellIndex(theirs)
    taken = 0
    for group, head in bank.heads.items():
        mine = classes.of_group(group)
        rows = cells.find(mine.cell_east, mine.cell_north)
        taken += int(np.count_nonzero(rows >= 0))
        rows = rows[head.part.start : head.part.stop]
        for their_group in np.unique(theirs.group[rows[rows >= 0]]).tolist():
            labels = np.flatnonzero((rows >= 0) & (theirs.group[rows] == their_group))
            their_labels = torch.from_numpy(theirs.label[rows[labels]].astype(np.int64))
            for name, parameter in head.named_parameters():
                saved = weights.heads[their_group].get(name)
                if saved is None or saved.shape[1:] != parameter.shape[1:]:
                    raise JobError(f"{weights.path}: its heads are of another kind or size than --head asks for")
                parameter[torch.from_numpy(labels)] = saved[their_labels].to(parameter)
    return taken
