"""SegmentationDataset: image/mask pairs, read and transformed. Next to read: `loaders.py`, which makes batches."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from ml_src.core.data.files import Pair, Raster, image_info, read_image, read_mask, row_windows
from ml_src.core.data.headers import read_header
from ml_src.core.data.pairs import Pairs
from ml_src.core.data.truth import Truth
from ml_src.core.errors import DataError
from ml_src.core.transforms import Pipeline
from ml_src.core.transforms.intensity import full_range
from ml_src.core.transforms.source import Arrays, Source, Window

BLOCK = 512  # side of the squares in which the classes of a large mask are counted


class SampleKey(NamedTuple):
    """Which sample, and when: all that its augmentation depends on, besides the seed."""

    sample: int
    epoch: int = 0
    step: int = 0


class Sample(NamedTuple):
    """One image and its mask, as the loader's workers hand them over."""

    image: NDArray[Any]  # (h, w, C) uint8, uint16, int16 or float32, transformed
    mask: NDArray[Any] | None  # (h, w), transformed; None where there is none
    size: tuple[int, int]  # height, width of the file, before the transforms


class SegmentationDataset:
    """Reads pair i and transforms it; the draw is a pure function of (seed, key), whatever worker does it.

    Sample number i is of pair i modulo their number, so that an epoch may take each of them several times.
    `with_masks=False` leaves the masks unread (prediction).
    """

    def __init__(
        self, pairs: Sequence[Pair], transforms: Pipeline, channels: int, seed: int, with_masks: bool = True
    ) -> None:
        if not isinstance(pairs, Pairs):
            pairs = Pairs([str(pair.image) for pair in pairs], [str(pair.mask) for pair in pairs])
        self.pairs, self.with_masks = pairs, with_masks
        self.transforms, self.channels, self.seed = transforms, channels, seed

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: SampleKey) -> Sample:
        source = self.source(key.sample % len(self.pairs))
        sample_rng = _generator(self.seed, 0, key.epoch, key.sample)
        step_rng = _generator(self.seed, 1, key.epoch, key.step)
        image, mask = self.transforms.apply(source, sample_rng, step_rng)
        return Sample(image, mask, source.size)

    def source(self, index: int) -> Source:
        """Return pair `index` as the transforms take it."""
        return open_source(self.pairs[index], self.transforms, self.channels, self.with_masks)


def open_source(pair: Pair, transforms: Pipeline, channels: int, with_masks: bool) -> Source:
    """Return a pair as the transforms take it: read already, or, where it is large, part by part."""
    fill, ignore_index = np.asarray(transforms.mean), transforms.ignore_index
    if pair.image.suffix.lower() in (".tif", ".tiff"):
        info = image_info(pair.image)
        if info.windowed:
            return LargePair(pair, (info.height, info.width), channels, fill, ignore_index, with_masks)
    raster = read_image(pair.image, channels)
    mask = None
    if with_masks:
        mask = read_mask(pair.mask)
        require_size(mask.shape, raster.pixels.shape[:2], pair)
    return Arrays(*without_nodata(raster, mask, fill, ignore_index))


