"""Retrieval within cells against brute force, and evaluation/retrieve.py as a user runs it."""

import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import tyro
import utm
from photos import with_spoilt_footer
from tiny import SOUTH, WEST, class_table, write_dataset, write_queries
from tiny_run import store_calibration, write_run
from torch import nn

from evaluation import gallery as gallery_file
from evaluation import retrieve
from evaluation.cell_index import CellIndex
from evaluation.gallery import Gallery, Images, read_descriptors
from evaluation.localiser import Localiser
from evaluation.ranking import RankingForm
from evaluation.searchers import BestOfCells, CellSearcher, FaissSearcher
from shards.console import JobError, WrongArguments
from shards.layout import shard_tables
from shards.names import parse_name
from training.heads import HeadKind, ScoreForm
from training.queries import QueryBatch
from training.scoring import Descriptors, describe_batches

METHODS = ("exhaustive", "ivf", "hnsw", "best-of-cells", "within-cells")


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


def run_here(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["retrieve.py", *map(str, words), "--methods", *METHODS])
    retrieve.main()


@pytest.mark.parametrize("kind", ["photos", "shards", "shards at a URL"])
def test_a_table_compares_the_ways_of_searching(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    monkeypatch.setenv("DIVIDE_AND_CLASSIFY_CACHE", str(tmp_path / "cache"))
    run, queries = write_run(tmp_path / "run"), write_queries(tmp_path / "queries")
    from_shards = kind != "photos"
    if from_shards:
        place = write_dataset(tmp_path / "shards").path
        database = f"file://{place}" if kind.endswith("URL") else str(place)
    else:
        folder = write_queries(tmp_path / "database", each=3)
        (folder / "plain.jpg").write_bytes(next(queries.iterdir()).read_bytes())
        database = str(folder)
    words = ["--checkpoint", run, "--database", database, "--queries", queries, "--out", tmp_path / "out"]
    run_here(monkeypatch, *words)
    rows = json.loads((tmp_path / "out" / "retrieval.json").read_text())["rows"]
    assert [row["name"] for row in rows] == list(METHODS)
    within = rows[-1]
    assert within["r_at_1"] > 80
    assert within["images"] == (160 if from_shards else 48)
    assert within["milliseconds_per_query"] > 0
    said = capsys.readouterr()
    assert "within-cells" in said.out
    if not from_shards:
        assert "1 photo left out" in said.err
        run_here(monkeypatch, *words)
        assert "48 descriptors made before" in capsys.readouterr().err


def test_a_database_may_be_a_list_and_is_described_again_once_it_or_its_photos_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, queries = write_run(tmp_path / "run"), write_queries(tmp_path / "queries")
    photos = sorted(write_queries(tmp_path / "photos", each=3).iterdir())
    (tmp_path / "lists").mkdir()
    listed = tmp_path / "lists" / "database.csv"
    rows = ["path,east,north"]
    for number, photo in enumerate(photos):
        rows.append(f"../photos/{number}.jpg,{parse_name(photo.name).east},{parse_name(photo.name).north}")
        photo.rename(photo.parent / f"{number}.jpg")
    listed.write_text("\n".join(rows))
    words = ["--checkpoint", run, "--queries", queries, "--out", tmp_path / "out"]

    def made_before(database: Path) -> bool:
        run_here(monkeypatch, *words, "--database", database)
        found = json.loads((tmp_path / "out" / "retrieval.json").read_text())["rows"]
        assert (found[-1]["images"], found[-1]["r_at_1"] > 80) == (48, True)
        return "48 descriptors made before" in capsys.readouterr().err

    assert not made_before(listed)
    monkeypatch.chdir(tmp_path)
    assert made_before(Path("lists/database.csv"))
    photo = tmp_path / "photos" / "7.jpg"
    os.utime(photo, ns=(0, 0))
    assert not made_before(listed)
    assert made_before(listed)
    listed.write_text("\n".join(rows[:2] + rows[:1:-1]))
    assert not made_before(listed)


def test_photos_of_a_linked_folder_are_described_again_once_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, queries = write_run(tmp_path / "run"), write_queries(tmp_path / "queries")
    photos = sorted(write_queries(tmp_path / "photos", each=3).iterdir())
    (tmp_path / "database").mkdir()
    (tmp_path / "database" / "linked").symlink_to(tmp_path / "photos")
    words = ["--checkpoint", run, "--database", tmp_path / "database", "--queries", queries, "--out", tmp_path / "out"]
    run_here(monkeypatch, *words)
    photos[0].unlink()
    run_here(monkeypatch, *words)
    assert json.loads((tmp_path / "out" / "retrieval.json").read_text())["rows"][0]["images"] == 47
    assert "made before" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["photos", "shards"])
