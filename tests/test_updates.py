"""Changes of a finished data set: labels stay, samples become those of a clean build, interruptions do no harm."""

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import HERE, SETTINGS
from photos import jpeg, name_at, write_csv, write_listed, write_photos
from present import present
from test_build import COMMAND, contents, quarantine

from preprocessing.build import build
from preprocessing.build_shards import main
from preprocessing.engine import run_tasks
from preprocessing.finishing import State
from preprocessing.revisions import revisions
from preprocessing.shard_run import Machinery
from preprocessing.sources import Source
from preprocessing.updates import add, retry_quarantined
from shards.console import JobError, entry
from shards.dataset import Dataset
from shards.index import open_index
from shards.layout import CHECKSUMS, REVISION_FILES, shard_tables
from shards.names import parse_name
from shards.reader import ShardReader
from shards.repair import repair
from shards.verification import verify
from shards.verify import print_summary


def samples(out: Path) -> set[tuple]:
    """Group, source's base name, crop and checksum of every sample."""
    rows = set()
    for table in shard_tables(out):
        for row in pq.read_table(table).to_pylist():
            rows.add((table.parent.name, row["source"].rpartition("/")[2], row["heading"], row["crc32"]))
    return rows


def labels(out: Path) -> dict[str, tuple[int, int]]:
    """The cell of every sample's label, by base name."""
    classes = Dataset.open(out).classes
    cells = {}
    for table in shard_tables(out):
        of_group = classes.of_group(int(table.parent.name[-2:]))
        for row in pq.read_table(table, columns=["source", "label"]).to_pylist():
            label = row["label"]
            cells[row["source"].rpartition("/")[2]] = (int(of_group.cell_east[label]), int(of_group.cell_north[label]))
    return cells


def write_cell(folder: Path, cell: int, count: int, first: int = 0, size: int = 96) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(first, first + count):
        paths.append(folder / name_at(500000 + 20 * cell + i % 20, 4180003, (cell + 10) * 1000 + i))
        paths[-1].write_bytes(jpeg(size, abs(cell) * 1000 + i))
    return paths


def sound(out: Path) -> None:
    """Verification finds nothing wrong, and every photo can be read through the index."""
    problems = [str(p) for p in verify(out).problems]
    assert not problems
    index = open_index(out, Dataset.open(out).classes)
    reader = ShardReader(index)
    for group, rows in index.items():
        for row in range(len(rows.size)):
            reader.read(group, row)


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """Cells 0 to 3 with twelve photos each, cell 4 with six, which are skipped."""
    write_photos(tmp_path / "photos")
    write_cell(tmp_path / "photos", 4, 6)
    build(tmp_path / "photos", tmp_path / "out", SETTINGS, HERE)
    return tmp_path / "out"


def test_an_addition_keeps_labels_fills_classes_and_makes_classes_of_cells_that_now_have_enough(begun, tmp_path):
    before = Dataset.open(begun).classes
    shards_before = {t: t.read_bytes() for t in shard_tables(begun)}
    more = tmp_path / "more" / "deep"
    write_cell(more, 0, 3, first=100)  # joins a class
    write_cell(more, 4, 5, first=100)  # with the six skipped ones enough
    write_cell(more, -6, 10)  # a new cell, before the others from west to east
    write_cell(more, 9, 4)  # too few
    shutil.copy(next((tmp_path / "photos").iterdir()), more)  # known
    summary, gain = present(add(Source.of(tmp_path / "more"), begun, HERE))
    after = Dataset.open(begun)
    assert (gain.new, gain.known, gain.images) == (22, 1, 3 + 11 + 10)
    assert sorted(gain.classes.cell_east.tolist()) == [500000 - 120, 500080]
    assert (summary.manifest.revision, summary.manifest.images, summary.manifest.skipped) == (2, 48 + 24, 4)
    for group in before.groups:
        old, new = before.of_group(group), after.classes.of_group(group)
        assert new.cell_east[: len(old)].tolist() == old.cell_east.tolist()
        assert new.label.tolist() == list(range(len(new)))
    assert sorted(after.classes.images.tolist()) == [10, 11, 12, 12, 12, 15]
    assert all(table.read_bytes() == data for table, data in shards_before.items())
    for name, (east, _) in labels(begun).items():
        assert east <= float(name.split("@")[1]) < east + 20
    sound(begun)


