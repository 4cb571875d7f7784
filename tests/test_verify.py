"""Verification finds any damage."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import HERE, SETTINGS
from photos import write_csv, write_listed
from present import present

from preprocessing.build import build
from preprocessing.sources import Source
from shards import verification
from shards.checksums import DamagedChecksums, read_checksums, seal
from shards.console import entry
from shards.dataset import Dataset
from shards.files import atomic_write_json
from shards.layout import CHECKSUMS, MANIFEST, PLAN
from shards.verification import verify
from shards.verify import main, print_summary

SCRIPT = Path(__file__).resolve().parent.parent / "shards" / "verify.py"
TAR, IDX, TABLE = (f"group-00/group-00-000000.{kind}" for kind in ("tar", "idx", "parquet"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a data set but the record of the command that made it."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "provenance.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def flip(path: Path, at: int, bits: int = 0xFF) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bits
    path.write_bytes(data)


def files_with_problems(folder: Path) -> set[str]:
    return {problem.file for problem in verify(folder).problems}


def only_problem(folder: Path) -> str:
    problems = verify(folder).problems
    assert len(problems) == 1, [str(p) for p in problems]
    return str(problems[0])


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("words", [["--workers", "0"], ["--source", "photos"]])
def test_wrong_arguments_are_one_line_and_exit_with_2(dataset, monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["verify.py", str(dataset.path), *words])
    with pytest.raises(SystemExit) as exit:
        entry(main)
    printed = capsys.readouterr().err
    assert (exit.value.code, printed.startswith("error: "), printed.count("\n")) == (2, True, 1)


def test_a_built_data_set_is_sound_with_and_without_checksums(dataset, copy):
    for folder in (dataset.path, copy):
        report = verify(folder)
        assert report.problems == []
        assert (report.images, report.shards) == (dataset.manifest.images, dataset.manifest.shards)
        assert report.bytes == dataset.manifest.bytes
    assert report.sealed


@pytest.mark.slow
def test_a_flipped_byte_at_any_of_sixty_random_places_is_found(copy):
    files = sorted(p for p in copy.rglob("*") if p.suffix in (".tar", ".idx", ".parquet"))
    assert len(files) >= 15
    rng = np.random.default_rng(0)
    for turn in range(60):
        path = files[turn % len(files)]
        before = path.read_bytes()
        at, bits = int(rng.integers(len(before))), int(rng.integers(1, 256))
        flip(path, at, bits)
        assert str(path.relative_to(copy)) in files_with_problems(copy), (path, at, bits)
        path.write_bytes(before)
    assert verify(copy).problems == []


@pytest.mark.parametrize("name", ["dataset.json", "plan.json", "classes.parquet", "quarantine.jsonl", CHECKSUMS, IDX])
def test_a_file_above_the_shards_that_was_changed_is_found(copy, name):
    if name == "quarantine.jsonl":
        (copy / name).write_bytes(b'{"source": "x.jpg", "reason": "truncated", "detail": ""}\n')
    else:
        flip(copy / name, len((copy / name).read_bytes()) // 2, 1)
    assert files_with_problems(copy) == {name}


def test_a_shard_in_another_groups_folder_is_no_shard(copy):
    (copy / CHECKSUMS).unlink()
    moved = {f"group-00/group-01-000000.{kind}" for kind in ("tar", "idx", "parquet")}
    for name in moved:
        shutil.copy(copy / name.replace("group-00", "group-01"), copy / name)
    problems = verify(copy).problems
    assert {(p.file, p.kind) for p in problems} == {(name, "extra") for name in moved}


def test_every_part_of_a_tar_is_checked_and_the_sample_named(copy):
    table = pq.read_table(copy / TABLE)
    key, offset, size = (table[name][5].as_py() for name in ("key", "offset", "size"))
    padded = size + -size % 512
    for at, what in [
        (offset - 512, "the photo's tar header is damaged"),
        (offset - 512 + 300, "the photo's tar header is damaged"),
        (offset, "the photo fails its checksum"),
        (offset + size - 1, "the photo fails its checksum"),
        (offset + padded + 10, "the label's tar header is damaged"),
        (offset + padded + 512, "the label is damaged"),
        (offset + padded + 1023, "the label is damaged"),
    ]:
        flip(copy / TAR, at, 1)
        assert only_problem(copy) == f"{TAR}: sample {key}: {what}"
        flip(copy / TAR, at, 1)
    padding = next(i for i, s in enumerate(table["size"].to_pylist()) if s % 512)
    flip(copy / TAR, table["offset"][padding].as_py() + table["size"][padding].as_py())
    assert "the padding after the photo is damaged" in only_problem(copy)
    flip(copy / TAR, table["offset"][padding].as_py() + table["size"][padding].as_py())
    flip(copy / TAR, -1)
    assert only_problem(copy) == f"{TAR}: the end of the archive is damaged"


def test_a_truncated_a_longer_and_an_empty_tar_are_found(copy):
    whole = (copy / TAR).read_bytes()
    table = pq.read_table(copy / TABLE)
    offset, key = (table[name][7].as_py() for name in ("offset", "key"))
    (copy / TAR).write_bytes(whole[: offset + 100])
    assert only_problem(copy) == (
        f"{TAR}: sample {key}: the file ends here, at byte {offset + 100}; {len(table) - 7:,} samples are cut off"
    )
    (copy / TAR).write_bytes(whole[:-512])
    assert "bytes long instead of" in only_problem(copy)
    (copy / TAR).write_bytes(whole + b"x")
    assert "bytes long instead of" in only_problem(copy)
    (copy / TAR).write_bytes(b"")
    assert "sample 000000000: the file ends here, at byte 0" in only_problem(copy)


def test_many_damaged_samples_of_one_shard_are_counted_and_not_all_listed(copy):
    data = bytearray((copy / TAR).read_bytes())
    offsets = pq.read_table(copy / TABLE)["offset"].to_pylist()
    for offset in offsets:
        data[offset] ^= 1
    (copy / TAR).write_bytes(data)
    problems = verify(copy).problems
    assert len(problems) == 11
    assert f"{len(offsets) - 10:,} more samples" in str(problems[-1])


@pytest.mark.parametrize(
    "name", [TAR, IDX, TABLE, "dataset.json", "classes.parquet", "index/group-00.size.npy", "plan.json"]
)
def test_a_missing_file_is_found_and_what_does_not_belong_is_named(copy, name):
    (copy / name).unlink()
    (problem,) = verify(copy).problems
    assert (problem.file, problem.kind) == (name, "missing")


def test_extra_files_of_any_kind_are_named(copy):
    extra = [
        "notes.txt",
        "group-00/group-00-000007.tar",
        "group-09/photo.jpg",
        "index/old.npy",
        "group-01/.a.1.partial",
    ]
    for name in extra:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("x")
    os.mkfifo(copy / "pipe")
    (copy / "group-00" / "deeper").mkdir()
    for kind in ("tar", "idx", "parquet"):
        shutil.copy(copy / f"group-00/group-00-000000.{kind}", copy / f"group-00/group-00-000001.{kind}")
        extra.append(f"group-00/group-00-000001.{kind}")
    problems = verify(copy).problems
    assert {p.file for p in problems} == {*extra, "pipe", "group-00/deeper"}
    assert {p.kind for p in problems} == {"extra"}


def test_without_checksums_a_shard_of_another_number_and_wrong_counts_are_found(dataset, tmp_path):
    folder = tmp_path / "city"
    shutil.copytree(dataset.path, folder)
    (folder / CHECKSUMS).unlink(missing_ok=True)
    for kind in ("tar", "idx", "parquet"):
        shutil.copy(folder / f"group-00/group-00-000000.{kind}", folder / f"group-00/group-00-000002.{kind}")
    text = {str(p) for p in verify(folder).problems}
    assert any("group-00-000002.parquet: notes number 0, but it is 2" in t for t in text)
    assert any("group-00-000002.parquet: its keys begin at 000000000" in t for t in text)
    assert "group-00/group-00-000001.parquet: missing" in text
    assert any("classes.parquet: group 0, label 0 has" in t for t in text)
    assert any("dataset.json: says shards 4, but it is 5" in t for t in text)


def test_without_checksums_every_count_and_setting_of_the_manifest_is_compared(dataset, tmp_path):
    folder = tmp_path / "city"
    shutil.copytree(dataset.path, folder)
    (folder / CHECKSUMS).unlink(missing_ok=True)
    manifest = json.loads((folder / MANIFEST).read_text())
    names = ["shards", "images", "bytes", "classes", "groups", "utm_zone", "M", "N", "skipped", "quarantined"]
    changed = {name: manifest[name] + 1 for name in names}
    atomic_write_json(folder / MANIFEST, manifest | changed)
    text = [str(p) for p in verify(folder).problems]
    expected = [f"{MANIFEST}: says {name} {value}, but it is {manifest[name]}" for name, value in changed.items()]
    expected += [f"{MANIFEST}: says {name} {changed[name]}, {PLAN} says {manifest[name]}" for name in ("M", "N")]
    assert sorted(text) == sorted(expected)


@pytest.mark.parametrize("key", ["x", "-00000001", "\u0660" * 9, "0" * 96, "000000001", "9" * 9])
def test_a_table_whose_keys_are_no_ascending_numbers_is_no_sample_table(dataset, tmp_path, key):
    folder = tmp_path / "city"
    shutil.copytree(dataset.path, folder)
    (folder / CHECKSUMS).unlink(missing_ok=True)
    table = pq.read_table(folder / TABLE)
    keys = pa.array([key, *table["key"].to_pylist()[1:]])
    pq.write_table(table.set_column(table.schema.get_field_index("key"), "key", keys), folder / TABLE)
    assert f"{TABLE}: not a sample table (its keys are not ascending numbers)" in map(str, verify(folder).problems)


def test_a_seal_keeps_the_checksum_of_what_rotted_and_takes_that_of_what_was_written(copy):
    long_ago = 1_000_000_000
    for path in (copy / TABLE, copy / IDX):
        os.utime(path, (long_ago, long_ago))
    before = present(read_checksums(copy))
    flip(copy / TABLE, 100)
    os.utime(copy / TABLE, (long_ago, long_ago))  # a disk that forgets does not touch the time
    flip(copy / "plan.json", 10)
    seal(copy)
    after = present(read_checksums(copy))
    assert {name for name in after if after[name] != before[name]} == {"plan.json"}


def test_the_seal_of_a_build_covers_the_manifest_that_is_about_to_be_written(copy, dataset):
    sealed = (copy / CHECKSUMS).read_bytes()
    (copy / "dataset.json").unlink()
    seal(copy, dataset.manifest)
    assert (copy / CHECKSUMS).read_bytes() == sealed


def test_the_seal_takes_no_other_folder_than_the_data_set(copy, monkeypatch):
    def refuse(*_, **__):
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr("tempfile.gettempdir", refuse)  # as in a container whose root is read-only
    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    manifest = Dataset.open(copy).manifest
    seal(copy, manifest)
    assert verify(copy).problems == []


def test_checksums_are_what_sha256sum_checks(copy):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    done = subprocess.run(["sha256sum", "--check", "--quiet", "--strict", CHECKSUMS], cwd=copy, capture_output=True)
    assert done.returncode == 0, done.stderr
    (copy / CHECKSUMS).write_bytes((copy / CHECKSUMS).read_bytes().replace(b"a", b"b", 1))
    with pytest.raises(DamagedChecksums):
        read_checksums(copy)


@pytest.mark.slow
def test_several_processes_find_what_one_finds(copy, monkeypatch):
    monkeypatch.setattr(verification, "PARALLEL_BYTES", 0)
    flip(copy / TAR, 1000)
    flip(copy / "index" / "group-02.size.npy", 300)
    assert set(verify(copy, workers=2).problems) == set(verify(copy, workers=1).problems)
    assert len(verify(copy, workers=2).problems) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"PAR1" + b"\xff" * 200 + b"PAR1",
        lambda data: bytes(len(data)),
    ],
)
def test_tables_and_manifests_of_any_bytes_are_problems_and_no_crash(copy, damage: Callable[[bytes], bytes]):
    (copy / CHECKSUMS).unlink()
    names = {TABLE, "classes.parquet", "skipped.parquet", "dataset.json", "plan.json", "provenance.json"}
    for name in names:
        (copy / name).write_bytes(damage((copy / name).read_bytes()))
    assert names <= files_with_problems(copy)


@pytest.mark.slow
def test_exit_codes_are_0_for_sound_1_for_problems_and_2_for_wrong_arguments(copy, tmp_path):
    assert run(copy).returncode == 0
    flip(copy / TAR, 1000, 1)
    done = run(copy, "--workers", "1")
    assert done.returncode == 1
    assert f"{TAR}: sample 000000000: the photo fails its checksum" in done.stdout
    assert "1 problem in 1 file;" in done.stdout
    assert run(copy, "--nonsense").returncode == 2
    for folder in (tmp_path / "none", tmp_path):
        done = run(folder)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")


def test_the_verdict_asks_for_photos_only_where_the_repair_needs_them(copy, capsys):
    shutil.rmtree(copy / "index")
    (copy / IDX).unlink()
    for damage, way_out in ((None, "; --repair mends them"), (TAR, "; --repair --source PHOTOS rebuilds them")):
        if damage:
            flip(copy / damage, 1000)
        print_summary(verify(copy), str(copy))
        assert capsys.readouterr().out.rstrip().endswith(way_out)


def test_seal_writes_checksums_of_a_sound_data_set_only(dataset, tmp_path):
    folder = tmp_path / "city"
    shutil.copytree(dataset.path, folder)
    (folder / CHECKSUMS).unlink(missing_ok=True)
    flip(folder / TAR, 1000)
    assert run(folder, "--seal").returncode == 1
    assert not (folder / CHECKSUMS).exists()
    flip(folder / TAR, 1000)
    assert "--seal" in run(folder).stdout
    assert run(folder, "--seal").returncode == 0
    assert read_checksums(folder)


def test_verifying_and_showing_do_not_import_torch():
    code = "import sys, shards.verify, shards.show; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_unfinished_data_set_is_said_to_be_unfinished(copy):
    for name in ("dataset.json", "classes.parquet", CHECKSUMS):
        (copy / name).unlink()
    assert "not finished" in str(next(p for p in verify(copy).problems if p.file == "dataset.json"))
    assert json.loads((copy / "plan.json").read_text())["M"] == 20


def test_a_photo_a_hair_west_or_south_of_the_origin_lies_in_its_cell(tmp_path):
    names = write_listed(tmp_path, 24)
    hairs = [-1e-16, -3.5e-15, -5e-324, -1e-300, -20.0, -0.25] * 2
    place = write_csv(tmp_path / "list.csv", path=names, east=hairs + [0.0, 5e-324] * 6, north=[*hairs, *hairs])
    build(Source.of(place), tmp_path / "out", SETTINGS, HERE)
    assert Dataset.open(tmp_path / "out").classes.cell_east.tolist() == [0, -20]
    assert verify(tmp_path / "out").problems == []
