"""Exported models answer as the checkpoint does."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import ROOT, fill, small_disk, write_queries
from tiny_run import evaluate_here, store_calibration, write_run

from evaluation import export
from evaluation.localiser import Localiser
from evaluation.ranking import RankingForm
from shards.console import JobError, WrongArguments
from shards.dataset import Dataset
from training.checkpoint import load_checkpoint, load_for_evaluation, save_checkpoint
from training.heads import HeadKind, ScoreForm
from training.queries import decode_query


def export_here(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
    export.main()


def answer_of(localiser: Localiser, photo: Path) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """The photo as an exported model takes it, and the checkpoint's own scores and confidences in table order."""
    pixels = torch.from_numpy(decode_query(photo, localiser.shorter_side).copy())
    count = len(localiser.classes)
    answers = localiser.answer(localiser.describe([photo]).vectors, top_k=count)[localiser.form]
    scores, confidence = np.empty((2, count), np.float32)
    scores[answers.rows[0]], confidence[answers.rows[0]] = answers.scores[0], answers.confidence[0]
    return pixels.permute(2, 0, 1)[None].float() / 255, scores, confidence


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("to", ["onnx", "torchscript"])
@pytest.mark.parametrize(
    ("head", "form", "calibrated"),
    [
        ("AAMC", "cosine", None),
        ("AAMC", "raw", None),
        ("FC_CE", "raw", None),
        ("AAMC", "cosine", "raw"),
        ("LMCC", "raw", "cosine"),
        ("FC_CE", "raw", "cosine"),
        ("AAMC", "raw", "zscore"),
        ("FC_CE", "raw", "softmax"),
        ("AAMC", "raw", "softmax"),
    ],
)
def test_an_exported_model_scores_a_photo_as_the_checkpoint_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, head: HeadKind, form: ScoreForm, calibrated: RankingForm
) -> None:
    run = write_run(tmp_path / "run", head=head, form=form)
    if calibrated:
        store_calibration(run, calibrated, 3.0)
    localiser = Localiser.load(run, torch.device("cpu"))
    photo = next(write_queries(tmp_path / "queries", size=48).iterdir())
    Image.open(photo).crop((0, 0, 48, 40)).save(photo)
    images, expected, confidence = answer_of(localiser, photo)
    if to == "onnx":
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
        export_here(monkeypatch, run, "--to", to, "--out", tmp_path / "out")
        scores, probabilities = runtime.InferenceSession(str(tmp_path / "out" / "model.onnx")).run(
            ["scores", "probabilities"], {"images": images.numpy()}
        )
    else:
        export_here(monkeypatch, run, "--to", to, "--out", tmp_path / "out")
        _, scores, probabilities = (part.numpy() for part in torch.jit.load(tmp_path / "out" / "model.pt")(images))
    np.testing.assert_allclose(scores[0], expected, rtol=1e-5, atol=1e-4)
    assert np.ptp(confidence) > 0.1
    lines = list(csv.DictReader((tmp_path / "out" / "classes.csv").open()))
    assert [float(line["east"]) for line in lines] == localiser.classes.center_east.tolist()
    centers = np.array([[float(line["east"]), float(line["north"])] for line in lines])
    near = np.linalg.norm(centers[:, None] - centers, axis=2) <= 25
    np.testing.assert_allclose(near @ probabilities[0], confidence, atol=1e-5)
    facts = json.loads((tmp_path / "out" / "model.json").read_text())
    assert facts["shorter_side_pixels"] == localiser.shorter_side
    assert (facts["score_form"], facts["temperature"]) == (calibrated or form, 3.0 if calibrated else None)


def a_row(run: Path, ns: tuple[int, ...] = (1, 5, 10, 20), **others: object) -> dict[str, object]:
    """A row of results.json about a run, as far as a model card shows it."""
    recalls = {f"lr_at_{n}": 2.0 * n for n in ns}
    row = {"queries": "a/night", "scored": 1200, "form": "cosine", "threshold_m": 25.0, "fitted": False}
    weights = load_for_evaluation(run).fingerprint
    return row | recalls | {"weights": weights, "chance": dict.fromkeys(recalls, 1.25)} | others


