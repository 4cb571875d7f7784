"""A checkpoint that answers: photos to ranked cells with a confidence and an uncertainty in metres."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.calibration import Calibration
from evaluation.ranking import Answers, ClassRanker, RankingForm
from shards.classes import ClassTable
from shards.console import JobError, first_line, last_line, printable
from training.checkpoint import EvaluationWeights, load_for_evaluation
from training.heads import Head, ScoreForm
from training.memory import keep_freed_memory
from training.model import GeoModel, fold_batch_norms
from training.presets import TrainConfig
from training.queries import Queries, list_queries, query_size
from training.scoring import THRESHOLD_METRES, Descriptors, describe_queries


class Localiser:
    """Model, heads and class map of a checkpoint, ready to answer on `device`.

    `form` and the confidence follow what validation queries said (`calibration`), where the checkpoint's folder holds
    that. `passed_over` says which better checkpoints of a run could not be read. Raises JobError where the folder is no
    checkpoint, or its weights, classes and configuration do not fit each other.
    """

    def __init__(self, weights: EvaluationWeights, device: torch.device) -> None:
        self.path = weights.path
        self.fingerprint = weights.fingerprint
        self.passed_over = [f"{reason}; answers come from {weights.path.name}" for reason in weights.passed_over]
        self.classes: ClassTable = weights.classes
        self.device = device
        self.config = _read_config(weights)
        self.calibration = Calibration.load(weights.path)
        if device.type == "cpu":
            keep_freed_memory()
        # Photos come channels-last; with the weights in that order and no batch norms, a CPU takes half of the time.
        self.model = _build_model(weights, self.config).eval()
        fold_batch_norms(self.model)
        self.model.to(device).to(memory_format=torch.channels_last)
        self.ranker = ClassRanker(_build_heads(weights, self.config, self.model), self.classes, device)
        self.heads = self.ranker.heads
        self.index = self.ranker.index

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Localiser:
        """Read a checkpoint folder, or the best checkpoint of a run."""
        return cls(load_for_evaluation(path), device)

    @classmethod
    def from_pretrained(cls, name: str | Path, device: torch.device | str = "cpu") -> Localiser:
        """Read a run, a folder of `export.py --to hub`, or a repository of that content on the Hugging Face Hub."""
        if not Path(name).exists():
            from huggingface_hub import snapshot_download
            from huggingface_hub.errors import HFValidationError

            try:
                name = snapshot_download(str(name))
            except (OSError, HFValidationError) as error:
                raise JobError(
                    f"{name}: no such folder, and no repository that can be downloaded ({first_line(error)})"
                ) from error
        return cls.load(Path(name), torch.device(device))

    @property
    def trained_form(self) -> ScoreForm:
        """Scores that the checkpoint was trained for: what one matrix product gives."""
        return self.config.score_form

    @property
    def form(self) -> RankingForm:
        """Scores to answer by: the best on validation queries, or those that the checkpoint was trained for."""
        return self.calibration.form if self.calibration else self.trained_form

    @property
    def product_form(self) -> ScoreForm:
        """`form` where one matrix product gives it, otherwise (zscore, softmax) the scores that it was trained for."""
        form = self.form
        return form if form == "raw" or form == "cosine" else self.trained_form

    def class_weights(self, form: ScoreForm) -> tuple[Tensor, Tensor | None]:
        """Weights [C, D] of all classes (and biases [C] of FC_CE's raw scores) on the CPU, in the order of the class
        map: their products with a descriptor are the scores by `form`."""
        heads = self.heads.values()
        weight = torch.cat([head.weight.detach().cpu() for head in heads])
        if form == "cosine":
            return nn.functional.normalize(weight, dim=1), None
        biases = [head.bias.detach().cpu() for head in heads if head.bias is not None]
        return weight, torch.cat(biases) if biases else None

    @property
    def shorter_side(self) -> int:
        """Shorter side in pixels that photos are resized to."""
        return query_size(self.config.image_size)

    def list_queries(self, source: Path) -> Queries:
        """The photos of a folder or list in the plane of the classes; see `training.queries.list_queries`."""
        return list_queries(source, self.classes.zone, southern=self.classes.southern)

    def describe(
        self, paths: Sequence[Path], *, batch_size: int = 32, threads: int = 1, title: str | None = None
    ) -> Descriptors:
        """Descriptors of photos, in batches of one shape; unreadable photos are listed with their reasons. With a
        `title`, progress is shown under it where it takes long."""
        return describe_queries(
            self.model,
            paths,
            shorter_side=self.shorter_side,
            batch_size=batch_size,
            device=self.device,
            threads=threads,
            title=title,
        )

    def answer(
        self,
        vectors: Tensor,
        *,
        forms: Sequence[RankingForm] | None = None,
        top_k: int = 20,
        radii_of: Callable[[np.ndarray], Sequence[int]] | None = None,
        threshold: float = THRESHOLD_METRES,
        title: str | None = None,
    ) -> dict[RankingForm, Answers]:
        """Rank the classes for descriptors float32 [Q, D], as `ClassRanker.rank`; `forms` None: the own form."""
        return self.ranker.rank(
            vectors,
            forms=forms or (self.form,),
            top_k=top_k,
            radii_of=radii_of,
            threshold=threshold,
            temperatures=self.calibration.temperatures if self.calibration else None,
            title=title,
        )


def choose_device(*, cpu: bool) -> torch.device:
    """The GPU where there is one and `cpu` does not rule it out."""
    return torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")


def load_localiser(path: Path, device: torch.device, *, southern: bool = False) -> Localiser:
    """`Localiser.load` with a line on stderr for every better checkpoint that could not be read.

    `southern`: its classes lie south of the equator, whether or not their table says so.
    """
    localiser = Localiser.load(path, device)
    if southern:
        localiser.classes = replace(localiser.classes, southern=True)
    for line in localiser.passed_over:
        print(f"warning: {printable(line)}", file=sys.stderr)
    return localiser


def _read_config(weights: EvaluationWeights) -> TrainConfig:
    try:
        return TrainConfig.from_json(weights.config)
    except (TypeError, ValueError, KeyError, JobError) as error:
        raise JobError(f"{weights.path}/config.json: no configuration of this project ({error})") from error


def _build_model(weights: EvaluationWeights, config: TrainConfig) -> GeoModel:
    try:
        model = GeoModel(config.backbone, "none", 0, config.descriptor_dim or None)
        model.load_state_dict(weights.model)
    except (RuntimeError, ValueError) as error:
        raise JobError(f"{weights.path}: its weights do not fit a {config.backbone} ({last_line(error)})") from error
    return model


def _build_heads(weights: EvaluationWeights, config: TrainConfig, model: GeoModel) -> dict[int, Head]:
    classes = weights.classes
    if sorted(weights.heads) != classes.groups:
        raise JobError(
            f"{weights.path}: heads of groups {sorted(weights.heads)} do not fit a class map of groups {classes.groups}"
        )
    heads = {}
    for group in classes.groups:
        head = Head(config.head, model.descriptor_dim, classes.count(group), config.s, config.m)
        try:
            head.load_state_dict(weights.heads[group])
        except RuntimeError as error:
            raise JobError(
                f"{weights.path}: the head of group {group} does not fit the class map ({last_line(error)})"
            ) from error
        heads[group] = head
    return heads
