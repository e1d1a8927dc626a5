"""The task: images normalised, panels, class weights, and findings only where the numbers show them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from known_networks import NAMES, ByBrightness, drawn_data
from PIL import Image

from ml_src.core.config_file import parse_config
from ml_src.core.metrics.segmentation import summarize
from ml_src.core.tasks import task_for
from ml_src.core.tasks.segmentation import Segmentation, findings

CPU = torch.device("cpu")


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


def test_an_ignored_class_is_no_finding() -> None:
    val = report_of([[90, 1, 0], [1, 20, 0], [0, 0, 0]])
    assert findings(NAMES, [9, 2, 0], {}, val, ignore_index=2) == []


def test_balanced_weights_come_from_the_training_masks(tmp_path: Path) -> None:
    """They turn the share of each class round, so that every class weighs the same in all."""
    data = drawn_data(tmp_path / "d", [(40, 40), (60, 80)])
    task = task_of(data, **{"loss.class_weights": "balanced", "loss.type": "cross_entropy"})
    criterion = task.criterion()
    masks = [np.array(Image.open(path)) for path in sorted((data / "masks").iterdir())]
    counts = sum(np.bincount(mask.ravel(), minlength=3) for mask in masks)
    weights = next(buffer for buffer in criterion.buffers() if buffer.shape == (3,)).numpy()
    assert weights * counts == pytest.approx(np.full(3, counts.sum() / 3), rel=1e-5)
