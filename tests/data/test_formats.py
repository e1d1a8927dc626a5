"""Images and masks of every kind that arrives, read whole and by windows; oracles are the libraries that wrote them."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from ml_src.core.data import geotiffs, headers
from ml_src.core.data.files import image_info, read_image, read_mask
from ml_src.core.data.headers import read_header
from ml_src.core.errors import DataError
from ml_src.core.transforms.source import Window

rasterio = pytest.importorskip("rasterio")
DTYPES = ["uint8", "uint16", "int16", "float32"]


def numbers(dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    generator = np.random.default_rng(0)
    if dtype == "float32":
        return generator.normal(100, 30, shape).astype(np.float32)
    info = np.iinfo(dtype)
    return generator.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)


def write_geotiff(path: Path, pixels: NDArray[Any], **profile: Any) -> None:
    """Pixels (H, W, C), half a metre each."""
    place = rasterio.transform.from_origin(300_000, 5_800_000, 0.5, 0.5)
    height, width, count = pixels.shape
    how = {"driver": "GTiff", "crs": "EPSG:32633", "transform": place, "dtype": pixels.dtype} | profile
    with rasterio.open(path, "w", height=height, width=width, count=count, **how) as raster:
        raster.write(pixels.transpose(2, 0, 1))


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of some thousand pixels are large ones."""
    monkeypatch.setattr(headers, "MIN_WINDOWED", 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7, 224])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_a_tiff_of_any_number_of_bands_is_read_as_stored(tmp_path, dtype, channels, planar):
    pixels = numbers(dtype, (9, 11, channels))
    stored = pixels if planar == "contig" else pixels.transpose(2, 0, 1)
    if channels == 1:
        stored = pixels[:, :, 0]
    how = {"photometric": "minisblack", "planarconfig": planar} if channels > 1 else {}
    tifffile.imwrite(tmp_path / "a.tif", stored, **how)
    raster = read_image(tmp_path / "a.tif")
    assert raster.missing is None
    assert raster.pixels.dtype == dtype and np.array_equal(raster.pixels, pixels)
    assert image_info(tmp_path / "a.tif").channels == channels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 4, 224])
def test_a_geotiff_of_any_number_of_bands_is_read_as_stored(tmp_path, dtype, channels):
    pixels = numbers(dtype, (9, 11, channels))
    write_geotiff(tmp_path / "a.tif", pixels, photometric="minisblack")
    raster = read_image(tmp_path / "a.tif")
    assert raster.missing is None
    assert raster.pixels.dtype == dtype and np.array_equal(raster.pixels, pixels)
    assert image_info(tmp_path / "a.tif").geo


@pytest.mark.parametrize("compression", ["lzw", "deflate", "zstd", "packbits", "lzma", None])
@pytest.mark.parametrize("predictor", [False, True])
@pytest.mark.parametrize("layout", [{}, {"rowsperstrip": 7}, {"tile": (16, 32)}])
def test_the_compressions_that_microscopes_and_maps_use_are_read(
    tmp_path, small_windows, compression, predictor, layout
):
    if predictor and compression in (None, "packbits"):
        pytest.skip("TIFF has no predictor with it")
    pixels = numbers("uint16", (50, 70, 3))
    tifffile.imwrite(
        tmp_path / "a.tif", pixels, photometric="rgb", compression=compression, predictor=predictor, **layout
    )
    assert np.array_equal(read_image(tmp_path / "a.tif").pixels, pixels)
    window = Window(13, 21, 30, 40)
    assert np.array_equal(read_image(tmp_path / "a.tif", window=window).pixels, pixels[13:43, 21:61])


