"""Scores of outlines: shapes by hand, MONAI and brute force as oracles, and what ignored pixels must not change."""

import json
import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from monai.metrics import compute_hausdorff_distance, compute_surface_dice

from ml_src.core.metrics.boundary import BoundaryScores, boundary_scores, summarize_boundaries

label_maps = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(
    lambda shape: st.tuples(*[st_numpy.arrays(np.uint8, shape, elements=st.integers(0, 2))] * 2)
)


def blobs(num_classes: int, seed: int, shape: tuple[int, int] = (60, 90)) -> np.ndarray:
    """Round patches of each class: the class whose smooth noise is highest."""
    noise = np.random.default_rng(seed).random((num_classes, *shape), np.float32)
    return np.array([cv2.GaussianBlur(layer, (0, 0), 4) for layer in noise]).argmax(axis=0).astype(np.uint8)


def disturbed(truth: np.ndarray) -> np.ndarray:
    """The truth moved by two pixels, with one patch of another class in it."""
    labels = np.roll(truth, 2, axis=1)
    labels[10:20, 30:45] = 1
    return labels


def square(top: int, left: int, size: int = 10, shape: tuple[int, int] = (40, 60)) -> np.ndarray:
    labels = np.zeros(shape, np.uint8)
    labels[top : top + size, left : left + size] = 1
    return labels


def assert_same(ours: BoundaryScores, theirs: BoundaryScores) -> None:
    for name, mine, other in zip(BoundaryScores._fields, ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-9, err_msg=name)


# --- brute force ---------------------------------------------------------------------------------------------------


def outside(region: np.ndarray, row: int, column: int) -> bool:
    height, width = region.shape
    return not (0 <= row < height and 0 <= column < width) or not region[row, column]


def rim(region: np.ndarray, offsets: list[tuple[int, int]]) -> set[tuple[int, int]]:
    """Pixels of a region with a pixel outside of it at one of the offsets."""
    pixels = [(int(row), int(column)) for row, column in np.argwhere(region)]
    return {
        (row, column)
        for row, column in pixels
        if any(outside(region, row + down, column + right) for down, right in offsets)
    }


def counted_rims(labels, truth, index, ignored, offsets):
    """Rims of both regions, and those of their pixels that count, by the words of the docstring."""
    regions = [(values == index) & ~ignored for values in (labels, truth)]
    rims = [rim(region, offsets) for region in regions]
    for_another_reason = [rim(region | ignored, offsets) for region in regions]
    cut = (rims[0] - for_another_reason[0]) & (rims[1] - for_another_reason[1])
    return rims, [pixels - cut for pixels in rims]


def brute_force(labels, truth, index, ignored, tolerance=2.0) -> tuple[float, float, float]:
    diagonal = math.hypot(*truth.shape)
    present = [bool(((values == index) & ~ignored).any()) for values in (labels, truth)]
    if not all(present):
        return (diagonal, 0.0, 0.0) if any(present) else (math.nan, math.nan, math.nan)
    outlines, counted = counted_rims(labels, truth, index, ignored, [(0, 1), (1, 0), (0, -1), (-1, 0)])
    there = [min(math.dist(pixel, other) for other in outlines[1]) for pixel in counted[0]]
    back = [min(math.dist(pixel, other) for other in outlines[0]) for pixel in counted[1]]
    both = there + back
    hd95 = max(np.percentile(directed, 95) if directed else 0.0 for directed in (there, back))
    surface_dice = sum(distance <= tolerance for distance in both) / len(both) if both else 1.0
    reach = range(-max(1, round(0.02 * diagonal)), max(1, round(0.02 * diagonal)) + 1)
    _, bands = counted_rims(labels, truth, index, ignored, [(down, right) for down in reach for right in reach])
    union = bands[0] | bands[1]
    return hd95, surface_dice, len(bands[0] & bands[1]) / len(union) if union else 1.0


@given(label_maps, st.sampled_from([None, 255, 2]))
def test_scores_are_those_of_brute_force(maps, ignore_index):
    labels, truth = maps
    if ignore_index == 255:
        truth[truth == 2] = 255
    scores = boundary_scores(labels, truth, 3, ignore_index)
    ignored = np.zeros(truth.shape, bool) if ignore_index is None else truth == ignore_index
    for index in range(3):
        expected = (math.nan,) * 3 if index == ignore_index else brute_force(labels, truth, index, ignored)
        ours = scores.hd95[index], scores.surface_dice[index], scores.boundary_iou[index]
        np.testing.assert_allclose(ours, expected, rtol=1e-9, err_msg=f"class {index}")


