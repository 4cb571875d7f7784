"""Calibration by validation queries: temperatures against known probabilities, and what evaluate.py makes of them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from present import present
from tiny import write_queries
from tiny_run import evaluate_here, write_run

from evaluation.calibration import TEMPERATURES, Calibration, fit
from evaluation.ranking import RANKING_FORMS, RankingForm
from shards.console import JobError
from shards.names import format_name, parse_name
from training.queries import list_queries


def answers_of(seed: int, too_sure: float, count: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Answers whose true odds are those claimed to the power of 1 / `too_sure`: right [Q], confidence [Q, T]."""
    rng = np.random.default_rng(seed)
    log_odds = rng.normal(2, 4, count)
    right = rng.random(count) < 1 / (1 + np.exp(-log_odds / too_sure))
    return right, 1 / (1 + np.exp(-log_odds[:, None] / np.array(TEMPERATURES)))


@pytest.mark.parametrize("too_sure", [0.5, 1.0, 3.0, 8.0])
def test_the_temperature_is_the_one_that_makes_the_claims_true(too_sure: float) -> None:
    found = fit({"raw": answers_of(0, too_sure)}, "val", "raw")
    assert found.temperatures["raw"] == pytest.approx(too_sure, rel=0.07)
    assert found.error_after["raw"] < 1.5
    right, confidence = answers_of(1, too_sure)  # other queries of the same kind
    at = TEMPERATURES.index(found.temperatures["raw"])
    assert abs(confidence[:, at].mean() - right.mean()) < 0.02
    if too_sure == 8.0:
        assert found.error_before["raw"] > 15


def test_temperatures_from_a_quarter_to_16_are_tried_and_1_is_among_them() -> None:
    assert (TEMPERATURES[0], TEMPERATURES[-1]) == (0.25, 16)
    assert 1.0 in TEMPERATURES
    assert np.ptp(np.diff(np.log(TEMPERATURES))) < 1e-12


@pytest.mark.filterwarnings("error")
def test_answers_that_are_sure_at_any_temperature_and_wrong_do_not_decide_it_alone() -> None:
    right, confidence = answers_of(0, 3.0)
    sure = fit(
        {"raw": (np.append(right, [False, True]), np.vstack([confidence, np.ones((2, len(TEMPERATURES)))]))},
        "val",
        "raw",
    )
    assert sure.temperatures == fit({"raw": (right, confidence)}, "val", "raw").temperatures


@pytest.mark.parametrize(("right", "likeliest"), [([True], 2 / 3), ([True] * 3, 4 / 5), ([False] * 2, 1 / 4)])
def test_few_answers_that_are_all_right_or_all_wrong_do_not_make_the_confidence_extreme(
    right: list[bool], likeliest: float
) -> None:
    log_odds = np.full((len(right), 1), 2.0 if right[0] else -2.0)
    found = fit({"raw": (np.array(right), 1 / (1 + np.exp(-log_odds / np.array(TEMPERATURES))))}, "val", "raw")
    confidence = 1 / (1 + np.exp(-log_odds[0, 0] / found.temperatures["raw"]))
    assert confidence == pytest.approx(likeliest, abs=0.02)  # Laplace's rule of succession


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("confidence", [1.0, np.nan])
def test_answers_whose_confidence_no_temperature_changes_leave_it_at_1(confidence: float) -> None:
    right = np.array([True, False, True])
    confidences = np.full((3, len(TEMPERATURES)), confidence)
    assert fit({"raw": (right, confidences)}, "val", "raw").temperatures == {"raw": 1.0}


@pytest.mark.parametrize(
    ("gained", "lost", "form"), [(0, 0, "cosine"), (4, 0, "cosine"), (5, 0, "raw"), (40, 22, "raw"), (40, 26, "cosine")]
)
def test_the_trained_form_stays_unless_another_is_better_by_more_than_two_standard_errors(
    gained: int, lost: int, form: RankingForm
) -> None:
    confidence = np.full((200, len(TEMPERATURES)), 0.5)
    own = np.arange(200) < 100
    other = own.copy()
    other[:lost], other[100 : 100 + gained] = False, True
    fitted = fit(
        {"cosine": (own, confidence), "raw": (other, confidence), "softmax": (own, confidence)}, "val", "cosine"
    )
    assert fitted.form == form
    assert fitted.lr_at_1 == pytest.approx({"cosine": 50, "raw": 50 + (gained - lost) / 2, "softmax": 50})


