"""Ways of searching against brute force."""

from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from tiny import SOUTH, WEST, class_table
from tiny_run import store_calibration, write_run

from evaluation import retrieve
from evaluation.gallery import Gallery, Images
from evaluation.localiser import Localiser
from evaluation.ranking import RankingForm
from evaluation.searchers import BestOfCells, CellSearcher, FaissSearcher
from shards.cell_index import CellIndex
from training.heads import HeadKind, ScoreForm


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = rng.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.fixture
def gallery() -> Gallery:
    """Four hundred images over sixteen cells and their surroundings."""
    rng = np.random.default_rng(0)
    east, north = WEST + rng.uniform(-20, 100, 400), SOUTH + rng.uniform(-20, 100, 400)
    return Gallery.of(Images(unit(rng, 400, 24), east, north), CellIndex(class_table()))


def test_a_gallery_holds_each_cell_s_images_in_one_run(gallery: Gallery) -> None:
    index = CellIndex(class_table())
    rows = index.holding(gallery.images.east, gallery.images.north)
    for row in range(16):
        assert set(rows[gallery.starts[row] : gallery.starts[row + 1]]) <= {row}
    assert gallery.outside == (rows < 0).sum() > 0
    assert gallery.starts[16] == (rows >= 0).sum()


@pytest.mark.parametrize("with_bias", [False, True])
def test_within_cells_names_another_place_with_each_image(gallery: Gallery, with_bias: bool) -> None:
    """Brute force in float64: the best image of each top cell, a central one of those behind, all others; but for
    images that are as much alike within a byte's rounding."""
    rng = np.random.default_rng(1)
    weights = torch.from_numpy(unit(rng, 16, 8))
    bias = torch.from_numpy(rng.normal(size=16).astype(np.float32)) if with_bias else None
    searcher = CellSearcher(gallery, weights, bias, 3)
    images, tie = gallery.images, 0.02
    rows = CellIndex(class_table()).holding(images.east, images.north)
    inside = np.flatnonzero(rows >= 0)
    as_best = 0
    for vector, own in zip(unit(rng, 20, 24), unit(rng, 20, 8), strict=True):
        order = np.argsort(-(weights.numpy() @ own + (0 if bias is None else bias.numpy())))
        alike = images.vectors.astype(np.float64) @ vector
        central = []
        for row in order[3:]:
            of_cell = np.flatnonzero(rows == row)
            east, north = images.east[of_cell], images.north[of_cell]
            central.append(of_cell[np.argmin(np.hypot(east - east.mean(), north - north.mean()))])
        found = searcher.search(vector, own, 16)
        assert sorted(rows[found[:3]]) == sorted(order[:3])
        best = np.array([alike[rows == row].max() for row in rows[found[:3]]])
        assert (alike[found[:3]] >= best - tie).all()
        assert (np.diff(alike[found[:3]]) <= tie).all()
        as_best += (alike[found[:3]] == best).sum()
        np.testing.assert_array_equal(found[3:], central)
        np.testing.assert_array_equal(searcher.search(vector, own, 2), found[:2])
        others = np.setdiff1d(inside, found)
        expected = np.sort(alike[others])[::-1]
        for count in (40, 1000):
            more = searcher.search(vector, own, count)
            np.testing.assert_array_equal(more[:16], found)
            np.testing.assert_allclose(alike[more[16:]], expected[: count - 16], atol=tie)
            assert np.isin(more[16:], others).all()
            assert len(np.unique(more)) == len(more)
    assert as_best >= 57  # of 60: near ties are rare


