"""What ml-split says of a split: how much of each class every part has, and what is odd. Next: `cli/split.py`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ml_src.core.data.checks import UNLABELLED, MaskFacts, unlabelled_value
from ml_src.core.data.files import MEND, listed
from ml_src.core.data.splits import Splits


def class_values(facts: Sequence[MaskFacts], names: list[str] | None) -> tuple[list[int], int | None]:
    """Return the mask values that are classes, those named and those found, and the one that means "unlabelled"."""
    found = {value for fact in facts for value in fact.counts} | set(range(len(names or [])))
    unlabelled = unlabelled_value(found, names)
    return sorted(found - {unlabelled}), unlabelled


@dataclass(frozen=True)
class Row:
    """One line of the table: a part of the split, with its pixels per class and without one."""

    name: str
    num_images: int
    num_groups: int
    pixels: list[int]
    ignored: int


def rows_of(drawn: Splits, facts: Sequence[MaskFacts], classes: list[int], groups: Sequence[str] | None) -> list[Row]:
    """Return one row a part: the test split, then train and val of each fold."""
    parts = {name.replace("_", " "): indices for name, indices in drawn.parts.items()}
    return _rows(parts, facts, classes, groups)


def rows_of_sites(
    site_of: Sequence[int], facts: Sequence[MaskFacts], classes: list[int], groups: Sequence[str] | None
) -> list[Row]:
    """Return one row a site, with all its images; `site_of` has the site of each image, counted from 0."""
    members: dict[str, list[int]] = {f"site {site}": [] for site in range(max(site_of) + 1)}
    for index, site in enumerate(site_of):
        members[f"site {site}"].append(index)
    return _rows(members, facts, classes, groups)


def _rows(
    parts: Mapping[str, Sequence[int]],
    facts: Sequence[MaskFacts],
    classes: list[int],
    groups: Sequence[str] | None,
) -> list[Row]:
    rows = []
    for name, indices in parts.items():
        total: Counter[int] = Counter()
        for index in indices:
            total.update(facts[index].counts)
        num_groups = len({groups[index] for index in indices}) if groups else 0
        pixels = [total[value] for value in classes]
        rows.append(Row(name, len(indices), num_groups, pixels, total.total() - sum(pixels)))
    return rows


def unevenness(rows: Sequence[Row]) -> float:
    """Return how far the class shares of the rows are from those of all of them together, on average.

    The distance is the total variation: the share of a row's pixels that would have to be of another class. 0 is none;
    1 is never reached. Rows without a pixel are passed over.
    """
    pixels = np.array([row.pixels for row in rows if any(row.pixels)], dtype=np.float64)  # (rows, classes)
    if not len(pixels):
        return 0.0
    shares, whole = pixels / pixels.sum(axis=1, keepdims=True), pixels.sum(axis=0) / pixels.sum()
    return float(np.abs(shares - whole).sum(axis=1).mean() / 2)


def distance_of_sites(rows: Sequence[Row]) -> str:
    """Say how uneven sites are in their classes."""
    apart = 100 * unevenness(rows)
    return f"on average {apart:.2f} % of a site's pixels would have to change their class to give it the shares of all"


def odd_values(facts: Sequence[MaskFacts], names: list[str] | None) -> str | None:
    """Say what is odd about the mask values, before a training stumbles over it."""
    values = sorted({value for fact in facts for value in fact.counts})
    classes = [value for value in values if value != UNLABELLED or values[-1] > UNLABELLED]
    if values == [0, UNLABELLED]:
        return f"the masks have the values 0 and {UNLABELLED} only, but class 1 has the value 1: {MEND}"
    if names and classes and classes[-1] >= len(names):
        foreign = [value for value in classes if value >= len(names)]
        return f"the masks have values [{listed(foreign, 10)}] but classes.txt names {len(names)} classes: {MEND}"
    if not names and classes and classes[-1] >= len(classes):
        return f"the masks have values [{listed(classes, 10)}], but classes are counted 0, 1, 2, ...: {MEND}"
    return None


def absent_classes(rows: list[Row], labels: list[str], stratified: bool) -> str | None:
    """Name the classes that a test or val part has no pixel of: their score there will say nothing."""
    measured = [row for row in rows if not row.name.endswith("train") and row.num_images]
    gaps = []
    for index, label in enumerate(labels):
        where = [row.name for row in measured if not row.pixels[index]]
        if len(where) == len(measured):
            where = ["any test or val part"]
        if where:
            gaps.append(f"{label} in {listed(where, 5)}")
    if not gaps:
        return None
    places = "; of ".join(gaps[:10])
    more = f"; and {len(gaps) - 10} more classes" if len(gaps) > 10 else ""
    remedy = "too few images have it" if stratified else "--stratified spreads rare classes"
    return f"no pixel of {places}{more}: such a class is not measured there ({remedy})"
