"""Runs shard tasks on a Ray cluster whose nodes share the folders of photos and of the data set.

The tasks are those of `preprocessing.engine`, and so are the bytes. Ray runs a task again elsewhere when its node dies.
"""

import importlib
from collections.abc import Callable, Generator, Iterator
from typing import Any

import cv2

from preprocessing.engine import Counts, Job
from preprocessing.plan import ShardTask
from preprocessing.shard_task import ShardResult, Stopped
from shards.console import JobError
from shards.files import remove_partials

_SECONDS_TO_STOP = 5
_ATTEMPTS_AFTER_LOSS = 10


def run_tasks(
    job: Job, tasks: Iterator[ShardTask], workers: int, progress: Callable[[Counts], bool]
) -> Iterator[ShardResult]:
    """Yield the results of `tasks` as they finish; `workers` is what the cluster has.

    `progress` is called after every shard and returns whether to go on. Where it does not, and on Ctrl-C, the shards
    in work are dropped. Raises `Stopped` or `JobError` as `preprocessing.engine.run_tasks` does.
    """
    ray = _start()
    results = _results(ray, job, tasks)
    photos = bad = source_bytes = 0
    try:
        for result in results:
            photos, bad = photos + result.images + len(result.bad), bad + len(result.bad)
            source_bytes += result.source_bytes
            yield result
            if not progress(Counts(photos, bad, source_bytes)):
                raise Stopped([])
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, JobError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        what = " ".join(str(error).split())[:300]
        raise JobError(f"Ray gave up a shard ({what}); the same command goes on where it was") from None
    finally:
        results.close()
        remove_partials(job.out)


def _results(ray: Any, job: Job, tasks: Iterator[ShardTask]) -> Generator[ShardResult, None, None]:
    write = ray.remote(max_retries=_ATTEMPTS_AFTER_LOSS, num_cpus=1)(_write)
    shared = ray.put(job)
    running: set[Any] = set()
    try:
        for task in tasks:
            running.add(write.remote(shared, task))
            while len(running) >= 2 * max(int(ray.cluster_resources().get("CPU", 1)), 1):
                done, _ = ray.wait(list(running))
                running -= set(done)
                yield from ray.get(done)
        while running:
            done, _ = ray.wait(list(running))
            running -= set(done)
            yield from ray.get(done)
    finally:
        for reference in running:
            ray.cancel(reference)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=_SECONDS_TO_STOP)


def _write(job: Job, task: ShardTask) -> ShardResult:
    cv2.setNumThreads(1)
    return job.run(task, lambda *_: True)


def _start() -> Any:
    """The ray module, connected to a cluster."""
    try:
        ray = importlib.import_module("ray")
    except ModuleNotFoundError:
        raise JobError("--engine ray needs the package ray: pip install 'divide-and-classify[ray]'") from None
    if not ray.is_initialized():
        try:
            ray.init(log_to_driver=False, configure_logging=False)
        except ConnectionError as error:
            raise JobError(f"no Ray cluster at RAY_ADDRESS ({' '.join(str(error).split())})") from None
    return ray
