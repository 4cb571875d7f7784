"""Photos behind a URL (s3://, gs://, http://, file:// ...), listed and read by fsspec."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from preprocessing.photos import Listing, load_listing
from preprocessing.resize import MAX_FILE_BYTES, BadPhoto
from shards.photo_tree import is_photo
from shards.store import Store

_witnesses: dict[str, str] = {}  # by URL: the photo that this process read last


def list_remote(url: str, cache: Path | None, progress: Callable[[int], None]) -> Listing:
    """List the photos below `url`, from `cache` where they were listed before (there are no folder times to compare).

    Raises `JobError` where they cannot be listed.
    """
    if cache is not None and (listing := load_listing(url, cache, as_recorded=True)) is not None:
        progress(len(listing))
        return listing
    store = Store.at(url)
    try:
        found = sorted(store.ask(lambda: store.files.find(store.root)))
    except Exception as error:  # each file system has errors of its own
        raise store.lost(error) from None
    below = [name.removeprefix(store.root).lstrip("/") for name in found]
    photos = [name for name in below if is_photo(name)]
    progress(len(photos))
    return Listing(url, pa.array(photos, pa.large_string()), [], len(below) - len(photos), fresh=True)


def read_remote(url: str, photo: str) -> bytes:
    """The bytes of a photo below `url`; raises `BadPhoto`, or `JobError` where all of them are out of reach."""
    store = Store.at(url)
    try:
        data = store.read_range(photo, 0, MAX_FILE_BYTES + 1, _witnesses.get(url))
    except FileNotFoundError:
        raise BadPhoto("missing", "listed, but gone when it was read") from None
    except OSError as error:
        raise BadPhoto("unreadable", f"{url}/{photo}: {error}") from None
    _witnesses[url] = photo
    if len(data) > MAX_FILE_BYTES:
        raise BadPhoto("too large", f"a file of more than {MAX_FILE_BYTES} bytes")
    return data
