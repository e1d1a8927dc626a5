"""One confusion matrix over a whole data set; IoU, Dice and accuracy are pure functions of it. Next: `core/tasks/`.

Averages of per-batch or per-image scores would depend on the batch size or weigh small images as much as large ones;
counts only add up.
"""

from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Matrix = NDArray[np.int64]
Scores = NDArray[np.float64]


class ConfusionMatrix:
    """Pixel counts per pair of true and predicted class, summed over any number of updates.

    Args:
        num_classes: C; labels run from 0 to C - 1.
        ignore_index: the truth value that is left out; may be one of the classes.
    """

    def __init__(self, num_classes: int, ignore_index: int | None) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts: Any = np.zeros(num_classes**2, np.int64)  # or a tensor, where tensors are counted

    def update(self, labels: "Tensor | NDArray[np.integer]", masks: "Tensor | NDArray[np.integer]") -> None:
        """Count predicted labels against the true masks.

        Counting happens where `labels` lie; the result stays there until `matrix` is read.

        Shape: two integer arrays, or two tensors, of one shape, whatever it is.
        Raises: ValueError if the shapes differ, or a label or mask value lies outside 0..C-1 (and a mask value is not
            ignore_index).
        """
        if labels.shape != masks.shape:
            raise ValueError(f"labels {tuple(labels.shape)} and masks {tuple(masks.shape)} differ in shape")
        library, predicted, true = _flat_int64(labels, masks)
        size = self.num_classes
        known = _inside(true, size) & _inside(predicted, size)
        cells = library.where(known, true * size + predicted, -1)
        if self.ignore_index is not None:
            cells = library.where(true == self.ignore_index, size**2, cells)  # one cell more, cut off below
        try:
            counts = library.bincount(cells, minlength=size**2 + 1)
        except (RuntimeError, ValueError):  # it refuses -1; to look for one before would be a second wait for the GPU
            self._name_outsider(predicted, true)
            raise
        before = self.counts if library is np else library.as_tensor(self.counts, device=counts.device)
        self.counts = before + counts[: size**2]

    @property
    def matrix(self) -> Matrix:
        """The counts, (C, C) int64; rows are truth, columns prediction."""
        counts = self.counts if isinstance(self.counts, np.ndarray) else self.counts.cpu().numpy()
        matrix: Matrix = counts.reshape(self.num_classes, self.num_classes).copy()
        return matrix

    def _name_outsider(self, predicted: Any, true: Any) -> None:
        """Raise the ValueError that names the first value outside the classes, if there is one."""
        for name, values in (("mask", true), ("label", predicted)):
            outside = ~_inside(values, self.num_classes)
            if self.ignore_index is not None:
                outside &= true != self.ignore_index
            if outside.any():
                raise ValueError(
                    f"{name} value {int(values[outside][0])} is no class (0 to {self.num_classes - 1}) "
                    f"and not ignore_index ({self.ignore_index})"
                )


def _flat_int64(labels: Any, masks: Any) -> tuple[Any, Any, Any]:
    """The library that counts, torch only where its tensors are counted, and both as (n,) int64 of it."""
    if isinstance(labels, np.ndarray):
        return np, labels.ravel().astype(np.int64), np.asarray(masks).ravel().astype(np.int64)
    import torch

    return torch, labels.flatten().long(), torch.as_tensor(masks, device=labels.device).flatten().long()


def _inside(values: Any, num_classes: int) -> Any:
    return (values >= 0) & (values < num_classes)


def iou(matrix: Matrix, ignore_index: int | None = None) -> Scores:
    """Intersection over union of each class, true positives / (true + predicted - true positives).

    Shape: matrix (C, C). Returns (C,) in [0, 1]; nan for the class ignore_index and for a class that is absent from
        both truth and prediction.
    """
    hits, true, predicted = _margins(matrix)
    return _without(_ratio(hits, true + predicted - hits), ignore_index)


def dice(matrix: Matrix, ignore_index: int | None = None) -> Scores:
    """Dice score (F1) of each class, 2 * true positives / (true + predicted), which is 2 IoU / (1 + IoU).

    Shape: matrix (C, C). Returns (C,) in [0, 1]; nan where `iou` is.
    """
    hits, true, predicted = _margins(matrix)
    return _without(_ratio(2 * hits, true + predicted), ignore_index)


def class_accuracy(matrix: Matrix, ignore_index: int | None = None) -> Scores:
    """Share of each class's true pixels that are predicted as it (recall).

    Shape: matrix (C, C). Returns (C,) in [0, 1]; nan for the class ignore_index and for a class absent from the truth.
    """
    hits, true, _ = _margins(matrix)
    return _without(_ratio(hits, true), ignore_index)


def pixel_accuracy(matrix: Matrix) -> float:
    """Share of all counted pixels that are right, in [0, 1]; nan where none was counted."""
    return float(_ratio(np.trace(matrix), matrix.sum()))


def mean_over_present(values: Scores) -> float:
    """Mean over the classes that have a score, which those absent from the data do not; nan where none has."""
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")


def absent_classes(matrix: Matrix, ignore_index: int | None = None) -> list[int]:
    """Return the classes that occur in neither truth nor prediction, the class ignore_index not among them."""
    _, true, predicted = _margins(matrix)
    return [int(index) for index in np.flatnonzero(true + predicted == 0) if index != ignore_index]


class Summary(TypedDict):
    """All scores of one confusion matrix as plain Python values: for JSON files and for checkpoints."""

    iou: float
    """Mean over the classes present in truth or prediction; nan where there is none, as in `dice`."""
    dice: float
    """Mean over the same classes."""
    pixel_accuracy: float
    """Over all pixels."""
    iou_per_class: list[float | None]
    """None for a class without a score, as in the next two."""
    dice_per_class: list[float | None]
    accuracy_per_class: list[float | None]
    absent_classes: list[int]
    """What the means leave out, the class ignore_index excepted."""


def summarize(matrix: Matrix, ignore_index: int | None = None) -> Summary:
    """Return every score of a confusion matrix (C, C); ignore_index is left out of all lists and means."""
    iou_scores, dice_scores = iou(matrix, ignore_index), dice(matrix, ignore_index)
    return Summary(
        iou=mean_over_present(iou_scores),
        dice=mean_over_present(dice_scores),
        pixel_accuracy=pixel_accuracy(matrix),
        iou_per_class=_plain(iou_scores),
        dice_per_class=_plain(dice_scores),
        accuracy_per_class=_plain(class_accuracy(matrix, ignore_index)),
        absent_classes=absent_classes(matrix, ignore_index),
    )


def _margins(matrix: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Pixels of each class that are right, that are true and that are predicted, each (C,)."""
    return np.diagonal(matrix), matrix.sum(axis=1), matrix.sum(axis=0)


def _ratio(numerators: Matrix | np.int64, denominators: Matrix | np.int64) -> Scores:
    """Divide, with nan for 0 / 0."""
    with np.errstate(invalid="ignore"):
        return np.asarray(numerators / denominators, dtype=np.float64)


def _without(scores: Scores, ignore_index: int | None) -> Scores:
    """Scores with nan at the class that is ignored, if it is one."""
    if ignore_index is not None and ignore_index < len(scores):
        scores[ignore_index] = np.nan
    return scores


def _plain(scores: Scores) -> list[float | None]:
    return [None if np.isnan(score) else float(score) for score in scores]
