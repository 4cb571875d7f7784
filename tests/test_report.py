"""The HTML report, opened in a real browser where there is one."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import simplejpeg
import torch
from browser import BROWSER, FLAGS, Page
from photos import with_spoilt_footer
from tiny import SOUTH, WEST, ZONE, class_table, photo, write_dataset, write_queries
from tiny_run import evaluate_here, write_run

from evaluation import evaluate
from evaluation.known_photos import KnownPhotos
from evaluation.pages import to_script
from evaluation.places import Place
from evaluation.thumbnails import data_url, thumbnails
from shards.console import JobError
from shards.layout import shard_tables
from shards.names import PhotoName, format_name, parse_name
from shards.sample_photos import SamplePhotos

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report over two query sets, one of them with hostile, unreadable and unlocated photos."""
    folder = tmp_path_factory.mktemp("report")
    run, queries = write_run(folder / "run"), write_queries(folder / "queries")
    odd = write_queries(folder / "odd")
    inner = sorted(queries.iterdir())[5]  # of a cell that has others all around, and rightly answered
    good = inner.read_bytes()
    (odd / f"@{WEST + 300}@{SOUTH + 300}@{ZONE}@S@{HOSTILE}.jpg").write_bytes(good)
    (odd / "plain.jpg").write_bytes(good)
    known = parse_name(inner.name)
    east, north = (int(metres) // 20 * 20 + 10 for metres in (known.east, known.north))
    for step in range(8):  # all around the centre of its cell, 25.03 m from it: wrong by less than is shown
        x, y = 25.03 * np.cos(step * np.pi / 4), 25.03 * np.sin(step * np.pi / 4)
        (odd / f"@{east + x:.3f}@{north + y:.3f}@{ZONE}@S@edge.jpg").write_bytes(good)
    (odd / f"@{WEST}@{SOUTH}@empty.jpg").write_bytes(b"")
    shards = write_dataset(folder / "shards").path
    words = ["--checkpoints", run, "--queries", queries, odd, "--out", folder / "out", "--shards", shards, "--cpu"]
    words += ["--val-queries", queries]
    before, sys.argv = sys.argv, ["evaluate.py", *map(str, words)]
    try:
        assert evaluate.main() == 0
    finally:
        sys.argv = before
    return folder / "out" / "report.html"


def open_page(page: Path, profile: Path) -> str:
    """The page's elements after its scripts have run, as HTML."""
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={profile}", "--virtual-time-budget=3000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HOME": str(profile)},
    )
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome")
def test_a_browser_shows_the_figures_the_map_and_the_galleries(report: Path, tmp_path: Path) -> None:
    page = open_page(report, tmp_path)
    rows = json.loads((report.parent / "results.json").read_text())["rows"]
    assert 'data-ready="yes"' in page
    for i, row in enumerate(rows):
        shown = re.search(rf'id="row-{i}-lr-at-1">([^<]*)<', page)
        assert shown is not None
        assert float(shown[1]) == pytest.approx(row["lr_at_1"], abs=0.051)
    assert [row["fitted"] for row in rows] == [True, False]  # opened first is what nothing was fitted to
    assert f"{rows[1]['queries']}: of {rows[1]['scored']} query photos {rows[1]['lr_at_1']:.1f} % are placed" in page
    assert f'data-queries-on-map="{rows[1]["scored"] - 1}"' in page  # one lies beyond the cells
    assert f"said to hold 68 % of the probability for {rows[1]['percent_within_radius']:.1f} % of the queries." in page
    body = page.split('<script type="application/json"')[0]
    assert body.count("<figure") >= 12
    assert body.count("<svg") == 3
    assert "<img src=x" not in body.replace(html.escape(HOSTILE), "")


@pytest.fixture
def page(report: Path, tmp_path: Path) -> Iterator[Page]:
    """The report in a browser; whatever a test does to it must leave no problem on the page."""
    page = Page(tmp_path)
    try:
        page.open(report.as_uri())
        page.wait_for("document.body?.dataset.ready === 'yes'")
        yield page
        assert not page.problems
    finally:
        page.close()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome")
