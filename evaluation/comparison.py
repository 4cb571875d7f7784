"""Compares checkpoints: all of them on all query sets. What goes wrong is said and counted, the rest goes on."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from evaluation.calibration import Calibration
from evaluation.localiser import Localiser
from evaluation.query_set import Outcome, Settings, calibrate, evaluate_set
from evaluation.ranking import RankingForm
from evaluation.report import write_report
from evaluation.result_files import Row, format_table, prepare_folder, write_csv, write_json, write_predictions
from shards.console import JobError, describe_os_error, format_count, in_words, printable
from shards.provenance import provenance
from shards.sample_photos import SamplePhotos
from training.checkpoint import validation_photos
from training.distributed import PATIENCE, World, check_gpus
from training.queries import Queries, SetAside

_LINES_A_KIND = 10


@dataclass(frozen=True)
class Job:
    """What to evaluate, and where the results go. `form` None: that of the calibration."""

    checkpoints: tuple[Path, ...]
    query_sets: tuple[Path, ...]
    out: Path
    settings: Settings
    form: RankingForm | None = None
    val_queries: Path | None = None


@dataclass
class Results:
    """Rows and outcomes in the order of the job, `problems` in words, and `failed`, how much could not be made.

    `speaks`: problems are said as they are noted, which the main process alone does.
    """

    job: Job
    speaks: bool = True
    rows: list[Row] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    calibrations: dict[str, Calibration | None] = field(default_factory=dict)
    failed: int = 0

    def error(self, message: str, rows: int = 1) -> None:
        """Note what made `rows` rows, or a calibration that was asked for, impossible."""
        self.failed += rows
        self._note("error", message)

    def warn(self, message: str) -> None:
        """Note what was left out of a row."""
        self._note("warning", message)

    def _note(self, kind: str, message: str) -> None:
        line = f"{kind}: {printable(message)}"
        if line not in self.problems:
            self.problems.append(line)
            if self.speaks:
                print(line, file=sys.stderr)


@contextmanager
def open_world(*, cpu: bool = False) -> Iterator[World]:
    """This process among those of its `accelerate launch`, or alone; JobError where GPUs are missing."""
    state = PartialState(cpu=cpu or not torch.cuda.is_available(), timeout=PATIENCE)
    check_gpus(state.device)
    try:
        yield World(state.process_index, state.num_processes, state.device)
    finally:
        state.destroy_process_group()


def evaluate_all(job: Job, world: World) -> Results | None:
    """Evaluate every checkpoint on every query set; the results on rank 0, None on the others.

    Raises JobError where `job.out` cannot hold results.
    """
    if world.is_main:
        prepare_folder(job.out)
    results = Results(job, speaks=world.is_main)
    for path in job.checkpoints:
        _evaluate_checkpoint(path, results, world)
    return results if world.is_main else None


def _evaluate_checkpoint(path: Path, results: Results, world: World) -> None:
    """One checkpoint on every query set; its weights are let go before those of the next are read."""
    job = results.job
    try:
        localiser = world.made_on(True, lambda: Localiser.load(path, world.device))
    except JobError as error:
        results.error(str(error), rows=len(results.job.query_sets))
        return
    assert localiser is not None
    for line in localiser.passed_over:
        results.warn(line)
    _calibrate(localiser, path, results, world)
    results.calibrations[str(path)] = localiser.calibration
    form = job.form or localiser.form
    for source in job.query_sets:
        try:
            queries = _list(source, localiser, world)
        except JobError as error:
            results.error(str(error))
            continue
        outcome = evaluate_set(localiser, str(path), queries, form, job.settings, world)
        if outcome is not None:
            _add(outcome, results)


def _list(source: Path, localiser: Localiser, world: World) -> Queries:
    """The queries of a folder or list, as the main process finds them; JobError on all ranks where none can be
    answered."""
    found: Queries = world.gather(world.made_on(world.is_main, lambda: localiser.list_queries(source)))[0]
    if len(found) == 0:
        raise JobError(f"{source}: no photo can be compared with the classes ({found.set_aside[0]})")
    return found


def _calibrate(localiser: Localiser, path: Path, results: Results, world: World) -> None:
    """Fit form and temperature on the validation queries that were given or, where nothing is stored, trained with."""
    source = results.job.val_queries
    if source is None and localiser.calibration is None:
        trained_with = localiser.config.val_queries
        source = world.gather(trained_with if trained_with is not None and trained_with.exists() else None)[0]
        if source is None and trained_with is not None:
            results.warn(
                f"{trained_with}: the training's validation queries are not here; {path} keeps {localiser.form} scores "
                "and a confidence that is not calibrated (--val-queries)"
            )
    if source is None:
        return
    asked = results.job.val_queries is not None
    say = results.error if asked else results.warn
    try:
        queries = _list(source, localiser, world)
        known = validation_photos(localiser.path)
        if not asked and known and world.gather(queries.fingerprint())[0] != known:
            raise JobError(f"{source}: other photos than the training's validation queries (--val-queries)")
    except JobError as error:
        say(f"{error}; {path} keeps {localiser.form} scores")
        return
    fitted = calibrate(localiser, queries, results.job.settings, world)
    if fitted is None:
        say(f"{source}: no readable query of it is answered rightly; {path} keeps {localiser.form} scores")
        return
    localiser.calibration = fitted
    if world.is_main:
        try:
            fitted.save(localiser.path)
        except OSError as error:
            results.warn(f"the calibration is not stored: {describe_os_error(error)}")


def _add(outcome: Outcome, results: Results) -> None:
    """Add a row, and say what it leaves out."""
    checkpoint, source = outcome.name
    row = outcome.row()
    if outcome.fitted:
        results.warn(f"{source}: the validation queries themselves; form and confidence are fitted to them")
    _warn_of_photos(source, "set aside", outcome.queries.set_aside, results)
    _warn_of_photos(source, "unreadable", outcome.failures, results)
    unlocated = outcome.queries.unlocated(outcome.readable)
    _warn_of_photos(source, "predicted but not scored", unlocated, results)
    zone = outcome.classes.zone
    if outcome.queries.reprojected and (source, zone) not in {(o.name[1], o.classes.zone) for o in results.outcomes}:
        moved = format_count(outcome.queries.reprojected, "photo")
        print(f"note: {printable(source)}: {moved} of a neighbouring UTM zone reprojected to {zone}", file=sys.stderr)
    results.outcomes.append(outcome)
    results.rows.append(row)
    if row["scored"] and not row["ceiling"]:
        near = f"within {row['threshold_m']:g} m of the centre of a class of {checkpoint} ({outcome.classes.crs})"
        results.warn(f"{source}: no query lies {near}: a small --threshold, or another city, zone or hemisphere")
    if row["scored"] == 0:
        results.error(
            f"{checkpoint} on {source}: no readable query with coordinates, so no LR@N{outcome.queries.advice}"
        )


def _warn_of_photos(source: str, kind: str, photos: Sequence[SetAside], results: Results) -> None:
    for photo in photos[:_LINES_A_KIND]:
        results.warn(f"{photo.path}: {kind}: {photo.reason}")
    if len(photos) > _LINES_A_KIND:
        results.warn(f"{source}: {len(photos) - _LINES_A_KIND} more photos {kind}")


def _compare_with_training(samples: SamplePhotos, results: Results) -> None:
    """Warn of checkpoints that the shards have no cell of, and of queries that seem to be training photos."""
    for outcome in results.outcomes:
        if not samples.covers(outcome.classes):
            results.warn(f"--shards {samples.dataset.place}: has none of the cells of {outcome.checkpoint}")
            continue
        queries = outcome.queries
        try:
            said = samples.familiar(queries.east[queries.located], queries.north[queries.located])
        except (JobError, OSError) as error:
            said = f"cannot be compared with training photos: {in_words(error)}"
        if said:
            results.warn(f"{outcome.name[1]}: {said}")


def write_results(results: Results, *, report: bool = True, samples: SamplePhotos | None = None) -> None:
    """Write all files, print the table and where the files are; without a row leave the folder as it was.

    Without a report, one of an earlier evaluation is removed: it would tell of other results.
    """
    out, rows = results.job.out, results.rows
    if not rows:
        print(f"no row of the table could be made; nothing is written to {out}", file=sys.stderr)
        return
    if report and samples is not None:
        _compare_with_training(samples, results)
    facts: dict[str, Any] = {
        "settings": asdict(results.job.settings),
        "calibrations": {path: asdict(some) if some else None for path, some in results.calibrations.items()},
        "problems": results.problems,
        "failed": results.failed,
        "provenance": provenance(),
    }
    write_json(out / "results.json", rows, **facts)
    write_csv(out / "results.csv", rows)
    write_predictions(out / "predictions.parquet", results.outcomes)
    written = ["results.json", "results.csv", "predictions.parquet"]
    if report:
        write_report(out / "report.html", results.outcomes, rows, facts, samples, results.warn)
        written.append("report.html")
    else:
        (out / "report.html").unlink(missing_ok=True)
    print(f"\n{format_table(rows)}\n")
    for path, calibration in results.calibrations.items():
        print(f"{path}: {calibration.describe() if calibration else 'confidence not calibrated; give --val-queries'}")
    print(f"written to {out}: {', '.join(written)}")
