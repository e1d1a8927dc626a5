"""What must be known of a picture before its pixels are decoded. Next to read: `files.py`, which decodes them.

Pillow reads the headers of PNG, JPEG, BMP and WebP; tifffile those of TIFFs, which may have any number of bands and any
number type.
"""

import logging
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ml_src.core.errors import DataError

if TYPE_CHECKING:
    import tifffile

# What these say beside their errors is no help to a user, and comes again for every file.
warnings.filterwarnings("ignore", module="PIL")
logging.getLogger("tifffile").setLevel(logging.CRITICAL)
# What is too large is found by its header, in `require_decodable`.
Image.MAX_IMAGE_PIXELS = None
MAX_DECODED = 2 << 30  # bytes
# From so many pixels on it pays to read only a part.
MIN_WINDOWED = 1 << 20
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by IHDR's colour type
LFS_START = b"version https://git-lfs"
# TIFF tags.
ORIENTATION, GEO_TAGS = 274, {33550, 34264, 34735, 42113}  # scale, matrix, keys; what GDAL calls nodata


@dataclass(frozen=True)
class Header:
    """A picture's description; sizes in pixels, upright."""

    format: str  # as Pillow names it: PNG, JPEG, TIFF, ...
    height: int
    width: int
    orientation: int  # EXIF: 1 is upright, 5 to 8 lie on their side
    pages: int
    samples: int
    alphas: tuple[int, ...]  # which of the samples
    bits: int  # per sample
    number: str  # uint, signed, float, complex
    mode: str = ""  # Pillow's; empty for a TIFF
    photometric: int = 1  # of a TIFF: 0 white is zero, 1 gray, 2 RGB, 3 palette, 6 YCbCr
    compression: int = 1  # of a TIFF
    lossy_webp: bool = False
    palette: bool = False
    geo: bool = False
    windowed: bool = False  # a part can be read without decoding the rest, and that pays

    @property
    def colours(self) -> int:
        """How many samples are not alpha."""
        return self.samples - len(self.alphas)

    @property
    def by_pillow(self) -> bool:
        """Whether Pillow decodes it: what is no TIFF, and TIFFs of luma and chroma or of less than 8 bits."""
        return self.format != "TIFF" or (not self.geo and (self.bits < 8 or self.photometric == 6))

    @property
    def lossy(self) -> bool:
        """Whether compression has changed its values; 6 and 7 are the two kinds of JPEG inside a TIFF."""
        return self.format in ("JPEG", "MPO") or self.compression in (6, 7) or self.lossy_webp

    @property
    def dtype(self) -> np.dtype[Any]:
        """The number type of the array that is read: uint8, uint16, int16, and float32 for all else."""
        if self.number == "uint" and self.bits <= 16:
            return np.dtype(np.uint8 if self.bits <= 8 else np.uint16)
        if self.number == "signed" and self.bits <= 16:
            return np.dtype(np.int16)
        return np.dtype(np.float32)

    @property
    def described(self) -> str:
        """Channels and number type in words: "4 channels of uint16"."""
        number = {"uint": "uint", "signed": "int"}.get(self.number, self.number)
        return f"{self.samples} channel{'s' * (self.samples != 1)} of {number}{self.bits}"


