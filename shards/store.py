"""A data set's folder at a URL (s3://, gs://, http://, file:// ...), read and written through fsspec."""

import os
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from shards.console import JobError
from shards.files import TEMPORARY_SUFFIX
from shards.layout import MANIFEST

PARALLEL = 16
"""Requests worth having under way at a time: enough to hide 20 ms each behind the decoding of one core."""

_WHOLE_OR_NOTHING = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "memory"}  # what a put is there
_PAUSES = (0.2, 1.0, 3.0)  # seconds before asking again
_FORBIDDEN = (401, 403)
_LATER = (408, 425, 429)  # the only statuses of HTTP from 400 to 499 that another time may not have
_FIRST_ANSWER = 45.0  # seconds that a store has for its first answer in this process
_SILENCE = 30.0  # seconds without a byte after which a request over HTTP has failed

answered: set[str] = set()
"""URLs of stores that have answered this process, or the one that started it."""

T = TypeVar("T")


def is_url(place: str | Path) -> bool:
    """Whether a place is a URL, not a path."""
    return "://" in str(place)


@dataclass(frozen=True)
class Store:
    """Files below `url`, by their names relative to it. Safe to use from any number of threads; can be pickled."""

    url: str

    @staticmethod
    def at(url: str) -> "Store":
        """The store at a URL; raises `JobError` where no installed file system knows such URLs."""
        store = Store(url.rstrip("/"))
        _ = store._opened
        return store

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}

    def ask(self, request: Callable[[], T]) -> T:
        """The result of a request for which a moment's fault of the network is waited out; of one to a store that has
        not answered anything yet, not for longer than `_FIRST_ANSWER` seconds (then a `TimeoutError`)."""
        if self.url in answered:
            return _patiently(request)
        try:
            result = _in_time(lambda: _patiently(request), _FIRST_ANSWER)
        except Exception as error:  # each file system has errors of its own
            if _is_final(error):
                answered.add(self.url)
            raise
        answered.add(self.url)
        return result

    def read(self, name: str) -> bytes:
        """A file's bytes; raises `FileNotFoundError`, and `JobError` where it cannot be read."""
        return self._asked(lambda: self.files.cat_file(self._path(name)))

    def _asked(self, request: Callable[[], T]) -> T:
        """As `ask`; raises `FileNotFoundError`, and `JobError` for any other error."""
        try:
            return self.ask(request)
        except FileNotFoundError:
            raise
        except Exception as error:  # each file system has errors of its own
            raise self.lost(error) from None

    def read_range(self, name: str, begin: int, length: int, witness: str | None = MANIFEST) -> bytes:
        """Bytes of a file, fewer at its end. Raises `OSError` where it cannot be read (`FileNotFoundError` where it is
        gone, `PermissionError` where the store forbids it), and `JobError` where all of the store is out of reach:
        where `witness`, a file that was there, cannot be read either."""
        try:
            return self.ask(lambda: self.files.cat_file(self._path(name), start=begin, end=begin + length))
        except Exception as error:  # each file system has errors of its own
            if _begins_after_the_end(error):
                return b""
            if not self._is_there(witness, error):
                raise self.lost(error) from None
            if isinstance(error, PermissionError) or getattr(error, "status", None) in _FORBIDDEN:
                raise PermissionError(_one_line(error)) from None
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
            raise kind(_one_line(error)) from None

    def _is_there(self, witness: str | None, error: Exception) -> bool:
        """Whether the store can be read although a file gave `error`; without a witness a definite answer tells."""
        if self.url not in answered:
            return False
        if witness is None:
            return _is_final(error) and (self._protocol in ("http", "https") or self.files.exists(self.root))
        try:
            self.read(witness)
        except FileNotFoundError:
            return False
        return True

    def fetch(self, name: str, path: Path) -> None:
        """Copy a file to `path`; raises as `read` does."""
        self._asked(lambda: self.files.get_file(self._path(name), str(path)))

    def names(self) -> set[str]:
        """Every file below the URL, as they are now; raises `JobError` where listing them fails."""
        return set(self._listed())

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below the URL, by name, as they are now; raises `JobError` where listing them fails."""
        listed = self._listed()
        sizes = {name: size for name, size in listed.items() if size is not None}
        unknown = [name for name in listed if name not in sizes]
        with ThreadPoolExecutor(PARALLEL) as pool:
            sizes.update(zip(unknown, pool.map(self._size, unknown), strict=True))
        return sizes

    def _listed(self) -> dict[str, int | None]:
        """Every file below the URL with its bytes, which a listing over HTTP leaves out."""
        self.files.invalidate_cache()
        try:
            found = self._asked(lambda: self.files.find(self.root, detail=True))
        except FileNotFoundError:
            return {}
        files = {path.removeprefix(self.root).lstrip("/"): info for path, info in found.items()}
        return {n: info["size"] for n, info in files.items() if info["type"] == "file" and not _no_file(n)}

    def _size(self, name: str) -> int:
        try:
            size = self.ask(lambda: self.files.info(self._path(name)))["size"]
        except Exception as error:  # each file system has errors of its own
            raise self.lost(error) from None
        if size is None:
            raise JobError(f"{self.url}/{name}: the server does not tell its size; use one that does")
        return size

    def put(self, path: Path, name: str) -> None:
        """Copy a local file to `name`, whole or not at all; raises `JobError` where that fails."""
        target = self._path(name)
        try:
            if self._protocol in _WHOLE_OR_NOTHING:
                self.ask(lambda: self.files.put_file(str(path), target))
                return
            folder, _, last = target.rpartition("/")
            unfinished = f"{folder}/.{last}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
            self.files.makedirs(folder, exist_ok=True)
            self.files.put_file(str(path), unfinished)
            self.files.mv(unfinished, target)
        except Exception as error:  # each file system has errors of its own
            raise JobError(
                f"{self.url}: {name} cannot be written ({_one_line(error)}); mend that and run the same command again"
            ) from None

    def remove(self, names: list[str]) -> None:
        """Delete files in this order; raises `JobError` where that fails."""
        for name in names:
            try:
                with suppress(FileNotFoundError):  # gone already, such as by a request whose answer was lost
                    self.ask(partial(self.files.rm_file, self._path(name)))
            except Exception as error:  # each file system has errors of its own
                raise JobError(
                    f"{self.url}: {name} cannot be deleted ({_one_line(error)}); delete it by hand"
                ) from None

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    @cached_property
    def _opened(self) -> tuple[fsspec.AbstractFileSystem, str]:
        options: dict[str, Any] = {}
        if self._protocol in ("s3", "s3a") and "config_kwargs" not in fsspec.config.conf.get("s3", {}):
            options = {"config_kwargs": {"max_pool_connections": 2 * PARALLEL}}  # 10 by default
        if self._protocol in ("http", "https") and "client_kwargs" not in fsspec.config.conf.get(self._protocol, {}):
            options = {"client_kwargs": _client_options()}
        try:
            return fsspec.core.url_to_fs(self.url, **options)
        except (ImportError, ValueError) as error:
            extra = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}.get(self._protocol)
            hint = f"; pip install 'divide-and-classify[{extra}]'" if extra else ""
            raise JobError(f"{self.url}: {_one_line(error)}{hint}") from None

    @property
    def files(self) -> fsspec.AbstractFileSystem:
        """The file system."""
        return self._opened[0]

    @property
    def root(self) -> str:
        """The store's folder, as the file system names it."""
        return self._opened[1].rstrip("/")

    @property
    def _protocol(self) -> str:
        return self.url.partition("://")[0]

    def lost(self, error: Exception) -> JobError:
        """What an error that concerns all of the store is reported as."""
        return JobError(
            f"{self.url}: cannot be read ({_one_line(error)}); bring it back and run the same command again"
        )


