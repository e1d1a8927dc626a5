"""The learning rate as a function of the step."""

from typing import Any

import pytest
import torch

from ml_src.core.config_file import parse_config
from ml_src.core.optim import Schedule, build_optimizer


def build(scheduler: dict[str, Any], steps_per_epoch: int = 4, num_epochs: int = 10, lr: float = 0.1) -> Schedule:
    raw = {
        "data": {"data_dir": "x", "num_classes": 2},
        "scheduler": scheduler,
        "optimizer": {"lr": lr},
        "training": {"num_epochs": num_epochs},
    }
    config = parse_config(raw)
    optimizer = build_optimizer(config.optimizer, [torch.nn.Parameter(torch.zeros(1))])
    return Schedule(config.scheduler, optimizer, steps_per_epoch, num_epochs)


def rates(schedule: Schedule, num_steps: int = 40) -> list[float]:
    values = []
    for _ in range(num_steps):
        values.append(schedule.lr)
        schedule.step()
    return [*values, schedule.lr]


def test_none_is_constant() -> None:
    assert set(rates(build({"type": "none"}))) == {0.1}


def test_step_drops_at_whole_epochs() -> None:
    values = rates(build({"type": "step", "step_size": 3, "gamma": 0.5}))
    assert values[11] == 0.1 and values[12] == pytest.approx(0.05) and values[24] == pytest.approx(0.025)


def test_cosine_agrees_with_torch_at_every_step() -> None:
    ours = rates(build({"type": "cosine", "eta_min": 0.01}))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.01)
    for value in ours:
        assert value == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        reference.step()


def test_cosine_stays_at_the_minimum_after_t_max() -> None:
    values = rates(build({"type": "cosine", "T_max": 5, "eta_min": 0.02}))
    assert values[20:] == pytest.approx([0.02] * 21)


def test_poly_agrees_with_its_formula_and_ends_at_zero() -> None:
    values = rates(build({"type": "poly", "power": 0.9}))
    assert values[10] == pytest.approx(0.1 * (1 - 10 / 40) ** 0.9)
    assert values[40] == 0.0


def test_one_cycle_agrees_with_torch_to_the_length_of_a_step() -> None:
    ours = rates(build({"type": "one_cycle"}))
    assert ours[0] == pytest.approx(0.1 / 25)
    assert max(ours) == ours[12] == pytest.approx(0.1)
    assert ours[40] == pytest.approx(0.1 / 250_000)


def test_warmup_rises_linearly_and_never_takes_a_step_at_zero() -> None:
    values = rates(build({"type": "cosine", "warmup_epochs": 2}))
    assert values[:8] == pytest.approx([0.1 * (i + 1) / 8 for i in range(8)])
    assert values[8] == pytest.approx(0.1) and values[40] == pytest.approx(0.0, abs=1e-12)


def test_plateau_waits_for_its_patience_and_ignores_nan() -> None:
    schedule = build({"type": "plateau", "patience": 2, "factor": 0.5})
    for loss, expected in [(1.0, 0.1), (0.9, 0.1), (0.95, 0.1), (float("nan"), 0.1), (0.91, 0.05), (0.5, 0.05)]:
        schedule.end_epoch({"val_loss": loss})
        assert schedule.lr == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["none", "step", "cosine", "poly", "plateau", "one_cycle"])
def test_a_restored_schedule_goes_on_with_the_same_rates(kind: str) -> None:
    whole, first, second = build({"type": kind}), build({"type": kind}), build({"type": kind})
    expected = rates(whole)[20:]
    rates(first, 20)
    second.load_state_dict(first.state_dict())
    assert rates(second, 20) == expected


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd", "rmsprop"])
def test_every_optimizer_lowers_a_parabola(kind: str) -> None:
    config = parse_config({"data": {"data_dir": "x", "num_classes": 2}, "optimizer": {"type": kind, "lr": 0.05}})
    x = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = build_optimizer(config.optimizer, [x])
    for _ in range(200):
        optimizer.zero_grad()
        (x**2).sum().backward()
        optimizer.step()
    assert abs(x.item()) < 0.5
