"""The flat index: it fits tables and class table, or is rebuilt, or one line says what is wrong."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from photos import with_spoilt_footer
from present import present

from shards.classes import ClassTable
from shards.console import JobError
from shards.dataset import Dataset
from shards.index import gather, open_index
from shards.layout import shard_tables


def shift_the_end_of_a_class(arrays: dict[str, np.ndarray]) -> None:
    arrays["starts"][1] += 1


def shift_all(arrays: dict[str, np.ndarray]) -> None:
    arrays["starts"] += 1


def flip_a_high_bit_of_a_start(arrays: dict[str, np.ndarray]) -> None:
    arrays["starts"][1] |= 1 << 40


def cut_an_array(arrays: dict[str, np.ndarray]) -> None:
    arrays["size"] = arrays["size"][:-1]


def name_a_shard_that_is_not(arrays: dict[str, np.ndarray]) -> None:
    arrays["shard"][3] = 999


def name_a_place_that_no_file_has(arrays: dict[str, np.ndarray]) -> None:
    arrays["offset"][3] |= np.uint64(1 << 63)


@pytest.mark.parametrize(
    "spoil",
    [
        shift_the_end_of_a_class,
        shift_all,
        flip_a_high_bit_of_a_start,
        cut_an_array,
        name_a_shard_that_is_not,
        name_a_place_that_no_file_has,
    ],
)
def test_arrays_that_do_not_fit_classes_and_shards_are_named_with_the_way_out(
    copy: Path, spoil: Callable[[dict[str, np.ndarray]], None]
) -> None:
    classes = ClassTable.load(copy / "classes.parquet")
    files = {path.name.split(".")[1]: path for path in (copy / "index").glob(f"group-{classes.groups[0]:02d}.*.npy")}
    arrays = {name: np.load(path) for name, path in files.items()}
    spoil(arrays)
    for name, path in files.items():
        np.save(path, arrays[name])
    with pytest.raises(JobError, match=r"index: damaged .*; delete it, it is rebuilt"):
        open_index(copy, classes)
    shutil.rmtree(copy / "index")
    assert open_index(copy, classes)


def rewrite(table: Path, column: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change a column of a sample table."""
    rows = pq.read_table(table)
    place = rows.schema.get_field_index(column)
    values = pa.array(change(rows[column].to_numpy().copy()), rows.schema.field(place).type)
    pq.write_table(rows.set_column(place, rows.schema.field(place), values), table)


def test_a_table_of_the_same_size_with_other_rows_makes_a_new_index(copy):
    table = shard_tables(copy)[0]
    size = table.stat().st_size
    rewrite(table, "crc32", lambda values: values ^ 1)
    assert table.stat().st_size == size
    classes = ClassTable.load(copy / "classes.parquet")
    index = open_index(copy, classes)[classes.groups[0]]
    assert set(pq.read_table(table)["crc32"].to_pylist()) <= set(index.crc32.tolist())


@pytest.mark.parametrize("label", [-1, 1 << 30])
def test_labels_that_no_class_has_are_named(copy, label):
    rewrite(shard_tables(copy)[0], "label", lambda values: np.where(np.arange(len(values)) == 3, label, values))
    with pytest.raises(JobError, match=rf"labels from .*{label}.*; run shards/verify\.py"):
        open_index(copy, ClassTable.load(copy / "classes.parquet"))


def test_tables_that_hold_other_photos_than_the_class_table_says_are_named(copy):
    table = shard_tables(copy)[0]
    rewrite(table, "label", lambda values: np.where(np.arange(len(values)) == 0, values[-1], values))
    with pytest.raises(JobError, match=r"tables do not fit classes\.parquet .*verify\.py"):
        open_index(copy, ClassTable.load(copy / "classes.parquet"))


@pytest.mark.parametrize("spoil", [lambda data: b"", lambda data: data[:-20] + bytes([data[-20] ^ 255]) + data[-19:]])
def test_a_damaged_table_is_named_where_there_is_no_index(copy, spoil):
    shutil.rmtree(copy / "index")
    table = shard_tables(copy)[0]
    table.write_bytes(spoil(table.read_bytes()))
    with pytest.raises(JobError, match=rf"{table.name}: damaged .*verify\.py"):
        open_index(copy, ClassTable.load(copy / "classes.parquet"))


def test_a_damaged_class_table_is_named(copy):
    table = copy / "classes.parquet"
    table.write_bytes(with_spoilt_footer(table.read_bytes()))
    with pytest.raises(JobError, match=f"{table}: not a class table"):
        Dataset.open(copy)


def test_an_array_whose_header_is_no_python_is_named(copy):
    array = copy / "index" / "group-00.size.npy"
    array.write_bytes(array.read_bytes().replace(b"'shape': (", b"'shape': [", 1).replace(b",), }", b",,(((", 1))
    with pytest.raises(JobError, match=r"index: damaged .*; delete it, it is rebuilt"):
        open_index(copy, ClassTable.load(copy / "classes.parquet"))


def test_a_file_where_the_index_belongs_is_named(copy):
    shutil.rmtree(copy / "index")
    (copy / "index").write_text("no folder")
    with pytest.raises(JobError, match=r"index: damaged .*; delete it, it is rebuilt"):
        open_index(copy, ClassTable.load(copy / "classes.parquet"))


def test_a_state_of_no_text_is_one_that_is_out_of_date(copy):
    (copy / "index" / "state").write_bytes(b"\xff\xfe")
    assert open_index(copy, ClassTable.load(copy / "classes.parquet"))


def test_labels_without_photos_have_a_place_in_the_index_the_last_ones_too(dataset: Dataset) -> None:
    group = dataset.classes.groups[0]
    tables = [t for t in shard_tables(dataset.path) if t.parent.name == f"group-{group:02d}"]
    more = dataset.classes.count(group) + 2
    starts = gather(tables, more)["starts"]
    assert len(starts) == more + 1
    assert (np.diff(starts)[-2:] == 0).all()


def test_a_data_set_on_a_read_only_disk_needs_no_index(copy):
    shutil.rmtree(copy / "index")
    alone = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("mounting needs a name space of its own")
    look = (
        "import sys; from shards.dataset import Dataset; from shards.index import open_index; "
        "d = Dataset.open(sys.argv[1]); print(sum(len(i.size) for i in open_index(d.path, d.classes).values()))"
    )
    mount = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && exec "$2" -c "$3" "$1"'
    seen = subprocess.run(
        [*alone, "sh", "-c", mount, "sh", copy, sys.executable, look], capture_output=True, text=True, check=False
    )
    assert seen.stdout.strip() == str(Dataset.open(copy).manifest.images), seen.stderr
    assert not (copy / "index").exists()


def test_processes_that_start_together_without_an_index_all_get_it(copy):
    look = (
        "import sys; from shards.dataset import Dataset; from shards.index import open_index; "
        "d = Dataset.open(sys.argv[1]); print('ready', flush=True); sys.stdin.readline(); "
        "print(sum(len(i.size) for i in open_index(d.path, d.classes).values()))"
    )
    for _ in range(2):
        (copy / "index" / "state").write_text("of other tables")
        command = [sys.executable, "-c", look, copy]
        starting = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)
        ]
        for process in starting:
            assert present(process.stdout).readline() == "ready\n"
        for process in starting:
            present(process.stdin).close()
        images = str(Dataset.open(copy).manifest.images)
        assert [present(process.stdout).read().strip() for process in starting] == [images] * 4
        for process in starting:
            assert process.wait() == 0
