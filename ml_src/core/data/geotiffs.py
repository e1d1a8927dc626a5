"""TIFFs with coordinates, by rasterio, which comes with the extra `geo`; the only importer of it.

GDAL knows what such files say beside their pixels: nodata, validity masks, which band is alpha, where on Earth it lies.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml_src.core.errors import DataError
from ml_src.core.transforms.source import Window

CACHE_MB = 64  # GDAL would take a twentieth of the memory, in every process


class Place(NamedTuple):
    """The rectangle on Earth that a raster covers, in units of its coordinate system."""

    crs: str
    left: float
    bottom: float
    right: float
    top: float


class Bands(NamedTuple):
    """A window of a raster: pixels (height, width, C) without alpha, and where they are missing, or None."""

    pixels: NDArray[Any]
    missing: NDArray[np.bool_] | None  # (height, width, C), or (height, width, 1) for all bands


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning, RasterioError
    except ModuleNotFoundError as error:
        raise DataError(f"{path} is a GeoTIFF: run pip install 'ml-src[geo]' to read it") from error
    try:
        with warnings.catch_warnings(), rasterio.Env(GDAL_CACHEMAX=CACHE_MB):
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(path) as raster:
                yield raster
    except RasterioError as error:
        raise DataError(f"{path} cannot be read ({error}): replace the file or remove the pair") from error


def read_bands(path: Path, window: Window | None = None) -> Bands:
    """Read a window, or all, of every band but alpha.

    Missing is what has the file's nodata value, what alpha shows as transparent, and what its validity mask leaves out.
    """
    with _opened(path) as raster:
        from rasterio.enums import ColorInterp, MaskFlags
        from rasterio.windows import Window as Part

        part = None if window is None else Part(window.left, window.top, window.width, window.height)
        colours = [
            band for band, kind in zip(raster.indexes, raster.colorinterp, strict=True) if kind != ColorInterp.alpha
        ]
        pixels = np.ascontiguousarray(raster.read(colours, window=part).transpose(1, 2, 0))
        missing: NDArray[np.bool_] | None = None
        flags = raster.mask_flag_enums[0]
        if MaskFlags.alpha in flags or MaskFlags.per_dataset in flags:
            missing = (raster.read_masks(1, window=part) == 0)[:, :, None]
        elif raster.nodata is not None:
            missing = np.isnan(pixels) if np.isnan(raster.nodata) else pixels == np.asarray(raster.nodata, pixels.dtype)
    return Bands(pixels, missing)


def place_of(path: Path) -> Place | None:
    """Return where a raster lies, or None where it does not say."""
    with _opened(path) as raster:
        if raster.crs is None:
            return None
        box = raster.bounds
        return Place(raster.crs.to_string(), min(box.left, box.right), min(box.bottom, box.top),
                     max(box.left, box.right), max(box.bottom, box.top))  # fmt: skip