def test_a_hub_folder_is_read_back_and_its_card_holds_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run")
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"rows": [a_row(run)]}))
    export_here(monkeypatch, run, "--to", "hub", "--out", tmp_path / "hub", "--results", results)
    files = {path.name for path in (tmp_path / "hub").iterdir()}
    assert {"config.json", "model.safetensors", "heads.safetensors", "classes.parquet", "README.md"} <= files
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "| queries | scored | scores | metres | LR@1 | LR@5 | LR@10 | LR@20 | chance LR@1 |" in card
    assert "| a/night | 1,200 | cosine | 25 | 2.0 | 10.0 | 20.0 | 40.0 | 1.2 |" in card
    assert "fitted" not in card
    photo = next(write_queries(tmp_path / "queries").iterdir())
    ours, theirs = (answer_of(Localiser.from_pretrained(path), photo)[1] for path in (run, tmp_path / "hub"))
    np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(JobError, match="exists already"):
        export_here(monkeypatch, run, "--to", "hub", "--out", tmp_path / "hub")


def test_a_hub_folder_does_not_tell_where_its_model_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = write_queries(tmp_path / "queries")
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path)])
    run = write_run(tmp_path / "run")
    checkpoint = load_checkpoint(next((run / "checkpoints").iterdir()))
    assert str(tmp_path) in checkpoint.provenance["command"]
    places = {name: f"{tmp_path}/{name}" for name in ("shards", "val_queries", "init_from", "weights")}
    save_checkpoint(run, replace(checkpoint, config=checkpoint.config | places))
    words = ["--checkpoints", run, "--queries", queries, "--val-queries", queries, "--out", tmp_path / "out"]
    assert evaluate_here(monkeypatch, *words) == 0
    export_here(monkeypatch, run, "--to", "hub", "--out", tmp_path / "hub")
    for file in (tmp_path / "hub").iterdir():
        assert os.fsencode(tmp_path) not in file.read_bytes(), file
    localiser = Localiser.from_pretrained(tmp_path / "hub")
    assert (localiser.config.backbone, localiser.config.weights) == ("small_cnn", "weights")
    assert localiser.calibration is not None
    words[1] = tmp_path / "hub"
    assert evaluate_here(monkeypatch, *words[:4], "--out", tmp_path / "again") == 0
    assert json.loads((tmp_path / "again" / "results.json").read_text())["rows"][0]["fitted"]
    (tmp_path / "hub" / "provenance.json").write_text("")
    with pytest.raises(JobError, match="provenance"):
        export_here(monkeypatch, tmp_path / "hub", "--to", "hub", "--out", tmp_path / "once more")


def test_a_card_shows_the_rows_of_its_own_weights_alone_with_metres_names_and_what_was_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = write_run(tmp_path / "run"), write_run(tmp_path / "other", head="FC_CE", form="raw")
    moved, results = tmp_path / "moved", tmp_path / "results.json"
    rows = [
        a_row(run, (3, 10), queries="a/test/q|1", threshold_m=100.0),
        a_row(run, (3, 10), queries="/data/b/test/q|1", fitted=True),
        a_row(run, (3, 10), queries="unplaced", scored=0, lr_at_3=None, lr_at_10=None),
        a_row(other, (3, 10), queries="c"),
    ]
    results.write_text(json.dumps({"rows": rows}))
    run.rename(moved)
    export_here(monkeypatch, moved, "--to", "hub", "--out", tmp_path / "hub", "--results", results)
    lines = (tmp_path / "hub" / "README.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| ") and "---" not in line] == [
        "| queries | scored | scores | metres | LR@3 | LR@10 | chance LR@3 |",
        r"| a/test/q\|1 | 1,200 | cosine | 100 | 6.0 | 20.0 | 1.2 |",
        r"| b/test/q\|1 (fitted) | 1,200 | cosine | 25 | 6.0 | 20.0 | 1.2 |",
    ]
    assert "called fitted" in lines[-1]


