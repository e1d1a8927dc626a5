"""The samples of a mask file as they are stored, whatever it is, and what they can mean. Next to read: `repair.py`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ml_src.core.data.files import mask_problem, read_image, read_mask, upright
from ml_src.core.data.geotiffs import read_bands
from ml_src.core.data.headers import Header, opened, read_header, require_decodable
from ml_src.core.data.tiffs import read_tiff
from ml_src.core.errors import DataError
from ml_src.core.transforms.source import Window

Kind = Literal["values", "gray", "one-hot", "colours"]


@dataclass(frozen=True)
class Stored:
    """A mask's samples (H, W, C) of any number type, upright; C counts pages too, and alpha where it is not opaque."""

    path: Path
    header: Header
    samples: NDArray[Any]
    nodata: float | None = None  # what the file itself calls "no data", where some pixels have it

    @property
    def kind(self) -> Kind:
        """What the samples are: one value a pixel, also as gray RGB, one channel a class, or colours.

        Pure red, green and blue are colours; in other numbers or channels, one channel set per pixel is one-hot.
        Raises: DataError, with the question that is open, for transparency and channels that overlap.
        """
        channels = self.samples.shape[2]
        coloured = channels == 3 and self.header.pages == 1
        if channels == 1:
            return "values"
        if _is_one_hot(self.samples) and not (coloured and self.samples.max() > 1):
            return "one-hot"
        if coloured and self.samples.dtype.kind == "u":
            gray = (self.samples == self.samples[:, :, :1]).all()
            return "gray" if gray else "colours"
        raise DataError(f"{self.path} {self._open_question()}")

    def _open_question(self) -> str:
        if self.header.colours < self.header.samples:
            clear = int((self.samples[:, :, -1] != _opaque(self.samples[:, :, -1].dtype)).sum())
            return (
                f"is transparent in {clear} pixels: which class do they have? "
                "Paint them in the colour of their class and save it without transparency"
            )
        what = "pages" if self.header.pages > 1 else "channels"
        set_ = (self.samples != 0).sum(axis=2)
        return (
            f"has {self.samples.shape[2]} {what}, of which {int((set_ > 1).sum())} pixels have several and "
            f"{int((set_ == 0).sum())} none: which class do these pixels have? Save one channel of class indices"
        )


def _is_one_hot(samples: NDArray[Any]) -> bool:
    """Whether every pixel has exactly one channel that is not zero, and everywhere with the same number."""
    one_each = bool(((samples != 0).sum(axis=2) == 1).all())
    return one_each and len(np.unique(samples.sum(axis=2))) == 1


def read_stored(path: Path) -> Stored:
    """Read all samples of a mask.

    Raises: DataError for a damaged file, pages that are no stack, and colours that are not gray, RGB or bands.
    """
    header = read_header(path)
    require_decodable(path, header)
    if header.geo and header.pages == 1:
        pixels, missing = read_bands(path)
        return Stored(path, header, pixels, None if missing is None else _only_value(pixels, missing))
    if mask_problem(header) is None:
        return Stored(path, header, read_mask(path)[:, :, None])
    if header.pages > 1:
        return Stored(path, header, _pages(path, header))
    pixels = read_image(path).pixels
    if header.colours < header.samples:
        alpha = _alpha(path, header)
        if (alpha != _opaque(alpha.dtype)).any():
            pixels = np.concatenate([pixels, alpha], axis=2)
    return Stored(path, header, pixels)


def _only_value(pixels: NDArray[Any], missing: NDArray[np.bool_]) -> float | None:
    """Return the one value that all missing pixels have, or None where alpha or a validity mask hides several."""
    values = np.unique(pixels[np.broadcast_to(missing, pixels.shape)])
    return float(values[0]) if len(values) == 1 else None


def _lying(header: Header) -> tuple[int, int]:
    """Height and width before the picture is turned upright."""
    return (header.width, header.height) if header.orientation >= 5 else (header.height, header.width)


def _pages(path: Path, header: Header) -> NDArray[Any]:
    with opened(path) as (file, _):
        pages = file.asarray() if header.format == "TIFF" else None
    if pages is None or pages.shape != (header.pages, *_lying(header)):
        raise DataError(f"{path} has {header.pages} pages: which one is the mask? Save it as a file of its own")
    return upright(np.moveaxis(pages, 0, -1), header.orientation)


def _alpha(path: Path, header: Header) -> NDArray[Any]:
    with opened(path) as (file, _):
        if header.format == "TIFF":
            alpha = read_tiff(file, Window(0, 0, *_lying(header)))[:, :, header.colours :]
        else:
            alpha = np.asarray(file.getchannel(file.getbands()[-1]))[:, :, None]
            if header.bits > 8:  # Pillow keeps 8 of them
                alpha = alpha.astype(np.uint16) * 257
    return upright(alpha, header.orientation)


def _opaque(dtype: np.dtype[Any]) -> float:
    return float(np.iinfo(dtype).max) if dtype.kind in "iu" else 1.0
