"""Windows of TIFFs without coordinates: only the strips or tiles that a window touches are decoded.

Next to read: `geotiffs.py`, the same for TIFFs with coordinates.
"""

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ml_src.core.data.headers import main_page
from ml_src.core.transforms.source import Window

if TYPE_CHECKING:
    import tifffile


def read_tiff(tiff: "tifffile.TiffFile", window: Window) -> NDArray[Any]:
    """Decode a window of the picture as it is stored: (height, width, samples).

    Raises: what tifffile raises for a damaged file or a compression it does not know.
    """
    page = main_page(tiff)
    tall = page.tilelength if page.is_tiled else page.rowsperstrip
    wide = page.tilewidth if page.is_tiled else page.imagewidth
    down, across = -(-page.imagelength // tall), -(-page.imagewidth // wide)
    planes = page.samplesperpixel if page.planarconfig == 2 else 1
    pixels = np.zeros((window.height, window.width, page.samplesperpixel), page.dtype)
    rows = range(window.top // tall, -(-(window.top + window.height) // tall))
    columns = range(window.left // wide, -(-(window.left + window.width) // wide))
    jpegtables = page.jpegtables
    for plane, row, column in product(range(planes), rows, columns):
        index = (plane * down + row) * across + column
        tiff.filehandle.seek(page.dataoffsets[index])
        data = tiff.filehandle.read(page.databytecounts[index])
        if len(data) < page.databytecounts[index]:
            raise ValueError(f"it ends {page.databytecounts[index] - len(data)} bytes too early")
        segment = page.decode(data or None, index, jpegtables=jpegtables)[0]
        if segment is None:  # a sparse file leaves out what is empty
            continue
        top, left = row * tall - window.top, column * wide - window.left
        _paste(pixels if planes == 1 else pixels[:, :, plane : plane + 1], segment[0], top, left)
    return pixels


def _paste(pixels: NDArray[Any], segment: NDArray[Any], top: int, left: int) -> None:
    """Copy what of a segment (h, w, samples), whose corner is at (top, left), lies inside `pixels`."""
    height, width = segment.shape[:2]
    rows = slice(max(0, top), min(pixels.shape[0], top + height))
    columns = slice(max(0, left), min(pixels.shape[1], left + width))
    pixels[rows, columns] = segment[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
