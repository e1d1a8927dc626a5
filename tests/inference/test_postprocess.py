"""Post-processing: each rule on maps that fit on paper, references by brute force, and the same result by bands."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy import ndimage

from ml_src.core.config import Config
from ml_src.core.config_file import parse_config, plain
from ml_src.core.errors import ConfigError
from ml_src.core.inference import planes
from ml_src.core.inference.planes import Plane
from ml_src.core.inference.postprocess import apply_postprocessing, has_chain, load_chain, save_chain
from ml_src.core.postprocess_specs import (
    Closing,
    Crf,
    FillHoles,
    KeepLargest,
    Opening,
    PostprocessStep,
    RemoveSmall,
    parse_steps,
    steps_from_yaml,
    steps_to_yaml,
)

NODATA = 255
Labels = NDArray[Any]

SIZES = st.tuples(st.integers(1, 14), st.integers(1, 14))
# three classes and pixels without data; blocks of equal pixels make regions that are more than specks
MAPS = st.tuples(SIZES, st.integers(1, 3)).flatmap(
    lambda drawn: arrays(np.uint8, drawn[0], elements=st.sampled_from([0, 0, 1, 1, 2, NODATA])).map(
        lambda labels: np.kron(labels, np.ones((drawn[1], drawn[1]), np.uint8))
    )
)
STEPS = st.one_of(
    st.integers(1, 3).map(lambda radius: Opening(type="opening", radius=radius)),
    st.integers(1, 3).map(lambda radius: Closing(type="closing", radius=radius)),
    st.sampled_from([None, 1, 4]).map(lambda area: FillHoles(type="fill_holes", area=area)),
    st.sampled_from([2, 5, 20, {1: 9, 2: 3}]).map(lambda area: RemoveSmall(type="remove_small", area=area)),
    st.just(KeepLargest(type="keep_largest")),
    st.just(KeepLargest(type="keep_largest", classes=[2, 0])),
)


def picture(text: str) -> Labels:
    """A map of one character a pixel: . is class 0, _ has no data."""
    rows = [row.strip() for row in text.strip().splitlines()]
    return np.array([[{".": 0, "_": NODATA}.get(c, 0) if c in "._" else int(c) for c in row] for row in rows], np.uint8)


def drawn(labels: Labels) -> str:
    return "\n".join("".join({0: ".", NODATA: "_"}.get(int(value), str(value)) for value in row) for row in labels)


def processed(
    labels: Labels, words: str | list[PostprocessStep], image: Labels | None = None, num_classes: int = 3
) -> Labels:
    steps = parse_steps(words.split()) if isinstance(words, str) else words
    guide: Callable[[int, int], Labels] | None = None if image is None else lambda top, bottom: image[top:bottom]
    return apply_postprocessing(Plane.of(labels), steps, num_classes, NODATA, guide).whole()


def in_bands(labels: Labels, steps: list[PostprocessStep], pixels: int, image: Labels | None = None) -> Labels:
    """As `processed`, with all planes in files and at most so many pixels at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planes, "IN_MEMORY", 0)
        patch.setattr(planes, "BAND", pixels)
        plane = Plane(labels.shape, labels.dtype)
        plane.put(0, labels)
        guide = None if image is None else lambda top, bottom: image[top:bottom]
        result = apply_postprocessing(plane, steps, 3, NODATA, guide)
        assert not result.in_memory
        assert np.array_equal(plane.whole(), labels)
        return result.whole()


