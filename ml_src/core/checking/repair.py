"""Repaired copies of masks, in a folder of their own with a record of what was done; the originals are never touched.

`repair_plan.py` decides what is done. Here files are written, all or none, and removed again.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from ml_src.core.atomic import replacing, write_json
from ml_src.core.checking.conversions import Conversion
from ml_src.core.checking.inspection import Look
from ml_src.core.checking.mask_colours import read_colours
from ml_src.core.checking.repair_plan import Job, Question, Refusals, find_jobs, in_threads, plan, read_parts
from ml_src.core.checking.stored import Stored
from ml_src.core.data.checks import UNLABELLED
from ml_src.core.data.files import listed, mask_problem, read_class_names, stem_of
from ml_src.core.errors import DataError

RECORD = "fixes.json"
PROGRAM = "ml-check --fix"
NUM_NAMED = 20
# What says where a TIFF lies on Earth: scale, tie points, matrix, keys with their numbers and texts.
PLACE_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)

Entry = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What is to be printed, and how many masks, or images without one, were refused."""

    lines: list[str]
    refused: int


def fix(
    looks: Sequence[Look],
    data_dir: Path,
    output_dir: Path,
    colors: Path | None = None,
    merge: str | None = None,
    num_classes: int | None = None,
    mask_dir: Path | None = None,
) -> Outcome:
    """Write a folder of masks that keep the rules, one for every image of the same stem, and fixes.json; or nothing.

    Args:
        looks: every image with its masks.
        data_dir: the data set; where `num_classes` is not given, its classes.txt says how many there are.
        output_dir: a folder that is new, empty, or of an earlier run, whose files are then replaced; not one inside
            the images or masks.
        colors: a table from colours to classes.
        merge: "union" makes one mask, of 0 and 1, of all masks of an image.
        num_classes: how many classes there are; it decides what the values alone leave open.
        mask_dir: where the masks are, DATA/masks by default.

    What cannot be repaired without guessing is refused and left out; nothing is written where that is so of all masks,
    or where no mask needs a repair.
    Raises: DataError where the folder holds what is not ours, and for a faulty table; OSError where it cannot be
    written.
    """
    output_dir = _followed(output_dir)
    jobs, refusals = find_jobs(looks)
    _require_apart(output_dir, looks, [data_dir / "images", mask_dir or data_dir / "masks"])
    recovered = _recover(output_dir)
    own = _own_files(output_dir)
    stale = [f"{output_dir} is of an earlier run: {_undo_command(data_dir, output_dir)} removes it"] * bool(own)
    table = None if colors is None else read_colours(colors)
    names = read_class_names(data_dir)
    try:
        chosen = plan(jobs, table, merge, num_classes or (len(names) if names else None))
    except Question as question:
        lines = [*recovered, str(question), *question.details, *_refused_lines(refusals), *stale]
        return Outcome(lines, len(jobs) + len(refusals))
    refusals |= chosen.refusals
    with _beside(output_dir) as folder:
        write = partial(_write, conversion=chosen.conversion, folder=folder, data_dir=data_dir)
        results = list(zip(chosen.jobs, in_threads(write, chosen.jobs), strict=True))
        refusals |= {job.sources[0]: str(result) for job, result in results if isinstance(result, DataError)}
        entries = [result for _, result in results if not isinstance(result, DataError)]
        if not any(entry["done"] for entry in entries):
            fine = f"{_counted(len(entries), 'mask')} {'need' if len(entries) != 1 else 'needs'} no repair"
            verdict = f"{fine if entries else 'none of the masks could be mended'}; nothing was written"
            return Outcome([*recovered, *_refused_lines(refusals), verdict, *stale], len(refusals))
        _write_record(folder, entries, refusals, data_dir)
        _take_place(folder, output_dir, own)
    lines = _done_lines(entries, chosen.conversion.unlabelled, data_dir, output_dir)
    return Outcome([*recovered, *lines, *_refused_lines(refusals)], len(refusals))


