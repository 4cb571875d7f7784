"""The configuration: presets, flags, and clear words for values that make no sense."""

import json
from pathlib import Path

import pytest

from shards.console import JobError, entry
from training.presets import PRESETS, TrainConfig, read_config

PLACES = ["--shards", "d", "--out", "r"]


def test_paper_b0_is_the_references_recipe() -> None:
    config = read_config(PLACES)
    assert config.preset == "paper-b0"
    stated = {
        "backbone": "efficientnet_b0", "weights": "imagenet", "freeze_until": 5, "head": "AAMC", "s": 100.0, "m": 0.2,
        "schedule": "sequential", "iterations_per_epoch": 2000, "epochs": 500, "batch_size": 64, "image_size": 224,
        "lr": 1e-4, "head_lr": 1e-2, "lr_schedule": "plateau", "patience": 10, "plateau_factor": 0.1,
        "precision": "fp16", "score_form": "raw", "grad_clip": 0.0, "ema": 0.0, "warmup_steps": 0,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in stated} == stated


def test_flags_override_the_preset_wherever_they_stand() -> None:
    config = read_config(["--s", "12", *PLACES, "--preset", "quickstart", "--no-channels-last"])
    assert (config.preset, config.backbone, config.s, config.channels_last) == ("quickstart", "small_cnn", 12.0, False)
    assert read_config([*PLACES, "--preset=paper-b5"]).backbone == "efficientnet_b5"


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_bears_its_own_name_and_survives_json(name: str) -> None:
    config = read_config([*PLACES, "--preset", name, "--val-queries", "q"])
    assert config.preset == name
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert config.val_queries == Path("q")


@pytest.mark.parametrize(
    "words",
    [
        [],
        [*PLACES, "--preset", "nonsense"],
        [*PLACES, "--head", "ArcFace"],
        [*PLACES, "--lr", "-1"],
        [*PLACES, "--lr", "fast"],
        [*PLACES, "--lr", "1e-7"],  # under which the plateau schedule ends a run: it would train nothing
        [*PLACES, "--no-such-flag"],
        [*PLACES, "--ema", "1.5"],
        [*PLACES, "--colour-jitter", "1.5"],
        [*PLACES, "--warmup-steps", "5"],
        [*PLACES, "--offload-heads", "--schedule", "joint"],
        [*PLACES, "--head-sample-rate", "0.5"],
        [*PLACES, "--m", "3"],
        [*PLACES, "--seed", "-1"],
        [*PLACES, "--seed", str(1 << 64)],
        [*PLACES, "--plateau-factor", "2"],
        [*PLACES, "--plateau-factor", "0"],
    ],
)
def test_wrong_arguments_exit_with_2_and_say_why(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        entry(lambda: bool(read_config(words)))
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.err or printed.out


def test_a_value_out_of_range_names_its_flag() -> None:
    with pytest.raises(JobError, match="--batch-size 0: must be more than 0"):
        TrainConfig(batch_size=0)


@pytest.mark.parametrize("name", ["lr", "head_lr", "s", "m", "grad_clip", "ema", "colour_jitter"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(JobError, match=f"--{name.replace('_', '-')} {value}: must be a finite number"):
        TrainConfig(**{name: value})  # type: ignore[arg-type]
