"""What a person sees of several processes of a launch: an error that stops them all in one line, and exit codes."""

from __future__ import annotations

import atexit
import os
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import tyro

from shards.console import JobError, exit_code

T = TypeVar("T")

_LAUNCHER_SECONDS = 3.0  # in which the launcher ends the others once one process has failed


@contextmanager
def one_voice() -> Iterator[None]:
    """Only the first process of a launch that fails with a `JobError` prints it; the others exit silently.

    The launcher's store says which is the first; where it cannot be reached, every process prints its own.
    """
    try:
        yield
    except JobError as error:
        if not _is_first(str(error)):
            time.sleep(_LAUNCHER_SECONDS)  # the launcher ends all at the first exit, which must not be this one
            raise SystemExit(exit_code(error)) from error
        raise


@contextmanager
def ended_at_once() -> Iterator[None]:
    """End the process with the exit code that comes here, without taking the interpreter down.

    Threads of gloo may still hold tensors of the last collective, and abort the process where they give them up while
    the interpreter ends (pytorch issues 38228, 179291, 190489); the process group, which would join them, lives as long
    as the process once DDP has had it.
    """
    try:
        yield
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            if stream:  # None where it was closed from the start
                stream.flush()
        os._exit(end.code)


def parse_arguments(kind: type[T], words: Sequence[str] | None = None, **options: Any) -> T:
    """The command line as a `kind`, by `tyro.cli`; help and wrong arguments are told by the first process alone."""
    first = os.environ.get("RANK", "0") == "0"
    try:
        return tyro.cli(kind, args=words, console_outputs=first, **options)
    except SystemExit:
        if not first:
            time.sleep(_LAUNCHER_SECONDS)  # as above
        raise


def _is_first(message: str) -> bool:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    import torch.distributed as dist  # seconds, which only processes of a launch have spent already

    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return bool(store.add(f"said/{attempt}/{zlib.crc32(message.encode())}", 1) == 1)
    except RuntimeError:  # torch's errors of its stores
        return True
