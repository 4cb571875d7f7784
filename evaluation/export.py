"""Export a checkpoint as ONNX or TorchScript, checked against PyTorch, or as a Hugging Face Hub style folder.

python evaluation/export.py RUN --to onnx|torchscript|hub --out DIR
"""

from __future__ import annotations

if __name__ == "__main__":
    from shards.console import quit_on_ctrl_c

    quit_on_ctrl_c()

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from evaluation.exported_model import TOLERANCE, export_hub, export_onnx, export_torchscript
from evaluation.localiser import load_localiser
from evaluation.result_files import prepare_folder
from shards.console import JobError, check_arguments, entry


@dataclass(frozen=True)
class Arguments:
    """What the command line says."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Run (its best checkpoint is taken) or a single checkpoint folder."""
    to: Literal["onnx", "torchscript", "hub"]
    """onnx: model.onnx; torchscript: model.pt; hub: config.json, safetensors and a model card."""
    out: Path
    """Folder to write."""
    results: Path | None = None
    """results.json of evaluate.py, for the model card of --to hub."""

    def __post_init__(self) -> None:
        check_arguments({"--results is for --to hub only": self.results is not None and self.to != "hub"})


def main() -> None:
    """Export and say how far the copy is from the original."""
    arguments = tyro.cli(Arguments, description=__doc__)
    localiser = load_localiser(arguments.checkpoint, torch.device("cpu"))
    if arguments.to == "hub":
        export_hub(localiser, arguments.out, arguments.results)
        print(f"written to {arguments.out}")
        return
    prepare_folder(arguments.out)
    export = export_onnx if arguments.to == "onnx" else export_torchscript
    difference = export(localiser, arguments.out)
    if not difference <= TOLERANCE:
        raise JobError(f"{arguments.out}: outputs differ from PyTorch's by {difference:.2g}, more than {TOLERANCE:g}")
    print(f"written to {arguments.out}; outputs differ from PyTorch's by at most {difference:.2g}")


if __name__ == "__main__":
    entry(main)
