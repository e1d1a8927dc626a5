"""Chooses the images on which an int8 export finds the ranges of its values. Next to read: `export/quantize.py`."""

import numpy as np
from numpy.typing import NDArray

MOST = 16  # images: more of them hardly move the ranges


def choose_images(counts: NDArray[np.int64], most: int = MOST) -> list[int]:
    """Return which images to calibrate on: every class is among them, and the rest is spread over all images.

    The rarest class comes first. Of the images that have it, the one is taken that adds most classes, then the one with
    the largest share of this class, then the first. What is left of `most` is filled with evenly spaced images.

    Args:
        counts: (N, C), how many pixels of each class each image has; ignored pixels are not counted.
        most: how many images at most.
    Returns: up to `most` different indices 0..N-1, rising; all where N is smaller. They only depend on the counts.
    """
    present = np.asarray(counts > 0)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    chosen: list[int] = []
    pixels = counts.sum(axis=0)  # (C,)
    uncovered = pixels > 0
    for kind in np.argsort(pixels, kind="stable"):
        if not uncovered[kind] or len(chosen) == most:
            continue
        having = np.flatnonzero(present[:, kind])
        added = (present[having] & uncovered).sum(axis=1)
        best = int(having[np.lexsort((-shares[having, kind], -added))[0]])
        chosen.append(best)
        uncovered &= ~present[best]
    others = np.setdiff1d(np.arange(len(counts)), chosen)
    room = min(most - len(chosen), len(others))
    spaced = (np.arange(room) * len(others)) // max(room, 1)
    return sorted([*chosen, *others[spaced].tolist()])
