"""One shard as a task: read its photos, resize them, publish tar, index and table. Shares nothing with others."""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preprocessing.photos import Bad
from preprocessing.plan import ShardTask
from preprocessing.resize import BadPhoto, Resizer
from preprocessing.samples import SampleMaker
from preprocessing.sources import Source
from shards.console import JobError, describe_os_error, is_systems
from shards.files import TEMPORARY_SUFFIX
from shards.layout import sample_key, shard_stem
from shards.names import parse_name
from shards.soundness import READ_ERRORS
from shards.writer import ShardWriter, publish_shard, shard_facts

Monitor = Callable[[int, bool], bool]
"""Called after each photo with the bytes that were read of it and whether it was bad; returns whether to go on."""


@dataclass
class ShardResult:
    """What became of a shard's planned samples: how many images it holds, the bad photos, bytes read and written."""

    group: int
    number: int
    images: int = 0
    source_bytes: int = 0
    jpeg_bytes: int = 0
    tar_bytes: int = 0
    bad: list[Bad] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """The result as JSON values, as kept in the sample table's metadata."""
        return {**vars(self), "bad": [b.facts() for b in self.bad]}

    @staticmethod
    def from_facts(facts: dict[str, Any]) -> "ShardResult":
        """The result that `facts` described."""
        return ShardResult(**{**facts, "bad": [Bad(**b) for b in facts["bad"]]})


class Stopped(Exception):
    """The job was stopped in the middle of a shard; `bad` are the photos of it that had been set aside by then."""

    def __init__(self, bad: list[Bad]) -> None:
        super().__init__(bad)
        self.bad = bad


def write_shard(
    task: ShardTask, sources: Sequence[Source], out: Path, resizer: Resizer, monitor: Monitor
) -> ShardResult:
    """Write one shard; nothing of it has its final name until all of it is on disk.

    `sources`: where samples' photos are. Raises `Stopped` when the monitor says so, `JobError` when the disk is full or
    the source has vanished.
    """
    stem = out / shard_stem(task.group, task.number)
    partial = stem.with_name(f".{stem.name}.tar.{os.getpid()}{TEMPORARY_SUFFIX}")
    result = ShardResult(task.group, task.number)
    rows = [i for i, sample in enumerate(task.samples) if sample not in task.elsewhere]
    maker = SampleMaker(sources, resizer, [task.samples[i] for i in rows])
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb", buffering=1 << 20) as file:
            writer = ShardWriter(file)
            for i, (jpeg, read) in zip(rows, maker.make(), strict=True):
                sample = task.samples[i]
                is_bad = isinstance(jpeg, BadPhoto)
                if isinstance(jpeg, BadPhoto):
                    result.bad.append(Bad(sample, jpeg.reason, jpeg.detail, task.planned(i)))
                else:
                    writer.add(
                        sample_key(task.first + i),
                        task.labels[i],
                        jpeg,
                        east=task.east[i],
                        north=task.north[i],
                        source=sample,
                        **_heading_and_timestamp(task, i, maker),
                    )
                    result.images += 1
                    result.jpeg_bytes += len(jpeg)
                result.source_bytes += read
                if not monitor(read, is_bad):
                    raise Stopped(result.bad)
            writer.finish()
        result.tar_bytes = writer.position
        publish_shard(stem, partial, writer, result.facts())
    except OSError as error:
        if not out.is_dir():
            raise went_away(out) from None
        error.filename = error.filename or f"{stem}.tar"
        raise JobError(f"cannot write the shard: {describe_os_error(error)}") from None
    finally:
        with suppress(OSError):  # it has its final name, or there is none
            partial.unlink()
    return result


def went_away(out: Path) -> JobError:
    """What to say where the folder of the data set is not there any more."""
    return JobError(f"{out}: the output folder went away; bring it back and run the same command again")


def _heading_and_timestamp(task: ShardTask, i: int, maker: SampleMaker) -> dict[str, Any]:
    """Heading and timestamp of a sample, from the plan where a list gave them, otherwise from the photo's name."""
    sample = task.samples[i]
    heading, timestamp = task.headings[i], task.timestamps[i]
    if timestamp is None:
        name = parse_name(maker.photo(sample))
        heading, timestamp = name.heading, name.timestamp
    turn = maker.turn(sample)
    if heading is not None and turn is not None:
        heading = (heading + turn) % 360
    return {"heading": math.nan if heading is None else heading, "timestamp": timestamp}


def finished_shard(out: Path, group: int, number: int, *, with_tar: bool = True) -> ShardResult | None:
    """The result of a shard that an earlier run finished, or None. `with_tar`: whether its tar must be there too."""
    stem = out / shard_stem(group, number)
    try:
        result = ShardResult.from_facts(shard_facts(stem.with_suffix(".parquet")))
        complete = not with_tar or os.path.getsize(stem.with_suffix(".tar")) == result.tar_bytes
    except READ_ERRORS as error:
        if is_systems(error) and not isinstance(error, FileNotFoundError):
            raise
        return None
    its_own = (result.group, result.number) == (group, number)
    return result if its_own and complete and stem.with_suffix(".idx").exists() else None
