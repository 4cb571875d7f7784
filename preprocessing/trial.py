"""A short trial on a few photos: how many bytes and how long a data set takes, and whether the disk has room."""

import io
import shutil
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from preprocessing.photos import Bad, Listing
from preprocessing.plan import Plan
from preprocessing.resize import BadPhoto, Resizer
from preprocessing.samples import SampleMaker
from preprocessing.shard_run import Machinery
from preprocessing.sources import Source, commonest, describe_bad
from shards.console import JobError, format_bytes, format_count
from shards.upright import UnreadablePhoto, open_photo
from shards.writer import TAR_BLOCK

_TABLE_BYTES = 200  # of sample table, DALI index and flat index, for each image
UNCUT = "most photos are at least twice as wide as high and are squeezed into squares; cut panoramas with --crops 12"
_SHAPES_SEEN = 32
_SURELY = 0.8  # photos differ: a disk with less than this share of the estimate is surely too small


@dataclass(frozen=True)
class Trial:
    """What a trial found: images tried, those set aside, images a second of one process (reading included), bytes of a
    data set and of photos for each image, and whether photos to take whole are panoramas."""

    tried: int
    set_aside: list[Bad]
    images_per_second: float
    bytes_per_image: float
    source_bytes_per_image: float
    uncut: bool

    @property
    def bad(self) -> Counter[str]:
        """The reasons of those set aside."""
        return Counter(b.reason for b in self.set_aside)


@dataclass(frozen=True)
class Forecast:
    """What a build will make of a plan: bad photos expected, and how many would stop it; files that are no photos;
    bytes needed and free (None at a URL), and seconds with a number of workers."""

    plan: Plan
    trial: Trial
    bad: float
    bad_limit: float
    other_files: int
    bytes_needed: float
    bytes_free: int | None
    seconds: float
    workers: int


def forecast(plan: Plan, listing: Listing, source: Source, out: Path | None, machinery: Machinery) -> Forecast:
    """Try a few hundred photos of a plan, in memory, and tell what building all of it takes. `out`: None at a URL.

    Raises `JobError` where none of those photos can be used.
    """
    trial = try_photos(plan, source, plan.settings.resizer(), 400)
    if trial.bad.total() == trial.tried:
        raise JobError(
            f"{source.root}: none of {trial.tried} photos that were tried can be used ({describe_bad(trial.set_aside)})"
            f"{_way_out(trial, source)}"
        )
    images, rate = len(plan.order), trial.images_per_second * machinery.workers
    return Forecast(
        plan,
        trial,
        bad=len(plan.bad) + images * trial.bad.total() / trial.tried,
        bad_limit=machinery.tolerance(plan.photos).limit,
        other_files=listing.others,
        bytes_needed=trial.bytes_per_image * images,
        bytes_free=None if out is None else free_bytes(out),
        seconds=images / rate if rate else 0.0,
        workers=machinery.workers,
    )


def _way_out(trial: Trial, source: Source) -> str:
    reason = commonest(trial.set_aside).reason
    if reason == "missing" and source.is_list:
        return "; --root is the folder that a list's paths are relative to"
    return "; leave out --crops to take photos whole" if reason == "not a panorama" else ""


def try_photos(plan: Plan, source: Source, resizer: Resizer, count: int) -> Trial:
    """Make about `count` samples, spread over the plan, in memory."""
    cv2.setNumThreads(1)
    spread = np.linspace(0, len(plan.order) - 1, min(count, len(plan.order))).astype(np.int64)
    if source.crops:  # whole panoramas, as a shard has them
        rows = np.unique(plan.order[spread[:: source.crops]] // source.crops)
        samples = (rows[:, None] * source.crops + np.arange(source.crops)).ravel()
    else:
        samples = plan.order[spread]
    task = plan.task_of(0, 0, samples)
    wide: list[bool] = []

    def look_at(data: bytes) -> None:
        if len(wide) == _SHAPES_SEEN:
            return
        with suppress(UnreadablePhoto), open_photo(io.BytesIO(data)) as image:
            wide.append(image.width >= 2 * image.height)

    maker = SampleMaker([source], resizer, task.samples, look_at)
    bad: list[Bad] = []
    written = read = 0
    start = time.perf_counter()
    for sample, (jpeg, photo_bytes) in zip(task.samples, maker.make(), strict=True):
        read += photo_bytes
        if isinstance(jpeg, BadPhoto):
            bad.append(Bad(maker.photo(sample), jpeg.reason, jpeg.detail))
            continue
        written += 3 * TAR_BLOCK + len(jpeg) + -len(jpeg) % TAR_BLOCK + _TABLE_BYTES
    seconds = time.perf_counter() - start
    tried = len(task.samples)
    uncut = not source.crops and sum(wide) * 2 > len(wide)
    return Trial(
        tried,
        bad,
        tried / seconds,
        written / max(tried - len(bad), 1),
        read / tried,
        uncut,
    )


def check_space(plan: Plan, source: Source, out: Path, resizer: Resizer, images: int) -> None:
    """Raise `JobError` where the disk surely lacks the room for `images` more images of a plan."""
    trial = try_photos(plan, source, resizer, 32)
    if trial.uncut:
        print(f"warning: {UNCUT}", file=sys.stderr)
    needed, free = trial.bytes_per_image * images, free_bytes(out)
    if free < _SURELY * needed:
        raise JobError(
            f"{out}: {format_count(images)} images need about {format_bytes(needed)} and the disk has "
            f"{format_bytes(free)} free; free some space or choose another --out"
        )


def free_bytes(out: Path) -> int:
    """Free bytes on the disk that `out` is on, or will be."""
    place = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    return shutil.disk_usage(place).free
