"""Local copies of the small files of a data set at a URL: everything that reading it takes but the tars.

They lie below the folder DIVIDE_AND_CLASSIFY_CACHE, or divide-and-classify in XDG_CACHE_HOME or ~/.cache; any of it
may be deleted while no program uses it.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from shards.checksums import DamagedChecksums, checksum, parse_checksums
from shards.console import JobError
from shards.files import atomic_path, atomic_write_bytes
from shards.layout import (
    CHECKSUMS,
    CLASSES,
    INDEX,
    MANIFEST,
    OPTIONAL_TOP_FILES,
    QUARANTINE,
    REVISIONS,
    SHARD_STEM,
    TOP_FILES,
    shard_tables,
)
from shards.locks import folder_locked
from shards.store import PARALLEL, Store

_BELOW = re.compile(rf"(group-\d{{2,}}|{INDEX}|{REVISIONS})/[\w-][\w.-]*")  # none of these leads out of the folder
_TABLE = re.compile(rf"{SHARD_STEM}\.parquet")
_MANY = 64  # files from which on a progress bar is shown


def cache_root() -> Path:
    """The folder of all that this program keeps of data sets at URLs."""
    if place := os.environ.get("DIVIDE_AND_CLASSIFY_CACHE"):
        return Path(place)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "divide-and-classify"


def mirror(store: Store) -> Path:
    """A folder with manifest, class table, list of bad photos and sample tables of the data set in `store`, as they
    are now; without a manifest where none is there. Processes of a host share it: one fetches, the others wait.

    Raises `JobError` where the data set is damaged or being changed.
    """
    name = re.sub(r"[^\w-]", "-", store.url.rpartition("/")[2])[:40]
    folder = cache_root() / "mirrors" / f"{name}-{hashlib.sha256(store.url.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with folder_locked(folder):
        _refresh(store, folder)
    return folder


def _refresh(store: Store, folder: Path) -> None:
    manifest = _read_if_there(store, MANIFEST)
    if manifest is None:
        (folder / MANIFEST).unlink(missing_ok=True)
        return
    seal = _read_if_there(store, CHECKSUMS)
    sums = _sums(store, seal)
    here = manifest == _local(folder / MANIFEST) and seal == _local(folder / CHECKSUMS)
    if here and all((folder / name).is_file() for name in sums if _is_mirrored(name)):
        return
    if sums and sums.get(MANIFEST) != hashlib.sha256(manifest).hexdigest():
        raise JobError(
            f"{store.url}: is being changed, or a change was interrupted; wait for it, or run that command again"
        )
    names = sums.keys() or store.names()
    wanted = [name for name in names if _is_mirrored(name)]
    have = {n for n in wanted if n in sums and (folder / n).is_file() and checksum(folder / n) == sums[n]}
    fetch_all(store, [n for n in wanted if n not in have], folder, sums)
    for table in shard_tables(folder):
        if str(table.relative_to(folder)) not in names:
            table.unlink()
    if seal is not None:
        atomic_write_bytes(folder / CHECKSUMS, seal)
    else:
        (folder / CHECKSUMS).unlink(missing_ok=True)
    atomic_write_bytes(folder / MANIFEST, manifest)


def fetch_all(store: Store, names: Iterable[str], folder: Path, sums: dict[str, str]) -> None:
    """Copy files of `store` to the same names in `folder`, several at a time, each whole or not at all.

    `sums`: the checksums that files must have, as far as known. Raises `JobError` where one is missing or damaged.
    """
    names = sorted(n for n in names if is_small(n))
    for parent in {(folder / n).parent for n in names}:
        parent.mkdir(parents=True, exist_ok=True)

    def fetch(name: str) -> None:
        try:
            with atomic_path(folder / name) as partial:
                store.fetch(name, partial)
                if name in sums and checksum(partial) != sums[name]:
                    raise JobError(f"{store.url}/{name}: differs from its checksum; run shards/verify.py {store.url}")
        except FileNotFoundError:
            raise JobError(f"{store.url}/{name}: missing; run shards/verify.py {store.url}") from None

    with (
        ThreadPoolExecutor(PARALLEL) as pool,
        tqdm(desc="fetching tables", total=len(names), unit=" files", disable=len(names) < _MANY) as bar,
    ):
        try:
            for _ in pool.map(fetch, names):
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def is_small(name: str) -> bool:
    """Whether a name, from a listing or a list of checksums, is that of a data set's file, and of none of its tars."""
    return name in TOP_FILES + OPTIONAL_TOP_FILES or (_BELOW.fullmatch(name) is not None and not name.endswith(".tar"))


def _is_mirrored(name: str) -> bool:
    return name in (CLASSES, QUARANTINE) or _TABLE.fullmatch(name) is not None


def _read_if_there(store: Store, name: str) -> bytes | None:
    try:
        return store.read(name)
    except FileNotFoundError:
        return None


def _sums(store: Store, seal: bytes | None) -> dict[str, str]:
    try:
        return {} if seal is None else parse_checksums(seal)
    except DamagedChecksums as error:
        raise JobError(f"{store.url}/{CHECKSUMS}: damaged ({error}); run shards/verify.py {store.url}") from None


def _local(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder in the cache, gone at the end; those that killed programs left go too."""
    root = cache_root() / "scratch"
    root.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with folder_locked(cache_root()):
            for old in root.iterdir():
                _remove_if_left(old)
            folder = Path(tempfile.mkdtemp(dir=root))
            held.enter_context(folder_locked(folder))
        inner = folder / "inner"  # of its own, so that a command can lock it as it locks any output
        inner.mkdir()
        try:
            yield inner
        finally:
            shutil.rmtree(inner, ignore_errors=True)
            held.close()  # NFS keeps a file that is open
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def named_by_url(store: Store, folder: Path) -> Iterator[None]:
    """Errors that name a file of `folder` name the one at the URL that it is a copy of."""
    try:
        yield
    except JobError as error:
        raise type(error)(str(error).replace(str(folder), store.url)) from error.__cause__


def _remove_if_left(folder: Path) -> None:
    with suppress(OSError), folder_locked(folder, wait=False) as free:  # its owner may just be done with it
        if free:  # else that one is alive
            shutil.rmtree(folder, ignore_errors=True)
