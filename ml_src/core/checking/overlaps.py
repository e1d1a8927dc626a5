"""Which georeferenced images cover the same ground. The pictures themselves are compared in `duplicates.py`."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Share of the smaller rectangle from which two are said to overlap: less is a seam, or a rounded coordinate.
LEAST_SHARE = 0.01


def overlaps(boxes: ArrayLike, crs_names: Sequence[str]) -> list[tuple[int, int, float]]:
    """Find the rectangles that share more than 1 % of the smaller one's area.

    Args:
        boxes: (N, 4): left, bottom, right, top in units of the reference system; the two of an axis in either order.
            What has no area, or a coordinate that is no finite number, overlaps nothing.
        crs_names: the N reference systems; only rectangles of the same text are compared.

    Returns: (index, later index, shared area / area of the smaller), sorted.

    A sweep along one axis: each rectangle is compared with those that begin before it ends. The axis is the one that
    leaves fewer pairs, so for a grid of N tiles the time grows with N to the power 1.5; memory with N and the pairs
    found.
    """
    corners = np.asarray(boxes, np.float64).reshape(-1, 2, 2)  # (N, end, axis)
    low, high = corners.min(axis=1), corners.max(axis=1)  # (N, axis)
    usable = np.isfinite(corners).all(axis=(1, 2)) & (high > low).all(axis=1)
    groups = defaultdict(list)
    for index in np.flatnonzero(usable).tolist():
        groups[crs_names[index]].append(index)
    return sorted(
        (min(members[i], members[j]), max(members[i], members[j]), share)
        for members in groups.values()
        for i, j, share in _sweep(low[members], high[members])
    )


def _sweep(low: NDArray[np.float64], high: NDArray[np.float64]) -> list[tuple[int, int, float]]:
    """Compare rectangles of one reference system, given by two (N, 2) arrays."""
    along = min((0, 1), key=lambda axis: _ends(np.sort(low[:, axis]), high[:, axis]).sum())
    order = np.argsort(low[:, along], kind="stable")
    low, high = low[order], high[order]
    areas = np.prod(high - low, axis=1)
    found = []
    for i, end in enumerate(_ends(low[:, along], high[:, along])):
        later = slice(i + 1, end)
        sides = np.minimum(high[i], high[later]) - np.maximum(low[i], low[later])
        shares = np.prod(np.maximum(sides, 0), axis=1) / np.minimum(areas[i], areas[later])
        for j in np.flatnonzero(shares > LEAST_SHARE):
            found.append((int(order[i]), int(order[i + 1 + j]), float(shares[j])))
    return found


def _ends(starts: NDArray[np.float64], stops: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return for each stop how many of the sorted starts lie before it."""
    return np.searchsorted(starts, stops)