@pytest.mark.parametrize("layout", [{"rowsperstrip": 5}, {"tile": (16, 16)}, {"tile": (64, 32)}])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("coordinates", [False, True])
def test_every_window_has_the_pixels_of_the_whole(tmp_path, small_windows, layout, planar, coordinates):
    pixels = numbers("int16", (80, 50, 5))
    path = tmp_path / "a.tif"
    if coordinates:
        tile = layout.get("tile")
        how = {"tiled": True, "blockysize": tile[0], "blockxsize": tile[1]} if tile else {"blockysize": 5}
        write_geotiff(path, pixels, interleave="pixel" if planar == "contig" else "band", **how)
    else:
        stored = pixels if planar == "contig" else pixels.transpose(2, 0, 1)
        tifffile.imwrite(path, stored, photometric="minisblack", planarconfig=planar, **layout)
    assert image_info(path).windowed
    for top, left, height, width in itertools.product((0, 15, 79), (0, 16, 49), (1, 17, 70), (1, 33)):
        window = Window(top, left, min(height, 80 - top), min(width, 50 - left))
        part = pixels[top : top + window.height, left : left + window.width]
        assert np.array_equal(read_image(path, window=window).pixels, part), window


def test_a_window_of_a_large_tiff_reads_a_small_part_of_the_file(tmp_path):
    """Noise does not compress: what is not read cannot be in the pixels."""
    path = tmp_path / "a.tif"
    pixels = numbers("uint8", (2048, 2048, 3))
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(256, 256))
    with path.open("r+b") as file:  # all that lies outside of the four tiles around the middle is lost
        with tifffile.TiffFile(path) as tiff:
            page: Any = tiff.pages.first
            spans = list(zip(page.dataoffsets, page.databytecounts, strict=True))
        for index, (offset, count) in enumerate(spans):
            if not (index // 8 in (3, 4) and index % 8 in (3, 4)):
                file.seek(offset)
                file.write(bytes(count))
    assert np.array_equal(read_image(path, window=Window(800, 800, 448, 448)).pixels, pixels[800:1248, 800:1248])


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_survive_with_and_without_alpha(tmp_path, suffix, channels):
    import cv2

    pixels = numbers("uint16", (9, 11, channels))
    path = tmp_path / f"a{suffix}"
    if suffix == ".tif":
        photometric = "minisblack" if channels < 3 else "rgb"
        extra = {"extrasamples": ["unassalpha"]} if channels in (2, 4) else {}
        tifffile.imwrite(
            path, pixels if channels > 1 else pixels[:, :, 0], photometric=photometric, planarconfig="contig", **extra
        )
    elif channels == 2:
        pytest.skip("no library here writes a 16-bit PNG of gray and alpha")
    else:
        swapped = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]
        cv2.imwrite(str(path), pixels[:, :, swapped])
    colours = pixels[:, :, : 1 if channels < 3 else 3]
    assert np.array_equal(read_image(path).pixels, colours)
    assert image_info(path).alpha == (channels in (2, 4))
    assert read_image(path, 3).pixels.shape == (9, 11, 3) and read_image(path, 1).pixels.dtype == np.uint16


