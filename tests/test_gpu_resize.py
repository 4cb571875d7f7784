"""The GPU codec: the same steps on nvImageCodec's CPU back end here, and on the GPU where there is one."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg
from conftest import SETTINGS
from photos import jpeg, picture, write_photos
from PIL import Image

from preprocessing import gpu_resize
from preprocessing.build import build
from preprocessing.gpu_resize import GpuResizer
from preprocessing.resize import BadPhoto, Resizer
from preprocessing.shard_run import Machinery
from shards.console import JobError
from shards.layout import shard_tables

pytest.importorskip("nvidia.nvimgcodec")
torch = pytest.importorskip("torch")

EXACT = Resizer(64, 95, "bicubic")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
    ),
]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def saved(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def turned(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return saved(Image.fromarray(picture(128, 4)[:, :100]), exif=tags)


def psnr(a: bytes, b: bytes) -> float:
    one, other = (simplejpeg.decode_jpeg(x).astype(float) for x in (a, b))
    return 10 * np.log10(255**2 / max(((one - other) ** 2).mean(), 1e-9))


@pytest.mark.parametrize("device", DEVICES)
def test_every_photo_of_a_batch_is_that_of_the_exact_path_in_its_order(device):
    photos = [jpeg(size, i) for i in range(70) for size in (64, 100, 512)[i % 3 : i % 3 + 1]]
    photos += [turned(i) for i in range(1, 9)]
    photos += [saved(Image.fromarray(picture(128, 5)).convert(mode)) for mode in ("L", "CMYK")]
    photos += [saved(Image.fromarray(picture(128, 6)), progressive=True)]
    made = GpuResizer(64, 95, device=device).make(photos)
    assert [i for i, small in enumerate(made) if isinstance(small, BadPhoto)] == []
    near = [psnr(small, EXACT(photo)) for small, photo in zip(made, photos, strict=True) if isinstance(small, bytes)]
    assert min(near) > 35


@pytest.mark.parametrize("device", DEVICES)
def test_bad_photos_get_the_reasons_of_the_cpu_codec_and_spare_their_neighbours(device):
    good = jpeg(128, 1)
    bad = [b"", b"hello", b"\xff\xd8\xff" + b"\0" * 500 + b"\xff\xd9", jpeg(512, 1)[:9000], jpeg(512, 1)[:-2],
           jpeg(512, 1)[:300], jpeg(512, 1)[:9000] + bytes(5000), jpeg(20, 1)]  # fmt: skip
    mixed = [photo for each in bad for photo in (each, good)]
    made = GpuResizer(64, 95, device=device).make(mixed)
    expected = [small.reason for small in Resizer(64, 95).make(bad) if isinstance(small, BadPhoto)]
    assert [small.reason for small in made[::2] if isinstance(small, BadPhoto)] == expected
    assert len(expected) == len(bad)
    assert len({small for small in made[1::2] if isinstance(small, bytes)}) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_small_jpegs_are_baseline_420_without_metadata(device):
    (small,) = GpuResizer(64, 95, device=device).make([turned(6)])
    assert isinstance(small, bytes)
    assert simplejpeg.decode_jpeg_header(small)[:4] == (64, 64, "YCbCr", "420")
    assert b"\xff\xc0" in small
    assert not any(marker in small[: small.index(b"\xff\xc0")] for marker in (b"\xff\xc2", b"Exif", b"\xff\xfe"))


def test_a_codec_that_makes_no_jpeg_is_refused_before_anything_is_begun(monkeypatch):
    GpuResizer(64, 95, device="cpu").check()
    monkeypatch.setattr(gpu_resize._Machines, "small", lambda *_: [None])  # as without nvJPEG
    with pytest.raises(JobError, match="makes no JPEG"):
        GpuResizer(64, 95, device="cpu").check()


def test_no_more_pixels_are_decoded_at_a_time_than_the_limit(monkeypatch):
    sizes = []
    small = gpu_resize._Machines.small

    def small_and_count(self, photos, *rest):
        sizes.append(len(photos))
        return small(self, photos, *rest)

    monkeypatch.setattr(gpu_resize, "_MOST_PIXELS", 3 * 128 * 128)
    monkeypatch.setattr(gpu_resize._Machines, "small", small_and_count)
    photos = [jpeg(128, i) for i in range(7)]
    resizer = GpuResizer(64, 95, device="cpu")
    assert resizer.make([photos[0]]) + resizer.make(photos[1:]) == resizer.make(photos)
    assert sizes == [1, 3, 3, 3, 3, 1]
    assert isinstance(resizer.make([jpeg(512, 1)])[0], bytes)  # too many pixels for it: by the CPU codec
    assert len(sizes) == 6


def test_what_shrinks_further_than_torchs_filter_can_on_a_gpu_is_left_to_the_cpu_codec(monkeypatch):
    monkeypatch.setattr(gpu_resize._Machines, "small", lambda *_: pytest.fail("it came to the GPU"))
    for width, height in [(64 * 40 + 8, 64), (64, 64 * 40 + 8)]:
        photo = saved(Image.fromarray(picture(64, 1)).resize((width, height)))
        (small,) = GpuResizer(64, 95, device="cpu").make([photo])
        assert isinstance(small, bytes)


@pytest.mark.gpu
@needs_gpu
def test_torchs_filter_shrinks_as_far_as_photos_are_given_to_it():
    photos = [saved(Image.fromarray(picture(64, 1)).resize(size)) for size in [(64 * 40, 64), (64, 64 * 40)]]
    made = GpuResizer(64, 95).make([*photos, saved(Image.fromarray(picture(2560, 1)))])
    assert all(isinstance(small, bytes) for small in made)


def test_a_gpu_that_fails_is_one_line_with_the_way_out(monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA Runtime failure: '#2' at image.cpp:62\nstack")

    monkeypatch.setattr(gpu_resize._Machines, "small", fail)
    resizer = GpuResizer(64, 95, device="cpu")
    for use in (resizer.check, lambda: resizer.make([jpeg(128, 1)])):
        with pytest.raises(JobError, match=r"'#2' at image.cpp:62\).*fewer --workers") as error:
            use()
        assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_line_says_so_and_nothing_is_begun(tmp_path):
    write_photos(tmp_path / "photos")
    with pytest.raises(JobError, match="needs an NVIDIA GPU") as error:
        build(tmp_path / "photos", tmp_path / "out", replace(SETTINGS, codec="gpu"), Machinery(1))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out" / "plan.json").exists()


@pytest.mark.gpu
@needs_gpu
def test_a_data_set_by_the_gpu_has_the_samples_and_labels_of_the_cpus_and_is_another_one(tmp_path: Path):
    photos = write_photos(tmp_path / "photos")
    photos[3].write_bytes(photos[3].read_bytes()[:500])
    build(tmp_path / "photos", tmp_path / "cpu", SETTINGS, Machinery(1))
    build(tmp_path / "photos", tmp_path / "gpu", replace(SETTINGS, codec="gpu"), Machinery(2))
    for one, other in zip(*(shard_tables(tmp_path / name) for name in ("cpu", "gpu")), strict=True):
        columns = ["key", "label", "east", "north", "source"]
        assert pq.read_table(one, columns=columns).equals(pq.read_table(other, columns=columns))
    assert (tmp_path / "cpu" / "quarantine.jsonl").read_text() == (tmp_path / "gpu" / "quarantine.jsonl").read_text()
    with pytest.raises(JobError, match="holds another data set"):
        build(tmp_path / "photos", tmp_path / "gpu", SETTINGS, Machinery(1))
