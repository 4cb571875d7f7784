"""Descriptors of queries, the ranking of all classes, and LR@N.

LR@N (the paper's localisation rate, "Evaluation" in the method's description): the share of queries for
which one of the N best-scored cells has its centre within a threshold, 25 m, of the query's UTM position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from shards.classes import ClassTable
from training.heads import Head, ScoreForm
from training.model import to_input
from training.queries import Queries, QueryBatch, SetAside, read_queries

RECALL_NS = (1, 5, 10, 20)
THRESHOLD_METRES = 25.0
STRIP = 32  # adjacent classes whose highest score is taken first, when the best of many are wanted


@dataclass(frozen=True)
class ClassBlock:
    """Adjacent rows of a class table, scored together.

    `first` is the table row of the block's first class, `count` the number of classes, and `score` maps unit
    descriptors float32 [B, D] to scores float32 [B, count].
    """

    first: int
    count: int
    score: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Ranking:
    """The K best classes of Q queries, best first, as rows of the class table.

    `class_index` int64 [Q, K]; `scores` float32 [Q, K]; `distances` float32 [Q, K], metres from the query to
    the cell's centre, NaN for queries without a position.
    """

    class_index: np.ndarray
    scores: np.ndarray
    distances: np.ndarray


@dataclass(frozen=True)
class Descriptors:
    """`vectors` float32 [Q, D], zero where `readable`, bool [Q], is False; `failures` says why."""

    vectors: Tensor
    readable: np.ndarray
    failures: tuple[SetAside, ...]


def describe_queries(
    model: nn.Module,
    paths: Sequence[Path],
    *,
    shorter_side: int,
    batch_size: int,
    device: torch.device,
    threads: int,
) -> Descriptors:
    """Unit descriptors of the photos at `paths`, in their order, in batches of same-shaped photos."""
    failures: list[SetAside] = []
    batches = read_queries(
        paths,
        shorter_side=shorter_side,
        batch_size=batch_size,
        threads=threads,
        on_failure=lambda index, reason: failures.append(SetAside(paths[index], reason)),
    )
    return describe_batches(model, batches, len(paths), device=device, failures=failures)


@torch.inference_mode()
def describe_batches(
    model: nn.Module,
    batches: Iterable[QueryBatch],
    count: int,
    *,
    device: torch.device,
    failures: list[SetAside] | None = None,
) -> Descriptors:
    """Descriptors of `count` queries that come as decoded batches; the model is left in the mode it was in."""
    vectors: Tensor | None = None
    readable = np.zeros(count, dtype=bool)
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            described = model(to_input(torch.from_numpy(batch.images).to(device))).float().cpu()
            if vectors is None:
                vectors = torch.zeros(count, described.shape[1])
            vectors[torch.from_numpy(batch.indices)] = described
            readable[batch.indices] = True
    finally:
        model.train(was_training)
    return Descriptors(torch.zeros(count, 1) if vectors is None else vectors, readable, tuple(failures or ()))


def class_blocks(heads: Mapping[int, Head], classes: ClassTable, form: ScoreForm) -> list[ClassBlock]:
    """One block for each group's head (`heads` is keyed by group id)."""
    starts = {group: int(np.searchsorted(classes.group, group)) for group in heads}
    return [
        ClassBlock(starts[group] + head.part.start, len(head.part), _scorer(head, form))
        for group, head in heads.items()
    ]


def _scorer(head: Head, form: ScoreForm) -> Callable[[Tensor], Tensor]:
    return lambda descriptors: head.scores(descriptors.to(head.weight.device), form)


@torch.inference_mode()
def rank_classes(
    descriptors: Tensor,
    blocks: Sequence[ClassBlock],
    *,
    top_k: int = max(RECALL_NS),
    device: torch.device | None = None,
    chunk: int = 256,
) -> tuple[Tensor, Tensor]:
    """The best `top_k` classes over all blocks: table rows int64 [Q, K] and scores float32 [Q, K].

    The same result as concatenating all groups' scores and sorting, without the sort and with scores of only
    `chunk` queries and one block in memory. K is smaller than `top_k` where there are fewer classes.
    """
    if not blocks or not len(descriptors):
        return torch.zeros(len(descriptors), 0, dtype=torch.int64), torch.zeros(len(descriptors), 0)
    rows: list[Tensor] = []
    scores: list[Tensor] = []
    for queries in descriptors.split(chunk):
        part = [_top_of_block(queries.to(device or queries.device), block, top_k) for block in blocks]
        best_rows, best_scores = merge_rankings(part, top_k)
        rows.append(best_rows.cpu())
        scores.append(best_scores.cpu())
    return torch.cat(rows), torch.cat(scores)


