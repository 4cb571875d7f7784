"""The walk over folders of photos, of training photos and of queries."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.console import JobError
from shards.photo_tree import walk_photos
from training.queries import find_photos


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """A folder of 1,500 folders, one in the other, the last with a photo."""
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("a.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    yield tmp_path
    subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # deeper than Python's own removal goes


def test_folders_may_lie_deep_in_each_other(deep: Path) -> None:
    found = list(walk_photos(deep))
    assert found == [("photo", "d/" * 1500 + "a.jpg")]
    assert find_photos(deep) == [deep / found[0][1]]


def test_a_folder_to_which_many_links_lead_is_listed_once_by_its_own_path_where_that_is_below(tmp_path: Path) -> None:
    root, count = tmp_path / "root", 12  # 12 folders that link to each other: more ways through them than can be walked
    for i in range(count):
        (root / f"f{i:02d}").mkdir(parents=True)
        (root / f"f{i:02d}" / "a.jpg").touch()
        for j in range(count):
            (root / f"f{i:02d}" / f"to{j:02d}").symlink_to(root / f"f{j:02d}")
    (root / "a-link").symlink_to(root / "f03")
    (tmp_path / "beside" / "below").mkdir(parents=True)
    (tmp_path / "beside" / "below" / "b.jpg").touch()
    (tmp_path / "beside" / "up").symlink_to(root)
    (root / "f07" / "x").symlink_to(tmp_path / "beside" / "below")
    (root / "f08" / "w").symlink_to(tmp_path / "beside")
    folders: dict[str, int] = {}
    found = [path for _, path in walk_photos(root, folders)]
    assert found == [*(f"f{i:02d}/a.jpg" for i in range(count)), "f07/x/b.jpg"]
    assert set(folders) == {"", *(f"f{i:02d}" for i in range(count)), "f07/x", "f08/w"}


def test_a_folder_that_cannot_be_read_is_an_error_and_not_passed_over(deep: Path) -> None:
    (deep / "a.jpg").write_bytes(b"")
    below = deep.joinpath(*["x" * 250] * 8)  # the system takes paths of less than 4,096 bytes
    below.mkdir(parents=True)
    (deep / "d").rename(below / "d")
    with pytest.raises(JobError, match=r"cannot list the photos: .*File name too long"):
        find_photos(deep)
    (below / "d").rename(deep / "d")
