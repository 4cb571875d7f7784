"""The plan of a data set: classes, labels, shards, keys and order, fixed from the photos' names alone.

Since nothing depends on what is inside the photos, a shard is a task that shares nothing with others; a photo
that turns out bad leaves a hole.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from preprocessing.codec import Codec, codec_name, make_resizer
from preprocessing.coordinates import identify, is_southern, locate
from preprocessing.partition import Partition, make_partition
from preprocessing.photos import Bad, Listing
from preprocessing.resize import ResizeFilter, Resizer
from preprocessing.sources import turns
from shards.classes import ClassTable, number_within
from shards.console import JobError
from shards.layout import FORMAT_VERSION, SHARD_SAMPLES
from shards.names import string_bytes
from shards.photo_list import GIVE_A_LIST
from shards.plane import Places, half_of

_STEP = 1 << 20


@dataclass(frozen=True)
class Settings:
    """What decides a data set's bytes, besides the photos: cell size `M` in metres, group grid `N`, least photos
    of a class, photo size in pixels, JPEG quality, filter, and the seed of the order within a class.

    `crops`: into how many each panorama is cut (0: photos are taken whole); `zone`: the UTM zone of the plane (0: the
    one most photos are in); `limit`: keep whole cells of a district, up to about this many images (0: all); `codec`:
    what makes the JPEGs.
    """

    M: int
    N: int
    min_images: int
    image_size: int
    quality: int
    resize_filter: ResizeFilter
    seed: int
    crops: int = 0
    zone: int = 0
    limit: int = 0
    codec: Codec = "cpu"

    def facts(self) -> dict[str, Any]:
        """The values as JSON, the codec by the names and versions of its libraries."""
        return {**asdict(self), "codec": codec_name(self.codec)}

    def resizer(self) -> Resizer:
        """What makes the small JPEGs; raises `JobError` where a GPU or its libraries are missing."""
        return make_resizer(self.codec, self.image_size, self.quality, self.resize_filter)


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: the planned samples of a group that have its number. Columns have shape [k]; metres, degrees.

    A timestamp of None means that the photo's name says it, and the heading too; a heading of None is unknown.
    `elsewhere`: samples that a retry brought into a later shard; they are left out.
    """

    group: int
    number: int
    samples: list[str]
    labels: list[int]
    east: list[float]
    north: list[float]
    headings: list[float | None]
    timestamps: list[str | None]
    elsewhere: frozenset[str] = frozenset()

    @property
    def first(self) -> int:
        """The number of its first sample among those planned for the group."""
        return self.number * SHARD_SAMPLES

    def without(self, samples: frozenset[str]) -> "ShardTask":
        """The same task, which leaves `samples` out: they keep their keys, as holes."""
        return replace(self, elsewhere=samples.intersection(self.samples))

    def planned(self, i: int) -> dict[str, Any]:
        """What is planned for sample i, as JSON values; see `Bad.sample`."""
        return {
            "group": self.group,
            "label": self.labels[i],
            "east": self.east[i],
            "north": self.north[i],
            "heading": self.headings[i],
            "timestamp": self.timestamps[i],
        }


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before a photo is read.

    `order` int64 [planned]: samples by group, label and a seeded shuffle within the class; a sample is a row of
    `paths`, or row * crops + crop. `label` int32 [n]: of each photo, below 0 without a class. `group_starts` maps each
    group, ascending, to where it begins in `order`; `skipped`: rows in cells with too few photos. `photos`: how many
    were listed (crops, of panoramas), those set aside by name or by their row in a list included.
    """

    settings: Settings
    classes: ClassTable
    paths: pa.Array
    places: Places
    order: np.ndarray
    label: np.ndarray
    group_starts: dict[int, int]
    skipped: np.ndarray
    bad: list[Bad]
    fingerprint: str
    photos: int

    @cached_property
    def group_sizes(self) -> dict[int, int]:
        """Planned samples of every group, in order of group."""
        bounds = [*self.group_starts.values(), len(self.order)]
        return {group: end - start for group, (start, end) in zip(self.group_starts, pairwise(bounds), strict=True)}

    def shards(self) -> list[tuple[int, int, int]]:
        """Group, number and planned samples of every shard, in order."""
        return [
            (group, number, min(SHARD_SAMPLES, size - number * SHARD_SAMPLES))
            for group, size in self.group_sizes.items()
            for number in range(math.ceil(size / SHARD_SAMPLES))
        ]

    def tasks(self) -> Iterator[ShardTask]:
        """The shards to write, in order of group and number."""
        return (self.task(group, number) for group, number, _ in self.shards())

    def task(self, group: int, number: int) -> ShardTask:
        """One shard to write."""
        of_group = self.order[self.group_starts[group] :][: self.group_sizes[group]]
        return self.task_of(group, number, of_group[number * SHARD_SAMPLES :][:SHARD_SAMPLES])

    def task_of(self, group: int, number: int, samples: np.ndarray) -> ShardTask:
        """A task of planned `samples` (values of `order`), whatever shard they are planned for."""
        crops = self.settings.crops
        rows = samples // crops if crops else samples
        sources = self.paths.take(pa.array(rows)).to_pylist()
        if crops:
            turn = turns(crops)
            sources = [f"{path}#{turn[i]}" for path, i in zip(sources, (samples % crops).tolist(), strict=True)]
        return ShardTask(
            group,
            number,
            sources,
            self.label[rows].tolist(),
            self.places.east[rows].tolist(),
            self.places.north[rows].tolist(),
            *headings_and_timestamps(self.places, rows),
        )


def headings_and_timestamps(places: Places, rows: np.ndarray) -> tuple[list[float | None], list[str | None]]:
    """Headings and timestamps of photos as JSON values: as a list gave them, or None where the names say it."""
    if places.heading is None or places.timestamp is None:
        return [None] * len(rows), [None] * len(rows)
    headings = [None if math.isnan(h) else h for h in places.heading[rows].tolist()]
    return headings, places.timestamp.take(pa.array(rows)).to_pylist()


def make_plan(listing: Listing, settings: Settings) -> Plan:
    """Plan a data set; raises `JobError` where there is nothing to make one of."""
    names, keys = identify(listing)
    places, zone, named_bad = locate(listing, names, settings.zone)
    bad = [*listing.bad, *named_bad]
    finite = np.isfinite(places.east)
    usable = slice(None) if finite.all() else np.flatnonzero(finite)
    if not finite.any():
        example = f"; e.g. {bad[0].source}: {bad[0].detail or bad[0].reason}" if bad else ""
        where, advice = "", ""
        if listing.places is None:
            where, advice = " in its name", f"; {GIVE_A_LIST}"
        raise JobError(f"{listing.root}: none of {len(listing)} photos has usable coordinates{where}{example}{advice}")
    crops = max(settings.crops, 1)
    part = make_partition(
        places.east[usable], places.north[usable],
        M=settings.M, N=settings.N, min_images=math.ceil(settings.min_images / crops), zone=zone,
    )  # fmt: skip
    if not len(part.classes):
        raise JobError(
            f"{listing.root}: no cell of {settings.M} m has {settings.min_images} photos, so there is nothing to "
            "learn; lower --min-images or raise --M"
        )
    part = _district(part, settings.limit / crops) if settings.limit else part
    row = part.row
    if not finite.all():
        row = np.full(len(listing), -2, np.int32)
        row[usable] = part.row
    label = np.where(row >= 0, part.classes.label[np.maximum(row, 0)], row)
    southern = half_of(part.classes.cell_north) if zone else None
    southern = is_southern(places) if southern is None else southern
    classes = replace(part.classes, images=part.classes.images * crops, southern=southern)
    sizes = np.bincount(classes.group, weights=classes.images, minlength=settings.N**2).astype(np.int64)
    starts = np.cumsum(sizes) - sizes
    return Plan(
        settings,
        classes,
        listing.paths,
        places,
        class_order(row, keys, settings.seed, crops),
        label,
        {g: int(starts[g]) for g in classes.groups},
        np.flatnonzero(row == -1),
        bad,
        _fingerprint(listing, settings),
        listing.found * crops,
    )


def class_order(row: np.ndarray, keys: np.ndarray, seed: int, crops: int) -> np.ndarray:
    """Samples by class and, within it, in an order shuffled by seed and name, so that a run of neighbours in a shard
    is a random sample of its class.

    `row`: the class of each photo (int32 [n], below 0 without one), `keys`: what `identify` orders it by (uint64 [n]).
    Returns photo * crops + crop, int64 [planned]. Class, some twenty bits of shuffle and sample are sorted as one
    number.
    """
    kept = np.flatnonzero(row >= 0)
    if not len(kept):
        return kept
    salt = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "little")
    index_bits = (len(row) * crops).bit_length()
    class_bits = int(row.max()).bit_length()
    sorted_by = np.empty((len(kept), crops), np.uint64)
    for first in range(0, len(kept), _STEP):
        rows = kept[first : first + _STEP]
        for crop in range(crops):
            key = keys[rows] ^ np.uint64((salt + crop * 0x9E3779B97F4A7C15) % 2**64)
            key *= np.uint64(0x9FB21C651E98DF25)
            key >>= np.uint64(class_bits + index_bits)
            key <<= np.uint64(index_bits)
            key |= rows.astype(np.uint64) * np.uint64(crops) + np.uint64(crop)
            key |= row[rows].astype(np.uint64) << np.uint64(64 - class_bits)
            sorted_by[first : first + _STEP, crop] = key
    order = sorted_by.ravel()
    order.sort()
    order &= np.uint64((1 << index_bits) - 1)
    return order.view(np.int64)


def _district(part: Partition, images: float) -> Partition:
    """The cells nearest to the middle of the city, whole, as many as hold `images` photos and one at least; the
    photos of others are in row -2."""
    classes = part.classes
    centers = classes.centers()
    distance = abs(centers - np.median(centers, axis=0)).max(axis=1)
    nearest = np.argsort(distance, kind="stable")
    count = max(1, int(np.searchsorted(np.cumsum(classes.images[nearest]), images, side="right")))
    chosen = np.sort(nearest[:count])
    kept = classes.take(chosen)
    kept = replace(kept, label=number_within(kept.group).astype(np.int32))
    new_row = np.full(len(classes) + 1, -2, np.int32)
    new_row[chosen] = np.arange(count, dtype=np.int32)
    new_row[-1] = -1
    return Partition(kept, new_row[part.row])


def _fingerprint(listing: Listing, settings: Settings) -> str:
    """A hash of everything that decides the bytes: settings, codec and the list of photos."""
    facts = {"format": FORMAT_VERSION, "samples": SHARD_SAMPLES, **settings.facts()}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    _hash_strings(digest, listing.paths)
    if (places := listing.places) is not None:
        for column in (places.east, places.north, places.zones, places.heading):
            digest.update(b"" if column is None else column.tobytes())
        if places.timestamp is not None:
            _hash_strings(digest, places.timestamp.cast(pa.large_string()))
    return digest.hexdigest()[:32]


def _hash_strings(digest: "hashlib._Hash", texts: pa.Array) -> None:
    ends, data = string_bytes(texts)
    for first in range(0, len(ends) - 1, 1 << 20):
        digest.update(np.diff(ends[first : first + (1 << 20) + 1]).tobytes())
    if data:
        digest.update(memoryview(data)[ends[0] : ends[-1]])
