"""What a sample is made from: an image and its mask, whole or by windows. Next to read: `geometry.py`.

A large scene on disk is a `Source` that reads windows; `Arrays` is the one for what is already in memory.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Size = tuple[int, int]  # height, width
Image = NDArray[Any]  # (H, W, C), uint8, uint16, int16 or float32
Mask = NDArray[Any]  # (H, W), uint8 or uint16


class Window(NamedTuple):
    """A rectangle of whole pixels of the source."""

    top: int
    left: int
    height: int
    width: int


class Source(Protocol):
    """An image and perhaps a mask of the same size."""

    @property
    def size(self) -> Size:
        """Height and width in pixels."""

    @property
    def windowed(self) -> bool:
        """Whether a window is read faster than the whole; if not, `read` is asked for all."""

    def read(self, window: Window | None) -> tuple[Image, Mask | None]:
        """Return image (h, w, C) and mask (h, w) of a window that lies inside the source; None is the whole."""

    def find(self, value: int, rng: Generator) -> tuple[int, int] | None:
        """Return (row, column) of a pixel drawn uniformly from those whose mask has this value.

        None where no pixel has it or there is no mask. Called only for `random_crop` with classes.
        """


class Arrays:
    """The source of an image (H, W, C) and a mask (H, W), or None, in memory."""

    windowed = False

    def __init__(self, image: Image, mask: Mask | None = None):
        self.image, self.mask = image, mask

    @property
    def size(self) -> Size:
        """Height and width in pixels."""
        return self.image.shape[0], self.image.shape[1]

    def read(self, window: Window | None) -> tuple[Image, Mask | None]:
        """Return the arrays themselves, or views of them."""
        if window is None:
            return self.image, self.mask
        rows = slice(window.top, window.top + window.height)
        columns = slice(window.left, window.left + window.width)
        return self.image[rows, columns], None if self.mask is None else self.mask[rows, columns]

    def find(self, value: int, rng: Generator) -> tuple[int, int] | None:
        """Return (row, column) of a pixel drawn uniformly from those whose mask has this value, or None."""
        if self.mask is None:
            return None
        places = np.flatnonzero(self.mask == value)
        if places.size == 0:
            return None
        row, column = divmod(int(places[rng.integers(places.size)]), self.mask.shape[1])
        return row, column
