"""What is written of a prediction can be read back, lies where its source lies, and is whole or not there."""

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from ml_src.core.data import geotiffs, headers, tiff_writer
from ml_src.core.data.files import read_image, read_mask
from ml_src.core.data.geotiffs import georeference
from ml_src.core.data.tiff_writer import write_tiff
from ml_src.core.errors import DataError
from ml_src.core.inference import planes, writers
from ml_src.core.inference.planes import Plane
from ml_src.core.inference.writers import (
    place_of,
    write_mask,
    write_overlay,
    write_polygons,
    write_probabilities,
    write_uncertainty,
)
from ml_src.core.pictures import overlay, palette

rasterio = pytest.importorskip("rasterio")
from affine import Affine  # noqa: E402
from rasterio.control import GroundControlPoint  # noqa: E402
from rasterio.features import rasterize  # noqa: E402
from rasterio.rpc import RPC  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore::PendingDeprecationWarning", "ignore::rasterio.errors.NotGeoreferencedWarning"
)
HEIGHT, WIDTH = 300, 277
NAMES = ["background", "Gebäude & <Dach>", "road", "water"]
UPRIGHT = Affine(0.5, 0, 300_000, 0, -0.5, 5_800_000)
ROTATED = Affine(0.4, 0.45, 300_000, 0.3, -0.6, 5_800_000)
ALBERS = "+proj=laea +lat_0=52 +lon_0=10 +x_0=4321000 +y_0=3210000 +ellps=GRS80 +units=m"


def regions(num_classes: int = 4, seed: int = 0, dtype: Any = np.uint8) -> NDArray[Any]:
    """Blocks, with single pixels of any class strewn over them."""
    rng = np.random.default_rng(seed)
    labels = cv2.resize(
        rng.integers(0, num_classes, (20, 15)).astype(np.uint16), (WIDTH, HEIGHT), interpolation=cv2.INTER_NEAREST
    )
    noise = rng.random((HEIGHT, WIDTH)) < 0.05
    labels[noise] = rng.integers(0, num_classes, noise.sum())
    return labels.astype(dtype)


def scene(array: NDArray[Any], monkeypatch: pytest.MonkeyPatch) -> Plane:
    """The array as a plane that lies in a file and is read by many bands."""
    monkeypatch.setattr(planes, "IN_MEMORY", 0)
    monkeypatch.setattr(planes, "BAND", 7000)
    plane = Plane(array.shape, array.dtype)
    plane.put(0, array)
    assert not plane.in_memory and len(list(plane.bands())) > 5
    return plane


def geotiff(path: Path, channels: int = 3, dtype: str = "uint8", **place: Any) -> Path:
    tags = place.pop("tags", {})
    pixels = np.random.default_rng(1).integers(0, 200, (channels, HEIGHT, WIDTH)).astype(dtype)
    size = {"height": HEIGHT, "width": WIDTH, "count": channels}
    with rasterio.open(path, "w", driver="GTiff", dtype=dtype, **size, **place) as raster:
        raster.update_tags(**tags)
        raster.write(pixels)
    return path


