"""Lists in UTM metres: in which hemisphere a zone is, by its band, an EPSG code, the other rows or the northings."""

from pathlib import Path

import numpy as np
import pytest
import utm
from conftest import HERE, SETTINGS
from present import present
from test_sources import write_csv, write_listed

from preprocessing.build import build
from preprocessing.coordinates import locate
from preprocessing.sources import Source, list_named
from preprocessing.updates import add
from shards.console import JobError
from shards.dataset import Dataset

AUCKLAND, MADRID = (-36.85, 174.76), (40.42, -3.70)


def write_metres(folder: Path, place: tuple[float, float], zones: list[str]) -> tuple[Path, float, float]:
    """A list of photos at one place (degrees), one for each spelling of its zone; and its metres."""
    east, north, _, _ = utm.from_latlon(*place)
    paths = [f"{i}.jpg" for i in range(len(zones))]
    return (
        write_csv(folder / "list.csv", path=paths, east=[east] * len(zones), north=[north] * len(zones), zone=zones),
        float(east),
        float(north),
    )


@pytest.mark.parametrize(
    ("place", "zones", "southern"),
    [
        (AUCKLAND, ["60H", "60h", "32760", "EPSG:32760", "epsg:32760", "60 H"], True),
        (AUCKLAND, ["60H", "60", "60.0", "60"], True),
        (MADRID, ["30T", "32630", "30", "EPSG:32630"], False),
        (MADRID, ["30", "30.0"], False),
        ((-2.0, -79.9), ["17", "17"], True),  # 9.78 million metres: north of Svalbard, if it were of the north
    ],
    ids=["bands and codes", "as other rows tell", "north", "taken for north", "by the northing"],
)
def test_the_hemisphere_of_metres_is_that_of_band_code_other_rows_or_northing(
    tmp_path: Path, place: tuple[float, float], zones: list[str], southern: bool
) -> None:
    file, east, north = write_metres(tmp_path, place, zones)
    listing = list_named(file, tmp_path, 0)
    assert not listing.bad
    places = present(listing.places)
    assert places.southern.tolist() == [southern] * len(zones)
    assert np.allclose(places.east, east, atol=0.01)
    assert np.allclose(places.north, north, atol=0.01)


def test_several_zones_as_mere_numbers_are_refused_where_nothing_tells_the_hemisphere(tmp_path: Path) -> None:
    places = [utm.from_latlon(-20.5, longitude) for longitude in (-48.01, -47.99)]  # zones 22 and 23, 2 km apart
    columns = {"path": ["a.jpg", "b.jpg"], "east": [p[0] for p in places], "north": [p[1] for p in places]}
    numbers, told = (
        write_csv(tmp_path / f"{n}.csv", **columns, zone=z) for n, z in enumerate((["22", "23"], ["22K", "23"]))
    )
    with pytest.raises(
        JobError, match=r"0\.csv: the zones are mere numbers, .* \(10S\) or as an EPSG code \(32610 north"
    ):
        list_named(numbers, tmp_path, 0)
    moved, zone, _, bad = locate(list_named(told, tmp_path, 0), 0)
    assert (zone, bad) == (22, [])
    assert np.hypot(np.diff(moved.east), np.diff(moved.north)) == pytest.approx(2087, abs=5)


def test_rows_whose_band_is_wrong_tell_no_others_their_hemisphere(tmp_path: Path) -> None:
    places = [utm.from_latlon(-20.5, longitude) for longitude in (-48.01, -47.99)] * 2
    columns = {"path": [*"abcd"], "east": [p[0] for p in places], "north": [p[1] for p in places]}
    file = write_csv(tmp_path / "list.csv", **columns, zone=["22", "23", "22S", "23S"])
    with pytest.raises(JobError, match="the zones are mere numbers"):
        list_named(file, tmp_path, 0)


def test_a_code_that_lacks_a_digit_is_no_zone(tmp_path: Path) -> None:
    file, _, _ = write_metres(tmp_path, MADRID, ["32630", "3263", "3273", "EPSG:3261", "3", "03"])
    assert [(b.source, b.reason) for b in list_named(file, tmp_path, 0).bad] == [
        (f"{row}.jpg", "no UTM zone") for row in (1, 2, 3)
    ]


def test_a_band_that_means_the_south_is_set_aside_and_bands_near_their_edges_are_not(tmp_path: Path) -> None:
    north = [7390000.0, 7390000.0, 4182000.0, 3540000.0, 4420000.0, 9990000.0, 100.0, 7390000.0]
    zone = ["23S", "23K", "23S", "23S", "23S", "23N", "23M", "23"]
    paths = [f"{i}.jpg" for i in range(8)]
    listing = list_named(
        write_csv(tmp_path / "l.csv", path=paths, east=[333000.0] * 8, north=north, zone=zone), tmp_path, 0
    )
    assert [(b.source, b.reason) for b in listing.bad] == [("0.jpg", "northing of another band of latitude")]


def test_photos_added_by_the_mere_number_of_a_zone_are_in_the_hemisphere_of_the_data_set(tmp_path: Path) -> None:
    first, later = write_listed(tmp_path / "first", 20), write_listed(tmp_path / "later", 20)
    east, north, _, _ = utm.from_latlon(-20.5, -48.01)
    beyond, level, _, _ = utm.from_latlon(-20.5, -47.99)  # in zone 23
    place = write_csv(tmp_path / "first.csv", path=first, east=[east] * 20, north=[north] * 20, zone=["22K"] * 20)
    build(Source.of(place, tmp_path / "first"), tmp_path / "out", SETTINGS, HERE)
    place = write_csv(tmp_path / "later.csv", path=later, east=[beyond] * 20, north=[level] * 20, zone=["23"] * 20)
    add(Source.of(place, tmp_path / "later"), tmp_path / "out", HERE)
    classes = Dataset.open(tmp_path / "out").classes
    assert (len(classes), classes.southern) == (2, True)
    assert np.hypot(np.ptp(classes.cell_east), np.ptp(classes.cell_north)) == pytest.approx(2087, abs=40)
