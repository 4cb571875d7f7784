"""Draws against the stated distribution, and against torchvision's crop."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, ks_2samp
from torchvision.transforms import RandomResizedCrop

from shards.index import GroupIndex
from shards.sampler import Draws, IndexedSampler, crops, uniforms


def draw(index, groups, seed, step, slots, attempt=0) -> Draws:
    return IndexedSampler(index, seed).draw(step, slots, groups, attempt)


COUNTS = np.array([3, 0, 40, 10, 1])


@pytest.fixture(scope="module")
def index() -> dict[int, GroupIndex]:
    n = COUNTS.sum()
    zeros = np.zeros(n, np.uint32)
    starts = np.concatenate([[0], np.cumsum(COUNTS)])
    return {2: GroupIndex(2, [], starts, zeros, zeros.astype(np.uint64), zeros, zeros, np.flatnonzero(COUNTS))}


def drawn(index, steps=400, slots=64, seed=5):
    parts = [draw(index, np.full(slots, 2), seed, step, np.arange(slots)) for step in range(steps)]
    return np.concatenate([p.label for p in parts]), np.concatenate([p.row for p in parts])


def test_classes_with_photos_are_drawn_uniformly_and_others_never(index):
    label, _ = drawn(index)
    counts = np.bincount(label, minlength=len(COUNTS))
    assert counts[1] == 0
    assert chisquare(counts[COUNTS > 0]).pvalue > 1e-3


def test_photos_are_drawn_uniformly_within_a_class(index):
    label, row = drawn(index)
    starts = index[2].starts
    for c in np.flatnonzero(COUNTS > 1):
        rows = row[label == c] - starts[c]
        assert chisquare(np.bincount(rows, minlength=COUNTS[c])).pvalue > 1e-3


def test_draws_of_neighbouring_steps_slots_and_attempts_are_independent():
    u = np.stack([uniforms(1, step, np.arange(32), attempt) for step in range(50) for attempt in range(2)])
    assert len(np.unique(u)) == u.size
    flat = u[:, :, 0].ravel()
    assert abs(np.corrcoef(flat[1:], flat[:-1])[0, 1]) < 0.05
    by_attempt = u[:, :, 0].reshape(50, 2, 32)
    assert abs(np.corrcoef(by_attempt[:, 0].ravel(), by_attempt[:, 1].ravel())[0, 1]) < 0.08


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_any_number_of_ranks_draws_the_same_global_batch(index, ranks):
    whole = draw(index, np.full(17, 2), 9, 123, np.arange(17))
    for rank in range(ranks):
        slots = np.arange(rank, 17, ranks)
        part = draw(index, np.full(len(slots), 2), 9, 123, slots)
        np.testing.assert_array_equal(part.row, whole.row[slots])
        np.testing.assert_array_equal(part.uniform, whole.uniform[slots])


def test_seed_step_and_attempt_each_change_the_draw(index):
    slots, groups = np.arange(64), np.full(64, 2)
    first = draw(index, groups, 1, 1, slots).row
    for seed, step, attempt in [(2, 1, 0), (1, 2, 0), (1, 1, 1)]:
        assert (draw(index, groups, seed, step, slots, attempt).row != first).any()


def test_crops_have_the_distribution_of_torchvisions_random_resized_crop():
    u = np.concatenate([uniforms(3, step, np.arange(64)) for step in range(60)])[:, 2:]
    ours = crops(u, 224)
    torch.manual_seed(0)
    photo = torch.empty(3, 224, 224)
    theirs = np.array([RandomResizedCrop.get_params(photo, (0.66, 1.0), (3 / 4, 4 / 3)) for _ in range(len(ours))])
    for mine, other in [(0, 1), (1, 0), (2, 3), (3, 2)]:  # left, top, width, height of theirs: (top, left, h, w)
        assert ks_2samp(ours[:, mine], theirs[:, other]).pvalue > 1e-3
    assert ((ours[:, 0] >= 0) & (ours[:, 0] + ours[:, 2] <= 224)).all()
    assert ((ours[:, 1] >= 0) & (ours[:, 1] + ours[:, 3] <= 224)).all()


def test_where_no_crop_fits_it_is_the_whole_photo_as_torchvision_has_it():
    u = uniforms(3, 0, np.arange(3))[:, 2:]
    u[0, 2:] = 1 - 2**-53  # ten crops of the whole area, wider than the photo
    u[1, 2::2], u[1, 3::2] = 1 - 2**-53, 0  # and higher
    boxes = crops(u, 224).tolist()
    assert boxes[:2] == [[0, 0, 224, 224]] * 2
    assert boxes[2] != boxes[0]
    top, left, h, w = RandomResizedCrop.get_params(torch.empty(3, 224, 224), [1.1, 1.1], [3 / 4, 4 / 3])
    assert boxes[0] == [left, top, w, h]


def test_a_crop_can_touch_every_edge_of_its_photo():
    u = uniforms(3, 0, np.arange(2))[:, 2:]
    u[0, :2], u[1, :2] = 0, 1 - 2**-53
    boxes = crops(u, 224)
    assert boxes[0, :2].tolist() == [0, 0]
    assert (boxes[1, :2] + boxes[1, 2:]).tolist() == [224, 224]


def test_the_draws_of_a_seed_are_those_of_earlier_versions(index):
    """A run that goes on after an update trains on what it would have trained on."""
    draws = draw(index, np.full(4, 2), 7, 1000, np.arange(4), attempt=1)
    assert draws.label.tolist() == [3, 3, 0, 3]
    assert draws.row.tolist() == [49, 52, 0, 51]
    boxes = [[2, 2, 201, 222], [7, 43, 206, 171], [17, 18, 206, 201], [17, 41, 188, 180]]
    assert crops(draws.uniform, 224).tolist() == boxes
