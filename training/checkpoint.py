"""Checkpoints: folders of safetensors, JSON and Parquet, nothing pickled.

    RUN/checkpoints/step-00002000/
      model.safetensors        weights of backbone and descriptor layer (averaged ones where the run keeps an average)
      heads.safetensors        `<group id>.<parameter>`
      optimizer.safetensors    tensors of the training state: Adam's moments, weights behind an average, batch norms
      optimizer.json           the rest of it: hyper-parameters, scheduler, scaler
      state.json               step, epoch sums, best value so far
      config.json  classes.parquet  provenance.json
      files.json               bytes and CRC-32 of every file; written last
    RUN/best.json              name of the best checkpoint and its value

Weights lie apart from the optimiser's state, so that evaluation reads only what it needs. A folder is written
beside its place and renamed, so that it appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shards.classes import ClassTable
from shards.console import JobError, one_line
from shards.files import TEMPORARY_SUFFIX, atomic_folder, atomic_write_json, named, read_bytes

FORMAT = 1
WEIGHT_FILES = ("model.safetensors", "heads.safetensors", "config.json", "classes.parquet")
TRAINING_FILES = ("optimizer.safetensors", "optimizer.json", "state.json", "provenance.json")


class CheckpointError(JobError):
    """A checkpoint folder that is truncated, changed or no checkpoint at all; the message names the file."""


@dataclass(frozen=True)
class TrainingState:
    """Everything that resuming needs besides weights: tensors, and nested JSON values that may refer to them."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory. `heads` maps group id to that head's tensors by parameter name."""

    model: dict[str, Tensor]
    heads: dict[int, dict[str, Tensor]]
    classes: ClassTable
    config: dict[str, Any]
    training: TrainingState
    state: dict[str, Any]
    provenance: dict[str, Any]


@dataclass(frozen=True)
class EvaluationWeights:
    """What evaluation reads of a checkpoint: no optimiser state. `path` is the checkpoint's own folder.

    `fingerprint`: checksums of the weights, the same wherever the folder lies. `passed_over`: why better checkpoints of
    the run were not taken.
    """

    path: Path
    model: dict[str, Tensor]
    heads: dict[int, dict[str, Tensor]]
    classes: ClassTable
    config: dict[str, Any]
    fingerprint: str = ""
    passed_over: tuple[str, ...] = ()


