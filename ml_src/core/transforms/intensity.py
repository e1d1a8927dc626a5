"""Every colour transform; those that map grey levels to grey levels are composed into one look-up table.

They act after all geometry, in the order of the list, and never on the mask. The formulas are written for grey levels
from 0 to 255; `Pixels` brings images of other number types to them. Next to read: `geometry.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from statistics import NormalDist
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import DTypeLike, NDArray

from ml_src.core import transform_specs as specs
from ml_src.core.errors import ConfigError
from ml_src.core.transforms.geometry import by_channels
from ml_src.core.transforms.source import Image

Levels = NDArray[Any]  # grey levels, 0 to 255: of a table of 256, or of an image (H, W, C); float64 or float32

LUMA = np.array([0.2989, 0.587, 0.114])  # ITU-R BT.601, with torchvision's digits


def full_range(dtype: DTypeLike) -> float:
    """Return the value that `normalize` counts as 1: white of unsigned integers, 1 of what has units of its own."""
    return {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}.get(np.dtype(dtype), 1.0)


class Normalize:
    """The mean and standard deviation per channel, in units of the full range; applied on the device, not here.

    Raises: ConfigError where they are still to be computed from the data.
    """

    def __init__(self, spec: specs.Normalize):
        if spec.mean == "data" or spec.std == "data":
            raise ConfigError(
                "transforms: normalize says data for mean or std, which must be computed from the training images "
                "before the transforms are built: give numbers"
            )
        self.mean, self.std = tuple(spec.mean), tuple(spec.std)


class Pixels:
    """A uint8 image (H, W, C) together with the table of grey levels that is still to be applied to it.

    `adjust` changes the table alone; reading `image` or `levels` applies it. The array given is never written to.
    """

    def __init__(self, image: Image, normalize: Normalize | None = None):
        self._image, self._normalize = image, normalize
        self._table: Levels | None = None

    def adjust(self, change: Callable[[Levels], Levels]) -> None:
        """Apply a function of grey levels, 0 to 255, the same for all channels; its results are clipped."""
        table = np.arange(256.0) if self._table is None else self._table
        self._table = np.clip(change(table), 0, 255)

    @property
    def num_channels(self) -> int:
        """C."""
        return int(self._image.shape[2])

    @property
    def image(self) -> Image:
        """The image (H, W, C) as it now is."""
        if self._table is not None:
            flat = self._image.reshape(self._image.shape[0], -1)  # one table for all channels
            self._image = cv2.LUT(flat, np.rint(self._table).astype(np.uint8)).reshape(self._image.shape)
            self._table = None
        return self._image

    @image.setter
    def image(self, image: Image) -> None:
        self._image, self._table = image, None

    @property
    def levels(self) -> Image:
        """The grey levels (H, W, C) as they now are: uint8, the image itself."""
        return self.image

    @levels.setter
    def levels(self, levels: Image) -> None:
        self.image = levels

    @property
    def middle(self) -> NDArray[Any]:
        """The mean of `normalize`, else the middle of the full range: of each channel, or one for all; in the image's
        units and number type."""
        share = np.array(self._normalize.mean if self._normalize else (0.5,))
        dtype = self._image.dtype
        middle = share * full_range(dtype)
        return (middle if dtype.kind == "f" else np.rint(middle)).astype(dtype)

    def mean_grey(self) -> float:
        """Mean of the luma of an RGB image, or of all channels of another, over all pixels; exact."""
        image = self._image
        if self._table is None and image.shape[2] == 3:
            return float(np.average(cv2.mean(image)[:3], weights=LUMA))
        if image.shape[2] == 3:
            counts = sum(weight * _histogram(image, channel) for channel, weight in enumerate(LUMA))
        else:
            counts = _histogram(image.reshape(image.shape[0], -1), 0)
        levels = np.arange(256.0) if self._table is None else self._table
        return float(counts @ levels / np.sum(counts))


class WidePixels(Pixels):
    """An image (H, W, C) of another number type, and its grey levels in float32, which may lie beyond 0 and 255.

    Such numbers seldom fill their type, so black and white are what they would be in a photograph: level 0 is the
    mean of `normalize` less two standard deviations, 255 the mean and two more. (Of 8-bit photographs, four standard
    deviations are about the full range.) Without `normalize` they are 0 and the full range.
    """

    def __init__(self, image: Image, normalize: Normalize | None = None):
        super().__init__(image, normalize)
        low, high = np.zeros(1), np.ones(1)
        if normalize is not None:
            mean, std = np.array(normalize.mean), np.array(normalize.std)
            low, high = mean - 2 * std, mean + 2 * std
        self._low, self._range = (v.astype(np.float32) for v in np.array((low, high - low)) * full_range(image.dtype))
        self._levels: Levels | None = None

    def adjust(self, change: Callable[[Levels], Levels]) -> None:
        """Apply a function of grey levels, the same for all channels."""
        self.levels = change(self.levels)

    @property
    def image(self) -> Image:
        """The image (H, W, C) as it now is: integers are rounded and clipped to what their type can hold."""
        if self._levels is not None:
            values, dtype = self._levels * (self._range / 255) + self._low, self._image.dtype
            if dtype.kind != "f":
                values = np.clip(np.rint(values), np.iinfo(dtype).min, np.iinfo(dtype).max)
            self._image, self._levels = values.astype(dtype, copy=False), None
        return self._image

    @image.setter
    def image(self, image: Image) -> None:
        self._image, self._levels = image, None

    @property
    def levels(self) -> Image:
        """The grey levels (H, W, C) as they now are, float32."""
        if self._levels is None:
            self._levels = (self._image.astype(np.float32) - self._low) * (255 / self._range)
        return self._levels

    @levels.setter
    def levels(self, levels: Image) -> None:
        self._levels = levels

    def mean_grey(self) -> float:
        """Mean of the luma of an RGB image, or of all channels of another, over all pixels."""
        channels = self.levels.mean(axis=(0, 1), dtype=np.float64)
        return float(np.average(channels, weights=LUMA if len(channels) == 3 else None))


def pixels_of(image: Image, normalize: Normalize | None) -> Pixels:
    """Return the grey levels of an image (H, W, C) of uint8, uint16, int16 or float32, C-contiguous."""
    return (Pixels if image.dtype == np.uint8 else WidePixels)(image, normalize)


def _histogram(image: Image, channel: int) -> NDArray[np.float64]:
    counts: NDArray[np.float32] = cv2.calcHist([image], [channel], None, [256], [0, 256])
    return counts.ravel().astype(np.float64)


# Functions of grey levels (H, W, C), uint8 or float32; the result has the same type.


def mix(levels: Image, saturation: float, scale: float, shift: float) -> Image:
    """Scale and shift the levels of an RGB image (H, W, 3) and mix them with their luma, all as one linear map.

    A saturation of 0 is grey, 1 keeps the colours, more is more vivid.
    """
    mixing = saturation * np.eye(3) + (1 - saturation) * np.tile(LUMA, (3, 1))
    shifts = mixing @ np.full((3, 1), shift)
    mixed: Image = cv2.transform(levels, np.hstack([scale * mixing, shifts]))  # rounds and saturates uint8
    return mixed


def shift_hue(levels: Image, turns: float) -> Image:
    """Turn the colours of an RGB image (H, W, 3) by a share of the colour circle; value and saturation (HSV) stay.

    Levels below 0, which have no hue, count as 0.
    """
    if levels.dtype != np.uint8:
        levels = np.maximum(levels, 0)
    turned = np.empty_like(levels)
    for top in range(0, levels.shape[0], 32):  # in bands, whose float32 copies stay in the cache
        band = levels[top : top + 32].astype(np.float32) * np.float32(1 / 255)
        hsv = cv2.cvtColor(band, cv2.COLOR_RGB2HSV)  # of uint8, it would be several grey levels off: too few hues
        hue = hsv[:, :, 0] + np.float32(360 * (turns % 1))
        hsv[:, :, 0] = hue - np.float32(360) * (hue >= 360)  # ten times as fast as the remainder
        rgb = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        # the first rounds and clips
        turned[top : top + 32] = cv2.convertScaleAbs(rgb, alpha=255) if levels.dtype == np.uint8 else 255 * rgb
    return turned


def add_noise(levels: Image, std: float, rng: Generator) -> Image:
    """Add normal noise of a standard deviation, independent in every pixel and channel.

    Each value is one of 65 536 quantiles of the normal distribution, drawn by 16 random bits: three times as fast as
    NumPy's normal numbers, and right up to 4.3 standard deviations.
    """
    flat = levels.reshape(levels.shape[0], -1)
    bits = rng.integers(0, 2**64, -(-flat.size // 4), dtype=np.uint64).view(np.uint16)
    quantiles = _normal_quantiles() * np.float32(std)
    if levels.dtype == np.uint8:  # rounding noise or sum is the same
        quantiles = np.rint(quantiles).astype(np.int16)
    noise = cv2.LUT(bits[: flat.size].reshape(flat.shape), quantiles)
    noisy: Image = cv2.add(flat, noise, dtype=cv2.CV_8U if levels.dtype == np.uint8 else cv2.CV_32F)  # saturates uint8
    return noisy.reshape(levels.shape)


@cache
def _normal_quantiles() -> NDArray[np.float32]:
    """The values below which (i + 0.5) / 65536 of the standard normal distribution lie."""
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)], np.float32)


class Intensity(ABC):
    """Changes the values of pixels, not their places."""

    @abstractmethod
    def apply(self, pixels: Pixels, rng: Generator) -> None:
        """Draw this sample's change from `rng` and apply it."""