def _top_of_block(descriptors: Tensor, block: ClassBlock, top_k: int) -> tuple[Tensor, Tensor]:
    scores, labels = top_scores(block.score(descriptors).float(), top_k)
    return (labels + block.first).to(descriptors.device), scores.to(descriptors.device)


def top_scores(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The best `top_k` of each row of scores [Q, C], best first: values and columns [Q, K], as `Tensor.topk`.

    The K best lie in the K strips of columns with the highest maxima, so that all but a few strips are read once.
    """
    count = scores.shape[1]
    strips = count // STRIP
    if strips < 4 * top_k:
        return scores.topk(min(top_k, count), dim=1)
    whole = strips * STRIP
    best = scores[:, :whole].unflatten(1, (strips, STRIP)).amax(2).topk(top_k, dim=1).indices
    columns = strip_columns(best)
    rest = torch.arange(whole, count, device=scores.device).expand(len(scores), -1)
    columns = torch.cat([columns, rest], dim=1)
    values, order = scores.gather(1, columns).topk(top_k, dim=1)
    return values, columns.gather(1, order)


def strip_columns(strips: Tensor) -> Tensor:
    """int64 [Q, K * STRIP]: the columns of these strips (int64 [Q, K])."""
    return (strips[:, :, None] * STRIP + torch.arange(STRIP, device=strips.device)).flatten(1)


def merge_rankings(parts: Sequence[tuple[Tensor, Tensor]], top_k: int) -> tuple[Tensor, Tensor]:
    """One ranking out of several over disjoint classes: each (table rows [Q, k], scores [Q, k])."""
    rows = torch.cat([rows for rows, _ in parts], dim=1)
    scores = torch.cat([scores for _, scores in parts], dim=1)
    best, order = scores.topk(min(top_k, scores.shape[1]), dim=1)
    return rows.gather(1, order), best


def cell_distances(class_index: np.ndarray, classes: ClassTable, east: np.ndarray, north: np.ndarray) -> np.ndarray:
    """float32 [Q, K]: metres from the queries (float64 [Q]) to the centres of the cells in `class_index`.

    A cell's centre is its lower-left corner plus M // 2. The difference is taken in float64 and the distance
    kept in float32, as the reference does, so that a query at 25 m is judged alike.
    """
    delta_east = classes.center_east[class_index] - east[:, None]
    delta_north = classes.center_north[class_index] - north[:, None]
    return np.sqrt(delta_east**2 + delta_north**2).astype(np.float32)


def recall_at(
    distances: np.ndarray, ns: Sequence[int] = RECALL_NS, threshold: float = THRESHOLD_METRES
) -> dict[int, float]:
    """LR@N in percent for each N of `ns`, from distances float32 [Q, K] in metres, best class first.

    NaN where there are no queries. An N beyond K counts the K classes there are.
    """
    if len(distances) == 0:
        return dict.fromkeys(ns, float("nan"))
    near = distances <= np.float32(threshold)
    return {n: float(near[:, :n].any(axis=1).mean() * 100) for n in ns}


@dataclass(frozen=True)
class QueryScores:
    """The outcome for a query set: its ranking, `scored` bool [Q] (readable and located), and LR@N in percent."""

    ranking: Ranking
    scored: np.ndarray
    recall: dict[int, float]


def score_queries(
    descriptors: Descriptors,
    blocks: Sequence[ClassBlock],
    classes: ClassTable,
    queries: Queries,
    *,
    ns: Sequence[int] = RECALL_NS,
    threshold: float = THRESHOLD_METRES,
    device: torch.device | None = None,
) -> QueryScores:
    """Rank the classes for every query and take LR@N over those that are readable and have a position."""
    rows, scores = rank_classes(descriptors.vectors, blocks, top_k=max(ns), device=device)
    return assess_ranking(rows.numpy(), scores.numpy(), descriptors.readable, classes, queries, ns, threshold)


def assess_ranking(
    class_index: np.ndarray,
    scores: np.ndarray,
    readable: np.ndarray,
    classes: ClassTable,
    queries: Queries,
    ns: Sequence[int] = RECALL_NS,
    threshold: float = THRESHOLD_METRES,
) -> QueryScores:
    """Distances and LR@N of a finished ranking (int64 [Q, K] table rows, float32 [Q, K] scores)."""
    distances = cell_distances(class_index, classes, queries.east, queries.north)
    scored = readable & queries.located
    return QueryScores(Ranking(class_index, scores, distances), scored, recall_at(distances[scored], ns, threshold))
