"""The plan of a data set: classes, labels, shards, keys and order, fixed from the photos' names alone.

Since nothing depends on what is inside the photos, a shard is a task that shares nothing with others; a photo
that turns out bad leaves a hole.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import utm

from preprocessing.partition import Partition, make_partition
from preprocessing.photos import Bad, Listing
from preprocessing.resize import ResizeFilter, codec_name
from shards.classes import ClassTable
from shards.console import JobError, printable
from shards.layout import FORMAT_VERSION, SHARD_SAMPLES
from shards.names import BadName, hash_names, parse_name, parse_utm


@dataclass(frozen=True)
class Settings:
    """What decides a data set's bytes, besides the photos: cell size `M` in metres, group grid `N`, least photos
    of a class, photo size in pixels, JPEG quality, filter, and the seed of the order within a class."""

    M: int
    N: int
    min_images: int
    image_size: int
    quality: int
    resize_filter: ResizeFilter
    seed: int


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: planned samples `first` onwards of a group. Columns have shape [k]; metres."""

    group: int
    number: int
    first: int
    sources: list[str]
    labels: list[int]
    east: list[float]
    north: list[float]


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before a photo is read.

    `order` int64 [planned]: rows of `paths` by group, label and a seeded shuffle within the class;
    `group_starts` maps a group to where it begins in `order`; `skipped`: rows in cells with too few photos.
    """

    settings: Settings
    classes: ClassTable
    paths: pa.Array
    east: np.ndarray
    north: np.ndarray
    order: np.ndarray
    label: np.ndarray
    group_starts: dict[int, int]
    skipped: np.ndarray
    bad: list[Bad]
    fingerprint: str

    @property
    def photos(self) -> int:
        """Photos listed, those set aside by name included."""
        return len(self.paths)

    def group_size(self, group: int) -> int:
        """Planned samples of a group."""
        later = [start for start in self.group_starts.values() if start > self.group_starts[group]]
        return min(later, default=len(self.order)) - self.group_starts[group]

    def shard_count(self) -> int:
        """How many shards there will be."""
        return sum(math.ceil(self.group_size(g) / SHARD_SAMPLES) for g in self.group_starts)

    def tasks(self) -> Iterator[ShardTask]:
        """The shards to write, in order of group and number."""
        for group, start in self.group_starts.items():
            for first in range(0, self.group_size(group), SHARD_SAMPLES):
                count = min(SHARD_SAMPLES, self.group_size(group) - first)
                rows = self.order[start + first : start + first + count]
                yield ShardTask(
                    group,
                    first // SHARD_SAMPLES,
                    first,
                    self.paths.take(pa.array(rows)).to_pylist(),
                    self.label[rows].tolist(),
                    self.east[rows].tolist(),
                    self.north[rows].tolist(),
                )


def make_plan(listing: Listing, settings: Settings) -> Plan:
    """Plan a data set from a listing; raises `JobError` where no cell has enough photos."""
    if not len(listing):
        raise JobError(f"{listing.root}: no photos found (looked for .jpg, .jpeg and .png in all folders below)")
    east, north, zones = parse_utm(listing.paths)
    zone = _common_zone(zones, np.isfinite(east))
    bad: list[Bad] = list(listing.bad)
    bad += _without_coordinates(listing.paths, east)
    bad += _unify_zones(listing.paths, east, north, zones, zone)
    names = hash_names(listing.paths)
    bad += _duplicates(listing.paths, east, names)
    usable = np.flatnonzero(np.isfinite(east))
    if not len(usable):
        example = f"; e.g. {bad[0].source}: {bad[0].detail or bad[0].reason}" if bad else ""
        raise JobError(f"{listing.root}: none of {len(listing)} photos has usable coordinates in its name{example}")
    part = make_partition(
        east[usable], north[usable], M=settings.M, N=settings.N, min_images=settings.min_images, zone=zone
    )
    if not len(part.classes):
        raise JobError(
            f"{listing.root}: no cell of {settings.M} m has {settings.min_images} photos, so there is nothing to "
            "learn; lower --min-images or raise --M"
        )
    order, label = _order(part, usable, names, settings.seed, len(listing))
    group = part.classes.group[part.row[part.row >= 0]]
    starts = np.concatenate([[0], np.cumsum(np.bincount(group, minlength=settings.N**2))])
    return Plan(
        settings,
        part.classes,
        listing.paths,
        east,
        north,
        order,
        label,
        {g: int(starts[g]) for g in part.classes.groups},
        usable[part.row < 0],
        bad,
        _fingerprint(listing, settings),
    )


def _order(
    part: Partition, usable: np.ndarray, names: np.ndarray, seed: int, photos: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows by class and, within it, in an order shuffled by seed and name, so that a run of neighbours in a shard
    is a random sample of its class; and the label of each photo (int32, -1 without a class)."""
    label = np.full(photos, -1, np.int32)
    kept = part.row >= 0
    rows = usable[kept]
    label[rows] = part.classes.label[part.row[kept]]
    salt = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "little")
    shuffled = (names[rows] ^ np.uint64(salt)) * np.uint64(0x9FB21C651E98DF25)
    key = (part.row[kept].astype(np.uint64) << np.uint64(32)) | (shuffled >> np.uint64(32))
    return rows[np.argsort(key, kind="stable")], label


