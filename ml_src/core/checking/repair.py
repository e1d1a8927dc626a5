"""Repaired copies of masks, in a folder of their own with a record of what was done; the originals are never touched.

`repair_plan.py` decides what is done. Here files are written, all or none, and removed again.
"""

import errno
import shutil
from collections import Counter
from collections.abc import Sequence
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
from ml_src.core.checking.output_folder import (
    PROGRAM,
    RECORD,
    Entry,
    beside,
    changed_files,
    digest_of,
    followed,
    own_files,
    read_record,
    recover,
    remove,
    require_apart,
    take_place,
)
from ml_src.core.checking.repair_plan import Job, Question, Refusals, find_jobs, in_threads, plan, read_parts
from ml_src.core.checking.stored import Stored
from ml_src.core.data.checks import UNLABELLED
from ml_src.core.data.files import listed, mask_problem, read_class_names, stem_of
from ml_src.core.errors import DataError

NUM_NAMED = 20
# What says where a TIFF lies on Earth: scale, tie points, matrix, keys with their numbers and texts.
PLACE_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)


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
    output_dir = followed(output_dir)
    jobs, refusals = find_jobs(looks)
    require_apart(output_dir, looks, [data_dir / "images", mask_dir or data_dir / "masks"])
    recovered = recover(output_dir)
    own = own_files(output_dir)
    stale = [f"{output_dir} is of an earlier run: {_undo_command(data_dir, output_dir)} removes it"] * bool(own)
    table = None if colors is None else read_colours(colors)
    names = read_class_names(data_dir)
    try:
        chosen = plan(jobs, table, merge, num_classes or (len(names) if names else None))
    except Question as question:
        lines = [*recovered, str(question), *question.details, *_refused_lines(refusals), *stale]
        return Outcome(lines, len(jobs) + len(refusals))
    refusals |= chosen.refusals
    with beside(output_dir) as folder:
        write = partial(_write, conversion=chosen.conversion, folder=folder, data_dir=data_dir)
        results = list(zip(chosen.jobs, in_threads(write, chosen.jobs), strict=True))
        refusals |= {job.sources[0]: str(result) for job, result in results if isinstance(result, DataError)}
        entries = [result for _, result in results if not isinstance(result, DataError)]
        if not any(entry["done"] for entry in entries):
            fine = f"{_counted(len(entries), 'mask')} {'need' if len(entries) != 1 else 'needs'} no repair"
            verdict = f"{fine if entries else 'none of the masks could be mended'}; nothing was written"
            return Outcome([*recovered, *_refused_lines(refusals), verdict, *stale], len(refusals))
        _write_record(folder, entries, refusals, data_dir)
        take_place(folder, output_dir, own)
    lines = _done_lines(entries, chosen.conversion.unlabelled, data_dir, output_dir)
    return Outcome([*recovered, *lines, *_refused_lines(refusals)], len(refusals))


def undo(output_dir: Path) -> list[str]:
    """Remove what `fix` wrote into a folder, and the folder where it is empty then; return what to print.

    A file that was changed since is kept and named.
    Raises: DataError where there is no fixes.json of ours.
    """
    output_dir = followed(output_dir)
    recovered = recover(output_dir)
    entries = read_record(output_dir)["masks"]
    changed = changed_files(output_dir, entries)
    there = {entry["target"] for entry in entries if (output_dir / entry["target"]).exists()} - set(changed)
    remove(output_dir, {RECORD, *there})
    lines = [*recovered, f"removed {_counted(len(there), 'mask')} and {RECORD} from {output_dir}"]
    if changed:
        lines.append(f"kept what was changed since: {listed(sorted(changed))}")
    if any(output_dir.iterdir()):
        return lines
    output_dir.rmdir()
    return lines


def _write_record(folder: Path, entries: Sequence[Entry], refusals: Refusals, data_dir: Path) -> None:
    refused = [{"source": _named(path, data_dir), "reason": refusals[path]} for path in sorted(refusals)]
    record = {"program": PROGRAM, "version": version("ml-src"), "masks": entries, "refused": refused}
    write_json(folder / RECORD, record)


def _named(path: Path, data_dir: Path) -> str:
    return (path.relative_to(data_dir) if path.is_relative_to(data_dir) else path).as_posix()


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
        "sources": [{"path": _named(path, data_dir), "sha256": digest_of(path)} for path in job.sources],
        "target": target.name,
        "sha256": digest_of(target),
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
