"""Ranking the classes of all groups for descriptors, with a confidence and an uncertainty in metres."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from shards.cell_index import CellIndex
from shards.classes import ClassTable
from shards.console import progress_bar
from training.heads import NORM_FLOOR, Head, ScoreForm, full_precision
from training.scoring import SCORES_IN_MEMORY, STRIP, THRESHOLD_METRES, classes_in_cache, strip_columns, strip_maxima

RankingForm = Literal["raw", "cosine", "zscore", "softmax"]
RANKING_FORMS: tuple[RankingForm, ...] = get_args(RankingForm)
OWN_FORMS: tuple[RankingForm, ...] = ("raw", "cosine")

UNCERTAINTY_MASS = 0.68
LEAST_DEVIATION = 1e-12  # of a group's scores, where they are all alike
_QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class Answers:
    """The K best cells of Q photos, best first, by one form of scores.

    `rows` int64 [Q, K] of the class table; `scores` float32 [Q, K]; `confidence` float32 [Q, K], the probability
    of all cells whose centres lie within the threshold of that cell's; `uncertainty` float32 [Q, K], the radius
    in metres around the cell's centre that holds 68 % of the probability of all cells: a whole number rounded up, or
    half of a cell's diagonal; NaN where it was not asked for.
    """

    rows: np.ndarray
    scores: np.ndarray
    confidence: np.ndarray
    uncertainty: np.ndarray


class ClassRanker:
    """Ranks the classes of `heads` (keyed by group id) for descriptors, on `device`.

    Scores of q photos lie in one matrix [q, columns]: the groups one after another, each filled up to whole strips
    with at least one column of no class, whose score is minus infinity.
    """

    def __init__(self, heads: dict[int, Head], classes: ClassTable, device: torch.device) -> None:
        self.classes = classes
        self.device = device
        self.heads = {group: head.to(device) for group, head in heads.items()}
        self.margin = next(iter(heads.values())).margin
        self.index = CellIndex(classes)
        self.starts: list[int] = []
        rows: list[Tensor] = []
        scales: list[Tensor] = []
        shifts: list[Tensor] = []
        groups: list[Tensor] = []
        for group, head in self.heads.items():
            self.starts.append(sum(len(some) for some in rows))
            own = torch.arange(head.classes, device=device) + int(np.searchsorted(classes.group, group))
            width = (head.classes // STRIP + 1) * STRIP
            rows.append(_filled(own, width, -1))
            weight = head.weight.detach()
            scales.append(_filled(weight.norm(dim=1).clamp_min(NORM_FLOOR).reciprocal(), width, 1.0))
            bias = weight.new_zeros(len(weight)) if head.bias is None else head.bias.detach()
            shifts.append(_filled(bias, width, 0.0))
            groups.append(torch.full((width // STRIP,), len(groups), device=device))
        self.row_of_column, self.inverse_norms, self.biases, self.group_of_strip = (
            torch.cat(parts) for parts in (rows, scales, shifts, groups)
        )
        real = torch.nonzero(self.row_of_column >= 0)[:, 0]
        self.column_of_row = torch.empty_like(real)
        self.column_of_row[self.row_of_column[real]] = real
        centers = classes.centers() - classes.centers()[0]  # small enough for float32
        self._centers = torch.from_numpy(centers).float().to(device)[self.row_of_column].T.contiguous()

    def order_of(self, form: RankingForm) -> ScoreForm:
        """The scores that rank a group's own classes as `form` does: its weights' raw products or cosines."""
        if form in OWN_FORMS:
            return form  # type: ignore[return-value]
        return "cosine" if self.margin.normalises else "raw"

    def blocks(self, queries: int) -> Iterator[tuple[int, Tensor, slice, slice]]:
        """Blocks for so many queries: group number, weights [c, D], columns, and these with the filled-up ones."""
        for number, (start, head) in enumerate(zip(self.starts, self.heads.values(), strict=True)):
            size = classes_in_cache(queries) if self.device.type == "cpu" else head.classes
            for first in range(0, head.classes, size):
                weight = head.weight.detach()[first : first + size]
                end = start + first + len(weight)
                last = first + len(weight) == head.classes
                whole = start + (head.classes // STRIP + 1) * STRIP if last else end
                yield number, weight, slice(start + first, end), slice(start + first, whole)

    def in_order(self, products: Tensor, order: ScoreForm, columns: Tensor | slice) -> Tensor:
        """Scores by `order` out of the products of descriptors and weights in these columns."""
        if order == "cosine":
            return products * self.inverse_norms[columns]
        return products if self.margin.normalises else products + self.biases[columns]

    @torch.inference_mode()
    def rank(
        self,
        vectors: Tensor,
        *,
        forms: Sequence[RankingForm],
        top_k: int = 20,
        radii_of: Callable[[np.ndarray], Sequence[int]] | None = None,
        threshold: float = THRESHOLD_METRES,
        temperatures: Mapping[RankingForm, float] | None = None,
        title: str | None = None,
    ) -> dict[RankingForm, Answers]:
        """Rank all groups' classes for descriptors float32 [Q, D] by each of `forms`.

        `threshold` (metres) bounds the neighbourhood whose probability is a cell's confidence. `temperatures` (1 where
        none is given) divide the logits behind the probabilities; they change no ranking. K is `top_k`, or the number
        of classes where there are fewer. `radii_of` names the ranks whose uncertainty is wanted (None: all), given a
        photo's table rows int64 [K]. With a `title`, progress is shown under it where it takes long.
        """
        top_k = min(top_k, len(self.classes))
        divisors = {form: (temperatures or {}).get(form, 1.0) for form in forms}
        parts: dict[RankingForm, list[tuple[Tensor, ...]]] = {form: [] for form in forms}
        for scores in self._scored(vectors, forms, set(divisors.values()), title):
            for form in forms:
                values, columns = scores.best(form, top_k)
                rows = self.row_of_column[columns]
                pieces = rows.split(self._answers_at_once(len(scores.products), threshold), dim=1)
                confidence = [scores.probability_of(self._near(piece, threshold), divisors[form]) for piece in pieces]
                radii = self._radii(rows, scores.probabilities(divisors[form]), radii_of or all_ranks)
                found = (rows, values, torch.cat(confidence, dim=1), radii)
                parts[form].append(tuple(part.cpu() for part in found))
        return {form: _join(parts[form], top_k) for form in forms}

    @torch.inference_mode()
    def confidences(
        self,
        vectors: Tensor,
        *,
        forms: Sequence[RankingForm],
        temperatures: Sequence[float],
        threshold: float,
        title: str | None = None,
    ) -> dict[RankingForm, tuple[np.ndarray, np.ndarray]]:
        """The first answer's row, int64 [Q], and its confidence at each temperature, float32 [Q, T], by each form."""
        parts: dict[RankingForm, list[tuple[Tensor, Tensor]]] = {form: [] for form in forms}
        for scores in self._scored(vectors, forms, set(temperatures), title):
            for form in forms:
                rows = self.row_of_column[scores.best(form, 1)[1]]
                near = self._near(rows, threshold)
                found = [scores.probability_of(near, divisor) for divisor in temperatures]
                parts[form].append((rows[:, 0].cpu(), torch.cat(found, dim=1).cpu()))
        return {
            form: (torch.cat([rows for rows, _ in some]).numpy(), torch.cat([found for _, found in some]).numpy())
            for form, some in parts.items()
        }

    def _scored(
        self, vectors: Tensor, forms: Sequence[RankingForm], temperatures: Collection[float], title: str | None
    ) -> Iterator[ScoredClasses]:
        """The scores of some queries after the other, in the same memory."""
        size = int(np.clip(SCORES_IN_MEMORY // len(self.row_of_column), 1, _QUERIES_AT_ONCE))
        # Allocated once: fresh ones would fragment memory, which the process never gives back.
        room = torch.empty(min(size, len(vectors)), len(self.row_of_column), device=self.device)
        with progress_bar(title, len(vectors), "photos") as bar:
            for first in range(0, len(vectors), size):
                some = vectors[first : first + size].to(self.device)
                yield ScoredClasses(self, some, forms, temperatures, room[: len(some)])
                bar.update(len(some))

    def _answers_at_once(self, queries: int, threshold: float) -> int:
        """For how many answers of so many photos the confidence is taken at once, to bound the memory."""
        return max(SCORES_IN_MEMORY // (4 * queries * self.index.most_neighbours(threshold)), 1)

    def _near(self, rows: Tensor, radius: float) -> Tensor:
        """int64 [q, K, J]: the columns of the classes within `radius` metres of each answer's, or one of no class."""
        near = torch.from_numpy(self.index.neighbours(rows.cpu().numpy(), radius)).to(self.device)
        nowhere = len(self.row_of_column) - 1
        return torch.where(near < 0, nowhere, self.column_of_row[near.clamp(min=0)])

    def _radii(
        self, rows: Tensor, probabilities: Iterable[Tensor], radii_of: Callable[[np.ndarray], Sequence[int]]
    ) -> Tensor:
        """Metres, float32 [q, K], around the answers that hold 68 % of `probabilities`, float32 [columns] a photo."""
        radii = torch.full(rows.shape, torch.nan)
        east, north = self._centers
        columns = self.column_of_row[rows]
        for i, (some, probability) in enumerate(zip(rows.cpu().numpy(), probabilities, strict=True)):
            for rank in radii_of(some):
                own = columns[i, rank : rank + 1]
                apart = (east - east[own]).square_().add_((north - north[own]).square_()).sqrt_()
                share = torch.bincount(apart.ceil_().int(), probability).cumsum(0)  # by whole metres
                radii[i, rank] = (share < UNCERTAINTY_MASS).sum()
        return radii.clamp(min=self.classes.M / 2**0.5)


def all_ranks(rows: np.ndarray) -> Sequence[int]:
    """Every rank of a photo's table rows int64 [K]."""
    return range(len(rows))


def first_rank(rows: np.ndarray) -> Sequence[int]:
    """The rank of the first answer."""
    return (0,)


class ScoredClasses:
    """Scores of q photos (unit descriptors) for the classes of all groups, and what each form makes of them.

    "raw" and "cosine" are the heads' own. Two more put the groups, which were trained apart, on one scale:
    "zscore" subtracts from each group's cosines (logits for FC_CE) their mean and divides by their deviation,
    "softmax" takes each group's log-probabilities. Neither changes the order within a group, so one matrix product
    and the maxima of its strips serve all forms. Probabilities are those of the softmax that training used, over
    the classes of all groups, without margin; they can be asked for at each of `temperatures`.
    """

    def __init__(
        self,
        ranker: ClassRanker,
        descriptors: Tensor,
        forms: Sequence[RankingForm],
        temperatures: Collection[float],
        room: Tensor,
    ) -> None:
        self.ranker = ranker
        self.own: ScoreForm = ranker.order_of("softmax")  # what training took for logits, but for the scale
        self.scale = ranker.margin.s
        columns = len(ranker.row_of_column)
        self.products = room
        orders = dict.fromkeys([self.own, *map(ranker.order_of, forms)])
        self.maxima = {order: descriptors.new_empty(len(descriptors), columns // STRIP) for order in orders}
        needed = {*temperatures, *([1.0] if "softmax" in forms else [])}
        self.log_totals: dict[float, list[list[Tensor]]] = {divisor: [[] for _ in ranker.starts] for divisor in needed}
        widest = max(whole.stop - whole.start for _, _, _, whole in ranker.blocks(len(descriptors)))
        self._scratch = descriptors.new_empty(len(descriptors) * widest)  # once, as the room for the products
        for block in ranker.blocks(len(descriptors)):
            self._score(descriptors, *block)

    def _score(self, descriptors: Tensor, group: int, weight: Tensor, columns: slice, whole: slice) -> None:
        """Fill in the products of a block, the maxima of its strips, and the sums behind probabilities."""
        part = self.products[:, columns]
        with full_precision(weight.device):
            torch.mm(descriptors, weight.T, out=part)
        self.products[:, columns.stop : whole.stop] = -torch.inf
        strips = slice(whole.start // STRIP, whole.stop // STRIP)
        for order, maxima in self.maxima.items():
            scores = self.ranker.in_order(self.products[:, whole], order, whole)
            maxima[:, strips] = strip_maxima(scores)
            if order == self.own:
                highest = maxima[:, strips].amax(1, keepdim=True)
                above = scores - highest
                scratch = self._scratch[: above.numel()].view(above.shape)
                for divisor, totals in self.log_totals.items():
                    factor = self.scale / divisor
                    total = torch.mul(above, factor, out=scratch).exp_().sum(1).log_()
                    totals[group].append(total + highest[:, 0] * factor)

    def best(self, form: RankingForm, top_k: int) -> tuple[Tensor, Tensor]:
        """The `top_k` best scores by a form, best first, and their columns: float32 and int64 [q, K]."""
        order = self.ranker.order_of(form)
        if form in OWN_FORMS:
            return self._select(order, top_k)
        return self._select(order, top_k, *(self._standard() if form == "zscore" else self._log_softmax()))

    def probability(self, columns: Tensor, temperature: float) -> Tensor:
        """Probability float32 [q, n] of the classes in columns int64 [q, n]."""
        scores = self.ranker.in_order(self.products.gather(1, columns), self.own, columns)
        return (scores * (self.scale / temperature) - self._log_total(temperature)[:, None]).exp()

    def probabilities(self, temperature: float) -> Iterator[Tensor]:
        """Of one photo after the other, the probability float32 [columns] of each class; 0 in columns of none."""
        for products, total in zip(self.products, self._log_total(temperature), strict=True):
            scores = self.ranker.in_order(products, self.own, slice(None))
            yield (scores * (self.scale / temperature) - total).exp()

    def _log_total(self, temperature: float) -> Tensor:
        """The log of the sum behind the probabilities, [q]."""
        return torch.stack([t for group in self.log_totals[temperature] for t in group]).logsumexp(0)

    def probability_of(self, areas: Tensor, temperature: float) -> Tensor:
        """Probability float32 [q, K] that the place is in one of the classes in columns int64 [q, K, J]."""
        return self.probability(areas.flatten(1), temperature).view(areas.shape).sum(2).clamp(max=1)

    def _select(
        self, order: ScoreForm, top_k: int, shift: Tensor | None = None, factor: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The best of all groups, after `(score - shift) * factor` with one shift and factor [q, G] a group."""
        group, maxima = self.ranker.group_of_strip, self.maxima[order]
        if shift is not None and factor is not None:
            maxima = (maxima - shift[:, group]) * factor[:, group]
        strips = maxima.topk(min(top_k, maxima.shape[1]), dim=1).indices
        columns = strip_columns(strips)
        scores = self.ranker.in_order(self.products.gather(1, columns), order, columns)
        if shift is not None and factor is not None:
            of_column = group[strips].repeat_interleave(STRIP, dim=1)
            scores = (scores - shift.gather(1, of_column)) * factor.gather(1, of_column)
        values, at = scores.topk(top_k, dim=1)
        return values, columns.gather(1, at)

    def _standard(self) -> tuple[Tensor, Tensor]:
        """Mean and inverse deviation of each group's scores, [q, G] both."""
        means, factors = [], []
        for start, head in zip(self.ranker.starts, self.ranker.heads.values(), strict=True):
            columns = slice(start, start + head.classes)
            scores = self.ranker.in_order(self.products[:, columns], self.own, columns)
            variance, mean = torch.var_mean(scores, dim=1, correction=0)
            means.append(mean)
            factors.append(variance.sqrt().clamp_min(LEAST_DEVIATION).reciprocal())
        return torch.stack(means, dim=1), torch.stack(factors, dim=1)

    def _log_softmax(self) -> tuple[Tensor, Tensor]:
        """What turns each group's scores into log-probabilities: the log of its sum over the scale, and the scale."""
        totals = torch.stack([torch.stack(group).logsumexp(0) for group in self.log_totals[1.0]], dim=1)
        return totals / self.scale, torch.full_like(totals, self.scale)


def _filled(values: Tensor, width: int, fill: float) -> Tensor:
    """`values` with `fill` behind them up to `width`."""
    return torch.cat([values, values.new_full((width - len(values),), fill)])


def _join(parts: list[tuple[Tensor, ...]], top_k: int) -> Answers:
    if not parts:
        empty = np.zeros((0, top_k), np.float32)
        return Answers(empty.astype(np.int64), empty, empty, empty)
    return Answers(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))
