"""The photos of a folder and of all folders below it."""

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from shards.console import JobError, describe_os_error
from shards.names import PHOTO_EXTENSIONS


class _Folder(NamedTuple):
    path: str
    modified: int
    entries: Iterator[os.DirEntry[str]]


def is_photo(name: str) -> bool:
    """Whether a file (any path; only its base name counts) is taken for a photo: by its extension, and not hidden as
    what macOS leaves beside each file on foreign disks, `._photo.jpg`, is."""
    base = name.rpartition("/")[2]
    return base.lower().endswith(PHOTO_EXTENSIONS) and not base.startswith(".")


def walk_photos(root: Path, folders: dict[str, int] | None = None) -> Iterator[tuple[str, str]]:
    """Yield (kind, path relative to `root`) of every file below `root`, folder by folder in sorted order, then of those
    in the folders that links lead to.

    Kinds: `photo`, `other` (no photo by its name, or hidden), and for names of photos also `not a regular file` and
    `name is not UTF-8`. A folder is listed once, however many links lead to it: by its path without links where it lies
    below `root`, or else by the first link that was found. `folders` gets the time stamp of every folder (nanoseconds).
    Raises `JobError` where a folder cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    beginnings = deque([""])
    while beginnings:
        begun = _open(root, beginnings.popleft(), seen)
        way = [begun] if begun else []
        while way:
            entry = next(way[-1].entries, None)
            if entry is None:
                folder = way.pop()
                if folders is not None:
                    folders[folder.path] = folder.modified
                continue
            path = f"{way[-1].path}/{entry.name}" if way[-1].path else entry.name
            try:
                is_folder, is_regular = entry.is_dir(), entry.is_file()
            except OSError:  # a link that leads nowhere
                is_folder, is_regular = False, False
            if not is_folder:
                yield _kind(path, is_regular), path
            elif entry.is_symlink():
                beginnings.append(path)
            elif below := _open(root, path, seen):
                way.append(below)


def _open(root: Path, path: str, seen: set[tuple[int, int]]) -> _Folder | None:
    """A folder that is to be listed; None for one that was `seen` before."""
    here = root / path
    try:
        status = here.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            return None
        seen.add(identity)
        entries = sorted(os.scandir(here), key=lambda e: os.fsencode(e.name))
    except OSError as error:
        raise JobError(f"cannot list the photos: {describe_os_error(error)}") from None
    return _Folder(path, status.st_mtime_ns, iter(entries))


def _kind(path: str, is_regular: bool) -> str:
    if not is_photo(path):
        return "other"
    if not is_regular:
        return "not a regular file"
    try:
        path.encode()
    except UnicodeEncodeError:
        return "name is not UTF-8"
    return "photo"
