"""A finished data set on disk: its manifest and class table."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from shards.classes import ClassTable
from shards.console import JobError
from shards.files import atomic_write_json
from shards.layout import CLASSES, FORMAT_VERSION, MANIFEST


@dataclass(frozen=True)
class Manifest:
    """What `dataset.json` says: the settings that made the data set, and counts.

    Lengths in metres (`M`), photos in pixels (`image_size`), JPEG quality 1 to 100.
    """

    format_version: int
    revision: int
    M: int
    N: int
    min_images: int
    image_size: int
    quality: int
    resize_filter: str
    codec: str
    seed: int
    utm_zone: int
    groups: int
    classes: int
    shards: int
    images: int
    skipped: int
    quarantined: int
    bytes: int
    fingerprint: str

    def save(self, path: Path) -> None:
        """Write the manifest, whole or not at all."""
        atomic_write_json(path, asdict(self))

    @staticmethod
    def load(path: Path) -> "Manifest":
        """Read a manifest; raises `JobError` where it is missing, damaged or of another format version."""
        try:
            values: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            raise JobError(
                f"{path}: no finished data set here; make one with preprocessing/build_shards.py "
                "(the same command again finishes an interrupted one)"
            ) from None
        except ValueError as error:
            raise JobError(f"{path}: damaged ({error}); run shards/verify.py --repair") from None
        version = values.get("format_version") if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            raise JobError(f"{path}: format version {version}; this program reads version {FORMAT_VERSION}")
        missing = [f.name for f in fields(Manifest) if f.name not in values]
        if missing:
            raise JobError(f"{path}: the field {missing[0]!r} is missing; rebuild the data set")
        return Manifest(**{f.name: values[f.name] for f in fields(Manifest)})


GPU_CODEC = "gpu: "
"""What the name of a codec (`Manifest.codec`, and in the plan) begins with where it ran on a GPU."""


@dataclass(frozen=True)
class Dataset:
    """A finished data set: where it is, its manifest and its classes."""

    path: Path
    manifest: Manifest
    classes: ClassTable

    @staticmethod
    def open(path: Path | str) -> "Dataset":
        """Open a data set; raises `JobError` where there is none or it is not finished."""
        path = Path(path)
        if not path.is_dir():
            raise JobError(f"{path}: no such folder")
        return Dataset(path, Manifest.load(path / MANIFEST), ClassTable.load(path / CLASSES))
