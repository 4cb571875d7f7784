"""Files that appear whole or not at all (law 2 of the design): write beside, flush, rename."""

import ctypes
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shards.console import is_systems

TEMPORARY_SUFFIX = ".partial"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # renameat2(2)


@contextmanager
def named(path: Path | str, partial: Path | None = None) -> Iterator[None]:
    """Give an error of the operating system that names no file the name of `path`: those of reading and writing an open
    file name none. One that names `partial`, as which `path` is written, gets it too."""
    try:
        yield
    except OSError as error:
        if is_systems(error) and error.filename is None:
            error.filename = str(path)
        elif partial is not None and isinstance(error.filename, str):
            error.filename = error.filename.replace(str(partial), str(path))
        raise


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it to `path`.

    On an error the temporary file is removed and `path` is left as it was; an `OSError` bears the name of a file.
    """
    path = Path(path)
    partial = for_arrow(_partial(path))
    try:
        with named(path, partial):
            yield partial
            _flush(partial)
            os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):  # where nothing can be written, nothing is there
            partial.unlink()
        if isinstance(error, OSError) and not is_systems(error):  # pyarrow's, where closing a file fails
            raise OSError(errno.EIO, str(error), str(path)) from error
        raise
    _flush(path.parent)


@contextmanager
def atomic_folder(path: Path | str, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success flush every file and rename it to `path`.

    A folder that stands there is an error, or with `replace` gives way once the new one is on disk. On an error the
    temporary folder is removed and `path` is left as it was; an `OSError` bears the name of a file.
    """
    path = Path(path)
    partial = _partial(path)
    try:
        with named(path, partial):
            partial.mkdir(parents=True)
            yield partial
            for file in sorted(partial.rglob("*")):
                _flush(file)
            _flush(partial)
            if replace and path.exists():
                _change_places(partial, path)
            else:
                os.rename(partial, path)
            _flush(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def for_arrow(path: Path) -> Path:
    """A path that Arrow takes for one: it takes a relative one with a colon for a URL where nothing is there yet."""
    return path.absolute() if ":" in str(path) else path


def read_table(
    path: Path | str, columns: list[str] | None = None, filters: list[tuple[str, str, Any]] | None = None
) -> pa.Table:
    """A Parquet file's table, or some columns and rows of it; an `OSError` bears its name, also one of reading."""
    with named(path):
        return pq.read_table(for_arrow(Path(path)), columns=columns, filters=filters)


def read_bytes(path: Path) -> bytes:
    """The bytes of a file; an `OSError` bears its name, also one of reading."""
    with named(path):
        return path.read_bytes()


def atomic_write_bytes(path: Path | str, data: bytes | memoryview) -> None:
    """Write `data` to `path`, whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_bytes(data)


def atomic_write_text(path: Path | str, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: Path | str, value: Any) -> None:
    """Write `value` as `json_text` to `path`, whole or not at all."""
    atomic_write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """`value` as indented JSON with sorted keys."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def is_partial(name: str) -> bool:
    """Whether a file or folder in a data set is what a killed writer left, by its name or path."""
    return name.rpartition("/")[2].startswith(".") and name.endswith(TEMPORARY_SUFFIX)


def remove_partials(folder: Path | str) -> int:
    """Remove what killed writers left under `folder`; return how many files and folders that were."""
    leftovers = list(Path(folder).rglob(f".*{TEMPORARY_SUFFIX}"))
    for leftover in leftovers:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    return len(leftovers)


def _partial(path: Path) -> Path:
    """A name beside `path` that no other process uses, on this host or another."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")


def _change_places(one: Path, other: Path) -> None:
    """Let two folders take each other's names: at once where the file system can, else by way of a third name."""
    if ctypes.CDLL(None).renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        aside = _partial(other)
        os.rename(other, aside)
        os.rename(one, other)
        os.rename(aside, one)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with named(path):
            os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some file systems, as vboxsf, do not flush folders
            raise
    finally:
        os.close(descriptor)
