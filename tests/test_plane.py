"""Zones of UTM, and photos carried from one into another."""

import math

import numpy as np
import pyarrow as pa
import pytest
import utm

from shards.names import parse_utm
from shards.plane import Places, in_plane, into_zone, zone_of


def test_zones_agree_with_the_utm_package_everywhere() -> None:
    latitude, longitude = (a.ravel() for a in np.meshgrid(np.arange(-79.5, 84, 1.7), np.arange(-180, 180, 1.0)))
    expected = [utm.latlon_to_zone_number(*point) for point in zip(latitude, longitude, strict=True)]
    assert zone_of(latitude, longitude).tolist() == expected


@pytest.mark.parametrize(
    ("latitude", "border", "zones"),
    [(37.7, -120.0, (10, 11)), (-33.9, 150.0, (55, 56)), (-17.8, 180.0, (60, 1)), (0.0, 36.0, (36, 37))],
)
def test_points_on_both_sides_of_a_border_come_as_near_to_each_other_as_they_are(
    latitude: float, border: float, zones: tuple[int, int]
) -> None:
    step = 1e-4 * np.arange(-5, 6)
    longitude = (border + step + 180) % 360 - 180
    points = [utm.from_latlon(latitude + 1e-9, x) for x in longitude]
    names = pa.array([f"@{e:.4f}@{n:.4f}@{zone}@{band}@.jpg" for e, n, zone, band in points], pa.large_string())
    for into in zones:
        east, north, zone = (np.array([point[i] for point in points]) for i in range(3))
        known = Places(east.copy(), north.copy(), zone.astype(np.int8), np.array([p[3] < "N" for p in points]))
        named = Places(*parse_utm(names))
        for places in (known, named):
            moves = into_zone(places, into)
            assert moves.carried.tolist() == np.flatnonzero(zone != into).tolist()
            assert len(moves.far) == len(moves.nowhere) == 0
            metres = np.hypot(np.diff(places.east), np.diff(places.north))
            np.testing.assert_allclose(metres, 1e-4 * 111_320 * np.cos(np.radians(latitude)), rtol=2e-3)


def test_a_photo_keeps_its_hemisphere_at_the_equator() -> None:
    points = [utm.from_latlon(latitude, 36.001) for latitude in (2e-5, -2e-5)]  # zone 37, bands N and M
    names = [f"@{east:.4f}@{north:.4f}@{zone}@{band}@.jpg" for east, north, zone, band in points]
    places = Places(*parse_utm(pa.array(names, pa.large_string())))
    into_zone(places, 36)
    assert places.north == pytest.approx([2.2, 1e7 - 2.2], abs=0.05)


def test_photos_of_far_zones_and_photos_off_the_map_are_told_apart() -> None:
    zones = np.array([10, 11, 11, 54, 0, 12], np.int8)
    east = np.array([5e5, 2e5, 5e5, 3e5, 5e5, np.nan])
    north = np.array([4e6, 4e6, 9.9e7, 4e6, 4e6, 4e6])
    places = Places(east, north, zones, np.zeros(6, bool))
    moves = into_zone(places, 10)
    assert [rows.tolist() for rows in moves] == [[1], [3], [2]]
    assert np.isnan(places.east).tolist() == [False, False, True, True, False, True]
    assert places.east[[0, 4]].tolist() == [5e5, 5e5]
    alone = Places(np.array([5e5]), np.array([9.9e7]), np.array([11], np.int8), np.array([False]))
    assert [rows.tolist() for rows in into_zone(alone, 10)] == [[], [], [0]]


@pytest.mark.parametrize(
    ("east", "north", "zoned", "expected"),
    [
        (166_000, 0, True, True),
        (-505_000, -600_000, True, True),  # the next zone's, at the equator; of the other hemisphere
        (1_505_000, 11_100_000, True, True),
        (54_438_851, 4_172_700, True, False),  # a lost decimal point
        (544_388, 417_270_000, True, False),
        (2_600_000, 1_200_000, False, True),  # a plane of one's own, such as Switzerland's
        (999_999_999_999, 0, False, False),
        (0, -1e11, False, False),
        (math.nan, 0, False, False),
    ],
)
def test_what_no_plane_holds_is_told_from_what_one_does(east: float, north: float, zoned: bool, expected: bool) -> None:
    assert in_plane(np.array([east]), np.array([north]), zoned=zoned).tolist() == [expected]
    assert in_plane(np.array([east]), np.array([north]), zoned=np.array([zoned])).tolist() == [expected]


def test_photos_beyond_any_plane_are_nowhere_in_a_zone_and_without_one() -> None:
    east = [5e5, 5.4e7, 2.6e6, 1e11]  # a lost decimal point, a plane of one's own, and beyond any
    for zone, zones, lost in ((10, [10, 10, 0, 11], [1, 2, 3]), (0, [0, 11, 0, 0], [3])):
        places = Places(np.array(east), np.full(4, 4e6), np.array(zones, np.int8), np.zeros(4, bool))
        moves = into_zone(places, zone)
        assert [rows.tolist() for rows in moves] == [[], [], lost]
        assert np.flatnonzero(np.isnan(places.east)).tolist() == lost
