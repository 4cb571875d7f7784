"""Preprocessing beside what a user would do otherwise, one core, in turn, medians.

    python tests/benchmarks/preprocessing.py [--quick] [--json FILE] [--photos DIR] [--img2dataset PYTHON]

Resizing: photos of 512 pixels on disk (in the page cache) to 224-pixel JPEGs in tar shards on disk.
`ours` writes a shard as build_shards.py does; `pillow` decodes in full, reduces with the bicubic filter and uses
tarfile; `img2dataset` runs where --img2dataset names a Python that has it (give it an environment of its own); its rate
is that between 500 and 4,000 photos, so that its start-up does not count.
PSNR and SSIM are against a Lanczos reduction of the full-size photo, without JPEG. A second set of rows has the
same photos saved again at a JPEG quality that makes them 24 kB, the average of SF-XL's crops (`photo_bytes`).

`ours` has also what a sample takes on disk (tar, tables and index: `disk_bytes_per_image`), the rate of two workers
as a multiple of one's (`two_workers`), both processes started and at work, and the rate of the codec alone in memory
(`codec_images_per_second`: simplejpeg decoding at half scale, OpenCV's linear step, simplejpeg encoding).
--quick renders 150 photos and goes over them several times; they are in the page cache either way.

Partition: names that are already listed to a label for each, in a process of its own; peak bytes beside the names.
"""

import argparse
import bisect
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import paths  # noqa: F401
import pyarrow as pa
import simplejpeg
from PIL import Image

from preprocessing.city.plan import CitySettings, Plan
from preprocessing.city.streetview import Renderer
from preprocessing.city.writer import photo_path
from preprocessing.engine import Counts, Job, run_tasks
from preprocessing.partition import make_partition
from preprocessing.plan import ShardTask
from preprocessing.resize import Resizer
from preprocessing.shard_task import write_shard
from preprocessing.sources import Source
from shards.names import parse_utm

SIZE, QUALITY = 224, 90
SF_XL_BYTES = 24_000
PEER_COUNTS = (500, 4000)
ALL_CORES = os.sched_getaffinity(0)


@dataclass(frozen=True)
class Amount:
    """How much is measured: photos that are rendered or taken (`distinct`), photos a round of each way (those again and
    again), photos whose quality is compared, rounds, and photos for one of two workers."""

    distinct: int
    ours: int
    pillow: int
    compared: int
    rounds: int
    each_worker: int


QUICK = Amount(distinct=150, ours=1200, pillow=125, compared=50, rounds=3, each_worker=600)
FULL = Amount(distinct=1500, ours=3000, pillow=1000, compared=150, rounds=7, each_worker=3500)


def make_task(photos: list[str]) -> ShardTask:
    places = [0.0] * len(photos)
    unknown: list[None] = [None] * len(photos)
    return ShardTask(0, 0, photos, [0] * len(photos), places, places, [*unknown], [*unknown])


def ours(source: Path, photos: list[str], out: Path) -> None:
    write_shard(make_task(photos), [Source.of(source)], out, Resizer(SIZE, QUALITY), lambda *_: True)


