"""A checkpoint as one network, and as files that other programs read: ONNX, TorchScript, a Hub style folder."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import torch
from torch import Tensor, nn

from evaluation.calibration import temperature_of
from evaluation.localiser import Localiser
from evaluation.model_card import model_card
from evaluation.ranking import LEAST_DEVIATION
from shards.console import JobError
from shards.dataset import refuse_data_set
from shards.files import (
    atomic_folder,
    atomic_path,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    read_bytes,
)
from shards.provenance import provenance
from training.checkpoint import WEIGHT_FILES, check_files, write_listing
from training.heads import NORM_FLOOR
from training.model import IMAGENET_MEAN, IMAGENET_STD

TOLERANCE = 1e-4

_PLACES = ("shards", "out", "val_queries", "init_from")  # what a configuration names on the training's machine


class ExportedModel(nn.Module):
    """Photos to descriptors and class scores in one network, normalisation included.

    Input: float32 [B, 3, H, W], RGB from 0 to 1. Outputs: unit descriptors float32 [B, D], and of all classes, in the
    order of classes.csv, the scores float32 [B, C] that rank them as the checkpoint does, and their probabilities
    float32 [B, C] at its temperature.
    """

    weight: Tensor
    bias: Tensor
    inverse_norms: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, localiser: Localiser) -> None:
        super().__init__()
        self.model = localiser.model
        self.form = localiser.form
        self.own = localiser.ranker.order_of("softmax")
        self.scale = localiser.ranker.margin.s
        self.temperature = temperature_of(localiser.calibration, localiser.form) or 1.0
        self.sizes = [head.classes for head in localiser.heads.values()]
        weight, bias = localiser.class_weights("raw")
        self.register_buffer("weight", weight)
        self.register_buffer("bias", torch.zeros(len(weight)) if bias is None else bias)
        self.register_buffer("inverse_norms", weight.norm(dim=1).clamp_min(NORM_FLOOR).reciprocal())
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Descriptors, scores and probabilities of a batch."""
        descriptors = self.model((images - self.mean) / self.deviation)
        products = nn.functional.linear(descriptors, self.weight)
        by_order = {"raw": products + self.bias, "cosine": products * self.inverse_norms}
        own = by_order[self.own]
        probabilities = (own * (self.scale / self.temperature)).softmax(1)
        if self.form in by_order:
            return descriptors, by_order[self.form], probabilities
        groups = own.split(self.sizes, dim=1)
        return descriptors, torch.cat([self._on_one_scale(group) for group in groups], dim=1), probabilities

    def _on_one_scale(self, scores: Tensor) -> Tensor:
        """A group's scores [B, c] by the forms that put groups on one scale; see `ranking.ScoredClasses`."""
        if self.form == "softmax":
            return (scores * self.scale).log_softmax(1)
        deviation, mean = torch.std_mean(scores, dim=1, correction=0, keepdim=True)
        return (scores - mean) / deviation.clamp_min(LEAST_DEVIATION)


def export_torchscript(localiser: Localiser, out: Path) -> float:
    """Write OUT/model.pt and its classes; returns the largest difference from PyTorch's outputs."""
    network, examples = ExportedModel(localiser).eval(), _examples(localiser)
    written = io.BytesIO()  # a file that cannot be written to (a full disk) would end the process with an abort
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # PyTorch announces the end of TorchScript at every call
        torch.jit.save(torch.jit.trace(network, examples[0]), written)
        written.seek(0)
        loaded = torch.jit.load(written)
    atomic_write_bytes(out / "model.pt", written.getbuffer())
    _write_facts(localiser, out)
    return _largest_difference(network, examples, lambda images: [part.numpy() for part in loaded(images)])


