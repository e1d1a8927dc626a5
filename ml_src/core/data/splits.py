"""Which image is for testing, training and validation. Next to read: `split_files.py`, `cli/split.py`.

A split is drawn from the seed alone, may keep groups together (patient, slide, scene) and may give every part its share
of every class.
"""

import csv
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ml_src.core.data.files import Pair, listed, stem_of
from ml_src.core.errors import ConfigError, DataError

# Stands beside the classes in the bookkeeping below: every unit has it, so it balances the number of images.
ANY = -1


@dataclass(frozen=True)
class Splits:
    """Indices into the pairs, ascending: those for testing, and (train, val) of each fold; the group of each pair."""

    test: list[int]
    folds: list[tuple[list[int], list[int]]]
    groups: list[str] | None = None

    @property
    def parts(self) -> dict[str, list[int]]:
        """The indices of every part by the name that its files have: `test`, `fold_0_train`, `fold_0_val`, ..."""
        parts = {"test": self.test}
        for fold, (train, val) in enumerate(self.folds):
            parts |= {f"fold_{fold}_train": train, f"fold_{fold}_val": val}
        return parts


def make_splits(
    counts: Sequence[Mapping[int, int]],
    groups: Sequence[str] | None,
    num_folds: int,
    test_split: float,
    val_split: float | None,
    stratified: bool,
    seed: int,
) -> Splits:
    """Draw a test split, then folds of the rest.

    Without `val_split` the folds partition the rest: each image is in val exactly once. With it each fold draws that
    fraction of the rest anew.

    Args:
        counts: for each image the pixels per class, ignored ones left out; used where `stratified`.
        groups: for each image the name of its group; no group is divided.
        num_folds: at least 2, or at least 1 with `val_split`.
        test_split: share of the images in [0, 1).
        val_split: share of the images that are not test, in (0, 1).
        stratified: give every part its share of every class, in images and in pixels, and every part at least one
            image of a rare class where there are enough.
        seed: not negative; the same arguments give the same splits.
    """
    _check_fractions(num_folds, test_split, val_split)
    units = _units(counts, groups, stratified)
    num_parts = num_folds if val_split is None else 2
    if len(units) < num_parts + (test_split > 0):
        what = "images" if groups is None else "groups"
        parts = f"{num_folds} folds" if val_split is None else "training and validation"
        test = " and a test split" if test_split > 0 else ""
        raise DataError(f"{len(units)} {what} are too few for {parts}{test}: give fewer folds or more {what}")

    drawn: list[_Unit] = []
    rest = units
    if test_split > 0:
        drawn, rest = _draw(units, test_split, num_parts, _stream(seed, 0))
    if val_split is None:
        vals = _partition(rest, num_folds, _stream(seed, 1))
    else:
        vals = [_draw(rest, val_split, 1, _stream(seed, 2 + fold))[0] for fold in range(num_folds)]
    remaining = set(_members(rest))
    folds = [(sorted(remaining - set(val)), val) for val in map(_members, vals)]
    return Splits(_members(drawn), folds, None if groups is None else list(groups))


def _stream(seed: int, number: int) -> np.random.Generator:
    """Return independent random numbers for each decision, so that one more fold leaves the others as they are."""
    return np.random.Generator(np.random.Philox(key=[seed, number]))


