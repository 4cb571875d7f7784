"""Several processes against one: the same losses and gradients, in float64, batch norm aside."""

import math
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny import class_table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shards.console import JobError
from shards.sampler import slots_of_rank
from training.assembly import make_accelerator, make_engine
from training.batch_norms import averaged_batch_norms, batch_norms
from training.distributed import World, join_after_restart
from training.engine import Engine
from training.head_bank import HeadBank
from training.model import GeoModel
from training.presets import TrainConfig
from training.schedules import make_schedule
from training.scoring import merge_rankings, rank_classes

CPU = torch.device("cpu")
CASES: dict[str, dict[str, Any]] = {
    "sequential": {"schedule": "sequential"},
    "joint": {"schedule": "joint"},
    "joint-accumulated": {"schedule": "joint", "accumulate": 2},
    "sharded-sequential": {"schedule": "sequential", "shard_head": True},
    "sharded-joint": {"schedule": "joint", "shard_head": True},
    "sharded-accumulated": {"schedule": "joint", "shard_head": True, "accumulate": 2},
    "linear-joint": {"schedule": "joint", "head": "FC_CE"},
}


def engine_of(case: str, batch_size: int, world: World) -> Engine:
    """A float64 engine whose batch norms use fixed statistics."""
    config = TrainConfig(batch_size=batch_size, precision="fp32", s=20.0, **CASES[case])
    torch.manual_seed(0)
    model = GeoModel("small_cnn", "none", 0, 8).double()
    wrapped = DistributedDataParallel(model) if world.size > 1 else model
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    bank = HeadBank(class_table(side=6), config, 8, world)
    for head in bank.heads.values():
        head.double()
    return Engine(config, model, wrapped, bank, world)


