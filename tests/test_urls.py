"""Data sets at URLs: written, gone on with, changed and read as in a folder; S3 by a server in this process."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HERE, SETTINGS
from photos import jpeg, name_at
from PIL import Image
from present import present
from s3 import s3_server
from test_build import ROOT, contents
from tiny import configure, train_here, write_dataset

from preprocessing.build import assemble, build, build_share, dry_run
from preprocessing.output import Output
from preprocessing.shard_run import Machinery
from preprocessing.sources import Source
from preprocessing.updates import add, retry_quarantined
from shards.console import JobError
from shards.dataset import Dataset
from shards.layout import MANIFEST
from shards.loader import Loader, Mode
from shards.overview import describe
from shards.pictures import contact_sheet
from shards.store import Store
from shards.stream import StreamSettings
from shards.verify import Arguments
from shards.verify import main as verify_main
from training.run_folder import read_losses

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


def batches(dataset: Dataset, mode: Mode, steps: int = 6, **options) -> tuple[list[torch.Tensor], int]:
    """Images and labels of some steps, and how many photos were replaced."""
    groups = np.array(dataset.classes.groups)
    loader = Loader(
        dataset, lambda step: np.resize(groups, 24), batch_size=24, image_size=32, seed=4, mode=mode,
        stream=StreamSettings(run=5, window=96), **{"decoder": "cpu", **options},
    )  # fmt: skip
    loader._source.max_bad_share = 1.0
    taken = [part.clone() for b in loader.batches(0, steps) for part in (b.images, b.labels)]
    loader.close()
    return taken, loader.failures


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", ["file", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def test_a_data_set_built_at_a_url_has_the_bytes_of_one_in_a_folder(kind, photos, whole, tmp_path, request, cache):
    url = {"file": f"file://{tmp_path}/city", "memory": "memory://built/city"}.get(kind) or (
        request.getfixturevalue("bucket")
    )
    build_at(url, photos)
    assert stored(url) == contents(whole)
    assert not list((cache / "scratch").iterdir())


@pytest.mark.slow
def test_photos_on_s3_make_a_data_set_on_s3(photos, whole, bucket):
    upload(photos, f"{bucket}/photos")
    build_at(f"{bucket}/city", Source.of(f"{bucket}/photos"))
    made = stored(f"{bucket}/city")
    tars = [name for name in made if name.endswith((".tar", ".idx"))]
    assert len(tars) == 2 * SHARDS
    assert {name: made[name] for name in tars} == {name: contents(whole)[name] for name in tars}


def test_the_same_command_again_writes_no_shard_and_changes_nothing(photos, memory, monkeypatch):
    build_at(memory, photos)
    before = stored(memory)
    put: list[str] = []
    monkeypatch.setattr(Store, "put", lambda self, path, name: put.append(name))
    build_at(memory, photos)
    assert not [name for name in put if name.startswith(("group-", "index/"))]
    assert stored(memory) == before


COMMAND = [sys.executable, str(ROOT / "preprocessing" / "build_shards.py"), "--image-size", "32", "--N", "3"]


@pytest.mark.slow
def test_killed_the_same_command_goes_on_from_another_machine_and_keeps_what_was_done(
    bucket, tmp_path, cache, monkeypatch
):
    photos = write_cells(tmp_path / "photos", each=60, side=3)
    monkeypatch.setattr("preprocessing.plan.SHARD_SAMPLES", 8192)
    build(photos, tmp_path / "whole", replace(SMALL, N=3), machinery=HERE)
    store, command = Store.at(bucket), [*COMMAND, "--source", photos, "--out", bucket, "--workers", "1"]

    def tables() -> dict[str, object]:
        store.files.invalidate_cache()
        found = store.files.find(store.root, detail=True)
        return {path: i["LastModified"] for path, i in found.items() if "/group-" in path and path.endswith(".parquet")}

    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while len(tables()) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(0.5)  # the worker dies with its parent
    done = tables()
    assert MANIFEST not in store.sizes()
    assert list((cache / "scratch").iterdir())
    other = os.environ | {"DIVIDE_AND_CLASSIFY_CACHE": str(tmp_path / "other")}
    last = subprocess.run(command, env=other, capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    assert f"going on: {len(done)} of 9 shards were done before" in last.stdout
    assert f"finished    {bucket}" in last.stdout
    assert done.items() <= tables().items()
    assert stored(bucket) == contents(tmp_path / "whole")
    assert not list((tmp_path / "other" / "scratch").iterdir())
    with Output.open(bucket):  # what the killed one left goes with the next program
        assert len(list((cache / "scratch").iterdir())) == 1


def test_a_shard_whose_tar_did_not_arrive_is_written_again(photos, whole, memory):
    build_at(memory, photos)
    store = Store.at(memory)
    tar = next(name for name in store.sizes() if name.endswith(".tar"))
    store.files.pipe_file(store._path(tar), b"cut short")
    store.files.rm_file(store._path(MANIFEST))
    build_at(memory, photos)
    assert stored(memory) == contents(whole)


def test_shards_that_never_arrive_are_missed_before_the_manifest_is_written(photos):
    url = "memory://lost/city"
    with pytest.raises(JobError, match=r"memory://lost/city: 8 shards that were written are not there"):
        build_at(url, photos, Machinery(1))  # worker processes have a memory of their own
    assert MANIFEST not in Store.at(url).sizes()


def test_additions_and_retries_make_what_they_make_in_a_folder(tmp_path):
    photos, more = write_cells(tmp_path / "photos"), write_cells(tmp_path / "more", first=50, each=3)
    bad = sorted(photos.iterdir())[:3]
    sound = [photo.read_bytes() for photo in bad]
    for photo in bad:
        photo.write_bytes(b"")
    places = [str(tmp_path / "city"), "memory://changed/city"]
    for place in places:
        with Output.open(place) as out:
            build(photos, out, SMALL, machinery=HERE)
    for photo, data in zip(bad, sound, strict=True):
        photo.write_bytes(data)
    for place in places:
        with Output.open(place) as out:
            assert present(retry_quarantined(out, HERE))[1:] == (3, 3)
        with Output.open(place) as out:
            assert present(add(Source.of(more), out, HERE))[1].images == 3 * CELLS
    assert stored(places[1]) == contents(tmp_path / "city")
    assert Dataset.open(places[1]).manifest.revision == 3


def test_tasks_of_several_machines_and_a_finish_make_the_bytes_of_one_build(photos, whole, memory):
    source = Source.of(photos)
    for index in (1, 0):
        with Output.open(memory) as out:
            build_share(source, out, SMALL, HERE, index=index, count=3)
    with Output.open(memory) as out, pytest.raises(JobError, match=rf"{memory}: 2 of 8 shards .*run task 2 of 3"):
        assemble(source, out, SMALL, HERE, count=3)
    with Output.open(memory) as out:
        build_share(source, out, SMALL, HERE, index=2, count=3)
    with Output.open(memory) as out:
        assemble(source, out, SMALL, HERE, count=3)
    assert stored(memory) == contents(whole)


def test_a_dry_run_leaves_only_the_list(photos, memory):
    with Output.open(memory) as out:
        assert dry_run(Source.of(photos), out, SMALL, workers=1).bytes_free is None
    assert list(Store.at(memory).sizes()) == ["listing.parquet"]


def test_a_place_of_something_else_is_left_alone_and_named_by_its_url(photos, memory):
    store = Store.at(memory)
    store.files.pipe_file(store._path("thesis.txt"), b"mine")
    with pytest.raises(JobError, match=rf"{memory}: not empty and not a data set"):
        build_at(memory, photos)
    assert stored(memory) == {"thesis.txt": b"mine"}
    build_at(f"{memory}/city", photos)
    with (
        pytest.raises(JobError, match=rf"^{memory}/city: holds another data set .*seed was 0, is 1"),
        Output.open(f"{memory}/city") as out,
    ):
        build(photos, out, replace(SMALL, seed=1), machinery=HERE)


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_one_line_before_any_work(photos, server):
    with pytest.raises(JobError, match=r"s3://no-such-bucket/city: .* cannot be written .*bucket does not exist"):
        build_at("s3://no-such-bucket/city", photos)
    for url in ("s3://no-such-bucket/city", f"{server}/nothing", "memory://nothing"):
        with pytest.raises(JobError, match=f"{url}: no finished data set here"):
            Dataset.open(url)
    with pytest.raises(JobError, match="nonsense"):
        Dataset.open("nonsense://x/y")


@pytest.mark.slow
def test_batches_from_s3_are_those_from_a_folder_in_both_modes(whole, bucket):
    upload(whole, bucket)
    here, there = Dataset.open(whole), Dataset.open(bucket)
    for mode in ("indexed", "stream"):
        taken, failures = batches(there, mode)
        assert same(taken, batches(here, mode)[0])
        assert failures == 0


def test_stream_asks_for_runs_and_indexed_for_photos_each_once(whole, memory, monkeypatch):
    upload(whole, memory)
    dataset = Dataset.open(memory)
    asked: list[str] = []
    read_range = Store.read_range

    def read_range_and_count(self, name, *place):
        asked.append(name)
        return read_range(self, name, *place)

    monkeypatch.setattr(Store, "read_range", read_range_and_count)
    batches(dataset, "indexed", steps=4)
    assert len(asked) <= 4 * 24
    asked.clear()
    batches(dataset, "stream", steps=4)  # one window of 96, and the next one
    assert len(asked) < 2 * 96 / 1.5  # runs of 5, cut by the lanes of so small a window and by shards of 6


@pytest.mark.slow
def test_photos_of_a_deleted_object_are_replaced_counted_and_named_in_both_modes(whole, bucket, caplog):
    upload(whole, bucket)
    store, here, there = Store.at(bucket), Dataset.open(whole), Dataset.open(bucket)
    store.files.rm_file(store._path("group-03/group-03-000001.tar"))
    for mode in ("indexed", "stream"):
        caplog.clear()
        taken, failures = batches(there, mode)
        assert f"{bucket}/group-03/group-03-000001.tar at byte" in caplog.text
        assert "replaced by the next draw" in caplog.text
        expected, _ = batches(here, mode)
        images = zip(taken[::2], expected[::2], strict=True)
        differing = sum(not torch.equal(a[i], b[i]) for a, b in images for i in range(24))
        assert 0 < differing <= failures


def test_a_damaged_photo_at_a_url_is_replaced(whole, tmp_path):
    url = "memory://damaged/city"
    upload(whole, url)
    store = Store.at(url)
    tar = bytearray(store.read("group-00/group-00-000000.tar"))
    tar[700] ^= 1
    store.files.pipe_file(store._path("group-00/group-00-000000.tar"), bytes(tar))
    assert batches(Dataset.open(url), "indexed", steps=20)[1] > 0


@pytest.mark.parametrize("mode", ["indexed", "stream"])
def test_a_data_set_that_vanishes_while_it_is_read_is_one_clear_error(whole, mode):
    url = "memory://vanished/city"
    upload(whole, url)
    dataset = Dataset.open(url)
    Store.at(url).files.rm("/vanished", recursive=True)
    with pytest.raises(JobError, match=rf"^{url}: cannot be read .*bring it back and run the same command again"):
        batches(dataset, mode)


def test_a_mirror_is_fetched_once_and_anew_when_the_data_set_changes(whole, tmp_path, monkeypatch):
    url = "memory://mirrored/city"
    upload(whole, url)
    fetched: list[str] = []
    fetch = Store.fetch

    def fetch_and_count(self, name, path):
        fetched.append(name)
        return fetch(self, name, path)

    monkeypatch.setattr(Store, "fetch", fetch_and_count)
    first = Dataset.open(url)
    assert len(fetched) == SHARDS + 2
    assert not list(first.path.rglob("*.tar"))
    fetched.clear()
    assert Dataset.open(url).path == first.path
    assert fetched == []
    with Output.open(url) as out:
        add(Source.of(write_cells(tmp_path / "more", first=50, each=1)), out, HERE)
    fetched.clear()
    again = Dataset.open(url)
    assert again.manifest.images == first.manifest.images + CELLS
    assert sum(name.startswith("group-") for name in fetched) == CELLS  # the new ones
    assert batches(again, "indexed")[1] == 0


def test_a_table_that_is_not_what_was_sealed_is_refused(whole):
    url = "memory://rotten/city"
    upload(whole, url)
    store = Store.at(url)
    store.files.pipe_file(store._path("group-02/group-02-000000.parquet"), b"rotten")
    with pytest.raises(JobError, match=r"memory://rotten/city/group-02/.*parquet: differs from its checksum"):
        Dataset.open(url)
    upload(whole, url)
    assert Dataset.open(url).manifest.shards == SHARDS
    store.files.pipe_file(store._path(MANIFEST), store.read(MANIFEST) + b"\n")
    with pytest.raises(JobError, match="is being changed, or a change was interrupted"):
        Dataset.open(url)


def test_names_from_outside_do_not_lead_out_of_the_mirror(whole, cache):
    url = "memory://hostile/city"
    upload(whole, url)
    store = Store.at(url)
    store.files.pipe_file("/hostile/city/group-00/../../../evil.parquet", b"evil")
    store.files.rm_file(store._path("checksums.txt"))
    Dataset.open(url)
    assert not list(cache.parent.rglob("evil*"))


@pytest.mark.slow
def test_training_from_s3_has_the_losses_of_training_from_a_folder(bucket, tmp_path):
    upload(write_dataset(tmp_path / "tiny").path, bucket)  # without checksums
    losses = []
    for number, place in enumerate((tmp_path / "tiny", bucket)):
        train_here(configure(place, tmp_path / str(number), read="stream", epochs=1))
        losses.append(read_losses(tmp_path / str(number)))
    assert len(losses[0]) == 8
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_show_describes_a_data_set_at_a_url(whole, tmp_path):
    url = f"file://{tmp_path}/{whole.name}"
    shutil.copytree(whole, tmp_path / whole.name)
    command = [sys.executable, ROOT / "shards" / "show.py", url, "--out", tmp_path / "city.png"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    here = Dataset.open(whole)
    assert done.stdout.split("\n\npictures")[0] == describe(here).replace(str(whole), url)
    with Image.open(tmp_path / "city.png") as sheet:
        assert (np.asarray(sheet) == np.asarray(contact_sheet(here))).all()


def test_verify_finds_what_is_damaged_at_a_url_and_its_advice_mends_it(photos, whole, tmp_path, monkeypatch, capsys):
    place, url = tmp_path / "there", f"file://{tmp_path}/there"
    shutil.copytree(whole, place)
    monkeypatch.setattr(sys, "argv", ["verify.py", url])
    assert verify_main() == 0
    assert f"{url}: sound" in capsys.readouterr().out
    tar = bytearray((place / "group-01" / "group-01-000001.tar").read_bytes())
    tar[600] ^= 1
    (place / "group-01" / "group-01-000001.tar").write_bytes(tar)
    (place / "group-02" / "group-02-000000.idx").write_bytes(b"rotten")
    (place / "group-03" / "group-03-000001.tar").unlink()
    (place / "thesis.txt").write_text("mine")
    assert verify_main() == 1
    printed = capsys.readouterr().out
    for line in (
        "group-01/group-01-000001.tar: sample 000000006",
        "group-02/group-02-000000.idx: differs from its checksum",
        "group-03/group-03-000001.tar: missing",
        "thesis.txt: does not belong to the data set",
        f"{url}: 4 problems in 4 files; --repair tells how",
    ):
        assert line in printed
    with pytest.raises(JobError, match="delete the tables"):
        Arguments(url, repair=True)
    for stem in ("group-01/group-01-000001", "group-02/group-02-000000", "group-03/group-03-000001"):
        (place / f"{stem}.parquet").unlink()
    build_at(url, photos)
    (place / "thesis.txt").unlink()
    assert stored(url) == contents(whole)