@pytest.mark.parametrize("dtype", DTYPES)
def test_gray_is_the_luma_of_colours_in_every_number_type(tmp_path, dtype):
    pixels = np.abs(numbers(dtype, (9, 11, 3)).astype(np.float64)).clip(0, 30_000).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb")
    gray = read_image(tmp_path / "a.tif", 1).pixels
    assert gray.dtype == dtype and gray.shape == (9, 11, 1)
    luma = pixels.astype(np.float64) @ [0.299, 0.587, 0.114]
    assert np.abs(gray[:, :, 0] - luma).max() <= (0.01 if dtype == "float32" else 0.6)  # 65536ths are not thousandths


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_16_bit_tiff_is_turned_upright_as_an_8_bit_one_is(tmp_path, orientation):
    pixels = numbers("uint8", (5, 8, 3))
    for name, factor in (("a", 1), ("b", 257)):
        extra = [(274, "H", 1, orientation, False)]
        tifffile.imwrite(tmp_path / f"{name}.tif", pixels.astype(np.uint16) * factor if factor > 1 else pixels,
                         photometric="rgb", extratags=extra)  # fmt: skip
    wide = read_image(tmp_path / "b.tif").pixels
    with Image.open(tmp_path / "a.tif") as picture:
        assert np.array_equal(wide // 257, np.asarray(picture.convert("RGB")))
    info = image_info(tmp_path / "b.tif")
    assert (info.height, info.width) == wide.shape[:2]


@pytest.mark.parametrize(
    ("dtype", "nodata"), [("int16", -32768), ("float32", -9999.0), ("float32", float("nan")), ("uint8", 0)]
)
def test_nodata_is_missing_band_by_band(tmp_path, dtype, nodata):
    pixels = np.abs(numbers(dtype, (6, 7, 3)).clip(1, 120)).astype(dtype)
    pixels[0, :, 1] = nodata
    pixels[1] = nodata
    write_geotiff(tmp_path / "a.tif", pixels, nodata=nodata)
    missing = read_image(tmp_path / "a.tif").missing
    assert missing is not None
    expected = np.zeros((6, 7, 3), bool)
    expected[0, :, 1] = expected[1] = True
    assert np.array_equal(missing, expected)
    part = read_image(tmp_path / "a.tif", window=Window(0, 2, 2, 3))
    assert np.array_equal(part.missing, expected[:2, 2:5])


def test_a_nodata_that_the_number_type_cannot_hold_is_nowhere(tmp_path):
    pixels = numbers("uint8", (6, 7, 1))
    tifffile.imwrite(tmp_path / "b.tif", pixels[:, :, 0], extratags=[(42113, "s", 0, "-9999", True)])
    raster = read_image(tmp_path / "b.tif")
    assert np.array_equal(raster.pixels, pixels) and (raster.missing is None or not raster.missing.any())


def test_what_alpha_hides_and_what_a_validity_mask_leaves_out_is_missing(tmp_path):
    pixels = numbers("uint8", (6, 7, 4))
    pixels[:, :, 3] = 255
    pixels[2, 3:, 3] = 0
    write_geotiff(tmp_path / "alpha.tif", pixels, photometric="rgb", alpha="yes")
    expected = np.zeros((6, 7, 1), bool)
    expected[2, 3:] = True
    raster = read_image(tmp_path / "alpha.tif")
    assert np.array_equal(raster.pixels, pixels[:, :, :3]) and np.array_equal(raster.missing, expected)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        write_geotiff(tmp_path / "mask.tif", pixels[:, :, :3])
        with rasterio.open(tmp_path / "mask.tif", "r+") as file:
            file.write_mask(~expected[:, :, 0])
    raster = read_image(tmp_path / "mask.tif")
    assert np.array_equal(raster.pixels, pixels[:, :, :3]) and np.array_equal(raster.missing, expected)


def test_what_is_not_finite_is_missing(tmp_path):
    pixels = numbers("float32", (6, 7, 2))
    pixels[0, 0, 0], pixels[1, 1, 1] = np.nan, np.inf
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack", planarconfig="contig")
    missing = read_image(tmp_path / "a.tif").missing
    assert missing is not None and np.argwhere(missing).tolist() == [[0, 0, 0], [1, 1, 1]]


def test_a_geotiff_without_rasterio_says_what_to_install(tmp_path, monkeypatch):
    import sys

    write_geotiff(tmp_path / "a.tif", numbers("uint8", (6, 7, 3)))
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(DataError, match=r"a\.tif is a GeoTIFF: run pip install 'ml-src\[geo\]'"):
        read_image(tmp_path / "a.tif")
    assert image_info(tmp_path / "a.tif").channels == 3  # the header can be read without


def test_another_number_of_bands_says_what_to_set(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", numbers("uint8", (6, 7, 5)), photometric="minisblack", planarconfig="contig")
    with pytest.raises(
        DataError, match=r"a\.tif has 5 channels but model.in_channels is 3: set model.in_channels to 5"
    ):
        read_image(tmp_path / "a.tif", 3)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("coordinates", [False, True])
@pytest.mark.parametrize("tiled", [False, True])
def test_windows_of_a_mask_have_the_values_of_the_whole(tmp_path, small_windows, dtype, coordinates, tiled):
    values = numbers(dtype, (48, 64, 1))
    path = tmp_path / "a.tif"
    if coordinates:
        write_geotiff(path, values, tiled=tiled, **({"blockxsize": 16, "blockysize": 16} if tiled else {}))
    else:
        tifffile.imwrite(path, values[:, :, 0], **({"tile": (16, 16)} if tiled else {"rowsperstrip": 8}))
    assert np.array_equal(read_mask(path), values[:, :, 0]) and read_mask(path).dtype == dtype
    assert np.array_equal(read_mask(path, Window(10, 20, 30, 40)), values[10:40, 20:60, 0])


def test_the_window_of_a_png_mask_has_its_values_too(tmp_path):
    values = numbers("uint8", (20, 30))
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.array_equal(read_mask(tmp_path / "a.png", Window(3, 4, 10, 20)), values[3:13, 4:24])


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_tiff_cut_short_is_an_error_and_not_black(tmp_path, keep):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, numbers("uint16", (64, 64, 3)), photometric="rgb", rowsperstrip=8)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DataError, match=r"a\.tif cannot be read"):
        read_image(path)


