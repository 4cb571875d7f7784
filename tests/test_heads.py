"""Heads against formulas written here from the method's text, in float64, and against their own promises."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from present import present
from torch import Tensor

from training.heads import Head, full_precision

KINDS = ("AAMC", "LMCC", "FC_CE")


def formula_losses(
    kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, s: float, m: float
) -> Tensor:
    """The text of the method, a sample and a class at a time."""
    losses = []
    for row, label in zip(x, labels.tolist(), strict=True):
        logits = []
        for c, w in enumerate(weight):
            if kind == "FC_CE":
                assert bias is not None
                logits.append((row * w).sum() + bias[c])
                continue
            cos = (row * w).sum() / (row.square().sum().sqrt() * w.square().sum().sqrt())
            if c == label and kind == "LMCC":
                cos = cos - m
            elif c == label and cos > 0:
                cos = cos * math.cos(m) - (1 - cos * cos).sqrt() * math.sin(m)
            logits.append(s * cos)
        stacked = torch.stack(logits)
        shifted = stacked - stacked.max().detach()
        losses.append(shifted.exp().sum().log() - shifted[label])
    return torch.stack(losses)


def problem(kind: str, dtype: torch.dtype = torch.float64, s: float = 30.0) -> tuple[Head, Tensor, Tensor, Tensor]:
    """A head, descriptors (not of unit length), labels (one twice, cosines of both signs), loss weights."""
    torch.manual_seed(3)
    head = Head(kind, 12, 9, s=s, m=0.2).to(dtype)  # type: ignore[arg-type]
    x = (torch.randn(7, 12, dtype=torch.float64) * 1.7).to(dtype)
    labels = torch.tensor([4, 0, 8, 4, 2, 1, 5])
    with torch.no_grad():
        head.weight[0] = -x[1] + 0.3
        head.weight[8] = x[2] + 0.2
    cosines = torch.cosine_similarity(x, head.weight[labels])
    assert (cosines > 0.5).any()
    assert (cosines < -0.5).any()
    return head, x, labels, torch.linspace(-0.5, 2.0, 7, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_formulas(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.heads.CPU_BLOCK", 4)  # three blocks, the last one short
    head, x, labels, of_losses = problem(kind)
    x.requires_grad_()
    losses = head(x, labels)
    leaves = [x, *head.parameters()]
    found = torch.autograd.grad((losses * of_losses).sum(), leaves)

    expected_losses = formula_losses(kind, x, head.weight, head.bias, labels, 30.0, 0.2)
    expected = torch.autograd.grad((expected_losses * of_losses).sum(), leaves)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=1e-12)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_gradients_agree_with_float64_elementwise_at_scale_100(kind: str) -> None:
    head, x, labels, _ = problem(kind, torch.float32, s=100.0)
    x.requires_grad_()
    found = torch.autograd.grad(head(x, labels).mean(), [x, *head.parameters()])
    exact = head.double()
    x64 = x.detach().double().requires_grad_()
    losses = formula_losses(kind, x64, exact.weight, exact.bias, labels, 100.0, 0.2)
    expected = torch.autograd.grad(losses.mean(), [x64, *exact.parameters()])
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max().item()
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=2e-4, atol=2e-5 * scale)


def test_classes_without_probability_get_no_gradient_rather_than_denormal_numbers() -> None:
    head = Head("AAMC", 4, 3, s=100.0, m=0.0)
    with torch.no_grad():
        head.weight.copy_(torch.eye(3, 4))
    head(torch.eye(1, 4), torch.tensor([0])).sum().backward()  # exp(-100) is 3.8e-44
    assert head.weight.grad is not None
    assert not head.weight.grad[1:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_passes_gradcheck_per_sample(kind: str) -> None:
    head, x, labels, _ = problem(kind, s=5.0)
    parameters = [p.detach().clone().requires_grad_() for p in head.parameters()]
    names = [name for name, _ in head.named_parameters()]

    def losses(descriptors: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(head, dict(zip(names, values, strict=True)), (descriptors, labels))

    assert torch.autograd.gradcheck(losses, (x.requires_grad_(), *parameters))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_no_bit(kind: str, dtype: torch.dtype) -> None:
    head, x, labels, _ = problem(kind, torch.float32, s=100.0)
    x = x.to(dtype)
    results = []
    for autocast in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            losses = head(leaf, labels)
            grads = torch.autograd.grad(losses.sum(), [leaf, *head.parameters()])
            scores = head.scores(leaf, "cosine")
        assert losses.dtype == scores.dtype == torch.float32
        assert grads[0].dtype == dtype
        results.append((losses, scores, *grads))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_at_cosine_one_and_minus_one(kind: str) -> None:
    head = Head(kind, 4, 3)  # type: ignore[arg-type]
    x = torch.stack([head.weight[1], -head.weight[2]]).detach().requires_grad_()
    losses = head(x, torch.tensor([1, 2]))
    losses.sum().backward()
    assert x.grad is not None
    assert all(torch.isfinite(t).all() for t in (losses, x.grad, present(head.weight.grad)))


def exact(value: float) -> float:
    """AAMC's logit over s of a cosine, from the text of the method."""
    return value * math.cos(0.2) - math.sqrt(max(0.0, 1 - value * value)) * math.sin(0.2) if value > 0 else value


