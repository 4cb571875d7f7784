"""One shard as a task: read its photos, resize them, publish tar, index and table. Shares nothing with others."""

import errno
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from preprocessing.photos import Bad
from preprocessing.plan import ShardTask
from preprocessing.resize import BadPhoto, Resizer
from shards.console import JobError, describe_os_error
from shards.files import TEMPORARY_SUFFIX
from shards.layout import sample_key, shard_stem
from shards.names import parse_name
from shards.writer import ShardWriter, publish_shard, shard_facts

_MAX_FILE_BYTES = 1 << 28
_BAD_SECTOR_ERRORS = (errno.EACCES, errno.EIO, errno.ELOOP, errno.EPERM, errno.ENAMETOOLONG, errno.EUCLEAN)

Monitor = Callable[[int, int, int], bool]
"""Called after each photo with (photos, source bytes, bad photos); returns whether to go on."""


@dataclass
class ShardResult:
    """What became of a shard's planned samples: kept by label, set aside, and bytes read and written."""

    group: int
    number: int
    images: int = 0
    source_bytes: int = 0
    jpeg_bytes: int = 0
    tar_bytes: int = 0
    bad: list[Bad] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """The result as JSON values, as kept in the sample table's metadata."""
        return asdict(self)

    @staticmethod
    def from_facts(facts: dict[str, Any]) -> "ShardResult":
        """The result that `facts` described."""
        return ShardResult(**{**facts, "bad": [Bad(**b) for b in facts["bad"]]})

    def reasons(self) -> Counter[str]:
        """How many photos were set aside for each reason."""
        return Counter(b.reason for b in self.bad)


class Stopped(Exception):
    """The job was stopped in the middle of a shard; `bad` are the photos of it that had been set aside by then."""

    def __init__(self, bad: list[Bad]) -> None:
        super().__init__(bad)
        self.bad = bad


def write_shard(task: ShardTask, source: Path, out: Path, resizer: Resizer, monitor: Monitor) -> ShardResult:
    """Write one shard; nothing of it has its final name until all of it is on disk.

    Raises `Stopped` when the monitor says so, `JobError` when the disk is full or the source has vanished.
    """
    stem = out / shard_stem(task.group, task.number)
    stem.parent.mkdir(parents=True, exist_ok=True)
    partial = stem.with_name(f".{stem.name}.tar.{os.getpid()}{TEMPORARY_SUFFIX}")
    result = ShardResult(task.group, task.number)
    try:
        with open(partial, "wb", buffering=1 << 20) as file:
            writer = ShardWriter(file)
            for i, photo in enumerate(task.sources):
                data, is_bad = b"", 0
                try:
                    data = read_photo(source, photo)
                    jpeg = resizer(data)
                except BadPhoto as bad:
                    result.bad.append(Bad(photo, bad.reason, bad.detail))
                    is_bad = 1
                else:
                    name = parse_name(photo)
                    writer.add(
                        sample_key(task.first + i),
                        task.labels[i],
                        jpeg,
                        east=task.east[i],
                        north=task.north[i],
                        heading=math.nan if name.heading is None else name.heading,
                        timestamp=name.timestamp,
                        source=photo,
                    )
                    result.images += 1
                    result.jpeg_bytes += len(jpeg)
                result.source_bytes += len(data)
                if not monitor(1, len(data), is_bad):
                    raise Stopped(result.bad)
            writer.finish()
        result.tar_bytes = writer.position
        publish_shard(stem, partial, writer, result.facts())
    except OSError as error:
        raise JobError(f"cannot write the shard: {describe_os_error(error)}") from None
    finally:
        partial.unlink(missing_ok=True)
    return result


def read_photo(source: Path, photo: str) -> bytes:
    """A photo's bytes; raises `BadPhoto`, or `JobError` where the whole source has vanished."""
    path = source / photo
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MAX_FILE_BYTES:
                raise BadPhoto("too large", f"a file of {size} bytes")
            return file.read()
    except OSError as error:
        if error.errno == errno.ENOENT and _holds_files(path.parent):
            raise BadPhoto("missing", "listed, but gone when it was read") from None
        if error.errno in _BAD_SECTOR_ERRORS:
            raise BadPhoto("unreadable", error.strerror or str(error)) from None
        raise JobError(
            f"the source folder went away ({describe_os_error(error)}); bring it back and run the same command again"
        ) from None


def finished_shard(out: Path, task: ShardTask) -> ShardResult | None:
    """The result of a shard that an earlier run finished, or None."""
    stem = out / shard_stem(task.group, task.number)
    try:
        result = ShardResult.from_facts(shard_facts(stem.with_suffix(".parquet")))
        complete = os.path.getsize(stem.with_suffix(".tar")) == result.tar_bytes
    except (FileNotFoundError, pa.ArrowInvalid, KeyError, TypeError):
        return None
    return result if complete and stem.with_suffix(".idx").exists() else None


def _holds_files(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(entries)
    except OSError:
        return False
