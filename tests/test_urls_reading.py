"""Data sets at URLs: read as from a folder, in training and by the commands that show."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HERE
from PIL import Image
from test_build import ROOT
from tiny import configure, train_here, write_dataset
from url_places import CELLS, SHARDS, bucket, cache, memory, photos, server, small_shards, upload, whole, write_cells  # noqa: F401  (fixtures)

from preprocessing.output import Output
from preprocessing.sources import Source
from preprocessing.updates import add
from shards.console import JobError
from shards.dataset import Dataset
from shards.layout import MANIFEST
from shards.loader import Loader, Mode
from shards.overview import describe
from shards.pictures import contact_sheet
from shards.store import Store
from shards.stream import StreamSettings
from training.checkpoint import list_checkpoints, load_checkpoint
from training.interruption import Interruption
from training.run_folder import read_losses


def batches(
    dataset: Dataset, mode: Mode, steps: int = 6, max_bad_share: float = 1.0, **options
) -> tuple[list[torch.Tensor], int]:
    """Images and labels of some steps, and how many photos were replaced."""
    groups = np.array(dataset.classes.groups)
    loader = Loader(
        dataset, lambda step: np.resize(groups, 24), batch_size=24, image_size=32, seed=4, mode=mode,
        stream=StreamSettings(run=5, window=96), **{"decoder": "cpu", **options},
    )  # fmt: skip
    loader._supply.max_bad_share = max_bad_share
    taken = [part.clone() for b in loader.batches(0, steps) for part in (b.images, b.labels)]
    loader.close()
    return taken, loader.failures


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


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


@contextmanager
def http_server(folder: Path, answer: type[SimpleHTTPRequestHandler] = SimpleHTTPRequestHandler) -> Iterator[str]:
    """Serves `folder` as `python -m http.server` does: whole files, whatever range is asked for."""
    pytest.importorskip("aiohttp")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(answer, directory=str(folder))) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("mode", ["indexed", "stream"])
def test_a_server_that_sends_whole_files_for_parts_is_one_clear_error(whole, mode):
    with http_server(whole) as url, pytest.raises(JobError, match=rf"{url}: .* must serve ranges"):
        batches(Dataset.open(url), mode)


Answer = tuple[int, bytes]


def serving_ranges(answer: Callable[[str, bytes, int, int], Answer]) -> type[SimpleHTTPRequestHandler]:
    """A server of ranges: `answer` gives status and body by a file's name, bytes and the range's begin and end."""

    class ServingRanges(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if "Range" not in self.headers:
                return super().do_GET()
            begin, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            status, body = answer(self.path, Path(self.translate_path(self.path)).read_bytes(), begin, last + 1)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return ServingRanges


def as_asked(name: str, data: bytes, begin: int, end: int) -> Answer:
    return 206, data[begin:end]


def less_of_a_tar(name: str, data: bytes, begin: int, end: int) -> Answer:
    return 206, data[begin : end - 7 if "group-03-000001.tar" in name else end]


def nothing_of_a_tar(name: str, data: bytes, begin: int, end: int) -> Answer:
    return 206, b"" if "group-03-000001.tar" in name else data[begin:end]


def another_range_of_a_tar(name: str, data: bytes, begin: int, end: int) -> Answer:
    shift = 512 if "group-03-000001.tar" in name else 0
    return 206, data[begin - shift : end - shift]


def no_tar(name: str, data: bytes, begin: int, end: int) -> Answer:
    return (403, b"") if "group-03-000001.tar" in name else (206, data[begin:end])


@pytest.mark.parametrize("decoder", ["cpu", "dali"])
@pytest.mark.parametrize("mode", ["indexed", "stream"])
def test_batches_over_http_are_those_from_a_folder(whole, mode, decoder):
    with http_server(whole, serving_ranges(as_asked)) as url:
        taken, failures = batches(Dataset.open(url), mode, decoder=decoder)
    assert same(taken, batches(Dataset.open(whole), mode, decoder=decoder)[0])
    assert failures == 0


@pytest.mark.parametrize("answer", [less_of_a_tar, nothing_of_a_tar, another_range_of_a_tar, no_tar])
@pytest.mark.parametrize("mode", ["indexed", "stream"])
def test_photos_of_which_a_server_sends_less_or_other_bytes_are_replaced_counted_and_named(whole, caplog, mode, answer):
    expected, _ = batches(Dataset.open(whole), mode)
    with http_server(whole, serving_ranges(answer)) as url:
        taken, failures = batches(Dataset.open(url), mode)
    named = [record.getMessage() for record in caplog.records if "replaced by the next draw" in record.getMessage()]
    assert len(named) == failures
    assert all(f"{url}/group-03/group-03-000001.tar at byte" in line for line in named)
    images = zip(taken[::2], expected[::2], strict=True)
    assert 0 < sum(not torch.equal(a[i], b[i]) for a, b in images for i in range(24)) <= failures


def no_tars(name: str, data: bytes, begin: int, end: int) -> Answer:
    return (403, b"") if name.endswith(".tar") else (206, data[begin:end])


@pytest.mark.parametrize("mode", ["indexed", "stream"])
def test_a_server_that_forbids_the_tars_is_not_a_damaged_data_set(whole, mode):
    with http_server(whole, serving_ranges(no_tars)) as url:
        dataset = Dataset.open(url)
        with pytest.raises(JobError, match=r"group-0\d-00000\d.tar at byte .*403.*; allow this user to read them"):
            batches(dataset, mode, max_bad_share=0.01)


@pytest.mark.parametrize("mode", ["indexed", "stream"])
def test_a_server_that_stops_serving_ranges_under_a_running_loader_is_one_clear_error(whole, mode):
    asked: list[str] = []

    def whole_files_later(name: str, data: bytes, begin: int, end: int) -> Answer:
        asked.append(name)
        return (206, data[begin:end]) if len(asked) < 40 else (200, data)

    with (
        http_server(whole, serving_ranges(whole_files_later)) as url,
        pytest.raises(JobError, match=rf"{url}: .* must serve ranges"),
    ):
        batches(Dataset.open(url), mode, steps=40)
    assert len(asked) >= 40


def silent_about_tars(asked: threading.Event, answer: threading.Event) -> type[SimpleHTTPRequestHandler]:
    """What tells when it is asked for a tar, and waits before it answers."""

    class SilentAboutTars(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith(".tar"):
                asked.set()
                answer.wait()
            elif "Range" in self.headers:
                self.send_response(206)
                self.send_header("Content-Length", "1")
                self.end_headers()
                self.wfile.write(b"{")
            else:
                super().do_GET()

    return SilentAboutTars


@pytest.mark.parametrize("mode", ["indexed", "stream"])
def test_closing_does_not_wait_for_a_server_that_is_silent(whole, mode):
    asked, answer = threading.Event(), threading.Event()
    with http_server(whole, silent_about_tars(asked, answer)) as url:
        dataset = Dataset.open(url)
        groups = np.resize(dataset.classes.groups, 24)
        loader = Loader(dataset, lambda step: groups, batch_size=24, image_size=32, seed=4, mode=mode, decoder="cpu")
        outcome: Future[object] = Future()

        def consume() -> None:
            try:
                outcome.set_result(next(loader.batches(0, 3)))
            except Exception as error:
                outcome.set_exception(error)

        threading.Thread(target=consume, daemon=True).start()
        assert asked.wait(30)
        closing = threading.Thread(target=loader.close, daemon=True)
        closing.start()
        closing.join(20)  # a request is given up after 30 s
        assert not closing.is_alive()
        assert outcome.exception(timeout=20) is not None
        answer.set()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["indexed", "stream"])
def test_a_signal_while_a_server_is_silent_saves_and_leaves_and_the_run_goes_on_as_if_nothing_happened(tmp_path, mode):
    folder, run = write_dataset(tmp_path / "tiny").path, tmp_path / "run"
    whole = train_here(configure(folder, tmp_path / "whole", read=mode))
    train_here(configure(folder, run, read=mode, epochs=1))
    asked, answer = threading.Event(), threading.Event()

    def ask() -> None:
        asked.wait(60)
        os.kill(os.getpid(), signal.SIGTERM)
        answer.wait(20)
        answer.set()  # else a training that waits for it ends only after many requests of 30 s

    with http_server(folder, silent_about_tars(asked, answer)) as url, Interruption() as interruption:
        threading.Thread(target=ask, daemon=True).start()
        stopped = train_here(configure(url, run, read=mode, resume=True), interruption)
        answer.set()
    assert stopped.progress.step == 8
    assert load_checkpoint(list_checkpoints(run)[0]).config["shards"] == url
    train_here(configure(folder, run, read=mode, resume=True))
    assert read_losses(run) == read_losses(whole.config.out)


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


@pytest.mark.parametrize("lost", ["group-02/group-02-000000.parquet", "classes.parquet", "dataset.json", "group-02"])
def test_what_is_deleted_from_a_mirror_is_fetched_again(whole, memory, lost):
    upload(whole, memory)
    path = Dataset.open(memory).path / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert batches(Dataset.open(memory), "indexed")[1] == 0


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
