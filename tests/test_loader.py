"""Batches: the same draws whatever reads, decodes and shares them, and no bad photo ever among them."""

import gc
import json
import resource
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import simplejpeg
import torch
from scipy.stats import ks_2samp
from tiny import ROOT, class_table, write_dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resized_crop

from shards.batch import BatchPlan, Supply
from shards.console import JobError
from shards.dataset import Dataset
from shards.index import open_index
from shards.loader import Loader, choose_decoder
from shards.reader import ShardReader
from shards.sampler import IndexedSampler
from shards.stream import StreamSettings, Window

DECODERS = ["cpu", "dali"]


def make_loader(dataset, *, decoder="cpu", batch_size=16, image_size=48, seed=4, **options) -> Loader:
    groups = dataset.classes.groups

    def schedule(step: int) -> np.ndarray:
        return np.full(batch_size, groups[step % len(groups)])

    return Loader(
        dataset, schedule, batch_size=batch_size, image_size=image_size, seed=seed, decoder=decoder, **options
    )


def take(loader, first, last):
    return [(b.images.clone(), b.labels.clone(), b.groups.copy()) for b in loader.batches(first, last)]


def same(a, b) -> bool:
    return all(
        torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) and (x[2] == y[2]).all() for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_batch_depends_on_its_step_alone_not_on_threads_or_where_the_run_began(dataset, decoder):
    whole = take(make_loader(dataset, decoder=decoder, threads=1), 0, 7)
    assert same(whole[3:], take(make_loader(dataset, decoder=decoder, threads=3), 3, 7))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_out_the_global_batch_of_one(dataset, ranks, decoder):
    whole = take(make_loader(dataset, decoder=decoder), 5, 8)
    parts = [take(make_loader(dataset, decoder=decoder, rank=r, world_size=ranks), 5, 8) for r in range(ranks)]
    for step in range(3):
        for rank in range(ranks):
            assert torch.equal(parts[rank][step][0], whole[step][0][rank::ranks])
            assert torch.equal(parts[rank][step][1], whole[step][1][rank::ranks])


def test_both_decoders_carry_out_the_same_draws(dataset):
    for image_size, tolerance in [(64, 0.5), (32, 4.0)]:
        cpu, dali = (take(make_loader(dataset, decoder=d, image_size=image_size), 0, 4) for d in DECODERS)
        for a, b in zip(cpu, dali, strict=True):
            assert torch.equal(a[1], b[1])
            assert (a[0].float() - b[0].float()).abs().mean() < tolerance


def test_pixels_have_one_distribution_whatever_the_decoder(dataset):
    cpu, dali = (
        torch.cat([b[0] for b in take(make_loader(dataset, decoder=d, image_size=64), 0, 20)]) for d in DECODERS
    )
    for statistic in (lambda x: x.float().mean((1, 2, 3)), lambda x: x.float().std((1, 2, 3)), sharpness):
        assert ks_2samp(statistic(cpu).numpy(), statistic(dali).numpy()).pvalue > 0.9


def sharpness(images: torch.Tensor) -> torch.Tensor:
    """The mean difference between pixels below each other, by image."""
    return images.float().diff(dim=1).abs().mean((1, 2, 3))


def test_photos_that_shrink_to_half_are_nearly_as_sharp_from_either_decoder(dataset):
    cpu, dali = (
        torch.cat([b[0] for b in take(make_loader(dataset, decoder=d, image_size=32), 0, 10)]) for d in DECODERS
    )
    assert 0.98 < float((sharpness(cpu) / sharpness(dali)).mean()) < 1.12  # DALI's filter is the wider one


def test_an_image_is_the_drawn_crop_of_the_drawn_photo(dataset):
    index = open_index(dataset.path, dataset.classes)
    supply = Supply(IndexedSampler(index, 4), ShardReader(index), 64)
    ((images, labels, groups),) = take(make_loader(dataset, image_size=64), 1, 2)
    plan = BatchPlan(supply, 1, np.arange(16), groups)
    assert labels.tolist() == plan.labels.tolist()
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (16, 64, 64, 3))
    for i in range(16):
        photo = torch.from_numpy(simplejpeg.decode_jpeg(plan.encoded(i))).permute(2, 0, 1)
        left, top, width, height = plan.boxes[i].tolist()
        expected = resized_crop(photo, top, left, height, width, [64, 64], InterpolationMode.BILINEAR)
        assert (images[i].permute(2, 0, 1).float() - expected.float()).abs().max() <= 1


@pytest.mark.parametrize("mode", ["indexed", "stream"])
def test_resuming_reads_no_photo_of_the_steps_before(dataset, monkeypatch, mode):
    pread, read = ShardReader._pread, []

    def pread_and_count(self, group, row, end):
        read.append(end - row)
        return pread(self, group, row, end)

    monkeypatch.setattr(ShardReader, "_pread", pread_and_count)
    loader = make_loader(dataset, mode=mode, stream=StreamSettings(run=5, window=64))
    take(loader, 5000, 5001)
    loader.close()
    windows = 2 * 4 * 8 * 5  # two of four steps, in which each of four groups has a run of 5 in each of 8 lanes
    assert 0 < sum(read) <= (16 if mode == "indexed" else 2 * windows)