@pytest.mark.parametrize("other", [{"weights": "0-0"}, {"scored": 0, "lr_at_1": None}])
def test_results_without_a_score_of_the_checkpoint_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
) -> None:
    run, results = write_run(tmp_path / "run"), tmp_path / "results.json"
    of_before = a_row(run)
    del of_before["weights"]
    results.write_text(json.dumps({"rows": [a_row(run, **other), of_before]}))
    with pytest.raises(JobError, match=r"no score of .*step-00000007 among 2 rows; evaluate that checkpoint"):
        export_here(monkeypatch, run, "--to", "hub", "--out", tmp_path / "hub", "--results", results)
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("text", ["{", '{"rows": [1]}', '{"rows": 1}', "[]", '{"rows": [{"queries": "a"}]}'])
def test_a_file_that_is_no_results_json_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    run, results = write_run(tmp_path / "run"), tmp_path / "results.json"
    results.write_text(text)
    with pytest.raises(JobError, match=r"results.json: no (results.json of|score of .* among 1 row; )"):
        export_here(monkeypatch, run, "--to", "hub", "--out", tmp_path / "hub", "--results", results)


@pytest.mark.slow
@pytest.mark.parametrize(("to", "file"), [("torchscript", "out/model.pt"), ("hub", "out/model.safetensors")])
def test_a_full_disk_is_one_line_that_names_what_could_not_be_written(tmp_path: Path, to: str, file: str) -> None:
    run = write_run(tmp_path / "run")
    with small_disk(tmp_path / "disk") as disk:
        fill(disk, leave=1 << 16)
        command: list[str | Path] = [
            sys.executable,
            ROOT / "evaluation" / "export.py",
            run,
            "--to",
            to,
            "--out",
            disk / "out",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert f"{disk}/{file}: No space left on device" in done.stderr
        assert not list(disk.rglob("*.partial"))


def test_torch_hub_loads_a_run_from_the_checkout(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    model = torch.hub.load(str(ROOT), "model", source="local", checkpoint=run)
    assert model(torch.zeros(1, 3, 32, 40)).shape == (1, 32)


def test_torch_hub_asks_for_every_package_that_a_loaded_model_imports(
    tmp_path: Path,
) -> None:
    run, photo = write_run(tmp_path / "run"), next(write_queries(tmp_path / "queries").iterdir())
    script = f"""
import builtins, sys
real, asked = builtins.__import__, set()
def noting(name, globals=None, *rest):
    ours = str((globals or {{}}).get("__name__")).partition(".")[0] in ("shards", "training", "evaluation", "hubconf")
    asked.update([name.partition(".")[0]] if ours else [])
    return real(name, globals, *rest)
builtins.__import__ = noting
import hubconf
from pathlib import Path
localiser = hubconf.localiser({str(run)!r})
localiser.answer(localiser.describe([Path({str(photo)!r})]).vectors)
ours = {{"shards", "training", "evaluation", "hubconf"}}
print(*sorted(asked - set(sys.stdlib_module_names) - ours - set(hubconf.dependencies)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_name_that_is_neither_folder_nor_repository_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no such folder"):
        Localiser.from_pretrained(tmp_path / "absent")


def test_results_without_a_model_card_and_a_data_set_as_output_are_refused(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(WrongArguments, match="--results is for --to hub only"):
        export_here(monkeypatch, run, "--to", "onnx", "--out", tmp_path / "out", "--results", tmp_path / "results.json")
    with pytest.raises(JobError, match="holds a data set"):
        export_here(monkeypatch, run, "--to", "torchscript", "--out", dataset.path)
    with pytest.raises(JobError, match="lies in a data set"):
        export_here(monkeypatch, run, "--to", "hub", "--out", dataset.path / "hub")
