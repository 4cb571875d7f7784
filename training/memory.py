"""What a process does about memory: keep the host's, and say what needs less of a GPU's."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shards.console import JobError

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next request, instead of giving it back and having it zeroed anew.

    Activations are freed and wanted again in every step or batch; without this, page faults take up to half of the time
    of describing photos on a CPU. The process then stays as large as it ever was. Other C libraries are left alone.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
        libc.mallopt(_MMAP_MAX, 0)


@contextmanager
def full_memory_told() -> Iterator[None]:
    """Within this block a GPU's memory that does not suffice is a JobError with the ways out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = ". ".join(str(error).split(". ")[:2])
        raise JobError(
            f"{what}; less is needed with --accumulate 4 (the same step in parts), --precision bf16, --offload-heads, "
            "or --shard-head on several GPUs"
        ) from error
