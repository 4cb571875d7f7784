"""A reader written from docs/shard-format.md alone: what the document promises is what the builder wrote.

The reader uses NumPy, PyArrow and the standard library only; a change of the format breaks it.
"""

import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import HERE
from present import present
from tiny import ROOT

DOCUMENT = (ROOT / "docs" / "shard-format.md").read_text()


def read(dataset: Path) -> Iterator[tuple[int, dict[str, Any], bytes]]:
    """Group, row of the sample table and JPEG of every photo."""
    assert json.loads((dataset / "dataset.json").read_text())["format_version"] == 1
    for table in sorted(dataset.glob("group-*/group-*.parquet")):
        group = int(table.parent.name.removeprefix("group-"))
        with open(table.with_suffix(".tar"), "rb") as tar:
            for row in pq.read_table(table).to_pylist():
                tar.seek(row["offset"])
                yield group, row, tar.read(row["size"])


def columns_of(heading: str) -> dict[str, str]:
    """Columns and types that the document's first table after `heading` names."""
    lines = DOCUMENT[DOCUMENT.index(heading) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|---"))
    columns: dict[str, str] = {}
    for line in lines[first + 1 :]:
        if not line.startswith("|"):
            break
        names, kind = (cell.strip() for cell in line.split("|")[1:3])
        columns |= dict.fromkeys((name.strip(" `") for name in names.split(",")), kind)
    return columns


def schema_of(path: Path) -> dict[str, str]:
    return {field.name: {"double": "float64", "float": "float32"}.get(str(field.type), str(field.type))
            for field in pq.read_schema(path)}  # fmt: skip


def test_every_photo_is_a_jpeg_with_its_checksum_in_the_cell_of_its_class(dataset):
    manifest = json.loads((dataset.path / "dataset.json").read_text())
    M, N = manifest["M"], manifest["N"]
    cells = {(c["group"], c["label"]): c for c in pq.read_table(dataset.path / "classes.parquet").to_pylist()}
    images = dict.fromkeys(cells, 0)
    for group, row, jpeg in read(dataset.path):
        assert jpeg[:2] == b"\xff\xd8"
        assert jpeg[-2:] == b"\xff\xd9"
        assert zlib.crc32(jpeg) == row["crc32"]
        cell = cells[group, row["label"]]
        assert cell["cell_east"] == row["east"] // M * M
        assert cell["cell_north"] == row["north"] // M * M
        assert group == row["east"] // M % N * N + row["north"] // M % N
        images[group, row["label"]] += 1
    assert images == {key: c["images"] for key, c in cells.items()}
    assert sum(images.values()) == manifest["images"]
    assert all(c["center_east"] == c["cell_east"] + M // 2 for c in cells.values())
    assert list(cells) == sorted(cells)


def test_columns_and_types_are_those_of_the_document(dataset):
    assert schema_of(next(dataset.path.glob("group-*/*.parquet"))) == columns_of("**Sample table**")
    assert schema_of(dataset.path / "classes.parquet") == columns_of("`classes.parquet`, sorted")
    assert set(json.loads((dataset.path / "dataset.json").read_text())) == set(columns_of("## dataset.json"))
    skipped = pq.read_schema(dataset.path / "skipped.parquet")
    assert skipped.names == ["source", "east", "north", "heading", "timestamp"]
    metadata = pq.read_schema(dataset.path / "classes.parquet").metadata
    assert {b"M", b"N", b"zone", b"crs"} <= set(metadata)


def test_files_are_those_of_the_document(dataset):
    listed = DOCUMENT[DOCUMENT.index("<dataset>/") : DOCUMENT.index("Group numbers have")]
    for entry in dataset.path.iterdir():
        name = "group-00/" if entry.name.startswith("group-") else entry.name
        assert entry.name.startswith(".") or name in listed, entry.name


def test_tars_and_dali_indexes_are_as_described(dataset):
    table = next(dataset.path.glob("group-*/*.parquet"))
    rows = pq.read_table(table).to_pylist()
    assert table.with_suffix(".tar").stat().st_size % 10240 == 0
    with tarfile.open(table.with_suffix(".tar")) as tar:
        members = tar.getmembers()
        labels = [present(tar.extractfile(m)).read() for m in members[1::2]]
    assert [m.name for m in members] == [f"{row['key']}.{kind}" for row in rows for kind in ("jpg", "cls")]
    assert labels == [b"%d" % row["label"] for row in rows]
    assert {(m.mode, m.uid, m.gid, m.mtime, m.uname) for m in members} == {(0o444, 0, 0, 0, "")}
    lines = table.with_suffix(".idx").read_text().splitlines()
    assert lines[0] == f"v1.2 {len(rows)}"
    image, label = members[2:4]
    assert lines[2] == f"jpg {image.offset_data} {image.size} {image.name} cls {label.offset_data} {label.size} {label.name}"  # fmt: skip  # noqa: E501


def test_the_flat_index_follows_from_the_tables_as_described(dataset):
    kinds = {"starts": np.int64, "shard": np.uint32, "offset": np.uint64, "size": np.uint32, "crc32": np.uint32}
    for folder in sorted(dataset.path.glob("group-*")):
        tables = [pq.read_table(t) for t in sorted(folder.glob("*.parquet"))]
        rows = pa.concat_tables(t.append_column("shard", pa.array([i] * len(t))) for i, t in enumerate(tables))
        order = np.argsort(rows["label"].to_numpy(), kind="stable")
        arrays = {n: np.load(dataset.path / "index" / f"{folder.name}.{n}.npy") for n in kinds}
        assert {n: a.dtype for n, a in arrays.items()} == kinds
        for name in ("shard", "offset", "size", "crc32"):
            assert (arrays[name] == rows[name].to_numpy()[order]).all()
        assert (np.repeat(np.arange(len(arrays["starts"]) - 1), np.diff(arrays["starts"]))
                == rows["label"].to_numpy()[order]).all()  # fmt: skip


def test_the_state_of_the_flat_index_is_as_described(dataset):
    digest = hashlib.sha256(b"starts shard offset size crc32")
    for table in sorted(dataset.path.glob("group-*/group-*.parquet")):
        data = table.read_bytes()
        digest.update(f"{table.name} {len(data)}\n".encode() + data[-8192:])
    assert (dataset.path / "index" / "state").read_text().strip() == digest.hexdigest()


def test_checksums_are_as_described(dataset):
    body, last = (dataset.path / "checksums.txt").read_text().rsplit("# sha256 of the lines above: ", 1)
    assert hashlib.sha256(body.encode()).hexdigest() == last.strip()
    sums = dict(reversed(line.split("  ", 1)) for line in body.splitlines())
    assert list(sums) == sorted(sums)
    for name, digest in sums.items():
        assert hashlib.sha256((dataset.path / name).read_bytes()).hexdigest() == digest
    assert {"dataset.json", "plan.json", "classes.parquet", "skipped.parquet", "quarantine.jsonl"} <= set(sums)
    assert not [name for name in sums if name.endswith(".tar") or name.startswith("index/")]


def test_revisions_hold_the_files_of_the_document(dataset, city, tmp_path):
    import shutil

    from preprocessing.sources import Source
    from preprocessing.updates import add

    copy = tmp_path / "copy"
    shutil.copytree(dataset.path, copy)
    add(Source.of(str(city / "test" / "queries"), None, 0), copy, HERE)
    assert json.loads((copy / "dataset.json").read_text())["revision"] == 2
    assert sorted(p.name for p in (copy / "revisions").iterdir()) == [
        "000002-bad.jsonl", "000002-classes.parquet", "000002-skipped.parquet", "000002.parquet",
    ]  # fmt: skip
    planned = pq.read_table(copy / "revisions" / "000002.parquet")
    assert planned.column_names == ["group", "number", "label", "east", "north", "heading", "timestamp", "source"]
    waiting = set(pq.read_table(dataset.path / "skipped.parquet")["source"].to_pylist())
    assert all(source.startswith("//1/") or source in waiting for source in planned["source"].to_pylist())
    before = pq.read_table(dataset.path / "classes.parquet")
    after = pq.read_table(copy / "classes.parquet")
    for group in set(before["group"].to_pylist()):
        old, new = (
            [(r["label"], r["cell_east"], r["cell_north"]) for r in t.to_pylist() if r["group"] == group]
            for t in (before, after)
        )
        assert new[: len(old)] == old
    assert len(list(read(copy))) == len(list(read(dataset.path))) + len(planned)
