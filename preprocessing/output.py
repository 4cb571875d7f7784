"""Where a data set is written: a folder, or a URL with a folder on this machine that stands in for it."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from preprocessing.shard_task import ShardResult, finished_shard
from shards.checksums import files_below, sealed_checksums
from shards.console import JobError
from shards.files import is_partial
from shards.layout import (
    CHECKSUMS,
    INDEX,
    LISTING,
    MANIFEST,
    PLAN,
    REVISION_FILES,
    REVISIONS,
    shard_numbers,
    shard_stem,
    shard_tables,
)
from shards.mirror import fetch_all, is_small, named_by_url, scratch_folder
from shards.store import PARALLEL, Store, is_url

_INDEX_STATE = f"{INDEX}/state"


@dataclass(frozen=True)
class Output:
    """The folder of a data set that is being made, or changed.

    Of one at a URL (`store`), the folder holds everything but the tars. Workers put shards into the store themselves,
    the table last; `gather` has their tables and DALI indexes here, `share` brings the rest there.
    `known`: size and time of the files here that are the same there.
    """

    folder: Path
    store: Store | None = None
    known: dict[str, tuple[int, int]] = field(default_factory=dict)

    @staticmethod
    def of(place: "Output | Path") -> "Output":
        """An output as it is, or that of a folder."""
        return place if isinstance(place, Output) else Output(place)

    @staticmethod
    @contextmanager
    def open(place: str) -> Iterator["Output"]:
        """The output at a path or URL; of a URL, what is there so far is fetched first. Raises `JobError`."""
        if not is_url(place):
            yield Output(Path(place))
            return
        store = Store.at(place)
        with scratch_folder() as folder, named_by_url(store, folder):
            output = Output(folder, store)
            output._fetch()
            yield output

    @property
    def place(self) -> str:
        """The folder or the URL, for messages."""
        return self.store.url if self.store else str(self.folder)

    def finished_shard(self, group: int, number: int) -> ShardResult | None:
        """The result of a shard that is done, or None."""
        return finished_shard(self.folder, group, number, with_tar=self.store is None)

    def gather(self, shards: Iterable[tuple[int, int]]) -> None:
        """Have here the tables of all shards in the store; raises `JobError` where one of `shards` is not there."""
        if self.store is None:
            return
        self._fetch_tables(self.store.sizes(), {})
        missing = [shard_stem(*shard) for shard in shards if self.finished_shard(*shard) is None]
        if missing:
            raise JobError(
                f"{self.place}: {len(missing)} shards that were written are not there (e.g. {missing[0]}); "
                "run the same command again"
            )

    def share(self) -> None:
        """Bring what changed in the folder to the store, but for shards.

        The plan goes first, which says whose place it is. A revision's files go one after another, as they are
        written: one says "begun" of all. The manifest goes last, after its checksums.
        """
        if self.store is None:
            return
        changed = [n for n in files_below(self.folder) if is_small(n) and not _of_shard(n) and self._changed(n)]
        index = [n for n in changed if n.startswith(f"{INDEX}/")]
        if index and self._index_is_there():
            changed = [n for n in changed if n not in index]
        first = [PLAN] if PLAN in changed else []
        last = sorted((n for n in changed if n.startswith(f"{REVISIONS}/")), key=_turn)
        last += [n for n in (_INDEX_STATE, CHECKSUMS, MANIFEST) if n in changed]
        for name in first:
            self._put(name)
        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(self._put, [n for n in changed if n not in first + last]))
        for name in last:
            self._put(name)

    def _fetch(self) -> None:
        assert self.store is not None
        sizes = self.store.sizes()
        ours = any(name in sizes for name in (MANIFEST, PLAN, LISTING))
        if not ours and not all(is_partial(name) for name in sizes):
            raise JobError(f"{self.place}: not empty and not a data set; choose an empty or new place")
        above = [n for n in sizes if is_small(n) and not _of_shard(n) and not n.startswith(f"{INDEX}/")]
        fetch_all(self.store, above, self.folder, {})
        for name in above:
            self.known[name] = self._stamp(name)
        self._fetch_tables(sizes, sealed_checksums(self.folder))
        if CHECKSUMS in above:  # as new as the tables: `seal` then takes their checksums from it
            (self.folder / CHECKSUMS).touch()
            self.known[CHECKSUMS] = self._stamp(CHECKSUMS)

    def _fetch_tables(self, sizes: dict[str, int], sums: dict[str, str]) -> None:
        """Fetch tables and DALI indexes that are not here; of a shard whose tar is not whole there, no table stays."""
        assert self.store is not None
        stems = [n.removesuffix(".parquet") for n in sizes if _of_shard(n) and n.endswith(".parquet")]
        wanted = [f"{stem}.{kind}" for stem in stems for kind in ("idx", "parquet") if f"{stem}.{kind}" in sizes]
        fetch_all(self.store, [n for n in wanted if not (self.folder / n).exists()], self.folder, sums)
        for table in shard_tables(self.folder):
            name = str(table.relative_to(self.folder).with_suffix(""))
            result = finished_shard(self.folder, *shard_numbers(name), with_tar=False)
            if result is None or sizes.get(f"{name}.tar") != result.tar_bytes:
                table.unlink()

    def _index_is_there(self) -> bool:
        assert self.store is not None
        try:
            return self.store.read(_INDEX_STATE) == (self.folder / _INDEX_STATE).read_bytes()
        except FileNotFoundError:
            return False

    def _put(self, name: str) -> None:
        assert self.store is not None
        stamp = self._stamp(name)
        self.store.put(self.folder / name, name)
        self.known[name] = stamp

    def _changed(self, name: str) -> bool:
        return self.known.get(name) != self._stamp(name)

    def _stamp(self, name: str) -> tuple[int, int]:
        status = (self.folder / name).stat()
        return status.st_size, status.st_mtime_ns


def _turn(name: str) -> int:
    """When a file of a revision is put among the others."""
    return next(turn for turn, end in enumerate(REVISION_FILES) if name.endswith(end))


def _of_shard(name: str) -> bool:
    return name.startswith("group-")