@pytest.mark.parametrize("cosine", [1.0, 1 - 1e-6, 1 - 1e-3, 1e-3, 1e-6, 0.0, -1e-6, -1e-3, -1 + 1e-6, -1.0])
def test_aamc_is_right_in_float32_where_the_angle_is_degenerate(cosine: float) -> None:
    head = Head("AAMC", 2, 2, s=30.0, m=0.2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    x = torch.tensor([[cosine, math.sqrt(1 - cosine * cosine)]], dtype=torch.float64).float().requires_grad_()
    value = x[0, 0].item() / math.hypot(*x[0].tolist())
    own, other = 30 * exact(value), 30 * math.sqrt(1 - value * value)
    loss = head(x, torch.tensor([0]))
    assert loss.item() == pytest.approx(np.logaddexp(0, other - own), rel=1e-4, abs=1e-6)
    loss.backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(present(head.weight.grad)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_or_descriptor_of_zero_length_scores_zero_and_keeps_everything_finite(kind: str) -> None:
    head, x, labels, _ = problem(kind, torch.float32)
    with torch.no_grad():
        head.weight[4].zero_()
        head.weight[3].zero_()  # no sample's class
        x[1].zero_()
    x.requires_grad_()
    losses = head(x, labels)
    losses.sum().backward()
    assert x.grad is not None
    assert all(torch.isfinite(t).all() for t in (losses, x.grad, present(head.weight.grad)))
    if kind != "FC_CE":
        assert not head.scores(x, "cosine")[:, [3, 4]].any()
        assert not head.scores(x, "cosine")[1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_descriptors_cost_no_more_than_their_own_rounding(kind: str) -> None:
    head, x, labels, _ = problem(kind, torch.float32, s=100.0)
    half = x.half().requires_grad_()
    same = half.detach().float().requires_grad_()
    for leaf in (half, same):
        head(leaf, labels).mean().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.float16
    assert same.grad is not None
    torch.testing.assert_close(half.grad, same.grad.half(), rtol=0, atol=0)


def test_a_tiny_loss_keeps_its_digits() -> None:
    head = Head("LMCC", 2, 2, s=20.0, m=0.0)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    loss = head(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-40.0)), rel=1e-5)


def test_one_class_has_no_loss() -> None:
    head = Head("AAMC", 4, 1)
    x = torch.randn(2, 4, requires_grad=True)
    losses = head(x, torch.zeros(2, dtype=torch.int64))
    losses.sum().backward()
    assert losses.tolist() == [0.0, 0.0]
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_hits_are_the_samples_whose_class_ranks_first_without_margin(kind: str) -> None:
    torch.manual_seed(0)
    head = Head(kind, 3, 5)  # type: ignore[arg-type]
    x, labels = torch.randn(200, 3), torch.randint(5, (200,))
    _, hits = head.losses_and_hits(x, labels)
    best = head.scores(x, "raw" if kind == "FC_CE" else "cosine").argmax(1)
    assert torch.equal(hits, best == labels)
    assert 0 < hits.sum() < 200


@pytest.mark.parametrize("kind", ["AAMC", "LMCC"])
def test_a_head_that_scores_all_classes_alike_has_no_hits(kind: str) -> None:
    head = Head(kind, 3, 5)  # type: ignore[arg-type]
    _, hits = head.losses_and_hits(torch.zeros(20, 3), torch.zeros(20, dtype=torch.int64))
    assert not hits.any()


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_raw_products_or_cosines(kind: str) -> None:
    head, x, _, _ = problem(kind)
    weight = head.weight.detach().numpy()
    raw = x.numpy() @ weight.T + (0 if head.bias is None else head.bias.detach().numpy())
    norms = np.linalg.norm(x.numpy(), axis=1)[:, None] * np.linalg.norm(weight, axis=1)
    np.testing.assert_allclose(head.scores(x, "raw").numpy(), raw, rtol=1e-12)
    np.testing.assert_allclose(head.scores(x, "cosine").numpy(), x.numpy() @ weight.T / norms, rtol=1e-12)
    with pytest.raises(ValueError, match="neither raw nor cosine"):
        head.scores(x, "dot")  # type: ignore[arg-type]


def peak_of_live_bytes(work: Callable[[], object]) -> int:
    """The most bytes that tensors made by `work` held at one time, from the allocator's own events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max())


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_at_most_two_copies_of_the_logits_beside_the_gradients(kind: str) -> None:
    head = Head(kind, 16, 20_000)  # type: ignore[arg-type]
    x = torch.randn(64, 16, requires_grad=True)
    labels = torch.randint(20_000, (64,))
    logits = 64 * 20_000 * 4
    gradients = head.weight.nbytes + x.nbytes
    peak = peak_of_live_bytes(lambda: head(x, labels).mean().backward())
    assert logits < peak - gradients < 2 * logits


@pytest.mark.parametrize("kind", KINDS)
def test_init_is_that_of_the_reference(kind: str) -> None:
    torch.manual_seed(5)
    head = Head(kind, 64, 300)  # type: ignore[arg-type]
    bound = 1 / math.sqrt(64) if kind == "FC_CE" else math.sqrt(6 / (64 + 300))
    assert head.weight.abs().max() <= bound
    assert head.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert (head.bias is not None) == (kind == "FC_CE")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ArcFace", 4, 3), "none of AAMC, LMCC, FC_CE"),
        (("AAMC", 4, 0), "at least one dimension and one class"),
        (("AAMC", 4, 3, 0.0), "scale s > 0"),
        (("LMCC", 4, 3, 30.0, -0.1), "margin 0 <= m"),
    ],
)
def test_a_head_that_cannot_be_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Head(*arguments)


@pytest.fixture
def tf32() -> Iterator[None]:
    """Puts back what a test says about TF32."""
    precision = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = precision


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("allowed_by", ["nothing", "old setting", "new setting"])
def test_tf32_is_off_in_heads_by_both_of_torchs_settings_and_then_as_it_was(allowed_by: str) -> None:
    matmul = torch.backends.cuda.matmul
    if allowed_by == "old setting":
        torch.set_float32_matmul_precision("high")
    elif allowed_by == "new setting":
        matmul.fp32_precision = "tf32"
    before = matmul.fp32_precision
    with full_precision(torch.device("cuda")):
        assert matmul.allow_tf32 is False  # fails where the two settings contradict each other
        assert matmul.fp32_precision == "ieee"
    assert matmul.fp32_precision == before
    if allowed_by != "new setting":  # with that alone torch cannot tell the old one
        assert torch.get_float32_matmul_precision() == ("high" if allowed_by == "old setting" else "highest")
