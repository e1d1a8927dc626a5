"""Files: which belong together, and that pixels come out as they were put in."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from ml_src.core.data.files import (
    ImageInfo,
    Pair,
    find_pairs,
    image_info,
    read_class_names,
    read_image,
    read_mask,
)
from ml_src.core.errors import DataError

GRADIENT = np.arange(12, dtype=np.uint8).reshape(3, 4)
EXIF_ORIENTATION = 274


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[EXIF_ORIENTATION] = orientation
    return tags


def corners() -> np.ndarray:
    """Draw 16 x 32 pixels: red top left, green top right, blue bottom left, white bottom right."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16], pixels[:8, 16:], pixels[8:, :16], pixels[8:, 16:] = (255, 0, 0), (0, 255, 0), (0, 0, 255), 255
    return pixels


# Pairs


def test_pairs_are_matched_by_stem_and_sorted(tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    touch(
        images / "b 2.JPG", images / "ä.tif", images / "a.1.png", masks / "a.1.PNG", masks / "b 2.png", masks / "ä.png"
    )
    found = find_pairs(images, masks)
    assert found == [
        Pair(images / "a.1.png", masks / "a.1.PNG"),
        Pair(images / "b 2.JPG", masks / "b 2.png"),
        Pair(images / "ä.tif", masks / "ä.png"),
    ]


def test_an_accent_spelled_by_a_mac_matches_that_of_a_pc(tmp_path):
    touch(tmp_path / "images" / "e\u0301.png", tmp_path / "masks" / "\u00e9.png")
    assert len(find_pairs(tmp_path / "images", tmp_path / "masks")) == 1


def test_what_is_no_image_is_passed_over(tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    touch(images / "a.png", masks / "a.png")
    touch(
        images / ".hidden.png", images / "Thumbs.db", images / "SOURCE.md", masks / "notes.txt", masks / "b.png" / "c"
    )
    assert find_pairs(images, masks) == [Pair(images / "a.png", masks / "a.png")]


def test_everything_without_a_partner_is_named_at_once(tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    touch(images / "a.png", images / "b.png", images / "c.png", images / "c.jpg", masks / "a.png", masks / "d.png")
    with pytest.raises(DataError) as error:
        find_pairs(images, masks)
    assert str(error.value) == (
        f"{images} has more than one file of the stem 'c'; "
        "3 images have no mask of the same stem: b.png, c.jpg, c.png; "
        "1 mask has no image of the same stem: d.png"
    )


def test_every_name_is_given_however_many_there_are(tmp_path):
    touch(*(tmp_path / "images" / f"{index:02}.png" for index in range(25)), tmp_path / "masks" / "00.png")
    with pytest.raises(DataError, match=r"^24 images have no mask ") as caught:
        find_pairs(tmp_path / "images", tmp_path / "masks")
    assert all(f"{index:02}.png" in str(caught.value) for index in range(1, 25))


def test_a_missing_or_empty_folder_is_named(tmp_path):
    touch(tmp_path / "images" / "a.png", tmp_path / "masks" / "readme.txt")
    with pytest.raises(DataError, match="nowhere cannot be read"):
        find_pairs(tmp_path / "images", tmp_path / "nowhere")
    with pytest.raises(DataError, match="masks holds no image files"):
        find_pairs(tmp_path / "images", tmp_path / "masks")


def test_a_line_break_in_a_name_is_refused_because_index_files_have_one_path_a_line(tmp_path):
    touch(tmp_path / "images" / "a\nb.png")
    with pytest.raises(DataError, match="line break"):
        find_pairs(tmp_path / "images", tmp_path / "images")


# Class names


@pytest.mark.parametrize("text", [b"sky\nroad\n", b"\xef\xbb\xbfsky\r\nroad\r\n\r\n", b"sky\nroad"])
def test_class_names_survive_windows_editors(tmp_path, text):
    (tmp_path / "classes.txt").write_bytes(text)
    assert read_class_names(tmp_path) == ["sky", "road"]


def test_no_class_names_is_none_and_no_utf_8_is_an_error(tmp_path):
    assert read_class_names(tmp_path) is None
    (tmp_path / "classes.txt").write_bytes("straße".encode("latin-1"))
    with pytest.raises(DataError, match=r"classes\.txt cannot be read .* UTF-8"):
        read_class_names(tmp_path)


# Images


def test_an_rgb_image_comes_out_as_stored_and_gray_by_luma(tmp_path):
    pixels = corners()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png", 3).pixels, pixels)
    gray = read_image(tmp_path / "a.png", 1).pixels
    assert gray.shape == (16, 32, 1)
    assert [gray[0, 0, 0], gray[0, -1, 0], gray[-1, 0, 0], gray[-1, -1, 0]] == [76, 150, 29, 255]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_a_gray_image_is_repeated_for_three_channels(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(GRADIENT).save(path)
    assert np.array_equal(read_image(path, 1).pixels[..., 0], GRADIENT)
    assert np.array_equal(read_image(path, 3).pixels, np.repeat(GRADIENT[..., None], 3, axis=2))
    assert read_image(path, 3).pixels.flags.writeable


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_alpha_is_dropped_and_not_blended(tmp_path, suffix):
    pixels = np.dstack([corners(), np.full((16, 32), 128, np.uint8)])
    path = tmp_path / f"a{suffix}"
    Image.fromarray(pixels).save(path, **({"lossless": True, "exact": True} if suffix == ".webp" else {}))
    assert np.array_equal(read_image(path, 3).pixels, corners())
    info = image_info(path)
    assert (info.height, info.width, info.channels) == (16, 32, 3)


def test_gray_with_alpha_is_gray(tmp_path):
    Image.merge("LA", [Image.fromarray(GRADIENT), Image.fromarray(GRADIENT)]).save(tmp_path / "a.png")
    info = image_info(tmp_path / "a.png")
    assert (info.channels, info.dtype, info.alpha) == (1, "uint8", True)
    assert np.array_equal(read_image(tmp_path / "a.png", 1).pixels[..., 0], GRADIENT)


def test_a_palette_image_shows_its_colours(tmp_path):
    indexed = Image.fromarray(np.array([[0, 1]], np.uint8), mode="P")
    indexed.putpalette([10, 20, 30, 40, 50, 60])
    indexed.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 3).pixels.tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert image_info(tmp_path / "a.png").channels == 3


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_pixels_and_size(tmp_path, suffix, orientation):
    """What a viewer shows: the stored picture, undone by the EXIF specification's table."""
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a),
    }
    path = tmp_path / f"a{suffix}"
    Image.fromarray(corners()).save(path, exif=exif(orientation))
    upright = undo[orientation](corners())
    pixels = read_image(path, 3).pixels
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright)[[2, -3]][:, [2, -3]].max() < 40  # lossy only a little inside a quarter
    info = image_info(path)
    assert (info.height, info.width) == upright.shape[:2]


