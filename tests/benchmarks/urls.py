"""Reading a data set at a URL: what `stream` gains over `indexed` where every request takes its time.

    python tests/benchmarks/urls.py [--delay 0.02] [--json FILE]

An HTTP server in a process of its own (on a core of its own, where there are two) answers each request after a delay.
The loader has one core, makes batches of 64 crops of 224 pixels, and reads through fsspec; rows:

`indexed, asked for when needed`   a request for each photo, when a decoding thread comes to it
`indexed`                          a request for each photo, coming batches asked for ahead
`stream`                           a request for each run of up to 32 neighbours
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import paths  # noqa: F401
import torch
from loader import BATCH, multiply, ours, render_shards

from shards.checksums import seal
from shards.dataset import Dataset
from shards.layout import CHECKSUMS
from shards.range_reader import RangeReader
from shards.stream import StreamSettings

ROUNDS = 3
WINDOW = StreamSettings.window
EXPECT = RangeReader.expect
ROWS = {  # mode, asking ahead, images a round (of `stream` whole windows, since it asks for one at a time)
    "indexed, asked for when needed": ("indexed", False, 8 * BATCH),
    "indexed": ("indexed", True, WINDOW),
    "stream": ("stream", True, 3 * WINDOW),
}
_RANGE = re.compile(rb"[Rr]ange: bytes=(\d+)-(\d+)")


def serve(folder: Path, delay: float, core: int, out: Connection) -> None:
    """Serve files with ranges; the path /count answers how many requests there were."""
    os.sched_setaffinity(0, {core})
    count = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                writer.close()
                return
            name = head.split(b" ", 2)[1].decode().lstrip("/")
            if name.endswith("/count"):
                status, data = "200 OK", str(count).encode()
            else:
                count += 1
                await asyncio.sleep(delay)
                try:
                    with open(folder / name, "rb") as file:
                        wanted = _RANGE.search(head)
                        file.seek(int(wanted[1]) if wanted else 0)
                        data = file.read(int(wanted[2]) - int(wanted[1]) + 1 if wanted else -1)
                        status = "206 Partial Content" if wanted else "200 OK"
                except OSError:
                    status, data = "404 Not Found", b""
            writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\n\r\n".encode())
            if not head.startswith(b"HEAD"):
                writer.write(data)

    async def main() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=256)
        out.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


def measure(batches: Iterator[int], requests: Dataset, images: int) -> tuple[float, float]:
    """Images a second and requests an image over so many images, after a warm-up of at most a window."""
    assert requests.store is not None
    for _ in range(min(images, WINDOW) // BATCH):
        next(batches)
    before, begin = int(requests.store.read("count")), time.perf_counter()
    for _ in range(images // BATCH):
        next(batches)
    spent = time.perf_counter() - begin
    asked = int(requests.store.read("count")) - before
    batches.close()  # type: ignore[attr-defined]
    return images / spent, asked / images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay", type=float, default=0.02, help="seconds that a request takes")
    parser.add_argument("--json", type=Path, help="write the rows as JSON to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["DIVIDE_AND_CLASSIFY_CACHE"] = f"{scratch}/cache"
        small, shards = render_shards(Path(scratch)), Path(scratch) / "many"
        multiply(small, shards, -(-30_000 // Dataset.open(small).manifest.images))
        (shards / CHECKSUMS).unlink()
        seal(shards)
        ours_end, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        server = context.Process(target=serve, args=(Path(scratch), arguments.delay, cores[0], theirs), daemon=True)
        server.start()
        url = f"http://127.0.0.1:{ours_end.recv()}/many"
        os.sched_setaffinity(0, {cores[-1]})
        counter = Dataset.open(url)
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in ROWS}
        for _ in range(ROUNDS):
            for name, (mode, ahead, images) in ROWS.items():
                RangeReader.expect = EXPECT if ahead else lambda *_: None  # type: ignore[method-assign]
                measured[name].append(measure(ours(url, mode, "cpu", 1), counter, images))
        server.terminate()
    rows = [
        {"name": name, "delay_seconds": arguments.delay, "images_per_second": statistics.median(r for r, _ in found),
         "requests_per_image": statistics.median(n for _, n in found)}
        for name, found in measured.items()
    ]  # fmt: skip
    print(f"\n{'':34}{'images/s':>10}{'requests an image':>20}")
    for row in rows:
        print(f"{row['name']:34}{row['images_per_second']:10.0f}{row['requests_per_image']:20.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
