"""ml-export as a user types it: one file whose masks are those of the checkpoint, or a sentence and no file."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from known_networks import Blurred, ByBrightness, drawn_data, member_of, write_gray
from PIL import Image
from torch import Tensor, nn

from ml_src.cli import export, inference
from ml_src.core.atomic import only_writer
from ml_src.core.checkpoint import CONTENTS, save_checkpoint
from ml_src.core.config_file import plain
from ml_src.core.deployment.benchmark import in_fresh_process
from ml_src.core.network.custom import MODEL_REGISTRY, SimpleUNet

SIZES = [(40, 52), (33, 90), (7, 1), (64, 64)]
BEST = Path("runs/cells_fold_0/weights/best.pt")
ONNX = BEST.with_suffix(".onnx")


class OtherwiseIfWide(Blurred):
    """Tells whether it is being exported, and then goes wrong beyond column 200."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        if not torch.compiler.is_exporting():
            return logits
        beyond = torch.relu(torch.arange(logits.shape[-1], dtype=torch.float32) - 200)
        return logits + beyond * torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)


@pytest.fixture(autouse=True)
def networks(registries_as_they_were: None) -> None:
    MODEL_REGISTRY["by_brightness"] = lambda **section: ByBrightness()
    MODEL_REGISTRY["blurred"] = lambda num_classes, **section: Blurred(num_classes)
    MODEL_REGISTRY["otherwise_if_wide"] = lambda num_classes, **section: OtherwiseIfWide(num_classes)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    drawn_data(Path("data"), SIZES)
    return Path("data")


def save(
    path: Path = BEST, network: str = "blurred", weights: Mapping[str, Any] | None = None, **overrides: Any
) -> Path:
    config = member_of(nn.Identity(), "data", **{"model.custom_architecture": network, **overrides}).config
    path.parent.mkdir(parents=True, exist_ok=True)
    empty = {key: kind() for key, kind in CONTENTS.items() if key != "format_version"}
    about = {"config": plain(config), "class_names": config.class_names, "model_state_dict": dict(weights or {})}
    save_checkpoint(path, {**empty, **about})
    return path


def run(*words: object) -> int:
    return export.main([str(word) for word in words])