def undo(output_dir: Path) -> list[str]:
    """Remove what `fix` wrote into a folder, and the folder where it is empty then; return what to print.

    A file that was changed since is kept and named.
    Raises: DataError where there is no fixes.json of ours.
    """
    output_dir = _followed(output_dir)
    recovered = _recover(output_dir)
    entries = _read_record(output_dir)["masks"]
    changed = _changed(output_dir, entries)
    there = {entry["target"] for entry in entries if (output_dir / entry["target"]).exists()} - set(changed)
    _remove(output_dir, {RECORD, *there})
    lines = [*recovered, f"removed {_counted(len(there), 'mask')} and {RECORD} from {output_dir}"]
    if changed:
        lines.append(f"kept what was changed since: {listed(sorted(changed))}")
    if any(output_dir.iterdir()):
        return lines
    output_dir.rmdir()
    return lines


# The record


def _own_files(output_dir: Path) -> set[str]:
    """Return the names of an earlier run's files, which may be replaced.

    Raises: DataError where a file is not ours or was changed.
    """
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return set()
    if not (output_dir / RECORD).exists():
        raise DataError(f"{output_dir} holds files but no {RECORD} of ours: give an empty folder with --output")
    entries = _read_record(output_dir)["masks"]
    if changed := _changed(output_dir, entries):
        raise DataError(
            f"{output_dir} holds files that were changed since they were written ({listed(changed)}): move them "
            "elsewhere, or give another folder with --output"
        )
    return {RECORD, *(entry["target"] for entry in entries)}


def _read_record(output_dir: Path) -> Entry:
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


def _changed(output_dir: Path, entries: Sequence[Entry]) -> list[str]:
    """Return the names of files that are there and are not as they were written."""
    digests = {entry["target"]: entry["sha256"] for entry in entries if (output_dir / entry["target"]).exists()}
    return [name for name, digest in digests.items() if _digest(output_dir / name) != digest]


def _write_record(folder: Path, entries: Sequence[Entry], refusals: Refusals, data_dir: Path) -> None:
    refused = [{"source": _named(path, data_dir), "reason": refusals[path]} for path in sorted(refusals)]
    record = {"program": PROGRAM, "version": version("ml-src"), "masks": entries, "refused": refused}
    write_json(folder / RECORD, record)


def _named(path: Path, data_dir: Path) -> str:
    return (path.relative_to(data_dir) if path.is_relative_to(data_dir) else path).as_posix()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# The files


def _write(job: Job, conversion: Conversion, folder: Path, data_dir: Path) -> Entry | DataError:
    """Write one mask and return its entry of the record, or why it is refused."""
    try:
        parts = read_parts(job)
        converted = conversion(parts)
    except DataError as error:
        return error
    first = parts[0]
    turned = [turn for turn in job.turns if turn != 1]
    done = converted.done + _form(first) * (len(parts) == 1)
    done += ["turned as the EXIF orientation of the image asks"] * bool(turned)
    as_tiff = first.header.format == "TIFF" and (not done or (first.header.geo and not turned))
    target = folder / (job.stem + (".tif" if as_tiff else ".png"))
    try:
        _save(target, converted.classes if done else None, first.path)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return DataError(
            f"{first.path} cannot be written under the name of its image, which is too long: give both a shorter name"
        )
    same_format = first.header.format == ("TIFF" if as_tiff else "PNG")
    if same_format and first.path.suffix.lower() not in ((".tif", ".tiff") if as_tiff else (".png",)):
        done.append(f"named {target.suffix}, as what it is")
    if len(parts) == 1 and stem_of(first.path) != job.stem:
        done.append("named as its image")
    data = dict(converted.data)
    if turned:
        data["orientation"] = turned[0]
    height, width = converted.classes.shape
    return {
        "sources": [{"path": _named(path, data_dir), "sha256": _digest(path)} for path in job.sources],
        "target": target.name,
        "sha256": _digest(target),
        "width": width,
        "height": height,
        "done": done,
        **data,
    }


def _form(stored: Stored) -> list[str]:
    """Say what changes by writing one channel of class indices, whatever the values."""
    header, done = stored.header, []
    if mask_problem(header) is None:
        return []
    if header.format not in ("PNG", "TIFF") or header.lossy:
        done.append(f"{header.format} became PNG")
    if header.number in ("float", "signed") or header.bits > 16:
        done.append(f"{header.bits}-bit {header.number} numbers became class indices")
    if stored.kind == "gray":
        done.append("gray stored as RGB became one channel")
    if header.colours < header.samples:
        done.append("opaque alpha was left out")
    return done


