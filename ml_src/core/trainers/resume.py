"""From what `--resume` names to a checkpoint and the configuration it was started with."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_src.core.checkpoint import load_checkpoint, previous_of
from ml_src.core.config import Config
from ml_src.core.config_file import parse_config
from ml_src.core.errors import CheckpointError
from ml_src.core.plugins import check_plugins

log = logging.getLogger("ml_src")


def checkpoint_of(path: Path) -> Path:
    """Return the checkpoint that a run folder or a checkpoint's own path stands for.

    Raises: CheckpointError where a folder holds none, or a checkpoint lies outside a run's folder.
    """
    if path.is_file() and path.absolute().parent.name != "weights":
        raise CheckpointError(f"{path} is not in a run's folder: put it into RUN/weights/, where the run can go on")
    if path.is_dir():
        path = path / "weights" / "last.pt"
        if not path.is_file() and not previous_of(path).is_file():
            raise CheckpointError(
                f"{path.parent.parent} has no weights/last.pt to go on from: start it with ml-train --config"
            )
    return _whole(path.absolute() if path.parent == Path() else path)


def _whole(path: Path) -> Path:
    """Return a checkpoint that can be opened: `path`, or the one before it."""
    previous = previous_of(path)
    try:
        load_checkpoint(path)
    except CheckpointError as error:
        try:
            before = load_checkpoint(previous)
        except CheckpointError:
            raise error from None
        log.warning(
            "%s is missing or damaged: going on from the one before it, %s (epoch %d, step %d)",
            path, previous.name, before["epoch"], before["step"],
        )  # fmt: skip
        return previous
    return path


def checkpoint_config(path: Path, overrides: Mapping[str, Any], plugins: Sequence[str]) -> Config:
    """Return the configuration inside a checkpoint, with overrides.

    The plugins that it names must be among `plugins`, which are imported in their place: opening a file runs no code.
    """
    config = parse_config(load_checkpoint(path)["config"], overrides, source=str(path))
    check_plugins(config.plugins, plugins, path)
    return config.model_copy(update={"plugins": list(plugins)})


def require_same_run(
    before: Config, now: Config, contents: Mapping[str, Any], path: Path, num_processes: int = 1
) -> None:
    """Refuse to go on with what would be another run: other images, classes or optimizer.

    With another fold, images that were trained on would be used for validation.
    Raises: CheckpointError that names the key.
    """
    same: dict[str, tuple[Any, Any]] = {
        "the data set": (before.dataset_name, now.dataset_name),
        "data.fold": (before.data.fold, now.data.fold),
        "data.num_classes": (before.data.num_classes, now.data.num_classes),
        "data.ignore_index": (before.data.ignore_index, now.data.ignore_index),
        "differential privacy": (before.training.trainer_type == "dp", now.training.trainer_type == "dp"),
        "optimizer.type": (before.optimizer.type, now.optimizer.type),
    }
    if contents["epoch_step"]:  # the rest of an epoch is counted in its steps
        same["images a step"] = (_step_size(before, len(contents["processes"])), _step_size(now, num_processes))
    for key, (old, new) in same.items():
        if old != new:
            raise CheckpointError(f"{path} was trained with {key} {old}, not {new}: start a new run with --run_name")


def _step_size(config: Config, num_processes: int) -> int:
    """How many images a step takes, over all processes."""
    return config.training.batch_size * config.training.gradient_accumulation_steps * num_processes