def masks(checkpoint: Path, *words: object) -> dict[str, np.ndarray]:
    """The masks of ml-inference for all images, by name."""
    shutil.rmtree("masks", ignore_errors=True)
    line = ["--checkpoint_path", checkpoint, "--input", "data/images", "--output", "masks", *words]
    assert inference.main([str(word) for word in line]) == 0
    return {path.name: np.asarray(Image.open(path)) for path in sorted(Path("masks/masks").iterdir())}


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one sentence that a command answers with."""
    capsys.readouterr()
    assert run(*words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines and lines[-1].startswith("error: ")
    return lines[-1]


def test_the_file_lies_beside_the_checkpoint_with_its_card_and_its_proof(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save()
    assert run("--checkpoint", BEST, "--validate") == 0
    said = capsys.readouterr().out
    assert "PASS: 100.0000 % of the labels are equal" in said
    assert f"Next: ml-inference --checkpoint_path {ONNX} --input FOLDER" in said
    names = {"best.pt", "best.onnx", "best.validation.json", "MODEL_CARD.md"}
    assert {path.name for path in BEST.parent.iterdir()} == names
    proof = json.loads(ONNX.with_suffix(".validation.json").read_text())
    assert proof["verdict"] == "PASS" and proof["num_images"] == len(SIZES)
    assert "| cell |" in ONNX.with_name("MODEL_CARD.md").read_text()


@pytest.mark.parametrize(
    "words",
    [[], ["--tile", 64, "--overlap", 0.3], ["--tta_augmentations", "rotate_90", "scale_1.5", "brightness", "contrast"]],
    ids=["whole", "tiles", "views"],
)
def test_its_masks_are_those_of_the_checkpoint(data: Path, words: list[object]) -> None:
    save(**{"inference.postprocess": [{"type": "remove_small", "area": 140}]})
    assert run("--checkpoint", BEST) == 0
    expected, found = masks(BEST, *words), masks(ONNX, *words)
    assert len(expected) == len(SIZES) and expected.keys() == found.keys()
    for name, mask in expected.items():
        assert np.array_equal(found[name], mask)
    plainly = masks(BEST, *words, "--postprocess", "none")
    assert any(not np.array_equal(plainly[name], mask) for name, mask in expected.items())


def test_a_split_has_the_same_scores_by_the_file(data: Path) -> None:
    save()
    assert run("--checkpoint", BEST) == 0
    reports = []
    for path, folder in ((BEST, "a"), (ONNX, "b")):
        assert inference.main(["--checkpoint_path", str(path), "--split", "val", "--output", folder]) == 0
        reports.append(json.loads(Path(folder, "metrics.json").read_text()))
    for key in ("iou", "dice", "confusion_matrix", "boundaries", "per_image"):
        assert reports[0][key] == reports[1][key]


def test_several_checkpoints_become_one_graph_that_averages(data: Path) -> None:
    other = save(Path("runs/cells_fold_1/weights/best.pt"), "by_brightness")
    save()
    both = Path("runs/cells_fold_0/weights/ensemble.onnx")
    assert run("--checkpoint", "runs/cells_fold_*", "--ensemble_weights", 3, 1, "--validate") == 0
    found = masks(both)
    line = ["--ensemble", BEST, other, "--ensemble_aggregation", "weighted", "--ensemble_weights", 3, 1,
            "--input", "data/images", "--output", "together"]  # fmt: skip
    assert inference.main([str(word) for word in line]) == 0
    for name, mask in found.items():
        assert np.array_equal(np.asarray(Image.open(Path("together/masks", name))), mask)


def test_a_file_that_predicts_something_else_fails_and_is_kept_under_another_name(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(data)
    drawn_data(data, [(20, 320), (30, 40)])
    save(network="otherwise_if_wide")
    ONNX.write_bytes(b"an older one")
    assert run("--checkpoint", BEST, "--validate") == 1
    assert "FAIL: " in (said := capsys.readouterr().out) and "Not to be used: best.failed.onnx" in said
    assert ONNX.read_bytes() == b"an older one"
    assert json.loads(ONNX.with_name("best.failed.validation.json").read_text())["verdict"] == "FAIL"
    assert ONNX.with_name("best.failed.onnx").stat().st_size > 100
    assert not ONNX.with_name("MODEL_CARD.md").exists()


def test_without_images_it_is_validated_on_noise(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save()
    shutil.rmtree(data)
    assert run("--checkpoint", BEST, "--validate") == 0
    said = capsys.readouterr().out
    assert "8 pictures of smooth noise" in said and "PASS" in said and "No pixel is labelled" in said


@pytest.mark.parametrize(("words", "expected"), [
    (["--checkpoint", "gone.pt"], "gone.pt does not exist"),
    (["--checkpoint", "gone_*"], "gone_* fits no file"),
    (["--checkpoint", "text.pt"], "text.pt is not a checkpoint"),
    (["--checkpoint", "best.onnx"], "best.onnx is an exported file already: give the checkpoint"),
    (["--checkpoint", BEST, "--output", "runs"], "--output runs is a folder"),
    (["--checkpoint", BEST, "--output", "a.pt"], "a file of --format onnx ends in .onnx"),
    (["--checkpoint", BEST, "--opset", 12], "--opset 12 is not offered: give 18 to"),
    (["--checkpoint", BEST, "--input_size", "512"], "'512' is no size: write height and width"),
    (["--checkpoint", BEST, "--input_size", "0,4"], "'0,4' is no size"),
    (["--checkpoint", BEST, "--precision", "int8", "--format", "torchscript"], "--precision int8 is for onnx and"),
    (["--checkpoint", BEST, "--precision", "fp16", "--format", "torchscript"], "torchscript is written in fp32"),
    (["--checkpoint", BEST, "--ensemble_weights", 1, 2], "--ensemble_weights has 2 numbers for 1 checkpoints"),
    (["--checkpoint", BEST, BEST], "is named twice"),
    (["--checkpoint", BEST, "--precision", "int8", "--input_size", "64,64"], "leave out --input_size, or take fp16"),
    (["--checkpoint", BEST, "--format", "safetensors", "--layout", "NCHW"], "safetensors has no layout"),
    (["--checkpoint", BEST, "--format", "torchscript", "--opset", 19], "torchscript has no opset"),
    (["--checkpoint", BEST, "--data_dir", "gone"], "gone is not here"),
    ([], "--checkpoint"),
])  # fmt: skip
def test_what_cannot_be_is_one_sentence_and_no_file(
    data: Path, capsys: pytest.CaptureFixture[str], words: list[object], expected: str
) -> None:
    save()
    Path("text.pt").write_text("no checkpoint")
    Path("best.onnx").write_text("an exported file")
    before = sorted(Path().rglob("*"))
    assert expected in refused(capsys, *words)
    assert sorted(Path().rglob("*")) == before


def test_int8_without_images_is_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save()
    shutil.rmtree(data)
    assert "--precision int8 needs the validation images of data" in refused(
        capsys, "--checkpoint", BEST, "--precision", "int8"
    )
    assert [path.name for path in BEST.parent.iterdir()] == ["best.pt"]


def test_members_that_take_other_images_are_not_one_graph(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save()
    resized = [{"type": "resize", "size": [64, 64]}, {"type": "normalize", "mean": [0.0], "std": [1.0]}]
    save(Path("runs/cells_fold_1/weights/best.pt"), **{"transforms.train": resized})
    assert "take different images" in refused(capsys, "--checkpoint", "runs/cells_fold_*")


@pytest.mark.parametrize(("words", "expected"), [
    (["--compile"], "--compile is for checkpoints"),
    (["--device", "cuda"], "cuda"),
])  # fmt: skip
def test_flags_that_are_not_for_exported_files_are_refused(
    data: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    save()
    assert run("--checkpoint", BEST) == 0
    assert inference.main(["--checkpoint_path", str(ONNX), "--input", "data/images", *words]) == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]


def test_where_images_are_large_the_file_keeps_to_max_ram(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    save()
    assert run("--checkpoint", BEST) == 0
    expected = masks(ONNX)
    caplog.clear()
    found = masks(ONNX, "--max_ram", "3G")
    assert "--max_ram 3G: tiles of" in caplog.text
    assert all(np.array_equal(found[name], mask) for name, mask in expected.items())


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "accelerate", "tensorboard", "onnx"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from ml_src.cli.inference import main
sys.exit(main(sys.argv[1:]))
"""


