"""A cross-validation: every image once, by the network that has not seen it, and all of them as one set."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from known_folds import drawn_folds, speckled_run, write_groups
from PIL import Image

from ml_src.cli import inference
from ml_src.core.inference import planes
from ml_src.core.inference.postprocess import save_chain
from ml_src.core.metrics.segmentation import ConfusionMatrix, summarize
from ml_src.core.postprocess_specs import parse_steps


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return drawn_folds(Path("blocks"))


@pytest.fixture
def folds(data: Path) -> list[str]:
    """The network of fold 0 makes no mistake, that of fold 1 specks of one pixel, that of fold 2 larger ones."""
    return [str(speckled_run(Path(f"runs/my_fold_{fold}"), data, fold, speck=fold)) for fold in range(3)]


def metrics_of(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "metrics.json").read_text())


def test_every_image_counts_once_and_the_folds_add_up(
    data: Path, folds: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert inference.main(["--cv", *folds]) == 0
    merged, printed = metrics_of("runs/my_cv"), capsys.readouterr().out
    total, images = np.zeros((3, 3), np.int64), []
    for number, fold in enumerate(folds):
        assert inference.main(["--checkpoint_path", fold, "--split", "val", "--output", f"alone_{number}"]) == 0
        alone, row = metrics_of(f"alone_{number}"), merged["folds"][number]
        total += np.array(alone["confusion_matrix"])
        images += [one["image"] for one in alone["per_image"]]
        assert row["fold"] == number and row["num_images"] == 2
        assert all(row[key] == alone[key] for key in ("iou", "dice", "iou_per_class", "dice_per_class", "intervals"))
        assert f"Fold {number}: 2 images, mean IoU {alone['iou']:.4f}, mean Dice {alone['dice']:.4f}\n" in printed
    assert merged["split"] == "cv" and merged["num_images"] == 6
    assert merged["confusion_matrix"] == total.tolist()
    assert [one["image"] for one in merged["per_image"]] == images == [f"{number}.png" for number in range(6)]
    assert {key: merged[key] for key in summarize(total)} == summarize(total)
    assert merged["intervals"]["over"] == "images" and merged["intervals"]["num"] == 6
    assert printed.startswith(f"Cross-validated Results:\n  Mean IoU: {merged['iou']:.4f}\n")
    assert "Each fold's best epoch was chosen on these very images" in printed


def test_what_is_written_is_what_was_measured(data: Path, folds: list[str]) -> None:
    assert inference.main(["--cv", *folds, "--output", "out"]) == 0
    confusion = ConfusionMatrix(3, None)
    for number in range(6):
        assert Path(f"out/overlays/{number}.png").is_file()
        confusion.update(
            *(np.array(Image.open(folder / f"{number}.png")) for folder in (Path("out/masks"), data / "masks"))
        )
    assert metrics_of("out")["confusion_matrix"] == confusion.matrix.tolist()


def test_images_of_one_name_in_the_folders_of_different_folds_are_kept_apart(data: Path, folds: list[str]) -> None:
    """Named by where they lie below what is common to all folds, also where these spell the data's folder otherwise."""
    for kind in ("images", "masks"):
        for number in range(6):
            place = data / kind / f"site_{number // 2}" / f"{number % 2}.png"
            place.parent.mkdir(exist_ok=True)
            (data / kind / f"{number}.png").rename(place)
        for fold in range(3):
            lines = "".join(f"{kind}/site_{fold}/{number}.png\n" for number in range(2))
            (data / "splits" / f"fold_{fold}_val_{kind}.txt").write_text(lines)
    Path("link").symlink_to(data)
    linked = speckled_run(Path("runs/linked"), Path("link"), fold=2, speck=2, **{"data.splits_dir": "blocks/splits"})
    for third in (folds[2], str(linked)):
        assert inference.main(["--cv", *folds[:2], third, "--output", third.replace("runs", "out")]) == 0
        confusion, masks = ConfusionMatrix(3, None), Path(third.replace("runs", "out"), "masks")
        for path in sorted(masks.rglob("*.png")):
            truth = data / "masks" / path.relative_to(masks)
            confusion.update(np.array(Image.open(path)), np.array(Image.open(truth)))
        assert len(list(masks.rglob("*.png"))) == 6
        assert metrics_of(str(masks.parent))["confusion_matrix"] == confusion.matrix.tolist()


