"""Commands that meet on one data set: one at a time, tasks of a plan beside each other."""

import errno
import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HERE, SETTINGS
from photos import write_photos
from present import present
from test_build import ROOT

from preprocessing import claim
from preprocessing.build import build
from preprocessing.claim import TaskLock
from preprocessing.sources import Source
from preprocessing.updates import add, retry_quarantined
from shards.checksums import seal
from shards.console import JobError
from shards.layout import PLAN, PROVENANCE
from shards.locks import at_work
from shards.verification import verify


@pytest.fixture
def built(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos")
    build(tmp_path / "photos", tmp_path / "out", SETTINGS, HERE)
    return tmp_path / "out"


def test_changes_beside_another_command_are_refused(built: Path, tmp_path: Path) -> None:
    with at_work(built):
        with pytest.raises(JobError, match="another command is at work"):
            add(Source.of(tmp_path / "photos"), built, HERE)
        with pytest.raises(JobError, match="another command is at work"):
            retry_quarantined(built, HERE)
    with at_work(built, beside_others=True), at_work(built, beside_others=True):
        pass


def test_a_build_that_was_killed_between_its_first_two_files_records_what_made_it(tmp_path, monkeypatch):
    write_photos(tmp_path / "photos")
    write = claim.atomic_write_json

    def write_one(path: Path, value: object) -> None:
        write(path, value)
        raise KeyboardInterrupt

    monkeypatch.setattr(claim, "atomic_write_json", write_one)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "photos", tmp_path / "out", SETTINGS, HERE)
    monkeypatch.setattr(claim, "atomic_write_json", write)
    assert (tmp_path / "out" / PLAN).exists()
    assert not (tmp_path / "out" / PROVENANCE).exists()
    build(tmp_path / "photos", tmp_path / "out", SETTINGS, HERE)
    assert not verify(tmp_path / "out").problems


def test_an_addition_to_a_data_set_whose_plan_is_lost_names_the_way_out(built, tmp_path):
    plan = (built / PLAN).read_bytes()
    fields = {name: value for name, value in json.loads(plan).items() if name != "source"}
    for damage, line in ((None, "missing"), (json.dumps(fields), "'source' is missing")):
        (built / PLAN).unlink() if damage is None else (built / PLAN).write_text(damage)
        seal(built)
        with pytest.raises(JobError, match=rf"plan.json: {line}; run the command that made the data set once more"):
            add(Source.of(tmp_path / "photos"), built, HERE)
        build(tmp_path / "photos", built, SETTINGS, HERE)
        assert (built / PLAN).read_bytes() == plan
        assert add(Source.of(tmp_path / "photos"), built, HERE) is None


HOLDER = """
import contextlib, errno, fcntl, sys
from pathlib import Path
from preprocessing.claim import TaskLock
from shards.locks import at_work

def flock(*_):
    raise OSError(errno.EBADF, "as NFS says of a folder")

fcntl.flock = flock
out, task = Path(sys.argv[1]), sys.argv[2] == "task"
with at_work(out, beside_others=task), TaskLock.of(out, 1, 3) if task else contextlib.nullcontext():
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("first", ["command", "task"])
def test_where_folders_cannot_be_locked_a_file_keeps_commands_apart(
    built: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EBADF, "as NFS says of a folder")

    monkeypatch.setattr(fcntl, "flock", flock)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, built, first], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as holder:
        assert present(holder.stdout).readline() == "held\n"
        with pytest.raises(JobError, match="another command is at work"):
            retry_quarantined(built, HERE)
        with at_work(built, beside_others=True):
            if first == "task":  # others may start, the same one may not
                with TaskLock.of(built, 0, 3):
                    pass
            with pytest.raises(JobError, match="at work already"), TaskLock.of(built, 1, 3):
                pass
    assert holder.returncode == 0
    assert retry_quarantined(built, HERE) is None
    assert not verify(built).problems