class ColorJitter(Intensity):
    """Random brightness, contrast, saturation and hue, in this order.

    Each is defined as in `torchvision.transforms.v2.ColorJitter` (there in random order): brightness multiplies;
    contrast multiplies the distance to the image's mean grey; saturation that to the pixel's own grey; hue turns the
    colour circle. The first three are one linear map, so that what is too bright in between, and would be clipped
    there, is not lost.

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
        scale = _factor(self.brightness, rng) if self.brightness else 1.0
        shift = 0.0
        if self.contrast:
            ratio, middle = _factor(self.contrast, rng), scale * pixels.mean_grey()
            scale, shift = ratio * scale, (1 - ratio) * middle
        if self.saturation:
            pixels.levels = mix(pixels.levels, _factor(self.saturation, rng), scale, shift)
        elif self.brightness or self.contrast:
            pixels.adjust(lambda levels: scale * levels + shift)
        if self.hue:
            pixels.levels = shift_hue(pixels.levels, rng.uniform(-self.hue, self.hue))


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


class RandomGamma(Intensity):
    """Raise levels, as a share of 255, to a power; those below 0, which have no power, count as 0."""

    def __init__(self, spec: specs.RandomGamma):
        self.gamma, self.p = spec.gamma, spec.p

    def apply(self, pixels: Pixels, rng: Generator) -> None:
        if rng.random() < self.p:
            gamma = rng.uniform(*self.gamma)
            pixels.adjust(lambda levels: 255 * (np.maximum(levels, 0) / 255) ** gamma)


class GaussianNoise(Intensity):
    """Add independent normal noise to every pixel and channel."""

    def __init__(self, spec: specs.GaussianNoise):
        self.std, self.p = spec.std, spec.p

    def apply(self, pixels: Pixels, rng: Generator) -> None:
        if rng.random() < self.p:
            pixels.levels = add_noise(pixels.levels, 255 * rng.uniform(0, self.std), rng)


class GaussianBlur(Intensity):
    """Blur with a Gaussian whose width is drawn between 0.1 and sigma pixels (or is sigma, where that is less)."""

    def __init__(self, spec: specs.GaussianBlur):
        self.sigma, self.p = spec.sigma, spec.p

    def apply(self, pixels: Pixels, rng: Generator) -> None:
        if rng.random() < self.p:
            sigma = rng.uniform(min(0.1, self.sigma), self.sigma)
            pixels.levels = by_channels(lambda channels: cv2.GaussianBlur(channels, (0, 0), sigma), pixels.levels)


class CoarseDropout(Intensity):
    """Fill rectangles, all inside the image, with its mean; the mask stays (Cutout, DeVries and Taylor 2017).

    The network has to tell from the surroundings what is hidden. Number, heights, widths and places are uniform;
    rectangles may overlap. Colours that follow in the list change the filling too.
    """

    def __init__(self, spec: specs.CoarseDropout):
        self.num_holes, self.size, self.p = spec.num_holes, spec.size, spec.p

    def apply(self, pixels: Pixels, rng: Generator) -> None:
        if rng.random() >= self.p:
            return
        image, fewest, most = pixels.image.copy(), *self.num_holes
        for _ in range(rng.integers(fewest, most + 1)):
            height, width = (max(1, round(rng.uniform(*self.size) * side)) for side in image.shape[:2])
            top, left = rng.integers(image.shape[0] - height + 1), rng.integers(image.shape[1] - width + 1)
            image[top : top + height, left : left + width] = pixels.middle
        pixels.image = image
