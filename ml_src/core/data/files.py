"""Image and mask files: which belong together, and their pixels. Next to read: `headers.py`, then `checks.py`.

Pillow decodes PNG, JPEG, BMP, WebP, and TIFFs of luma and chroma or of few bits; tifffile decodes the other TIFFs,
rasterio those with coordinates. What Pillow would silently scale, invert or cut to 8 bits is known from the header and
undone.
"""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ml_src.core.data.geotiffs import read_bands
from ml_src.core.data.headers import Header, main_page, opened, require_decodable
from ml_src.core.data.tiffs import read_tiff
from ml_src.core.errors import DataError
from ml_src.core.transforms.source import Window

SUFFIXES: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")

# Pillow's modes whose colours become gray or RGB without choosing a colour profile.
READABLE_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "YCbCr", "I;16", "I;16B", "I;16L", "I"}
# TIFFs whose samples are shades of gray, red, green and blue, a palette's numbers, or luma and chroma.
READABLE_PHOTOMETRICS = {0, 1, 2, 3, 6}
LUMA = (19595, 38470, 7471)  # ITU-R 601, in 65536ths

# Rows that are read at once of a picture too large to be read whole: a multiple of the height of most tiles.
BAND = 512

# What an error about a mask ends with.
MEND = "run ml-check DATA --fix"


@dataclass(frozen=True)
class Pair:
    """An image and the mask of the same stem."""

    image: Path
    mask: Path


@dataclass(frozen=True)
class ImageInfo:
    """What the header says: size in pixels after EXIF, channels without alpha, number type of the array read."""

    height: int
    width: int
    channels: int
    dtype: str  # uint8, uint16, int16 or float32
    alpha: bool
    windowed: bool  # a part can be read without decoding the rest
    geo: bool  # it lies somewhere on Earth


class Raster(NamedTuple):
    """Pixels (H, W, C) of uint8, uint16, int16 or float32, and where the file has none: (H, W, C or 1), or None."""

    pixels: NDArray[Any]
    missing: NDArray[np.bool_] | None

    @property
    def nowhere(self) -> NDArray[np.bool_] | None:
        """Where no channel has data: (H, W)."""
        return None if self.missing is None else np.asarray(self.missing.all(axis=2))

    @property
    def to_show(self) -> NDArray[Any]:
        """The pixels (H, W, C), NaN where there is no data."""
        return self.pixels if self.missing is None else np.where(self.missing, np.float32(np.nan), self.pixels)


def stem_of(path: Path) -> str:
    """Return the name without its ending, in one Unicode form: a Mac and a PC spell the same accent differently."""
    return unicodedata.normalize("NFC", path.stem)


def listed(names: Sequence[object], most: int = 20) -> str:
    """Join names by commas; of more than `most` the rest is counted."""
    shown = ", ".join(str(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def find_pairs(image_dir: Path, mask_dir: Path) -> list[Pair]:
    """Match the images of one folder with the masks of another by stem; sorted by stem.

    Hidden files, folders and files that are no images are passed over.
    Raises: DataError that names every image without mask, mask without image and stem that occurs twice.
    """
    images, masks = _by_stem(image_dir), _by_stem(mask_dir)
    problems = [
        f"{folder} has more than one file of the stem {listed([repr(stem) for stem in twice])}"
        for folder, found in ((image_dir, images), (mask_dir, masks))
        if (twice := sorted(stem for stem, paths in found.items() if len(paths) > 1))
    ]
    for one, other, found, lacking in (("image", "mask", images, masks), ("mask", "image", masks, images)):
        lonely = [path.name for stem in sorted(found.keys() - lacking.keys()) for path in found[stem]]
        if lonely:
            verb = f"{one} has" if len(lonely) == 1 else f"{one}s have"
            problems.append(f"{len(lonely)} {verb} no {other} of the same stem: {listed(lonely, len(lonely))}")
    if problems:
        raise DataError("; ".join(problems))
    return [Pair(images[stem][0], masks[stem][0]) for stem in sorted(images)]


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if is_image_name(entry.name) and entry.is_file()]
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}): give the folder that holds the files") from error
    if not names:
        raise DataError(f"{folder} holds no image files ({', '.join(SUFFIXES)})")
    found = defaultdict(list)
    for name in sorted(names):
        if "\n" in name or "\r" in name:
            raise DataError(f"{folder} has a file with a line break in its name: {name!r}; rename it")
        found[stem_of(Path(name))].append(folder / name)
    return found


def is_image_name(name: str) -> bool:
    """Whether a file is taken for an image by its name: an ending that is known, and not hidden."""
    return not name.startswith(".") and name.lower().endswith(SUFFIXES)


def read_class_names(data_dir: Path) -> list[str] | None:
    """Return the lines of DATA/classes.txt, line i naming mask value i, or None where there is no such file."""
    path = data_dir / "classes.txt"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}): write one class name a line, in UTF-8") from error
    names = [line.strip() for line in text.strip().split("\n")] if text.strip() else None
    if names is not None and (len(set(names)) < len(names) or "" in names):
        raise DataError(f"{path} has an empty line or a name twice: line i names mask value i - 1")
    return names


