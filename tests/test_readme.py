"""Every command that README.md, CONTRIBUTING.md and docs/own-data.md show is run on tiny data, in the page's order.

Commands stand in blocks marked `sh`. Each runs as written in a folder laid out as the page says (links to the checkout,
a small rendered city in the place of SF-XL, a folder in the place of a bucket), with `MORE` behind it to keep it small.
`make` is only asked whether it knows the target: what `quickstart` and `test` do is run elsewhere.
"""

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import utm
from photos import name_at, picture
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from tiny import ROOT
from tiny_run import write_run

from shards.names import parse_name

PAGES = ["README.md", "docs/own-data.md", "CONTRIBUTING.md"]
SERVER = "evaluation/serve.py"  # runs until it is stopped
STARTS = re.compile(r"(python|make|accelerate|tensorboard|pip|torchrun|sbatch|docker) ")
TRAIN = """--backbone small_cnn --weights none --freeze-until 0 --descriptor-dim 32 --s 20 --m 0.1 --image-size 32
    --batch-size 16 --iterations-per-epoch 2 --epochs 1 --precision fp32 --threads 1 --cpu"""
# What is put behind a command that holds the words on the left.
MORE = {
    "build_shards.py --source": "--image-size 64 --workers 2",
    "training/train.py": TRAIN,
    "tensorboard ": "--inspect",
    "make ": "--dry-run",
    SERVER: "--port 0 --cpu",
}
INSTEAD = {"launch/eight_gpus.yaml": "launch/cpu.yaml", "--preset paper-b0": "--preset quickstart"}


def blocks(page: str) -> list[tuple[str, list[str]]]:
    """The language and the lines of every fenced block."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [(language, body.splitlines()) for language, body in found]


def commands(page: str) -> list[str]:
    """The commands of a page, each on one line, without comments."""
    lines = [line for language, body in blocks(page) if language == "sh" for line in body]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [" ".join(shlex.split(line, comments=True)) for line in joined.splitlines() if line.strip()]


def tiny_form(command: str, folder: Path) -> list[str]:
    """The words that are run in `folder` for a command of a page."""
    words = command
    for text, other in (INSTEAD | {"s3://bucket": f"file://{folder}/bucket"}).items():
        words = words.replace(text, other)
    for text, more in MORE.items():
        if text in command:
            words += " " + more
    return words.split()


@pytest.fixture
def workspace(city: Path, tmp_path: Path) -> Path:
    """A folder in which the pages' commands find what they name."""
    for room in (
        "preprocessing",
        "shards",
        "training",
        "evaluation",
        "launch",
        "tests",
        "Makefile",
        "pyproject.toml",
        "constraints.txt",
    ):
        (tmp_path / room).symlink_to(ROOT / room)
    sf_xl = tmp_path / "data" / "sf-xl"
    (sf_xl / "test").mkdir(parents=True)
    (sf_xl / "train").symlink_to(city / "train")
    (sf_xl / "val").symlink_to(city / "val")
    (sf_xl / "test" / "queries_v1").symlink_to(city / "test" / "queries")
    queries = sorted((city / "test" / "queries").iterdir())
    (tmp_path / "photo.jpg").symlink_to(queries[0])
    return tmp_path


@pytest.fixture
def own_photos(workspace: Path, city: Path) -> Path:
    """`photos`, `panoramas`, `more_photos`, lists of photos and queries, and an earlier run, for docs/own-data.md."""
    database, queries = city / "train" / "database", city / "test" / "queries"
    (workspace / "photos").symlink_to(database)
    (workspace / "more_photos").symlink_to(queries)
    write_degrees(workspace / "list.csv", database, relative_to=database)
    for name in ("val.csv", "test.csv"):
        write_degrees(workspace / name, queries)
    (workspace / "panoramas").mkdir()
    for i in range(3):
        strip = np.concatenate([picture(64, 10 * i + k) for k in range(6)], axis=1)
        path = workspace / "panoramas" / name_at(500000 + 20 * i + 5, 4180003, i)
        path.write_bytes(simplejpeg.encode_jpeg(strip, quality=90))
    write_run(workspace / "runs" / "b0")
    return workspace


def write_degrees(file: Path, photos: Path, *, relative_to: Path | None = None) -> None:
    """A list of the photos below a folder, with their places by their names."""
    with file.open("w", newline="") as opened:
        rows = csv.writer(opened)
        rows.writerow(["path", "latitude", "longitude"])
        for photo in sorted(photos.rglob("*.jpg")):
            name = parse_name(photo.name)
            place = utm.to_latlon(name.east, name.north, name.zone, name.band)
            rows.writerow([photo.relative_to(relative_to) if relative_to else photo, *(float(x) for x in place)])


