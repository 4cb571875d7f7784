"""What the interpreter's lock leaves to many decoding threads, measured without as many cores."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np
import simplejpeg

from shards import decode_cpu
from shards.batch import BatchPlan, Supply
from shards.dataset import Dataset
from shards.index import open_index
from shards.reader import ShardReader
from shards.sampler import IndexedSampler

THREADS = (1, 2, 4, 8, 16, 32)


def seconds_in_c(shards: Path, size: int) -> tuple[float, float]:
    """Median seconds of decoding and of cropping and resizing a photo, both without the interpreter's lock."""
    dataset = Dataset.open(shards)
    index = open_index(dataset.path, dataset.classes)
    supply = Supply(IndexedSampler(index, 0), ShardReader(index), dataset.manifest.image_size)
    plan = BatchPlan(supply, 0, np.arange(256), np.resize(dataset.classes.groups, 256))
    out, decode, resize = np.empty((size, size, 3), np.uint8), [], []
    for i in range(len(plan)):
        jpeg, (left, top, width, height) = plan.encoded(i), plan.boxes[i].tolist()
        begin = time.perf_counter()
        photo = simplejpeg.decode_jpeg(jpeg)
        middle = time.perf_counter()
        decode_cpu.crop_resize(photo[top : top + height, left : left + width], out)
        decode.append(middle - begin)
        resize.append(time.perf_counter() - middle)
    return median(decode), median(resize)


@contextmanager
def replaced(photo_size: int, pause: Callable[[float], None], decode: float, resize: float) -> Iterator[None]:
    """Within this block decoding and resizing only call `pause` with their seconds."""
    photo = np.zeros((photo_size, photo_size, 3), np.uint8)
    real = simplejpeg.decode_jpeg, decode_cpu.crop_resize

    def no_decode(_: bytes, buffer: object) -> np.ndarray:
        pause(decode)
        return photo

    simplejpeg.decode_jpeg = no_decode
    decode_cpu.crop_resize = lambda *_: pause(resize)
    try:
        yield
    finally:
        simplejpeg.decode_jpeg, decode_cpu.crop_resize = real


def threads_rows(shards: Path, size: int, rate: Callable[[int], float]) -> list[dict[str, object]]:
    """`rate(threads)` of a loader whose C code sleeps, which takes no core, and with no C code at all; both printed.

    The second is what Python alone allows: no number of threads gets past it. The first is a lower bound of what as
    many cores give, since all waking up happens on the cores of this machine.
    """
    photo_size = Dataset.open(shards).manifest.image_size
    decode, resize = seconds_in_c(shards, size)
    begin = time.perf_counter()
    for _ in range(1000):
        time.sleep((decode + resize) / 2)
    asleep = (time.perf_counter() - begin) / 500
    with replaced(photo_size, lambda _: None, 0, 0):
        alone = rate(1)
    print(
        f"\ndecoding {decode * 1e6:.0f} us and resizing {resize * 1e6:.0f} us a photo hold no lock; the rest alone: "
        f"{1e6 / alone:.1f} us, {alone:,.0f} photos/s; asleep for {asleep * 1e6:.0f} us a photo instead:"
    )
    rows: list[dict[str, object]] = []
    with replaced(photo_size, time.sleep, decode, resize):
        for threads in THREADS:
            got = rate(threads)
            amdahl = 1 / max((asleep + 1 / alone) / threads, 1 / alone)
            rows.append({"name": "indexed-asleep", "threads": threads, "images_per_second": got, "limit": amdahl})
            print(f"{threads:4} threads {got:10,.0f} photos/s, {got / amdahl:4.0%} of the limit {amdahl:,.0f}")
    return rows
