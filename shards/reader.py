"""Reads photos at their byte offsets in the tar shards."""

import os
import resource
import threading
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np

from shards.index import GroupIndex

_OPEN_FILES = 512  # at most, and a quarter of those that the process may have


class ShardReader:
    """Reads JPEGs by `pread`, from any number of threads, with a bounded number of open files.

    `parallel`: how many requests are worth having under way at a time.
    """

    parallel = 4

    def __init__(self, index: dict[int, GroupIndex]) -> None:
        self._index = index
        self._files: OrderedDict[Path, _File] = OrderedDict()
        self._lock = threading.Lock()
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = _OPEN_FILES if allowed == resource.RLIM_INFINITY else min(_OPEN_FILES, max(1, allowed // 4))

    def expect(self, groups: np.ndarray, rows: np.ndarray) -> None:
        """Take a hint which photos (both int [b]) will be read soon; a local disk needs none."""

    def read(self, group: int, row: int) -> bytes:
        """The JPEG in `row` of a group's index; raises `OSError` where it cannot be read or fails its checksum."""
        return self.check(group, row, self._pread(group, row, row + 1))

    def read_run(self, group: int, row: int, count: int) -> list[bytes]:
        """`count` JPEGs from `row` on, which lie in one shard, in one request; not checked. Raises `OSError`."""
        index = self._index[group]
        data = self._pread(group, row, row + count)
        starts = (index.offset[row : row + count] - index.offset[row]).astype(np.int64).tolist()
        return [data[s : s + n] for s, n in zip(starts, index.size[row : row + count].tolist(), strict=True)]

    def check(self, group: int, row: int, data: bytes) -> bytes:
        """`data`, where it is what `row` of a group's index should hold; else raises `OSError`."""
        index = self._index[group]
        try:
            return checked(data, int(index.size[row]), int(index.crc32[row]))
        except OSError:
            self._forget(index.shards[index.shard[row]])
            raise

    def _span(self, group: int, row: int, end: int) -> tuple[Path, int, int]:
        """The tar that holds the rows up to, not including, `end`, and where they lie in it: first byte, and bytes."""
        index = self._index[group]
        begin = int(index.offset[row])
        return index.shards[index.shard[row]], begin, int(index.offset[end - 1]) + int(index.size[end - 1]) - begin

    def _pread(self, group: int, row: int, end: int) -> bytes:
        path, begin, length = self._span(group, row, end)
        file = self._open(path)
        try:
            return os.pread(file.descriptor, length, begin)
        except OSError:
            self._forget(path)
            raise

    def place(self, group: int, row: int) -> str:
        """Where a photo lies, for messages: shard and byte offset."""
        path, begin, _ = self._span(group, row, row + 1)
        return f"{path} at byte {begin}"

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            self._files.clear()

    def _open(self, path: Path) -> "_File":
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = _File(path)
                if len(self._files) > self._most:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(path)
            return file

    def _forget(self, path: Path) -> None:
        """Open a file anew at its next read: a repair may have replaced it by then, and on NFS it may be stale."""
        with self._lock:
            self._files.pop(path, None)


def checked(data: bytes, size: int, crc32: int) -> bytes:
    """`data` of a shard, where it is a photo of that size and checksum; else raises `OSError`."""
    if len(data) == size and zlib.crc32(data) == crc32:
        return data
    raise OSError("the shard ends within the photo" if len(data) < size else "the photo fails its checksum")


class _File:
    """An open file that closes with its last user, so that a file leaving the cache is not closed under a read."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        os.posix_fadvise(
            self.descriptor, 0, 0, os.POSIX_FADV_RANDOM
        )  # no read-ahead: what is read is what was asked for

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
