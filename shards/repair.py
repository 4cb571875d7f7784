"""Rebuilds just what is broken in a data set: an index from its tables, a shard from the source photos.

Photos are resized in another room, which this one may not import: repair takes away what is broken, the marker that
it is done first, and runs the program that made the data set. That makes only what is not there.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shards.checksums import seal
from shards.classes import ClassTable
from shards.console import JobError, flag_of, format_count
from shards.dataset import GPU_CODEC, Manifest
from shards.files import (
    TEMPORARY_SUFFIX,
    atomic_write_bytes,
    atomic_write_json,
    read_bytes,
    remove_partials,
)
from shards.index import build_index
from shards.layout import (
    CHECKSUMS,
    CLASSES,
    INDEX,
    LISTING,
    MANIFEST,
    PLAN,
    PROVENANCE,
    QUARANTINE,
    REVISIONS,
    SHARD_KINDS,
    SKIPPED,
)
from shards.locks import at_work
from shards.provenance import provenance
from shards.soundness import index_of_table, read_sample_table
from shards.store import is_url
from shards.verification import Report

BUILD = Path(__file__).resolve().parent.parent / "preprocessing" / "build_shards.py"
_FINISHED_BY_BUILD = (MANIFEST, PLAN, CLASSES, SKIPPED, QUARANTINE, LISTING)
_NOT_SETTINGS = ("fingerprint", "source", "codec")


def repair(dataset: Path, report: Report, source: str | None, workers: int) -> None:
    """Rebuild what `report` (of `shards.verification.verify`) found broken; the caller verifies again.

    `source`: the photos that the data set was made from, a path or URL. Nothing is deleted that could not be made
    again: files that do not belong to the data set move to a folder beside it. Raises `JobError` where photos are
    needed and not given or are others than those, where plan and manifest or a revision are lost, or where the build
    fails; then the same command goes on from there.
    """
    broken = _broken(report)
    plans = sorted(name for name in broken if name.startswith(f"{REVISIONS}/"))
    if plans:
        raise JobError(
            f"{dataset / plans[0]}: says what an addition or a retry planned, and nothing else does; bring {len(plans)}"
            " such files back from a copy, or build the data set anew from all photos. Its shards serve as they are"
        )
    stems = _broken_shards(broken)
    with at_work(dataset):
        _set_aside(dataset, [p.file for p in report.problems if p.kind == "extra"])
        for name in sorted(broken):
            if name.endswith(".idx") and name.removesuffix(".idx") not in stems:
                _rebuild_dali_index(dataset / name)
    if PROVENANCE in broken:
        atomic_write_json(dataset / PROVENANCE, provenance())
        print(f"{PROVENANCE}: what made the data set is lost; this repair is recorded instead")
    if needs_photos(report):
        _build(dataset, sorted(stems), broken, source, workers)
    elif any(name.startswith(f"{INDEX}/") for name in broken):
        build_index(dataset, ClassTable.load(dataset / CLASSES))
        print(f"{INDEX}: rebuilt from the tables")
    if report.sealed or CHECKSUMS in broken:
        seal(dataset)


def needs_photos(report: Report) -> bool:
    """Whether what `report` found broken can only be made anew from the photos; an index follows from the tables."""
    broken = _broken(report)
    return bool(_broken_shards(broken) or broken & set(_FINISHED_BY_BUILD))


def _broken(report: Report) -> set[str]:
    return {problem.file for problem in report.problems if problem.kind != "extra"}


def _broken_shards(broken: set[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in broken if name.endswith((".tar", ".parquet")) and "/" in name}


def _set_aside(dataset: Path, names: list[str]) -> None:
    if remove_partials(dataset):
        print("removed what interrupted writers left")
    aside = dataset.resolve().with_name(f"{dataset.resolve().name}-set-aside")
    for name in names:
        if (dataset / name).is_symlink() or (dataset / name).exists():
            place = aside / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.exists():
                raise JobError(f"{place}: already there; move it away, so that {name} of the data set can go there")
            shutil.move(dataset / name, place)
            print(f"{name}: moved to {place}")
        with suppress(OSError):  # the folder holds other files
            os.removedirs((dataset / name).parent)


def _rebuild_dali_index(path: Path) -> None:
    table, _ = read_sample_table(path.with_suffix(".parquet"))
    atomic_write_bytes(path, index_of_table(table))
    print(f"{path.name}: rebuilt from its table")


def _build(dataset: Path, stems: list[str], broken: set[str], source: str | None, workers: int) -> None:
    """Take away the broken shards and run the build, which makes them and finishes."""
    if source is None:
        what = format_count(len(stems), "shard") if stems else ", ".join(sorted(broken & set(_FINISHED_BY_BUILD)))
        raise JobError(
            f"{dataset}: rebuilding {what} takes the photos it was made from; name them with --source PHOTOS"
        )
    if not is_url(source) and not Path(source).exists():
        raise JobError(f"{source}: no such photos; --source takes those that the data set was made from")
    plan, before = _settings(dataset, broken)
    if PLAN in broken:
        atomic_write_json(dataset / PLAN, plan)
    if LISTING in broken:
        (dataset / LISTING).unlink(missing_ok=True)
    command = [sys.executable, str(BUILD), "--source", str(source), "--out", str(dataset), "--workers", str(workers)]
    if plan["codec"].startswith(GPU_CODEC):
        command += ["--codec", "gpu"]
    beside_list = "source" in plan and plan.get("root") == str(Path(plan["source"]).parent)
    if beside_list and not Path(plan["root"]).is_dir():
        plan["root"] = None  # the list has moved, and its photos with it
    for name, value in plan.items():
        if name not in _NOT_SETTINGS and value is not None:
            command += [flag_of(name), str(value)]
    if QUARANTINE in broken:  # else the build counts there how many bad photos were accepted
        command += ["--max-bad-share", "1"]
    print(f"rebuilding {format_count(len(stems), 'shard')} from {source}", flush=True)
    of_shards = [f"{stem}.{kind}" for stem in stems for kind in reversed(SHARD_KINDS)]
    with _out_of_the_way(dataset, [MANIFEST, *of_shards]):
        code = subprocess.run(command, check=False).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise JobError(
            f"{dataset}: the build ended with code {code} (its message is above); mend that and repair again"
        )
    after = Manifest.load(dataset / MANIFEST)
    if before is not None and after.images != before.images:
        print(f"the data set had {format_count(before.images, 'image')} and now has {format_count(after.images)}")


@contextmanager
def _out_of_the_way(dataset: Path, names: list[str]) -> Iterator[None]:
    """Give files the names of leftovers, in that order: the build removes those when it has found that the photos are
    the right ones. What is still there afterwards gets its name back."""
    places = {dataset / name: dataset / f"{name}{TEMPORARY_SUFFIX}" for name in names}
    places = {path: place.with_name(f".{place.name}") for path, place in places.items() if path.exists()}
    for path, place in places.items():
        os.rename(path, place)
    try:
        yield
    finally:
        for path, place in reversed(places.items()):
            if place.exists():
                os.rename(place, path)


def _settings(dataset: Path, broken: set[str]) -> tuple[dict[str, Any], Manifest | None]:
    """The plan's facts (from the manifest where the plan is lost), and the manifest where it is sound."""
    before = None if MANIFEST in broken else Manifest.load(dataset / MANIFEST)
    if before is not None and PLAN in broken:
        counts = ("format_version", "revision", "utm_zone", "groups", "classes", "shards", "images", "skipped",
                  "quarantined", "bytes")  # fmt: skip
        return {name: value for name, value in asdict(before).items() if name not in counts}, before
    # Where the manifest is missing, the plan may be broken only in that an interrupted rebuild from photos in another
    # place noted that place after the data set was sealed; the build compares it with its fingerprint.
    with suppress(FileNotFoundError, ValueError, AttributeError):
        plan = json.loads(read_bytes(dataset / PLAN))
        if {"codec", "fingerprint"} <= plan.keys():
            return plan, before
    raise JobError(
        f"{dataset}: plan.json and dataset.json are both lost, and with them the settings; remove them and run "
        "preprocessing/build_shards.py with the settings that made the data set (provenance.json holds the command)"
    )