def flatten_tensors(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Replace every tensor in nested dicts and lists by {"tensor": NAME} and put it into `tensors`.

    Dict keys that are no strings are kept as pairs, so that optimiser states (keyed by int) survive JSON.
    """
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        pairs = [[key, flatten_tensors(item, tensors, f"{name}.{key}")] for key, item in value.items()]
        return {"pairs": pairs}
    if isinstance(value, list | tuple):
        return {"items": [flatten_tensors(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]}
    return value


def unflatten_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `flatten_tensors`; tuples come back as lists. Raises KeyError for a missing tensor."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "items" in value:
        return [unflatten_tensors(item, tensors) for item in value["items"]]
    return {key: unflatten_tensors(item, tensors) for key, item in value["pairs"]}


def training_state(values: dict[str, Any]) -> TrainingState:
    """Nested values with tensors in them (optimiser state dicts and the like) as a `TrainingState`."""
    tensors: dict[str, Tensor] = {}
    return TrainingState(tensors, {key: flatten_tensors(item, tensors, key) for key, item in values.items()})


def training_values(training: TrainingState) -> dict[str, Any]:
    """The nested values behind a `TrainingState`."""
    return {key: unflatten_tensors(item, training.tensors) for key, item in training.values.items()}


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def checkpoint_step(path: Path) -> int:
    """The step in a checkpoint's folder name."""
    return int(path.name.removeprefix("step-"))


def save_checkpoint(run: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint into RUN/checkpoints and return its folder; an interruption leaves no half of it.

    Raises OSError (a full disk, for example), which leaves earlier checkpoints as they were.
    """
    path = run / "checkpoints" / checkpoint_name(checkpoint.state["step"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(path, replace=True) as folder:
        _save_tensors(checkpoint.model, folder / "model.safetensors")
        heads = {f"{group}.{name}": t for group, head in checkpoint.heads.items() for name, t in head.items()}
        _save_tensors(heads, folder / "heads.safetensors")
        _save_tensors(checkpoint.training.tensors, folder / "optimizer.safetensors")
        atomic_write_json(folder / "optimizer.json", checkpoint.training.values)
        atomic_write_json(folder / "state.json", checkpoint.state)
        atomic_write_json(folder / "config.json", checkpoint.config)
        atomic_write_json(folder / "provenance.json", checkpoint.provenance)
        checkpoint.classes.save(folder / "classes.parquet")
        write_listing(folder)
    return path


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    own: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        own[name] = tensor.detach().cpu().contiguous()
        if own[name].untyped_storage().data_ptr() in taken:  # tied weights and views, which safetensors refuses
            own[name] = own[name].clone()
        taken.add(own[name].untyped_storage().data_ptr())
    path.touch()
    mode = path.stat().st_mode
    save_file(own, path)
    path.chmod(mode)  # safetensors lets nobody but the owner read it, whatever the umask


def _describe(path: Path) -> dict[str, int]:
    crc = 0
    with named(path), path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return {"bytes": path.stat().st_size, "crc32": crc}


def write_listing(folder: Path) -> None:
    """Write files.json, by which `check_files` knows the files that the folder holds now."""
    files = {file.name: _describe(file) for file in sorted(folder.iterdir())}
    atomic_write_json(folder / "files.json", {"format": FORMAT, "files": files})


def check_files(path: Path, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Compare files of a checkpoint with what was written; CheckpointError names the first that differs.

    Returns bytes and CRC-32 of all files that were written, by name.
    """
    try:
        listing = json.loads(read_bytes(path / "files.json"))
        version = int(listing["format"])
        written = {name: (facts["bytes"], facts["crc32"]) for name, facts in listing["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"files.json: {type(error).__name__} {error}"
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            reason = "it has no files.json" if path.is_dir() else "a file" if path.exists() else "no such folder"
        message = f"{path}: no checkpoint of this project ({reason}); name a run or a checkpoint's folder"
        raise CheckpointError(message) from error
    if version > FORMAT:
        raise CheckpointError(f"{path}: written by a later version (format {version}); update this project")
    for name in names:
        file = path / name
        if name not in written or not file.is_file():
            raise CheckpointError(f"{file}: missing from the checkpoint; copy it again or name another")
        size, checksum = written[name]
        found, way_out = file.stat().st_size, "copy the checkpoint again or name another"
        if found != size:
            raise CheckpointError(f"{file}: truncated or changed: {found} bytes, {size} written; {way_out}")
        if _describe(file)["crc32"] != checksum:
            raise CheckpointError(f"{file}: changed since it was written (its checksum differs); {way_out}")
    return written


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a whole checkpoint; CheckpointError where a file is missing, truncated or changed."""
    weights = _read_weights(path, check_files(path, WEIGHT_FILES + TRAINING_FILES))
    return Checkpoint(
        model=weights.model,
        heads=weights.heads,
        classes=weights.classes,
        config=weights.config,
        training=TrainingState(
            _load_tensors(path / "optimizer.safetensors"), json.loads(read_bytes(path / "optimizer.json"))
        ),
        state=json.loads(read_bytes(path / "state.json")),
        provenance=json.loads(read_bytes(path / "provenance.json")),
    )


def load_for_evaluation(path: Path) -> EvaluationWeights:
    """Read weights, heads, classes and configuration of a checkpoint folder or of a run.

    Of a run the best checkpoint is taken, or the latest where none is marked best; one that is truncated is passed over
    for the next. Raises CheckpointError where nothing can be read.
    """
    if (path / "files.json").exists() or not (path / "checkpoints").is_dir():
        return _read_weights(path, check_files(path, WEIGHT_FILES))
    reasons: list[str] = []
    for candidate in [c for c in (best_checkpoint(path),) if c is not None] + list_checkpoints(path):
        try:
            weights = _read_weights(candidate, check_files(candidate, WEIGHT_FILES))
            return replace(weights, passed_over=tuple(dict.fromkeys(reasons)))
        except CheckpointError as error:
            reasons.append(str(error))
    raise CheckpointError(reasons[0] if reasons else f"{path}: the run holds no checkpoint")


def validation_photos(path: Path) -> str:
    """The fingerprint of the queries that a checkpoint's training was validated with; "" where it tells of none."""
    try:
        return str(json.loads(read_bytes(path / "state.json"))["progress"]["val_photos"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({one_line(error)})") from error


def _read_weights(path: Path, written: dict[str, tuple[int, int]]) -> EvaluationWeights:
    heads: dict[int, dict[str, Tensor]] = {}
    for key, tensor in _load_tensors(path / "heads.safetensors").items():
        group, name = key.split(".", 1)
        heads.setdefault(int(group), {})[name] = tensor
    return EvaluationWeights(
        path=path,
        model=_load_tensors(path / "model.safetensors"),
        heads=dict(sorted(heads.items())),
        classes=ClassTable.load(path / "classes.parquet"),
        config=json.loads(read_bytes(path / "config.json")),
        fingerprint="-".join(f"{written[name][1]:08x}" for name in WEIGHT_FILES[:2]),
    )


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, latest step first; half-written ones do not bear such a name."""
    found = [p for p in (run / "checkpoints").glob("step-*") if p.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=checkpoint_step, reverse=True)


def load_latest(run: Path) -> tuple[Path, Checkpoint, list[str]] | None:
    """The latest checkpoint that is whole, with its folder, and why later ones were passed over.

    None where the run holds no checkpoint; CheckpointError where it holds some and none is whole.
    """
    passed_over: list[str] = []
    for path in list_checkpoints(run):
        try:
            return path, load_checkpoint(path), passed_over
        except CheckpointError as error:
            passed_over.append(str(error))
    if passed_over:
        raise CheckpointError(f"{run}: none of its checkpoints is whole: {'; '.join(passed_over)}")
    return None


def best_checkpoint(run: Path) -> Path | None:
    """The checkpoint that is marked as the run's best, if it is still there."""
    try:
        path = run / "checkpoints" / json.loads(read_bytes(run / "best.json"))["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return path if path.is_dir() else None


def mark_best(run: Path, path: Path, metric: str, value: float) -> None:
    """Record `path` as the run's best checkpoint by `metric`."""
    atomic_write_json(run / "best.json", {"checkpoint": path.name, "metric": metric, "value": value})


def drop_old(run: Path, keep: int, step: int) -> None:
    """Delete all but the best and the `keep` latest of the checkpoints up to `step`, where the run stands.

    Later ones are those that a resumed run passed over; they do not push out whole ones.
    """
    best = best_checkpoint(run)
    for path in [path for path in list_checkpoints(run) if checkpoint_step(path) <= step][keep:]:
        if path != best:
            _delete(path)


def _delete(path: Path) -> None:
    """Take the name away first, so that a folder half deleted is no checkpoint and is cleared at the next start."""
    doomed = path.with_name(f".{path.name}.deleted{TEMPORARY_SUFFIX}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
