"""Files that appear whole or not at all, and errors that name the file."""

import errno
import json
import os
import stat
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pytest

from shards.console import JobError, describe_os_error
from shards.dataset import Dataset, Manifest
from shards.files import _RENAME_EXCHANGE, atomic_folder, atomic_path, atomic_write_text, named

UNREADABLE = Path("/proc/self/mem")  # opens, but its first bytes cannot be read: EIO, as of a bad disk


def test_a_file_that_opens_and_cannot_be_read_is_named(tmp_path: Path) -> None:
    manifest = tmp_path / "dataset.json"
    manifest.symlink_to(UNREADABLE)
    with pytest.raises(OSError, match="Input/output error") as raised:
        Manifest.load(manifest)
    assert describe_os_error(raised.value) == f"{manifest}: Input/output error"


def test_on_a_read_only_disk_the_file_is_named_and_not_what_it_is_written_as(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match="Read-only") as raised:
        atomic_write_text(tmp_path / "file", "text")
    assert describe_os_error(raised.value).startswith(f"{tmp_path / 'file'}: Read-only file system")


@pytest.mark.parametrize(("number", "goes_on"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_file_system_that_flushes_no_folders_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, goes_on: bool
) -> None:
    flush = os.fsync

    def flush_no_folder(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr("os.fsync", flush_no_folder)
    with nullcontext() if goes_on else pytest.raises(OSError, match=os.strerror(number)):
        atomic_write_text(tmp_path / "file", "text")
        with atomic_folder(tmp_path / "folder") as folder:
            (folder / "file").write_text("text")
        assert (tmp_path / "folder" / "file").read_text() == (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize(
    ("field", "value"), [("image_size", "big"), ("image_size", 0), ("images", 1.5), ("codec", None)]
)
def test_a_manifest_with_a_field_of_another_kind_is_named(
    dataset: Dataset, tmp_path: Path, field: str, value: object
) -> None:
    manifest = tmp_path / "dataset.json"
    manifest.write_text(json.dumps(asdict(dataset.manifest) | {field: value}))
    with pytest.raises(JobError, match=f"{manifest}: the field '{field}' is {value!r}; run shards/verify.py --repair"):
        Manifest.load(manifest)


def test_a_table_that_opens_and_cannot_be_read_is_named_in_few_words(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Error reading bytes") as raised, named(tmp_path / "classes.parquet"):
        pa.OSFile(str(UNREADABLE)).read(8)
    assert describe_os_error(raised.value) == f"{tmp_path / 'classes.parquet'}: Input/output error"


def test_a_write_that_fails_names_the_file_and_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_text("old")
    with pytest.raises(OSError, match="No space left") as raised, atomic_path(path):
        Path("/dev/full").write_text("x")
    assert raised.value.filename == str(path)
    with pytest.raises(OSError, match="No such file") as raised, atomic_path(path) as partial:
        partial.open()
    assert raised.value.filename == str(path)
    assert path.read_text() == "old"


def test_a_folder_that_cannot_be_written_names_its_file_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as raised, atomic_folder(tmp_path / "index") as partial:
        (partial / "group" / "state").write_text("x")
    assert raised.value.filename == str(tmp_path / "index" / "group" / "state")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", [_RENAME_EXCHANGE, 1 << 20], ids=["at once", "where no file system can"])
def test_a_folder_gives_way_to_a_new_one_once_that_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: int
) -> None:
    monkeypatch.setattr("shards.files._RENAME_EXCHANGE", flag)
    old = tmp_path / "folder"
    old.mkdir()
    (old / "state").write_text("old")
    with pytest.raises(OSError, match="No space left"), atomic_folder(old, replace=True):
        Path("/dev/full").write_text("x")
    assert (old / "state").read_text() == "old"
    with pytest.raises(OSError, match="not empty"), atomic_folder(old) as partial:
        (partial / "state").write_text("new")
    with atomic_folder(old, replace=True) as partial:
        (partial / "state").write_text("new")
        assert (old / "state").read_text() == "old"
    assert (old / "state").read_text() == "new"
    assert list(tmp_path.iterdir()) == [old]


def test_an_error_without_a_number_is_told_as_one_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Error closing file") as raised, atomic_path(tmp_path / "t.parquet"):
        raise OSError("Error closing file")  # as pyarrow says it where a network file system refuses at the end
    assert raised.value.errno == errno.EIO
    assert describe_os_error(raised.value) == f"{tmp_path / 't.parquet'}: Error closing file"
