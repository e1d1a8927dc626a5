"""Every geometric transform of a list is composed into one map, so that image and mask are sampled once each.

A transform only draws a `Step`; `trace` chains the steps and `resample` samples. Next to read: `intensity.py`.

Coordinates are (x, y) in pixels; (0, 0) is the centre of the first pixel: an image of width w spans -0.5 to w - 0.5.
Maps are inverse: they say where a pixel of the output comes from. Sizes are (height, width).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import product
from math import ceil, cos, inf, radians, sin, sqrt
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from ml_src.core import transform_specs as specs

Size = tuple[int, int]
Matrix = NDArray[np.float64]  # (3, 3), acts on columns (x, y, 1)
Image = NDArray[np.uint8]  # (H, W, C)
Mask = NDArray[Any]  # (H, W), uint8 or uint16

CELLS_PER_SIGMA = 3  # of the elastic noise grid: bilinear enlargement then keeps 99 % of the displacement
CHANNELS_AT_ONCE = 4  # more than these, OpenCV takes only in some functions and versions


class Step(NamedTuple):
    """One drawn transform: the size of its output, and where each pixel of it comes from on the canvas before.

    A point p comes from matrix @ p, or, where a displacement (grid height, grid width, 2) is given, from p plus the
    displacement in pixels (x, y), which is interpolated from a grid that spans the canvas.
    """

    size: Size
    matrix: Matrix
    displacement: NDArray[np.float32] | None = None


# The steps, as functions of plain numbers.


def keep(size: Size) -> Step:
    """Return the step that changes nothing."""
    return Step(size, np.eye(3))


def window(left: float, top: float, width: float, height: float, size: Size) -> Step:
    """Return the step that stretches a rectangle, given by its edges in pixels of the canvas, to `size`.

    The whole canvas is left = top = 0. An output pixel stands for an area, not a point, hence the halves.
    """
    x, y = width / size[1], height / size[0]
    return Step(size, np.array([[x, 0, left + 0.5 * x - 0.5], [0, y, top + 0.5 * y - 0.5], [0, 0, 1]]))


def mirror(size: Size, horizontal: bool, vertical: bool) -> Step:
    """Return the step that swaps left and right, top and bottom, both or nothing."""
    x, y = -1 if horizontal else 1, -1 if vertical else 1
    last_x, last_y = (size[1] - 1) * horizontal, (size[0] - 1) * vertical
    return Step(size, np.array([[x, 0, last_x], [0, y, last_y], [0, 0, 1]], dtype=np.float64))


def rotate(size: Size, degrees: float) -> Step:
    """Return the step that turns the picture counter-clockwise about the centre of its canvas, which keeps its size."""
    c, s = cos(radians(degrees)), sin(radians(degrees))
    x, y = (size[1] - 1) / 2, (size[0] - 1) / 2
    return Step(size, np.array([[c, -s, x - c * x + s * y], [s, c, y - s * x - c * y], [0, 0, 1]]))


def deform(size: Size, alpha: float, sigma: float, rng: Generator) -> Step:
    """Return a smooth random deformation (Simard, Steinkraus, Platt 2003, section 2).

    Normal noise under a Gaussian of `sigma` pixels, scaled so that the root mean square length of the displacement is
    `alpha` pixels. The noise is drawn on a grid of a third of sigma: the Gaussian leaves nothing finer to see.
    """
    cell = max(1.0, sigma / CELLS_PER_SIGMA)
    rows, columns = ceil(size[0] / cell), ceil(size[1] / cell)
    margin = 3 * CELLS_PER_SIGMA  # three sigmas: the noise beyond the edge counts too, else the edges move most
    noise = rng.standard_normal((rows + 2 * margin, columns + 2 * margin, 2), dtype=np.float32)
    kernel = (2 * margin + 1, 2 * margin + 1)
    field = cv2.GaussianBlur(noise, kernel, sigmaX=sigma * columns / size[1], sigmaY=sigma * rows / size[0])
    field = field[margin:-margin, margin:-margin]
    length = np.sqrt(np.mean(np.sum(field**2, axis=2)))
    return Step(size, np.eye(3), np.ascontiguousarray(field * (alpha / length), dtype=np.float32))


# From steps to pixels.


def trace(steps: Sequence[Step], size: Size) -> tuple[Matrix, NDArray[np.float32] | None]:
    """Follow the pixels of the last step's output back to the source image.

    Args:
        steps: in the order in which they act.
        size: of the last step's output.

    Returns: the product of all matrices; and, where a step deforms, the source coordinates (H, W, 2) of every pixel.
        Those are computed for one node in a square of pixels and interpolated, as no displacement is finer than that.
    """
    matrix, every = np.eye(3), inf
    for step in reversed(steps):
        if step.displacement is not None:
            rows, columns = step.displacement.shape[:2]
            every = min(every, min(step.size[0] / rows, step.size[1] / columns) / max(_spans(matrix)))
        matrix = step.matrix @ matrix
    if every == inf:
        return matrix, None
    every = max(1, int(every))  # pixels of the output from node to node
    rows, columns = ceil(size[0] / every) + 2, ceil(size[1] / every) + 2  # one beyond each edge
    points = _grid(window(-every, -every, columns * every, rows * every, (rows, columns)).matrix, (rows, columns))
    for step in reversed(steps):
        if step.displacement is None:
            points = cv2.transform(points, step.matrix[:2])
        else:
            points = points + _look_up(step.displacement, step.size, points)
    points = cv2.resize(points, (columns * every, rows * every), interpolation=cv2.INTER_LINEAR)
    return matrix, points[every : every + size[0], every : every + size[1]]


def resample(image: Image, mask: Mask | None, steps: Sequence[Step], ignore_index: int) -> tuple[Image, Mask | None]:
    """Sample image (bilinear) and mask (nearest neighbour) once each, however many steps there are.

    The image is mirrored at its edges; the mask is `ignore_index` wherever a pixel comes from outside the source image.
    What one step pushes off the canvas and a later one brings back is still there, with its labels.
    A list that only mirrors, or does nothing, copies pixels and is exact.
    """
    source, size = (image.shape[0], image.shape[1]), steps[-1].size if steps else image.shape[:2]
    matrix, points = trace(steps, size)
    if points is None and size == source:
        for vertical, horizontal in product((False, True), repeat=2):
            if np.array_equal(matrix, mirror(size, horizontal, vertical).matrix):
                rows, columns = slice(None, None, -1 if vertical else 1), slice(None, None, -1 if horizontal else 1)
                return image[rows, columns], None if mask is None else mask[rows, columns]
    if mask is not None:
        mask = _warp(mask, matrix, points, size, cv2.INTER_NEAREST, cv2.BORDER_CONSTANT, ignore_index)
    if max(_spans(matrix)) > 2:
        image, to_reduced = _reduce(image, matrix)
        points = None if points is None else cv2.transform(points, to_reduced[:2])
        matrix = to_reduced @ matrix

    def sample(channels: NDArray[Any]) -> NDArray[Any]:
        # BORDER_REFLECT mirrors at the edge of the outer pixel, so that enlarging repeats it, as cv2.resize does
        return _warp(channels, matrix, points, size, cv2.INTER_LINEAR, cv2.BORDER_REFLECT, 0)

    return by_channels(sample, image), mask


def by_channels(function: Callable[[NDArray[Any]], NDArray[Any]], image: NDArray[Any]) -> NDArray[Any]:
    """Apply an OpenCV function to an image (H, W, C) of any number of channels; the result keeps its last axis."""
    groups = [
        function(np.ascontiguousarray(image[:, :, start : start + CHANNELS_AT_ONCE]))
        for start in range(0, image.shape[2], CHANNELS_AT_ONCE)
    ]
    groups = [group[:, :, None] if group.ndim == 2 else group for group in groups]  # OpenCV drops an axis of length 1
    return groups[0] if len(groups) == 1 else np.concatenate(groups, axis=2)


def _grid(matrix: Matrix, size: Size) -> NDArray[np.float32]:
    """The coordinates (H, W, 2) that `matrix` gives to every pixel of a canvas."""
    x, y = np.arange(size[1]), np.arange(size[0])[:, None]
    points = np.empty((*size, 2), np.float32)
    for axis in range(2):
        points[:, :, axis] = matrix[axis, 0] * x + (matrix[axis, 1] * y + matrix[axis, 2])
    return points


def _look_up(displacement: NDArray[np.float32], size: Size, points: NDArray[np.float32]) -> NDArray[np.float32]:
    """The displacement (H, W, 2) at points of a canvas of `size`, which the displacement's grid spans."""
    rows, columns = displacement.shape[:2]
    to_grid = window(0, 0, columns, rows, size).matrix
    at = cv2.transform(points, to_grid[:2])
    values: NDArray[np.float32] = cv2.remap(displacement, at, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return values


def _spans(matrix: Matrix) -> tuple[float, float]:
    """How many source pixels a pixel of the output spans along the source's x and along its y."""
    return float(np.hypot(*matrix[0, :2])), float(np.hypot(*matrix[1, :2]))


def _reduce(image: Image, matrix: Matrix) -> tuple[Image, Matrix]:
    """Average whole blocks of pixels along the axes that shrink more than twofold: bilinear alone would skip pixels.

    Returns the reduced image and the map from source coordinates to its coordinates.
    """
    height, width = image.shape[:2]
    across, down = (min(int(s), n) if s > 2 else 1 for s, n in zip(_spans(matrix), (width, height), strict=True))
    rows, columns = ceil(height / down), ceil(width / across)
    bottom, right = rows * down - height, columns * across - width  # filled up to whole blocks

    def average(channels: NDArray[Any]) -> NDArray[Any]:
        filled = cv2.copyMakeBorder(channels, 0, bottom, 0, right, cv2.BORDER_REFLECT)
        blocks: NDArray[Any] = cv2.resize(filled, (columns, rows), interpolation=cv2.INTER_AREA)
        return blocks

    return by_channels(average, image), window(0, 0, columns, rows, (rows * down, columns * across)).matrix


def _warp(
    values: NDArray[Any],
    matrix: Matrix,
    points: NDArray[np.float32] | None,
    size: Size,
    interpolation: int,
    border: int,
    outside: int,
) -> NDArray[Any]:
    """Sample (H, W) or (H, W, up to 4) at `points`, or, without them, where `matrix` maps the pixels of the output."""
    warped: NDArray[Any]
    if points is None:
        flags = interpolation | cv2.WARP_INVERSE_MAP
        warped = cv2.warpAffine(
            values, matrix[:2], (size[1], size[0]), flags=flags, borderMode=border, borderValue=outside
        )
    else:
        warped = cv2.remap(values, points, None, interpolation, borderMode=border, borderValue=outside)
    return warped


# The transforms, as the configuration names them.


class Geometric(ABC):
    """Moves pixels: image and mask alike."""

    @abstractmethod
    def draw(self, size: Size, rng: Generator, step_rng: Generator) -> Step:
        """Draw this sample's step.

        Args:
            size: of the canvas that the step acts on.
            rng: of this sample.
            step_rng: the same for all samples of a step; for what must agree in a batch.
        """


class Resize(Geometric):
    """Stretch to one size."""

    def __init__(self, spec: specs.Resize):
        self.size = spec.size

    def draw(self, size: Size, rng: Generator, step_rng: Generator) -> Step:
        return window(0, 0, size[1], size[0], self.size)


class RandomHorizontalFlip(Geometric):
    """Swap left and right, or not."""

    def __init__(self, spec: specs.RandomHorizontalFlip):
        self.p = spec.p

    def draw(self, size: Size, rng: Generator, step_rng: Generator) -> Step:
        return mirror(size, horizontal=rng.random() < self.p, vertical=False)


class RandomVerticalFlip(Geometric):
    """Swap top and bottom, or not."""

    def __init__(self, spec: specs.RandomVerticalFlip):
        self.p = spec.p

    def draw(self, size: Size, rng: Generator, step_rng: Generator) -> Step:
        return mirror(size, horizontal=False, vertical=rng.random() < self.p)


class RandomRotation(Geometric):
    """Turn about the centre by an angle between -degrees and +degrees."""

    def __init__(self, spec: specs.RandomRotation):
        self.degrees, self.p = spec.degrees, spec.p

    def draw(self, size: Size, rng: Generator, step_rng: Generator) -> Step:
        return rotate(size, rng.uniform(-self.degrees, self.degrees)) if rng.random() < self.p else keep(size)


class RandomResizeCrop(Geometric):
    """Stretch a random rectangle, or the whole canvas, to a size that is drawn once for the batch.

    The rectangle has the proportions of that size, so that nothing is distorted; it is made smaller where it would not
    fit into the canvas, and its place is uniform.
    """

    def __init__(self, spec: specs.RandomResizeCrop):
        self.sizes, self.p, self.scale = spec.sizes, spec.p, spec.scale

    def draw(self, size: Size, rng: Generator, step_rng: Generator) -> Step:
        target = self.sizes[step_rng.integers(len(self.sizes))]
        (height, width), (rows, columns) = size, target
        if rng.random() >= self.p:
            return window(0, 0, width, height, target)
        zoom = sqrt(rng.uniform(*self.scale) * height * width / (rows * columns))  # canvas pixels an output pixel spans
        zoom = min(zoom, height / rows, width / columns)
        # max: rounding may leave a room of -1e-14
        left, top = rng.uniform(0, max(0.0, width - zoom * columns)), rng.uniform(0, max(0.0, height - zoom * rows))
        return window(left, top, zoom * columns, zoom * rows, target)


class Elastic(Geometric):
    """Deform smoothly, or not."""

    def __init__(self, spec: specs.Elastic):
        self.alpha, self.sigma, self.p = spec.alpha, spec.sigma, spec.p

    def draw(self, size: Size, rng: Generator, step_rng: Generator) -> Step:
        return deform(size, self.alpha, self.sigma, rng) if rng.random() < self.p else keep(size)
