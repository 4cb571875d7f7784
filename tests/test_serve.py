"""evaluation/serve.py: a real server asked over HTTP."""

import asyncio
import json
import signal
import socket
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from page_server import AT_ONCE, MEGABYTES, Server, encoded, serving, square, write_served
from photos import bomb
from PIL import Image
from tiny import SOUTH, WEST, class_table, photo, write_dataset
from uvicorn.server import ServerState

from evaluation import predict, serve, web_app
from shards.console import JobError, WrongArguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_served(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder) as server:
        yield server


def test_an_upload_is_answered_as_predict_answers_the_file(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sorted((folder / "queries").iterdir())[5]
    monkeypatch.setattr(sys, "argv", ["predict.py", "--checkpoint", str(folder / "run"), str(path), "--json", "--cpu"])
    assert predict.main() == 0
    expected = json.loads(capsys.readouterr().out)
    status, said = server.locate(path.read_bytes(), path.name)
    assert status == 200
    assert said["utm_zone"] == expected["utm_zone"]
    (ours,), (theirs,) = said["photos"], expected["photos"]
    assert ours["photo"] == path.name
    assert ours["known_position"] == theirs["known_position"]
    for one, other in zip(ours["places"], theirs["places"], strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)
    east, north = (float(part) for part in path.name.split("@")[1:3])
    assert said["known_east_north"] == pytest.approx([east, north], abs=0.01)


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"progressive": True})]
)
def test_the_accepted_formats_are_answered(server: Server, kind: str, options: dict[str, Any]) -> None:
    status, said = server.locate(encoded(photo(WEST, SOUTH, 64, 3), kind, **options))
    assert status == 200
    assert said["photos"][0]["known_position"] is None
    assert len(said["photos"][0]["places"]) == 5


def test_exif_positions_and_rotation_are_taken_from_an_upload(server: Server) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8825).update({1: "N", 2: (37.0, 46.0, 1.2), 3: "W", 4: (122.0, 30.0, 0.0)})
    upright = photo(WEST, SOUTH, 64, 3)
    exif[0x0112] = 8  # to be turned by 90 degrees to the left
    turned = encoded(np.rot90(upright, -1).copy(), "PNG", exif=exif)
    status, said = server.locate(turned)
    assert status == 200
    assert said["photos"][0]["known_position"]["source"] == "exif"
    assert said["photos"][0]["places"][0]["distance_m"] < 200
    _, straight = server.locate(encoded(upright, "PNG"))
    confidences = [[p["confidence"] for p in s["photos"][0]["places"]] for s in (said, straight)]
    assert confidences[0] == pytest.approx(confidences[1], rel=1e-4)


def test_known_photos_are_those_of_the_answered_cell_the_most_alike_first(server: Server) -> None:
    _, said = server.locate(encoded(photo(WEST, SOUTH, 32, 3)))
    status, headers, body = server.ask("GET", f"/known/{said['answer']}/1")
    photos, place = json.loads(body)["photos"], said["photos"][0]["places"][1]
    assert (status, headers["content-type"]) == (200, "application/json")
    assert len(photos) == 4
    likeness = [photo["likeness"] for photo in photos]
    assert likeness == sorted(likeness, reverse=True)
    for shown in photos:
        assert shown["picture"].startswith("data:image/jpeg;base64,")
        # tiny's photos stand at the corner of their cell, the answer is its centre
        assert (shown["east"], shown["north"]) == (place["east"] - 10, place["north"] - 10)
    for address in (f"/known/{said['answer']}/9", "/known/nothing/0", f"/known/{said['answer']}/-1"):
        assert server.ask("GET", address)[0] == 404


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "empty"),
        (b"no photo at all", 415, "no photo of a known format"),
        (b"GIF89a" + bytes(100), 415, "no photo of a known format"),
        (encoded(photo(WEST, SOUTH, 64, 0))[:600], 422, "damaged"),
        (square(30_000), 413, "more pixels"),
        (square(2_500), 413, "2,500 x 2,500 pixels"),
        (bomb(30_000, 30_000), 413, "more pixels"),
        (bomb(2_400, 2_400), 413, "2,400 x 2,400 pixels"),
        (encoded(np.zeros((2000, 20, 3), np.uint8)), 422, "10 times"),
        (encoded(photo(WEST, SOUTH, 64, 0), progressive=True) + b"\xff\xda" * 100, 422, "scans"),
        (bytes(MEGABYTES * 10**6 + 1), 413, "larger than the 1 MB"),
    ],
    ids=["empty", "text", "gif", "cut", "huge", "large", "bomb", "small-bomb", "strip", "scans", "bytes"],
)  # fmt: skip
def test_a_bad_upload_is_refused_in_words(server: Server, body: bytes, status: int, words: str) -> None:
    answered, said = server.locate(body)
    assert answered == status
    assert words in said["error"]
    assert server.locate(encoded(photo(WEST, SOUTH, 32, 3)))[0] == 200


