"""The training step against an independent transcription of the method in plain PyTorch."""

import math

import numpy as np
import pytest
import torch
import torchvision
from tiny import class_table
from torch import Tensor, nn
from torch.nn import functional as F

from training.backbones import Backbone
from training.distributed import World
from training.engine import Engine
from training.head_bank import HeadBank
from training.model import GeoModel
from training.presets import TrainConfig
from training.schedules import make_schedule

STEPS, EPOCH, BATCH, SIDE, BLOCK = 20, 2, 6, 32, 500
WORLD = World(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.heads.CPU_BLOCK", BLOCK)


class Transcription:
    """The method as `method.md` words it: model, one head a group, one Adam for the model and one a head."""

    def __init__(self, backbone: nn.Module, linear: nn.Linear, heads: dict[int, list[Tensor]], kind: str) -> None:
        self.backbone, self.linear, self.kind = backbone, linear, kind
        self.heads = {group: [t.clone().requires_grad_() for t in tensors] for group, tensors in heads.items()}
        self.model_adam = torch.optim.Adam([*backbone.parameters(), *linear.parameters()], lr=1e-4)
        self.head_adams = {group: torch.optim.Adam(tensors, lr=1e-2) for group, tensors in self.heads.items()}

    def logits(self, images: Tensor, labels: Tensor, group: int) -> Tensor:
        pooled = F.adaptive_avg_pool2d(self.backbone(images), 1).flatten(1)
        descriptors = F.normalize(self.linear(pooled), p=2, dim=1)
        if self.kind == "FC_CE":
            weight, bias = self.heads[group]
            return descriptors @ weight.T + bias
        s, m = 100.0, 0.2
        cosine = F.normalize(descriptors) @ F.normalize(self.heads[group][0]).T
        own = torch.arange(cosine.shape[1])[None] == labels[:, None]
        if self.kind == "LMCC":
            return torch.where(own, s * (cosine - m), s * cosine)
        sine = torch.sqrt((1 - cosine**2).clamp(0, 1))
        turned = torch.where(cosine > 0, cosine * math.cos(m) - sine * math.sin(m), cosine)
        return s * torch.where(own, turned, cosine)

    def step(self, images: Tensor, labels: Tensor, group: int) -> float:
        loss = F.cross_entropy(self.logits(images, labels, group), labels)
        for optimizer in (self.model_adam, self.head_adams[group]):
            optimizer.zero_grad()
        loss.backward()
        self.model_adam.step()
        self.head_adams[group].step()
        return loss.item()


def tiny_stages() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU()),
        nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU()),
    )


def efficientnet_stages() -> nn.Sequential:
    return torchvision.models.efficientnet_b0(weights=None, stochastic_depth_prob=0.0).features


def tiny_model() -> GeoModel:
    model = GeoModel("small_cnn", "none", 0)
    model.backbone = Backbone(*tiny_stages(), out_channels=16)
    model.backbone[0].requires_grad_(False)
    model.projection = nn.Linear(16, 16)
    return model


def preset_model() -> GeoModel:
    """The model of the paper's preset from random weights, stochastic depth off."""
    config = TrainConfig()
    model = GeoModel(config.backbone, "none", config.freeze_until, config.descriptor_dim or None)
    for module in model.modules():
        if isinstance(module, torchvision.ops.StochasticDepth):
            module.p = 0.0
    return model


def build_pair(kind: str, dtype: torch.dtype, model: GeoModel) -> tuple[Engine, Transcription]:
    """Our engine and the transcription, from the same initial weights; heads of more classes than one block."""
    config = TrainConfig(head=kind, batch_size=BATCH, precision="fp32", iterations_per_epoch=EPOCH)  # type: ignore[arg-type]
    model.to(dtype)
    bank = HeadBank(class_table(side=46), config, model.projection.out_features, WORLD)
    for head in bank.heads.values():
        head.to(dtype)
    assert bank.classes.count(0) > BLOCK
    heads = {group: [p.detach().clone() for p in head.parameters()] for group, head in bank.heads.items()}
    stages, frozen = (efficientnet_stages(), 5) if len(model.backbone) == 9 else (tiny_stages(), 1)
    stages.to(dtype).load_state_dict(model.backbone.state_dict())
    for child in list(stages)[:frozen]:
        child.requires_grad_(False)
    linear = nn.Linear(model.projection.in_features, model.projection.out_features).to(dtype)
    linear.load_state_dict(model.projection.state_dict())
    return Engine(config, model, model, bank, WORLD), Transcription(stages, linear, heads, kind)


