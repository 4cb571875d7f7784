"""Learning rates and the running average, against values worked out here."""

import math

import pytest
import torch

from training.optimisers import Average, Rates, make_adam
from training.presets import TrainConfig


def rates(**values: object) -> Rates:
    config = TrainConfig(**values)  # type: ignore[arg-type]
    return Rates(config, make_adam([torch.nn.Parameter(torch.zeros(1))], config.lr))


def test_the_papers_run_ends_after_the_third_cut() -> None:
    # 1e-4 -> 1e-5 -> 1e-6 (in floating point not under 1e-6) -> 1e-7; a cut comes 11 epochs after the last best.
    schedule = rates()
    ended = []
    for _ in range(40):
        schedule.end_epoch(1.0)
        ended.append(schedule.exhausted)
    assert ended.index(True) == 1 + 3 * 11 - 1
    assert math.isclose(schedule.model_rate, 1e-7, rel_tol=1e-9)


def test_with_the_plateau_schedule_no_step_changes_a_rate() -> None:
    schedule, head = rates(lr=3e-4), make_adam([torch.nn.Parameter(torch.zeros(1))], 0.5)
    for step in (0, 5, 10**6):
        schedule.apply(step, [head])
        assert (schedule.model_rate, head.param_groups[0]["lr"]) == (3e-4, 0.5)


def test_a_lower_loss_resets_the_patience() -> None:
    schedule = rates(patience=2)
    for loss in (5.0, 5.0, 5.0, 4.0, 4.0, 4.0):
        schedule.end_epoch(loss)
    assert schedule.model_rate == 1e-4
    schedule.end_epoch(4.0)
    assert math.isclose(schedule.model_rate, 1e-5)


def test_the_plateau_follows_the_rule_of_torchs_defaults_on_losses_that_fall_stall_and_rise() -> None:
    # Better is under 0.9999 of the best; after more epochs than the patience without one the rate is cut.
    generator = torch.Generator().manual_seed(0)
    schedule = rates(patience=3, plateau_factor=0.5, lr=1.0)
    best, bad, rate, cuts = math.inf, 0, 1.0, 0
    loss = 5.0
    while not schedule.exhausted:
        loss *= 1 + 2e-4 * (float(torch.rand(1, generator=generator)) - 0.6)
        best, bad = (loss, 0) if loss < best * (1 - 1e-4) else (best, bad + 1)
        if bad > 3:
            rate, bad, cuts = rate * 0.5, 0, cuts + 1
        assert schedule.ends_after(loss) == (rate < 1e-6)
        schedule.end_epoch(loss)
        assert math.isclose(schedule.model_rate, rate)
    assert cuts == 20  # 2^-20 is the first under 1e-6


def test_asking_whether_an_epoch_would_end_the_run_changes_nothing() -> None:
    schedule = rates(patience=1, lr=2e-6)
    for loss in (1.0, 2.0):
        schedule.end_epoch(loss)
    before = schedule.state_dict()
    assert [schedule.ends_after(3.0), schedule.ends_after(0.5), schedule.ends_after(3.0)] == [True, False, True]
    assert schedule.state_dict() == before
    assert not schedule.exhausted


def test_a_restored_plateau_goes_on_counting() -> None:
    first, second = rates(patience=2), rates(patience=2)
    for loss in (1.0, 1.0):
        first.end_epoch(loss)
    second.load_state_dict(first.state_dict())
    for schedule in (first, second):
        schedule.end_epoch(1.0)
        schedule.end_epoch(1.0)
        assert math.isclose(schedule.model_rate, 1e-5)


def test_cosine_rises_over_the_warmup_and_falls_to_zero_for_model_and_heads() -> None:
    schedule = rates(lr_schedule="cosine", warmup_steps=4, epochs=2, iterations_per_epoch=12, lr=1.0, head_lr=10.0)
    head = make_adam([torch.nn.Parameter(torch.zeros(1))], 10.0)
    seen = []
    for step in range(24):
        schedule.apply(step, [head])
        seen.append(schedule.model_rate)
        assert math.isclose(head.param_groups[0]["lr"], 10 * seen[-1])
    expected = [(i + 1) / 5 for i in range(4)] + [(1 + math.cos(math.pi * i / 20)) / 2 for i in range(20)]
    assert seen == pytest.approx(expected)
    assert not schedule.exhausted


def test_constant_rises_over_the_warmup_and_stays() -> None:
    schedule = rates(lr_schedule="constant", warmup_steps=2, epochs=1, iterations_per_epoch=9, lr=3.0, head_lr=6.0)
    head = make_adam([torch.nn.Parameter(torch.zeros(1))], 6.0)
    for step, rate in enumerate([1.0, 2.0, *[3.0] * 7]):
        schedule.apply(step, [head])
        assert schedule.model_rate == pytest.approx(rate)
        assert head.param_groups[0]["lr"] == pytest.approx(2 * rate)
    assert schedule.state_dict() == {}


def test_adam_leaves_frozen_parameters_out() -> None:
    frozen = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
    assert len(make_adam([frozen, torch.nn.Parameter(torch.zeros(1))], 1.0).param_groups[0]["params"]) == 1


def test_the_average_follows_its_formula_and_can_be_swapped_in() -> None:
    value = torch.tensor([1.0])
    average = Average({"w": value}, decay=0.5)
    expected, current = 1.0, 1.0
    for n in range(20):
        current = float(n)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * current
        value.fill_(current)
        average.update()
    assert float(average.tensors["w"]) == pytest.approx(expected, rel=1e-6)
    with average.swapped_in():
        assert float(value) == pytest.approx(expected, rel=1e-6)
    assert float(value) == current
