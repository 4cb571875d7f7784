"""The stream mode: windows are pure functions, keep the distribution, and read each run once."""

import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from test_loader import DECODERS, same, take
from test_loader_faults import damage, spoil_some_photos

from shards.console import JobError
from shards.index import GroupIndex, open_index
from shards.loader import Loader
from shards.reader import ShardReader
from shards.sampler import philox, uniforms
from shards.stream import Stream, StreamSettings, WindowPlan, make_window
from training.colour import colour_changes

COUNTS = np.array([3, 0, 40, 10, 64])


@pytest.fixture(scope="module")
def index() -> dict[int, GroupIndex]:
    n = COUNTS.sum()
    zeros = np.zeros(n, np.uint32)
    starts = np.concatenate([[0], np.cumsum(COUNTS)])
    return {g: GroupIndex(g, [], starts, zeros, zeros, zeros, zeros, np.flatnonzero(COUNTS)) for g in (0, 1)}


def make_loader(dataset, *, batch_size=16, joint=False, **options) -> Loader:
    groups = np.array(dataset.classes.groups)

    def schedule(step: int) -> np.ndarray:
        return np.resize(groups, batch_size) if joint else np.full(batch_size, groups[step // 3 % len(groups)])

    return Loader(
        dataset, schedule, batch_size=batch_size, image_size=48, seed=4, mode="stream",
        **{"decoder": "cpu", "stream": StreamSettings(run=5, window=64), **options},
    )  # fmt: skip


def test_every_slot_of_a_window_gets_a_photo_of_its_group_and_label(index):
    groups = np.array([[0, 1] * 9] * 7)
    window = make_window(index, groups, seed=1, first_step=21, run=4, turns={0: 33, 1: 34})
    starts = index[0].starts
    assert (window.row >= starts[window.label]).all()
    assert (window.row < starts[window.label + 1]).all()
    for slot, run in zip(np.ndindex(groups.shape), window.run.ravel(), strict=True):
        group, rows = window.runs[run]
        assert group == groups[slot]
        assert window.row[slot] in rows


def test_a_run_stays_within_a_lane(index):
    window = make_window(index, np.zeros((10, 32), int), seed=1, first_step=0, run=4, turns={0: 0})
    for run in range(len(window.runs)):
        _, slots = np.nonzero(window.run == run)
        assert len(set((slots % 8).tolist())) <= 1


def test_classes_and_photos_are_uniform_in_expectation(index):
    groups = np.zeros((4, 16), int)
    windows = [make_window(index, groups, seed=2, first_step=4 * n, run=4, turns={0: 16 * n}) for n in range(1500)]
    labels = np.concatenate([w.label.ravel() for w in windows])
    rows = np.concatenate([w.row.ravel() for w in windows])
    runs = len(windows) * 64 / 4  # photos of a run are not independent: test at the number of runs
    shares = np.bincount(labels, minlength=5) / len(labels)
    assert shares[1] == 0
    assert chisquare(shares[COUNTS > 0] * runs).pvalue > 1e-3
    for label in np.flatnonzero(COUNTS):
        of_class = rows[labels == label] - index[0].starts[label]
        share = np.bincount(of_class, minlength=COUNTS[label]) / len(of_class)
        assert chisquare(share * runs * shares[label]).pvalue > 1e-3


def test_classes_take_turns_and_each_goes_on_where_its_last_run_ended(index):
    starts = index[0].starts
    seen: dict[int, list] = {label: [] for label in np.flatnonzero(COUNTS).tolist()}
    order = []
    for number in range(6):  # 6 windows of 8 lanes: 48 turns of 4 classes
        window = make_window(index, np.zeros((4, 8), int), seed=3, first_step=4 * number, run=4, turns={0: 8 * number})
        for _, rows in window.runs:
            label = int(np.searchsorted(starts, rows[0], side="right")) - 1
            order.append(label)
            seen[label] += (rows - starts[label]).tolist()
    rounds = np.sort(np.reshape(order, (12, 4)), axis=1)
    assert (rounds == np.flatnonzero(COUNTS)).all()
    assert len({tuple(order[i : i + 4]) for i in range(0, 48, 4)}) > 1
    assert sorted(seen[2]) == sorted([*range(40), *seen[2][-8:]])  # 12 runs of 4: the class of 40 once, and 8 more
    assert len(set(seen[4])) == 48


@pytest.mark.parametrize("joint", [False, True])
def test_no_run_is_read_again_before_its_class_is_through_and_classes_come_up_alike(dataset, joint):
    loader = make_loader(dataset, joint=joint)  # groups change every 3 steps, windows are of 4
    stream = loader._supply.reader
    assert isinstance(stream, Stream)
    read: dict[int, list[int]] = {group: [] for group in dataset.classes.groups}
    for number in range(60):
        for group, rows in stream._hold(number).window.runs:
            read[group] += rows.tolist()
    for group, of_group in read.items():
        starts = stream._index[group].starts
        times = np.split(np.bincount(of_group, minlength=starts[-1]), starts[1:-1])
        assert all(np.ptp(of_class) <= 1 for of_class in times)
        # Runs of classes of fewer photos than a run are shorter.
        runs = [-(-int(of_class.sum()) // min(5, len(of_class))) for of_class in times]
        assert 5 < min(runs) >= max(runs) - 1
    loader.close()


def test_a_window_is_the_same_whether_or_not_the_run_began_before_it(dataset):
    first, second = (make_loader(dataset)._supply.reader for _ in range(2))
    assert isinstance(first, Stream)
    assert isinstance(second, Stream)
    windows = [first._hold(number).window for number in range(9)]
    for number in (8, 3):  # and one before, as where a loader begins anew
        assert (second._hold(number).window.row == windows[number].row).all()


def test_windows_differ_and_depend_on_seed_first_step_and_turns_alone(index):
    make = partial(make_window, index, np.zeros((4, 16), int), run=4, turns={0: 16})
    first = make(seed=1, first_step=4)
    assert (make(seed=1, first_step=4).row == first.row).all()
    assert (make(seed=1, first_step=8).row != first.row).any()
    assert (make(seed=2, first_step=4).row != first.row).any()
    assert (make(seed=1, first_step=4, turns={0: 17}).row != first.row).any()


def test_the_windows_of_a_seed_are_those_of_earlier_versions(index):
    """A run that goes on after an update trains on what it would have trained on."""
    groups = np.array([[0, 1] * 2] * 2)
    window = make_window(index, groups, seed=7, first_step=1000, run=4, turns={0: 1000, 1: 1000})
    assert window.label.tolist() == [[3, 0, 2, 4], [3, 0, 2, 4]]
    assert window.row.tolist() == [[45, 2, 27, 105], [47, 0, 25, 107]]


def test_random_numbers_of_one_purpose_serve_no_other(index, monkeypatch):
    used: list[set[tuple[int, ...]]] = []

    def record(*key):
        used[-1].add(key)
        return philox(*key)

    for module in ("shards.sampler", "shards.stream"):
        monkeypatch.setattr(f"{module}.philox", record)
    purposes: tuple[Callable[[int], object], ...] = (
        lambda step: make_window(
            index, np.array([[0, 1] * 8] * 4), seed=1, first_step=4 * step, run=4, turns={0: 8 * step, 1: 8 * step}
        ),
        lambda step: colour_changes(1, step, np.arange(4), 0.1),
        *(partial(uniforms, 1, slots=np.arange(4), key=attempt) for attempt in range(3)),
    )
    for purpose in purposes:
        used.append(set())
        for step in range(10):
            purpose(step)
    assert all(used)
    assert len(set.union(*used)) == sum(map(len, used))


@pytest.mark.parametrize(("window", "batch_size"), [(65536, 64), (10_000, 3), (4096, 64), (100, 7), (5, 16)])
def test_windows_follow_each_other_without_a_gap_and_grow_up_to_the_largest(window, batch_size):
    plan = WindowPlan(window, batch_size)
    spans = [plan.steps(number) for number in range(12)]
    assert spans[0].start == 0
    assert all(a.stop == b.start for a, b in pairwise(spans))
    photos = [len(span) * batch_size for span in spans]
    assert photos == sorted(photos)
    assert all(b < 1.5 * (a + batch_size) for a, b in pairwise(photos))
    assert min(window, 4096) - batch_size < photos[0] <= max(min(window, 4096), batch_size)
    assert window - batch_size < photos[-1] <= max(window, batch_size)
    for number, span in enumerate(spans):
        for place in {0, len(span) // 2, len(span) - 1}:
            assert plan.find(span[place]) == (number, place)


@pytest.mark.parametrize("decoder", ["cpu", "dali"])
def test_resuming_within_a_window_gives_the_same_batches(dataset, decoder):
    whole = take(make_loader(dataset, decoder=decoder), 0, 11)
    assert same(whole[6:], take(make_loader(dataset, decoder=decoder, threads=3), 6, 11))


@pytest.mark.parametrize(("ranks", "decoder"), [(2, "cpu"), (3, "cpu"), (3, "dali")])
@pytest.mark.parametrize("joint", [False, True])
def test_ranks_share_out_the_global_batch_of_one(dataset, ranks, decoder, joint):
    whole = take(make_loader(dataset, joint=joint, decoder=decoder, threads=1), 2, 7)
    for rank in range(ranks):
        part = take(make_loader(dataset, joint=joint, decoder=decoder, rank=rank, world_size=ranks), 2, 7)
        for mine, all_ in zip(part, whole, strict=True):
            assert torch.equal(mine[0], all_[0][rank::ranks])
            assert torch.equal(mine[1], all_[1][rank::ranks])


def test_each_run_is_one_request_and_read_by_one_rank_alone(dataset, monkeypatch):
    requests: Counter[tuple[int, int, int]] = Counter()
    read_run, single = ShardReader.read_run, []

    def read_run_and_count(self, *run):
        requests[run] += 1
        return read_run(self, *run)

    monkeypatch.setattr(ShardReader, "read_run", read_run_and_count)
    monkeypatch.setattr(ShardReader, "read", lambda *a: single.append(a))

    def asked_for(rank: int, world_size: int) -> Counter[tuple[int, int, int]]:
        requests.clear()
        loader = make_loader(dataset, rank=rank, world_size=world_size)
        take(loader, 0, 1)
        stream = loader._supply.reader
        assert isinstance(stream, Stream)
        for window in stream._held.values():
            for photos, _ in window.result().photos.values():
                photos.result()  # which closing would call off
        loader.close()
        return requests.copy()

    alone = asked_for(0, 1)
    assert asked_for(0, 2) + asked_for(1, 2) == alone
    windows = 2  # the one in use and the next
    runs = windows * 8 * -(-64 // 8 // 5) + windows * 8 * 3  # of 5 photos for each of 8 lanes; some wrap or meet groups
    assert not single
    assert alone.total() <= runs


@pytest.mark.parametrize("window", [64, 16], ids=["windows of four steps", "windows of one step"])
def test_every_photo_of_many_windows_comes_from_memory(dataset, monkeypatch, window):
    read, single = ShardReader.read, []

    def read_and_count(self, *photo):
        single.append(photo)
        return read(self, *photo)

    monkeypatch.setattr(ShardReader, "read", read_and_count)
    loader = make_loader(dataset, stream=StreamSettings(run=5, window=window))
    take(loader, 0, 60)
    loader.close()
    assert not single


def test_photos_of_a_run_are_those_read_one_by_one(dataset):
    index = open_index(dataset.path, dataset.classes)
    reader = ShardReader(index)
    together = reader.read_run(0, 3, 9)
    assert together == [reader.read(0, row) for row in range(3, 12)]


def test_a_damaged_photo_in_a_run_is_replaced_by_the_next_draw(dataset, tmp_path):
    spoiled = damage(dataset, tmp_path, spoil_some_photos)
    loader = make_loader(spoiled)
    loader._supply.max_bad_share = 1.0
    batches = take(loader, 0, 40)
    assert loader.failures > 0
    assert min(float(b[0].float().std((1, 2, 3)).min()) for b in batches) > 1
    loader.close()


@pytest.mark.parametrize("decoder", DECODERS)
def test_too_many_bad_photos_stop_training_with_a_clear_error(dataset, tmp_path, decoder):
    emptied = damage(dataset, tmp_path, lambda tar: os.truncate(tar, 4096))
    with pytest.raises(JobError, match=r"verify\.py"):
        take(make_loader(emptied, decoder=decoder), 0, 50)
