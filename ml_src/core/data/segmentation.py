"""SegmentationDataset: image/mask pairs, read and transformed. Next to read: `loaders.py`, which makes batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ml_src.core.data.files import Pair, read_image, read_mask
from ml_src.core.errors import DataError
from ml_src.core.transforms import Pipeline


class SampleKey(NamedTuple):
    """Which sample, and when: all that its augmentation depends on, besides the seed."""

    sample: int
    epoch: int = 0
    step: int = 0


class Sample(NamedTuple):
    """One image and its mask, as the loader's workers hand them over."""

    image: NDArray[np.uint8]  # (h, w, C), transformed
    mask: NDArray[Any] | None  # (h, w), transformed; None where there is none
    size: tuple[int, int]  # height, width of the file, before the transforms


class SegmentationDataset(Dataset[Sample]):
    """Reads pair i and transforms it; the draw is a pure function of (seed, key), whatever worker does it.

    `with_masks=False` leaves the masks unread (prediction).
    """

    def __init__(
        self, pairs: Sequence[Pair], transforms: Pipeline, channels: int, seed: int, with_masks: bool = True
    ) -> None:
        self.images = np.array([str(pair.image) for pair in pairs])  # arrays: nothing for a worker to copy by touching
        self.masks = np.array([str(pair.mask) for pair in pairs]) if with_masks else None
        self.transforms, self.channels, self.seed = transforms, channels, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: SampleKey) -> Sample:
        image = read_image(Path(self.images[key.sample]), self.channels)
        size = (image.shape[0], image.shape[1])
        mask = None
        if self.masks is not None:
            mask = read_mask(Path(self.masks[key.sample]))
            require_size(mask, size, Path(self.masks[key.sample]), Path(self.images[key.sample]))
            if self.transforms.ignore_index > 255:
                mask = mask.astype(np.uint16)  # 8 bits could not hold what is ignored
        sample_rng = _generator(self.seed, 0, key.epoch, key.sample)
        step_rng = _generator(self.seed, 1, key.epoch, key.step)
        image, mask = self.transforms(image, mask, sample_rng, step_rng)
        return Sample(image, mask, size)


def require_size(mask: NDArray[Any], size: tuple[int, int], mask_path: Path, image_path: Path) -> None:
    """Raise a DataError where a mask (H, W) has not the size (height, width) of its image."""
    if mask.shape != size:
        raise DataError(
            f"{mask_path} is {mask.shape[1]}x{mask.shape[0]} but {image_path} is {size[1]}x{size[0]} (width x height): "
            "make the mask again from the image at this size"
        )


def _generator(seed: int, stream: int, epoch: int, number: int) -> np.random.Generator:
    """A generator that is a function of its arguments, not of what was drawn before."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, stream, epoch, number))))
