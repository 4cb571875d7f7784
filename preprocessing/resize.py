"""Turns a photo's bytes into a small square JPEG, or says why it cannot be one.

The fast path decodes a JPEG at a fraction of its size (libjpeg-turbo's scaled IDCT) and does the rest with OpenCV,
four bytes a pixel since its kernels are faster so; anything unusual (PNG) goes through Pillow. Photos are stretched
to a square, as the reference does, and turned upright where their metadata say so.
"""

import functools
import io
import re
import threading
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from shards.upright import UnreadablePhoto, open_photo, upright_rgb

ResizeFilter = Literal["fast", "bicubic", "lanczos"]

MAX_FILE_BYTES = 1 << 28
MAX_PIXELS = 1 << 27
_MAX_SCANS = 64
_SCRATCH_PIXELS = 1 << 20
_SCALABLE = frozenset((0xC0, 0xC1, 0xC2, 0xC9, 0xCA))  # frames of cosine transforms: baseline, progressive, arithmetic
_ONE_SCAN_POSSIBLE = frozenset((0xC0, 0xC1))
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_TABLES_AND_COMMENTS = frozenset((0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE))
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xdd\xe0-\xef\xfe]")  # the end, and those whose length libjpeg reads
_START_OF_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
_MOST_CUBIC = 1.6  # scaled decoding leaves less than a factor of 2, of which this much needs no area filter
_PILLOW_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
_ORIENTATION_TAG = 0x0112
_LUMA_TABLE = b"\xff\xdb\x00\x43\x00"  # what stands before the 64 bytes of the quantisation table of luminance
_LUMA_GAINS = (
    (1.00, 0.99, 1.00, 1.01, 1.05, 1.04, 0.99, 0.84),
    (0.99, 1.01, 1.00, 1.02, 1.04, 1.03, 0.94, 0.79),
    (1.00, 1.00, 1.01, 1.02, 1.03, 1.00, 0.90, 0.76),
    (1.01, 1.02, 1.02, 1.02, 1.01, 0.97, 0.89, 0.74),
    (1.05, 1.04, 1.03, 1.01, 0.99, 0.94, 0.86, 0.73),
    (1.04, 1.03, 1.00, 0.97, 0.94, 0.90, 0.80, 0.71),
    (0.99, 0.94, 0.90, 0.89, 0.86, 0.80, 0.72, 0.65),
    (0.84, 0.79, 0.76, 0.74, 0.73, 0.71, 0.65, 0.49),
)
"""By vertical and horizontal frequency, the factor on a luminance coefficient of the fast path's JPEGs that brings it
nearest, in least squares, to that of a Lanczos reduction: the cubic step weakens middle frequencies, and of the highest
much is aliasing and rounding (tests/benchmarks/RESULTS.md). It is applied by scaling the quantisation table."""


class BadPhoto(Exception):
    """A photo cannot be used. `reason` is a short phrase to count by, `detail` what was seen."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class _Scratch(threading.local):
    """Where photos are decoded one after the other: memory that is in the processor's cache already saves 6 % of a
    photo's time."""

    def __init__(self) -> None:
        self.pixels = np.empty((_SCRATCH_PIXELS, 4), np.uint8)


_scratch = _Scratch()


class JpegHeader(NamedTuple):
    """What a JPEG's header says: size in pixels, colour space, whether it can be decoded at a fraction of its size
    (`scalable`), and whether it may hold EXIF or XMP (`tagged`)."""

    height: int
    width: int
    colorspace: str
    scalable: bool
    tagged: bool


