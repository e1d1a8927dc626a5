"""The confusion matrix and its scores: a table by hand, two oracles, and the laws that tie the scores together."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from sklearn.metrics import confusion_matrix, f1_score, jaccard_score, recall_score
from torchmetrics.classification import MulticlassJaccardIndex

from ml_src.core.metrics.segmentation import (
    ConfusionMatrix,
    absent_classes,
    class_accuracy,
    dice,
    iou,
    mean_over_present,
    pixel_accuracy,
    summarize,
)

# Rows truth, columns prediction; class 2 occurs nowhere.
HAND = np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]])

matrices = st_numpy.arrays(np.int64, st.integers(2, 5).map(lambda c: (c, c)), elements=st.integers(0, 1000))


def sample(num_classes: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random truth and a prediction that is right in half of the pixels."""
    rng = np.random.default_rng(seed)
    masks = rng.integers(0, num_classes, (3, 16, 16))
    labels = np.where(rng.random(masks.shape) < 0.5, masks, rng.integers(0, num_classes, masks.shape))
    return labels, masks


def matrix_of(labels, masks, num_classes: int = 4, ignore_index: int | None = None) -> np.ndarray:
    confusion = ConfusionMatrix(num_classes, ignore_index)
    confusion.update(labels, masks)
    return confusion.matrix


# --- the matrix ----------------------------------------------------------------------------------------------------


def test_rows_are_truth_and_columns_prediction():
    matrix = matrix_of(torch.tensor([[0, 1], [1, 1]]), torch.tensor([[0, 0], [0, 1]]), num_classes=3)
    assert matrix.tolist() == [[1, 2, 0], [0, 1, 0], [0, 0, 0]]
    assert matrix.dtype == np.int64


def test_matrix_agrees_with_sklearn():
    labels, masks = sample()
    assert np.array_equal(matrix_of(labels, masks), confusion_matrix(masks.ravel(), labels.ravel(), labels=range(4)))


@pytest.mark.parametrize("ignored", [255, 1], ids=["outside the classes", "one of the classes"])
def test_ignored_pixels_are_left_out(ignored):
    labels, masks = sample()
    masks[:, :4] = ignored
    kept = masks != ignored
    expected = confusion_matrix(masks[kept], labels[kept], labels=range(4))
    assert np.array_equal(matrix_of(labels, masks, ignore_index=ignored), expected)


def test_updates_add_up_to_the_whole():
    """So the scores cannot depend on the batch size."""
    labels, masks = sample()
    confusion = ConfusionMatrix(4, None)
    for image_labels, image_masks in zip(labels, masks, strict=True):
        confusion.update(image_labels, image_masks)
    assert np.array_equal(confusion.matrix, matrix_of(labels, masks))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_arrays_and_tensors_of_any_integer_type_count_the_same(dtype):
    labels, masks = sample()
    masks[0, 0] = 255
    expected = matrix_of(labels, masks, ignore_index=255)
    labels, masks = labels.astype(dtype), masks.astype(dtype)
    masks.setflags(write=False)  # as an image reader may return it
    assert np.array_equal(matrix_of(labels, masks, ignore_index=255), expected)
    tensors = torch.from_numpy(labels), torch.from_numpy(masks.copy())
    assert np.array_equal(matrix_of(*tensors, ignore_index=255), expected)


def test_mirrored_views_count_like_their_copies():
    labels, masks = sample()
    assert np.array_equal(matrix_of(labels[..., ::-1], masks[..., ::-1]), matrix_of(labels, masks))


def test_matrix_is_a_copy():
    confusion = ConfusionMatrix(2, None)
    confusion.matrix[0, 0] = 9
    assert confusion.matrix.sum() == 0


@pytest.mark.parametrize("value", [4, 254, -1])
def test_truth_that_is_no_class_is_named(value):
    labels, masks = sample()
    masks[1, 2, 3] = value
    with pytest.raises(ValueError, match=rf"mask value {value} is no class \(0 to 3\) and not ignore_index \(255\)"):
        matrix_of(labels, masks, ignore_index=255)


def test_truth_that_is_no_class_is_named_without_ignore_index():
    labels, masks = sample()
    masks[1, 2, 3] = 255
    with pytest.raises(ValueError, match="mask value 255"):
        matrix_of(labels, masks)


def test_prediction_that_is_no_class_is_named_rather_than_counted_elsewhere():
    labels, masks = sample()
    labels[1, 2, 3] = 5
    with pytest.raises(ValueError, match="label value 5"):
        matrix_of(labels, masks)


def test_a_refused_update_leaves_the_counts_as_they_were():
    labels, masks = sample()
    confusion = ConfusionMatrix(4, None)
    confusion.update(labels, masks)
    with pytest.raises(ValueError, match="mask value 9"):
        confusion.update(labels, np.full_like(masks, 9))
    assert np.array_equal(confusion.matrix, matrix_of(labels, masks))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ in shape"):
        matrix_of(np.zeros((2, 3), int), np.zeros((3, 2), int))


# --- the scores ----------------------------------------------------------------------------------------------------


def test_scores_by_hand():
    np.testing.assert_allclose(iou(HAND), [3 / 6, 4 / 7, np.nan])
    np.testing.assert_allclose(dice(HAND), [6 / 9, 8 / 11, np.nan])
    np.testing.assert_allclose(class_accuracy(HAND), [3 / 4, 4 / 6, np.nan])
    assert pixel_accuracy(HAND) == pytest.approx(7 / 10)
    assert mean_over_present(iou(HAND)) == pytest.approx((3 / 6 + 4 / 7) / 2)


