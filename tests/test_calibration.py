"""Temperatures from validation queries, against outcomes whose probabilities are known."""

import json
from pathlib import Path

import numpy as np
import pytest

from evaluation.calibration import TEMPERATURES, Calibration, fit
from shards.console import JobError


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


def test_the_form_with_the_highest_lr_at_1_is_chosen_and_among_equals_the_trained_one() -> None:
    confidence = np.full((4, len(TEMPERATURES)), 0.5)
    half, most = np.array([True, True, False, False]), np.array([True, True, True, False])
    assert fit({"raw": (half, confidence), "zscore": (most, confidence)}, "val", "raw").form == "zscore"
    assert fit({"raw": (half, confidence), "cosine": (half, confidence)}, "val", "cosine").form == "cosine"


def test_a_calibration_is_read_back_and_a_damaged_one_is_a_clear_error(tmp_path: Path) -> None:
    assert Calibration.load(tmp_path) is None
    found = fit({"raw": answers_of(0, 2.0, 100)}, "val", "raw")
    found.save(tmp_path)
    assert Calibration.load(tmp_path) == found
    written = json.loads((tmp_path / "calibration.json").read_text())
    unsound = [
        {"form": "best"},
        {"form": "cosine"},
        *({"temperatures": {"raw": t}} for t in (0.0, -1.0, float("inf"), float("nan"), "hot")),
    ]
    for text in ("", "{}", "[1]", *(json.dumps(written | values) for values in unsound)):
        (tmp_path / "calibration.json").write_text(text)
        with pytest.raises(JobError, match=r"calibration\.json: no calibration"):
            Calibration.load(tmp_path)
