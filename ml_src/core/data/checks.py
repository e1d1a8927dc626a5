"""The mask rules of the guide as checks, over all masks at once. Next to read: `splits.py`.

Every mask is read once, in parallel, into a handful of numbers (`MaskFacts`), which are kept in a small file beside the
splits: a second start reads no mask. All rules are then arithmetic on these facts.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ml_src.core.atomic import write_text
from ml_src.core.data.files import MEND, Pair, image_info, listed, other_channels, read_mask, row_windows
from ml_src.core.data.truth import Truth
from ml_src.core.errors import DataError

UNLABELLED = 255
UNLABELLED_NAMES = {"void", "unlabelled", "unlabeled", "ignore", "ignored"}
CACHE_VERSION = 2
NUM_NAMED = 10

Stamp = list[int]
# A problem: what kind, for the count in the first line, and the sentence.
Problem = tuple[str, str]


@dataclass(frozen=True)
class MaskFacts:
    """What the rules need of one pair: sizes in pixels, pixels per mask value where the image has data, what the
    image's header says of its channels, or why it cannot be read.
    """

    height: int
    width: int
    counts: dict[int, int]
    image_height: int
    image_width: int
    channels: int = 0
    dtype: str = ""
    alpha: bool = False
    problem: str | None = None


def scan(
    pairs: Sequence[Pair], cache_path: Path | None, progress: Callable[[int], None] | None = None
) -> list[MaskFacts]:
    """Read every mask, and the header of every image, in threads; what the cache knows is not read again.

    Args:
        pairs: what to read.
        cache_path: a JSON file; ignored where it is broken or cannot be written. Its folder is not created.
        progress: called with the number of pairs done so far.
    """
    cache = _Cache(cache_path)
    facts = {index: known for index, pair in enumerate(pairs) if (known := cache.get(pair))}
    missing = [index for index in range(len(pairs)) if index not in facts]
    stamps = {index: _stamp(pairs[index]) for index in missing}  # before reading: a later change must be seen
    if progress is not None:
        progress(len(facts))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoders let go of the interpreter lock
        for index, found in zip(missing, pool.map(_examine, [pairs[index] for index in missing]), strict=True):
            facts[index] = found
            cache.put(pairs[index], stamps[index], found)
            if progress is not None:
                progress(len(facts))
    if missing:
        cache.save()
    return [facts[index] for index in range(len(pairs))]


def _examine(pair: Pair) -> MaskFacts:
    try:
        image, truth = image_info(pair.image), Truth(pair)
        mask = truth.mask
        same_size = (mask.height, mask.width) == (image.height, image.width)
        pixels = np.zeros(1 << 16, np.int64)
        for window in row_windows(mask.height, mask.width) if truth.windowed else [None]:
            values, nowhere = truth.read(window) if same_size else (read_mask(pair.mask, window), None)
            pixels += np.bincount(values.ravel() if nowhere is None else values[~nowhere], minlength=1 << 16)
    except DataError as error:
        return MaskFacts(0, 0, {}, 0, 0, problem=str(error))
    counts = {int(value): int(pixels[value]) for value in np.flatnonzero(pixels)}
    return MaskFacts(
        mask.height, mask.width, counts, image.height, image.width, image.channels, image.dtype, image.alpha
    )


class _Cache:
    """Facts by the absolute path of the mask, each good as long as size and time of both files stay the same."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.entries: dict[str, list[Any]] = {}
        with suppress(OSError, ValueError, TypeError):
            stored = json.loads(path.read_bytes()) if path is not None else None
            if isinstance(stored, dict) and stored.get("version") == CACHE_VERSION:
                self.entries = dict(stored.get("masks", {}))

    def get(self, pair: Pair) -> MaskFacts | None:
        try:
            image, stamp, (height, width), values, pixels, header = self.entries[str(pair.mask.absolute())]
            if image != str(pair.image.absolute()) or stamp != _stamp(pair):
                return None
            return MaskFacts(height, width, dict(zip(values, pixels, strict=True)), *header)
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def put(self, pair: Pair, stamp: Stamp | None, fact: MaskFacts) -> None:
        if stamp is None or fact.problem is not None:  # a problem may go without a change of the file: permissions
            return
        size, values, pixels = [fact.height, fact.width], list(fact.counts), list(fact.counts.values())
        header = [fact.image_height, fact.image_width, fact.channels, fact.dtype, fact.alpha]
        self.entries[str(pair.mask.absolute())] = [str(pair.image.absolute()), stamp, size, values, pixels, header]

    def save(self) -> None:
        if self.path is None:
            return
        with suppress(OSError):
            write_text(self.path, json.dumps({"version": CACHE_VERSION, "masks": self.entries}, separators=(",", ":")))


