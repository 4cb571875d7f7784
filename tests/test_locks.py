"""Locks on file systems of several kinds; those of commands that meet on one data set are in test_claim.py."""

import errno
import fcntl
import os
from pathlib import Path
from threading import Event, Thread

import pytest

from shards.locks import folder_locked, locked
from shards.mirror import scratch_folder


@pytest.fixture
def nfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only descriptors for writing can be locked, so no folder."""
    flock = fcntl.flock

    def as_on_nfs(descriptor: int, operation: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", as_on_nfs)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIVIDE_AND_CLASSIFY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "scratch"


@pytest.mark.parametrize("lock", [locked, folder_locked])
@pytest.mark.usefixtures("nfs")
def test_a_lock_waits_where_only_descriptors_for_writing_can_be_locked(tmp_path, lock):
    path, entered = tmp_path, Event()
    if lock is locked:
        path = tmp_path / "classes.parquet"
        path.touch()

    def enter() -> None:
        with lock(path):
            entered.set()

    with lock(path):
        second = Thread(target=enter)
        second.start()
        assert not entered.wait(0.2)
        with lock(path, wait=False) as held:
            assert not held
    second.join(10)
    assert entered.is_set()
    with locked(tmp_path) as held:
        assert not held  # a folder: nobody waits there


@pytest.mark.parametrize("place", ["local", "nfs", "without locks"])
def test_a_scratch_folder_is_its_owners_until_the_end_and_one_that_was_left_goes(place, scratch, request, monkeypatch):
    (scratch / "left" / "inner").mkdir(parents=True)
    if place == "nfs":
        request.getfixturevalue("nfs")
    if place == "without locks":

        def flock(descriptor: int, operation: int) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "flock", flock)
    with scratch_folder() as first:
        assert (scratch / "left").exists() == (place == "without locks")  # whose owner may be alive
        (first / "plan.json").touch()
        with scratch_folder() as second:
            assert first != second
        assert not second.exists()
        assert (first / "plan.json").exists()
    assert [path.name for path in scratch.iterdir()] == ["left"] * (place == "without locks")
