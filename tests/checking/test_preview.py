"""The sheet of augmented samples: it shows what training draws, in the colours of its legend."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image

from ml_src.cli import split
from ml_src.core.checking.preview import MOST_BYTES, write_preview
from ml_src.core.config_file import load_config
from ml_src.core.data.files import find_pairs
from ml_src.core.data.segmentation import SampleKey, SegmentationDataset
from ml_src.core.data.split_files import read_split
from ml_src.core.errors import ConfigError, DataError
from ml_src.core.pictures import palette
from ml_src.core.transforms import build_transforms

SIDE = 64
GRAY = (187, 187, 187)
FLIPS = [{"type": "random_horizontal_flip"}, {"type": "random_brightness_contrast", "p": 1}]  # no draw twice
NORMALIZE = {"type": "normalize", "mean": [0.5], "std": [0.25]}


def noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_pairs(folder: Path, num_images: int, mask: np.ndarray, channels: int = 3) -> Path:
    """Write images of noise, all with one mask."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for index in range(num_images):
        Image.fromarray(noise((*mask.shape, channels), index)).save(folder / "images" / f"{index}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{index}.png")
    return folder


def write_config(folder: Path, transforms: list[dict[str, Any]], **data: Any) -> Path:
    path = folder / "config.yaml"
    raw = {
        "data": {"data_dir": str(folder), "num_classes": 2, **data},
        "transforms": {"train": [*transforms, NORMALIZE]},
    }
    path.write_text(yaml.safe_dump(raw))
    return path


