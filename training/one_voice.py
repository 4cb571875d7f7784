"""One line for an error that stops several processes of a launch."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from shards.console import JobError

_LAUNCHER_SECONDS = 3.0  # in which the launcher ends the others once one process has failed


@contextmanager
def one_voice() -> Iterator[None]:
    """Let the first process that a `JobError` stops tell it; others of the launch exit with 1 without a word.

    They are told apart in the launcher's store; where that cannot be reached, every process tells it.
    """
    try:
        yield
    except JobError as error:
        if not _is_first(str(error)):
            time.sleep(_LAUNCHER_SECONDS)  # the launcher ends all at the first exit, which must not be this one
            raise SystemExit(1) from error
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
