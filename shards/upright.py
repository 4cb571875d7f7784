"""What a photo shows, whatever its file's way of storing it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from shards.console import one_line

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
"""What a photo may be, whatever its name ends in. Of Pillow's others some start programs (Ghostscript for EPS)."""

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of half of what is refused, read as any other


class UnreadablePhoto(OSError):
    """A photo that Pillow does not read, and in its words why not.

    `reason` is a phrase to count by: "not an image" (of no known format), "too large", "truncated" or "unreadable".
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def open_photo(photo: Path | BinaryIO, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """A photo of one of Pillow's `formats`, its header read; raises `UnreadablePhoto`."""
    with _unreadable(formats):
        return Image.open(photo, formats=formats)


def upright_rgb(image: Image.Image) -> Image.Image:
    """The photo in RGB, upright by its EXIF tag; grey of 16 bits keeps the upper 8.

    `image` itself may be turned. Raises `UnreadablePhoto` for one that cannot be decoded to its last row, and for
    pixels of 32 bits.
    """
    with _unreadable():
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError("pixels of 32 bits, whose black and white are not known")
        return image.convert("RGB")


@contextmanager
def _unreadable(formats: tuple[str, ...] = FORMATS) -> Iterator[None]:
    try:
        yield
    except UnidentifiedImageError as error:
        raise UnreadablePhoto("not an image", f"no photo of a known format ({', '.join(formats)})") from error
    except Image.DecompressionBombError as error:
        raise UnreadablePhoto("too large", str(error)) from error
    except Exception as error:  # Pillow raises anything on hostile bytes; none of it may stop a long job
        cut = any(word in str(error).lower() for word in ("truncated", "premature"))
        raise UnreadablePhoto("truncated" if cut else "unreadable", one_line(error)) from error
