"""Building a data set: what is kept, what is set aside, and clear words for what cannot be."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import HERE, SETTINGS
from photos import jpeg, name_at, write_photos
from present import present

from preprocessing import build_shards
from preprocessing.build import Summary, build, dry_run
from preprocessing.engine import Counts
from preprocessing.photos import Listing, list_photos, store_listing
from preprocessing.plan import class_order, make_plan
from preprocessing.shard_run import Machinery
from preprocessing.sources import Source
from shards.console import JobError, WrongArguments
from shards.dataset import Dataset
from shards.layout import LISTING, shard_tables
from shards.names import hash_names
from shards.verification import verify

ROOT = Path(__file__).resolve().parent.parent
NOT_BYTES = {"provenance.json"}


def run(source: Path, out: Path, *, settings=SETTINGS, workers=0, max_bad_share=None, rescan=False) -> Summary:
    """Build with so many worker processes; 0: in this process."""
    machinery = Machinery(workers, max_bad_share) if workers else replace(HERE, max_bad_share=max_bad_share)
    return build(source, out, settings, machinery, rescan=rescan)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a data set but the record of the command that made it."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in NOT_BYTES)
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def quarantine(out: Path) -> dict[str, str]:
    lines = (out / "quarantine.jsonl").read_text().splitlines()
    return {json.loads(line)["source"]: json.loads(line)["reason"] for line in lines}


@pytest.fixture(scope="module")
def built(city: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Summary]:
    """The data set of the city's training photos by two workers, and what the build said of it."""
    out = tmp_path_factory.mktemp("built") / "city"
    summary = run(city / "train" / "database", out, workers=2)
    return Dataset.open(out), summary


def test_a_built_city_has_the_classes_and_counts_of_its_names(built, city):
    dataset, summary = built
    photos = list((city / "train" / "database").rglob("*.jpg"))
    made = dataset.manifest
    assert made.images + made.skipped == len(photos)
    assert made.quarantined == 0
    assert dataset.classes.images.sum() == made.images
    assert dataset.classes.images.min() >= 10
    assert summary.images_per_group == {
        g: int(dataset.classes.of_group(g).images.sum()) for g in dataset.classes.groups
    }
    assert summary.source_bytes == sum(p.stat().st_size for p in photos) - sum(
        (city / "train" / "database" / p).stat().st_size
        for p in pq.read_table(dataset.path / "skipped.parquet")["source"].to_pylist()
    )


def test_the_same_photos_give_the_same_bytes_for_any_number_of_workers(built, dataset):
    assert contents(built[0].path) == contents(dataset.path)  # two workers; this process alone


def test_neighbours_in_a_shard_are_a_shuffled_sample_of_their_class(dataset):
    table = pq.read_table(shard_tables(dataset.path)[0])
    first = [s for s, label in zip(table["source"].to_pylist(), table["label"].to_pylist(), strict=True) if label == 0]
    assert first != sorted(first)


def test_bad_photos_are_set_aside_with_their_reason_and_the_rest_goes_on(tmp_path):
    source = tmp_path / "photos"
    good = write_photos(source / "37.70")
    bad = {
        "37.70/" + name_at(500001, 4180003, 90001): (b"", "empty file"),
        "37.70/" + name_at(500001, 4180003, 90002): (jpeg(96, 1)[:700], "truncated"),
        "37.70/" + name_at(500001, 4180003, 90003): (b"<html>not found</html>", "not an image"),
        "37.70/" + name_at(500001, 4180003, 90004): (jpeg(8, 1), "too small"),
        "37.70/no-coordinates.jpg": (jpeg(96, 2), "no coordinates"),
        "37.70/@x@y@.jpg": (jpeg(96, 2), "no coordinates"),
        "37.71/" + good[0].name: (jpeg(96, 3), "duplicate name"),
        "37.70/" + name_at(500001, 4180003, 90005, zone=33): (jpeg(96, 2), "zone mismatch"),
    }
    for name, (data, _) in bad.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(data)
    (source / "README.txt").write_text("hello")
    summary = run(source, tmp_path / "out")
    assert quarantine(tmp_path / "out") == {name: reason for name, (_, reason) in bad.items()}
    assert summary.manifest.quarantined == len(bad)
    assert summary.manifest.images == len(good)
    assert summary.other_files == 1