def test_after_an_addition_the_samples_are_those_of_a_clean_build_of_both(begun, tmp_path):
    write_cell(tmp_path / "more", 0, 3, first=100)
    write_cell(tmp_path / "more", 4, 5, first=100)
    add(Source.of(tmp_path / "more"), begun, HERE)
    both = tmp_path / "both"
    shutil.copytree(tmp_path / "photos", both / "a")
    shutil.copytree(tmp_path / "more", both / "b")
    build(both, tmp_path / "clean", SETTINGS, HERE)
    assert samples(begun) == samples(tmp_path / "clean")
    assert labels(begun) == labels(tmp_path / "clean")


def test_bad_photos_that_an_addition_accepted_stop_no_later_command(begun, tmp_path):
    for photo in write_cell(tmp_path / "more", 0, 40, first=100)[:30]:
        photo.write_bytes(b"no photo")
    with pytest.raises(JobError, match=r"30 of 40 photos are bad \(30 not an image; e\.g\. @.*: begins with"):
        add(Source.of(tmp_path / "more"), begun, HERE)
    accepted = add(Source.of(tmp_path / "more"), begun, replace(HERE, max_bad_share=0.75))
    assert present(accepted)[1].images == 10
    write_cell(tmp_path / "others", 0, 5, first=200)
    add(Source.of(tmp_path / "others"), begun, HERE)
    before = samples(begun)
    for tar in begun.glob("*/*.tar"):
        tar.unlink()
    repair(begun, verify(begun), str(tmp_path / "photos"), 1)
    sound(begun)
    assert samples(begun) == before


def test_an_addition_of_too_many_rows_without_a_place_names_the_first_as_the_list_does(begun, tmp_path):
    place = tmp_path / "more.csv"
    rows = [*(f"/photos/{i}.jpg,9e5,4e6,33" for i in range(30)), *(f"{i}.jpg,5e5,4.1e6,10" for i in range(10)), ",,,10"]
    place.write_text("\n".join(["path,east,north,zone", *rows]))
    with pytest.raises(
        JobError, match=r"31 of 41 .* \(30 zone mismatch, 1 no path; e\.g\. /photos/0\.jpg: UTM zone 33 "
    ):
        add(Source.of(place), begun, HERE)


def test_an_addition_of_too_many_bad_photos_leaves_the_data_set_as_it_was_and_open_to_others(begun, tmp_path):
    cells = [photo for cell in (1, 8, 9) for photo in write_cell(tmp_path / "more", cell, 20, first=100)]
    good = {photo: photo.read_bytes() for photo in cells}
    for photo in cells[20:]:
        photo.write_bytes(good[photo][:300])
    before = contents(begun)
    with pytest.raises(JobError, match=r"(2[6-9]|3\d|40) of 60 photos are bad"):
        add(Source.of(tmp_path / "more"), begun, Machinery(1))
    assert contents(begun) == before
    sound(begun)
    write_cell(tmp_path / "others", 0, 5, first=200)
    others = shutil.copytree(begun, tmp_path / "first")
    add(Source.of(tmp_path / "others"), others, HERE)
    assert len(samples(others)) == len(samples(begun)) + 5
    for photo in cells:
        photo.write_bytes(good[photo])
    assert present(add(Source.of(tmp_path / "more"), begun, HERE))[1].images == 60
    sound(begun)


def test_an_addition_after_the_clock_was_set_back_is_sound(begun, tmp_path):
    hour_ahead = (begun / CHECKSUMS).stat().st_mtime + 3600
    os.utime(begun / CHECKSUMS, (hour_ahead, hour_ahead))
    write_cell(tmp_path / "more", 0, 3, first=100)
    add(Source.of(tmp_path / "more"), begun, HERE)
    sound(begun)


