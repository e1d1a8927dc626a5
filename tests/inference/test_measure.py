"""Honest scores: at the images' own size, with intervals, and nothing that is missed left out of a mean."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from known_networks import ByBrightness, drawn_data, member_of
from PIL import Image

from ml_src.core.data.files import Pair
from ml_src.core.errors import DataError
from ml_src.core.inference import measure, planes
from ml_src.core.inference.measure import Measuring, compare, compare_split, report, results
from ml_src.core.inference.members import weighted
from ml_src.core.inference.planes import Plane
from ml_src.core.inference.predictor import Options
from ml_src.core.postprocess_specs import parse_steps

HOW = Measuring()


def test_a_perfect_network_scores_one_at_every_size(tmp_path: Path) -> None:
    sizes = [(40, 40), (17, 63), (64, 16), (33, 100)]
    members = weighted([member_of(ByBrightness(), drawn_data(tmp_path / "d", sizes))], None)
    shapes = []
    scored = measure.split_report(
        members, "test", Options(), [], HOW, keep=lambda predicted: shapes.append(predicted.labels.shape)
    )
    assert shapes == sizes
    assert scored["iou"] == scored["boundaries"]["surface_dice"] == scored["boundaries"]["boundary_iou"] == 1.0
    assert scored["boundaries"]["hd95"] == 0.0
    assert scored["intervals"]["iou"] == [1.0, 1.0] and scored["intervals"]["over"] == "images"


def test_scores_are_taken_at_the_size_of_the_files_not_of_the_network(tmp_path: Path) -> None:
    """Shrunk to 16x16 the network cannot be perfect any more; every pixel of the files is counted."""
    resize = [{"type": "resize", "size": [16, 16]}, {"type": "normalize", "mean": [0.0], "std": [1.0]}]
    data = drawn_data(tmp_path / "d", [(100, 90), (61, 77)])
    members = weighted([member_of(ByBrightness(), data, **{"transforms.train": resize})], None)
    scored = measure.split_report(members, "test", Options(), [], HOW)
    assert np.sum(scored["confusion_matrix"]) == 100 * 90 + 61 * 77
    assert 0.7 < scored["iou"] < 1.0


def test_a_mask_that_changed_its_size_is_named(tmp_path: Path) -> None:
    data = drawn_data(tmp_path / "d", [(40, 40)])
    member = member_of(ByBrightness(), data)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(data / "masks/0.png")
    with pytest.raises(DataError, match=r"masks/0\.png is 8x8 but .*images/0\.png is 40x40"):
        compare_split(weighted([member], None), "test", Options(), [], HOW)
    with pytest.raises(DataError, match=r"masks/0\.png is 8x8 but .*images/0\.png is 40x40"):
        list(member.task.loader("train").epoch())


def test_an_image_that_cannot_be_read_stops_the_measurement(tmp_path: Path) -> None:
    """Left out, it would make the score too good without a word."""
    data = drawn_data(tmp_path / "d", [(40, 40), (40, 40)])
    (data / "images/1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"images/1\.png"):
        compare_split(weighted([member_of(ByBrightness(), data)], None), "test", Options(), [], HOW)


def test_what_is_measured_is_what_post_processing_left(tmp_path: Path) -> None:
    members = weighted([member_of(ByBrightness(), drawn_data(tmp_path / "d", [(40, 40)]))], None)
    scored = measure.split_report(members, "test", Options(), parse_steps(["remove_small,area=5000"]), HOW)
    assert np.count_nonzero(np.sum(scored["confusion_matrix"], axis=0)) == 1


def pair_of(folder: Path, truth: np.ndarray) -> Pair:
    Image.fromarray(truth).save(folder / "truth.png")
    Image.fromarray(truth).save(folder / "image.png")
    return Pair(folder / "image.png", folder / "truth.png")


def test_a_missed_class_counts_as_nothing_found_and_an_invented_one_too(tmp_path: Path) -> None:
    truth = np.zeros((30, 40), np.uint8)
    truth[5:10, 5:10] = 1
    invented = np.zeros((30, 40), np.uint8)
    invented[5:10, 5:10] = 2
    compared = compare(pair_of(tmp_path, truth), Plane.of(invented), 3, 255, HOW)
    scored = report([compared], ["background", "cell", "fibre"], 255, None, HOW)
    outlines = scored["boundaries"]
    assert outlines["surface_dice_per_class"] == [1.0, 0.0, 0.0]
    assert outlines["hd95_per_class"] == [0.0, 50.0, 50.0]  # the diagonal
    assert [counts["missed"] for counts in outlines["counts_per_class"]] == [0, 1, 0]
    assert [counts["invented"] for counts in outlines["counts_per_class"]] == [0, 0, 1]
    assert scored["per_image"][0]["missed"] == [1] and scored["per_image"][0]["invented"] == [2]
    text = results("Test", scored, 255)
    assert "    Class 1 (cell): 50.00, 0.0000, 0.0000; missed in 1 and invented in 0 of 1 images" in text
    assert "One image alone gives no intervals." in text


def test_a_scene_is_counted_by_bands_and_its_outlines_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    truth, labels = rng.integers(0, 3, (2, 90, 70), np.uint8)
    pair = pair_of(tmp_path, truth)
    whole = compare(pair, Plane.of(labels), 3, 255, HOW)
    monkeypatch.setattr(measure, "MOST_PIXELS", 100)
    monkeypatch.setattr(planes, "IN_MEMORY", 100)
    monkeypatch.setattr(planes, "BAND", 700)
    plane = Plane(labels.shape, np.uint8)
    plane.put(0, labels)
    banded = compare(pair, plane, 3, 255, HOW)
    assert np.array_equal(whole.matrix, banded.matrix) and banded.boundaries is None
    scored = report([banded, whole], ["a", "b", "c"], 255, None, HOW)
    assert scored["boundaries"]["num_images"] == 1 and "hd95" not in scored["intervals"]
    assert "Outlines were not compared" in results("Test", report([banded], ["a", "b", "c"], 255, None, HOW), 255)


def test_pixels_without_data_are_not_counted(tmp_path: Path) -> None:
    pixels = np.zeros((20, 20), np.float32)
    pixels[:5] = np.nan
    tifffile.imwrite(tmp_path / "image.tif", pixels)
    Image.fromarray(np.ones((20, 20), np.uint8)).save(tmp_path / "mask.png")
    labels = np.ones((20, 20), np.uint8)
    labels[:5] = 255
    compared = compare(Pair(tmp_path / "image.tif", tmp_path / "mask.png"), Plane.of(labels), 2, 255, HOW)
    assert compared.matrix.tolist() == [[0, 0], [0, 300]]


def test_intervals_are_over_groups_and_say_so_where_there_is_only_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(6):
        truth = rng.integers(0, 2, (20, 20), np.uint8)
        wrong = rng.random((20, 20)) < rng.uniform(0, 0.4)
        found.append(compare(pair_of(tmp_path, truth), Plane.of(np.where(wrong, 1 - truth, truth)), 2, 255, HOW))
    names = ["background", "cell"]
    over_images = report(found, names, 255, None, HOW)
    over_groups = report(found, names, 255, ["a", "a", "b", "b", "c", "c"], HOW)
    one_group = report(found, names, 255, ["a"] * 6, HOW)
    assert over_images["intervals"]["over"] == "images" and over_groups["intervals"]["over"] == "groups"
    assert "by resampling 3 groups: mean IoU" in results("Test", over_groups, 255)
    assert one_group["intervals"]["iou"] == over_images["intervals"]["iou"]
    assert "6 images, all of one group, so that new groups may differ by more" in results("Test", one_group, 255)
    low, high = over_images["intervals"]["iou"]
    assert low < over_images["iou"] < high


def test_the_block_of_results_says_over_what_the_means_are_taken(tmp_path: Path) -> None:
    truth = np.repeat(np.array([0, 1], np.uint8), [60, 40]).reshape(10, 10)
    labels = truth.copy()
    labels.ravel()[:10], labels.ravel()[-5:] = 1, 0
    two = [compare(pair_of(tmp_path, truth), Plane.of(labels), 3, 255, HOW)] * 2
    lines = results("Validation", report(two, ["background", "cell", "fibre"], 255, None, HOW), 255).splitlines()
    assert lines[:8] == [
        "Validation Results:",
        f"  Mean IoU: {(50 / 65 + 35 / 50) / 2:.4f}",
        f"  Mean Dice: {(100 / 115 + 70 / 85) / 2:.4f}",
        "  Pixel Accuracy: 0.8500",
        "",
        "  Per-class IoU:",
        "    Class 0 (background): 0.7692",
        "    Class 1 (cell): 0.7000",
    ]
    assert lines[8] == "    Class 2 (fibre): not present"
    means = next(line for line in lines if line.startswith("Means are"))
    assert "over 2 of 3 classes" in means and "2 images" in means


def test_an_ignored_class_has_no_score(tmp_path: Path) -> None:
    truth = np.repeat(np.array([0, 2], np.uint8), 50).reshape(10, 10)
    scored = report([compare(pair_of(tmp_path, truth), Plane.of(truth), 3, 2, HOW)], ["a", "b", "c"], 2, None, HOW)
    assert "    Class 2 (c): ignored" in results("Validation", scored, 2)
    assert scored["boundaries"]["hd95_per_class"][2] is None