def test_a_phones_jpeg_with_a_preview_is_one_picture(tmp_path):
    picture = Image.fromarray(corners())
    picture.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[picture.resize((8, 4))])
    assert Image.open(tmp_path / "a.jpg").format == "MPO"
    assert read_image(tmp_path / "a.jpg", 3).pixels.shape == (16, 32, 3)


def write_16_bit_rgb_png(path: Path) -> None:
    """Pillow cannot write it, and would read it cut to 8 bits."""
    import cv2

    cv2.imwrite(str(path), np.full((3, 4, 3), 40_000, np.uint16))


@pytest.mark.parametrize(
    ("name", "write", "dtype", "channels"),
    [
        ("a.png", lambda path: Image.fromarray(GRADIENT.astype(np.uint16) * 300).save(path), "uint16", 1),
        ("a.tif", lambda path: Image.fromarray(GRADIENT.astype(np.uint16) * 300).save(path), "uint16", 1),
        ("a.png", write_16_bit_rgb_png, "uint16", 3),
        ("a.tif", lambda path: tifffile.imwrite(path, np.zeros((3, 4, 3), np.uint16), photometric="rgb"), "uint16", 3),
        ("a.tif", lambda path: Image.fromarray(GRADIENT.astype(np.float32)).save(path), "float32", 1),
        ("a.tif", lambda path: Image.fromarray(GRADIENT.astype(np.int32)).save(path), "float32", 1),
        ("a.tif", lambda path: tifffile.imwrite(path, GRADIENT.astype(np.int8)), "int16", 1),
    ],
)
def test_more_than_8_bits_are_described_and_read_uncut(tmp_path, name, write, dtype, channels):
    write(tmp_path / name)
    assert image_info(tmp_path / name) == ImageInfo(3, 4, channels, dtype, alpha=False, windowed=False, geo=False)
    pixels = read_image(tmp_path / name).pixels
    assert (pixels.shape, pixels.dtype) == ((3, 4, channels), dtype)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: tifffile.imwrite(path, np.zeros((5, 8, 9), np.uint8)), "has 5 pages, but an image is one page"),
        (lambda path: tifffile.imwrite(path, np.zeros((8, 9, 4), np.uint8), photometric="separated"), "not gray, RGB"),
        (lambda path: tifffile.imwrite(path, np.zeros((8, 9), np.complex64)), "has complex numbers"),
        (lambda path: Image.new("CMYK", (4, 3)).save(path, format="JPEG"), r"not gray, RGB or bands \(mode CMYK\)"),
        (lambda path: path.write_text("hello"), "is no image that can be read"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid"), "is a Git LFS pointer"),
    ],
)
def test_what_is_not_one_picture_is_refused_in_a_sentence(tmp_path, write, message):
    path = tmp_path / "a.tif"
    write(path)
    for read in (image_info, read_image):
        with pytest.raises(DataError, match=rf"a\.tif .*{message}"):
            read(path)


