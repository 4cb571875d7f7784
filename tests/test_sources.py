"""Folders, lists and URLs of photos: which photos are one and the same, and what happens where they go away."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import HERE, SETTINGS
from photos import jpeg, name_at, samples, write_csv, write_listed, write_photos
from present import present
from test_build import quarantine

from preprocessing.build import build, dry_run
from preprocessing.coordinates import _rows_of, hash_files, identify, locate
from preprocessing.engine import Job
from preprocessing.photos import list_photos
from preprocessing.plan import make_plan
from preprocessing.resize import Resizer
from preprocessing.shard_run import Machinery
from preprocessing.shard_task import write_shard
from preprocessing.sources import Source, list_named
from preprocessing.summaries import print_forecast
from shards.console import JobError
from shards.dataset import Dataset
from shards.layout import LISTING, shard_tables


def test_of_photos_of_one_name_all_but_the_first_are_set_aside_and_the_listing_stays_as_it_was(tmp_path):
    names = [f"@{500000 + i}@4180000@10@S@{i}@.jpg" for i in range(9)]
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        for name in names[::2] if folder == "b" else names[:7]:
            (tmp_path / folder / name).touch()
    listing = list_photos(tmp_path, None, lambda n: None)
    places, _, bad = locate(listing, identify(listing)[0], 0)
    repeated = [*(f"b/{name}" for name in names[:7:2]), *(f"c/{name}" for name in names[:7])]
    assert sorted((b.source, b.reason) for b in bad) == [(path, "duplicate name") for path in sorted(repeated)]
    assert np.isnan(places.east).sum() == len(repeated)

    paths = ["x.jpg", "y.jpg", "x.jpg", "./x.jpg", "a//../x.jpg", str(tmp_path / "x.jpg"), "a/x.jpg", "x..jpg"]
    place = write_csv(tmp_path / "list.csv", path=paths, latitude=[37.7] * 8, longitude=[-122.4] * 8)
    listing = list_named(place, tmp_path, 0)
    before = present(listing.places).east.copy()
    assert np.isnan(locate(listing, identify(listing)[0], 0)[0].east).tolist() == [
        False,
        False,
        True,
        True,
        True,
        True,
        False,
        False,
    ]
    assert np.array_equal(present(listing.places).east, before)


def test_a_photo_of_a_relative_root_is_the_one_of_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_csv(Path("list.csv"), path=["a/x.jpg", str(tmp_path / "a" / "x.jpg")], latitude=[37.7] * 2, longitude=[9] * 2)
    listing = list_named(Path("list.csv"), ".", 0)
    _, _, bad = locate(listing, identify(listing)[0], 0)
    assert [(b.source, b.detail) for b in bad] == [(str(tmp_path / "a" / "x.jpg"), "the same photo as a/x.jpg")]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (("/", "a/b.jpg"), ("/", "/a/b.jpg"), True),
        (("/", "a/b.jpg"), ("/a", "./b.jpg"), True),
        (("s3://bucket/photos/", "a.jpg"), ("s3://bucket/photos", "./a.jpg"), True),
        (("s3://bucket/photos", "/a.jpg"), ("s3://bucket/others", "/a.jpg"), False),
        (("s3://bucket/photos", "/a.jpg"), ("s3://bucket/photos", "/b/../a.jpg"), True),
    ],
)
def test_which_photos_are_one_file_at_the_ends_of_roots(one, other, same):
    hashes = [hash_files(root, pa.array([path], pa.large_string())) for root, path in (one, other)]
    assert bool(hashes[0] == hashes[1]) is same


def test_names_are_found_among_more_than_are_compared_at_once():
    names = np.random.default_rng(0).permutation(np.arange(2**20 + 5000, dtype=np.uint64))
    for sought in (names[-1:], np.sort(names[::1000]), np.array([0, 7, 2**20 + 4999, 2**40], np.uint64)):
        assert np.array_equal(_rows_of(names, sought), np.flatnonzero(np.isin(names, sought)))


def test_names_with_places_that_no_plane_holds_are_set_aside_and_stop_nothing(tmp_path):
    good = write_photos(tmp_path / "photos")
    far = ["@999999999999@999999999999@10@S@a@.jpg", "@99999999999.5@4180003.00@11@S@b@.jpg", "@7e9@1@10@S@c@.jpg"]
    lost_point = [f"@50000312@4180003@10@S@{i}@.jpg" for i in range(12)]
    for i, name in enumerate([*far, *lost_point]):
        (tmp_path / "photos" / name).write_bytes(jpeg(96, i))
    build(Source.of(tmp_path / "photos"), tmp_path / "out", SETTINGS, HERE)
    reasons = dict.fromkeys([*far, *lost_point], "coordinates out of range") | {far[2]: "no coordinates"}
    assert quarantine(tmp_path / "out") == reasons
    made = Dataset.open(tmp_path / "out")
    assert (made.manifest.classes, made.manifest.images) == (4, len(good))
    with pytest.raises(JobError, match=r"15 of 63 photos are bad \(14 coordinates out of range, 1 no coordinates"):
        build(Source.of(tmp_path / "photos"), tmp_path / "strict", SETTINGS, replace(HERE, max_bad_share=0.1))


def test_a_dry_run_tells_of_small_cells_and_of_rows_without_a_place(tmp_path, capsys):
    names = write_listed(tmp_path, 30)
    east = [500003.0] * 20 + [500023.0] * 6 + [500043.0] * 2 + [None] * 2
    place = write_csv(tmp_path / "list.csv", path=names, east=east, north=[4180003.0] * 30)
    print_forecast(dry_run(Source.of(place), tmp_path / "out", SETTINGS, Machinery(1)), "out")
    said = capsys.readouterr().out
    assert "8 photos in 2 cells with fewer than 10; --min-images 5 makes classes of 1 of these cells" in said
    assert "set aside   2 photos by names or list (2 no coordinates)" in said


def test_photos_whose_names_say_nothing_are_told_of_lists(tmp_path):
    write_listed(tmp_path / "photos")
    with pytest.raises(JobError, match=r"no coordinates in the name .* give a list with path, latitude, longitude"):
        build(Source.of(tmp_path / "photos"), tmp_path / "out", SETTINGS, HERE)


@pytest.mark.slow
def test_a_limit_takes_whole_cells_of_every_group_and_is_part_of_the_plan(tmp_path):
    for row in range(6):
        write_photos_at(tmp_path / "photos", row)
    whole = build(tmp_path / "photos", tmp_path / "whole", replace(SETTINGS, image_size=32), HERE).manifest
    made = build(tmp_path / "photos", tmp_path / "out", replace(SETTINGS, image_size=32, limit=135), HERE).manifest
    assert (whole.images, made.images, made.skipped) == (360, 130, 0)
    assert Dataset.open(tmp_path / "out").classes.images.tolist() == [10] * 13
    assert made.groups == 4
    with pytest.raises(JobError, match="limit was 135, is 0"):
        build(tmp_path / "photos", tmp_path / "out", replace(SETTINGS, image_size=32), HERE)


def write_photos_at(folder: Path, row: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for column in range(6):
        for i in range(10):
            number = 1000 * row + 100 * column + i
            name = name_at(500003 + 20 * column, 4180003 + 20 * row, number)
            (folder / name).write_bytes(jpeg(32, number))


def test_a_source_that_vanishes_midway_stops_the_job_leaves_nothing_and_the_command_goes_on(tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    write_photos(photos, cells=1, per_cell=20)
    task = next(make_plan(Source.of(photos).photos(None, 0), SETTINGS).tasks())
    assert len(task.samples) > Resizer.batch
    seen = []

    def unmount(*_: int) -> bool:
        seen.append(1)
        if len(seen) == 5:
            photos.rename(tmp_path / "elsewhere")
        return True

    with pytest.raises(JobError, match=r"source folder went away .*same command again"):
        write_shard(task, [Source.of(photos)], tmp_path / "out", Resizer(64, 90), unmount)
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    (tmp_path / "elsewhere").rename(photos)
    assert write_shard(task, [Source.of(photos)], tmp_path / "out", Resizer(64, 90), lambda *_: True).images == 20


def test_an_output_folder_that_vanishes_midway_is_named_and_not_made_again(tmp_path):
    write_photos(tmp_path / "photos", cells=1)
    task = next(make_plan(Source.of(tmp_path / "photos").photos(None, 0), SETTINGS).tasks())
    out = tmp_path / "out"

    def unmount(*_: int) -> bool:
        shutil.rmtree(out, ignore_errors=True)
        return True

    job = Job((Source.of(tmp_path / "photos"),), out, Resizer(64, 90))
    out.mkdir()
    for monitor in (unmount, lambda *_: True):  # midway, and before the next shard
        with pytest.raises(JobError, match=rf"{out}: the output folder went away; bring it back"):
            job.run(task, monitor)
        assert not out.exists()


def test_a_group_whose_folder_cannot_be_made_is_named(tmp_path):
    write_photos(tmp_path / "photos", cells=1)
    task = next(make_plan(Source.of(tmp_path / "photos").photos(None, 0), SETTINGS).tasks())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "group-00").write_text("no folder")
    with pytest.raises(JobError, match="/out/group-00: File exists, but a folder is needed"):
        write_shard(task, [Source.of(tmp_path / "photos")], tmp_path / "out", Resizer(64, 90), lambda *_: True)


def test_a_folder_above_the_photos_may_have_a_name_that_is_not_utf8(tmp_path):
    photos = tmp_path / os.fsdecode(b"caf\xe9") / "photos"
    write_photos(photos)
    build(photos, tmp_path / "out", SETTINGS, HERE)
    assert list_photos(photos, tmp_path / "out" / LISTING, lambda n: None).fresh is False
    assert len(samples(tmp_path / "out")) == 48


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    write_photos(tmp_path / "photos" / "37.70", cells=1)
    real = os.scandir

    def scandir(path):
        if str(path).endswith("37.70"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr("preprocessing.photos.os.scandir", scandir)
    with pytest.raises(JobError, match=r"37\.70: Permission denied; check the permissions"):
        build(tmp_path / "photos", tmp_path / "out", SETTINGS, HERE)


def test_photos_behind_a_url_make_the_bytes_of_a_folder(tmp_path):
    write_photos(tmp_path / "photos" / "37.70")
    (tmp_path / "photos" / "README.txt").write_text("hello")
    (tmp_path / "photos" / "37.70" / f"._{name_at(500003, 4180003, 0)}").write_bytes(b"\0\5\x16\7")  # macOS's
    build(tmp_path / "photos", tmp_path / "expected", SETTINGS, HERE)
    summary = build(Source.of(f"file://{tmp_path}/photos"), tmp_path / "out", SETTINGS, HERE)
    tars = [t.with_suffix(".tar") for t in shard_tables(tmp_path / "expected")]
    assert tars
    assert [(tmp_path / "out" / t.relative_to(tmp_path / "expected")).read_bytes() for t in tars] == [
        t.read_bytes() for t in tars
    ]
    assert summary.other_files == 2
    assert summary.manifest.quarantined == 0


@pytest.mark.parametrize("url", ["nonsense://x/y", "file:///no/such/folder"])
def test_a_url_that_leads_nowhere_is_one_line(tmp_path, url):
    with pytest.raises(JobError) as error:
        build(Source.of(url), tmp_path / "out", SETTINGS, HERE)
    assert "\n" not in str(error.value)
