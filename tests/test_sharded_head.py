"""A head split over ranks against one rank that holds all classes, in float64 over gloo."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from present import present

from training.heads import Head
from training.sharded_head import ShardedHead, part_of

DIM, CLASSES = 10, 23
SIZES = (5, 6, 0)  # samples of each rank: unequal, and none at all


def whole_problem(kind: str) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The head of one rank, and the descriptors, labels and loss weights of the global batch of 11."""
    torch.manual_seed(1)
    head = Head(kind, DIM, CLASSES, s=20.0, m=0.3).double()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(sum(SIZES), DIM, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (sum(SIZES),), generator=generator)
    return head, x, labels, torch.linspace(0.1, 2.0, sum(SIZES), dtype=torch.float64)


def work(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    results: dict[str, Any] = {}
    start = sum(SIZES[:rank])
    stop = sum(SIZES) if rank == ranks - 1 else start + SIZES[rank]
    for kind in ("AAMC", "LMCC", "FC_CE"):
        _, x, labels, of_losses = whole_problem(kind)
        torch.manual_seed(1)
        head = ShardedHead(kind, DIM, CLASSES, s=20.0, m=0.3).double()
        leaf = x[start:stop].clone().requires_grad_()
        losses, hits = head.losses_and_hits(leaf, labels[start:stop])
        (losses * of_losses[start:stop]).sum().backward()
        results[kind] = (
            losses.detach(),
            hits,
            leaf.grad,
            head.weight.detach(),
            head.weight.grad,
            None if head.bias is None else head.bias.grad,
        )
    torch.manual_seed(1)
    sampled = ShardedHead("AAMC", DIM, 400, s=20.0, m=0.3, sample_rate=0.25).double()
    _, x, labels, _ = whole_problem("AAMC")
    leaf = x[start:stop].clone().requires_grad_()
    for attempt in range(2):
        torch.manual_seed(100 + rank)
        losses = sampled(leaf, labels[start:stop] * 17)
        results[f"sampled {attempt}"] = losses.detach()
    losses.sum().backward()
    results["touched"] = torch.nonzero(present(sampled.weight.grad).abs().sum(1)).squeeze(1) + sampled.part.start
    results["gradient"] = leaf.grad
    results["weight gradient"] = present(sampled.weight.grad)
    sampled.eval()
    results["unsampled"] = sampled(leaf, labels[start:stop] * 17).detach()
    few = ShardedHead("AAMC", DIM, 20, sample_rate=0.01)
    none = few(torch.zeros(0, DIM, requires_grad=True), labels[:0])  # a part of a batch without samples of this head
    none.sum().backward()
    results["none"] = (none.detach(), few.weight.grad)
    with pytest.raises(ValueError, match="1 classes cannot be split over"):
        ShardedHead("AAMC", DIM, 1)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def by_rank(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(request.param, folder), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AAMC", "LMCC", "FC_CE"])
def test_losses_and_gradients_are_those_of_one_rank(kind: str, by_rank: list[dict[str, Any]]) -> None:
    head, x, labels, of_losses = whole_problem(kind)
    x.requires_grad_()
    losses, hits = head.losses_and_hits(x, labels)
    (losses * of_losses).sum().backward()
    bias_grad = None if head.bias is None else head.bias.grad
    expected = (losses.detach(), hits, x.grad, head.weight.detach(), head.weight.grad, bias_grad)
    for position, whole in enumerate(expected):
        if whole is not None:
            found = torch.cat([results[kind][position] for results in by_rank])
            torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_sampled_losses_are_those_over_the_sampled_classes(by_rank: list[dict[str, Any]]) -> None:
    _, x, labels, _ = whole_problem("AAMC")
    labels = labels * 17
    touched = torch.cat([results["touched"] for results in by_rank])
    assert len(touched) == sum(round(0.25 * len(part_of(400, r, len(by_rank)))) for r in range(len(by_rank)))
    assert set(labels.tolist()) <= set(touched.tolist())

    torch.manual_seed(1)
    whole = Head("AAMC", DIM, 400, s=20.0, m=0.3).double()
    few = Head("AAMC", DIM, len(touched), s=20.0, m=0.3).double()
    with torch.no_grad():
        few.weight.copy_(whole.weight[touched])
    x.requires_grad_()
    losses = few(x, torch.searchsorted(touched, labels))
    losses.sum().backward()
    for name in ("sampled 0", "sampled 1"):
        found = torch.cat([results[name] for results in by_rank])
        torch.testing.assert_close(found, losses.detach(), rtol=1e-9, atol=1e-12)
    gradient = torch.cat([results["gradient"] for results in by_rank])
    torch.testing.assert_close(gradient, x.grad, rtol=1e-9, atol=1e-12)
    of_weight = torch.cat([results["weight gradient"] for results in by_rank])
    torch.testing.assert_close(of_weight[touched], present(few.weight.grad), rtol=1e-9, atol=1e-12)
    unsampled = torch.cat([results["unsampled"] for results in by_rank])
    torch.testing.assert_close(unsampled, whole(x, labels).detach(), rtol=1e-9, atol=1e-12)


def test_a_batch_without_samples_has_no_losses_and_no_gradients(by_rank: list[dict[str, Any]]) -> None:
    for results in by_rank:
        losses, gradient = results["none"]
        assert losses.shape == (0,)
        assert not gradient.any()


def test_parts_cover_all_classes_once() -> None:
    for classes, ranks in ((23, 3), (8, 8), (9, 2)):
        parts = [part_of(classes, rank, ranks) for rank in range(ranks)]
        assert [c for part in parts for c in part] == list(range(classes))
        assert min(map(len, parts)) > 0


def test_a_split_that_cannot_be_is_refused(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="over 0 and at most 1"):
            ShardedHead("AAMC", DIM, 4, sample_rate=0.0)
        with pytest.raises(ValueError, match="at least one dimension and one class"):
            ShardedHead("AAMC", 0, 4)
    finally:
        dist.destroy_process_group()
