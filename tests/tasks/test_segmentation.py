"""The task: honest scores at the images' own size, and findings only where the numbers show them."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ml_src.core.config_file import parse_config
from ml_src.core.errors import DataError
from ml_src.core.metrics.segmentation import summarize
from ml_src.core.tasks import task_for
from ml_src.core.tasks.segmentation import Segmentation, findings

CPU = torch.device("cpu")
NAMES = ["background", "cell", "fibre"]


class ByBrightness(nn.Module):
    """A network that is always right on masks drawn as gray levels: class = round(2 * brightness)."""

    def forward(self, images: Tensor) -> Tensor:
        level = images[:, :1]
        return torch.cat([-(level - centre).abs() for centre in (0.0, 0.5, 1.0)], dim=1) * 100


def drawn_data(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    """Images whose gray level is the class, in three blocks; one file of each size in every split."""
    rng = np.random.default_rng(0)
    (folder / "splits").mkdir(parents=True)
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    names = []
    for number, (height, width) in enumerate(sizes):
        mask = cv2.resize(rng.integers(0, 3, (4, 4)).astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
        Image.fromarray(mask).save(folder / f"masks/{number}.png")
        Image.fromarray((mask * 127.5).astype(np.uint8)).save(folder / f"images/{number}.png")
        names.append(f"{number}.png")
    for split in ("test", "fold_0_train", "fold_0_val"):
        for kind in ("images", "masks"):
            (folder / "splits" / f"{split}_{kind}.txt").write_text("".join(f"{kind}/{name}\n" for name in names))
    return folder


def task_of(data_dir: Path, **overrides: Any) -> Segmentation:
    raw = {
        "data": {"data_dir": str(data_dir), "num_classes": 3, "class_names": NAMES},
        "model": {"in_channels": 1},
        "training": {"batch_size": 3, "num_workers": 0},
        "transforms": {"train": [{"type": "normalize", "mean": [0.0], "std": [1.0]}]},
    }
    task = task_for(parse_config(raw, overrides))
    assert isinstance(task, Segmentation)
    return task


def test_a_perfect_network_scores_one_at_every_size(tmp_path: Path) -> None:
    """Different sizes share a batch, filled up with what is ignored and cut off again."""
    task = task_of(drawn_data(tmp_path / "d", [(40, 40), (17, 63), (64, 16), (33, 100)]))
    predictions = list(task.predict(ByBrightness(), "test", CPU))
    for prediction, size in zip(predictions, [(40, 40), (17, 63), (64, 16), (33, 100)], strict=True):
        assert prediction.labels.shape == size
        truth = np.array(Image.open(prediction.pair.mask))
        assert np.array_equal(prediction.labels, truth)
    assert task.measure(predictions)["iou"] == 1.0


def test_scores_are_taken_at_the_size_of_the_files_not_of_the_network(tmp_path: Path) -> None:
    """Shrunk to 16x16 the network cannot be perfect any more; every pixel of the files is counted."""
    resize = [{"type": "resize", "size": [16, 16]}, {"type": "normalize", "mean": [0.0], "std": [1.0]}]
    task = task_of(drawn_data(tmp_path / "d", [(100, 90), (61, 77)]), **{"transforms.train": resize})
    report = task.measure(task.predict(ByBrightness(), "test", CPU))
    assert np.sum(report["confusion_matrix"]) == 100 * 90 + 61 * 77
    assert 0.7 < report["iou"] < 1.0


def test_a_mask_that_changed_its_size_is_named(tmp_path: Path) -> None:
    data = drawn_data(tmp_path / "d", [(40, 40)])
    task = task_of(data)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(data / "masks/0.png")
    for batches in (task.predict(ByBrightness(), "test", CPU), task.loader("train").epoch()):
        with pytest.raises(DataError, match=r"masks/0\.png is 8x8 but .*images/0\.png is 40x40"):
            list(batches)


def test_images_come_to_the_network_normalised(tmp_path: Path) -> None:
    normalize = [{"type": "normalize", "mean": [0.25], "std": [0.5]}]
    task = task_of(drawn_data(tmp_path / "d", [(16, 16)]), **{"transforms.train": normalize})
    batch = next(task.loader("val").epoch())
    images, masks = task.prepare(batch, CPU)
    assert torch.allclose(images, (batch.images.float() / 255 - 0.25) / 0.5, atol=1e-6)
    assert masks.dtype == torch.int64 and images.dtype == torch.float32


def test_a_panel_shows_image_truth_and_prediction_of_the_same_samples(tmp_path: Path) -> None:
    task = task_of(drawn_data(tmp_path / "d", [(40, 40), (30, 20), (40, 60)]))
    panel = task.panel(ByBrightness(), CPU)
    assert panel.dtype == np.uint8 and panel.shape == (40 + 30 + 40 + 12, 3 * 60 + 8, 3)
    truth, predicted = panel[:40, 44:84], panel[:40, 88:128]
    assert np.array_equal(truth, predicted)


def test_the_block_of_results_says_over_what_the_means_are_taken() -> None:
    task = task_of(Path("nowhere"))
    matrix = np.array([[50, 10, 0], [5, 35, 0], [0, 0, 0]])
    report = {"num_images": 2, **summarize(matrix, 255)}
    lines = task.results("test", report).splitlines()
    assert lines[:8] == [
        "Test Results:",
        f"  Mean IoU: {(50 / 65 + 35 / 50) / 2:.4f}",
        f"  Mean Dice: {(100 / 115 + 70 / 85) / 2:.4f}",
        "  Pixel Accuracy: 0.8500",
        "",
        "  Per-class IoU:",
        "    Class 0 (background): 0.7692",
        "    Class 1 (cell): 0.7000",
    ]
    assert lines[8] == "    Class 2 (fibre): not present"
    assert "over 2 of 3 classes" in lines[10] and "2 images" in lines[10]


def report_of(matrix: list[list[int]]) -> dict[str, Any]:
    return {**summarize(np.array(matrix), 255), "confusion_matrix": matrix}


def test_good_numbers_have_no_findings() -> None:
    val = report_of([[900, 10, 5], [8, 200, 4], [3, 6, 100]])
    assert findings(NAMES, [900, 200, 100], {"train_iou": 0.9, "val_iou": 0.88}, val) == []


@pytest.mark.parametrize(
    ("metrics", "counts", "matrix", "words"),
    [
        ({"train_iou": 0.9, "val_iou": 0.5}, [9, 2, 1], [[90, 1, 1], [1, 20, 1], [1, 1, 10]], ["Overfitting", "0.90"]),
        ({}, [9, 2, 1], [[90, 1, 9], [1, 20, 9], [9, 9, 5]], ["Very low IoU: class 2 (fibre, IoU 0.12"]),
        ({}, [9, 2, 1], [[90, 1, 0], [1, 20, 0], [9, 1, 0]], ["Never predicted: class 2 (fibre, 8.3%"]),
        ({}, [9, 2, 0], [[90, 1, 0], [1, 20, 0], [9, 1, 0]], ["No pixel in the training masks has class 2 (fibre)"]),
        ({}, [9, 2, 1], [[990, 0, 0], [30, 2, 0], [30, 0, 2]], ["Pixel accuracy is", "predicts mostly background"]),
    ],
)
def test_each_sign_of_trouble_is_said_where_it_shows(
    metrics: dict[str, float], counts: list[int], matrix: list[list[int]], words: list[str]
) -> None:
    found = " ".join(findings(NAMES, counts, metrics, report_of(matrix)))
    assert all(word in found for word in words)
    assert bool(found) == bool(words)


def test_an_ignored_class_is_no_finding_and_has_no_score() -> None:
    val = report_of([[90, 1, 0], [1, 20, 0], [0, 0, 0]])
    assert findings(NAMES, [9, 2, 0], {}, val, ignore_index=2) == []
    task = task_of(Path("nowhere"), **{"data.ignore_index": 2})
    assert "    Class 2 (fibre): ignored" in task.results("val", {"num_images": 1, **val})


def test_balanced_weights_come_from_the_training_masks(tmp_path: Path) -> None:
    """They turn the share of each class round, so that every class weighs the same in all."""
    data = drawn_data(tmp_path / "d", [(40, 40), (60, 80)])
    task = task_of(data, **{"loss.class_weights": "balanced", "loss.type": "cross_entropy"})
    criterion = task.criterion()
    masks = [np.array(Image.open(path)) for path in sorted((data / "masks").iterdir())]
    counts = sum(np.bincount(mask.ravel(), minlength=3) for mask in masks)
    weights = next(buffer for buffer in criterion.buffers() if buffer.shape == (3,)).numpy()
    assert weights * counts == pytest.approx(np.full(3, counts.sum() / 3), rel=1e-5)