def _no_file(name: str) -> bool:
    """Whether a name in a list is that of the listed folder, or of a link by which a web server sorts the list."""
    return not name or name.rpartition("/")[2].startswith("?")


def _one_line(error: Exception) -> str:
    """An error of any file system in one line."""
    return " ".join(f"{type(error).__name__} {error}".split())[:300]


def _in_time(request: Callable[[], T], seconds: float) -> T:
    """The request's result; raises `TimeoutError` where there is none in time, and leaves the request to itself."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(request())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return outcome.result(seconds)
    except TimeoutError:
        if outcome.done():  # the request's own
            raise
        raise TimeoutError(f"no answer within {seconds:.0f} s") from None


def _patiently(request: Callable[[], T]) -> T:
    """The request's result, asked for again after a pause where a network may have failed for a moment."""
    for pause in _PAUSES:
        try:
            return request()
        except Exception as error:  # each file system has errors of its own
            if _is_final(error):
                raise
            time.sleep(pause)
    return request()


def _is_final(error: Exception) -> bool:
    """Whether asking again changes nothing."""
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError) or _begins_after_the_end(error):
        return True
    status = getattr(error, "status", None)  # of aiohttp's errors
    return isinstance(status, int) and 400 <= status < 500 and status not in _LATER


def _begins_after_the_end(error: Exception) -> bool:
    """Whether a range was asked for of a file that has no byte there, such as an empty one."""
    return getattr(error, "status", None) == 416 or "InvalidRange" in str(error.__cause__)  # HTTP's; that of s3fs


def _client_options() -> dict[str, Any]:
    try:
        from aiohttp import ClientTimeout
    except ImportError:  # fsspec says what is missing
        return {}
    return {"timeout": ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)}
