"""What made a file: versions, command and commit, kept with every data set, run and report."""

import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = (
    "divide-and-classify", "torch", "torchvision", "accelerate", "numpy", "pyarrow", "simplejpeg",
    "opencv-python-headless", "Pillow", "webdataset", "utm", "safetensors",
    "nvidia-dali-cuda130", "nvidia-dali-cuda120",
)  # fmt: skip


def provenance() -> dict[str, Any]:
    """Versions of Python and of the packages that matter, the command line, the git commit, the UTC time."""
    return {
        "command": f"{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}",
        "commit": _commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit with `+` where files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
