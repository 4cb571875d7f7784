"""How many workers there may be, and what every worker process of a pool begins with."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def cores_of_process() -> int:
    """The processors that this process may use, shared among this host's processes of a launch; at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def follow_parent(parent: int) -> None:
    """Leave Ctrl-C to the process `parent`, which started this one, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
