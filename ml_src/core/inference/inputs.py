"""From the words after --input to the images that they name. Next to read: `predictor.py`, which reads them."""

import os
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ml_src.core.data.files import SUFFIXES, is_image_name
from ml_src.core.errors import DataError

WILDCARD = re.compile(r"[*?[]")
ALL: tuple[str, ...] = ("*",)  # as a glob: what lies in a folder
ALL_BELOW: tuple[str, ...] = ("**", "*")


class Input(NamedTuple):
    """An image to predict, and where its outputs go: a relative path without ending."""

    name: PurePosixPath
    path: Path


class _Folder(NamedTuple):
    path: Path
    real: str  # the same without links
    prefix: str  # of the names of what lies in it: "" or "sub/folder/"


class _Found(NamedTuple):
    name: str
    path: Path
    place: tuple[str, str]  # folder without links, and name: the same for every way to name a file but links to it


def find_inputs(words: Sequence[str], recursive: bool, output_dir: Path | None) -> list[Input]:
    """Return the images that files, folders and globs name, each once, sorted by name.

    A file is taken whatever its ending. A folder gives its image files, with `recursive` those of its sub-folders too;
    a glob the image files that match, where `**` is any number of folders. Hidden files, `output_dir` where it lies in
    a folder, and what is behind links to folders below a folder or `**` are passed over. A name is relative to the
    folder, or to what precedes a glob's first wildcard; the name of a file is its stem.

    Raises: DataError for a word that names nothing, a folder that cannot be read, and two images of the same name.
    """
    output = None if output_dir is None else str(output_dir.resolve())
    taken: dict[str, Path] = {}
    clashes: list[tuple[Path, Path]] = []
    seen: set[tuple[str, str]] = set()
    for word in words:
        for found in _named_by(word, recursive, output):
            if found.place in seen:
                continue
            seen.add(found.place)
            if found.name in taken:
                clashes.append((taken[found.name], found.path))
            else:
                taken[found.name] = found.path
    if clashes:
        raise DataError(_same_name(clashes))
    return [Input(PurePosixPath(name), taken[name]) for name in sorted(taken)]


def _named_by(word: str, recursive: bool, output: str | None) -> list[_Found]:
    if not word:
        raise DataError("--input has an empty word: give a file, a folder or a quoted glob")
    path = Path(word).expanduser() if word.startswith("~/") else Path(word)  # no shell expands what is quoted
    if path.is_file():
        return [_Found(path.stem, path, (str(path.parent.resolve()), path.name))]
    if path.is_dir():
        base, pattern = path, ALL_BELOW if recursive else ALL
    else:
        base, pattern = _glob(path)
    if not pattern or not base.is_dir():
        raise DataError(_missing(base))
    folder = _Folder(base, str(base.resolve()), "")
    if "**" in pattern and folder.real == output:
        raise DataError(f"{base} is also the output folder, whose masks would be read: give another --output")
    images = list(_matching(folder, pattern, output))
    if not images:
        raise DataError(_nothing(path, folder, pattern, output))
    return images


def _glob(path: Path) -> tuple[Path, tuple[str, ...]]:
    """Divide before the first part with a wildcard; a folder that really is called "scan [2]" has none."""
    base = Path()
    for index, part in enumerate(path.parts):
        if WILDCARD.search(part) and not (base / part).exists():
            return base, path.parts[index:]
        base /= part
    return base, ()


def _matching(folder: _Folder, pattern: tuple[str, ...], output: str | None) -> Iterator[_Found]:
    """Yield the image files below a folder that match a glob, given as its parts; some perhaps twice."""
    first, rest = pattern[0], pattern[1:]
    if first == "**":
        yield from _matching(folder, rest or ALL, output)
        for below in _folders(folder, "*", False, output):
            yield from _matching(below, pattern, output)
    elif rest:
        for below in _folders(folder, first, True, output):
            yield from _matching(below, rest, output)
    else:
        for entry in _entries(folder):
            if is_image_name(entry.name) and fnmatch(entry.name, first) and _is_file(entry):
                stem = entry.name.rpartition(".")[0]
                yield _Found(folder.prefix + stem, folder.path / entry.name, (folder.real, entry.name))


def _folders(folder: _Folder, pattern: str, linked: bool, output: str | None) -> Iterator[_Folder]:
    """Yield the folders in a folder, with `linked` links to folders too, but for the output folder."""
    for entry in _entries(folder):
        hidden = entry.name.startswith(".") and not pattern.startswith(".")
        if not hidden and fnmatch(entry.name, pattern) and _is_folder(entry, linked):
            path = folder.path / entry.name
            real = str(path.resolve())
            if real != output:
                yield _Folder(path, real, f"{folder.prefix}{entry.name}/")


def _entries(folder: _Folder) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder.path) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(
            f"{folder.path} cannot be read ({error.strerror}): allow it, or name the folders beside it one by one"
        ) from error


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file, or a link to nothing or to itself, which whoever reads it will name."""
    try:
        return entry.is_file() or (entry.is_symlink() and not entry.is_dir())
    except OSError:
        return True


def _is_folder(entry: os.DirEntry[str], linked: bool) -> bool:
    try:
        return entry.is_dir(follow_symlinks=linked)
    except OSError:  # a link to itself
        return False


def _missing(path: Path) -> str:
    """Say which part of a path is not there, and what is called nearly so."""
    while not path.parent.exists():
        path = path.parent
    if path.is_symlink() or path.exists():
        return f"{path} is neither a file nor a folder, or a link to what is gone: give a file, a folder or a glob"
    beside = {one.name.lower(): one for one in path.parent.iterdir()} if path.parent.is_dir() else {}
    near = get_close_matches(path.name.lower(), beside, n=1)
    advice = f"did you mean {beside[near[0]]}?" if near else "give a file, a folder or a quoted glob"
    return f"{path} does not exist: {advice}"


def _nothing(path: Path, folder: _Folder, pattern: tuple[str, ...], output: str | None) -> str:
    """Return the sentence for a folder or a glob without images."""
    endings = ", ".join(SUFFIXES)
    if folder.path != path:
        return f"{path} matches no image files ({endings}): give a glob of files, such as {folder.path / '*.png'}"
    if pattern == ALL_BELOW:
        return f"{path} and its sub-folders hold no image files ({endings}): give a folder that does"
    if next(_matching(folder, ALL_BELOW, output), None):
        return f"{path} holds no image files ({endings}), but its sub-folders do: add --recursive"
    return f"{path} holds no image files ({endings}): give a folder that does"


def _same_name(clashes: Sequence[tuple[Path, Path]]) -> str:
    """Return the sentence for images whose outputs would be the same files."""
    one, other = clashes[0]
    more = f" ({len(clashes) - 1} more such pairs)" if len(clashes) > 1 else ""
    remedy = "rename one of them"
    if one.parent != other.parent:
        remedy = "give the folder that holds both with --recursive, or predict them into different --output folders"
    return f"{one} and {other} would have outputs of the same name{more}: {remedy}"
