"""TIFFs with coordinates, by rasterio, which comes with the extra `geo`; the only importer of it.

GDAL knows what such files say beside their pixels: nodata, validity masks, which band is alpha, where on Earth it lies.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml_src.core.errors import DataError
from ml_src.core.transforms.source import Window

# A file without coordinates is read as any other.
warnings.filterwarnings("ignore", message="Dataset has no geotransform")
logging.getLogger("rasterio").setLevel(logging.CRITICAL)
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
        from rasterio.errors import RasterioError
    except ModuleNotFoundError as error:
        raise DataError(f"{path} is a GeoTIFF: run pip install 'ml-src[geo]' to read it") from error
    try:
        with rasterio.Env(GDAL_CACHEMAX=CACHE_MB), rasterio.open(path) as raster:
            yield raster
    except RasterioError as error:
        reason = error.__cause__ or error
        raise DataError(f"{path} cannot be read ({reason}): replace the file or remove the pair") from error


def read_bands(path: Path, window: Window | None = None) -> Bands:
    """Read a window, or all, of every band but alpha.

    Missing is what has its band's nodata value, what alpha shows as transparent, and what the validity mask leaves out.
    """
    with _opened(path) as raster:
        from rasterio.enums import ColorInterp, MaskFlags
        from rasterio.windows import Window as Part

        part = None if window is None else Part(window.left, window.top, window.width, window.height)
        alphas = [
            band for band, kind in zip(raster.indexes, raster.colorinterp, strict=True) if kind == ColorInterp.alpha
        ]
        colours = [band for band in raster.indexes if band not in alphas]
        pixels = np.ascontiguousarray(raster.read(colours, window=part).transpose(1, 2, 0))
        missing: NDArray[np.bool_] | None = None
        nodata = [raster.nodatavals[band - 1] for band in colours]
        if any(value is not None for value in nodata):
            missing = np.stack([_is(pixels[:, :, index], value) for index, value in enumerate(nodata)], axis=2)
        hidden = [raster.read(alphas[0], window=part) == 0] if alphas else []
        if MaskFlags.per_dataset in raster.mask_flag_enums[0] and MaskFlags.alpha not in raster.mask_flag_enums[0]:
            hidden.append(raster.read_masks(1, window=part) == 0)
        for outside in hidden:
            missing = outside[:, :, None] if missing is None else missing | outside[:, :, None]
    return Bands(pixels, missing)


def _is(band: NDArray[Any], nodata: float | None) -> NDArray[np.bool_]:
    if nodata is None:
        return np.zeros(band.shape, bool)
    return np.asarray(np.isnan(band) if np.isnan(nodata) else band == nodata)


def may_miss(path: Path) -> bool:
    """Whether pixels of a raster can be missing, by its header: it has nodata, alpha, or a validity mask."""
    with _opened(path) as raster:
        from rasterio.enums import MaskFlags

        return any(MaskFlags.all_valid not in flags for flags in raster.mask_flag_enums)


def place_of(path: Path) -> Place | None:
    """Return where a raster lies, or None where it does not say."""
    with _opened(path) as raster:
        if raster.crs is None:
            return None
        box = raster.bounds
        return Place(raster.crs.to_string(), min(box.left, box.right), min(box.bottom, box.top),
                     max(box.left, box.right), max(box.bottom, box.top))  # fmt: skip
