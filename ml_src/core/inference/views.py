"""Test-time augmentation: the same images seen in other ways, and what the network says of them merged into one.

Next to read: `predictor.py`, which shows every tile in every view.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ml_src.core.config import Config
from ml_src.core.config_rules import Mirroring
from ml_src.core.errors import ConfigError
from ml_src.core.registry import suggest
from ml_src.core.transform_specs import RandomHorizontalFlip, RandomRotate90, RandomTranspose, RandomVerticalFlip
from ml_src.core.transforms.source import Size

FLAG = "--tta_augmentations"
FACTORS = (0.25, 4.0)  # smallest and largest of scale, brightness and contrast
USUAL_FACTOR = 1.1  # of brightness and contrast without a number
TIE = 0.001  # what the mean probability weighs beside the votes
ROWS, COLUMNS = 2, 3  # axes of (N, C, H, W)

Aggregation = Literal["mean", "max", "voting"]


@dataclass(frozen=True)
class View:
    """The images as they are. Every other view overrides what differs."""

    name: str = "original"

    @property
    def mirrors(self) -> bool:
        """Whether left becomes right."""
        return False

    def apply(self, images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Return the images as this view shows them.

        Args:
            images: (N, C, H, W), normalised, floating point; not written to.
            mean: (1, C, 1, 1), such that images * std + mean are pixel values of which 0 is black.
            std: likewise. For images whose numbers do not begin at black (all but 8-bit ones) 2 and 1 put black two
                deviations below the mean, where the colours of training have it.
        """
        return images

    def invert(self, probs: Tensor, size: Size) -> Tensor:
        """Return probabilities (N, K, h, w) of the view's images as (N, K, H, W), where the images' pixels are.

        `size` is (H, W), of the images that `apply` was given.
        """
        return probs


@dataclass(frozen=True)
class Turned(View):
    """Rows and columns swapped or not, then flipped along some axes: a permutation of the pixels, without any blur."""

    transposed: bool = False
    flipped: tuple[int, ...] = ()

    @property
    def mirrors(self) -> bool:
        return (len(self.flipped) + self.transposed) % 2 == 1

    def apply(self, images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return (images.mT if self.transposed else images).flip(self.flipped)

    def invert(self, probs: Tensor, size: Size) -> Tensor:
        probs = probs.flip(self.flipped)
        return probs.mT if self.transposed else probs


@dataclass(frozen=True)
class Scaled(View):
    """Height and width times a factor, rounded; bilinear both ways, and antialiased where it shrinks."""

    factor: float = 1.0

    def apply(self, images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        height, width = (max(1, round(self.factor * side)) for side in images.shape[-2:])
        return _resized(images, (height, width))

    def invert(self, probs: Tensor, size: Size) -> Tensor:
        return _resized(probs, size)


@dataclass(frozen=True)
class Brighter(View):
    """Pixel values times a factor, as color_jitter does it, but nothing is clipped."""

    factor: float = 1.0

    def apply(self, images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return self.factor * images + (self.factor - 1) * mean / std  # (factor * (images * std + mean) - mean) / std


@dataclass(frozen=True)
class Contrasted(View):
    """Distances to the mean of `normalize` times a factor; nothing is clipped.

    Not to the image's own mean: that differs from tile to tile, and with what a batch fills up.
    """

    factor: float = 1.0

    def apply(self, images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return self.factor * images


TURNED = {
    view.name: view
    for view in (
        Turned("horizontal_flip", flipped=(COLUMNS,)),
        Turned("vertical_flip", flipped=(ROWS,)),
        Turned("rotate_90", transposed=True, flipped=(ROWS,)),  # counter-clockwise, as random_rotate90
        Turned("rotate_180", flipped=(ROWS, COLUMNS)),
        Turned("rotate_270", transposed=True, flipped=(COLUMNS,)),
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
        self._merged: Tensor | None = None  # (N, C, H, W) float32
        self._weights = 0.0

    def add(self, probs: Tensor, weight: float = 1.0) -> None:
        """Add probabilities (N, C, H, W), which sum to 1 over C and are not written to; `max` knows no weights."""
        probs, self._weights = probs.float(), self._weights + weight
        if self._merged is None:
            self._merged = torch.zeros_like(probs)
        match self.how:
            case "mean":
                self._merged.add_(probs, alpha=weight)
            case "max":
                torch.maximum(self._merged, probs, out=self._merged)
            case "voting":
                votes = probs.argmax(dim=1, keepdim=True)  # (N, 1, H, W)
                self._merged.add_(probs, alpha=TIE * weight)
                self._merged.scatter_add_(1, votes, torch.full_like(votes, weight, dtype=torch.float32))

    def result(self) -> Tensor:
        """Return the merged probabilities (N, C, H, W), float32; after at least one `add`."""
        assert self._merged is not None
        match self.how:
            case "mean":
                return self._merged / self._weights
            case "max":
                return self._merged / self._merged.sum(dim=1, keepdim=True)
            case "voting":
                return self._merged / (self._weights * (1 + TIE))


def _resized(values: Tensor, size: Size) -> Tensor:
    shrinks = size[0] < values.shape[-2] or size[1] < values.shape[-1]
    return F.interpolate(values, size=size, mode="bilinear", align_corners=False, antialias=shrinks)
