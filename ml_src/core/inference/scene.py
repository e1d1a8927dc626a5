"""One image as a network takes it: whole or by windows, resized or not. Next to read: `predictor.py`."""

from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml_src.core.data.files import Pair, image_info, read_image
from ml_src.core.data.headers import read_header
from ml_src.core.data.segmentation import open_source
from ml_src.core.data.truth import can_miss
from ml_src.core.errors import DataError
from ml_src.core.inference.inputs import Input
from ml_src.core.inference.members import Member
from ml_src.core.transforms.source import Arrays, Size, Source, Window

KEPT_BYTES = 4 << 20  # of an image that is kept for its overlay, though the network sees it resized
MOST_BYTES = 64 << 20  # of a row of tiles that is read at once: files in strips would be decoded once for each tile


class Scene:
    """An image to predict. Its pixels are read when the first tile is asked for, by whatever thread asks.

    Raises: DataError where its header cannot be read, or it has other channels than the network's images.
    """

    def __init__(self, item: Input, member: Member) -> None:
        self.item, self._member = item, member
        info = image_info(item.path)
        expected = member.intake.channels
        if info.channels != expected and {info.channels, expected} != {1, 3}:
            raise DataError(
                f"{item.path} has {info.channels} channels, but the network was trained on {expected}: give images of "
                "as many"
            )
        self.size: Size = (info.height, info.width)
        self.dtype = np.dtype(info.dtype)
        self.canvas: Size = member.intake.size or self.size
        self.windowed = info.windowed and self.canvas == self.size
        self.can_miss = can_miss(item.path, read_header(item.path))
        self._row_bytes = info.width * info.channels * np.dtype(info.dtype).itemsize
        self.decoded_bytes = self._row_bytes * info.height
        self._kept: tuple[tuple[int, int], NDArray[Any]] | None = None
        self._lock = Lock()

    @cached_property
    def _source(self) -> Source:
        pair = Pair(self.item.path, self.item.path)
        return open_source(pair, self._member.data.val_transforms, self._member.intake.channels, with_masks=False)

    @cached_property
    def _canvas(self) -> NDArray[Any]:
        """The whole image as the network takes it, (h, w, channels)."""
        unused = np.random.default_rng(0)  # nothing in a validation list is random
        canvas = self._member.data.val_transforms.apply(self._source, unused, unused)[0]
        if self.canvas != self.size and self.decoded_bytes > KEPT_BYTES:
            del self._source  # many images wait for their batch: only what the network sees of them is kept
        return canvas

    def decode(self) -> None:
        """Read the file now, where it is read whole."""
        self._source  # noqa: B018 - reading is what it does

    def tile(self, window: Window) -> NDArray[Any]:
        """Return the pixels (h, w, channels) of a window of the canvas."""
        columns = slice(window.left, window.left + window.width)
        with self._lock:
            if not self.windowed:
                return self._canvas[window.top : window.top + window.height, columns]
            if self._row_bytes * window.height <= MOST_BYTES:
                return self._row(window.top, window.height)[:, columns]
        return np.ascontiguousarray(self._source.read(window)[0])

    def _row(self, top: int, height: int) -> NDArray[Any]:
        """A row of tiles, (height, W, channels); the last one is kept, for all of its tiles are asked for in turn."""
        if self._kept is None or self._kept[0] != (top, height):
            self._kept = (top, height), self._source.read(Window(top, 0, height, self.size[1]))[0]
        return self._kept[1]

    @property
    def pixels(self) -> NDArray[Any] | None:
        """The pixels (H, W, channels) of the file, where they have been read whole."""
        source = self.__dict__.get("_source")  # not to be read again for this
        return source.image if isinstance(source, Arrays) else None

    def nowhere(self, top: int, bottom: int) -> NDArray[np.bool_] | None:
        """Where rows top to bottom of the file have no data, (n, W); None where they have some everywhere."""
        if not self.can_miss:
            return None
        if self.windowed:
            return read_image(self.item.path, window=Window(top, 0, bottom - top, self.size[1])).nowhere
        return None if self._nowhere is None else self._nowhere[top:bottom]

    @cached_property
    def _nowhere(self) -> NDArray[np.bool_] | None:
        return read_image(self.item.path).nowhere