def test_a_body_without_a_length_is_refused_once_it_passes_the_limit(server: Server) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(40):
            sent += 100_000
            yield bytes(100_000)

    status, _, _ = server.ask("POST", "/locate", chunks(), {"Transfer-Encoding": "chunked"}, chunked=True)
    assert status == 413
    small = encoded(photo(WEST, SOUTH, 32, 3))
    headers = {"Transfer-Encoding": "chunked"}
    assert server.ask("POST", "/locate", iter([small[:90], small[90:]]), headers, chunked=True)[0] == 200


def test_a_body_larger_than_its_declared_length_counts_as_declared(server: Server) -> None:
    small, large = encoded(photo(WEST, SOUTH, 32, 3)), bytes(3 * MEGABYTES * 10**6)
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as wire:
        head = f"POST /locate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(small)}\r\n\r\n"
        wire.sendall(head.encode() + small + b"\r\n\r\n" + large[:2000])
        reply = wire.recv(100)
    assert reply.startswith(b"HTTP/1.1 200")


def test_a_declared_length_beyond_the_limit_is_refused_before_the_body_comes(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as wire:
        wire.sendall(b"POST /locate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n")
        assert wire.recv(100).startswith(b"HTTP/1.1 413")
    for odd in (b"-1", b"many"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as wire:
            wire.sendall(b"POST /locate HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + odd + b"\r\n\r\n")
            assert wire.recv(100).startswith(b"HTTP/1.1 400")


def test_twenty_uploads_at_once_are_all_answered_each_with_its_own_place(server: Server, folder: Path) -> None:
    paths = sorted((folder / "queries").iterdir())
    paths = (paths + paths)[:20]
    alone = {path: server.locate(path.read_bytes(), path.name)[1]["photos"] for path in dict.fromkeys(paths)}
    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(lambda path: server.locate(path.read_bytes(), path.name), paths))
    for path, (status, said) in zip(paths, together, strict=True):
        assert status == 200
        assert said["photos"][0]["photo"] == path.name
        places, expected = said["photos"][0]["places"], alone[path][0]["places"]
        assert [(p["group"], p["label"]) for p in places] == [(p["group"], p["label"]) for p in expected]


def test_requests_beyond_the_bound_are_turned_away_and_a_place_that_is_given_up_is_free_again(server: Server) -> None:
    small = encoded(photo(WEST, SOUTH, 32, 3))
    wires = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(AT_ONCE)]
    for wire in wires:
        wire.sendall(f"POST /locate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(small)}\r\n\r\n".encode())
        wire.sendall(small[:100])
    _wait_until(lambda: server.locate(small)[0] == 503)
    assert f"{AT_ONCE} photos are being answered" in server.locate(small)[1]["error"]
    for wire in wires:
        wire.close()
    _wait_until(lambda: server.locate(small)[0] == 200)


def test_a_client_that_dawdles_over_its_headers_is_cut_off_and_one_with_a_slow_photo_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(web_app, "_HEAD_SECONDS", 0.5)
    request = b"PUT / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 20\r\n\r\n"

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        while scope["method"] == "PUT" and (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def dawdle(port: int, at_once: bytes, slowly: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(at_once)
        answered = asyncio.create_task(reader.read())
        for byte in slowly:
            if (await asyncio.wait([answered], timeout=0.05))[0]:
                break
            writer.write(bytes([byte]))
        return await answered

    async def ask() -> tuple[bytes, ...]:
        config = uvicorn.Config(answer, http=web_app.HastyProtocol, ws="none", lifespan="off", log_level="error")
        config.load()
        state, loop = ServerState(), asyncio.get_running_loop()
        server = await loop.create_server(lambda: web_app.HastyProtocol(config, state, {}), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, asyncio.timeout(60):
            return await asyncio.gather(
                dawdle(port, b"", b""),
                dawdle(port, b"", request * 99),
                dawdle(port, request + bytes(20), request * 99),
                dawdle(port, request.replace(b"PUT", b"POST").replace(b"20", b"9999"), bytes(9999)),
                dawdle(port, request, bytes(20)),
            )

    silent, slow_headers, slow_second, slow_rest, slow_photo = asyncio.run(ask())
    assert (silent, slow_headers) == (b"", b"")
    for answers in (slow_second, slow_rest, slow_photo):
        assert answers.startswith(b"HTTP/1.1 204")
        assert answers.count(b"HTTP/1.1") == 1


def _wait_until(holds: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize(
    "path",
    [
        "/../serve.py", "/..%2f..%2fetc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/page.js/../../serve.py",
        "/serve.js", "/serve_page/serve.js", "/known/../../etc/passwd", "/known/..%2f..%2fetc/0", "/known/x/0/../1",
        "/page.js%00", "/..\\..\\etc\\passwd", "/docs", "/openapi.json",
    ],
)  # fmt: skip
def test_no_file_of_the_server_can_be_reached(server: Server, path: str) -> None:
    status, _, body = server.ask("GET", path)
    assert status == 404
    assert "error" in json.loads(body)


def test_only_known_names_and_own_pages_are_answered(server: Server) -> None:
    for host in ("127.0.0.1", "localhost:1", "[::1]:80", "192.0.2.1", socket.gethostname().lower()):
        assert server.ask("GET", "/", headers={"Host": host})[0] == 200
    for host in ("rebound.example", "127.0.0.1.example:80", "localhost.example", ""):
        assert server.ask("GET", "/", headers={"Host": host})[0] == 421
    small = encoded(photo(WEST, SOUTH, 32, 3))
    own = {"Host": "localhost:8000", "Origin": "http://localhost:8000"}
    assert server.ask("POST", "/locate", small, own)[0] == 200
    for origin in ("http://other.example", "null", "http://localhost:9000"):
        assert server.ask("POST", "/locate", small, own | {"Origin": origin})[0] == 403


def test_every_answer_forbids_foreign_scripts_sniffing_and_sharing(server: Server) -> None:
    for method, path in (("GET", "/"), ("GET", "/page.js"), ("GET", "/nothing"), ("OPTIONS", "/locate"), ("POST", "/")):
        _, headers, _ = server.ask(method, path)
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert headers["x-content-type-options"] == "nosniff"
        assert not any(name.startswith("access-control") for name in headers)
        assert "server" not in headers


def test_a_name_from_outside_comes_back_as_json_without_its_folders(server: Server) -> None:
    small = encoded(photo(WEST, SOUTH, 32, 3))
    _, headers, body = server.ask("POST", "/locate?name=..%2F..%2Fetc%2F%3Cimg%20src=x%3E%00.jpg", small)
    assert headers["content-type"] == "application/json"
    assert json.loads(body)["photos"][0]["photo"] == "<img src=x>\0.jpg"
    assert str(Path.cwd()) not in body.decode()


@pytest.mark.slow
def test_ctrl_c_ends_the_server_with_130_and_without_a_traceback(folder: Path) -> None:
    server = Server("--checkpoint", folder / "run")
    assert server.address == f"http://127.0.0.1:{server.port}/"
    server.process.send_signal(signal.SIGINT)
    out, errors = server.process.communicate(timeout=30)
    assert server.process.returncode == 130
    assert (out, errors.strip()) == ("", "interrupted")


def run_here(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["serve.py", *map(str, words), "--cpu"])
    serve.main()


def test_what_cannot_be_served_is_one_clear_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--port", 0, "--checkpoint")
    with pytest.raises(JobError, match="absent"):
        run_here(monkeypatch, *words, tmp_path / "absent")
    with pytest.raises(JobError, match="no checkpoint of this project"):
        run_here(monkeypatch, *words, tmp_path)
    elsewhere = write_dataset(tmp_path / "elsewhere", class_table(shift=100))
    with pytest.raises(JobError, match="none of the checkpoint's cells"):
        run_here(monkeypatch, *words, folder / "run", "--shards", elsewhere.path)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(JobError, match=r"name another --port"):
        run_here(monkeypatch, "--checkpoint", folder / "run", "--port", taken.getsockname()[1])
    with pytest.raises(JobError, match=r"^--host x{70}: no name that a computer can have"):
        run_here(monkeypatch, *words, folder / "run", "--host", "x" * 70)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    monkeypatch.delitem(sys.modules, "evaluation.web_app", raising=False)
    with pytest.raises(JobError, match=r"divide-and-classify\[serve\]"):
        run_here(monkeypatch, *words, folder / "run")


@pytest.mark.parametrize("words", [["--port", "70000"], ["--at-once", "0"], ["--max-megapixels", "9999"]])
def test_wrong_arguments_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    with pytest.raises(WrongArguments, match=f"^{words[0]}: "):
        run_here(monkeypatch, "--checkpoint", folder / "run", *words)