def groups_from_csv(pairs: Sequence[Pair], path: Path) -> list[str]:
    """Return the group of each pair from a CSV file with the columns `image` (name or stem) and `group`.

    Raises: DataError that names the images without a group or with two.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if not {"image", "group"} <= set(columns):
                raise DataError(f"{path} has the columns [{listed(columns)}] but needs image and group, with commas")
            rows = [((row["image"] or "").strip(), (row["group"] or "").strip()) for row in reader]
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give --groups a CSV file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}): save it as CSV in UTF-8") from error
    known: dict[str, set[str]] = defaultdict(set)
    for image, group in rows:
        if group:
            known[unicodedata.normalize("NFC", image)].add(group)
    found = [known[unicodedata.normalize("NFC", pair.image.name)] | known[stem_of(pair.image)] for pair in pairs]
    missing = [pair.image.name for pair, names in zip(pairs, found, strict=True) if not names]
    if missing:
        raise DataError(f"{path} gives no group for {len(missing)} of {len(pairs)} images: {listed(missing)}")
    twice = [pair.image.name for pair, names in zip(pairs, found, strict=True) if len(names) > 1]
    if twice:
        raise DataError(f"{path} gives more than one group for {listed(twice)}")
    return [next(iter(names)) for names in found]


def groups_from_regex(pairs: Sequence[Pair], pattern: str) -> list[str]:
    """Return the group of each pair: what the pattern's first group, or all of it, finds in the stem.

    Raises: ConfigError for a faulty pattern; DataError that names the images where it finds nothing.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--group_regex {pattern!r} is no regular expression: {error}") from error
    matches = [compiled.search(stem_of(pair.image)) for pair in pairs]
    groups = [match[min(1, compiled.groups)] if match else None for match in matches]
    missing = [pair.image.name for pair, group in zip(pairs, groups, strict=True) if not group]
    if missing:
        raise DataError(
            f"--group_regex {pattern!r} finds no group in the stems of {len(missing)} of {len(pairs)} images: "
            f"{listed(missing)}"
        )
    return [group for group in groups if group]


def _check_fractions(num_folds: int, test_split: float, val_split: float | None) -> None:
    if num_folds < 1 or (num_folds == 1 and val_split is None):
        raise ConfigError(f"--folds is {num_folds}: give at least 2, or 1 together with --val_split")
    if not 0 <= test_split < 1:
        raise ConfigError(f"--test_split is {test_split}: give a share of the images from 0 to below 1, such as 0.15")
    if val_split is not None and not 0 < val_split < 1:
        raise ConfigError(f"--val_split is {val_split}: give a share between 0 and 1, such as 0.15")


@dataclass(frozen=True)
class _Unit:
    """What is placed as a whole: an image, or all images of a group. Images and pixels by class, and by ANY."""

    members: list[int]
    images: dict[int, int]
    pixels: dict[int, int]


def _units(counts: Sequence[Mapping[int, int]], groups: Sequence[str] | None, stratified: bool) -> list[_Unit]:
    by_group: dict[str | int, list[int]] = defaultdict(list)
    for index in range(len(counts)):
        by_group[index if groups is None else groups[index]].append(index)
    units = []
    for members in by_group.values():
        images, pixels = {ANY: len(members)}, {ANY: 0}
        if stratified:
            for index in members:
                for value, number in counts[index].items():
                    images[value] = images.get(value, 0) + 1
                    pixels[value] = pixels.get(value, 0) + number
        units.append(_Unit(members, images, pixels))
    return units


def _members(units: Sequence[_Unit]) -> list[int]:
    return sorted(index for unit in units for index in unit.members)


def _draw(units: list[_Unit], fraction: float, keep: int, rng: np.random.Generator) -> tuple[list[_Unit], list[_Unit]]:
    """Draw a fraction of the images; at least one unit is drawn, and `keep` units stay, of each class too if it can."""
    num_images = sum(unit.images[ANY] for unit in units)
    size = min(max(round(num_images * fraction), 1), num_images - keep)
    shuffled = [units[index] for index in rng.permutation(len(units))]
    drawn, rest = _place(shuffled, [size, num_images - size], keep, rng)
    if not drawn:  # every group is larger than twice the part: the smallest comes nearest
        smallest = min(rest, key=lambda unit: unit.images[ANY])
        return [smallest], [unit for unit in rest if unit is not smallest]
    return drawn, rest


