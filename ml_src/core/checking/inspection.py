"""What one look at a pair of image and mask finds out, as small facts. Next: `findings.py`, which judges them."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ml_src.core.checking.duplicates import Fingerprint, fingerprint
from ml_src.core.checking.layouts import Files
from ml_src.core.checking.tallies import compact_pixels
from ml_src.core.data.files import BAND, image_info, mask_problem, read_image, read_mask, row_windows
from ml_src.core.data.geotiffs import Place, place_of
from ml_src.core.data.headers import LFS_START, TIFF_STARTS, Header, read_header, require_decodable
from ml_src.core.errors import DataError
from ml_src.core.transforms.source import Window

MOST_VALUES = 256  # distinct values or colours that are kept of one mask
MOST_TRACKED = 1 << 20  # and counted, of one that is read in parts
MOST_CHANNELS = 4  # of what may be a colour
REDUCED = 512  # pixels on the shorter side, about, of the copy that stands for an image read in parts
SPARSE = 16  # every so many rows and columns are enough to see that most images are not constant
PICTURE_STARTS = (*TIFF_STARTS, b"\x89PNG", b"\xff\xd8\xff", b"BM", b"RIFF")

Cause = Literal[
    "empty_file",
    "lfs_pointer",
    "not_an_image",
    "damaged_file",
    "too_large",
    "needs_rasterio",
    "unsupported_colours",
    "multi_page",
]


@dataclass(frozen=True)
class MaskLook:
    """A mask file as it is, whatever it is."""

    path: Path
    header: Header | None = None  # None: no picture, see `problem`
    problem: str | None = None  # why its pixels cannot be read, a whole sentence
    values: dict[float, int] = field(default_factory=dict)  # pixels per stored value, where it has one channel
    colours: dict[tuple[int, ...], int] = field(default_factory=dict)  # pixels per colour, where it has several
    num_distinct: int = 0  # of values or colours; more than MOST_VALUES are counted but only the commonest kept
    num_not_finite: int = 0  # NaN and infinite pixels
    cause: Cause | None = None  # of `problem`, in a word
    compact: dict[float, int] = field(default_factory=dict)  # of the first channel, those among eight of their value


@dataclass(frozen=True)
class ImageLook:
    """An image file as it is."""

    path: Path
    header: Header | None = None
    problem: str | None = None
    constant: bool = False  # all pixels, of all channels each for itself, have one value
    fingerprint: Fingerprint | None = None
    place: Place | None = None  # where on Earth it lies
    cause: Cause | None = None


@dataclass(frozen=True)
class Look:
    """An image with all of its masks: none, one, or several; or a mask without image."""

    image: ImageLook | None
    masks: tuple[MaskLook, ...]


def inspect_all(files: Sequence[Files], progress: Callable[[int], None] | None = None) -> list[Look]:
    """Look once at every file of a data set, in threads, in the order of `layouts.find_files`.

    Args:
        files: images with their masks.
        progress: called with how many are done.
    """
    looks = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoders let go of the interpreter lock
        for found in pool.map(look, *zip(*files, strict=True)):
            looks.append(found)
            if progress is not None:
                progress(len(looks))
    return looks


def look(image_path: Path | None, mask_paths: Sequence[Path]) -> Look:
    """Look at an image and its masks; what cannot be read becomes a fact, not an error."""
    image = None if image_path is None else _look_at_image(image_path)
    return Look(image, tuple(map(_look_at_mask, mask_paths)))


def _look_at_image(path: Path) -> ImageLook:
    header = None
    try:
        header = read_header(path)
        require_decodable(path, header)
        place = place_of(path) if header.geo else None
        pixels, constant = _reduced(path, header) if header.windowed else _whole(path)
    except DataError as error:
        return ImageLook(path, header, str(error), cause=_cause(path, header))
    return ImageLook(path, header, None, constant, fingerprint(pixels), place)


def _whole(path: Path) -> tuple[NDArray[Any], bool]:
    """Return pixels (H, W, C), NaN where they are missing, and whether they are constant."""
    pixels, missing = read_image(path)
    lowest, highest = _range(pixels, missing)
    return _with_nan(pixels, missing), bool((lowest >= highest).all())


def _reduced(path: Path, header: Header) -> tuple[NDArray[Any], bool]:
    """Return the same of an image that is read in bands: (h, w, C) means of squares of its pixels."""
    side = max(1, min(header.height, header.width) // REDUCED)
    parts, ranges = [], []
    for window in row_windows(header.height, header.width, side * max(1, BAND // side)):
        pixels, missing = read_image(path, window=window)
        ranges.append(_range(pixels, missing))
        parts.append(_squares(_with_nan(pixels, missing), side))
    lowest, highest = np.min([low for low, _ in ranges], axis=0), np.max([high for _, high in ranges], axis=0)
    return np.concatenate(parts), bool((lowest >= highest).all())


def _with_nan(pixels: NDArray[Any], missing: NDArray[np.bool_] | None) -> NDArray[Any]:
    return pixels if missing is None else np.where(missing, np.float32(np.nan), pixels)


def _squares(pixels: NDArray[Any], side: int) -> NDArray[np.float32]:
    """Return the mean of each whole square of `side` pixels: (H // side, W // side, C)."""
    height, width = pixels.shape[0] // side, pixels.shape[1] // side
    squares = pixels[: height * side, : width * side].reshape(height, side, width, side, -1)
    means: NDArray[np.float32] = squares.mean(axis=(1, 3), dtype=np.float32)
    return means


Range = tuple[NDArray[Any], NDArray[Any]]


def _range(pixels: NDArray[Any], missing: NDArray[np.bool_] | None) -> Range:
    """Return the lowest and highest value of each channel, (C,) each, or of some pixels if these differ already."""
    few = (slice(None, None, SPARSE), slice(None, None, SPARSE))
    lowest, highest = _range_of_all(pixels[few], None if missing is None else missing[few])
    return (lowest, highest) if (lowest < highest).any() else _range_of_all(pixels, missing)


def _range_of_all(pixels: NDArray[Any], missing: NDArray[np.bool_] | None) -> Range:
    """Return the range of what is not missing; inf and -inf where all is."""
    if missing is None:
        return pixels.min(axis=(0, 1)), pixels.max(axis=(0, 1))
    known = ~np.broadcast_to(missing, pixels.shape)
    pixels = pixels.astype(np.float32, copy=False)
    lowest = np.min(pixels, axis=(0, 1), where=known, initial=np.inf)
    return lowest, np.max(pixels, axis=(0, 1), where=known, initial=-np.inf)


def _look_at_mask(path: Path) -> MaskLook:
    header = None
    tally, inside = _Tally(), _Tally()
    try:
        header = read_header(path)
        require_decodable(path, header)
        for window in row_windows(header.height, header.width) if header.windowed else [None]:
            pixels, missing = _mask_pixels(path, header, window)
            tally.add(pixels[~missing] if missing is not None else pixels.reshape(-1, pixels.shape[2]))
            inside.add(compact_pixels(pixels[:, :, 0])[:, None])
    except DataError as error:
        return MaskLook(path, header, str(error), cause=_cause(path, header))
    values, colours = tally.commonest()
    compact, _ = inside.commonest()
    return MaskLook(path, header, None, values, colours, len(tally.pixels), tally.num_not_finite, None, compact)


def _mask_pixels(path: Path, header: Header, window: Window | None) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """Return what training would read or, of a mask that it refuses, what there is, (H, W, C), and where it is missing.

    Where numbers are not finite nothing is called missing, for these are counted.
    """
    if mask_problem(header) is None:
        return read_mask(path, window)[:, :, None], None
    pixels, missing = read_image(path, window=window)
    if missing is None or not np.isfinite(pixels).all():
        return pixels, None
    return pixels, np.asarray(missing.any(axis=2))


class _Tally:
    """Counts how often each value or colour occurs, over the parts of a mask."""

    def __init__(self) -> None:
        self.keys: NDArray[Any] = np.empty((0, 1))
        self.pixels: NDArray[np.int64] = np.empty(0, np.int64)
        self.num_not_finite = 0

    def add(self, rows: NDArray[Any]) -> None:
        """Add pixels (N, C)."""
        if rows.dtype.kind == "f":
            finite = np.isfinite(rows).all(axis=1)
            self.num_not_finite += len(rows) - int(finite.sum())
            rows = rows[finite]
        if not len(rows) or rows.shape[1] > MOST_CHANNELS:
            return
        keys, pixels = _counted(rows)
        if len(self.keys):
            keys, inverse = np.unique(np.concatenate([self.keys, keys]), axis=0, return_inverse=True)
            pixels = np.bincount(inverse.ravel(), np.concatenate([self.pixels, pixels])).astype(np.int64)
        if len(keys) > MOST_TRACKED:
            kept = np.argsort(-pixels, kind="stable")[:MOST_TRACKED]
            keys, pixels = keys[kept], pixels[kept]
        self.keys, self.pixels = keys, pixels

    def commonest(self) -> tuple[dict[float, int], dict[tuple[int, ...], int]]:
        """Return pixels per value or per colour, the commonest first."""
        order = np.argsort(-self.pixels, kind="stable")[:MOST_VALUES]
        keys, pixels = self.keys[order].tolist(), self.pixels[order].tolist()
        if self.keys.shape[1] == 1:
            return {key: number for (key,), number in zip(keys, pixels, strict=True)}, {}
        return {}, {tuple(key): number for key, number in zip(keys, pixels, strict=True)}


def _counted(rows: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the distinct rows of (N, C), and how often each occurs."""
    if rows.dtype.kind == "u" and rows.shape[1] == 1:
        pixels = np.bincount(rows.ravel())
        keys = np.flatnonzero(pixels)
        return keys[:, None], pixels[keys]
    if rows.dtype == np.uint8:  # a colour as one number sorts a hundred times faster
        packed = np.zeros((len(rows), 4), np.uint8)
        packed[:, : rows.shape[1]] = rows
        numbers, pixels = _counted_runs(packed.view(np.uint32).ravel())
        return numbers.view(np.uint8).reshape(-1, 4)[:, : rows.shape[1]], pixels
    if rows.shape[1] == 1:
        numbers, pixels = _counted_runs(rows.ravel())
        return numbers[:, None], pixels
    keys, pixels = np.unique(rows, axis=0, return_counts=True)
    return keys, pixels


def _counted_runs(numbers: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Count distinct numbers by way of runs of equal ones, of which a mask has few."""
    starts = np.flatnonzero(np.concatenate([[True], numbers[1:] != numbers[:-1]]))
    lengths = np.diff(starts, append=len(numbers))
    keys, inverse = np.unique(numbers[starts], return_inverse=True)
    return keys, np.bincount(inverse, lengths).astype(np.int64)


def _cause(path: Path, header: Header | None) -> Cause:
    """Say in a word why a file could not be read."""
    if header is None:
        return _cause_of_start(path)
    if header.pages > 1:
        return "multi_page"
    if header.geo and find_spec("rasterio") is None:
        return "needs_rasterio"
    try:
        require_decodable(path, header)
    except DataError:
        return "too_large"
    try:
        image_info(path)
    except DataError:
        return "unsupported_colours"
    return "damaged_file"


def _cause_of_start(path: Path) -> Cause:
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_START))
    except OSError:
        return "damaged_file"
    if not start:
        return "empty_file"
    if start == LFS_START:
        return "lfs_pointer"
    return "damaged_file" if start.startswith(PICTURE_STARTS) else "not_an_image"
