"""Everything a run consists of, in one object, and how it becomes a checkpoint and is restored from one."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ml_src.core.callbacks import Callback
from ml_src.core.checkpoint import load_weights, random_state, save_checkpoint, set_random_state
from ml_src.core.config import Config
from ml_src.core.config_file import plain
from ml_src.core.data.loaders import Loader
from ml_src.core.device import Peek
from ml_src.core.errors import CheckpointError, TrainingError
from ml_src.core.optim import Schedule
from ml_src.core.tasks import Task
from ml_src.core.trainers.average import WeightAverage
from ml_src.core.trainers.backend import Backend
from ml_src.core.trainers.run_dir import command


class Losses:
    """The losses of a step's batches; added up where they are, looked at without a wait for what comes after them."""

    def __init__(self) -> None:
        self.loss_sum: Tensor | float = 0.0  # over images
        self.num_samples = 0
        self._seen: list[Peek] = []

    def add(self, loss: Tensor, num_samples: int) -> None:
        """Add the mean loss of some images."""
        loss = loss.detach()
        self._seen.append(Peek(loss))
        precise = torch.float32 if loss.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        self.loss_sum = self.loss_sum + loss.to(precise) * num_samples
        self.num_samples += num_samples

    def are_finite(self) -> bool:
        """Whether each of them is a number."""
        return all(math.isfinite(peek.value()) for peek in self._seen)


@dataclass
class Progress:
    """Where a run stands, and what the unfinished epoch has summed up so far, in this process."""

    epoch: int = 0  # finished epochs
    step: int = 0  # optimizer steps of the whole run
    epoch_step: int = 0  # finished steps of the current epoch
    loss_sum: Tensor | float = 0.0  # over images; stays on the device, so that no step waits for it
    num_samples: int = 0
    counts: Tensor | None = None  # of the metric

    def count_step(self, losses: Losses, counts: Tensor) -> None:
        """Count a step that has been taken."""
        self.step += 1
        self.epoch_step += 1
        self.loss_sum = self.loss_sum + losses.loss_sum
        self.num_samples += losses.num_samples
        self.counts = counts

    def mean_loss(self) -> float:
        """The loss per image of this process, NaN before the first."""
        return float(self.loss_sum) / self.num_samples if self.num_samples else math.nan


