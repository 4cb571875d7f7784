"""Places at URLs for tests: a small data set in a folder, an empty place in memory, on S3 (a server in this process).

Test modules import the fixtures that they need; `small_shards` and `cache` work by being imported.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import HERE, SETTINGS
from photos import jpeg, name_at
from s3 import s3_server

from preprocessing.build import build
from preprocessing.output import Output
from preprocessing.shard_run import Machinery
from preprocessing.sources import Source
from shards.store import Store

SMALL = replace(SETTINGS, image_size=32)
CELLS = 4  # each a group of its own, in two shards
SHARDS = 8


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("preprocessing.plan.SHARD_SAMPLES", 6)
        yield


def write_cells(folder: Path, first: int = 0, each: int = 12, side: int = 2) -> Path:
    folder.mkdir(parents=True)
    for cell in range(side * side):
        for i in range(first, first + each):
            name = name_at(500003 + 20 * (cell // side), 4180003 + 20 * (cell % side), cell * 100 + i)
            (folder / name).write_bytes(jpeg(64, cell * 100 + i))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cells(tmp_path_factory.mktemp("photos") / "photos")


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set that a build in a folder makes."""
    out = tmp_path_factory.mktemp("whole") / "city"
    build(photos, out, SMALL, machinery=HERE)
    return out


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as bucket:
        yield bucket


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, as on another machine."""
    monkeypatch.setenv("DIVIDE_AND_CLASSIFY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty place in memory."""
    url = f"memory://{place_of(request)}/city"
    yield url
    Store.at(url).files.store.clear()


def place_of(request: pytest.FixtureRequest) -> str:
    return hashlib.sha256(request.node.name.encode()).hexdigest()[:12]


@pytest.fixture
def bucket(server: str, request: pytest.FixtureRequest) -> str:
    """An empty place on S3."""
    return f"{server}/{place_of(request)}"


def stored(url: str) -> dict[str, bytes]:
    """Every file below a URL but the record of the command that made it."""
    store = Store.at(url)
    names = [name for name in store.sizes() if name != "provenance.json"]
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(store.read, names), strict=True))


def upload(folder: Path, url: str) -> None:
    store, files = Store.at(url), [path for path in folder.rglob("*") if path.is_file()]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: store.put(path, str(path.relative_to(folder))), files))


def build_at(url: str, source: Path | Source, machinery: Machinery = HERE) -> None:
    with Output.open(url) as out:
        build(source, out, SMALL, machinery=machinery)