RULES = [
    (
        "opening removes what a disk does not fit into",
        "opening,radius=1",
        """
        .........
        .111.....
        .1111111.
        .111.....
        .........
        """,
        """
        .........
        ..11.....
        .1111....
        ..11.....
        .........
        """,
    ),
    (
        "a disk of opening fits where a part of it is beyond the edge, or has no data",
        "opening,radius=1",
        """
        11..
        11..
        .__1
        .__1
        """,
        """
        11..
        1...
        .__1
        .__1
        """,
    ),
    (
        "what opening removes becomes the class along most of its border",
        "opening,radius=1,classes=1",
        """
        22222
        22122
        221..
        .....
        """,
        """
        22222
        22222
        222..
        .....
        """,
    ),
    (
        "closing fills gaps, over other classes but not over pixels without data",
        "closing,radius=1,classes=1",
        """
        ...............
        ...............
        ..111.111.1_1..
        ..1112111.1_1..
        ..111.111.1_1..
        ...............
        ...............
        """,
        """
        ...............
        ...............
        ..111.111.1_1..
        ..111111111_1..
        ..111.111.1_1..
        ...............
        ...............
        """,
    ),
    (
        "closing fills a narrow gap to the edge, and to where there is no data",
        "closing,radius=1",
        """
        .......
        ..111..
        ..111._
        ..111._
        ..111._
        .......
        .......
        """,
        """
        ...1...
        ..111..
        ..1111_
        ..1111_
        ..111._
        .......
        .......
        """,
    ),
    (
        "holes are filled with whatever is in them, unless they reach the edge or pixels without data",
        "fill_holes,classes=1",
        """
        1111.1111.1111.11
        1..1.1.11.1.11.1.
        1.21.11.1.1_11.1.
        1111.1111.1111.11
        """,
        """
        1111.1111.1111.11
        1111.1111.1.11.1.
        1111.1111.1_11.1.
        1111.1111.1111.11
        """,
    ),
    (
        "holes that meet at a corner are two, and only small ones are filled where area says so",
        "fill_holes,area=1",
        """
        1111.1111
        1..1.1.11
        1.11.11.1
        1111.1111
        """,
        """
        1111.1111
        1..1.1111
        1.11.1111
        1111.1111
        """,
    ),
    (
        "regions below the area become what is around them; pixels that meet at a corner are one region",
        "remove_small,area=2,classes=1",
        """
        1...11..22..
        .1......22..
        ....1...212.
        1_......22..
        """,
        """
        1...11..22..
        .1......22..
        ........222.
        ._......22..
        """,
    ),
    (
        "of several classes along the border the lowest wins; where there is none, the region stays",
        "remove_small,area=5,classes=1",
        """
        221.._11_
        """,
        """
        22..._11_
        """,
    ),
    (
        "the area may be said for each class; a class that is not named is left alone",
        "remove_small,area=2:3",
        """
        22.222.1.2
        """,
        """
        ...222.1..
        """,
    ),
    (
        "one region of each class is kept, the largest",
        "keep_largest",
        """
        11.1.22.2
        11.1..2.2
        .........
        1....2..2
        """,
        """
        11...22..
        11....2..
        .........
        .........
        """,
    ),
    (
        "of several largest regions the one that begins furthest up is kept, then furthest left",
        "keep_largest",
        """
        ...1.1
        11...1
        ...1..
        """,
        """
        .....1
        .....1
        ......
        """,
    ),
    (
        "each class in turn acts on what the one before has left",
        "remove_small,area=3,classes=1+2",
        """
        ..22122..
        """,
        """
        ..22222..
        """,
    ),
    (
        "in the other order the same step leaves something else",
        "remove_small,area=3,classes=2+1",
        """
        ..22122..
        """,
        """
        .........
        """,
    ),
    (
        "steps are done in their order",
        "remove_small,area=2 closing,radius=1",
        """
        .........
        .........
        ..1111...
        ..1..1.1.
        ..1111...
        .........
        .........
        """,
        """
        .........
        .........
        ..1111...
        ..1111...
        ..1111...
        .........
        .........
        """,
    ),
]


@pytest.mark.parametrize(("claim", "words", "before", "after"), RULES, ids=[rule[0] for rule in RULES])
def test_on_paper(claim: str, words: str, before: str, after: str) -> None:
    assert drawn(processed(picture(before), words)) == drawn(picture(after))


# The same rules once more, by scipy and loops over single pixels.


