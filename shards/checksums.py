"""The data set's checksums: what no other file vouches for, in the form that `sha256sum --check` reads.

A photo's checksum is in its sample table, and the rest of a tar follows from the table; the flat index follows from
the tables too. `checksums.txt` covers the files that all of this rests on: tables, DALI indexes, plan and manifest.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from shards.console import JobError
from shards.files import atomic_write_text, named, read_bytes
from shards.layout import CHECKSUMS, INDEX, MANIFEST, PROVENANCE

if TYPE_CHECKING:
    from shards.dataset import Manifest

_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")
_OWN = "# sha256 of the lines above: "


class DamagedChecksums(ValueError):
    """`checksums.txt` is not what was written."""


def seal(dataset: Path, manifest: "Manifest | None" = None) -> None:
    """Write `checksums.txt`; with `manifest`, of the data set whose `dataset.json` is about to be saved as that.

    Files older than the last seal keep their recorded checksums, so that sealing again neither reads a large data set
    nor accepts what rotted since; where the clock was set back, every file is read. Raises `OSError`.
    """
    try:
        before = read_checksums(dataset) or {}
        sealed_at = (dataset / CHECKSUMS).stat().st_mtime_ns
    except (DamagedChecksums, FileNotFoundError):
        before, sealed_at = {}, 0
    with named(dataset), tempfile.TemporaryFile(dir=dataset) as now:
        if os.fstat(now.fileno()).st_mtime_ns < sealed_at:
            before = {}
    sums = {}
    for name in sorted(files_below(dataset)):
        path = dataset / name
        if not is_sealed(name) or not path.is_file():
            continue
        known = before.get(name)
        sums[name] = known if known and path.stat().st_mtime_ns < sealed_at else checksum(path)
    if manifest is not None:
        sums[MANIFEST] = hashlib.sha256(manifest.text().encode()).hexdigest()
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    atomic_write_text(dataset / CHECKSUMS, f"{text}{_OWN}{hashlib.sha256(text.encode()).hexdigest()}\n")


def read_checksums(dataset: Path) -> dict[str, str] | None:
    """The checksum of every sealed file by its path in the data set, or None where the data set was never sealed.

    Raises `DamagedChecksums`, `OSError`.
    """
    try:
        data = read_bytes(dataset / CHECKSUMS)
    except FileNotFoundError:
        return None
    return parse_checksums(data)


def sealed_checksums(dataset: Path) -> dict[str, str]:
    """As `read_checksums`, but none of a data set that was never sealed; raises `JobError` where they are damaged."""
    try:
        return read_checksums(dataset) or {}
    except DamagedChecksums as error:
        raise JobError(f"{dataset / CHECKSUMS}: damaged ({error}); run shards/verify.py --repair") from None


def parse_checksums(data: bytes) -> dict[str, str]:
    """What the bytes of a `checksums.txt` say; raises `DamagedChecksums`."""
    body, own, digest = data.rpartition(_OWN.encode())
    if not own or digest != hashlib.sha256(body).hexdigest().encode() + b"\n":
        raise DamagedChecksums("its own checksum does not match")
    matches = [_LINE.fullmatch(line) for line in body.decode().splitlines()]
    return {match[2]: match[1] for match in matches if match}


def is_sealed(name: str) -> bool:
    """Whether a file (path in the data set) belongs in the checksums.

    Left out: tars and the flat index (tables vouch for them), the record of the command, hidden files.
    """
    parts = name.split("/")
    return not (
        name.endswith(".tar")
        or parts[0] == INDEX
        or name in (CHECKSUMS, PROVENANCE)
        or any(part.startswith(".") or not part.isprintable() for part in parts)
    )


def checksum(path: Path) -> str:
    """SHA-256 of a file's bytes in hexadecimal."""
    with named(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(dataset: Path) -> Iterator[str]:
    """Everything in a data set's folder and one level below, as relative paths; folders deeper down by their name."""
    for entry in os.scandir(dataset):
        if entry.is_dir():
            yield from (f"{entry.name}/{inner.name}" for inner in os.scandir(entry))
        else:
            yield entry.name
