"""One line for errors of torch that the machine or the options are to blame for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shards.console import JobError, first_line


@contextmanager
def torch_errors_told() -> Iterator[None]:
    """Within this block a GPU's memory that does not suffice and a compilation that fails are JobErrors."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = ". ".join(str(error).split(". ")[:2])
        raise JobError(
            f"{what}; less is needed with --accumulate 4 (the same step in parts), --precision bf16, --offload-heads, "
            "or --shard-head on several GPUs"
        ) from error
    except RuntimeError as error:
        from torch._dynamo.exc import BackendCompilerFailed  # seconds, which a run that compiles has spent already

        if not isinstance(error, BackendCompilerFailed):
            raise
        raise JobError(
            f"--compile: {first_line(error)}; it needs a C++ compiler (g++) and Python's headers, or "
            "--no-compile (TORCH_LOGS=+dynamo tells more)"
        ) from error