def _common_zone(zones: np.ndarray, usable: np.ndarray) -> int:
    """The zone most photos are in; 0 where no name has one."""
    counts = np.bincount(zones[usable], minlength=61)
    return int(np.argmax(counts[1:]) + 1) if counts[1:].any() else 0


def _without_coordinates(paths: pa.Array, east: np.ndarray) -> list[Bad]:
    bad = []
    for row in np.flatnonzero(~np.isfinite(east)):
        path = paths[row].as_py()
        try:
            parse_name(path)
        except BadName as error:
            bad.append(Bad(path, "no coordinates", str(error)))
    return bad


def _unify_zones(paths: pa.Array, east: np.ndarray, north: np.ndarray, zones: np.ndarray, zone: int) -> list[Bad]:
    """Carry photos of the neighbouring zones into `zone`'s plane, in place; set those of farther zones aside."""
    bad = []
    others = (zones != 0) & (zones != zone) & np.isfinite(east)
    for other in np.unique(zones[others]).tolist():
        rows = np.flatnonzero(others & (zones == other))
        if abs(other - zone) in (1, 59):
            bands = [parse_name(paths[row].as_py()).band for row in rows]
            southern = np.array([band < "N" for band in bands])
            for half, is_northern in ((rows[southern], False), (rows[~southern], True)):
                if len(half):
                    latitude, longitude = utm.to_latlon(
                        east[half], north[half], other, northern=is_northern, strict=False
                    )
                    east[half], north[half], _, _ = utm.from_latlon(
                        latitude, longitude, force_zone_number=zone, force_northern=is_northern
                    )
        else:
            east[rows] = north[rows] = np.nan
            detail = f"UTM zone {other} where most photos are in zone {zone}"
            bad += [Bad(paths[row].as_py(), "zone mismatch", detail) for row in rows]
    return bad


def _duplicates(paths: pa.Array, east: np.ndarray, names: np.ndarray) -> list[Bad]:
    """Set aside all but the first of the photos that share a base name, in place in `east`."""
    order = np.argsort(names, kind="stable")
    hashes = names[order]
    bad = []
    for repeated in np.unique(hashes[1:][hashes[1:] == hashes[:-1]]):
        rows = order[np.searchsorted(hashes, repeated) : np.searchsorted(hashes, repeated, side="right")]
        first: dict[str, str] = {}
        for row in rows:
            path = paths[row].as_py()
            base = path.rpartition("/")[2]
            if base in first and np.isfinite(east[row]):
                east[row] = np.nan
                bad.append(Bad(path, "duplicate name", f"the same name as {printable(first[base])}"))
            first.setdefault(base, path)
    return bad


def _fingerprint(listing: Listing, settings: Settings) -> str:
    """A hash of everything that decides the bytes: settings, codec and the list of photos."""
    facts = {"format": FORMAT_VERSION, "samples": SHARD_SAMPLES, "codec": codec_name(), **asdict(settings)}
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    for first in range(0, len(listing), 1 << 16):
        digest.update("\0".join(listing.paths.slice(first, 1 << 16).to_pylist()).encode())
        digest.update(b"\0")
    return digest.hexdigest()