@pytest.mark.parametrize("ignore_index", [None, 255], ids=["all counted", "some ignored"])
def test_scores_of_larger_patches_are_those_of_brute_force(ignore_index):
    """Bands are two pixels wide here, and classes are cropped."""
    truth = blobs(5, seed=1)
    labels = disturbed(truth)
    if ignore_index is not None:
        truth[30:40, 20:70] = ignore_index
    scores = boundary_scores(labels, truth, 5, ignore_index)
    for index in range(5):
        ours = scores.hd95[index], scores.surface_dice[index], scores.boundary_iou[index]
        np.testing.assert_allclose(ours, brute_force(labels, truth, index, truth == 255), rtol=1e-9)


# --- other libraries -----------------------------------------------------------------------------------------------


def one_hot(labels: np.ndarray, num_classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.from_numpy(labels).long(), num_classes).permute(2, 0, 1)[None]


@pytest.mark.parametrize(("tolerance", "pixel_size"), [(0.0, 1.0), (2.0, 1.0), (1.6, 0.5)])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore::FutureWarning:monai")
def test_distances_agree_with_monai(tolerance, pixel_size, seed):
    truth = blobs(4, seed)
    labels = disturbed(truth)
    scores = boundary_scores(labels, truth, 4, None, tolerance, pixel_size)
    pair = one_hot(labels, 4), one_hot(truth, 4)
    hd95 = compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=pixel_size)
    shares = compute_surface_dice(*pair, [tolerance] * 4, include_background=True, spacing=pixel_size)
    np.testing.assert_allclose(scores.hd95, hd95[0].numpy(), rtol=1e-6)
    np.testing.assert_allclose(scores.surface_dice, shares[0].numpy(), rtol=1e-6)


def eroded_by_the_paper(mask: np.ndarray, width: int) -> np.ndarray:
    """The definition that the authors of boundary IoU published: zeros around the image, 3x3 erosions."""
    padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    return cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)[1:-1, 1:-1]


@pytest.mark.parametrize(("shape", "width"), [((20, 30), 1), ((120, 160), 4), ((300, 90), 6)])
def test_boundary_iou_is_that_of_its_paper(shape, width):
    truth = blobs(3, seed=5, shape=shape)
    labels = disturbed(truth)
    scores = boundary_scores(labels, truth, 3, None)
    for index in range(3):
        masks = [(values == index).astype(np.uint8) for values in (labels, truth)]
        first, second = (mask - eroded_by_the_paper(mask, width) > 0 for mask in masks)
        assert scores.boundary_iou[index] == pytest.approx((first & second).sum() / (first | second).sum())


# --- shapes by hand ------------------------------------------------------------------------------------------------


def test_an_exact_prediction_is_perfect():
    truth = blobs(4, seed=0)
    scores = boundary_scores(truth, truth, 4, None)
    assert scores.hd95.tolist() == [0.0] * 4
    assert scores.surface_dice.tolist() == [1.0] * 4
    assert scores.boundary_iou.tolist() == [1.0] * 4
    assert (scores.missed, scores.invented) == ([], [])


def test_a_moved_square_by_hand():
    """10 x 10 pixels, outline of 36, bands 1 pixel wide; moved to the right by 3."""
    scores = boundary_scores(square(10, 20), square(10, 23), 2, None)
    assert scores.hd95[1] == 3.0
    # within 2 of the other: nine columns of top and bottom; of the side within the other, two pixels at each end
    assert scores.surface_dice[1] == pytest.approx((2 * 9 + 2 * 2) / 36)
    assert scores.boundary_iou[1] == pytest.approx(14 / (36 + 36 - 14))


def test_a_single_pixel_against_another_by_hand():
    scores = boundary_scores(square(3, 4, size=1), square(6, 8, size=1), 2, None, tolerance=5.0)
    assert (scores.hd95[1], scores.surface_dice[1], scores.boundary_iou[1]) == (5.0, 1.0, 0.0)


def test_the_outline_runs_along_the_edge_of_the_image():
    """One class everywhere against one with a hole in the middle: the hole is 4 pixels from the nearest edge."""
    truth = np.zeros((9, 9), np.uint8)
    labels = truth.copy()
    labels[4, 4] = 1
    scores = boundary_scores(labels, truth, 1, None)
    assert scores.hd95[0] == pytest.approx(np.percentile([0.0] * 32 + [3.0] * 4, 95))


def test_three_pixels_of_a_tenth_are_within_three_tenths():
    scores = boundary_scores(square(5, 5, size=1), square(5, 8, size=1), 2, None, tolerance=0.3, pixel_size=0.1)
    assert scores.surface_dice[1] == 1.0


