"""Writes one shard: the tar, its DALI index and its sample table, each whole or not at all."""

import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from shards.files import atomic_path, for_arrow
from shards.layout import SAMPLE_COLUMNS

TAR_BLOCK = 512  # bytes; every part of a tar begins at a multiple
_RECORD = 20 * TAR_BLOCK
_PADDING = bytes(TAR_BLOCK)


def _tar_template() -> bytes:
    """A header without name, size and checksum: a file, mode 0444, owner 0, time 0 (POSIX.1-1988, ustar)."""
    header = bytearray(TAR_BLOCK)
    for position, (digits, value) in {100: (7, 0o444), 108: (7, 0), 116: (7, 0), 136: (11, 0)}.items():
        header[position : position + digits] = f"{value:0{digits}o}".encode()
    for position in (329, 337):  # device numbers
        header[position : position + 7] = b"0" * 7
    header[148:156] = b" " * 8
    header[156:157] = b"0"
    header[257:265] = b"ustar\x0000"
    return bytes(header)


_TEMPLATE = _tar_template()
_TEMPLATE_SUM = sum(_TEMPLATE)


def tar_header(name: str, size: int) -> bytes:
    """A plain ustar header of 512 bytes with fixed metadata; `name`: at most 100 ASCII characters, `size`: bytes."""
    encoded, digits = name.encode("ascii"), b"%011o" % size
    total = b"%06o\x00 " % (_TEMPLATE_SUM + sum(encoded) + sum(digits))
    return b"".join((encoded, _TEMPLATE[len(encoded) : 124], digits, _TEMPLATE[135:148], total, _TEMPLATE[156:]))


@dataclass
class ShardWriter:
    """Appends samples to an open binary file as a WebDataset tar and remembers where each one lies.

    `columns` are those of the shard's sample table; `index` the lines of the DALI index.
    """

    file: BinaryIO
    position: int = 0
    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in SAMPLE_COLUMNS.names})
    index: list[str] = field(default_factory=list)

    def add(self, key: str, label: int, jpeg: bytes, **facts: Any) -> None:
        """Append KEY.jpg (`jpeg`) and KEY.cls (`label` in ASCII); `facts` fill the table's other columns."""
        image_at = self._member(f"{key}.jpg", jpeg)
        text = str(label).encode()
        label_at = self._member(f"{key}.cls", text)
        self.index.append(f"jpg {image_at} {len(jpeg)} {key}.jpg cls {label_at} {len(text)} {key}.cls")
        row = dict(key=key, label=label, offset=image_at, size=len(jpeg), crc32=zlib.crc32(jpeg), **facts)
        for name, values in self.columns.items():
            values.append(row[name])

    def finish(self) -> None:
        """Write the end of the archive, padded to a record as `tar` does."""
        self.file.write(bytes(2 * TAR_BLOCK))
        self.position += 2 * TAR_BLOCK
        rest = -self.position % _RECORD
        self.file.write(bytes(rest))
        self.position += rest

    def dali_index(self) -> bytes:
        """The DALI index of what was written so far."""
        return ("\n".join([f"v1.2 {len(self.index)}", *self.index]) + "\n").encode("ascii")

    def _member(self, name: str, data: bytes) -> int:
        """Write one member; return the offset of its data."""
        self.file.write(tar_header(name, len(data)))
        self.file.write(data)
        self.file.write(_PADDING[: -len(data) % TAR_BLOCK])
        start = self.position + TAR_BLOCK
        self.position = start + len(data) + -len(data) % TAR_BLOCK
        return start


def publish_shard(stem: Path, partial_tar: Path, writer: ShardWriter, facts: dict[str, Any]) -> None:
    """Give a finished tar its final name, write its index, and last its sample table, which marks it as done.

    `facts` are kept as JSON in the table's metadata (what was set aside, counts).
    """
    with atomic_path(stem.with_suffix(".tar")) as place:
        os.rename(partial_tar, place)
    with atomic_path(stem.with_suffix(".idx")) as place:
        place.write_bytes(writer.dali_index())
    table = pa.table(writer.columns, SAMPLE_COLUMNS.with_metadata({"shard": json.dumps(facts, sort_keys=True)}))
    with atomic_path(stem.with_suffix(".parquet")) as place:
        pq.write_table(table, place)


def shard_facts(table: Path) -> dict[str, Any]:
    """The facts that `publish_shard` kept with a sample table."""
    return json.loads(pq.read_schema(for_arrow(table)).metadata[b"shard"])
