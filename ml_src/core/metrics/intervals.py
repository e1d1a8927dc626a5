"""How far a score could be off by the choice of images: 95 % bootstrap intervals. See also `segmentation.py`.

The images are drawn again, with replacement, as many as there are, 2000 times; the 2.5th and the 97.5th percentile of
the 2000 scores are the interval (percentile bootstrap, Efron 1979). Images of one group, such as the slices of a
patient, are alike: where groups are given, whole groups are drawn.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from ml_src.core.metrics.boundary import BoundaryScores
from ml_src.core.metrics.segmentation import Matrix, Scores

Interval = list[float]
"""[low, high]."""

CHUNK = 4_000_000
"""So many draws are in hand as float64 at a time: 32 MB."""


class Counts(NamedTuple):
    """Pixels of each class that are right, that are true and that are predicted: all that the scores need.

    Shape: each (C,), or (N, C) of N images; a matrix of each image would be C times as large.
    """

    hits: Matrix
    true: Matrix
    predicted: Matrix

    @classmethod
    def of(cls, matrix: Matrix) -> "Counts":
        """Return the counts of a confusion matrix (C, C), rows are truth; or of several, (N, C, C)."""
        hits = np.diagonal(matrix, axis1=-2, axis2=-1).copy()  # a view would keep the matrix
        return cls(hits, matrix.sum(axis=-1), matrix.sum(axis=-2))

    @classmethod
    def stacked(cls, images: Sequence["Counts"]) -> "Counts":
        """Return the counts of several images as one, (N, C)."""
        return cls(*(np.stack(part) for part in zip(*images, strict=True)))

    def summed(self) -> "Counts":
        """Return the counts over all images: (N, C) to (C,)."""
        return Counts(*(part.sum(axis=0) for part in self))

    def dice(self, ignore_index: int | None) -> Scores:
        """`segmentation.dice` of these counts, in their shape."""
        return _without(_ratio(2 * self.hits, self.true + self.predicted), ignore_index)


class BoundaryIntervals(TypedDict, total=False):
    """Intervals of what `boundary.BoundarySummary` holds; only there where boundaries were measured."""

    hd95: Interval | None
    surface_dice: Interval | None
    boundary_iou: Interval | None
    hd95_per_class: list[Interval | None]
    surface_dice_per_class: list[Interval | None]
    boundary_iou_per_class: list[Interval | None]


class Intervals(BoundaryIntervals):
    """95 % intervals as plain Python values, each for the score of the same name in the summaries.

    None for a class that is in fewer than two images (groups, if they are drawn) in truth or prediction, and for the
    class ignore_index. A resample without a class says nothing of it; its means are over the classes it has.
    """

    over: str
    """What was drawn: "images" or "groups"."""
    num: int
    """How many of them there are."""
    iou: Interval | None
    dice: Interval | None
    pixel_accuracy: Interval | None
    iou_per_class: list[Interval | None]
    dice_per_class: list[Interval | None]


def resamples(num_images: int, groups: Sequence[str] | None, num: int = 2000, seed: int = 0) -> NDArray[np.int32]:
    """Draw the images, or groups, again with replacement, as many as there are, `num` times.

    The same arguments always give the same draws.

    Args:
        num_images: N.
        groups: the group of each image, if whole groups are to be drawn.
        num: the number of resamples.
        seed: of the random numbers.

    Shape: returns (num, N), how often each image was drawn.
    Raises: ValueError if there is not one group for each image.
    """
    units = _units(num_images, groups)
    num_units = len(np.unique(units))
    generator = np.random.default_rng(seed)
    draws = np.empty((num, num_units), np.int32)
    for row in draws:
        row[:] = np.bincount(generator.integers(0, num_units, num_units), minlength=num_units)
    return draws[:, units]


def score_intervals(
    counts: Counts,
    boundaries: Sequence[BoundaryScores] | None,
    ignore_index: int | None,
    groups: Sequence[str] | None = None,
) -> Intervals | None:
    """Return the interval of every score; None where there are fewer than two images (groups, if they are given).

    The scores of a resample are those of the sum of its counts, and the means of its boundary scores. All
    intervals are from the same resamples.

    Args:
        counts: of each image.
        boundaries: the boundary scores of each image, if they were measured.
        ignore_index: the class that has no scores, if it is a class.
        groups: the group of each image, if whole groups are to be drawn.

    Shape: counts (N, C) each; boundaries and groups N.
    Raises: ValueError if there are not as many boundaries or groups as images that were counted.
    """
    num_images, num_classes = counts.hits.shape
    if boundaries is not None and len(boundaries) != num_images:
        raise ValueError(f"counts of {num_images} images but boundary scores of {len(boundaries)}")
    units = _units(num_images, groups)
    num_units = len(np.unique(units))
    if num_units < 2:
        return None
    draws = resamples(num_images, groups)
    drawn = _drawn(draws, counts)
    scored = (counts.true + counts.predicted > 0) & (np.arange(num_classes) != ignore_index)
    iou, dice = _iou(drawn, ignore_index), drawn.dice(ignore_index)
    outlines = BoundaryIntervals() if boundaries is None else _boundary_intervals(draws, boundaries, units)
    return Intervals(
        **outlines,
        over="images" if groups is None else "groups",
        num=num_units,
        iou=_interval(_class_mean(iou)),
        dice=_interval(_class_mean(dice)),
        pixel_accuracy=_interval(_ratio(drawn.hits.sum(axis=1), drawn.true.sum(axis=1))),
        iou_per_class=_per_class(iou, scored, units),
        dice_per_class=_per_class(dice, scored, units),
    )


def paired_interval(
    before: Counts, after: Counts, ignore_index: int | None, groups: Sequence[str] | None = None
) -> tuple[float, float] | None:
    """Interval of how much the mean Dice rises from one prediction of the images to another.

    Both are scored on the same resamples, so what is hard in both cancels. The change helps where the interval lies
    above zero.

    Shape: before and after (N, C) each, of the same images in the same order; groups N.
    Returns: low and high in [-1, 1]; None where there are fewer than two images (groups, if they are given), or nothing
        is counted in them.
    Raises: ValueError if the shapes differ, or there is not one group for each image.
    """
    if before.hits.shape != after.hits.shape:
        raise ValueError(f"counts before {before.hits.shape} and after {after.hits.shape} differ in shape")
    if len(np.unique(_units(len(before.hits), groups))) < 2:
        return None
    draws = resamples(len(before.hits), groups)
    first, second = (_class_mean(_drawn(draws, counts).dice(ignore_index)) for counts in (before, after))
    interval = _interval(second - first)
    return None if interval is None else (interval[0], interval[1])


def _drawn(draws: NDArray[np.int32], counts: Counts) -> Counts:
    """Sum over the images of each resample: draws (R, N) and counts (N, C) to (R, C).

    As float64, for products of integer arrays would not use BLAS; exact, for it holds whole numbers up to 9e15.
    """
    return Counts(*(_sums(draws, part.astype(np.float64)).astype(np.int64) for part in counts))


def _sums(draws: NDArray[np.int32], values: Scores) -> Scores:
    """Sum over the images of each resample: (R, N) and (N, C) to (R, C)."""
    num_chunks = -(-draws.size // CHUNK)
    return np.concatenate([chunk.astype(np.float64) @ values for chunk in np.array_split(draws, num_chunks)])


def _iou(counts: Counts, ignore_index: int | None) -> Scores:
    """`segmentation.iou` of these counts, in their shape."""
    return _without(_ratio(counts.hits, counts.true + counts.predicted - counts.hits), ignore_index)


def _without(scores: Scores, ignore_index: int | None) -> Scores:
    return np.where(np.arange(scores.shape[-1]) == ignore_index, np.nan, scores)


def _ratio(numerators: Matrix | Scores, denominators: Matrix | Scores) -> Scores:
    """Divide, with nan for 0 / 0."""
    with np.errstate(invalid="ignore"):
        return np.asarray(numerators / denominators, np.float64)


def _class_mean(scores: Scores) -> Scores:
    """`segmentation.mean_over_present` of each resample: (R, C) to (R,)."""
    present = ~np.isnan(scores)
    return _ratio(np.where(present, scores, 0.0).sum(axis=1), present.sum(axis=1).astype(np.float64))


def _boundary_intervals(
    draws: NDArray[np.int32], boundaries: Sequence[BoundaryScores], units: NDArray[np.int64]
) -> BoundaryIntervals:
    scored = np.array([~np.isnan(image.hd95) for image in boundaries])
    drawn = _sums(draws, scored.astype(np.float64))
    hd95, surface_dice, boundary_iou = (
        _ratio(_sums(draws, np.nan_to_num(values)), drawn)
        for values in np.array([image[:3] for image in boundaries]).swapaxes(0, 1)  # (3, N, C)
    )
    return BoundaryIntervals(
        hd95=_interval(_class_mean(hd95)),
        surface_dice=_interval(_class_mean(surface_dice)),
        boundary_iou=_interval(_class_mean(boundary_iou)),
        hd95_per_class=_per_class(hd95, scored, units),
        surface_dice_per_class=_per_class(surface_dice, scored, units),
        boundary_iou_per_class=_per_class(boundary_iou, scored, units),
    )


def _per_class(scores: Scores, scored: NDArray[np.bool_], units: NDArray[np.int64]) -> list[Interval | None]:
    """Interval of each class that is in two units at least: scores (R, C), scored (N, C) where it is."""
    num_units = [len(np.unique(units[images])) for images in scored.T]
    return [_interval(column) if num >= 2 else None for column, num in zip(scores.T, num_units, strict=True)]


def _interval(scores: Scores) -> Interval | None:
    """Percentiles over the resamples (R,) that have a score; None if none has."""
    known = scores[~np.isnan(scores)]
    return [float(bound) for bound in np.percentile(known, [2.5, 97.5])] if known.size else None


def _units(num_images: int, groups: Sequence[str] | None) -> NDArray[np.int64]:
    """What each image is drawn with, (N,): numbers from 0, in order of appearance."""
    if groups is None:
        return np.arange(num_images)
    if len(groups) != num_images:
        raise ValueError(f"{num_images} images but groups of {len(groups)}")
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return np.array([numbers[group] for group in groups], np.int64)