def run(command: str, folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = tiny_form(command, folder)
    if SERVER in command:
        with subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            assert server.stdout.readline().startswith("http://127.0.0.1:"), command
            server.terminate()
        return
    result = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"


@pytest.mark.slow
def test_every_command_of_the_readme_runs(workspace: Path) -> None:
    for command in commands("README.md"):
        run(command, workspace)
    assert (workspace / "results" / "report.html").exists()
    assert (workspace / "sf-xl-map.png").exists()


@pytest.mark.slow
def test_every_command_of_the_page_on_contributing_is_known(workspace: Path) -> None:
    for command in commands("CONTRIBUTING.md"):
        run(command, workspace)


@pytest.mark.slow
def test_every_command_of_the_page_on_own_data_runs(own_photos: Path) -> None:
    for command in commands("docs/own-data.md"):
        run(command, own_photos)


def test_the_script_of_the_page_on_own_data_lists_photos_by_gps(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    gps = {1: "S", 2: (22.0, 30.0, 0.0), 3: "W", 4: (48.0, 0.0, 36.0)}
    exif, tags = Image.Exif(), ImageFileDirectory_v2()
    exif.get_ifd(0x8825).update(gps)
    tags[0x8825] = gps
    Image.new("RGB", (16, 16)).save(tmp_path / "photos" / "Foto (3).jpeg", exif=exif)
    Image.new("RGB", (16, 16)).save(tmp_path / "photos" / "scan.tif", tiffinfo=tags)
    Image.new("RGB", (16, 16)).save(tmp_path / "photos" / "none.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "photos" / "phone.avif", exif=exif)
    (script,) = ("\n".join(lines) for language, lines in blocks("docs/own-data.md") if language == "python")
    made = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert (tmp_path / "list.csv").read_text().splitlines()[1:] == [
        "photos/Foto (3).jpeg,-22.5,-48.01",
        "photos/scan.tif,-22.5,-48.01",
    ]
    assert made.stdout.splitlines()[0].startswith("2 photos listed, 2 files left out")
    assert made.stdout.splitlines()[1:] == ["photos/none.png", "photos/phone.avif"]


@pytest.mark.parametrize("page", PAGES)
def test_commands_stand_in_blocks_that_are_run(page: str) -> None:
    assert commands(page)
    for language, lines in blocks(page):
        if language != "sh":
            assert not [line for line in lines if STARTS.match(line)], f"{page}: mark the block with sh"


@pytest.mark.parametrize(
    "page", sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
)
def test_links_of_a_page_lead_to_files(page: str) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text()):
        assert target.startswith("http") or ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_the_loader_gives_batches_as_the_page_on_architecture_says(dataset, capsys) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)
    for there, here in (("data/sf-xl-shards", str(dataset.path)), ("1000", "2")):
        assert there in code
        code = code.replace(there, here)
    exec(code, {})
    sizes = "torch.Size([64, 224, 224, 3]) torch.Size([64])"
    assert capsys.readouterr().out == f"0 {sizes}\n1 {sizes}\n"


def test_modules_that_the_page_on_architecture_names_exist() -> None:
    """A name without a folder is in the folder named before it in its row."""
    for row in re.findall(r"^\|.*\.py.*\|$", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE):
        folder = ""
        for named, module in re.findall(r"`(?:(\w+)/)?(\w+\.py)?`", row):
            folder = named or folder
            assert (ROOT / folder / module).exists(), row


def test_flags_that_the_readme_names_exist() -> None:
    """Flags in running text (troubleshooting): commands in blocks are run anyway."""
    sources = "\n".join(p.read_text() for room in ("preprocessing", "shards", "training", "evaluation", "launch")
                        for p in (ROOT / room).rglob("*") if p.suffix in (".py", ".yaml", ".sh"))  # fmt: skip
    foreign = {"--ipc", "--help", "--incremental-mode", "--resume-train", "--cpu", "--num-processes",
               "--main-process-port", "--config-file", "--quick", "--logdir",
               "--max-restarts"}  # fmt: skip
    for page in PAGES:
        for flag in sorted(set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", (ROOT / page).read_text()))):
            name = flag[2:].replace("-", "_")
            assert flag.replace("_", "-") in foreign or re.search(rf"^    {name}\b", sources, re.MULTILINE), flag
