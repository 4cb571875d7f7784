"""Changes of a data set that lacks something or holds something else: refused in one line, and nothing is changed."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import HERE, SETTINGS
from photos import write_photos
from test_build import contents
from test_updates import begun, sound, write_cell

from preprocessing.build import build
from preprocessing.sources import Source
from preprocessing.updates import add, retry_quarantined
from shards.checksums import seal
from shards.console import JobError
from shards.dataset import Dataset
from shards.layout import CLASSES, MANIFEST, PLAN, QUARANTINE, SKIPPED
from shards.repair import repair
from shards.verification import verify

_ = begun


def more(tmp_path: Path) -> Source:
    write_cell(tmp_path / "more", 0, 3, first=100)
    return Source.of(tmp_path / "more")


@pytest.mark.parametrize("kinds", [("tar", "idx", "parquet"), ("parquet",)])
def test_a_data_set_that_lacks_a_shard_is_not_changed_and_taken_for_whole(begun, tmp_path, kinds):
    for kind in kinds:
        (begun / f"group-00/group-00-000000.{kind}").unlink()
    before = contents(begun)
    for change in (lambda: add(more(tmp_path), begun, HERE), lambda: retry_quarantined(begun, HERE)):
        with pytest.raises(JobError, match=r"1 of 2 shards missing or damaged; run shards/verify\.py"):
            change()
        assert contents(begun) == before
    repair(begun, verify(begun), str(tmp_path / "photos"), 1)
    add(more(tmp_path), begun, HERE)
    sound(begun)


def test_a_shard_lost_while_an_addition_was_interrupted_is_missed_too(begun, tmp_path, monkeypatch):
    monkeypatch.setattr("preprocessing.updates.publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        add(more(tmp_path), begun, HERE)
    monkeypatch.undo()
    (begun / "group-02/group-02-000000.parquet").unlink()
    with pytest.raises(JobError, match="1 of 2 shards missing or damaged"):
        retry_quarantined(begun, HERE)


def test_a_shard_under_another_ones_name_is_none(begun, tmp_path):
    for kind in ("tar", "idx", "parquet"):
        shutil.copy(begun / f"group-00/group-00-000000.{kind}", begun / f"group-02/group-02-000000.{kind}")
    before = contents(begun)
    with pytest.raises(JobError, match="1 of 2 shards missing or damaged"):
        add(more(tmp_path), begun, HERE)
    assert contents(begun) == before
    build(tmp_path / "photos", begun, SETTINGS, HERE)  # writes the one that is not there
    sound(begun)


def test_a_shard_of_another_data_set_is_one_line(begun, tmp_path):
    write_photos(tmp_path / "others", cells=9)
    build(tmp_path / "others", tmp_path / "other", SETTINGS, HERE)
    for kind in ("tar", "idx", "parquet"):
        shutil.copy(tmp_path / f"other/group-00/group-00-000000.{kind}", begun / f"group-00/group-00-000000.{kind}")
    with pytest.raises(
        JobError, match=r"group-00-000000\.parquet: labels from 0 to 4, .* 2 classes; run shards/verify"
    ):
        build(tmp_path / "photos", begun, SETTINGS, HERE)


@pytest.mark.parametrize("name", [PLAN, CLASSES, SKIPPED, QUARANTINE, MANIFEST])
def test_what_a_change_goes_by_is_held_against_its_checksum(begun, tmp_path, name):
    write_photos(tmp_path / "others", cells=5, per_cell=14)
    (next((tmp_path / "others").iterdir())).write_bytes(b"no photo")
    build(tmp_path / "others", tmp_path / "other", SETTINGS, HERE)
    shutil.copy(tmp_path / "other" / name, begun / name)
    before = contents(begun)
    for change in (lambda: add(more(tmp_path), begun, HERE), lambda: retry_quarantined(begun, HERE)):
        with pytest.raises(JobError, match=f"{name}: differs from its checksum; run shards/verify.py"):
            change()
    assert contents(begun) == before


@pytest.mark.parametrize("name", ["000002.parquet", "000002-skipped.parquet"])
def test_a_table_of_other_columns_where_a_revision_belongs_is_one_line(begun, tmp_path, name):
    add(more(tmp_path), begun, HERE)
    shutil.copy(begun / CLASSES, begun / "revisions" / name)
    seal(begun)
    with pytest.raises(JobError, match=r"000002\.parquet: damaged, or a file beside it"):
        retry_quarantined(begun, HERE)


@pytest.mark.parametrize("text", [b"\xff\xfe", b"{", b"[1]\n", b'{"source": "a"}\n', b"7\n"])
def test_a_damaged_list_of_bad_photos_is_one_line(begun, tmp_path, text):
    (begun / QUARANTINE).write_bytes(text)
    seal(begun)
    with pytest.raises(JobError, match=rf"{QUARANTINE}: damaged \(.*run shards/verify\.py --repair"):
        add(more(tmp_path), begun, HERE)


@pytest.mark.parametrize("plan", ["null", "[]", "7", '{"codec": 7}', "text"])
def test_a_damaged_plan_is_one_line(begun, tmp_path, plan):
    if plan.startswith("{"):
        plan = json.dumps(json.loads((begun / PLAN).read_text()) | json.loads(plan))
    (begun / PLAN).write_text(plan)
    seal(begun)
    with pytest.raises(JobError, match=f"{PLAN}: damaged"):
        add(more(tmp_path), begun, HERE)


def test_an_addition_with_later_libraries_keeps_the_name_of_the_first_codec(begun, tmp_path, monkeypatch):
    codec = json.loads((begun / MANIFEST).read_text())["codec"]
    monkeypatch.setattr("preprocessing.plan.codec_name", lambda codec: "simplejpeg 9, OpenCV 9")
    add(more(tmp_path), begun, HERE)
    assert json.loads((begun / MANIFEST).read_text())["codec"] == codec
    sound(begun)
    with pytest.raises(JobError, match=f"was made with {codec}, .*; install those versions"):
        build(tmp_path / "photos", begun, SETTINGS, HERE)


def test_a_copy_of_a_table_under_another_name_is_no_shard(begun, tmp_path):
    table = begun / "group-00/group-00-000000.parquet"
    shutil.copy(table, table.with_name("group-00-000000 (copy).parquet"))
    add(more(tmp_path), begun, HERE)
    assert Dataset.open(begun).manifest.images == 48 + 3
    sound(begun)
