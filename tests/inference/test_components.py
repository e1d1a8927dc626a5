"""Regions of masks that are seen in bands: what the whole mask shows, however it is cut."""

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy import ndimage

from ml_src.core.inference import planes
from ml_src.core.inference.components import (
    NONE,
    Band,
    Survey,
    Votes,
    border_votes,
    find_regions,
    rows_around,
    winners,
)
from ml_src.core.inference.planes import Plane

STRUCTURE = {4: ndimage.generate_binary_structure(2, 1), 8: np.ones((3, 3), bool)}
MASKS = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(lambda size: arrays(bool, size))
CUTS = st.lists(st.integers(1, 11), max_size=6)


def seen_in_bands(
    mask: NDArray[Any], connectivity: int, cuts: list[int], outside: NDArray[Any]
) -> tuple[list[Band], int]:
    """The bands of a mask, completed by what the others know, and the area of the largest region."""
    ends = sorted({0, len(mask), *(cut for cut in cuts if cut < len(mask))})
    bands = [
        find_regions(mask[top:bottom], connectivity, top == 0, bottom == len(mask), outside[top:bottom])
        for top, bottom in pairwise(ends)
    ]
    survey = Survey(connectivity)
    for band in bands:
        survey.add(band)
    joined = survey.join()
    return [joined.complete(index, band) for index, band in enumerate(bands)], joined.largest


@given(MASKS, st.sampled_from([4, 8]), CUTS, st.randoms())
def test_regions_seen_in_bands_are_those_of_the_whole_mask(
    mask: NDArray[Any], connectivity: int, cuts: list[int], random: Any
) -> None:
    """scipy labels the whole; each of its regions has one number, its own area, and is open where it should be."""
    outside = np.array([random.random() < 0.1 for _ in range(mask.size)]).reshape(mask.shape)
    whole, count = ndimage.label(mask, STRUCTURE[connectivity])
    bands, largest = seen_in_bands(mask, connectivity, cuts, outside)
    areas = np.concatenate([band.area[band.labels] for band in bands])
    is_open = np.concatenate([band.is_open[band.labels] for band in bands])
    own = [np.where(band.region > 0, band.region + 1000 * index, band.region) for index, band in enumerate(bands)]
    numbers = np.concatenate([number[band.labels] for number, band in zip(own, bands, strict=True)])
    edge = outside.copy()
    edge[[0, -1]] = edge[:, [0, -1]] = True
    seen = set()
    for label in range(1, count + 1):
        region = whole == label
        assert len(set(numbers[region])) == 1
        seen.add(int(numbers[region][0]))
        assert set(areas[region]) == {region.sum()}
        assert set(is_open[region]) == {bool((region & edge).any())}
    assert len(seen) == count
    assert largest == max((int((whole == label).sum()) for label in range(1, count + 1)), default=0)


def test_a_snake_that_crosses_every_seam_many_times_is_one_region() -> None:
    mask = np.zeros((20, 41), bool)
    mask[:, ::2] = True
    mask[0, 1::4] = mask[-1, 3::4] = True
    bands, largest = seen_in_bands(mask, 8, list(range(1, 20)), np.zeros_like(mask))
    assert largest == mask.sum()
    assert len({int(number) for band in bands for number in band.region[band.labels][band.labels > 0]}) == 1


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([(1, 2, 5), (1, 3, 4)], [NONE, 2, NONE]),
        ([(1, 3, 5), (1, 2, 5)], [NONE, 2, NONE]),  # of several the lowest
        ([(2, 0, 1), (1, 7, 1)], [NONE, 7, 0]),
        ([], [NONE, NONE, NONE]),
    ],
)
def test_the_class_with_most_votes_wins(votes: list[tuple[int, int, int]], expected: list[int]) -> None:
    columns = np.array(votes, np.int64).reshape(-1, 3).T
    assert winners(Votes(*columns), 3).tolist() == expected


@given(st.tuples(st.integers(1, 8), st.integers(1, 8)), st.data())
def test_votes_are_the_sides_beyond_which_another_class_lies(size: tuple[int, int], data: st.DataObject) -> None:
    values = data.draw(arrays(np.uint8, (size[0] + 2, size[1]), elements=st.integers(0, 3)))
    labels = np.asarray(ndimage.label(values[1:-1] == 1, np.ones((3, 3)))[0], np.int32)
    chosen = data.draw(arrays(bool, int(labels.max()) + 1))
    chosen[0] = False
    expected: Counter[tuple[int, int]] = Counter()
    for (row, column), label in np.ndenumerate(labels):
        for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            there = column + right
            if chosen[label] and 0 <= there < size[1] and values[row + 1 + down, there] != 1:
                expected[int(label), int(values[row + 1 + down, there])] += 1
    votes = border_votes(labels, chosen, values, no_vote=1)
    assert {(int(r), int(v)): int(a) for r, v, a in zip(*votes, strict=True)} == dict(expected)


def test_a_map_is_cut_into_bands_whether_it_is_in_memory_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "BAND", 21)
    array = np.arange(77, dtype=np.uint8).reshape(11, 7)
    assert list(Plane.of(array).bands()) == [(0, 3), (3, 6), (6, 9), (9, 11)]
    for top, bottom in Plane.of(array).bands():
        rows, inner = rows_around(Plane.of(array), top, bottom, 2)
        assert np.array_equal(rows, array[max(0, top - 2) : bottom + 2])
        assert np.array_equal(rows[inner], array[top:bottom])
