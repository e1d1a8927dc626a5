"""From words to torch.optim, and the learning rate as a function of the optimizer step."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ml_src.core.config import (
    SGD,
    Adam,
    AdamW,
    CosineSchedule,
    NoSchedule,
    OneCycleSchedule,
    PlateauSchedule,
    PolySchedule,
    RMSprop,
    StepSchedule,
)

OptimizerConfig = Adam | AdamW | SGD | RMSprop
ScheduleConfig = NoSchedule | StepSchedule | CosineSchedule | PolySchedule | PlateauSchedule | OneCycleSchedule


def build_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the optimizer that `config` names, with torch's defaults for what the section does not say."""
    match config:
        case Adam():
            return torch.optim.Adam(parameters, lr=config.lr, weight_decay=config.weight_decay)
        case AdamW():
            return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
        case SGD():
            return torch.optim.SGD(
                parameters,
                lr=config.lr,
                momentum=config.momentum,
                nesterov=config.momentum > 0,
                weight_decay=config.weight_decay,
            )
        case RMSprop():
            return torch.optim.RMSprop(
                parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
            )


class Schedule:
    """Sets the learning rate of every optimizer step: lr * warm-up or shape(epochs since the warm-up).

    All schedules but `plateau` are a pure function of the number of steps taken, so that a resumed run has the same
    rates. `plateau` also counts epochs without improvement.
    """

    def __init__(
        self, config: ScheduleConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int, num_epochs: int
    ) -> None:
        self.config, self.optimizer = config, optimizer
        self.steps_per_epoch, self.num_epochs = steps_per_epoch, num_epochs
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.num_steps = 0
        self.plateau_factor, self.num_bad_epochs = 1.0, 0
        self.best: float | None = None
        self._apply()

    def step(self) -> None:
        """Count one optimizer step and set the rate of the next."""
        self.num_steps += 1
        self._apply()

    def end_epoch(self, metrics: Mapping[str, float]) -> None:
        """Let `plateau` look at the epoch's metrics."""
        if not isinstance(self.config, PlateauSchedule):
            return
        value = metrics[self.config.monitor]
        if self.config.is_better(value, self.best):
            self.best, self.num_bad_epochs = value, 0
            return
        self.num_bad_epochs += 1
        if self.num_bad_epochs > self.config.patience:
            self.plateau_factor *= self.config.factor
            self.num_bad_epochs = 0
            self._apply()

    @property
    def lr(self) -> float:
        """The rate of the next step (of the first parameter group)."""
        return float(self.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {
            "num_steps": self.num_steps,
            "monitor": getattr(self.config, "monitor", None),
            "plateau_factor": self.plateau_factor,
            "best": self.best,
            "num_bad_epochs": self.num_bad_epochs,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.num_steps = state["num_steps"]
        if state["monitor"] == getattr(self.config, "monitor", None):  # values of another metric are no measure
            self.plateau_factor, self.best = state["plateau_factor"], state["best"]
            self.num_bad_epochs = state["num_bad_epochs"]
        self._apply()

    def _apply(self) -> None:
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * self._factor(base) * self.plateau_factor

    def _factor(self, base: float) -> float:
        warmup = self.config.warmup_epochs
        epochs = self.num_steps / self.steps_per_epoch
        if epochs < warmup:
            return (self.num_steps + 1) / (warmup * self.steps_per_epoch)  # never a step with rate 0
        return shape(self.config, epochs - warmup, max(self.num_epochs - warmup, 1), base)


def shape(config: ScheduleConfig, epochs: float, num_epochs: int, base_lr: float) -> float:
    """Return the factor of the learning rate `epochs` after the warm-up, of `num_epochs` in all."""
    progress = min(epochs / num_epochs, 1.0)
    match config:
        case StepSchedule():
            return config.gamma ** int(epochs // config.step_size)
        case CosineSchedule():
            low = config.eta_min / base_lr
            return low + (1 - low) * _half_cosine(min(epochs / (config.T_max or num_epochs), 1.0))
        case PolySchedule():
            return float((1 - progress) ** config.power)
        case OneCycleSchedule():  # from 1/25 up to 1, then down to 1/250 000, as in the paper's authors' library
            if progress < config.pct_start:
                return 1 + (1 / 25 - 1) * _half_cosine(progress / config.pct_start)
            return 1 / 250_000 + (1 - 1 / 250_000) * _half_cosine(
                (progress - config.pct_start) / (1 - config.pct_start)
            )
        case NoSchedule() | PlateauSchedule():
            return 1.0


def _half_cosine(progress: float) -> float:
    """1 at 0, 0 at 1."""
    return (1 + math.cos(math.pi * progress)) / 2
