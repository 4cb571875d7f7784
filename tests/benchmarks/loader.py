"""The input path beside what people use: photos to uint8 or float batches, in turn, medians.

    python tests/benchmarks/loader.py [--quick] [--json FILE] [--shards DIR]

`indexed`              this project: class-uniform draws, pread at byte offsets, threads (cpu) or DALI (dali)
`stream`               this project: runs of neighbouring photos, one request each
`reference-files`      the reference's way: files, PIL, ToTensor, Resize, RandomResizedCrop in a DataLoader
`webdataset-torchvision`  the webdataset library over the same shards, PIL and torchvision
`litdata`              LitData over the same photos (where it is installed)

Every loader makes batches of 64 crops of 224 pixels. Rates are of a warm page cache, and of a simulated hard disk
(200 reads and 157 MB a second by a cgroup limit, cold cache) where root and cgroups allow it.
--quick: one core, warm: indexed with the cpu decoder, and reference-files.
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
from pathlib import Path

sys.path.pop(0)  # this folder: a benchmark named like a package would shadow it

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from preprocessing.build import build
from preprocessing.city.plan import CitySettings
from preprocessing.city.writer import render_city
from preprocessing.plan import Settings
from preprocessing.shard_run import Machinery
from shards.dataset import Dataset as Shards
from shards.index import build_index
from shards.layout import sample_key, shard_tables
from shards.loader import Loader
from shards.writer import ShardWriter, publish_shard

BATCH, SIZE = 64, 224
HDD_READS, HDD_BYTES = 200, 157_286_400  # a second
AUGMENTATION = transforms.Compose(
    [
        transforms.ToTensor(),
        transforms.Resize((SIZE, SIZE), antialias=True),
        transforms.RandomResizedCrop(SIZE, scale=(0.66, 1.0), antialias=True),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)


def ours(shards: Path, mode: str, decoder: str, cores: int) -> Iterator[int]:
    dataset = Shards.open(shards)
    groups = dataset.classes.groups

    def schedule(step: int) -> np.ndarray:
        return np.full(BATCH, groups[step // 50 % len(groups)])

    options = {} if mode == "indexed" else {"mode": mode}
    loader = Loader(
        dataset, schedule, batch_size=BATCH, image_size=SIZE, seed=time.monotonic_ns() & 0xFFFF,
        decoder=decoder, threads=cores, **options,
    )  # fmt: skip
    for batch in loader.batches(0, 1_000_000):
        yield len(batch.labels)


class Files(Dataset[tuple[torch.Tensor, int]]):
    """The reference's data set: a class uniformly, then a photo uniformly within it, decoded by PIL."""

    def __init__(self, classes: list[list[Path]]) -> None:
        self.classes = classes

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, _: int) -> tuple[torch.Tensor, int]:
        label = int(torch.randint(len(self.classes), ()))
        photos = self.classes[label]
        with Image.open(photos[int(torch.randint(len(photos), ()))]) as image:
            return AUGMENTATION(image.convert("RGB")), label


def reference_files(folder: Path, cores: int) -> Iterator[int]:
    classes = [sorted(c.iterdir()) for c in sorted(folder.iterdir())]
    workers = 0 if cores == 1 else cores
    for images, _ in DataLoader(Files(classes), BATCH, num_workers=workers):
        yield len(images)


def webdataset_torchvision(shards: Path, cores: int) -> Iterator[int]:
    import webdataset

    tars = [str(t.with_suffix(".tar")) for t in shard_tables(shards)]
    samples = (
        webdataset.WebDataset(tars, shardshuffle=len(tars), repeat=True, nodesplitter=webdataset.split_by_node)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(AUGMENTATION, int)
    )
    workers = 0 if cores == 1 else cores
    for images, _ in DataLoader(samples, BATCH, num_workers=workers):
        yield len(images)


def litdata_stream(folder: Path, cores: int) -> Iterator[int]:
    from litdata import StreamingDataLoader, StreamingDataset

    class Crops(StreamingDataset):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            sample = super().__getitem__(index)
            return AUGMENTATION(sample["image"]), sample["label"]

    while True:
        for images, _ in StreamingDataLoader(
            Crops(str(folder), shuffle=True), batch_size=BATCH, num_workers=0 if cores == 1 else cores
        ):
            yield len(images)


def rate(batches: Iterator[int], seconds: float) -> float:
    """Images a second over `seconds`, after a warm-up of a fifth of that."""
    for _ in range(4):
        next(batches)
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds / 5:
        next(batches)
    begin, images = time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < seconds:
        images += next(batches)
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
        script = 'echo $$ > "$0/cgroup.procs"; exec "$@"'
        command = ["sh", "-c", script, str(self.group), sys.executable, __file__, "--child", *arguments]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def hdd_rows(shards: Path, files: Path) -> list[dict[str, object]]:
    try:
        disk = HardDisk(shards)
    except OSError as error:
        print(f"no simulated hard disk here: {error}")
        return []
    rows: list[dict[str, object]] = []
    for name in ("stream", "indexed", "reference-files"):
        folder = files if name == "reference-files" else shards
        measured = []
        for _ in range(3):
            forget(folder)
            measured.append(disk.run(name, str(folder)))
        middle = sorted(measured, key=lambda m: m["images_per_second"])[1]
        rows.append(
            {"name": name, "storage": "hdd", "decoder": "pil" if folder == files else "cpu", "cores": 1,
             "dtype": "float32" if folder == files else "uint8", **middle}
        )  # fmt: skip
    return rows


