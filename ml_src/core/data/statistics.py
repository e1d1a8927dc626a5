"""Mean and standard deviation of each channel, in one pass over any number of images of any size.

Blocks are summed in float64 and merged pairwise (Chan, Golub, LeVeque 1979), which loses no digits where the mean is
large beside the deviation, and lets threads, and later sites, each count their own part.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml_src.core.atomic import write_json
from ml_src.core.data.files import Raster, image_info, read_image, row_windows
from ml_src.core.transforms.intensity import full_range

DIGITS = 7
AT_ONCE = 1 << 20  # values


@dataclass(frozen=True)
class Moments:
    """Of each channel: how many pixels, their mean, and the sum of their squared distances to it; (C,) float64."""

    count: NDArray[np.float64]
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]

    @classmethod
    def of(cls, pixels: NDArray[Any], missing: NDArray[np.bool_] | None = None) -> "Moments":
        """Return those of an array (H, W, C), without what is missing (H, W, C or 1)."""
        values = pixels.reshape(-1, pixels.shape[2]).astype(np.float64)
        if missing is None:
            count = np.full(values.shape[1], float(len(values)))
            mean = values.mean(axis=0)
            return cls(count, mean, ((values - mean) ** 2).sum(axis=0))
        there = ~np.broadcast_to(missing, pixels.shape).reshape(values.shape)
        count = there.sum(axis=0).astype(np.float64)
        mean = np.sum(values, axis=0, where=there) / np.maximum(count, 1)
        return cls(count, mean, np.sum((values - mean) ** 2, axis=0, where=there))

    def __add__(self, other: "Moments") -> "Moments":
        """Return those of both parts together."""
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        apart = other.mean - self.mean
        return Moments(count, self.mean + apart * share, self.squares + other.squares + apart**2 * self.count * share)

    @property
    def std(self) -> NDArray[np.float64]:
        """The standard deviation; 1 for a channel that is constant or empty, which then becomes 0 throughout."""
        deviation = np.sqrt(self.squares / np.maximum(self.count, 1))
        return np.where(deviation > 0, deviation, 1.0)


def channel_moments(
    paths: Sequence[Path], channels: int, progress: Callable[[int], None] | None = None
) -> tuple[Moments, str]:
    """Return the moments over all images, in the files' own units, and their number type.

    Read in threads, in blocks of rows where an image is large; merged in the order of the paths, so that the result
    does not depend on who was faster.
    """
    total = None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for number, found in enumerate(pool.map(lambda path: _of_file(path, channels), paths), start=1):
            total = found if total is None else (total[0] + found[0], found[1])
            if progress is not None:
                progress(number)
    assert total is not None
    return total


def _of_file(path: Path, channels: int) -> tuple[Moments, str]:
    total = None
    for raster in _blocks(path, channels):
        moments = Moments.of(*raster)
        total = moments if total is None else total + moments
    assert total is not None
    return total, raster.pixels.dtype.name


def _blocks(path: Path, channels: int) -> Iterator[Raster]:
    """Read an image in bands of rows, and yield it in pieces whose float64 copies are small."""
    info = image_info(path)
    for band in row_windows(info.height, info.width) if info.windowed else [None]:
        pixels, missing = read_image(path, channels, band)
        rows = max(1, AT_ONCE // (pixels.shape[1] * pixels.shape[2]))
        for top in range(0, len(pixels), rows):
            piece = slice(top, top + rows)
            yield Raster(pixels[piece], None if missing is None else missing[piece])


def channel_statistics(
    paths: Sequence[Path], channels: int, cache_path: Path, progress: Callable[[int], None] | None = None
) -> tuple[list[float], list[float]]:
    """Return mean and std of all images as `normalize` has them; what was computed before is in the cache.

    The cache is a JSON file, ignored where it is broken or cannot be written; an image that changes makes it void.
    """
    files = [(str(path), found.st_size, found.st_mtime_ns) for path in paths for found in [path.stat()]]
    key = hashlib.sha256(repr((channels, files)).encode()).hexdigest()
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError, TypeError):
        known = dict(json.loads(cache_path.read_bytes()))
    if key not in known:
        known[key] = normalisation(*channel_moments(paths, channels, progress))
        with suppress(OSError):
            write_json(cache_path, known)
    mean, std = known[key]
    return mean, std


def normalisation(moments: Moments, dtype: str) -> tuple[list[float], list[float]]:
    """Return mean and std as `normalize` has them: as shares of the full range, or in the file's own units."""
    scale = full_range(np.dtype(dtype))
    return _rounded(moments.mean / scale), _rounded(np.where(moments.squares > 0, moments.std / scale, 1.0))


def _rounded(values: NDArray[np.float64]) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values]
