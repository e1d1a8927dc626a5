"""Predictions as files: indexed masks and overlays. Each is whole or not there."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from ml_src.core.atomic import replacing
from ml_src.core.pictures import Image, overlay, palette


def write_mask(path: Path, labels: NDArray[Any], num_classes: int) -> None:
    """Write labels (H, W) as a PNG whose values are the classes: indexed with a palette, 16-bit above 256 classes."""
    if num_classes <= 256:
        picture = PILImage.fromarray(labels.astype(np.uint8)).convert("P")
        picture.putpalette(palette().tobytes())
    else:
        picture = PILImage.fromarray(labels.astype(np.uint16))
    with replacing(path) as file:
        picture.save(file, format="PNG")


def write_overlay(path: Path, image: Image, labels: NDArray[Any]) -> None:
    """Write the image (H, W, C) with its labels (H, W) drawn over it as PNG."""
    pixels = cv2.cvtColor(overlay(image, labels), cv2.COLOR_RGB2BGR)
    with replacing(path) as file:
        file.write(cv2.imencode(".png", pixels)[1].tobytes())
