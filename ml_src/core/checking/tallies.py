"""What values masks hold, counted. Next to read: `mask_values.py`, which finds out what they mean."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of each mask, and of the set, at most so many different values are kept, the commonest: floats may have millions.
MOST_KEPT = 1 << 16
# Of more different values with gaps nobody can say that each is a class.
MOST_CLASSES_WITH_GAPS = 64


@dataclass
class Tally:
    """What values a set of masks holds: pixels per finite value, and what its files say of themselves."""

    counts: Counter[float] = field(default_factory=Counter)
    num_pixels: int = 0
    num_not_finite: int = 0
    nodata: set[float] = field(default_factory=set)
    lossy: bool = False
    compact: Counter[float] = field(default_factory=Counter)  # pixels among eight of their own value
    holders: Counter[float] = field(default_factory=Counter)  # masks that hold a value, of those with few values
    num_masks: int = 0

    def add(self, other: "Tally") -> None:
        """Take in another mask."""
        self.counts.update(other.counts)
        self.compact.update(other.compact)
        if len(self.counts) > 4 * MOST_KEPT:
            self.counts = _commonest(self.counts)
            self.compact = Counter({value: self.compact[value] for value in self.compact.keys() & self.counts.keys()})
        self.holders.update(other.holders)
        self.num_masks += other.num_masks
        self.num_pixels += other.num_pixels
        self.num_not_finite += other.num_not_finite
        self.nodata |= other.nodata
        self.lossy |= other.lossy

    @property
    def common(self) -> tuple[float, ...]:
        """The values that at least a hundredth of the pixels have, ascending."""
        return tuple(sorted(value for value, pixels in self.counts.items() if 100 * pixels >= self.num_pixels))


def tally_of(plane: NDArray[Any], nodata: float | None = None, lossy: bool = False) -> Tally:
    """Count the values of one mask, (H, W)."""
    finite = plane[np.isfinite(plane)] if plane.dtype.kind == "f" else plane
    counts = _counted(finite)
    kept = _commonest(counts) if len(counts) > MOST_KEPT else counts
    own = set() if nodata is None else {nodata}
    compact = _counted(compact_pixels(plane))
    holders = Counter(dict.fromkeys(kept, 1) if len(kept) <= MOST_CLASSES_WITH_GAPS else {})
    return Tally(kept, plane.size, plane.size - finite.size, own, lossy, compact, holders, 1)


def compact_pixels(plane: NDArray[Any]) -> NDArray[Any]:
    """Return the values of the pixels whose eight neighbours all have the same one; classes have many, borders none.

    Args:
        plane: (H, W); what lies at its edge has fewer neighbours and is left out.
    """
    rows = (plane[:, 1:-1] == plane[:, :-2]) & (plane[:, 1:-1] == plane[:, 2:])  # (H, W - 2)
    centre = plane[1:-1, 1:-1]
    alike = (centre == plane[:-2, 1:-1]) & (centre == plane[2:, 1:-1])
    inside: NDArray[Any] = centre[rows[:-2] & rows[1:-1] & rows[2:] & alike]
    return inside


def _counted(pixels: NDArray[Any]) -> Counter[float]:
    values, numbers = np.unique(pixels, return_counts=True)
    return Counter(dict(zip(values.astype(float).tolist(), numbers.tolist(), strict=True)))


def _commonest(counts: Counter[float]) -> Counter[float]:
    """Keep the commonest values, and the ends."""
    ends = {value: counts[value] for value in (min(counts), max(counts))}
    return Counter(dict(counts.most_common(MOST_KEPT)) | ends)
