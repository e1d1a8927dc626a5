"""Connected regions of masks that are seen in bands of rows: what lies in several bands is put together.

A region inside one band is known there. Of the others the parts are numbered, summed and joined over the seams, so
that memory grows with the length of the seams, not with the number of regions. Next to read: `postprocess.py`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from ml_src.core.inference.planes import Plane

NONE = -1
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


def rows_around(plane: Plane, top: int, bottom: int, margin: int) -> tuple[NDArray[Any], slice]:
    """Return rows with up to `margin` more above and below, and where in them top to bottom lie."""
    start = max(0, top - margin)
    return plane.rows(start, min(plane.shape[0], bottom + margin)), slice(top - start, bottom - start)


class Band(NamedTuple):
    """The regions of a band of a mask. Arrays (k + 1,) go by the value in `labels`; their first entry means nothing."""

    labels: NDArray[np.int32]  # (n, W): 1 to k, 0 outside of the mask
    area: Ints  # (k + 1,) in pixels
    is_open: Bools  # (k + 1,): touches the edge of the image, or what counts as outside of it
    is_shared: Bools  # (k + 1,): reaches a seam, so that it may go on in another band
    region: Ints  # (k + 1,): different for different regions; below 0, and the same in all bands, for shared ones


class Votes(NamedTuple):
    """How often a class is met along the border of a region: three arrays (m,), in which no pair of both is twice."""

    region: Ints
    value: Ints
    amount: Ints


NOTHING = np.zeros(0, np.int64)
NO_VOTES = Votes(NOTHING, NOTHING, NOTHING)


def find_regions(
    mask: Bools, connectivity: int, at_top: bool = True, at_bottom: bool = True, outside: Bools | None = None
) -> Band:
    """Number the regions of a band.

    Args:
        mask: (n, W).
        connectivity: 4 or 8.
        at_top, at_bottom: whether the band begins, or ends, where the image does; where not, there is a seam.
        outside: pixels (n, W) that count as outside of the image.
    """
    count, labels = cv2.connectedComponents(mask.view(np.uint8), connectivity=connectivity)
    ends = ((labels[0], at_top), (labels[-1], at_bottom))
    is_shared = _among([row for row, is_edge in ends if not is_edge], count)
    edges = [labels[:, 0], labels[:, -1], *(row for row, is_edge in ends if is_edge)]
    is_open = _among(edges if outside is None else [*edges, labels[outside]], count)
    return Band(labels, np.bincount(labels.ravel(), minlength=count), is_open, is_shared, np.arange(count))


def _among(parts: Sequence[NDArray[np.int32]], count: int) -> Bools:
    """Which labels (count,) occur in any of some arrays; 0 does not count."""
    found = np.zeros(count, bool)
    for part in parts:
        found[part] = True
    found[0] = False
    return found


def border_votes(labels: NDArray[np.int32], chosen: Bools, values: NDArray[np.integer], no_vote: int) -> Votes:
    """Count, along the borders of regions, the sides of pixels beyond which another class lies.

    Args:
        labels: regions (n, W), 0 to k.
        chosen: the regions (k + 1,) to count for; never the first.
        values: classes (n + 2, W) of the band and of the rows above and below it.
        no_vote: the class that does not count, as nothing beyond the left and right edge does.
    """
    if not chosen.any():
        return NO_VOTES
    padded = np.pad(values, ((0, 0), (1, 1)), constant_values=no_vote)
    at_border = cv2.dilate((padded != no_vote).view(np.uint8), CROSS).ravel() > 0
    inside, around, width = np.pad(labels, 1).ravel(), padded.ravel(), padded.shape[1]
    pixels = np.flatnonzero(at_border & (inside > 0))
    pixels = pixels[chosen[inside[pixels]]]
    regions, found = [], []
    for step in (-1, 1, -width, width):
        beside = around[pixels + step]
        votes = np.flatnonzero(beside != no_vote)
        regions.append(inside[pixels[votes]])
        found.append(beside[votes])
    region = np.concatenate(regions).astype(np.int64)
    return _added_up(Votes(region, np.concatenate(found).astype(np.int64), np.ones_like(region)))


def _added_up(votes: Votes) -> Votes:
    """Sum the counts of equal pairs of region and class; the result is sorted by both."""
    base = int(votes.value.max(initial=0)) + 1
    pairs, places = np.unique(votes.region * base + votes.value, return_inverse=True)
    return Votes(pairs // base, pairs % base, _sums(places, votes.amount, len(pairs)))


def _sums(places: Ints, amounts: Ints, size: int) -> Ints:
    """Sum amounts by place. Floats between hold whole numbers below 2 ** 53 exactly."""
    return np.bincount(places, amounts, minlength=size).astype(np.int64)


def winners(votes: Votes, size: int) -> Ints:
    """Return for each of `size` regions the class with most votes (of several the lowest), or NONE without any."""
    order = np.lexsort((votes.value, -votes.amount, votes.region))
    regions = votes.region[order]
    first = np.flatnonzero(np.diff(regions, prepend=NONE))
    winner = np.full(size, NONE, np.int64)
    winner[regions[first]] = votes.value[order][first]
    return winner


class Joined(NamedTuple):
    """What regions come to that several bands share. The shared labels of all bands in turn have the places 0 to m."""

    starts: list[int]  # the place of the first shared label of each band
    root: Ints  # (m,): the first place of the same region
    area: Ints  # (m,) of the whole region
    is_open: Bools  # (m,)
    winner: Ints  # (m,): the class with most votes, or NONE
    largest: int  # area of the largest of all regions, shared or not

    def complete(self, index: int, band: Band) -> Band:
        """Return band number `index` with areas and all else of its shared regions as a whole."""
        area, is_open, region = band.area.copy(), band.is_open.copy(), band.region.copy()
        places = self._places(index)
        area[band.is_shared], is_open[band.is_shared] = self.area[places], self.is_open[places]
        region[band.is_shared] = -1 - self.root[places]
        return band._replace(area=area, is_open=is_open, region=region)

    def winners(self, index: int, band: Band, votes: Votes) -> Ints:
        """Return the winning class (k + 1,) of each region of a band; `votes` are for those that are not shared."""
        winner = winners(votes, len(band.area))
        winner[band.is_shared] = self.winner[self._places(index)]
        return winner

    def _places(self, index: int) -> slice:
        return slice(self.starts[index], self.starts[index + 1])


class Survey:
    """Sees all bands of a mask, from the top, and remembers of each what its shared regions have there."""

    def __init__(self, connectivity: int) -> None:
        self._connectivity = connectivity
        self._last_row: Ints | None = None  # places (W,) in the last row that was seen
        self._starts, self._largest = [0], 0
        self._pairs = [np.zeros((0, 2), np.int64)]
        self._area, self._is_open, self._votes = [NOTHING], [NOTHING.astype(bool)], [NO_VOTES]

    def add(self, band: Band, votes: Votes | None = None) -> None:
        """Take in the next band; `votes` are for its shared regions, where a class is to be elected."""
        start = self._starts[-1]
        end = start + int(band.is_shared.sum())
        place = np.full(len(band.area), NONE)
        place[band.is_shared] = np.arange(start, end)
        if self._last_row is not None:
            self._pairs.append(_touching(self._last_row, place[band.labels[0]], self._connectivity))
        if votes is not None:
            self._votes.append(votes._replace(region=place[votes.region]))
        self._area.append(band.area[band.is_shared])
        self._is_open.append(band.is_open[band.is_shared])
        self._last_row = place[band.labels[-1]]
        self._starts.append(end)
        self._largest = max(self._largest, int(band.area[1:].max(initial=0)))

    def join(self) -> Joined:
        """Return what the shared regions come to, once all bands were seen."""
        size = self._starts[-1]
        root = _roots(np.concatenate(self._pairs), size)
        area = _sums(root, np.concatenate(self._area), size)
        is_open = np.zeros(size, bool)
        is_open[root[np.concatenate(self._is_open)]] = True
        region, value, amount = (np.concatenate(parts) for parts in zip(*self._votes, strict=True))
        winner = winners(_added_up(Votes(root[region], value, amount)), size)
        largest = max(self._largest, int(area.max(initial=0)))
        return Joined(self._starts, root, area[root], is_open[root], winner[root], largest)


def _touching(above: Ints, below: Ints, connectivity: int) -> Ints:
    """Return the pairs (m, 2) of places that meet between two rows (W,) of places."""
    width, found = len(above), []
    for shift in (0,) if connectivity == 4 else (-1, 0, 1):
        pairs = np.stack([above[max(0, shift) : width + shift], below[max(0, -shift) : width - shift]], axis=1)
        new = np.any(np.diff(pairs, axis=0, prepend=NONE) != 0, axis=1)  # wide regions meet in many pixels
        found.append(pairs[new & np.all(pairs != NONE, axis=1)])
    return np.concatenate(found)


def _roots(pairs: Ints, size: int) -> Ints:
    """Return for each of `size` places the smallest that pairs (m, 2) connect it with."""
    root, (first, second) = np.arange(size), pairs.T
    while True:
        low, high = np.minimum(root[first], root[second]), np.maximum(root[first], root[second])
        apart = low < high
        if not apart.any():
            return root
        first, second = first[apart], second[apart]
        np.minimum.at(root, high[apart], low[apart])
        while np.any(root[root] != root):
            root = root[root]