def test_an_addition_of_photos_where_no_plane_is_makes_no_class_of_them(begun, tmp_path):
    before = Dataset.open(begun).classes
    names = [f"@99999999999.{i:02d}@4180003.00@10@S@{i}@.jpg" for i in range(12)]
    (tmp_path / "more").mkdir()
    for i, name in enumerate(names):
        (tmp_path / "more" / name).write_bytes(jpeg(96, i))
    _, gain = present(add(Source.of(tmp_path / "more"), begun, HERE))
    assert (gain.new, gain.images, len(gain.classes)) == (0, 0, 0)
    assert Dataset.open(begun).classes.fingerprint() == before.fingerprint()
    assert quarantine(begun) == {f"//1/{name}": "coordinates out of range" for name in names}
    sound(begun)


def test_adding_again_changes_nothing_and_what_the_folder_gained_since_is_added(begun, tmp_path):
    write_cell(tmp_path / "more", 0, 3, first=100)
    (tmp_path / "more" / "nowhere.jpg").write_bytes(b"x")
    add(Source.of(tmp_path / "more"), begun, HERE)
    before = contents(begun)
    assert add(Source.of(tmp_path / "more"), begun, HERE) is None
    assert contents(begun) == before
    write_cell(tmp_path / "more", 1, 2, first=100)
    summary, _ = present(add(Source.of(tmp_path / "more"), begun, HERE))
    assert (summary.manifest.revision, summary.manifest.images, summary.manifest.quarantined) == (3, 53, 1)
    assert set(quarantine(begun)) == {"//1/nowhere.jpg"}
    sound(begun)


@pytest.mark.slow
def test_the_first_source_may_grow_and_the_first_command_still_repairs(begun, tmp_path):
    write_cell(tmp_path / "photos", 2, 5, first=100)
    add(Source.of(tmp_path / "photos"), begun, HERE)
    expected = contents(begun)
    sources = [s for t in shard_tables(begun) for s in pq.read_table(t)["source"].to_pylist()]
    assert len(sources) == 53
    assert not [s for s in sources if s.startswith("//")]
    for table in shard_tables(begun):
        table.unlink()
    (begun / "dataset.json").unlink()
    build(tmp_path / "photos", begun, SETTINGS, HERE)
    assert contents(begun) == expected


def test_a_source_keeps_its_number_where_the_first_one_grew_and_is_named_by_a_relative_path(
    begun, tmp_path, monkeypatch
):
    write_cell(tmp_path / "photos", 2, 5, first=100)
    add(Source.of(tmp_path / "photos"), begun, HERE)
    write_cell(tmp_path / "more", 0, 3, first=100)
    add(Source.of(tmp_path / "more"), begun, HERE)
    before = samples(begun)
    for table in shard_tables(begun):
        table.unlink()
    (begun / "dataset.json").unlink()
    monkeypatch.chdir(tmp_path)
    build(Path("photos"), begun, SETTINGS, HERE)
    assert quarantine(begun) == {}
    assert samples(begun) == before
    sound(begun)


def test_a_source_keeps_its_number_where_the_first_one_grew_and_a_link_took_its_place(begun, tmp_path):
    write_cell(tmp_path / "photos", 2, 5, first=100)
    add(Source.of(tmp_path / "photos"), begun, HERE)
    write_cell(tmp_path / "more", 0, 3, first=100)
    add(Source.of(tmp_path / "more"), begun, HERE)
    before = State.of_dataset(begun, revisions(begun)).sources
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    (tmp_path / "photos").symlink_to(tmp_path / "elsewhere")
    assert State.of_dataset(begun, revisions(begun)).sources == before


