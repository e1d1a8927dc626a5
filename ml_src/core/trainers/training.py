"""Everything a run consists of, in one object, and how it becomes a checkpoint and is restored from one."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ml_src.core.callbacks import Callback
from ml_src.core.checkpoint import load_weights, random_state, set_random_state
from ml_src.core.config import Config
from ml_src.core.config_file import plain
from ml_src.core.data.loaders import Loader
from ml_src.core.errors import CheckpointError
from ml_src.core.optim import Schedule
from ml_src.core.tasks import Task
from ml_src.core.trainers.backend import Backend


@dataclass
class Progress:
    """Where a run stands, and what the unfinished epoch has summed up so far."""

    epoch: int = 0  # finished epochs
    step: int = 0  # optimizer steps of the whole run
    batch: int = 0  # finished batches of the current epoch
    loss_sum: Tensor | float = 0.0  # over images; stays on the device, so that no step waits for it
    num_samples: int = 0
    counts: Tensor | None = None  # of the metric

    def add(self, loss: Tensor, num_samples: int) -> None:
        """Add the mean loss of some samples."""
        precise = torch.float32 if loss.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        self.loss_sum = self.loss_sum + loss.to(precise) * num_samples
        self.num_samples += num_samples

    def count_step(self, num_batches: int, counts: Tensor) -> None:
        """Count an optimizer step over some batches."""
        self.step += 1
        self.batch += num_batches
        self.counts = counts

    def mean_loss(self) -> float:
        """The loss per image, NaN before the first."""
        return float(self.loss_sum) / self.num_samples if self.num_samples else math.nan


@dataclass
class Training:
    """One run: what it consists of, where it stands."""

    config: Config
    task: Task
    device: torch.device
    model: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    backend: Backend
    train_loader: Loader
    val_loader: Loader
    callbacks: list[Callback]
    run_dir: Path
    progress: Progress = field(default_factory=Progress)
    metrics: dict[str, float] = field(default_factory=dict)  # of the last finished epoch
    stop: str = ""  # why to stop after this epoch
    interrupted: bool = False  # stop after this step
    started: float = field(default_factory=time.monotonic)
    seconds_before: float = 0.0  # spent by the processes that this one goes on from

    @property
    def num_epochs(self) -> int:
        """Epochs of the whole run."""
        return self.config.training.num_epochs

    @property
    def accumulation(self) -> int:
        """Batches a step."""
        return self.config.training.gradient_accumulation_steps

    @property
    def max_norm(self) -> float | None:
        """Largest norm of a step's gradient."""
        return self.config.max_norm

    def seconds(self) -> float:
        """How long the run has taken, over all its resumes."""
        return self.seconds_before + time.monotonic() - self.started

    def checkpoint(self) -> dict[str, Any]:
        """Return the run as the contents of a checkpoint."""
        return {
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
            "scheduler_state_dict": self.schedule.state_dict(),
            "backend_state_dict": self.backend.state_dict(),
            "callback_state_dicts": {callback.name: callback.state_dict() for callback in self.callbacks},
            "config": plain(self.config),
            "class_names": list(self.config.class_names),
            "epoch": self.progress.epoch,
            "step": self.progress.step,
            "metrics": dict(self.metrics),
            "unfinished_epoch": {
                "batch": self.progress.batch,
                "loss_sum": float(self.progress.loss_sum),
                "num_samples": self.progress.num_samples,
                "counts": self.progress.counts,
            },
            "random_state": random_state(),
            "num_threads": torch.get_num_threads(),
            "seconds": self.seconds(),
        }

    def restore(self, contents: dict[str, Any], path: Path) -> None:
        """Go on from a checkpoint's contents, to the same bits as if the run had never stopped.

        Raises: CheckpointError where the checkpoint does not fit the run.
        """
        load_weights(self.model, contents["model_state_dict"], path)
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        try:
            self.optimizer.load_state_dict(contents["optimizer_state_dict"])
            for group, values in zip(self.optimizer.param_groups, settings, strict=True):
                group.update(values)  # what the config says now, not what it said then
            self.schedule.load_state_dict(contents["scheduler_state_dict"])
            self.backend.load_state_dict(contents["backend_state_dict"])
            for callback in self.callbacks:
                callback.load_state_dict(contents["callback_state_dicts"].get(callback.name, {}))
            unfinished = dict(contents["unfinished_epoch"])
            counts = unfinished.pop("counts")
            self.progress = Progress(
                epoch=contents["epoch"],
                step=contents["step"],
                counts=None if counts is None else counts.to(self.device),
                **unfinished,
            )
            set_random_state(contents["random_state"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} cannot be gone on from ({error!r}): it is incomplete; give the last.pt of the run"
            ) from error
        self.metrics = dict(contents["metrics"])
        self.seconds_before = float(contents["seconds"])
