"""Where photos were taken: latitude, longitude, confidence, and the radius that holds 68 % of the probability.

Prints the distance where a photo's EXIF GPS or its name tells the true position. Exit code 1 where a photo failed.

python evaluation/predict.py --checkpoint RUN photo.jpg [more photos, folders, "globs/*.jpg"]
"""

from __future__ import annotations

if __name__ == "__main__":
    from shards.console import quit_on_ctrl_c

    quit_on_ctrl_c()

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from evaluation.answer_photos import Request, answer_photos, describe_others, find_all, to_geojson, to_json, to_table
from evaluation.localiser import choose_device, load_localiser
from shards.console import JobError, check_arguments, entry, printable
from shards.workers import cores_of_process
from training.scoring import THRESHOLD_METRES


@dataclass(frozen=True)
class Arguments:
    """What the command line says."""

    photos: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Photos, folders of photos, or patterns such as "trip/*.jpg"."""
    checkpoint: Path
    """Run (its best checkpoint is taken) or a single checkpoint folder."""
    top: int = 5
    """Places for each photo."""
    apart: float = THRESHOLD_METRES
    """Metres between the places of a photo; the confidence is the probability within this distance."""
    json: bool = False
    """Print JSON instead of a table."""
    geojson: bool = False
    """Print GeoJSON instead of a table."""
    southern: bool = False
    """The city lies south of the equator (class maps of older data sets do not say so themselves)."""
    batch_size: int = 16
    """Photos of one shape described at once."""
    cpu: bool = False
    """Compute on the CPU even where there is a GPU."""

    def __post_init__(self) -> None:
        check_arguments(
            {
                "name at least one photo": not self.photos,
                "--top: at least 1": self.top < 1,
                "--apart: 0 metres or more, and finite": not 0 <= self.apart < math.inf,
                "--batch-size: at least 1": self.batch_size < 1,
                "--json or --geojson, not both": self.json and self.geojson,
            }
        )


def main() -> int:
    """Answer all photos and print; 1 where one failed."""
    arguments = tyro.cli(Arguments, description=__doc__)
    paths, failures, others = find_all(arguments.photos)
    if others:
        print(f"note: {describe_others(others)}", file=sys.stderr)
    device = choose_device(cpu=arguments.cpu)
    localiser = load_localiser(arguments.checkpoint, device, southern=arguments.southern)
    if arguments.geojson and not localiser.classes.zone:
        raise JobError(f"{arguments.checkpoint}: its classes have no UTM zone, so no degrees; use --json")
    threads = cores_of_process()
    request = Request(arguments.top, arguments.apart, arguments.batch_size, threads)
    answered, unreadable = answer_photos(localiser, paths, request)
    failures += unreadable
    for failure in failures:
        print(f"error: {printable(str(failure.path))}: {printable(failure.reason)}", file=sys.stderr)
    show = to_geojson if arguments.geojson else to_json if arguments.json else partial(to_table, apart=arguments.apart)
    print(show(answered, failures, localiser))
    return 1 if failures else 0


if __name__ == "__main__":
    entry(main, names_photos=True)