def test_the_headline_is_that_of_the_row_chosen_and_names_it(report: Path, page: Page) -> None:
    rows = json.loads((report.parent / "results.json").read_text())["rows"]
    assert page.evaluate("$('row').value") == "1"
    for number in (1, 0):
        page.evaluate(f"$('row').value = '{number}'; $('row').onchange()")
        row, said = rows[number], page.evaluate("$('summary').textContent")
        assert said.startswith(
            f"{row['checkpoint']} on {row['queries']}: "
            f"of {row['scored']} query photos {row['lr_at_1']:.1f} % are placed within 25 m "
            f"at the first answer (chance {row['chance']['lr_at_1']:.1f} %), among 16 cells"
        )
        assert ("fitted" in said) == row["fitted"]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome")
def test_numbers_are_rounded_as_in_the_console_and_nouns_follow_them(page: Page) -> None:
    for value, digits in [(21.25, 1), (0.05, 1), (61.35, 1), (2.5, 0), (100.0, 1), (0.125, 2), (1234.5678, 2)]:
        assert page.evaluate(f"number({value}, {digits})") == f"{value:.{digits}f}"
    assert page.evaluate("number(null)") == "–"
    assert page.evaluate("[1, 2, 1234].map((n) => count(n, 'cell'))") == ["1 cell", "2 cells", "1,234 cells"]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome")
def test_where_nothing_was_scored_a_sentence_stands_in_place_of_each_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = tmp_path / "queries"
    queries.mkdir()
    (queries / "plain.jpg").write_bytes(simplejpeg.encode_jpeg(photo(WEST, SOUTH, 64, 0), quality=90))
    words = ["--checkpoints", write_run(tmp_path / "run"), "--queries", queries, "--out", tmp_path / "out"]
    assert evaluate_here(monkeypatch, *words) == 1
    page = Page(tmp_path / "profile")
    try:
        page.open((tmp_path / "out" / "report.html").as_uri())
        page.wait_for("document.body?.dataset.ready === 'yes'")
        assert page.evaluate("$('summary').textContent") == "Nothing was scored: no readable query has a known place."
        for name in ("histogram", "curve", "reliability", "groups", "confident", "farthest", "successes"):
            section = f"$('{name}').closest('section')"
            assert page.evaluate(f"{section}.innerText.split(/\\n+/).slice(1)") == ["Nothing was scored."], name
        assert not page.problems
    finally:
        page.close()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome")