def child(name: str, folder: Path) -> None:
    batches = reference_files(folder, 1) if name == "reference-files" else ours(folder, name, "cpu", 1)
    first, speed = first_and_rate(batches, 8)
    print(json.dumps({"images_per_second": speed, "first_batch_seconds": first}))


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
    build_index(out, Shards.open(out).classes.groups)


def write_files(shards: Path, folder: Path) -> None:
    """The photos of the shards as files, a folder for each class, as the reference reads them."""
    import tarfile

    for table in shard_tables(shards):
        with tarfile.open(table.with_suffix(".tar")) as tar:
            held = b""
            for member in tar:
                data = tar.extractfile(member)
                assert data is not None
                if member.name.endswith(".jpg"):
                    held = data.read()
                else:
                    place = folder / f"{table.parent.name}-{data.read().decode()}"
                    place.mkdir(parents=True, exist_ok=True)
                    (place / member.name.replace("cls", "jpg")).write_bytes(held)


def write_litdata(files: Path, folder: Path) -> bool:
    try:
        from litdata import optimize
    except ImportError:
        return False
    photos = [(str(p), i) for i, c in enumerate(sorted(files.iterdir())) for p in sorted(c.iterdir())]
    optimize(_litdata_sample, photos, str(folder), chunk_bytes="64MB", num_workers=1)
    return True


def _litdata_sample(photo: tuple[str, int]) -> dict[str, object]:
    from PIL.JpegImagePlugin import JpegImageFile

    return {"image": JpegImageFile(photo[0]), "label": photo[1]}


def measure(
    loaders: dict[tuple[str, str, str], Callable[[int], Iterator[int]]], cores: int, rounds: int, seconds: float
) -> list[dict[str, object]]:
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


def print_rows(rows: list[dict[str, object]]) -> None:
    print(f"\n{'loader':24}{'storage':>8}{'decoder':>12}{'cores':>6}{'dtype':>9}{'images/s':>10}{'ratio':>7}")
    first: dict[object, float] = {}
    for row in rows:
        base = first.setdefault((row["cores"], row["storage"]), float(str(row["images_per_second"])))
        speed = float(str(row["images_per_second"]))
        print(
            f"{row['name']:24}{row['storage']:>8}{row['decoder']:>12}{row['cores']:>6}{row['dtype']:>9}"
            f"{speed:10.0f}{speed / base:7.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two loaders on one core; ends within 50 seconds")
    parser.add_argument("--json", type=Path, help="write the rows as JSON to this file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=Path, help="a data set of 224-pixel photos (default: a rendered city)")
    arguments = parser.parse_args()
    if arguments.child:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
        return child(arguments.child[0], Path(arguments.child[1]))
    available = sorted(os.sched_getaffinity(0))
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        shards = arguments.shards
        if shards is None:
            shards = Path(scratch) / "shards"
            city = Path(scratch) / "city"
            settings = CitySettings(blocks=1, size=256, years=1, val_queries=1, test_queries=1)
            render_city(city, settings, workers=len(available))
            form = Settings(20, 2, 10, SIZE, 90, "fast", 0)
            build(city / "train" / "database", shards, form, Machinery(1))
        files = Path(scratch) / "files"
        write_files(shards, files)
        loaders: dict[tuple[str, str, str], Callable[[int], Iterator[int]]] = {
            ("indexed", "cpu", "uint8"): lambda cores: ours(shards, "indexed", "cpu", cores),
            ("reference-files", "pil", "float32"): lambda cores: reference_files(files, cores),
        }
        if not arguments.quick:
            loaders |= {
                ("indexed", "dali", "uint8"): lambda cores: ours(shards, "indexed", "dali", cores),
                ("stream", "cpu", "uint8"): lambda cores: ours(shards, "stream", "cpu", cores),
                ("stream", "dali", "uint8"): lambda cores: ours(shards, "stream", "dali", cores),
                ("webdataset-torchvision", "pil", "float32"): lambda cores: webdataset_torchvision(shards, cores),
            }
            if write_litdata(files, Path(scratch) / "litdata"):
                loaders["litdata", "pil", "float32"] = lambda cores: litdata_stream(Path(scratch) / "litdata", cores)
        torch.set_num_threads(1)
        if not arguments.quick:
            large = Path(scratch) / "large"
            multiply(shards, large, -(-60_000 // Shards.open(shards).manifest.images))
            rows += hdd_rows(large, files)
            shutil.rmtree(large)
        for cores in (1,) if arguments.quick else sorted({1, len(available)}):
            os.sched_setaffinity(0, set(available[-cores:]))
            rows += measure(loaders, cores, 3 if arguments.quick else 5, 2.5)
    print_rows(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
