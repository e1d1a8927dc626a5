"""Tiled TIFFs of any size, written a row of tiles at a time. Next to read: `geotiffs.py`, which says where they lie."""

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any, BinaryIO
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import DTypeLike, NDArray

Rows = Callable[[int, int], NDArray[Any]]
# What tifffile takes as one of `extratags`: number, type, count, value, whether for the first page only.
Tag = tuple[int, int | str, int, Any, bool]

TILE_SIDES = (256, 128, 64, 32, 16)  # a TIFF's tiles have sides of a multiple of 16
IN_FLIGHT = 32 << 20  # bytes of a row of tiles, and of what is compressed at once
CLASSIC_MAX = (1 << 32) - (1 << 25)  # bytes; above it, offsets of 32 bits may not suffice
GDAL_METADATA, GDAL_NODATA = 42112, 42113


def write_tiff(
    file: BinaryIO,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    rows: Rows,
    *,
    colours: NDArray[np.uint8] | None = None,
    names: Sequence[str] = (),
    nodata: float | None = None,
    tags: Sequence[Tag] = (),
) -> None:
    """Write an array (H, W) or (H, W, bands), compressed without loss, as a tiled TIFF.

    Args:
        file: opened for writing, and empty.
        shape: of the array.
        dtype: of the file: unsigned integers or floats.
        rows: returns rows top to bottom, without the last; asked for in order.
        colours: (256, 3) RGB, which make the values of an uint8 the numbers of a palette.
        names: of the bands.
        nodata: the value of pixels without data. It makes the file one that is read by rasterio.
        tags: further ones, as of `Georeference`.
    """
    dtype = np.dtype(dtype)
    if shape[2:] == (1,):  # which tifffile would take for a stack of lines
        shape = shape[:2]
    side = _tile_side(prod(shape[1:]) * dtype.itemsize)
    extra = [*tags]
    if names:
        extra.append((GDAL_METADATA, "s", 0, _band_names(names), True))
    if nodata is not None:
        extra.append((GDAL_NODATA, "s", 0, str(nodata), True))
    import tifffile

    with tifffile.TiffWriter(file, bigtiff=prod(shape) * dtype.itemsize > CLASSIC_MAX) as writer:
        writer.write(
            _tiles(shape, dtype, rows, side),
            shape=shape,
            dtype=dtype,
            tile=(side, side),
            photometric="minisblack" if colours is None else "palette",
            colormap=None if colours is None else colours.T.astype(np.uint16) * 257,
            planarconfig="contig" if len(shape) == 3 else None,
            compression="adobe_deflate",
            predictor=dtype.kind == "f",
            metadata=None,
            software=False,
            extratags=extra,
            buffersize=IN_FLIGHT,
        )


def _tile_side(row_bytes: int) -> int:
    """Return the largest side at which a row of tiles stays below IN_FLIGHT."""
    return next((side for side in TILE_SIDES if side * row_bytes <= IN_FLIGHT), TILE_SIDES[-1])


def _tiles(shape: tuple[int, ...], dtype: np.dtype[Any], rows: Rows, side: int) -> Iterator[NDArray[Any]]:
    """Cut rows into tiles, from the left and from the top; those at the right and lower edge may be smaller."""
    for top in range(0, shape[0], side):
        band = rows(top, min(shape[0], top + side)).astype(dtype, copy=False).reshape(-1, *shape[1:])
        for left in range(0, shape[1], side):
            yield band[:, left : left + side]


def _band_names(names: Sequence[str]) -> bytes:
    """Return what GDAL, and with it every map program, reads the names of bands from; it escapes them twice."""
    items = "".join(
        f'<Item name="DESCRIPTION" sample="{index}" role="description">{escape(escape(name))}</Item>'
        for index, name in enumerate(names)
    )
    return f"<GDALMetadata>{items}</GDALMetadata>".encode()
