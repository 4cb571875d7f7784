"""Changes of a finished data set: new photos, quarantined photos tried again. Every label stays what it is."""

import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from preprocessing.addition import Gain, plan_addition, plan_samples
from preprocessing.engine import Job
from preprocessing.finishing import State, Summary, finish
from preprocessing.output import Output
from preprocessing.photos import Bad
from preprocessing.resize import BadPhoto, Resizer
from preprocessing.revisions import PLANNED, Revision, count_bad, publish, read_bad, retried, revisions, stage
from preprocessing.samples import SampleMaker
from preprocessing.shard_run import Machinery, TooManyBad, write_shards
from preprocessing.shard_task import finished_shard
from preprocessing.sources import Source
from shards.checksums import sealed_checksums
from shards.console import JobError, format_count
from shards.dataset import Manifest
from shards.files import remove_partials
from shards.layout import (
    CLASSES,
    MANIFEST,
    PLAN,
    QUARANTINE,
    REVISIONS,
    SHARD_KINDS,
    SKIPPED,
    shard_numbers,
    shard_stem,
    shard_tables,
)
from shards.locks import at_work
from shards.soundness import check_sum


def add(
    source: Source, out: Output | Path, machinery: Machinery, *, crops: int | None = None
) -> tuple[Summary, Gain] | None:
    """Bring the photos of `source` into the finished data set `out`; None where all of them are known already.

    `crops`: as in `Source`; None means those of the data set. Where an earlier change was interrupted, it is finished
    first. Raises `JobError`; where too many photos are bad, the data set is then as it was.
    """
    start = time.monotonic()
    source, out = source.resolved(), Output.of(out)
    source.check(out.folder)
    Manifest.load(out.folder / MANIFEST)
    with at_work(out.folder):
        state = _begin(out, machinery)
        source = replace(source, crops=state.settings.crops if crops is None else crops)
        zone = state.classes.zone
        listing = source.photos(None, zone, southern=state.classes.southern if zone else None)
        revision, gain = plan_addition(out.folder, state, source, listing)
        new_bad = revision.bad[len(state.bad) :]
        machinery.tolerance(listing.found, named=new_bad).check()
        if not gain.new and not new_bad:
            return None
        revision.save(out.folder)
        out.share()
        before = Manifest.load(out.folder / MANIFEST).images
        try:
            summary = _end(out, state, machinery, start)
            return summary, replace(gain, images=summary.manifest.images - before)
        except TooManyBad:
            _withdraw(out, revision)
            raise


def retry_quarantined(out: Output | Path, machinery: Machinery) -> tuple[Summary, int, int] | None:
    """Try the quarantined photos of `out` again and append those that are sound now.

    Returns the summary, how many were appended and how many were tried, or None where none can be used. Photos that
    were set aside by their names are not tried. Raises `JobError`.
    """
    start, out = time.monotonic(), Output.of(out)
    Manifest.load(out.folder / MANIFEST)
    with at_work(out.folder):
        state = _begin(out, machinery)
        candidates = [b for b in read_bad(out.folder / QUARANTINE) if b.sample is not None]
        sound = _sound(candidates, state.sources, state.settings.resizer())
        if not sound:
            return None
        rows = [{**(b.sample or {}), "number": 0, "source": b.source} for b in sound]
        samples = plan_samples(pa.Table.from_pylist(rows, PLANNED), state.settings.seed, out.folder)
        number = 2 + len(state.revisions)
        Revision(number, None, samples, state.classes, state.skipped, state.bad, len(sound)).save(out.folder)
        out.share()
        return _end(out, state, machinery, start), len(sound), len(candidates)


def _sound(candidates: list[Bad], sources: list[Source], resizer: Resizer) -> list[Bad]:
    made = SampleMaker(sources, resizer, [b.source for b in candidates]).make()
    tried = tqdm(zip(candidates, made, strict=True), "trying quarantined photos", len(candidates), unit=" photos")
    return [bad for bad, (jpeg, _) in tried if not isinstance(jpeg, BadPhoto)]