def _stamp(pair: Pair) -> Stamp | None:
    """Return size and time of change of both files, or None where one is missing."""
    try:
        mask, image = pair.mask.stat(), pair.image.stat()
    except OSError:
        return None
    return [mask.st_size, mask.st_mtime_ns, image.st_size, image.st_mtime_ns]


def unlabelled_value(values: Collection[int], names: Sequence[str] | None) -> int | None:
    """Return the mask value that means "unlabelled" by convention, or None.

    That is 255 where it is the largest value and no class has it, else a class of classes.txt named void or the like.
    """
    if max(values) == UNLABELLED and len(names or ()) <= UNLABELLED:
        return UNLABELLED
    return next((index for index, name in enumerate(names or ()) if name.lower() in UNLABELLED_NAMES), None)


def check_masks(pairs: Sequence[Pair], facts: Sequence[MaskFacts], num_classes: int, ignore_index: int | None) -> None:
    """Raise a DataError that names the masks which break a rule of the guide, the first ten one a line.

    The rules: readable, of its image's size, no value from num_classes up but ignore_index.
    """
    _raise_all(
        [_file_problem(*both) or _value_problem(*both, num_classes, ignore_index) for both in _both(pairs, facts)]
    )


def check_files(pairs: Sequence[Pair], facts: Sequence[MaskFacts]) -> None:
    """Like `check_masks`, before the number of classes is known: readable, and of its image's size."""
    _raise_all([_file_problem(*both) for both in _both(pairs, facts)])


def check_images(pairs: Sequence[Pair], facts: Sequence[MaskFacts], in_channels: int) -> None:
    """Raise a DataError that names images with other channels than the network takes, or another number type.

    Gray and RGB become each other; nothing else does. All must have the number type that most have, because their
    statistics are in its units.
    """
    common = Counter(fact.dtype for fact in facts).most_common(1)[0][0]
    _raise_all([_image_problem(pair.image, fact, in_channels, common) for pair, fact in _both(pairs, facts)])


def _image_problem(path: Path, fact: MaskFacts, in_channels: int, common: str) -> Problem | None:
    if fact.channels != in_channels and {fact.channels, in_channels} != {1, 3}:
        return "have another number of channels", other_channels(path, fact.channels, in_channels)
    if fact.dtype != common:
        return "have another number type", f"{path} has {fact.dtype} pixels but most have {common}: convert it"
    return None


def class_counts(facts: Sequence[MaskFacts], num_classes: int, ignore_index: int | None) -> list[int]:
    """Return the pixels of each class over all facts, (num_classes,); ignored pixels count for none."""
    total: Counter[int] = Counter()
    for fact in facts:
        total.update(fact.counts)
    return [0 if value == ignore_index else total[value] for value in range(num_classes)]


def _both(pairs: Sequence[Pair], facts: Sequence[MaskFacts]) -> list[tuple[Pair, MaskFacts]]:
    return list(zip(pairs, facts, strict=True))


def _file_problem(pair: Pair, fact: MaskFacts) -> Problem | None:
    if fact.problem is not None:
        return "cannot be read as image and mask", fact.problem
    if (fact.height, fact.width) != (fact.image_height, fact.image_width):
        mask_size, image_size = f"{fact.width}x{fact.height}", f"{fact.image_width}x{fact.image_height}"
        sentence = f"{pair.mask} is {mask_size} pixels (width x height) but {pair.image} is {image_size}: {MEND}"
        return "differ in size between image and mask", sentence
    return None


def _value_problem(pair: Pair, fact: MaskFacts, num_classes: int, ignore_index: int | None) -> Problem | None:
    values = sorted(fact.counts)
    foreign = [value for value in values if value >= num_classes and value != ignore_index]
    if not foreign:
        return None
    remedy = MEND
    if foreign == [255]:
        remedy += ", or set data.ignore_index: 255 if 255 marks unlabelled pixels"
    sentence = f"{pair.mask} has values [{listed(values, 10)}] but num_classes is {num_classes}: {remedy}"
    return f"have values outside 0..{num_classes - 1}", sentence


def _raise_all(problems: Sequence[Problem | None]) -> None:
    found = [problem for problem in problems if problem is not None]
    if not found:
        return
    if len(found) == 1:
        raise DataError(found[0][1])
    kinds = Counter(kind for kind, _ in found)
    causes = "; ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    lines = [f"of {len(problems)} pairs of image and mask {causes}:", *(line for _, line in found[:NUM_NAMED])]
    if len(found) > NUM_NAMED:
        lines.append(f"and {len(found) - NUM_NAMED} more")
    raise DataError("\n  ".join(lines))
