"""Repair gives back the bytes of a clean build, and takes nothing away that it cannot make again."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import HERE, SETTINGS
from photos import jpeg, write_csv, write_listed, write_photos
from test_verify import IDX, TAR, contents, flip, only_problem, run

from preprocessing.build import build
from preprocessing.sources import Source
from shards.checksums import seal
from shards.console import JobError
from shards.layout import CHECKSUMS, MANIFEST, shard_tables
from shards.repair import repair
from shards.verification import verify


@pytest.fixture
def photos(city: Path) -> Path:
    return city / "train" / "database"


def test_a_flat_index_that_disagrees_with_the_tables_is_found_and_rebuilt_without_photos(copy, dataset):
    flip(copy / "index" / "group-01.offset.npy", 500)
    assert only_problem(copy) == "index/group-01.offset.npy: does not agree with the sample tables"
    repair(copy, verify(copy), None, 1)
    shutil.rmtree(copy / "index")
    assert only_problem(copy).startswith("index/state: missing")
    repair(copy, verify(copy), None, 1)
    assert verify(copy).problems == []
    assert {k: v for k, v in contents(copy).items() if k != CHECKSUMS} == {
        k: v for k, v in contents(dataset.path).items() if k != CHECKSUMS
    }


def test_a_dali_index_is_rebuilt_from_its_table_and_no_shard_is_touched(copy):
    before = contents(copy)
    times = {p: p.stat().st_mtime_ns for p in copy.rglob("*.tar")}
    flip(copy / IDX, 40)
    (copy / "group-01" / "group-01-000000.idx").unlink()
    repair(copy, verify(copy), None, 1)
    assert contents(copy) == before
    assert {p: p.stat().st_mtime_ns for p in times} == times


def test_repair_moves_extra_files_beside_the_data_set_and_deletes_none(copy):
    (copy / "group-00" / "notes.txt").write_text("mine")
    (copy / "a\nb").write_text("odd")
    (copy / ".x.1.partial").write_text("left over")
    folders = {p for p in copy.rglob("*") if p.is_dir()}
    for name in ("mine/too/deep", "mine/.y.2.partial", "killed/.z.3.partial"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(name)
    repair(copy, verify(copy), None, 1)
    assert verify(copy).problems == []
    assert {p for p in copy.rglob("*") if p.is_dir()} == folders
    aside = copy.with_name("city-set-aside")
    assert (aside / "group-00" / "notes.txt").read_text() == "mine"
    assert {p.name for p in aside.iterdir()} == {"group-00", "a\nb", "mine"}


def test_rebuilding_a_shard_without_the_photos_is_refused_and_takes_nothing_away(copy):
    flip(copy / TAR, 1000)
    before = contents(copy)
    with pytest.raises(JobError, match="--source PHOTOS"):
        repair(copy, verify(copy), None, 1)
    with pytest.raises(JobError, match="no such photos"):
        repair(copy, verify(copy), str(copy / "nowhere"), 1)
    assert contents(copy) == before


def test_repair_is_refused_where_the_settings_are_lost_or_a_file_was_set_aside_before(copy, photos):
    aside = copy.with_name("city-set-aside")
    aside.mkdir()
    for folder in (copy, aside):
        (folder / "notes.txt").write_text(str(folder))
    with pytest.raises(JobError, match=r"set-aside/notes\.txt: already there; move it away"):
        repair(copy, verify(copy), None, 1)
    assert [(folder / "notes.txt").read_text() for folder in (copy, aside)] == [str(copy), str(aside)]
    (copy / "notes.txt").unlink()
    for name in ("plan.json", "dataset.json"):
        (copy / name).write_bytes(b"")
    before = contents(copy)
    with pytest.raises(JobError, match=r"both lost.*provenance\.json holds the command"):
        repair(copy, verify(copy), str(photos), 1)
    assert contents(copy) == before


@pytest.mark.slow
def test_repair_from_photos_of_which_some_changed_since_ends_sound_and_says_how_many_are_left(tmp_path, capfd):
    source, out = tmp_path / "photos", tmp_path / "out"
    photos = write_photos(source)
    build(source, out, SETTINGS, HERE)
    photos[0].write_bytes(jpeg(96, 99))
    photos[1].write_bytes(photos[1].read_bytes()[:300])
    flip(shard_tables(out)[0].with_suffix(".tar"), 700)
    repair(out, verify(out), str(source), 1)
    assert "had 48 images and now has 47" in capfd.readouterr().out
    assert verify(out).problems == []


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["dataset.json", "plan.json"])
def test_repair_gives_back_the_bytes_of_a_clean_build_and_leaves_sound_shards_alone(copy, photos, lost):
    before = contents(copy)
    tables = [str(t.relative_to(copy)) for t in shard_tables(copy)]
    flip(copy / tables[0], 300)
    flip(copy / tables[1].replace("parquet", "tar"), 5000)
    (copy / tables[2].replace("parquet", "idx")).unlink()
    flip(copy / "classes.parquet", 50)
    flip(copy / "listing.parquet", 50)
    (copy / "skipped.parquet").unlink()
    (copy / "index" / "state").unlink()
    flip(copy / lost, 30)
    untouched = copy / tables[3]
    time = untouched.stat().st_mtime_ns
    repair(copy, verify(copy), str(photos), 1)
    assert verify(copy).problems == []
    assert contents(copy) == before
    assert untouched.stat().st_mtime_ns == time


@pytest.mark.slow
def test_repair_ends_as_a_failed_job_where_the_photos_are_others_and_goes_on_with_the_right_ones(
    copy, photos, tmp_path
):
    before = contents(copy)
    write_photos(tmp_path / "others")
    flip(copy / TAR, 1000)
    damaged = contents(copy)
    done = run(copy, "--repair", "--source", tmp_path / "others")
    assert done.returncode == 1
    assert "holds another data set" in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(copy) == damaged  # nothing was taken away that these photos could not give back
    done = run(copy, "--repair", "--source", photos)
    assert done.returncode == 0, done.stderr
    assert contents(copy) == before


@pytest.mark.slow
def test_repair_keeps_to_the_share_of_bad_photos_that_the_data_set_had(tmp_path):
    source, out = tmp_path / "photos", tmp_path / "out"
    for photo in write_photos(source)[:20]:
        photo.write_bytes(jpeg(96, 1)[:300])
    build(source, out, SETTINGS, replace(HERE, max_bad_share=0.5))
    seal(out)
    before = contents(out)
    tar = next(out.glob("*/*.tar"))
    tar.unlink()
    repair(out, verify(out), str(source), 1)
    assert contents(out) == before


@pytest.mark.slow
def test_repair_takes_the_photos_from_a_url(tmp_path):
    write_photos(tmp_path / "photos")
    url, out = f"file://{tmp_path}/photos", tmp_path / "out"
    build(Source.of(url), out, SETTINGS, HERE)
    before = contents(out)
    shard_tables(out)[0].with_suffix(".tar").unlink()
    (out / "plan.json").unlink()
    done = run(out, "--repair", "--source", url)
    assert done.returncode == 0, done.stderr
    assert contents(out) == before


@pytest.mark.parametrize("with_photos", [True, False])
def test_repair_finds_the_photos_of_a_list_that_moved_with_or_without_them(tmp_path, with_photos):
    names = write_listed(tmp_path / "here" / "photos")
    columns = {"east": [500003.0 + i % 12 for i in range(24)], "north": [4180003.0] * 24}
    place = write_csv(tmp_path / "here" / "list.csv", path=[f"photos/{name}" for name in names], **columns)
    out = tmp_path / "out"
    build(Source.of(place), out, SETTINGS, HERE)
    before = contents(out)
    if with_photos:
        place.parent.rename(tmp_path / "there")
    else:
        (tmp_path / "there").mkdir()
        place.rename(tmp_path / "there" / place.name)
    (out / TAR).unlink()
    repair(out, verify(out), str(tmp_path / "there" / "list.csv"), 1)
    after = contents(out)
    assert {name for name in before if before[name] != after[name]} <= {"plan.json", CHECKSUMS}
    assert verify(out).problems == []


@pytest.mark.slow
def test_a_repair_from_photos_in_another_place_that_stopped_goes_on(tmp_path):
    source, out, moved = (tmp_path / name for name in ("photos", "out", "moved"))
    write_photos(source)
    build(source, out, SETTINGS, HERE)
    seal(out)
    before = contents(out)
    shutil.copytree(source, moved)
    (out / MANIFEST).unlink()
    shard_tables(out)[0].with_suffix(".tar").unlink()

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # as Ctrl-C ends a repair
        build(moved, out, SETTINGS, replace(HERE, run_tasks=interrupted))
    repair(out, verify(out), str(moved), 1)
    assert verify(out).problems == []
    after = contents(out)
    places = {name for name in before if before[name] != after[name]}
    assert places == {"plan.json", "listing.parquet", "checksums.txt"}
    assert after.keys() == before.keys()
