"""The geometric steps, as functions of plain numbers. Next to read: `geometry.py`, which composes them.

Coordinates are (x, y) in pixels; (0, 0) is the centre of the first pixel: an image of width w spans -0.5 to w - 0.5.
Maps are inverse: they say where a pixel of the output comes from. Sizes are (height, width).
"""

from math import ceil, cos, radians, sin, tan
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from ml_src.core.transforms.source import Size

Matrix = NDArray[np.float64]  # (3, 3), acts on columns (x, y, 1); the result is divided by its third coordinate

CELLS_PER_SIGMA = 3  # of the elastic noise grid: bilinear enlargement then keeps 99 % of the displacement
SAMPLES_PER_CELL = 16  # of the grid distortion: straight from one to the next, it is off by 1 % of the largest at most


class Step(NamedTuple):
    """One drawn transform: the size of its output, and where each pixel of it comes from on the canvas before.

    A point p comes from matrix @ p, or, where a displacement (grid height, grid width, 2) is given, from p plus the
    displacement in pixels (x, y), which is interpolated from a grid that spans the canvas.
    """

    size: Size
    matrix: Matrix
    displacement: NDArray[np.float32] | None = None


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


def transpose(size: Size) -> Step:
    """Return the step that swaps rows and columns, of the canvas too."""
    return Step((size[1], size[0]), np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]]))


def quarter_turns(size: Size, turns: int) -> Step:
    """Return the step that turns picture and canvas counter-clockwise by 0, 1, 2 or 3 times 90 degrees."""
    mirrored = mirror(size, horizontal=turns in (1, 2), vertical=turns in (2, 3))
    if turns % 2 == 0:
        return mirrored
    transposed = transpose(size)
    return Step(transposed.size, mirrored.matrix @ transposed.matrix)


def rotate(size: Size, degrees: float) -> Step:
    """Return the step that turns the picture counter-clockwise about the centre of its canvas, which keeps its size."""
    c, s = cos(radians(degrees)), sin(radians(degrees))
    x, y = (size[1] - 1) / 2, (size[0] - 1) / 2
    return Step(size, np.array([[c, -s, x - c * x + s * y], [s, c, y - s * x - c * y], [0, 0, 1]]))


def zoom(size: Size, factor: float) -> Step:
    """Return the step that enlarges the picture about the centre of its canvas, which keeps its size."""
    width, height = size[1] / factor, size[0] / factor
    return window((size[1] - width) / 2, (size[0] - height) / 2, width, height, size)


def shift(size: Size, right: int, down: int) -> Step:
    """Return the step that moves the picture by whole pixels on its canvas."""
    return Step(size, np.array([[1.0, 0, -right], [0, 1, -down], [0, 0, 1]]))


def shear(size: Size, degrees: float, upright: bool) -> Step:
    """Return the step that slants the picture about the centre of its canvas, which keeps its size.

    Columns lean to the right by `degrees`; or, if `upright`, they stay so, and rows rise to the right by `degrees`.
    """
    slope, x, y = tan(radians(degrees)), (size[1] - 1) / 2, (size[0] - 1) / 2
    if upright:
        return Step(size, np.array([[1, 0, 0], [slope, 1, -slope * x], [0, 0, 1]]))
    return Step(size, np.array([[1, slope, -slope * y], [0, 1, 0], [0, 0, 1]]))


def perspective(size: Size, inwards: NDArray[np.float64]) -> Step:
    """Return the step that moves the corners of the picture inwards on its canvas, which keeps its size.

    Args:
        size: of the canvas.
        inwards: (4, 2), by how many pixels along x and y: top left, top right, bottom right, bottom left.
    """
    (height, width), signs = size, np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]]) - 0.5
    moved = (corners + signs * inwards).astype(np.float32)
    matrix = cv2.getPerspectiveTransform(moved, corners.astype(np.float32))
    third = matrix[2] @ ((width - 1) / 2, (height - 1) / 2, 1)
    return Step(size, matrix / third)  # then it is 1 at the centre, less where farther away, and 0 at the horizon


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


def move_crossings(size: Size, moves: NDArray[np.float64]) -> Step:
    """Return the step that displaces the crossings of a grid of equal cells which spans the canvas.

    Args:
        size: of the canvas.
        moves: (rows + 1, columns + 1, 2), where each crossing comes from: so many cells to the right and down.

    Between the crossings the displacement is blended along x and along y by smoothstep, 3 t^2 - 2 t^3 for a share t
    of the cell: there are no kinks. If no move is longer than a quarter of a cell along x or along y, nothing folds:
    blended so, displacements whose ends lie in -a to a have slopes along x and y whose absolute values sum up to
    3.97 a at most, and below 1 the determinant of the Jacobian, (1 + p)(1 + s) - q r, is positive.
    """
    blends, cells = [], []
    for length, crossings in zip(size, moves.shape[:2], strict=True):
        samples = min(SAMPLES_PER_CELL * (crossings - 1), length)
        place = (np.arange(samples) + 0.5) * (crossings - 1) / samples  # of a sample, in cells
        share = np.clip(1 - np.abs(place[:, None] - np.arange(crossings)), 0, 1)  # of each crossing, if straight
        blends.append(share**2 * (3 - 2 * share))  # (samples, crossings)
        cells.append(length / (crossings - 1))
    pixels = moves * (cells[1], cells[0])
    displacement = np.einsum("yi,xj,ijk->yxk", *blends, pixels, optimize=True)
    return Step(size, np.eye(3), np.ascontiguousarray(displacement, dtype=np.float32))