def read_sheet(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.mode == "RGB"
        return np.array(picture)


def place_of(sheet: np.ndarray, picture: np.ndarray) -> tuple[int, int] | None:
    """Return (row, column) where a picture lies in the sheet, pixel for pixel."""
    height, width = picture.shape[:2]
    starts = (sheet[: -height + 1, : -width + 1] == picture[0, 0]).all(axis=2)
    for top, left in np.argwhere(starts).tolist():
        if np.array_equal(sheet[top : top + height, left : left + width], picture):
            return top, left
    return None


def fourfold(picture: np.ndarray) -> np.ndarray:
    return picture.repeat(4, axis=0).repeat(4, axis=1)


def last_row(sheet: np.ndarray) -> np.ndarray:
    """Return the last row of pictures, of which the first begins at the left and the lowest ends at the bottom."""
    ink = (sheet != 255).any(axis=2)
    bottom, left = np.flatnonzero(ink.any(axis=1))[-1] + 1, np.flatnonzero(ink[-100:].any(axis=0))[0]
    return sheet[bottom - 4 * SIDE : bottom, left:]


def test_each_row_is_an_image_and_then_what_five_epochs_of_training_make_of_it(tmp_path):
    data = write_pairs(tmp_path / "set", 2, np.zeros((SIDE, SIDE), np.uint8))
    path = write_config(data, FLIPS)
    sheet = read_sheet(write_preview(path, None, tmp_path / "sheet.png"))
    config = load_config(path)
    pairs = find_pairs(data / "images", data / "masks")
    drawn = SegmentationDataset(pairs, build_transforms(config.train_transforms, config.ignore_index), 3, config.seed)
    for index, pair in enumerate(pairs):
        expected = [np.asarray(Image.open(pair.image))]
        expected += [drawn[SampleKey(index, epoch)].image for epoch in range(5)]
        places = [place_of(sheet, fourfold(picture)) for picture in expected]
        assert None not in places
        assert len({top for top, _ in places}) == 1
        assert [left for _, left in places] == sorted({left for _, left in places})


def test_only_training_images_of_the_fold_are_shown(tmp_path):
    data = write_pairs(tmp_path / "set", 9, np.zeros((SIDE, SIDE), np.uint8))
    assert split.main(["--raw_data", str(data / "images"), "--mask_data", str(data / "masks"), "--folds", "2"]) == 0
    path = write_config(data, [], fold=1)
    sheet = read_sheet(write_preview(path, None, tmp_path / "sheet.png"))
    shown = {
        name: [place_of(sheet, fourfold(np.asarray(Image.open(pair.image)))) is not None for pair in pairs]
        for name in ("fold_1_train", "fold_1_val", "test")
        for pairs in [read_split(data / "splits", data, name)]
    }
    assert all(shown["fold_1_train"])
    assert not any(shown["fold_1_val"] + shown["test"])


def test_a_fold_that_is_not_there_is_an_error_that_names_those_that_are(tmp_path):
    data = write_pairs(tmp_path / "set", 9, np.zeros((SIDE, SIDE), np.uint8))
    assert split.main(["--raw_data", str(data / "images"), "--mask_data", str(data / "masks"), "--folds", "2"]) == 0
    with pytest.raises(DataError, match="choose a fold from 0 to 1"):
        write_preview(write_config(data, [], fold=7), None, tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()


def test_another_data_folder_takes_the_place_of_the_configured_one(tmp_path):
    mask = np.zeros((SIDE, SIDE), np.uint8)
    path = write_config(write_pairs(tmp_path / "one", 1, mask), [])
    other = write_pairs(tmp_path / "other", 1, mask)
    Image.fromarray(noise((SIDE, SIDE, 3), seed=100)).save(other / "images" / "0.png")
    sheet = read_sheet(write_preview(path, other, tmp_path / "sheet.png"))
    assert place_of(sheet, fourfold(noise((SIDE, SIDE, 3), seed=100))) is not None
    assert place_of(sheet, fourfold(noise((SIDE, SIDE, 3), seed=0))) is None


def test_the_legend_has_the_colour_of_each_class_that_is_shown_and_of_no_other(tmp_path):
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:20], mask[40:] = 1, 3
    path = write_config(write_pairs(tmp_path / "set", 1, mask), [], num_classes=5)
    sheet = read_sheet(write_preview(path, None, tmp_path / "sheet.png"))
    swatches = [place_of(sheet, np.full((16, 16, 3), colour, np.uint8)) is not None for colour in palette(5)]
    assert swatches == [False, True, False, True, False]  # class 0 is not coloured


@pytest.mark.parametrize("ignore_index", [0, 1, 300])
def test_ignored_pixels_and_no_others_are_hatched(tmp_path, ignore_index):
    mask = np.full((SIDE, SIDE), ignore_index, np.uint16)
    mask[:, SIDE // 2 :] = 2
    data = write_pairs(tmp_path / "set", 1, mask)
    Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(data / "images" / "0.png")
    path = write_config(data, [], num_classes=3, ignore_index=ignore_index)
    sheet = read_sheet(write_preview(path, None, tmp_path / "sheet.png"))
    hatched = (last_row(sheet)[:, : 4 * SIDE] == GRAY).all(axis=2)
    assert hatched[:, : 2 * SIDE].any(axis=0).all()
    assert not hatched[:, 2 * SIDE :].any()


def test_what_a_rotation_brings_in_from_outside_is_hatched(tmp_path):
    data = write_pairs(tmp_path / "set", 1, np.zeros((SIDE, SIDE), np.uint8))
    Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(data / "images" / "0.png")
    straight = read_sheet(write_preview(write_config(data, []), None, tmp_path / "straight.png"))
    turns = [{"type": "random_rotation", "degrees": 45}]
    turned = read_sheet(write_preview(write_config(data, turns), None, tmp_path / "turned.png"))
    num_gray, num_gray_turned = ((sheet == GRAY).all(axis=2).sum() for sheet in (straight, turned))
    assert num_gray_turned > num_gray + 1000


def test_even_pure_noise_stays_below_four_megabytes(tmp_path):
    data = write_pairs(tmp_path / "set", 7, np.zeros((300, 300), np.uint8))
    path = write_preview(write_config(data, [{"type": "random_vertical_flip"}]), None, tmp_path / "sheet.png")
    assert path == tmp_path / "sheet.png"
    assert path.stat().st_size < MOST_BYTES


@pytest.mark.parametrize(("dtype", "channels"), [(np.uint8, 1), (np.uint16, 2), (np.int16, 4), (np.float32, 7)])
def test_images_of_any_channels_and_number_type_become_visible(tmp_path, dtype, channels):
    data = write_pairs(tmp_path / "set", 2, np.zeros((40, 300), np.uint8))
    for index in range(2):
        (data / "images" / f"{index}.png").unlink()
        ramp = np.linspace(0, 100, 300).astype(dtype)
        pixels = np.broadcast_to(ramp[None, :, None], (40, 300, channels))
        options = {} if channels == 1 else {"planarconfig": "contig"}
        tifffile.imwrite(data / "images" / f"{index}.tif", pixels.squeeze(), photometric="minisblack", **options)
    path = write_config(data, [])
    raw = yaml.safe_load(path.read_text()) | {"model": {"in_channels": channels}}
    path.write_text(yaml.safe_dump(raw))
    sheet = read_sheet(write_preview(path, None, tmp_path / "sheet.png"))
    row = last_row(sheet)[-10, :250].mean(axis=1)  # the ramp, from left to right
    assert row[-1] > row[0] + 50 and (np.diff(row) >= 0).all()


def test_statistics_that_are_left_to_the_data_are_computed(tmp_path):
    data = write_pairs(tmp_path / "set", 2, np.zeros((SIDE, SIDE), np.uint8))
    path = write_config(data, [])
    raw = yaml.safe_load(path.read_text()) | {"transforms": {"train": [{"type": "normalize"}]}}
    path.write_text(yaml.safe_dump(raw))
    sheet = read_sheet(write_preview(path, None, tmp_path / "sheet.png"))
    assert place_of(sheet, fourfold(noise((SIDE, SIDE, 3), seed=0))) is not None


@pytest.mark.parametrize("name", ["sheet", "sheet.jpg", "config.yaml"])
def test_another_ending_is_refused_and_nothing_is_written(tmp_path, name):
    data = write_pairs(tmp_path / "set", 1, np.zeros((SIDE, SIDE), np.uint8))
    path = write_config(data, [])
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"give a name that ends in \.png"):
        write_preview(path, None, data / name)
    assert path.read_bytes() == before
    assert sorted(one.name for one in data.iterdir()) == ["config.yaml", "images", "masks"]


@pytest.mark.parametrize("name", ["images/0.png", "masks/0.png", "images/new.png", "masks/deep/new.png"])
def test_the_sheet_never_lies_among_the_data(tmp_path, name):
    data = write_pairs(tmp_path / "set", 1, np.zeros((SIDE, SIDE), np.uint8))
    path = write_config(data, [])
    (tmp_path / "link").symlink_to(data)
    before = {one: one.read_bytes() for one in data.rglob("*.png")}
    for output in (data / name, tmp_path / "link" / name, data / "images" / ".." / name):
        with pytest.raises(ConfigError, match="among the data: give a name elsewhere"):
            write_preview(path, None, output)
    assert {one: one.read_bytes() for one in data.rglob("*.png")} == before


def test_the_sheet_never_lies_among_masks_that_the_split_names(tmp_path):
    data = write_pairs(tmp_path / "set", 9, np.zeros((SIDE, SIDE), np.uint8))
    (data / "masks").rename(data / "labels")
    assert split.main(["--raw_data", str(data / "images"), "--mask_data", str(data / "labels"), "--folds", "2"]) == 0
    path = write_config(data, [])
    with pytest.raises(ConfigError, match="labels, among the data"):
        write_preview(path, None, data / "labels" / "0.png")


def test_a_sheet_takes_the_place_of_an_older_one(tmp_path):
    path = write_config(write_pairs(tmp_path / "set", 1, np.zeros((SIDE, SIDE), np.uint8)), [])
    (tmp_path / "sheet.png").write_bytes(b"older")
    sheet = read_sheet(write_preview(path, None, tmp_path / "sheet.png"))
    assert sheet.shape[0] > SIDE and sheet.shape[1] > 6 * SIDE
