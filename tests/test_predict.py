"""evaluation/predict.py as a user runs it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import utm
from PIL import Image
from present import present
from tiny import SOUTH, WEST, ZONE, class_table, photo, write_queries
from tiny_run import write_run

from evaluation import predict
from evaluation.places import east_north, exif_position, great_circle, known_position, top_places
from evaluation.ranking import Answers
from shards.console import JobError, WrongArguments


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("predict") / "run")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_queries(tmp_path / "photos")


def run_here(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit code of predict.py with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, words), "--cpu"])
    return predict.main()


def with_gps(path: Path, latitude: tuple[float, ...], north: str, longitude: tuple[float, ...], east: str) -> Path:
    """A photo of the first cell with a GPS position in its EXIF data."""
    exif = Image.Exif()
    exif.get_ifd(0x8825).update({1: north, 2: latitude, 3: east, 4: longitude})
    Image.fromarray(photo(WEST, SOUTH, 32, 3)).save(path, exif=exif, quality=95)
    return path


def test_json_names_places_in_degrees_with_metres_and_confidence(
    run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(monkeypatch, "--checkpoint", run, folder, "--json", "--top", 3) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["photos"]) == 16
    assert said["failed"] == []
    near = 0
    for answered in said["photos"]:
        places = answered["places"]
        assert 1 <= len(places) <= 3
        assert all(0 < place["confidence"] <= 1 for place in places)
        for i, place in enumerate(places):
            assert place["uncertainty_m"] >= 14
            for other in places[:i]:
                assert abs(place["east"] - other["east"]) + abs(place["north"] - other["north"]) > 25
        assert answered["known_position"]["source"] == "name"
        best = places[0]
        near += best["distance_m"] <= 25
        # tiny's names hold a rough latitude and longitude; the position comes from their UTM fields.
        assert best["latitude"] == pytest.approx(37.77, abs=0.05)
        assert best["longitude"] == pytest.approx(-122.5, abs=0.05)
    assert near >= 13


@pytest.mark.parametrize(("words", "within"), [([], "within 25 m"), (["--apart", 12345.5], "within 12345.5 m")])
def test_the_table_says_within_what_distance_its_probabilities_are(
    run: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[object],
    within: str,
) -> None:
    assert run_here(monkeypatch, "--checkpoint", run, sorted(folder.iterdir())[0], *words) == 0
    _, head, first, *_, last = capsys.readouterr().out.splitlines()
    assert head.split("  68 %")[0].endswith(f"  {within}")
    assert first.index(" %") + 2 == head.index(within) + len(within)
    assert last == f"1 photo answered; confidence {within}, not calibrated (evaluate.py --val-queries does that)"


def test_geojson_has_longitude_before_latitude(
    run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = sorted(folder.iterdir())[0]
    assert run_here(monkeypatch, "--checkpoint", run, first, "--geojson", "--top", 1) == 0
    (feature,) = json.loads(capsys.readouterr().out)["features"]
    longitude, latitude = feature["geometry"]["coordinates"]
    assert (longitude, latitude) == (pytest.approx(-122.5, abs=0.05), pytest.approx(37.77, abs=0.05))
    assert feature["properties"]["rank"] == 1


def test_bad_photos_are_one_line_each_and_the_rest_is_answered(
    run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = sorted(folder.iterdir())
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.jpg").write_bytes(good[0].read_bytes()[:300])
    (folder / "text.jpg").write_text("no photo")
    words = ["--checkpoint", run, folder, folder / "absent.jpg", folder.parent / "*.none"]
    assert run_here(monkeypatch, *words) == 1
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 5
    assert all(line.startswith("error: ") for line in said.err.splitlines())
    assert "16 photos answered, 5 failed" in said.out


def test_patterns_and_folders_name_each_photo_once(
    run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = sorted(folder.iterdir())[0]
    assert run_here(monkeypatch, "--checkpoint", run, folder / "*.jpg", folder, first) == 0
    assert "16 photos answered" in capsys.readouterr().out


def test_other_files_of_folders_are_one_line_with_their_extensions_and_hidden_ones_are_not_worth_it(
    run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--checkpoint", run, folder, folder.parent / "ph*", folder]
    for name in (".DS_Store", "._a.jpg"):
        (folder / name).write_bytes(b"")
    assert run_here(monkeypatch, *words) == 0
    assert capsys.readouterr().err == ""
    below = folder / "below"
    below.mkdir()
    for name in ("a.TIF", "b.tif", "c.heic", "README"):
        (below / name).write_bytes(b"")
    said = "note: ignored 4 files of other kinds: 2 .tif, 1 without extension, 1 .heic"
    photos = " (.jpg, .jpeg, .png, .webp are photos)\n"
    assert run_here(monkeypatch, *words, "--json") == 0
    out, err = capsys.readouterr()
    assert (len(json.loads(out)["photos"]), err) == (16, said + photos)
    for number in range(8):
        (below / f"d.{number}").write_bytes(b"")
    assert run_here(monkeypatch, *words) == 0
    err = capsys.readouterr().err
    assert err.startswith("note: ignored 12 files of other kinds: 2 .tif, 1 without extension, 1 .heic, 1 .0, ")
    assert err.endswith(f", 6 of other extensions{photos}")
    assert run_here(monkeypatch, "--checkpoint", run, below) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("note: ignored 12 files")
    assert second.startswith(f"error: {below}: no photos found")


def test_an_empty_name_is_no_folder(
    run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)  # what Path("") stands for
    assert run_here(monkeypatch, "--checkpoint", run, "") == 1
    said = capsys.readouterr()
    assert "0 photos answered, 1 failed" in said.out
    assert said.err == "error: '': no such photo, folder or pattern\n"


def test_a_closed_output_is_no_traceback(run: Path, folder: Path) -> None:
    photo = str(sorted(folder.iterdir())[0])
    words = [sys.executable, predict.__file__, "--checkpoint", str(run), photo, "--cpu"]
    closed = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *words], stderr=subprocess.PIPE, text=True, check=False)
    assert (closed.returncode, closed.stderr) == (0, "")


def test_the_distance_to_the_exif_position_is_printed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_gps(tmp_path / "a.jpg", (37.0, 46.0, 1.2), "N", (122.0, 30.0, 0.0), "W")
    assert run_here(monkeypatch, "--checkpoint", run, path) == 0
    assert "EXIF GPS: 37.76700, -122.50000" in capsys.readouterr().out


def test_exif_positions_are_read_in_all_quarters_and_nonsense_is_none(tmp_path: Path) -> None:
    south = exif_position(with_gps(tmp_path / "s.jpg", (33.0, 30.0, 0.0), "S", (70.0, 0.0, 36.0), "E"))
    assert south is not None
    assert (south.latitude, south.longitude) == (-33.5, pytest.approx(70.01))
    assert exif_position(with_gps(tmp_path / "n.jpg", (95.0, 0.0, 0.0), "N", (1.0, 0.0, 0.0), "E")) is None
    assert exif_position(with_gps(tmp_path / "w.jpg", (9.0, 0.0, 0.0), "N", (185.0, 0.0, 0.0), "E")) is None
    assert exif_position(with_gps(tmp_path / "l.jpg", (33.0, 30.0, 0.0), "", (70.0, 0.0, 36.0), "W")) is None
    assert exif_position(with_gps(tmp_path / "l.jpg", (33.0, 30.0, 0.0), "N", (70.0, 0.0, 36.0), "?")) is None
    assert exif_position(with_gps(tmp_path / "z.jpg", (0.0, 0.0, 0.0), "N", (0.0, 0.0, 0.0), "E")) is None
    (tmp_path / "t.jpg").write_text("no photo")
    assert exif_position(tmp_path / "t.jpg") is None
    assert exif_position(tmp_path / "absent.jpg") is None


def test_a_name_without_a_zone_lies_in_that_of_the_classes() -> None:
    name = Path(f"@{WEST}@{SOUTH}@x@.jpg")
    with_zone = known_position(Path(f"@{WEST}@{SOUTH}@{ZONE}@S@.jpg"), 33)
    assert known_position(name, ZONE) == with_zone
    assert known_position(name, 0) is None
    assert known_position(Path("plain.jpg"), ZONE) is None


@pytest.mark.parametrize(("band", "degrees"), [("M", -7.2), ("N", 0.9), ("S", 37.8), ("G", -44.5)])
def test_the_band_of_a_name_tells_its_hemisphere_whatever_that_of_the_classes(band: str, degrees: float) -> None:
    east, north, _, found = utm.from_latlon(degrees, -122.5)
    assert found == band
    for southern in (False, True):
        known = present(known_position(Path(f"@{east}@{north}@10@{band}@.jpg"), 33, southern=southern))
        assert (known.source, known.latitude, known.longitude) == (
            "name",
            pytest.approx(degrees),
            pytest.approx(-122.5),
        )
        assert east_north(known, 10, southern=band < "N") == pytest.approx((east, north))
        assert east_north(known, 0, southern=False) is None


@pytest.mark.parametrize(("east", "north"), [("999999999999", "5"), ("1e300", "5"), (f"{WEST}", "99999999999")])
def test_a_name_that_lies_nowhere_on_earth_is_no_known_position(east: str, north: str) -> None:
    assert known_position(Path(f"@{east}@{north}@{ZONE}@S@.jpg"), ZONE) is None


def test_places_are_farther_apart_than_asked_and_as_many_as_asked() -> None:
    classes = class_table()
    order = np.random.default_rng(0).permutation(16)[None]
    answers = Answers(order, *(np.arange(16, dtype=np.float32)[None] for _ in range(3)))
    centers = classes.centers()
    for apart in (0.0, 20.0, 30.0, 40.0):  # cells are 20 m wide: some centres are exactly so far from each other
        expected: list[int] = []
        for row in order[0].tolist():
            if all(np.hypot(*(centers[row] - centers[better])) > apart for better in expected):
                expected.append(row)
        for count in (1, 3, 16):
            places = top_places(answers, 0, classes, count=count, apart=apart)
            assert [(place.east, place.north) for place in places] == [tuple(centers[row]) for row in expected[:count]]
            assert [place.label for place in places] == classes.label[expected[:count]].tolist()
            assert [place.confidence for place in places] == [order[0].tolist().index(row) for row in expected[:count]]


def test_great_circles_are_those_of_a_sphere() -> None:
    for latitude, longitude, other_latitude, other_longitude in np.random.default_rng(0).uniform(-90, 90, (100, 4)):
        one, other = (
            np.array([np.cos(phi) * np.cos(theta), np.cos(phi) * np.sin(theta), np.sin(phi)])
            for phi, theta in np.radians([(latitude, longitude * 2), (other_latitude, other_longitude * 2)])
        )
        angle = np.arctan2(np.linalg.norm(np.cross(one, other)), one @ other)
        found = great_circle(latitude, longitude * 2, other_latitude, other_longitude * 2)
        assert found == pytest.approx(6_371_008.8 * angle, rel=1e-9)
    assert great_circle(48, 11, 48, 11) == 0
    assert great_circle(10, 179.9995, 10, -179.9995) == pytest.approx(109.5, abs=0.1)


def test_a_class_map_of_the_south_answers_in_the_south(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    southern = write_run(tmp_path / "southern", replace(class_table(), southern=True))
    Image.fromarray(photo(WEST, SOUTH, 64, 0)).save(tmp_path / "a.jpg")
    answers = []
    for of, words in ((run, ["--southern"]), (southern, []), (southern, ["--southern"])):
        assert run_here(monkeypatch, "--checkpoint", of, "--json", tmp_path / "a.jpg", *words) == 0
        answers.append(json.loads(capsys.readouterr().out)["photos"][0]["places"][0]["latitude"])
    assert answers[0] < 0
    assert answers == [answers[0]] * 3


def test_a_class_map_without_a_zone_answers_in_metres_but_not_as_geojson(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plane = write_run(tmp_path / "plane", replace(class_table(), zone=0))
    assert run_here(monkeypatch, "--checkpoint", plane, folder) == 0
    assert "easting m" in capsys.readouterr().out
    with pytest.raises(JobError, match="no UTM zone"):
        run_here(monkeypatch, "--checkpoint", plane, folder, "--geojson")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name at least one photo"),
        (["a.jpg", "--top", "0"], "--top: at least 1"),
        (["a.jpg", "--apart", "inf"], "--apart: .*finite"),
        (["a.jpg", "--json", "--geojson"], "not both"),
    ],
)
def test_wrong_arguments_are_named(run: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str) -> None:
    with pytest.raises(WrongArguments, match=said):
        run_here(monkeypatch, "--checkpoint", run, *words)
