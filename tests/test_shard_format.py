"""The shard format as others see it: tar, webdataset, DALI's own reader, and the index beside the tables."""

import io
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import simplejpeg
from present import present

from shards.dataset import Dataset
from shards.index import build_index, open_index
from shards.layout import SAMPLE_COLUMNS, shard_tables
from shards.writer import ShardWriter, tar_header


def first_shard(dataset: Dataset) -> Path:
    return shard_tables(dataset.path)[0].with_suffix(".tar")


def test_a_header_is_what_tarfile_writes():
    for name, size in [("000000000.jpg", 3541), ("000000001.cls", 1), ("x", 0)]:
        facts = tarfile.TarInfo(name)
        facts.size, facts.mode = size, 0o444
        ours = tar_header(name, size)
        read = tarfile.TarInfo.frombuf(ours, "ascii", "strict")  # checks the checksum
        facts.chksum = read.chksum
        assert read.get_info() == facts.get_info()
        theirs = bytearray(facts.tobuf(tarfile.USTAR_FORMAT))
        theirs[329:345] = 2 * b"0000000\x00"  # device numbers, which GNU tar writes and tarfile leaves out
        theirs[148:154] = f"{read.chksum:06o}".encode()
        assert ours == theirs


def test_a_shard_is_a_tar_of_photo_and_label_pairs(dataset):
    table = pq.read_table(shard_tables(dataset.path)[0])
    assert table.schema.remove_metadata() == SAMPLE_COLUMNS
    with tarfile.open(first_shard(dataset)) as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == [
            f"{key}.{kind}" for key in table["key"].to_pylist() for kind in ("jpg", "cls")
        ]
        assert [m.offset_data for m in members[::2]] == table["offset"].to_pylist()
        for member, crc, label in zip(
            members[::2], table["crc32"].to_pylist(), table["label"].to_pylist(), strict=True
        ):
            assert zlib.crc32(present(tar.extractfile(member)).read()) == crc
            assert present(tar.extractfile(member.name.replace("jpg", "cls"))).read() == str(label).encode()


def test_photos_are_baseline_420_squares_without_metadata(dataset):
    with tarfile.open(first_shard(dataset)) as tar:
        data = present(tar.extractfile(present(tar.next()))).read()
    assert simplejpeg.decode_jpeg_header(data) == (64, 64, "YCbCr", "420")
    assert b"\xff\xc0" in data  # start of a baseline frame
    assert b"\xff\xc2" not in data
    assert b"Exif" not in data


def test_labels_of_a_group_lie_in_order_and_agree_with_the_class_table(dataset):
    for group in dataset.classes.groups:
        tables = [pq.read_table(t) for t in shard_tables(dataset.path) if t.parent.name == f"group-{group:02d}"]
        labels = np.concatenate([t["label"].to_numpy() for t in tables])
        assert (np.diff(labels) >= 0).all()
        classes = dataset.classes.of_group(group)
        assert np.bincount(labels, minlength=len(classes)).tolist() == classes.images.tolist()
        east = np.concatenate([t["east"].to_numpy() for t in tables])
        assert (np.floor(east / 20) * 20 == classes.cell_east[labels]).all()


def test_the_webdataset_library_reads_a_shard(dataset):
    import webdataset

    table = pq.read_table(shard_tables(dataset.path)[0])
    samples = list(webdataset.WebDataset(str(first_shard(dataset)), shardshuffle=False).decode("rgb8"))
    assert [s["__key__"] for s in samples] == table["key"].to_pylist()
    assert [s["cls"] for s in samples] == table["label"].to_pylist()
    assert samples[0]["jpg"].shape == (64, 64, 3)


def test_dalis_own_reader_reads_a_shard_through_its_index(dataset):
    from nvidia.dali import fn, pipeline_def

    tar = first_shard(dataset)
    table = pq.read_table(tar.with_suffix(".parquet"))

    @pipeline_def(batch_size=4, num_threads=1, device_id=None)
    def graph():
        jpeg, label = fn.readers.webdataset(  # type: ignore[misc]  # its stub says None
            paths=[str(tar)], index_paths=[str(tar.with_suffix(".idx"))], ext=["jpg", "cls"]
        )
        return fn.decoders.image(jpeg), label

    images, labels = graph().run()
    assert [int(bytes(np.asarray(label))) for label in labels] == table["label"].to_pylist()[:4]
    assert np.asarray(images[0]).shape == (64, 64, 3)


def test_the_dali_index_is_what_wds2idx_writes(dataset, tmp_path):
    tar = first_shard(dataset)
    script = Path(sys.executable).with_name("wds2idx")
    subprocess.run([script, tar, tmp_path / "x.idx"], check=True, capture_output=True)
    assert (tmp_path / "x.idx").read_text() == tar.with_suffix(".idx").read_text()


def test_the_flat_index_leads_to_the_photos_of_a_class(dataset):
    for group, index in open_index(dataset.path, dataset.classes).items():
        table = pq.read_table(index.shards[0].with_suffix(".parquet"))
        for label in index.labels[:5]:
            rows = slice(index.starts[label], index.starts[label + 1])
            of_class = np.flatnonzero(table["label"].to_numpy() == label)
            assert index.offset[rows].tolist() == table["offset"].to_numpy()[of_class].tolist(), group
            assert index.size[rows].tolist() == table["size"].to_numpy()[of_class].tolist()
        assert sum(a.nbytes for a in (index.shard, index.offset, index.size, index.crc32)) == 20 * len(table)


def test_a_flat_index_that_is_out_of_date_is_rebuilt(dataset, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(dataset.path, copy)
    (copy / "index" / "state").write_text("other")
    (copy / "index" / "group-00.size.npy").unlink()
    assert (open_index(copy, dataset.classes)[0].size > 0).all()
    build_index(copy, dataset.classes)
    state = (copy / "index" / "state").read_text()
    assert state == (dataset.path / "index" / "state").read_text()


def test_a_written_archive_ends_on_a_whole_record():
    file = io.BytesIO()
    writer = ShardWriter(file)
    writer.add("000000000", 7, b"abc", east=1.0, north=2.0, heading=0.0, timestamp="", source="x.jpg")
    writer.finish()
    assert len(file.getvalue()) == writer.position == 10240
    file.seek(0)
    with tarfile.open(fileobj=file) as tar:
        assert tar.getnames() == ["000000000.jpg", "000000000.cls"]
