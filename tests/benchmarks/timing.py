"""Works timed in turn, and the memory that one of them holds."""

import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler is used for its memory events only

import numpy as np
import torch

LONGEST_ROUNDS_SECONDS = 25.0


def in_turn(works: dict[str, Callable[[], object]], rounds: int, clear: Callable[[], None]) -> dict[str, float]:
    """Median milliseconds of each work over at most `rounds` rounds."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    end = time.perf_counter() + LONGEST_ROUNDS_SECONDS
    for _ in range(rounds):
        for name, work in works.items():
            clear()
            start = time.perf_counter()
            work()
            taken[name].append(1e3 * (time.perf_counter() - start))
        if time.perf_counter() > end:
            break
    return {name: statistics.median(values) for name, values in taken.items()}


def peak_of_live_bytes(work: Callable[[], object], clear: Callable[[], None]) -> int:
    """The most bytes that tensors made by `work` held at one time, from the allocator's own events."""
    work()
    clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(np.cumsum([event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]).max())
