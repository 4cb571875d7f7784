"""Reads photos at their byte offsets in the tar shards."""

import os
import threading
import zlib
from collections import OrderedDict
from pathlib import Path

from shards.index import GroupIndex

_OPEN_FILES = 512


class ShardReader:
    """Reads JPEGs by `pread`, from any number of threads, with a bounded number of open files."""

    def __init__(self, index: dict[int, GroupIndex]) -> None:
        self._index = index
        self._files: OrderedDict[Path, _File] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, group: int, row: int) -> bytes:
        """The JPEG in `row` of a group's index; raises `OSError` where it cannot be read or fails its checksum."""
        index = self._index[group]
        path = index.shards[index.shard[row]]
        size = int(index.size[row])
        data = os.pread(self._open(path).descriptor, size, int(index.offset[row]))
        if len(data) != size:
            raise OSError(f"{path}: ends before byte {int(index.offset[row]) + size}")
        if zlib.crc32(data) != index.crc32[row]:
            raise OSError(f"{path}: the photo at byte {int(index.offset[row])} fails its checksum")
        return data

    def place(self, group: int, row: int) -> str:
        """Where a photo lies, for messages: shard and byte offset."""
        index = self._index[group]
        return f"{index.shards[index.shard[row]]} at byte {int(index.offset[row])}"

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            self._files.clear()

    def _open(self, path: Path) -> "_File":
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = _File(path)
                if len(self._files) > _OPEN_FILES:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(path)
            return file


class _File:
    """An open file that closes with its last user, so that a file leaving the cache is not closed under a read."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