def read_header(path: Path) -> Header:
    """Read the header alone.

    Raises: DataError for a file that is missing, empty, a Git LFS pointer, or no image.
    """
    with opened(path) as (_, header):
        return header


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Header]]:
    """Open a file as Pillow's image, or as tifffile's TIFF, with its header.

    Whatever goes wrong, also while pixels are decoded inside the `with`, becomes a DataError.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)  # of a WebP, up to the first chunk of pixels
            file.seek(0)
            if start.startswith(TIFF_STARTS):
                import tifffile  # not above: those who have no TIFFs need not wait for it

                with tifffile.TiffFile(file, name=path.name) as tiff:
                    yield tiff, _tiff_header(tiff)
            else:
                _require_picture(path, start)
                with Image.open(file) as image:
                    yield image, _pillow_header(image, start)
    except (DataError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is no image that can be read: replace the file or leave it out") from error
    except Exception as error:  # on damaged files decoders raise nearly anything: OSError, SyntaxError, struct.error
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, IndexError | KeyError | struct.error) or not reason:
            reason = "it is cut off or damaged"
        raise DataError(f"{path} cannot be read ({reason}): replace the file or leave it out") from error


def _require_picture(path: Path, start: bytes) -> None:
    if not start:
        raise DataError(f"{path} is empty: restore the file or leave it out")
    if start.startswith(LFS_START):
        raise DataError(f"{path} is a Git LFS pointer, not the picture itself: run git lfs pull")


def _pillow_header(image: Image.Image, start: bytes) -> Header:
    form, (width, height) = image.format or "", image.size
    samples = PNG_SAMPLES[start[25]] if form == "PNG" else len(image.getbands())
    bits = start[24] if form == "PNG" else 16 if image.mode.startswith("I") else 8  # Pillow's mode hides 16 bits of RGB
    orientation = pages = 1
    if form != "MPO":  # the further pictures of a phone's JPEG are previews
        pages = getattr(image, "n_frames", 1)
    if form != "PNG" or "exif" in image.info:  # for a PNG without, getexif() would decode the pixels
        orientation = image.getexif().get(ORIENTATION, 1)
    if orientation in (5, 6, 7, 8):
        height, width = width, height
    return Header(
        format=form,
        height=height,
        width=width,
        orientation=orientation,
        pages=pages,
        samples=samples,
        alphas=(samples - 1,) if samples in (2, 4) and image.mode.endswith(("A", "a")) else (),
        bits=bits,
        number="uint",
        mode=image.mode,
        palette=image.mode in ("P", "PA"),
        lossy_webp=form == "WEBP" and b"VP8 " in start,
    )


def _tiff_header(tiff: "tifffile.TiffFile") -> Header:
    page = main_page(tiff)
    samples, extra = int(page.samplesperpixel), [int(kind) for kind in page.extrasamples]
    alphas = tuple(samples - len(extra) + index for index, kind in enumerate(extra) if kind in (1, 2))
    geo = not GEO_TAGS.isdisjoint(page.tags.keys())
    if samples == 4 and not extra and page.photometric == 2 and not geo:
        alphas = (3,)
    height, width = int(page.imagelength), int(page.imagewidth)
    tag = page.tags.get(ORIENTATION)
    orientation = 1 if tag is None or geo else int(tag.value)  # where a map's pixels are, its coordinates say
    tall = int(page.tilelength if page.is_tiled else page.rowsperstrip)
    header = Header(
        format="TIFF",
        height=width if orientation in (5, 6, 7, 8) else height,
        width=height if orientation in (5, 6, 7, 8) else width,
        orientation=orientation,
        pages=_num_pages(tiff),
        samples=samples,
        alphas=alphas,
        bits=int(page.bitspersample),
        number={2: "signed", 3: "float", 5: "complex", 6: "complex"}.get(int(page.sampleformat), "uint"),
        photometric=int(page.photometric),
        compression=int(page.compression),
        palette=page.photometric == 3,
        geo=geo,
    )
    windowed = height * width >= MIN_WINDOWED and tall < height and orientation == 1 and not header.by_pillow
    return replace(header, windowed=windowed)


def main_page(tiff: "tifffile.TiffFile") -> Any:
    """Return the first page that is neither a reduced copy (overview) nor a validity mask."""
    return next((page for page in tiff.pages if _is_picture(page)), tiff.pages.first)


def _is_picture(page: Any) -> bool:
    return not int(getattr(page, "subfiletype", 0)) & 0b101


def _num_pages(tiff: "tifffile.TiffFile") -> int:
    """Count pictures, not what a GeoTIFF keeps beside its one."""
    if tiff.is_imagej and len(tiff.pages) == 1:  # ImageJ writes the header of the first picture only
        return int((tiff.imagej_metadata or {}).get("images", 1))
    return sum(map(_is_picture, tiff.pages))


def require_decodable(path: Path, header: Header) -> None:
    """Refuse by its header what would fill the memory once decoded.

    Raises: DataError with the size.
    """
    size = header.height * header.width * header.samples * max(1, header.bits // 8)
    if size > MAX_DECODED and not header.windowed:
        raise DataError(
            f"{path} is {header.width}x{header.height} pixels, {size / 2**30:.1f} GiB once decoded, where "
            f"{MAX_DECODED >> 30} are the limit: save it as a tiled TIFF, of which parts can be read, or cut it up"
        )
