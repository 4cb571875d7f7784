"""A data set that several tasks write at the same time, a trial run, and a disk without room."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import HERE, SETTINGS
from photos import jpeg, name_at
from test_build import COMMAND, contents

from preprocessing.build import assemble, build, build_share, dry_run
from preprocessing.build_shards import main
from preprocessing.shard_run import Machinery
from preprocessing.sources import Source
from preprocessing.summaries import print_forecast
from shards.console import JobError, entry
from shards.dataset import Dataset

SMALL = replace(SETTINGS, image_size=32)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four groups of one cell each, and a photo in a cell of its own."""
    folder = tmp_path_factory.mktemp("photos") / "photos"
    folder.mkdir()
    for cell in range(4):
        for i in range(12):
            name = name_at(500003 + 20 * (cell // 2), 4180003 + 20 * (cell % 2), cell * 100 + i)
            (folder / name).write_bytes(jpeg(64, cell * 100 + i))
    (folder / name_at(600003, 4180003, 999)).write_bytes(jpeg(64, 1))
    return folder


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set that one build makes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    build(photos, out, SMALL, HERE)
    return out


@pytest.mark.slow
def test_tasks_in_any_order_and_a_finish_make_the_bytes_of_one_build(photos, whole, tmp_path):
    out, source = tmp_path / "out", Source.of(photos)
    shards = [build_share(source, out, SMALL, HERE, index=i, count=3) for i in (2, 0, 1)]
    assert shards == [1, 2, 1]
    assert not (out / "dataset.json").exists()
    assemble(source, out, SMALL, HERE, count=3)
    assert contents(out) == contents(whole)


def test_a_finish_before_all_tasks_are_done_names_the_missing_shards_and_tasks(photos, tmp_path):
    out, source = tmp_path / "out", Source.of(photos)
    build_share(source, out, SMALL, HERE, index=1, count=3)
    with pytest.raises(JobError, match=r"3 of 4 shards missing \(group-00.*run task 0,2 of 3 again"):
        assemble(source, out, SMALL, HERE, count=3)
    with pytest.raises(JobError, match="run the tasks that write them again"):
        assemble(source, out, SMALL, HERE)
    assert not (out / "dataset.json").exists()


def test_more_tasks_than_shards_do_no_harm(photos, tmp_path):
    assert build_share(Source.of(photos), tmp_path / "out", SMALL, HERE, index=6, count=7) == 0


@pytest.mark.slow
def test_tasks_that_race_for_an_empty_folder_make_the_bytes_of_one_build(photos, whole, tmp_path):
    out = tmp_path / "out"
    command = [
        *COMMAND[:2],
        "--source",
        photos,
        "--out",
        out,
        "--image-size",
        "32",
        "--workers",
        "1",
        "--task-count",
        "3",
    ]
    tasks = [subprocess.Popen([*command, "--task-index", str(i)], stderr=subprocess.PIPE) for i in range(3)]
    for task in tasks:
        _, printed = task.communicate()
        assert task.returncode == 0, printed.decode()
    done = subprocess.run([*command, "--finish"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(whole)


def test_a_dry_run_tells_counts_disk_and_time_and_leaves_only_the_list(photos, tmp_path):
    out = tmp_path / "out"
    made = dry_run(Source.of(photos), out, SMALL, Machinery(2))
    built = build(photos, tmp_path / "real", SMALL, HERE).manifest
    assert [p.name for p in out.iterdir()] == ["listing.parquet"]
    assert (len(made.plan.order), len(made.plan.skipped), made.trial.bad.total()) == (48, 1, 0)
    assert built.bytes * 0.5 < made.bytes_needed < built.bytes * 1.5
    assert made.seconds > 0
    assert made.bytes_free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


@pytest.mark.parametrize("share", [None, 0.7])
def test_a_dry_run_says_that_a_build_would_stop_for_its_bad_photos(photos, tmp_path, capsys, share):
    source = shutil.copytree(photos, tmp_path / "photos")
    for number, photo in enumerate(sorted(source.iterdir())):
        if number % 4:
            photo.write_bytes(photo.read_bytes()[:400])
    (source / "notes.txt").write_text("")
    made = dry_run(Source.of(source), tmp_path / "out", SMALL, Machinery(1, share))
    print_forecast(made, "out")
    said = capsys.readouterr().out
    assert "bad         about 36 of 49 photos: TOO MANY, more than " in said
    assert f"{'34' if share else '25'} stop a build (--max-bad-share)" in said
    assert "ignored     1 file of other kinds (.jpg, .jpeg, .png, .webp are photos)" in said
    with pytest.raises(JobError, match="36 of 49 photos are bad"):
        build(source, tmp_path / "out", SMALL, replace(HERE, max_bad_share=share))
    print_forecast(dry_run(Source.of(source), tmp_path / "o", SMALL, Machinery(1, 0.8)), "o")
    assert "TOO MANY" not in capsys.readouterr().out


def test_a_source_that_holds_queries_beside_training_photos_is_told(photos, tmp_path):
    for name in ("train/database", "test/queries"):
        shutil.copytree(photos, tmp_path / "city" / name)
    told = {}
    for source in (tmp_path / "city", tmp_path / "city" / "train"):
        words = ["--source", source, "--out", tmp_path / "out", "--image-size", "64", "--dry-run"]
        words += ["--max-bad-share", "1"]
        told[source.name] = subprocess.run([*COMMAND[:2], *words], capture_output=True, text=True).stderr
    assert f"warning: {tmp_path / 'city'} holds test/ beside train/: queries would be trained on\n" in told["city"]
    assert "warning" not in told["train"]
    words = ["--out", tmp_path / "out", "--retry-quarantined"]  # which takes no photos from the current folder
    done = subprocess.run([*COMMAND[:2], *words], capture_output=True, text=True, cwd=tmp_path / "city")
    assert "warning" not in done.stderr


def test_the_command_prints_a_forecast(photos, whole, tmp_path):
    words = ["--source", photos, "--out", tmp_path / "out", "--image-size", "64", "--dry-run"]
    done = subprocess.run([*COMMAND[:2], *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "free: enough" in done.stdout
    groups = re.findall(r"^ +(\d|all) +([\d,]+) +([\d,]+) +[\d.]+$", done.stdout, re.MULTILINE)
    classes = Dataset.open(whole).classes
    expected = {str(g): (classes.count(g), int(classes.of_group(g).images.sum())) for g in classes.groups}
    assert {g: (int(n), int(images)) for g, n, images in groups} == expected | {"all": (4, 48)}
    for line in (
        r"^skipped +1 photo",
        r"^trial +48 images \(none bad\)",
        r"^disk +about .* needed",
        r"^time +about .* s ",
    ):
        assert re.search(line, done.stdout, re.MULTILINE)


def test_a_disk_that_surely_lacks_the_room_is_refused_before_a_shard_is_written(photos, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("preprocessing.trial.shutil.disk_usage", lambda _: usage._replace(free=20_000))
    with pytest.raises(JobError, match=r"48 images need about .* kB and the disk has 20.0 kB free; free some space"):
        build(photos, tmp_path / "out", SMALL, HERE)
    assert not list((tmp_path / "out").glob("group-*"))
    monkeypatch.undo()
    build(photos, tmp_path / "out", SMALL, HERE)
    assert Dataset.open(tmp_path / "out").manifest.images == 48


@pytest.mark.parametrize(
    "arguments",
    [
        ["--add", "x", "--dry-run"],
        [],
        ["--source", "x", "--task-index", "3", "--task-count", "3"],
        ["--source", "x", "--zone", "61"],
    ],
)
def test_arguments_that_make_no_sense_together_are_one_line_and_exit_with_2(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["build_shards.py", "--out", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as exit:
        entry(main)
    printed = capsys.readouterr().err
    assert (exit.value.code, printed.startswith("error: "), printed.count("\n")) == (2, True, 1)
    assert not (tmp_path / "out").exists()
