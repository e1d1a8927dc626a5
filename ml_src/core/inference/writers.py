"""Predictions as files: masks, overlays, probabilities, uncertainty, polygons. Each is whole or not there.

What is made of a raster with coordinates lies where the raster lies. Of what is not in memory, rows are read as they
are written. Next to read: `ml_src/core/data/tiff_writer.py` and `geotiffs.py`.
"""

import json
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from ml_src.core.atomic import replacing
from ml_src.core.data.files import image_info, read_image, row_windows
from ml_src.core.data.geotiffs import Georeference, Outline, georeference, outlines
from ml_src.core.data.tiff_writer import write_tiff
from ml_src.core.inference.planes import Plane
from ml_src.core.pictures import Image, overlay, palette, shown_channels

MAX_SIDE = 4096  # of pictures to look at
NAN = float("nan")
SCRATCH = ".outlines-"  # begins the names of folders that are there while polygons are drawn, and after a kill


def write_mask(path: Path, labels: Plane, num_classes: int, nodata: int | None, source: Path | None) -> Path:
    """Write labels (H, W) so that each pixel's value is its class, and return the file.

    An image gives a PNG, a raster with coordinates a GeoTIFF, and what is not in memory a TIFF. Up to 256 values they
    have 8 bits and a palette, above 16 bits.

    Args:
        path: without ending.
        labels: classes and nodata.
        num_classes: which decides about 8 or 16 bits.
        nodata: the label of pixels without data, which they keep; None where there are none.
        source: the image, which says where it lies.
    """
    dtype = np.uint8 if max(num_classes - 1, nodata or 0) <= 255 else np.uint16
    place = place_of(source)
    if place is None and labels.in_memory:
        return _write_indexed(_named(path, ".png"), labels.whole().astype(dtype, copy=False))
    return _write_tiff(
        _named(path, ".tif"),
        labels,
        place,
        dtype=dtype,
        colours=palette() if dtype == np.uint8 else None,
        nodata=nodata,
    )


def _write_indexed(path: Path, labels: NDArray[np.uint8 | np.uint16]) -> Path:
    picture = PILImage.fromarray(labels)
    if labels.dtype == np.uint8:
        picture.putpalette(palette().tobytes())
    with replacing(path) as file:
        picture.save(file, format="PNG")
    return path


def write_overlay(
    path: Path,
    labels: Plane,
    nodata: int | None,
    source: Path,
    channels: int | None = None,
    image: NDArray[Any] | None = None,
) -> Path:
    """Write an image with its labels (H, W) drawn over it as PNG, and return the file.

    What is longer than 4096 pixels is shown by every second, third, ... pixel of every such row. Pixels without data
    are left as they are.

    Args:
        path: without ending.
        labels: classes and nodata.
        nodata: the label of pixels without data; None where there are none.
        source: the image.
        channels: as of `read_image`.
        image: the same, (H, W, C), where it has been read.
    """
    step = _step(labels)
    thin = _thinned(labels, step)
    shown = thin if nodata is None else np.where(thin == nodata, 0, thin)
    pixels = _thinned_image(source, channels, step) if image is None else image[::step, ::step]
    return _write_picture(_named(path, ".png"), overlay(pixels, shown))


def write_probabilities(
    path: Path, probs: Plane, class_names: Sequence[str], how: Literal["tiff", "npz"], source: Path | None
) -> Path:
    """Write probabilities (H, W, C), float16, without loss, and return the file.

    A TIFF has a band for each class, of its name; it is a GeoTIFF where the source has coordinates, and NaN, where
    there are any, are then without data. An npz has the array as `probs`.

    Args:
        path: without ending.
        probs: float16 in [0, 1].
        class_names: C of them.
        how: which of the two.
        source: the image.
    """
    if how == "npz":
        return _write_npz(_named(path, ".npz"), probs)
    return _write_tiff(_named(path, ".tif"), probs, place_of(source), names=class_names, nodata=NAN)