def test_it_predicts_where_there_is_no_torch(data: Path) -> None:
    save()
    assert run("--checkpoint", BEST) == 0
    expected = masks(BEST)
    words = ["--checkpoint_path", str(ONNX), "--input", "data/images", "--output", "free", "--overlay", "--tta",
             "--uncertainty", "--save_probs"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", BLOCKED, *words], capture_output=True, text=True, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in expected:
        assert Path("free/overlays", name).is_file()
    split = [sys.executable, "-c", BLOCKED, "--checkpoint_path", str(ONNX), "--split", "val", "--output", "split"]
    done = subprocess.run(split, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Mean IoU" in done.stdout, done.stderr
    for path in sorted(Path("split/masks").iterdir()):
        assert np.array_equal(np.asarray(Image.open(path)), expected[path.name])
    checkpoint = [sys.executable, "-c", BLOCKED, "--checkpoint_path", str(BEST), "--input", "data/images"]
    done = subprocess.run(checkpoint, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "needs PyTorch: run pip install 'ml-src[train]'" in done.stderr


def test_a_proof_is_of_the_file_that_it_lies_beside(data: Path) -> None:
    save()
    proof = ONNX.with_suffix(".validation.json")
    assert run("--checkpoint", BEST, "--validate") == 0
    assert json.loads(proof.read_text())["sha256"] == hashlib.sha256(ONNX.read_bytes()).hexdigest()
    assert run("--checkpoint", BEST, "--layout", "NCHW") == 0
    assert not proof.exists()


def test_a_missing_validation_image_is_named_and_noise_does_not_take_its_place(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save()
    (data / "images/2.png").unlink()
    assert "2.png" in refused(capsys, "--checkpoint", BEST, "--validate")
    assert not ONNX.exists()


def test_an_ensemble_of_folds_is_compared_and_measured_on_images_that_none_has_seen(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save()
    save(Path("runs/cells_fold_1/weights/best.pt"), **{"data.fold": 1})
    for kind in ("images", "masks"):
        splits = data / "splits"
        shutil.copy(splits / f"fold_0_val_{kind}.txt", splits / f"fold_1_val_{kind}.txt")
        shutil.copy(splits / f"fold_0_train_{kind}.txt", splits / f"fold_1_train_{kind}.txt")
        (splits / f"test_{kind}.txt").write_text(f"{kind}/3.png\n")
    assert run("--checkpoint", "runs/cells_fold_*", "--validate") == 0
    both = Path("runs/cells_fold_0/weights/ensemble.onnx")
    assert json.loads(both.with_suffix(".validation.json").read_text())["num_images"] == 1
    for words in (["--checkpoint_path", both, "--split", "val"], ["--cv", both]):
        capsys.readouterr()
        assert inference.main([str(word) for word in words]) == 2
        assert "holds networks of 2 folds" in capsys.readouterr().err
    assert inference.main(["--checkpoint_path", str(both)]) == 0


def test_the_steps_of_an_exported_file_are_not_tuned(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save()
    assert run("--checkpoint", BEST) == 0
    assert inference.main(["--checkpoint_path", str(ONNX), "--tune_postprocess"]) == 2
    assert "tune the checkpoint, then export it" in capsys.readouterr().err


def test_an_image_of_another_number_type_fails_alone_unless_the_file_takes_all(data: Path) -> None:
    save()
    Image.fromarray(np.full((20, 30), 40000, np.uint16)).save(data / "images/deep.png")
    line = ["--input", str(data / "images"), "--output", "out", "--checkpoint_path"]
    assert run("--checkpoint", BEST, "--input_type", "uint8") == 0
    assert inference.main([*line, str(ONNX)]) == 2
    assert len(list(Path("out/masks").iterdir())) == len(SIZES)
    assert run("--checkpoint", BEST, "--input_type", "float32", "--output", "all.onnx") == 0
    expected, found = masks(BEST), masks(Path("all.onnx"))
    assert len(found) == len(SIZES) + 1
    assert all(np.array_equal(found[name], mask) for name, mask in expected.items())


@pytest.mark.parametrize("words", [["--input_type", "uint16"], ["--input_type", "uint8", "--input_size", "96,64"]])
def test_files_of_another_type_or_one_size_keep_to_max_ram_too(data: Path, words: list[str]) -> None:
    save()
    for path in (data / "images").iterdir():
        pixels = np.asarray(Image.open(path))
        Image.fromarray(pixels.astype(np.uint16) * 257 if "uint16" in words else pixels).save(path)
    assert run("--checkpoint", BEST, *words) == 0
    expected, found = masks(BEST, "--tile", 64), masks(ONNX, "--tile", 64, "--max_ram", "3G")
    assert all(np.array_equal(found[name], mask) for name, mask in expected.items())


def test_a_name_with_brackets_is_a_name(data: Path) -> None:
    save()
    assert run("--checkpoint", BEST, "--output", "b[1].onnx") == 0
    assert Path("b[1].onnx").is_file() and Path("MODEL_CARD.md").is_file()


def test_two_exports_to_one_file_do_not_meet(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save()
    with only_writer(ONNX.with_name(".best.onnx.export")):
        assert "another process is writing" in refused(capsys, "--checkpoint", BEST)
    assert run("--checkpoint", BEST) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_an_ensemble_of_files_takes_no_more_memory_than_max_ram(data: Path) -> None:
    """Each engine keeps what a prediction took, so that it adds up."""
    network = SimpleUNet(1, 3, base_channels=16)
    path = save(Path("runs/wide_fold_0/weights/best.pt"), "simple_unet", network.state_dict(),
                **{"model.base_channels": 16, "model.num_classes": 3})  # fmt: skip
    assert run("--checkpoint", path, "--input_type", "uint8") == 0
    for fold in (1, 2):  # what a file computes is no matter here
        shutil.copytree("runs/wide_fold_0", f"runs/wide_fold_{fold}")
    write_gray(Path("large.png"), 800, 1000)
    files = [f"runs/wide_fold_{fold}/weights/best.onnx" for fold in range(3)]
    words = ["-m", "ml_src.cli.inference", "--ensemble", *files, "--input", "large.png", "--output", "out",
             "--tile", "1024", "--batch_size", "2", "--max_ram", "1G"]  # fmt: skip
    assert 300 << 20 < in_fresh_process(words).peak_bytes <= 1 << 30


def test_a_card_is_not_replaced_by_that_of_another_file(data: Path) -> None:
    save()
    assert run("--checkpoint", BEST) == 0
    first = ONNX.with_name("MODEL_CARD.md").read_text()
    assert run("--checkpoint", BEST, "--format", "safetensors") == 0
    assert ONNX.with_name("MODEL_CARD.md").read_text() == first and "best.onnx" in first
    assert "best.safetensors" in ONNX.with_name("best.safetensors.MODEL_CARD.md").read_text()
    assert run("--checkpoint", BEST, "--layout", "NCHW") == 0
    assert ONNX.with_name("MODEL_CARD.md").read_text() != first


def test_a_type_that_the_images_have_not_is_refused_before_the_work(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save()
    said = refused(capsys, "--checkpoint", BEST, "--validate", "--input_type", "uint16")
    assert "the validation images are uint8" in said
