"""Test-time augmentation: the same images seen in other ways, and what the network says of them merged into one.

Next to read: `predictor.py`, which shows every tile in every view.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from ml_src.core.config import Config
from ml_src.core.config_rules import Mirroring
from ml_src.core.errors import ConfigError
from ml_src.core.registry import suggest
from ml_src.core.transform_specs import RandomHorizontalFlip, RandomRotate90, RandomTranspose, RandomVerticalFlip
from ml_src.core.transforms.geometry import by_channels
from ml_src.core.transforms.intensity import full_range
from ml_src.core.transforms.source import Size

FLAG = "--tta_augmentations"
FACTORS = (0.25, 4.0)  # smallest and largest of scale, brightness and contrast
USUAL_FACTOR = 1.1  # of brightness and contrast without a number
TIE = 0.001  # what the mean probability weighs beside the votes

Pixels = NDArray[Any]  # (N, H, W, channels), uint8, uint16, int16 or float32
Floats = NDArray[np.float32]

Aggregation = Literal["mean", "max", "voting"]


class Levels(NamedTuple):
    """Pixel values of each channel, (channels,): what black is, and the mean of `normalize`."""

    black: Floats
    mean: Floats

    @classmethod
    def of(cls, dtype: np.dtype[Any], mean: Sequence[float], std: Sequence[float]) -> "Levels":
        """From the statistics of `normalize`, for pixels of a number type.

        Numbers other than 8 bits need not begin at black: there it lies two deviations below the mean, where the
        colours of training have it.
        """
        scale = full_range(dtype)
        centre, spread = (np.array(each, np.float32) * np.float32(scale) for each in (mean, std))
        return cls(np.zeros_like(centre) if dtype == np.uint8 else centre - 2 * spread, centre)


@dataclass(frozen=True)
class View:
    """The images as they are. Every other view overrides what differs."""

    name: str = "original"

    @property
    def mirrors(self) -> bool:
        """Whether left becomes right."""
        return False

    def apply(self, pixels: Pixels, levels: Levels) -> Pixels:
        """Return pixels (N, H, W, channels) as this view shows them, of the same number type; they are not written to.

        It shows files, not what a network makes of them, so that every engine is given the same: whole numbers are
        rounded and clipped, as those of augmented images in training are.
        """
        return pixels

    def invert(self, probs: Floats, size: Size) -> Floats:
        """Return probabilities (N, K, h, w) of the view's images as (N, K, H, W), where the images' pixels are.

        `size` is (H, W), of the images that `apply` was given.
        """
        return probs


@dataclass(frozen=True)
class Turned(View):
    """Rows and columns swapped or not, then flipped along some axes: a permutation of the pixels, without any blur."""

    transposed: bool = False
    flips_rows: bool = False
    flips_columns: bool = False

    @property
    def mirrors(self) -> bool:
        return (self.flips_rows + self.flips_columns + self.transposed) % 2 == 1

    def apply(self, pixels: Pixels, levels: Levels) -> Pixels:
        return self._flipped(pixels.swapaxes(1, 2) if self.transposed else pixels, 1).copy()  # engines want it in order

    def invert(self, probs: Floats, size: Size) -> Floats:
        probs = self._flipped(probs, 2)
        return probs.swapaxes(2, 3) if self.transposed else probs

    def _flipped(self, values: NDArray[Any], rows: int) -> NDArray[Any]:
        axes = tuple(axis for axis, flips in ((rows, self.flips_rows), (rows + 1, self.flips_columns)) if flips)
        return np.asarray(np.flip(values, axes))


@dataclass(frozen=True)
class Scaled(View):
    """Height and width times a factor, rounded: bilinear where it enlarges, averaged where it shrinks; and back."""

    factor: float = 1.0

    def apply(self, pixels: Pixels, levels: Levels) -> Pixels:
        height, width = (max(1, round(self.factor * side)) for side in pixels.shape[1:3])
        return np.stack([by_channels(lambda part: _resized(part, (height, width)), image) for image in pixels])

    def invert(self, probs: Floats, size: Size) -> Floats:
        return np.stack([[_resized(plane, size) for plane in image] for image in probs])


@dataclass(frozen=True)
class Brighter(View):
    """Distances to black times a factor, as color_jitter does it."""

    factor: float = 1.0

    def apply(self, pixels: Pixels, levels: Levels) -> Pixels:
        return _stretched(pixels, levels.black, self.factor)


@dataclass(frozen=True)
class Contrasted(View):
    """Distances to the mean of `normalize` times a factor.

    Not to the image's own mean: that differs from tile to tile, and with what a batch fills up.
    """

    factor: float = 1.0

    def apply(self, pixels: Pixels, levels: Levels) -> Pixels:
        return _stretched(pixels, levels.mean, self.factor)


def _stretched(pixels: Pixels, centre: Floats, factor: float) -> Pixels:
    """Distances to a centre (channels,) times a factor."""
    values = centre + np.float32(factor) * (pixels.astype(np.float32) - centre)
    if pixels.dtype.kind == "f":
        return values
    limits = np.iinfo(pixels.dtype)
    return np.asarray(np.rint(values).clip(limits.min, limits.max).astype(pixels.dtype))


def _resized(values: NDArray[Any], size: Size) -> NDArray[Any]:
    """Resize (h, w) or (h, w, up to 4)."""
    shrinks = size[0] < values.shape[0] or size[1] < values.shape[1]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(values, (size[1], size[0]), interpolation=how))


TURNED = {
    view.name: view
    for view in (
        Turned("horizontal_flip", flips_columns=True),
        Turned("vertical_flip", flips_rows=True),
        Turned("rotate_90", transposed=True, flips_rows=True),  # counter-clockwise, as random_rotate90
        Turned("rotate_180", flips_rows=True, flips_columns=True),
        Turned("rotate_270", transposed=True, flips_columns=True),
        Turned("transpose", transposed=True),
    )
}
SCALED = {"scale": Scaled, "brightness": Brighter, "contrast": Contrasted}
"""Word -> view with a factor, `scale_0.75`."""

LEARNED: dict[type, tuple[str, ...]] = {
    RandomHorizontalFlip: ("horizontal_flip",),
    RandomVerticalFlip: ("vertical_flip",),
    RandomRotate90: ("rotate_90", "rotate_180", "rotate_270"),
    RandomTranspose: ("transpose",),
}
"""Transform of training -> the views that it makes a network used to."""


def parse_views(words: Sequence[str], mirror: bool) -> list[View]:
    """Return the views of --tta_augmentations, after the original one, which always comes first.

    Args:
        words: horizontal_flip, vertical_flip, rotate_90, rotate_180, rotate_270, transpose, scale_F, brightness[_F],
            contrast[_F], with a factor F of 0.25 to 4.
        mirror: `data.mirror` of the checkpoint's configuration.

    Raises: ConfigError for what is no view, stands twice, or mirrors where that is forbidden.
    """
    views = [View()]
    for word in words:
        view = _view(word)
        if view in views:
            raise ConfigError(f"{FLAG}: {word} is there already: give each view once")
        views.append(view)
    mirrored = [view.name for view in views if view.mirrors]
    if mirrored and not mirror:
        raise ConfigError(
            f"{FLAG}: data.mirror is false in the checkpoint's configuration, since left and right are different "
            f"classes: leave out {', '.join(mirrored)}"
        )
    return views


def _view(word: str) -> View:
    match = re.fullmatch(r"([a-z]+)(?:_(\d*\.?\d+))?", word)
    kind, number = match.groups() if match else ("", None)
    if word in TURNED:
        return TURNED[word]
    if kind not in SCALED or (kind == "scale" and number is None):
        known = [*TURNED, "scale_0.75", *(kind for kind in SCALED if kind != "scale")]
        raise ConfigError(f"{FLAG}: unknown name {word!r}; {suggest(word, known)}")
    factor = float(number or USUAL_FACTOR)
    if not FACTORS[0] <= factor <= FACTORS[1] or factor == 1:
        raise ConfigError(f"{FLAG}: the factor of {word} must be {FACTORS[0]:g} to {FACTORS[1]:g}, and not 1")
    return SCALED[kind](f"{kind}_{factor:g}", factor)


def default_views(config: Config) -> list[str]:
    """Return what --tta alone means: the flips and quarter turns that the network was trained with.

    Both flips together are rotate_180 too. Where it was trained with none of them, horizontal_flip.
    Raises: ConfigError where that one is forbidden.
    """
    used = [spec for spec in config.train_transforms if isinstance(spec, Mirroring | RandomRotate90) and spec.p > 0]
    learned = {word for spec in used for word in LEARNED[type(spec)]}
    if {"horizontal_flip", "vertical_flip"} <= learned:
        learned.add("rotate_180")
    if learned:
        return [word for word in TURNED if word in learned]
    if config.data.mirror:
        return ["horizontal_flip"]
    raise ConfigError(
        "--tta: data.mirror is false in the checkpoint's configuration and the network was trained without "
        f"random_rotate90, which leaves no view: name some, such as {FLAG} scale_0.75 brightness"
    )


class Merger:
    """Probabilities of several views, or members of an ensemble, merged one after the other into one.

    `mean`: their mean. `max`: the largest of each class, divided by their sum. `voting`: the share of the votes, where
    each gives one to its most probable class at a pixel; a thousandth of the mean probability is added, so that it
    decides where votes are equal, and all is divided by 1.001. Every result sums to 1 over the classes.
    """

    def __init__(self, how: Aggregation) -> None:
        self.how = how
        self._merged: Floats | None = None  # (N, C, H, W)
        self._weights = 0.0

    def add(self, probs: Floats, weight: float = 1.0) -> None:
        """Add probabilities (N, C, H, W), which sum to 1 over C and are not written to; `max` knows no weights."""
        self._weights += weight
        if self._merged is None:
            self._merged = np.zeros(probs.shape, np.float32)
        match self.how:
            case "mean":
                self._merged += probs if weight == 1 else np.float32(weight) * probs
            case "max":
                np.maximum(self._merged, probs, out=self._merged)
            case "voting":
                votes = probs.argmax(axis=1)[:, None]  # (N, 1, H, W)
                self._merged += np.float32(TIE * weight) * probs
                merged = np.take_along_axis(self._merged, votes, axis=1)
                np.put_along_axis(self._merged, votes, merged + np.float32(weight), axis=1)

    def result(self) -> Floats:
        """Return the merged probabilities (N, C, H, W); after at least one `add`."""
        assert self._merged is not None
        match self.how:
            case "mean":
                return self._merged / np.float32(self._weights)
            case "max":
                return np.asarray(self._merged / self._merged.sum(axis=1, keepdims=True))
            case "voting":
                return self._merged / np.float32(self._weights * (1 + TIE))