def compare(engine: Engine, plain: Transcription, dtype: torch.dtype, steps: int) -> list[tuple[float, float]]:
    """Both sides' losses of each step; epoch e is of group e mod 4, so that every group comes back."""
    generator = torch.Generator().manual_seed(1)
    config = engine.config
    schedule = make_schedule(
        config.schedule, engine.bank.groups, batch_size=BATCH, iterations_per_epoch=config.iterations_per_epoch
    )
    losses = []
    for step in range(steps):
        group = step // EPOCH % 4
        images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator, dtype=torch.float64).to(dtype)
        labels = torch.randint(0, engine.bank.classes.count(group), (BATCH,), generator=generator)
        outcome = engine.step(step, images, labels, schedule(step))
        losses.append((outcome.loss / BATCH, plain.step(images, labels, group)))
    return losses


def assert_close(losses: list[tuple[float, float]], tolerance: float) -> None:
    for step, (ours, theirs) in enumerate(losses):
        assert math.isclose(ours, theirs, rel_tol=tolerance), f"step {step}: {ours!r} and {theirs!r}"


@pytest.mark.parametrize("kind", ["AAMC", "LMCC", "FC_CE"])
def test_twenty_steps_equal_the_transcription_in_float64(kind: str) -> None:
    torch.manual_seed(0)
    engine, plain = build_pair(kind, torch.float64, tiny_model())
    losses = compare(engine, plain, torch.float64, STEPS)
    assert_close(losses, 1e-8)
    assert losses[0][0] != losses[1][0]


