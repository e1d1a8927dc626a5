"""From a list of the configuration to one `Pipeline`: one resampling of image and mask, then the colours.

Next to read: `steps.py` and `geometry.py`, where the resampling is composed, and `intensity.py`, where the grey levels
are.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random import Generator

from ml_src.core.errors import ConfigError
from ml_src.core.registry import lookup
from ml_src.core.transform_specs import TrainTransform
from ml_src.core.transforms import geometric, intensity
from ml_src.core.transforms.geometric import Canvas, Geometric
from ml_src.core.transforms.geometry import resample
from ml_src.core.transforms.intensity import Intensity, Normalize, pixels_of
from ml_src.core.transforms.source import Arrays, Image, Mask, Source
from ml_src.core.transforms.steps import Step

TRANSFORM_REGISTRY: dict[str, Any] = {
    "resize": geometric.Resize,
    "random_horizontal_flip": geometric.RandomHorizontalFlip,
    "random_vertical_flip": geometric.RandomVerticalFlip,
    "random_rotation": geometric.RandomRotation,
    "random_rotate90": geometric.RandomRotate90,
    "random_transpose": geometric.RandomTranspose,
    "random_scale": geometric.RandomScale,
    "random_shift": geometric.RandomShift,
    "random_shear": geometric.RandomShear,
    "random_perspective": geometric.RandomPerspective,
    "random_crop": geometric.RandomCrop,
    "random_resize_crop": geometric.RandomResizeCrop,
    "grid_distortion": geometric.GridDistortion,
    "elastic": geometric.Elastic,
    "color_jitter": intensity.ColorJitter,
    "random_brightness_contrast": intensity.RandomBrightnessContrast,
    "random_gamma": intensity.RandomGamma,
    "gaussian_noise": intensity.GaussianNoise,
    "gaussian_blur": intensity.GaussianBlur,
    "coarse_dropout": intensity.CoarseDropout,
    "normalize": Normalize,
}
"""Config word -> class, built from its section of the configuration: a Geometric, an Intensity, or Normalize."""


def build_transforms(specs: Sequence[TrainTransform], ignore_index: int) -> "Pipeline":
    """Build what happens to a sample.

    Args:
        specs: `transforms.train` or `transforms.val` of the configuration.
        ignore_index: the mask value of what comes from outside the image.

    Raises: ConfigError if the list has more than one `normalize`, or one that is still to be computed from the data.
    """
    return Pipeline([lookup(TRANSFORM_REGISTRY, spec.type, "transforms")(spec) for spec in specs], ignore_index)


class Pipeline:
    """All transforms of a list: geometry first, in list order, as one resampling; then intensities, in list order.

    `mean` and `std` are those of `normalize` (else (0.0,) and (1.0,)), in units of the full range: pixels keep the
    number type of their file, for 8 bits a quarter of the bytes of float32, until the device normalises them.
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
        self._normalize = normalizes[0] if normalizes else None
        if self._normalize is not None:
            self.mean, self.std = self._normalize.mean, self._normalize.std

    def __call__(
        self, image: Image, mask: Mask | None, rng: Generator, step_rng: Generator
    ) -> tuple[Image, Mask | None]:
        """Transform one sample that is in memory; all else is as in `apply`."""
        return self.apply(Arrays(image, mask), rng, step_rng)

    def apply(self, source: Source, rng: Generator, step_rng: Generator) -> tuple[Image, Mask | None]:
        """Transform one sample.

        Args:
            source: image (H, W, C), uint8, uint16, int16 or float32, any C; and mask (H, W), uint8 or uint16, or None
                for a prediction. Of a windowed one, only what the sample needs is read, after all steps are drawn.
            rng: of this sample; all of its draws come from it, so the same generator gives the same bytes.
            step_rng: the same for all samples of a step; only random_resize_crop draws from it, the size.

        Returns: image (h, w, C) and mask (h, w) of the source's dtypes, contiguous. The arrays of the source are not
            written to, but are handed back themselves where nothing changes them.

        Raises: DataError if image and mask differ in size, or the mask's dtype cannot hold ignore_index.
        """
        steps: list[Step] = []
        for transform in self._geometric:
            steps.append(transform.draw(Canvas(source, steps), rng, step_rng))
        image, mask = resample(source, steps, self.ignore_index)
        pixels = pixels_of(np.ascontiguousarray(image), self._normalize)
        for each in self._intensities:
            each.apply(pixels, rng)
        return pixels.image, None if mask is None else np.ascontiguousarray(mask)