def _begin(out: Output, machinery: Machinery) -> State:
    """The state of a finished data set, after a change of it that was interrupted is finished."""
    manifest = Manifest.load(out.folder / MANIFEST)
    begun = revisions(out.folder)
    if manifest.revision > 1 + len(begun):
        raise JobError(f"{out.place}: what revision {manifest.revision} planned is lost; run shards/verify.py")
    _check_shards(out, manifest, begun[manifest.revision - 1 :])
    if manifest.revision == 1 + len(begun):
        _check_tables(out)
    state = State.of_dataset(out.folder, begun)
    remove_partials(out.folder)
    if manifest.revision < 1 + len(begun):
        print(f"finishing revision {1 + len(begun)}, which was interrupted")
        _end(out, state, machinery)
    return state


def _check_shards(out: Output, manifest: Manifest, unfinished: list[Revision]) -> None:
    """Raise `JobError` where the data set lacks a shard: once `finish` has counted the others, nobody would miss it."""
    later = {shard for revision in unfinished for shard in revision.shards()}
    named = {shard_numbers(table.stem) for table in shard_tables(out.folder)} - later
    lost = manifest.shards - sum(finished_shard(out.folder, *shard, with_tar=False) is not None for shard in named)
    if lost > 0:
        raise JobError(
            f"{out.place}: {lost} of {format_count(manifest.shards, 'shard')} missing or damaged; "
            f"run shards/verify.py {out.place}"
        )


def _check_tables(out: Output) -> None:
    """Raise `JobError` where a file that a change goes by is not the one that was sealed."""
    sums = sealed_checksums(out.folder)
    for name in (MANIFEST, PLAN, CLASSES, SKIPPED, QUARANTINE, *(n for n in sums if n.startswith(f"{REVISIONS}/"))):
        if (out.folder / name).exists() and (problem := check_sum(out.folder, name, sums)):
            raise JobError(f"{out.place}/{name}: {problem.what}; run shards/verify.py {out.place}")


def _withdraw(out: Output, revision: Revision) -> None:
    """Undo a revision of which nothing is published; into a store its shards have gone already, so they go first."""
    if out.store is not None:
        there = out.store.sizes()
        shards = [f"{shard_stem(*shard)}.{kind}" for kind in reversed(SHARD_KINDS) for shard in revision.shards()]
        out.store.remove([name for name in [*shards, *revision.files()] if name in there])
    revision.withdraw(out.folder)


def _end(out: Output, state: State, machinery: Machinery, start: float | None = None) -> Summary:
    summary = finish(out.folder, complete_revisions(out, state, machinery), start=start)
    out.share()
    return summary


def complete_revisions(out: Output, state: State, machinery: Machinery) -> State:
    """Write what is missing of every revision's shards and move them into the data set; the state after the last."""
    begun = revisions(out.folder)
    for count in range(1, len(begun) + 1):
        _complete(out, state.after(begun[:count]), retried(begun[count:]), machinery)
    return state.after(begun)


def _complete(out: Output, state: State, elsewhere: frozenset[str], machinery: Machinery) -> None:
    """`complete_revisions` for the last revision of `state`; `elsewhere`: what later ones retried."""
    revision = state.revisions[-1]
    shards = revision.shards()
    staged = stage(out.folder)
    staged.mkdir(parents=True, exist_ok=True)
    finished = {s: out.finished_shard(*s) or finished_shard(staged, *s) for s in shards}
    write_shards(
        Job(tuple(state.sources), staged, state.settings.resizer(), out.store),
        (t.without(elsewhere) for t in revision.tasks() if finished[t.group, t.number] is None),
        finished,
        machinery.tolerance(revision.photos, accepted=count_bad(out.folder / QUARANTINE)),
        machinery,
        images=len(revision.samples),
    )
    publish(out.folder, shards)
    out.gather(shards)