def pillow(source: Path, photos: list[str], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / "shard.tar", "w") as tar:
        for i, photo in enumerate(photos):
            jpeg = pillow_jpeg(source / photo)
            for name, data in ((f"{i:09d}.jpg", jpeg), (f"{i:09d}.cls", b"0")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def pillow_jpeg(path: Path) -> bytes:
    with Image.open(path) as image:
        small = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def codec_rate(source: Path, photos: list[str]) -> float:
    """Images a second of the codec alone, in memory."""
    read = [(source / photo).read_bytes() for photo in photos]
    begin = time.perf_counter()
    for data in read:
        photo = simplejpeg.decode_jpeg(data, "RGB", fastupsample=True, min_height=SIZE, min_width=SIZE)
        small = cv2.resize(photo, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
        simplejpeg.encode_jpeg(small, QUALITY, "RGB", "420", fastdct=True)
    return len(read) / (time.perf_counter() - begin)


def img2dataset(python: str, source: Path, photos: list[str], out: Path) -> float:
    """Steady images a second of img2dataset on one core: by how much a long run takes longer than a short one, of
    `photos` repeated under other names. The short one is long enough for all its threads to have begun."""
    script = (
        "import sys\nfrom img2dataset import download\n"
        "if __name__ == '__main__':\n"
        "    urls, out = sys.argv[1:]\n"
        f"    download(url_list=urls, output_folder=out, output_format='webdataset', image_size={SIZE},\n"
        f"             resize_mode='center_crop', processes_count=1, thread_count=2, encode_quality={QUALITY},\n"
        "             resize_only_if_bigger=False, number_sample_per_shard=100000)\n"
    )
    out.mkdir(parents=True)
    (out / "run.py").write_text(script)
    seconds = []
    for count in PEER_COUNTS:
        urls = out / f"urls-{count}.txt"
        names = [out / f"{count}-{i}.jpg" for i in range(count)]
        for i, name in enumerate(names):
            name.symlink_to((source / photos[i % len(photos)]).resolve())
        urls.write_text("".join(f"file://{name.resolve()}\n" for name in names))
        begin = time.perf_counter()
        subprocess.run([python, out / "run.py", urls, out / f"out-{count}"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - begin)
        tars = [p for p in (out / f"out-{count}").glob("*.tar") if p.stat().st_size > 1000 * count]
        assert len(tars) == 1, f"img2dataset wrote no whole shard of {count} photos"
    shutil.rmtree(out)
    return (PEER_COUNTS[1] - PEER_COUNTS[0]) / (seconds[1] - seconds[0])


def rate(run: Callable[[Path, list[str], Path], None], source: Path, photos: list[str], scratch: Path) -> float:
    out = scratch / f"{run.__name__}-{time.monotonic_ns()}"
    begin = time.perf_counter()
    run(source, photos, out)
    return len(photos) / (time.perf_counter() - begin)


def disk_bytes(source: Path, photos: list[str], out: Path) -> float:
    """Bytes of a shard's files for each image: tar, DALI index and sample table, and 20 of the flat index."""
    ours(source, photos, out)
    return sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) / len(photos) + 20


def steady_rate(source: Path, photos: list[str], out: Path, workers: int, count: int) -> float:
    """Images a second of `workers` processes together, between the first and the last tenth of `count` images."""
    seen: list[tuple[float, int]] = []

    def progress(counts: Counts) -> bool:
        if 0.1 * count < counts.photos < 0.9 * count:
            seen.append((time.perf_counter(), counts.photos))
        return True

    size = count // (4 * workers)
    chosen = list(islice(cycle(photos), count))
    parts = [chosen[first : first + size] for first in range(0, count, size)]
    out.mkdir(parents=True)
    tasks = (replace(make_task(part), number=number) for number, part in enumerate(parts))
    for _ in run_tasks(Job((Source.of(source),), out, Resizer(SIZE, QUALITY)), tasks, workers, progress):
        pass
    return (seen[-1][1] - seen[0][1]) / (seen[-1][0] - seen[0][0])


def gain_of_two_workers(source: Path, photos: list[str], scratch: Path, rounds: int, count: int) -> float | None:
    """The rate of two workers as a multiple of one's, measured in turn; None on a machine of one core."""
    every = os.sched_getaffinity(0)
    if len(ALL_CORES) < 2:
        return None
    os.sched_setaffinity(0, ALL_CORES)
    try:
        rates = [
            [steady_rate(source, photos, scratch / f"{i}-{n}", n, n * count) for n in (1, 2)] for i in range(rounds)
        ]
    finally:
        os.sched_setaffinity(0, every)
    return statistics.median(two / one for one, two in rates)


def smaller_files(source: Path, photos: list[str], out: Path, target: float) -> int:
    """Save `photos` in `out` at the highest JPEG quality that keeps to `target` bytes on average; that quality."""

    def saved(photo: str, quality: int) -> bytes:
        return simplejpeg.encode_jpeg(simplejpeg.decode_jpeg((source / photo).read_bytes()), quality, "RGB", "420")

    few = photos[:: max(1, len(photos) // 20)]
    quality = bisect.bisect(range(30, 95), target, key=lambda q: statistics.mean(len(saved(p, q)) for p in few)) + 29
    for photo in photos:
        (out / photo).parent.mkdir(parents=True, exist_ok=True)
        (out / photo).write_bytes(saved(photo, quality))
    return quality


def qualities(source: Path, photos: list[str]) -> dict[str, tuple[float, float, float]]:
    """Mean PSNR (dB), mean SSIM and mean bytes of the small JPEGs, by way."""
    found: dict[str, list[tuple[float, float, float]]] = {"ours": [], "pillow": []}
    for photo in photos:
        data = (source / photo).read_bytes()
        whole = Image.open(io.BytesIO(data)).convert("RGB")
        exact = np.asarray(whole.resize((SIZE, SIZE), Image.Resampling.LANCZOS), np.float32)
        for name, small in (("ours", Resizer(SIZE, QUALITY)(data)), ("pillow", pillow_jpeg(source / photo))):
            result = simplejpeg.decode_jpeg(small).astype(np.float32)
            psnr = 10 * np.log10(255**2 / max(float(((result - exact) ** 2).mean()), 1e-9))
            found[name].append((float(psnr), ssim(result, exact), len(small)))
    return {name: tuple(np.mean(values, axis=0).tolist()) for name, values in found.items()}


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two float32 [h, w, 3] images (Wang et al., 2004: Gaussian window, sigma 1.5)."""

    def blur(x: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(x, (11, 11), 1.5)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean())


def resizing_rows(
    source: Path, photos: list[str], amount: Amount, scratch: Path, python: str | None, two: bool
) -> list[dict[str, Any]]:
    """The rows of each way; `python` has img2dataset, `two`: whether two workers are measured as well."""
    seen = qualities(source, photos[:: max(1, len(photos) // amount.compared)])
    ways = {ours: amount.ours, pillow: amount.pillow}
    rates: dict[str, list[float]] = {"ours": [], "pillow": []}
    alone: list[float] = []
    for run in ways:
        rate(run, source, photos[:50], scratch)
    for _ in range(amount.rounds):
        for run, count in ways.items():
            rates[run.__name__].append(rate(run, source, list(islice(cycle(photos), count)), scratch))
        alone.append(codec_rate(source, photos[:200]))
        if python:
            rates.setdefault("img2dataset", []).append(img2dataset(python, source, photos, scratch / "peer"))
    gain = None
    if two:
        gain = gain_of_two_workers(source, photos, scratch / "two", max(1, amount.rounds // 3), amount.each_worker)
    extra = {
        "disk_bytes_per_image": disk_bytes(source, photos, scratch / "disk"),
        "two_workers": gain,
        "codec_images_per_second": statistics.median(alone),
    }
    average = statistics.mean((source / p).stat().st_size for p in photos)
    nothing = (None, None, None)
    return [
        {
            "name": name,
            "images_per_second_per_core": statistics.median(values),
            **dict(zip(("psnr", "ssim", "bytes_per_image"), seen.get(name, nothing), strict=True)),
            "photo_bytes": average,
            **(extra if name == "ours" else {}),
        }
        for name, values in rates.items()
    ]


def render_queries(folder: Path, count: int) -> None:
    """Render `count` queries of a small city, each of another place and direction, 512 pixels."""
    plan = Plan(CitySettings(blocks=1, years=1, val_queries=0, test_queries=count))
    renderer = Renderer(plan)
    for query in (p for p in plan.panoramas if p.split == "test"):
        path = folder / photo_path(plan, query, 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        photo = renderer.photo(renderer.look_around(query), 0)
        path.write_bytes(simplejpeg.encode_jpeg(photo, plan.settings.quality, "RGB", "420", fastdct=False))


def make_names(count: int) -> pa.Array:
    """`count` SF-XL names spread over a city of 30 km, as an Arrow array, made without Python strings."""
    rng = np.random.default_rng(0)
    template = b"37.70/@0544388.51@4172758.25@10@S@037.70098@-122.49646@kPnABhWJ1kA61eMNPLs1vQ@@210@@@@201606@@.jpg"
    names = np.tile(np.frombuffer(template, np.uint8), (count, 1))
    for first, low in ((7, 540000_00), (18, 4170000_00)):
        value = rng.integers(low, low + 30000_00, count)
        for digit, column in enumerate([*range(first + 9, first + 7, -1), *range(first + 6, first - 1, -1)]):
            names[:, column] = 48 + value // 10**digit % 10
    data = pa.py_buffer(names)
    offsets = np.arange(count + 1, dtype=np.int64) * len(template)
    return pa.LargeStringArray.from_buffers(count, pa.py_buffer(offsets), data)


def measure_partition(count: int) -> dict[str, object]:
    """Seconds and peak bytes from names to labels; run in a process of its own."""
    names = make_names(count)
    seconds, peak = [], 0
    for _ in range(3):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = resource_bytes("VmRSS")
        begin = time.perf_counter()
        east, north, _, _ = parse_utm(names)
        made = make_partition(east, north, M=20, N=2, min_images=2, zone=10)
        seconds.append(time.perf_counter() - begin)
        peak = max(peak, resource_bytes("VmHWM") - before)
        assert len(made.row) == count
        del east, north, made
    return {"name": "partition", "names": count, "seconds": statistics.median(seconds), "peak_bytes": peak}


def resource_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few photos and rounds; ends within 50 seconds")
    parser.add_argument("--json", type=Path, help="write the rows as JSON to this file")
    parser.add_argument("--photos", type=Path, help="folder of 512-pixel JPEGs (default: rendered ones)")
    parser.add_argument("--img2dataset", metavar="PYTHON", help="a Python interpreter that has img2dataset")
    parser.add_argument("--names", type=int, default=4_000_000, help="names to partition")
    parser.add_argument("--partition-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cpu = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpu})
    cv2.setNumThreads(1)
    if arguments.partition_only:
        print(json.dumps(measure_partition(arguments.names)))
        return
    amount = QUICK if arguments.quick else FULL
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        source = arguments.photos or scratch / "city"
        if arguments.photos is None:
            render_queries(source, amount.distinct)
        photos = sorted(str(p.relative_to(source)) for p in source.rglob("*.jpg"))[: amount.distinct]
        if not photos:
            parser.error(f"{source}: no photos (.jpg) in it")
        for photo in photos:
            (source / photo).read_bytes()
        rows = resizing_rows(source, photos, amount, scratch / "first", arguments.img2dataset, True)
        small = scratch / "small"
        small_quality = smaller_files(source, photos, small, SF_XL_BYTES)
        rows += resizing_rows(small, photos, amount, scratch / "second", arguments.img2dataset, not arguments.quick)
    child = [sys.executable, __file__, "--partition-only", "--names", str(arguments.names)]
    rows.append(json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout))
    print(f"\nresizing {len(photos)} photos, 512 to {SIZE} pixels, one core (processor {cpu})")
    print(f"{'':12} {'images/s':>9} {'ratio':>6} {'PSNR':>7} {'SSIM':>7} {'bytes':>7}")
    for row in rows[:-1]:
        speed = row["images_per_second_per_core"]
        if row["name"] == "ours":
            first = speed
            gain = f"; two workers {row['two_workers']:.2f} x one" if row["two_workers"] else ""
            alone = row["codec_images_per_second"]
            kilobytes, disk = row["photo_bytes"] / 1000, row["disk_bytes_per_image"]
            print(f"photos of {kilobytes:.1f} kB; {disk:.0f} bytes a sample{gain}")
            print(
                f"{'(codec alone':12} {alone:9.0f} {alone / first:6.2f} in memory; ours is {first / alone:.0%} of it)"
            )
        rest = f"{row['psnr']:7.2f} {row['ssim']:7.4f} {row['bytes_per_image']:7.0f}" if row["psnr"] else ""
        print(f"{row['name']:12} {speed:9.0f} {speed / first:6.2f} {rest}")
    print(f"(the second set of photos: saved again at JPEG quality {small_quality})")
    last = rows[-1]
    print(f"\npartition of {last['names']:,} names: {last['seconds']:.2f} s, {last['peak_bytes'] / 1e9:.2f} GB more")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
