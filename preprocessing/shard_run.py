"""Writes the shards of a plan that are not there yet: progress, the limit of bad photos, a clean Ctrl-C."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from preprocessing.engine import Counts, Job, run_tasks
from preprocessing.photos import Bad
from preprocessing.plan import ShardTask
from preprocessing.shard_task import ShardResult, Stopped
from preprocessing.sources import describe_bad
from shards.console import JobError, format_bytes, format_count

_BAD_SHARE = 0.01
_TOLERATED_BAD = 25


class TooManyBad(JobError):
    """More photos were set aside than a job allows."""


@dataclass(frozen=True)
class Tolerance:
    """How many bad photos a job bears: `limit` of the `photos` that are considered, counting `named`, those that were
    set aside by their names."""

    limit: float
    photos: int
    named: Sequence[Bad]

    def check(self, found: Iterable[Bad] = ()) -> None:
        """Raise `TooManyBad`, with the reasons, where `named` and what was `found` are more."""
        bad = [*self.named, *found]
        if len(bad) > self.limit:
            raise TooManyBad(
                f"{len(bad)} of {self.photos} photos are bad ({describe_bad(bad)}), more than the limit of "
                f"{self.limit:.0f}; mend the source, or raise --max-bad-share and run the same command again"
            )


RunTasks = Callable[[Job, Iterator[ShardTask], int, Callable[[Counts], bool]], Iterator[ShardResult]]


@dataclass(frozen=True)
class Machinery:
    """How shards are written: processes at a time, the share of bad photos that stops the job (None: 1 %, but never
    fewer than 25 photos), and what runs the tasks."""

    workers: int
    max_bad_share: float | None = None
    run_tasks: RunTasks = run_tasks

    def tolerance(self, photos: int, *, named: Sequence[Bad] = (), accepted: int = 0) -> Tolerance:
        """How many of `photos` may be bad, on top of those that an earlier job `accepted`."""
        share = self.max_bad_share
        limit = max(_BAD_SHARE * photos, _TOLERATED_BAD) if share is None else share * photos
        return Tolerance(accepted + limit, photos, named)


def write_shards(
    job: Job,
    tasks: Iterator[ShardTask],
    shards: Mapping[tuple[int, int], ShardResult | None],
    tolerance: Tolerance,
    machinery: Machinery,
    *,
    images: int,
) -> list[ShardResult]:
    """Write `tasks`; returns their results after those of shards that are done.

    `shards`: the results of all shards of the plan, by group and number, None of those to write; `images`: how many
    are planned for all. Raises `JobError` where more photos are bad than is tolerated.
    """
    results = [result for result in shards.values() if result is not None]
    done = len(results)
    tolerance.check(bad_of(results))
    if done == len(shards):
        return results
    if done:
        print(f"going on: {done} of {format_count(len(shards), 'shard')} done before")
    left = images - sum(r.images + len(r.bad) for r in results)
    bad_before = len(tolerance.named) + sum(len(r.bad) for r in results)
    with tqdm(desc="starting workers", total=left, unit=" images", unit_scale=True, smoothing=0.05) as bar:

        def progress(counts: Counts) -> bool:
            if counts.photos:
                bar.set_description_str("writing shards", refresh=False)
            bar.set_postfix_str(f"{format_bytes(counts.source_bytes)} read, {counts.bad} set aside", refresh=False)
            bar.update(counts.photos - bar.n)
            return counts.bad + bad_before <= tolerance.limit

        try:
            results += machinery.run_tasks(job, tasks, min(machinery.workers, len(shards) - done), progress)
            bar.update(left - bar.n)
        except Stopped as stopped:
            tolerance.check([*stopped.bad, *bad_of(results)])
            raise AssertionError("stopped without a reason") from stopped
        except KeyboardInterrupt:
            bar.close()
            made = format_count(sum(r.images for r in results), "image")
            print(
                f"stopped: {len(results)} of {format_count(len(shards), 'shard')} ({made}) "
                f"are done in {job.place}; the same command goes on from there"
            )
            raise
    tolerance.check(bad_of(results))
    return results


def bad_of(results: Iterable[ShardResult]) -> list[Bad]:
    """The photos that shards set aside."""
    return [bad for result in results for bad in result.bad]
