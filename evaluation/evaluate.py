"""LR@N of checkpoints on query sets: a table, results.json, results.csv, predictions.parquet and report.html.

Needs neither shards nor training photos. Exit code 1 where a row of the table could not be made or --val-queries were
of no use; files are written where there is a row.

python evaluation/evaluate.py --checkpoints RUN [RUN ...] --queries PHOTOS [PHOTOS ...] --out DIR

accelerate launch evaluation/evaluate.py --checkpoints RUN --queries PHOTOS --out DIR
"""

from __future__ import annotations

if __name__ == "__main__":
    from shards.console import quit_on_ctrl_c

    quit_on_ctrl_c()

import math
from dataclasses import dataclass
from pathlib import Path

from evaluation.comparison import Job, evaluate_all, open_world, write_results
from evaluation.query_set import Settings
from evaluation.ranking import OWN_FORMS, RankingForm
from shards.console import check_arguments, entry
from shards.sample_photos import SamplePhotos
from shards.workers import cores_of_process
from training.one_voice import one_voice, parse_arguments
from training.scoring import RECALL_NS, THRESHOLD_METRES


@dataclass(frozen=True)
class Arguments:
    """What the command line says."""

    checkpoints: tuple[Path, ...]
    """Runs (their best checkpoint is taken) or single checkpoint folders."""
    queries: tuple[Path, ...]
    """Folders of query photos named by UTM position, or lists (.csv, .parquet) with their places; photos without
    coordinates are predicted but not scored."""
    out: Path
    """Folder for the results."""
    ns: tuple[int, ...] = RECALL_NS
    """The N of LR@N: the first N answers count."""
    threshold: float = THRESHOLD_METRES
    """Metres from the query within which an answer is right; --val-queries are always judged at 25."""
    forms: tuple[RankingForm, ...] = OWN_FORMS
    """Scores to rank by: raw, cosine, zscore (cosines on one scale over groups), softmax (within groups)."""
    score_form: RankingForm | None = None
    """Scores of the main figures; the default is the one trained with, or one that is surely better on the validation
    queries."""
    val_queries: Path | None = None
    """Validation queries that choose the form of the main figures and calibrate the confidence, which is stored with
    the checkpoint; the default is those of its training, if they are still there and nothing is stored yet."""
    shards: str | None = None
    """Data set (folder or URL) whose photos illustrate the report's failures."""
    report: bool = True
    """Write report.html; without it, one of earlier results in the folder is removed."""
    batch_size: int = 32
    """Photos of one shape described at once."""
    threads: int = 0
    """Threads of a process that decode photos; 0: as many as it has cores."""
    cpu: bool = False
    """Compute on the CPU even where there is a GPU."""

    def __post_init__(self) -> None:
        check_arguments(
            {
                "--checkpoints: name at least one run": not self.checkpoints,
                "--queries: name at least one folder or list": not self.queries,
                "--ns: whole numbers of at least 1": not self.ns or min(self.ns) < 1,
                "--threshold: more than 0 metres, and finite": not 0 < self.threshold < math.inf,
                "--forms: name at least one": not self.forms,
                "--batch-size: at least 1": self.batch_size < 1,
                "--threads: 0 or more": self.threads < 0,
            }
        )


@one_voice()
def main() -> int:
    """Evaluate and write the results; 1 where something asked for could not be made."""
    arguments = parse_arguments(Arguments, description=__doc__)
    job = Job(
        arguments.checkpoints,
        arguments.queries,
        arguments.out,
        Settings(
            tuple(sorted(set(arguments.ns))),
            arguments.threshold,
            arguments.forms,
            arguments.batch_size,
            arguments.threads or cores_of_process(),
        ),
        arguments.score_form,
        arguments.val_queries,
    )
    samples = None
    if arguments.report and arguments.shards is not None:
        samples = SamplePhotos.open(arguments.shards)
    with open_world(cpu=arguments.cpu) as world:
        results = evaluate_all(job, world)
        if results is None:
            return 0
        write_results(results, report=arguments.report, samples=samples)
    return 1 if results.failed else 0


if __name__ == "__main__":
    entry(main)
