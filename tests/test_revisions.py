"""The files of a revision: what is planned, and tables of names."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SETTINGS
from photos import write_photos

from preprocessing.finishing import State
from preprocessing.photos import list_photos
from preprocessing.plan import make_plan
from preprocessing.revisions import PLANNED, SKIPPED_COLUMNS, Revision, write_table
from preprocessing.sources import Source
from shards.classes import ClassTable
from shards.layout import SHARD_SAMPLES


def test_the_samples_of_a_revision_make_a_shard_for_every_group_and_number(tmp_path):
    column = {
        "group": [0, 0, 0, 1, 1],
        "number": [1, 1, 2, 2, 2],
        "label": [4, 5, 5, 0, 0],
        "source": [*"abcde"],
        "timestamp": ["2020", None, None, None, ""],
    }
    numbers = {name: [1.0, 2.0, 3.0, 4.0, 5.0] for name in ("east", "north", "heading")}
    table = pa.table({**column, **numbers}).select(PLANNED.names).cast(PLANNED)
    cells = np.zeros(1, np.int64)
    classes = ClassTable(20, 2, 10, cells.astype(np.int32), cells.astype(np.int32), cells, cells, cells)
    for samples, shards in ((table, [(0, 1), (0, 2), (1, 2)]), (table[:0], [])):
        for source in (None, Source.of(tmp_path)):
            Revision(2, source, samples, classes, SKIPPED_COLUMNS.empty_table(), [], 7).save(tmp_path)
            revision = Revision.load(tmp_path, 2)
            assert (revision.source, revision.photos, revision.shards()) == (source, 7, shards)
            tasks = list(revision.tasks())
            assert [(task.group, task.number) for task in tasks] == shards
            assert [task.first for task in tasks] == [number * SHARD_SAMPLES for _, number in shards]
            assert [task.samples for task in tasks] == [["a", "b"], ["c"], ["d", "e"]][: len(shards)]
            assert [task.planned(0)["label"] for task in tasks] == [4, 5, 0][: len(shards)]
            assert [task.timestamps for task in tasks] == [["2020", None], [None], [None, ""]][: len(shards)]


def test_tables_hold_string_whatever_they_are_in_memory_and_bytes_as_pyarrow_writes_them(tmp_path):
    for rows in (0, 3):
        columns = {name: [1.0] * rows for name in ("east", "north", "heading")} | {"timestamp": ["2020"] * rows}
        table = pa.table({"source": [f"{i}.jpg" for i in range(rows)], **columns}, SKIPPED_COLUMNS)
        write_table(table, tmp_path / "ours")
        stored = table.set_column(0, "source", table["source"].cast(pa.string()))
        pq.write_table(stored, tmp_path / "plain")
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "plain").read_bytes()


@pytest.mark.slow
def test_names_of_skipped_photos_may_be_more_than_two_gigabytes(tmp_path):
    write_photos(tmp_path / "photos", cells=1)
    plan = make_plan(list_photos(tmp_path / "photos", None, lambda _: None), SETTINGS)
    many = 2_200_000
    long = replace(plan, paths=pa.array(["x" * 1000], pa.large_string()), skipped=np.zeros(many, np.int64))
    skipped = State.of_plan(long, Source.of(tmp_path)).skipped
    assert skipped.nbytes > 2**31
    write_table(skipped, tmp_path / "skipped.parquet")
    file = pq.ParquetFile(tmp_path / "skipped.parquet")
    assert (file.metadata.num_rows, file.schema_arrow.field("source").type) == (many, pa.string())
    last = file.read_row_group(file.num_row_groups - 1, ["source"])["source"]
    assert set(last.unique().to_pylist()) == {"x" * 1000}
