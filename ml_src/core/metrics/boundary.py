"""How well the outlines fit: HD95, surface Dice and boundary IoU of each class in each image. Next: `intervals.py`.

Counts of pixels hardly see an outline: a large object with a ragged edge has nearly the IoU of a perfect one.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import cv2
import numpy as np
from numpy.typing import NDArray

from ml_src.core.metrics.segmentation import Scores, mean_over_present

Mask = NDArray[np.bool_]
LabelMap = NDArray[np.integer]

CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.uint8)
"""A pixel and its four neighbours."""


class BoundaryScores(NamedTuple):
    """Scores of one image, each (C,) float64.

    - A class that is in the truth but not predicted is missed: its HD95 is the diagonal of the image, the others are 0.
    - A class that is predicted but not in the truth is invented: the same.
    - A class in neither, and the class ignore_index, has no score: nan.
    """

    hd95: Scores
    """At least 0, in the unit of pixel_size; smaller is better."""
    surface_dice: Scores
    """In [0, 1]."""
    boundary_iou: Scores
    """In [0, 1]."""
    missed: list[int]
    invented: list[int]


def boundary_scores(
    labels: LabelMap,
    truth: LabelMap,
    num_classes: int,
    ignore_index: int | None,
    tolerance: float = 2.0,
    pixel_size: float = 1.0,
) -> BoundaryScores:
    """Compare the outlines of each class in one image.

    - HD95: the larger of the two 95th percentiles of the distances from the one outline to the other (robust Hausdorff
      distance). An outline is the pixels of the class that have one of their four neighbours outside of it.
    - Surface Dice: the share of the pixels of both outlines that are within `tolerance` of the other outline
      (Nikolov et al. 2018, with pixels for areas, as in Seidlitz et al. 2022).
    - Boundary IoU: IoU of two bands, the pixels of a class that have a pixel outside of it within d rows and d columns;
      d is 2 % of the diagonal of the image, at least 1 (Cheng et al. 2021).

    Beyond the edge of the image everything is outside, so an outline runs along it. Pixels that are ignored in the
    truth belong to no class, whatever is predicted there. Where they cut truth and prediction in the same place, both
    outlines are unknown, and their pixels are not counted there; but to those pixels others may be near. Where they cut
    only one of the two, the other differs from it, and that is counted.

    Args:
        labels: predicted classes; other values belong to no class.
        truth: the true classes, as labels.
        num_classes: C.
        ignore_index: the truth value that is left out; may be one of the classes.
        tolerance: of surface Dice, in the unit of pixel_size.
        pixel_size: the side of a pixel, in any unit; 1 for distances in pixels.

    Shape: labels and truth (H, W), integers of at least 0.
    Raises: ValueError if the shapes differ.
    """
    if labels.shape != truth.shape:
        raise ValueError(f"labels {labels.shape} and truth {truth.shape} differ in shape")
    counted = np.ones(truth.shape, np.bool_) if ignore_index is None else truth != ignore_index
    predicted, true = (_present(values[counted], num_classes, ignore_index) for values in (labels, truth))
    diagonal = float(np.hypot(*truth.shape))
    band_width = max(1, round(0.02 * diagonal))
    scores = np.full((3, num_classes), np.nan)
    scores[:, true != predicted] = [[diagonal * pixel_size], [0.0], [0.0]]
    for index in np.flatnonzero(true & predicted):
        regions = _cropped((labels == index) & counted, truth == index, ~counted, margin=band_width)
        distances = [pixels * pixel_size for pixels in _outline_distances(*regions)]
        scores[:, index] = _hd95(distances), _share_within(tolerance, distances), _band_iou(*regions, band_width)
    hd95, surface_dice, boundary_iou = scores
    missed, invented = np.flatnonzero(true & ~predicted), np.flatnonzero(predicted & ~true)
    return BoundaryScores(hd95, surface_dice, boundary_iou, missed.tolist(), invented.tolist())


class ClassCounts(TypedDict):
    """In how many images a class is."""

    images: int
    """In truth or prediction."""
    missed: int
    """In the truth alone, counted in images too."""
    invented: int
    """In the prediction alone, counted in images too."""


class BoundarySummary(TypedDict):
    """Scores of many images as plain Python values.

    A class's score is its mean over the images in which it is in truth or prediction, with those in which it is missed
    or invented; None where there is no such image, and for the class ignore_index. The first three are means over the
    classes that have a score; None where none has.
    """

    hd95: float | None
    surface_dice: float | None
    boundary_iou: float | None
    hd95_per_class: list[float | None]
    surface_dice_per_class: list[float | None]
    boundary_iou_per_class: list[float | None]
    counts_per_class: list[ClassCounts]


def summarize_boundaries(scores: Sequence[BoundaryScores]) -> BoundarySummary:
    """Return the means and counts over the images, of which there must be at least one."""
    tables = (np.stack(values, axis=1) for values in zip(*(image[:3] for image in scores), strict=True))  # (C, N) each
    hd95, surface_dice, boundary_iou = (np.array([mean_over_present(images) for images in table]) for table in tables)
    return BoundarySummary(
        hd95=_plain(mean_over_present(hd95)),
        surface_dice=_plain(mean_over_present(surface_dice)),
        boundary_iou=_plain(mean_over_present(boundary_iou)),
        hd95_per_class=[_plain(score) for score in hd95],
        surface_dice_per_class=[_plain(score) for score in surface_dice],
        boundary_iou_per_class=[_plain(score) for score in boundary_iou],
        counts_per_class=_counts(scores),
    )


def _present(values: LabelMap, num_classes: int, ignore_index: int | None) -> Mask:
    """Which classes are among the values, (C,); ignore_index never is."""
    present = np.bincount(values, minlength=num_classes)[:num_classes] > 0
    if ignore_index is not None:
        present[ignore_index : ignore_index + 1] = False
    return present


def _cropped(predicted: Mask, true: Mask, ignored: Mask, margin: int) -> tuple[Mask, Mask, Mask]:
    """All three where one of the two regions is, and `margin` pixels around it."""
    left, top, width, height = cv2.boundingRect((predicted | true).view(np.uint8))
    rows = slice(max(0, top - margin), top + height + margin)
    columns = slice(max(0, left - margin), left + width + margin)
    return predicted[rows, columns], true[rows, columns], ignored[rows, columns]


def _outline_distances(predicted: Mask, true: Mask, ignored: Mask) -> tuple[Scores, Scores]:
    """Pixels from each counted pixel of the prediction's outline to the truth's, and the reverse."""
    predicted_outline, true_outline, counted = _rims(predicted, true, ignored, CROSS)
    return (
        _distances(predicted_outline & counted, true_outline),
        _distances(true_outline & counted, predicted_outline),
    )


def _band_iou(predicted: Mask, true: Mask, ignored: Mask, width: int) -> float:
    """IoU of the counted pixels of two bands along the insides of the outlines."""
    square = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    predicted_band, true_band, counted = _rims(predicted, true, ignored, square)
    union = np.count_nonzero((predicted_band | true_band) & counted)
    # nothing to count: all outlines are cut in both, so the regions are equal
    return np.count_nonzero(predicted_band & true_band & counted) / union if union else 1.0


def _rims(predicted: Mask, true: Mask, ignored: Mask, kernel: NDArray[np.uint8]) -> tuple[Mask, Mask, Mask]:
    """Pixels of each region from which the kernel reaches out of it; and which pixels are counted.

    Not counted are those in both rims from which it only reaches ignored pixels.
    """
    predicted_rim, true_rim = predicted & ~_eroded(predicted, kernel), true & ~_eroded(true, kernel)
    cut_in_both = predicted_rim & true_rim & _eroded(predicted | ignored, kernel) & _eroded(true | ignored, kernel)
    return predicted_rim, true_rim, ~cut_in_both


def _eroded(mask: Mask, kernel: NDArray[np.uint8]) -> Mask:
    eroded: NDArray[np.uint8] = cv2.erode(mask.astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return eroded.astype(np.bool_)


def _distances(sources: Mask, targets: Mask) -> Scores:
    """Euclidean distance in pixels from each source to the nearest target, of which there is one at least."""
    everywhere: NDArray[np.float32] = cv2.distanceTransform(
        (~targets).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE
    )
    # the square of a distance in pixels is a whole number: this takes the error of float32 away
    squares = np.rint(everywhere[sources].astype(np.float64) ** 2)
    return np.asarray(np.sqrt(squares))


def _hd95(distances: Sequence[Scores]) -> float:
    """The larger of the 95th percentiles, linearly interpolated; 0 without a distance."""
    return max((float(np.percentile(directed, 95)) for directed in distances if directed.size), default=0.0)


def _share_within(tolerance: float, distances: Sequence[Scores]) -> float:
    """Share of all distances that are within the tolerance; 1 without a distance."""
    within = np.concatenate(distances) <= tolerance * (1 + 1e-9)  # 3 pixels of 0.1 are more than 0.3 in floats
    return float(within.mean()) if within.size else 1.0


def _counts(scores: Sequence[BoundaryScores]) -> list[ClassCounts]:
    images = np.sum([~np.isnan(image.hd95) for image in scores], axis=0)
    missed = Counter(index for image in scores for index in image.missed)
    invented = Counter(index for image in scores for index in image.invented)
    return [
        ClassCounts(images=int(number), missed=missed[index], invented=invented[index])
        for index, number in enumerate(images)
    ]


def _plain(score: float) -> float | None:
    return None if np.isnan(score) else float(score)
