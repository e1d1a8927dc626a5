"""The folder that --fix writes: put into its place as a whole, known by its record, recovered after a kill."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_src.core.checking.inspection import Look
from ml_src.core.data.files import listed
from ml_src.core.errors import DataError

RECORD = "fixes.json"
PROGRAM = "ml-check --fix"

Entry = dict[str, Any]


# The record


def own_files(output_dir: Path) -> set[str]:
    """Return the names of an earlier run's files, which may be replaced.

    Raises: DataError where a file is not ours or was changed.
    """
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return set()
    if not (output_dir / RECORD).exists():
        raise DataError(f"{output_dir} holds files but no {RECORD} of ours: give an empty folder with --output")
    entries = read_record(output_dir)["masks"]
    if changed := changed_files(output_dir, entries):
        raise DataError(
            f"{output_dir} holds files that were changed since they were written ({listed(changed)}): move them "
            "elsewhere, or give another folder with --output"
        )
    return {RECORD, *(entry["target"] for entry in entries)}


def read_record(output_dir: Path) -> Entry:
    """Return what an earlier run wrote down.

    Raises: DataError where there is no record, or one of another program.
    """
    path = output_dir / RECORD
    try:
        record = json.loads(path.read_bytes())
        ours = record["program"] == PROGRAM and all(
            Path(entry["target"]).name == entry["target"] and isinstance(entry["sha256"], str)
            for entry in record["masks"]
        )
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give the folder that --fix wrote") from error
    except (ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise DataError(f"{path} is no record of {PROGRAM}: give the folder that it wrote")
    return dict(record)


def changed_files(output_dir: Path, entries: Sequence[Entry]) -> list[str]:
    """Return the names of files that are there and are not as they were written."""
    digests = {entry["target"]: entry["sha256"] for entry in entries if (output_dir / entry["target"]).exists()}
    return [name for name, digest in digests.items() if digest_of(output_dir / name) != digest]


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# The folder


def followed(output_dir: Path) -> Path:
    """Return the folder itself where a path cannot be renamed or removed: a link, `.` and `..`."""
    return output_dir.resolve() if output_dir.name in ("", "..") or output_dir.is_symlink() else output_dir


def require_apart(output_dir: Path, looks: Sequence[Look], folders: Sequence[Path]) -> None:
    """Raise a DataError for a file, for a folder that holds masks to repair, and for one inside the images or masks."""
    inside = output_dir.resolve()
    masks = [mask.path for look in looks for mask in look.masks]
    if within := next((path for path in masks if inside in path.resolve().parents), None):
        raise DataError(f"{output_dir} holds masks to repair ({within.name}): give another folder with --output")
    apart = {*folders, *(path.parent for path in masks), *(look.image.path.parent for look in looks if look.image)}
    if among := next((folder for folder in sorted(apart) if folder.resolve() in inside.parents), None):
        raise DataError(
            f"{output_dir} lies in {among}, where the copies would be taken for originals: give a folder elsewhere "
            "with --output"
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise DataError(f"{output_dir} is a file: give a folder with --output")


@contextmanager
def beside(output_dir: Path) -> Iterator[Path]:
    """Make a folder beside another one; what of it is still there at the end is removed."""
    folder = output_dir.with_name(f"{output_dir.name}.{os.getpid()}.tmp")
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def take_place(folder: Path, output_dir: Path, own: set[str]) -> None:
    """Put a folder in the place of another, whose files that are not ours move into it."""
    if not output_dir.exists():
        folder.rename(output_dir)
        return
    foreign = {path.name for path in output_dir.iterdir()} - own
    if clash := sorted(foreign & {path.name for path in folder.iterdir()}):
        raise DataError(f"{output_dir} holds {listed(clash)}, which is not ours: move it elsewhere")
    previous = output_dir.with_name(f"{output_dir.name}.{os.getpid()}.old")
    output_dir.rename(previous)
    try:
        folder.rename(output_dir)
    except OSError:
        previous.rename(output_dir)
        raise
    for name in foreign:
        (previous / name).rename(output_dir / name)
    remove(previous, own)
    previous.rmdir()


def remove(folder: Path, own: set[str]) -> None:
    """Remove our files, the record last: without it nothing says whose the others are."""
    for name in sorted(own, key=lambda name: name == RECORD):
        (folder / name).unlink(missing_ok=True)


def recover(output_dir: Path) -> list[str]:
    """Clear what runs that were killed have left beside a folder, give back what they had set aside, and say so."""
    if not output_dir.parent.is_dir() or (output_dir.exists() and not output_dir.is_dir()):
        return []
    left = re.compile(rf"{re.escape(output_dir.name)}\.(\d{{1,9}})\.(tmp|old)")
    lines = []
    for path in sorted(output_dir.parent.iterdir()):
        match = left.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir() or _runs(int(match[1])):
            continue
        if match[2] == "tmp":
            shutil.rmtree(path)
        else:
            lines += _give_back(path, output_dir)
    return lines


def _runs(process: int) -> bool:
    """Whether a process other than this one has that number."""
    if os.name == "nt":  # where to ask is to stop it
        return process != os.getpid()
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return process != os.getpid()


def _give_back(previous: Path, output_dir: Path) -> list[str]:
    """Put an earlier state of the folder back, or what in it is not ours where there is a new one; say so."""
    there = {path.name for path in previous.iterdir()}
    try:
        entries = read_record(previous)["masks"] if there else []
    except DataError:  # not of ours
        return []
    if not output_dir.exists():
        previous.rename(output_dir)
        return [f"{output_dir} is back, which a run that was killed had set aside"]
    own = {RECORD, *(entry["target"] for entry in entries)} - set(changed_files(previous, entries))
    moved = sorted(name for name in there - own if not (output_dir / name).exists())
    for name in moved:
        (previous / name).rename(output_dir / name)
    lines = [f"back in {output_dir}, after a run that was killed: {listed(moved)}"] * bool(moved)
    if kept := sorted(there - own - set(moved)):
        return [*lines, f"{previous} holds {listed(kept)}, left there by a run that was killed: move it elsewhere"]
    remove(previous, own)
    previous.rmdir()
    return lines
