"""Arrays as large as an image, which need not fit into memory. Next to read: `predictor.py`, which fills them."""

import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

IN_MEMORY = 128 << 20  # bytes; what is larger lies in a file
BAND = 4 << 20  # pixels that are handled at once


class Plane:
    """An array (H, W) or (H, W, K) that is read and written by rows: in memory or, where it is large, in a file.

    The file has no name and goes when the plane does, also when the program is killed.

    Args:
        shape: of the array, which is zero at first.
        dtype: of its elements.
        folder: on whose disk the file lies; None is the system's folder for temporary files.
    """

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike, folder: Path | None = None) -> None:
        self.shape, self.dtype, self.folder = shape, np.dtype(dtype), folder
        self._array: NDArray[Any] | None = None
        self._file: BinaryIO | None = None
        if prod(shape) * self.dtype.itemsize <= IN_MEMORY:
            self._array = np.zeros(shape, dtype)
        else:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - it lives as long as the plane
            self._file.truncate(shape[0] * self._row_bytes)

    @classmethod
    def of(cls, array: NDArray[Any]) -> "Plane":
        """Return a plane of an array that is in memory, without a copy."""
        plane = cls((0, *array.shape[1:]), array.dtype)
        plane.shape, plane._array = array.shape, array
        return plane

    @property
    def in_memory(self) -> bool:
        """Whether the whole is an array in memory."""
        return self._array is not None

    @property
    def _row_bytes(self) -> int:
        return prod(self.shape[1:]) * self.dtype.itemsize

    def bands(self) -> Iterator[tuple[int, int]]:
        """Cut the rows into bands (top, bottom) that are handled at once."""
        height = max(1, BAND // prod(self.shape[1:]))
        for top in range(0, self.shape[0], height):
            yield top, min(self.shape[0], top + height)

    def rows(self, top: int, bottom: int) -> NDArray[Any]:
        """Return rows top to bottom, without the last: (bottom - top, W[, K]). Not to be written to."""
        if self._array is not None:
            return self._array[top:bottom]
        assert self._file is not None
        array = np.empty((bottom - top, *self.shape[1:]), self.dtype)
        view, start = array.data.cast("B"), 0
        self._file.seek(top * self._row_bytes)
        while start < len(view):
            start += self._file.readinto(view[start:])  # type: ignore[attr-defined]
        return array

    def put(self, top: int, rows: NDArray[Any]) -> None:
        """Write rows (n, W[, K]) from `top` on."""
        if self._array is not None:
            self._array[top : top + len(rows)] = rows
            return
        assert self._file is not None
        view, start = np.ascontiguousarray(rows, self.dtype).data.cast("B"), 0
        self._file.seek(top * self._row_bytes)
        while start < len(view):
            start += self._file.write(view[start:])

    def whole(self) -> NDArray[Any]:
        """Return all rows, whatever memory that takes."""
        return self.rows(0, self.shape[0])