def test_hostile_names_and_files_neither_hang_nor_escape(tmp_path):
    source = tmp_path / "photos"
    write_photos(source)
    hostile = ["new\nline", 'quo"te', "..", "a'b", "tab\t", "\u202eright", "semi;colon"]
    for i, text in enumerate(hostile):
        (source / f"@0500001.00@4180003.00@10@S@@@{text}{i}@@@@@@@@.jpg").write_bytes(jpeg(96, i))
    os.mkfifo(source / name_at(500001, 4180003, 70000))
    os.symlink(source, source / "loop")
    os.symlink(tmp_path / "nowhere", source / name_at(500001, 4180003, 70001))
    (source / os.fsdecode(b"@0500001.00@4180003.00@10@S@\xff\xfe@.jpg")).write_bytes(jpeg(96, 1))
    summary = run(source, tmp_path / "out")
    assert summary.manifest.images == 48 + len(hostile)
    assert sorted(quarantine(tmp_path / "out").values()) == [
        "name is not UTF-8", "not a regular file", "not a regular file",
    ]  # fmt: skip
    assert {p.name for p in tmp_path.iterdir()} == {"photos", "out"}
    sources = [s for t in shard_tables(tmp_path / "out") for s in pq.read_table(t)["source"].to_pylist()]
    assert sum("new\nline" in s for s in sources) == 1


def test_too_many_bad_photos_stop_the_job_with_the_reasons_and_a_higher_limit_goes_on(tmp_path):
    source = tmp_path / "photos"
    photos = write_photos(source)
    for photo in photos[:20]:
        photo.write_bytes(jpeg(96, 1)[:300])
    with pytest.raises(JobError, match=r"of 48 photos are bad \(\d+ truncated.*--max-bad-share"):
        run(source, tmp_path / "out", max_bad_share=0.1)
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert run(source, tmp_path / "out", max_bad_share=0.5).manifest.quarantined == 20


def test_one_percent_of_bad_photos_is_the_limit_unless_another_is_given_and_a_few_of_a_small_set_are_not_too_many():
    assert [Machinery(1).tolerance(photos).limit for photos in (41_000_000, 10_000, 2500, 100)] == [
        410_000,
        100,
        25,
        25,
    ]
    assert (Machinery(1, 0.05).tolerance(100).limit, Machinery(1, 0).tolerance(41_000_000).limit) == (5, 0)


def test_a_job_that_meets_too_many_bad_photos_stops_before_it_has_tried_the_rest(tmp_path):
    source = tmp_path / "photos"
    for photo in write_photos(source, cells=8, per_cell=100):
        photo.write_bytes(b"")
    tried = []

    def one_by_one(job, tasks, workers, progress):
        def monitor(source_bytes, is_bad):
            tried.append(is_bad)
            return progress(Counts(len(tried), sum(tried), 0))

        yield from (job.run(task, monitor) for task in tasks)

    with pytest.raises(JobError, match=r"^26 of 800 photos are bad \(26 empty file"):
        build(source, tmp_path / "out", SETTINGS, Machinery(1, run_tasks=one_by_one))
    assert len(tried) == 26


