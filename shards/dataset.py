"""A finished data set on disk: its manifest and class table."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from shards.classes import ClassTable
from shards.console import JobError
from shards.files import atomic_write_text, json_text, read_bytes
from shards.index import GroupIndex
from shards.layout import CLASSES, FORMAT_VERSION, MANIFEST
from shards.mirror import mirror, named_by_url
from shards.range_reader import RangeReader
from shards.reader import ShardReader, checked
from shards.store import Store, is_url


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

    def text(self) -> str:
        """The manifest as it is written."""
        return json_text(asdict(self))

    def save(self, path: Path) -> None:
        """Write the manifest, whole or not at all."""
        atomic_write_text(path, self.text())

    @staticmethod
    def load(path: Path) -> "Manifest":
        """Read a manifest; raises `JobError` where it is missing, damaged or of another format version."""
        try:
            values: dict[str, Any] = json.loads(read_bytes(path))
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
        for field in fields(Manifest):
            value = values[field.name]
            if type(value) is not field.type or (field.name == "image_size" and value <= 0):
                raise JobError(f"{path}: the field {field.name!r} is {value!r}; run shards/verify.py --repair")
        return Manifest(**{f.name: values[f.name] for f in fields(Manifest)})


GPU_CODEC = "gpu: "
"""What the name of a codec (`Manifest.codec`, and in the plan) begins with where it ran on a GPU."""


@dataclass(frozen=True)
class Dataset:
    """A finished data set: its folder, its manifest and its classes.

    Of one at a URL, `store` is where it lies and `path` a local copy of all that is needed but the tars.
    """

    path: Path
    manifest: Manifest
    classes: ClassTable
    store: Store | None = None

    @staticmethod
    def open(path: Path | str) -> "Dataset":
        """Open a data set in a folder or at a URL; raises `JobError` where there is none or it is not finished."""
        if is_url(path):
            store = Store.at(str(path))
            folder = mirror(store)
            with named_by_url(store, folder):
                return Dataset(folder, Manifest.load(folder / MANIFEST), ClassTable.load(folder / CLASSES), store)
        path = Path(path)
        check_folder(path)
        return Dataset(path, Manifest.load(path / MANIFEST), ClassTable.load(path / CLASSES))

    @property
    def place(self) -> str:
        """The folder or the URL, for messages."""
        return self.store.url if self.store else str(self.path)

    def jpeg(self, tar: Path, offset: int, size: int, crc32: int) -> bytes:
        """The bytes of a photo in a shard (`tar`: its path below `path`), by what the shard's sample table says.

        Raises `OSError` where it cannot be read or fails its checksum, `JobError` where the store of the data set is
        out of reach.
        """
        if self.store:
            return checked(self.store.read_range(tar.relative_to(self.path).as_posix(), offset, size), size, crc32)
        with tar.open("rb") as file:
            file.seek(offset)
            return checked(file.read(size), size, crc32)

    def reader(self, index: dict[int, GroupIndex]) -> ShardReader:
        """What reads the photos of an index of this data set."""
        return RangeReader(index, self.store) if self.store else ShardReader(index)


def check_folder(path: Path) -> None:
    """Raise `JobError` where a data set's folder is a file, or is not there."""
    if not path.is_dir():
        raise JobError(f"{path}: {'is a file; name the folder of a data set' if path.exists() else 'no such folder'}")


def refuse_data_set(out: Path) -> None:
    """Raise `JobError` where `out`, a folder that may not be there yet, holds a data set or lies in one, in which
    `verify.py` would call whatever is written there a problem."""
    for folder in (place := out.resolve(), *place.parents):
        if (folder / MANIFEST).exists() and (folder / CLASSES).exists():
            raise JobError(f"--out {out}: {'holds' if folder == place else 'lies in'} a data set; name another place")
