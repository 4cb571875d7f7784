"""LR@N and the ranking behind it, against cases worked by hand and against a full sort."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SOUTH, WEST, ZONE, class_table, write_queries

from shards.classes import ClassTable
from shards.console import JobError
from training.heads import Head
from training.queries import Queries, QueryBatch, list_queries
from training.scoring import (
    ClassBlock,
    assess_ranking,
    cell_distances,
    class_blocks,
    describe_batches,
    describe_queries,
    merge_rankings,
    rank_classes,
    recall_at,
)


def three_cells() -> ClassTable:
    """Cells whose centres lie at 10, 50 and 210 m east of WEST, all 10 m north of SOUTH."""
    east = np.array([WEST, WEST + 40, WEST + 200])
    return ClassTable(
        20, 2, ZONE, np.zeros(3, np.int32), np.arange(3, dtype=np.int32), east, np.full(3, SOUTH), np.full(3, 10)
    )


def queries_at(east: list[float], north: list[float]) -> Queries:
    paths = tuple(Path(f"{i}.jpg") for i in range(len(east)))
    return Queries(Path("q"), tuple(map(str, paths)), paths, np.array(east), np.array(north), 0, ())


def test_recall_is_the_share_of_queries_with_a_near_cell_among_the_first_n() -> None:
    # Query 0 stands on cell 0's centre and ranks it first; query 1 stands there too but ranks it second;
    # query 2 stands 24 m from cell 1's centre and ranks it last; query 3 is far from every cell.
    queries = queries_at([WEST + 10, WEST + 10, WEST + 50 + 24, WEST + 5000], [SOUTH + 10.0] * 4)
    ranked = np.array([[0, 1, 2], [2, 0, 1], [2, 0, 1], [0, 1, 2]])
    outcome = assess_ranking(ranked, np.ones(4, bool), three_cells(), queries, ns=(1, 2, 3))
    assert outcome.recall == {1: 25.0, 2: 50.0, 3: 75.0}
    np.testing.assert_allclose(outcome.distances[0], [0, 40, 200])


def test_a_query_at_exactly_25_metres_counts_and_one_just_beyond_does_not() -> None:
    cells = three_cells()
    distances = cell_distances(
        np.array([[0], [0]]), cells, np.array([WEST + 35.0, WEST + 35.0001]), np.array([SOUTH + 10.0] * 2)
    )
    assert distances.dtype == np.float32
    assert recall_at(distances[:1], (1,)) == {1: 100.0}
    assert recall_at(distances[1:], (1,)) == {1: 0.0}


def test_threshold_and_ns_can_be_chosen_and_no_queries_give_nan() -> None:
    assert recall_at(np.array([[30.0, 10.0]], np.float32), (1, 2), threshold=30.0) == {1: 100.0, 2: 100.0}
    assert np.isnan(recall_at(np.zeros((0, 5), np.float32))[1])


def test_a_cell_of_odd_size_predicts_its_corner_plus_half_rounded_down() -> None:
    cells = ClassTable(
        15, 2, ZONE, np.zeros(1, np.int32), np.zeros(1, np.int32), np.array([WEST]), np.array([SOUTH]), np.array([9])
    )
    assert cell_distances(np.array([[0]]), cells, np.array([WEST + 7.0]), np.array([SOUTH + 7.0])) == 0


def test_queries_without_position_or_pixels_are_left_out_of_the_recall() -> None:
    queries = queries_at([WEST + 10, float("nan"), WEST + 10], [SOUTH + 10, float("nan"), SOUTH + 10])
    ranked = np.zeros((3, 1), dtype=np.int64)
    readable = np.array([True, True, False])
    outcome = assess_ranking(ranked, readable, three_cells(), queries, ns=(1,))
    assert outcome.scored.tolist() == [True, False, False]
    assert outcome.recall == {1: 100.0}


@pytest.mark.parametrize("side", [6, 41])  # with 1,681 classes, groups have 13 and 14 strips and several pieces
def test_ranking_equals_a_full_sort_of_all_groups_for_both_score_forms(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.scoring._SCORES_IN_CACHE", 10 * 96)
    torch.manual_seed(0)
    classes = class_table(side)
    heads = {group: Head("AAMC", 16, classes.count(group)) for group in classes.groups}
    descriptors = torch.nn.functional.normalize(torch.randn(37, 16), dim=1)
    for form in ("raw", "cosine"):
        weights = torch.cat([heads[group].weight for group in classes.groups]).detach().double()
        if form == "cosine":
            weights = torch.nn.functional.normalize(weights, dim=1)
        expected = descriptors.double() @ weights.T
        best = expected.sort(dim=1, descending=True).values[:, :20]
        rows, scores = rank_classes(descriptors, class_blocks(heads, classes, form), top_k=20, chunk=10)
        torch.testing.assert_close(scores.double(), best, atol=1e-6, rtol=0)
        torch.testing.assert_close(expected.gather(1, rows), best, atol=1e-6, rtol=0)
        assert all(len(set(row)) == 20 for row in rows.tolist())


def scores_of(scores: torch.Tensor, descriptors: torch.Tensor, columns: slice) -> torch.Tensor:
    return descriptors @ scores[:, columns]


def test_rankings_over_parts_of_the_classes_merge_into_the_whole() -> None:
    torch.manual_seed(1)
    scores = torch.randn(5, 30)
    whole = rank_classes(torch.eye(5), [ClassBlock(0, 30, lambda d, c: d @ scores[:, c])], top_k=7)
    parts = [
        rank_classes(torch.eye(5), [ClassBlock(first, 10, partial(scores_of, scores[:, first : first + 10]))], top_k=7)
        for first in (20, 0, 10)
    ]
    merged = merge_rankings(parts, 7)
    assert torch.equal(merged[0], whole[0])
    assert torch.equal(merged[1], whole[1])


def test_fewer_classes_than_asked_for_are_ranked_as_they_are() -> None:
    rows, _ = rank_classes(torch.eye(2), [ClassBlock(0, 3, lambda d, c: torch.ones(len(d), 3)[:, c])], top_k=20)
    assert rows.shape == (2, 3)


class MeanColour(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(images.mean(dim=(2, 3)), dim=1)


def test_descriptors_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    folder = write_queries(tmp_path / "q")
    queries = list_queries(folder, ZONE)
    described = [
        describe_queries(
            MeanColour(), queries.paths, shorter_side=24, batch_size=size, device=torch.device("cpu"), threads=1
        )
        for size in (1, 7)
    ]
    torch.testing.assert_close(described[0].vectors, described[1].vectors, atol=1e-6, rtol=0)
    assert described[0].readable.all()


def test_a_batch_that_a_gpu_has_no_room_for_is_one_line_with_its_size() -> None:
    class Full(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    batch = QueryBatch(np.arange(5), np.zeros((5, 32, 48, 3), np.uint8))
    with pytest.raises(JobError, match=r"for 5 photos of 48 x 32 pixels at once; give fewer by --batch-size"):
        describe_batches(Full(), [batch], 5, device=torch.device("cpu"))
