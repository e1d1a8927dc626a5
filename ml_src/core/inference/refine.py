"""Borders between classes, moved to edges of the image. Next to read: `postprocess.py`, which applies it.

The field calls such a step CRF refinement, after the dense CRF of Krähenbühl and Koltun (2011). No library for Python
that is still maintained has one (pydensecrf no longer is), so this is another edge-aware filter: the guided filter of
He, Sun and Tang (ECCV 2010, TPAMI 2013) smooths the one-hot planes of the label map as the image suggests, and each
pixel takes the class of the largest.

Sums over windows are sums of whole numbers, which are exact: so a result does not depend on how a map is cut.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from ml_src.core.inference.components import Bools, rows_around
from ml_src.core.inference.planes import Plane
from ml_src.core.postprocess_specs import Crf

Guide = Callable[[int, int], NDArray[Any]]
"""From (top, bottom) to these rows of the image, (n, W, channels) of any number type."""
Labels = NDArray[Any]  # (n, W), uint8 or uint16
Levels = NDArray[np.uint8]  # (n, W, channels), 0 to WHITE
Floats = NDArray[np.float64]

WHITE = 255
TILE = 128  # columns that are refined at once: a pixel needs many numbers
FIXED = 2.0**24  # slopes are below 1 a level: a sum over a window of such whole numbers stays below 2 ** 53


def refine_map(plane: Plane, step: Crf, num_classes: int, nodata: int | None, guide: Guide) -> Plane:
    """Return a label map (H, W) whose borders between classes lie at edges of the image.

    A pixel changes only to a class that is within `step.radius` of it (in rows and in columns). Pixels without data,
    or of a class that takes no part, neither change nor count. uint8 images guide by their values, all others by
    values that are stretched: per channel, mean - 2 std becomes black and mean + 2 std white.
    """
    classes = sorted(step.classes or range(num_classes))
    takes_part = np.isin(np.arange(np.iinfo(plane.dtype).max + 1), classes)
    if nodata is not None:
        takes_part[nodata] = False
    stretch = _Stretch.of(plane, takes_part, guide)
    refined = Plane(plane.shape, plane.dtype, plane.folder)
    for top, bottom in plane.bands():
        rows, inner = rows_around(plane, top, bottom, 2 * step.radius)
        inside, start = takes_part[rows], top - inner.start
        if _is_mixed(rows, inside):
            levels, there = stretch.levels(guide(start, start + len(rows)))
            rows = _refine_tiles(rows, levels, inside & there, classes, step)
        refined.put(top, rows[inner])
    return refined


def _is_mixed(labels: Labels, inside: Bools) -> bool:
    """Whether more than one class takes part."""
    found = labels[inside]
    return bool(len(found) and found.min() < found.max())


class _Stretch(NamedTuple):
    """How pixels become levels: (pixels - low) * scale per channel; None for uint8, which are levels."""

    low: NDArray[np.float32] | None
    scale: NDArray[np.float32] | None

    @classmethod
    def of(cls, plane: Plane, takes_part: Bools, guide: Guide) -> "_Stretch":
        """Measure an image where classes take part."""
        first = guide(0, 1)
        if first.dtype == np.uint8:
            return cls(None, None)
        count, sums, squares = 0, np.zeros(first.shape[2]), np.zeros(first.shape[2])
        for top, bottom in plane.bands():
            for labels, pixels in zip(plane.rows(top, bottom), guide(top, bottom), strict=True):
                # row by row: a sum of floats depends on how it is grouped, and must not on the bands
                counted = pixels[takes_part[labels] & np.isfinite(pixels).all(axis=1)].astype(np.float64)  # (m, C)
                count, sums, squares = count + len(counted), sums + counted.sum(0), squares + (counted**2).sum(0)
        mean = sums / max(1, count)
        std = np.sqrt(np.maximum(squares / max(1, count) - mean**2, 0))
        scale = np.divide(WHITE, 4 * std, out=np.zeros_like(std), where=std > 0)
        return cls((mean - 2 * std).astype(np.float32), scale.astype(np.float32))

    def levels(self, pixels: NDArray[Any]) -> tuple[Levels, Bools | np.bool_]:
        """Return the levels of some rows (n, W, C), and where all channels are numbers."""
        if self.low is None or self.scale is None:
            return pixels, np.True_
        there = np.isfinite(pixels)
        levels = (np.where(there, pixels, 0).astype(np.float32) - self.low) * self.scale
        return np.clip(np.rint(levels), 0, WHITE).astype(np.uint8), np.asarray(there.all(axis=2))


def _refine_tiles(labels: Labels, levels: Levels, inside: Bools, classes: Sequence[int], step: Crf) -> Labels:
    """As `refine`, for rows of any width."""
    refined, margin = np.empty_like(labels), 2 * step.radius
    for left in range(0, labels.shape[1], TILE):
        start = max(0, left - margin)
        tile = np.s_[:, start : left + TILE + margin]
        new = refine(labels[tile], levels[tile], inside[tile], classes, step.radius, step.eps)
        refined[:, left : left + TILE] = new[:, left - start : left - start + TILE]
    return refined


def refine(
    labels: Labels, levels: Levels, inside: Bools, classes: Sequence[int], radius: int, eps: float
) -> NDArray[Any]:
    """Filter the one-hot planes of some classes as the image suggests, and take the largest.

    Args:
        labels: (n, W).
        levels: the image, (n, W, C), 0 to WHITE.
        inside: (n, W), pixels of these classes that take part; only they count in a window.
        classes: in rising order; those of all pixels inside.
        radius: windows are of 2 * radius + 1 pixels a side.
        eps: variance of the full range as 1, above which something is an edge.
    """
    one_hot = {c: ((labels == c) & inside).view(np.uint8) for c in np.flatnonzero(np.bincount(labels[inside]))}
    near = {c: _window_sums(mask, radius) for c, mask in one_hot.items()}
    counts = _window_sums(inside.view(np.uint8), radius)
    movable = inside & ~np.logical_or.reduce([of_class == counts for of_class in near.values()])
    if not movable.any():
        return labels
    model = _LocalModels(levels, inside, counts, movable, radius, eps * WHITE**2)
    best, rest = np.full(len(model.targets), -np.inf), model.total
    chosen, refined = labels.ravel()[model.targets], labels.copy()
    for c, mask in one_hot.items():
        share = rest if c == classes[-1] else model.smooth(mask, near[c])  # the planes sum to 1
        better = (share > best) & (near[c].ravel()[model.targets] > 0)
        best[better], chosen[better] = share[better], c
        rest = rest - share
    refined[movable] = chosen
    return refined


class _LocalModels:
    """In the window of each pixel, a linear function of the levels that fits a plane best; a pixel takes their mean.

    Args:
        levels: the image, (n, W, C), 0 to WHITE.
        inside: (n, W), the pixels that count in a window.
        counts: (n, W), how many these are in the window of each pixel.
        movable: (n, W), the pixels for which the mean is asked; all lie inside.
        radius: windows are of 2 * radius + 1 pixels a side.
        eps: added to the variance of each channel.
    """

    def __init__(
        self, levels: Levels, inside: Bools, counts: NDArray[np.int32], movable: Bools, radius: int, eps: float
    ) -> None:
        window = np.ones((2 * radius + 1, 2 * radius + 1), np.uint8)
        self._radius, self._shape = radius, inside.shape
        self._levels = [np.where(inside, levels[:, :, channel], 0) for channel in range(levels.shape[2])]
        self._sources = np.flatnonzero(cv2.dilate(movable.view(np.uint8), window) & inside)  # whose models are needed
        self.targets = np.flatnonzero(movable)
        self._weight, self.total = 1 / np.take(counts, self._sources), FIXED * np.take(counts, self.targets)
        self._means = [self._mean(level) for level in self._levels]
        covariances = [
            [self._covariance(i, j) + (eps if i == j else 0) for j in range(i + 1)] for i in range(len(self._levels))
        ]
        self._factors = _factorize(covariances)

    def smooth(self, mask: NDArray[np.uint8], sums: NDArray[np.int32]) -> Floats:
        """Return `total` times what a plane (n, W) of 0 and 1, with its sums over windows, becomes at the targets."""
        mean = np.take(sums, self._sources) * self._weight
        cross = [self._mean(level * mask) - m * mean for level, m in zip(self._levels, self._means, strict=True)]
        slopes = _solve(self._factors, cross)
        offset = mean - sum(slope * m for slope, m in zip(slopes, self._means, strict=True))
        result = self._spread(offset)
        for slope, level in zip(slopes, self._levels, strict=True):
            result += self._spread(slope) * np.take(level, self.targets)
        return result

    def _mean(self, plane: NDArray[Any]) -> Floats:
        means: Floats = np.take(_window_sums(plane, self._radius), self._sources) * self._weight
        return means

    def _covariance(self, i: int, j: int) -> Floats:
        products = np.multiply(self._levels[i], self._levels[j], dtype=np.uint16)
        return self._mean(products) - self._means[i] * self._means[j]

    def _spread(self, values: Floats) -> Floats:
        """Sum over the window of each target what its sources say, as whole numbers."""
        plane = np.zeros(self._shape)
        plane.ravel()[self._sources] = np.rint(values * FIXED)
        sums: Floats = np.take(_window_sums(plane, self._radius), self.targets)
        return sums


def _window_sums(plane: NDArray[Any], radius: int) -> NDArray[Any]:
    """Sum whole numbers (n, W) over the window around each pixel: int32 of unsigned, float64 of float64. Exact."""
    depth = cv2.CV_32S if plane.dtype.kind == "u" else cv2.CV_64F
    size = (2 * radius + 1, 2 * radius + 1)
    sums: NDArray[Any] = cv2.boxFilter(plane, depth, size, normalize=False, borderType=cv2.BORDER_CONSTANT)
    return sums


def _factorize(lower: list[list[Floats]]) -> list[list[Floats]]:
    """Turn the lower half of symmetric positive matrices into their factors L D L^T: D on the diagonal, L below."""
    size = len(lower)
    for i in range(size):
        for j in range(i + 1, size):
            ratio = lower[j][i] / lower[i][i]
            for k in range(j, size):
                lower[k][j] = lower[k][j] - ratio * lower[k][i]
            lower[j][i] = ratio
    return lower


def _solve(factors: list[list[Floats]], right: list[Floats]) -> list[Floats]:
    """Solve the systems whose matrices `_factorize` has factored, for all pixels at once."""
    solution = list(right)
    for i in range(len(right)):
        for j in range(i):
            solution[i] = solution[i] - factors[i][j] * solution[j]
    for i in reversed(range(len(right))):
        solution[i] = solution[i] / factors[i][i]
        for j in range(i + 1, len(right)):
            solution[i] = solution[i] - factors[j][i] * solution[j]
    return solution
