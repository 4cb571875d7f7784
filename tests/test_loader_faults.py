"""Photos and shards that are damaged, or become so under a running loader: replaced, named, counted."""

import os
import re
import shutil
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from conftest import HERE, SETTINGS
from photos import write_photos
from present import present
from test_loader import DECODERS, make_loader, same, take
from tiny import write_dataset

from preprocessing.build import build
from preprocessing.updates import retry_quarantined
from shards.console import JobError
from shards.dataset import Dataset
from shards.decode_cpu import CpuDecoder
from shards.index import open_index
from shards.loader import Loader
from shards.reader import ShardReader
from shards.stream import StreamSettings


def damage(dataset: Dataset, folder: Path, spoil) -> Dataset:
    copy = folder / "damaged"
    shutil.copytree(dataset.path, copy)
    for tar in copy.glob("group-*/*.tar"):
        os.chmod(tar, 0o644)
        spoil(tar)
    return Dataset.open(copy)


def spoil_some_photos(tar: Path, every: int = 40) -> None:
    """Overwrite the pixels of every 40th photo, or of so many, with a JPEG's end."""
    lines = tar.with_suffix(".idx").read_text().split("\n")[1:-1]
    with open(tar, "r+b") as file:
        for line in lines[::every]:
            offset, size = map(int, line.split()[1:3])
            file.seek(offset + size // 2)
            file.write(b"\xff\xd9" * (size // 4))


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_photo_that_cannot_be_decoded_is_replaced_by_the_next_draw_and_named(dataset, tmp_path, decoder, caplog):
    spoiled = damage(dataset, tmp_path, spoil_some_photos)
    clean = take(make_loader(dataset, decoder=decoder), 0, 12)
    loader = make_loader(spoiled, decoder=decoder)
    loader._supply.max_bad_share = 1.0
    mended = take(loader, 0, 12)
    assert loader.failures > 0
    assert "replaced by the next draw" in caplog.text
    assert all(record.getMessage().count(".tar at byte") == 1 for record in caplog.records)
    replaced = sum(not torch.equal(a[0][i], b[0][i]) for a, b in zip(clean, mended, strict=True) for i in range(16))
    assert 0 < replaced <= loader.failures
    assert min(float(b[0].float().std((1, 2, 3)).min()) for b in mended) > 1
    on_cpu = take(make_loader(spoiled, decoder="cpu"), 0, 12)
    for mine, other in zip(mended, on_cpu, strict=True):
        assert torch.equal(mine[1], other[1])
        difference = (mine[0].float() - other[0].float()).abs().mean((1, 2, 3))
        assert float(difference.max()) <= (0 if decoder == "cpu" else 4)


@pytest.fixture(params=[640, -2])
def cut_short(tmp_path, monkeypatch, request) -> Dataset:
    """A data set whose every 40th photo ends behind its header, or lacks its end, with the checksum of just that."""
    made, encode = [], simplejpeg.encode_jpeg

    def encode_and_cut(pixels: np.ndarray, **options: int) -> bytes:
        made.append(encode(pixels, **options))
        return made[-1] if len(made) % 40 else made[-1][: request.param]

    with monkeypatch.context() as patch:
        patch.setattr("simplejpeg.encode_jpeg", encode_and_cut)
        return write_dataset(tmp_path / "cut", images=20)


@pytest.mark.parametrize("mode", ["indexed", "stream"])
def test_photos_that_pass_their_checksum_and_cannot_be_decoded_are_replaced_alike_by_both_decoders(cut_short, mode):
    simplejpeg.decode_jpeg_header(ShardReader(open_index(cut_short.path, cut_short.classes)).read(0, 39))
    taken = {}
    for decoder in DECODERS:
        loader = make_loader(cut_short, decoder=decoder, mode=mode, image_size=32)
        loader._supply.max_bad_share = 1.0
        taken[decoder] = take(loader, 0, 20)
        assert 0 < loader.failures < 30
        loader.close()
        again = make_loader(cut_short, decoder=decoder, mode=mode, image_size=32, threads=3)
        assert same(taken[decoder][11:], take(again, 11, 20))
        again.close()
    for a, b in zip(*taken.values(), strict=True):
        assert torch.equal(a[1], b[1])
        assert (a[0].float() - b[0].float()).abs().mean((1, 2, 3)).max() < 2


def spoil_while_it_is_read(dataset, folder: Path, spoil, **options) -> tuple[Loader, list[torch.Tensor]]:
    """A loader of a copy, and its images; `spoil` is called with the copy's second shard after batch 9."""
    copy = damage(dataset, folder, lambda tar: None)
    loader = make_loader(copy, stream=StreamSettings(run=5, window=64), **options)
    loader._supply.max_bad_share = 0.5
    images = []
    for batch in loader.batches(0, 40):
        images.append(batch.images.clone())
        if batch.step == 9:
            spoil(sorted(copy.path.glob("group-*/*.tar"))[1])
    loader.close()
    return loader, images


def flip_a_byte_of_some_photos(tar: Path) -> None:
    """Change colours: decoders see nothing wrong."""
    with tar.open("r+b") as file:
        for line in tar.with_suffix(".idx").read_text().split("\n")[1:-1:3]:
            offset, size = map(int, line.split()[1:3])
            middle = os.pread(file.fileno(), 1, offset + size // 2)[0]
            os.pwrite(file.fileno(), bytes([middle ^ 0x10]), offset + size // 2)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("mode", ["indexed", "stream"])
def test_a_shard_that_changes_under_a_running_loader_gives_no_blank_or_wrong_image(
    dataset, tmp_path, caplog, mode, decoder
):
    clean = [b[0] for b in take(make_loader(dataset, mode=mode, decoder=decoder,
                                            stream=StreamSettings(run=5, window=64)), 0, 40)]  # fmt: skip
    for name, spoil in {
        "cut": lambda tar: os.truncate(tar, tar.stat().st_size // 2),
        "over": lambda tar: tar.open("r+b").write(bytes(tar.stat().st_size // 2)),
        "flip": flip_a_byte_of_some_photos,
    }.items():
        caplog.clear()
        loader, images = spoil_while_it_is_read(dataset, tmp_path / name, spoil, mode=mode, decoder=decoder)
        replaced = [int((a != b).flatten(1).any(1).sum()) for a, b in zip(clean, images, strict=True)]
        assert sum(replaced[:10]) == 0
        assert 0 < sum(replaced) <= loader.failures == len(caplog.records)
        assert all("group-01-000000.tar at byte" in record.getMessage() for record in caplog.records)
        assert min(float(batch.float().std((1, 2, 3)).min()) for batch in images) > 10


@pytest.mark.parametrize("mode", ["indexed", "stream"])
def test_a_loader_goes_on_with_the_shard_it_has_open_where_another_file_takes_its_place(dataset, tmp_path, mode):
    def replace_by_noise(tar: Path) -> None:
        tar.with_suffix(".new").write_bytes(os.urandom(tar.stat().st_size))
        tar.with_suffix(".new").replace(tar)

    assert spoil_while_it_is_read(dataset, tmp_path, replace_by_noise, mode=mode)[0].failures == 0


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("mode", ["indexed", "stream"])
def test_replacements_are_the_same_for_any_number_of_ranks_and_threads_and_after_resuming(
    dataset, tmp_path, mode, decoder
):
    spoiled = damage(dataset, tmp_path, partial(spoil_some_photos, every=6))

    def taken(first: int, last: int, **options: int) -> tuple[list, int]:
        loader = make_loader(spoiled, mode=mode, decoder=decoder, stream=StreamSettings(run=5, window=64), **options)
        loader._supply.max_bad_share = 1.0
        batches = take(loader, first, last)
        loader.close()
        return batches, loader.failures

    whole, failures = taken(0, 6, threads=1)
    resumed, later = taken(3, 6, threads=3)
    assert 0 < later < failures
    assert same(whole[3:], resumed)
    parts, failures_of_parts = zip(*(taken(0, 6, rank=rank, world_size=3) for rank in range(3)), strict=True)
    assert sum(failures_of_parts) == failures
    for rank, part in enumerate(parts):
        for mine, all_ in zip(part, whole, strict=True):
            assert torch.equal(mine[0], all_[0][rank::3])
            assert torch.equal(mine[1], all_[1][rank::3])


@pytest.mark.parametrize("decoder", DECODERS)
def test_too_many_bad_photos_stop_training_with_a_clear_error(dataset, tmp_path, decoder):
    emptied = damage(dataset, tmp_path, lambda tar: os.truncate(tar, 4096))
    with pytest.raises(JobError, match=r"verify\.py") as stopped:
        take(make_loader(emptied, decoder=decoder), 0, 50)
    failed, tried = map(int, present(re.search(r"(\d+) of the last (\d+) photos", str(stopped.value))).groups())
    assert 20 < failed <= tried


def test_a_group_whose_photos_were_all_bad_is_told_with_a_way_out_that_leads_there(tmp_path):
    photos = write_photos(tmp_path / "photos", cells=2)
    for photo in photos[:12]:
        photo.write_bytes(photo.read_bytes()[:300])
    build(tmp_path / "photos", tmp_path / "city", SETTINGS, replace(HERE, max_bad_share=0.5))
    with pytest.raises(JobError, match=r"group 0 has no photos.*quarantine\.jsonl.*--retry-quarantined"):
        make_loader(Dataset.open(tmp_path / "city"))
    write_photos(tmp_path / "photos", cells=2)
    retry_quarantined(tmp_path / "city", HERE)
    assert take(make_loader(Dataset.open(tmp_path / "city")), 0, 1)


def test_a_disk_that_fails_after_weeks_stops_training_as_soon_as_one_that_fails_early(dataset):
    supply = make_loader(dataset)._supply
    for _ in range(300):
        supply.count(992)
        for _ in range(8):  # 0.8 %, borne for good
            supply.fail("a.tar at byte 512", OSError("Input/output error"))
    supply.count(10_000_000)
    before = supply.failed

    def read_from_then_on() -> None:
        for _ in range(10_000):
            supply.count(8)
            supply.fail("a.tar at byte 512", OSError("Input/output error"))

    with pytest.raises(JobError, match=r"more than 1\.0%"):
        read_from_then_on()
    assert supply.failed - before < 7_000


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("size", [48, 80])
def test_photos_of_another_size_than_the_manifest_says_are_no_samples(dataset, decoder, size):
    other = replace(dataset, manifest=replace(dataset.manifest, image_size=size))
    with pytest.raises(JobError, match="could not be used"):
        take(make_loader(other, decoder=decoder), 0, 10)


def test_a_shard_that_is_mended_under_a_running_loader_is_read_anew(dataset, tmp_path):
    spoiled = damage(dataset, tmp_path, lambda tar: tar.write_bytes(bytes(tar.stat().st_size)))
    index = open_index(spoiled.path, spoiled.classes)
    group = spoiled.classes.groups[0]
    reader = ShardReader(index)
    with pytest.raises(OSError, match="checksum"):
        reader.read(group, 0)
    for tar in spoiled.path.glob("group-*/*.tar"):
        sound = tar.with_suffix(".new")
        shutil.copy(dataset.path / tar.relative_to(spoiled.path), sound)
        sound.replace(tar)
    assert reader.read(group, 0) == ShardReader(open_index(dataset.path, dataset.classes)).read(group, 0)


@pytest.mark.parametrize("fails_at", [0, 2, 6])
@pytest.mark.parametrize("decoder", DECODERS)
def test_an_error_while_a_batch_is_drawn_reaches_the_trainer_and_leaves_no_thread(dataset, decoder, fails_at):
    groups = np.full(16, dataset.classes.groups[0])

    def schedule(step: int) -> np.ndarray:
        if step == fails_at:
            raise JobError("the store went away")
        return groups

    loader = Loader(dataset, schedule, batch_size=16, image_size=48, seed=4, decoder=decoder)
    with pytest.raises(JobError, match="the store went away"):
        list(loader.batches(0, 10))
    loader.close()
    deadline = time.monotonic() + 20
    while any(thread.name.startswith("plan") for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("plan")]


def check_that_a_refused_batch_is_decoded_by_the_cpu(dataset, monkeypatch, **options) -> None:
    from nvidia.dali.pipeline import Pipeline

    clean = take(make_loader(dataset, decoder="dali", **options), 0, 8)
    calls, refused = [], []
    share, decode = Pipeline.share_outputs, CpuDecoder._decode_one

    def refuse_the_third_batch(self):
        calls.append(self)
        if len(calls) == 3:
            raise RuntimeError("Failed to decode sample #5\nStack trace")
        return share(self)

    def refuse_the_first_photo(self, jpeg, box, out):
        refused.append(jpeg)
        if len(refused) == 1:
            raise ValueError("damaged")
        decode(self, jpeg, box, out)

    monkeypatch.setattr(Pipeline, "share_outputs", refuse_the_third_batch)
    monkeypatch.setattr(CpuDecoder, "_decode_one", refuse_the_first_photo)
    loader = make_loader(dataset, decoder="dali", threads=1, **options)
    found = take(loader, 0, 8)
    assert loader.failures == 1
    assert calls[1] is not calls[3]
    others = [*range(2), *range(3, 8)]
    assert same([clean[step] for step in others], [found[step] for step in others])
    assert found[2][0].device == clean[2][0].device
    difference = (found[2][0].float() - clean[2][0].float()).abs().mean((1, 2, 3))
    assert int((difference > 5).sum()) == 1


def test_a_batch_that_dali_refuses_is_decoded_by_the_cpu_and_dali_goes_on(dataset, monkeypatch):
    check_that_a_refused_batch_is_decoded_by_the_cpu(dataset, monkeypatch)


def test_a_batch_of_sound_photos_that_dali_refuses_is_one_line_with_its_words(dataset, monkeypatch):
    from nvidia.dali.pipeline import Pipeline

    def refuse(self):
        raise RuntimeError("CUDA out of memory\nStack trace (1 entry)")

    monkeypatch.setattr(Pipeline, "share_outputs", refuse)
    with pytest.raises(JobError, match=r"step 3: DALI failed on photos that are sound: CUDA out of memory$"):
        take(make_loader(dataset, decoder="dali"), 3, 5)
