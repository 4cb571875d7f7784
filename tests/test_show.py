"""The person's view of a data set: its numbers add up, its pictures show what they say."""

import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFont

from shards import pictures
from shards.classes import ClassTable
from shards.console import JobError
from shards.dataset import Dataset
from shards.index import open_index
from shards.layout import PLAN, SAMPLE_COLUMNS, shard_tables
from shards.overview import count_reasons, describe, histogram, measure_sizes
from shards.pictures import cell_map, contact_sheet, group_colour, spread_classes

SCRIPT = Path(__file__).resolve().parent.parent / "shards" / "show.py"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


def with_cells(dataset: Dataset, east: np.ndarray, north: np.ndarray, N: int = 2) -> Dataset:
    """The data set with other cells, one image each."""
    M = dataset.manifest.M
    group = (east // M % N * N + north // M % N).astype(np.int32)
    order = np.argsort(group, kind="stable")
    group, east, north = group[order], east[order], north[order]
    label = np.concatenate([np.arange(count) for count in np.bincount(group)]).astype(np.int32)
    classes = ClassTable(M, N, 10, group, label, east, north, np.ones(len(east), np.int64))
    return replace(dataset, classes=classes)


def test_sizes_add_up_to_the_files_on_disk(dataset):
    sizes = measure_sizes(dataset)
    files = [p for p in dataset.path.rglob("*") if p.is_file() and p.parent != dataset.path]
    assert sizes.total == sum(p.stat().st_size for p in files)
    assert sizes.jpeg + sizes.framing == dataset.manifest.bytes
    index = open_index(dataset.path, dataset.classes)
    assert sizes.jpeg == sum(int(of_group.size.sum()) for of_group in index.values())


def test_the_histogram_counts_every_class_once():
    images = np.array([0, 1, 10, 12, 14, 15, 99, 100, 100, 70_000])
    rows = histogram(images)
    assert sum(count for _, _, count in rows) == len(images)
    assert rows[0][:2] == (0, 0)
    for low, high, count in rows:
        assert count == np.count_nonzero((images >= low) & (images <= high))
    assert all(a[1] + 1 == b[0] for a, b in pairwise(rows))
    assert histogram(np.zeros(0, np.int64)) == []


def test_the_text_tells_counts_classes_sizes_and_reasons(dataset, tmp_path):
    copy = tmp_path / "city"
    shutil.copytree(dataset.path, copy)
    lines = ['{"source": "a.jpg", "reason": "truncated"}'] * 3 + ['{"source": "b.jpg", "reason": "evil\\u001b[31m"}']
    (copy / "quarantine.jsonl").write_text("\n".join(lines) + "\n")
    text = describe(Dataset.open(copy))
    made = dataset.manifest
    assert f"{made.images:,} images of {made.classes:,} classes" in text
    for group in dataset.classes.groups:
        assert f"{group:>5}  {dataset.classes.count(group):>9}" in text
    assert "3  truncated" in text
    assert "\x1b" not in text
    assert f"{measure_sizes(dataset).jpeg / made.images:,.0f}" in text
    assert count_reasons(Dataset.open(copy))["truncated"] == 3


def test_the_map_shows_each_cell_in_its_groups_colour_with_north_up(dataset):
    east, north = np.array([500_000, 500_020, 500_000, 500_020]), np.array([4_000_000, 4_000_000, 4_000_020, 4_000_020])
    shown = with_cells(dataset, east, north)
    page = np.asarray(cell_map(shown))
    left = np.arange(page.shape[1]) < 200  # of the legend, which has the same colours
    places = {g: np.argwhere((page == group_colour(g, 4)).all(2) & left) for g in range(4)}
    middle = {group: at.mean(0) for group, at in places.items()}
    assert all(len(at) > 1000 for at in places.values())
    for group, e, n in zip(shown.classes.group, shown.classes.cell_east, shown.classes.cell_north, strict=True):
        for other, e2, n2 in zip(shown.classes.group, shown.classes.cell_east, shown.classes.cell_north, strict=True):
            if n > n2:
                assert middle[group][0] < middle[other][0]
            if e > e2:
                assert middle[group][1] > middle[other][1]


@pytest.mark.parametrize(("N", "cells", "spread"), [(5, 20_000, 9_000), (2, 40, 8_000_000), (1, 1, 1)])
def test_a_map_of_any_extent_has_a_bounded_size(dataset, N, cells, spread):
    rng = np.random.default_rng(0)
    east, north = (rng.integers(0, spread, cells) // 20 * 20 + 4_000_000 for _ in range(2))
    page = cell_map(with_cells(dataset, east, north, N))
    assert max(page.size) < 3000
    assert min(page.size) > 150


@pytest.mark.parametrize(("cells", "mixed"), [(2000, False), (2600, True)])  # of 20 m, across
def test_on_the_map_of_a_large_city_no_group_hides_the_others(dataset, cells, mixed):
    east, north = (500_000 + 20 * np.array([*ends, cells - 1]) for ends in ([0, 1, 0, 1], [0, 0, 1, 1]))
    page = np.asarray(cell_map(with_cells(dataset, east, north))).astype(int)
    south_west = page[-97 - 3 : -96, 110:113].reshape(-1, 3)
    colours = [group_colour(group, 4) for group in range(4)]
    if mixed:
        assert (abs(south_west - np.mean(colours, axis=0)).max(axis=1) <= 1).any()
    else:
        assert all((south_west == colour).all(axis=1).any() for colour in colours)


@pytest.mark.parametrize(("across", "down"), [(1, 1), (2, 1), (9, 9), (16, 3), (3, 1_600), (1_600, 3), (400, 400)])
@pytest.mark.parametrize("corner", [0, 499_980, 98_000_000])
def test_no_two_words_of_a_map_lie_over_each_other_and_both_axes_have_some(dataset, monkeypatch, across, down, corner):
    words = {}

    def note(pen, at, text, size, ink=None, anchor="la"):
        words[at] = (anchor + text, pen.textbbox(at, text, font=ImageFont.load_default(size), anchor=anchor))

    monkeypatch.setattr(pictures, "_write", note)
    corners = [corner + 20 * np.array([0, size - 1]) for size in (across, down)]
    page = cell_map(with_cells(dataset, *corners))
    for (one, a), (other, b) in combinations(words.values(), 2):
        assert min(a[2], b[2]) < max(a[0], b[0]) or min(a[3], b[3]) < max(a[1], b[1]), (one, other)
    assert all(box[0] >= 0 and box[2] <= page.width and box[3] <= page.height for _, box in words.values())
    assert {"ma", "rm"} <= {text[:2] for at, (text, _) in words.items() if at[0] == 100 or text.startswith("ma")}


@pytest.mark.parametrize("west", [5, 26, 35])
def test_the_enlarged_part_of_a_map_has_the_densest_cells_in_its_middle(dataset, west):
    east, north = (a.ravel() for a in np.meshgrid(west + np.arange(34), 26 + np.arange(20)))
    east, north = np.append(east, [0, 1_000, 1_000]), np.append(north, [0, 0, 1_000])
    page = np.asarray(cell_map(with_cells(dataset, 500_000 + 20 * east, 4_000_000 + 20 * north)))
    legend = page.shape[1] - 244
    detail = page[92 + 26 + 24 * 4 + 60 :, legend : legend + 216]
    shown = np.argwhere(np.any([(detail == group_colour(group, 4)).all(2) for group in range(4)], axis=0))
    assert len(shown) == 25 * 34 * 20
    assert (shown.min(0) + shown.max(0))[1] / 2 == pytest.approx(108, abs=4)


def test_groups_have_colours_of_their_own():
    for groups in (1, 4, 8, 25):
        assert len({group_colour(g, groups) for g in range(groups)}) == groups


def test_classes_on_the_contact_sheet_come_from_all_groups_in_turn(dataset):
    index = open_index(dataset.path, dataset.classes)
    chosen = spread_classes(index, 6)
    assert [group for group, _ in chosen] == [0, 1, 2, 3, 0, 1]
    assert len(set(chosen)) == 6
    assert all(label in index[group].labels for group, label in chosen)
    every = spread_classes(index, 10**6)
    assert len(every) == len(set(every)) == len(dataset.classes)


def test_the_contact_sheet_shows_photos_and_marks_the_damaged(dataset, tmp_path):
    whole = np.asarray(contact_sheet(dataset, rows=2, columns=3)).astype(int)
    assert whole.std() > 30
    copy = tmp_path / "city"
    shutil.copytree(dataset.path, copy)
    for table in shard_tables(copy):
        tar = table.with_suffix(".tar")
        tar.write_bytes(bytes(tar.stat().st_size))
    damaged = np.asarray(contact_sheet(Dataset.open(copy), rows=2, columns=3)).astype(int)
    assert damaged.shape == whole.shape
    assert (damaged[:, 200:] == (222, 224, 228)).all(2).mean() > 0.4


@pytest.mark.parametrize(
    ("heading", "time", "caption"),
    [
        (725.0, "201206", "5°   2012-06"),
        (-90.0, "2026-05-01T10:00:00Z", "270°   2026-05-01 10:00"),
        (359.7, "2026-05-01 10:00:00.123+02:00", "0°   2026-05-01 10:00"),
        (np.nan, "2026-05-01", "2026-05-01"),
        (np.inf, "on a Sunday", "on a Sunday"),
        (10.0, "on the first Sunday of the month", "10°   on the first Sunday of the …"),
        (10.0, "M" * 10_000, f"10°   {'M' * 14}…"),
    ],
)
def test_below_a_photo_stand_its_heading_within_a_turn_and_its_time(dataset, monkeypatch, heading, time, caption):
    said = []
    monkeypatch.setattr(pictures, "_write", lambda pen, at, text, size, *ink_and_anchor: said.append((size, text)))
    facts = pa.table({"heading": pa.array([heading], pa.float32()), "timestamp": [time]})
    monkeypatch.setattr(pictures, "read_samples", lambda *words: facts)
    contact_sheet(dataset, rows=1, columns=1)
    assert [text for size, text in said if size == 12] == [caption]


def test_a_damaged_table_below_a_current_index_is_named(dataset, tmp_path):
    copy = tmp_path / "city"
    shutil.copytree(dataset.path, copy)
    open_index(copy, dataset.classes)
    table = shard_tables(copy)[0]
    place = pq.read_metadata(table).row_group(0).column(SAMPLE_COLUMNS.names.index("timestamp")).data_page_offset
    with table.open("r+b") as file:
        file.seek(place)
        file.write(b"\xff" * 12)
    with pytest.raises(JobError, match=f"{table.name}: damaged .* run shards/verify.py --repair"):
        contact_sheet(Dataset.open(copy), rows=4, columns=3)


@pytest.mark.slow
def test_pictures_are_written_beside_each_other_and_exit_codes_are_0_1_and_2(dataset, tmp_path):
    done = run(dataset.path, "--out", tmp_path / "new" / "city.png")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"city.png", "city-map.png"}
    for path in (tmp_path / "new").iterdir():
        with Image.open(path) as picture:
            picture.verify()
    assert run(dataset.path, "--out", tmp_path / "city.jpg").returncode == 2
    before = sorted(dataset.path.rglob("*"))
    for out, where in ((dataset.path, "holds"), (dataset.path / "group-00", "lies in")):
        done = run(dataset.path, "--out", out / "city.png")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"error: --out {out}: {where} a data set; name another place\n"
    assert sorted(dataset.path.rglob("*")) == before
    done = run(dataset.path, "--out", tmp_path / "new" / "city.png" / "x.png")
    assert done.returncode == 1
    assert done.stderr.endswith("city.png: File exists, but a folder is needed there\n")
    assert run(tmp_path).returncode == 1
    assert run("--nonsense").returncode == 2


def test_a_data_set_with_a_missing_tar_is_one_clear_line(dataset, tmp_path):
    copy = tmp_path / "city"
    shutil.copytree(dataset.path, copy)
    shard_tables(copy)[0].with_suffix(".tar").unlink()
    done = run(copy)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "verify.py --repair" in done.stderr
    assert (copy / PLAN).exists()


@pytest.mark.parametrize("streams", ["2>&-", "<&- 2>&-", "PYTHONIOENCODING=ascii"])
def test_a_terminal_without_these_characters_and_a_closed_one_are_no_error(dataset, streams):
    word, *variable = (streams,) if ">" in streams else ("", streams)
    command = ["env", *variable, "bash", "-c", f'exec "$@" {word}', "bash", sys.executable, SCRIPT, dataset.path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "images a class" in done.stdout
    command[-2] = SCRIPT.with_name("verify.py")
    assert subprocess.run(command, capture_output=True).returncode == 0
