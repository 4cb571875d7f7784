"""`serve.py` running on a tiny model, for the tests of its addresses and of its page."""

import http.client
import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tiny import ROOT, SOUTH, WEST, photo, write_dataset, write_queries
from tiny_run import write_run

MEGABYTES, MEGAPIXELS, AT_ONCE = 1, 4, 24


class Server:
    """`serve.py` in a process of its own on a free port."""

    def __init__(self, *words: object) -> None:
        command = [sys.executable, ROOT / "evaluation" / "serve.py", "--port", "0", "--cpu", *words]
        self.process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        self.address = self.line.split()[0] if self.line else ""
        self.port = int(self.address.rstrip("/").rpartition(":")[2]) if self.line else 0

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, chunked: bool = False
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (lower case) and body of an answer; the path is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {}, encode_chunked=chunked)
            reply = connection.getresponse()
            return reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read()
        finally:
            connection.close()

    def locate(self, body: bytes, name: str = "") -> tuple[int, dict[str, Any]]:
        """Status and JSON of the answer to a photo."""
        status, _, said = self.ask("POST", f"/locate?name={name}", body)
        return status, json.loads(said)


def write_served(folder: Path) -> Path:
    """Write a run, its shards, and query photos."""
    write_run(folder / "run")
    write_dataset(folder / "shards")
    write_queries(folder / "queries")
    return folder


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server of what `write_served` wrote; nothing that it is sent may make it complain."""
    limits = ["--max-megabytes", MEGABYTES, "--max-megapixels", MEGAPIXELS, "--at-once", AT_ONCE]
    server = Server("--checkpoint", folder / "run", "--shards", folder / "shards", *limits)
    yield server
    server.process.terminate()
    _, errors = server.process.communicate(timeout=30)
    assert errors == ""


def encoded(image: np.ndarray, kind: str = "JPEG", **options: Any) -> bytes:
    """An image as the bytes of a file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def square(side: int) -> bytes:
    """A JPEG whose header claims that many pixels a side, and that ends soon after."""
    jpeg = bytearray(encoded(photo(WEST, SOUTH, 64, 0)))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", side, side)
    return bytes(jpeg)
