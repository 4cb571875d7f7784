"""Decodes batches with a pool of CPU threads: simplejpeg and OpenCV, written in place into the batch.

Both libraries release the interpreter's lock; Python's share of a sample is some ten microseconds.
"""

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import cv2
import numpy as np
import simplejpeg
import torch

from shards.batch import BatchPlan, Supply

_CHUNK = 8


class CpuDecoder:
    """Submit plans of `count` samples, take their images in the same order; see `shards.loader`."""

    def __init__(self, supply: Supply, count: int, image_size: int, threads: int, pin: bool) -> None:
        cv2.setNumThreads(1)
        self._supply, self._count, self._size, self._pin = supply, count, image_size, pin
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._queue: deque[tuple[torch.Tensor, list[Future[None]]]] = deque()
        self._scratch = threading.local()

    def submit(self, plan: Future[BatchPlan]) -> None:
        """Start decoding a plan as soon as it is drawn."""
        images = torch.empty((self._count, self._size, self._size, 3), dtype=torch.uint8, pin_memory=self._pin)
        pixels = images.numpy()
        chunks = range(0, self._count, _CHUNK)
        self._queue.append((images, [self._pool.submit(self._decode, plan, pixels, c) for c in chunks]))

    def take(self) -> torch.Tensor:
        """Images of the oldest submitted plan, uint8 [b, S, S, 3]; raises what its decoding raised."""
        images, parts = self._queue.popleft()
        for part in parts:
            part.result()
        return images

    def close(self) -> None:
        """Drop what the threads have not begun. What they have ends by itself, at the latest when the reader closes."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._queue.clear()

    def _decode(self, drawn: Future[BatchPlan], pixels: np.ndarray, first: int) -> None:
        plan, last = drawn.result(), min(first + _CHUNK, self._count)
        for i in range(first, last):
            plan.use(i, partial(self._decode_one, plan.boxes[i], pixels[i]))
        self._supply.count(last - first)

    def _decode_one(self, box: np.ndarray, out: np.ndarray, jpeg: bytes) -> None:
        size = self._supply.photo_size
        if not hasattr(self._scratch, "photo"):
            self._scratch.photo = bytearray(size * size * 3)
        photo = simplejpeg.decode_jpeg(jpeg, buffer=self._scratch.photo)
        height, width, _ = photo.shape
        check_size(height, width, size)
        left, top, w, h = box.tolist()
        crop_resize(photo[top : top + h, left : left + w], out)


def check_size(height: int, width: int, size: int) -> None:
    """Raise `ValueError` where a photo is not `size` pixels square."""
    if (height, width) != (size, size):
        raise ValueError(f"{width} x {height} pixels where the manifest says {size} x {size}")


def crop_resize(photo: np.ndarray, out: np.ndarray) -> None:
    """Resize `photo` uint8 [h, w, 3] into `out` uint8 [S, S, 3]: bilinear, by area where it shrinks noticeably."""
    height, width = out.shape[:2]
    shrinks = photo.shape[0] > 1.25 * height or photo.shape[1] > 1.25 * width
    cv2.resize(photo, (width, height), dst=out, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
