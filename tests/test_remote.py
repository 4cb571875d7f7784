"""Photos behind http:// on a network with faults: a real server that fails in chosen ways."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import SETTINGS
from photos import jpeg, name_at, write_csv
from s3 import s3_server
from test_build import ROOT

from preprocessing.plan import ShardTask, make_plan
from preprocessing.resize import Resizer
from preprocessing.shard_task import ShardResult, write_shard
from preprocessing.sources import Source
from shards.console import JobError
from shards.store import Store

pytest.importorskip("aiohttp")

Fault = Callable[[str, int], int | str | None]
"""By a photo's name and how often it was asked for (from 1): a status, "reset", "cut", or None for an answer."""


class Server:
    """Serves `photos` below /photos, with faults."""

    def __init__(self) -> None:
        self.photos = {name_at(500003, 4180003, i): jpeg(96, i) for i in range(12)}
        self.fault: Fault = lambda name, attempt: None
        self.asked: Counter[str] = Counter()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that went away
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}/photos"

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.removeprefix("/photos/")
        self.asked[name] += 1
        data = self.photos.get(name)
        fault = self.fault(name, self.asked[name]) or (404 if data is None else None)
        if fault == "reset":
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            request.connection.close()
            return
        if isinstance(fault, int):
            request.send_response(fault)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        assert data is not None
        ranged = "Range" in request.headers
        if ranged and not data:
            request.send_response(416)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(206 if ranged else 200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        if fault == "cut":
            request.connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self._thread.is_alive():
            self._http.shutdown()
            self._thread.join()
            self._http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def task_of(server: Server, folder: Path) -> tuple[ShardTask, Source]:
    places = {"east": [500003.0] * len(server.photos), "north": [4180003.0] * len(server.photos)}
    source = Source.of(write_csv(folder / "list.csv", path=list(server.photos), **places), server.url)
    return next(make_plan(source.photos(None, 0), SETTINGS).tasks()), source


def write(server: Server, folder: Path) -> ShardResult:
    task, source = task_of(server, folder)
    return write_shard(task, [source], folder / "out", Resizer(64, 90), lambda *_: True)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.store._PAUSES", (0.01, 0.02, 0.03))


def only(wanted: str, fault: int | str) -> Fault:
    """A fault of one photo at all times."""
    return lambda name, attempt: fault if wanted in name else None


@pytest.mark.parametrize("fault", [503, 500, 429, "reset", "cut"])
def test_a_fault_of_a_moment_sets_no_photo_aside(server, tmp_path, fault):
    server.fault = lambda name, attempt: fault if attempt <= 2 else None
    result = write(server, tmp_path)
    assert (result.images, result.bad) == (12, [])


@pytest.mark.parametrize(
    ("fault", "reason", "asked"),
    [
        (404, "missing", 1),
        (403, "unreadable", 1),
        (410, "unreadable", 1),
        (500, "unreadable", 4),
        ("cut", "unreadable", 4),
    ],
)
@pytest.mark.parametrize("wanted", ["pano00000", "pano00005"])
def test_a_photo_that_stays_out_of_reach_is_set_aside_and_the_rest_goes_on(
    server, tmp_path, fault, reason, asked, wanted
):
    server.fault = only(wanted, fault)
    result = write(server, tmp_path)
    assert [(wanted in b.source, b.reason) for b in result.bad] == [(True, reason)]
    assert result.images == 11
    assert next(count for name, count in server.asked.items() if wanted in name) == asked


def test_an_empty_photo_is_set_aside(server, tmp_path):
    server.photos[next(iter(server.photos))] = b""
    result = write(server, tmp_path)
    assert [b.reason for b in result.bad] == ["empty file"]


@pytest.mark.parametrize("fault", [503, 403, "reset"])
def test_a_server_that_fails_for_all_photos_midway_stops_the_job_with_its_url_and_nothing_is_set_aside(
    server, tmp_path, fault
):
    server.fault = lambda name, attempt: fault if server.asked.total() > 5 else None
    with pytest.raises(JobError, match=rf"{server.url}: cannot be read .*same command again"):
        write(server, tmp_path)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    server.fault = lambda name, attempt: None
    assert write(server, tmp_path).images == 12


def test_a_server_that_never_answers_is_named(server, tmp_path):
    server.close()
    with pytest.raises(JobError, match=rf"{server.url}: cannot be read"):
        write(server, tmp_path)


@pytest.fixture
def silence(server) -> Iterator[threading.Event]:
    """Set at the end: until then the faults that wait for it are silent."""
    event = threading.Event()
    yield event
    event.set()


def test_a_server_that_is_silent_from_the_first_request_is_named_without_asking_on(
    server, tmp_path, silence, monkeypatch
):
    monkeypatch.setattr("shards.store._FIRST_ANSWER", 0.3)
    server.fault = lambda name, attempt: silence.wait() and None
    with pytest.raises(JobError, match=rf"{server.url}: cannot be read \(TimeoutError no answer within"):
        write(server, tmp_path)
    assert server.asked.total() == 1


def test_a_server_that_has_answered_may_be_silent_for_longer(server, tmp_path, silence, monkeypatch):
    monkeypatch.setattr("shards.store._FIRST_ANSWER", 0.3)
    threading.Timer(1, silence.set).start()
    server.fault = lambda name, attempt: silence.wait() and None if server.asked.total() == 4 else None
    assert write(server, tmp_path).images == 12


def test_an_empty_object_on_s3_is_set_aside(tmp_path):
    with s3_server() as bucket:
        store = Store.at(bucket)
        photos = {"empty.jpg": b""} | {f"{i}.jpg": jpeg(96, i) for i in range(11)}
        for name, data in photos.items():
            store.files.pipe_file(f"{store.root}/{name}", data)
        source = Source.of(
            write_csv(tmp_path / "list.csv", path=list(photos), east=[5.0] * 12, north=[4.0] * 12), bucket
        )
        task = next(make_plan(source.photos(None, 0), SETTINGS).tasks())
        result = write_shard(task, [source], tmp_path / "out", Resizer(64, 90), lambda *_: True)
    assert ([b.source for b in result.bad], [b.reason for b in result.bad]) == (["empty.jpg"], ["empty file"])


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_a_server_that_is_silent(server, tmp_path):
    task_of(server, tmp_path)
    silence = threading.Event()
    trial = len(server.photos)  # which reads every photo once
    server.fault = lambda name, attempt: silence.wait() and None if server.asked.total() > trial + 5 else None
    command: list[str | Path] = [sys.executable, ROOT / "preprocessing" / "build_shards.py"]
    command += ["--workers", "1", "--image-size", "64"]
    process = subprocess.Popen(
        [*command, "--source", tmp_path / "list.csv", "--root", server.url, "--out", tmp_path / "out"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    while server.asked.total() <= trial + 5:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    silence.set()
    assert process.returncode == 130
    assert "goes on from there" in printed
    assert "Traceback" not in printed
    assert "starting workers" in printed
