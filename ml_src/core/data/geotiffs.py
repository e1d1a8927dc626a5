"""TIFFs with coordinates, by rasterio, which comes with the extra `geo`; the only importer of it.

GDAL knows what such files say beside their pixels: nodata, validity masks, which band is alpha, where on Earth it lies.
"""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml_src.core.data.headers import read_header
from ml_src.core.data.tiff_writer import Tag
from ml_src.core.errors import DataError
from ml_src.core.transforms.source import Window

# A file without coordinates is read as any other.
warnings.filterwarnings("ignore", message="Dataset has no geotransform")
logging.getLogger("rasterio").setLevel(logging.CRITICAL)
CACHE = 64 << 20  # bytes, unlike GDAL's own setting; it would take a twentieth of the memory, in every process
# TIFF tags: scale, control points, matrix, three of the coordinate system, rational polynomials.
PLACE_TAGS = (33550, 33922, 34264, 34735, 34736, 34737, 50844)


class Place(NamedTuple):
    """The rectangle on Earth that a raster covers, in units of its coordinate system."""

    crs: str
    left: float
    bottom: float
    right: float
    top: float


@dataclass(frozen=True)
class Georeference:
    """Where a raster lies, and what a TIFF of the same size must say to lie there too."""

    crs: str | None  # an OGC name, or WKT where the coordinate system has no number
    # (a, b, c, d, e, f): corner (column, row) lies at x = a column + b row + c, y = d column + e row + f. None where
    # only control points or rational polynomials say where it lies.
    transform: tuple[float, float, float, float, float, float] | None
    unit: str | None  # of x and y, such as "metre"; None for degrees
    tags: tuple[Tag, ...]

    @property
    def pixel_area(self) -> float | None:
        """The area of a pixel in square units of the coordinates; None in degrees, and where a system is unknown."""
        if self.transform is None or self.unit is None or self.crs is None:
            return None
        a, b, _, d, e, _ = self.transform
        return abs(a * e - b * d)


class Outline(NamedTuple):
    """The edge of a region: closed rings of pixel corners (n, 2), x right and y down. All but the first are holes."""

    value: int
    rings: list[NDArray[np.int64]]


class Bands(NamedTuple):
    """A window of a raster: pixels (height, width, C) without alpha, and where they are missing, or None."""

    pixels: NDArray[Any]
    missing: NDArray[np.bool_] | None  # (height, width, C), or (height, width, 1) for all bands


def require_rasterio(problem: str, purpose: str) -> None:
    """Raise a DataError with the command that installs rasterio, where it is not: "<problem>: run ... <purpose>"."""
    try:
        import rasterio  # noqa: F401
    except ModuleNotFoundError as error:
        raise DataError(f"{problem}: run pip install 'ml-src[geo]' {purpose}") from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    require_rasterio(f"{path} is a GeoTIFF", "to read it")
    import rasterio
    from rasterio.errors import RasterioError

    try:
        with rasterio.Env(GDAL_CACHEMAX=CACHE), rasterio.open(path) as raster:
            yield raster
    except RasterioError as error:
        reason = error.__cause__ or error
        raise DataError(f"{path} cannot be read ({reason}): replace the file or leave it out") from error


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


def georeference(path: Path) -> Georeference | None:
    """Return where an image lies; None for what is no TIFF with coordinates.

    The transform or else the control points, rational polynomials, the coordinate system, and whether coordinates are
    those of pixels' centres are kept, also those of a file beside the raster; arrays of geolocations are not.
    """
    if not read_header(path).geo:
        return None
    with _opened(path) as raster:
        place: dict[str, Any] = {"crs": raster.crs, "rpcs": raster.rpcs}
        points, points_crs = raster.gcps
        placed = not raster.transform.is_identity
        if placed:
            place["transform"] = raster.transform
        elif points:
            place.update(gcps=points, crs=points_crs)
        tags = _place_tags({key: value for key, value in place.items() if value}, raster.tags().get("AREA_OR_POINT"))
        if not tags:
            return None
        transform = tuple(raster.transform)[:6] if placed else None
        return Georeference(_name(raster.crs), transform, _unit(raster.crs), tags)


def _place_tags(place: dict[str, Any], meaning: str | None) -> tuple[Tag, ...]:
    """Return the TIFF tags by which GDAL says where a raster lies, taken from a small one."""
    import tifffile
    from rasterio.io import MemoryFile

    size = {"height": 1, "width": 1, "count": 1, "dtype": "uint8"}
    with MemoryFile() as file:
        with file.open(driver="GTiff", **size, **place) as raster:
            if meaning is not None:
                raster.update_tags(AREA_OR_POINT=meaning)
        with tifffile.TiffFile(io.BytesIO(file.read())) as tiff:
            found = tiff.pages.first.tags
            return tuple(
                (tag.code, int(tag.dtype), tag.count, tag.value, True) for tag in found if tag.code in PLACE_TAGS
            )


def _name(crs: Any) -> str | None:
    """Return a coordinate system as GeoJSON of 2008 names it: by its number or, where it has none, as WKT."""
    from rasterio.crs import CRS

    if crs is None:
        return None
    authority = crs.to_authority()
    if authority is None or CRS.from_authority(*authority) != crs:  # what is only nearly the same has a number too
        return str(crs.to_wkt())
    if authority == ("EPSG", "4326"):  # whose axes are latitude, longitude, where ours are longitude, latitude
        return "urn:ogc:def:crs:OGC:1.3:CRS84"
    return f"urn:ogc:def:crs:{authority[0]}::{authority[1]}"


def _unit(crs: Any) -> str | None:
    if crs is not None and crs.is_geographic:
        return None
    return "unit" if crs is None or crs.linear_units == "unknown" else str(crs.linear_units)


def outlines(labels: NDArray[np.uint8 | np.uint16] | Path, there: NDArray[np.bool_] | Path) -> Iterator[Outline]:
    """Yield the edge of every region of equal labels, whose pixels touch by their sides.

    GDAL holds the edges of all regions in memory, not the labels.

    Args:
        labels: (H, W), or a TIFF of them, of which only a few rows are in memory.
        there: which pixels belong to a region at all: (H, W), or a TIFF of uint8 that are not zero there.
    """
    require_rasterio("Polygons are drawn by rasterio", "to have them")
    import rasterio
    from rasterio.features import shapes

    with ExitStack() as files:
        label_band, there_band = (
            rasterio.band(files.enter_context(_opened(each)), 1) if isinstance(each, Path) else each
            for each in (labels, there)
        )
        for shape, value in shapes(label_band, mask=there_band, connectivity=4):
            yield Outline(int(value), [np.array(ring, np.int64) for ring in shape["coordinates"]])
