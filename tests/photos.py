"""Photos for tests: smooth random pictures under names that carry coordinates, or in lists, and what became of them in
a data set; and a way to damage a table."""

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import simplejpeg

from shards.layout import shard_tables
from shards.names import PhotoName, format_name


def picture(size: int, seed: int) -> np.ndarray:
    """A smooth random picture, uint8 [size, size, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def jpeg(size: int, seed: int) -> bytes:
    """A picture as a JPEG."""
    return simplejpeg.encode_jpeg(picture(size, seed), quality=90)


def bomb(width: int, height: int) -> bytes:
    """A sound PNG of that many black pixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes((width // 8 + 1) * height), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def name_at(east: float, north: float, number: int, zone: int = 10) -> str:
    """A photo's name at a place, `number` making it unique."""
    return format_name(PhotoName(east, north, zone, "S", pano=f"pano{number:05d}", heading=number % 360))


def write_photos(folder: Path, cells: int = 4, per_cell: int = 12, size: int = 96) -> list[Path]:
    """`cells` cells in a row, 20 m each, with `per_cell` photos; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for cell in range(cells):
        for i in range(per_cell):
            path = folder / name_at(500000 + 20 * cell + i, 4180003, cell * 1000 + i)
            path.write_bytes(jpeg(size, cell * 1000 + i))
            paths.append(path)
    return paths


def with_spoilt_footer(table: bytes) -> bytes:
    """A Parquet file whose footer is damaged so that pyarrow raises an `OSError` without a number."""
    footer = len(table) - 8 - int.from_bytes(table[-8:-4], "little")
    return table[:footer] + b"\xff" * 8 + table[footer + 8 :]


def samples(out: Path) -> list[dict]:
    return [row for table in shard_tables(out) for row in pq.read_table(table).to_pylist()]


def write_listed(folder: Path, count: int = 24) -> list[str]:
    """Photos under names that say nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"IMG_{i:04d}.jpg" for i in range(count)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(jpeg(96, i))
    return names


def write_csv(file: Path, /, **columns: list | np.ndarray) -> Path:
    csv.write_csv(pa.table(columns), file)
    return file