def test_a_few_photos_that_are_all_bad_make_no_data_set(tmp_path):
    write_photos(tmp_path / "photos", cells=2, per_cell=12)
    for _ in range(2):
        with pytest.raises(
            JobError, match=r"no photo can be used \(24 too small; e\.g\. @.*: 96 x 96 pixels .*\); mend"
        ):
            run(tmp_path / "photos", tmp_path / "out", settings=replace(SETTINGS, image_size=1000))
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_a_class_whose_photos_are_all_bad_keeps_its_label(tmp_path):
    source = tmp_path / "photos"
    photos = write_photos(source, cells=6)
    whole = run(source, tmp_path / "whole")
    for photo in photos[:12]:
        photo.write_bytes(b"")
    run(source, tmp_path / "out", max_bad_share=1)
    classes = Dataset.open(tmp_path / "out").classes
    assert classes.fingerprint() == Dataset.open(tmp_path / "whole").classes.fingerprint()
    assert sorted(classes.images.tolist()) == [0, 12, 12, 12, 12, 12]
    assert whole.manifest.classes == 6


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda s: None, "no such folder"),
        (lambda s: s.mkdir(), "no photos found"),
        (lambda s: write_photos(s, cells=3, per_cell=4), "no cell of 20 m has 10 photos"),
        (lambda s: (s.mkdir(), (s / "photo.jpg").write_bytes(b"x")), "usable coordinates"),
    ],
)
def test_a_source_that_gives_nothing_is_named_in_one_line(tmp_path, prepare, message):
    prepare(tmp_path / "photos")
    with pytest.raises(JobError, match=message) as error:
        run(tmp_path / "photos", tmp_path / "out")
    assert "\n" not in str(error.value)


def test_an_output_folder_of_something_else_is_left_alone(tmp_path):
    write_photos(tmp_path / "photos")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(JobError, match="not empty"):
        run(tmp_path / "photos", tmp_path / "out")
    with pytest.raises(JobError, match="lies inside the source"):
        run(tmp_path / "photos", tmp_path / "photos" / "out")
    run(tmp_path / "photos", tmp_path / "ours")
    before = contents(tmp_path / "ours")
    with pytest.raises(JobError, match=r"another data set.*quality was 90, is 80"):
        run(tmp_path / "photos", tmp_path / "ours", settings=replace(SETTINGS, quality=80))
    assert contents(tmp_path / "ours") == before


