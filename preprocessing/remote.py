"""Photos behind a URL (s3://, gs://, http://, file:// ...), listed and read by fsspec."""

from collections.abc import Callable
from pathlib import Path

import fsspec  # type: ignore[import-untyped]
import pyarrow as pa

from preprocessing.photos import PHOTO_EXTENSIONS, Listing, load_listing, store_listing
from preprocessing.resize import MAX_FILE_BYTES, BadPhoto
from shards.console import JobError


def list_remote(url: str, cache: Path | None, progress: Callable[[int], None]) -> Listing:
    """List the photos below `url`, from `cache` where they were listed before (there are no folder times to compare).

    Raises `JobError` where they cannot be listed.
    """
    if cache is not None and (listing := load_listing(url, cache, as_recorded=True)) is not None:
        progress(len(listing))
        return listing
    files, root = _open(url)
    try:
        found = sorted(files.find(root))
    except Exception as error:  # each file system has errors of its own
        raise _lost(url, error) from None
    below = [name.removeprefix(root).lstrip("/") for name in found]
    photos = [name for name in below if name.lower().endswith(PHOTO_EXTENSIONS)]
    progress(len(photos))
    listing = Listing(url, pa.array(photos, pa.large_string()), [], len(below) - len(photos))
    if cache is not None:
        store_listing(listing, cache)
    return listing


def read_remote(url: str, photo: str) -> bytes:
    """The bytes of a photo below `url`; raises `BadPhoto`, or `JobError` where all of them are out of reach."""
    files, root = _open(url)
    try:
        data = files.cat_file(f"{root.rstrip('/')}/{photo}", end=MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        if not files.exists(root):
            raise _lost(url, error) from None
        raise BadPhoto("missing", "listed, but gone when it was read") from None
    except (IsADirectoryError, PermissionError) as error:
        raise BadPhoto("unreadable", str(error)) from None
    except Exception as error:  # each file system has errors of its own
        raise _lost(url, error) from None
    if len(data) > MAX_FILE_BYTES:
        raise BadPhoto("too large", f"a file of more than {MAX_FILE_BYTES} bytes")
    return data


def _open(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise JobError(f"{url}: {' '.join(str(error).split())}") from None


def _lost(url: str, error: Exception) -> JobError:
    what = " ".join(f"{type(error).__name__} {error}".split())[:300]
    return JobError(f"{url}: cannot be read ({what}); bring it back and run the same command again")
