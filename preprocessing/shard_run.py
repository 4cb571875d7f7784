"""Writes the shards of a plan that are not there yet: progress, the limit of bad photos, a clean Ctrl-C."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tqdm import tqdm

from preprocessing.engine import Counts, Job, run_tasks
from preprocessing.photos import Bad, reasons_of
from preprocessing.plan import ShardTask
from preprocessing.shard_task import ShardResult, Stopped
from shards.console import JobError, format_bytes, format_count, printable

DEFAULT_BAD_SHARE = 0.01
_TOLERATED_BAD = 25


class TooManyBad(JobError):
    """More photos were set aside than a job allows."""


RunTasks = Callable[[Job, Iterator[ShardTask], int, Callable[[Counts], bool]], Iterator[ShardResult]]


@dataclass(frozen=True)
class Machinery:
    """How shards are written: processes at a time, the share of bad photos that stops the job (None: 1 %, but never
    fewer than 25 photos), and what runs the tasks."""

    workers: int
    max_bad_share: float | None = None
    run_tasks: RunTasks = run_tasks


def write_shards(
    job: Job,
    tasks: Iterator[ShardTask],
    done: list[ShardResult],
    bad_names: list[Bad],
    machinery: Machinery,
    *,
    shards: int,
    images: int,
    photos: int,
    accepted: int,
) -> list[ShardResult]:
    """Write `tasks`; returns their results after those that are `done`.

    `shards` and `images`: how many the plan has, done ones included; `photos`: how many were considered for it,
    `bad_names` included. Raises `JobError` where more photos are bad than `machinery` allows on top of the `accepted`
    ones of an earlier build.
    """
    results = list(done)
    limit = accepted + bad_limit(machinery.max_bad_share, photos)
    check_bad(bad_names, results, limit, photos)
    if len(done) == shards:
        return results
    if done:
        print(f"going on: {len(done)} of {format_count(shards, 'shard')} done before")
    left = images - sum(r.images + len(r.bad) for r in results)
    bad_before = len(bad_names) + sum(len(r.bad) for r in results)
    with tqdm(desc="starting workers", total=left, unit=" images", unit_scale=True, smoothing=0.05) as bar:

        def progress(counts: Counts) -> bool:
            if counts.photos:
                bar.set_description_str("writing shards", refresh=False)
            bar.set_postfix_str(f"{format_bytes(counts.source_bytes)} read, {counts.bad} set aside", refresh=False)
            bar.update(counts.photos - bar.n)
            return counts.bad + bad_before <= limit

        try:
            results += machinery.run_tasks(job, tasks, min(machinery.workers, shards - len(done)), progress)
            bar.update(left - bar.n)
        except Stopped as stopped:
            check_bad(bad_names + stopped.bad, results, limit, photos)
            raise AssertionError("stopped without a reason") from stopped
        except KeyboardInterrupt:
            bar.close()
            made = format_count(sum(r.images for r in results), "image")
            print(
                f"stopped: {len(results)} of {format_count(shards, 'shard')} ({made}) "
                f"are done in {job.place}; the same command goes on from there"
            )
            raise
    check_bad(bad_names, results, limit, photos)
    return results


def bad_limit(share: float | None, photos: int) -> float:
    """How many of `photos` may be bad."""
    return max(DEFAULT_BAD_SHARE * photos, _TOLERATED_BAD) if share is None else share * photos


def check_bad(bad_names: list[Bad], results: list[ShardResult], limit: float, photos: int) -> None:
    """Raise `TooManyBad`, with the reasons, where more than `limit` photos were set aside."""
    bad = bad_names + [b for result in results for b in result.bad]
    if len(bad) <= limit:
        return
    reasons = reasons_of(bad)
    raise TooManyBad(
        f"{len(bad)} of {photos} photos are bad ({reasons}; e.g. {printable(bad[-1].source)}), more than the limit of "
        f"{limit:.0f}; mend the source, or raise --max-bad-share and run the same command again"
    )
