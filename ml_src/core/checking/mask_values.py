"""From the values that a set of masks holds to the class of each, where nothing has to be guessed. Pure arithmetic.

Next to read: `mask_colours.py`, the same for colours; `repair.py`, which reads and writes the files.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from math import isnan
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ml_src.core.checking.tallies import MOST_CLASSES_WITH_GAPS, Tally
from ml_src.core.data.checks import UNLABELLED
from ml_src.core.data.files import listed
from ml_src.core.errors import DataError

# Values are clean where so large a share of all pixels has one of so few, and others lie between any two of them.
CLEAN_SHARE, MOST_CLEAN = 0.98, 16
# Values between clean ones are blends where they are more than so many for each clean one, else they may be classes.
BLENDS_EACH = 4
# Values that a class has, and no blend, have at least so large a share of their pixels among eight of their own.
REGION_SHARE = 0.01
# So many values, evenly spaced, may be blends of two: halving the size of a mask makes 0, 64, 128, 191, 255.
FEWEST_EVEN_BLENDS = 5
# JPEG moves a value by less than this where all pixels kept one of few values.
LOSSY_GAP = 16
FULL_SCALES = (1.0, 255.0, 65535.0)


def class_dtype(highest: int) -> type[np.uint8 | np.uint16]:
    """Return the number type that holds classes up to `highest`."""
    return np.uint8 if highest <= 255 else np.uint16


@dataclass(frozen=True)
class ValueMap:
    """Which class each value becomes: that of the nearest of `values`, which ascend; `unlabelled` ones become 255."""

    values: tuple[float, ...]
    classes: tuple[int, ...]
    unlabelled: tuple[float, ...] = ()
    blends: bool = False  # there are other values, between these

    @property
    def identity(self) -> bool:
        """Whether every value is its class already."""
        return not self.blends and self.values == self.classes and set(self.unlabelled) <= {UNLABELLED}

    @property
    def described(self) -> str:
        """Values and classes in words."""
        if self.identity:
            return f"values {listed(self.classes, 5)} are classes already"
        values = f"values {listed([shown(value) for value in self.values])} became {listed(self.classes)}"
        if self.blends:
            values += ", those between them that of the nearest"
        changed = [shown(value) for value in self.unlabelled if value != UNLABELLED]
        return values + (f", {listed(changed)} became {UNLABELLED} (unlabelled)" if changed else "")

    def classes_of(self, pixels: NDArray[Any]) -> NDArray[np.uint8 | np.uint16]:
        """Return the class of every pixel, in the same shape; 16 bits where 8 are too few."""
        if pixels.dtype.kind == "u" and pixels.dtype.itemsize <= 2:  # a table of all values, then one look-up
            table = self._nearest(np.arange(1 << 8 * pixels.dtype.itemsize))
            return cast(NDArray[np.uint8 | np.uint16], table[pixels])
        return self._nearest(pixels)

    def _nearest(self, pixels: NDArray[Any]) -> NDArray[np.uint8 | np.uint16]:
        values = np.array(self.values)
        table: NDArray[np.uint8 | np.uint16] = np.array(self.classes, class_dtype(max(self.classes)))
        classes = table[np.searchsorted((values[1:] + values[:-1]) / 2, pixels, side="left")]
        classes[self._is_unlabelled(pixels)] = UNLABELLED
        return classes

    def _is_unlabelled(self, pixels: NDArray[Any]) -> NDArray[np.bool_]:
        found = np.isin(pixels, np.array(self.unlabelled))
        return found | np.isnan(pixels) if any(map(isnan, self.unlabelled)) else found

    def num_blended(self, pixels: NDArray[Any]) -> int:
        """Count the pixels whose value is none of `values`."""
        if not self.blends:
            return 0
        return int((~np.isin(pixels, np.array(self.values)) & ~self._is_unlabelled(pixels)).sum())


def shown(value: float) -> str:
    """A number without needless digits."""
    return f"{value:.0f}" if float(value).is_integer() else f"{value:g}"


def plan_values(tally: Tally, num_classes: int | None = None) -> ValueMap:
    """Find the class of every value.

    Args:
        tally: the values of all masks together.
        num_classes: how many classes there are, where that is known; class indices below it are then left alone.

    -1, and a "no data" that cannot be a class, is unlabelled. Values 0..k are classes already, 255 beside them is
    unlabelled. Two values, evenly stretched ones (0, 127, 255) and a few with gaps become 0..n-1 in ascending order;
    but of five and more all between the ends must fill regions, else they may be blends at borders. Where at least
    98 % of the pixels have one of at most 16 values, and others, more than four times as many, lie between any two of
    them and fill no regions, these are blends from smoothing or compression and take the nearest; likewise where 98 %
    of the pixels scatter in the lowest and the highest eighth of 0..255.
    Raises: DataError with the question that must be answered first.
    """
    unlabelled = _unlabelled(tally)
    counts = Counter({value: pixels for value, pixels in tally.counts.items() if value not in unlabelled})
    if not counts:
        raise DataError("no pixel of the masks is labelled: where are the labels?")
    values = tuple(sorted(counts))
    if values[0] < 0:
        negative = listed([shown(value) for value in values if value < 0], 5)
        raise DataError(
            f"the masks hold negative values ({negative}): which value marks unlabelled pixels? "
            "Save it as 255 and the classes from 0 up"
        )
    if unlabelled and len(values) == 1:
        raise DataError(
            f"the masks hold {shown(values[0])} and what usually marks unlabelled pixels "
            f"({listed([shown(value) for value in unlabelled])}): are these two classes? Save them as 0 and 1"
        )
    plan = _plan_known if num_classes is not None else _plan_unknown
    chosen = plan(_Values(values, counts, tally), num_classes or 0)
    both = ValueMap(chosen.values, chosen.classes, (*chosen.unlabelled, *sorted(unlabelled)), chosen.blends)
    if both.unlabelled and UNLABELLED in both.classes:
        raise DataError(
            f"the masks hold {len(both.classes)} classes and unlabelled pixels besides, and 255 is a class: which "
            "value shall mark unlabelled pixels? Save class indices"
        )
    return both


def _unlabelled(tally: Tally) -> set[float]:
    """Return what can only mean "unlabelled": -1 if it alone is negative, and what files call no data."""
    found = {value for value in tally.nodata if isnan(value) or value < 0 or value >= UNLABELLED}
    if tally.num_not_finite and not any(map(isnan, tally.nodata)):
        raise DataError(
            f"{tally.num_not_finite} pixels are NaN or infinite: which value marks unlabelled pixels? "
            "Save whole numbers, with 255 for unlabelled"
        )
    if {value for value in tally.counts if value < 0} - found == {-1.0}:
        found.add(-1.0)
    return found


@dataclass(frozen=True)
class _Values:
    """The values that may be classes, ascending, and what the rules ask about them."""

    values: tuple[float, ...]
    counts: Counter[float]
    tally: Tally

    @property
    def whole(self) -> bool:
        return all(value.is_integer() for value in self.values)

    @property
    def with_255(self) -> bool:
        return self.values[-1] == UNLABELLED

    @property
    def labels(self) -> tuple[float, ...]:
        """All but 255."""
        return self.values[:-1] if self.with_255 else self.values

    @property
    def consecutive(self) -> bool:
        return self.labels == tuple(range(len(self.labels)))

    @property
    def stretched(self) -> bool:
        """Whether they lie evenly between 0 and a full scale, but for rounding."""
        top, steps = self.values[-1], len(self.values) - 1
        if self.values[0] != 0 or top not in FULL_SCALES or not 1 <= steps < MOST_CLASSES_WITH_GAPS:
            return False
        slack = 1e-3 if top == 1 else 1.0
        return all(abs(value - index * top / steps) < slack for index, value in enumerate(self.values))

    @property
    def clean(self) -> tuple[float, ...]:
        """The fewest values that nearly all pixels have, if others lie between any two and none outside; else ()."""
        few, covered = [], 0
        for value, pixels in self.counts.most_common(MOST_CLEAN):
            few.append(value)
            covered += pixels
            if covered >= CLEAN_SHARE * self.num_labelled:
                break
        else:
            return ()
        few.sort()
        if not 2 <= len(few) < len(self.values) or (few[0], few[-1]) != (self.values[0], self.values[-1]):
            return ()
        apart = _least_gap(few) >= (few[-1] - few[0]) / MOST_CLEAN
        places = [self.values.index(value) for value in few]
        return tuple(few) if apart and _least_gap(places) > 1 else ()

    @property
    def regions(self) -> set[float]:
        """The values that fill regions, as no blend at a border does."""
        compact = self.tally.compact
        return {value for value, pixels in self.counts.items() if compact[value] >= max(1, REGION_SHARE * pixels)}

    @property
    def solid(self) -> bool:
        """Whether none can be a blend: all between the ends fill regions, or they are few and none is rare."""
        few = len(self.values) < FEWEST_EVEN_BLENDS and not self.clean
        return few or self.regions >= set(self.values[1:-1])

    @property
    def pure(self) -> tuple[float, ...]:
        """The clean values, if between the ends just these fill regions, or all was compressed with loss; else ()."""
        ends = {self.values[0], self.values[-1]}
        return self.clean if self.tally.lossy or self.regions | ends == set(self.clean) else ()

    @property
    def filling(self) -> tuple[float, ...]:
        """Those of five to 64 values that fill regions, if the ends do; else ()."""
        regions = tuple(sorted(self.regions))
        few = FEWEST_EVEN_BLENDS <= len(self.values) <= MOST_CLASSES_WITH_GAPS
        return regions if few and {self.values[0], self.values[-1]} <= set(regions) else ()

    @property
    def odd(self) -> tuple[float, ...]:
        """The labels beyond 0, 1, ... or 1, 2, ..., where at least two are such; else ()."""
        first = self.values[0]
        run = list(takewhile(lambda pair: pair[1] == first + pair[0], enumerate(self.labels)))
        return self.labels[len(run) :] if first in (0, 1) and len(run) > 1 else ()

    @property
    def unharmed(self) -> bool:
        """Whether a compression that loses detail cannot have made one of them into another."""
        return not self.tally.lossy or _least_gap(self.values) >= LOSSY_GAP

    @property
    def num_labelled(self) -> int:
        unlabelled = sum(pixels for value, pixels in self.tally.counts.items() if value not in self.counts)
        return self.tally.num_pixels - self.tally.num_not_finite - unlabelled

    @property
    def two_ends(self) -> bool:
        """Whether they scatter around 0 and 255 as JPEG makes them do."""
        if self.values[-1] > 255 or not self.whole:
            return False
        low, high = ([value for value in self.values if a <= value <= b] for a, b in ((0, 31), (224, 255)))
        scattered = self.tally.lossy or min(len(low), len(high)) > 2
        near = sum(self.counts[value] for value in (*low, *high))
        between = self.regions - {*low, *high}
        return bool(scattered and low and high and not between and near >= CLEAN_SHARE * self.num_labelled)

    @property
    def blended(self) -> tuple[float, ...]:
        """The clean values where the others are evidently blends of them; else ()."""
        if self.two_ends:
            return (0.0, 255.0) if self.clean in ((), (0.0, 255.0)) else ()
        pure = self.pure
        return pure if self.tally.lossy or len(self.values) - len(pure) > BLENDS_EACH * len(pure) else ()

    def in_order(self, values: tuple[float, ...] | None = None, blends: bool = False) -> ValueMap:
        kept = self.values if values is None else values
        return ValueMap(kept, tuple(range(len(kept))), blends=blends)

    def as_they_are(self) -> ValueMap:
        unlabelled = (float(UNLABELLED),) if self.with_255 else ()
        return ValueMap(self.labels, tuple(map(int, self.labels)), unlabelled)


def _least_gap(values: Sequence[float]) -> float:
    return min(high - low for low, high in pairwise(values))


def _plan_unknown(found: _Values, _: int) -> ValueMap:
    """Without knowing how many classes there are."""
    values, blended = found.values, found.blended
    if len(values) == 1 and found.labels and found.whole:
        return found.as_they_are()
    if len(values) == 1:
        raise _both_meanings(found)
    if len(values) == 2 and found.unharmed and not (values[0] > 0 and found.with_255):
        return found.in_order()
    if found.tally.lossy:
        if blended:
            return found.in_order(blended, blends=True)
        raise DataError(
            f"the masks hold {len(values)} values, and JPEG compression has changed them: which classes were meant? "
            "Export the masks again, as PNG"
        )
    if found.whole and found.consecutive and not (found.with_255 and len(values) > MOST_CLASSES_WITH_GAPS and blended):
        if len(values) < 256 or not found.with_255:
            return found.as_they_are()
        raise _threshold(found)
    if found.stretched and found.solid:
        return found.in_order()
    if blended:
        return found.in_order(blended, blends=True)
    if found.clean and not found.solid:
        raise _classes_or_blends(found)
    if not (found.whole or found.stretched) or len(values) > MOST_CLASSES_WITH_GAPS:
        raise _threshold(found)
    if not found.solid:
        raise _classes_or_blends(found)
    if found.with_255:
        raise _both_meanings(found)
    _require_no_stray(found)
    return found.in_order()


def _plan_known(found: _Values, num_classes: int) -> ValueMap:
    """With the number of classes, which decides where the values alone do not."""
    values, blended = found.values, found.blended or found.pure or found.filling
    legal = found.whole and not found.tally.lossy and bool(found.labels) and found.labels[-1] < num_classes
    whole_set = len(values) == num_classes
    if whole_set and found.unharmed and not found.odd and (not legal or not found.with_255 or len(found.labels) == 1):
        return found.in_order()
    if legal and not whole_set and (not found.with_255 or len(found.labels) > 1):
        return found.as_they_are()
    if blended and len(blended) == num_classes:
        return found.in_order(blended, blends=True)
    renumbered = len(found.labels) == num_classes and not found.stretched and not found.odd
    if found.with_255 and renumbered and not found.tally.lossy:
        first = found.in_order(found.labels)
        return ValueMap(first.values, first.classes, (float(UNLABELLED),))
    raise DataError(
        f"the masks hold {len(values)} values ({_some(values)}) but there are {num_classes} classes: which value is "
        "which class? Save class indices, or correct the number of classes (one line each in classes.txt)"
    )


def _require_no_stray(found: _Values) -> None:
    """Refuse to make a class of a value that few masks hold beside classes that are numbered well."""
    holders, num_masks = found.tally.holders, found.tally.num_masks
    rare = [value for value in found.odd if 2 * holders[value] < num_masks]
    if rare:
        raise DataError(
            f"only {max(holders[value] for value in rare)} of the {num_masks} masks hold {_some(rare)} beside the "
            f"values {_some([value for value in found.values if value not in rare])}: is that a class, or a mistake? "
            "Correct these masks, or write one class name a line into classes.txt, unused numbers included"
        )


def _some(values: Sequence[float]) -> str:
    return listed([shown(value) for value in values], 10)


def _both_meanings(found: _Values) -> DataError:
    return DataError(
        f"the masks hold the values {_some(found.values)}: is {shown(found.values[-1])} a class, or does it mark "
        f"unlabelled pixels? Write one class name a line into classes.txt: {len(found.values)} lines if it is a class"
    )


def _threshold(found: _Values) -> DataError:
    return DataError(
        f"the masks hold {len(found.values)} different values from {shown(found.values[0])} to "
        f"{shown(found.values[-1])}, as probabilities do: at which threshold does a class begin? Save class indices"
    )


def _classes_or_blends(found: _Values) -> DataError:
    clean = sorted({found.values[0], found.values[-1]} | found.regions)
    rare = [value for value in found.values if value not in clean]
    share = 100 * sum(found.counts[value] for value in rare) / found.num_labelled
    return DataError(
        f"the masks hold {_some(clean)} and, in {share:.2g} % of the pixels, {_some(rare)} between them: are these "
        f"classes, or blends at the borders? Write one class name a line into classes.txt: {len(found.values)} lines "
        f"for classes, {len(clean)} for blends"
    )