def test_the_decoder_that_a_cpu_gets_is_the_pool_of_threads_and_a_gpus_is_dali(dataset):
    assert make_loader(dataset, decoder="auto").decoder_name == "cpu"
    assert choose_decoder("auto", torch.device("cuda")) == "dali"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_dali_without_a_gpu_to_begin_on_is_one_line_with_the_way_out(dataset):
    with pytest.raises(JobError, match=r"DALI cannot begin .*--decoder cpu") as error:
        take(make_loader(dataset, decoder="dali", device="cuda"), 0, 1)
    assert "\n" not in str(error.value)


def test_a_dali_before_2_0_is_one_line_with_the_way_out(dataset, monkeypatch):
    monkeypatch.setattr("nvidia.dali.__version__", "1.53.0")
    with pytest.raises(JobError, match=r"--decoder dali needs NVIDIA DALI 2\.0 .*not 1\.53\.0.*--decoder cpu"):
        take(make_loader(dataset, decoder="dali"), 0, 1)


def test_waiting_for_a_batch_holds_all_that_the_loader_does_before_it_is_there(dataset):
    pause, groups = 0.02, np.full(16, dataset.classes.groups[0])

    def slow_schedule(step: int) -> np.ndarray:
        time.sleep(pause)
        return groups

    loader = Loader(dataset, slow_schedule, batch_size=16, image_size=48, seed=4, decoder="cpu")
    waited = [batch.wait_seconds for batch in loader.batches(0, 6)]
    assert sum(waited) > 6 * pause


def test_a_batch_smaller_than_the_number_of_processes_is_refused(dataset):
    with pytest.raises(JobError, match="batch-size"):
        make_loader(dataset, batch_size=2, world_size=3)


@pytest.mark.parametrize("mode", ["indexed", "stream"])
def test_few_descriptors_are_enough_for_many_groups(tmp_path, mode):
    many = write_dataset(tmp_path / "many", class_table(side=12, N=12), images=1)  # 144 groups, a shard each
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + 40, hard))
    try:
        loader = make_loader(many, mode=mode, batch_size=8, image_size=16)
        assert len(take(loader, 0, 150)) == 150
        assert loader.failures == 0
        loader.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("mode", ["indexed", "stream"])
def test_memory_and_open_files_stay_flat_over_200_group_switches(dataset, mode, decoder):
    stream = StreamSettings(run=5, window=64)  # 200 steps are 50 windows
    loader = make_loader(dataset, mode=mode, decoder=decoder, image_size=224, threads=2, stream=stream)
    process = psutil.Process()
    for start in range(0, 240, 2):  # 200 batches are 480 MB
        for _ in loader.batches(start, start + 2):
            pass
        if start == 40:
            windows = count_windows()  # those of other tests' loaders among them
            memory, files, threads = process.memory_info().rss, process.num_fds(), process.num_threads()
    assert process.num_fds() <= files
    assert process.num_threads() <= threads + 50  # 100 decoders were closed, the last ones just now
    assert process.memory_info().rss - memory < 64 << 20
    assert count_windows() <= windows + 2
    loader.close()


def count_windows() -> int:
    gc.collect()
    return sum(type(found) is Window for found in gc.get_objects())


def test_the_larger_copy_that_the_benchmark_reads_from_a_slow_disk_is_a_data_set(dataset, tmp_path):
    code = (
        "import sys; from pathlib import Path; folder, shards, out = sys.argv[1:]; sys.path.insert(0, folder)\n"
        "import loader; loader.multiply(Path(shards), Path(out), 3)"
    )
    benchmarks = ROOT / "tests" / "benchmarks"
    subprocess.run([sys.executable, "-c", code, benchmarks, dataset.path, tmp_path / "large"], check=True)
    large = Dataset.open(tmp_path / "large")
    index = open_index(large.path, large.classes)
    assert sum(len(of_group.size) for of_group in index.values()) == 3 * dataset.manifest.images
    assert len(take(make_loader(large), 0, 2)) == 2


def test_the_benchmark_takes_no_time_for_a_gpu_that_no_loader_uses():
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import loader\n"
        "torch.cuda.is_available = lambda: True; torch.cuda.synchronize = lambda: sys.exit('began to use the GPU')\n"
        "loader.rate(iter(lambda: 1, None), 0.01)"
    )
    done = subprocess.run([sys.executable, "-c", code, ROOT / "tests" / "benchmarks"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["webdataset_simplejpeg", "dali_webdataset"])
def test_the_benchmarks_faster_peers_go_on_past_the_end_of_a_data_set_in_whole_batches(dataset, peer):
    count = dataset.manifest.images // 64 + 2
    code = (
        "import sys; from itertools import islice; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        f"import paths, loader_peers; print(*islice(loader_peers.{peer}(Path(sys.argv[2]), 1), {count}))"
    )
    command = [sys.executable, "-c", code, ROOT / "tests" / "benchmarks", dataset.path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["64"] * count, done.stderr


@pytest.mark.slow
def test_the_quick_benchmark_leaves_its_two_rows_as_json(dataset, tmp_path):
    command = [sys.executable, ROOT / "tests" / "benchmarks" / "loader.py", "--quick", "--shards", dataset.path]
    done = subprocess.run([*command, "--json", tmp_path / "rows.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    columns = ("name", "storage", "decoder", "cores", "dtype")
    assert [tuple(row[column] for column in columns) for row in rows] == [
        ("indexed", "warm", "cpu", 1, "uint8"),
        ("reference-files", "warm", "pil", 1, "float32"),
    ]
    for row in rows:
        assert row["images_per_second"] > 0
        assert row["name"] in done.stdout