def test_overviews_of_a_geotiff_are_not_pages(tmp_path):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(corners(), photometric="rgb")
        tiff.write(corners()[::2, ::2], photometric="rgb", subfiletype=1)
    assert np.array_equal(read_image(path, 3).pixels, corners())


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_a_file_cut_short_is_named(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=rf"a\{suffix} (cannot be read|is no image)"):
        read_image(path, 3)


def test_a_file_that_is_gone_is_named(tmp_path):
    for read in (read_mask, image_info):
        with pytest.raises(DataError, match=r"gone\.png does not exist"):
            read(tmp_path / "gone.png")


# Masks


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_mask_values_come_out_as_stored(tmp_path, dtype, suffix):
    values = (GRADIENT.astype(dtype) * (5000 if dtype == np.uint16 else 20)).astype(dtype)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(values).save(path)
    assert np.array_equal(read_mask(path), values)
    assert read_mask(path).dtype == dtype


@pytest.mark.parametrize(("name", "bits"), [("a.png", 1), ("a.png", 2), ("a.png", 4), ("a.png", 8), ("a.tif", 8)])
def test_a_palette_mask_keeps_its_indices(tmp_path, name, bits):
    values = np.arange(16, dtype=np.uint8).reshape(4, 4) & (2**bits - 1)
    indexed = Image.fromarray(values, mode="P")
    indexed.putpalette([200, 30, 30, 30, 200, 30, 30, 30, 200] + [7] * 39)
    indexed.save(tmp_path / name, **({"bits": bits} if name == "a.png" else {}))
    assert np.array_equal(read_mask(tmp_path / name), values)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_1_bit_mask_is_0_and_1(tmp_path, suffix):
    values = np.eye(5, dtype=np.uint8)
    Image.fromarray(values.astype(bool)).save(tmp_path / f"a{suffix}")
    assert np.array_equal(read_mask(tmp_path / f"a{suffix}"), values)
    assert read_mask(tmp_path / f"a{suffix}").dtype == np.uint8


@pytest.mark.parametrize("bits", [2, 4])
def test_a_gray_png_of_few_bits_is_not_spread_to_255(tmp_path, bits):
    """Written by hand, because Pillow writes gray with 8 bits."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = {2: bytes([0b00_01_10_11]), 4: bytes([0x01, 0x2F])}[bits]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + data)
    assert read_mask(tmp_path / "a.png").tolist() == [{2: [0, 1, 2, 3], 4: [0, 1, 2, 15]}[bits]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_white_is_zero_tiff_keeps_its_stored_values(tmp_path, dtype):
    """Pillow inverts 8 bits for display; a class index is no brightness."""
    tifffile.imwrite(tmp_path / "a.tif", GRADIENT.astype(dtype), photometric="miniswhite")
    assert np.array_equal(read_mask(tmp_path / "a.tif"), GRADIENT)


def write_jpeg_tiff(path: Path) -> None:
    Image.fromarray(GRADIENT).save(path, compression="jpeg")


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.jpg", lambda path: Image.fromarray(GRADIENT).save(path), "is a JPEG, .* PNG or TIFF"),
        ("a.png", lambda path: Image.fromarray(GRADIENT).save(path, format="JPEG"), "is a JPEG"),
        ("a.tif", write_jpeg_tiff, "is a JPEG"),
        ("a.bmp", lambda path: Image.fromarray(GRADIENT).save(path), "is a BMP file; save masks as PNG or TIFF"),
        ("a.png", lambda path: Image.fromarray(corners()).save(path), "has 3 channels .*RGB mask"),
        ("a.png", lambda path: Image.fromarray(corners()).convert("RGBA").save(path), "has 4 channels"),
        ("a.tif", lambda path: Image.fromarray(GRADIENT.astype(np.float32)).save(path), "has float values"),
        ("a.tif", lambda path: Image.fromarray(GRADIENT.astype(np.int32)).save(path), "has 32-bit signed values"),
        ("a.tif", lambda path: tifffile.imwrite(path, GRADIENT.astype(np.int8)), "has 8-bit signed values"),
        ("a.tif", lambda path: tifffile.imwrite(path, np.zeros((2, 8, 9), np.uint8)), "has 2 pages"),
    ],
)
def test_a_mask_against_the_rules_is_refused_with_the_tool_that_mends_it(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name} {message}.*: run ml-check DATA --fix$"):
        read_mask(tmp_path / name)
