"""evaluation/retrieve.py as a user runs it."""

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
import utm
from photos import with_spoilt_footer
from test_searchers import unit
from tiny import write_dataset, write_queries
from tiny_run import write_run
from torch import nn

from evaluation import gallery as gallery_file
from evaluation import retrieve
from evaluation.gallery import read_descriptors
from shards.console import JobError, WrongArguments
from shards.layout import shard_tables
from shards.names import parse_name
from training.queries import QueryBatch
from training.scoring import Descriptors, describe_batches

METHODS = ("exhaustive", "ivf", "hnsw", "best-of-cells", "within-cells")


_FLAGS, _METHOD = 8, 10  # where a zip's directory has an entry's flags (1: encrypted) and way of compression


def unreadable_zip(path: Path, field: int) -> bytes:
    """A zip file with a bit of a field in its directory flipped, so that `zipfile` refuses to read its first entry."""
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"PK\x01\x02") + field] ^= 1
    return bytes(damaged)


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


def test_queries_that_are_among_the_database_images_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, database = write_run(tmp_path / "run"), write_queries(tmp_path / "database", each=3)
    words = ["--checkpoint", run, "--database", database, "--out", tmp_path / "out"]
    run_here(monkeypatch, *words, "--queries", database)
    assert "note: 48 of 48 queries lie at the very place of a database image" in capsys.readouterr().err
    rows = [
        f"{photo},{parse_name(photo.name).east + 0.01},{parse_name(photo.name).north}" for photo in database.iterdir()
    ]
    moved = tmp_path / "moved.csv"
    moved.write_text("\n".join(["path,east,north", *rows]))
    run_here(monkeypatch, *words, "--queries", moved)
    assert "very place" not in capsys.readouterr().err


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


def test_kept_descriptors_take_a_name_s_own_length_and_those_of_earlier_versions_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, queries = write_run(tmp_path / "run"), write_queries(tmp_path / "queries")
    database = write_queries(tmp_path / "database", each=3)
    (database / ("folder" * 40)).mkdir()
    deep = min(database.glob("*.jpg"))
    deep.rename(database / ("folder" * 40) / deep.name)
    words = ["--checkpoint", run, "--database", database, "--queries", queries, "--out", tmp_path / "out"]
    run_here(monkeypatch, *words)
    made = tmp_path / "out" / "database.npz"
    names = read_descriptors(made).names
    assert set(names) == {str(path.relative_to(database)) for path in database.rglob("*.jpg")}
    arrays = dict(np.load(made))
    assert arrays["names"].nbytes < 2 * sum(map(len, names))
    np.savez(made, **arrays | {"names": np.array(names)})
    run_here(monkeypatch, *words)
    assert "48 descriptors made before" in capsys.readouterr().err
    assert read_descriptors(made).names == names


@pytest.mark.parametrize("field", [_METHOD, _FLAGS])
def test_descriptors_whose_file_was_damaged_are_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], field: int
) -> None:
    run, database = write_run(tmp_path / "run"), write_queries(tmp_path / "photos")
    words = ["--checkpoint", run, "--database", database, "--queries", database, "--out", tmp_path / "out"]
    run_here(monkeypatch, *words)
    made = tmp_path / "out" / "database.npz"
    made.write_bytes(unreadable_zip(made, field))
    run_here(monkeypatch, *words)
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
        f"{database}: the descriptors of 48 photos and their copy for a search take 12.3 kB of memory, and 8.2 kB may "
        "be used here, which holds 32; name fewer photos: a folder of a part of the city, or a list (.csv, .parquet)"
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
    (tmp_path / "l.npz").write_bytes(unreadable_zip(tmp_path / "c.npz", _METHOD))
    (tmp_path / "m.npz").write_bytes(unreadable_zip(tmp_path / "c.npz", _FLAGS))
    (tmp_path / "j.npy").write_bytes(b"")
    (tmp_path / "k.jpg").write_bytes(b"a photo")
    for name in (*(f"{letter}.npz" for letter in "acdefghilm"), "b.npy", "j.npy", "k.jpg"):
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
    with pytest.raises(JobError, match="no readable photo with coordinates; where names say nothing, give a list"):
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
