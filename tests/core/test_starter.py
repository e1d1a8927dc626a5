"""ml-init-config: what it reads off the data, what it writes, and that it never blocks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from ml_src.cli import init_config, split
from ml_src.core.config_file import load_config
from ml_src.core.data.files import find_pairs, read_image
from ml_src.core.starter import sampled_statistics, training_size


def draw(data: Path, images: list[np.ndarray], masks: list[np.ndarray], suffix: str = ".png") -> Path:
    for kind, arrays in (("images", images), ("masks", masks)):
        (data / kind).mkdir(parents=True)
        for number, array in enumerate(arrays):
            Image.fromarray(array).save(data / kind / f"{number}{suffix if kind == 'images' else '.png'}")
    return data


def gray(size: tuple[int, int] = (20, 30), number: int = 4) -> list[np.ndarray]:
    return [np.random.default_rng(i).integers(0, 256, size, dtype=np.uint8) for i in range(number)]


def masks_of(values: list[int], size: tuple[int, int] = (20, 30), number: int = 4) -> list[np.ndarray]:
    return [np.resize(np.array(values, np.uint8), size) for _ in range(number)]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_gray_images_and_ignored_pixels_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    draw(Path("data/a"), gray(), masks_of([0, 1, 2, 255]))
    assert init_config.main(["data/a", "--task", "segmentation"]) == 0
    config = load_config(Path("configs/a_config.yaml"))
    assert (config.data.num_classes, config.data.ignore_index, config.model.in_channels) == (3, 255, 1)
    assert config.data.class_names == ["background", "class_1", "class_2"]
    assert config.val_transforms[0].size == (20, 30)
    text = capsys.readouterr().out
    assert (
        "4, gray, uint8" in text and "25.0% (value 255)" in text and "Next: ml-split --raw_data data/a/images" in text
    )


def test_every_choice_says_why() -> None:
    draw(Path("data/a"), gray(), masks_of([0, 1]))
    assert init_config.main(["data/a"]) == 0
    lines = Path("configs/a_config.yaml").read_text().splitlines()
    for key in ("class_names", "in_channels", "base_channels", "loss", "batch_size", "num_epochs", "- {type: resize"):
        explained = [line for line in lines if key in line and ("  # " in line or line == "loss:")]
        assert explained, key


def test_names_come_from_classes_txt_and_count_classes_without_a_pixel() -> None:
    data = draw(Path("data/a"), gray(), masks_of([0, 1]))
    (data / "classes.txt").write_text("ground\nhouse\nlake\n")
    assert init_config.main(["data/a"]) == 0
    assert load_config(Path("configs/a_config.yaml")).data.class_names == ["ground", "house", "lake"]


def test_a_class_named_void_is_taken_as_unlabelled(capsys: pytest.CaptureFixture[str]) -> None:
    data = draw(Path("data/a"), gray(), masks_of([0, 1, 2, 2]))
    (data / "classes.txt").write_text("ground\nhouse\nVoid\n")
    assert init_config.main(["data/a"]) == 0
    config = load_config(Path("configs/a_config.yaml"))
    assert (config.data.num_classes, config.data.ignore_index) == (3, 2)
    assert "by the name of this class" in Path("configs/a_config.yaml").read_text()
    assert "(value 2)" in capsys.readouterr().out


def test_flags_land_in_the_file() -> None:
    draw(Path("data/a"), gray(), masks_of([0, 1]))
    assert (
        init_config.main(["data/a", "--batch_size", "3", "--num-epochs", "7", "--lr", "1e-4", "--output", "b.yaml"])
        == 0
    )
    config = load_config(Path("b.yaml"))
    assert (config.training.batch_size, config.training.num_epochs, config.optimizer.lr) == (3, 7, 1e-4)


def test_a_changed_file_is_not_overwritten_without_a_word_and_nothing_waits_for_an_answer() -> None:
    draw(Path("data/a"), gray(), masks_of([0, 1]))
    command = [sys.executable, "-m", "ml_src.cli.init_config", "data/a"]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, timeout=60).returncode == 0
    assert subprocess.run(command, stdin=subprocess.DEVNULL, timeout=60).returncode == 0, "the same file is no conflict"
    path = Path("configs/a_config.yaml")
    path.write_text(path.read_text() + "seed: 7\n")
    done = subprocess.run(command, stdin=subprocess.DEVNULL, timeout=60, capture_output=True, text=True)
    assert done.returncode == 2 and "give --yes to overwrite it" in done.stderr
    assert path.read_text().endswith("seed: 7\n")
    assert subprocess.run([*command, "--yes"], stdin=subprocess.DEVNULL, timeout=60).returncode == 0
    assert not path.read_text().endswith("seed: 7\n")


def test_the_first_line_points_an_editor_to_a_schema_that_accepts_the_file() -> None:
    draw(Path("data/a"), gray(), masks_of([0, 1]))
    assert init_config.main(["data/a"]) == 0
    path = Path("configs/a_config.yaml")
    first = path.read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=config.schema.json"
    schema = json.loads((path.parent / "config.schema.json").read_text())
    raw: dict[str, Any] = yaml.safe_load(path.read_text())
    assert raw.keys() <= schema["properties"].keys()


def test_masks_of_0_and_255_are_recognised(capsys: pytest.CaptureFixture[str]) -> None:
    draw(Path("data/a"), gray(), masks_of([0, 255]))
    assert init_config.main(["data/a"]) == 2
    assert "have the values 0 and 255 only: write class 1 as 1, not 255" in capsys.readouterr().err
    assert not Path("configs").exists()


def test_the_number_of_steps_an_epoch_follows_the_split() -> None:
    data = draw(Path("data/a"), gray((8, 8), 60), masks_of([0, 1], (8, 8), 60))
    arguments = ["--raw_data", str(data / "images"), "--mask_data", str(data / "masks"), "--folds", "5"]
    assert split.main([*arguments, "--task", "segmentation"]) == 0
    assert init_config.main(["data/a"]) == 0
    assert load_config(Path("configs/a_config.yaml")).training.batch_size == 4


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(37, 53)] * 3, (37, 53)),
        ([(1024, 1024)] * 3, (512, 512)),
        ([(256, 256), (256, 320), (1040, 1388)], (256, 320)),
        ([(2000, 1000), (2000, 1000)], (512, 256)),
        ([(10, 4000)], (16, 512)),
        ([(3, 5), (4, 4)], (16, 16)),
    ],
)
def test_the_training_size_is_the_median_within_bounds(sizes: list[tuple[int, int]], expected: tuple[int, int]) -> None:
    assert training_size(sizes) == expected


@pytest.mark.parametrize("channels", [1, 3])
def test_sampled_statistics_are_those_of_all_pixels(channels: int) -> None:
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 200, (10 + i, 12, 3), dtype=np.uint8) for i in range(5)]
    data = draw(Path("d"), images, [np.zeros(image.shape[:2], np.uint8) for image in images])
    pairs = find_pairs(data / "images", data / "masks")
    pixels = np.concatenate([read_image(p.image, channels).pixels.reshape(-1, channels) for p in pairs]) / 255
    mean, std = sampled_statistics(pairs, channels)
    assert mean == pytest.approx(pixels.mean(axis=0), abs=1e-4)
    assert std == pytest.approx(pixels.std(axis=0), abs=1e-4)


def test_masks_are_those_that_were_split() -> None:
    """As after ml-check --fix, whose masks are in a folder of their own."""
    data = draw(Path("data/a"), gray((8, 8), 8), masks_of([0, 255], (8, 8), 8))
    (data / "masks_fixed").mkdir()
    for path in (data / "masks").iterdir():
        Image.fromarray(np.array(Image.open(path)) // 255).save(data / "masks_fixed" / path.name)
    arguments = ["--raw_data", str(data / "images"), "--mask_data", str(data / "masks_fixed"), "--folds", "2"]
    assert split.main([*arguments, "--task", "segmentation"]) == 0
    assert init_config.main(["data/a"]) == 0
    assert yaml.safe_load(Path("configs/a_config.yaml").read_text())["data"]["num_classes"] == 2


def test_16_bit_images_leave_their_statistics_to_the_training_images() -> None:
    images = [image.astype(np.uint16) * 200 for image in gray()]
    draw(Path("data/a"), images, masks_of([0, 1]))
    assert init_config.main(["data/a"]) == 0
    lists = yaml.safe_load(Path("configs/a_config.yaml").read_text())["transforms"]
    for name in ("train", "val"):
        assert lists[name][-1] == {"type": "normalize", "mean": "data", "std": "data"}


def test_images_of_unlike_number_types_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    images = gray()
    images[1] = images[1].astype(np.uint16) * 200
    draw(Path("data/a"), images, masks_of([0, 1]))
    assert init_config.main(["data/a"]) == 2
    assert "1.png has uint16 pixels but most have uint8: convert it" in capsys.readouterr().err