def reference(labels: Labels, step: Any, value: int) -> Labels:
    mask, outside = labels == value, labels == NODATA
    match step:
        case Opening():
            centres = ndimage.binary_erosion(mask | outside, disk(step.radius), border_value=1) & ~outside
            return given_away(labels, mask & ~ndimage.binary_dilation(centres, disk(step.radius)), value)
        case Closing():
            near = ndimage.binary_dilation(mask, disk(step.radius)) | outside
            added = ndimage.binary_erosion(near, disk(step.radius), border_value=1) & ~outside
            return np.where(added, value, labels)
        case FillHoles():
            holes, _ = ndimage.label(~mask)
            edge = outside.copy()
            edge[[0, -1]] = edge[:, [0, -1]] = True
            open_ones = np.unique(holes[edge])
            filled = [
                hole
                for hole in range(1, holes.max() + 1)
                if hole not in open_ones and (step.area is None or (holes == hole).sum() <= step.area)
            ]
            return np.where(np.isin(holes, filled), value, labels)
    regions, count = ndimage.label(mask, np.ones((3, 3)))
    areas = [(regions == region).sum() for region in range(1, count + 1)]
    if isinstance(step, RemoveSmall):
        least = step.area[value] if isinstance(step.area, dict) else step.area
        removed = [region for region, area in enumerate(areas, 1) if area < least]
    else:
        first = [np.flatnonzero(regions == region)[0] for region in range(1, count + 1)]
        removed = sorted(range(1, count + 1), key=lambda region: (-areas[region - 1], first[region - 1]))[1:]
    return given_away(labels, np.isin(regions, removed), value)


def disk(radius: int) -> Labels:
    return np.array(
        [[y * y + x * x <= radius * radius for x in range(-radius, radius + 1)] for y in range(-radius, radius + 1)]
    )


def given_away(labels: Labels, removed: Labels, value: int) -> Labels:
    regions, count = ndimage.label(removed, np.ones((3, 3)))
    new = labels.copy()
    for region in range(1, count + 1):
        votes: Counter[int] = Counter()
        for row, column in np.argwhere(regions == region):
            for y, x in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if 0 <= y < labels.shape[0] and 0 <= x < labels.shape[1] and labels[y, x] not in (value, NODATA):
                    votes[int(labels[y, x])] += 1
        if votes:
            new[regions == region] = max(votes, key=lambda other: (votes[other], -other))
    return new


def classes_of(step: Any) -> list[int]:
    return step.classes or (list(step.area) if isinstance(getattr(step, "area", None), dict) else [1, 2])


@given(MAPS, STEPS, st.integers(1, 60))
def test_every_step_is_its_reference_on_the_whole_and_by_bands(labels: Labels, step: Any, pixels: int) -> None:
    expected = labels
    for value in classes_of(step):
        expected = reference(expected, step, value).astype(np.uint8)
    given_labels = labels.copy()
    assert drawn(processed(labels, [step])) == drawn(expected)
    assert drawn(in_bands(labels, [step], pixels)) == drawn(expected)
    assert np.array_equal(labels, given_labels)  # it was not written to
    assert np.array_equal(expected == NODATA, labels == NODATA)


@given(MAPS, st.lists(STEPS, max_size=4), st.integers(1, 60))
def test_chains_of_steps_are_the_same_by_bands_and_leave_pixels_without_data(
    labels: Labels, steps: list[Any], pixels: int
) -> None:
    whole = processed(labels, steps)
    assert drawn(in_bands(labels, steps, pixels)) == drawn(whole)
    assert np.array_equal(whole == NODATA, labels == NODATA)


@given(MAPS, STEPS.filter(lambda step: not isinstance(step, KeepLargest)), st.sampled_from([1, 2, 3]), st.booleans())
def test_a_turned_or_mirrored_map_gives_the_turned_or_mirrored_result(
    labels: Labels, step: Any, quarters: int, mirrored: bool
) -> None:
    def moved(array: Labels) -> Labels:
        return np.ascontiguousarray(np.rot90(array[:, ::-1] if mirrored else array, quarters))

    assert np.array_equal(processed(moved(labels), [step]), moved(processed(labels, [step])))


