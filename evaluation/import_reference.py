"""Turn a checkpoint of the public reference code (best_model.pth) into a run of this project.

The order of its classes follows from the paths of its training photos; the photos themselves are not needed.

python evaluation/import_reference.py --checkpoint best_model.pth --train-list LIST --out RUN
"""

from __future__ import annotations

if __name__ == "__main__":
    from shards.console import quit_on_ctrl_c

    quit_on_ctrl_c()

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from evaluation.reference_classes import PythonHashing, reference_table
from shards.classes import ClassTable
from shards.console import JobError, check_arguments, entry, first_line, format_count, last_line
from shards.provenance import provenance
from training.backbones import BackboneName
from training.checkpoint import Checkpoint, TrainingState, save_checkpoint
from training.heads import HeadKind
from training.model import GeoModel
from training.presets import TrainConfig

_BACKBONES: dict[int, BackboneName] = {1280: "efficientnet_b0", 2048: "efficientnet_b5", 2560: "efficientnet_b7"}


@dataclass(frozen=True)
class Arguments:
    """What the command line says."""

    checkpoint: Path
    """best_model.pth or last_checkpoint.pth of the reference."""
    train_list: Path
    """Text file with the path of every training photo relative to the root, one a line; or the folder itself."""
    out: Path
    """Folder of the new run."""
    M: Annotated[int, tyro.conf.arg(name="M")] = 20
    """Side of a cell in metres, as in its training."""
    N: Annotated[int, tyro.conf.arg(name="N")] = 2
    """Cells of one group are N cells apart, as in its training."""
    min_images: int = 10
    """Least photos of a class, as in its training."""
    head: Literal["AAMC", "LMCC"] = "AAMC"
    """Kind of its heads; FC_CE is recognised."""
    s: float = 100.0
    """Scale of its heads."""
    m: float = 0.2
    """Margin of its heads."""
    hashing: PythonHashing = "3.8+"
    """Python that the class order comes from: 3.8 and newer, or 3.7."""

    def __post_init__(self) -> None:
        check_arguments({"--M, --N and --min-images: at least 1": min(self.M, self.N, self.min_images) < 1})


def main() -> None:
    """Read, convert and write."""
    arguments = tyro.cli(Arguments, description=__doc__)
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise JobError(f"--out {arguments.out}: exists already; name a new folder")
    paths = read_train_list(arguments.train_list)
    print(format_count(len(paths), "training path"), flush=True)
    order, classes = reference_table(paths, arguments.M, arguments.N, arguments.min_images, arguments.hashing)
    model, heads = read_reference(arguments.checkpoint)
    path = save_checkpoint(arguments.out, convert(arguments, model, heads, order, classes))
    print(f"{format_count(len(classes), 'class')} in {format_count(len(order), 'group')}; written to {path}")


def read_train_list(path: Path) -> list[str]:
    """The training paths in a list or below a folder, relative to the root; JobError where there are none."""
    if path.is_dir():
        paths = glob.glob("**/*.jpg", root_dir=path, recursive=True)
    else:
        try:
            paths = [line for line in path.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise JobError(f"--train-list {path}: cannot be read ({error})") from error
    if not paths:
        raise JobError(f"--train-list {path}: names no training photos")
    return paths


def read_reference(path: Path) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Model and heads of a reference checkpoint, without running any code of its pickle; JobError where it is none."""
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
        model, heads = state["model_state_dict"], state["classifiers_state_dict"]
    except Exception as error:  # a file that is no pickle raises whatever its bytes happen to say
        raise JobError(f"{path}: no checkpoint of the reference code ({first_line(error)})") from error
    if not isinstance(model, Mapping) or not isinstance(heads, list) or not heads:
        raise JobError(f"{path}: no checkpoint of the reference code (no weights of a model and of heads)")
    return {name.removeprefix("module."): tensor for name, tensor in model.items()}, [dict(head) for head in heads]


def convert(
    arguments: Arguments,
    model: dict[str, Tensor],
    heads: list[dict[str, Tensor]],
    order: list[int],
    classes: ClassTable,
) -> Checkpoint:
    """The reference's weights under our names; JobError where model, heads and classes do not fit each other."""
    renamed = {name.replace("classifier.0.", "projection."): tensor for name, tensor in model.items()}
    dim = int(renamed["projection.bias"].shape[0]) if "projection.bias" in renamed else 0
    if dim not in _BACKBONES:
        raise JobError(f"{arguments.checkpoint}: none of the reference's models (descriptors of {dim} numbers)")
    if len(heads) != len(order):
        raise JobError(
            f"{arguments.checkpoint}: {len(heads)} heads, but the training list gives {len(order)} groups; check --N"
        )
    kind: HeadKind = "FC_CE" if "linear.weight" in heads[0] else arguments.head
    ours: dict[int, dict[str, Tensor]] = {}
    for group, head in zip(order, heads, strict=True):
        ours[group] = {name.removeprefix("linear."): tensor for name, tensor in head.items()}
        rows, expected = len(ours[group]["weight"]), classes.count(group)
        if rows != expected:
            raise JobError(
                f"{arguments.checkpoint}: the head of group {group} has {rows} classes, the training list gives "
                f"{expected}; check the list, --M, --N and --min-images"
            )
    config = TrainConfig(
        shards=str(arguments.train_list), out=arguments.out, backbone=_BACKBONES[dim], weights="none", head=kind,
        s=arguments.s, m=arguments.m, score_form="raw",
    )  # fmt: skip
    built = GeoModel(config.backbone, "none", config.freeze_until)
    try:
        built.load_state_dict(renamed)
    except RuntimeError as error:
        raise JobError(
            f"{arguments.checkpoint}: its weights do not fit a {config.backbone} ({last_line(error)})"
        ) from error
    origin = {
        "file": arguments.checkpoint.name,
        "python_hashing": arguments.hashing,
        "min_images": arguments.min_images,
    }
    return Checkpoint(
        model=built.state_dict(),
        heads=dict(sorted(ours.items())),
        classes=classes,
        config=config.to_json() | {"imported_from_reference": origin},
        training=TrainingState({}, {}),
        state={"step": 0},
        provenance=provenance(),
    )


if __name__ == "__main__":
    entry(main)
