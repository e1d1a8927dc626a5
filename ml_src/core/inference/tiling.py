"""An image cut into overlapping tiles, and their predictions blended again. Next to read: `predictor.py`.

Tiles begin at multiples of 32 pixels, so that what a network pools together in a tile it also pools together in the
whole image. Their weights are products of one for the row and one for the column, which sum to 1 at every pixel.
"""

from collections.abc import Callable, Iterator
from math import ceil
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from ml_src.core.transforms.source import Size, Window

ALIGN = 32  # pixels: a network that halves its image five times still sees the same blocks
SIGMA = 1 / 8  # of the Gaussian, in tiles: at the edge of a tile its weight is 0.0003 (nnU-Net, Isensee et al. 2021)

Profile = Callable[[NDArray[np.float64]], NDArray[np.float64]]
PROFILES: dict[str, Profile] = {
    "gaussian": lambda place: np.exp(-0.5 * ((place - 0.5) / SIGMA) ** 2),
    "cosine": lambda place: np.sin(np.pi * place) ** 2,
}
"""Word -> weight of a pixel by its place in the tile, 0 to 1."""


class Part(NamedTuple):
    """From the first pixel of a tile to the one behind its last, along one axis."""

    start: int
    stop: int


class Axis(NamedTuple):
    """The tiles along one axis and the weight of each of their pixels."""

    parts: list[Part]
    weights: list[NDArray[np.float32]]


class Grid:
    """The tiles of an image.

    Args:
        size: height and width of the image.
        tile: height and width of a tile, multiples of 32; the last one of a row or column is cut off by the edge.
        overlap: share of a tile's side that the next one covers too, 0 to 0.9.
        profile: how weights fall towards the edges of a tile: a word of PROFILES.
    """

    def __init__(self, size: Size, tile: Size, overlap: float, profile: str = "gaussian") -> None:
        self.size = size
        self.rows, self.columns = (_axis(*each, overlap, PROFILES[profile]) for each in zip(size, tile, strict=True))

    def __len__(self) -> int:
        return len(self.rows.parts) * len(self.columns.parts)

    def window(self, row: int, column: int) -> Window:
        """Where a tile lies."""
        (top, bottom), (left, right) = self.rows.parts[row], self.columns.parts[column]
        return Window(top, left, bottom - top, right - left)


def _axis(length: int, tile: int, overlap: float, profile: Profile) -> Axis:
    parts = _parts(length, tile, overlap)
    totals = np.zeros(length)
    shapes = []
    for start, stop in parts:
        shapes.append(profile((np.arange(stop - start) + 0.5) / tile))
        totals[start:stop] += shapes[-1]
    weights = [
        (shape / totals[start:stop]).astype(np.float32) for shape, (start, stop) in zip(shapes, parts, strict=True)
    ]
    return Axis(parts, weights)


def _parts(length: int, tile: int, overlap: float) -> list[Part]:
    if length <= tile:
        return [Part(0, length)]
    step = max(ALIGN, int(tile * (1 - overlap)) // ALIGN * ALIGN)
    last = ceil((length - tile) / ALIGN) * ALIGN
    return [Part(start, start + tile) for start in range(0, last, step)] + [Part(last, length)]


class Blender:
    """Adds up the tiles of one image, a row of tiles after the other; of the image it holds one such row.

    The rows of pixels are kept in a ring, so that nothing as wide as the image is ever copied.
    """

    def __init__(self, grid: Grid, num_channels: int) -> None:
        self.grid = grid
        self._height = max(stop - start for start, stop in grid.rows.parts)
        self._sums = np.zeros((num_channels, self._height, grid.size[1]), np.float32)

    def add(self, row: int, column: int, values: NDArray[np.float32]) -> None:
        """Add the values (K, h, w) of a tile."""
        (top, bottom), (left, right) = self.grid.rows.parts[row], self.grid.columns.parts[column]
        weighted = values * (self.grid.rows.weights[row][:, None] * self.grid.columns.weights[column])
        for start, stop in self._pieces(top, bottom):
            place = start % self._height
            self._sums[:, place : place + stop - start, left:right] += weighted[:, start - top : stop - top]

    def finished(self, row: int, most: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """After the last tile of a row: yield (top, values (K, n, W)) of the pixels that no later tile meets.

        At most `most` rows at a time. The values are good until the next are asked for.
        """
        parts = self.grid.rows.parts
        bottom = parts[row + 1].start if row + 1 < len(parts) else self.grid.size[0]
        for start, stop in self._pieces(parts[row].start, bottom):
            for top in range(start, stop, most):
                place = top % self._height
                done = self._sums[:, place : place + min(most, stop - top)]
                yield top, done
                done[:] = 0

    def _pieces(self, top: int, bottom: int) -> Iterator[Part]:
        """Cut rows where the ring begins again."""
        end = (top // self._height + 1) * self._height
        yield Part(top, min(end, bottom))
        if end < bottom:
            yield Part(end, bottom)


def enlarged(canvas: NDArray[np.float32], size: Size, top: int, bottom: int) -> NDArray[np.float32]:
    """Rows top to bottom of a canvas (K, h, w) brought to `size` (H, W) by bilinear interpolation: (K, n, W).

    The same values as of the whole, its edges repeated (torch's `interpolate` without aligned corners).
    """
    places = (np.arange(top, bottom) + 0.5) * (canvas.shape[1] / size[0]) - 0.5
    places = places.clip(0, canvas.shape[1] - 1)
    low = places.astype(np.intp)
    high = np.minimum(low + 1, canvas.shape[1] - 1)
    shares = (places - low).astype(np.float32)[:, None]
    rows = canvas[:, low]  # (K, n, w)
    rows += shares * (canvas[:, high] - rows)
    if size[1] == canvas.shape[2]:
        return rows
    return np.stack([cv2.resize(plane, (size[1], bottom - top), interpolation=cv2.INTER_LINEAR) for plane in rows])