def global_batch(engine: Engine, batch_size: int, step: int) -> tuple[Tensor, Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(batch_size, 3, 16, 16, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 9, (batch_size,), generator=generator)
    groups = make_schedule(engine.config.schedule, engine.bank.groups, batch_size=batch_size, iterations_per_epoch=2)(
        step
    )
    return images, labels, groups


def gradients(engine: Engine, batch_size: int, world: World) -> dict[str, Any]:
    """The step's losses, and the gradients that the optimisers would see; of heads, this rank's parts."""
    images, labels, groups = global_batch(engine, batch_size, 0)
    mine = slots_of_rank(batch_size, world.rank, world.size)
    sums = engine._forward_backward(images[mine], labels[mine], groups[mine], world.rank == 1).wait()
    trained = engine.bank.groups_of_step(groups[mine])
    engine.bank.reduce_gradients(trained)
    found: dict[str, Any] = {"sums": torch.tensor(sums, dtype=torch.float64)}
    found |= {name: p.grad.clone() for name, p in engine.model.named_parameters() if p.grad is not None}
    for group in trained:
        head = engine.bank.heads[group]
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None
            found[f"head {group} {name} from {head.part.start}"] = parameter.grad.clone()
    return found


def after_steps(engine: Engine, batch_size: int, world: World) -> dict[str, Any]:
    """Losses of three steps, then all heads and optimiser states as rank 0 collects them, and a ranking.

    Several ranks also make two steps that are for nothing, since one of them is asked to stop or has a loss of NaN.
    """
    losses = []
    for step in range(3):
        images, labels, groups = global_batch(engine, batch_size, step)
        mine = slots_of_rank(batch_size, world.rank, world.size)
        if step == 1 and world.size > 1:
            assert engine.step(step, images[mine], labels[mine], groups[mine], asked_to_stop=world.rank == 1).stop
            spoilt = images[mine] * (math.nan if world.rank == 1 else 1.0)
            assert not engine.step(step, spoilt, labels[mine], groups[mine]).finite
        losses.append(engine.step(step, images[mine], labels[mine], groups[mine]).losses)
    heads, state = engine.bank.collect()
    generator = torch.Generator().manual_seed(9)
    descriptors = torch.nn.functional.normalize(torch.randn(5, 8, generator=generator), dim=1)
    ranking = rank_classes(descriptors, engine.bank.blocks("cosine"), top_k=7)
    rows, scores = merge_rankings([part for part in world.gather(ranking) if part[0].numel()], 7)
    return {
        "losses": torch.from_numpy(np.stack(losses)),
        "rows": rows,
        "head bytes": torch.tensor(engine.bytes_reduced - engine.model_bytes),
        "scores": scores,
        "state": state,
        "heads": {f"{group}.{name}": tensor for group, head in heads.items() for name, tensor in head.items()},
    }


def work(rank: int, ranks: int, folder: str, batch_size: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    world = World(rank, ranks, CPU)
    results: dict[str, Any] = {}
    for case in CASES:
        results[case] = gradients(engine_of(case, batch_size, world), batch_size, world)
        results[f"{case} after"] = after_steps(engine_of(case, batch_size, world), batch_size, world)
    norms = nn.Sequential(nn.BatchNorm2d(2))
    layer = norms[0]
    assert isinstance(layer, nn.BatchNorm2d)
    layer.running_mean = torch.tensor([float(rank), 1.0])
    layer.running_var = torch.tensor([1.0, 2.0 + rank])
    before = [layer.running_mean.clone(), layer.running_var.clone()]
    with averaged_batch_norms(norms, world):
        results["batch norm"] = {"mean": layer.running_mean.clone(), "var": layer.running_var.clone()}
    assert torch.equal(torch.stack(before), torch.stack([layer.running_mean, layer.running_var]))
    torch.save(results, f"{folder}/rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(folder: Path, ranks: int, batch_size: int) -> list[dict[str, Any]]:
    mp.start_processes(work, (ranks, str(folder), batch_size), nprocs=ranks, start_method="spawn")
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "batch_size"), [(2, 8), (3, 10), (4, 8)])
def test_ranks_with_shares_of_the_batch_equal_one_rank_with_all_of_it(
    tmp_path: Path, ranks: int, batch_size: int
) -> None:
    found = run_ranks(tmp_path, ranks, batch_size)
    alone = World(0, 1, CPU)
    for case in CASES:
        expected = gradients(engine_of(case, batch_size, alone), batch_size, alone)
        for of_rank in found:
            compare_gradients(of_rank[case], expected, case)
        expected = after_steps(engine_of(case, batch_size, alone), batch_size, alone)
        for rank, of_rank in enumerate(found):
            after = of_rank[f"{case} after"]
            torch.testing.assert_close(after["losses"], expected["losses"], rtol=1e-9, atol=1e-12)
            assert torch.equal(after["rows"], expected["rows"])
            check_traffic(case, int(after["head bytes"]), rank, ranks)
        for kind in ("heads", "state"):
            collected = found[0][f"{case} after"][kind]
            assert collected.keys() == expected[kind].keys()
            for name, tensor in expected[kind].items():
                torch.testing.assert_close(collected[name], tensor, rtol=1e-6, atol=1e-9, msg=f"{case} {name}")
    check_batch_norm([of_rank["batch norm"] for of_rank in found], ranks)


def compare_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], case: str) -> None:
    torch.testing.assert_close(found["sums"][:-1], expected["sums"][:-1], rtol=1e-9, atol=1e-12)
    assert found["sums"][-1] == 1  # one rank was asked to stop, and all know
    for name, gradient in found.items():
        if name == "sums":
            continue
        whole = expected.get(name)
        if name.startswith("head"):
            stem, start = name.rsplit(" from ", 1)
            whole = expected[f"{stem} from 0"][int(start) : int(start) + len(gradient)]
        assert whole is not None
        torch.testing.assert_close(gradient, whole, rtol=1e-9, atol=1e-9, msg=f"{case}: {name}")


def check_traffic(case: str, head_bytes: int, rank: int, ranks: int) -> None:
    """Sharded heads send no gradients, nor do those of the joint schedule where the ranks divide the groups."""
    one_head = 9 * 8 * 8
    if case.startswith("sharded") or (case == "joint" and ranks in (2, 4)):
        assert head_bytes == 0
    elif case == "sequential":
        assert head_bytes == one_head
    elif case == "joint":  # ten slots: rank 0 has all four groups, rank 1 not the third, rank 2 not the last
        assert head_bytes == (4, 3, 3)[rank] * one_head


