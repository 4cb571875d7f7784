"""Photo names: every form that real data sets have, and the fast path against the plain one."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards.names import BadName, PhotoName, format_name, hash_names, names_and_keys, parse_name, parse_utm

SF_XL = "@0544388.51@4172758.25@10@S@037.70098@-122.49646@kPnABhWJ1kA61eMNPLs1vQ@@210@@@@201606@@.jpg"


def test_every_field_of_an_sf_xl_name_is_read():
    assert parse_name(SF_XL) == PhotoName(
        544388.51, 4172758.25, 10, "S", 37.70098, -122.49646, "kPnABhWJ1kA61eMNPLs1vQ", "", 210.0, "201606"
    )


@pytest.mark.parametrize(
    ("name", "pano", "heading", "timestamp"),
    [
        ("@0549678.37@4180874.60@10@S@037.77386@-122.43590@bZ1VXzxFCSKi9wcz8H5pZA0@201311.jpg",
         "bZ1VXzxFCSKi9wcz8H5pZA0", None, "201311"),
        ("@0381523.71@3946790.15@54@S@035.65786@0139.69112@00687.jpg@@@@@@@@.jpg", "00687.jpg", None, ""),
        ("@0381418.20@3946450.42@54@S@035.65478@0139.69001@JHVdmPpMNQcjBfR7qsWEtA@04@@@@@@@.jpg",
         "JHVdmPpMNQcjBfR7qsWEtA", None, ""),
        ("@1.50@-2.25@anything@.jpg", "", None, ""),
    ],
)  # fmt: skip
def test_older_and_shorter_names_are_read(name, pano, heading, timestamp):
    read = parse_name(name)
    assert (read.pano, read.heading, read.timestamp) == (pano, heading, timestamp)


def test_only_the_base_name_counts():
    assert parse_name("city@home/37@70/" + SF_XL) == parse_name(SF_XL)


@pytest.mark.parametrize("extension", [".jpg", ".JPG", ".jpeg", ".png"])
def test_every_extension_is_read(extension):
    assert parse_name(f"@1.5@2.5@{extension}").extension == extension


@pytest.mark.parametrize("name", ["", "photo.jpg", "@5@.jpg", "@nan@1@.jpg", "@1e5@2@.jpg", "@1_0@2@.jpg", "@@@.jpg"])
def test_a_name_without_plain_coordinates_is_refused(name):
    with pytest.raises(BadName):
        parse_name(name)


def test_a_name_survives_being_written_and_read():
    assert format_name(parse_name(SF_XL)) == SF_XL


NUMBERS = st.one_of(
    st.text("0123456789.+-", max_size=16), st.sampled_from(["0544388.51", "nan", "1e3", "", " 1", "1.2.3", "١"])
)
NAMES = st.builds(
    lambda folder, fields, tail: folder + "@".join(["", *fields]) + tail,
    st.sampled_from(["", "a/", "a@b/", "x.y/z/"]),
    st.lists(st.one_of(NUMBERS, st.sampled_from(["10", "61", "S", "M", "N", "I", "7"])), max_size=8),
    st.sampled_from([".jpg", "@.jpg", "@", "", "@\u00e9.jpg"]),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(NAMES, min_size=1, max_size=8))
def test_the_fast_path_agrees_with_the_plain_one(names):
    east, north, zone, southern = parse_utm(pa.array(names, pa.large_string()))
    for i, name in enumerate(names):
        try:
            plain = parse_name(name)
            expected = (plain.east, plain.north, plain.zone or 0, "" < plain.band < "N")
        except BadName:
            expected = (math.nan, math.nan, 0, False)
        np.testing.assert_array_equal((east[i], north[i], zone[i], southern[i]), expected, err_msg=name)


@settings(deadline=None)
@given(st.integers(0, 28), st.characters(codec="ascii"), st.integers(0, 40))
def test_a_full_name_with_one_other_character_is_read_as_the_plain_path_reads_it(at, character, cut):
    names = ["a/" + SF_XL, "a/" + SF_XL[:at] + character + SF_XL[at + 1 :], "a/" + SF_XL[: 40 - cut]]
    for some in (names[:1], names[:2], names[2:], names[1:2]):
        read = zip(*parse_utm(pa.array(some, pa.large_string())), strict=True)
        for name, found in zip(some, read, strict=True):
            try:
                plain = parse_name(name)
                expected = (plain.east, plain.north, plain.zone or 0, "" < plain.band < "N")
            except BadName:
                expected = (math.nan, math.nan, 0, False)
            np.testing.assert_array_equal(found, expected, err_msg=name)


def test_the_fast_path_agrees_over_many_names_and_a_slice():
    rng = np.random.default_rng(0)
    names = [
        f"37.70/@{e:010.2f}@{n:010.2f}@{z:02d}@{'MNS'[i % 3]}@037.7@-122.4@id{i}@@210@@@@201606@@.jpg"
        for i, (e, n, z) in enumerate(
            zip(rng.uniform(1e5, 9e5, 40_000), rng.uniform(0, 1e7, 40_000), rng.integers(1, 61, 40_000), strict=True)
        )
    ]
    east, north, zone, southern = parse_utm(pa.array(names, pa.large_string()).slice(7))
    for i in range(0, len(east), 501):
        plain = parse_name(names[i + 7])
        assert (east[i], north[i], zone[i], southern[i]) == (plain.east, plain.north, plain.zone, plain.band < "N")


def test_hashes_depend_on_the_whole_base_name_and_on_nothing_else():
    names = ["a/" + SF_XL, "b/c/" + SF_XL, SF_XL.replace("210", "211"), SF_XL + "x", "x", "", "12345678", "123456780"]
    hashes = hash_names(pa.array(names, pa.large_string()))
    assert hashes[0] == hashes[1]
    assert len(set(hashes.tolist())) == len(names) - 1
    for longest in ("", "x" * 300):  # whatever is beside it
        beside = pa.array([*names, *[longest] * 20_000, *names], pa.large_string())
        assert hash_names(beside)[: len(names)].tolist() == hashes.tolist()
        assert hash_names(beside)[-len(names) :].tolist() == hashes.tolist()


def test_data_sets_of_earlier_versions_have_their_photos_in_the_same_order():
    """Those whose names differ in length too: a repair makes a lost shard of the photos that it had."""
    names = pa.array(["IMG_1.jpg", "a/IMG_00000000002.jpg", "IMG_3.jpeg"], pa.large_string())
    assert names_and_keys(names)[1].tolist() == [260795593125168008, 11492212945409131637, 6469816647127138910]