def _partition(units: list[_Unit], num_parts: int, rng: np.random.Generator) -> list[list[_Unit]]:
    """Divide into parts of equal size, as far as groups allow."""
    num_images = sum(unit.images[ANY] for unit in units)
    sizes = [num_images // num_parts + (part < num_images % num_parts) for part in range(num_parts)]
    shuffled = [units[index] for index in rng.permutation(len(units))]
    shuffled.sort(key=lambda unit: -unit.images[ANY])  # large groups first: small ones then level the parts
    return _place(shuffled, [sizes[index] for index in rng.permutation(num_parts)], None, rng)


class _Part:
    """A part while it fills: its room in images, and how much of each class it still wants.

    What it wants is in units of its fair share: 1 is all of it, 0 none, below 0 it has too much.
    """

    def __init__(self, size: int, num_images: int, labels: Iterable[int]) -> None:
        self.size = self.room = size
        self.share = size / num_images
        self.images = dict.fromkeys(labels, 1.0)
        self.pixels = dict.fromkeys(labels, 1.0)
        self.num_units = dict.fromkeys(labels, 0)

    def want(self, label: int, images: Mapping[int, float], pixels: Mapping[int, float]) -> float:
        """Return how much a unit is wanted for `label`: for its images, and for its pixels of all classes.

        Half of the unit is counted as placed, which rounds to the nearest, as in Webster's method of giving out seats.
        """
        want = self.images[label] - images[label] / 2 / self.share
        if weight := sum(pixels.values()):
            wants = (part * (self.pixels[one] - part / 2 / self.share) for one, part in pixels.items())
            want += sum(wants) / weight
        return want

    def take(self, num_images: int, images: Mapping[int, float], pixels: Mapping[int, float]) -> None:
        self.room -= num_images
        for label in images:
            self.images[label] -= images[label] / self.share
            self.pixels[label] -= pixels[label] / self.share
            self.num_units[label] += 1


def _place(units: list[_Unit], sizes: list[int], keep: int | None, rng: np.random.Generator) -> list[list[_Unit]]:
    """Iterative stratification: rarest class first, each unit goes where it is wanted most (Sechidis et al. 2011).

    Differences from the paper: pixels are wanted as well as images, parts have a size that single images keep
    exactly, and the last units of a class go to the parts that have none of it.

    Args:
        units: in the order in which they are placed within a class.
        sizes: images per part.
        keep: for two parts, how many units of a class the second keeps where there are more than that.
        rng: breaks ties.
    """
    waiting: dict[int, list[int]] = defaultdict(list)
    total_images: Counter[int] = Counter()
    total_pixels: Counter[int] = Counter()
    for index, unit in enumerate(units):
        total_images.update(unit.images)
        total_pixels.update(unit.pixels)
        for label in unit.images:
            waiting[label].append(index)
    num_waiting = {label: len(indices) for label, indices in waiting.items()}
    # At most so many units of a class may go to the first part.
    limits = {label: number - keep for label, number in num_waiting.items() if keep and number > keep}
    parts = [_Part(size, sum(sizes), waiting) for size in sizes]
    noise = rng.random((len(units), len(parts))).tolist()
    placed: list[list[_Unit]] = [[] for _ in parts]
    done = [False] * len(units)

    while num_waiting:
        label = min(num_waiting, key=lambda one: (num_waiting[one], one == ANY, one))
        for index in waiting[label]:
            if done[index]:
                continue
            unit = units[index]
            images = {one: number / total_images[one] for one, number in unit.images.items()}
            pixels = {one: number / max(total_pixels[one], 1) for one, number in unit.pixels.items()}
            full = any(parts[0].num_units[one] >= limits[one] for one in unit.images if one in limits)
            choice = _open(parts, unit.images[ANY], range(int(full), len(parts)))
            lacking = [place for place in choice if not parts[place].num_units[label]]
            if num_waiting[label] <= len(lacking) and (keep is None or label in limits):
                choice = lacking
            wants = {place: round(parts[place].want(label, images, pixels), 9) for place in choice}
            ties = noise[index]
            best = max(choice, key=lambda place: (wants[place], parts[place].room / parts[place].size, ties[place]))

            placed[best].append(unit)
            parts[best].take(unit.images[ANY], images, pixels)
            done[index] = True
            for one in unit.images:
                num_waiting[one] -= 1
        del num_waiting[label]
    return placed


def _open(parts: Sequence[_Part], num_images: int, allowed: Iterable[int]) -> list[int]:
    """Return the allowed parts that so many images bring nearer to their size; else those with the most room."""
    places = list(allowed)
    most = max(parts[place].room for place in places)
    return [place for place in places if 2 * parts[place].room > num_images or parts[place].room == most]