@dataclass(frozen=True)
class Resizer:
    """Makes `size` x `size` JPEGs of a quality from 1 to 100: baseline, 4:2:0, nothing but image data."""

    size: int
    quality: int
    resize_filter: ResizeFilter = "fast"
    batch: ClassVar[int] = 16
    """How many photos `make` should be given at a time; to read, resize and write them one by one takes 5 % longer."""

    def make(self, photos: Sequence[bytes]) -> list[bytes | BadPhoto]:
        """The small JPEG of each of `photos`, or why there is none."""
        return [self._attempt(data) for data in photos]

    def __call__(self, data: bytes) -> bytes:
        """The small JPEG of a photo's bytes; raises `BadPhoto`."""
        return self.shrink(self.decode(data), data)

    def shrink(self, photo: np.ndarray, data: bytes) -> bytes:
        """The small JPEG of `photo`, which `decode` made of `data`, or of a crop of it."""
        return self.encode(self.resize(photo), reduced=self._reduces(photo, data))

    def _attempt(self, data: bytes) -> bytes | BadPhoto:
        try:
            return self(data)
        except BadPhoto as bad:
            return bad

    def decode(self, data: bytes) -> np.ndarray:
        """Upright pixels, uint8 [h, w, 3] RGB or [h, w, 4] RGBX; at least `size` a side where the photo has them.

        This thread's next decode may overwrite the array.
        """
        if not data:
            raise BadPhoto("empty file")
        if data[:3] == b"\xff\xd8\xff":
            return self._decode_jpeg(data)
        return self._decode_other(data)

    def resize(self, photo: np.ndarray) -> np.ndarray:
        """`photo` (uint8 [h, w, 3 or 4]) stretched to uint8 [size, size, 3 or 4]."""
        target = (self.size, self.size)
        if photo.shape[:2] == target:
            return photo
        if self.resize_filter != "fast":
            return np.asarray(Image.fromarray(photo[:, :, :3]).resize(target, _PILLOW_FILTERS[self.resize_filter]))
        shrinks = max(photo.shape[:2]) > _MOST_CUBIC * self.size
        return cv2.resize(photo, target, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)

    def encode(self, photo: np.ndarray, *, reduced: bool = True) -> bytes:
        """`photo` (uint8 [size, size, 3 or 4]) as a JPEG; `reduced`: it was made of more pixels."""
        colours = "RGB" if photo.shape[2] == 3 else "RGBX"
        jpeg = simplejpeg.encode_jpeg(photo, self.quality, colours, "420", fastdct=True)
        if self.resize_filter != "fast" or not reduced:
            return jpeg
        start, table = _fitted_table(self.quality)
        return jpeg[:start] + table + jpeg[start + len(table) :]

    def _reduces(self, photo: np.ndarray, data: bytes) -> bool:
        if photo.shape[:2] != (self.size, self.size):
            return min(photo.shape[:2]) >= self.size
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
        except ValueError:  # another format, which is decoded at its own size
            return False
        return min(height, width) > self.size

    def jpeg_header(self, data: bytes) -> JpegHeader:
        """The header of a JPEG; raises `BadPhoto` where that much is bad."""
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            raise _bad_jpeg(data, error) from None
        self._check_size(width, height)
        frame, one_scan, tagged = _segments(data)
        if not one_scan and data.count(b"\xff\xda") > _MAX_SCANS and _has_too_many_scans(data):
            raise BadPhoto("too large", f"a JPEG of more than {_MAX_SCANS} scans")
        return JpegHeader(height, width, colorspace, frame in _SCALABLE, tagged)

    def _decode_jpeg(self, data: bytes) -> np.ndarray:
        try:
            header = self.jpeg_header(data)
        except BadPhoto as bad:
            if bad.reason != "unreadable":
                raise
            return self._decode_oddly_sampled(data, bad)
        least = self.size if self.resize_filter == "fast" and header.scalable else 0
        inks = header.colorspace in ("CMYK", "YCCK")
        colours = "CMYK" if inks else "RGBX"
        buffer = _scratch.pixels if header.height * header.width <= _SCRATCH_PIXELS else None
        try:
            photo = simplejpeg.decode_jpeg(
                data, colours, fastupsample=True, min_height=least, min_width=least, buffer=buffer
            )
        except ValueError as error:
            raise _bad_jpeg(data, error) from None
        if inks:  # stored inverted, as Adobe's programs do and everyone else since
            photo = np.asarray(Image.fromarray(255 - photo, "CMYK").convert("RGB"))
        return _upright(photo, _orientation(data)) if header.tagged else photo

    def _decode_oddly_sampled(self, data: bytes, bad: BadPhoto) -> np.ndarray:
        """A JPEG whose chroma is sampled in a way that libjpeg-turbo's simple interface has no name for, by Pillow."""
        try:
            return self._decode_other(data)
        except BadPhoto as worse:
            raise bad if worse.reason in ("unreadable", "not an image") else worse from None

    def _decode_other(self, data: bytes) -> np.ndarray:
        _check_png(data)
        try:
            with warnings.catch_warnings(action="ignore"):
                image = open_photo(io.BytesIO(data))
                self._check_size(*image.size)
                return np.asarray(upright_rgb(image))
        except UnreadablePhoto as error:
            seen = f"begins with {data[:12]!r}" if error.reason == "not an image" else str(error)
            raise BadPhoto(error.reason, seen) from None

    def _check_size(self, width: int, height: int) -> None:
        if width * height > MAX_PIXELS:
            raise BadPhoto("too large", f"{width} x {height} pixels; the limit is {MAX_PIXELS >> 20} megapixels")
        if 2 * min(width, height) < self.size:
            raise BadPhoto("too small", f"{width} x {height} pixels for an image size of {self.size}")


