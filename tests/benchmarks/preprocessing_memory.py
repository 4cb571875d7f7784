"""Memory of the main process and of the workers while they resize: does it grow with the data set?

    python tests/benchmarks/preprocessing_memory.py [--samples 100000 1000000] [--workers 2] [--json FILE]

The photos are hard links to a few 32-pixel pictures under distinct names, made into 16-pixel ones: it is about memory,
not about speed. `main_before` and `main_peak` are the main process at the first shard and at most until the last one;
`worker_peak` is the largest worker's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import paths  # noqa: F401
import simplejpeg

from shards.names import PhotoName, format_name

BUILD = Path(__file__).resolve().parents[2] / "preprocessing" / "build_shards.py"
PER_CELL, PER_FOLDER, PICTURES = 20, 10_000, 100


def make_photos(folder: Path, count: int) -> None:
    """`count` photos in cells of 20, hard links to 100 pictures."""
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir(parents=True)
    for i in range(PICTURES):
        picture = cv2.resize(rng.integers(0, 256, (6, 6, 3), np.uint8), (32, 32))
        (folder / "pictures" / f"{i}.bin").write_bytes(simplejpeg.encode_jpeg(picture, 90))
    for i in range(count):
        if i % PER_FOLDER == 0:
            (folder / f"{i // PER_FOLDER:04d}").mkdir()
        cell = i // PER_CELL
        name = PhotoName(540000 + 20 * (cell % 250) + 3, 4170000 + 20 * (cell // 250) + 3, 10, "S", pano=f"p{i:07d}")
        (folder / f"{i // PER_FOLDER:04d}" / format_name(name)).hardlink_to(folder / "pictures" / f"{i % PICTURES}.bin")


def rss(process: int | str) -> int:
    """Resident bytes of a process, 0 where it has ended."""
    try:
        return int(Path(f"/proc/{process}/status").read_text().split("VmRSS:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return 0


def workers_of(process: int) -> list[str]:
    """The spawned processes that resize."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


def measure(count: int, workers: int) -> dict[str, object]:
    """Build `count` samples and watch the processes."""
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch) / "photos", Path(scratch) / "out"
        make_photos(source, count)
        command = [sys.executable, BUILD, "--source", source, "--out", out, "--image-size", "16"]
        start = time.perf_counter()
        build = subprocess.Popen([*map(str, command), "--workers", str(workers)], stderr=subprocess.DEVNULL)
        before = peak = worker_peak = 0
        while build.poll() is None:
            try:
                working = workers_of(build.pid)
            except OSError:
                continue
            if working:
                now = rss(build.pid)
                before, peak = before or now, max(peak, now)
                worker_peak = max(worker_peak, *(rss(w) for w in working))
            time.sleep(0.2)
        if build.returncode:
            raise SystemExit(f"the build ended with code {build.returncode}")
    return {
        "name": "memory",
        "samples": count,
        "main_before": before,
        "main_peak": peak,
        "worker_peak": worker_peak,
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows as JSON to this file")
    arguments = parser.parse_args()
    rows = [measure(count, arguments.workers) for count in arguments.samples]
    print(f"{'samples':>10} {'main, first shard':>18} {'main, peak':>11} {'worker, peak':>13}  (MB)")
    for row in rows:
        before, peak, worker = (float(str(row[k])) / 1e6 for k in ("main_before", "main_peak", "worker_peak"))
        print(f"{row['samples']:>10,} {before:18.0f} {peak:11.0f} {worker:13.0f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