def test_a_build_that_was_killed_at_its_first_file_goes_on(tmp_path):
    photos = tmp_path / "photos"
    write_photos(photos)
    out = tmp_path / "out"
    out.mkdir()
    (out / ".listing.parquet.7-0a1b2c3d.partial").write_bytes(b"PAR1")
    build(photos, out, SETTINGS, HERE)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_second_run_over_a_finished_data_set_changes_nothing(tmp_path):
    write_photos(tmp_path / "photos")
    run(tmp_path / "photos", tmp_path / "out")
    times = {p: p.stat().st_mtime_ns for p in shard_tables(tmp_path / "out")}
    before = contents(tmp_path / "out")
    run(tmp_path / "photos", tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert {p: p.stat().st_mtime_ns for p in times} == times


@pytest.mark.parametrize("rescan", [False, True])
@pytest.mark.parametrize(("photos", "message"), [(0, "no photos found"), (13, "the list of photos changed")])
def test_a_source_that_is_empty_or_another_leaves_a_finished_data_set_as_it_was(tmp_path, rescan, photos, message):
    source = tmp_path / "photos"
    write_photos(source, cells=1)
    build(source, tmp_path / "out", SETTINGS, HERE)
    before = contents(tmp_path / "out")
    shutil.rmtree(source)
    write_photos(source, cells=1, per_cell=photos)
    with pytest.raises(JobError, match=message):
        build(source, tmp_path / "out", SETTINGS, HERE, rescan=rescan)
    assert contents(tmp_path / "out") == before


def test_a_relative_folder_may_have_a_colon_in_its_name(tmp_path, monkeypatch):
    write_photos(tmp_path / "photos:of:2026")
    monkeypatch.chdir(tmp_path)
    out = Path("shards-2026-11-29T10:00")
    build(Path("photos:of:2026"), out, SETTINGS, HERE)
    (out / "skipped.parquet").unlink()
    assert [str(p) for p in verify(out).problems] == ["skipped.parquet: missing"]
    build(Path("photos:of:2026"), out, SETTINGS, HERE)
    assert not verify(out).problems
    assert Dataset.open(out).manifest.images == 48


def test_photos_of_the_neighbouring_zone_are_carried_into_the_common_plane(tmp_path):
    import utm

    source = tmp_path / "photos"
    source.mkdir()
    for i in range(30):  # a city on the border of zones 10 and 11, at 120 degrees west
        longitude = -120 + (i - 20.5) * 1e-6
        east, north, zone, _ = utm.from_latlon(37.7, longitude)
        (source / name_at(east, north, i, zone)).write_bytes(jpeg(96, i))
    run(source, tmp_path / "out")
    classes = Dataset.open(tmp_path / "out").classes
    assert (len(classes), classes.zone, classes.images.sum()) == (1, 10, 30)


def test_a_listing_is_read_from_its_cache_until_a_folder_changes(tmp_path):
    source, cache = tmp_path / "photos", tmp_path / "listing.parquet"
    write_photos(source / "a", cells=1)
    first = list_photos(source, cache, lambda n: None)
    store_listing(first, cache)
    again = list_photos(source, cache, lambda n: None)
    assert (again.paths, first.fresh, again.fresh) == (first.paths, True, False)
    whole = cache.read_bytes()
    for damaged in (b"", whole[:100], whole[:4] + bytes(60) + whole[64:]):
        cache.write_bytes(damaged)
        assert list_photos(source, cache, lambda n: None).fresh
    cache.write_bytes(whole)
    (source / "a" / name_at(500001, 4180003, 5)).write_bytes(b"x")
    assert len(list_photos(source, cache, lambda n: None)) == 13


def test_a_walk_over_folders_says_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("preprocessing.photos._BATCH", 10)
    write_photos(tmp_path / "a", cells=1)
    write_photos(tmp_path / "b", cells=2)
    said: list[int] = []
    assert len(list_photos(tmp_path, None, said.append)) == 36
    assert said == [10, 20, 30, 36]


def test_a_listing_is_that_of_its_root_alone_and_rescan_reads_the_folders_again(tmp_path):
    source, out = tmp_path / "photos", tmp_path / "out"
    write_photos(source)
    shutil.copytree(source, tmp_path / "copy")
    dry_run(Source.of(source), out, SETTINGS, Machinery(1))
    assert list_photos(source, out / LISTING, lambda n: None).fresh is False
    assert list_photos(tmp_path / "copy", out / LISTING, lambda n: None).fresh
    before = source.stat().st_mtime_ns
    (source / name_at(500001, 4180003, 99)).write_bytes(jpeg(96, 99))
    os.utime(source, ns=(before, before))  # as on a file system whose folders keep no time
    assert len(dry_run(Source.of(source), out, SETTINGS, Machinery(1)).plan.paths) == 48
    assert len(dry_run(Source.of(source), out, SETTINGS, Machinery(1), rescan=True).plan.paths) == 49


def test_a_plan_depends_on_names_alone_and_the_seed_shuffles_within_classes(tmp_path):
    source = tmp_path / "photos"
    paths = write_photos(source)
    listing = list_photos(source, None, lambda n: None)
    plan = make_plan(listing, SETTINGS)
    for path in paths:
        path.write_bytes(b"")
    assert (make_plan(list_photos(source, None, lambda n: None), SETTINGS).order == plan.order).all()
    other = make_plan(listing, replace(SETTINGS, seed=1))
    assert (other.order != plan.order).any()
    assert (other.label[other.order] == plan.label[plan.order]).all()
    assert other.fingerprint != plan.fingerprint


def test_photos_on_the_edges_of_a_cell_are_in_it_and_sound(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(10):
        path = tmp_path / "photos" / name_at(500000 + i % 2 * 19.99, 4180000 + i % 2 * 19.99, i)
        path.write_bytes(jpeg(96, i))
    run(tmp_path / "photos", tmp_path / "out")
    classes = Dataset.open(tmp_path / "out").classes
    assert (classes.cell_east.tolist(), classes.cell_north.tolist(), classes.images.tolist()) == (
        [500000],
        [4180000],
        [10],
    )
    assert verify(tmp_path / "out").problems == []


def test_the_order_within_classes_is_that_of_earlier_versions(monkeypatch):
    """A build or a repair that an update of this project interrupts goes on with the same samples."""
    names = hash_names(pa.array([f"a/@{i}@{i}@x{i}@.jpg" for i in range(8)], pa.large_string()))
    row = np.array([1, 0, -1, 0, 1, 0, 1, 0], np.int32)
    for step in (1 << 20, 3):  # photos at once
        monkeypatch.setattr("preprocessing.plan._STEP", step)
        assert class_order(row, names, 3, 1).tolist() == [5, 1, 7, 3, 0, 6, 4]
        assert class_order(row, names, 3, 2).tolist() == [11, 10, 2, 14, 6, 3, 15, 7, 13, 0, 9, 1, 12, 8]


COMMAND = [sys.executable, str(ROOT / "preprocessing" / "build_shards.py"), "--image-size", "64", "--workers", "2"]


@pytest.mark.slow
def test_wrong_arguments_exit_with_2_and_failed_jobs_with_1(tmp_path):
    def code(*arguments: str) -> int:
        return subprocess.run([*COMMAND, *arguments], capture_output=True).returncode

    assert code("--nonsense") == 2
    assert code("--source", str(tmp_path / "none"), "--out", str(tmp_path / "out")) == 1
    assert code("--help") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name the photos with --source"),
        (["--source", ""], "--source and --add take"),
        (["--add", ""], "--source and --add take"),
        (["--source", "photos", "--M", "0"], "--M must be from 1"),
        (["--source", "photos", "--task-count", "2"], "--task-count goes with"),
        (["--source", "photos", "--max-bad-share", "5"], "--max-bad-share must be from 0 to 1"),
        (["--add", "more", "--M", "20", "--image_size=64"], "leave out --M, --image-size: --add goes by what"),
        (["--add", "more", "--source", "photos"], "leave out --source: --add goes by what"),
        (
            ["--retry-quarantined", "--crops", "12", "--root", "x"],
            "leave out --crops, --root: --retry-quarantined goes",
        ),
    ],
)
def test_wrong_arguments_are_named(tmp_path, monkeypatch, words, said):
    monkeypatch.setattr(sys, "argv", ["build_shards.py", "--out", str(tmp_path / "out"), *words])
    with pytest.raises(WrongArguments, match=said):
        build_shards.main()
    assert not (tmp_path / "out").exists()


