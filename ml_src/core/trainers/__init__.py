"""`train(config)` builds a run and sees it through. Next to read: `loop.py`, the loop itself."""

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from ml_src.core.allocator import keep_freed_memory
from ml_src.core.atomic import remove_leftovers, write_text
from ml_src.core.callbacks import build_callbacks
from ml_src.core.checkpoint import load_checkpoint, previous_of
from ml_src.core.config import Config
from ml_src.core.config_file import parse_config, to_yaml
from ml_src.core.device import seed_everything
from ml_src.core.errors import ConfigError
from ml_src.core.network import build_model
from ml_src.core.optim import Schedule, build_optimizer
from ml_src.core.plugins import import_plugins
from ml_src.core.tasks import Task, task_for
from ml_src.core.trainers.average import WeightAverage
from ml_src.core.trainers.backend import Backend
from ml_src.core.trainers.loop import fit
from ml_src.core.trainers.profile import Profile
from ml_src.core.trainers.resume import require_same_run
from ml_src.core.trainers.run_dir import command, log_to, open_run
from ml_src.core.trainers.summary import measure
from ml_src.core.trainers.training import Training

PREVIOUS = previous_of(Path("last.pt")).name
log = logging.getLogger("ml_src")


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    run_dir: Path
    interrupted: bool
    summary: str


def train(config: Config, resume: Path | None = None, overwrite: bool = False) -> Outcome:
    """Train as `config` says, then measure the best weights on the validation and test images at their own size.

    Args:
        config: the whole run.
        resume: a checkpoint to go on from; its run folder is used again.
        overwrite: remove an existing run of the same name.

    Raises: MLError for all that the user can mend.
    """
    keep_freed_memory()
    import_plugins(config.plugins)
    backend = choose_backend(config)
    if not backend.is_main:
        log.setLevel(logging.WARNING)
    run_dir = config.run_dir if resume is None else resume.parent.parent
    task = task_for(config)
    with backend.main_first():
        task.check_data()
        config = task.settle()
    training = build_training(config, task, backend, run_dir)
    if resume is None and backend.is_main:  # not before everything that a mistake in the config can stop
        open_run(run_dir, overwrite, command("ml-train --resume", run_dir, config))
    with log_to(run_dir / "logs" / "train.log") if backend.is_main else nullcontext():
        if resume is not None:
            restore(training, resume)
        if backend.is_main:
            for folder in (run_dir, run_dir / "weights"):
                remove_leftovers(folder)
            last = run_dir / "weights" / "last.pt"
            if resume is not None and resume.name == PREVIOUS and last.exists():
                last.replace(last.with_name("last.aside.pt"))  # or the next save would keep it as the previous one
            write_text(run_dir / "config.yaml", to_yaml(config))
        num_parameters = sum(p.numel() for p in training.measured.parameters())
        log.info("%s, %d parameters, on %s", run_dir, num_parameters, backend.device)
        with closing(training.train_loader), closing(training.val_loader), stop_on_ctrl_c(training):
            fit(training)
        backend.close()
        if training.interrupted:
            how = f"Stopped. To go on: {command('ml-train --resume', run_dir, config)}"
            return Outcome(run_dir, True, how if backend.is_main else "")
        if training.stop:
            log.info("Stopped early: %s", training.stop)
        return Outcome(run_dir, False, measure(training) if backend.is_main else "")


def choose_backend(config: Config) -> Backend:
    """Return the backend that `training.trainer_type` names.

    Raises: ConfigError for `federated`, which is no way to take a step.
    """
    match config.training.trainer_type:
        case "standard":
            return Backend(config)
        case "mixed_precision":
            from ml_src.core.trainers.mixed_precision import MixedPrecision

            return MixedPrecision(config)
        case "accelerate":
            from ml_src.core.trainers.accelerate import choose_strategy

            return choose_strategy(config)
        case "dp":
            try:
                from ml_src.core.trainers.dp import DP
            except ModuleNotFoundError as error:
                raise ConfigError("training.trainer_type dp needs Opacus: run pip install 'ml-src[dp]'") from error
            return DP(config)
        case other:
            raise ConfigError(f"training.trainer_type {other!r} trains at several sites: give its YAML to ml-train")


def build_training(config: Config, task: Task, backend: Backend, run_dir: Path) -> Training:
    """Build every part of a run, in an order that fixes which random number goes where."""
    seed_everything(config.seed, config.deterministic)
    network = backend.place(build_model(config.model))
    optimizer = build_optimizer(config.optimizer, network.parameters())
    average = None if config.training.ema is None else WeightAverage(network, config.training.ema)
    pin = config.training.pin_memory and backend.device.type == "cuda"
    train_loader = task.loader("train", backend.train_order(task), training=True, pin_memory=pin)
    criterion = task.criterion().to(backend.device)
    backend.require_fitting(criterion)
    model, optimizer = backend.prepare(network, optimizer)
    extra = backend.callbacks() + [Profile()] * (config.training.profile and backend.is_main)
    return Training(
        config=config,
        task=task,
        network=network,
        model=model,
        criterion=criterion,
        optimizer=optimizer,
        schedule=Schedule(config.scheduler, optimizer, train_loader.num_steps, config.training.num_epochs),
        backend=backend,
        train_loader=train_loader,
        val_loader=task.loader("val", backend.val_order(task), pin_memory=pin),
        callbacks=build_callbacks(config, task.monitors, extra, backend.is_main),
        run_dir=run_dir,
        average=average,
    )


def restore(training: Training, path: Path) -> None:
    """Go on from a checkpoint file."""
    contents = load_checkpoint(path)  # each part moves what it needs; Adam's counts of steps stay on the host
    require_same_run(
        parse_config(contents["config"], source=str(path)),
        training.config,
        contents,
        path,
        training.backend.num_processes,
    )
    training.restore(contents, path)
    threads = contents["num_threads"]
    if threads != torch.get_num_threads():
        log.info(
            "This run was started with %s threads and goes on with %d: sums are rounded differently from here on.",
            threads,
            torch.get_num_threads(),
        )
    log.info("Going on after epoch %d, step %d", training.progress.epoch, training.progress.step)


@contextmanager
def stop_on_ctrl_c(training: Training) -> Iterator[None]:
    """Ctrl-C (or SIGTERM) ends the loop after the current step, with last.pt written; a second Ctrl-C ends at once.

    A cluster's scheduler and whoever started this process may both send it SIGTERM: within a second they count as one.
    """
    told = 0.0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal told
        if training.signalled:
            if number == signal.SIGTERM and time.monotonic() - told < 1:
                return
            training.interrupted = False  # in the middle of a step there is nothing whole to save
            raise KeyboardInterrupt
        log.info("Stopping after this step ...")
        training.signalled, told = True, time.monotonic()

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
