"""Where photos were taken, brought into one plane: that of a UTM zone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import utm

from shards.names import parse_name


@dataclass
class Places:
    """Where and when photos were taken, row by row, [n]: `east` and `north` in metres (float64, NaN where unusable),
    `zones` (int8, 0 where unknown), `southern` (bool), `heading` in degrees (float32, NaN where unknown) and
    `timestamp` (string). None: the names say it."""

    east: np.ndarray
    north: np.ndarray
    zones: np.ndarray
    southern: np.ndarray | None = None
    heading: np.ndarray | None = None
    timestamp: pa.Array | None = None


class Moves(NamedTuple):
    """Rows (int64, ascending) that `into_zone` carried into its zone, those of zones too far away, and those of a
    neighbouring zone that lie nowhere on its map."""

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


def into_zone(places: Places, paths: Sequence[str] | pa.Array, zone: int) -> Moves:
    """Carry photos of the neighbouring zones into the plane of `zone`, in place, each in its hemisphere.

    The easting of those that cannot be carried becomes NaN. `paths` tells the hemisphere where `places` do not.
    """
    east, north, zones = places.east, places.north, places.zones
    others = np.flatnonzero((zones != 0) & (zones != zone))
    others = others[np.isfinite(east[others])]
    near = zones_apart(zones[others], zone) == 1
    far, near = others[~near], others[near]
    if places.southern is not None:
        southern = places.southern[near]
    else:
        southern = np.array([parse_name(str(paths[row])).band < "N" for row in near], bool)
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
    return Moves(near[~nowhere], far, near[nowhere])
