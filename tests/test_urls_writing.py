"""Data sets at URLs: written, gone on with and changed as in a folder."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import HERE
from present import present
from test_build import ROOT, contents
from url_places import (  # noqa: F401  (fixtures)
    CELLS,
    SHARDS,
    SMALL,
    bucket,
    build_at,
    cache,
    memory,
    photos,
    server,
    small_shards,
    stored,
    upload,
    whole,
    write_cells,
)

from preprocessing.build import assemble, build, build_share, dry_run
from preprocessing.output import Output
from preprocessing.shard_run import Machinery
from preprocessing.sources import Source
from preprocessing.updates import add, retry_quarantined
from shards.console import JobError
from shards.dataset import Dataset
from shards.layout import CHECKSUMS, MANIFEST, REVISION_FILES
from shards.store import Store
from shards.verify import Arguments
from shards.verify import main as verify_main


@pytest.fixture(params=["file", "memory", pytest.param("bucket", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place of each kind of store."""
    return f"file://{tmp_path}/city" if request.param == "file" else request.getfixturevalue(request.param)


def test_a_data_set_built_at_a_url_has_the_bytes_of_one_in_a_folder(url, photos, whole, cache):
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


def test_an_addition_of_too_many_bad_photos_leaves_the_data_set_at_a_url_as_it_was(
    url, photos, tmp_path, cache, monkeypatch
):
    build_at(url, photos)
    before = stored(url)
    names: list[str] = []
    put = Store.put

    def noted(store: Store, path: Path, name: str) -> None:
        names.append(name)
        put(store, path, name)

    monkeypatch.setattr(Store, "put", noted)
    more = write_cells(tmp_path / "more", first=50)
    for photo in sorted(more.iterdir())[24:]:
        photo.write_bytes(photo.read_bytes()[:300])
    with Output.open(url) as out, pytest.raises(JobError, match=r"\d+ of 48 photos are bad"):
        add(Source.of(more), out, replace(HERE, max_bad_share=0.25))
    assert [name for name in names if name.startswith("group-") and name.endswith(".tar")]
    assert "revisions/000002.parquet" in names
    assert stored(url) == before


@pytest.mark.parametrize("lost", REVISION_FILES)
def test_an_addition_of_which_a_file_never_arrives_at_a_url_can_be_made_again(memory, tmp_path, monkeypatch, lost):
    photos, more = write_cells(tmp_path / "photos"), Source.of(write_cells(tmp_path / "more", first=50))
    build(photos, tmp_path / "city", SMALL, HERE)
    add(more, tmp_path / "city", HERE)
    build_at(memory, photos)
    put = Store.put

    def lose(store: Store, path: Path, name: str) -> None:
        if name == f"revisions/000002{lost}":
            time.sleep(0.1)  # whatever goes beside it arrives
            raise JobError("the network went away")
        put(store, path, name)

    monkeypatch.setattr(Store, "put", lose)
    with Output.open(memory) as out, pytest.raises(JobError, match="went away"):
        add(more, out, HERE)
    monkeypatch.setattr(Store, "put", put)
    assert "revisions/000002.parquet" not in Store.at(memory).sizes()
    build_at(memory, photos)
    with Output.open(memory) as out:
        add(more, out, HERE)
    assert stored(memory) == contents(tmp_path / "city")


def test_the_plan_is_the_first_file_of_a_build_at_a_url(photos, memory, monkeypatch):
    def put(store: Store, path: Path, name: str) -> None:
        raise JobError(f"{name} cannot be written")

    monkeypatch.setattr(Store, "put", put)
    with pytest.raises(JobError, match=r"^plan.json cannot"):
        build_at(memory, photos)


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
    assert f"going on: {len(done)} of 9 shards done before" in last.stdout
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
        assert dry_run(Source.of(photos), out, SMALL, Machinery(1)).bytes_free is None
    assert list(Store.at(memory).sizes()) == ["listing.parquet"]


def test_a_build_that_was_killed_at_its_first_file_at_a_url_goes_on(photos, memory):
    store = Store.at(memory)
    store.files.pipe_file(store._path(".plan.json.7-0a1b2c3d.partial"), b"{")
    build_at(memory, photos)
    assert "dataset.json" in stored(memory)


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
        with pytest.raises(JobError, match=f"^{url}/dataset.json: no finished data set here"):
            Dataset.open(url)
    with pytest.raises(JobError, match="nonsense"):
        Dataset.open("nonsense://x/y")


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
    (place / CHECKSUMS).write_text("rotten")
    with pytest.raises(JobError, match=r"checksums\.txt: damaged .*; run shards/verify\.py --repair"):
        build_at(url, photos)
    with pytest.raises(JobError, match=r"delete checksums\.txt there if it is damaged, and the tables"):
        Arguments(url, repair=True)
    (place / CHECKSUMS).unlink()
    for stem in ("group-01/group-01-000001", "group-02/group-02-000000", "group-03/group-03-000001"):
        (place / f"{stem}.parquet").unlink()
    build_at(url, photos)
    (place / "thesis.txt").unlink()
    assert stored(url) == contents(whole)


def test_deleting_waits_out_a_moment_of_the_network_and_takes_what_is_gone_for_deleted(memory, monkeypatch):
    monkeypatch.setattr("shards.store._PAUSES", (0.01, 0.01, 0.01))
    store = Store.at(memory)
    store.files.pipe_file(f"{store.root}/a", b"1")
    answers: list[Exception | None] = [ConnectionResetError(), FileNotFoundError()]  # deleted, and the answer lost
    delete = store.files.rm_file

    def rm_file(path: str) -> None:
        if store.files.exists(path):
            delete(path)
        if answers and (fault := answers.pop(0)) is not None:
            raise fault

    monkeypatch.setattr(store.files, "rm_file", rm_file)
    store.remove(["a"])
    assert answers == []
    assert not store.files.exists(f"{store.root}/a")
