"""LR@N on validation queries during training, over all processes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

import numpy as np
import torch
from torch import nn

from shards.cell_index import CellIndex
from shards.classes import ClassTable
from shards.console import JobError, format_count
from training.distributed import World
from training.head_bank import HeadBank
from training.interruption import Interruption
from training.presets import TrainConfig
from training.queries import Queries, QueryBatch, list_queries, query_size, read_queries
from training.scoring import (
    RECALL_NS,
    THRESHOLD_METRES,
    QueryScores,
    assess_ranking,
    describe_batches,
    merge_rankings,
    rank_classes,
)

CACHE_BYTES = 256 << 20
_BEYOND_METRES = 10_000.0  # of these and more kilometres are told


class Validator:
    """The validation queries, decoded once where they fit in memory.

    Every rank describes its share of the queries; then every rank ranks all of them over the classes whose
    weights it holds, and rank 0 merges the rankings, so no head travels.
    """

    def __init__(
        self, config: TrainConfig, classes: ClassTable, world: World, threads: int, interruption: Interruption
    ) -> None:
        assert config.val_queries is not None
        self.config = config
        self.classes = classes
        self.world = world
        self.threads = threads
        self.interruption = interruption
        self.queries: Queries = list_queries(config.val_queries, classes.zone, southern=classes.southern)
        if not self.queries.located.any():
            unlocated = self.queries.unlocated(np.ones(len(self.queries), bool))
            first = (*unlocated, *self.queries.set_aside)[0]
            raise JobError(
                f"{config.val_queries}: no validation query has usable coordinates ({first}){self.queries.advice}"
            )
        self.answerable = self._count_answerable()
        self._check_readable()
        self.mine = np.arange(world.rank, len(self.queries), world.size)
        self.cache: list[QueryBatch] | None = None
        self.unreadable: dict[int, str] = {}
        self.told = False

    def _count_answerable(self) -> int:
        """How many queries some class could answer; JobError where none, since LR@N would be 0 to the end."""
        east, north = (axis[self.queries.located] for axis in (self.queries.east, self.queries.north))
        count = int(np.count_nonzero(CellIndex(self.classes).count_near(east, north, THRESHOLD_METRES)))
        if count:
            return count
        centers = self.classes.centers()
        nearest = min(float(np.hypot(*(centers - place).T).min()) for place in np.stack([east, north], axis=1))
        away = f"{nearest:,.1f} m" if nearest < _BEYOND_METRES else f"{nearest / 1000:,.0f} km"
        raise JobError(
            f"{self.config.val_queries}: none of {format_count(len(east), 'validation query')} lies within "
            f"{THRESHOLD_METRES:g} m of a class's centre (the nearest: {away}; {self.classes.crs}): streets without "
            f"classes, cells that are too large (M is {self.classes.M}), or another city, zone or "
            "hemisphere; leave out --val-queries to train without"
        )

    def _check_readable(self) -> None:
        """Raise JobError where no photo with a place can be read; else one is decoded."""
        paths = [self.queries.paths[i] for i in np.flatnonzero(self.queries.located)]
        reasons: dict[int, str] = {}
        batches = read_queries(
            paths,
            shorter_side=query_size(self.config.image_size),
            batch_size=1,
            threads=1,
            on_failure=lambda index, reason: reasons.update({index: reason}),
        )
        if next(batches, None) is None:
            raise JobError(f"{self.config.val_queries}: none of its photos can be read ({paths[0]}: {reasons[0]})")

    def validate(self, model: nn.Module, bank: HeadBank) -> tuple[QueryScores | None, bool]:
        """LR@N of model and heads as they are: on rank 0, None on the others; True where a signal to any rank cut it
        short. All ranks must call it."""
        described = describe_batches(model, self._batches(), len(self.mine), device=self.world.device)
        if any(self.world.gather(self.interruption.received is not None)):
            return None, True
        own = (self.mine, described.vectors.numpy(), described.readable, self.unreadable)
        everyone = self.world.gather(own)
        vectors = np.zeros((len(self.queries), max(part.shape[1] for _, part, _, _ in everyone)), np.float32)
        readable = np.zeros(len(self.queries), dtype=bool)
        for indices, part, part_readable, unreadable in everyone:
            vectors[indices[part_readable]] = part[part_readable]
            readable[indices] = part_readable
            self.unreadable |= unreadable
        if not readable.any():
            raise JobError(f"{self.config.val_queries}: its photos went away; bring them back and go on with --resume")
        top = max(RECALL_NS)
        blocks = bank.blocks(self.config.score_form)
        ranking = rank_classes(torch.from_numpy(vectors), blocks, top_k=top, device=self.world.device)
        parts = [part for part in self.world.gather(ranking) if part[0].numel()]
        if not self.world.is_main:
            return None, False
        rows, _ = merge_rankings(parts, top)
        return assess_ranking(rows.numpy(), readable, self.classes, self.queries), False

    def _batches(self) -> Iterator[QueryBatch]:
        """This rank's queries, up to a signal; kept decoded as long as they fit in `CACHE_BYTES`."""
        if self.cache is not None:
            yield from takewhile(lambda _: self.interruption.received is None, self.cache)
            return
        kept: list[QueryBatch] | None = []
        size = 0
        for batch in read_queries(
            [self.queries.paths[i] for i in self.mine],
            shorter_side=query_size(self.config.image_size),
            batch_size=self.config.val_batch_size,
            threads=self.threads,
            on_failure=lambda index, reason: self.unreadable.update({int(self.mine[index]): reason}),
        ):
            size += batch.images.nbytes
            if kept is not None and size <= CACHE_BYTES:
                kept.append(batch)
            else:
                kept = None
            yield batch
            if self.interruption.received is not None:
                return
        self.cache = kept

    def describe_unreadable(self) -> str | None:
        """One line about the queries that turned out unreadable, once, after the first validation; else None."""
        if self.told or not self.unreadable:
            return None
        self.told = True
        index, reason = min(self.unreadable.items())
        path = self.queries.paths[index]
        count = format_count(len(self.unreadable), "validation query")
        return f"{count} cannot be read (left out): {path}: {reason}"

    def describe_set(self) -> str:
        """One line about the queries, for the console."""
        queries = self.queries
        located = int(queries.located.sum())
        unlocated, far = len(queries) - located, located - self.answerable
        notes = [f"{unlocated} without coordinates (left out)" if unlocated else ""]
        notes += [f"{queries.reprojected} of another UTM zone (reprojected)" if queries.reprojected else ""]
        notes += [f"{len(queries.set_aside)} set aside ({queries.set_aside[0].reason})" if queries.set_aside else ""]
        notes += [
            f"{far:,} of them farther than {THRESHOLD_METRES:g} m from every class "
            f"(LR@N is at most {100 * self.answerable / located:.1f} %)"
            if far
            else ""
        ]
        return format_count(len(queries), "validation query") + "".join(f", {note}" for note in notes if note)
