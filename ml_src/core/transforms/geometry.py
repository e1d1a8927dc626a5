"""Every step of a list is composed into one map, so that image and mask are sampled once each.

`trace` chains the steps and `resample` samples; `steps.py` says what a step is, and which coordinates are meant. Next
to read: `geometric.py`, the transforms that draw the steps.
"""

from collections.abc import Callable, Sequence
from math import ceil, floor, inf
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ml_src.core.errors import DataError
from ml_src.core.transforms.source import Image, Mask, Size, Source, Window
from ml_src.core.transforms.steps import Matrix, Step, shift, window

Points = NDArray[np.float32]  # (H, W, 2), x and y
Blocks = tuple[int, int]  # height, width in pixels of what is averaged before it is sampled

NODES_PER_SIDE = 128  # of a view in perspective: straight from node to node, it is off by less than 0.1 pixels
HORIZON = 1e-3  # of the third coordinate, which is 1 at the centre of the canvas and 0 infinitely far away
REACH = 4  # canvas sides beyond the canvas: what a view in perspective shows from farther away, it shows from there
INVERSIONS = 10  # steps of a fixed point, each nearer by the slope of the displacement
CHANNELS_AT_ONCE = 4  # more than these, OpenCV takes only in some functions and versions
# From output pixels to points a thousandth of a pixel before them. Halfway between two pixels of a mask, OpenCV takes
# the even one, which in a window is another one than in the whole.
HAIR = np.array([[1, 0, -1e-3], [0, 1, -1e-3], [0, 0, 1]])
EXACT = 1e-9  # a map that is so near to whole pixels is meant to be: the rest is rounding, in 20 000 pixels too


def trace(steps: Sequence[Step], size: Size) -> tuple[Matrix, Points | None]:
    """Follow the pixels of the last step's output back to the source image.

    Args:
        steps: in the order in which they act.
        size: of the last step's output.

    Returns: the product of all matrices; and, where a step deforms or is in perspective, the source coordinates
        (H, W, 2) of every pixel. Those are computed for one node in a square of pixels and interpolated, as no
        displacement is finer than that.
    """
    matrix, every = np.eye(3), inf
    for step in reversed(steps):
        if step.displacement is not None:
            rows, columns = step.displacement.shape[:2]
            cell = min(step.size[0] / rows, step.size[1] / columns)
            every = min(every, cell / max(_spans(matrix, size, step.size)))
        elif not _is_affine(step.matrix):
            every = min(every, min(size) / NODES_PER_SIDE)
        matrix = step.matrix @ matrix
    if every == inf:
        return matrix, None
    every = max(1, int(every))  # pixels of the output from node to node
    rows, columns = ceil(size[0] / every) + 2, ceil(size[1] / every) + 2  # one beyond each edge
    points = _grid(window(-every, -every, columns * every, rows * every, (rows, columns)).matrix, (rows, columns))
    for step in reversed(steps):
        points = back(step, points)
    points = cv2.resize(points, (columns * every, rows * every), interpolation=cv2.INTER_LINEAR)
    return matrix, points[every : every + size[0], every : every + size[1]]


def back(step: Step, points: Points) -> Points:
    """Where points (H, W, 2) of a step's output come from on the canvas before it."""
    if step.displacement is not None:
        return points + _look_up(step.displacement, step.size, points)
    if _is_affine(step.matrix):
        return np.asarray(cv2.transform(points, step.matrix[:2]), np.float32)
    x, y, third = cv2.split(cv2.transform(points, step.matrix))
    third = np.maximum(third, HORIZON)  # what lies behind the horizon is shown from far away before it
    (height, width) = step.size
    x = np.clip(x / third, -REACH * width, (REACH + 1) * width)
    y = np.clip(y / third, -REACH * height, (REACH + 1) * height)
    return np.stack((x, y), axis=-1)


def forth(steps: Sequence[Step], row: int, column: int) -> tuple[float, float] | None:
    """Where a pixel of the source lies, (y, x), on the canvas after the steps; None if behind a horizon."""
    x, y = float(column), float(row)
    for step in steps:
        if step.displacement is None:
            x, y, third = np.linalg.solve(step.matrix, (x, y, 1.0)).tolist()
            if third <= 0:
                return None
            x, y = x / third, y / third
        else:
            target = np.array([[[x, y]]], np.float32)
            point = target
            for _ in range(INVERSIONS):
                point = target - _look_up(step.displacement, step.size, point)
            x, y = point[0, 0].tolist()
    return y, x


