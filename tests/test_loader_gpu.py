"""The input path on a GPU: DALI's mixed decoding stays on the device, CPU threads write to pinned memory."""

import pytest
import torch
from test_loader import make_loader, same, take
from test_loader_faults import check_that_a_refused_batch_is_decoded_by_the_cpu, damage, spoil_some_photos

from shards.loader import choose_decoder

needs_dali = pytest.mark.skipif(choose_decoder("auto", torch.device("cuda")) != "dali", reason="needs NVIDIA DALI")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_cpu_threads_write_batches_into_pinned_memory(dataset):
    for batch in make_loader(dataset, decoder="cpu", device="cuda").batches(0, 3):
        assert batch.images.is_pinned()


@needs_dali
def test_dali_leaves_the_images_on_the_device_and_carries_out_the_draws_of_the_cpu(dataset):
    for image_size, tolerance in [(64, 2.0), (32, 6.0)]:  # nvJPEG interpolates colour in another way
        cpu = take(make_loader(dataset, decoder="cpu", image_size=image_size), 0, 6)
        gpu = take(make_loader(dataset, decoder="dali", image_size=image_size, device="cuda"), 0, 6)
        for a, b in zip(cpu, gpu, strict=True):
            assert b[0].device.type == "cuda"
            assert (b[0].dtype, b[0].shape) == (torch.uint8, a[0].shape)
            assert torch.equal(a[1], b[1])
            assert (a[0].float() - b[0].cpu().float()).abs().mean() < tolerance


@needs_dali
def test_a_batch_keeps_its_pixels_while_later_ones_are_decoded_and_the_device_is_busy(dataset):
    loader = make_loader(dataset, decoder="dali", device="cuda")
    weights = torch.rand(4096, 4096, device="cuda")
    sums, kept = [], []
    for batch in loader.batches(0, 12):
        for _ in range(20):
            weights = torch.nn.functional.normalize(weights @ weights)
        sums.append(batch.images.double().sum())
        kept.append(batch.images)
    assert [float(s) for s in sums] == [float(k.double().sum()) for k in kept]
    again = take(make_loader(dataset, decoder="dali", device="cuda", threads=3), 4, 12)
    assert all(torch.equal(a, b[0]) for a, b in zip(kept[4:], again, strict=True))


@needs_dali
def test_dali_replaces_damaged_photos_on_the_device(dataset, tmp_path):
    loader = make_loader(damage(dataset, tmp_path, spoil_some_photos), decoder="dali", device="cuda")
    loader._supply.max_bad_share = 1.0
    batches = take(loader, 0, 12)
    assert loader.failures > 0
    assert all(b[0].device.type == "cuda" for b in batches)
    assert min(float(b[0].float().std((1, 2, 3)).min()) for b in batches) > 1


@needs_dali
def test_memory_of_the_device_stays_flat_over_200_group_switches(dataset):
    loader = make_loader(dataset, decoder="dali", device="cuda")
    take(loader, 0, 20)
    free = torch.cuda.mem_get_info()[0]
    for start in range(0, 200, 4):
        for _ in loader.batches(start, start + 4):
            pass
    assert free - torch.cuda.mem_get_info()[0] < 256 << 20


@needs_dali
@pytest.mark.parametrize("mode", ["indexed", "stream"])
def test_resuming_gives_the_same_pixels_on_the_device(dataset, mode):
    whole = take(make_loader(dataset, decoder="dali", device="cuda", mode=mode), 0, 9)
    assert same(whole[5:], take(make_loader(dataset, decoder="dali", device="cuda", mode=mode), 5, 9))


@needs_dali
def test_a_batch_that_dali_refuses_is_decoded_by_the_cpu_and_comes_to_the_device(dataset, monkeypatch):
    check_that_a_refused_batch_is_decoded_by_the_cpu(dataset, monkeypatch, device="cuda")
