"""The input path beside what people use: photos to uint8 or float batches, in turn, medians.

    python tests/benchmarks/loader.py [--quick | --part warm|hdd|gpu|threads] [--json FILE] [--shards DIR]
    python tests/benchmarks/loader.py --synthetic [--json FILE] [--shards DIR]

`indexed`              this project: class-uniform draws, pread at byte offsets, threads (cpu) or DALI (dali)
`stream`               this project: runs of neighbouring photos, one request each
`reference-files`      the reference's way: files, PIL, ToTensor, Resize, RandomResizedCrop in a DataLoader
`webdataset-torchvision`  the webdataset library over the same shards, PIL and torchvision
`webdataset-simplejpeg`  the same with simplejpeg and OpenCV, batches made in the workers
`dali-webdataset`      DALI's own reader, decoder and crop over the same shards, on its CPU back end
`litdata`              LitData over the same photos (where it is installed)

Every loader makes batches of 64 crops of 224 pixels. Parts, all without --part:
warm     rates from the page cache, on one core and on all
hdd      a simulated hard disk (200 reads and 157 MB a second by a cgroup limit, cold cache) where root and cgroups
         allow it, one core: 60,000 photos in shards larger than the read-ahead, and 15,000 files
threads  what threads can give where there are more cores than here: photos a second of 1 to 32 threads whose decoding
         and resizing sleeps as long as they take (without the interpreter's lock, and without a core)
gpu      decoder settings on a GPU: hardware share, batch, threads, and the CPU pool with its copy to the device
--quick: one core, warm: indexed with the cpu decoder, and reference-files.
--synthetic: training's end-to-end rate beside the same training on random tensors that lie on the device.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import paths  # noqa: F401
import pyarrow.parquet as pq
import torch
from loader_peers import (
    BATCH,
    SIZE,
    dali_webdataset,
    litdata_stream,
    reference_files,
    webdataset_simplejpeg,
    webdataset_torchvision,
    write_files,
    write_litdata,
)
from loader_threads import threads_rows

from preprocessing.build import build
from preprocessing.city.plan import CitySettings
from preprocessing.city.writer import render_city
from preprocessing.plan import Settings
from preprocessing.shard_run import Machinery
from shards.dataset import Dataset
from shards.index import build_index
from shards.layout import CLASSES, sample_key, shard_tables
from shards.loader import DecoderName, Loader, Mode, choose_decoder
from shards.writer import ShardWriter, publish_shard

Row = dict[str, object]
Loaders = dict[tuple[str, str, str], Callable[[int], Iterator[int]]]
PARTS = ("warm", "hdd", "threads", "gpu")
HDD_READS, HDD_BYTES = 200, 157_286_400  # a second


def ours(
    shards: Path | str, mode: Mode, decoder: DecoderName, threads: int, batch: int = BATCH, **options: Any
) -> Iterator[int]:
    """Batches of this project's loader, on `device` if one is among the options; yields their sizes."""
    dataset = Dataset.open(shards)
    groups = dataset.classes.groups

    def schedule(step: int) -> np.ndarray:
        return np.full(batch, groups[step // 50 % len(groups)])

    loader = Loader(
        dataset, schedule, batch_size=batch, image_size=SIZE, seed=time.monotonic_ns() & 0xFFFF,
        mode=mode, decoder=decoder, threads=threads, **options,
    )  # fmt: skip
    try:
        for got in loader.batches(0, 1_000_000):
            got.images.to(options.get("device", "cpu"), non_blocking=True)
            yield len(got.labels)
    finally:
        loader.close()


def rate(batches: Iterator[int], seconds: float, ahead: int = 4) -> float:
    """Images a second over `seconds`, after a warm-up of `ahead` batches, which may have been made before, and a fifth
    of that."""
    for _ in range(ahead):
        next(batches)
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds / 5:
        next(batches)
    begin, images = time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < seconds:
        images += next(batches)
    if torch.cuda.is_initialized():  # where no loader used a GPU this would begin to, in the time that is taken
        torch.cuda.synchronize()
        spent = time.perf_counter() - begin
    return images / spent


def first_and_rate(batches: Iterator[int], seconds: float) -> tuple[float, float]:
    """Seconds until the first batch, and images a second after it."""
    begin = time.perf_counter()
    next(batches)
    first = time.perf_counter() - begin
    begin, images = time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < seconds:
        images += next(batches)
    return first, images / spent


class HardDisk:
    """A cgroup (version 1 or 2) in which reads of the device that holds `folder` are those of a hard disk."""

    def __init__(self, folder: Path) -> None:
        device = os.stat(folder).st_dev
        name = f"{os.major(device)}:{os.minor(device)}"
        if not Path(f"/sys/dev/block/{name}/queue").exists():  # limits are set on the whole disk
            name = Path(f"/sys/dev/block/{name}/../dev").read_text().strip()
        version_1 = Path("/sys/fs/cgroup/blkio")
        self.group = (version_1 if version_1.exists() else Path("/sys/fs/cgroup")) / "loader-benchmark"
        self.group.mkdir(exist_ok=True)
        if version_1.exists():
            (self.group / "blkio.throttle.read_iops_device").write_text(f"{name} {HDD_READS}")
            (self.group / "blkio.throttle.read_bps_device").write_text(f"{name} {HDD_BYTES}")
        else:
            (self.group / "io.max").write_text(f"{name} riops={HDD_READS} rbps={HDD_BYTES}")

    def run(self, *arguments: str) -> dict[str, float]:
        """This script's --child with `arguments`, in the cgroup."""
        return run_child(*arguments, before=("sh", "-c", 'echo $$ > "$0/cgroup.procs"; exec "$@"', str(self.group)))


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def hdd_rows(shards: Path, scratch: Path) -> list[Row]:
    large, files = scratch / "large", scratch / "large-files"
    images = Dataset.open(shards).manifest.images
    multiply(shards, large, -(-60_000 // images))
    write_files(shards, files, -(-15_000 // images))
    try:
        disk = HardDisk(large)
    except OSError as error:
        print(f"no simulated hard disk here: {error}")
        return []
    rows: list[Row] = []
    for name in ("stream", "indexed", "reference-files"):
        folder = files if name == "reference-files" else large
        measured, warm = [], []
        for _ in range(3):
            forget(folder)
            measured.append(disk.run(name, str(folder)))
            if name == "stream":  # in turn, since the machine's speed drifts
                for file in large.rglob("*.tar"):
                    file.read_bytes()
                warm.append(run_child(name, str(folder))["images_per_second"])
        middle = sorted(measured, key=lambda m: m["images_per_second"])[1]
        if warm:
            middle["warm_images_per_second"] = statistics.median(warm)
        rows.append(
            {"name": name, "storage": "hdd", "decoder": "pil" if folder == files else "cpu", "cores": 1,
             "dtype": "float32" if folder == files else "uint8", **middle}
        )  # fmt: skip
    disk.group.rmdir()
    for folder in (large, files):
        shutil.rmtree(folder)
    return rows


def run_child(*arguments: str, before: tuple[str, ...] = ()) -> dict[str, float]:
    """This script's --child with `arguments`, in a process of its own."""
    command = [*before, sys.executable, __file__, "--child", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def child(name: str, folder: Path) -> None:
    batches = (
        reference_files(folder, 1)
        if name == "reference-files"
        else ours(folder, "stream" if name == "stream" else "indexed", "cpu", 1)
    )
    first, speed = first_and_rate(batches, 8)
    print(json.dumps({"images_per_second": speed, "first_batch_seconds": first}))


def gpu_rows(shards: Path) -> list[Row]:
    """Images a second on a GPU: DALI by hardware share, batch and threads, and the CPU pool with its copy."""
    if not torch.cuda.is_available():
        print("no GPU here: its part is left out")
        return []
    cores = len(os.sched_getaffinity(0))
    settings: list[dict[str, Any]] = [
        {"decoder": "dali", "hardware_share": share, "batch": batch, "threads": threads}
        for share in (0.0, 0.5, 0.65, 0.8, 1.0)
        for batch, threads in ((64, cores), (256, 4), (256, cores))
    ]
    if choose_decoder("auto", torch.device("cuda")) != "dali":
        print("no NVIDIA DALI here: its rows are left out")
        settings = []
    settings += [{"decoder": "cpu", "batch": batch, "threads": cores} for batch in (64, 256)]
    rows: list[Row] = []
    print(f"\n{torch.cuda.get_device_name()}, {cores} cores")
    for setting in settings:
        batches = ours(shards, "indexed", device="cuda", **setting)
        speed = rate(batches, 4)
        batches.close()  # type: ignore[attr-defined]
        rows.append({"name": "indexed", "storage": "warm", "cores": cores, "dtype": "uint8", **setting})
        rows[-1] |= {"images_per_second": speed, "device": torch.cuda.get_device_name()}
        print(f"{speed:10,.0f} images/s   {', '.join(f'{name} {value}' for name, value in setting.items())}")
    return rows


def multiply(shards: Path, out: Path, copies: int) -> None:
    """The data set `shards` with every photo `copies` times, so that it outlasts a measurement on a cold disk."""
    shutil.copytree(shards, out, ignore=shutil.ignore_patterns("group-*", "index"))
    for table in shard_tables(shards):
        rows = pq.read_table(table).to_pylist()
        stem = out / table.parent.name / table.stem
        stem.parent.mkdir(parents=True, exist_ok=True)
        with open(table.with_suffix(".tar"), "rb") as tar, open(stem.with_suffix(".partial"), "wb") as file:
            writer = ShardWriter(file)
            for number, row in enumerate(r for r in rows for _ in range(copies)):
                jpeg = os.pread(tar.fileno(), row["size"], row["offset"])
                facts = {k: row[k] for k in ("east", "north", "heading", "timestamp", "source")}
                writer.add(sample_key(number), row["label"], jpeg, **facts)
            writer.finish()
        publish_shard(stem, stem.with_suffix(".partial"), writer, {})
    classes = Dataset.open(shards).classes
    classes = replace(classes, images=classes.images * copies)
    classes.save(out / CLASSES)
    build_index(out, classes)


def measure(loaders: Loaders, cores: int, rounds: int, seconds: float) -> list[Row]:
    rates: dict[tuple[str, str, str], list[float]] = {key: [] for key in loaders}
    for _ in range(rounds):
        for key, make in loaders.items():
            batches = make(cores)
            rates[key].append(rate(batches, seconds))
            batches.close()  # type: ignore[attr-defined]
    return [
        {
            "name": name, "storage": "warm", "decoder": decoder, "cores": cores, "dtype": dtype,
            "images_per_second": statistics.median(rates[name, decoder, dtype]),
        }
        for name, decoder, dtype in loaders
    ]  # fmt: skip


def print_rows(rows: list[Row]) -> None:
    print(f"\n{'loader':24}{'storage':>8}{'decoder':>12}{'cores':>6}{'dtype':>9}{'images/s':>10}{'ratio':>7}")
    first: dict[object, float] = {}
    for row in rows:
        base = first.setdefault((row["cores"], row["storage"]), float(str(row["images_per_second"])))
        speed = float(str(row["images_per_second"]))
        print(
            f"{row['name']:24}{row['storage']:>8}{row['decoder']:>12}{row['cores']:>6}{row['dtype']:>9}"
            f"{speed:10.0f}{speed / base:7.2f}"
            + "".join(
                f"   {key} {row[key]:.4g}" for key in ("first_batch_seconds", "warm_images_per_second") if key in row
            )
        )


def render_shards(scratch: Path) -> Path:
    """A data set of 224-pixel photos of a small rendered city."""
    settings = CitySettings(blocks=1, size=256, years=1, val_queries=1, test_queries=1)
    render_city(scratch / "city", settings, workers=len(os.sched_getaffinity(0)))
    form = Settings(20, 2, 10, SIZE, 90, "fast", 0)
    build(scratch / "city" / "train" / "database", scratch / "shards", form, Machinery(1))
    return scratch / "shards"


def warm_rows(shards: Path, scratch: Path, *, quick: bool) -> list[Row]:
    files = scratch / "files"
    if not quick:  # the libraries' loaders begin anew after every epoch: it must not be a short one
        many = scratch / "many"
        multiply(shards, many, -(-10_000 // Dataset.open(shards).manifest.images))
        shards = many
    write_files(shards, files)
    loaders: Loaders = {
        ("indexed", "cpu", "uint8"): lambda cores: ours(shards, "indexed", "cpu", cores),
        ("reference-files", "pil", "float32"): lambda cores: reference_files(files, cores),
    }
    if not quick:
        loaders |= {
            ("indexed", "dali", "uint8"): lambda cores: ours(shards, "indexed", "dali", cores),
            ("stream", "cpu", "uint8"): lambda cores: ours(shards, "stream", "cpu", cores),
            ("stream", "dali", "uint8"): lambda cores: ours(shards, "stream", "dali", cores),
            ("webdataset-torchvision", "pil", "float32"): lambda cores: webdataset_torchvision(shards, cores),
            ("webdataset-simplejpeg", "cpu", "uint8"): lambda cores: webdataset_simplejpeg(shards, cores),
            ("dali-webdataset", "dali", "uint8"): lambda cores: dali_webdataset(shards, cores),
        }
        if write_litdata(files, scratch / "litdata"):
            loaders["litdata", "pil", "float32"] = lambda cores: litdata_stream(scratch / "litdata", cores)
    torch.set_num_threads(1)
    available = sorted(os.sched_getaffinity(0))
    rows: list[Row] = []
    for cores in (1,) if quick else sorted({1, len(available)}):
        os.sched_setaffinity(0, set(available[-cores:]))
        rows += measure(loaders, cores, 3, 2.0)
    return rows


def threads_rate(shards: Path, threads: int) -> float:
    batches = ours(shards, "indexed", "cpu", threads)
    speed = rate(batches, 2)
    batches.close()  # type: ignore[attr-defined]
    return speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="two loaders on one core; ends within 50 seconds")
    what.add_argument("--part", choices=PARTS, help="one part only")
    what.add_argument("--synthetic", action="store_true", help="training beside training on random tensors")
    what.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="write the rows as JSON to this file")
    parser.add_argument("--shards", type=Path, help="a data set of 224-pixel photos (default: a rendered city)")
    arguments = parser.parse_args()
    if arguments.child:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
        return child(arguments.child[0], Path(arguments.child[1]))
    parts = ("warm",) if arguments.quick else (arguments.part,) if arguments.part else PARTS
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        shards = arguments.shards or render_shards(scratch)
        if arguments.synthetic:
            from loader_training import synthetic_rows  # late: the other parts do not need training

            rows = synthetic_rows(shards, scratch, rounds=3)
        else:
            if "gpu" in parts:
                rows += gpu_rows(shards)
            if "threads" in parts:
                rows += threads_rows(shards, SIZE, lambda threads: threads_rate(shards, threads))
            if "hdd" in parts:
                rows += hdd_rows(shards, scratch)
            if "warm" in parts:
                rows += warm_rows(shards, scratch, quick=arguments.quick)
            print_rows([row for row in rows if "storage" in row and "device" not in row])  # a GPU's are printed
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
