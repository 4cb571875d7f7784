"""Which group every slot of a global batch trains: pure functions of the step.

`sequential` is the paper's: epoch e trains group e mod G. `joint` trains all groups in every step: slot i
belongs to group i mod G, so with as many ranks as groups each rank needs one head only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from shards.sampler import Schedule, slots_of_rank

ScheduleName = Literal["sequential", "joint"]


def make_schedule(name: ScheduleName, groups: Sequence[int], *, batch_size: int, iterations_per_epoch: int) -> Schedule:
    """A function from the global step to the group id of every slot, int64 [batch_size].

    `groups` are the ids of the groups that have classes, ascending.
    """
    ids = np.asarray(groups, dtype=np.int64)

    def sequential(step: int) -> np.ndarray:
        return np.full(batch_size, ids[(step // iterations_per_epoch) % len(ids)])

    def joint(step: int) -> np.ndarray:
        return _joint_groups(groups, np.arange(batch_size))

    return sequential if name == "sequential" else joint


def _joint_groups(groups: Sequence[int], slots: np.ndarray) -> np.ndarray:
    """The group of each of `slots` (int [k]) in the joint schedule, int64 [k]."""
    return np.asarray(groups, np.int64)[slots % len(groups)]


def parts_of_share(batch_size: int, rank: int, world_size: int, accumulate: int) -> list[np.ndarray]:
    """A rank's slots in `accumulate` parts that differ by one at most; fewer where some rank has fewer slots."""
    return np.array_split(slots_of_rank(batch_size, rank, world_size), min(accumulate, batch_size // world_size))


def count_of_group(name: ScheduleName, groups: Sequence[int], group: int, slots: np.ndarray) -> int:
    """How many of `slots` belong to `group` in a step that trains it."""
    return len(slots) if name == "sequential" else int(np.count_nonzero(_joint_groups(groups, slots) == group))


def holders_of_groups(
    name: ScheduleName, groups: Sequence[int], *, batch_size: int, world_size: int
) -> dict[int, tuple[int, ...]]:
    """The ranks that ever train each group, ascending: in the joint schedule those with a slot of the group."""
    if name == "sequential":
        return {group: tuple(range(world_size)) for group in groups}
    trained = [_joint_groups(groups, slots_of_rank(batch_size, rank, world_size)) for rank in range(world_size)]
    return {group: tuple(rank for rank, own in enumerate(trained) if group in own) for group in groups}
