"""Cut a folder of street photos into classes and groups and write them as WebDataset tar shards.

python preprocessing/build_shards.py --source photos/train/database --out shards/city
"""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from preprocessing.build import Summary, build
from preprocessing.plan import Settings
from preprocessing.resize import ResizeFilter
from shards.console import JobError, entry, format_bytes, format_count, format_duration


@dataclass(frozen=True)
class Arguments:
    """Cut a folder of street photos into classes and groups and write them as WebDataset tar shards.

    Names carry the place (@EAST@NORTH@ZONE@BAND@..., UTM metres). The same command again goes on where an
    interrupted one stopped.
    """

    source: Path
    """Folder of photos (.jpg, .jpeg, .png in all folders below)."""
    out: Path
    """Folder of the data set: a new one, or one that this command began."""
    M: Annotated[int, tyro.conf.arg(name="M")] = 20
    """Side of a cell in metres; a cell is a class."""
    N: Annotated[int, tyro.conf.arg(name="N")] = 2
    """Cells of one group are N cells apart; there are N * N groups."""
    min_images: int = 10
    """Cells with fewer photos than this are left out."""
    image_size: int = 224
    """Side of the square photos in the shards, in pixels."""
    quality: int = 90
    """JPEG quality, 1 to 100."""
    resize_filter: ResizeFilter = "fast"
    """fast: scaled decoding, then linear; bicubic and lanczos: from the full-size photo, exact and slow."""
    seed: int = 0
    """Seed of the order of photos within a class."""
    workers: int = len(os.sched_getaffinity(0))
    """Processes that resize; the default is one for each core."""
    max_bad_share: float | None = None
    """Stop when more than this share of the photos is bad (default: 0.01, but not for fewer than 25 photos)."""
    rescan: bool = False
    """List the source anew even where no folder's time has changed."""

    def __post_init__(self) -> None:
        for name, low, high in (("M", 1, 100_000), ("N", 1, 100), ("min_images", 1, 10**9), ("image_size", 16, 4096),
                                ("quality", 1, 100), ("workers", 1, 4096), ("seed", 0, 2**63)):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise JobError(f"--{name.replace('_', '-')} must be from {low} to {high}")


def main() -> None:
    arguments = tyro.cli(Arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings = Settings(
        arguments.M, arguments.N, arguments.min_images, arguments.image_size, arguments.quality,
        arguments.resize_filter, arguments.seed,
    )  # fmt: skip
    summary = build(
        arguments.source,
        arguments.out,
        settings,
        workers=arguments.workers,
        max_bad_share=arguments.max_bad_share,
        rescan=arguments.rescan,
    )
    print_summary(summary, arguments.out)


def print_summary(summary: Summary, out: Path) -> None:
    """What was built, for a person."""
    made = summary.manifest
    print(f"\n{'group':>5}  {'classes':>9}  {'images':>12}  {'images a class':>14}")
    for group, classes in summary.classes_per_group.items():
        images = summary.images_per_group[group]
        print(f"{group:5}  {format_count(classes):>9}  {format_count(images):>12}  {images / classes:14.1f}")
    print(f"{'all':>5}  {format_count(made.classes):>9}  {format_count(made.images):>12}  "
          f"{made.images / made.classes:14.1f}\n")  # fmt: skip
    print(f"skipped     {format_count(made.skipped)} photos in cells with fewer than {made.min_images} photos")
    reasons = ", ".join(f"{count} {reason}" for reason, count in summary.reasons.most_common())
    print(f"set aside   {format_count(made.quarantined)} bad photos{f' ({reasons})' if reasons else ''}")
    if summary.other_files:
        print(f"ignored     {format_count(summary.other_files)} files that are no photos")
    print(f"bytes       {format_bytes(summary.source_bytes)} of photos -> {format_bytes(made.bytes)} in {made.shards} "
          f"shards ({summary.jpeg_bytes / max(made.images, 1):,.0f} bytes of JPEG a photo)")  # fmt: skip
    fresh = "" if summary.shards_before == 0 else f" ({summary.shards_before} shards were done before)"
    print(f"finished    {out} in {format_duration(summary.seconds)}{fresh}")


if __name__ == "__main__":
    entry(main)
