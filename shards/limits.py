"""What a container or batch system lets this process have of the machine: limits of control groups (cgroups(7))."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

_MEMBERSHIP = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


def cores(membership: Path = _MEMBERSHIP, mount: Path = _MOUNT) -> int:
    """The processors that this process may use, at least 1: those it may run on, or fewer where its time is limited."""
    shares = [float(len(os.sched_getaffinity(0)))]
    for group in _groups("cpu", membership, mount):
        limit = _words(group / "cpu.max") or _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
        if len(limit) == 2 and limit[0] not in ("max", "-1"):
            shares.append(int(limit[0]) / int(limit[1]))
    return max(1, math.ceil(min(shares)))


def memory(membership: Path = _MEMBERSHIP, mount: Path = _MOUNT) -> int:
    """The bytes of memory that this process may use: the machine's, or fewer."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for group in _groups("memory", membership, mount):
        limit = _words(group / "memory.max") or _words(group / "memory.limit_in_bytes")
        sizes += [int(word) for word in limit if word != "max"]
    return min(sizes)


def _groups(controller: str, membership: Path, mount: Path) -> Iterator[Path]:
    """The folders of this process's groups of a controller and of those around them.

    Some may not be there: in a container its own group may be the root, and the membership its place on the host.
    """
    try:
        lines = membership.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in filter(None, lines):
        _, controllers, place = line.split(":", 2)
        root = mount / controller if controllers else mount
        if not controllers or controller in controllers.split(","):
            group = Path(place.strip("/"))
            yield from (root / part for part in (group, *group.parents))


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