@given(matrices)
def test_dice_is_two_iou_over_one_plus_iou(matrix):
    np.testing.assert_allclose(dice(matrix), 2 * iou(matrix) / (1 + iou(matrix)))


@given(matrices)
def test_scores_lie_between_0_and_1_and_iou_is_the_strictest(matrix):
    present = ~np.isnan(iou(matrix))
    assert np.all((iou(matrix)[present] >= 0) & (dice(matrix)[present] <= 1))
    assert np.all(iou(matrix)[present] <= dice(matrix)[present])
    in_truth = matrix.sum(axis=1) > 0
    assert np.all(iou(matrix)[in_truth] <= class_accuracy(matrix)[in_truth])


@given(matrices)
def test_swapping_truth_and_prediction_changes_neither_iou_nor_dice(matrix):
    np.testing.assert_array_equal(iou(matrix.T), iou(matrix))
    np.testing.assert_array_equal(dice(matrix.T), dice(matrix))


@pytest.mark.parametrize("ignored", [None, 255, 2])
def test_iou_agrees_with_torchmetrics(ignored):
    """Class 3 occurs nowhere: torchmetrics says 0 for its IoU and leaves it out of the mean."""
    labels, masks = sample(num_classes=3)
    if ignored == 255:
        masks[:, :4] = 255
    matrix = matrix_of(labels, masks, ignore_index=ignored)
    for average, ours in (
        ("none", np.nan_to_num(iou(matrix, ignored))),
        ("macro", mean_over_present(iou(matrix, ignored))),
    ):
        oracle = MulticlassJaccardIndex(4, average=average, ignore_index=ignored)
        theirs = oracle(torch.from_numpy(labels), torch.from_numpy(masks)).numpy()
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_scores_agree_with_sklearn():
    labels, masks = sample()
    matrix, pair = matrix_of(labels, masks), (masks.ravel(), labels.ravel())
    np.testing.assert_allclose(iou(matrix), jaccard_score(*pair, average=None))
    np.testing.assert_allclose(dice(matrix), f1_score(*pair, average=None))
    np.testing.assert_allclose(class_accuracy(matrix), recall_score(*pair, average=None))
    assert mean_over_present(iou(matrix)) == pytest.approx(jaccard_score(*pair, average="macro"))
    assert mean_over_present(dice(matrix)) == pytest.approx(f1_score(*pair, average="macro"))


def test_absent_class_is_listed_and_left_out_of_the_means():
    assert absent_classes(HAND) == [2]
    assert mean_over_present(dice(HAND)) == pytest.approx(mean_over_present(dice(HAND[:2, :2])))


def test_class_that_is_only_predicted_counts_as_zero():
    """Absent means absent from both: what is predicted without being there is an error, not a gap."""
    matrix = np.array([[3, 1], [0, 0]])
    assert iou(matrix).tolist() == [0.75, 0.0]
    assert absent_classes(matrix) == []
    assert math.isnan(class_accuracy(matrix)[1])


def test_ignored_class_is_left_out_of_scores_and_not_called_absent():
    matrix = np.array([[0, 0, 0], [1, 4, 0], [0, 1, 3]])
    assert np.isnan(iou(matrix, 0)).tolist() == [True, False, False]
    assert np.isnan(dice(matrix, 0)).tolist() == [True, False, False]
    assert iou(matrix, 0)[1] == pytest.approx(4 / 6)  # pixels given to the ignored class are still wrong
    assert absent_classes(np.diag([0, 0, 5]), 0) == [1]
    assert mean_over_present(iou(matrix, 0)) == pytest.approx((4 / 6 + 3 / 4) / 2)


def test_ignore_index_beyond_the_classes_hides_no_class():
    np.testing.assert_array_equal(iou(HAND, 255), iou(HAND))


def test_nothing_counted_gives_nan_and_no_warning(recwarn):
    empty = np.zeros((2, 2), np.int64)
    assert math.isnan(pixel_accuracy(empty))
    assert math.isnan(mean_over_present(iou(empty)))
    assert len(recwarn) == 0


def test_summary_holds_plain_values_with_none_for_what_has_no_score(tmp_path):
    """Plain: it survives JSON, and a checkpoint that is opened with weights_only."""
    summary = summarize(HAND)
    assert summary == {
        "iou": pytest.approx((3 / 6 + 4 / 7) / 2),
        "dice": pytest.approx((6 / 9 + 8 / 11) / 2),
        "pixel_accuracy": pytest.approx(0.7),
        "iou_per_class": [pytest.approx(3 / 6), pytest.approx(4 / 7), None],
        "dice_per_class": [pytest.approx(6 / 9), pytest.approx(8 / 11), None],
        "accuracy_per_class": [pytest.approx(3 / 4), pytest.approx(4 / 6), None],
        "absent_classes": [2],
    }
    assert json.loads(json.dumps(summary)) == summary
    torch.save(summary, tmp_path / "summary.pt")
    assert torch.load(tmp_path / "summary.pt", weights_only=True) == summary


def test_summary_leaves_the_ignored_class_out():
    summary = summarize(np.array([[0, 0, 0], [1, 4, 0], [0, 1, 3]]), ignore_index=0)
    assert summary["iou_per_class"][0] is None
    assert summary["accuracy_per_class"][0] is None
    assert summary["iou"] == pytest.approx((4 / 6 + 3 / 4) / 2)
    assert summary["absent_classes"] == []