def export_onnx(localiser: Localiser, out: Path) -> float:
    """Write OUT/model.onnx and its classes; returns the largest difference of onnxruntime's outputs from PyTorch's.

    Batch, height and width are free. Raises JobError where onnx, onnxscript or onnxruntime is not installed.
    """
    try:
        runtime = import_module("onnxruntime")
        import_module("onnxscript")
    except ImportError as error:
        raise JobError('ONNX is not installed: pip install "divide-and-classify[export]"') from error
    network, examples = ExportedModel(localiser).eval(), _examples(localiser)
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    with warnings.catch_warnings(), atomic_path(out / "model.onnx") as partial:
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (examples[0],),
            str(partial),
            input_names=["images"],
            output_names=["descriptors", "scores", "probabilities"],
            dynamic_shapes={"images": sizes},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    session = runtime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    _write_facts(localiser, out)
    return _largest_difference(network, examples, lambda images: session.run(None, {"images": images.numpy()}))


def _examples(localiser: Localiser) -> list[Tensor]:
    """Images of two shapes and batch sizes: what holds for one shape only would show."""
    generator = torch.Generator().manual_seed(0)
    side = localiser.shorter_side
    return [
        torch.rand(2, 3, side, side + side // 3, generator=generator),
        torch.rand(3, 3, side + side // 2, side, generator=generator),
    ]


def _largest_difference(network: nn.Module, examples: Sequence[Tensor], run: Any) -> float:
    """The largest difference between outputs, of numbers above 1 relative to them."""
    largest = 0.0
    for images in examples:
        with torch.inference_mode():
            expected = network(images)
        for ours, theirs in zip(expected, run(images), strict=True):
            size = np.maximum(np.abs(ours.numpy()), 1)
            largest = max(largest, float((np.abs(ours.numpy() - theirs) / size).max()))
    return largest


def _write_facts(localiser: Localiser, out: Path) -> None:
    """classes.csv, the position of each column of the scores, and model.json, how photos are prepared."""
    classes = localiser.classes
    latitude, longitude = classes.to_latlon(classes.center_east, classes.center_north)
    table = pa.table(
        {
            "group": classes.group, "label": classes.label, "east": classes.center_east, "north": classes.center_north,
            "latitude": latitude, "longitude": longitude,
        }
    )  # fmt: skip
    with atomic_path(out / "classes.csv") as partial:
        pacsv.write_csv(table, partial)
    facts = {
        "input": "float32 [batch, 3, height, width], RGB from 0 to 1",
        "shorter_side_pixels": localiser.shorter_side,
        "resize": "bilinear with antialiasing, aspect kept",
        "outputs": [
            "descriptors [batch, dim], unit length",
            "scores [batch, classes], columns as in classes.csv: the highest is the answer",
            "probabilities [batch, classes]; those of classes within 25 m of an answer add up to its confidence",
        ],
        "score_form": localiser.form,
        "temperature": temperature_of(localiser.calibration, localiser.form),
        "utm_zone": classes.zone,
        "southern": classes.southern,
        "cell_metres": classes.M,
        "provenance": provenance(),
    }
    atomic_write_json(out / "model.json", facts)


def export_hub(localiser: Localiser, out: Path, results: Path | None) -> None:
    """Write OUT as a Hugging Face Hub style folder that `Localiser.from_pretrained` reads, with a model card, and
    without the paths and the command line of its training.

    `results`, a results.json of evaluation/evaluate.py, fills the card's metrics. JobError where OUT exists, the
    checkpoint is damaged or the results are not of it.
    """
    if out.exists():
        raise JobError(f"--out {out}: exists already; name a new folder")
    refuse_data_set(out)
    check_files(localiser.path, (*WEIGHT_FILES, "provenance.json"))
    card = model_card(localiser, results)
    with atomic_folder(out) as folder:
        for name in WEIGHT_FILES:
            atomic_write_bytes(folder / name, read_bytes(localiser.path / name))
        _copy_facts(localiser.path / "config.json", folder, _PLACES, weights=Path(localiser.config.weights).name)
        _copy_facts(localiser.path / "provenance.json", folder, ("command",))
        write_listing(folder)
        if localiser.calibration:
            replace(localiser.calibration, queries=Path(localiser.calibration.queries).name).save(folder)
        atomic_write_text(folder / "README.md", card)


def _copy_facts(path: Path, folder: Path, left_out: Collection[str], **changed: str) -> None:
    facts = {name: value for name, value in json.loads(read_bytes(path)).items() if name not in left_out}
    atomic_write_json(folder / path.name, facts | changed)