def resample(source: Source, steps: Sequence[Step], ignore_index: int) -> tuple[Image, Mask | None]:
    """Sample image (bilinear) and mask (nearest neighbour) once each, however many steps there are.

    The image is mirrored at its edges; the mask is `ignore_index` wherever a pixel comes from outside the source image.
    What one step pushes off the canvas and a later one brings back is still there, with its labels.
    Whole pixels that are only moved, mirrored or turned by right angles are copied, without a change. Of a source that
    is read by windows, only the rectangle that the output needs is read.

    Raises: DataError if image and mask differ in size, or the mask's dtype cannot hold ignore_index.
    """
    size = steps[-1].size if steps else source.size
    matrix, points = trace(steps, size)
    blocks = _blocks(matrix, size, source.size)
    part = _needed(matrix, points, size, source.size, blocks) if source.windowed else None
    image, mask = source.read(part)
    if mask is not None:
        _check(image, mask, ignore_index)
    if part is not None:
        matrix = shift(source.size, part.left, part.top).matrix @ matrix
        points = None if points is None else points - np.array((part.left, part.top), np.float32)
    if points is None and _is_copy(matrix, size, (image.shape[0], image.shape[1])):
        return _copy(image, matrix, size), None if mask is None else _copy(mask, matrix, size)
    if mask is not None:
        mask = _warp(mask, matrix @ HAIR, points, size, cv2.INTER_NEAREST, cv2.BORDER_CONSTANT, ignore_index)
    if blocks != (1, 1):
        image, to_reduced = _reduce(image, blocks)
        points = None if points is None else cv2.transform(points, to_reduced[:2])
        matrix = to_reduced @ matrix

    def sample(channels: NDArray[Any]) -> NDArray[Any]:
        four = channels.shape[2] == 3 and channels.dtype != np.int16
        if four:  # OpenCV samples four channels faster than three, up to twice as fast, and to the same values
            channels = cv2.cvtColor(channels, cv2.COLOR_RGB2RGBA)
        # BORDER_REFLECT mirrors at the edge of the outer pixel, so that enlarging repeats it, as cv2.resize does
        sampled = _warp(channels, matrix, points, size, cv2.INTER_LINEAR, cv2.BORDER_REFLECT, 0)
        return cv2.cvtColor(sampled, cv2.COLOR_RGBA2RGB) if four else sampled

    return by_channels(sample, image), mask


def by_channels(function: Callable[[NDArray[Any]], NDArray[Any]], image: NDArray[Any]) -> NDArray[Any]:
    """Apply an OpenCV function to an image (H, W, C) of any number of channels; the result keeps its last axis."""
    groups = [
        function(np.ascontiguousarray(image[:, :, start : start + CHANNELS_AT_ONCE]))
        for start in range(0, image.shape[2], CHANNELS_AT_ONCE)
    ]
    groups = [group[:, :, None] if group.ndim == 2 else group for group in groups]  # OpenCV drops an axis of length 1
    return groups[0] if len(groups) == 1 else np.concatenate(groups, axis=2)


def _check(image: Image, mask: Mask, ignore_index: int) -> None:
    if mask.shape != image.shape[:2]:
        raise DataError(
            f"an image of {image.shape[1]} x {image.shape[0]} pixels has a mask of shape {mask.shape}: "
            "both must have the same height and width, and the mask one channel"
        )
    if ignore_index > np.iinfo(mask.dtype).max:
        raise DataError(f"ignore_index is {ignore_index}, more than a mask of {mask.dtype} can hold: read it as uint16")


def _is_affine(matrix: Matrix) -> bool:
    return bool((matrix[2] == (0, 0, 1)).all())


def _grid(matrix: Matrix, size: Size) -> Points:
    """The coordinates (H, W, 2) that an affine `matrix` gives to every pixel of a canvas."""
    x, y = np.arange(size[1]), np.arange(size[0])[:, None]
    points = np.empty((*size, 2), np.float32)
    for axis in range(2):
        points[:, :, axis] = matrix[axis, 0] * x + (matrix[axis, 1] * y + matrix[axis, 2])
    return points


