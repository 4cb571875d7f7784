"""Brings the photos of a source into one plane: UTM metres of one zone, from names or from a list."""

import os
import posixpath
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from preprocessing.photos import Bad, Listing
from shards.console import printable
from shards.names import BadName, hash_names, names_and_keys, parse_name, parse_utm
from shards.plane import Places, into_zone, join_at_equator, nowhere_in
from shards.store import is_url

_STEP = 1 << 20
_ROUNDABOUT = r"//|(^|/)\.\.?(/|$)"


def locate(
    listing: Listing, names: np.ndarray, zone: int, southern: bool | None = None
) -> tuple[Places, int, list[Bad]]:
    """Where the photos of a listing are, of which `names` (uint64 [n]) tells which are one and the same: places in the
    plane of one zone, that zone, and the photos that were set aside (their easting becomes NaN).

    `zone`: the zone to use; 0 means the one that most photos are in. The zone is 0 where nothing tells it. `southern`:
    the hemisphere of a plane on the equator; None means the one that most photos are in.
    """
    if listing.places is not None:
        places = replace(listing.places, east=listing.places.east.copy(), north=listing.places.north.copy())
        bad = []
    else:
        places = Places(*parse_utm(listing.paths))
        bad = _without_coordinates(listing.paths, places.east)
    zone = zone or _common_zone(places.zones, places.east)
    bad += _unify_zones(listing.paths, places, zone)
    join_at_equator(places, southern)
    bad += _duplicates(listing, places.east, names)
    return places, zone, bad


def identify(listing: Listing) -> tuple[np.ndarray, np.ndarray]:
    """A hash of what makes a photo one and the same, its base name or, where a list names it, its absolute path; and
    numbers to order photos at random by (`names_and_keys`, of the paths in a list), uint64 [n] both."""
    if listing.places is None:
        return names_and_keys(listing.paths)
    _, keys = names_and_keys(pc.replace_substring(listing.paths, "/", "\\"))
    return hash_files(str(listing.root), listing.paths), keys


def hash_files(root: str, paths: pa.Array) -> np.ndarray:
    """A hash of which files paths name, in `root` (a folder or URL) or, with a folder, absolute, uint64 [n]: `./a`,
    `b/../a` and the absolute path of `a` are one file. Links are not followed."""
    root = _plain_root(root)
    start, nothing = (pa.scalar(text, pa.large_string()) for text in (f"{root}/", ""))
    out = np.empty(len(paths), np.uint64)
    for first in range(0, len(paths), _STEP):
        part = paths.slice(first, _STEP)
        inside = pc.binary_join_element_wise(start, part, nothing)
        whole = inside if is_url(root) else pc.if_else(pc.starts_with(part, "/"), part, inside)
        roundabout = pc.match_substring_regex(part, _ROUNDABOUT)
        if pc.any(roundabout).as_py():
            plain = pa.array([_plain(root, path) for path in part.filter(roundabout).to_pylist()], pa.large_string())
            whole = pc.replace_with_mask(whole, roundabout, plain)
        out[first : first + len(part)] = hash_names(pc.replace_substring(whole, "/", "\0"))  # the whole as a base name
    return out


def _plain_root(root: str) -> str:
    return (root if is_url(root) else os.path.abspath(root)).rstrip("/")


def _plain(root: str, path: str) -> str:
    """One spelling of a path in `root`, which is as `_plain_root` has it."""
    if is_url(root):
        return f"{root}/{posixpath.normpath(path)}"
    return posixpath.normpath(path if path.startswith("/") else f"{root}/{path}")


def is_southern(places: Places) -> bool:
    """Whether the plane lies south of the equator, as most photos that know their zone say."""
    usable = np.isfinite(places.east) & (places.zones != 0)
    return bool(np.count_nonzero(places.southern & usable) * 2 > np.count_nonzero(usable))


def _common_zone(zones: np.ndarray, east: np.ndarray) -> int:
    counts = np.bincount(zones, minlength=61)
    if np.count_nonzero(counts[1:]) > 1:
        counts = np.bincount(zones[np.isfinite(east)], minlength=61)
    return int(np.argmax(counts[1:]) + 1) if counts[1:].any() else 0


def _without_coordinates(paths: pa.Array, east: np.ndarray) -> list[Bad]:
    bad = []
    for row in np.flatnonzero(np.isnan(east)):
        path = paths[row].as_py()
        try:
            parse_name(path)
        except BadName as error:
            bad.append(Bad(path, "no coordinates", str(error)))
    return bad


def _unify_zones(paths: pa.Array, places: Places, zone: int) -> list[Bad]:
    """Carry photos of the neighbouring zones into `zone`'s plane, in place; set those of farther zones, and those that
    lie nowhere, aside."""
    moves = into_zone(places, zone)
    bad = [
        Bad(paths[row].as_py(), "zone mismatch", f"UTM zone {places.zones[row]} where most photos are in zone {zone}")
        for row in moves.far
    ]
    return bad + [Bad(paths[row].as_py(), "coordinates out of range", nowhere_in(zone)) for row in moves.nowhere]


def _duplicates(listing: Listing, east: np.ndarray, names: np.ndarray) -> list[Bad]:
    """Set aside all but the first of the photos that are one and the same, in place in `east`."""
    hashes = np.sort(names)
    repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    del hashes
    if not len(repeated):
        return []
    bad = []
    first: dict[str, str] = {}
    what = "name" if listing.places is None else "photo"
    root = _plain_root(str(listing.root))
    for row in _rows_of(names, repeated):
        path = listing.paths[row].as_py()
        name = path.rpartition("/")[2] if listing.places is None else _plain(root, path)
        if name in first and np.isfinite(east[row]):
            east[row] = np.nan
            bad.append(Bad(path, "duplicate name", f"the same {what} as {printable(first[name])}"))
        first.setdefault(name, path)
    return bad


def _rows_of(names: np.ndarray, sought: np.ndarray) -> np.ndarray:
    """Where `names` holds one of `sought` (sorted); `np.isin` would sort all names once more, with twice the memory."""
    step = 1 << 20
    rows = []
    for first in range(0, len(names), step):
        part = names[first : first + step]
        at = np.minimum(np.searchsorted(sought, part), len(sought) - 1)
        rows.append(first + np.flatnonzero(sought[at] == part))
    return np.concatenate(rows)
