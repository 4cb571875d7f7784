"""Ranking the classes of all groups for descriptors, with a confidence and an uncertainty in metres."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation.cell_index import CellIndex
from shards.classes import ClassTable
from training.heads import NORM_FLOOR, Head
from training.scoring import THRESHOLD_METRES

RankingForm = Literal["raw", "cosine", "zscore", "softmax"]
RANKING_FORMS: tuple[RankingForm, ...] = get_args(RankingForm)
OWN_FORMS: tuple[RankingForm, ...] = ("raw", "cosine")

UNCERTAINTY_MASS = 0.68
_UNCERTAINTY_CLASSES = 256
_SCORES_IN_MEMORY = 1 << 24


@dataclass(frozen=True)
class Answers:
    """The K best cells of Q photos, best first, by one form of scores.

    `rows` int64 [Q, K] of the class table; `scores` float32 [Q, K]; `confidence` float32 [Q, K], the probability
    of all cells whose centres lie within the threshold of that cell's; `uncertainty` float32 [Q, K], the radius
    in metres around the cell's centre that holds 68 % of the probability.
    """

    rows: np.ndarray
    scores: np.ndarray
    confidence: np.ndarray
    uncertainty: np.ndarray


class ClassRanker:
    """Ranks the classes of `heads` (keyed by group id) for descriptors, on `device`."""

    def __init__(self, heads: dict[int, Head], classes: ClassTable, device: torch.device) -> None:
        self.classes = classes
        self.device = device
        self.heads = {group: head.to(device) for group, head in heads.items()}
        self.norms = {
            group: head.weight.detach().norm(dim=1).clamp_min(NORM_FLOOR) for group, head in self.heads.items()
        }
        self.index = CellIndex(classes)
        self._centers = torch.from_numpy(classes.centers()).to(device)
        self._neighbours: dict[float, Tensor] = {}

    @torch.inference_mode()
    def rank(
        self,
        vectors: Tensor,
        *,
        forms: Sequence[RankingForm],
        top_k: int = 20,
        threshold: float = THRESHOLD_METRES,
    ) -> dict[RankingForm, Answers]:
        """Rank all groups' classes for descriptors float32 [Q, D] by each of `forms`.

        `threshold` (metres) bounds the neighbourhood whose probability is a cell's confidence. K is `top_k`, or the
        number of classes where there are fewer.
        """
        top_k = min(top_k, len(self.classes))
        neighbours = self._neighbours_within(threshold)
        chunk = int(np.clip(_SCORES_IN_MEMORY // len(self.classes), 1, 128))
        parts: dict[RankingForm, list[tuple[Tensor, ...]]] = {form: [] for form in forms}
        for some in vectors.split(chunk):
            groups = GroupScores(self.heads, self.norms, some.to(self.device))
            probability = groups.probability()
            likely = probability.topk(min(_UNCERTAINTY_CLASSES, probability.shape[1]), dim=1)
            padded = F.pad(probability, (0, 1))  # the column that absent neighbours (-1) point at
            for form in forms:
                scores, rows = groups.scores(form).topk(top_k, dim=1)
                near = neighbours[rows].flatten(1)
                confidence = padded.gather(1, near % padded.shape[1]).view(*rows.shape, -1).sum(2).clamp(max=1)
                radius = self._radius(rows, likely.indices, likely.values)
                parts[form].append(tuple(part.cpu() for part in (rows, scores, confidence, radius)))
        return {form: _join(parts[form], top_k) for form in forms}

    def _radius(self, rows: Tensor, likely: Tensor, mass: Tensor) -> Tensor:
        """Metres [q, K] around each answer that hold 68 % of the probability of the likeliest cells [q, L]."""
        apart = torch.cdist(
            self._centers[rows], self._centers[likely], compute_mode="donot_use_mm_for_euclid_dist"
        )  # the other mode loses centimetres to metres on coordinates of millions
        distances, order = apart.sort(dim=2)
        share = (mass / mass.sum(1, keepdim=True))[:, None, :].expand(apart.shape).gather(2, order).cumsum(2)
        at = (share < UNCERTAINTY_MASS).sum(2, keepdim=True).clamp(max=apart.shape[2] - 1)
        half_diagonal = self.classes.M / 2**0.5
        return distances.gather(2, at).squeeze(2).clamp(min=half_diagonal).float()

    def _neighbours_within(self, radius: float) -> Tensor:
        if radius not in self._neighbours:
            self._neighbours[radius] = torch.from_numpy(self.index.neighbours(radius)).to(self.device)
        return self._neighbours[radius]


class GroupScores:
    """Scores of q photos (unit descriptors) for the classes of all groups, [q, C], in the order of the class table.

    "raw" and "cosine" are the heads' own. Two more put the groups, which were trained apart, on one scale:
    "zscore" subtracts from each group's cosines (logits for FC_CE) their mean and divides by their deviation,
    "softmax" takes each group's log-probabilities.
    """

    def __init__(self, heads: dict[int, Head], norms: dict[int, Tensor], descriptors: Tensor) -> None:
        self.heads = heads
        self.descriptors = descriptors
        # One matrix product serves all forms: a cosine is the raw score of a unit descriptor over the weight's norm.
        self.raw = [head.scores(descriptors, "raw").float() for head in heads.values()]
        self.base = [
            raw / norms[group] if head.margin.normalises else raw
            for raw, (group, head) in zip(self.raw, heads.items(), strict=True)
        ]

    def scores(self, form: RankingForm) -> Tensor:
        """Scores float32 [q, C] to rank the classes by."""
        if form == "raw":
            return torch.cat(self.raw, dim=1)
        if form == "cosine":
            return torch.cat([self._cosine(i, head) for i, head in enumerate(self.heads.values())], dim=1)
        if form == "zscore":
            return torch.cat([_standardise(base) for base in self.base], dim=1)
        return torch.cat([logits.log_softmax(dim=1) for logits in self._logits()], dim=1)

    def probability(self) -> Tensor:
        """Probability float32 [q, C] over the classes of all groups: the softmax that training used, without margin."""
        return torch.cat(self._logits(), dim=1).softmax(dim=1)

    def _cosine(self, i: int, head: Head) -> Tensor:
        return self.base[i] if head.margin.normalises else head.scores(self.descriptors, "cosine").float()

    def _logits(self) -> list[Tensor]:
        return [base * head.margin.s for base, head in zip(self.base, self.heads.values(), strict=True)]


def _standardise(scores: Tensor) -> Tensor:
    deviation = scores.std(dim=1, keepdim=True, correction=0).clamp_min(1e-12)
    return (scores - scores.mean(dim=1, keepdim=True)) / deviation


def _join(parts: list[tuple[Tensor, ...]], top_k: int) -> Answers:
    if not parts:
        empty = np.zeros((0, top_k), np.float32)
        return Answers(empty.astype(np.int64), empty, empty, empty)
    return Answers(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))
