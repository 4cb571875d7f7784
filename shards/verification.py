"""Verifies a data set: every shard in parallel, the flat index, the tables above the shards, and what lies around."""

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from shards.checksums import DamagedChecksums, files_below, read_checksums
from shards.classes import ClassTable
from shards.console import JobError, format_count, one_line
from shards.dataset import Manifest, check_folder
from shards.files import TEMPORARY_SUFFIX, json_text, read_table
from shards.index import INDEX_ARRAYS
from shards.layout import (
    CHECKSUMS,
    CLASSES,
    INDEX,
    LISTING,
    MANIFEST,
    OPTIONAL_TOP_FILES,
    PLAN,
    PROVENANCE,
    QUARANTINE,
    REVISION_FILES,
    REVISIONS,
    SHARD_KINDS,
    SHARD_STEM,
    SKIPPED,
    TOP_FILES,
    group_name,
    shard_numbers,
    shard_stem,
)
from shards.locks import LOCK
from shards.soundness import READ_ERRORS, Problem, ShardReport, check_group_index, check_shard, check_sum
from shards.store import Store
from shards.workers import run_tasks

PARALLEL_BYTES = 1 << 29  # of tars: below, starting processes takes longer than checking in this one
_ROWS = {"skipped": SKIPPED, "quarantined": QUARANTINE}
_STEM = re.compile(rf"(?P<stem>{SHARD_STEM})\.({'|'.join(SHARD_KINDS)})")
_ARRAY = re.compile(rf"{INDEX}/(group-\d{{2,}})\.({'|'.join(INDEX_ARRAYS)})\.npy")

Show = Callable[[Problem], None]


@dataclass
class Report:
    """What a verification found: `problems` in the order found; `images` and `bytes` of the shards that were read,
    `shards` their number; `sealed`: whether there are checksums of the tables; `seconds`: how long it took."""

    problems: list[Problem] = field(default_factory=list)
    shards: int = 0
    images: int = 0
    bytes: int = 0
    sealed: bool = False
    seconds: float = 0.0


def verify(dataset: Path, workers: int = 1, show: Show = lambda problem: None, store: Store | None = None) -> Report:
    """Check every byte of a data set that anything depends on; `show` is called with each problem as it is found.

    Tars are compared with their tables, tables and DALI indexes with `checksums.txt` and with each other, the flat
    index with the tables, the class table and the manifest with all of it. Raises `JobError` where there is no data
    set. Of one at a URL (`store`), `dataset` is a copy of all but the tars, which are fetched one by one to be checked.
    Not checked: whether `index/state` is current (where it is not, the index is rebuilt when it is next opened).
    """
    start = time.monotonic()
    check_folder(dataset)
    stored = store.sizes() if store else {}
    found = set(stored) if store else set(files_below(dataset))
    if not any(name in (MANIFEST, PLAN) or _STEM.fullmatch(name) for name in found):
        raise JobError(f"{dataset}: no data set here; preprocessing/build_shards.py makes one")
    report = Report()

    def note(problems: Sequence[Problem]) -> None:
        report.problems += problems
        for problem in problems:
            show(problem)

    try:
        sums = read_checksums(dataset)
        report.sealed = sums is not None
    except (DamagedChecksums, OSError) as error:
        sums = None
        note([Problem(CHECKSUMS, f"damaged ({one_line(error)})")])
    top = _check_top(dataset, found, sums)
    note(top.problems)
    note(_check_revisions(dataset, found, sums, top.manifest))
    stems = sorted({m["stem"] for name in (found if sums is None else sums) if (m := _STEM.fullmatch(name))})
    note(_extra_files(dataset, found, set(stems), sums, top.classes, tars_here=store is None))
    tars = [f"{stem}.tar" for stem in stems if f"{stem}.tar" in found]
    report.bytes = sum(stored[tar] if store else (dataset / tar).stat().st_size for tar in tars)
    if report.bytes < PARALLEL_BYTES:
        workers = 1
    shards = _check_shards(dataset, store, report.bytes, stems, sums, top.classes, workers, note)
    complete = [s for s in shards if s.complete]
    report.shards, report.images = len(shards), sum(s.images for s in complete)
    note(_check_order(shards))
    if (dataset / INDEX).is_dir() and top.classes is not None:
        note(_check_index(dataset, shards, top.classes))
    if len(complete) == len(shards):
        note(_check_counts(top, shards))
    report.seconds = time.monotonic() - start
    return report


@dataclass
class _Top:
    """The files above the shards: what was read of those that are sound, by name, and what is wrong with the others."""

    values: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def manifest(self) -> Manifest | None:
        return self.values.get(MANIFEST)

    @property
    def classes(self) -> ClassTable | None:
        return self.values.get(CLASSES)