@functools.cache
def _fitted_table(quality: int) -> tuple[int, bytes]:
    """Where in a JPEG of this quality luminance's quantisation table stands, and `_LUMA_GAINS` times that table."""
    jpeg = simplejpeg.encode_jpeg(np.zeros((8, 8, 3), np.uint8), quality, "RGB", "420")
    start = jpeg.index(_LUMA_TABLE) + len(_LUMA_TABLE)
    places = sorted(np.ndindex(8, 8), key=lambda at: (sum(at), at[sum(at) % 2 == 0]))  # zigzag
    steps = zip(jpeg[start : start + 64], places, strict=True)
    return start, bytes(max(1, round(step * _LUMA_GAINS[row][column])) for step, (row, column) in steps)


def cpu_codec_name() -> str:
    """What decides the bytes of a JPEG: libraries with versions, and that the fast way's table is fitted."""
    return f"simplejpeg {simplejpeg.__version__}, OpenCV {cv2.__version__}, table fitted to reductions"


def _bad_jpeg(data: bytes, error: ValueError) -> BadPhoto:
    """An interrupted download lacks the end-of-image marker, or is filled up with zeros."""
    return BadPhoto("unreadable" if is_whole(data) else "truncated", str(error))


def _check_png(data: bytes) -> None:
    """Raise `BadPhoto` where a part of a PNG fails its checksum: Pillow does not compare that of pixels."""
    place, kind = (8 if data.startswith(b"\x89PNG\r\n\x1a\n") else len(data)), b""
    while kind != b"IEND" and (end := place + 12 + int.from_bytes(data[place : place + 4], "big")) <= len(data):
        kind, checksum = data[place + 4 : place + 8], int.from_bytes(data[end - 4 : end], "big")
        if zlib.crc32(memoryview(data)[place + 4 : end - 4]) != checksum:
            raise BadPhoto("CRC mismatch", f"PNG chunk {kind.decode('ascii', 'replace')}")
        place = end


def is_whole(jpeg: bytes) -> bool:
    """Whether a JPEG ends with its end-of-image marker, zeros after it aside."""
    return jpeg.rstrip(b"\0").endswith(b"\xff\xd9")


def _segments(jpeg: bytes) -> tuple[int, bool, bool]:
    """What stands before a JPEG's first scan: the marker of its frame (0 where it has none, or odd segments before it);
    whether the decoder ends after the first scan, since that has all components of a baseline or extended frame; and
    whether there may be EXIF or XMP. To look costs a tenth of what counting the scans of any JPEG does.

    A lossless frame must not be decoded at a fraction of its size: TurboJPEG 3 writes all of it past the end of the
    smaller picture.
    """
    place, frame, components, tagged = 2, 0, 0, False
    while place + 9 < len(jpeg) and jpeg[place] == 0xFF:
        marker = jpeg[place + 1]
        if marker == 0xDA:
            return frame, frame in _ONE_SCAN_POSSIBLE and jpeg[place + 4] == components, tagged
        if marker == 0xE1:
            tagged = True
        elif marker in _FRAMES and not frame:
            frame, components = marker, jpeg[place + 9]
        elif marker not in _TABLES_AND_COMMENTS:
            break
        place += 2 + (jpeg[place + 2] << 8) + jpeg[place + 3]
    return frame, False, True


def _has_too_many_scans(jpeg: bytes) -> bool:
    """Whether a JPEG has more than `_MAX_SCANS` scans, those in metadata and behind its end (a film) aside."""
    place, scans = 2, 0
    while scans <= _MAX_SCANS and (found := _MARKER.search(jpeg, place)) and found[0] != _END_OF_IMAGE:
        scans += found[0] == _START_OF_SCAN
        place = found.end() + int.from_bytes(jpeg[found.end() : found.end() + 2], "big")
    return scans > _MAX_SCANS


def _orientation(jpeg: bytes) -> int:
    try:
        with warnings.catch_warnings(action="ignore"):  # Pillow's, of odd metadata, would break up the progress line
            return open_photo(io.BytesIO(jpeg)).getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # as above; damaged metadata around a sound picture
        return 1


def _upright(photo: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (1 to 8; others are taken as upright)."""
    if orientation in (5, 6, 7, 8):
        photo = photo.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        photo = photo[:, ::-1]
    if orientation in (3, 4, 7, 8):
        photo = photo[::-1]
    return np.ascontiguousarray(photo)
