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
    raw = dict(load_checkpoint(path)["config"])
    check_plugins(raw.get("plugins") or [], plugins, path)
    return parse_config({**raw, "plugins": list(plugins)}, overrides, source=str(path))
