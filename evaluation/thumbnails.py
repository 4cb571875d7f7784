"""Small pictures of photos inside a page, within a budget of bytes."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from shards.upright import UnreadablePhoto, open_photo, upright_rgb

_SIZES = ((1500, 120, 72), (4000, 88, 65), (10**9, 56, 50))  # up to this many photos: pixels, JPEG quality

_THREADS = 2


def data_url(source: Path | bytes, side: int, quality: int = 75) -> str:
    """A photo as a JPEG of at most `side` x `side` pixels inside a `data:` URL; "" where it cannot be read."""
    try:
        if isinstance(source, Path) and not source.is_file():
            return ""
        with open_photo(io.BytesIO(source) if isinstance(source, bytes) else source) as opened:
            opened.draft("RGB", (side, side))
            image = upright_rgb(opened)
            image.thumbnail((side, side))
    except UnreadablePhoto:
        return ""
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()


def thumbnails(paths: Sequence[Path], budget: int) -> list[str]:
    """One `data:` URL for each photo: smaller ones the more photos there are, and "" once `budget` bytes are used.

    Where the budget is too small for all, photos that go without are spread over the list.
    """
    _, side, quality = next(size for size in _SIZES if len(paths) <= size[0])
    found = [""] * len(paths)
    with ThreadPoolExecutor(_THREADS) as pool:
        order = _spread(len(paths))
        for first in range(0, len(paths), 256):
            some = order[first : first + 256]
            for i, url in zip(some, pool.map(lambda i: data_url(paths[i], side, quality), some), strict=True):
                if len(url) > budget:
                    return found
                found[i] = url
                budget -= len(url)
    return found


def _spread(count: int) -> list[int]:
    """All of range(count), in an order whose every beginning covers the range evenly."""
    stride = max(1, count // 97)
    return [i for start in range(stride) for i in range(start, count, stride)]