@pytest.mark.parametrize(
    "moment",
    [
        "before the first shard",
        pytest.param("after the first shard", marks=pytest.mark.slow),
        pytest.param("while shards are moved", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_addition_leaves_the_old_data_set_and_is_finished_by_any_later_command(
    begun, tmp_path, monkeypatch, moment
):
    for cell in range(4):
        write_cell(tmp_path / "more", cell, 3, first=100)
    add(Source.of(tmp_path / "more"), shutil.copytree(begun, tmp_path / "undisturbed"), HERE)

    def killed(*arguments):
        if moment == "after the first shard":
            yield next(run_tasks(*arguments))
        raise KeyboardInterrupt

    before = contents(begun)
    machinery = HERE if moment == "while shards are moved" else replace(HERE, run_tasks=killed)
    if moment == "while shards are moved":
        monkeypatch.setattr("preprocessing.updates.publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        add(Source.of(tmp_path / "more"), begun, machinery)
    monkeypatch.undo()
    now = contents(begun)
    assert {name: now[name] for name in before} == before
    assert Dataset.open(begun).manifest.revision == 1
    if moment == "after the first shard":
        assert add(Source.of(tmp_path / "more"), begun, HERE) is None
    else:
        build(tmp_path / "photos", begun, SETTINGS, HERE)
    assert contents(begun) == contents(tmp_path / "undisturbed")


@pytest.mark.slow
def test_an_addition_that_is_killed_at_any_moment_ends_with_the_bytes_of_an_undisturbed_one(begun, tmp_path):
    for cell in range(4):
        for i in range(0, 200, 20):
            write_cell(tmp_path / "more", cell, 20, first=100 + i)
    command = [*COMMAND[:2], "--workers", "2", "--out", begun, "--add", tmp_path / "more"]
    undisturbed = shutil.copytree(begun, tmp_path / "undisturbed")
    add(Source.of(tmp_path / "more"), undisturbed, HERE)
    moments = np.random.default_rng(0)
    for _ in range(8):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(moments.uniform(0.8, 3))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        Dataset.open(begun)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(begun) == contents(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["group-00/group-00-000000", "group-00/group-00-000001"])
def test_a_shard_repaired_after_a_retry_leaves_out_what_the_retry_brought(begun, tmp_path, lost):
    photos = [p for p in sorted((tmp_path / "photos").iterdir()) if labels(begun).get(p.name) == (500000, 4180000)]
    photos += write_cell(tmp_path / "more", 0, 3, first=100)
    good = {p: p.read_bytes() for p in photos}
    for photo in (photos[0], photos[-1]):
        photo.write_bytes(good[photo][:300])
    out = tmp_path / "damaged"
    build(tmp_path / "photos", out, SETTINGS, HERE)
    add(Source.of(tmp_path / "more"), out, HERE)
    for photo in (photos[0], photos[-1]):
        photo.write_bytes(good[photo])
    assert present(retry_quarantined(out, HERE))[1] == 2
    before, tars = samples(out), {p: p.read_bytes() for p in out.rglob("*.tar")}
    (out / f"{lost}.tar").write_bytes(b"")
    repair(out, verify(out), str(tmp_path / "photos"), 1)
    assert samples(out) == before
    assert {p: p.read_bytes() for p in out.rglob("*.tar")} == tars
    assert quarantine(out) == {}
    sound(out)


def test_a_list_is_added_to_a_folder_with_headings_from_the_list(begun, tmp_path):
    names = write_listed(tmp_path / "more", 12)
    place = write_csv(
        tmp_path / "more" / "list.csv",
        path=names,
        east=[500085.0] * 12,
        north=[4180003.0] * 12,
        heading=list(range(12)),
    )
    _, gain = present(add(Source.of(place), begun, HERE))
    assert gain.images == 18
    rows = {r["source"]: r for t in shard_tables(begun) for r in pq.read_table(t).to_pylist()}
    assert rows["//1/IMG_0007.jpg"]["heading"] == 7
    skipped_before = [r for name, r in rows.items() if "@" in name and 500080 <= r["east"] < 500100]
    assert [np.isfinite(r["heading"]) for r in skipped_before] == [True] * 6
    assert add(Source.of(place), begun, HERE) is None
    sound(begun)


@pytest.mark.parametrize("base", ["list", "list by absolute paths", "folder"])
def test_photos_of_a_list_are_known_however_it_and_those_before_name_them(tmp_path, base):
    photos = write_cell(tmp_path / "photos", 0, 14) + write_cell(tmp_path / "photos" / "deeper", 2, 12)
    photos = [photo.relative_to(tmp_path / "photos") for photo in photos]

    def write_list(name: str, paths: list[str]) -> Source:
        place = [parse_name(path) for path in paths]
        columns = {"east": [p.east for p in place], "north": [p.north for p in place]}
        return Source.of(write_csv(tmp_path / "photos" / name, path=paths, **columns))

    absolute = [str(tmp_path / "photos" / photo) for photo in photos]
    lists = {"list": [str(photo) for photo in photos], "list by absolute paths": absolute}
    source = write_list("base.csv", lists[base]) if base in lists else Source.of(tmp_path / "photos")
    out = tmp_path / "out"
    build(source, out, SETTINGS, HERE)
    new = write_cell(tmp_path / "photos" / ("new" * 20), 0, 3, first=50)
    for name, known in (("longer.csv", lists["list"]), ("absolute.csv", absolute), ("base.csv", lists["list"])):
        paths = [*known, *(f"./deeper/../{photo.relative_to(tmp_path / 'photos')}" for photo in new)]
        done = add(write_list(name, paths), out, HERE)
        assert (done and (done[1].new, done[1].known)) == ((3, 26) if name == "longer.csv" else None)
    done = add(Source.of(tmp_path / "photos"), out, HERE)
    assert done is None
    assert Dataset.open(out).manifest.images == 29
    sound(out)


@pytest.mark.parametrize("name", [f"000002{end}" for end in REVISION_FILES])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"PAR1 and nothing")])
def test_damage_to_what_an_addition_planned_is_found_and_neither_repaired_nor_built_upon(
    begun, tmp_path, capsys, name, damage
):
    write_cell(tmp_path / "more", 0, 3, first=100)
    add(Source.of(tmp_path / "more"), begun, HERE)
    damage(begun / "revisions" / name)
    before = contents(begun)
    report = verify(begun)
    assert [p.file for p in report.problems] == [f"revisions/{name}"]
    print_summary(report, str(begun))
    assert "1 problem in 1 file; --repair tells how to mend them" in capsys.readouterr().out
    with pytest.raises(JobError, match="back from a copy, or build the data set anew"):
        repair(begun, report, str(tmp_path / "photos"), 1)
    write_cell(tmp_path / "more", 1, 3, first=100)
    with pytest.raises(JobError, match=r"000002|revision 2"):
        add(Source.of(tmp_path / "more"), begun, HERE)
    assert contents(begun) == before


@pytest.mark.parametrize(
    ("name", "sealed", "said"),
    [
        ("skipped.parquet", True, "/skipped.parquet: differs from its checksum"),
        ("skipped.parquet", False, ": a table is damaged"),
        ("group-00/group-00-000000.parquet", True, ": 1 of 2 shards missing or damaged"),
        ("checksums.txt", True, "/checksums.txt: damaged"),
    ],
)
def test_a_damaged_table_under_a_change_is_one_line_that_names_the_data_set(
    begun, tmp_path, monkeypatch, capsys, name, sealed, said
):
    (begun / name).write_bytes(b"PAR1 and nothing")
    if not sealed:
        (begun / CHECKSUMS).unlink()
    write_cell(tmp_path / "more", 0, 3, first=100)
    words = ["--out", str(begun), "--add", str(tmp_path / "more")]
    monkeypatch.setattr("sys.argv", ["build_shards.py", *words])
    with pytest.raises(SystemExit) as exit:
        entry(main)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert exit.value.code == 1
    assert len(errors) == 1
    assert f"{begun}{said}" in errors[0]


def test_what_cannot_be_added_is_refused_and_changes_nothing(begun, tmp_path):
    before = contents(begun)
    (tmp_path / "empty").mkdir()
    for place, message in (
        (tmp_path / "none", "no such folder"),
        (tmp_path / "none.csv", "no such list"),
        (tmp_path / "empty", "no photos found"),
        (tmp_path, "inside"),
    ):
        with pytest.raises(JobError, match=message):
            add(Source.of(place), begun, HERE)
    for i in range(40):
        (tmp_path / "empty" / f"{i}.jpg").write_bytes(b"x")
    with pytest.raises(JobError, match="40 of 40 photos are bad"):
        add(Source.of(tmp_path / "empty"), begun, HERE)
    with pytest.raises(JobError, match="no finished data set"):
        add(Source.of(tmp_path / "photos"), tmp_path / "empty", HERE)
    assert contents(begun) == before
