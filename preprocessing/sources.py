"""Folders that photos are read from, and the names that samples have in the tables.

A sample's `source` is the photo's path below the root of the data set's first source; `//K/path` is a photo of source
K, which `--add` brought. Of a panorama, `path#90` is the crop that looks 90 degrees to the right of its middle.
"""

import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from preprocessing.photos import Bad, Listing, list_photos, reasons_of
from preprocessing.remote import list_remote, read_remote
from preprocessing.resize import MAX_FILE_BYTES, BadPhoto
from shards.console import JobError, describe_os_error, printable
from shards.names import PHOTO_EXTENSIONS
from shards.photo_list import BACKSLASHES, is_list, read_list
from shards.store import is_url

_BAD_SECTOR_ERRORS = (errno.EACCES, errno.EIO, errno.ELOOP, errno.EPERM, errno.ENAMETOOLONG, errno.EUCLEAN)
_OF_LATER_SOURCE = re.compile(r"//(\d+)/(.*)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """Photos to take: `place` is a folder (a path, or a URL that fsspec knows), or a CSV or Parquet file whose paths
    are relative to `root`. `crops`: into how many each panorama is cut; 0 where photos are taken whole."""

    place: str
    root: str
    crops: int = 0

    @staticmethod
    def of(place: Path | str, root: Path | str | None = None, crops: int = 0) -> "Source":
        """The source at `place`; paths in a list are relative to the list's folder where `root` is None."""
        place = str(place)
        if not is_list(place):
            root = place
        elif root is None:
            root = Path(place).parent
        return Source(place, str(root), crops)

    def resolved(self) -> "Source":
        """The same source by absolute paths."""
        place, root = (p if is_url(p) else str(Path(p).resolve()) for p in (self.place, self.root))
        return Source(place, root, self.crops)

    @property
    def is_list(self) -> bool:
        """Whether the photos are named by a CSV or Parquet file."""
        return is_list(self.place)

    def check(self, out: Path) -> None:
        """Raise `JobError` where the source or its root is not there, or it holds the folder `out` of the data set."""
        if is_url(self.place):
            return
        place = Path(self.place)
        if not place.exists():
            raise JobError(f"{place}: no such {'list' if self.is_list else 'folder of photos'}")
        if self.is_list and not is_url(self.root) and not Path(self.root).is_dir():
            raise JobError(f"--root {self.root}: no such folder")
        if not self.is_list and out.resolve().is_relative_to(place.resolve()):
            raise JobError(f"{out}: lies inside the source {place}; choose another folder")

    def query_sets(self) -> list[str]:
        """Folders of queries that lie beside train/ in the source, as in the folder around the sets of SF-XL."""
        place = Path(self.place)
        sets = [name for name in ("val", "test") if (place / name).is_dir()]
        return [f"{name}/" for name in sets] if (place / "train").is_dir() else []

    def photos(
        self, cache: Path | None, zone: int, *, as_recorded: bool = False, southern: bool | None = None
    ) -> Listing:
        """List the photos under a progress bar; see `list_photos`, `list_remote` and `read_list`. Raises `JobError`
        where there are none."""
        with tqdm(desc="listing photos", unit=" photos", unit_scale=True) as bar:

            def progress(found: int) -> None:
                bar.update(found - bar.n)

            if is_url(self.place):
                listing = list_remote(self.place, cache, progress)
            elif self.is_list:
                listing = list_named(Path(self.place), self.root, zone, southern)
                progress(len(listing))
            else:
                listing = list_photos(Path(self.place), cache, progress, as_recorded=as_recorded)
        if not len(listing):
            raise JobError(f"{self.place}: no photos found ({', '.join(PHOTO_EXTENSIONS)} in all folders below)")
        return listing

    def read(self, photo: str) -> bytes:
        """The bytes of a photo below the root; raises `BadPhoto`, or `JobError` where the whole source has vanished."""
        try:
            if is_url(self.root):
                return read_remote(self.root, photo)
            path = os.path.join(self.root, photo)  # pathlib's paths cost 4 % of a photo's time
            return read_photo(path, self.root if self.is_list else os.path.dirname(path))
        except BadPhoto as bad:
            if bad.reason == "missing" and "\\" in photo and self.is_list:
                raise BadPhoto(f"missing: {BACKSLASHES}") from None
            raise


def list_named(file: Path, root: Path | str, zone: int, southern: bool | None = None) -> Listing:
    """The photos in a CSV or Parquet list (see `read_list`); their paths are relative to `root` (a folder or URL), or
    absolute.

    Rows without usable values are set aside with the reason. Raises `JobError` where the list cannot be read, or names
    no photo with its place.
    """
    listed = read_list(file, zone, southern=southern)
    paths, places = listed.paths, listed.places
    bad = [
        Bad(printable(paths[row].as_py()) or f"row {listed.numbers[row]}", reason, listed.values(row, reason))
        for reason, rows in listed.unusable.items()
        for row in np.flatnonzero(rows).tolist()
    ]
    good = np.isfinite(places.east)
    if not good.any():
        seen = f" ({describe_bad(bad)})" if bad else ""
        raise JobError(f"{file}: none of its {len(paths)} rows names a photo and its place{seen}")
    if not good.all():
        assert places.timestamp is not None
        rows = pa.array(np.flatnonzero(good))
        paths, places.timestamp = paths.take(rows), places.timestamp.take(rows)
        for name in ("east", "north", "zones", "southern", "heading"):
            setattr(places, name, getattr(places, name)[good])
    return Listing(root, paths, bad, places=places)


def prefix(number: int) -> str:
    """What the names of samples of source `number` begin with."""
    return f"//{number}/" if number else ""


def split_sample(sample: str) -> tuple[int, str]:
    """The number of a sample's source, and the rest of its name."""
    match = _OF_LATER_SOURCE.fullmatch(sample) if sample.startswith("//") else None
    return (int(match[1]), match[2]) if match else (0, sample)


def commonest(bad: Sequence[Bad]) -> Bad:
    """Of photos that were set aside (one at least), the first of the commonest reason."""
    reason = Counter(b.reason for b in bad).most_common(1)[0][0]
    return next(b for b in bad if b.reason == reason)


def describe_bad(bad: Sequence[Bad]) -> str:
    """Why photos (one at least) were set aside, and what was seen of the first of the commonest reason, named by its
    path in its source."""
    first = commonest(bad)
    path = split_sample(first.source)[1]
    return f"{reasons_of(bad)}; e.g. {printable(f'{path}: {first.detail}' if first.detail else path)}"


def turns(crops: int) -> list[str]:
    """By how many degrees each crop of a panorama is turned from its middle, as written in samples' names."""
    return [f"{360 * i / crops:g}" for i in range(crops)]


def read_photo(path: str, folder: str) -> bytes:
    """A photo's bytes; raises `BadPhoto`, or `JobError` where the whole source has vanished: where the photo is not
    there and neither is anything else in `folder`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BadPhoto("not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise BadPhoto("too large", f"a file of {status.st_size} bytes")
            data = os.read(descriptor, status.st_size)
            while len(data) < status.st_size and (rest := os.read(descriptor, status.st_size - len(data))):
                data += rest  # a network file system may give less at a time
            return data
        finally:
            os.close(descriptor)
    except ValueError:  # a NUL character in a list's path
        raise BadPhoto("unreadable", "no possible name of a file") from None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and _holds_files(folder):
            raise BadPhoto("missing", "listed, but gone when it was read") from None
        if error.errno in _BAD_SECTOR_ERRORS:
            raise BadPhoto("unreadable", error.strerror or str(error)) from None
        error.filename = error.filename or path
        raise JobError(
            f"the source folder went away ({describe_os_error(error)}); bring it back and run the same command again"
        ) from None


def _holds_files(folder: str) -> bool:
    try:
        with os.scandir(folder or ".") as entries:
            return any(entries)
    except OSError:
        return False