def features(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["features"]
    return found


def burnt(path: Path, transform: Affine) -> NDArray[np.uint16]:
    """The polygons of a file as a label map again."""
    shapes = [(one["geometry"], one["properties"]["class"]) for one in features(path)]
    if not shapes:
        return np.zeros((HEIGHT, WIDTH), np.uint16)
    return np.asarray(rasterize(shapes, (HEIGHT, WIDTH), transform=transform, dtype="uint16"))


@pytest.mark.parametrize(
    ("num_classes", "nodata", "bits"),
    [(4, None, 8), (4, 255, 8), (256, None, 8), (256, 65535, 16), (257, None, 16), (300, 65535, 16)],
)
def test_a_mask_has_the_labels_that_were_written(tmp_path, monkeypatch, num_classes, nodata, bits):
    """As PNG, as GeoTIFF, and as TIFF of what is not in memory."""
    labels = regions(num_classes, dtype=np.uint16)
    if nodata is not None:
        labels[50:90, 20:200] = nodata
    source = geotiff(tmp_path / "map.tif", crs="EPSG:32633", transform=UPRIGHT)
    png = write_mask(tmp_path / "a", Plane.of(labels), num_classes, nodata, None)
    geo = write_mask(tmp_path / "geo", Plane.of(labels), num_classes, nodata, source)
    tiff = write_mask(tmp_path / "scene", scene(labels, monkeypatch), num_classes, nodata, png)
    assert [path.name for path in (png, geo, tiff)] == ["a.png", "geo.tif", "scene.tif"]
    for path in (png, geo, tiff):
        assert np.array_equal(read_mask(path), labels), path
        assert headers.read_header(path).bits == bits and headers.read_header(path).palette == (bits == 8)
    if bits == 8:
        with Image.open(png) as picture, Image.open(tiff) as other:
            assert picture.getpalette() == other.getpalette() == palette().ravel().tolist()


def test_a_mask_of_a_map_says_what_its_values_and_colours_are(tmp_path):
    labels = regions()
    labels[:9] = 255
    source = geotiff(tmp_path / "map.tif", crs="EPSG:32633", transform=UPRIGHT)
    with rasterio.open(write_mask(tmp_path / "mask", Plane.of(labels), 4, 255, source)) as raster:
        assert raster.nodata == 255 and raster.dtypes == ("uint8",)
        assert np.array_equal(raster.read_masks(1) == 0, labels == 255)
        colours = [raster.colormap(1)[value][:3] for value in range(255)]
        assert np.array_equal(colours, palette()[:255])
        assert raster.profile["tiled"] and raster.block_shapes == [(256, 256)]
        assert raster.compression.value == "DEFLATE"
    with rasterio.open(write_mask(tmp_path / "mask", Plane.of(labels), 256, None, source)) as raster:
        assert raster.nodata is None


PLACES: dict[str, dict[str, Any]] = {
    "upright": {"crs": "EPSG:32633", "transform": UPRIGHT},
    "rotated": {"crs": "EPSG:32633", "transform": ROTATED},
    "south up": {"crs": "EPSG:32633", "transform": Affine(0.5, 0, 300_000, 0, 0.5, 5_800_000)},
    "centres": {"crs": "EPSG:32633", "transform": UPRIGHT, "tags": {"AREA_OR_POINT": "Point"}},
    "feet": {"crs": "EPSG:2263", "transform": UPRIGHT},
    "degrees": {"crs": "EPSG:4326", "transform": Affine(0.001, 0, 13, 0, -0.001, 52)},
    "no number": {"crs": ALBERS, "transform": UPRIGHT},
    "no system": {"transform": UPRIGHT},
}


@pytest.mark.parametrize("name", PLACES)
def test_what_is_made_of_a_map_lies_where_the_map_lies(tmp_path, name):
    source = geotiff(tmp_path / "map.tif", **PLACES[name])
    one, two = np.zeros((HEIGHT, WIDTH, 1), np.float16), np.zeros((HEIGHT, WIDTH, 4), np.float16)
    written = [
        write_mask(tmp_path / "mask", Plane.of(regions()), 4, None, source),
        write_probabilities(tmp_path / "probs", Plane.of(two), NAMES, "tiff", source),
        write_uncertainty(tmp_path / "uncertainty", Plane.of(one), source)[0],
    ]
    with rasterio.open(source) as given:
        for path in written:
            with rasterio.open(path) as raster:
                assert (raster.crs, raster.transform, raster.bounds) == (given.crs, given.transform, given.bounds)
                assert raster.tags().get("AREA_OR_POINT") == given.tags().get("AREA_OR_POINT")
                assert raster.shape == given.shape


def test_control_points_and_rational_polynomials_are_kept(tmp_path):
    points = [GroundControlPoint(row, col, 300_000 + col, 5_800_000 - row) for row in (0, 90) for col in (0, 70)]
    source = geotiff(tmp_path / "points.tif", gcps=points, crs="EPSG:32633")
    with rasterio.open(write_mask(tmp_path / "a", Plane.of(regions()), 4, None, source)) as raster:
        found, crs = raster.gcps
        assert crs == "EPSG:32633"
        assert [(p.row, p.col, p.x, p.y) for p in found] == [(p.row, p.col, p.x, p.y) for p in points]
    numbers = dict.fromkeys(("height_off", "lat_off", "line_off", "long_off", "samp_off"), 2.0)
    numbers |= dict.fromkeys(("height_scale", "lat_scale", "line_scale", "long_scale", "samp_scale"), 3.0)
    kinds = ("line_den_coeff", "line_num_coeff", "samp_den_coeff", "samp_num_coeff")
    polynomials = RPC(**numbers, **{kind: [float(i) for i in range(20)] for kind in kinds})
    source = geotiff(tmp_path / "rpc.tif", rpcs=polynomials, crs="EPSG:4326")
    with rasterio.open(write_mask(tmp_path / "b", Plane.of(regions()), 4, None, source)) as raster:
        assert {**raster.rpcs.to_dict(), "err_bias": None, "err_rand": None} == polynomials.to_dict()
    assert georeference(tmp_path / "points.tif").transform is None
    assert georeference(tmp_path / "points.tif").pixel_area is None


def test_a_place_that_is_said_in_a_file_beside_is_kept(tmp_path):
    source = geotiff(tmp_path / "map.tif", nodata=7)
    (tmp_path / "map.tfw").write_text("0.5\n0\n0\n-0.5\n300000.25\n5799999.75\n")
    with rasterio.open(write_mask(tmp_path / "mask", Plane.of(regions()), 4, None, source)) as raster:
        assert raster.transform == UPRIGHT


def test_pictures_and_tiffs_without_coordinates_lie_nowhere(tmp_path):
    """Also one that only says which value is no data."""
    Image.fromarray(regions()).save(tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "b.tif", regions())
    for source in (tmp_path / "a.png", tmp_path / "b.tif", geotiff(tmp_path / "c.tif", nodata=7)):
        assert georeference(source) is None
        assert write_mask(tmp_path / "mask", Plane.of(regions()), 4, None, source).suffix == ".png"


@pytest.mark.parametrize(
    ("name", "crs", "area", "unit"),
    [
        ("upright", "urn:ogc:def:crs:EPSG::32633", 0.25, "metre"),
        ("rotated", "urn:ogc:def:crs:EPSG::32633", 0.375, "metre"),
        ("feet", "urn:ogc:def:crs:EPSG::2263", 0.25, "US survey foot"),
        ("degrees", "urn:ogc:def:crs:OGC:1.3:CRS84", None, None),
        ("no system", None, None, "unit"),
    ],
)
def test_a_pixel_has_an_area_in_the_units_of_its_map(tmp_path, name, crs, area, unit):
    place = georeference(geotiff(tmp_path / "map.tif", **PLACES[name]))
    assert place is not None and place.crs == crs and place.unit == unit
    assert place.pixel_area == (area if area is None else pytest.approx(area))


def test_a_coordinate_system_without_number_is_named_by_its_text(tmp_path):
    place = georeference(geotiff(tmp_path / "map.tif", **PLACES["no number"]))
    assert place is not None and place.crs is not None
    assert rasterio.CRS.from_wkt(place.crs) == rasterio.CRS.from_string(ALBERS)


@pytest.mark.parametrize("name", [None, *PLACES])
def test_polygons_burnt_into_a_raster_are_the_labels(tmp_path, name):
    labels = regions()
    labels[100:130, 60:220] = 255
    source = None if name is None else geotiff(tmp_path / "map.tif", **PLACES[name])
    path = write_polygons(tmp_path / "a", Plane.of(labels), NAMES, 255, source)
    transform = Affine.identity() if name is None else PLACES[name]["transform"]
    assert path.name == "a.geojson"
    assert np.array_equal(burnt(path, transform), np.where(labels == 255, 0, labels))


def test_the_areas_of_polygons_are_those_of_their_pixels(tmp_path):
    labels = regions()
    for source, area, unit in (
        (None, 1, "pixel"),
        (geotiff(tmp_path / "a.tif", **PLACES["rotated"]), 0.375, "square metre"),
        (geotiff(tmp_path / "b.tif", **PLACES["degrees"]), 1, "pixel"),
    ):
        found = features(write_polygons(tmp_path / "a", Plane.of(labels), NAMES, None, source))
        assert {one["properties"]["area_unit"] for one in found} == {unit}
        for index in (1, 2, 3):
            of_class = [one["properties"] for one in found if one["properties"]["class"] == index]
            assert {one["name"] for one in of_class} == {NAMES[index]}
            assert sum(one["area"] for one in of_class) == pytest.approx((labels == index).sum() * area)
            num_regions = cv2.connectedComponents((labels == index).astype(np.uint8), connectivity=4)[0] - 1
            assert len(of_class) == num_regions


def test_a_ring_is_a_polygon_with_a_hole_and_corners_do_not_join(tmp_path):
    labels = np.zeros((5, 6), np.uint8)
    labels[0:3, 0:3] = 1
    labels[1, 1] = 0
    labels[3, 3] = 1
    found = features(write_polygons(tmp_path / "a", Plane.of(labels), NAMES, None, None))
    by_area = {one["properties"]["area"]: one["geometry"]["coordinates"] for one in found}
    assert sorted(by_area) == [1, 8]
    assert [sorted(map(tuple, ring[1:])) for ring in by_area[8]] == [
        [(0, 0), (0, 3), (3, 0), (3, 3)],
        [(1, 1), (1, 2), (2, 1), (2, 2)],
    ]
    assert sorted(map(tuple, by_area[1][0][1:])) == [(3, 3), (3, 4), (4, 3), (4, 4)]


def test_polygons_name_the_coordinate_system_where_there_is_one(tmp_path):
    empty = Plane.of(np.zeros((HEIGHT, WIDTH), np.uint8))
    source = geotiff(tmp_path / "map.tif", **PLACES["upright"])
    contents = json.loads(write_polygons(tmp_path / "a", empty, NAMES, None, source).read_text())
    name = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32633"}}
    assert contents == {"type": "FeatureCollection", "crs": name, "features": []}
    contents = json.loads(write_polygons(tmp_path / "a", empty, NAMES, None, None).read_text())
    assert contents == {"type": "FeatureCollection", "features": []}


def test_polygons_without_rasterio_say_what_to_install_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(DataError, match=r"rasterio: run pip install 'ml-src\[geo\]' to have them"):
        write_polygons(tmp_path / "a", Plane.of(regions()), NAMES, None, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_classes", [4, 300])
def test_scenes_give_the_bytes_that_arrays_give(tmp_path, monkeypatch, num_classes):
    """Masks, polygons and uncertainties of a map, and the array in an npz."""
    nodata = 255 if num_classes <= 255 else 65535
    labels = regions(num_classes, dtype=np.uint8 if num_classes <= 255 else np.uint16)
    labels[40:70] = nodata
    numbers = np.random.default_rng(3).random((HEIGHT, WIDTH, 2)).astype(np.float16)
    source = geotiff(tmp_path / "map.tif", **PLACES["rotated"])
    names = [f"class {index}" for index in range(num_classes)]

    def outputs(folder: Path, label_plane: Plane, number_plane: Plane) -> dict[str, bytes]:
        folder.mkdir()
        write_mask(folder / "mask", label_plane, num_classes, nodata, source)
        write_polygons(folder / "polygons", label_plane, names, nodata, source)
        write_overlay(folder / "overlay", label_plane, nodata, source)
        write_uncertainty(folder / "uncertainty", number_plane, source)
        write_probabilities(folder / "probs", number_plane, names[:2], "tiff", source)
        npz = write_probabilities(folder / "probs", number_plane, names[:2], "npz", source)
        with np.load(npz) as arrays:
            assert np.array_equal(arrays["probs"], numbers) and arrays["probs"].dtype == np.float16
        return {path.name: path.read_bytes() for path in folder.iterdir() if path != npz}

    whole = outputs(tmp_path / "whole", Plane.of(labels), Plane.of(numbers))
    in_files = outputs(tmp_path / "files", scene(labels, monkeypatch), scene(numbers, monkeypatch))
    assert whole.keys() == in_files.keys() and len(whole) == 6
    assert [name for name in whole if whole[name] != in_files[name]] == []


def test_probabilities_are_kept_to_the_last_bit(tmp_path):
    """As maps, as arrays, and read by another library, with the classes as names of the bands."""
    probs = np.repeat(np.random.default_rng(0).dirichlet(np.ones(4), (HEIGHT, 1)), WIDTH, axis=1).astype(np.float16)
    probs[0, :4] = [[0, 0, 0, 1], [6e-8, 6e-5, 0.5, 0.5], [1, 0, 0, 0], [np.nan] * 4]
    source = geotiff(tmp_path / "map.tif", **PLACES["upright"])
    for place in (None, source):
        path = write_probabilities(tmp_path / "probs", Plane.of(probs), NAMES, "tiff", place)
        assert tifffile.imread(path).dtype == np.float16
        assert np.array_equal(tifffile.imread(path), probs, equal_nan=True)
        with rasterio.open(path) as raster:
            assert np.array_equal(raster.read().transpose(1, 2, 0), probs.astype(np.float32), equal_nan=True)
            assert list(raster.descriptions) == NAMES
        assert np.array_equal(read_image(path).to_show, probs.astype(np.float32), equal_nan=True)
    assert path.stat().st_size < 0.1 * probs.nbytes


def test_a_picture_of_uncertainty_goes_from_dark_to_light_and_shows_no_data_as_black(tmp_path):
    values = np.linspace(0, 1, 256, dtype=np.float16)[None].repeat(4, axis=0)
    uncertainty = np.stack([values, values / 2], axis=2)
    uncertainty[0] = np.nan
    path, shown_path = write_uncertainty(tmp_path / "a", Plane.of(uncertainty), None)
    assert np.array_equal(tifffile.imread(path), uncertainty, equal_nan=True)
    with rasterio.open(path) as raster:
        assert raster.descriptions == ("entropy", "mutual information")
    assert [path.name, shown_path.name] == ["a.tif", "a.png"]
    with Image.open(shown_path) as picture:
        shown = np.array(picture).astype(float)
    assert (shown[0] == 0).all() and (shown[1] == shown[3]).all()
    luma = shown[1] @ (0.299, 0.587, 0.114)
    assert luma[0] < 60 and luma[-1] > 200 and (np.diff(luma) > -1).all()


def test_an_overlay_is_the_image_with_its_regions_and_no_data_is_left_alone(tmp_path):
    labels = regions()
    labels[100:150, 50:90] = 255
    source = geotiff(tmp_path / "map.tif", **PLACES["upright"])
    image = read_image(source).pixels
    with Image.open(write_overlay(tmp_path / "a", Plane.of(labels), 255, source)) as picture:
        shown = np.array(picture)
    assert np.array_equal(shown[labels == 255], image[labels == 255])
    assert np.array_equal(shown, overlay(image, np.where(labels == 255, 0, labels)))
    with Image.open(write_overlay(tmp_path / "b", Plane.of(labels), 255, source, image=255 - image)) as picture:
        assert np.array_equal(np.array(picture)[labels == 255], 255 - image[labels == 255])


@pytest.mark.parametrize("kind", ["picture", "windows", "map with holes", "floats", "many bands"])
def test_a_large_overlay_is_one_of_every_third_pixel(tmp_path, monkeypatch, kind):
    """Read by windows where the file allows it, and stretched as a whole."""
    monkeypatch.setattr(writers, "MAX_SIDE", 500)
    monkeypatch.setattr(headers, "MIN_WINDOWED", 1)
    height, width = 1300, 50
    rng, path = np.random.default_rng(0), tmp_path / "a.tif"
    ramp = np.linspace(0, 3000, height)[:, None, None]
    pixels = (rng.random((height, width, 300 if kind == "many bands" else 3)) * 500 + ramp).astype(np.uint16)
    if kind == "picture":
        pixels, path = (pixels >> 4).astype(np.uint8), tmp_path / "a.png"
        Image.fromarray(pixels).save(path)
    elif kind == "map with holes":
        pixels[700:, 10:20] = 9
        where = {"height": height, "width": width, "count": 3, "crs": "EPSG:32633", "transform": UPRIGHT}
        with rasterio.open(path, "w", driver="GTiff", dtype="uint16", nodata=9, blockysize=16, **where) as raster:
            raster.write(pixels.transpose(2, 0, 1))
    else:
        pixels = pixels.astype(np.float32) if kind == "floats" else pixels
        tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig", rowsperstrip=16)
    assert headers.read_header(path).windowed == (kind != "picture")
    labels = cv2.resize(regions(), (width, height), interpolation=cv2.INTER_NEAREST)
    with Image.open(write_overlay(tmp_path / "o", scene(labels, monkeypatch), None, path)) as picture:
        assert picture.size == (17, 434)
        expected = overlay(read_image(path).to_show[::3, ::3], labels[::3, ::3])
        assert np.array_equal(np.array(picture), expected)


def test_large_files_have_offsets_of_64_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(tiff_writer, "CLASSIC_MAX", 1000)
    path = write_mask(tmp_path / "a", scene(regions(), monkeypatch), 4, None, None)
    assert path.read_bytes().startswith(b"II+\0")
    assert np.array_equal(read_mask(path), regions())


@pytest.mark.parametrize("bands", [1, 3, 40, 4000])
def test_rows_are_asked_for_once_in_order_and_few_at_a_time(tmp_path, monkeypatch, bands):
    monkeypatch.setattr(tiff_writer, "IN_FLIGHT", 100_000)
    asked = []

    def rows(top: int, bottom: int) -> NDArray[Any]:
        asked.append((top, bottom))
        return np.broadcast_to(np.arange(top, bottom, dtype=np.float16)[:, None, None], (bottom - top, 3, bands))

    with (tmp_path / "a.tif").open("wb") as file:
        write_tiff(file, (300, 3, bands), np.float16, rows)
    assert [top for top, _ in asked] == [0, *(bottom for _, bottom in asked[:-1])] and asked[-1][1] == 300
    assert all((bottom - top) * 3 * bands * 2 <= 100_000 or bottom - top <= 16 for top, bottom in asked)
    assert np.array_equal(tifffile.imread(tmp_path / "a.tif").reshape(300, 3, bands)[:, 2, -1], np.arange(300))


class Cut(Plane):
    """A plane that cannot be read to its end, as on a disk that fails."""

    def rows(self, top: int, bottom: int) -> NDArray[Any]:
        if bottom > 260:
            raise OSError(errno.EIO, "the disk is gone")
        return super().rows(top, bottom)


@pytest.mark.parametrize("what", ["mask", "map", "overlay", "tiff", "npz", "uncertainty", "polygons"])
def test_what_is_cut_off_leaves_the_old_file_or_none(tmp_path, monkeypatch, what):
    """A writer that is stopped after most of the rows."""
    source = geotiff(tmp_path / "map.tif", **PLACES["upright"])
    folder = tmp_path / "out"
    folder.mkdir()

    def write(plane: Callable[[tuple[int, ...], Any], Plane]) -> None:
        labels = plane((HEIGHT, WIDTH), np.uint8)
        numbers = plane((HEIGHT, WIDTH, 1), np.float16)
        if what == "overlay":
            write_overlay(folder / "a", labels, None, source)
        elif what == "uncertainty":
            write_uncertainty(folder / "a", numbers, source)
        elif what == "polygons":
            write_polygons(folder / "a", labels, NAMES, None, source)
        elif what in ("tiff", "npz"):
            write_probabilities(folder / "a", numbers, NAMES[:1], what, source)
        else:
            write_mask(folder / "a", labels, 4, None, source if what == "map" else None)

    monkeypatch.setattr(planes, "IN_MEMORY", 0)
    monkeypatch.setattr(planes, "BAND", 7000)
    with pytest.raises(OSError, match="the disk is gone"):
        write(Cut)
    assert not list(folder.iterdir())
    write(Plane)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OSError, match="the disk is gone"):
        write(Cut)
    assert before and {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_tile_of_a_map_is_decoded_once(tmp_path):
    """Its later rows are read although it is gone from the file; else polygons would decode each tile 256 times."""
    labels = regions()
    path = write_mask(tmp_path / "a", Plane.of(labels), 4, None, geotiff(tmp_path / "map.tif", **PLACES["upright"]))
    with tifffile.TiffFile(path) as tiff:
        start, length = tiff.pages.first.dataoffsets[0], sum(tiff.pages.first.databytecounts[:2])
    with geotiffs._opened(path) as raster:
        first = raster.read(1, window=((0, 1), (0, WIDTH)))
        with path.open("r+b") as file:
            file.seek(start)
            file.write(bytes(length))
        last = raster.read(1, window=((255, 256), (0, WIDTH)))
    assert np.array_equal(np.concatenate([first, last]), labels[[0, 255]])


def test_where_an_image_lies_is_read_once_for_all_its_outputs_and_again_when_it_has_changed(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(writers, "georeference", lambda path: asked.append(path) or georeference(path))
    source = geotiff(tmp_path / "map.tif", **PLACES["upright"])
    labels, numbers = Plane.of(regions()), Plane.of(np.zeros((HEIGHT, WIDTH, 1), np.float16))
    write_mask(tmp_path / "a", labels, 4, None, source)
    write_polygons(tmp_path / "a", labels, NAMES, None, source)
    write_uncertainty(tmp_path / "u", numbers, source)
    write_probabilities(tmp_path / "p", numbers, NAMES[:1], "tiff", source)
    assert asked == [source]
    os.utime(geotiff(source, **PLACES["rotated"]), ns=(0, 0))
    assert place_of(source) == georeference(source) and place_of(source).transform == tuple(ROTATED)[:6]
    assert asked == [source] * 2
    source.unlink()
    with pytest.raises(DataError, match=r"map\.tif"):
        place_of(source)
    assert place_of(None) is None


def test_dots_in_a_name_stay(tmp_path):
    assert write_mask(tmp_path / "tile_1.5_b", Plane.of(regions()), 4, None, None).name == "tile_1.5_b.png"


def test_real_maps_give_masks_and_polygons_on_the_same_ground(tmp_path, real_data):
    """The scenes' own masks, written as if they had been predicted."""
    folder = real_data / "fair_aerial_scenes_geotiff"
    for source in sorted((folder / "images").glob("*.tif"))[:2]:
        truth = folder / "masks_geotiff" / source.name
        labels = read_mask(truth)
        mask = write_mask(tmp_path / source.stem, Plane.of(labels), 2, 255, source)
        with rasterio.open(source) as image, rasterio.open(truth) as expected, rasterio.open(mask) as raster:
            assert raster.crs == image.crs == expected.crs
            assert raster.transform == image.transform == expected.transform and raster.bounds == image.bounds
            assert np.array_equal(raster.read(1), expected.read(1))
            polygons = write_polygons(tmp_path / source.stem, Plane.of(labels), ["ground", "building"], 255, source)
            shapes = [one["geometry"] for one in features(polygons)]
            again = rasterize(shapes, image.shape, transform=image.transform, dtype="uint8")
        assert labels.any() and np.array_equal(again, labels)
        area = sum(one["properties"]["area"] for one in features(polygons))
        assert area == pytest.approx(labels.sum() * 0.07464553543468355**2)
