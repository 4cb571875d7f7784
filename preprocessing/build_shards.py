"""Cut street photos into classes and groups and write them as WebDataset tar shards.

Names carry the place (@EAST@NORTH@ZONE@BAND@..., UTM metres), or a list does. The same command again goes on where an
interrupted one stopped.

python preprocessing/build_shards.py --source photos/train/database --out shards/city

python preprocessing/build_shards.py --out shards/city --add more_photos
"""

if __name__ == "__main__":
    from shards.console import quit_on_ctrl_c

    quit_on_ctrl_c()

import signal
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from preprocessing import engine, ray_engine
from preprocessing.build import assemble, build, build_share, dry_run
from preprocessing.codec import Codec
from preprocessing.output import Output
from preprocessing.plan import Settings
from preprocessing.resize import ResizeFilter
from preprocessing.shard_run import Machinery
from preprocessing.sources import Source
from preprocessing.summaries import print_forecast, print_gain, print_recovery, print_summary
from preprocessing.updates import add, retry_quarantined
from shards.console import WrongArguments, check_ranges, entry, flag_of, format_count
from shards.soundness import damaged_tables_named
from shards.workers import cores_of_process

ENGINES = {"process": engine.run_tasks, "ray": ray_engine.run_tasks}


@dataclass(frozen=True)
class Arguments:
    """What the command line says."""

    out: str
    """Folder or URL (s3://bucket/city) of the data set: a new one, or one that this command began."""
    source: str | None = None
    """Folder of photos (.jpg, .jpeg, .png, .webp in all folders below; a path or any URL that fsspec knows), or a list:
    CSV or Parquet with the columns path and east, north (zone) or latitude, longitude; heading and timestamp where
    known."""
    root: str | None = None
    """Folder or URL that the paths in a list are relative to (default: the list's own)."""
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
    """fast: scaled decoding, then a cubic step; bicubic and lanczos: from the full-size photo, exact and slow."""
    codec: Codec = "cpu"
    """What decodes, resizes and encodes: cpu, or gpu (NVIDIA, by nvImageCodec: whole photos, by a bicubic filter)."""
    seed: int = 0
    """Seed of the order of photos within a class."""
    crops: int | None = None
    """Photos are panoramas of 360 degrees: cut each into so many square crops (SF-XL: 12). 0: take photos whole. The
    default is 0, and for --add what the data set was made with."""
    zone: int = 0
    """UTM zone of the plane, 1 to 60. 0: the zone that most photos are in."""
    limit: int = 0
    """Make a trial slice: whole cells around the middle of the city, up to this many images. 0: everything."""
    dry_run: bool = False
    """Say what would be made, how long it would take and whether the disk has room."""
    add: str | None = None
    """Bring the photos of this folder or list into the finished data set; labels stay, new classes follow."""
    retry_quarantined: bool = False
    """Try photos again that were bad, after fetching them anew."""
    task_index: int | None = None
    """Write the share of one of several tasks at a time, on any machines: this one, from 0. Then --finish."""
    task_count: int | None = None
    """How many tasks there are."""
    finish: bool = False
    """Finish the data set after all tasks, or say which shards are missing."""
    engine: Literal["process", "ray"] = "process"
    """process: on this machine; ray: on the Ray cluster of RAY_ADDRESS (or a local one), over shared folders."""
    workers: int = cores_of_process()
    """Processes that resize; the default is one for each core. (ray: as many as the cluster has cores.)"""
    max_bad_share: float | None = None
    """Stop when more than this share of the photos is bad, from 0 to 1 (default: 0.01, but not for fewer than 26)."""
    rescan: bool = False
    """List the source anew even where no folder's time has changed."""

    def __post_init__(self) -> None:
        check_ranges(
            self, M=(1, 100_000), N=(1, 100), min_images=(1, 10**9), image_size=(16, 4096), quality=(1, 100),
            workers=(1, 4096), seed=(0, 2**63), crops=(0, 360), zone=(0, 60), limit=(0, 10**12),
        )  # fmt: skip
        if self.max_bad_share is not None and not 0 <= self.max_bad_share <= 1:
            raise WrongArguments("--max-bad-share must be from 0 to 1: a share of the photos, 0.05 for 5 %")
        changes = (self.add is not None) + self.retry_quarantined
        if changes + self.dry_run + self.finish + (self.task_index is not None) > 1:
            raise WrongArguments(
                "--add, --retry-quarantined, --dry-run, --task-index and --finish are for one command each; "
                "additions have no dry run"
            )
        if self.codec == "gpu" and (self.crops or self.resize_filter == "lanczos" or self.engine == "ray"):
            raise WrongArguments("--codec gpu goes without --crops, --resize-filter lanczos and --engine ray")
        if self.source is None and not changes:
            raise WrongArguments("name the photos with --source")
        if "" in (self.source, self.add):
            raise WrongArguments("--source and --add take a folder, a list or a URL, and none has an empty name")
        if self.task_index is not None and not 0 <= self.task_index < (self.task_count or 0):
            raise WrongArguments("--task-index must be from 0 to below --task-count")
        if self.task_count is not None and self.task_index is None and not self.finish:
            raise WrongArguments("--task-count goes with --task-index or --finish")


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    _check_flags_of_a_change(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    given = {name: getattr(arguments, name) for name in Settings.__dataclass_fields__}
    settings = Settings(**given | {"crops": arguments.crops or 0})
    machinery = Machinery(arguments.workers, arguments.max_bad_share, ENGINES[arguments.engine])
    source = Source.of(arguments.add or arguments.source or ".", arguments.root, settings.crops)
    if (arguments.add or arguments.source) and (sets := source.query_sets()):
        print(
            f"warning: {source.place} holds {', '.join(sets)} beside train/: queries would be trained on",
            file=sys.stderr,
        )
    with Output.open(arguments.out) as out, damaged_tables_named(out.place):
        _run(arguments, source, out, settings, machinery)


def _check_flags_of_a_change(arguments: Arguments) -> None:
    """Raise `WrongArguments` where a flag is given that a change of a finished data set does not go by."""
    if arguments.add is None and not arguments.retry_quarantined:
        return
    change, own = ("--retry-quarantined", set()) if arguments.add is None else ("--add", {"root", "crops"})
    fixed = {flag_of(name) for name in {"source", "root", *Settings.__dataclass_fields__} - own}
    given = {word.partition("=")[0].replace("_", "-") for word in sys.argv[1:]}  # a value cannot begin with --
    if wrong := sorted(fixed & given):
        raise WrongArguments(f"leave out {', '.join(wrong)}: {change} goes by what the data set was made with")


def _run(arguments: Arguments, source: Source, out: Output, settings: Settings, machinery: Machinery) -> None:
    rescan, index, count = arguments.rescan, arguments.task_index, arguments.task_count
    if arguments.dry_run:
        print_forecast(dry_run(source, out, settings, machinery, rescan=rescan), out.place)
    elif arguments.add:
        print_gain(add(source, out, machinery, crops=arguments.crops), out.place)
    elif arguments.retry_quarantined:
        print_recovery(retry_quarantined(out, machinery), out.place)
    elif index is not None and count:
        shards = build_share(source, out, settings, machinery, index=index, count=count, rescan=rescan)
        print(f"task {index} of {count}: {format_count(shards, 'shard')} done; after all tasks, --finish")
    elif arguments.finish:
        print_summary(assemble(source, out, settings, machinery, count=count), out.place)
    else:
        print_summary(build(source, out, settings, machinery, rescan=rescan), out.place)


if __name__ == "__main__":
    entry(main)
