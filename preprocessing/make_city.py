"""Render a procedural city as street-level photos, named and laid out as SF-XL.

Writes train/database/LATITUDE/, val/queries/ and test/queries/, and city.json with settings and counts. The same
settings give the same bytes, whatever the number of workers; an interrupted run goes on.

python preprocessing/make_city.py --out city --seed 0 --blocks 3 --size 512 --years 3
"""

from __future__ import annotations

if __name__ == "__main__":
    from shards.console import quit_on_ctrl_c

    quit_on_ctrl_c()

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from preprocessing.city.plan import CitySettings
from preprocessing.city.writer import render_city
from shards.console import check_ranges, entry
from shards.dataset import refuse_data_set
from shards.workers import cores_of_process


@dataclass(frozen=True)
class Arguments:
    """What the command line says."""

    out: Path
    """Folder to write; new or empty, or holding this very city."""
    city: Annotated[CitySettings, tyro.conf.arg(name="")] = field(default_factory=CitySettings)
    workers: int = cores_of_process()
    """Processes that render; the default is one for each core."""

    def __post_init__(self) -> None:
        check_ranges(self, workers=(1, 4096))


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    refuse_data_set(arguments.out)
    render_city(arguments.out, arguments.city, arguments.workers)


if __name__ == "__main__":
    entry(main)
