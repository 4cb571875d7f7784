"""What the benchmarks found becomes a section of RESULTS.md and a picture."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import ROOT

BENCHMARKS = ROOT / "tests" / "benchmarks"
ROWS: dict[str, list[dict[str, object]]] = {
    "loader.json": [
        {"name": "indexed", "storage": "warm", "decoder": "cpu", "cores": 1, "images_per_second": 3000.0},
        {"name": "litdata", "storage": "warm", "decoder": "pil", "cores": 1, "images_per_second": 500.0},
        {"name": "litdata", "storage": "warm", "decoder": "pil", "cores": 2, "images_per_second": 1.0},
        {"name": "webdataset-simplejpeg", "storage": "warm", "decoder": "cpu", "cores": 1, "images_per_second": 2500.0},
    ],
    "training.json": [
        {"name": "head", "milliseconds": 200.0, "peak_bytes": 7},
        {"name": "head-plain", "milliseconds": 700.0, "peak_bytes": 7},
        {"name": "step-small_cnn-64", "forward": 68.1, "data": None},
    ],
    "preprocessing.json": [
        {"name": "ours", "images_per_second_per_core": 900.0, "photo_bytes": 50_000.0},
        {"name": "pillow", "images_per_second_per_core": 300.0, "photo_bytes": 50_000.0},
        {"name": "ours", "images_per_second_per_core": 800.0, "photo_bytes": 24_000.0},
        {"name": "pillow", "images_per_second_per_core": 1600.0, "photo_bytes": 24_000.0},
    ],
}
PAGE = "# Figures\n\nNewest first.\n\n## 2020-01-01: earlier\n\nten\n"
FASTER, SLOWER = (0x44, 0x77, 0xAA), (0xEE, 0x88, 0x33)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows as the scripts leave them, and a page of results."""
    for name, rows in ROWS.items():
        (tmp_path / name).write_text(json.dumps(rows))
    (tmp_path / "RESULTS.md").write_text(PAGE)
    return tmp_path


def render(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    files: list[str | Path] = [folder / word if word.endswith(".json") else word for word in words]
    places: list[str | Path] = ["--results", folder / "RESULTS.md", "--picture", folder / "speed.png"]
    return subprocess.run(
        [sys.executable, BENCHMARKS / "render.py", *files, *places], capture_output=True, text=True, cwd=folder
    )


def has(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((np.abs(picture.astype(int) - colour).max(axis=2) < 4).any())


def test_a_section_before_all_others_shows_ratios_and_every_row_and_a_second_run_replaces_it(folder: Path) -> None:
    for _ in range(2):
        done = render(folder, *ROWS, "--quick")
        assert done.returncode == 0, done.stderr
    page = (folder / "RESULTS.md").read_text()
    headings = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert [heading[10:] for heading in headings] == [": make benchmark, quick form", ": earlier"]
    assert page.startswith("# Figures\n\nNewest first.\n\n## 2")
    assert page.endswith("\n\n## 2020-01-01: earlier\n\nten\n")
    compared = {line.split(" | ")[1]: line.split(" | ")[-1] for line in page.splitlines() if " | " in line}
    assert compared["LitData, torchvision"] == "6.00 |"  # more images a second, on as many cores
    assert compared["plain autograd"] == "3.50 |"  # fewer milliseconds
    assert len(re.findall(r"^\| Photos of (50|24) kB.* (3\.00|0\.50) \|$", page, re.MULTILINE)) == 2
    assert "| step-small_cnn-64 | 68.1 |  |" in page


def test_the_picture_has_its_own_paper_and_tells_slower_from_faster(folder: Path) -> None:
    render(folder, "loader.json", "training.json")
    faster = np.asarray(Image.open(folder / "speed.png").convert("RGBA"))
    assert (faster[0, 0] == 255).all()  # white and opaque: reads on a dark page too
    assert (faster[..., 3] == 255).all()
    assert (faster[:, :15] == 255).all()  # the longest name begins within the paper
    assert has(faster[..., :3], FASTER)
    assert not has(faster[..., :3], SLOWER)
    render(folder, "preprocessing.json")
    assert has(np.asarray(Image.open(folder / "speed.png").convert("RGB")), SLOWER)


@pytest.mark.parametrize("text", ["{", '{"name": "head"}', "[1]"])
def test_what_are_no_rows_is_one_line_and_the_page_stays(folder: Path, text: str) -> None:
    (folder / "training.json").write_text(text)
    done = render(folder, "loader.json", "training.json")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "training.json" in done.stderr
    assert (folder / "RESULTS.md").read_text() == PAGE
    assert not (folder / "speed.png").exists()


def test_every_row_that_is_compared_is_one_that_a_benchmark_writes() -> None:
    others = "\n".join(p.read_text() for p in BENCHMARKS.glob("*.py") if p.name != "render.py")
    names = re.findall(r'"name": "([\w-]+)"', (BENCHMARKS / "render.py").read_text())
    assert len(names) > 15
    for name in names:
        assert f'"{name}"' in others or name.startswith("end-to-end-"), name
