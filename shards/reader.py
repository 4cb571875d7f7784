"""Reads photos at their byte offsets in the tar shards."""

import os
import threading
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np

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
        if len(data) != index.size[row]:
            raise OSError(f"{self.place(group, row)}: the shard ends within the photo")
        if zlib.crc32(data) != index.crc32[row]:
            raise OSError(f"{self.place(group, row)}: the photo fails its checksum")
        return data

    def _pread(self, group: int, row: int, end: int) -> bytes:
        index = self._index[group]
        begin = int(index.offset[row])
        length = int(index.offset[end - 1]) + int(index.size[end - 1]) - begin
        return os.pread(self._open(index.shards[index.shard[row]]).descriptor, length, begin)

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
