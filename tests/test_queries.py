"""Query photos: names, UTM zones, decoding, batches of one shape."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pytest
import torchvision.transforms.functional as F
import utm
from PIL import Image

from evaluation.places import exif_position
from evaluation.thumbnails import data_url
from shards.console import JobError
from shards.names import PhotoName, format_name
from training.queries import QueryBatch, decode_query, list_queries, query_size, read_queries

LATITUDE, LONGITUDE = 37.75, -120.01  # near the border of zones 10 and 11


def save(path: Path, width: int = 40, height: int = 30, mode: str = "RGB", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


def named(folder: Path, east: float, north: float, zone: int | None, name: str = "a") -> Path:
    photo = PhotoName(east, north, zone, "S" if zone else "", 37.7, -122.4, name)
    return folder / (format_name(photo) if zone else f"@{east}@{north}@{name}@.jpg")


def read(paths: list[Path], **options: int) -> tuple[list[QueryBatch], dict[int, str]]:
    failures: dict[int, str] = {}
    settings = {"shorter_side": 24, "batch_size": 4, "threads": 2} | options
    return list(read_queries(paths, on_failure=failures.__setitem__, **settings)), failures


def test_photos_are_found_in_all_folders_and_sorted(tmp_path: Path) -> None:
    for name in ("b/@1@2@x@.JPG", "a/@1@2@x@.png", "@1@2@x@.jpeg"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("")
    found = list_queries(tmp_path, 0)
    assert [p.relative_to(tmp_path).as_posix() for p in found.paths] == [
        "@1@2@x@.jpeg",
        "a/@1@2@x@.png",
        "b/@1@2@x@.JPG",
    ]
    assert found.east.tolist() == [1.0] * 3


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    for name in ("q/@1@2@.jpg", "q/sub/@3@4@.jpg", "other/@5@6@.jpg"):
        save(tmp_path / name)
    (tmp_path / "q" / "sub" / "up").symlink_to(tmp_path / "q")
    (tmp_path / "q" / "aside").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "q")
    found = [path.relative_to(tmp_path / "q").as_posix() for path in list_queries(tmp_path / "q", 0).paths]
    assert found == ["@1@2@.jpg", "aside/@5@6@.jpg", "sub/@3@4@.jpg"]


@pytest.mark.parametrize("make", [False, True])
def test_no_folder_and_no_photos_are_clear_errors(tmp_path: Path, make: bool) -> None:
    folder = tmp_path / "q"
    if make:
        folder.mkdir()
    with pytest.raises(JobError, match="no photos found" if make else "no such folder"):
        list_queries(folder, 10)


def test_a_query_of_the_next_zone_is_reprojected_to_the_metre(tmp_path: Path) -> None:
    east, north, zone, _ = utm.from_latlon(LATITUDE, LONGITUDE, force_zone_number=11)
    save(named(tmp_path, east, north, zone))
    queries = list_queries(tmp_path, 10)
    expected = utm.from_latlon(LATITUDE, LONGITUDE, force_zone_number=10)
    assert queries.reprojected == 1
    np.testing.assert_allclose([queries.east[0], queries.north[0]], expected[:2], atol=0.05)


def test_a_query_of_a_far_zone_is_set_aside_with_its_reason(tmp_path: Path) -> None:
    save(named(tmp_path, 381523.71, 3946790.15, 54))
    queries = list_queries(tmp_path, 10)
    assert len(queries) == 0
    assert "zone 54" in queries.set_aside[0].reason
    assert queries.advice == ""


@pytest.mark.parametrize(("zone", "reason"), [(10, "nowhere in UTM zone 10, that of the classes"), (0, "farther from")])
def test_a_query_where_no_plane_is_is_set_aside(tmp_path: Path, zone: int, reason: str) -> None:
    save(tmp_path / "@544388@4178000@10@S@a@.jpg")
    save(tmp_path / "@99999999999@4178000@10@S@b@.jpg")
    queries = list_queries(tmp_path, zone)
    assert queries.east.tolist() == [544388]
    assert [aside.reason[: len(reason)] for aside in queries.set_aside] == [reason]


def test_queries_without_coordinates_are_kept_and_not_located(tmp_path: Path) -> None:
    save(tmp_path / "holiday.jpg")
    save(named(tmp_path, 544000.0, 4180000.0, None))
    queries = list_queries(tmp_path, 10)
    assert queries.located.tolist() == [True, False]


def write_list(file: Path, **columns: list[Any]) -> Path:
    """A list, and a file for each of its photos."""
    csv.write_csv(pa.table(columns), file)
    for name in columns["path"]:
        (file.parent / name).touch() if name.strip() else None
    return file


def test_queries_of_a_list_lie_where_the_same_photos_by_their_names_do(tmp_path: Path) -> None:
    points = [(LATITUDE + i * 1e-4, LONGITUDE + i * 5e-3) for i in range(5)]  # zones 10 and 11
    photos = []
    for i, point in enumerate(points):
        east, north, zone, _ = utm.from_latlon(*point)
        photos.append(save(named(tmp_path / "q", east, north, zone, str(i))))
        save(tmp_path / f"{i}.jpg")
    latitude, longitude = ([point[k] for point in points] for k in (0, 1))
    by_name = list_queries(tmp_path / "q", 10)
    order = np.argsort([path.name for path in photos])
    assert by_name.reprojected > 0
    degrees = write_list(
        tmp_path / "degrees.csv", path=[f"{i}.jpg" for i in range(5)], latitude=latitude, longitude=longitude
    )
    utm_metres = [utm.from_latlon(*point) for point in points]
    metres = write_list(
        tmp_path / "metres.csv",
        path=[str(path) for path in photos],
        east=[p[0] for p in utm_metres],
        north=[p[1] for p in utm_metres],
        zone=[f"{p[2]}{p[3]}" for p in utm_metres],
    )
    for some, names in ((degrees, [f"{i}.jpg" for i in range(5)]), (metres, [str(path) for path in photos])):
        listed = list_queries(some, 10)
        assert (listed.source, listed.names) == (some, tuple(names))
        assert listed.paths == tuple(tmp_path / name for name in names)
        np.testing.assert_allclose(listed.east[order], by_name.east, atol=0.05)
        np.testing.assert_allclose(listed.north[order], by_name.north, atol=0.05)


def test_rows_of_a_list_without_a_place_are_kept_and_those_far_away_or_without_a_path_set_aside(tmp_path: Path) -> None:
    rows = [("a.jpg", "37.75", "-122.4"), ("b.jpg", "", ""), ("c.jpg", "48.2", "16.4"), ("", "37.75", "-122.4")]
    rows.append(("d.jpg", "0.0", "-0"))
    path, latitude, longitude = (list(column) for column in zip(*rows, strict=True))
    file = write_list(tmp_path / "list.csv", path=path, latitude=latitude, longitude=longitude)
    queries = list_queries(file, 10)
    assert queries.names == ("a.jpg", "b.jpg", "d.jpg")
    assert queries.located.tolist() == [True, False, False]
    assert [photo.reason for photo in queries.unlocated(np.ones(3, bool))] == [
        "no coordinates (latitude=, longitude=; coordinates are decimal numbers, negative in the south and west)",
        "no GPS fix (latitude=0.0, longitude=-0)",
    ]
    assert [(aside.path.name, aside.reason) for aside in queries.set_aside] == [
        ("c.jpg", "farther away than the zones beside 10, that of the classes"),
        ("list.csv, row 4", "no path"),
    ]


def test_empty_rows_of_a_list_are_no_queries_and_those_behind_them_keep_their_numbers(tmp_path: Path) -> None:
    rows = [
        "path,latitude,longitude",
        ",,",
        "a.jpg,37.75,-122.4",
        ",,",
        ",37.75,-122.4",
        "a.jpg,37.75,-122.4",
        ",,",
        "",
    ]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    (tmp_path / "a.jpg").touch()
    queries = list_queries(tmp_path / "list.csv", 10)
    assert queries.names == ("a.jpg",)
    assert [(str(aside.path), aside.reason) for aside in queries.set_aside] == [
        (f"{tmp_path}/list.csv, row 4", "no path"),
        (f"{tmp_path}/a.jpg", "named twice, in row 2 and again in row 5"),
    ]


def test_a_list_in_degrees_lies_in_the_hemisphere_of_the_classes(tmp_path: Path) -> None:
    file = write_list(tmp_path / "list.csv", path=["a.jpg"], latitude=[1e-5], longitude=[36.1])
    assert list_queries(file, 37).north[0] == pytest.approx(1.1, abs=0.1)
    assert list_queries(file, 37, southern=True).north[0] == pytest.approx(1e7 + 1.1, abs=0.1)


@pytest.mark.parametrize("southern", [False, True])
def test_queries_beyond_the_equator_lie_in_the_plane_of_the_classes(tmp_path: Path, southern: bool) -> None:
    for latitude in (-2e-5, 2e-5):
        east, north, zone, band = utm.from_latlon(latitude, 36.1)
        save(tmp_path / f"@{east:.2f}@{north:.2f}@{zone}@{band}@.jpg")
    north = list_queries(tmp_path, 37, southern=southern).north - (1e7 if southern else 0)
    assert sorted(north) == pytest.approx([-2.2, 2.2], abs=0.05)


def test_a_list_that_cannot_be_compared_with_the_classes_is_a_clear_error(tmp_path: Path) -> None:
    degrees = write_list(tmp_path / "d.csv", path=["a.jpg"], latitude=[37.7], longitude=[-122.4])
    with pytest.raises(JobError, match="no UTM zone, so that it must give east and north"):
        list_queries(degrees, 0)
    assert list_queries(write_list(tmp_path / "m.csv", path=["a.jpg"], east=[3.0], north=[4.0]), 0).east[0] == 3
    with pytest.raises(JobError, match="no row names a photo"):
        list_queries(write_list(tmp_path / "n.csv", path=["", " "], east=[3.0] * 2, north=[4.0] * 2), 10)
    with pytest.raises(JobError, match="needs path and either"):
        list_queries(write_list(tmp_path / "o.csv", path=["a"], east=[3.0]), 10)
    with pytest.raises(JobError, match="cannot read the list"):
        list_queries(tmp_path / "missing.csv", 10)
    windows = write_list(tmp_path / "w.csv", path=[r"b\c.jpg"], east=[3.0], north=[4.0])
    (tmp_path / r"b\c.jpg").unlink()
    with pytest.raises(JobError, match=r"none of its photos is there .*b\\c.jpg; its path has \\, here / separates"):
        list_queries(windows, 10)
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(JobError, match=r"none of its photos is there .*a\.jpg\); paths are relative to the list's"):
        list_queries(tmp_path / "m.csv", 0)


def test_a_row_says_why_it_has_no_place_and_a_photo_with_two_places_counts_once(tmp_path: Path) -> None:
    rows = [("a.jpg", "", ""), ("a.jpg", "37.7", "-122.4"), ("a.jpg", "37.8", "-122.4"), ("b.jpg", "-122.4", "37.7")]
    path, latitude, longitude = (list(column) for column in zip(*rows, strict=True))
    queries = list_queries(write_list(tmp_path / "l.csv", path=path, latitude=latitude, longitude=longitude), 10)
    assert queries.names == ("a.jpg", "a.jpg", "b.jpg")
    unlocated = queries.unlocated(np.ones(3, bool))
    assert [(aside.path.name, aside.reason.partition(" (")[0]) for aside in unlocated] == [
        ("a.jpg", "no coordinates"),
        ("b.jpg", "coordinates out of range"),
    ]
    assert [aside.reason for aside in queries.set_aside] == ["named twice, in row 2 and again in row 3"]


@pytest.mark.parametrize("southern", [False, True])
def test_a_zone_without_a_band_is_in_the_hemisphere_of_the_classes(tmp_path: Path, southern: bool) -> None:
    point = (-22.5 if southern else 22.5, -48.01)
    east, north, zone, band = utm.from_latlon(*point, force_zone_number=22)
    here, there, _, _ = utm.from_latlon(*point, force_zone_number=23)
    for text in (str(zone), f"{zone}{band}"):
        file = write_list(tmp_path / "m.csv", path=["a.jpg"], east=[east], north=[north], zone=[text])
        queries = list_queries(file, 23, southern=southern)
        assert (queries.reprojected, queries.east[0], queries.north[0]) == (
            1,
            pytest.approx(here, abs=0.01),
            pytest.approx(there, abs=0.01),
        )


def test_photos_are_the_same_set_by_another_list_and_in_another_place(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / "q" / f"@{550000 + i}@4178000@{i}@.jpg", width=40 + i)
    by_name = list_queries(tmp_path / "q", 10)
    (tmp_path / "q").rename(tmp_path / "moved")
    names = [f"moved/{name}" for name in by_name.names]
    place = {"east": [5e5] * 3, "north": [4e6] * 3}
    same = list_queries(write_list(tmp_path / "l.csv", path=[*names, "none.jpg"], east=[5e5] * 4, north=[4e6] * 4), 10)
    (tmp_path / "none.jpg").unlink()
    assert same.fingerprint() == list_queries(tmp_path / "moved", 10).fingerprint()
    names[1] = names[0]
    assert list_queries(write_list(tmp_path / "m.csv", path=names, **place), 10).fingerprint() != same.fingerprint()


def test_photos_of_one_size_in_bytes_are_told_apart_by_what_they_hold(tmp_path: Path) -> None:
    sets = []
    for name in ("a", "b", "c"):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(2):
            Image.new("RGB", (40, 30), (i, 0, name == "b")).save(folder / f"{i}.bmp")  # no compression: all of one size
        lines = ["path,east,north", *(f"{i}.bmp,550000,4178000" for i in range(2))]
        (folder / "list.csv").write_text("\n".join(lines))
        sets.append(list_queries(folder / "list.csv", 10).fingerprint())
    assert sets[0] == sets[2] != sets[1]


def test_the_fingerprint_waits_for_no_pipe_and_needs_no_photo(tmp_path: Path) -> None:
    save(tmp_path / "@550000@4178000@.jpg")
    os.mkfifo(tmp_path / "@550001@4178000@.jpg")
    (tmp_path / "@550002@4178000@.jpg").symlink_to("gone")
    assert list_queries(tmp_path, 10).fingerprint()


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    places = [tmp_path / "pipe.jpg", tmp_path / "folder.jpg", Path("/dev/zero")]
    batches, failures = read(places)
    assert (batches, set(failures.values())) == ([], {"not a regular file"})
    assert data_url(tmp_path / "pipe.jpg", 64) == ""


def test_query_size_keeps_the_reference_proportion() -> None:
    assert (query_size(224), query_size(64), query_size(96)) == (256, 73, 110)


@pytest.mark.parametrize(("width", "height"), [(400, 300), (300, 401), (64, 64), (256, 300)])
def test_decoding_equals_torchvisions_resize_of_the_pil_image(tmp_path: Path, width: int, height: int) -> None:
    path = save(tmp_path / "a.png", width, height)
    with Image.open(path) as image:
        expected = np.asarray(F.resize(image.convert("RGB"), 256))
    np.testing.assert_array_equal(decode_query(path, 256), expected)


@pytest.mark.parametrize(("mode", "suffix"), [("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png")])
def test_other_colour_modes_are_converted(tmp_path: Path, mode: str, suffix: str) -> None:
    assert decode_query(save(tmp_path / f"a.{suffix}", mode=mode), 20).shape == (20, 26, 3)


def test_grey_of_16_bits_is_the_same_grey_in_8_bits(tmp_path: Path) -> None:
    grey = np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray((grey >> 8).astype(np.uint8)).save(tmp_path / "b.png")
    assert Image.open(tmp_path / "a.png").mode == "I;16"
    np.testing.assert_array_equal(decode_query(tmp_path / "a.png", 20), decode_query(tmp_path / "b.png", 20))


def test_grey_of_32_bits_is_reported_and_not_made_black_or_white(tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 32), 0.5, np.float32)).save(tmp_path / "a.png", format="TIFF")
    assert read([tmp_path / "a.png"])[1] == {0: "pixels of 32 bits, whose black and white are not known"}


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_query(save(tmp_path / "a.jpg", 40, 30, exif=exif), 30).shape == (40, 30, 3)


def test_a_photo_whose_exif_data_is_damaged_is_reported_and_the_rest_is_read(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0102], exif[0x0112] = (8, 8, 8), 6
    damaged_exif = bytearray(exif.tobytes())
    damaged_exif[19] = 1  # three numbers of two bytes become three of one byte, which Pillow cannot write again
    paths = [save(tmp_path / "a.jpg", exif=bytes(damaged_exif)), save(tmp_path / "b.jpg")]
    batches, failures = read(paths, shorter_side=24)
    assert list(failures) == [0]
    assert [batch.indices.tolist() for batch in batches] == [[1]]


def test_batches_hold_one_shape_each_and_every_photo_once(tmp_path: Path) -> None:
    sizes = [(40, 30), (30, 40), (30, 30)] * 5
    paths = [save(tmp_path / f"{i}.jpg", *size) for i, size in enumerate(sizes)]
    batches, failures = read(paths)
    assert not failures
    assert sorted(np.concatenate([batch.indices for batch in batches]).tolist()) == list(range(15))
    for batch in batches:
        assert len(batch.indices) <= 4
        for index, image in zip(batch.indices, batch.images, strict=True):
            np.testing.assert_array_equal(image, decode_query(paths[index], 24))


def test_many_shapes_do_not_pile_up(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{i}.png", 30 + i, 30) for i in range(30)]
    batches, _ = read(paths, batch_size=2)
    assert sum(len(batch.indices) for batch in batches) == 30
    assert batches[0].indices[0] < 10


def test_corrupt_photos_are_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    good = save(tmp_path / "good.jpg")
    truncated = tmp_path / "truncated.jpg"
    truncated.write_bytes(good.read_bytes()[:-400])
    empty = tmp_path / "empty.jpg"
    empty.write_bytes(b"")
    text = tmp_path / "text.jpg"
    text.write_text("no photo")
    batches, failures = read([truncated, good, empty, text])
    assert sorted(failures) == [0, 2, 3]
    assert all(failures.values())
    assert np.concatenate([batch.indices for batch in batches]).tolist() == [1]


@pytest.mark.parametrize("form", ["EPS", "GIF", "PPM"])
def test_other_formats_are_no_photos_and_no_program_is_started_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexit 1\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(ghostscript.parent), prepend=os.pathsep)
    paths = [save(tmp_path / "a.jpg", format=form), save(tmp_path / "b.jpg")]
    batches, failures = read(paths)
    assert failures == {0: "no photo of a known format (JPEG, PNG, WEBP, BMP, TIFF)"}
    assert [batch.indices.tolist() for batch in batches] == [[1]]
    assert exif_position(paths[0]) is None
    assert data_url(paths[0], 64) == ""
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("error", [MemoryError, RuntimeError("damaged")])
def test_whatever_pillow_raises_a_photo_is_reported_and_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def transpose(image: Image.Image, **options: bool) -> None:
        if image.width == 41:
            raise error

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", transpose)
    paths = [save(tmp_path / "a.jpg", width=41), save(tmp_path / "b.jpg")]
    batches, failures = read(paths)
    assert failures in ({0: "MemoryError"}, {0: "damaged"})
    assert [batch.indices.tolist() for batch in batches] == [[1]]
    assert data_url(paths[0], 64) == ""


def test_a_photo_that_is_gone_is_reported_in_words_without_its_path_once_more(tmp_path: Path) -> None:
    _, failures = read([tmp_path / "gone.jpg"], shorter_side=32, batch_size=2, threads=1)
    assert failures == {0: "No such file or directory"}
