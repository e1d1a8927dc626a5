"""What ml-split says of a split: how much of each class every part has, and what is odd. Next: `cli/split.py`."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

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
    parts = {"test": drawn.test}
    for fold, (train, val) in enumerate(drawn.folds):
        parts |= {f"fold {fold} train": train, f"fold {fold} val": val}
    rows = []
    for name, indices in parts.items():
        total: Counter[int] = Counter()
        for index in indices:
            total.update(facts[index].counts)
        num_groups = len({groups[index] for index in indices}) if groups else 0
        pixels = [total[value] for value in classes]
        rows.append(Row(name, len(indices), num_groups, pixels, total.total() - sum(pixels)))
    return rows


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