def test_a_calibration_is_read_back_and_a_damaged_one_is_a_clear_error(tmp_path: Path) -> None:
    assert Calibration.load(tmp_path) is None
    found = fit({"raw": answers_of(0, 2.0, 100)}, "val", "raw")
    found.save(tmp_path)
    assert Calibration.load(tmp_path) == found
    written = json.loads((tmp_path / "calibration.json").read_text())
    unsound = [
        {"form": "best"},
        {"form": "cosine"},
        {"lr_at_1": {}},
        *({"temperatures": {"raw": t}} for t in (0.0, -1.0, float("inf"), float("nan"), "hot")),
    ]
    for text in ("", "{}", "[1]", *(json.dumps(written | values) for values in unsound)):
        (tmp_path / "calibration.json").write_text(text)
        with pytest.raises(JobError, match=r"calibration\.json: no calibration"):
            Calibration.load(tmp_path)


@pytest.mark.parametrize(
    ("raw", "zscore", "said"),
    [
        (65.6, 64.8, "raw 65.6, cosine 64.0, zscore 64.8, softmax 62.8; not surely better: raw, zscore"),
        (64.0, 64.8, "raw 64.0, cosine 64.0, zscore 64.8, softmax 62.8; not surely better: zscore"),
        (64.0, 60.0, "raw 64.0, cosine 64.0, zscore 60.0, softmax 62.8"),
    ],
)
def test_the_line_of_a_fit_says_why_a_form_of_higher_lr_at_1_was_not_taken_in_one_order_always(
    tmp_path: Path, raw: float, zscore: float, said: str
) -> None:
    first: dict[RankingForm, float] = {"softmax": 62.8, "cosine": 64.0, "raw": raw, "zscore": zscore}
    found = Calibration("cosine", {"cosine": 1.125}, "val", 250, first, {}, {})
    found.save(tmp_path)
    line = f"fitted to 250 queries of val: cosine scores (LR@1 there within 25 m: {said}), temperature 1.12"
    assert found.describe() == present(Calibration.load(tmp_path)).describe() == line


def test_validation_queries_of_no_use_are_one_error_and_the_rest_goes_on(
    run_and_queries: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, queries = run_and_queries
    words = ["--checkpoints", run, "--queries", queries, "--out", tmp_path, "--no-report"]
    assert evaluate_here(monkeypatch, *words, "--val-queries", tmp_path / "none") == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"error: {tmp_path / 'none'}: no such folder of photos; {run} keeps")
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["lr_at_1"] > 80


