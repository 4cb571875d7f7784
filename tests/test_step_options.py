"""Options that change how a step is computed, not what it computes; and the profile."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import configure, train_here
from torch import nn

from training.optimisers import make_adam
from training.run_folder import read_losses


def losses(shards: Path, out: Path, **settings: object) -> list[float]:
    train_here(configure(shards, out, schedule="joint", iterations_per_epoch=6, epochs=1, **settings))
    return read_losses(out)


@pytest.mark.slow
def test_channels_last_changes_the_layout_in_memory_and_not_the_losses(shards: Path, tmp_path: Path) -> None:
    trainer = train_here(configure(shards, tmp_path / "last", schedule="joint", channels_last=True, epochs=1))
    weights = [module.weight for module in trainer.engine.model.modules() if isinstance(module, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    train_here(configure(shards, tmp_path / "first", schedule="joint", epochs=1))
    np.testing.assert_allclose(read_losses(tmp_path / "last"), read_losses(tmp_path / "first"), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler (g++) on the CPU")
def test_a_compiled_model_has_the_losses_of_an_eager_one(shards: Path, tmp_path: Path) -> None:
    settings = {"channels_last": True, "lr": 1e-4, "head_lr": 1e-3}
    compiled = losses(shards, tmp_path / "compiled", compile=True, **settings)
    eager = losses(shards, tmp_path / "eager", **settings)
    np.testing.assert_allclose(compiled, eager, rtol=1e-3)
    assert compiled[0] == pytest.approx(eager[0], rel=1e-5)
    resumed = train_here(configure(shards, tmp_path / "compiled", resume=True, iterations_per_epoch=6, epochs=2))
    assert resumed.progress.step == 12  # the weights bear the same names


def test_adam_follows_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(50, generator=generator, dtype=torch.float64)
    parameter = nn.Parameter(value.clone())
    adam = make_adam([parameter], 0.01)
    first, second, expected = np.zeros(50), np.zeros(50), value.numpy().copy()
    for t in range(1, 6):
        gradient = torch.randn(50, generator=generator, dtype=torch.float64)
        parameter.grad = gradient
        adam.step()
        first = 0.9 * first + 0.1 * gradient.numpy()
        second = 0.999 * second + 0.001 * gradient.numpy() ** 2
        expected -= 0.01 * (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12)


@pytest.mark.slow
def test_a_profile_is_a_trace_that_chrome_reads(shards: Path, tmp_path: Path) -> None:
    train_here(configure(shards, tmp_path / "r", profile=True, epochs=2))
    (trace,) = (tmp_path / "r" / "profile").glob("*.pt.trace.json")
    events = json.loads(trace.read_text())["traceEvents"]
    assert sum(event["name"].startswith("ProfilerStep#") and event["ph"] == "X" for event in events) == 5
    assert {"MarginSoftmax", "aten::convolution"} <= {event["name"] for event in events}


def test_a_start_that_is_too_short_for_a_profile_says_so(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_here(configure(shards, tmp_path / "r", profile=True, epochs=1))
    assert "--profile: no trace" in capsys.readouterr().out
