"""Reads photos of a data set at a URL: byte ranges of its tars, many requests at a time."""

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from queue import SimpleQueue

import numpy as np

from shards.console import JobError
from shards.index import GroupIndex
from shards.layout import MANIFEST
from shards.reader import ShardReader
from shards.store import PARALLEL, Store

_EXPECTED_BATCHES = 8  # more than a loader has under way


class RangeReader(ShardReader):
    """A `ShardReader` of tars in a store. A request takes tens of milliseconds, so the photos of coming batches are
    asked for ahead, by threads of its own.

    Raises `JobError` where the store does not serve parts of files. After `close`, reading raises `CancelledError`,
    also what waits for a server at that time.
    """

    parallel = PARALLEL

    def __init__(self, index: dict[int, GroupIndex], store: Store) -> None:
        super().__init__(index)
        self._store = store
        self._check_length(store.read_range(MANIFEST, 0, 1), 1)  # before a whole tar comes for every photo
        self._requests = _Requests(PARALLEL)
        self._expected: tuple[dict[tuple[int, int], Future[bytes]], ...] = ()

    def expect(self, groups: np.ndarray, rows: np.ndarray) -> None:
        """Ask for the photos of a batch."""
        keys = set(zip(groups.tolist(), rows.tolist(), strict=True))
        batch = {(group, row): self._ask(group, row, row + 1) for group, row in keys}
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
        """Drop what was asked for, without waiting for answers."""
        self._requests.close()
        self._expected = ()

    def _pread(self, group: int, row: int, end: int) -> bytes:
        return self._ask(group, row, end).result()

    def _ask(self, group: int, row: int, end: int) -> Future[bytes]:
        path, begin, length = self._span(group, row, end)
        name = f"{path.parent.name}/{path.name}"
        return self._requests.submit(lambda: self._check_length(self._store.read_range(name, begin, length), length))

    def _check_length(self, data: bytes, most: int) -> bytes:
        if len(data) > most:
            raise JobError(
                f"{self._store.url}: the server sends more than the bytes that are asked for; it must serve ranges "
                "(python -m http.server does not)"
            )
        return data


class _Requests:
    """Requests in daemon threads: neither `close` nor the end of the process waits for a server's answer."""

    def __init__(self, threads: int) -> None:
        self._waiting: SimpleQueue[tuple[Future[bytes], Callable[[], bytes]] | None] = SimpleQueue()
        self._open: set[Future[bytes]] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._threads = threads
        for _ in range(threads):
            threading.Thread(target=self._answer, daemon=True, name="range").start()

    def submit(self, request: Callable[[], bytes]) -> Future[bytes]:
        future: Future[bytes] = Future()
        with self._lock:
            if self._closed:
                raise CancelledError
            self._open.add(future)
        self._waiting.put((future, request))
        return future

    def close(self) -> None:
        with self._lock:
            self._closed = True
            left = tuple(self._open)
        for future in left:
            with suppress(InvalidStateError):
                future.set_exception(CancelledError())
        for _ in range(self._threads):
            self._waiting.put(None)

    def _answer(self) -> None:
        while (item := self._waiting.get()) is not None:
            future, request = item
            if not future.done():
                with suppress(InvalidStateError):  # closed meanwhile
                    try:
                        future.set_result(request())
                    except Exception as error:
                        future.set_exception(error)
            with self._lock:
                self._open.discard(future)
