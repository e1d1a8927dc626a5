"""The main job on real images, where there are some (ML_SRC_DATA names the folder); nothing is written beside them."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ml_src.cli import inference, init_config, split, train
from ml_src.core.config_file import load_config

TINY = ["--num_epochs", "1", "--num_workers", "0"]


def linked(real_data: Path, name: str) -> Path:
    """A folder of our own under data/ that shows a real data set's images and masks."""
    source = real_data / name
    if not source.is_dir():
        pytest.skip(f"no {source}")
    data = Path("data") / name
    data.mkdir(parents=True)
    for part in ("images", "masks", "classes.txt"):
        if (source / part).exists():
            (data / part).symlink_to(source / part)
    return data


def split_of(data: Path, *words: str) -> int:
    folders = ["--raw_data", str(data / "images"), "--mask_data", str(data / "masks")]
    return split.main([*folders, "--folds", "5", "--task", "segmentation", *words])


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "num_classes", "channels", "size"),
    [("isbi2012_em", 2, 1, 64), ("dsb2018_nuclei", 2, 3, 64), ("magnetic_tile_defects", 6, 1, 32)],
)
def test_from_folders_to_masks_of_the_images_own_sizes(
    real_data: Path, name: str, num_classes: int, channels: int, size: int
) -> None:
    """The quick start as a user types it, with a tiny network for one epoch."""
    data = linked(real_data, name)
    assert split_of(data, "--stratified") == 0
    assert init_config.main([str(data), "--task", "segmentation"]) == 0
    path = Path(f"configs/{name}_config.yaml")
    config = load_config(path)
    assert (config.data.num_classes, config.model.in_channels) == (num_classes, channels)
    normalize = config.val_transforms[-1].model_dump(mode="json")
    transforms = f"transforms.train=[{{type: resize, size: [{size}, {size}]}}, {normalize}]"
    words = ["model.base_channels=2", "transforms.val=null", transforms]
    assert train.main(["--config", str(path), *TINY, "--set", *words]) == 0
    run = Path(f"runs/{name}_fold_0")
    assert inference.main(["--checkpoint_path", str(run / "weights/best.pt")]) == 0
    lines = (data / "splits/test_images.txt").read_text().splitlines()
    for line in lines:
        with Image.open(data / line) as image, Image.open(run / f"inference/test/masks/{Path(line).stem}.png") as mask:
            assert mask.size == image.size and mask.mode == "P"
            assert np.array(mask).max() < num_classes


def test_blocks_of_neighbouring_sections_never_straddle_a_split(real_data: Path) -> None:
    data = linked(real_data, "isbi2012_em")
    with Path("blocks.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "group"])
        writer.writerows([f"{number:02}", f"block {number // 5}"] for number in range(30))
    assert split_of(data, "--groups", "blocks.csv") == 0
    for name in ("test", *(f"fold_{k}_val" for k in range(5))):
        numbers = [int(Path(line).stem) for line in (data / f"splits/{name}_images.txt").read_text().splitlines()]
        assert len(numbers) == 5 and len({number // 5 for number in numbers}) == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing_pairs", "8 images have no mask of the same stem"),
        ("rgb_coded_masks_png", "no mask of the same stem: 001_image.png"),
    ],
)
def test_dirty_folders_are_refused_with_the_cause_first(
    real_data: Path, name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = linked(real_data / "dirty", name)
    assert split_of(data) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert not (data / "splits").exists()


def test_masks_of_0_and_255_are_never_taken_for_unlabelled(real_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = linked(real_data / "dirty", "mask_values_0_255")
    assert init_config.main([str(data)]) == 2
    assert "write class 1 as 1, not 255" in capsys.readouterr().err
