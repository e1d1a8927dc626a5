"""Many pairs in little memory: an object a path would be copied, page by page, into every worker that touches it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from ml_src.core.data.files import Pair


class Paths(Sequence[Path]):
    """Paths as one piece of text and where each ends in it; a Path is made when one is asked for."""

    def __init__(self, paths: Iterable[str]) -> None:
        encoded = [path.encode(errors="surrogateescape") for path in paths]
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self._text = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Path]: ...

    def __getitem__(self, index: int | slice) -> Path | Sequence[Path]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = self._ends[index - 1] if index else 0
        return Path(self._text[start : self._ends[index]].decode(errors="surrogateescape"))


class Pairs(Sequence[Pair]):
    """Pairs of image and mask, in the same way."""

    def __init__(self, images: Iterable[str], masks: Iterable[str]) -> None:
        self.images, self.masks = Paths(images), Paths(masks)

    def __len__(self) -> int:
        return len(self.images)

    @overload
    def __getitem__(self, index: int) -> Pair: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Pair]: ...

    def __getitem__(self, index: int | slice) -> Pair | Sequence[Pair]:
        if isinstance(index, slice):
            return [Pair(*both) for both in zip(self.images[index], self.masks[index], strict=True)]
        return Pair(self.images[index], self.masks[index])