def test_map_and_histogram_count_as_right_what_the_results_count(report: Path, page: Page) -> None:
    for number, row in enumerate(json.loads((report.parent / "results.json").read_text())["rows"]):
        page.evaluate(f"openRow({number})")
        right = round(row["lr_at_1"] / 100 * row["scored"])
        assert page.evaluate("view.scored.filter(view.isRight).length") == right
        bars = "[...$('histogram').querySelectorAll('rect')].filter((bar) => Number(bar.getAttribute('height')))"
        counts = "[...$('histogram').querySelectorAll('text.value')].map((label) => Number(label.textContent))"
        green = page.evaluate(f"{bars}.map((bar) => bar.getAttribute('fill') === RIGHT)")
        numbers = page.evaluate(counts)
        assert sum(numbers) == row["scored"]
        assert sum(n for n, is_right in zip(numbers, green, strict=True) if is_right) == right
    assert page.evaluate("view.answers.error.filter((metres) => metres === 25).length") == 8


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome")
def test_the_map_follows_wheel_drag_and_pointer_and_pointing_draws_only_what_changed(page: Page) -> None:
    page.evaluate("$('map').scrollIntoView()")
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")  # at rest
    page.evaluate("{ const paint = map.paint; map.paint = (...all) => { painted++; paint(...all); } } painted = 0")
    left, top, wide, high = page.evaluate(
        "(({ x, y, width, height }) => [x, y, width, height])(map.canvas.getBoundingClientRect())"
    )

    def mouse(kind: str, x: float, y: float, **more: object) -> None:
        page.command("Input.dispatchMouseEvent", type=kind, x=left + x, y=top + y, **more)

    x, y = page.evaluate("map.toScreen(view.set.east[view.scored[0]], view.set.north[view.scored[0]])")
    mouse("mouseMoved", x, y)
    page.wait_for("!$('card').hidden && map.frame === undefined")
    assert page.evaluate("map.toScreen(view.set.east[map.hovered], view.set.north[map.hovered])") == [x, y]
    assert page.evaluate("painted") == 0
    mouse("mouseMoved", 1, 1)
    page.wait_for("$('card').hidden && map.frame === undefined")
    assert page.evaluate("painted") == 0
    scale, middle = page.evaluate("[map.scale, map.x]")
    mouse("mouseWheel", wide / 2, high / 2, deltaX=0, deltaY=-240)
    page.wait_for(f"map.scale > {scale} * 1.3 && painted >= 1")
    mouse("mousePressed", wide / 2, high / 2, button="left", buttons=1, clickCount=1)
    mouse("mouseMoved", wide / 2 + 60, high / 2, button="left", buttons=1)
    mouse("mouseReleased", wide / 2 + 60, high / 2, button="left", clickCount=1)
    page.wait_for(f"map.x < {middle} && painted > 1")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome")
def test_cells_of_less_than_two_pixels_are_drawn_as_one_picture_that_has_each_at_its_place(page: Page) -> None:
    page.evaluate("map.scale = 1 / view.cells.M; map.draw()")
    page.evaluate(
        "{ const kind = CanvasRenderingContext2D.prototype, fill = kind.fillRect; drawn = 0;"
        " kind.fillRect = function (...all) { drawn++; fill.apply(this, all); } } map.draw()"
    )
    assert page.evaluate("view.cells.east.length") == 16
    assert page.evaluate("drawn") < 4
    assert page.evaluate(
        "(() => { const { canvas, west, north } = pictureOf(view.cells), { width, height } = canvas;"
        " const { data } = canvas.getContext('2d').getImageData(0, 0, width, height);"
        " const at = (k) => (north - view.cells.north[k] - 1) * width + view.cells.east[k] - west;"
        " return view.cells.east.every((_, k) => data[4 * at(k) + 3] === 255) })()"
    )
    page.evaluate("map.scale = 4 / view.cells.M; map.draw()")
    assert page.evaluate("drawn") >= 16


def test_the_report_loads_nothing_from_outside(report: Path) -> None:
    text = report.read_text()
    links = set(re.findall(r"https?://[^\"'\s)]+", text))
    assert links <= {"http://www.w3.org/2000/svg"}  # a namespace, never fetched
    assert "default-src 'none'" in text
    assert not re.search(r"<(script|link|iframe)[^>]+(src|href)=", text)


def test_names_from_outside_cannot_end_the_script() -> None:
    text = to_script({"name": "</script><script>alert(1)</script>", "odd": "\u2028", "error": float("nan")})
    assert "<" not in text
    assert json.loads(text) == {"name": "</script><script>alert(1)</script>", "odd": "\u2028", "error": None}


def test_mistakes_show_a_photo_of_the_answer_and_of_the_true_cell(report: Path) -> None:
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', report.read_text(), re.DOTALL)
    assert text is not None
    data = json.loads(text[1])
    for row, answers in zip(data["rows"], data["answers"], strict=True):
        assert len(answers["error"]) == row["photos"] - row["set_aside"]
        for item in answers["confident"]:
            assert item["answer"].startswith("data:image/jpeg;base64,")
    assert all(item["truth"] for item in data["answers"][0]["confident"])