class LargePair:
    """An image of which only the part that is asked for is decoded, and its mask: a `Source`.

    Args:
        pair: whose image can be read by windows; a mask that cannot be is decoded whole each time.
        size: height and width of the image.
        channels: of the image, as `read_image` takes them.
        fill: what stands in for nodata, per channel or one for all; as shares of the full range.
        ignore_index: what the mask has there.
        with_masks: False leaves the mask unread.
    """

    windowed = True

    def __init__(
        self,
        pair: Pair,
        size: tuple[int, int],
        channels: int,
        fill: NDArray[np.float64],
        ignore_index: int,
        with_masks: bool,
    ) -> None:
        self.size = size
        self.pair, self.channels, self.fill, self.ignore_index = pair, channels, fill, ignore_index
        self.with_masks = with_masks
        if with_masks:
            header = read_header(pair.mask)
            require_size((header.height, header.width), self.size, pair)

    def read(self, window: Window | None) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Return image (h, w, C) and mask (h, w) of a window, or of all."""
        raster = read_image(self.pair.image, self.channels, window)
        mask = read_mask(self.pair.mask, window) if self.with_masks else None
        return without_nodata(raster, mask, self.fill, self.ignore_index)

    def find(self, value: int, rng: Generator) -> tuple[int, int] | None:
        """Return (row, column) of a pixel with this mask value, each as likely; None where there is none."""
        if not self.with_masks:
            return None
        stamp = self.pair.image.stat().st_mtime_ns, self.pair.mask.stat().st_mtime_ns
        blocks = _blocks_with(self.pair, value, stamp)
        if not len(blocks):
            return None
        top, left, _ = blocks[np.searchsorted(np.cumsum(blocks[:, 2]), rng.integers(blocks[:, 2].sum()), "right")]
        window = Window(int(top), int(left), min(BLOCK, self.size[0] - int(top)), min(BLOCK, self.size[1] - int(left)))
        rows, columns = np.nonzero(_has(value, *Truth(self.pair).read(window)))
        chosen = rng.integers(len(rows))
        return int(top) + int(rows[chosen]), int(left) + int(columns[chosen])


def _has(value: int, mask: NDArray[Any], nowhere: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    return np.asarray(mask == value if nowhere is None else (mask == value) & ~nowhere)


@lru_cache(maxsize=4096)
def _blocks_with(pair: Pair, value: int, changed: tuple[int, int]) -> NDArray[np.int64]:
    """The blocks of a mask that have a value, as rows of (top, left, pixels); read once, until a file changes."""
    truth, found = Truth(pair), []
    height, width = truth.mask.height, truth.mask.width
    whole = None if truth.windowed else _has(value, *truth.read())
    for band in row_windows(height, width, BLOCK):
        rows = _has(value, *truth.read(band)) if whole is None else whole[band.top : band.top + band.height]
        counts = np.add.reduceat(rows.sum(axis=0), np.arange(0, width, BLOCK))
        found += [(band.top, BLOCK * int(column), int(counts[column])) for column in np.flatnonzero(counts)]
    return np.array(found, np.int64).reshape(-1, 3)


def without_nodata(
    raster: Raster, mask: NDArray[Any] | None, fill: NDArray[np.float64], ignore_index: int
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Put `fill` (shares of the full range) where bands have no data; ignore the mask where no band has any."""
    pixels, nowhere = raster.pixels, raster.nowhere
    if mask is not None and ignore_index > 255:
        mask = mask.astype(np.uint16, copy=False)  # 8 bits could not hold what is ignored
    if raster.missing is not None:
        levels = fill * full_range(pixels.dtype)
        filling = (levels if pixels.dtype.kind == "f" else np.rint(levels)).astype(pixels.dtype)
        pixels = np.where(raster.missing, filling, pixels)
    if mask is not None and nowhere is not None:
        mask = ignored(mask, nowhere, ignore_index)
    return pixels, mask


def read_truth(pair: Pair, ignore_index: int) -> NDArray[Any]:
    """Return the mask of a pair, (H, W), ignored where the image has no data."""
    mask, nowhere = Truth(pair).read()
    return mask if nowhere is None else ignored(mask, nowhere, ignore_index)


def ignored(mask: NDArray[Any], where: NDArray[np.bool_], ignore_index: int) -> NDArray[Any]:
    """Return a mask (H, W) with ignore_index where `where` (H, W) says so."""
    if ignore_index > 255:
        mask = mask.astype(np.uint16, copy=False)  # 8 bits could not hold what is ignored
    return np.where(where, ignore_index, mask).astype(mask.dtype)


def require_size(mask_size: tuple[int, ...], size: tuple[int, ...], pair: Pair) -> None:
    """Raise a DataError where a mask has not the size (height, width) of its image."""
    if mask_size != size:
        raise DataError(
            f"{pair.mask} is {mask_size[1]}x{mask_size[0]} but {pair.image} is {size[1]}x{size[0]} (width x height): "
            "make the mask again from the image at this size"
        )


def _generator(seed: int, stream: int, epoch: int, number: int) -> Generator:
    """A generator that is a function of its arguments, not of what was drawn before."""
    return Generator(np.random.Philox(np.random.SeedSequence((seed, stream, epoch, number))))