def _check_top(dataset: Path, found: set[str], sums: dict[str, str] | None) -> _Top:
    """Check the files above the shards, each by itself, and that plan and manifest agree."""
    top = _Top()
    missing = "missing; the data set is not finished, preprocessing/build_shards.py goes on with it"
    for name in TOP_FILES:
        if name not in found:
            top.problems.append(Problem(name, missing if name == MANIFEST else "missing", kind="missing"))
    readers: dict[str, Callable[[Path], Any]] = {
        MANIFEST: _read_manifest,
        PLAN: _read_json,
        PROVENANCE: _read_json,
        CLASSES: ClassTable.load,
        SKIPPED: read_table,
        QUARANTINE: _read_quarantine,
        LISTING: read_table,
    }
    for name in found & readers.keys():
        regular = (dataset / name).is_file()
        problem = check_sum(dataset, name, sums) if regular else Problem(name, "not a regular file")
        if problem is None:
            try:
                top.values[name] = readers[name](dataset / name)
            except (JobError, *READ_ERRORS) as error:
                problem = Problem(name, f"damaged ({one_line(error).removeprefix(f'{dataset / name}: ')})")
        if problem is not None:
            top.problems.append(problem)
    if top.manifest is not None:
        facts = asdict(top.manifest)
        for name, value in top.values.get(PLAN, {}).items():
            if facts.get(name, value) != value:
                top.problems.append(Problem(MANIFEST, f"says {name} {facts[name]}, {PLAN} says {value}"))
    return top


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON file as `atomic_write_json` writes it."""
    text = path.read_text()
    value = json.loads(text)
    if not isinstance(value, dict) or text != json_text(value):
        raise ValueError("not as it was written")
    return value


def _read_manifest(path: Path) -> Manifest:
    _read_json(path)
    return Manifest.load(path)


def _read_quarantine(path: Path) -> list[dict[str, str]]:
    photos = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    for photo in photos:
        if not photo["reason"] or not photo["source"]:
            raise ValueError("a photo without a name or reason")
    return photos


def _check_revisions(
    dataset: Path, found: set[str], sums: dict[str, str] | None, manifest: Manifest | None
) -> list[Problem]:
    """Check what additions and retries planned: nothing else tells it."""
    begun = range(2, 1 + manifest.revision) if manifest else ()
    names = {f"{REVISIONS}/{number:06d}{end}" for number in begun for end in REVISION_FILES}
    problems = [Problem(name, "missing", kind="missing") for name in sorted(names - found)]
    for name in sorted(n for n in found if n.startswith(f"{REVISIONS}/") and not n.endswith(TEMPORARY_SUFFIX)):
        problem = check_sum(dataset, name, sums)
        if problem is None and name.endswith(".parquet"):
            try:
                read_table(dataset / name)
            except READ_ERRORS as error:
                problem = Problem(name, f"damaged ({one_line(error)})")
        if problem is not None:
            problems.append(problem)
    return problems


def _extra_files(
    dataset: Path,
    found: set[str],
    stems: set[str],
    sums: dict[str, str] | None,
    classes: ClassTable | None,
    *,
    tars_here: bool,
) -> list[Problem]:
    """Files that no part of the data set accounts for, and what killed writers left."""
    groups = None if classes is None else {group_name(g) for g in classes.groups}
    problems = []
    for name in sorted(found):
        shard, array = _STEM.fullmatch(name), _ARRAY.fullmatch(name)
        known = (
            name in TOP_FILES
            or name in (*OPTIONAL_TOP_FILES, LOCK)
            or name == f"{INDEX}/state"
            or (shard is not None and shard["stem"] in stems)
            or (array is not None and (groups is None or array[1] in groups))
            or name.startswith(f"{REVISIONS}/")
            or name in (sums or ())
        )
        if name.endswith(TEMPORARY_SUFFIX):
            problems.append(Problem(name, "left by a writer that was interrupted", kind="extra"))
        elif not known or not ((dataset / name).is_file() or (name.endswith(".tar") and not tars_here)):
            problems.append(Problem(name, "does not belong to the data set", kind="extra"))
    if f"{INDEX}/state" not in found:
        problems.append(Problem(f"{INDEX}/state", "missing, or the whole folder", kind="missing"))
    return problems


def _check_shards(
    dataset: Path,
    store: Store | None,
    total: int,
    stems: list[str],
    sums: dict[str, str] | None,
    classes: ClassTable | None,
    workers: int,
    note: Callable[[Sequence[Problem]], None],
) -> list[ShardReport]:
    tasks = []
    of_groups = {} if classes is None else {g: classes.of_group(g) for g in classes.groups}
    for stem in stems:
        own = None if sums is None else {n: sums[n] for n in (f"{stem}.idx", f"{stem}.parquet") if n in sums}
        check = partial(_check_stored_shard, store) if store else check_shard
        tasks.append(partial(check, dataset, stem, own, of_groups.get(_group_of(stem))))
    reports: list[ShardReport] = []
    with tqdm(desc="checking shards", total=total, unit="B", unit_scale=True, disable=not stems) as bar:
        images, start = 0, time.monotonic()
        for report in run_tasks(tasks, workers):
            reports.append(report)
            note(report.problems)
            images += report.images
            bar.set_postfix_str(f"{images / (time.monotonic() - start):,.0f} images/s", refresh=False)
            bar.update(report.tar_bytes)
    return sorted(reports, key=lambda r: r.stem)


def _check_stored_shard(
    store: Store, dataset: Path, stem: str, sums: dict[str, str] | None, classes: ClassTable | None
) -> ShardReport:
    tar = dataset / f"{stem}.tar"
    tar.parent.mkdir(exist_ok=True)
    try:
        with suppress(FileNotFoundError):  # the check says so
            store.fetch(f"{stem}.tar", tar)
        return check_shard(dataset, stem, sums, classes)
    finally:
        tar.unlink(missing_ok=True)


def _check_order(shards: list[ShardReport]) -> list[Problem]:
    """Shards of a group are numbered from 0, and their keys go on from one to the next."""
    problems = []
    last: dict[int, ShardReport] = {}
    filled: dict[int, ShardReport] = {}  # the last that holds photos: all of a shard's may have been bad
    for shard in shards:
        group, number = shard_numbers(shard.stem)
        before = last.get(group)
        for absent in range(shard_numbers(before.stem)[1] + 1 if before else 0, number):
            problems.append(Problem(f"{shard_stem(group, absent)}.parquet", "missing", kind="missing"))
        if shard.images:
            if group in filled and shard.first_key <= filled[group].last_key:
                what = f"its keys begin at {shard.first_key}, before the last of {filled[group].stem}"
                problems.append(Problem(f"{shard.stem}.parquet", what))
            filled[group] = shard
        last[group] = shard
    return problems


def _check_index(dataset: Path, shards: list[ShardReport], classes: ClassTable) -> list[Problem]:
    """Compare the flat index with the tables of every group whose tables could all be read."""
    unread = {_group_of(s.stem) for s in shards if not s.complete}
    problems: list[Problem] = []
    for group in sorted({_group_of(s.stem) for s in shards} - unread):
        tables = [dataset / f"{s.stem}.parquet" for s in shards if _group_of(s.stem) == group]
        problems += check_group_index(dataset, group, tables, classes.count(group))
    return problems


def _check_counts(top: _Top, shards: list[ShardReport]) -> list[Problem]:
    """Compare the class table and the manifest with what the shards hold."""
    manifest, classes = top.manifest, top.classes
    problems: list[Problem] = []
    if classes is not None:
        problems += _class_counts(classes, shards)
    if manifest is None:
        return problems
    counts = {
        "shards": len(shards),
        "images": sum(s.images for s in shards),
        "bytes": sum(s.tar_bytes_by_table for s in shards),
    }
    if classes is not None:
        counts |= {"classes": len(classes), "groups": len(classes.groups), "utm_zone": classes.zone}
        counts |= {"M": classes.M, "N": classes.N}
    counts |= {name: len(top.values[file]) for name, file in _ROWS.items() if file in top.values}
    for name, count in counts.items():
        if getattr(manifest, name) != count:
            problems.append(Problem(MANIFEST, f"says {name} {getattr(manifest, name)}, but it is {count}"))
    return problems


def _class_counts(classes: ClassTable, shards: list[ShardReport]) -> Iterator[Problem]:
    for group in classes.groups:
        expected = classes.of_group(group).images
        images = np.zeros(len(expected), np.int64)
        for shard in shards:
            if _group_of(shard.stem) == group:
                known = shard.labels < len(expected)  # of the others the shard's own check has told
                images[shard.labels[known]] += shard.images_per_label[known]
        wrong = np.flatnonzero(images != expected)
        if len(wrong):
            label = wrong[0]
            more = f", and {format_count(len(wrong) - 1)} more labels" if len(wrong) > 1 else ""
            what = f"group {group}, label {label} has {expected[label]} images, the shards have {images[label]}{more}"
            yield Problem(CLASSES, what)


def _group_of(stem: str) -> int:
    return shard_numbers(stem)[0]
