"""ml-inference: masks of the images' size, overlays, scores, and refusals in one sentence."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ml_src.cli import inference
from ml_src.core.config_file import parse_config
from ml_src.core.metrics.segmentation import ConfusionMatrix
from ml_src.core.pictures import colorize, overlay, palette
from ml_src.core.trainers import train


@pytest.fixture
def best(small_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    small_config["transforms"]["train"].insert(0, {"type": "resize", "size": [48, 32]})
    return train(parse_config(small_config)).run_dir / "weights" / "best.pt"


def test_what_is_written_is_what_was_measured(best: Path, sample_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The scores can be counted again from the PNG files, which have the size of the images."""
    assert inference.main(["--checkpoint_path", str(best)]) == 0
    out = best.parent.parent / "inference" / "test"
    metrics = json.loads((out / "metrics.json").read_text())
    names = [line.split("/")[1] for line in (sample_dir / "splits/test_images.txt").read_text().splitlines()]
    assert sorted(path.name for path in (out / "masks").iterdir()) == sorted(names)
    assert sorted(path.name for path in (out / "overlays").iterdir()) == sorted(names)
    confusion = ConfusionMatrix(3, None)
    for name, one in zip(names, metrics["per_image"], strict=True):
        with Image.open(out / "masks" / name) as picture:
            assert picture.mode == "P" and picture.size == (64, 64)
            labels = np.array(picture)
        truth = np.array(Image.open(sample_dir / "masks" / name))
        confusion.update(labels, truth)
        assert one["image"] == name and one["pixel_accuracy"] == pytest.approx(float((labels == truth).mean()))
    assert metrics["confusion_matrix"] == confusion.matrix.tolist()
    printed = capsys.readouterr().out
    assert printed.startswith(f"Test Results:\n  Mean IoU: {metrics['iou']:.4f}\n  Mean Dice: {metrics['dice']:.4f}\n")
    assert f"    Class 1 (cell): {metrics['iou_per_class'][1]:.4f}\n" in printed


def test_the_scores_after_training_are_those_of_inference(best: Path) -> None:
    run = json.loads((best.parent.parent / "metrics.json").read_text())
    for split in ("test", "val"):
        assert inference.main(["--checkpoint_path", str(best), "--split", split, "--output", split]) == 0
        assert json.loads(Path(split, "metrics.json").read_text())["confusion_matrix"] == run[split]["confusion_matrix"]


def test_a_checkpoint_is_enough_wherever_it_and_the_data_have_moved(best: Path, sample_dir: Path) -> None:
    shutil.copy(best, "model.pt")
    shutil.copytree(sample_dir, "elsewhere")
    assert inference.main(["--checkpoint-path", "model.pt", "--data-dir", "elsewhere", "--split", "val"]) == 0
    assert Path("inference/val/metrics.json").is_file()


def test_missing_data_and_missing_checkpoints_are_one_sentence(best: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inference.main(["--checkpoint_path", "nothing.pt"]) == 2
    assert inference.main(["--checkpoint_path", str(best), "--data_dir", "nowhere"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all(line.startswith("error: ") for line in errors)
    assert not Path("inference").exists()


def test_colours_of_the_first_classes_are_fixed_and_all_differ() -> None:
    assert np.array_equal(palette(3), palette(256)[:3])
    assert len({tuple(color) for color in palette(32).tolist()}) == 32


def test_an_overlay_leaves_the_background_alone_and_colours_the_rest() -> None:
    image = np.full((20, 20, 1), 100, np.uint8)
    labels = np.zeros((20, 20), np.uint8)
    labels[5:15, 5:15] = 2
    picture = overlay(image, labels)
    assert picture.shape == (20, 20, 3)
    assert (picture[labels == 0] == 100).all() and (picture[5, 5] == palette()[2]).all()
    assert not (picture[10, 10] == 100).all()
    assert (image == 100).all()


def test_ignored_pixels_are_gray() -> None:
    labels = np.array([[0, 1, 255]], np.uint8)
    picture = colorize(labels, ignore_index=255)
    assert len(set(picture[0, 2].tolist())) == 1 and (picture[0, 1] == palette()[1]).all()


def test_what_an_earlier_measurement_left_in_a_folder_does_not_stay(best: Path, tmp_path: Path) -> None:
    words = ["--checkpoint_path", str(best), "--output", "out"]
    assert inference.main(words) == 0
    stray = Path("out/masks/mine.png")
    stray.write_bytes(b"not ours")
    metrics = json.loads(Path("out/metrics.json").read_text())
    metrics["per_image"].append({"image": "older.jpg"})
    Path("out/metrics.json").write_text(json.dumps(metrics))
    Path("out/masks/older.png").write_bytes(b"of another data set")
    assert inference.main(words) == 0
    assert not Path("out/masks/older.png").exists() and stray.exists()
    assert json.loads(Path("out/metrics.json").read_text())["iou"] == metrics["iou"]
