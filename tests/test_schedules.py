"""Schedules: which group each slot trains, and which ranks hold which head."""

import numpy as np
import pytest

from shards.sampler import slots_of_rank
from training.schedules import count_of_group, holders_of_groups, make_schedule, parts_of_share


def test_sequential_trains_group_e_mod_g_in_every_slot_of_epoch_e() -> None:
    schedule = make_schedule("sequential", [0, 1, 3], batch_size=5, iterations_per_epoch=10)
    assert [set(schedule(step).tolist()) for step in (0, 9, 10, 29, 30)] == [{0}, {0}, {1}, {3}, {0}]
    assert schedule(7).shape == (5,)


def test_joint_gives_slot_i_to_group_i_mod_g_in_every_step() -> None:
    schedule = make_schedule("joint", [0, 1, 3], batch_size=7, iterations_per_epoch=10)
    assert schedule(0).tolist() == [0, 1, 3, 0, 1, 3, 0]
    assert np.array_equal(schedule(0), schedule(123))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_the_ranks_slots_make_up_the_batch(ranks: int) -> None:
    slots = np.concatenate([slots_of_rank(16, rank, ranks) for rank in range(ranks)])
    assert sorted(slots.tolist()) == list(range(16))


def test_with_as_many_ranks_as_groups_each_rank_holds_one_head() -> None:
    holders = holders_of_groups("joint", [0, 1, 2, 3], batch_size=64, world_size=4)
    assert holders == {0: (0,), 1: (1,), 2: (2,), 3: (3,)}


def test_ranks_that_the_groups_do_not_divide_share_heads() -> None:
    assert holders_of_groups("joint", [0, 1, 2, 3], batch_size=8, world_size=2) == {0: (0,), 1: (1,), 2: (0,), 3: (1,)}
    assert holders_of_groups("joint", [0, 1, 2, 3], batch_size=64, world_size=3) == dict.fromkeys(range(4), (0, 1, 2))


def test_sequential_heads_are_held_by_all_ranks() -> None:
    assert holders_of_groups("sequential", [0, 1], batch_size=8, world_size=2) == {0: (0, 1), 1: (0, 1)}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8])
def test_holders_are_exactly_the_ranks_that_have_a_slot_of_the_group(ranks: int) -> None:
    schedule = make_schedule("joint", [0, 1, 2, 3], batch_size=20, iterations_per_epoch=1)(0)
    holders = holders_of_groups("joint", [0, 1, 2, 3], batch_size=20, world_size=ranks)
    for rank in range(ranks):
        mine = set(schedule[slots_of_rank(20, rank, ranks)].tolist())
        assert mine == {group for group, held in holders.items() if rank in held}


@pytest.mark.parametrize("name", ["sequential", "joint"])
@pytest.mark.parametrize(("batch", "ranks", "accumulate"), [(64, 4, 1), (22, 3, 4), (7, 3, 5), (16, 8, 2)])
def test_a_share_is_cut_into_parts_whose_groups_every_rank_knows(name, batch, ranks, accumulate):
    groups = [0, 2, 3]
    schedule = make_schedule(name, groups, batch_size=batch, iterations_per_epoch=10)
    shares = [parts_of_share(batch, rank, ranks, accumulate) for rank in range(ranks)]
    assert {len(parts) for parts in shares} == {min(accumulate, batch // ranks)}
    for rank, parts in enumerate(shares):
        np.testing.assert_array_equal(np.concatenate(parts), slots_of_rank(batch, rank, ranks))
        for slots in parts:
            assert len(slots)
            for group in np.unique(schedule(11)).tolist():
                assert count_of_group(name, groups, group, slots) == np.count_nonzero(schedule(11)[slots] == group)