# --- missed and invented -------------------------------------------------------------------------------------------


def test_a_missed_class_costs_the_diagonal_and_all_of_the_shares():
    scores = boundary_scores(np.zeros((30, 40), np.uint8), square(5, 5, shape=(30, 40)), 3, None, pixel_size=0.5)
    assert (scores.missed, scores.invented) == ([1], [])
    assert (scores.hd95[1], scores.surface_dice[1], scores.boundary_iou[1]) == (25.0, 0.0, 0.0)


def test_an_invented_class_costs_the_same():
    scores = boundary_scores(square(5, 5, shape=(30, 40)), np.zeros((30, 40), np.uint8), 3, None, pixel_size=0.5)
    assert (scores.missed, scores.invented) == ([], [1])
    assert (scores.hd95[1], scores.surface_dice[1], scores.boundary_iou[1]) == (25.0, 0.0, 0.0)


def test_a_class_in_neither_has_no_score():
    scores = boundary_scores(square(5, 5), square(5, 6), 3, None)
    assert np.isnan([scores.hd95[2], scores.surface_dice[2], scores.boundary_iou[2]]).all()


@given(label_maps)
def test_nothing_is_worse_than_to_miss(maps):
    labels, truth = maps
    scores = boundary_scores(labels, truth, 3, None)
    known = ~np.isnan(scores.hd95)
    assert np.all((scores.hd95[known] >= 0) & (scores.hd95[known] <= math.hypot(*truth.shape)))
    for shares in (scores.surface_dice[known], scores.boundary_iou[known]):
        assert np.all((shares >= 0) & (shares <= 1))


# --- laws ----------------------------------------------------------------------------------------------------------


@given(label_maps)
def test_exchanging_truth_and_prediction_only_exchanges_missed_and_invented(maps):
    scores, reverse = boundary_scores(*maps, 3, None), boundary_scores(*maps[::-1], 3, None)
    assert_same(scores, reverse._replace(missed=reverse.invented, invented=reverse.missed))


def test_a_class_is_scored_as_if_it_were_alone():
    truth = blobs(6, seed=2)
    labels = disturbed(truth)
    scores = boundary_scores(labels, truth, 6, None)
    for index in range(6):
        alone = boundary_scores((labels == index).astype(np.uint8), (truth == index).astype(np.uint8), 2, None)
        assert [scores[part][index] for part in range(3)] == [alone[part][1] for part in range(3)]


@pytest.mark.parametrize("ignore_index", [None, 2])
def test_mirrored_and_turned_images_have_the_same_scores(ignore_index):
    truth = blobs(4, seed=3)
    labels = disturbed(truth)
    scores = boundary_scores(labels, truth, 4, ignore_index)
    for change in (np.fliplr, np.flipud, np.transpose):
        assert_same(boundary_scores(change(labels), change(truth), 4, ignore_index), scores)


def test_distances_are_in_the_unit_of_the_pixel_size():
    truth = blobs(4, seed=4)
    labels = disturbed(truth)
    pixels = boundary_scores(labels, truth, 4, None, tolerance=2.0)
    metres = boundary_scores(labels, truth, 4, None, tolerance=0.6, pixel_size=0.3)
    assert_same(metres, pixels._replace(hd95=pixels.hd95 * 0.3))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_any_integer_type_gives_the_same_scores(dtype):
    truth = blobs(3, seed=6)
    labels = disturbed(truth)
    assert_same(
        boundary_scores(labels.astype(dtype), truth.astype(dtype), 3, 65535), boundary_scores(labels, truth, 3, 255)
    )


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ in shape"):
        boundary_scores(np.zeros((2, 3), int), np.zeros((3, 2), int), 2, None)


# --- ignored pixels ------------------------------------------------------------------------------------------------


@given(label_maps, st.integers(0, 2**32 - 1))
def test_what_is_predicted_where_the_truth_is_ignored_changes_nothing(maps, seed):
    labels, truth = maps
    anything = np.random.default_rng(seed).choice(np.array([0, 1, 2, 255], np.uint8), labels.shape)
    truth[truth == 2] = 255
    assert_same(
        boundary_scores(np.where(truth == 255, anything, labels), truth, 3, 255), boundary_scores(labels, truth, 3, 255)
    )


def test_a_class_that_is_ignored_has_no_score_where_it_is_predicted():
    labels, truth = square(5, 5), square(20, 20)
    scores = boundary_scores(labels, truth, 2, 1)
    assert np.isnan(scores.hd95).tolist() == [False, True]
    assert (scores.missed, scores.invented) == ([], [])


