"""Builds a data set: plan, run the shards that are not done, finish with the tables and the manifest."""

import time
from dataclasses import replace
from pathlib import Path

from preprocessing.claim import TaskLock, check_output, claim, unlock
from preprocessing.engine import Job
from preprocessing.finishing import State, Summary, finish
from preprocessing.output import Output
from preprocessing.photos import Listing, store_listing
from preprocessing.plan import Plan, Settings, make_plan
from preprocessing.revisions import count_bad, retried, revisions
from preprocessing.shard_run import Machinery, bad_of, write_shards
from preprocessing.shard_task import ShardResult
from preprocessing.sources import Source, describe_bad
from preprocessing.trial import Forecast, check_space, forecast
from preprocessing.updates import complete_revisions
from shards.console import JobError, format_count
from shards.files import TEMPORARY_SUFFIX, remove_partials
from shards.layout import LISTING, PLAN, QUARANTINE, REVISIONS, SHARD_SAMPLES, shard_stem
from shards.locks import at_work


def build(
    source: Source | Path,
    out: Output | Path,
    settings: Settings,
    machinery: Machinery,
    *,
    rescan: bool = False,
) -> Summary:
    """Make the data set `out` from the photos of `source`, or finish one that was interrupted. Raises `JobError`."""
    start = time.monotonic()
    source = Source.of(source) if isinstance(source, Path) else source
    out = Output.of(out)
    _prepare(source, out.folder, settings)
    with at_work(out.folder):
        listing, plan = _begin(source, out, settings, rescan)
        remove_partials(out.folder)
        return _finish(plan, listing, source, out, machinery, start)


def build_share(
    source: Source,
    out: Output | Path,
    settings: Settings,
    machinery: Machinery,
    *,
    index: int,
    count: int,
    rescan: bool = False,
) -> int:
    """Write the shards number `index`, `index + count`, ... of a plan, as one of `count` tasks that may run at the same
    time on several machines; returns how many those are. `assemble` finishes the data set. Raises `JobError`."""
    out = Output.of(out)
    _prepare(source, out.folder, settings)
    with at_work(out.folder, beside_others=True), TaskLock.of(out.folder, index, count) as lock:
        with lock.one_at_a_time():
            _, plan = _begin(source, out, settings, rescan)
        shards = plan.shards()[index::count]
        for group, number, _ in shards:
            stem = out.folder / shard_stem(group, number)
            for leftover in stem.parent.glob(f".{stem.name}.*{TEMPORARY_SUFFIX}"):
                leftover.unlink(missing_ok=True)
        _write_planned(plan, source, out, machinery, index, count)
        return len(shards)


def assemble(
    source: Source, out: Output | Path, settings: Settings, machinery: Machinery, *, count: int | None = None
) -> Summary:
    """Finish a data set whose shards `count` tasks wrote by `build_share`; raises `JobError` where some are missing."""
    start, out = time.monotonic(), Output.of(out)
    _prepare(source, out.folder, settings)
    with at_work(out.folder):
        listing, plan = _begin(source, out, settings, rescan=False)
        _check_all_there(plan, out, count)
        remove_partials(out.folder)
        unlock(out.folder)
        return _finish(plan, listing, source, out, machinery, start)


def _check_all_there(plan: Plan, out: Output, count: int | None) -> None:
    shards = plan.shards()
    missing = [i for i, (group, number, _) in enumerate(shards) if out.finished_shard(group, number) is None]
    if missing:
        names = ", ".join(shard_stem(*shards[i][:2]) for i in missing[:5]) + (", ..." if len(missing) > 5 else "")
        again = ",".join(str(index) for index in sorted({i % count for i in missing})) if count else ""
        advice = f"run task {again} of {count} again" if again else "run the tasks that write them again"
        raise JobError(
            f"{out.place}: {len(missing)} of {format_count(len(shards), 'shard')} missing ({names}); {advice}"
        )


def dry_run(
    source: Source, out: Output | Path, settings: Settings, machinery: Machinery, *, rescan: bool = False
) -> Forecast:
    """What `build` would make, after a short trial. Writes nothing but the list of photos, which the build reuses."""
    out = Output.of(out)
    _prepare(source, out.folder, settings)
    listing, plan = _plan(source, out.folder, settings, rescan)
    out.share()
    return forecast(plan, listing, source, None if out.store else out.folder, machinery)


def _prepare(source: Source, out: Path, settings: Settings) -> None:
    check_output(source, out)
    settings.resizer()  # where a GPU is missing, this says so before photos are listed
    out.mkdir(parents=True, exist_ok=True)


def _begin(source: Source, out: Output, settings: Settings, rescan: bool) -> tuple[Listing, Plan]:
    listing, plan = _plan(source, out.folder, settings, rescan)
    claim(out.folder, source, plan)
    if listing.fresh:
        store_listing(listing, out.folder / LISTING)
    out.share()
    return listing, plan


def _finish(plan: Plan, listing: Listing, source: Source, out: Output, machinery: Machinery, start: float) -> Summary:
    """Write what is missing of a plan's shards, and of later revisions', then the tables and the manifest."""
    before = _write_planned(plan, source, out, machinery, 0, 1)
    state = complete_revisions(out, State.of_plan(plan, source), machinery)
    summary = finish(out.folder, state, other_files=listing.others, shards_before=len(before), start=start)
    out.share()
    return summary


def _plan(source: Source, out: Path, settings: Settings, rescan: bool) -> tuple[Listing, Plan]:
    cache = None if rescan else out / LISTING
    changed_since = any((out / REVISIONS).glob("*.parquet"))  # then new photos may lie beside the first ones
    listing = source.photos(cache, settings.zone, as_recorded=changed_since)
    if listing.fresh and not (out / PLAN).exists():  # with a plan there, only once it is the same one
        store_listing(listing, out / LISTING)
        listing = replace(listing, fresh=False)
    return listing, make_plan(listing, settings)


def _write_planned(
    plan: Plan, source: Source, out: Output, machinery: Machinery, index: int, count: int
) -> list[ShardResult]:
    """Write the missing ones among shards `index`, `index + count`, ...; returns those that were done before."""
    settings = plan.settings
    resizer = settings.resizer()
    shards = plan.shards()[index::count]
    finished = {(group, number): out.finished_shard(group, number) for group, number, _ in shards}
    before = [result for result in finished.values() if result is not None]
    elsewhere = retried(revisions(out.folder)) if len(before) < len(shards) else frozenset[str]()
    images = sum(size for _, _, size in shards)
    if len(before) < len(shards):
        left = images - sum(r.images + len(r.bad) for r in before)
        in_flight = machinery.workers * SHARD_SAMPLES
        check_space(plan, source, out.folder, resizer, min(left, in_flight) if out.store else left)
    results = write_shards(
        Job((source,), out.folder, resizer, out.store),
        (plan.task(*shard).without(elsewhere) for shard, result in finished.items() if result is None),
        finished,
        machinery.tolerance(
            plan.photos // count,
            named=plan.bad if count == 1 else (),
            accepted=count_bad(out.folder / QUARANTINE),
        ),
        machinery,
        images=images,
    )
    if count == 1 and machinery.max_bad_share is None and not any(result.images for result in results):
        seen = describe_bad(bad_of(results))
        raise JobError(f"{source.place}: no photo can be used ({seen}); mend the source, or choose another --out")
    out.gather(finished)
    return before
