"""Image and mask files: which belong together, and their pixels; all formats live here. Next to read: `checks.py`.

Pillow decodes everything, because it keeps palette indices and knows EXIF; what it would silently scale, invert or cut
to 8 bits is found in the header and undone or refused.
"""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ml_src.core.errors import DataError

SUFFIXES: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")

# Modes whose colours become gray or RGB without choosing a colour profile.
READABLE_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "YCbCr"}
# EXIF orientation -> what brings the picture upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# TIFF tags.
SUBFILE, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, EXTRA_SAMPLES, SAMPLE_FORMAT = 254, 258, 259, 262, 277, 338, 339
EXIF_ORIENTATION = 274

# What an error about a mask ends with.
MEND = "convert it as docs/guide.md shows under Masks"


@dataclass(frozen=True)
class Pair:
    """An image and the mask of the same stem."""

    image: Path
    mask: Path


@dataclass(frozen=True)
class ImageInfo:
    """What the header says: size in pixels after EXIF, 1 or 3 channels without alpha, bits per sample (8, 16, 32)."""

    height: int
    width: int
    channels: int
    bits: int


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
            names = [entry.name for entry in entries if _is_image_name(entry.name) and entry.is_file()]
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


def _is_image_name(name: str) -> bool:
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


def read_image(path: Path, channels: int) -> NDArray[np.uint8]:
    """Read an 8-bit image upright, without alpha, as gray (`channels` 1) or RGB (3): (H, W, channels).

    RGB becomes gray by ITU-R 601 luma; gray becomes RGB by repetition.
    Raises: DataError for a damaged file and for anything but one 8-bit gray or RGB picture.
    """
    with _opened(path) as (image, header):
        _require_picture(path, header)
        if header.bits > 8:
            raise DataError(not_8_bit(path, header.bits))
        pixels: NDArray[np.uint8] = np.array(_upright(image, header).convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def not_8_bit(path: Path, bits: int) -> str:
    """Return the sentence for an image of more than 8 bits per sample."""
    return f"{path} has {bits} bits per sample: an 8-bit gray or RGB image is expected, convert it"


def image_info(path: Path) -> ImageInfo:
    """Describe a gray or RGB image of any bit depth from its header alone.

    Raises: DataError for a damaged file, several pages, or another number of channels.
    """
    with _opened(path) as (image, header):
        _require_picture(path, header)
        channels = 1 if image.mode in {"1", "L", "LA", "La", "F"} or image.mode.startswith("I") else 3
        bits = next(size for size in (8, 16, 32) if header.bits <= size or size == 32)
        return ImageInfo(header.height, header.width, channels, bits)


def read_mask(path: Path) -> NDArray[np.uint8 | np.uint16]:
    """Read the class indices of a mask, (H, W), exactly as stored: palette indices, 0/1 of a 1-bit file, 8 or 16 bits.

    An orientation tag turns a mask as it turns an image.

    Raises: DataError, with the guide's remedy, for a JPEG, RGB, float, signed, multi-page or damaged file.
    """
    with _opened(path) as (image, header):
        problem = _mask_problem(header)
        if problem:
            raise DataError(f"{path} {problem}: {MEND}")
        values = np.array(_upright(image, header))
    if header.bits > 8:
        return values.astype(np.uint16)
    values = values.astype(np.uint8)
    if header.mode == "L" and header.bits in (2, 4):
        values //= 255 // (2**header.bits - 1)  # Pillow spreads 2 and 4 bits over 0..255
    if header.inverted:
        values = (2**header.bits - 1) - values
    return values


def _mask_problem(header: "_Header") -> str | None:
    """Return the guide's "common mistake" that a mask's header shows; completes "<path> ..."."""
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


@dataclass(frozen=True)
class _Header:
    """What must be known before pixels are decoded. `samples` counts all stored channels, `colours` those but alpha."""

    format: str
    mode: str
    height: int
    width: int
    orientation: int
    pages: int
    samples: int
    colours: int
    bits: int
    number: str
    lossy: bool
    inverted: bool


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Image.Image, _Header]]:
    """Open a file and turn whatever goes wrong, also while pixels are decoded, into a DataError."""
    try:
        with path.open("rb") as file:
            start = file.read(26)
            file.seek(0)
            with Image.open(file) as image:
                yield image, _header(image, start)
    except (DataError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path} {_foreign(path)}: an 8-bit gray or RGB image is expected") from error
    except Exception as error:  # on damaged files decoders raise nearly anything: OSError, SyntaxError, struct.error
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read ({reason}): replace the file or remove the pair") from error


def _header(image: Image.Image, start: bytes) -> _Header:
    form, (width, height) = image.format or "", image.size
    orientation, pages, samples, number, inverted = 1, 1, len(image.getbands()), "uint", False
    colours = samples - image.mode.endswith(("A", "a"))
    bits, lossy = 8, form in ("JPEG", "MPO")
    if form == "TIFF":  # Pillow itself turns a TIFF upright
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits = max(tags.get(BITS, (1,)))
        pages = _num_tiff_pages(image)
        extra = tags.get(EXTRA_SAMPLES, ())
        samples = tags.get(SAMPLES, 1)
        unnamed_alpha = samples == 4 and not extra and image.mode == "RGBA"
        colours = samples - sum(kind in (1, 2) for kind in extra) - unnamed_alpha
        number = {2: "signed", 3: "float"}.get(tags.get(SAMPLE_FORMAT, (1,))[0], "uint")
        lossy = tags.get(COMPRESSION) in (6, 7)  # the two kinds of JPEG inside a TIFF
        inverted = tags.get(PHOTOMETRIC) == 0 and bits <= 8  # "white is zero", which Pillow turns round
    else:
        if form == "PNG":
            bits = start[24]  # IHDR; Pillow's mode hides 16 bits of RGB
        if form != "MPO":  # the further pictures of a phone's JPEG are previews
            pages = getattr(image, "n_frames", 1)
        if form != "PNG" or "exif" in image.info:  # for a PNG without, getexif() would decode the pixels
            orientation = image.getexif().get(EXIF_ORIENTATION, 1)
        if orientation in (5, 6, 7, 8):
            height, width = width, height
    return _Header(form, image.mode, height, width, orientation, pages, samples, colours, bits, number, lossy, inverted)


def _num_tiff_pages(image: Image.Image) -> int:
    """Count pictures, not the reduced copies (overviews) and validity masks that a GeoTIFF keeps beside its one."""
    num_pages = 0
    for index in range(getattr(image, "n_frames", 1)):
        image.seek(index)
        num_pages += not image.tag_v2.get(SUBFILE, 0) & 0b101  # type: ignore[attr-defined]
    image.seek(0)
    return num_pages


def _upright(image: Image.Image, header: _Header) -> Image.Image:
    image.load()
    return image.transpose(UPRIGHT[header.orientation]) if header.orientation in UPRIGHT else image


def _require_picture(path: Path, header: _Header) -> None:
    expected = "an 8-bit gray or RGB image is expected"
    if header.pages > 1:
        raise DataError(f"{path} has {header.pages} pages: {expected}, one a file")
    if header.colours not in (1, 3) or (header.bits <= 8 and header.mode not in READABLE_MODES):
        raise DataError(f"{path} has {header.colours} channels (mode {header.mode}): {expected}, convert it")


def _foreign(path: Path) -> str:
    """Say what a file is that Pillow does not know; scientific TIFFs have any number of bands and any type."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            return f"has {page.samplesperpixel} channels of {page.dtype}"
    except Exception:
        return "is no image that can be read"
