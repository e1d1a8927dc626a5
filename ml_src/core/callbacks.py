"""What happens around the steps: checkpoints, early stopping, TensorBoard, progress on the screen.

A callback looks at the Training (`trainers/training.py`) and may set its `stop`; it never touches a gradient.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ml_src.core.config import Config, EarlyStopping, Every, LrMonitor, ModelCheckpoint
from ml_src.core.errors import ConfigError, TrainingError
from ml_src.core.registry import suggest

if TYPE_CHECKING:
    from ml_src.core.trainers.training import Training

NUM_PANELS = 20  # at most so many pictures a run

log = logging.getLogger("ml_src")


class Callback:
    """Does nothing; each subclass says when it wants to be called."""

    name = "callback"

    def on_start(self, t: Training) -> None:
        """Before the first step of this process, also after a resume."""

    def on_step(self, t: Training, num_samples: int) -> None:
        """After each optimizer step, over `num_samples` images."""

    def on_epoch_end(self, t: Training) -> None:
        """After validation; `t.metrics` are the epoch's."""

    def on_end(self, t: Training) -> None:
        """When the loop is left."""

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""


def build_callbacks(
    config: Config, monitors: tuple[str, ...], of_backend: Sequence[Callback] = (), is_main: bool = True
) -> list[Callback]:
    """Return the callbacks of a run, in the order in which they are called; what shows or draws is the main process's.

    Raises: ConfigError for a metric that the task does not have.
    """
    sections = config.training.callbacks
    for section in [*sections, config.scheduler]:
        monitor = getattr(section, "monitor", None)
        if monitor is not None and monitor not in monitors:
            raise ConfigError(f"{section.type}.monitor: unknown metric {monitor!r}; {suggest(monitor, monitors)}")
    checkpoints = next((section for section in sections if isinstance(section, ModelCheckpoint)), None)
    callbacks: list[Callback] = [FiniteLoss()]
    callbacks += [StopEarly(section) for section in sections if isinstance(section, EarlyStopping)]
    callbacks += of_backend
    if is_main:
        callbacks.append(ProgressBar() if sys.stderr.isatty() else ProgressLines())
        callbacks.append(TensorBoard(every_step=any(isinstance(section, LrMonitor) for section in sections)))
    # last: what it writes holds the state of all others at the end of the epoch
    section = checkpoints or ModelCheckpoint(type="model_checkpoint")
    callbacks.append(Checkpoints(section, config.checkpoint_every))
    return callbacks


class FiniteLoss(Callback):
    """Ends a run whose validation loss is no longer a number, before it overwrites a good checkpoint.

    The training loss is looked at before every step, by `Training.require_finite`.
    """

    name = "finite_loss"

    def on_epoch_end(self, t: Training) -> None:
        if not math.isfinite(t.metrics["val_loss"]):
            kept = t.run_dir / "weights" / "last.pt"
            raise TrainingError(
                f"val_loss became {t.metrics['val_loss']} in epoch {t.progress.epoch}: lower optimizer.lr "
                f"({t.config.optimizer.lr:g}) tenfold, or add gradient_clipping to training.callbacks"
                + (f"; {kept} is the state before" if kept.exists() else "")
            )


