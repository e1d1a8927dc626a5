"""Files that are whole or not there: written beside their name, flushed to the disk, renamed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ml_src.core.errors import ConfigError

LOCK = ".lock"


@contextmanager
def replacing(path: Path, previous: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file that takes `path`'s place when the block ends well, and leaves no trace when it does not.

    What was at `path` stays as `previous`, where that is given; at no moment are both names without a whole file.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _keep(path, previous)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk does not say which
            error.filename = str(path)
        raise


def _keep(path: Path, name: Path) -> None:
    """Give a file a second name; where the file system has no links, another one."""
    link = name.with_name(f"{name.name}.{os.getpid()}.tmp")
    try:
        os.link(path, link)
        link.replace(name)
        link.unlink(missing_ok=True)  # where both were one file already, it is not moved
    except OSError:
        path.replace(name)


@contextmanager
def only_writer(folder: Path, advice: str = "wait for it, or give another --output") -> Iterator[None]:
    """Make a folder and keep other processes from writing into it, as long as the block.

    Raises: ConfigError where another one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("wb") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of a process that is killed, it is gone
        except ModuleNotFoundError:  # on Windows two at once are not found out
            pass
        except BlockingIOError as error:
            raise ConfigError(f"another process is writing to {folder}: {advice}") from error
        yield


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder; nobody may be writing there."""
    for path in folder.glob("*.tmp"):
        if path.suffixes[-2:-1] and path.suffixes[-2][1:].isdigit():
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, contents: Any) -> None:
    """Write plain data as JSON."""
    write_text(path, json.dumps(contents, indent=2) + "\n")