def test_photos_of_cells_that_cannot_be_had_are_said_and_the_report_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, queries = write_run(tmp_path / "run"), write_queries(tmp_path / "queries")
    damaged = write_dataset(tmp_path / "damaged").path
    for table in shard_tables(damaged):
        table.write_bytes(table.read_bytes()[:-50])
    elsewhere = write_dataset(tmp_path / "elsewhere", class_table(shift=100)).path
    out = tmp_path / "out"
    for shards, said in ((damaged, "shards/verify.py"), (elsewhere, "has none of the cells")):
        words = ["--checkpoints", run, "--queries", queries, "--out", out, "--shards", shards, "--cpu"]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        assert evaluate.main() == 0
        printed = capsys.readouterr().err
        assert said in printed
        assert said in (out / "report.html").read_text()
        for lost in ("cannot be compared with training photos: ", "the report lacks photos of cells: "):
            assert (lost in printed) == (shards == damaged)


def test_queries_that_are_the_training_photos_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, dataset = write_run(tmp_path / "run"), write_dataset(tmp_path / "city")
    queries, others = tmp_path / "queries", write_queries(tmp_path / "others")
    queries.mkdir()
    for table in shard_tables(dataset.path):
        for i, place in enumerate(pq.read_table(table, columns=["east", "north"]).slice(0, 15).to_pylist()):
            name = PhotoName(place["east"], place["north"], ZONE, "S", pano=f"{table.stem}-{i}")
            (queries / format_name(name)).write_bytes(next(others.iterdir()).read_bytes())
    out = tmp_path / "out"
    for folder, told in ((queries, True), (others, False)):
        words = ["--checkpoints", run, "--queries", folder, "--out", out, "--shards", dataset.path, "--cpu"]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        assert evaluate.main() == 0
        said = capsys.readouterr().err
        assert ("compared lie at the very place of a training photo" in said) == told
        assert ("the very place of a training photo" in (out / "report.html").read_text()) == told


def test_a_photo_of_a_cell_is_sought_in_the_shards_that_have_the_cell_alone(tmp_path: Path) -> None:
    classes = class_table(side=8)
    dataset = write_dataset(tmp_path / "city", classes)
    (table,) = shard_tables(dataset.path)[:1]
    samples = pq.read_table(table)
    half = classes.count(0) // 2
    second = table.with_name("group-00-000001.parquet")
    low, high = (samples.filter(chosen) for chosen in (pc.field("label") < half, pc.field("label") >= half))
    pq.write_table(low, table)
    pq.write_table(high, second)
    shutil.copy(table.with_suffix(".tar"), second.with_suffix(".tar"))
    photos = SamplePhotos(dataset)
    cells = [(int(classes.cell_east[row]), int(classes.cell_north[row])) for row in (0, half)]
    assert [len(photos.some_of_cell(cell, classes.M, 20)) for cell in cells] == [10, 10]
    unread = SamplePhotos(dataset)
    second.unlink()  # with thousands of shards in a group, looking into each of them takes seconds
    assert photos.of_cell(cells[0], classes.M) is not None
    for of_lost in (photos, unread):
        with pytest.raises(JobError, match=r"000001.parquet: missing; run shards/verify.py --repair"):
            of_lost.of_cell(cells[1], classes.M)
    table.write_bytes(with_spoilt_footer(table.read_bytes()))
    with pytest.raises(JobError, match=r"group-00-000000.parquet: damaged .* run shards/verify.py --repair"):
        SamplePhotos(dataset).of_cell(cells[0], classes.M)


def test_a_data_set_of_the_other_hemisphere_has_no_photos_of_a_class_map(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "city")
    samples = SamplePhotos(dataset)
    assert samples.covers(dataset.classes)
    assert not samples.covers(replace(dataset.classes, southern=True))


