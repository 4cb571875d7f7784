"""Verify a data set byte for byte; with --repair, rebuild just what is broken from the photos.

Prints a line for each problem. Exits with 0 where the data set is sound, 1 where it is not.

python shards/verify.py shards/city

python shards/verify.py shards/city --repair --source photos/train/database
"""

if __name__ == "__main__":
    from shards.console import quit_on_ctrl_c

    quit_on_ctrl_c()

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from shards.checksums import seal
from shards.console import WrongArguments, check_ranges, entry, format_bytes, format_count, format_duration
from shards.layout import CHECKSUMS, REVISIONS
from shards.mirror import fetch_all, named_by_url, scratch_folder
from shards.repair import needs_photos, repair
from shards.soundness import Problem
from shards.store import Store, is_url
from shards.verification import Report, verify
from shards.workers import cores_of_process


@dataclass(frozen=True)
class Arguments:
    """What the command line says."""

    dataset: Annotated[str, tyro.conf.Positional]
    """Folder or URL of the data set; from a URL, each shard is fetched, checked and dropped."""
    workers: int = cores_of_process()
    """Processes that check shards; the default is one for each core."""
    repair: bool = False
    """Rebuild what is broken, then verify again. Files that do not belong there move to a folder beside."""
    source: str | None = None
    """The photos that the data set was made from (a path or URL); --repair needs them for anything but an index."""
    seal: bool = False
    """Write checksums.txt for a data set that is sound and has none, so that damage to a table can be found later."""

    def __post_init__(self) -> None:
        check_ranges(self, workers=(1, 4096))
        if self.source is not None and not self.repair:
            raise WrongArguments("--source is for --repair only")
        if is_url(self.dataset) and (self.repair or self.seal):
            raise WrongArguments(
                f"--repair and --seal work in a folder. To mend {self.dataset}, delete {CHECKSUMS} there if it is "
                "damaged, and the tables (.parquet) of damaged shards, and run the command that built it again: it "
                "writes those anew"
            )


def main() -> int:
    arguments = tyro.cli(Arguments, description=__doc__)
    if is_url(arguments.dataset):
        return _verify_at_url(Store.at(arguments.dataset), arguments.workers)
    dataset = Path(arguments.dataset)
    report = verify(dataset, arguments.workers, print_problem)
    print_summary(report, arguments.dataset)
    if report.problems and arguments.repair:
        repair(dataset, report, arguments.source, arguments.workers)
        report = verify(dataset, arguments.workers, print_problem)
        print_summary(report, arguments.dataset)
    if arguments.seal and not report.problems and not report.sealed:
        seal(dataset)
        print(f"sealed: {arguments.dataset}/checksums.txt")
    return 1 if report.problems else 0


def _verify_at_url(store: Store, workers: int) -> int:
    with scratch_folder() as folder, named_by_url(store, folder):
        fetch_all(store, store.names(), folder, {})
        report = verify(folder, workers, print_problem, store)
    print_summary(report, store.url)
    return 1 if report.problems else 0


def print_problem(problem: Problem) -> None:
    """One line for a problem, above the progress bar."""
    with tqdm.external_write_mode(nolock=True):  # on Ctrl-C its lock, if not yet made, hides that
        print(problem, flush=True)


def print_summary(report: Report, dataset: str) -> None:
    """What was checked, and the verdict, for a person."""
    rate = f"{report.images / report.seconds:,.0f} images/s, {format_bytes(report.bytes / report.seconds)}/s"
    print(
        f"checked {format_count(report.images, 'image')} in {format_count(report.shards, 'shard')} "
        f"({format_bytes(report.bytes)}) in {format_duration(report.seconds)} ({rate})"
    )
    if not report.problems:
        print(f"{dataset}: sound")
        if not report.sealed:
            print("there is no checksums.txt: a changed name of a source photo in a table would go unseen; see --seal")
        return
    files = len({problem.file for problem in report.problems})
    lost = any(problem.file.startswith(f"{REVISIONS}/") for problem in report.problems)  # nothing rebuilds these
    if lost or is_url(dataset):
        way_out = "--repair tells how to mend them"
    else:
        way_out = "--repair --source PHOTOS rebuilds them" if needs_photos(report) else "--repair mends them"
    print(f"{dataset}: {format_count(len(report.problems), 'problem')} in {format_count(files, 'file')}; {way_out}")


if __name__ == "__main__":
    entry(main)