class StopEarly(Callback):
    """`early_stopping`."""

    name = "early_stopping"

    def __init__(self, section: EarlyStopping) -> None:
        self.section = section
        self.best: float | None = None
        self.num_bad_epochs = 0

    def on_start(self, t: Training) -> None:
        self._stop_if_over(t)

    def on_epoch_end(self, t: Training) -> None:
        self.heed(t.metrics[self.section.monitor])
        self._stop_if_over(t)

    def heed(self, value: float) -> None:
        """Count an epoch."""
        if self.section.is_better(value, self.best, self.section.min_delta):
            self.best, self.num_bad_epochs = value, 0
        else:
            self.num_bad_epochs += 1

    @property
    def reason(self) -> str:
        """Why to stop; empty where there is none."""
        if self.num_bad_epochs < self.section.patience:
            return ""
        best = "" if self.best is None else f" over {self.best:.4f}"
        return f"{self.section.monitor} has not improved{best} for {self.num_bad_epochs} epochs"

    def _stop_if_over(self, t: Training) -> None:
        t.stop = self.reason or t.stop

    def state_dict(self) -> dict[str, Any]:
        return {"monitor": self.section.monitor, "best": self.best, "num_bad_epochs": self.num_bad_epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("monitor") == self.section.monitor:  # values of another metric are no measure
            self.best, self.num_bad_epochs = state["best"], state["num_bad_epochs"]


class Checkpoints(Callback):
    """`weights/last.pt` at the start, after every epoch, as often as `every` says, and when stopped; `best.pt`; the
    best k as `epoch_N.pt`.
    """

    name = "model_checkpoint"

    def __init__(self, section: ModelCheckpoint, every: Every | None = None) -> None:
        self.section, self.every = section, every
        self.best: float | None = None
        self.kept: list[list[float]] = []  # [value, epoch], best first

    def on_start(self, t: Training) -> None:
        self.last_save = time.monotonic()
        if t.backend.is_main:
            (t.run_dir / "metrics.json").unlink(missing_ok=True)  # no longer finished
        if t.progress.step == 0:  # from here on the folder is taken, and a run that is killed can go on
            t.save("last.pt")

    def on_step(self, t: Training, num_samples: int) -> None:
        if self.every is None or t.stop:  # when the loop stops, it saves anyway
            return
        due = self.every.steps is not None and t.progress.step % self.every.steps == 0
        if self.every.seconds is not None:  # the clocks of several processes differ
            due = t.backend.any(time.monotonic() - self.last_save >= self.every.seconds)
        if due:
            t.save("last.pt")
            self.last_save = time.monotonic()

    def on_epoch_end(self, t: Training) -> None:
        value, epoch = t.metrics[self.section.monitor], t.progress.epoch
        folder = t.run_dir / "weights"
        is_best = self.section.is_better(value, self.best) or not (folder / "best.pt").exists()
        if is_best:
            self.best = None if math.isnan(value) else value
        dropped = self._keep(value, epoch)
        keeps_epoch = self.section.save_top_k > 1 and epoch not in dropped
        t.save(*["best.pt"] * is_best, *[f"epoch_{epoch}.pt"] * keeps_epoch, "last.pt")
        self.last_save = time.monotonic()
        if t.backend.is_main:
            for old in dropped:
                (folder / f"epoch_{old}.pt").unlink(missing_ok=True)

    def on_end(self, t: Training) -> None:
        if t.interrupted:
            t.save("last.pt")

    def _keep(self, value: float, epoch: int) -> list[int]:
        """Enter an epoch into the best k; return those that fall out."""
        place = next((i for i, (other, _) in enumerate(self.kept) if self.section.is_better(value, other)), None)
        self.kept.insert(len(self.kept) if place is None else place, [value, epoch])
        self.kept, dropped = self.kept[: self.section.save_top_k], self.kept[self.section.save_top_k :]
        return [int(epoch) for _, epoch in dropped]

    def state_dict(self) -> dict[str, Any]:
        return {"monitor": self.section.monitor, "best": self.best, "kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("monitor") == self.section.monitor:  # values of another metric are no measure
            self.best, self.kept = state["best"], [list(pair) for pair in state["kept"]]


class TensorBoard(Callback):
    """Losses, learning rate and scores per epoch, and now and then a panel of image | truth | prediction."""

    name = "tensorboard"

    def __init__(self, every_step: bool) -> None:
        self.every_step = every_step

    def on_start(self, t: Training) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self.writer = SummaryWriter(t.run_dir / "tensorboard", purge_step=t.progress.step + 1)

    def on_step(self, t: Training, num_samples: int) -> None:
        if self.every_step:
            self.writer.add_scalar("lr/step", t.schedule.lr, t.progress.step)

    def on_epoch_end(self, t: Training) -> None:
        step = t.progress.step
        for key, value in t.metrics.items():
            split, _, name = key.partition("_")
            self.writer.add_scalar(f"{name}/{split}" if "/" not in name else f"{split}_{name}", value, step)
        self.writer.add_scalar("lr/epoch", t.schedule.lr, step)
        if t.progress.epoch % -(-t.num_epochs // NUM_PANELS) == 0:
            panel = t.task.panel(t.measured, t.device)
            self.writer.add_image("validation: image | truth | prediction", panel, step, dataformats="HWC")
        self.writer.flush()

    def on_end(self, t: Training) -> None:
        self.writer.close()


class ProgressLines(Callback):
    """One line an epoch, and one every half minute within it: for logs and pipes."""

    name = "progress"

    def on_start(self, t: Training) -> None:
        self.start = self.last_line = time.monotonic()
        self.first_step, self.num_samples = t.progress.step, 0

    def on_step(self, t: Training, num_samples: int) -> None:
        self.num_samples += num_samples
        if time.monotonic() - self.last_line > 30:
            step = f"step {t.progress.epoch_step}/{t.train_loader.num_steps}"
            self._say(f"epoch {t.progress.epoch + 1}/{t.num_epochs}, {step}", t)

    def on_epoch_end(self, t: Training) -> None:
        scores = [f"{key} {t.metrics[key]:.4f}" for key in ("train_loss", "val_loss", "val_iou") if key in t.metrics]
        of_backend = [key for key in t.metrics if not key.startswith(("train_", "val_"))]
        scores += [f"{key.replace('_', ' ')} {t.metrics[key]:.6g}" for key in of_backend]
        self._say(f"epoch {t.progress.epoch}/{t.num_epochs}: " + ", ".join(scores), t)

    def _say(self, what: str, t: Training) -> None:
        self.last_line = time.monotonic()
        log.info("%s, %.1f images/s, %s left", what, self._speed(), _duration(self._seconds_left(t)))

    def _speed(self) -> float:
        """Images per second since the start, validation included."""
        return self.num_samples / max(time.monotonic() - self.start, 1e-9)

    def _seconds_left(self, t: Training) -> float:
        steps = t.train_loader.num_steps
        taken = t.progress.step - self.first_step
        return (time.monotonic() - self.start) / max(taken, 1) * max(steps * t.num_epochs - t.progress.step, 0)


class ProgressBar(ProgressLines):
    """A moving bar on a terminal; the line of each finished epoch stays above it."""

    def on_start(self, t: Training) -> None:
        super().on_start(t)
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}  {task.fields[numbers]}"),
            console=Console(stderr=True),
            transient=True,
            redirect_stderr=True,
            redirect_stdout=False,
        )
        self.bar.start()
        self.line = self.bar.add_task("", total=t.train_loader.num_steps, numbers="")

    def on_step(self, t: Training, num_samples: int) -> None:
        self.num_samples += num_samples
        if time.monotonic() - self.last_line < 0.2 and t.progress.epoch_step > 1:  # the loss is a wait for the GPU
            return
        self.last_line = time.monotonic()
        val = f", val_iou {t.metrics['val_iou']:.4f}" if "val_iou" in t.metrics else ""
        self.bar.update(
            self.line,
            description=f"epoch {t.progress.epoch + 1}/{t.num_epochs}",
            completed=t.progress.epoch_step,
            numbers=f"loss {t.progress.mean_loss():.4f}{val}, {self._speed():.1f} images/s, "
            f"{_duration(self._seconds_left(t))} left",
        )

    def on_end(self, t: Training) -> None:
        self.bar.stop()


def _duration(seconds: float) -> str:
    """1:05:09 or 5:09."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
