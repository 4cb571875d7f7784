"""Query photos: names, UTM zones, decoding, batches of one shape."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.transforms.functional as F
import utm
from PIL import Image

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
    found = list_queries(tmp_path, None)
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
    found = [path.relative_to(tmp_path / "q").as_posix() for path in list_queries(tmp_path / "q", None).paths]
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


def test_queries_without_coordinates_are_kept_and_not_located(tmp_path: Path) -> None:
    save(tmp_path / "holiday.jpg")
    save(named(tmp_path, 544000.0, 4180000.0, None))
    queries = list_queries(tmp_path, 10)
    assert queries.located.tolist() == [True, False]


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