def read_image(path: Path, channels: int | None = None, window: Window | None = None) -> Raster:
    """Read an image upright and without alpha, whole or a window of it.

    Args:
        path: of the file.
        channels: 1 turns RGB into gray (ITU-R 601 luma), 3 repeats gray; otherwise as many as the file must have. None
            takes what it has.
        window: of the upright image; only where the header says `windowed` does it save the decoding of the rest.

    Missing is nodata of a GeoTIFF, and what is not a finite number.
    Raises: DataError for a damaged file, several pages, and another number of channels.
    """
    with opened(path) as (image, header):
        _require_picture(path, header)
        require_decodable(path, header)
        part = window or Window(0, 0, header.height, header.width)
        missing = None
        if header.by_pillow:
            pixels = _shown(path, image, header)[part.top : part.top + part.height, part.left : part.left + part.width]
        else:
            if header.geo:
                pixels, missing = read_bands(path, part)
            else:
                pixels = _stored(image, header, part)
                if header.alphas:
                    pixels = np.delete(pixels, header.alphas, axis=2)
            pixels = _as_shown(pixels, image, header)
        pixels = _of_kept_dtype(pixels)
        if pixels.dtype == np.float32 and not np.isfinite(pixels).all():
            missing = ~np.isfinite(pixels) if missing is None else missing | ~np.isfinite(pixels)
    if channels is not None and channels != pixels.shape[2]:
        pixels, missing = _with_channels(path, pixels, missing, channels)
    return Raster(np.require(pixels, requirements=["C", "W"]), missing)  # Pillow's arrays cannot be written to


def row_windows(height: int, width: int, rows: int = BAND) -> Iterator[Window]:
    """Divide a picture into bands over its whole width."""
    for top in range(0, height, rows):
        yield Window(top, 0, min(rows, height - top), width)