def test_an_interrupted_description_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    monkeypatch.setattr(gallery_file, "_PART", 20)
    run, queries = write_run(tmp_path / "run"), write_queries(tmp_path / "queries")
    if kind == "photos":
        database = write_queries(tmp_path / "database", each=3)
        min(database.iterdir()).write_bytes(b"no photo")
    else:
        database = write_dataset(tmp_path / "database", images=3).path
        tar = shard_tables(database)[0].with_suffix(".tar")
        tar.write_bytes(tar.read_bytes()[:2000])
    words = ["--checkpoint", run, "--database", database, "--queries", queries]
    run_here(monkeypatch, *words, "--out", tmp_path / "whole")
    left_out = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert left_out
    counts: list[int] = []

    def describe(model: nn.Module, batches: Iterable[QueryBatch], count: int, **options: Any) -> Descriptors:
        counts.append(count)
        if len(counts) == 3:
            raise KeyboardInterrupt
        return describe_batches(model, batches, count, **options)

    monkeypatch.setattr(gallery_file, "describe_batches", describe)
    words += ["--out", tmp_path / "out"]
    with pytest.raises(KeyboardInterrupt):
        run_here(monkeypatch, *words)
    assert not (tmp_path / "out" / "database.npz").exists()
    capsys.readouterr()
    run_here(monkeypatch, *words)
    assert counts == [16, 20, 20, 16, 20, 8]  # queries and parts, interrupted in the second; queries and the rest
    assert [line for line in capsys.readouterr().err.splitlines() if "left out" in line] == left_out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["database.npz", "retrieval.json"]
    once, twice = (np.load(tmp_path / out / "database.npz") for out in ("whole", "out"))
    for name in ("names", "east", "north", "descriptors"):
        np.testing.assert_array_equal(once[name], twice[name])


@pytest.mark.parametrize("kind", ["photos", "shards"])
def test_a_database_whose_descriptors_exceed_the_memory_is_refused_with_figures_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    run, queries = write_run(tmp_path / "run"), write_queries(tmp_path / "queries")
    folder = tmp_path / "database"
    database = write_queries(folder, each=3) if kind == "photos" else write_dataset(folder, images=3).path
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2}
    words = ["--checkpoint", run, "--database", database, "--queries", queries, "--out", tmp_path / "o"]
    monkeypatch.setattr(os, "sysconf", lambda name: sizes[name])
    with pytest.raises(JobError) as refused:
        run_here(monkeypatch, *words)
    assert str(refused.value) == (
        f"{database}: the descriptors of 48 photos and their copy for a search take 12.3 kB of memory and this machine "
        "has 8.2 kB, which holds 32; name fewer photos: a folder of a part of the city, or a list (.csv, .parquet)"
    )
    sizes["SC_PHYS_PAGES"] = 3
    run_here(monkeypatch, *words)


def test_names_of_descriptors_that_no_file_can_have_are_one_line(tmp_path: Path) -> None:
    for name, reason in (("\ud800\n.jpg", "no coordinates"), ("@5@6@54@S@\ud800\n@.jpg", "UTM zone 54")):
        np.savez(tmp_path / "d.npz", descriptors=np.ones((1, 5), np.float32), names=np.array([name]))
        with pytest.raises(JobError, match=rf"d\.npz: .*\\ud800\\n.*: {reason}"):
            read_descriptors(tmp_path / "d.npz", 10)


def test_damaged_shards_lose_their_photos_and_a_damaged_table_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, queries = write_run(tmp_path / "run"), write_queries(tmp_path / "queries")
    database = write_dataset(tmp_path / "shards").path
    first, second, *_ = shard_tables(database)
    tar = bytearray(first.with_suffix(".tar").read_bytes())
    tar[pq.read_table(first)["offset"][3].as_py() + 40] ^= 1
    first.with_suffix(".tar").write_bytes(tar)
    second.with_suffix(".tar").unlink()
    words = ["--checkpoint", run, "--database", database, "--queries", queries, "--out", tmp_path / "out"]
    run_here(monkeypatch, *words)
    assert json.loads((tmp_path / "out" / "retrieval.json").read_text())["rows"][0]["images"] == 160 - 1 - 40
    said = capsys.readouterr().err
    assert said.count("fails its checksum") == said.count("No such file") == 1
    assert "41 photos left out" in said
    whole = first.read_bytes()
    (tmp_path / "out" / "database.npz").unlink()
    for spoilt in (whole[:-9], with_spoilt_footer(whole)):
        first.write_bytes(spoilt)
        with pytest.raises(JobError, match=f"{first}: damaged"):
            run_here(monkeypatch, *words)