def blobs(seed: int) -> Labels:
    """A map of 50 x 40 with regions of many sizes, and a corner and specks without data."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(50, 40)), 1.5)
    labels = np.digitize(smooth / smooth.std() + rng.normal(size=(50, 40)) / 3, [0.2, 1.0]).astype(np.uint8)
    labels[rng.random((50, 40)) < 0.02] = labels[:9, 30:] = NODATA
    return labels


WORDS = ["opening,radius=1", "opening,radius=3", "closing,radius=1", "closing,radius=3", "fill_holes,area=12"]
WORDS += ["remove_small,area=20", "keep_largest", "remove_small,area=6,classes=0+1+2"]


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("seed", range(3))
def test_larger_regions_and_radii_are_as_exact(word: str, seed: int) -> None:
    (step,), labels = parse_steps([word]), blobs(seed)
    expected = labels
    for value in classes_of(step):
        expected = reference(expected, step, value).astype(np.uint8)
    assert (expected != labels).any()
    for num_rows in (1, 2, 7, 50):
        assert drawn(in_bands(labels, [step], 40 * num_rows)) == drawn(expected)


@pytest.mark.parametrize("word", [*WORDS, "crf,radius=3"])
def test_a_class_whose_number_says_no_data_is_left_alone(word: str) -> None:
    labels = np.where(blobs(0) == NODATA, 1, blobs(0)).astype(np.uint8)
    steps, image = parse_steps([word]), np.random.default_rng(0).integers(0, 255, (50, 40, 3), np.uint8)
    for nodata in range(3):
        result = apply_postprocessing(Plane.of(labels), steps, 3, nodata, lambda top, bottom: image[top:bottom]).whole()
        assert np.array_equal(result == nodata, labels == nodata)


@given(MAPS)
def test_filling_holes_of_any_size_is_what_scipy_calls_so(labels: Labels) -> None:
    mask = (labels == 1).astype(np.uint8)
    assert np.array_equal(processed(mask, "fill_holes", num_classes=2), ndimage.binary_fill_holes(mask))


def test_more_than_256_classes_are_16_bit() -> None:
    labels = np.full((9, 9), 300, np.uint16)
    labels[2:7, 2:7], labels[4, 4], labels[0, 0] = 700, 65535, 5
    steps = parse_steps(["remove_small,area=2,classes=5", "fill_holes,classes=300"])
    result = apply_postprocessing(Plane.of(labels), steps, 701, 65535, None)
    labels[0, 0] = 300  # the square stays: there is a pixel without data in it
    assert result.dtype == np.uint16 and np.array_equal(result.whole(), labels)


# crf: the guided filter.


def window(row: int, column: int, radius: int) -> tuple[slice, slice]:
    return np.s_[max(0, row - radius) : row + radius + 1, max(0, column - radius) : column + radius + 1]


def shares(labels: Labels, levels: Labels, inside: Labels, radius: int, eps: float) -> NDArray[np.float64]:
    """The guided filter of the three one-hot planes as the paper writes it, pixel by pixel: (H, W, 3)."""
    height, width, channels = levels.shape
    slopes, offsets = np.zeros((height, width, channels, 3)), np.zeros((height, width, 3))
    result = np.zeros((height, width, 3))

    for row, column in np.argwhere(inside):
        part = window(row, column, radius)
        counted = inside[part]
        pixels, targets = levels[part][counted], np.eye(3)[labels[part][counted]]
        centred = pixels - pixels.mean(0)
        variance = centred.T @ centred / len(pixels) + eps * np.eye(channels)
        slopes[row, column] = np.linalg.solve(variance, centred.T @ (targets - targets.mean(0)) / len(pixels))
        offsets[row, column] = targets.mean(0) - pixels.mean(0) @ slopes[row, column]
    for row, column in np.argwhere(inside):
        part = window(row, column, radius)
        counted = inside[part]
        mean = slopes[part][counted].mean(0), offsets[part][counted].mean(0)
        near = np.unique(labels[part][counted])
        result[row, column] = levels[row, column] @ mean[0] + mean[1]
        result[row, column, np.setdiff1d([0, 1, 2], near)] = -9  # a share is about 0 to 1
    return result


GUIDED = st.tuples(SIZES, st.integers(1, 4)).flatmap(
    lambda drawn: st.tuples(
        arrays(np.uint8, drawn[0], elements=st.sampled_from([0, 0, 1, 1, 2, NODATA])),
        arrays(np.uint8, (*drawn[0], drawn[1]), elements=st.sampled_from([0, 90, 100, 200, 255])),
    )
)
CRFS = st.builds(
    Crf,
    type=st.just("crf"),
    radius=st.integers(1, 4),
    eps=st.sampled_from([1e-6, 1e-3, 0.1]),
    classes=st.sampled_from([None, [0, 1], [2, 1]]),
)


@given(GUIDED, CRFS)
def test_crf_takes_the_class_of_the_largest_share_of_a_guided_filter(pair: tuple[Labels, Labels], step: Crf) -> None:
    labels, image = pair
    inside = np.isin(labels, step.classes or [0, 1, 2])
    result = processed(labels, [step], image)
    assert np.array_equal(result[~inside], labels[~inside])
    ranked = shares(labels, image / 255, inside, step.radius, step.eps)
    sure = inside & (np.diff(np.sort(ranked, axis=2))[:, :, 1] > 1e-5)  # a tie may go either way
    assert np.array_equal(result[sure], ranked.argmax(axis=2)[sure])


@given(GUIDED, CRFS, st.integers(1, 60), st.sampled_from([np.uint8, np.uint16, np.int16, np.float32]))
def test_crf_is_the_same_by_bands(pair: tuple[Labels, Labels], step: Crf, pixels: int, dtype: Any) -> None:
    labels, image = pair[0], (pair[1].astype(np.float64) * 1.7).astype(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ml_src.core.inference.refine.TILE", 5)
        tiled = in_bands(labels, [step], pixels, image)
    assert np.array_equal(tiled, processed(labels, [step], image))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("radius", [2, 5])
def test_crf_is_the_same_by_bands_where_all_is_near_a_border(
    radius: int, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.random.default_rng(radius).normal(100, 30, (50, 40, 3)).clip(0, 255).astype(dtype)
    step = Crf(type="crf", radius=radius, eps=1e-6)
    whole = processed(blobs(radius), [step], image)
    assert (whole != blobs(radius)).sum() > 100
    monkeypatch.setattr("ml_src.core.inference.refine.TILE", 7)
    for num_rows in (1, 3, 50):
        assert np.array_equal(in_bands(blobs(radius), [step], 40 * num_rows, image), whole)


@given(GUIDED, CRFS)
def test_crf_brings_a_pixel_only_a_class_that_is_within_the_radius(pair: tuple[Labels, Labels], step: Crf) -> None:
    result = processed(pair[0], [step], pair[1])
    for row, column in np.argwhere(result != pair[0]):
        part = np.s_[
            max(0, row - step.radius) : row + step.radius + 1, max(0, column - step.radius) : column + step.radius + 1
        ]
        assert result[row, column] in pair[0][part]


def test_not_even_a_class_that_is_large_beyond_the_radius() -> None:
    labels = np.random.default_rng(0).integers(1, 60, (30, 40), np.uint8)
    labels[:, 20:] = 0
    result = processed(labels, "crf,radius=3", np.zeros((30, 40, 1), np.uint8), num_classes=60)
    assert (result[:, 17:20] == 0).any() and (result[:, :17] > 0).all()


def test_shares_that_are_equal_are_equal_by_bands() -> None:
    """Each row has every class twice, in every window: all shares are a third, which no binary number is."""
    rng = np.random.default_rng(0)
    labels = np.stack([rng.permutation([0, 0, 1, 1, 2, 2]) for _ in range(60)]).astype(np.uint8)
    image, step = np.full((60, 6, 1), 9, np.uint8), Crf(type="crf", radius=5)
    whole = processed(labels, [step], image)
    for num_rows in (1, 4, 11):
        assert drawn(in_bands(labels, [step], 6 * num_rows, image)) == drawn(whole)


def shifted_border() -> tuple[Labels, Labels, Labels]:
    """A truth, labels whose border lies two or three pixels beside it, and a noisy image that shows the truth."""
    y, x = np.mgrid[:64, :64]
    truth = (x + y // 3 > 42).astype(np.uint8)
    labels = (x + y // 3 > 42 + np.where(y % 20 < 10, 3, -2)).astype(np.uint8)
    image = np.array([80, 120, 100]) + truth[:, :, None] * np.array([60, -40, 20])
    return truth, labels, (image + np.random.default_rng(0).normal(0, 4, image.shape)).astype(np.uint8)


def test_crf_moves_a_border_to_the_edge_that_the_image_shows() -> None:
    truth, labels, image = shifted_border()
    assert (labels != truth).sum() > 120
    assert (processed(labels, "crf", image, num_classes=2) != truth).sum() < 12


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32])
def test_crf_stretches_images_that_are_not_8_bit(dtype: Any) -> None:
    """Far from 0, and with a pixel that is far brighter: black and white are two deviations from the mean."""
    _, labels, image = shifted_border()
    image = (image.astype(np.float64) * 20 + 12000).astype(dtype)
    image[3, 3] = 30000
    low = image.mean((0, 1), np.float64) - 2 * image.std((0, 1), np.float64)
    levels = np.clip(np.rint((image - low) * 255 / (4 * image.std((0, 1), np.float64))), 0, 255).astype(np.uint8)
    for eps in (1e-6, 1e-3, 1e-2, 1e-1):
        step = Crf(type="crf", eps=eps)
        assert np.array_equal(processed(labels, [step], image), processed(labels, [step], levels))


def test_what_an_image_shows_without_data_guides_nothing() -> None:
    _, labels, image = shifted_border()
    labels[20:30, 30:50] = NODATA
    wild = image.astype(np.float32)
    expected = processed(labels, "crf", wild, num_classes=2)
    wild[20:30, 30:50] = np.nan
    assert np.array_equal(processed(labels, "crf", wild, num_classes=2), expected)
    wild[22:28, 32:48] = -1e30
    assert np.array_equal(processed(labels, "crf", wild, num_classes=2), expected)


def test_pixels_whose_image_is_no_number_stay_and_guide_nothing() -> None:
    _, labels, image = shifted_border()
    broken = image.astype(np.float32)
    broken[30:34, 20:40] = np.inf
    result = processed(labels, "crf", broken, num_classes=2)
    assert np.array_equal(result[30:34, 20:40], labels[30:34, 20:40])
    assert (result != labels).any()


def test_an_even_image_moves_no_straight_border() -> None:
    labels = np.repeat(np.repeat([[0, 1, 1, 2]], 8, axis=1), 20, axis=0).astype(np.uint8)
    assert np.array_equal(processed(labels, "crf", np.full((20, 32, 1), 7, np.uint8)), labels)


def test_crf_asks_for_the_image_only_where_classes_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "BAND", 64 * 8)
    labels = np.zeros((64, 64), np.uint8)
    labels[40:, 30:] = 1
    asked = []

    def guide(top: int, bottom: int) -> Labels:
        asked.append((top, bottom))
        return np.zeros((bottom - top, 64, 3), np.uint8)

    apply_postprocessing(Plane.of(labels), parse_steps(["crf,radius=2"]), 2, None, guide)
    assert min(top for top, bottom in asked if bottom - top > 1) >= 28  # the band of row 32, with its margin


def test_crf_without_an_image_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the image"):
        processed(np.zeros((4, 4), np.uint8), "crf")


# Words, and the file beside a checkpoint.


@pytest.mark.parametrize(
    ("word", "step"),
    [
        ("opening,radius=2", Opening(type="opening", radius=2)),
        ("closing", Closing(type="closing", radius=1)),
        ("fill_holes", FillHoles(type="fill_holes")),
        ("fill_holes,area=40", FillHoles(type="fill_holes", area=40)),
        ("keep_largest,classes=1", KeepLargest(type="keep_largest", classes=[1])),
        ("remove_small,area=30,classes=1+2", RemoveSmall(type="remove_small", area=30, classes=[1, 2])),
        ("remove_small,area=1:30+2:100", RemoveSmall(type="remove_small", area={1: 30, 2: 100})),
        ("crf, eps=1e-2", Crf(type="crf", eps=0.01)),
    ],
)
def test_words_of_the_command_line(word: str, step: PostprocessStep) -> None:
    assert parse_steps([word]) == [step]
    assert parse_steps([word, word]) == [step, step]


def test_none_alone_is_an_empty_chain() -> None:
    assert parse_steps(["none"]) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["openig"], "openig: unknown name 'openig'; did you mean 'opening'?"),
        (["none", "crf"], "none: it stands alone, so leave out either it or the steps beside it"),
        (["opening,radus=3"], "unknown key 'radus'; did you mean 'radius'?"),
        (["opening,radius=x"], "radius: should be a valid integer, unable to parse string as an integer, got 'x'"),
        (["opening,radius=0"], "radius: should be greater than or equal to 1, got '0'"),
        (["opening,radius"], "write each key once, with its value, as in remove_small,area=30,classes=1+2"),
        (["opening,radius=1,radius=2"], "write each key once"),
        (["opening,classes=1+1"], "classes has a value twice: [1, 1]"),
        (["opening,classes=1+-2"], "classes: should be greater than or equal to 0, got '-2'"),
        (["remove_small"], "area is missing: give it a value"),
        (["remove_small,area=1:2+1:3"], "area: should be a valid integer"),
        (["remove_small,area=1:2,classes=1"], "classes are said twice: area names them, so leave out classes"),
        (["crf,classes=1"], "classes: List should have at least 2 items"),
    ],
)
def test_a_word_that_cannot_be_is_refused_with_what_to_do(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_steps(words)
    assert str(caught.value).startswith(f"--postprocess {words[0]}: ") and expected in str(caught.value)


def configured(steps: list[Any]) -> Config:
    return parse_config(
        {"data": {"data_dir": "x", "num_classes": 3}, "inference": {"postprocess": steps_to_yaml(steps)}}
    )


def test_a_step_for_a_class_that_is_not_there_is_refused() -> None:
    labels = Plane.of(np.zeros((4, 4), np.uint8))
    for word in ("opening,classes=1+3", "remove_small,area=3:9", "crf,classes=0+3"):
        with pytest.raises(ConfigError, match="has class 3 but num_classes is 3"):
            apply_postprocessing(labels, parse_steps([word]), 3, None, None)
        with pytest.raises(ConfigError, match=r"inference\.postprocess: .* has class 3 but num_classes is 3"):
            configured(parse_steps([word]))


@given(st.lists(st.one_of(STEPS, CRFS), max_size=3))
def test_steps_survive_plain_data_and_the_configuration(steps: list[Any]) -> None:
    assert steps_from_yaml(steps_to_yaml(steps)) == steps
    config = configured(steps)
    assert config.inference.postprocess == steps
    assert parse_config(plain(config)) == config


def test_the_chain_of_a_checkpoint_lies_beside_it(tmp_path: Path) -> None:
    steps = parse_steps(["remove_small,area=1:30+2:100", "crf"])
    best = tmp_path / "best.pt"
    best.write_bytes(b"weights")
    assert load_chain(best) is None and not has_chain(best)
    save_chain(best, steps, {"dice": [0.8, 0.82]})
    assert load_chain(best) == steps and has_chain(best)
    save_chain(best, [], {})
    assert load_chain(best) == [] and has_chain(best)
    assert {path.name for path in tmp_path.iterdir()} == {"best.pt", "postprocess.yaml"}


def test_a_chain_is_for_the_checkpoints_that_it_was_chosen_for_and_no_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    steps, (best, last, third) = parse_steps(["crf"]), (tmp_path / name for name in ("best.pt", "last.pt", "third.pt"))
    for path in (best, last, third):
        path.write_text(path.name)
    save_chain(best, steps, {}, others=[last])
    assert load_chain(best) == load_chain(last) == steps and not caplog.messages
    assert load_chain(third) is None and not has_chain(third)
    assert caplog.messages == [
        f"{tmp_path}/postprocess.yaml was tuned for another checkpoint than third.pt and is not used: tune the "
        "steps again"
    ]
    best.write_text("trained again")
    assert load_chain(best) is None and load_chain(last) == steps
    best.write_text("best.pt")
    assert load_chain(best) == steps


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postprocess: [{type: opning}]", "step 1: unknown name 'opning'; did you mean 'opening'?"),
        ("postprocess: 3", "is no list of steps"),
        ("[]", "is no list of steps"),
        ("postprocess: [", "is not valid YAML"),
    ],
)
def test_a_chain_that_cannot_be_read_names_its_file(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "postprocess.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_chain(tmp_path / "best.pt")
    assert str(caught.value).startswith(str(tmp_path / "postprocess.yaml")) and expected in str(caught.value)
