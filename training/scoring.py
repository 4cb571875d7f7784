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
from shards.console import JobError, format_count, progress_bar
from training.heads import Head, ScoreForm
from training.model import to_input
from training.queries import Queries, QueryBatch, SetAside, read_queries

RECALL_NS = (1, 5, 10, 20)
THRESHOLD_METRES = 25.0
STRIP = 32  # adjacent classes whose highest score is taken first, when the best of many are wanted
SCORES_IN_MEMORY = 1 << 25  # 128 MB
_SCORES_IN_CACHE = 1 << 19  # 2 MB, beside the weights that make them


@dataclass(frozen=True)
class ClassBlock:
    """Adjacent rows of a class table: a group's classes, or some of them.

    `first` is the table row of the block's first class, `count` the number of classes, and `score` maps unit
    descriptors float32 [B, D] and a slice of the block's classes to their scores float32 [B, n].
    """

    first: int
    count: int
    score: Callable[[Tensor, slice], Tensor]


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
    title: str | None = None,
) -> Descriptors:
    """Unit descriptors of the photos at `paths`, in their order, in batches of same-shaped photos; `title` as in
    `describe_batches`."""
    failures: list[SetAside] = []
    batches = read_queries(
        paths,
        shorter_side=shorter_side,
        batch_size=batch_size,
        threads=threads,
        on_failure=lambda index, reason: failures.append(SetAside(paths[index], reason)),
    )
    return describe_batches(model, batches, len(paths), device=device, failures=failures, title=title)


@torch.inference_mode()
def describe_batches(
    model: nn.Module,
    batches: Iterable[QueryBatch],
    count: int,
    *,
    device: torch.device,
    failures: list[SetAside] | None = None,
    title: str | None = None,
) -> Descriptors:
    """Descriptors of `count` queries that come as decoded batches; the model is left in the mode it was in.

    With a `title`, progress is shown under it where it takes long. JobError where a batch is too large for the GPU.
    """
    vectors: Tensor | None = None
    readable = np.zeros(count, dtype=bool)
    was_training = model.training
    if was_training:
        model.eval()
    bar = progress_bar(title, count, "photos")
    try:
        for batch in batches:
            described = model(to_input(torch.from_numpy(batch.images).to(device))).float().cpu()
            if vectors is None:
                vectors = torch.zeros(count, described.shape[1])
            vectors[torch.from_numpy(batch.indices)] = described
            readable[batch.indices] = True
            bar.update(len(batch.indices))
    except torch.OutOfMemoryError as error:
        photos, height, width, _ = batch.images.shape
        raise JobError(
            f"the GPU's memory is too small for {format_count(photos, 'photo')} of {width} x {height} pixels at once; "
            "give fewer by --batch-size (--val-batch-size in training)"
        ) from error
    finally:
        bar.close()
        if was_training:
            model.train()
    return Descriptors(torch.zeros(count, 1) if vectors is None else vectors, readable, tuple(failures or ()))


def class_blocks(heads: Mapping[int, Head], classes: ClassTable, form: ScoreForm) -> list[ClassBlock]:
    """One block for each group's head (`heads` is keyed by group id)."""
    starts = {group: int(np.searchsorted(classes.group, group)) for group in heads}
    return [
        ClassBlock(starts[group] + head.part.start, len(head.part), _scorer(head, form))
        for group, head in heads.items()
    ]


def _scorer(head: Head, form: ScoreForm) -> Callable[[Tensor, slice], Tensor]:
    return lambda descriptors, classes: head.scores(descriptors.to(head.weight.device), form, classes)