def test_photos_of_a_cell_come_from_a_data_set_at_a_url_as_from_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIVIDE_AND_CLASSIFY_CACHE", str(tmp_path / "cache"))
    dataset = write_dataset(tmp_path / "city")
    here, there = SamplePhotos.open(str(dataset.path)), SamplePhotos.open(f"file://{dataset.path}")
    assert there.dataset is not None
    assert not list(there.dataset.path.rglob("*.tar"))
    cell = (int(dataset.classes.cell_east[3]), int(dataset.classes.cell_north[3]))
    local = here.of_cell(cell, dataset.classes.M, 90)
    assert local is not None
    assert there.of_cell(cell, dataset.classes.M, 90) == local
    some, expected = (photos.some_of_cell(cell, dataset.classes.M, 4) for photos in (there, here))
    assert len(expected) == 4
    assert [photo.read() for photo in some] == [photo.read() for photo in expected]


def test_damaged_photos_are_not_shown_beside_answers(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "city")
    samples, classes = SamplePhotos(dataset), dataset.classes
    table = pq.read_table(shard_tables(dataset.path)[0], filters=[("label", "==", 0)])
    row = int(np.flatnonzero((classes.group == 0) & (classes.label == 0))[0])
    cell = (int(classes.cell_east[row]), int(classes.cell_north[row]))
    place = Place(None, None, cell[0] + 10, cell[1] + 10, 0, 0, 1.0, 1.0, None)

    def describe(images: Sequence[np.ndarray]) -> Future[torch.Tensor]:
        done: Future[torch.Tensor] = Future()
        done.set_result(torch.ones(len(images), 1))
        return done

    def nearest() -> list[dict[str, Any]]:
        return KnownPhotos(samples, classes).nearest(place, torch.ones(1), 64, describe)

    def damage(offsets: list[int]) -> None:
        with shard_tables(dataset.path)[0].with_suffix(".tar").open("r+b") as tar:
            for offset in offsets:
                tar.seek(offset + 40)
                tar.write(b"damaged")

    first, *others = table["offset"].to_pylist()
    damage(others)
    assert len(nearest()) == 1
    damage([first])
    for read in (nearest, lambda: samples.of_cell(cell, classes.M)):
        with pytest.raises(OSError, match=r"group-00-000000.tar: the photo fails its checksum"):
            read()


def test_thumbnails_stay_within_their_budget_and_cover_the_list_evenly(tmp_path: Path) -> None:
    paths = []
    for i in range(300):
        paths.append(tmp_path / f"{i}.jpg")
        paths[-1].write_bytes(simplejpeg.encode_jpeg(photo(i, 0, 64, 0), quality=90))
    everything = thumbnails(paths, 10**9)
    assert all(everything)
    half = thumbnails(paths, sum(map(len, everything)) // 2)
    assert sum(map(len, half)) <= sum(map(len, everything)) // 2
    assert 100 < sum(map(bool, half)) < 200
    assert 20 < sum(map(bool, half[:100])) < 80


@pytest.mark.slow
def test_ten_thousand_queries_make_a_report_of_less_than_20_megabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, queries = write_run(tmp_path / "run"), tmp_path / "queries"
    queries.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)  # no photo compresses worse
    (tmp_path / "noise.jpg").write_bytes(simplejpeg.encode_jpeg(noise, quality=95))
    for i in range(10_000):
        place = PhotoName(
            WEST + i % 100, SOUTH + i // 100, ZONE, "S", 37.7, -122.4, f"a-pano-of-22-letters-{i}", "04", 90.0
        )
        os.link(tmp_path / "noise.jpg", queries / format_name(place))
    words = ["--checkpoints", run, "--queries", queries, "--shards", write_dataset(tmp_path / "shards").path]
    assert evaluate_here(monkeypatch, *words, "--out", tmp_path / "out") == 0
    report = (tmp_path / "out" / "report.html").read_text()
    assert 10e6 < len(report.encode()) < 20e6
    assert report.count("a-pano-of-22-letters-") == 10_000


def test_a_photo_that_cannot_be_read_has_no_thumbnail(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"nothing")
    assert data_url(tmp_path / "a.jpg", 64) == ""
    assert data_url(b"", 64) == ""