def _write_npz(path: Path, probs: Plane) -> Path:
    header = {"descr": np.lib.format.dtype_to_descr(probs.dtype), "fortran_order": False, "shape": probs.shape}
    with (
        replacing(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("probs.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        for top, bottom in probs.bands():
            member.write(np.ascontiguousarray(probs.rows(top, bottom)).data)
    return path


def write_uncertainty(path: Path, uncertainty: Plane, source: Path | None) -> list[Path]:
    """Write uncertainties (H, W, 1 or 2), float16, as TIFF, and their picture as PNG; return both.

    The bands are entropy and, of ensembles, mutual information. The TIFF is one with coordinates where the source has
    some. The picture shows the entropy from dark blue (0) to yellow (1), as large as an overlay. NaN is without data,
    and black.

    Args:
        path: without ending.
        uncertainty: float16 in [0, 1].
        source: the image.
    """
    entropy = _thinned(uncertainty, _step(uncertainty))[:, :, 0].astype(np.float32)
    known = np.isfinite(entropy)
    levels = np.rint(np.where(known, entropy, 0) * 255).clip(0, 255).astype(np.uint8)
    picture = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
    picture[~known] = 0
    shown = _write_picture(_named(path, ".png"), picture)
    names = ("entropy", "mutual information")[: uncertainty.shape[2]]
    return [_write_tiff(_named(path, ".tif"), uncertainty, place_of(source), names=names, nodata=NAN), shown]


def write_polygons(
    path: Path, labels: Plane, class_names: Sequence[str], nodata: int | None, source: Path | None
) -> Path:
    """Write the regions of labels (H, W) as GeoJSON, and return the file.

    A feature is a region of pixels of one class that touch by their sides, with the pixels' own edges. Class 0 is the
    background, and left out, as are pixels without data. Its properties are `class`, `name`, `area` and `area_unit`:
    square units of the coordinate system, as they are on the map, or pixels. Coordinates are those of the source, whose
    coordinate system the file names in the way of GeoJSON of 2008 (that of 2016 has degrees only); in degrees, areas
    are in pixels. Where the source has no transform, x is the column and y the row of pixels' corners.

    Args:
        path: without ending.
        labels: classes and nodata.
        class_names: C of them.
        nodata: the label of pixels without data; None where there are none.
        source: the image.

    Raises: DataError where the extra `geo` is not installed.
    """
    place, target = place_of(source), _named(path, ".geojson")
    with replacing(target) as file, _for_outlines(labels, nodata) as (values, there):
        file.write(_collection_start(place).encode())
        for number, outline in enumerate(outlines(values, there)):
            feature = json.dumps(_feature(outline, class_names, place), ensure_ascii=False, separators=(",", ":"))
            file.write((",\n" * (number > 0) + feature).encode())
        file.write(b"\n]}\n")
    return target


@contextmanager
def _for_outlines(labels: Plane, nodata: int | None) -> Iterator[tuple[Any, Any]]:
    """Give labels, and which of them are drawn, as arrays or as TIFFs for as long as the block."""

    def there(top: int, bottom: int) -> NDArray[np.bool_]:
        rows = labels.rows(top, bottom)
        return np.asarray((rows != 0) & (rows != (0 if nodata is None else nodata)))

    if labels.in_memory:
        yield labels.whole(), there(0, labels.shape[0])
        return
    with TemporaryDirectory(prefix=SCRATCH, dir=labels.folder) as folder:
        paths = Path(folder) / "labels.tif", Path(folder) / "there.tif"
        for path, dtype, rows in zip(paths, (labels.dtype, np.uint8), (labels.rows, there), strict=True):
            with path.open("wb") as file:
                write_tiff(file, labels.shape, dtype, rows)
        yield paths


def _collection_start(place: Georeference | None) -> str:
    crs = ""
    if place is not None and place.transform is not None and place.crs is not None:
        crs = f'"crs":{json.dumps({"type": "name", "properties": {"name": place.crs}})},\n'
    return f'{{"type":"FeatureCollection",\n{crs}"features":[\n'


def _feature(outline: Outline, class_names: Sequence[str], place: Georeference | None) -> dict[str, Any]:
    areas = [abs(_twice_area(ring)) / 2 for ring in outline.rings]
    area, unit = areas[0] - sum(areas[1:]), "pixel"
    if place is not None and place.pixel_area is not None:
        area, unit = area * place.pixel_area, f"square {place.unit}"
    properties = {"class": outline.value, "name": class_names[outline.value], "area": area, "area_unit": unit}
    rings = [_on_earth(ring, place).tolist() for ring in outline.rings]
    return {"type": "Feature", "properties": properties, "geometry": {"type": "Polygon", "coordinates": rings}}


def _twice_area(ring: NDArray[np.int64]) -> int:
    """Return twice the signed area of a closed ring (n, 2), by the shoelace formula."""
    x, y = ring.T
    return int((x[:-1] * y[1:] - x[1:] * y[:-1]).sum())


def _on_earth(ring: NDArray[np.int64], place: Georeference | None) -> NDArray[Any]:
    if place is None or place.transform is None:
        return ring
    a, b, c, d, e, f = place.transform
    column, row = ring.T
    return np.stack([a * column + b * row + c, d * column + e * row + f], axis=1)


def place_of(source: Path | None) -> Georeference | None:
    """Return where an image lies, as `georeference` does, which is asked once for all outputs of an image."""
    if source is None:
        return None
    try:
        status = source.stat()
    except OSError:
        return georeference(source)  # which says what is wrong
    return _place(source, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1)
def _place(source: Path, *stamp: int) -> Georeference | None:
    return georeference(source)


def _named(path: Path, suffix: str) -> Path:
    """Add an ending to a name, which may have dots of its own."""
    return path.with_name(path.name + suffix)


def _write_tiff(path: Path, plane: Plane, place: Georeference | None, *, nodata: float | None, **how: Any) -> Path:
    """Write a plane as a TIFF that lies where `place` says. Without a place, no nodata: it is written for GDAL only."""
    how = {"dtype": plane.dtype, **how}
    if place is not None:
        how |= {"nodata": nodata, "tags": place.tags}
    with replacing(path) as file:
        write_tiff(file, plane.shape, rows=plane.rows, **how)
    return path


def _write_picture(path: Path, picture: Image) -> Path:
    pixels = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    with replacing(path) as file:
        file.write(cv2.imencode(".png", pixels)[1].data)
    return path


def _step(plane: Plane) -> int:
    """Return of how many pixels one is shown."""
    return -(-max(plane.shape[:2]) // MAX_SIDE)


def _thinned(plane: Plane, step: int) -> NDArray[Any]:
    """Return every step-th pixel of every step-th row."""
    # copies: views would keep the bands
    return np.concatenate(
        [plane.rows(top, bottom)[-top % step :: step, ::step].copy() for top, bottom in plane.bands()]
    )


def _thinned_image(path: Path, channels: int | None, step: int) -> NDArray[Any]:
    """Return the same of an image file, (h, w, C), with those channels only that are shown."""
    info = image_info(path)
    if step == 1 or not info.windowed:
        return read_image(path, channels).to_show[::step, ::step]
    bands = []
    for window in row_windows(info.height, info.width):
        pixels = read_image(path, channels, window).to_show
        bands.append(pixels[-window.top % step :: step, ::step][:, :, shown_channels(pixels.shape[2])])
    return np.concatenate(bands)