def test_descriptors_of_another_model_are_matched_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, queries = write_run(tmp_path / "run"), write_queries(tmp_path / "queries")
    names = np.array([path.name for path in sorted(queries.iterdir())])
    vectors = unit(np.random.default_rng(0), 16, 5) * 7
    np.savez(tmp_path / "database.npz", descriptors=vectors, names=names)
    np.save(tmp_path / "queries.npy", vectors[::-1])
    (tmp_path / "queries.txt").write_text("\n".join(names[::-1]))
    words = [
        "--checkpoint",
        run,
        "--database",
        tmp_path / "database.npz",
        "--queries",
        queries,
        "--out",
        tmp_path / "o",
    ]
    run_here(monkeypatch, *words, "--query-descriptors", tmp_path / "queries.npy", "--top-cells", 16)
    rows = json.loads((tmp_path / "o" / "retrieval.json").read_text())["rows"]
    assert rows[-1]["r_at_1"] == 100
    with pytest.raises(JobError, match="give --query-descriptors by the same model"):
        run_here(monkeypatch, *words)


def test_files_that_hold_no_descriptors_are_clear_errors(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_text("nothing")
    np.save(tmp_path / "b.npy", np.zeros((2, 3)))
    np.savez(tmp_path / "c.npz", descriptors=np.zeros((2, 3)), names=np.array(["@1@2@.jpg"]))
    np.savez(tmp_path / "d.npz", descriptors=np.zeros((1, 3)), names=np.array(["plain.jpg"]))
    np.savez(tmp_path / "e.npz", descriptors=np.array([{}], dtype=object), names=np.array(["@1@2@.jpg"]))
    two = np.array(["@1@2@.jpg", "@3@4@.jpg"])
    np.savez(tmp_path / "f.npz", descriptors=np.array([["a", "b"], ["c", "d"]]), names=two)
    np.savez(tmp_path / "g.npz", descriptors=np.array([[1.0, 2.0], [np.nan, 1.0]]), names=two)
    np.savez(tmp_path / "h.npz", descriptors=np.zeros((0, 3)), names=two[:0])
    (tmp_path / "i.npz").write_bytes((tmp_path / "g.npz").read_bytes()[:300])
    (tmp_path / "j.npy").write_bytes(b"")
    (tmp_path / "k.jpg").write_bytes(b"a photo")
    for name in ("a.npz", "b.npy", "c.npz", "d.npz", "e.npz", "f.npz", "g.npz", "h.npz", "i.npz", "j.npy", "k.jpg"):
        with pytest.raises(JobError, match=name):
            read_descriptors(tmp_path / name)
    with pytest.raises(JobError, match=r"the descriptor of @3@4@.jpg"):
        read_descriptors(tmp_path / "g.npz")


def test_names_beside_descriptors_are_read_as_written_in_bytes_with_empty_lines_or_a_byte_order_mark(
    tmp_path: Path,
) -> None:
    names, vectors = ["@1@2@.jpg", "@3@4@.jpg"], np.eye(2)
    np.savez(tmp_path / "a.npz", descriptors=vectors, names=np.array([name.encode() for name in names]))
    np.save(tmp_path / "b.npy", vectors)
    (tmp_path / "b.txt").write_bytes("\r\n".join([*names, "", ""]).encode())
    np.save(tmp_path / "c.npy", vectors)
    (tmp_path / "c.txt").write_text("\n".join(names), encoding="utf-8-sig")
    for file in ("a.npz", "b.npy", "c.npy"):
        assert list(read_descriptors(tmp_path / file).names) == names


def test_the_images_of_descriptors_are_brought_into_the_zone_of_the_classes(tmp_path: Path) -> None:
    near, far = "@0016000.00@4178385.50@11@S@.jpg", "@0548916.37@4178385.50@33@S@.jpg"
    np.savez(tmp_path / "near.npz", descriptors=np.eye(1), names=np.array([near]))
    east, north, _, _ = utm.from_latlon(*utm.to_latlon(16000.0, 4178385.5, 11, "S", strict=False), force_zone_number=10)
    images = read_descriptors(tmp_path / "near.npz", zone=10)
    assert (images.east[0], images.north[0]) == (pytest.approx(east), pytest.approx(north))
    np.savez(tmp_path / "far.npz", descriptors=np.eye(1), names=np.array([far]))
    with pytest.raises(JobError, match=r"far\.npz: @0548916.*: UTM zone 33, the classes lie in zone 10"):
        read_descriptors(tmp_path / "far.npz", zone=10)


def test_a_database_in_no_class_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, queries = write_run(tmp_path / "run"), write_queries(tmp_path / "queries")
    np.savez(tmp_path / "d.npz", descriptors=np.eye(64)[:40], names=np.array([f"@1{i}@2@.jpg" for i in range(40)]))
    names = np.array([path.name for path in queries.iterdir()])
    np.savez(tmp_path / "q.npz", descriptors=np.eye(64)[: len(names)], names=names)
    words = ["--checkpoint", run, "--database", tmp_path / "d.npz", "--queries", queries, "--out", tmp_path / "o"]
    words += ["--query-descriptors", tmp_path / "q.npz"]
    with pytest.raises(JobError, match=r"d\.npz: none of its 40 images lies in a cell of .*run"):
        run_here(monkeypatch, *words)


def test_descriptors_of_two_queries_of_one_name_are_told_apart_by_their_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, photos = write_run(tmp_path / "run"), write_queries(tmp_path / "photos")
    queries = tmp_path / "queries"
    for folder in ("a", "b"):
        shutil.copytree(photos, queries / folder)
    names = [str(path.relative_to(queries)) for path in sorted(queries.rglob("*.jpg"))]
    vectors = unit(np.random.default_rng(0), len(names), 64)
    database = [name for name in names if name.startswith("b")]
    np.savez(tmp_path / "d.npz", descriptors=vectors[len(names) // 2 :], names=np.array(database))
    np.savez(tmp_path / "q.npz", descriptors=vectors[::-1], names=np.array(names[::-1]))
    words = ["--checkpoint", run, "--database", tmp_path / "d.npz", "--queries", queries, "--out", tmp_path / "o"]
    run_here(monkeypatch, *words, "--query-descriptors", tmp_path / "q.npz")
    first = json.loads((tmp_path / "o" / "retrieval.json").read_text())["rows"][0]["r_at_1"]
    assert 50 <= first < 70  # those in b are their own images, those in a found by chance
    np.savez(tmp_path / "q.npz", descriptors=vectors, names=np.array([f"c/{Path(name).name}" for name in names]))
    with pytest.raises(JobError, match=r"q\.npz: 2 descriptors for the query a/@"):
        run_here(monkeypatch, *words, "--query-descriptors", tmp_path / "q.npz")


def test_bad_queries_are_told_before_the_database_is_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, photos = write_run(tmp_path / "run"), write_queries(tmp_path / "photos")
    (tmp_path / "plain").mkdir()
    shutil.copy(next(photos.iterdir()), tmp_path / "plain" / "a.jpg")
    words = ["--checkpoint", run, "--database", photos, "--out", tmp_path / "o"]
    with pytest.raises(JobError, match="no readable photo with coordinates"):
        run_here(monkeypatch, *words, "--queries", tmp_path / "plain")
    assert "a.jpg: left out: no coordinates in its name" in capsys.readouterr().err
    with pytest.raises(JobError, match=r"a\.jpg: a file; name the folder"):
        run_here(monkeypatch, *words, "--queries", tmp_path / "plain" / "a.jpg")
    assert list((tmp_path / "o").iterdir()) == []
    with pytest.raises(JobError, match="is a file; name a folder"):
        run_here(monkeypatch, *words[:-1], tmp_path / "plain" / "a.jpg", "--queries", photos)


def test_a_missing_faiss_is_told_before_anything_is_read_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)  # its import fails, as where it is not installed
    words = ["--checkpoint", tmp_path / "run", "--database", tmp_path / "d", "--queries", tmp_path / "q"]
    with pytest.raises(JobError, match=r"FAISS is not installed: pip install .*\[retrieval\]"):
        run_here(monkeypatch, *words, "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--top-cells", "0"], ["--threshold", "inf"], ["--batch-size", "0"]])
def test_wrong_arguments_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    places = ("--checkpoint", tmp_path, "--database", tmp_path, "--queries", tmp_path, "--out", tmp_path / "out")
    with pytest.raises(WrongArguments, match=f"^{words[0]}: "):
        run_here(monkeypatch, *places, *words)
