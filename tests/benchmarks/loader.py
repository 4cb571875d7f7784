"""The input path beside what people use: photos to uint8 or float batches, in turn, medians.

    python tests/benchmarks/loader.py [--quick] [--json FILE] [--shards DIR]

`indexed`              this project: class-uniform draws, pread at byte offsets, threads (cpu) or DALI (dali)
`stream`               this project: runs of neighbouring photos, one request each
`reference-files`      the reference's way: files, PIL, ToTensor, Resize, RandomResizedCrop in a DataLoader
`webdataset-torchvision`  the webdataset library over the same shards, PIL and torchvision
`litdata`              LitData over the same photos (where it is installed)

Every loader makes batches of 64 crops of 224 pixels. Rates are of a warm page cache; --hdd measures on a simulated
hard disk (200 reads and 157 MB a second by a cgroup limit, cold cache), for which it needs root and cgroup v1 or v2.
--quick: one core, warm: indexed with the cpu decoder, and reference-files.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.pop(0)  # this folder: a benchmark named like a package would shadow it

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from preprocessing.build import build
from preprocessing.city.plan import CitySettings
from preprocessing.city.writer import render_city
from preprocessing.plan import Settings
from shards.dataset import Dataset as Shards
from shards.layout import shard_tables
from shards.loader import Loader

BATCH, SIZE = 64, 224
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
    parser.add_argument("--shards", type=Path, help="a data set of 224-pixel photos (default: a rendered city)")
    arguments = parser.parse_args()
    available = sorted(os.sched_getaffinity(0))
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        shards = arguments.shards
        if shards is None:
            shards = Path(scratch) / "shards"
            city = Path(scratch) / "city"
            render_city(city, CitySettings(blocks=1, size=256, years=1), workers=len(available))
            settings = Settings(20, 2, 10, SIZE, 90, "fast", 0)
            build(city / "train" / "database", shards, settings, workers=1, max_bad_share=None, rescan=False)
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
        for cores in (1,) if arguments.quick else sorted({1, len(available)}):
            os.sched_setaffinity(0, set(available[-cores:]))
            rows += measure(loaders, cores, 3 if arguments.quick else 5, 2.5)
    print_rows(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
