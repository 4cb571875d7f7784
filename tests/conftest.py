"""Fixtures: a rendered city and a data set built from it, made once for all tests."""

import fcntl
import os
import signal
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: float sums depend on it, and tests run side by side

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background job has it; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

from preprocessing.build import Summary, build
from preprocessing.city.plan import CitySettings
from preprocessing.city.writer import render_city
from preprocessing.plan import Settings
from preprocessing.shard_run import Machinery
from shards.dataset import Dataset

SETTINGS = Settings(M=20, N=2, min_images=10, image_size=64, quality=90, resize_filter="fast", seed=0)


@pytest.fixture(scope="session")
def city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small rendered city: train/database, val/queries, test/queries. Tests must not change it."""
    base = tmp_path_factory.getbasetemp()
    run = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # all processes of a test run share it
    settings = CitySettings(blocks=1, size=128, years=1, val_queries=40, test_queries=80)
    return made_once(run / "city", lambda out: render_city(out, settings, workers=1))


def made_once(out: Path, make: Callable[[Path], object]) -> Path:
    """`out`, made by the first process that asks for it; the others wait."""
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = out.with_suffix(".done")
        if not done.exists():
            make(out)
            done.touch()
    return out


@pytest.fixture(scope="session")
def built(city: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Summary]:
    """The data set of the city's training photos, and what the build said of it."""
    out = tmp_path_factory.mktemp("shards") / "city"
    summary = build(city / "train" / "database", out, SETTINGS, Machinery(2))
    return Dataset.open(out), summary


@pytest.fixture(scope="session")
def dataset(built: tuple[Dataset, Summary]) -> Dataset:
    """The data set of the city's training photos. Tests must not change it."""
    return built[0]
