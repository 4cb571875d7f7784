"""The limits of control groups, as kernels with version 1, version 2 and none of them show them."""

import os
from pathlib import Path

import pytest

from shards.limits import cores, memory

GIB = 1 << 30


def write(root: Path, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, errors="surrogateescape")
    return root / "membership", root / "mount"


@pytest.fixture(autouse=True)
def a_large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 64 * GIB // 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    monkeypatch.setattr(os, "sched_getaffinity", lambda of: set(range(16)))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"membership": "0::/\n", "mount/cpu.max": "350000 100000\n", "mount/memory.max": f"{GIB}\n"}, (4, GIB)),
        ({"membership": "0::/\n", "mount/cpu.max": "max 100000\n", "mount/memory.max": "max\n"}, (16, 64 * GIB)),
        (
            {
                "membership": "0::/batch/job 7: a\n",
                "mount/batch/job 7: a/memory.max": f"{8 * GIB}\n",
                "mount/batch/job 7: a/cpu.max": "max 100000\n",
                "mount/batch/memory.max": f"{2 * GIB}\n",
                "mount/batch/cpu.max": "50000 100000\n",
            },
            (1, 2 * GIB),
        ),
        (
            {
                "membership": "9:cpu,cpuacct:/docker/c0ffee\n4:memory:/docker/c0ffee\n0::/\n",
                "mount/cpu/cpu.cfs_quota_us": "200000\n",
                "mount/cpu/cpu.cfs_period_us": "100000\n",
                "mount/memory/memory.limit_in_bytes": f"{3 * GIB}\n",
            },
            (2, 3 * GIB),
        ),
        (
            {
                "membership": "9:cpu:/\n4:memory:/\n",
                "mount/cpu/cpu.cfs_quota_us": "-1\n",
                "mount/cpu/cpu.cfs_period_us": "100000\n",
                "mount/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            (16, 64 * GIB),
        ),
        ({"membership": "0::/\n", "mount/cpu.max": "9000000 100000\n"}, (16, 64 * GIB)),
        ({"membership": "\n0::/caf\udce9\n", "mount/caf\udce9/cpu.max": "100000 100000\n"}, (1, 64 * GIB)),
        ({}, (16, 64 * GIB)),
    ],
    ids=[
        "container",
        "no limit",
        "nested",
        "version 1",
        "version 1, no limit",
        "more than there are",
        "odd names",
        "no groups",
    ],
)
def test_the_tightest_limit_counts(tmp_path: Path, files: dict[str, str], expected: tuple[int, int]) -> None:
    places = write(tmp_path, files)
    assert (cores(*places), memory(*places)) == expected
