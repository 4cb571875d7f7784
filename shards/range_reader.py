"""Reads photos of a data set at a URL: byte ranges of its tars, many requests at a time."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from shards.index import GroupIndex
from shards.reader import ShardReader
from shards.store import PARALLEL, Store

_EXPECTED_BATCHES = 8  # more than a loader has under way


class RangeReader(ShardReader):
    """A `ShardReader` of tars in a store. A request takes tens of milliseconds, so the photos of coming batches are
    asked for ahead, by threads of its own."""

    parallel = PARALLEL

    def __init__(self, index: dict[int, GroupIndex], store: Store) -> None:
        super().__init__(index)
        self._store = store
        self._pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="range")
        self._expected: tuple[dict[tuple[int, int], Future[bytes]], ...] = ()

    def expect(self, groups: np.ndarray, rows: np.ndarray) -> None:
        """Ask for the photos of a batch."""
        keys = set(zip(groups.tolist(), rows.tolist(), strict=True))
        batch = {(group, row): self._pool.submit(self._pread, group, row, row + 1) for group, row in keys}
        self._expected = (*self._expected[1 - _EXPECTED_BATCHES :], batch)

    def read(self, group: int, row: int) -> bytes:
        """See `ShardReader.read`; raises `JobError` too, where the whole data set is out of reach."""
        for batch in self._expected:
            if (group, row) in batch:
                return self.check(group, row, batch[group, row].result())
        return super().read(group, row)

    def place(self, group: int, row: int) -> str:
        """Where a photo lies, for messages: URL and byte offset."""
        path, begin, _ = self._span(group, row, row + 1)
        return f"{self._store.url}/{path.parent.name}/{path.name} at byte {begin}"

    def close(self) -> None:
        """Drop what was asked for."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._expected = ()

    def _pread(self, group: int, row: int, end: int) -> bytes:
        path, begin, length = self._span(group, row, end)
        return self._store.read_range(f"{path.parent.name}/{path.name}", begin, length)