def test_what_a_killed_run_left_is_removed_and_large_label_maps_lie_in_the_output_folder(
    folds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = Path("out/masks/0.png.12345.tmp")
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    monkeypatch.setattr(planes, "IN_MEMORY", 0)
    monkeypatch.setattr(tempfile, "tempdir", "there is no such folder")
    assert inference.main(["--cv", *folds, "--output", "out"]) == 0
    assert inference.main(["--cv", *folds, "--output", "new"]) == 0
    assert not left.exists() and len(list(Path("out/masks").iterdir())) == 6


def test_a_chain_of_another_checkpoint_is_not_used(
    folds: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    best = Path(folds[2], "weights", "best.pt")
    save_chain(best, parse_steps(["remove_small,area=5"]), {})
    other = speckled_run(Path("runs/trained_again"), Path("blocks"), fold=2, speck=1)
    (other / "weights" / "best.pt").replace(best)
    assert inference.main(["--cv", *folds, "--output", "out"]) == 0
    assert sum("tuned for another checkpoint than best.pt and is not used" in text for text in caplog.messages) == 1
    assert metrics_of("out")["folds"][2]["dice"] < 1.0 and metrics_of("out")["how"]["postprocess"] == []
    assert "Each fold's best epoch was chosen" in capsys.readouterr().out


def test_a_quoted_pattern_means_the_same_as_the_folders(folds: list[str]) -> None:
    assert inference.main(["--cv", *folds, "--output", "named"]) == 0
    assert inference.main(["--cv", "runs/my_fold_*", "--output", "pattern"]) == 0
    assert metrics_of("named") == metrics_of("pattern")


def test_groups_that_reach_over_folds_are_resampled_as_a_whole(data: Path, folds: list[str]) -> None:
    write_groups(data, {number: "ab"[number % 2] for number in range(6)})
    assert inference.main(["--cv", *folds, "--output", "out"]) == 0
    intervals = metrics_of("out")["intervals"]
    assert intervals["over"] == "groups" and intervals["num"] == 2


def test_each_fold_is_post_processed_by_its_own_chain(folds: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """And where a chain was tuned, that too has been chosen on these images."""
    save_chain(Path(folds[2], "weights", "best.pt"), parse_steps(["remove_small,area=5"]), {})
    assert inference.main(["--cv", *folds, "--output", "own"]) == 0
    own = metrics_of("own")
    assert [fold["dice"] == 1.0 for fold in own["folds"]] == [True, False, True]
    assert [len(fold["how"]["postprocess"]) for fold in own["folds"]] == [0, 0, 1]
    assert "Each fold's best epoch and its post-processing were chosen on these very" in capsys.readouterr().out
    assert inference.main(["--cv", *folds, "--output", "same", "--postprocess", "remove_small,area=5"]) == 0
    assert metrics_of("same")["dice"] == 1.0 and "postprocess" in metrics_of("same")["how"]
    assert "Each fold's best epoch was chosen" in capsys.readouterr().out


def test_a_fold_without_a_checkpoint_is_remarked_upon(folds: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert inference.main(["--cv", folds[1]]) == 0
    assert "Without fold 0, 2 of blocks/splits, for which no checkpoint was given." in capsys.readouterr().out
    assert metrics_of("runs/my_cv")["num_images"] == 2


def test_folds_that_do_not_belong_together_are_one_sentence(
    data: Path, folds: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    other = drawn_folds(Path("other"))
    refused = {
        "0.png is a validation image of both": speckled_run(Path("runs/again"), data, fold=0, speck=0),
        "was trained on blocks, but": speckled_run(Path("runs/other"), other, fold=1, speck=0),
        "has the classes": speckled_run(Path("runs/names"), data, 1, 0, **{"data.class_names": ["a", "b", "c"]}),
    }
    for problem, run_dir in refused.items():
        assert inference.main(["--cv", folds[0], str(run_dir)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and problem in error
    assert inference.main(["--cv", *folds, "--split", "val"]) == 2
    assert not Path("runs/my_cv").exists()
