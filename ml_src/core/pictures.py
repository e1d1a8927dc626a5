"""Label maps as colours: the palette, overlays on the image, and image | truth | prediction side by side."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Pixels = NDArray[Any]  # (H, W, C), uint8, uint16, int16 or float32

# Paul Tol's "bright" scheme behind a black class 0: told apart also by readers who do not see all colours.
_BRIGHT = ((0, 0, 0), (238, 102, 119), (34, 136, 51), (68, 119, 170), (204, 187, 68), (102, 204, 238), (170, 51, 119))
_IGNORED_COLOR = (187, 187, 187)
TINT = 0.35  # how much of its class's colour a pixel of an overlay takes on


def palette(num_colors: int = 256) -> Image:
    """Return (num_colors, 3) RGB colours; those of the first classes do not depend on how many there are."""
    golden = (np.arange(num_colors) * 0.618034) % 1.0  # neighbours in number are far apart in hue
    hsv = np.stack([golden * 179, np.full(num_colors, 150), 160 + 80 * (np.arange(num_colors) % 2)], axis=1)
    colors = cv2.cvtColor(hsv.astype(np.uint8)[None], cv2.COLOR_HSV2RGB)[0]
    known = min(num_colors, len(_BRIGHT))
    colors[:known] = _BRIGHT[:known]
    return np.asarray(colors, np.uint8)


def colorize(labels: NDArray[Any], ignore_index: int | None = None) -> Image:
    """Return labels (H, W) as RGB (H, W, 3); ignored pixels are gray."""
    colors = palette(max(256, int(labels.max(initial=0)) + 1))
    picture = colors[labels]
    if ignore_index is not None:
        picture[labels == ignore_index] = _IGNORED_COLOR
    return np.asarray(picture, np.uint8)


def overlay(image: Pixels, labels: NDArray[Any]) -> Image:
    """Draw labels (H, W) over an image (H, W, C): a tint inside each region and a line at its border.

    Class 0 is left as it is.
    """
    picture = np.array(as_rgb(image))
    colors = palette(max(256, int(labels.max(initial=0)) + 1))[labels]
    inside = labels > 0
    tinted = cv2.addWeighted(picture, 1 - TINT, np.asarray(colors, np.uint8), TINT, 0)
    picture[inside] = tinted[inside]
    small = labels.astype(np.uint16)
    edge = cv2.morphologyEx(small, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    picture[edge & inside] = colors[edge & inside]
    return picture


def side_by_side(image: Pixels, *label_maps: NDArray[Any], ignore_index: int | None = None) -> Image:
    """Return the image and its label maps in one row, with a white line between."""
    line = np.full((image.shape[0], 4, 3), 255, np.uint8)
    parts = [as_rgb(image)]
    for labels in label_maps:
        parts += [line, colorize(labels, ignore_index)]
    return np.concatenate(parts, axis=1)


def as_rgb(image: Pixels) -> Image:
    """Return (H, W, 3) uint8 of an image (H, W, C) of any number type: gray is repeated, more channels are chosen from.

    Up to four channels: the first three. More: three at even distances, the last one as red, as the shortest waves come
    first in most files. What is not uint8 is stretched: black and white are where the darkest and the brightest 2 % of
    each channel begin. What is not finite is black.
    """
    image = image[:, :, shown_channels(image.shape[2])]
    return np.asarray(image) if image.dtype == np.uint8 else _stretched(image)


def shown_channels(channels: int) -> list[int]:
    """Return which channels of so many are shown as red, green and blue."""
    if channels > 4:
        return [channels - 1 - channels // 6, channels // 2, channels // 6]
    return [0, 0, 0] if channels < 3 else [0, 1, 2]


def _stretched(picture: Pixels) -> Image:
    stretched = np.zeros(picture.shape, np.uint8)
    for channel in range(picture.shape[2]):  # one at a time: in float64 all of them would be large
        levels = picture[:, :, channel]
        there = np.isfinite(levels)
        if there.any():
            low, high = np.percentile(levels[there], (2, 98))
            levels = np.where(there, (levels - low) / max(high - low, 1e-12) * 255, 0)
            stretched[:, :, channel] = np.clip(levels, 0, 255)
    return stretched
