"""Show what is in a data set: counts, sizes, a contact sheet and a map.

python shards/show.py shards/city --out city.png

python shards/show.py s3://bucket/city
"""

if __name__ == "__main__":
    from shards.console import quit_on_ctrl_c

    quit_on_ctrl_c()

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from shards.console import WrongArguments, entry
from shards.dataset import Dataset, refuse_data_set
from shards.files import atomic_path
from shards.overview import describe
from shards.pictures import cell_map, contact_sheet


@dataclass(frozen=True)
class Arguments:
    """What the command line says."""

    dataset: Annotated[str, tyro.conf.Positional]
    """Folder or URL of the data set."""
    out: Path | None = None
    """Picture to write (.png): a contact sheet of samples; the map of cells goes beside it, as NAME-map.png."""

    def __post_init__(self) -> None:
        if self.out is not None and self.out.suffix.lower() != ".png":
            raise WrongArguments(f"--out {self.out}: pictures are PNG; name a file that ends in .png")


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    if arguments.out is not None:
        refuse_data_set(arguments.out.parent)
    dataset = Dataset.open(arguments.dataset)
    print(describe(dataset))
    if arguments.out is None:
        print("\n--out FILE.png writes a contact sheet and a map")
        return
    sheet, map_ = arguments.out, arguments.out.with_name(f"{arguments.out.stem}-map.png")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for path, draw in ((sheet, contact_sheet), (map_, cell_map)):
        with atomic_path(path) as partial:
            draw(dataset).save(partial, format="PNG", optimize=True)
    print(f"\npictures  {sheet} (samples), {map_} (cells)")


if __name__ == "__main__":
    entry(main)