def test_where_both_are_cut_by_ignored_pixels_no_agreement_is_counted():
    """A square whose left half is ignored: of 10 x 5 pixels the cut is no outline, but for its two corners."""
    truth, labels = square(10, 20), square(10, 19)
    truth[:, 15:25] = 255
    labels[:, 29] = 1  # so that something differs: one column, over the height of the image
    scores = boundary_scores(labels, truth, 2, 255, tolerance=0.0)
    true_outline = 2 * 5 + 8  # top, bottom, right side
    predicted_outline = 2 * 4 + 2 * 15 + 10  # top and bottom but for the last column; the last column
    shared = 2 * 4 + 10  # all of the truth's
    assert true_outline == shared
    assert scores.surface_dice[1] == pytest.approx(2 * shared / (true_outline + predicted_outline))


def test_a_region_that_ignored_pixels_surround_is_perfect_where_it_is_predicted_in_full():
    """As in data sets that ignore a ring around each object. Its outline is unknown, but it is found."""
    truth = square(10, 20)
    truth[9:21, 19:31][square(1, 1, shape=(12, 12)) == 0] = 255
    scores = boundary_scores(square(10, 20), truth, 2, 255)
    assert (scores.hd95[1], scores.surface_dice[1], scores.boundary_iou[1]) == (0.0, 1.0, 1.0)


def test_a_region_that_ignored_pixels_surround_is_measured_where_the_prediction_falls_short():
    truth = square(10, 20)
    truth[9:21, 19:31][square(1, 1, shape=(12, 12)) == 0] = 255
    labels = square(10, 20)
    labels[10:20, 27:30] = 0  # three columns short
    scores = boundary_scores(labels, truth, 2, 255)
    assert scores.hd95[1] == 3.0
    assert scores.boundary_iou[1] == pytest.approx(
        2 / (10 + 14)
    )  # the new side, and the lost ones; they share its ends
    assert boundary_scores(np.zeros_like(truth), truth, 2, 255).missed == [1]


def test_nothing_counted_gives_no_score():
    scores = boundary_scores(square(5, 5), np.full((40, 60), 255, np.uint8), 2, 255)
    assert np.isnan(scores.hd95).all()
    assert (scores.missed, scores.invented) == ([], [])


# --- many images ---------------------------------------------------------------------------------------------------


def three_images() -> list[BoundaryScores]:
    """Of classes 0 to 3: 1 is found, missed and invented; 2 is ignored, 3 nowhere."""
    empty = np.zeros((40, 60), np.uint8)
    pairs = [(square(10, 20), square(10, 23)), (empty, square(10, 20)), (square(10, 20), empty)]
    return [boundary_scores(labels, truth, 4, 2) for labels, truth in pairs]


def test_means_are_over_the_images_that_have_the_class_with_the_missed_and_invented():
    summary = summarize_boundaries(three_images())
    diagonal = math.hypot(40, 60)
    assert summary["hd95_per_class"][1:] == [pytest.approx((3 + 2 * diagonal) / 3), None, None]
    assert summary["boundary_iou_per_class"][1:] == [pytest.approx(14 / 58 / 3), None, None]
    assert summary["counts_per_class"] == [
        {"images": 3, "missed": 0, "invented": 0},
        {"images": 3, "missed": 1, "invented": 1},
        {"images": 0, "missed": 0, "invented": 0},
        {"images": 0, "missed": 0, "invented": 0},
    ]


def test_the_mean_is_over_the_classes_that_have_a_score():
    summary = summarize_boundaries(three_images())
    for name in ("hd95", "surface_dice", "boundary_iou"):
        assert summary[name] == pytest.approx(sum(summary[f"{name}_per_class"][:2]) / 2)


def test_an_image_without_a_class_does_not_change_its_score():
    without = boundary_scores(np.zeros((7, 9), np.uint8), np.zeros((7, 9), np.uint8), 4, 2)
    summary, longer = summarize_boundaries(three_images()), summarize_boundaries([*three_images(), without])
    assert longer["hd95_per_class"][1] == summary["hd95_per_class"][1]
    assert longer["counts_per_class"][1] == summary["counts_per_class"][1]
    assert longer["counts_per_class"][0]["images"] == 4


def test_summary_is_plain_data():
    summary = summarize_boundaries(three_images())
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_nothing_scored_gives_none_and_no_warning(recwarn):
    truth = np.full((4, 4), 255, np.uint8)
    summary = summarize_boundaries([boundary_scores(truth, truth, 2, 255)])
    assert summary["hd95"] is None
    assert summary["surface_dice_per_class"] == [None, None]
    assert len(recwarn) == 0
