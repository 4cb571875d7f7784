"""Where photos were taken, brought into one plane: that of a UTM zone."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import utm

# UTM northings beyond the first are of the southern hemisphere alone, those below the second of the northern (84
# degrees north is 9.33 million metres, 80 degrees south 1.12 million); the equator is 0 in one and 1e7 in the other.
_SOUTHERN_ALONE, _NORTHERN_ALONE, _EQUATOR = 9.4e6, 1.1e6, 1e7

# Least and largest easting and northing that in_plane takes: those of a zone (0 to 1e6, 0 to 1e7) with those of its
# neighbours and of the other hemisphere near the equator, and those of a plane of one's own.
_OF_ZONE, _OF_OWN_PLANE = (-1e6, 2e6, -2e6, 1.2e7), (-1e8, 1e8, -1e8, 1e8)


@dataclass
class Places:
    """Where and when photos were taken, row by row, [n]: `east` and `north` in metres (float64, NaN where unusable),
    `zones` (int8, 0 where unknown), `southern` (bool, False where unknown), `heading` in degrees (float32, NaN where
    unknown) and `timestamp` (string). None: the names say it."""

    east: np.ndarray
    north: np.ndarray
    zones: np.ndarray
    southern: np.ndarray
    heading: np.ndarray | None = None
    timestamp: pa.Array | None = None


class Moves(NamedTuple):
    """Rows (int64, ascending) that `into_zone` carried into its zone, those of zones too far away, and those that lie
    nowhere: not in a plane (`in_plane`), or not on the map of a neighbouring zone."""

    carried: np.ndarray
    far: np.ndarray
    nowhere: np.ndarray


def zone_of(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """The UTM zone of every point in degrees, int8 [n], with the wide zones of Norway and Svalbard."""
    zone = (np.floor((longitude + 180) / 6) % 60 + 1).astype(np.int8)
    zone[(latitude >= 56) & (latitude < 64) & (longitude >= 3) & (longitude < 12)] = 32
    svalbard = (latitude >= 72) & (longitude >= 0) & (longitude < 42)
    zone[svalbard] = np.array([31, 33, 35, 37])[np.searchsorted([9, 21, 33], longitude[svalbard], side="right")]
    return zone


def zones_apart(zones: np.ndarray, zone: int) -> np.ndarray:
    """How many zones `zones` (int [n]) lie from `zone`, the shorter way round the earth: int64 [n]."""
    apart = abs(zones.astype(np.int64) - zone)
    return np.minimum(apart, 60 - apart)


def on_map(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Whether points in degrees are on the map of UTM, bool [n]: false where a value is NaN."""
    return (latitude >= -80) & (latitude <= 84) & (longitude >= -180) & (longitude <= 180)


def in_plane(east: np.ndarray, north: np.ndarray, *, zoned: np.ndarray | bool) -> np.ndarray:
    """Whether a plane holds points in metres, bool [n]: false where a value is NaN. `zoned` (bool [n], or one for all):
    the plane is that of a UTM zone, or else one of one's own (a simulator, a site survey)."""
    inside = [
        (east >= west) & (east <= most_east) & (north >= south) & (north <= most_north)
        for west, most_east, south, most_north in (_OF_ZONE, _OF_OWN_PLANE)
    ]
    return np.where(zoned, *inside)


def half_of(north: np.ndarray) -> bool | None:
    """Whether points lie in the southern plane, by their UTM northings (metres [n], n > 0) alone; None where these may
    be of either."""
    middle = np.median(north)
    return bool(middle > _SOUTHERN_ALONE) if not _NORTHERN_ALONE <= middle <= _SOUTHERN_ALONE else None


def join_at_equator(places: Places, southern: bool | None = None) -> None:
    """Count the northings of photos near the equator from one origin, in place, so that a city on it lies in one plane:
    the `southern`, the northern, or (None) that which most of them are in."""
    zoned = places.zones != 0
    south, north = zoned & (places.north > _SOUTHERN_ALONE), zoned & (places.north < _NORTHERN_ALONE)
    if southern is None:
        if not (south.any() and north.any()):
            return
        southern = bool(np.count_nonzero(south) > np.count_nonzero(north))
    if southern:
        places.north[north] += _EQUATOR
    else:
        places.north[south] -= _EQUATOR


def into_zone(places: Places, zone: int) -> Moves:
    """Carry photos of the neighbouring zones into the plane of `zone` (0: leave all in theirs), in place, each in its
    hemisphere.

    The easting of those that cannot be carried, or lie in no plane, becomes NaN.
    """
    east, north, zones = places.east, places.north, places.zones
    lost = np.flatnonzero(np.isfinite(east) & ~in_plane(east, north, zoned=zone != 0))
    east[lost] = np.nan
    others = np.flatnonzero((zones != 0) & (zones != zone)) if zone else np.empty(0, np.int64)
    others = others[np.isfinite(east[others])]
    near = zones_apart(zones[others], zone) == 1
    far, near = others[~near], others[near]
    southern = places.southern[near]
    for other in np.unique(zones[near]).tolist():
        for half in (True, False):
            rows = near[(zones[near] == other) & (southern == half)]
            if not len(rows):
                continue
            latitude, longitude = utm.to_latlon(east[rows], north[rows], other, northern=not half, strict=False)
            known = on_map(latitude, longitude)
            east[rows[~known]] = np.nan
            if known.any():
                east[rows[known]], north[rows[known]], _, _ = utm.from_latlon(
                    latitude[known], longitude[known], force_zone_number=zone, force_northern=not half
                )
    east[far] = np.nan
    nowhere = np.isnan(east[near])
    return Moves(near[~nowhere], far, np.sort(np.concatenate([lost, near[nowhere]])))


def nowhere_in(zone: int) -> str:
    """What is wrong with the places of `Moves.nowhere`, in words."""
    return f"nowhere in UTM zone {zone}" if zone else "farther from the origin than any plane of metres reaches"