def _look_up(displacement: NDArray[np.float32], size: Size, points: Points) -> Points:
    """The displacement (H, W, 2) at points of a canvas of `size`, which the displacement's grid spans."""
    rows, columns = displacement.shape[:2]
    to_grid = window(0, 0, columns, rows, size).matrix
    at = cv2.transform(points, to_grid[:2])
    values: Points = cv2.remap(displacement, at, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return values


def _spans(matrix: Matrix, size: Size, source: Size) -> tuple[float, float]:
    """How many pixels of the source a pixel of an output of `size` spans along the source's x and along its y.

    In perspective it is the median over what the output shows of the source: nowhere in it does a pixel span much more
    than twice that, which is what bilinear sampling covers, and the largest would blur all the rest.
    """
    if _is_affine(matrix):
        return float(np.hypot(*matrix[0, :2])), float(np.hypot(*matrix[1, :2]))
    x, y = np.meshgrid(np.linspace(0, size[1] - 1, 9), np.linspace(0, size[0] - 1, 9))
    u, v, third = matrix @ (x.ravel(), y.ravel(), np.ones(x.size))
    u, v = u / np.maximum(third, HORIZON), v / np.maximum(third, HORIZON)
    seen = (third > HORIZON) & (u > -1) & (u < source[1]) & (v > -1) & (v < source[0])
    if not seen.any():
        return 1.0, 1.0
    across, down = (
        np.median(np.hypot(*(matrix[axis, :2, None] - at * matrix[2, :2, None]) / third)[seen])
        for axis, at in enumerate((u, v))
    )
    return float(across), float(down)


def _blocks(matrix: Matrix, size: Size, source: Size) -> Blocks:
    """What to average: whole pixels along the axes that shrink more than twofold; bilinear alone would skip pixels."""
    across, down = _spans(matrix, size, source)
    return min(int(down), source[0]) if down > 2 else 1, min(int(across), source[1]) if across > 2 else 1


def _reduce(image: Image, blocks: Blocks) -> tuple[Image, Matrix]:
    """Average blocks of pixels. Returns the reduced image and the map from source coordinates to its coordinates."""
    (height, width), (down, across) = image.shape[:2], blocks
    rows, columns = ceil(height / down), ceil(width / across)
    bottom, right = rows * down - height, columns * across - width  # filled up to whole blocks

    def average(channels: NDArray[Any]) -> NDArray[Any]:
        filled = cv2.copyMakeBorder(channels, 0, bottom, 0, right, cv2.BORDER_REFLECT)
        averaged: NDArray[Any] = cv2.resize(filled, (columns, rows), interpolation=cv2.INTER_AREA)
        return averaged

    return by_channels(average, image), window(0, 0, columns, rows, (rows * down, columns * across)).matrix


def _needed(matrix: Matrix, points: Points | None, size: Size, source: Size, blocks: Blocks) -> Window:
    """The rectangle of the source from which the output is sampled, what is mirrored into it included."""
    if points is None:
        right, bottom = size[1] - 1.0, size[0] - 1.0
        points = cv2.transform(np.array([[(0, 0), (right, 0), (0, bottom), (right, bottom)]]), matrix[:2])
    (left, top), (right, bottom) = points.min(axis=(0, 1)), points.max(axis=(0, 1))
    top, bottom = _interval(top, bottom, source[0], blocks[0])
    left, right = _interval(left, right, source[1], blocks[1])
    return Window(top, left, bottom - top, right - left)


def _interval(low: float, high: float, length: int, block: int) -> tuple[int, int]:
    """From where to where an axis is needed for samples between two coordinates; whole blocks, or up to the end."""
    count = ceil(length / block)
    first, last = floor((low + 0.5) / block - 0.5) - 1, ceil((high + 0.5) / block - 0.5) + 1  # bilinear: one more
    start, stop = max(first, 0), min(last + 1, count)
    if first < 0:  # seen in the mirror at the beginning: 0 to -first - 1
        stop = max(stop, min(-first, count))
    if last >= count:  # and in the one at the end
        start = min(start, max(2 * count - 1 - last, 0))
    return start * block, min(stop * block, length)


def _is_copy(matrix: Matrix, size: Size, source: Size) -> bool:
    """Whether the map only moves whole pixels, all from inside the source: one of eight symmetries, and a shift."""
    whole = np.rint(matrix)
    turn = np.abs(whole[:2, :2]).tolist()
    if np.abs(matrix - whole).max() > EXACT or turn not in ([[1, 0], [0, 1]], [[0, 1], [1, 0]]):
        return False
    corners = whole[:2] @ ((0, size[1] - 1), (0, size[0] - 1), (1, 1))
    return bool((corners >= 0).all() and (corners < [[source[1]], [source[0]]]).all())


def _copy(values: NDArray[Any], matrix: Matrix, size: Size) -> NDArray[Any]:
    """Cut (H, W) or (H, W, C) out, turned and mirrored as the matrix says; a view where it is only cut."""
    whole = np.rint(matrix).astype(int)
    corners = whole[:2] @ ((0, size[1] - 1), (0, size[0] - 1), (1, 1))
    (left, top), (right, bottom) = corners.min(axis=1), corners.max(axis=1)
    part = values[top : bottom + 1, left : right + 1]
    turned = whole[0, 0] == 0
    horizontal, vertical = whole[:2, :2].sum(axis=0) < 0

    def turn(channels: NDArray[Any]) -> NDArray[Any]:  # by OpenCV, ten times as fast as copies of NumPy's views
        channels = cv2.transpose(channels) if turned else channels
        return cv2.flip(channels, -1 if horizontal and vertical else 1 if horizontal else 0) if mirrored else channels

    mirrored = horizontal or vertical
    if not (turned or mirrored):
        return part
    return turn(part) if part.ndim == 2 else by_channels(turn, part)


def _warp(
    values: NDArray[Any],
    matrix: Matrix,
    points: Points | None,
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
