"""evaluation/evaluate.py as a user runs it: its files, what it leaves out and says, and its exit codes."""

import csv
import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import utm
from PIL import Image
from tiny import ROOT, SOUTH, WEST, ZONE, class_table, photo
from tiny_run import evaluate_here, write_run

from evaluation.localiser import Localiser
from evaluation.query_set import Settings, evaluate_set
from shards.console import JobError, WrongArguments
from shards.names import PhotoName, format_name, parse_name
from training.checkpoint import load_for_evaluation
from training.distributed import World
from training.queries import list_queries


def test_a_row_has_lr_at_n_beside_chance_and_ceiling(
    run_and_queries: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, queries = run_and_queries
    assert evaluate_here(monkeypatch, "--checkpoints", run, "--queries", queries, "--out", tmp_path / "o") == 0
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    (row,) = results["rows"]
    assert (row["checkpoint"], row["queries"], row["form"]) == (str(run), str(queries), "cosine")
    assert row["lr_at_1"] > 80
    assert row["lr_at_5"] == row["lr_at_10"] == row["lr_at_20"] == row["ceiling"] == 100
    assert row["lr_at_1"] == row["forms"]["cosine"]["lr_at_1"]
    assert row["forms"]["raw"]["lr_at_1"] > 80
    # Between one and five of the sixteen centres lie within 25 m of a photo near a cell's middle.
    assert 100 / 16 <= row["chance"]["lr_at_1"] <= 500 / 16
    assert row["chance"]["lr_at_20"] == 100
    assert row["scored"] == row["photos"] == 32
    assert row["weights"] == load_for_evaluation(run).fingerprint
    assert row["median_error_m"] == pytest.approx(np.hypot(2, 2), abs=1e-3)
    assert sum(line["queries"] for line in row["by_group"]) == 32
    assert row["queries_per_second"] > 0
    assert row["latency_ms"] > 0
    assert results["provenance"]["command"].startswith("evaluate.py")
    printed = capsys.readouterr().out
    assert "chance" in printed
    assert f"{row['lr_at_1']:.1f}" in printed


def test_the_outcome_of_a_checkpoint_lets_its_weights_go(run_and_queries: tuple[Path, Path]) -> None:
    run, folder = run_and_queries
    device = torch.device("cpu")
    localiser = Localiser.load(run, device)
    heads = [weakref.ref(head.weight) for head in localiser.heads.values()]
    outcome = evaluate_set(localiser, "run", list_queries(folder, ZONE), "cosine", Settings(), World(0, 1, device))
    del localiser
    gc.collect()
    assert outcome is not None
    assert outcome.row()["lr_at_1"] > 80
    assert not any(head() is not None for head in heads)


def test_csv_and_parquet_say_the_same_as_json(
    run_and_queries: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, queries = run_and_queries
    evaluate_here(monkeypatch, "--checkpoints", run, "--queries", queries, "--out", tmp_path, "--no-report")
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    (line,) = csv.DictReader((tmp_path / "results.csv").open())
    assert float(line["lr_at_1"]) == row["lr_at_1"]
    assert float(line["chance_lr_at_5"]) == row["chance"]["lr_at_5"]
    assert float(line["raw_lr_at_1"]) == row["forms"]["raw"]["lr_at_1"]
    table = pq.read_table(tmp_path / "predictions.parquet")
    assert len(table) == 32
    errors = table["error_m"].to_numpy()
    assert 100 * np.mean(errors <= 25) == row["lr_at_1"]
    expected = np.hypot(
        table["predicted_east"].to_numpy() - table["true_east"].to_numpy(),
        table["predicted_north"].to_numpy() - table["true_north"].to_numpy(),
    )
    np.testing.assert_allclose(errors, expected, rtol=1e-5)
    within = 100 * np.mean(expected <= table["uncertainty_m"].to_numpy())
    assert float(line["percent_within_radius"]) == row["percent_within_radius"] == pytest.approx(within)
    assert not (tmp_path / "report.html").exists()


def test_photos_that_cannot_be_scored_are_said_and_left_out(
    run_and_queries: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, queries = run_and_queries
    folder = shutil.copytree(queries, tmp_path / "q")
    good = sorted(folder.iterdir())[0]
    (folder / "plain.jpg").write_bytes(good.read_bytes())
    (folder / f"@{WEST + 9}@{SOUTH + 9}@cut@.jpg").write_bytes(good.read_bytes()[:400])
    (folder / format_name(PhotoName(381523.0, 3946790.0, 54, "S"))).write_bytes(good.read_bytes())
    assert evaluate_here(monkeypatch, "--checkpoints", run, "--queries", folder, "--out", tmp_path / "o") == 0
    (row,) = json.loads((tmp_path / "o" / "results.json").read_text())["rows"]
    assert (row["scored"], row["photos"]) == (32, 35)
    assert (row["unlocated"], row["unreadable"], row["set_aside"]) == (1, 1, 1)
    assert row["lr_at_1"] > 80
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert any("plain.jpg" in line and "no coordinates" in line for line in said)
    assert any("cut" in line and "unreadable" in line for line in said)
    assert any("zone 54" in line for line in said)
    predictions = pq.read_table(tmp_path / "o" / "predictions.parquet").to_pylist()
    (plain,) = (p for p in predictions if p["photo"] == "plain.jpg")
    assert plain["readable"]
    assert plain["predicted_latitude"] == pytest.approx(37.7, abs=0.2)
    assert plain["error_m"] is None
    (cut,) = (p for p in predictions if "cut" in p["photo"])
    assert cut["predicted_east"] is None
    assert cut["labels"] is None


def test_queries_whose_names_say_nothing_are_told_of_lists(
    run_and_queries: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, queries = run_and_queries
    (tmp_path / "q").mkdir()
    shutil.copy(next(queries.iterdir()), tmp_path / "q" / "IMG_1.jpg")
    words = ["--checkpoints", run, "--no-report", "--out", tmp_path / "o", "--queries"]
    assert evaluate_here(monkeypatch, *words, tmp_path / "q") == 1
    advice = "where names say nothing, give a list with path, latitude, longitude (docs/own-data.md)"
    assert f"no readable query with coordinates, so no LR@N; {advice}" in capsys.readouterr().err
    (tmp_path / "l.csv").write_text("path,latitude,longitude\nq/IMG_1.jpg,37.7 N,122.4 W\n")
    assert evaluate_here(monkeypatch, *words, tmp_path / "l.csv") == 1
    said = capsys.readouterr().err
    assert "IMG_1.jpg: predicted but not scored: no coordinates (latitude=37.7 N, longitude=122.4 W; " in said
    assert advice not in said


def test_a_query_of_a_neighbouring_zone_is_a_note_for_all_checkpoints_and_no_problem(
    run_and_queries: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, folder = run_and_queries
    query = next(folder.iterdir())
    name = parse_name(query.name)
    latitude, longitude = utm.to_latlon(name.east, name.north, ZONE, "S")
    east, north, _, _ = utm.from_latlon(latitude, longitude, force_zone_number=ZONE + 1)
    (tmp_path / "q").mkdir()
    shutil.copy(query, tmp_path / "q" / f"@{east}@{north}@{ZONE + 1}@S@.jpg")
    runs = run, shutil.copytree(run, tmp_path / "again")
    assert evaluate_here(monkeypatch, "--checkpoints", *runs, "--queries", tmp_path / "q", "--out", tmp_path / "o") == 0
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert (results["rows"][0]["reprojected"], results["rows"][0]["lr_at_20"], results["problems"]) == (1, 100, [])
    said = f"note: {tmp_path / 'q'}: 1 photo of a neighbouring UTM zone reprojected to {ZONE}\n"
    assert capsys.readouterr().err == said


def test_what_cannot_be_evaluated_is_one_line_and_the_rest_goes_on(
    run_and_queries: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, queries = run_and_queries
    empty = tmp_path / "empty"
    empty.mkdir()
    unnamed = tmp_path / "unnamed"
    unnamed.mkdir()
    shutil.copy(next(queries.iterdir()), unnamed / "a.jpg")
    damaged = shutil.copytree(run, tmp_path / "damaged")
    next(damaged.rglob("model.safetensors")).write_bytes(b"")
    words = [
        "--checkpoints",
        tmp_path / "none",
        damaged,
        run,
        "--queries",
        empty,
        unnamed,
        queries,
        "--out",
        tmp_path / "o",
    ]
    assert evaluate_here(monkeypatch, *words) == 1
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert [Path(row["queries"]).name for row in results["rows"]] == ["unnamed", "queries"]
    assert results["rows"][0]["lr_at_1"] is None
    assert results["rows"][1]["lr_at_1"] > 80
    assert results["failed"] == 2 * 3 + 2
    said = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("error: ") for line in said) == 4
    assert results["problems"] == said
    assert (tmp_path / "o" / "report.html").exists()


def test_queries_of_a_list_are_answered_as_those_of_a_folder(
    run_and_queries: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, queries = shutil.copytree(run_and_queries[0], tmp_path / "run"), run_and_queries[1]
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = ["path,east,north"]
    for number, query in enumerate(sorted(queries.iterdir())):
        known = parse_name(query.name)
        shutil.copy(query, folder / f"IMG_{number}.jpg")
        rows.append(f"photos/IMG_{number}.jpg,{known.east},{known.north}")
    listed = tmp_path / "queries.csv"
    listed.write_text("\n".join([*rows, "photos/IMG_0.jpg,,", "photos/IMG_99.jpg,548900,4178200"]))
    words = ["--checkpoints", run, "--queries", queries, listed, "--val-queries", listed, "--out", tmp_path / "o"]
    assert evaluate_here(monkeypatch, *words) == 0
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    by_name, by_list = results["rows"]
    assert by_list["queries"] == str(listed)
    assert (by_list["scored"], by_list["unlocated"], by_list["unreadable"]) == (32, 1, 1)
    assert (by_name["fitted"], by_list["fitted"]) == (True, True)  # the same photos by other names
    for name in ("lr_at_1", "lr_at_20", "median_error_m", "ceiling", "by_group"):
        assert by_list[name] == by_name[name], name
    table = pq.read_table(tmp_path / "o" / "predictions.parquet")
    assert table["photo"].to_pylist()[32:35] == ["photos/IMG_0.jpg", "photos/IMG_1.jpg", "photos/IMG_2.jpg"]
    assert "photos/IMG_31.jpg" in (tmp_path / "o" / "report.html").read_text()


def test_a_name_that_is_not_utf_8_is_written_with_its_bytes_escaped(
    run_and_queries: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, queries = run_and_queries
    photo = min(queries.iterdir())
    folder = tmp_path / "queries"
    folder.mkdir()
    shutil.copy(
        os.fsencode(photo), os.fsencode(folder) + b"/" + os.fsencode(photo.name).replace(b"@.jpg", b"@\xff@.jpg")
    )
    assert evaluate_here(monkeypatch, "--checkpoints", run, "--queries", folder, "--out", tmp_path / "o") == 0
    table = pq.read_table(tmp_path / "o" / "predictions.parquet")
    assert table["photo"].to_pylist() == [photo.name.replace("@.jpg", r"@\xff@.jpg")]
    assert table["scored"].to_pylist() == [True]
    assert r"\\xff" in (tmp_path / "o" / "report.html").read_text()


def test_without_a_row_earlier_results_stay_as_they_were(
    run_and_queries: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, queries = run_and_queries
    assert evaluate_here(monkeypatch, "--checkpoints", run, "--queries", queries, "--out", tmp_path, "--no-report") == 0
    before = (tmp_path / "results.json").read_bytes()
    photo = next(queries.iterdir())
    assert evaluate_here(monkeypatch, "--checkpoints", run, "--queries", photo, "--out", tmp_path) == 1
    assert evaluate_here(monkeypatch, "--checkpoints", tmp_path, "--queries", queries, "--out", tmp_path) == 1
    with pytest.raises(JobError, match="no finished data set"):
        evaluate_here(monkeypatch, "--checkpoints", run, "--queries", queries, "--out", tmp_path, "--shards", queries)
    said = capsys.readouterr().err
    assert f"error: {photo}: a file; name the folder of photos that holds it" in said
    assert f"error: {tmp_path}: no checkpoint of this project (it has no files.json); name a run" in said
    assert "nothing is written" in said
    assert (tmp_path / "results.json").read_bytes() == before
    assert not (tmp_path / "report.html").exists()


def test_a_report_of_earlier_results_does_not_stay_beside_new_ones(
    run_and_queries: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, queries = run_and_queries
    words = ["--checkpoints", run, "--queries", queries, "--out", tmp_path]
    evaluate_here(monkeypatch, *words)
    assert (tmp_path / "report.html").exists()
    evaluate_here(monkeypatch, *words, "--no-report", "--ns", 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["predictions.parquet", "results.csv", "results.json"]


def test_n_and_threshold_can_be_chosen(
    run_and_queries: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, queries = run_and_queries
    words = [
        "--checkpoints",
        run,
        "--queries",
        queries,
        "--out",
        tmp_path,
        "--ns",
        3,
        1,
        "--threshold",
        1,
        "--no-report",
    ]
    assert evaluate_here(monkeypatch, *words) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [name for name in row if name.startswith("lr_at")] == ["lr_at_1", "lr_at_3"]
    assert row["lr_at_3"] == row["ceiling"] == 0  # photos are taken 2.8 m from the centres


def test_class_maps_in_another_place_have_no_answer_within_reach(
    run_and_queries: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_run(tmp_path / "run", class_table(shift=50))
    words = ["--checkpoints", other, "--queries", run_and_queries[1], "--out", tmp_path / "o", "--no-report"]
    assert evaluate_here(monkeypatch, *words) == 0
    (row,) = json.loads((tmp_path / "o" / "results.json").read_text())["rows"]
    assert row["ceiling"] == row["lr_at_20"] == row["chance"]["lr_at_20"] == 0
    assert row["outside_every_class"] == 100
    assert row["median_error_m"] > 900


def test_queries_from_both_sides_of_the_equator_are_scored_in_the_plane_of_the_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes = class_table()
    classes = replace(classes, cell_north=classes.cell_north - SOUTH, zone=36)
    run, queries = write_run(tmp_path / "run", classes), tmp_path / "q"
    queries.mkdir()
    for north, band in ((9999995.0, "M"), (5.0, "N")):
        name = format_name(PhotoName(WEST + 5.0, north, 36, band, pano=f"{band}"))
        Image.fromarray(photo(WEST, 0, 32, 0)).save(queries / name)
    words = ["--checkpoints", run, "--queries", queries, "--out", tmp_path / "o", "--no-report"]
    assert evaluate_here(monkeypatch, *words) == 0
    table = pq.read_table(tmp_path / "o" / "predictions.parquet")
    assert sorted(table["true_north"].to_pylist()) == [-5, 5]
    assert table["error_m"].to_numpy().max() < 100
    assert np.abs(table["predicted_latitude"].to_numpy()).max() < 1e-3


def test_an_output_folder_that_holds_a_data_set_or_is_a_file_is_refused(
    run_and_queries: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, queries = run_and_queries
    for name in ("dataset.json", "classes.parquet"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(JobError, match="holds a data set"):
        evaluate_here(monkeypatch, "--checkpoints", run, "--queries", queries, "--out", tmp_path)
    with pytest.raises(JobError, match="lies in a data set"):
        evaluate_here(monkeypatch, "--checkpoints", run, "--queries", queries, "--out", tmp_path / "index" / "new")
    with pytest.raises(JobError, match="is a file"):
        evaluate_here(monkeypatch, "--checkpoints", run, "--queries", queries, "--out", tmp_path / "dataset.json")


@pytest.mark.parametrize(
    "words", [["--ns", "0"], ["--threshold", "-1"], ["--threshold", "inf"], ["--batch-size", "0"], ["--forms", "best"]]
)
def test_wrong_arguments_are_named(
    run_and_queries: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    run, queries = run_and_queries
    with pytest.raises((SystemExit, WrongArguments), match=f"^2$|^{words[0]}: "):
        evaluate_here(monkeypatch, "--checkpoints", run, "--queries", queries, "--out", tmp_path, *words)


@pytest.mark.slow
def test_two_processes_give_the_row_of_one(run_and_queries: tuple[Path, Path], tmp_path: Path) -> None:
    run, queries = run_and_queries
    words = [
        "evaluation/evaluate.py",
        "--checkpoints",
        tmp_path / "none",
        run,
        "--queries",
        queries,
        "--cpu",
        "--no-report",
    ]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", "localhost:0"]
    rows = []
    for command, out in (([], tmp_path / "one"), (launch, tmp_path / "two")):
        done = subprocess.run(
            [sys.executable, *command, *map(str, words), "--out", str(out)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 1
        assert done.stderr.count("error: ") == 1
        rows.append(json.loads((out / "results.json").read_text())["rows"][0])
    assert (rows[0]["processes"], rows[1]["processes"]) == (1, 2)
    for name in ("lr_at_1", "lr_at_20", "forms", "scored", "median_error_m", "by_group"):
        assert rows[0][name] == rows[1][name]