def test_a_bomb_is_refused_by_its_header(tmp_path):
    """A PNG of 60 000 x 60 000 pixels that is a few hundred bytes long."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )
    with pytest.raises(DataError, match=r"60000x60000 pixels, 10\.1 GiB once decoded, where 2 are the limit"):
        read_image(tmp_path / "a.png")
    assert read_header(tmp_path / "a.png").width == 60_000


def masked(path: Path, pixels: NDArray[Any], valid: NDArray[np.bool_], **profile: Any) -> None:
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        write_geotiff(path, pixels, **profile)
        with rasterio.open(path, "r+") as file:
            file.write_mask(valid)


def test_a_compressed_photograph_of_the_ground_keeps_its_validity_mask(tmp_path, small_windows):
    """As orthophotos are published: JPEG of luma and chroma, with the border left out by a mask."""
    valid = np.ones((64, 96), bool)
    valid[:, 80:] = False
    pixels = np.full((64, 96, 3), (200, 100, 50), np.uint8)
    how = {"photometric": "ycbcr", "compress": "jpeg", "tiled": True, "blockxsize": 16, "blockysize": 16}
    masked(tmp_path / "a.tif", pixels, valid, **how)
    raster = read_image(tmp_path / "a.tif")
    assert np.abs(raster.pixels.astype(int) - (200, 100, 50)).max() < 6
    assert np.array_equal(raster.nowhere, ~valid) and image_info(tmp_path / "a.tif").windowed
    part = read_image(tmp_path / "a.tif", window=Window(8, 60, 20, 30))
    assert np.array_equal(part.pixels, raster.pixels[8:28, 60:90]) and np.array_equal(part.nowhere, ~valid[8:28, 60:90])


def test_a_palette_geotiff_shows_its_colours_and_lacks_its_nodata(tmp_path):
    indices = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    write_geotiff(tmp_path / "a.tif", indices[:, :, None], photometric="palette", nodata=0)
    colours = {0: (0, 0, 0, 255), 1: (255, 0, 10, 255), 2: (1, 200, 3, 255)}
    with rasterio.open(tmp_path / "a.tif", "r+") as file:
        file.write_colormap(1, colours)
    raster = read_image(tmp_path / "a.tif")
    assert np.array_equal(raster.pixels, np.array([colours[i][:3] for i in range(3)], np.uint8)[indices])
    assert np.array_equal(raster.nowhere, indices == 0)
    assert np.array_equal(read_mask(tmp_path / "a.tif"), indices)


def test_a_geotiff_of_few_bits_is_spread_over_the_gray_levels(tmp_path):
    values = np.array([[0, 1, 2, 3]], np.uint8)
    write_geotiff(tmp_path / "a.tif", values[:, :, None], nbits=2, nodata=3)
    raster = read_image(tmp_path / "a.tif")
    assert raster.pixels[:, :, 0].tolist() == [[0, 85, 170, 255]]
    assert raster.nowhere is not None and raster.nowhere.tolist() == [[False, False, False, True]]
    assert np.array_equal(read_mask(tmp_path / "a.tif"), values)


def test_nodata_alpha_and_mask_are_honoured_together(tmp_path):
    pixels = np.full((6, 7, 1), 5, np.int16)
    pixels[0] = -1
    valid = np.ones((6, 7), bool)
    valid[5] = False
    masked(tmp_path / "mask.tif", pixels, valid, nodata=-1)
    expected = np.zeros((6, 7), bool)
    expected[0] = expected[5] = True
    assert np.array_equal(read_image(tmp_path / "mask.tif").nowhere, expected)
    colours = np.full((6, 7, 4), 255, np.uint8)
    colours[0, :, :3] = 0
    colours[5, :, 3] = 0
    write_geotiff(tmp_path / "alpha.tif", colours, photometric="rgb", alpha="yes", nodata=0)
    assert np.array_equal(read_image(tmp_path / "alpha.tif").nowhere, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_pixels_of_a_geotiff_lie_where_its_coordinates_say_whatever_exif_says(tmp_path, orientation):
    pixels = numbers("uint8", (5, 8, 3))
    tags = [(33550, "d", 3, (1.0, 1.0, 0.0), True), (274, "H", 1, orientation, True)]
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extratags=tags)
    info = image_info(tmp_path / "a.tif")
    assert (info.height, info.width) == (5, 8) and np.array_equal(read_image(tmp_path / "a.tif").pixels, pixels)


def test_a_geotiff_of_four_bands_has_the_same_number_in_its_header_and_its_pixels(tmp_path):
    pixels = numbers("uint8", (5, 8, 4))
    write_geotiff(tmp_path / "a.tif", pixels, photometric="rgb", alpha="unspecified")
    assert image_info(tmp_path / "a.tif").channels == read_image(tmp_path / "a.tif").pixels.shape[2] == 4


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_white_is_zero_is_turned_round_in_an_image(tmp_path, dtype):
    stored = numbers(dtype, (5, 8))
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="miniswhite")
    assert np.array_equal(read_image(tmp_path / "a.tif").pixels[:, :, 0], np.iinfo(dtype).max - stored)


def test_alpha_is_dropped_wherever_it_stands(tmp_path):
    pixels = numbers("uint8", (5, 8, 5))
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", planarconfig="contig", extrasamples=[2, 0])
    assert np.array_equal(read_image(tmp_path / "a.tif").pixels, pixels[:, :, [0, 1, 2, 4]])


def test_a_reduced_copy_that_comes_first_is_not_the_picture(tmp_path):
    pixels = numbers("uint8", (64, 64, 3))
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(pixels[::8, ::8], photometric="rgb", subfiletype=1)
        tiff.write(pixels, photometric="rgb")
    assert np.array_equal(read_image(tmp_path / "a.tif").pixels, pixels)


def test_a_palette_of_16_bits_is_refused(tmp_path):
    colours = np.zeros((3, 65536), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", numbers("uint16", (5, 8)), photometric="palette", colormap=colours)
    with pytest.raises(DataError, match=r"a\.tif has a palette of 16 bits: convert it to RGB"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("nodata", ["-3.4028234663852886e+38", "-1.7976931348623157e+308"])
def test_common_values_for_no_data_make_no_noise(tmp_path, recwarn, caplog, nodata):
    pixels = np.array([[1.0, float(nodata)]])
    tags = [(33550, "d", 3, (1.0, 1.0, 0.0), True), (42113, "s", 0, nodata, True)]
    tifffile.imwrite(tmp_path / "a.tif", pixels.astype(np.float32 if "+38" in nodata else np.float64), extratags=tags)
    raster = read_image(tmp_path / "a.tif")
    assert raster.nowhere is not None and raster.nowhere.tolist() == [[False, True]]
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]
    assert not caplog.records


def test_the_place_of_a_geotiff_is_its_rectangle_on_earth(tmp_path):
    write_geotiff(tmp_path / "a.tif", numbers("uint8", (6, 8, 1)))
    place = geotiffs.place_of(tmp_path / "a.tif")
    assert place == ("EPSG:32633", 300_000, 5_799_997, 300_004, 5_800_000)


def test_real_hyperspectral_tiles_have_their_bands_and_holes(real_data):
    path = sorted((real_data / "enmap_potsdam_geotiff" / "images").glob("*.tif"))[0]
    raster = read_image(path)
    assert raster.pixels.shape == (32, 32, 224) and raster.missing is not None
    assert np.flatnonzero(raster.missing.all(axis=(0, 1))).tolist() == list(range(129, 135))
