"""Imports the user's own Python files, which register models and losses. Only ever at the user's own word."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from ml_src.core.errors import ConfigError


def import_plugins(paths: Sequence[str]) -> None:
    """Run each file once, under its stem as module name.

    Raises: ConfigError where a file is missing or raises.
    """
    for path in map(Path, paths):
        if not path.is_file():
            raise ConfigError(f"plugins: {path} does not exist (paths are relative to where the command is started)")
        spec = importlib.util.spec_from_file_location(f"ml_plugin_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ConfigError(f"plugins: {path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module  # loader workers and pickles find its classes
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ConfigError(f"plugins: {path} failed: {type(error).__name__}: {error}") from error


def check_plugins(needed: Sequence[str], given: Sequence[str], path: Path) -> None:
    """Refuse a checkpoint whose plugins the user has not named: what a file says is no reason to run code.

    Raises: ConfigError that says which flag to give.
    """
    missing = {Path(one).name for one in needed} - {Path(one).name for one in given}
    if missing:
        names = " ".join(sorted(missing))
        raise ConfigError(f"{path} needs {names}: pass --plugin {names} if you trust that file")
