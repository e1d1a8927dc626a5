"""Honest scores: at the images' own size, with intervals, and nothing that is missed left out of a mean."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from known_networks import ByBrightness, drawn_data, member_of
from PIL import Image

from ml_src.core.data import truth as truths
from ml_src.core.data.files import Pair
from ml_src.core.errors import DataError
from ml_src.core.inference import measure, planes
from ml_src.core.inference.measure import (
    Comparison,
    Measuring,
    compare,
    compare_split,
    label_maps,
    report,
    results,
    split_items,
)
from ml_src.core.inference.members import weighted
from ml_src.core.inference.planes import Plane
from ml_src.core.inference.predictor import Failed, Options, Predicted
from ml_src.core.metrics.segmentation import ConfusionMatrix
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
        list(member.data.loader("train").epoch())


def test_an_image_that_cannot_be_read_stops_the_measurement(tmp_path: Path) -> None:
    """Left out, it would make the score too good without a word."""
    data = drawn_data(tmp_path / "d", [(40, 40), (40, 40)])
    (data / "images/1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"images/1\.png"):
        compare_split(weighted([member_of(ByBrightness(), data)], None), "test", Options(), [], HOW)


def test_a_file_that_goes_before_its_results_are_written_fails_alone(tmp_path: Path) -> None:
    data = drawn_data(tmp_path / "d", [(40, 40), (40, 40)])
    members = weighted([member_of(ByBrightness(), data)], None)

    def finish(predicted: Predicted) -> str:
        if predicted.item.path.stem == "0":
            raise DataError("0.png has gone")
        return predicted.item.path.stem

    items = split_items(members[0], "test")
    assert list(label_maps(items, members, Options(), [], finish)) == [Failed(items[0], "0.png has gone"), "1"]


def test_what_is_measured_is_what_post_processing_left(tmp_path: Path) -> None:
    members = weighted([member_of(ByBrightness(), drawn_data(tmp_path / "d", [(40, 40)]))], None)
    scored = measure.split_report(members, "test", Options(), parse_steps(["remove_small,area=5000"]), HOW)
    assert np.count_nonzero(np.sum(scored["confusion_matrix"], axis=0)) == 1


def pair_of(folder: Path, truth: np.ndarray) -> Pair:
    Image.fromarray(truth).save(folder / "truth.png")
    Image.fromarray(truth).save(folder / "image.png")
    return Pair(folder / "image.png", folder / "truth.png")


def compared(*cases: tuple[Pair, np.ndarray | Plane], num_classes: int = 3, ignore_index: int = 255) -> Comparison:
    both = [
        compare(pair, labels if isinstance(labels, Plane) else Plane.of(labels), num_classes, ignore_index, HOW)
        for pair, labels in cases
    ]
    return Comparison([one for one, _ in both], np.sum([matrix for _, matrix in both], axis=0))


def test_a_missed_class_counts_as_nothing_found_and_an_invented_one_too(tmp_path: Path) -> None:
    truth = np.zeros((30, 40), np.uint8)
    truth[5:10, 5:10] = 1
    invented = np.zeros((30, 40), np.uint8)
    invented[5:10, 5:10] = 2
    found = compared((pair_of(tmp_path, truth), invented))
    scored = report(found, ["background", "cell", "fibre"], 255, None, HOW)
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
    whole = compared((pair, labels))
    monkeypatch.setattr(measure, "MOST_PIXELS", 100)
    monkeypatch.setattr(planes, "IN_MEMORY", 100)
    monkeypatch.setattr(planes, "BAND", 700)
    plane = Plane(labels.shape, np.uint8)
    plane.put(0, labels)
    banded = compared((pair, plane))
    assert np.array_equal(whole.matrix, banded.matrix) and banded.images[0].boundaries is None
    both = Comparison(banded.images + whole.images, banded.matrix + whole.matrix)
    scored = report(both, ["a", "b", "c"], 255, None, HOW)
    assert scored["boundaries"]["num_images"] == 1 and "hd95" not in scored["intervals"]
    assert "Outlines were not compared" in results("Test", report(banded, ["a", "b", "c"], 255, None, HOW), 255)


@pytest.mark.parametrize("most", [100, measure.MOST_PIXELS])
@pytest.mark.parametrize("holes", [False, True])
def test_files_that_must_be_decoded_whole_are_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, holes: bool
) -> None:
    rng = np.random.default_rng(0)
    mask, labels = rng.integers(0, 3, (2, 90, 70), np.uint8)
    pair = pair_of(tmp_path, mask)
    if holes:
        pixels = np.where(rng.random(mask.shape) < 0.2, np.nan, 1).astype(np.float32)
        pair = Pair(tmp_path / "image.tif", pair.mask)
        tifffile.imwrite(pair.image, pixels)
        mask = np.where(np.isnan(pixels), 255, mask)
    monkeypatch.setattr(measure, "MOST_PIXELS", most)
    monkeypatch.setattr(planes, "BAND", 700)
    opened, read_mask, read_image = [], truths.read_mask, truths.read_image
    monkeypatch.setattr(truths, "read_mask", lambda path, window: (opened.append(path), read_mask(path, window))[1])
    monkeypatch.setattr(
        truths, "read_image", lambda path, window: (opened.append(path), read_image(path, window=window))[1]
    )
    confusion = ConfusionMatrix(3, 255)
    confusion.update(labels, mask)
    assert np.array_equal(compared((pair, labels)).matrix, confusion.matrix)
    assert opened == [pair.mask, *[pair.image] * holes]


def test_the_scores_of_an_image_are_those_of_its_matrix_which_is_not_kept(tmp_path: Path) -> None:
    """With hundreds of classes, the matrices of thousands of images would not fit into the memory."""
    rng = np.random.default_rng(0)
    cases = []
    for number, (truth, labels) in enumerate(rng.integers(0, 200, (3, 2, 20, 30), np.uint8)):
        (tmp_path / str(number)).mkdir()
        cases.append((pair_of(tmp_path / str(number), truth), labels))
    found = compared(*cases, num_classes=250)
    scored = report(found, [str(value) for value in range(250)], 255, None, HOW)
    for one, each in zip(found.images, scored["per_image"], strict=True):
        hits, true, predicted = one.counts
        present = true + predicted > 0
        assert each["pixel_accuracy"] == hits.sum() / true.sum() and true.sum() == 600
        assert each["iou"] == pytest.approx(np.mean(hits[present] / (true + predicted - hits)[present]))
        assert each["absent_classes"] == np.flatnonzero(~present).tolist()
    kept = [part for one in found.images for part in one.counts]
    assert sum(part.nbytes for part in kept) == 3 * 3 * 250 * 8 and all(part.base is None for part in kept)
    assert found.matrix.sum() == 3 * 600


def test_pixels_without_data_are_not_counted(tmp_path: Path) -> None:
    pixels = np.zeros((20, 20), np.float32)
    pixels[:5] = np.nan
    tifffile.imwrite(tmp_path / "image.tif", pixels)
    Image.fromarray(np.ones((20, 20), np.uint8)).save(tmp_path / "mask.png")
    labels = np.ones((20, 20), np.uint8)
    labels[:5] = 255
    found = compared((Pair(tmp_path / "image.tif", tmp_path / "mask.png"), labels), num_classes=2)
    assert found.matrix.tolist() == [[0, 0], [0, 300]]


def test_intervals_are_over_groups_and_say_so_where_there_is_only_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cases = []
    for number in range(6):
        truth = rng.integers(0, 2, (20, 20), np.uint8)
        wrong = rng.random((20, 20)) < rng.uniform(0, 0.4)
        (tmp_path / str(number)).mkdir()
        cases.append((pair_of(tmp_path / str(number), truth), np.where(wrong, 1 - truth, truth)))
    found = compared(*cases, num_classes=2)
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
    two = compared(*[(pair_of(tmp_path, truth), labels)] * 2)
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
    found = compared((pair_of(tmp_path, truth), truth), ignore_index=2)
    scored = report(found, ["a", "b", "c"], 2, None, HOW)
    assert "    Class 2 (c): ignored" in results("Validation", scored, 2)
    assert scored["boundaries"]["hd95_per_class"][2] is None