@dataclass
class Training:
    """One run: what it consists of, where it stands."""

    config: Config
    task: Task
    network: nn.Module  # the plain one, with the names of its weights
    model: nn.Module  # what the loop calls: the network, or what the backend has put around it
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    backend: Backend
    train_loader: Loader
    val_loader: Loader
    callbacks: list[Callback]
    run_dir: Path
    average: WeightAverage | None = None
    progress: Progress = field(default_factory=Progress)
    metrics: dict[str, float] = field(default_factory=dict)  # of the last finished epoch
    stop: str = ""  # why to stop; in the middle of an epoch it is validated and counted all the same
    signalled: bool = False  # this process has been asked to stop
    interrupted: bool = False  # all processes stop after this step
    stepping: bool = False  # the weights are changing: what fails now cannot be tried again
    started: float = field(default_factory=time.monotonic)
    seconds_before: float = 0.0  # spent by the processes that this one goes on from

    @property
    def num_epochs(self) -> int:
        """Epochs of the whole run."""
        return self.config.training.num_epochs

    @property
    def accumulation(self) -> int:
        """Batches a step, as the config has it."""
        return self.config.training.gradient_accumulation_steps

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.backend.device

    @property
    def measured(self) -> nn.Module:
        """The network that is validated and kept as best.pt."""
        return self.backend.measured(self.network) if self.average is None else self.average.network

    @property
    def max_norm(self) -> float | None:
        """Largest norm of a step's gradient."""
        return self.config.max_norm

    def seconds(self) -> float:
        """How long the run has taken, over all its resumes."""
        return self.seconds_before + time.monotonic() - self.started

    def shrink_batches(self, size: int) -> None:
        """Let no batch have more than `size` images; the steps keep theirs."""
        for loader in (self.train_loader, self.val_loader):
            loader.order.batch_size = min(size, loader.order.batch_size)

    def heed_signals(self) -> None:
        """Agree with the other processes on whether to stop here."""
        if self.backend.any(self.signalled):
            self.stop, self.interrupted = "interrupted", True

    def require_finite(self, losses: Losses) -> None:
        """Save and end the run before a step whose loss is no number.

        Raises: TrainingError.
        """
        if not self.backend.any(not losses.are_finite()):
            return
        kept = self.run_dir / "weights" / "last.pt"
        # The forward pass may have left its mark on the running statistics: then the file before is the good one.
        if not self.backend.any(not is_finite(self.weights())):
            self.save("last.pt")
        state = self.backend.describe()
        raise TrainingError(
            f"the loss is no finite number in epoch {self.progress.epoch + 1}, step {self.progress.step + 1}, at "
            f"learning rate {self.schedule.lr:g}{state and ', '}{state}: lower optimizer.lr tenfold, or add "
            f"gradient_clipping to training.callbacks; {kept} is the state before"
        )

    def weights(self) -> dict[str, Any]:
        """The weights in training. Called by all processes at the same place."""
        return self.backend.weights(self.model, self.network)

    def save(self, *names: str) -> None:
        """Write the run as it stands into files of its weights folder. Called by all processes at the same place."""
        contents = self.checkpoint()
        if self.backend.is_main:
            try:
                self.backend.before_save(self.run_dir)
                for name in names:
                    save_checkpoint(self.run_dir / "weights" / name, contents, keep_previous=name == "last.pt")
            except OSError as error:
                raise TrainingError(
                    f"{error.filename} cannot be written ({error.strerror}): the file before it is whole; make room, "
                    f"then go on with {command('ml-train --resume', self.run_dir, self.config)}"
                ) from error

    def checkpoint(self) -> dict[str, Any]:
        """Return the run as the contents of a checkpoint."""
        own = {
            "random_state": random_state(),
            "loss_sum": float(self.progress.loss_sum),
            "num_samples": self.progress.num_samples,
            "counts": None if self.progress.counts is None else self.progress.counts.cpu(),
        }
        weights = self.weights()
        return {
            "model_state_dict": weights if self.average is None else self.average.network.state_dict(),
            "raw_state_dict": {} if self.average is None else weights,
            "optimizer_state_dict": self.backend.optimizer_state(self.model, self.optimizer),
            "scheduler_state_dict": self.schedule.state_dict(),
            "backend_state_dict": self.backend.state_dict(),
            "callback_state_dicts": {callback.name: callback.state_dict() for callback in self.callbacks},
            "config": plain(self.config),
            "class_names": list(self.config.class_names),
            "epoch": self.progress.epoch,
            "step": self.progress.step,
            "epoch_step": self.progress.epoch_step,
            "batch_size": self.train_loader.order.batch_size,
            "metrics": dict(self.metrics),
            "processes": self.backend.gather(own),
            "num_threads": torch.get_num_threads(),
            "seconds": self.seconds(),
        }

    def restore(self, contents: dict[str, Any], path: Path) -> None:
        """Go on from a checkpoint's contents, to the same bits as if the run had never stopped.

        Raises: CheckpointError where the checkpoint does not fit the run.
        """
        weights = contents["raw_state_dict"] or contents["model_state_dict"]
        self.backend.load_weights(self.model, self.network, weights, path)
        if self.average is not None:
            load_weights(self.average.network, contents["model_state_dict"], path)
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        try:
            self.backend.load_optimizer_state(self.model, self.optimizer, contents["optimizer_state_dict"])
            for group, values in zip(self.optimizer.param_groups, settings, strict=True):
                group.update(values)  # what the config says now, not what it said then
            self.schedule.load_state_dict(contents["scheduler_state_dict"])
            self.backend.load_state_dict(contents["backend_state_dict"])
            for callback in self.callbacks:
                callback.load_state_dict(contents["callback_state_dicts"].get(callback.name, {}))
            self.progress = Progress(contents["epoch"], contents["step"], contents["epoch_step"])
            if self.config.training.auto_batch:  # what did not fit then does not fit now
                self.shrink_batches(contents["batch_size"])
            self._restore_own(contents["processes"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} cannot be gone on from ({error!r}): it is incomplete; give the last.pt of the run"
            ) from error
        self.metrics = dict(contents["metrics"])
        self.seconds_before = float(contents["seconds"])

    def _restore_own(self, processes: list[dict[str, Any]]) -> None:
        """Take what was this process's own; of another number of processes, the first takes all sums."""
        rank, same_number = self.backend.rank, len(processes) == self.backend.num_processes
        if rank < len(processes):
            set_random_state(processes[rank]["random_state"])
        for own in processes[rank : rank + 1] if same_number else processes if rank == 0 else []:
            self.progress.loss_sum += own["loss_sum"]
            self.progress.num_samples += own["num_samples"]
            if own["counts"] is not None:
                counts = own["counts"].to(self.device)
                self.progress.counts = counts if self.progress.counts is None else self.progress.counts + counts


def is_finite(weights: dict[str, Any]) -> bool:
    """Whether every weight and buffer is a number."""
    return all(bool(value.isfinite().all()) for value in weights.values())