def check_batch_norm(found: list[dict[str, Tensor]], ranks: int) -> None:
    """Means 0 .. R-1 and variance 1 pool to the mean of the means and 1 plus their variance."""
    for of_rank in found:
        means = np.arange(ranks)
        torch.testing.assert_close(of_rank["mean"], torch.tensor([means.mean(), 1.0], dtype=torch.float32))
        torch.testing.assert_close(
            of_rank["var"], torch.tensor([1 + means.var(), 2 + means.mean()], dtype=torch.float32)
        )


class Alike(World):
    """A process among others that hold the same."""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.mul_(self.size)


def test_batch_norms_that_agree_over_all_ranks_stay_as_they_are_however_far_their_means_lie() -> None:
    norms = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(2)))
    for norm in batch_norms(norms):
        norm.running_mean = torch.tensor([0.5, -900.0, 30.0])[: norm.num_features]
        norm.running_var = torch.tensor([2.0, 0.01, 1e-4])[: norm.num_features]
    before = [buffer.clone() for buffer in norms.buffers()]
    with averaged_batch_norms(norms, Alike(0, 3, CPU)):
        for old, new in zip(before, norms.buffers(), strict=True):
            torch.testing.assert_close(new, old, rtol=1e-5, atol=0)


def test_a_model_without_batch_norms_has_nothing_to_average() -> None:
    without_statistics = nn.BatchNorm1d(2, track_running_stats=False)
    with averaged_batch_norms(nn.Sequential(nn.Linear(2, 2), without_statistics), World(0, 2, CPU)) as statistics:
        assert statistics.shape == (2, 0)


def join(rank: int, port: int, attempt: int) -> None:
    """Join as torchrun's process of that attempt, whose store is at `port`; in the second one rank 1 comes late."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"TORCHELASTIC_RESTART_COUNT": str(attempt), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    if attempt and rank:
        time.sleep(2)
    join_after_restart("gloo")
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total == 2
    os._exit(0)  # as one that is killed: it takes nothing back from the store


def test_ddp_takes_the_gpu_of_the_model_not_that_of_the_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class Wrapped(nn.Module):
        def __init__(self, module: nn.Module, **options: Any) -> None:
            super().__init__()
            asked.update(options)

    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Wrapped)
    monkeypatch.setattr(Accelerator, "multi_device", True)
    monkeypatch.setattr(Accelerator, "local_process_index", 3)  # where this process sees one GPU, cuda:0
    AcceleratorState._reset_state(reset_partial_state=True)
    asked_for = TrainConfig(shards="s", out=Path("r"), backbone="small_cnn", weights="none", freeze_until=0, cpu=True)
    accelerator, config = make_accelerator(asked_for)
    make_engine(config, class_table(), accelerator, World(3, 4, CPU))
    assert asked["device_ids"] is None
    assert asked["output_device"] is None


def test_accelerate_launch_with_cpu_trains_in_float32_also_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, config = make_accelerator(TrainConfig(shards="s", out=Path("r"), precision="fp16"))
    assert accelerator.device.type == "cpu"
    assert config.precision == "fp32"
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("restarted", [False, True])
def test_processes_wait_for_each_other_longer_than_nccls_ten_minutes(
    monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    asked: dict[str, Any] = {}

    def join(*_: Any, **options: Any) -> None:
        asked.update(options)
        raise JobError("joined")

    launch = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    launch |= {"LOCAL_WORLD_SIZE": "2"}  # Accelerate sets it where it is not
    launch |= {"TORCHELASTIC_RESTART_COUNT": str(int(restarted)), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", join)
    monkeypatch.setattr(dist, "TCPStore", lambda *_, **__: dist.HashStore())
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(JobError, match="joined"):
        make_accelerator(TrainConfig(shards="shards", out=Path("run"), cpu=True))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert asked["timeout"] == timedelta(minutes=30)


@pytest.mark.slow
def test_processes_that_are_started_again_look_for_each_other_and_not_for_the_dead() -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for attempt in (0, 1):
        mp.start_processes(join, (store.port, attempt), nprocs=2, start_method="spawn")
