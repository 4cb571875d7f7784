"""What a machine, a launch or a data set cannot serve is one clear line at a run's start."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import configure, train_here

from evaluation.comparison import open_world
from shards.console import JobError
from training.assembly import check_against_world, make_world
from training.distributed import World


def test_settings_that_the_data_set_or_the_machine_cannot_serve_are_one_clear_line(
    shards: Path, tmp_path: Path
) -> None:
    for settings, message in (
        ({"schedule": "joint", "batch_size": 3}, "--batch-size 3: less than one image for each of 4 groups"),
        ({"sync_bn": True}, "--sync-bn needs GPUs"),
        (
            {"read": "stream", "stream_run": 1 << 40},
            "--stream-run 1099511627776: more photos than --stream-window 65536",
        ),
        ({"freeze_until": 9}, "--freeze-until 9: small_cnn has 5 children"),
        ({"shard_head": True, "head_sample_rate": 0.5}, "--head-sample-rate needs several processes"),
        ({"image_size": 7, "batch_size": 1}, "--batch-size 1: leaves parts of one image"),
        ({"image_size": 16, "batch_size": 5, "accumulate": 4}, "a larger image, or a smaller --accumulate"),
    ):
        with pytest.raises(JobError, match=message) as error:
            train_here(configure(shards, tmp_path / "r", **settings))
        assert "\n" not in str(error.value)
        assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("opens", ["training", "evaluation"])
def test_more_processes_than_gpus_are_one_line_before_nccl_meets_itself(
    monkeypatch: pytest.MonkeyPatch, opens: str
) -> None:
    here = SimpleNamespace(device=torch.device("cuda", 1), process_index=5, num_processes=8)
    monkeypatch.setattr("evaluation.comparison.PartialState", lambda **_: here)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(JobError, match="8 processes were started here for 4 GPUs; give --num_processes 4 ") as error:
        make_world(here) if opens == "training" else open_world().__enter__()
    assert "\n" not in str(error.value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert make_world(here).size == 8


def test_one_gpu_for_several_processes_is_one_line_unless_each_may_see_another(monkeypatch: pytest.MonkeyPatch) -> None:
    here = SimpleNamespace(device=torch.device("cuda", 0), process_index=1, num_processes=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert make_world(here).size == 2  # by srun, say, with a GPU for each task
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert make_world(here).size == 2  # by a script that shows each process its own
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(JobError, match="2 processes were started here for 1 GPU; give --num_processes 1 "):
        make_world(here)


def test_batch_norms_over_several_gpus_are_not_compiled(shards: Path, tmp_path: Path) -> None:
    gpus, gpu = (World(0, size, torch.device("cuda")) for size in (2, 1))
    compiled = configure(shards, tmp_path / "r", sync_bn=True, compile=True)
    with pytest.raises(JobError, match=r"--sync-bn: each of its layers .*; add --no-compile"):
        check_against_world(compiled, gpus, 4)
    check_against_world(compiled, gpu, 4)
    check_against_world(replace(compiled, compile=False), gpus, 4)
