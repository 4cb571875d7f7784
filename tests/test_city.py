"""The procedural city: plan, names, photos, and the folder that make_city writes."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import utm
from conftest import CITY
from present import present
from test_build import ROOT
from tiny import fill, small_disk

from preprocessing.city.buildings import cast
from preprocessing.city.plan import (
    CELL,
    FIELD_OF_VIEW,
    MIN_PHOTOS_PER_CELL,
    CitySettings,
    Panorama,
    Plan,
)
from preprocessing.city.streetview import Renderer
from preprocessing.city.view import Lens
from preprocessing.city.writer import photo_path, render_city
from shards.console import JobError, WrongArguments
from shards.names import parse_name


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan(CitySettings(seed=1, size=128, val_queries=20, test_queries=30))


@pytest.fixture(scope="module")
def renderer(plan: Plan) -> Renderer:
    return Renderer(plan)


def photos(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.jpg"))}


def of_split(plan: Plan, split: str) -> list[Panorama]:
    return [pano for pano in plan.panoramas if pano.split == split]


def classes(plan: Plan) -> dict[tuple[int, int], int]:
    cells: Counter[tuple[int, int]] = Counter()
    for pano in of_split(plan, "train"):
        east, north = plan.to_utm(pano.x, pano.y)
        cells[math.floor(east / CELL), math.floor(north / CELL)] += len(pano.headings)
    return {cell: n for cell, n in cells.items() if n >= MIN_PHOTOS_PER_CELL}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_default_city_has_four_groups_of_at_least_25_classes(seed: int) -> None:
    cells = classes(Plan(CitySettings(seed=seed, val_queries=0, test_queries=0)))
    groups = Counter((east % 2, north % 2) for east, north in cells)
    assert len(groups) == 4
    assert min(groups.values()) >= 25
    assert 100 <= len(cells) <= 180
    assert 40 <= np.median(list(cells.values())) <= 90


def test_names_are_those_of_sf_xl_and_agree_with_utm(plan: Plan) -> None:
    for pano in plan.panoramas[::150]:
        path = Path(photo_path(plan, pano, 0))
        name = parse_name(str(path))
        east, north = utm.from_latlon(name.latitude, name.longitude, 10, "S")[:2]
        assert (name.zone, name.band, len(name.pano)) == (10, "S", 22)
        assert math.hypot(name.east - float(east), name.north - float(north)) < 1.0  # five decimals of a degree
        assert name.timestamp.startswith(str(plan.calendar[pano.year]))
        assert 1 <= int(name.timestamp[4:]) <= 12
        assert len(path.name.split("@")) == 16
        if pano.split == "train":
            assert path.parent.name == f"{math.floor(present(name.latitude) * 100) / 100:.2f}"


def test_every_photo_has_its_own_name(plan: Plan) -> None:
    names = [Path(photo_path(plan, pano, k)).name for pano in plan.panoramas for k in range(len(pano.headings))]
    assert len(set(names)) == len(names)


def test_queries_come_from_years_and_positions_that_training_never_saw(plan: Plan) -> None:
    track = np.array([(pano.x, pano.y) for pano in of_split(plan, "train")])
    known = classes(plan)
    years = {split: {pano.year for pano in of_split(plan, split)} for split in ("train", "val", "test")}
    assert not years["train"] & years["val"]
    assert not years["train"] & years["test"]
    assert not years["val"] & years["test"]
    for pano in of_split(plan, "val") + of_split(plan, "test"):
        assert np.hypot(track[:, 0] - pano.x, track[:, 1] - pano.y).min() > 0.5
        east, north = plan.to_utm(pano.x, pano.y)
        assert (math.floor(east / CELL), math.floor(north / CELL)) in known


def test_no_camera_stands_in_a_building_and_every_query_sees_facades(plan: Plan) -> None:
    box = plan.buildings.box
    for pano in plan.panoramas[::40] + of_split(plan, "test"):
        inside = (box[:, 0] < pano.x) & (pano.x < box[:, 2]) & (box[:, 1] < pano.y) & (pano.y < box[:, 3])
        assert not inside.any()
    for pano in of_split(plan, "val") + of_split(plan, "test"):
        assert plan.sees_buildings(pano.x, pano.y, pano.headings[0])


def test_rays_meet_boxes_where_geometry_says() -> None:
    boxes = np.array([(4.0, -1.0, 6.0, 1.0, 3.0), (-9.0, -1.0, -8.0, 1.0, 3.0), (2.0, 2.0, 3.0, 3.0, 3.0)])
    enter = cast(boxes, 0.0, 0.0, np.array([1.0, -1.0, 1.0, 0.0]), np.array([0.0, 0.0, 1.0, 1.0]))
    expected = np.full((4, 3), np.inf)
    expected[0, 0], expected[1, 1], expected[2, 2] = 4.0, 8.0, 2.0
    np.testing.assert_allclose(enter, expected, atol=1e-6)


def test_facade_edges_stand_where_a_pinhole_camera_projects_them(plan: Plan, renderer: Renderer) -> None:
    pano = of_split(plan, "train")[200]
    around = renderer.look_around(pano)
    size, heading = plan.settings.size, pano.headings[0]
    focal = size / 2 / math.tan(math.radians(FIELD_OF_VIEW / 2))
    lens = Lens(size, size, focal, size / 2, pano.x, pano.y, pano.height, plan.angle_of(heading))
    image = np.zeros((size, size, 3), np.uint8)
    depth = renderer._draw_buildings(image, around, lens).astype(np.float64)
    east, north = plan.to_utm(pano.x, pano.y)
    for column in range(3, size, 17):
        if not np.isfinite(depth[column]):
            continue
        aside = (column + 0.5 - size / 2) / focal * depth[column]
        turn = math.radians(heading)
        hit_east = east + depth[column] * math.sin(turn) + aside * math.cos(turn)
        hit_north = north + depth[column] * math.cos(turn) - aside * math.sin(turn)
        c, s = math.cos(plan.rotation), math.sin(plan.rotation)
        de, dn = hit_east - plan.to_utm(0, 0)[0], hit_north - plan.to_utm(0, 0)[1]
        x, y = c * de + s * dn, c * dn - s * de
        box = plan.buildings.box
        edge = np.minimum.reduce([abs(box[:, 0] - x), abs(box[:, 2] - x), abs(box[:, 1] - y), abs(box[:, 3] - y)])
        on_wall = (box[:, 0] - 0.01 < x) & (x < box[:, 2] + 0.01) & (box[:, 1] - 0.01 < y) & (y < box[:, 3] + 0.01)
        assert (on_wall & (edge < 0.01)).any()
        foot = size / 2 + focal * pano.height / depth[column]
        if foot < size - 2:
            drawn = np.flatnonzero(image[:, column].any(1))
            assert abs(drawn.max() + 1 - foot) <= 1.0


def test_a_place_looks_more_like_itself_in_another_year_than_like_another_place(plan: Plan, renderer: Renderer) -> None:
    stops = of_split(plan, "train")

    def look(pano: Panorama, heading: float) -> np.ndarray:
        view = Panorama(
            pano.index, "train", pano.year, pano.drive, pano.x, pano.y, pano.height, (heading,), pano.pano_id
        )
        image = renderer.photo(renderer.look_around(view), 0)
        small = cv2.resize(image[: len(image) * 5 // 8], (16, 10), interpolation=cv2.INTER_AREA).astype(float)
        small -= small.mean((0, 1))
        return small / np.linalg.norm(small)

    first, second = [], []
    for pano in [p for p in stops if p.year == 0][20:420:40]:
        later = min((p for p in stops if p.year == 1), key=lambda p: math.hypot(p.x - pano.x, p.y - pano.y))
        first.append(look(pano, 60.0))
        second.append(look(later, 60.0))
    likeness = np.tensordot(np.array(first), np.array(second), ((1, 2, 3), (1, 2, 3)))
    best = likeness.argmax(1) == np.arange(len(likeness))
    assert best.mean() >= 0.6


def test_photos_differ_between_years_and_are_neither_dark_nor_blank(plan: Plan, renderer: Renderer) -> None:
    stops = of_split(plan, "train")
    for pano in stops[::110]:
        image = renderer.photo(renderer.look_around(pano), 1)
        assert image.shape == (128, 128, 3)
        assert image.dtype == np.uint8
        assert 40 < image.mean() < 215
        assert image.std() > 15


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_number_of_workers(city: Path, tmp_path: Path) -> None:
    render_city(tmp_path / "two", CITY, workers=2)
    assert photos(tmp_path / "two") == photos(city)


def test_another_seed_gives_another_city(city: Path) -> None:
    other = Plan(CitySettings(**{**CITY.__dict__, "seed": 4}))
    names = {Path(photo_path(other, pano, 0)).name for pano in other.panoramas}
    assert not names & {Path(path).name for path in photos(city)}


def test_folder_record_and_counts(city: Path) -> None:
    record = json.loads((city / "city.json").read_text())
    found = photos(city)
    assert record["complete"]
    assert record["settings"] == CITY.__dict__
    assert record["photos"]["total"] == len(found)
    assert record["bytes"] == sum(map(len, found.values()))
    assert len(list((city / "val/queries").iterdir())) == record["photos"]["val"] == CITY.val_queries
    assert len(list((city / "test/queries").iterdir())) == record["photos"]["test"] == CITY.test_queries
    assert all(
        path.split("/")[:2] in (["train", "database"], ["val", "queries"], ["test", "queries"]) for path in found
    )
    assert all(data[:2] == b"\xff\xd8" and data[-2:] == b"\xff\xd9" for data in found.values())
    assert record["example"] in found


def test_the_same_command_again_changes_nothing(city: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in city.rglob("*")}
    render_city(city, CITY, workers=1)
    assert "already complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in city.rglob("*")}


@pytest.mark.slow
def test_an_interrupted_city_goes_on_to_the_same_bytes(city: Path, tmp_path: Path) -> None:
    out = tmp_path / "half"
    render_city(out, CITY, workers=1)
    record = json.loads((out / "city.json").read_text())
    (out / "city.json").write_text(json.dumps({**record, "complete": False}))
    written = sorted(out.rglob("*.jpg"))
    for path in written[::3]:
        path.unlink()
    (written[1].parent / ".left.jpg.partial").write_bytes(b"half a photo")
    render_city(out, CITY, workers=1)
    assert photos(out) == photos(city)
    assert not list(out.rglob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_names_the_photo_and_the_city_goes_on_once_there_is_room(
    city: Path, tmp_path: Path, workers: int
) -> None:
    with small_disk(tmp_path / "disk") as disk:
        fill(disk, leave=1 << 20)
        with pytest.raises(OSError, match="No space left on device") as full:
            render_city(disk / "city", CITY, workers)
        assert full.value.filename.startswith(f"{disk}/city/")
        assert full.value.filename.endswith(".jpg")
        assert ".partial" not in full.value.filename
        (disk / "other").unlink()
        render_city(disk / "city", CITY, workers)
        assert photos(disk / "city") == photos(city)
        assert not list(disk.rglob("*.partial"))


@pytest.mark.slow
def test_ctrl_c_ends_a_city_in_a_word_also_while_its_workers_start(tmp_path: Path) -> None:
    command: list[str | Path] = [
        sys.executable,
        ROOT / "preprocessing" / "make_city.py",
        "--out",
        tmp_path / "city",
        "--workers",
        "2",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(children.read_text().split()) < 2:  # multiprocessing's own, and a worker
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.15)  # it is at its imports now
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err


def test_a_folder_with_something_else_is_refused_and_left_alone(city: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(JobError, match="holds other files"):
        render_city(tmp_path, CITY, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(JobError, match=r"other settings \(seed\)"):
        render_city(city, CitySettings(**{**CITY.__dict__, "seed": 9}), workers=1)
    with pytest.raises(JobError, match="is a file"):
        render_city(tmp_path / "mine.txt", CITY, workers=1)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "city.json").write_text("{")
    with pytest.raises(JobError, match="cannot be read"):
        render_city(tmp_path / "broken", CITY, workers=1)


def test_a_city_without_cells_for_its_queries_is_one_clear_line_and_not_an_endless_search(tmp_path: Path) -> None:
    sparse = CitySettings(blocks=1, size=64, years=1, headings=1, step=20.0, val_queries=1, test_queries=1)
    with pytest.raises(JobError, match=r"no room for 1 val queries .* smaller --step"):
        render_city(tmp_path / "city", sparse, workers=1)
    assert not (tmp_path / "city").exists()  # so that other settings may be tried there


@pytest.mark.parametrize("wrong", [{"size": 32}, {"blocks": 0}, {"years": 0}, {"quality": 101}, {"step": 0.1}])
def test_settings_out_of_range_are_named(wrong: dict[str, int]) -> None:
    with pytest.raises(WrongArguments, match=f"--{next(iter(wrong))} must be from"):
        CitySettings(**wrong)
