"""How this process gives memory back, which on a CPU costs as much as some of the arithmetic."""

import ctypes

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
