"""From what `--resume` names to a checkpoint and the configuration it was started with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_src.core.checkpoint import load_checkpoint
from ml_src.core.config import Config
from ml_src.core.config_file import parse_config
from ml_src.core.errors import CheckpointError
from ml_src.core.plugins import check_plugins


def checkpoint_of(path: Path) -> Path:
    """Return the checkpoint that a run folder or a checkpoint's own path stands for.

    Raises: CheckpointError where a folder holds none, or a checkpoint lies outside a run's folder.
    """
    if path.is_file() and path.absolute().parent.name != "weights":
        raise CheckpointError(f"{path} is not in a run's folder: put it into RUN/weights/, where the run can go on")
    if not path.is_dir():
        return path.absolute() if path.parent == Path() else path
    last = path / "weights" / "last.pt"
    if not last.is_file():
        raise CheckpointError(f"{path} has no weights/last.pt to go on from: start it with ml-train --config")
    return last


def checkpoint_config(path: Path, overrides: Mapping[str, Any], plugins: Sequence[str]) -> Config:
    """Return the configuration inside a checkpoint, with overrides.

    The plugins that it names must be among `plugins`, which are imported in their place: opening a file runs no code.
    """
    config = parse_config(load_checkpoint(path)["config"], overrides, source=str(path))
    check_plugins(config.plugins, plugins, path)
    return config.model_copy(update={"plugins": list(plugins)})


def require_same_run(before: Config, now: Config, contents: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on with what would be another run: other images, classes or optimizer.

    With another fold, images that were trained on would be used for validation.
    Raises: CheckpointError that names the key.
    """
    same: dict[str, tuple[Any, Any]] = {
        "the data set": (before.dataset_name, now.dataset_name),
        "data.fold": (before.data.fold, now.data.fold),
        "data.num_classes": (before.data.num_classes, now.data.num_classes),
        "data.ignore_index": (before.data.ignore_index, now.data.ignore_index),
        "optimizer.type": (before.optimizer.type, now.optimizer.type),
    }
    if contents["unfinished_epoch"]["batch"]:  # the rest of an epoch is counted in its batches
        same["training.batch_size"] = (before.training.batch_size, now.training.batch_size)
    for key, (old, new) in same.items():
        if old != new:
            raise CheckpointError(f"{path} was trained with {key} {old}, not {new}: start a new run with --run_name")