def test_validation_queries_choose_the_form_and_the_temperature_that_later_answers_keep(
    run_and_queries: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, val = shutil.copytree(run_and_queries[0], tmp_path / "run"), run_and_queries[1]
    test = write_queries(tmp_path / "test", size=48)
    words = ["--checkpoints", run, "--queries", test, "--no-report"]
    assert evaluate_here(monkeypatch, *words, "--val-queries", val, "--out", tmp_path / "a") == 0
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    (row,), fitted = results["rows"], results["calibrations"][str(run)]
    assert sorted(fitted["lr_at_1"]) == sorted(RANKING_FORMS)
    assert fitted["lr_at_1"]["raw"] > fitted["lr_at_1"]["cosine"]  # by three of 32: not surely
    assert (fitted["queries"], fitted["count"], row["form"]) == (str(val), 32, "cosine")
    assert row["temperature"] == fitted["temperatures"][row["form"]] != 1
    assert "32 queries" in capsys.readouterr().out
    assert json.loads(next(run.rglob("calibration.json")).read_text()) == fitted
    # Nothing but the stored calibration is needed the next time.
    assert evaluate_here(monkeypatch, *words, "--out", tmp_path / "b") == 0
    again = json.loads((tmp_path / "b" / "results.json").read_text())["rows"][0]
    assert (again["temperature"], again["calibration_error"]) == (row["temperature"], row["calibration_error"])
    before = tmp_path / "c"
    words[1] = run_and_queries[0]
    assert evaluate_here(monkeypatch, *words, "--out", before) == 0
    untouched = json.loads((before / "results.json").read_text())["rows"][0]
    assert untouched["temperature"] is None
    assert untouched["calibration_error"] != row["calibration_error"]


@pytest.mark.parametrize("given", [True, False], ids=["given", "of the training"])
def test_the_threshold_of_an_evaluation_does_not_touch_the_confidence_that_prediction_uses(
    run_and_queries: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    queries = run_and_queries[1]
    stored = []
    for threshold in (25, 1):  # no photo is taken within 1 m of a cell's centre
        run = write_run(tmp_path / f"run-{threshold}", val_queries=None if given else queries)
        words = ["--checkpoints", run, "--queries", queries, "--no-report", "--out", tmp_path / "o"]
        words += ["--val-queries", queries] if given else []
        assert evaluate_here(monkeypatch, *words, "--threshold", threshold) == 0
        (row,) = json.loads((tmp_path / "o" / "results.json").read_text())["rows"]
        stored.append(json.loads(next(run.rglob("calibration.json")).read_text()))
        assert row["temperature"] == stored[-1]["temperatures"][row["form"]]
        assert (row["threshold_m"], row["lr_at_1"] > 80) == (threshold, threshold == 25)
    assert stored[0] == stored[1]
    assert stored[0]["lr_at_1"][stored[0]["form"]] > 80


def test_a_training_whose_validation_queries_are_not_here_says_that_nothing_is_calibrated(
    run_and_queries: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = write_run(tmp_path / "run", val_queries=tmp_path / "val")
    words = ["--checkpoints", run, "--queries", run_and_queries[1], "--no-report", "--out", tmp_path / "o"]
    assert evaluate_here(monkeypatch, *words) == 0
    assert f"{tmp_path / 'val'}: the training's validation queries are not here" in capsys.readouterr().err
    assert evaluate_here(monkeypatch, *words, "--val-queries", run_and_queries[1]) == 0
    capsys.readouterr()
    assert evaluate_here(monkeypatch, *words) == 0
    assert "not here" not in capsys.readouterr().err


def test_other_photos_at_the_place_of_the_validation_queries_are_not_taken_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained_with = write_queries(tmp_path / "val")
    photos = list_queries(trained_with, 0).fingerprint()
    run = write_run(tmp_path / "run", val_queries=Path("val"), val_photos=photos)
    other = tmp_path / "elsewhere"
    write_queries(other / "val", size=48)
    monkeypatch.chdir(other)
    words = ["--checkpoints", run, "--queries", "val", "--no-report", "--out", "o"]
    assert evaluate_here(monkeypatch, *words) == 0
    assert "val: other photos than the training's validation queries (--val-queries)" in capsys.readouterr().err
    assert not list(run.rglob("calibration.json"))
    monkeypatch.chdir(tmp_path)
    assert evaluate_here(monkeypatch, *words) == 0
    assert list(run.rglob("calibration.json"))
    assert json.loads(Path("o/results.json").read_text())["rows"][0]["fitted"] is True
    monkeypatch.chdir(other)
    assert evaluate_here(monkeypatch, *words) == 0
    assert json.loads(Path("o/results.json").read_text())["rows"][0]["fitted"] is False


def test_queries_of_another_hemisphere_are_told_and_nothing_is_fitted_to_them(
    run_and_queries: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = shutil.copytree(run_and_queries[0], tmp_path / "run")
    away = tmp_path / "away"
    away.mkdir()
    for photo in run_and_queries[1].iterdir():
        known = parse_name(photo.name)
        shutil.copy(photo, away / format_name(known._replace(north=known.north + 2_000_000)))
    words = ["--checkpoints", run, "--queries", away, "--val-queries", away, "--no-report", "--out", tmp_path / "o"]
    assert evaluate_here(monkeypatch, *words) == 1
    said = capsys.readouterr().err
    assert (
        f"{away}: no query lies within 25 m of the centre of a class of {run} (UTM zone 10 north, metres): "
        "a small --threshold, or another city, zone or hemisphere" in said
    )
    assert f"{away}: no readable query of it is answered rightly; {run} keeps cosine scores" in said
    assert not list(run.rglob("calibration.json"))


def test_queries_that_the_confidence_was_fitted_to_are_told_from_others(
    run_and_queries: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, val = shutil.copytree(run_and_queries[0], tmp_path / "run"), run_and_queries[1]
    words = ["--checkpoints", run, "--queries", val, "--val-queries", val, "--no-report", "--out", tmp_path / "o"]
    assert evaluate_here(monkeypatch, *words) == 0
    assert "the validation queries themselves" in capsys.readouterr().err
    assert json.loads((tmp_path / "o" / "results.json").read_text())["rows"][0]["fitted"] is True
    next(run.rglob("calibration.json")).write_text('{"form": "best"}')
    assert evaluate_here(monkeypatch, *words) == 1
    assert "calibration.json: no calibration" in capsys.readouterr().err
