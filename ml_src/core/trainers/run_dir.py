"""The folder of a run: who may write into it, its log."""

import logging
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ml_src.core.checkpoint import previous_of
from ml_src.core.config import Config
from ml_src.core.errors import TrainingError

OURS = (
    "config.yaml",
    "summary.txt",
    "metrics.json",
    "weights",
    "logs",
    "tensorboard",
    "profile",
    "privacy.json",
    "federation.json",
    "sites",
    "inference",
)
log = logging.getLogger("ml_src")


def open_run(run_dir: Path, overwrite: bool, resume: str) -> None:
    """Make the folders of a new run.

    Raises: TrainingError, which names the command `resume`, where there is a run that `overwrite` does not give up.
    """
    last = run_dir / "weights" / "last.pt"
    finished, resumable = (run_dir / "metrics.json").exists(), last.exists() or previous_of(last).exists()
    if (finished or resumable) and not overwrite:  # else it ended before its first step: nothing to lose
        state = "a finished run: give" if finished else f"an unfinished run: go on with {resume}, or give"
        raise TrainingError(f"{run_dir} holds {state} --run_name for another name, or --overwrite")
    for name in OURS:  # only what is ours: the folder may hold somebody's notes
        path = run_dir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for name in ("weights", "logs"):
        (run_dir / name).mkdir(parents=True, exist_ok=True)


def command(words: str, path: Path, config: Config) -> str:
    """Return a command line on a run's path that can be pasted into a shell."""
    plugins = f" --plugin {shlex.join(config.plugins)}" if config.plugins else ""
    return f"{words} {shlex.quote(str(path))}{plugins}"


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Also write the log lines of the block to a file, with their times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
