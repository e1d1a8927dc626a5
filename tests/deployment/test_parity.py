"""An exported file is judged by what it predicts beside its checkpoint, and no verdict says more than was counted."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import f1_score, jaccard_score

from ml_src.core.deployment.parity import MOST_OF_IOU, Output, Parity
from ml_src.core.export.metadata import Precision

NAMES = ["background", "cell", "fibre"]
IGNORED = 255
Labels = NDArray[np.uint8]


def parity(class_names: list[str] = NAMES, ignore_index: int = IGNORED) -> Parity:
    return Parity(class_names, ignore_index, "PyTorch float32", "best.onnx")


def output(labels: Labels, num_classes: int = len(NAMES)) -> Output:
    """Certain probabilities of a label map."""
    return Output(np.moveaxis(np.eye(num_classes, dtype=np.float32)[labels], -1, 0), labels)


def drawn(seed: int, shape: tuple[int, int] = (20, 30), num_classes: int = len(NAMES)) -> Labels:
    return np.random.default_rng(seed).integers(0, num_classes, shape).astype(np.uint8)


def with_wrong(labels: Labels, number: int) -> Labels:
    """The labels with the first `number` pixels, row by row, of another class."""
    changed = labels.copy().reshape(-1)
    changed[:number] = (changed[:number] + 1) % len(NAMES)
    return changed.reshape(labels.shape)


def judged(reference: Labels, exported: Labels, mask: Labels | None, precision: Precision = "fp32") -> bool:
    found = parity()
    found.update("a", output(reference), output(exported), mask)
    return found.verdict(precision).passed


def test_equal_predictions_pass_with_a_difference_of_zero() -> None:
    found, labels = parity(), drawn(0)
    found.update("a", output(labels), output(labels), drawn(1))
    facts = found.to_json("fp32")
    assert facts["verdict"] == "PASS"
    assert facts["probabilities"] == {"max_difference": 0.0, "mean_difference": 0.0, "num_not_finite": 0}
    assert facts["labels"] == {"num_equal": 600, "share_equal": 1.0}
    assert facts["iou"]["difference"] == facts["dice"]["difference"] == 0.0


def test_scores_of_both_are_those_of_scikit_learn() -> None:
    truth, reference, exported = drawn(0), drawn(1), drawn(2)
    truth[:3] = IGNORED
    found = parity()
    found.update("a", output(reference), output(exported), truth)
    facts, counted = found.to_json("fp32"), truth != IGNORED
    for word, labels in (("reference", reference), ("exported", exported)):
        for key, score in (("iou", jaccard_score), ("dice", f1_score)):
            expected = score(truth[counted], labels[counted], average=None)
            assert [one[key][word] for one in facts["per_class"]] == pytest.approx(expected.tolist())
            assert facts[key][word] == pytest.approx(expected.mean())
    assert facts["num_labelled_pixels"] == counted.sum()


def test_differences_of_probabilities_are_those_of_float64() -> None:
    rng = np.random.default_rng(0)
    one, other = (rng.dirichlet(np.ones(3), (20, 30)).transpose(2, 0, 1).astype(np.float32) for _ in range(2))
    found = parity()
    found.update("a", Output(one, drawn(0)), Output(other, drawn(0)))
    exact = np.abs(one.astype(np.float64) - other)
    facts = found.to_json("fp32")["probabilities"]
    assert facts["max_difference"] == pytest.approx(exact.max(), rel=1e-6)
    assert facts["mean_difference"] == pytest.approx(exact.mean(), rel=1e-6)


def test_float16_probabilities_are_subtracted_in_float32() -> None:
    labels = np.zeros((1, 1), np.uint8)
    high, low = (np.full((3, 1, 1), value, np.float16) for value in (1.0, 0.0001))
    found = parity()
    found.update("a", Output(high, labels), Output(low, labels))
    assert found.to_json("fp32")["probabilities"]["max_difference"] == np.float32(1) - np.float32(np.float16(0.0001))


@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(1, 19), max_size=4, unique=True))
def test_bands_give_what_whole_images_give(seed: int, cuts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    probs = [rng.random((3, 20, 30)).astype(np.float32) for _ in range(2)]
    labels, mask, nodata = [drawn(seed), drawn(seed + 1)], drawn(seed + 2), rng.random((20, 30)) < 0.2
    whole, banded = parity(), parity()
    whole.update("a", Output(probs[0], labels[0]), Output(probs[1], labels[1]), mask, nodata)
    for rows in (slice(*ends) for ends in zip([0, *sorted(cuts)], [*sorted(cuts), 20], strict=True)):
        parts = [Output(one[:, rows], two[rows]) for one, two in zip(probs, labels, strict=True)]
        banded.update("a", *parts, mask[rows], nodata[rows])
    expected, facts = whole.to_json("fp32"), banded.to_json("fp32")
    means = [one["probabilities"].pop("mean_difference") for one in (expected, facts)]
    assert means[0] == pytest.approx(means[1])
    assert facts == expected


def test_pixels_without_data_count_for_nothing() -> None:
    reference, exported, mask = drawn(0), drawn(0), drawn(1)
    nodata = np.zeros(reference.shape, bool)
    nodata[5:9] = True
    reference[nodata], exported[nodata], mask[nodata] = 200, 201, 77  # no classes at all
    probs = [output(drawn(0)).probs.copy() for _ in range(2)]
    probs[1][:, nodata] = np.nan
    found = parity()
    found.update("a", Output(probs[0], reference), Output(probs[1], exported), mask, nodata)
    facts = found.to_json("fp32")
    assert facts["verdict"] == "PASS"
    assert facts["num_pixels"] == facts["num_labelled_pixels"] == 600 - 4 * 30


def test_one_label_in_ten_thousand_may_differ_and_not_two() -> None:
    labels = drawn(0, (100, 100))
    assert judged(labels, with_wrong(labels, 1), labels)
    assert not judged(labels, with_wrong(labels, 2), labels)


def test_a_share_is_rounded_down_so_that_no_failure_looks_like_enough() -> None:
    labels = drawn(0, (1000, 1000))
    found = parity()
    found.update("a", output(labels), output(with_wrong(labels, 101)))
    assert found.verdict("fp32") == (False, "99.9899 % of the labels are equal, 99.99 % are needed")
    nearly = parity()
    large = np.zeros((2000, 1000), np.uint8)
    nearly.update("a", output(large), output(with_wrong(large, 1)))
    assert "99.9999 %" in nearly.block("fp32")


@pytest.mark.parametrize(
    ("num_wrong", "precision", "within"),
    [(9, "fp32", True), (11, "fp32", False), (9, "fp16", True), (11, "fp16", False), (49, "int8", True),
     (51, "int8", False)],
)  # fmt: skip
def test_mean_iou_may_differ_by_a_thousandth_and_in_int8_by_five(
    num_wrong: int, precision: Precision, within: bool
) -> None:
    mask = np.repeat(np.array([0, 1], np.uint8), 10_000).reshape(2, 10_000)
    wrong = mask.copy()
    wrong[0, :num_wrong] = 1
    found = parity(["a", "b"])
    found.update("a", output(mask, 2), output(wrong, 2), mask)
    by_hand = ((10_000 - num_wrong) / 10_000 + 10_000 / (10_000 + num_wrong)) / 2 - 1
    assert found.to_json(precision)["iou"]["difference"] == pytest.approx(by_hand)
    limit = f"at most {MOST_OF_IOU[precision]:g} is allowed"
    assert (limit not in found.verdict(precision).reason) == within


def test_a_difference_of_exactly_the_limit_passes() -> None:
    """In float64, 0.999 is more than 0.001 below 1."""
    mask = np.zeros((10, 100), np.uint8)
    wrong = mask.copy()
    wrong[0, 0] = 1  # class 1 is in no mask
    found = parity(["a", "b"])
    found.update("a", output(mask, 2), output(wrong, 2), mask)
    assert "is allowed" not in found.verdict("fp32").reason


def test_int8_is_not_held_to_equal_labels_but_they_are_stated() -> None:
    mask = drawn(0, (100, 100))
    one, other = mask.copy(), mask.copy()
    for index in range(3):  # as many pixels of each class wrong in both, in other places
        places = np.flatnonzero(mask == index)
        one.reshape(-1)[places[:100]] = other.reshape(-1)[places[-100:]] = (index + 1) % 3
    assert judged(one, other, mask, "int8")
    assert not judged(one, other, mask, "fp32")
    found = parity()
    found.update("a", output(one), output(other), mask)
    assert "Equal labels: 9400 of 10000 (94.0000 %)" in found.block("int8")


def test_without_masks_labels_alone_decide() -> None:
    labels = drawn(0, (100, 100))
    assert judged(labels, with_wrong(labels, 1), None)
    assert not judged(labels, with_wrong(labels, 2), None)
    found = parity()
    found.update("a", output(labels), output(labels))
    assert "mean IoU was not compared, for no pixel is labelled" in found.verdict("fp32").reason
    assert found.to_json("fp32")["iou"] == {"reference": None, "exported": None, "difference": None}


def test_int8_without_masks_is_held_to_the_labels_of_the_reference_and_says_so() -> None:
    labels = drawn(0, (100, 100))
    assert judged(labels, with_wrong(labels, 20), None, "int8")
    assert not judged(labels, with_wrong(labels, 60), None, "int8")
    found = parity()
    found.update("a", output(labels), output(with_wrong(labels, 60)))
    assert "with the reference's labels as truth" in found.verdict("int8").reason
    assert "With the labels of the reference as truth:" in found.block("int8")


@given(seeds=st.tuples(*[st.integers(0, 10_000)] * 3), num_classes=st.integers(2, 4))
def test_scores_against_any_mask_differ_by_no_more_than_the_two_predictions_from_each_other(
    seeds: tuple[int, int, int], num_classes: int
) -> None:
    """What makes the stand-in of int8 safe."""
    reference, exported, mask = (drawn(seed, (4, 5), num_classes) for seed in seeds)
    found = parity([str(index) for index in range(num_classes)])
    found.update("a", output(reference, num_classes), output(exported, num_classes), mask)
    for one in found.to_json("int8")["per_class"]:
        if one["iou"]["difference"] is not None and one["likeness"] is not None:
            assert abs(one["iou"]["difference"]) <= 1 - one["likeness"] + 1e-9


def test_a_class_that_one_predicts_in_a_single_pixel_does_not_move_the_mean() -> None:
    """Its IoU is 0 for one and undefined for the other: means over three and two classes cannot be compared."""
    mask = drawn(0, (200, 200), 2)
    exported = mask.copy()
    exported[0, 0] = 2
    found = parity()
    found.update("a", output(mask), output(exported), mask)
    assert found.verdict("fp32").passed
    facts = found.to_json("fp32")
    assert facts["per_class"][2]["iou"] == {"reference": None, "exported": 0.0, "difference": None}
    assert "Means are over 2 of 3 classes" in found.block("fp32")
    assert "Class 2 (fibre): not present, 0.0000" in found.block("fp32")


def test_an_ignored_class_has_no_score() -> None:
    found, mask = parity(ignore_index=0), drawn(0)
    found.update("a", output(drawn(1)), output(drawn(1)), mask)
    facts = found.to_json("fp32")
    assert facts["per_class"][0]["iou"]["reference"] is None
    assert facts["num_labelled_pixels"] == np.count_nonzero(mask)
    assert "Class 0 (background): ignored" in found.block("fp32")


def test_masks_that_label_nothing_are_as_none() -> None:
    labels = drawn(0)
    assert judged(labels, labels, np.full_like(labels, IGNORED))
    found = parity()
    found.update("a", output(labels), output(labels), np.full_like(labels, IGNORED))
    assert "no pixel is labelled" in found.verdict("fp32").reason


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_where_nothing_was_compared_nothing_passes(precision: Precision) -> None:
    nowhere, labels = np.ones((20, 30), bool), drawn(0)
    hidden = parity()
    hidden.update("a", output(labels), output(labels), labels, nowhere)
    for found in (parity(), hidden):
        assert found.verdict(precision) == (False, "no pixel was compared")
        assert "FAIL: no pixel was compared." in found.block(precision)
        assert found.to_json(precision)["probabilities"]["max_difference"] is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_probability_that_is_not_finite_fails(value: float, precision: Precision) -> None:
    labels = drawn(0)
    broken = output(labels)
    broken.probs[1, 2, 3] = value
    found = parity()
    found.update("a", output(labels), broken, labels)
    assert found.verdict(precision) == (False, "1 probabilities are not finite")


def test_the_image_that_differs_most_is_named() -> None:
    found, labels = parity(), drawn(0)
    for name, number in (("a/01", 0), ("b/01", 30), ("b/02", 3)):
        found.update(name, output(labels), output(with_wrong(labels, number)), labels)
    assert "Fewest in an image: 95.0000 % in b/01" in found.block("fp32")
    assert [one["share_equal"] for one in found.to_json("fp32")["per_image"]] == [1.0, 0.95, 0.995]


def test_every_failure_is_named_at_once() -> None:
    mask = drawn(0)
    reason_of = parity()
    reason_of.update("a", output(mask), output(drawn(1)), mask)
    reason = reason_of.verdict("fp32").reason
    assert "99.99 % are needed" in reason and "at most 0.001 is allowed" in reason


def test_the_report_is_json_without_nan() -> None:
    found = parity()
    empty = found.to_json("int8")
    assert json.loads(json.dumps(empty, allow_nan=False)) == empty and empty["num_pixels"] == 0
    found.update("a", output(drawn(0)), output(drawn(1)))
    filled = found.to_json("int8")
    assert json.loads(json.dumps(filled, allow_nan=False)) == filled and filled["num_pixels"] > 0


def test_shapes_that_do_not_fit_are_refused() -> None:
    labels = drawn(0)
    with pytest.raises(ValueError, match="of shape"):
        parity().update("a", output(labels), output(labels[:5]))
    with pytest.raises(ValueError, match="of shape"):
        parity(["a", "b"]).update("a", output(labels), output(labels))


def test_names_of_classes_cannot_break_the_block() -> None:
    found = parity(["a\nPASS: forged", "b", "c"])
    found.update("a", output(drawn(0)), output(drawn(1)), drawn(2))
    assert not any(line.startswith("PASS") for line in found.block("fp32").splitlines())
