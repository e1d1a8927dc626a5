"""Masks as they count: without what lies where the image has no data. Next to read: `segmentation.py`."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml_src.core.data.files import Pair, read_image, read_mask
from ml_src.core.data.geotiffs import may_miss
from ml_src.core.data.headers import Header, read_header
from ml_src.core.transforms.source import Window


class Truth:
    """The mask of a pair, whole or by windows, and where its pixels count."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.image, self.mask = read_header(pair.image), read_header(pair.mask)
        self.may_miss = can_miss(pair.image, self.image)

    @property
    def windowed(self) -> bool:
        """Whether a window of all that must be read for it can be read without decoding the rest."""
        return self.mask.windowed and (self.image.windowed or not self.may_miss)

    def read(self, window: Window | None = None) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Return the mask (h, w) and where the image has no data, or None where it has some everywhere."""
        mask = read_mask(self.pair.mask, window)
        return mask, read_image(self.pair.image, window=window).nowhere if self.may_miss else None


def can_miss(image: Path, header: Header) -> bool:
    """Whether an image can lack data: NaN among floats, nodata and masks of a raster."""
    return header.dtype == np.float32 or (header.geo and may_miss(image))
