"""Places in degrees: distinct answers for a photo, and where the photo itself says that it was taken."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import utm

from evaluation.ranking import Answers
from shards.classes import ClassTable
from shards.names import BadName, parse_name
from shards.plane import on_map
from shards.upright import open_photo

_GPS_TAG = 0x8825
_EARTH_RADIUS = 6_371_008.8


@dataclass(frozen=True)
class KnownPosition:
    """Where a photo was taken, in degrees, by its EXIF GPS (`source` "exif") or its name ("name")."""

    source: str
    latitude: float
    longitude: float


@dataclass(frozen=True)
class Place:
    """An answer: degrees (None without a UTM zone), UTM metres, its cell, a probability and a radius in metres.

    `distance_m` is the distance to the known position, None where there is none.
    """

    latitude: float | None
    longitude: float | None
    east: float
    north: float
    group: int
    label: int
    confidence: float
    uncertainty_m: float
    distance_m: float | None


def top_places(
    answers: Answers,
    i: int,
    classes: ClassTable,
    *,
    count: int,
    apart: float,
    known: KnownPosition | None = None,
) -> list[Place]:
    """The places of photo `i`: the `distinct` ones among its answers."""
    rows = answers.rows[i]
    centers = classes.take(rows).centers()
    kept = distinct(rows, classes, count=count, apart=apart)
    latitude, longitude = classes.to_latlon(centers[kept, 0], centers[kept, 1])
    places = []
    for rank, lat, lon in zip(kept, latitude.tolist(), longitude.tolist(), strict=True):
        located = not math.isnan(lat)
        distance = great_circle(lat, lon, known.latitude, known.longitude) if located and known else None
        places.append(
            Place(
                lat if located else None,
                lon if located else None,
                float(centers[rank, 0]),
                float(centers[rank, 1]),
                int(classes.group[rows[rank]]),
                int(classes.label[rows[rank]]),
                float(answers.confidence[i, rank]),
                float(answers.uncertainty[i, rank]),
                distance,
            )
        )
    return places


def distinct(rows: np.ndarray, classes: ClassTable, *, count: int, apart: float) -> list[int]:
    """The first `count` ranks of classes (int64 [K], best first) more than `apart` metres from every better one."""
    centers = classes.take(rows).centers()
    kept: list[int] = []
    for rank, center in enumerate(centers):
        if len(kept) == count:
            break
        if all(math.dist(center, centers[better]) > apart for better in kept):
            kept.append(rank)
    return kept


def great_circle(latitude: float, longitude: float, other_latitude: float, other_longitude: float) -> float:
    """Metres between two points in degrees on a sphere (haversine); within 0.5 % of the ellipsoid's distance."""
    phi, other_phi = math.radians(latitude), math.radians(other_latitude)
    half = math.sin((other_phi - phi) / 2) ** 2
    half += math.cos(phi) * math.cos(other_phi) * math.sin(math.radians(other_longitude - longitude) / 2) ** 2
    return 2 * _EARTH_RADIUS * math.asin(math.sqrt(min(half, 1.0)))


def known_position(
    path: Path, zone: int, *, southern: bool = False, content: BinaryIO | None = None
) -> KnownPosition | None:
    """Where the photo's EXIF GPS or, failing that, its name says that it was taken.

    A name without a zone is taken to lie in `zone` (0: such names say nothing). `content`: the photo, where `path` is
    but its name.
    """
    return exif_position(content or path) or _named_position(path, zone, southern)


def exif_position(photo: Path | BinaryIO) -> KnownPosition | None:
    """The GPS position in a photo's EXIF data; None where there is none that makes sense."""
    try:
        with open_photo(photo) as image:
            gps = image.getexif().get_ifd(_GPS_TAG)
        latitude = _degrees(gps[2]) * {"N": 1, "S": -1}[_letter(gps[1])]
        longitude = _degrees(gps[4]) * {"E": 1, "W": -1}[_letter(gps[3])]
    except Exception:  # Pillow raises anything on hostile bytes; none of it may stop a long job
        return None
    if not (abs(latitude) <= 90 and abs(longitude) <= 180) or latitude == longitude == 0:
        return None
    return KnownPosition("exif", latitude, longitude)


def east_north(known: KnownPosition, zone: int, *, southern: bool) -> tuple[float, float] | None:
    """Easting and northing of a known position in the plane of UTM `zone`, metres; None without a zone or too far
    from it."""
    if not zone:
        return None
    try:
        east, north, _, _ = utm.from_latlon(
            known.latitude, known.longitude, force_zone_number=zone, force_northern=not southern
        )
    except (utm.OutOfRangeError, ValueError):
        return None
    return float(east), float(north)


def _degrees(value: object) -> float:
    degrees, minutes, seconds = (float(part) for part in value)  # type: ignore[attr-defined]
    return degrees + minutes / 60 + seconds / 3600


def _letter(value: object) -> str:
    return (value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)).strip("\0 ").upper()[:1]


def _named_position(path: Path, zone: int, southern: bool) -> KnownPosition | None:
    try:
        name = parse_name(path.name)
    except BadName:
        return None
    zone, southern = (name.zone, name.band < "N") if name.zone else (zone, southern)
    if not zone:
        return None
    try:
        latitude, longitude = utm.to_latlon(name.east, name.north, zone, northern=not southern, strict=False)
    except (utm.OutOfRangeError, ValueError):
        return None
    if not on_map(latitude, longitude):
        return None
    return KnownPosition("name", float(latitude), float(longitude))