def test_an_addition_goes_by_flags_of_its_own(tmp_path, monkeypatch):
    words = [
        "--add",
        "more.csv",
        "--root",
        "x",
        "--crops",
        "12",
        "--workers",
        "1",
        "--max-bad-share",
        "0.5",
        "--rescan",
    ]
    monkeypatch.setattr(sys, "argv", ["build_shards.py", "--out", str(tmp_path / "out"), *words])
    with pytest.raises(JobError, match="no such list"):
        build_shards.main()


def test_pictures_of_the_city_survive_the_way_into_a_shard(dataset, city):
    import cv2
    import simplejpeg

    from shards.index import open_index
    from shards.reader import ShardReader

    index = open_index(dataset.path, dataset.classes)
    table = pq.read_table(shard_tables(dataset.path)[0])
    kept = simplejpeg.decode_jpeg(ShardReader(index).read(0, 0)).astype(float)
    photo = present(cv2.imread(str(city / "train" / "database" / table["source"][0].as_py())))[:, :, ::-1]
    assert np.abs(cv2.resize(photo, (64, 64), interpolation=cv2.INTER_AREA).astype(float) - kept).mean() < 4


def test_each_of_ten_thousand_groups_has_its_shard(tmp_path):
    east, north = (a.ravel() for a in np.meshgrid(20 * np.arange(100), 20 * np.arange(100)))
    names = [f"@{e}@{n}@{i}@.jpg" for e, n in zip(east, north, strict=True) for i in range(1 + e // 20 % 2)]
    listing = Listing(tmp_path, pa.array(names, pa.large_string()), [])
    plan = make_plan(listing, replace(SETTINGS, N=100, min_images=1))
    assert plan.shards() == [(group, 0, 1 + group // 100 % 2) for group in range(10_000)]
    assert len(plan.task(101, 0).samples) == len(plan.task(9999, 0).samples) == 2