@pytest.mark.parametrize("kind", ["AAMC", "LMCC", "FC_CE"])
def test_the_first_step_equals_the_transcription_in_float32(kind: str) -> None:
    torch.manual_seed(0)
    engine, plain = build_pair(kind, torch.float32, tiny_model())
    assert_close(compare(engine, plain, torch.float32, 1), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AAMC", "LMCC", "FC_CE"])
def test_the_first_step_of_the_papers_preset_equals_the_transcription_in_float32(kind: str) -> None:
    torch.manual_seed(0)
    engine, plain = build_pair(kind, torch.float32, preset_model())
    assert_close(compare(engine, plain, torch.float32, 1), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AAMC", "LMCC", "FC_CE"])
def test_twenty_steps_of_the_papers_preset_equal_the_transcription(kind: str) -> None:
    torch.manual_seed(0)
    engine, plain = build_pair(kind, torch.float64, preset_model())
    assert_close(compare(engine, plain, torch.float64, STEPS), 1e-8)


def engine_with_loss(**settings: object) -> Engine:
    torch.manual_seed(0)
    config = TrainConfig(batch_size=BATCH, precision="fp32", s=30.0, **settings)  # type: ignore[arg-type]
    model = GeoModel("small_cnn", "none", 0, 16)
    return Engine(config, model, model, HeadBank(class_table(), config, 16, WORLD), WORLD)


def a_batch() -> tuple[Tensor, Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (BATCH, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 4, (BATCH,), generator=generator), np.array([0, 1, 2, 3, 0, 1])


def weights_of(engine: Engine) -> list[Tensor]:
    tensors = list(engine.model.state_dict().values())
    return [t.clone() for t in tensors + [head.weight.detach() for head in engine.bank.heads.values()]]


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    engine = engine_with_loss()
    images, labels, groups = a_batch()
    engine.step(0, images, labels, groups)
    before = weights_of(engine)
    with torch.no_grad():
        bias = engine.model.get_parameter("projection.bias")
        kept = bias.clone()
        bias.fill_(float("nan"))
    assert not engine.step(1, images, labels, groups).finite
    with torch.no_grad():
        bias.copy_(kept)
    for old, new in zip(before, weights_of(engine), strict=True):
        assert torch.equal(old, new)
    assert engine.step(2, images, labels, groups).finite


def test_a_step_in_which_a_rank_is_asked_to_stop_changes_nothing() -> None:
    engine = engine_with_loss()
    images, labels, groups = a_batch()
    engine.step(0, images, labels, groups)
    before = weights_of(engine)
    outcome = engine.step(1, torch.zeros_like(images), torch.zeros_like(labels), groups, asked_to_stop=True)
    assert (outcome.stop, outcome.finite) == (True, False)
    for old, new in zip(before, weights_of(engine), strict=True):
        assert torch.equal(old, new)


def test_accumulation_gives_the_same_step_as_the_whole_batch_but_for_batch_norms() -> None:
    whole, parts = engine_with_loss(), engine_with_loss(accumulate=3)
    for engine in (whole, parts):
        for module in engine.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    images, labels, groups = a_batch()
    losses = [engine.step(0, images, labels, groups).loss for engine in (whole, parts)]
    assert math.isclose(*losses, rel_tol=1e-5)
    for one, other in zip(weights_of(whole), weights_of(parts), strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


def test_only_the_groups_of_the_batch_change() -> None:
    engine = engine_with_loss()
    images, labels, _ = a_batch()
    before = [head.weight.detach().clone() for head in engine.bank.heads.values()]
    engine.step(0, images, labels, np.full(BATCH, 2))
    changed = [not torch.equal(old, engine.bank.heads[group].weight) for group, old in enumerate(before)]
    assert changed == [False, False, True, False]


def test_heads_compute_in_float32_under_autocast() -> None:
    engine = engine_with_loss()
    images, labels, groups = a_batch()
    plain = engine.bank.losses(engine.model(images.permute(0, 3, 1, 2).float() / 255), labels, groups)[0]
    descriptors = engine.model(images.permute(0, 3, 1, 2).float() / 255)
    with torch.autocast("cpu", torch.bfloat16):
        under = engine.bank.losses(descriptors, labels, groups)[0]
    assert under.dtype == torch.float32
    torch.testing.assert_close(plain, under, rtol=1e-5, atol=1e-5)


def test_clipping_bounds_the_models_gradient_and_reports_its_norm() -> None:
    free, clipped = engine_with_loss(), engine_with_loss(grad_clip=1e-6)
    norms = [engine.step(0, *a_batch(), want_norm=True).grad_norm for engine in (free, clipped)]
    assert norms[0] == norms[1]
    assert norms[1] == pytest.approx(first_gradient(free.optimizer), rel=1e-4)
    assert first_gradient(clipped.optimizer) == pytest.approx(1e-6, rel=1e-4)
    for group, optimizer in clipped.bank.optimizers.items():
        assert first_gradient(optimizer) == first_gradient(free.bank.optimizers[group])


@pytest.mark.parametrize(("clip", "taken"), [(0.0, True), (1.0, False)])
def test_whether_a_step_is_taken_depends_on_clipping_and_not_on_what_is_logged(clip: float, taken: bool) -> None:
    states = []
    for want_norm in (False, True):
        engine = engine_with_loss(grad_clip=clip)
        before = weights_of(engine)
        engine.model.get_parameter("projection.bias").register_hook(lambda g: g * float("inf"))
        assert engine.step(0, *a_batch(), want_norm=want_norm).finite is taken
        states.append(weights_of(engine))
        assert all(torch.equal(a, b) for a, b in zip(before, states[-1], strict=True)) is not taken
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def first_gradient(optimizer: torch.optim.Optimizer) -> float:
    """The norm of the gradient that Adam's first step saw: a tenth of it is the first moment."""
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    return 10 * float(nn.utils.get_total_norm(moments))


def test_the_fp16_scaler_updates_once_a_step_for_model_and_heads_together() -> None:
    plain, scaled = engine_with_loss(), engine_with_loss()
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for step in range(6):
        losses = [engine.step(step, *a_batch()).loss for engine in (plain, scaled)]
        assert math.isclose(*losses, rel_tol=1e-3)
    assert scaled.scaler.get_scale() == 4096  # doubled after steps 3 and 6, not after every second optimiser


def test_an_overflow_in_the_models_gradient_halves_the_scale_and_leaves_the_model() -> None:
    engine = engine_with_loss()
    engine.scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    before = [parameter.detach().clone() for parameter in engine.model.parameters()]
    engine.step(0, *a_batch())
    assert engine.scaler.get_scale() == pytest.approx(5e37)
    for old, new in zip(before, engine.model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_batch_norms_are_averaged_with_the_weights() -> None:
    engine = engine_with_loss(ema=0.9)

    def numbers() -> list[Tensor]:
        state = engine.model.state_dict()
        return [state[name].double() for name in state if not name.endswith("num_batches_tracked")]

    expected = numbers()
    for step in range(4):
        engine.step(step, *a_batch())
        decay = min(0.9, (1 + step) / (10 + step))
        expected = [decay * e + (1 - decay) * now for e, now in zip(expected, numbers(), strict=True)]
    with engine.averaged():
        for e, now in zip(expected, numbers(), strict=True):
            torch.testing.assert_close(now, e, rtol=1e-5, atol=1e-6)


def test_the_average_is_what_is_evaluated_and_training_goes_on_with_the_weights() -> None:
    engine = engine_with_loss(ema=0.9)
    for step in range(3):
        engine.step(step, *a_batch())
    before = weights_of(engine)
    with engine.averaged():
        assert not torch.equal(weights_of(engine)[0], before[0])
    for old, new in zip(before, weights_of(engine), strict=True):
        assert torch.equal(old, new)