def _save(target: Path, classes: NDArray[np.uint8 | np.uint16] | None, source: Path) -> None:
    """Write classes (H, W) as TIFF or PNG; without them the source as it is."""
    with replacing(target) as file:
        if classes is None:
            with source.open("rb") as original:
                shutil.copyfileobj(original, file)
        elif target.suffix == ".tif":
            _write_tiff(file, classes, source)
        else:
            Image.fromarray(classes).save(file, "PNG")


def _write_tiff(file: Any, classes: NDArray[np.uint8 | np.uint16], source: Path) -> None:
    """Write a TIFF that lies where its source lies."""
    with tifffile.TiffFile(source) as tiff:
        tags = [tag for code in PLACE_TAGS if (tag := tiff.pages.first.tags.get(code)) is not None]
        place = [(tag.code, tag.dtype, tag.count, tag.value, True) for tag in tags]
    tifffile.imwrite(
        file, classes, photometric="minisblack", compression="zlib", metadata=None, software=False, extratags=place
    )


# The folder


def _followed(output_dir: Path) -> Path:
    """Return the folder itself where a path cannot be renamed or removed: a link, `.` and `..`."""
    return output_dir.resolve() if output_dir.name in ("", "..") or output_dir.is_symlink() else output_dir


def _require_apart(output_dir: Path, looks: Sequence[Look], folders: Sequence[Path]) -> None:
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
def _beside(output_dir: Path) -> Iterator[Path]:
    """Make a folder beside another one; what of it is still there at the end is removed."""
    folder = output_dir.with_name(f"{output_dir.name}.{os.getpid()}.tmp")
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _take_place(folder: Path, output_dir: Path, own: set[str]) -> None:
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
    _remove(previous, own)
    previous.rmdir()


def _remove(folder: Path, own: set[str]) -> None:
    """Remove our files, the record last: without it nothing says whose the others are."""
    for name in sorted(own, key=lambda name: name == RECORD):
        (folder / name).unlink(missing_ok=True)


def _recover(output_dir: Path) -> list[str]:
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
        entries = _read_record(previous)["masks"] if there else []
    except DataError:  # not of ours
        return []
    if not output_dir.exists():
        previous.rename(output_dir)
        return [f"{output_dir} is back, which a run that was killed had set aside"]
    own = {RECORD, *(entry["target"] for entry in entries)} - set(_changed(previous, entries))
    moved = sorted(name for name in there - own if not (output_dir / name).exists())
    for name in moved:
        (previous / name).rename(output_dir / name)
    lines = [f"back in {output_dir}, after a run that was killed: {listed(moved)}"] * bool(moved)
    if kept := sorted(there - own - set(moved)):
        return [*lines, f"{previous} holds {listed(kept)}, left there by a run that was killed: move it elsewhere"]
    _remove(previous, own)
    previous.rmdir()
    return lines


# The lines


def _done_lines(entries: Sequence[Entry], unlabelled: bool, data_dir: Path, output_dir: Path) -> list[str]:
    phrases = Counter(phrase for entry in entries for phrase in entry["done"] or ["copied as it is"])
    lines = [f"wrote {_counted(len(entries), 'mask')} into {output_dir}; {RECORD} there says what was done to each"]
    lines += [f"  {_counted(number, 'mask')}: {phrase}" for phrase, number in phrases.most_common()]
    if blended := sum(entry.get("blended_pixels", 0) for entry in entries):
        share = 100 * blended / sum(entry["width"] * entry["height"] for entry in entries)
        lines.append(f"{share:.2g} % of all pixels lay between clean values and took the nearest")
    if unlabelled:
        lines.append(f"{UNLABELLED} marks unlabelled pixels: set data.ignore_index: {UNLABELLED}")
    command = _undo_command(data_dir, output_dir)
    return [*lines, f"look at some, then give --mask_data {output_dir}; {command} removes them"]


def _undo_command(data_dir: Path, output_dir: Path) -> str:
    where = "" if output_dir == data_dir / "masks_fixed" else f" --output {output_dir}"
    return f"ml-check {data_dir} --undo{where}"


def _refused_lines(refusals: Refusals) -> list[str]:
    if not refusals:
        return []
    reasons = [refusals[path] for path in sorted(refusals)]
    lines = [
        f"{len(reasons)} refused and left out:",
        *(f"  {reason}" for reason in reasons[:NUM_NAMED]),
    ]
    return lines + [f"  and {len(reasons) - NUM_NAMED} more"] * (len(reasons) > NUM_NAMED)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