@pytest.mark.parametrize("head", ["AAMC", "FC_CE"])
@pytest.mark.parametrize(("calibrated", "by"), [("raw", "raw"), ("cosine", "cosine"), ("zscore", "cosine")])
def test_within_cells_ranks_cells_by_the_form_that_prediction_uses_where_one_product_gives_it(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    head: HeadKind,
    calibrated: RankingForm,
    by: ScoreForm,
) -> None:
    run = write_run(tmp_path / "run", head=head, form="cosine")
    store_calibration(run, calibrated, 1.0)
    localiser = Localiser.load(run, torch.device("cpu"))
    centers = localiser.classes.centers()
    images = Images(unit(np.random.default_rng(0), 16, 32), centers[:, 0], centers[:, 1])
    words = ("--checkpoint", run, "--database", "d", "--queries", tmp_path, "--out", tmp_path, "--top-cells", 1)
    arguments = tyro.cli(retrieve.Arguments, args=[str(word) for word in words])
    searcher = retrieve.searcher_of("within-cells", localiser, Gallery.of(images, localiser.index), arguments)
    assert ("cosine scores; zscore ones are no single product" in capsys.readouterr().err) == (calibrated == "zscore")
    for vector in unit(np.random.default_rng(1), 10, 32):
        expected = localiser.answer(torch.from_numpy(vector[None]), forms=[by], top_k=16)[by].rows[0]
        np.testing.assert_array_equal(searcher.search(vector, vector, 16), expected)


def test_a_byte_a_number_names_the_photo_that_is_most_alike_but_for_near_ties() -> None:
    rng = np.random.default_rng(6)
    classes = class_table()
    east, north = classes.centers().repeat(300, axis=0).T
    skewed = np.abs(rng.normal(size=(4_800, 256))).astype(np.float32) ** 3  # a few large numbers, as after pooling
    images = Images(skewed / np.linalg.norm(skewed, axis=1, keepdims=True), east, north)
    gallery = Gallery.of(images, CellIndex(classes))
    searcher = CellSearcher(gallery, torch.from_numpy(unit(rng, 16, 8)), None, 16)
    vectors = gallery.images.vectors
    lost = []
    for query in np.abs(rng.normal(size=(50, 256))).astype(np.float32) ** 3:
        query /= np.linalg.norm(query)
        found = searcher.search(query, unit(rng, 8), 16)
        lost.append(np.max(vectors @ query) - vectors[found[0]] @ query)
    assert max(lost) < 0.005
    assert np.mean(np.array(lost) < 1e-6) > 0.85


def test_within_cells_does_not_count_cells_without_images(gallery: Gallery) -> None:
    rows = CellIndex(class_table()).holding(gallery.images.east, gallery.images.north)
    kept = np.flatnonzero(~np.isin(rows, [2, 5]))
    images = Images(gallery.images.vectors[kept], gallery.images.east[kept], gallery.images.north[kept])
    emptier = Gallery.of(images, CellIndex(class_table()))
    rng = np.random.default_rng(4)
    weights = unit(rng, 16, 8)
    found = CellSearcher(emptier, torch.from_numpy(weights), None, 3).search(unit(rng, 24), weights[5], 14)
    held = CellIndex(class_table()).holding(images.east[found], images.north[found])
    order = [row for row in np.argsort(-(weights @ weights[5])) if row not in (2, 5)]
    assert set(held[:3]) == set(order[:3])
    assert held[3:].tolist() == order[3:]


@pytest.mark.parametrize("kind", ["exhaustive", "ivf", "hnsw"])  # of 400 images IVF visits all lists
def test_searches_of_few_images_are_brute_force_over_everything(gallery: Gallery, kind: str) -> None:
    searcher = FaissSearcher(gallery, kind)
    for vector in unit(np.random.default_rng(2), 10, 24):
        best = np.argsort(-(gallery.images.vectors @ vector))[:7]
        np.testing.assert_array_equal(searcher.search(vector, vector, 7), best)
        np.testing.assert_array_equal(searcher.search(np.repeat(vector, 2)[::2], vector, 7), best)  # not contiguous
        many = searcher.search(vector, vector, 500)
        assert len(np.unique(many)) == len(many) > 350
        assert many.min() >= 0


def test_best_of_cells_is_brute_force_with_the_best_image_of_each_cell_of_the_grid(gallery: Gallery) -> None:
    images = gallery.images
    cells = list(zip(images.east // 20, images.north // 20, strict=True))
    assert len(set(cells)) > 16  # some are no class
    searcher = BestOfCells(gallery)
    for vector in unit(np.random.default_rng(2), 10, 24):
        expected: dict[tuple[float, float], int] = {}
        for i in np.argsort(-(images.vectors.astype(np.float64) @ vector)):
            expected.setdefault(cells[i], i)
        for count in (1, 20, 1000):
            np.testing.assert_array_equal(searcher.search(vector, vector, count), list(expected.values())[:count])