@torch.inference_mode()
def rank_classes(
    descriptors: Tensor,
    blocks: Sequence[ClassBlock],
    *,
    top_k: int = max(RECALL_NS),
    device: torch.device | None = None,
    chunk: int = 512,
) -> tuple[Tensor, Tensor]:
    """The best `top_k` classes over all blocks: table rows int64 [Q, K] and scores float32 [Q, K].

    The same result as concatenating all groups' scores and sorting, without the sort and with scores of only
    `chunk` queries (fewer where that takes over 128 MB) and one block in memory. K is smaller than `top_k` where
    there are fewer classes.
    """
    if not blocks or not len(descriptors):
        return torch.zeros(len(descriptors), 0, dtype=torch.int64), torch.zeros(len(descriptors), 0)
    rows: list[Tensor] = []
    scores: list[Tensor] = []
    device = device or descriptors.device
    widest = max(-(-block.count // STRIP) for block in blocks) * STRIP
    chunk = min(chunk, len(descriptors), max(SCORES_IN_MEMORY // widest, 1))
    room = torch.empty(chunk, widest, device=device)  # made once: new memory costs its page faults
    for queries in descriptors.split(chunk):
        part = [_top_of_block(queries.to(device), block, top_k, room) for block in blocks]
        best_rows, best_scores = merge_rankings(part, top_k)
        rows.append(best_rows.cpu())
        scores.append(best_scores.cpu())
    return torch.cat(rows), torch.cat(scores)


def _top_of_block(descriptors: Tensor, block: ClassBlock, top_k: int, room: Tensor) -> tuple[Tensor, Tensor]:
    """The best classes of a block: table rows and scores, both [q, k].

    The k best lie in the k strips with the highest maxima, so that only those are searched. Pieces of the block are
    scored and their strips' maxima taken while they are in cache. `room` float32 [q or more, columns of the block's
    whole strips or more] holds the scores meanwhile.
    """
    strips = -(-block.count // STRIP)
    scores = room[: len(descriptors), : strips * STRIP]
    scores[:, block.count :] = -torch.inf
    maxima = scores.new_empty(len(scores), strips)
    size = classes_in_cache(len(scores)) if scores.device.type == "cpu" else strips * STRIP
    for first in range(0, block.count, size):
        piece = slice(first, min(first + size, block.count))
        scores[:, piece] = block.score(descriptors, piece)
        some = slice(first // STRIP, -(-piece.stop // STRIP))
        maxima[:, some] = strip_maxima(scores[:, some.start * STRIP : some.stop * STRIP])
    columns = strip_columns(maxima.topk(min(top_k, strips), dim=1).indices)
    best, at = scores.gather(1, columns).topk(min(top_k, block.count), dim=1)
    return columns.gather(1, at) + block.first, best


def classes_in_cache(queries: int) -> int:
    """How many classes, in whole strips, leave the scores of so many queries in a processor's cache."""
    return max(_SCORES_IN_CACHE // max(queries, 1) // STRIP, 1) * STRIP


def strip_maxima(scores: Tensor) -> Tensor:
    """The highest score of each strip, [Q, C / STRIP], of scores [Q, C] in whole strips."""
    return scores.unflatten(1, (scores.shape[1] // STRIP, STRIP)).amax(2)


def strip_columns(strips: Tensor) -> Tensor:
    """int64 [Q, K * STRIP]: the columns of these strips (int64 [Q, K])."""
    return (strips[:, :, None] * STRIP + torch.arange(STRIP, device=strips.device)).flatten(1)


def merge_rankings(parts: Sequence[tuple[Tensor, Tensor]], top_k: int) -> tuple[Tensor, Tensor]:
    """One ranking out of several over disjoint classes: each (table rows [Q, k], scores [Q, k])."""
    rows = torch.cat([rows for rows, _ in parts], dim=1)
    scores = torch.cat([scores for _, scores in parts], dim=1)
    best, order = scores.topk(min(top_k, scores.shape[1]), dim=1)
    return rows.gather(1, order), best


def cell_distances(rows: np.ndarray, classes: ClassTable, east: np.ndarray, north: np.ndarray) -> np.ndarray:
    """float32 [Q, K]: metres from the queries (float64 [Q]) to the centres of cells.

    `rows` int64 [Q, K] of the class table. A cell's centre is its lower-left corner plus M // 2. The difference is
    taken in float64 and the distance kept in float32, as the reference does, so that a query at 25 m is judged alike.
    """
    delta_east = classes.center_east[rows] - east[:, None]
    delta_north = classes.center_north[rows] - north[:, None]
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
    """The outcome for a query set: `distances` float32 [Q, K], metres to the centres of the K best cells, best first
    (NaN without a position), `scored` bool [Q] (readable and located), and LR@N in percent."""

    distances: np.ndarray
    scored: np.ndarray
    recall: dict[int, float]


def assess_ranking(
    rows: np.ndarray,
    readable: np.ndarray,
    classes: ClassTable,
    queries: Queries,
    ns: Sequence[int] = RECALL_NS,
) -> QueryScores:
    """Distances and LR@N of a finished ranking (`rows` of the class table, int64 [Q, K]), the latter over the queries
    that are `readable` (bool [Q]) and have a position."""
    distances = cell_distances(rows, classes, queries.east, queries.north)
    scored = readable & queries.located
    return QueryScores(distances, scored, recall_at(distances[scored], ns))
