"""Finishes a data set whose shards are all there: class table, skipped and bad photos, index, manifest."""

import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from preprocessing.claim import claimed
from preprocessing.photos import Bad
from preprocessing.plan import Plan, Settings
from preprocessing.revisions import Revision, photo_table, read_bad, write_bad, write_table
from preprocessing.shard_task import ShardResult
from preprocessing.sources import Source
from shards.checksums import seal
from shards.classes import ClassTable
from shards.dataset import Manifest
from shards.files import read_table
from shards.index import build_index, check_labels
from shards.layout import CLASSES, FORMAT_VERSION, MANIFEST, QUARANTINE, SKIPPED, shard_tables
from shards.writer import shard_facts


@dataclass(frozen=True)
class Summary:
    """What a build did: the manifest, the classes, photos set aside by reason, bytes read, and the time it took in
    seconds."""

    manifest: Manifest
    classes: ClassTable
    images_per_group: dict[int, int]
    reasons: Counter[str]
    other_files: int
    source_bytes: int
    jpeg_bytes: int
    seconds: float
    shards_before: int


@dataclass(frozen=True)
class State:
    """What a data set's tables follow from, besides its shards: the source, settings and name of the codec that it was
    begun with, classes, skipped photos (`SKIPPED_COLUMNS`), photos that were set aside by their names, and what has
    changed since the first build."""

    source: Source
    settings: Settings
    codec: str
    fingerprint: str
    classes: ClassTable
    skipped: pa.Table
    bad: list[Bad]
    revisions: list[Revision]

    @staticmethod
    def of_plan(plan: Plan, source: Source) -> "State":
        """The state after the first build, from `source`."""
        skipped = photo_table(plan.paths.take(pa.array(plan.skipped)), plan.places, plan.skipped)
        codec = plan.settings.facts()["codec"]
        return State(source.resolved(), plan.settings, codec, plan.fingerprint, plan.classes, skipped, plan.bad, [])

    @staticmethod
    def of_dataset(out: Path, begun: list[Revision]) -> "State":
        """The state of a data set after the revisions that it has `begun`, the last of which may be unfinished."""
        claim = claimed(out)
        by_name = [b for b in read_bad(out / QUARANTINE) if b.sample is None]
        skipped, classes = read_table(out / SKIPPED), ClassTable.load(out / CLASSES)
        state = State(claim.source, claim.settings, claim.codec, claim.fingerprint, classes, skipped, by_name, [])
        return state.after(begun)

    @property
    def sources(self) -> list[Source]:
        """Where samples are from, by the number that their names begin with; by the absolute paths that were noted,
        among which the first one is again where it grew."""
        return list(dict.fromkeys([self.source, *(r.source for r in self.revisions if r.source)]))

    def after(self, revisions: list[Revision]) -> "State":
        """The state after the last of `revisions`, all there are."""
        if not revisions:
            return self
        last = revisions[-1]
        return replace(self, classes=last.classes, skipped=last.skipped, bad=last.bad, revisions=revisions)


def finish(
    out: Path, state: State, *, other_files: int = 0, shards_before: int = 0, start: float | None = None
) -> Summary:
    """Write the tables, the index and, last of all, the manifest.

    `start`: when the job began, by `time.monotonic`; it and the other numbers are for the summary alone.
    """
    classes, results = _count(out, state.classes)
    classes.save(out / CLASSES)
    write_table(state.skipped, out / SKIPPED)
    bad = state.bad + _bad_photos(results, state.revisions)
    write_bad(bad, out / QUARANTINE)
    build_index(out, classes)
    settings = state.settings.facts() | {"codec": state.codec}
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        revision=1 + len(state.revisions),
        **{name: value for name, value in settings.items() if name in Manifest.__dataclass_fields__},
        utm_zone=classes.zone,
        groups=len(classes.groups),
        classes=len(classes),
        shards=len(results),
        images=sum(r.images for r in results),
        skipped=len(state.skipped),
        quarantined=len(bad),
        bytes=sum(r.tar_bytes for r in results),
        fingerprint=state.fingerprint,
    )
    seal(out, manifest)
    manifest.save(out / MANIFEST)
    return Summary(
        manifest,
        classes,
        {g: sum(r.images for r in results if r.group == g) for g in classes.groups},
        Counter(b.reason for b in bad),
        other_files,
        sum(r.source_bytes for r in results),
        sum(r.jpeg_bytes for r in results),
        time.monotonic() - start if start else 0.0,
        shards_before,
    )


def _count(out: Path, classes: ClassTable) -> tuple[ClassTable, list[ShardResult]]:
    """The class table with the images that its shards hold, and what each shard holds."""
    images = np.zeros(len(classes), np.int64)
    results = []
    for table in shard_tables(out):
        result = ShardResult.from_facts(shard_facts(table))
        results.append(result)
        first = int(np.searchsorted(classes.group, result.group))
        count = classes.count(result.group)
        labels = read_table(table, ["label"])["label"].to_numpy()
        check_labels(table, labels, count)
        images[first : first + count] += np.bincount(labels, minlength=count)
    return replace(classes, images=images), results


def _bad_photos(results: list[ShardResult], revisions: list[Revision]) -> list[Bad]:
    """What shards set aside, less the samples that a later revision got."""
    bad = {b.source: b for result in results for b in result.bad}
    of_shard = {(r.group, r.number): {b.source for b in r.bad} for r in results}
    for revision in revisions:
        if revision.source is None:
            still_bad = set().union(*(of_shard[shard] for shard in revision.shards()))
            for source in revision.samples["source"].to_pylist():
                if source not in still_bad:
                    bad.pop(source, None)
    return list(bad.values())
