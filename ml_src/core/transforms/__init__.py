"""From a list of the configuration to one `Pipeline`: one resampling of image and mask, then the colours.

Next to read: `geometry.py`, where the resampling is composed, and `intensity.py`, where the grey levels are.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from ml_src.core.errors import ConfigError, DataError
from ml_src.core.registry import lookup
from ml_src.core.transform_specs import TrainTransform
from ml_src.core.transforms import geometry, intensity
from ml_src.core.transforms.geometry import Geometric
from ml_src.core.transforms.intensity import Intensity, Normalize

TRANSFORM_REGISTRY: dict[str, Any] = {
    "resize": geometry.Resize,
    "random_horizontal_flip": geometry.RandomHorizontalFlip,
    "random_vertical_flip": geometry.RandomVerticalFlip,
    "random_rotation": geometry.RandomRotation,
    "random_resize_crop": geometry.RandomResizeCrop,
    "elastic": geometry.Elastic,
    "color_jitter": intensity.ColorJitter,
    "random_brightness_contrast": intensity.RandomBrightnessContrast,
    "gaussian_noise": intensity.GaussianNoise,
    "gaussian_blur": intensity.GaussianBlur,
    "normalize": Normalize,
}
"""Config word -> class, built from its section of the configuration: a Geometric, an Intensity, or Normalize."""


def build_transforms(specs: Sequence[TrainTransform], ignore_index: int) -> "Pipeline":
    """Build what happens to a sample.

    Args:
        specs: `transforms.train` or `transforms.val` of the configuration.
        ignore_index: the mask value of what comes from outside the image.

    Raises: ConfigError if the list has more than one `normalize`.
    """
    return Pipeline([lookup(TRANSFORM_REGISTRY, spec.type, "transforms")(spec) for spec in specs], ignore_index)


class Pipeline:
    """All transforms of a list: geometry first, in list order, as one resampling; then intensities, in list order.

    `mean` and `std` are those of `normalize` (else (0.0,) and (1.0,)), in units of the full range, 0 to 1: pixels stay
    uint8, a quarter of the bytes of float32, until the device normalises them.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __init__(self, transforms: Sequence[Geometric | Intensity | Normalize], ignore_index: int):
        self.ignore_index = ignore_index
        self._geometric = [each for each in transforms if isinstance(each, Geometric)]
        self._intensities = [each for each in transforms if isinstance(each, Intensity)]
        normalizes = [each for each in transforms if isinstance(each, Normalize)]
        if len(normalizes) > 1:
            raise ConfigError(f"transforms: the list has {len(normalizes)} normalize entries: keep one")
        for normalize in normalizes:
            self.mean, self.std = normalize.mean, normalize.std

    def __call__(
        self, image: NDArray[np.uint8], mask: NDArray[Any] | None, rng: Generator, step_rng: Generator
    ) -> tuple[NDArray[np.uint8], NDArray[Any] | None]:
        """Transform one sample.

        Args:
            image: (H, W, C) uint8, any C.
            mask: (H, W) uint8 or uint16, or None for a prediction.
            rng: of this sample; all of its draws come from it, so the same generator gives the same bytes.
            step_rng: the same for all samples of a step; only random_resize_crop draws from it, the size.

        Returns: image (h, w, C) uint8 and mask (h, w) of its dtype, contiguous. The arrays given are not written to,
            but are handed back themselves where nothing changes them.

        Raises: DataError if image and mask differ in size, or the mask's dtype cannot hold ignore_index.
        """
        if mask is not None:
            _check(image, mask, self.ignore_index)
        size, steps = (image.shape[0], image.shape[1]), []
        for transform in self._geometric:
            steps.append(transform.draw(size, rng, step_rng))
            size = steps[-1].size
        image, mask = geometry.resample(image, mask, steps, self.ignore_index)
        pixels = intensity.Pixels(np.ascontiguousarray(image))
        for each in self._intensities:
            each.apply(pixels, rng)
        return pixels.image, None if mask is None else np.ascontiguousarray(mask)


def _check(image: NDArray[np.uint8], mask: NDArray[Any], ignore_index: int) -> None:
    if mask.shape != image.shape[:2]:
        raise DataError(
            f"an image of {image.shape[1]} x {image.shape[0]} pixels has a mask of shape {mask.shape}: "
            "both must have the same height and width, and the mask one channel"
        )
    if ignore_index > np.iinfo(mask.dtype).max:
        raise DataError(f"ignore_index is {ignore_index}, more than a mask of {mask.dtype} can hold: read it as uint16")
