"""Every colour transform; those that map grey levels to grey levels are composed into one look-up table.

They act after all geometry, in the order of the list, and never on the mask. Next to read: `geometry.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from ml_src.core import transform_specs as specs
from ml_src.core.errors import ConfigError
from ml_src.core.transforms.geometry import Image, by_channels

Levels = NDArray[np.float64]  # what each of the 256 grey levels becomes

LUMA = np.array([0.2989, 0.587, 0.114])  # ITU-R BT.601, with torchvision's digits


class Pixels:
    """A uint8 image (H, W, C) together with the table of grey levels that is still to be applied to it.

    `adjust` changes the table alone; reading `image` applies it. The array given is never written to.
    """

    def __init__(self, image: Image):
        self._image = image
        self._levels: Levels | None = None

    def adjust(self, change: Callable[[Levels], Levels]) -> None:
        """Apply a function of grey levels, 0 to 255, the same for all channels; its results are clipped."""
        levels = np.arange(256.0) if self._levels is None else self._levels
        self._levels = np.clip(change(levels), 0, 255)

    @property
    def num_channels(self) -> int:
        """C."""
        return int(self._image.shape[2])

    @property
    def image(self) -> Image:
        """The image (H, W, C) as it now is."""
        if self._levels is not None:
            flat = self._image.reshape(self._image.shape[0], -1)  # one table for all channels
            self._image = cv2.LUT(flat, np.rint(self._levels).astype(np.uint8)).reshape(self._image.shape)
            self._levels = None
        return self._image

    @image.setter
    def image(self, image: Image) -> None:
        self._image, self._levels = image, None

    def mean_grey(self) -> float:
        """Mean of the luma of an RGB image, or of all channels of another, over all pixels; exact, from a histogram."""
        image = self._image
        if image.shape[2] == 3:
            counts = sum(weight * _histogram(image, channel) for channel, weight in enumerate(LUMA))
        else:
            counts = _histogram(image.reshape(image.shape[0], -1), 0)
        levels = np.arange(256.0) if self._levels is None else self._levels
        return float(counts @ levels / np.sum(counts))


def _histogram(image: Image, channel: int) -> NDArray[np.float64]:
    counts: NDArray[np.float32] = cv2.calcHist([image], [channel], None, [256], [0, 256])
    return counts.ravel().astype(np.float64)


def saturate(image: Image, factor: float) -> Image:
    """Mix an RGB image (H, W, 3) with its luma: 0 is grey, 1 the image itself, more is more vivid."""
    mixing = factor * np.eye(3) + (1 - factor) * np.tile(LUMA, (3, 1))
    mixed: Image = cv2.transform(image, mixing)  # rounds and saturates
    return mixed


def shift_hue(image: Image, turns: float) -> Image:
    """Turn the colours of an RGB image (H, W, 3) by a share of the colour circle; value and saturation (HSV) stay."""
    turned = np.empty_like(image)
    for top in range(0, image.shape[0], 32):  # in bands, whose float32 copies stay in the cache
        band = image[top : top + 32].astype(np.float32) * np.float32(1 / 255)
        hsv = cv2.cvtColor(band, cv2.COLOR_RGB2HSV)  # of uint8, it would be several grey levels off: too few hues
        hue = hsv[:, :, 0] + np.float32(360 * (turns % 1))
        hsv[:, :, 0] = hue - np.float32(360) * (hue >= 360)  # ten times as fast as the remainder
        turned[top : top + 32] = cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), alpha=255)  # rounds, clips
    return turned


class Intensity(ABC):
    """Changes the values of pixels, not their places."""

    @abstractmethod
    def apply(self, pixels: Pixels, rng: Generator) -> None:
        """Draw this sample's change from `rng` and apply it."""


class ColorJitter(Intensity):
    """Random brightness, contrast, saturation and hue, in this order.

    Each is defined as in `torchvision.transforms.v2.ColorJitter` (there in random order): brightness multiplies;
    contrast multiplies the distance to the image's mean grey; saturation that to the pixel's own grey; hue turns the
    colour circle.

    Raises: ConfigError at the first image that is not RGB, where saturation or hue is asked for.
    """

    def __init__(self, spec: specs.ColorJitter):
        self.brightness, self.contrast, self.p = spec.brightness, spec.contrast, spec.p
        self.saturation, self.hue = spec.saturation, spec.hue

    def apply(self, pixels: Pixels, rng: Generator) -> None:
        channels = pixels.num_channels
        if (self.saturation or self.hue) and channels != 3:
            raise ConfigError(
                f"transforms: color_jitter can change saturation and hue of RGB images only, but this image has "
                f"{channels} {'channel' if channels == 1 else 'channels'}: set saturation and hue to 0"
            )
        if rng.random() >= self.p:
            return
        if self.brightness:
            factor = _factor(self.brightness, rng)
            pixels.adjust(lambda levels: levels * factor)
        if self.contrast:
            ratio, middle = _factor(self.contrast, rng), pixels.mean_grey()
            pixels.adjust(lambda levels: middle + ratio * (levels - middle))
        if self.saturation:
            pixels.image = saturate(pixels.image, _factor(self.saturation, rng))
        if self.hue:
            pixels.image = shift_hue(pixels.image, rng.uniform(-self.hue, self.hue))


def _factor(strength: float, rng: Generator) -> float:
    return rng.uniform(max(0.0, 1 - strength), 1 + strength)


class RandomBrightnessContrast(Intensity):
    """Multiply the distance to the middle of the range, 127.5, then add a shift; the same for all channels."""

    def __init__(self, spec: specs.RandomBrightnessContrast):
        self.brightness, self.contrast, self.p = spec.brightness, spec.contrast, spec.p

    def apply(self, pixels: Pixels, rng: Generator) -> None:
        if rng.random() < self.p:
            shift = 255 * rng.uniform(-self.brightness, self.brightness)
            ratio = rng.uniform(1 - self.contrast, 1 + self.contrast)
            pixels.adjust(lambda levels: 127.5 + ratio * (levels - 127.5) + shift)


class GaussianNoise(Intensity):
    """Add independent normal noise to every pixel and channel."""

    def __init__(self, spec: specs.GaussianNoise):
        self.std, self.p = spec.std, spec.p

    def apply(self, pixels: Pixels, rng: Generator) -> None:
        if rng.random() < self.p:
            image = pixels.image
            flat = image.reshape(image.shape[0], -1)
            noise = rng.standard_normal(flat.shape, dtype=np.float32)
            noise *= np.float32(255 * rng.uniform(0, self.std))
            pixels.image = cv2.add(flat, noise, dtype=cv2.CV_8U).reshape(image.shape)  # rounds and saturates


class GaussianBlur(Intensity):
    """Blur with a Gaussian whose width is drawn between 0.1 and sigma pixels (or is sigma, where that is less)."""

    def __init__(self, spec: specs.GaussianBlur):
        self.sigma, self.p = spec.sigma, spec.p

    def apply(self, pixels: Pixels, rng: Generator) -> None:
        if rng.random() < self.p:
            sigma = rng.uniform(min(0.1, self.sigma), self.sigma)
            pixels.image = by_channels(lambda channels: cv2.GaussianBlur(channels, (0, 0), sigma), pixels.image)


class Normalize:
    """The mean and standard deviation per channel, in units of the full range; applied on the device, not here."""

    def __init__(self, spec: specs.Normalize):
        self.mean, self.std = tuple(spec.mean), tuple(spec.std)
