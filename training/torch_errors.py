"""One line for errors of torch that the machine or the options are to blame for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shards.console import JobError, first_line, format_bytes


@contextmanager
def torch_errors_told() -> Iterator[None]:
    """Within this block memory that does not suffice, a GPU's or the machine's, and a compilation that fails are
    JobErrors."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(error) from error
    except RuntimeError as error:
        if found := re.search(r"DefaultCPUAllocator: .*?tried to allocate (\d+) bytes", str(error)):
            raise JobError(
                f"not enough memory: {format_bytes(int(found[1]))} more were asked for; less is needed with a smaller "
                "--batch-size, --image-size or --descriptor-dim, or --accumulate 4 (the same step in parts, batch "
                "norms aside)"
            ) from error
        from torch._dynamo.exc import TorchDynamoException  # seconds, which a run that compiles has spent already

        if not isinstance(error, TorchDynamoException):
            raise
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, torch.OutOfMemoryError):
            raise _out_of_memory(inner) from error
        raise JobError(
            f"--compile: {first_line(error)}; it needs a C++ compiler (g++), Python's headers and on a GPU Triton, or "
            "--no-compile (TORCH_LOGS=+dynamo tells more)"
        ) from error


def _out_of_memory(error: torch.OutOfMemoryError) -> JobError:
    what = ". ".join(str(error).split(". ")[:2])
    return JobError(
        f"{what}; less is needed with --accumulate 4 (the same step in parts, batch norms aside), --precision bf16, "
        "--offload-heads, or --shard-head on several GPUs"
    )