def _as_shown(pixels: NDArray[Any], tiff: Any, header: Header) -> NDArray[Any]:
    """Stored samples (H, W, C) of a TIFF as the levels they stand for: palettes, white is zero, less than 8 bits."""
    if header.palette:
        colours: NDArray[np.uint16] = main_page(tiff).colormap  # (3, 2 ** bits), of 16 bits
        return np.asarray((colours >> 8).astype(np.uint8).T[pixels[:, :, 0]])
    if header.photometric == 0 and header.number == "uint":
        pixels = (2**header.bits - 1) - pixels
    return pixels * (255 // (2**header.bits - 1)) if header.bits < 8 else pixels


def _stored(tiff: Any, header: Header, window: Window) -> NDArray[Any]:
    """Samples of a TIFF, upright; a file that lies on its side is never windowed."""
    if header.orientation == 1:
        return read_tiff(tiff, window)
    lying = header.orientation >= 5
    height, width = (header.width, header.height) if lying else (header.height, header.width)
    turned = upright(read_tiff(tiff, Window(0, 0, height, width)), header.orientation)
    return turned[window.top : window.top + window.height, window.left : window.left + window.width]


def _shown(path: Path, image: Any, header: Header) -> NDArray[Any]:
    """Gray or RGB of a whole picture, upright: (H, W, 1 or 3)."""
    if header.format == "PNG" and header.bits > 8 and header.samples > 1:  # of these Pillow would keep 8 bits
        return upright(imagecodecs.png_decode(path.read_bytes())[:, :, : header.colours], header.orientation)
    if header.format == "TIFF":
        with Image.open(path) as picture:  # which turns it upright
            picture.load()
            pixels = np.asarray(picture.convert("L" if header.colours == 1 and not header.palette else "RGB"))
            pixels = pixels.reshape(*pixels.shape[:2], -1)
    else:
        kept = "I;16" if header.bits > 8 else "L" if header.mode in ("1", "L", "LA", "La") else "RGB"
        pixels = upright(np.asarray(image.convert(kept) if image.mode != kept else image), header.orientation)
    return pixels.reshape(*pixels.shape[:2], -1)


def upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn an array (H, W, ...) as an EXIF orientation, 1 to 8, asks; others are ignored."""
    if orientation in (3, 4, 7):
        pixels = pixels[::-1]
    if orientation in (2, 3, 7):
        pixels = pixels[:, ::-1]
    if orientation in (5, 7):
        return pixels.swapaxes(0, 1)
    return np.rot90(pixels, {6: -1, 8: 1}.get(orientation, 0))


def _of_kept_dtype(pixels: NDArray[Any]) -> NDArray[Any]:
    """Unsigned integers of 8 and 16 bits stay; signed ones become int16, all else float32."""
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize <= 2:
        return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    if pixels.dtype.kind == "i" and pixels.dtype.itemsize <= 2:
        return pixels.astype(np.int16, copy=False)
    with np.errstate(over="ignore"):  # what a float64 has for "no data" becomes infinite, and is missing as such
        return pixels.astype(np.float32, copy=False)


def _with_channels(
    path: Path, pixels: NDArray[Any], missing: NDArray[np.bool_] | None, channels: int
) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """Gray to RGB or RGB to gray; anything else is refused."""
    if {channels, pixels.shape[2]} != {1, 3}:
        raise DataError(other_channels(path, pixels.shape[2], channels))
    if channels == 3:
        return np.repeat(pixels, 3, axis=2), missing
    if missing is not None:
        missing = np.logical_or.reduce(missing, axis=2, keepdims=True)
    if pixels.dtype.kind == "f":
        return (pixels @ (np.array(LUMA, np.float32) / np.float32(65536)))[:, :, None], missing
    luma = (pixels.astype(np.int64) @ np.array(LUMA) + 32768) >> 16
    return luma.astype(pixels.dtype)[:, :, None], missing


def other_channels(path: Path, found: int, expected: int) -> str:
    """Return the sentence for an image whose channels are not those of the network."""
    return f"{path} has {found} channels but model.in_channels is {expected}: set model.in_channels to {found}"


def image_info(path: Path) -> ImageInfo:
    """Describe an image from its header alone.

    Raises: DataError for a damaged file, several pages, and colours that are not gray, RGB or bands.
    """
    with opened(path) as (_, header):
        _require_picture(path, header)
        require_decodable(path, header)
    channels = 3 if header.palette else header.colours
    alpha = header.colours < header.samples
    return ImageInfo(header.height, header.width, channels, header.dtype.name, alpha, header.windowed, header.geo)


def _require_picture(path: Path, header: Header) -> None:
    if header.pages > 1:
        raise DataError(
            f"{path} has {header.pages} pages, but an image is one page: save channels as the samples of one page, "
            "and the slices of a stack as files of their own"
        )
    if header.palette and header.bits > 8:
        raise DataError(f"{path} has a palette of {header.bits} bits: convert it to RGB")
    readable = header.photometric in READABLE_PHOTOMETRICS if header.format == "TIFF" else header.mode in READABLE_MODES
    if not readable:
        raise DataError(f"{path} has colours that are not gray, RGB or bands ({_colours(header)}): convert it to RGB")
    if header.number == "complex":
        raise DataError(f"{path} has complex numbers: save magnitude, or real and imaginary part, as channels")


def _colours(header: Header) -> str:
    return f"photometric {header.photometric}" if header.format == "TIFF" else f"mode {header.mode}"


def read_mask(path: Path, window: Window | None = None) -> NDArray[np.uint8 | np.uint16]:
    """Read the class indices of a mask, (H, W), exactly as stored: palette indices, 0/1 of a 1-bit file, 8 or 16 bits.

    An orientation tag turns a mask as it turns an image.

    Raises: DataError, with the remedy, for a JPEG, RGB, float, signed, multi-page or damaged file.
    """
    with opened(path) as (image, header):
        problem = mask_problem(header)
        if problem:
            raise DataError(f"{path} {problem}: {MEND}")
        require_decodable(path, header)
        part = window or Window(0, 0, header.height, header.width)
        if header.geo:
            values = read_bands(path, part).pixels[:, :, 0]
        elif not header.by_pillow:
            values = _stored(image, header, part)[:, :, 0]
        else:
            values = _stored_by_pillow(path, image, header)
            values = values[part.top : part.top + part.height, part.left : part.left + part.width]
    return np.require(values, np.uint16 if header.bits > 8 else np.uint8, ["C", "W"])


def _stored_by_pillow(path: Path, image: Any, header: Header) -> NDArray[Any]:
    """Values of a one-channel picture as the file has them: what Pillow changes for display is undone."""
    if header.format == "TIFF":
        with Image.open(path) as picture:
            values = np.array(picture, dtype=np.uint8)
            mode = picture.mode
    else:
        values, mode = upright(np.asarray(image), header.orientation), header.mode
    if header.bits > 8:
        return values
    values = values.astype(np.uint8)
    if mode == "L" and header.bits in (2, 4):
        values //= 255 // (2**header.bits - 1)  # Pillow spreads 2 and 4 bits over 0..255
    if header.photometric == 0:
        values = (2**header.bits - 1) - values
    return values


def mask_problem(header: Header) -> str | None:
    """Return the rule of the guide that a mask's header breaks; completes "<path> ..."."""
    if header.lossy_webp:
        return "is a lossy WebP, whose compression changes class indices; save masks as PNG or TIFF"
    if header.lossy:
        return "is a JPEG, whose compression changes class indices; save masks as PNG or TIFF"
    if header.format not in ("PNG", "TIFF"):
        return f"is a {header.format} file; save masks as PNG or TIFF"
    if header.pages > 1:
        return f"has {header.pages} pages; a mask is one single-channel picture"
    if header.samples > 1:
        return f"has {header.samples} channels (an RGB mask?); a mask has one channel of class indices"
    if header.number == "float":
        return "has float values; a mask has 8- or 16-bit unsigned class indices"
    if header.number != "uint" or header.bits > 16:
        return f"has {header.bits}-bit {header.number} values; a mask has 8- or 16-bit unsigned class indices"
    return None
