"""Zones and hemispheres: names and lists in degrees or UTM metres come into one plane, whatever tells where it is."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import utm
from conftest import HERE, SETTINGS
from photos import jpeg, samples, write_csv, write_listed
from present import present

from preprocessing.build import build, dry_run
from preprocessing.coordinates import identify, locate
from preprocessing.sources import Source, list_named
from preprocessing.summaries import print_forecast, print_summary
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
        ((48.1, 11.5), ["25832", "EPSG:25832", "25832.0", "epsg:25832"], False),
        ((38.9, -77.0), ["26918", "EPSG:26918", "18"], False),
        ((-33.87, 151.21), ["28356", "EPSG:28356", "7856", "EPSG:7856", "56"], True),
        ((52.52, 13.4), ["33U"], False),
        ((59.91, 10.75), ["32V"], False),
        ((64.15, -21.94), ["27W"], False),
        ((78.22, 15.65), ["33X"], False),
        ((-2.0, -79.9), ["17", "17"], True),  # 9.78 million metres: north of Svalbard, if it were of the north
    ],
    ids=[
        "bands and codes",
        "as other rows tell",
        "north",
        "taken for north",
        "ETRS89",
        "NAD83",
        "GDA94 and GDA2020",
        "band U",
        "band V",
        "band W",
        "band X",
        "by the northing",
    ],
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
    listing = list_named(told, tmp_path, 0)
    moved, zone, bad = locate(listing, identify(listing)[0], 0)
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


@pytest.mark.parametrize(
    ("first", "last", "zone"),
    [(32601, 32660, 1), (32701, 32760, 1), (25828, 25838, 28), (26901, 26923, 1), (28346, 28359, 46), (7846, 7859, 46)],
)
def test_the_zones_of_a_datum_end_where_its_codes_do(tmp_path: Path, first: int, last: int, zone: int) -> None:
    codes = [str(code) for code in range(first - 1, last + 2)]
    listing = list_named(write_metres(tmp_path, (-45.0, 3.0), codes)[0], tmp_path, 0)
    assert [b.source for b in listing.bad] == ["0.jpg", f"{len(codes) - 1}.jpg"]
    assert present(listing.places).zones.tolist() == list(range(zone, zone + last - first + 1))


@pytest.mark.parametrize("text", ["31467", "Zone 32 Nord", "61", "EPSG:32"])
def test_a_zone_that_is_not_understood_is_shown_with_the_forms_that_are(tmp_path: Path, text: str) -> None:
    file, _, _ = write_metres(tmp_path, MADRID, [text, "x"])
    with pytest.raises(
        JobError, match=rf"2 no UTM zone; e\.g\. 0\.jpg: .*zone={text}; a zone is written 10, 10S or as"
    ):
        list_named(file, tmp_path, 0)


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


def test_a_list_south_of_the_equator_makes_a_class_map_that_says_so(tmp_path):
    names = write_listed(tmp_path / "photos", 30)
    more = write_listed(tmp_path / "more", 30)
    at = {"latitude": [-33.9] * 30, "longitude": [151.2] * 30}
    place = write_csv(tmp_path / "list.csv", path=names, **at)
    build(Source.of(place, tmp_path / "photos"), tmp_path / "out", SETTINGS, HERE)
    assert Dataset.open(tmp_path / "out").classes.southern
    at = {"latitude": [-33.91] * 30, "longitude": [151.2] * 30}
    add(Source.of(write_csv(tmp_path / "more.csv", path=more, **at), tmp_path / "more"), tmp_path / "out", HERE)
    classes = Dataset.open(tmp_path / "out").classes
    assert (len(classes), classes.southern, classes.crs) == (2, True, "UTM zone 56 south, metres")


def test_where_the_classes_lie_and_that_some_lie_far_away_is_told(tmp_path, capsys):
    names = write_listed(tmp_path / "photos", 45)
    at = {"latitude": [48.14] * 33 + [49.05] * 12, "longitude": [11.58] * 45}
    source = Source.of(write_csv(tmp_path / "list.csv", path=names, **at), tmp_path / "photos")
    print_forecast(dry_run(source, tmp_path / "out", SETTINGS, HERE), "out")
    print_summary(build(source, tmp_path / "out", SETTINGS, HERE), "out")
    said = capsys.readouterr().out
    assert said.count("south to north, around latitude 48.595, longitude 11.580\n") == 2
    assert "plane       UTM zone 32 north, metres; " in said
    assert said.count("far away    2 classes of 2, up to 51 km from the middle: WRONG COORDINATES?\n") == 2
    at["latitude"][33:] = [48.145] * 12
    source = Source.of(write_csv(tmp_path / "list.csv", path=names, **at), tmp_path / "photos")
    print_forecast(dry_run(source, tmp_path / "other", SETTINGS, HERE), "other")
    assert "far away" not in capsys.readouterr().out


@pytest.mark.parametrize("zone", [1, 60])
def test_the_zone_of_names_is_that_of_the_map_at_the_ends_of_the_earth_too(tmp_path, zone):
    (tmp_path / "photos").mkdir()
    for i in range(12):
        (tmp_path / "photos" / f"@334000.5@6249000.5@{zone}@V@{i}@.jpg").write_bytes(jpeg(96, i))
    build(Source.of(tmp_path / "photos"), tmp_path / "out", SETTINGS, HERE)
    assert Dataset.open(tmp_path / "out").manifest.utm_zone == zone


@pytest.mark.parametrize(("band", "southern"), [("H", True), ("N", False), ("", False)])
def test_names_say_by_their_band_whether_a_city_lies_south_of_the_equator(tmp_path, band, southern):
    (tmp_path / "photos").mkdir()
    for i in range(12):
        (tmp_path / "photos" / f"@334000.5@6249000.5@56@{band}@{i}@.jpg").write_bytes(jpeg(96, i))
    build(Source.of(tmp_path / "photos"), tmp_path / "out", SETTINGS, HERE)
    assert Dataset.open(tmp_path / "out").classes.southern == southern


def test_latitude_and_longitude_become_metres_of_the_zone_most_photos_are_in(tmp_path):
    names = write_listed(tmp_path, 40)
    latitude = np.full(40, 37.7)
    longitude = -120 + (np.arange(40) - 30.5) * 1e-6  # 31 in zone 10, 9 in zone 11
    place = write_csv(tmp_path / "list.csv", path=names, latitude=latitude, longitude=longitude)
    build(Source.of(place), tmp_path / "out", SETTINGS, HERE)
    dataset = Dataset.open(tmp_path / "out")
    assert (dataset.manifest.utm_zone, dataset.manifest.images, dataset.manifest.classes) == (10, 40, 1)
    assert not dataset.classes.southern
    for row in samples(tmp_path / "out"):
        i = names.index(row["source"])
        expected = utm.from_latlon(latitude[i], longitude[i], force_zone_number=10)[:2]
        assert np.allclose((row["east"], row["north"]), expected, atol=1e-6)
    build(Source.of(place), tmp_path / "forced", replace(SETTINGS, zone=11), HERE)
    assert Dataset.open(tmp_path / "forced").manifest.utm_zone == 11


def test_a_city_on_the_equator_lies_in_one_plane(tmp_path):
    names = write_listed(tmp_path, 20)
    latitude = (np.arange(20) - 5) * 2e-6
    place = write_csv(tmp_path / "list.csv", path=names, latitude=latitude, longitude=np.full(20, 36.001))
    listing = list_named(place, tmp_path, 0)
    assert np.ptp(present(listing.places).north) < 10


def write_on_equator(folder: Path, latitudes: np.ndarray) -> list[str]:
    """Photos at 36.001 degrees east, named by their UTM position in the plane of their own hemisphere."""
    folder.mkdir()
    names = []
    for i, latitude in enumerate(latitudes):
        east, north, zone, band = utm.from_latlon(latitude, 36.001)
        names.append(f"@{east:010.2f}@{north:010.2f}@{zone}@{band}@{i}@.jpg")
        (folder / names[-1]).write_bytes(jpeg(96, i))
    return names


@pytest.mark.parametrize("most", ["N", "M"])
def test_a_city_on_the_equator_lies_in_one_plane_by_names_and_by_metres_too(tmp_path, most):
    side = {"N": 1, "M": -1}[most]
    latitudes = side * 9.04e-6 * np.array([*range(1, 18), *range(-12, 0)])  # metres from the equator
    names = write_on_equator(tmp_path / "photos", latitudes)
    fields = [name.split("@") for name in names]
    metres = write_csv(
        tmp_path / "metres.csv",
        path=names,
        east=[f[1] for f in fields],
        north=[f[2] for f in fields],
        zone=[f[3] + f[4] for f in fields],
    )
    degrees = write_csv(tmp_path / "degrees.csv", path=names, latitude=latitudes, longitude=[36.001] * len(names))
    north = {}
    for kind, place in (("names", tmp_path / "photos"), ("metres", metres), ("degrees", degrees)):
        build(Source.of(place, tmp_path / "photos"), tmp_path / kind, SETTINGS, HERE)
        made = Dataset.open(tmp_path / kind)
        assert (made.classes.southern, made.manifest.images) == (most == "M", len(names))
        origin = 1e7 if most == "M" else 0
        assert sorted(made.classes.cell_north - origin) == [-20, 0]
        north[kind] = [row["north"] - origin for row in sorted(samples(tmp_path / kind), key=lambda row: row["source"])]
    assert np.allclose(north["names"], north["degrees"], atol=0.02)
    assert np.allclose(north["metres"], north["names"])


def test_photos_beyond_the_equator_are_added_in_the_plane_of_the_data_set(tmp_path):
    write_on_equator(tmp_path / "photos", 9.04e-6 * np.arange(1, 13))
    write_on_equator(tmp_path / "more", -9.04e-6 * np.arange(1, 13))
    build(Source.of(tmp_path / "photos"), tmp_path / "out", SETTINGS, HERE)
    add(Source.of(tmp_path / "more"), tmp_path / "out", HERE)
    classes = Dataset.open(tmp_path / "out").classes
    assert not classes.southern
    assert sorted(classes.cell_north) == [-20, 0]


def test_several_zones_in_metres_are_carried_into_one_plane_south_of_the_equator_too(tmp_path):
    names = write_listed(tmp_path, 30)
    longitude = 150 + (np.arange(30) - 20.5) * 1e-6  # zones 55 and 56
    points = [utm.from_latlon(-33.9, x) for x in longitude]
    place = write_csv(
        tmp_path / "list.csv",
        path=names,
        east=[p[0] for p in points],
        north=[p[1] for p in points],
        zone=[f"{p[2]}{p[3]}" for p in points],
    )
    build(Source.of(place), tmp_path / "out", SETTINGS, HERE)
    made = Dataset.open(tmp_path / "out")
    assert (made.manifest.utm_zone, made.manifest.classes, made.manifest.images) == (55, 1, 30)


def test_a_zone_may_be_written_as_a_decimal_number(tmp_path):
    names = write_listed(tmp_path, 4)
    (tmp_path / "list.csv").write_text(f"path;east;north;zone\n{names[0]};5e5;4e6;10.0\n{names[1]};5e5;4e6;10,0\n"
                                       f"{names[2]};5e5;4e6;\n{names[3]};5e5;4e6;10.5\n")  # fmt: skip
    listing = list_named(tmp_path / "list.csv", tmp_path, 0)
    assert present(listing.places).zones.tolist() == [10, 10, 0]
    assert {b.source: b.reason for b in listing.bad} == {names[3]: "no UTM zone"}
