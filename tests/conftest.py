"""Fixtures: a rendered city and a data set built from it, made once for all tests."""

import fcntl
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: float sums depend on it, and tests run side by side

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background job has it; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

from preprocessing.build import build
from preprocessing.city.plan import CitySettings
from preprocessing.city.writer import render_city
from preprocessing.engine import Counts, Job
from preprocessing.plan import Settings, ShardTask
from preprocessing.shard_run import Machinery
from preprocessing.shard_task import ShardResult
from shards.checksums import seal
from shards.dataset import Dataset

SETTINGS = Settings(M=20, N=2, min_images=10, image_size=64, quality=90, resize_filter="fast", seed=0)
CITY = CitySettings(blocks=1, size=96, years=1, headings=4, val_queries=20, test_queries=40)


def in_this_process(
    job: Job, tasks: Iterator[ShardTask], workers: int, progress: Callable[[Counts], bool]
) -> Iterator[ShardResult]:
    """What writes shards without worker processes, whose start takes longer than all else in a small build."""
    yield from (job.run(task, lambda *_: True) for task in tasks)


HERE = Machinery(1, run_tasks=in_this_process)


@pytest.fixture(scope="session")
def city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small rendered city: train/database, val/queries, test/queries. Tests must not change it."""
    return made_once(shared_folder(tmp_path_factory) / "city", lambda out: render_city(out, CITY, workers=1))


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of a test run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


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
def dataset(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The data set of the city's training photos. Tests must not change it."""
    photos = city / "train" / "database"
    return Dataset.open(
        made_once(shared_folder(tmp_path_factory) / "city-shards", lambda out: build(photos, out, SETTINGS, HERE))
    )


@pytest.fixture
def copy(dataset: Dataset, tmp_path: Path) -> Path:
    """A data set with checksums that a test may damage."""
    folder = tmp_path / "city"
    shutil.copytree(dataset.path, folder)
    seal(folder)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data set for tests of training. Tests must not change it."""
    from tiny import write_dataset  # seconds, which tests of other rooms do without

    return write_dataset(tmp_path_factory.mktemp("tiny") / "shards").path


@pytest.fixture(scope="module")
def queries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Query photos in the cells of that data set. Tests must not change them."""
    from tiny import write_queries

    return write_queries(tmp_path_factory.mktemp("tiny") / "queries")


@pytest.fixture(scope="module")
def run_and_queries(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that answers without training, and two query photos of every class. Tests must not change them."""
    from tiny import write_queries
    from tiny_run import write_run

    folder = tmp_path_factory.mktemp("evaluate")
    return write_run(folder / "run"), write_queries(folder / "queries", each=2)
