"""From ml-split to ml-inference with images that are not 8-bit RGB, with no conversion by the user."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image

from ml_src.cli import inference, init_config, split, train
from ml_src.core.checkpoint import load_checkpoint
from ml_src.core.data import headers

rasterio = pytest.importorskip("rasterio")

NARROW = ["--set", "model.base_channels=8"]  # enough to learn what these masks are, in seconds


def write_scenes(data: Path, dtype: str, bands: int, side: int, suffix: str = ".tif") -> None:
    """Two classes that differ in the last band; a corner of every image has no data."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (data / kind).mkdir(parents=True)
    place = rasterio.transform.from_origin(300_000, 5_800_000, 10, 10)
    level = 100 if dtype == "uint8" else 1000
    for index in range(7):
        mask = np.zeros((side, side), np.uint8)
        top, left = rng.integers(0, side // 2, 2)
        mask[top : top + side // 2, left : left + side // 2] = 1
        image = level * rng.normal(1, 0.05, (side, side, bands))
        image[:, :, -1] += 0.4 * level * mask
        image = image.astype(dtype)
        image[:5, :7] = nodata = -32768 if dtype == "int16" else 0
        Image.fromarray(mask).save(data / "masks" / f"{index}.png")
        how = {"driver": "GTiff", "crs": "EPSG:32633", "transform": place, "nodata": nodata}
        how |= {"tiled": True, "blockxsize": 16, "blockysize": 16}
        with rasterio.open(
            data / "images" / f"{index}.tif", "w", height=side, width=side, count=bands, dtype=dtype, **how
        ) as raster:
            raster.write(image.transpose(2, 0, 1))


def learn(data: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> dict[str, Any]:
    """Run the four commands in the folder of the data and return the checkpoint."""
    monkeypatch.chdir(data.parent)
    folders = ["--raw_data", str(data / "images"), "--mask_data", str(data / "masks")]
    assert split.main([*folders, "--folds", "2"]) == 0
    assert init_config.main([str(data), "--task", "segmentation", "--output", "c.yaml", "--yes"]) == 0
    assert train.main(["--config", "c.yaml", "--num_workers", "0", "--run_name", "r", *flags]) == 0
    best = Path("runs/r_fold_0/weights/best.pt")
    assert inference.main(["--checkpoint_path", str(best)]) == 0
    assert len(list(Path("runs/r_fold_0/inference/test/overlays").glob("*.png"))) == 1
    return load_checkpoint(best)


@pytest.mark.parametrize("dtype", ["int16", "float32", "uint16"])
def test_bands_of_any_number_type_are_learned_from(tmp_path, monkeypatch, dtype):
    write_scenes(tmp_path / "data", dtype, bands=5, side=32)
    checkpoint = learn(tmp_path / "data", monkeypatch, "--num_epochs", "6", "--lr", "0.01", *NARROW)
    assert checkpoint["metrics"]["val_iou"] > 0.75
    normalize = checkpoint["config"]["transforms"]["train"][-1]
    unit = 65535 if dtype == "uint16" else 1
    assert len(normalize["mean"]) == 5 and all(950 < mean * unit < 1050 for mean in normalize["mean"][:4])
    assert 1050 < normalize["mean"][4] * unit < 1200, "nodata does not count"
    assert yaml.safe_load(Path("runs/r_fold_0/config.yaml").read_text())["transforms"]["train"][-1] == normalize


def test_scenes_are_learned_from_in_crops_at_their_own_resolution(tmp_path, monkeypatch):
    monkeypatch.setattr(headers, "MIN_WINDOWED", 1)
    write_scenes(tmp_path / "data", "uint8", bands=3, side=272)
    flags = ["--num_epochs", "1", "--batch_size", "2", *NARROW]
    checkpoint = learn(tmp_path / "data", monkeypatch, *flags)
    crop = checkpoint["config"]["transforms"]["train"][0]
    assert (crop["type"], list(crop["size"])) == ("random_crop", [256, 256])
    assert [line["type"] for line in checkpoint["config"]["transforms"]["val"]] == ["normalize"]


def test_gray_of_16_bits_is_stretched_by_its_own_statistics(tmp_path, monkeypatch):
    """12 bits in 16: by the full range it would be nearly black."""
    data, rng = tmp_path / "data", np.random.default_rng(0)
    for kind in ("images", "masks"):
        (data / kind).mkdir(parents=True)
    for index in range(6):
        mask = (rng.random((4, 4)) < 0.5).astype(np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        Image.fromarray(mask).save(data / "masks" / f"{index}.png")
        image = (rng.normal(2000, 100, (32, 32)) + 800.0 * mask).astype(np.uint16)
        if index % 2:
            Image.fromarray(image).save(data / "images" / f"{index}.png")
        else:
            tifffile.imwrite(data / "images" / f"{index}.tif", image)
    checkpoint = learn(data, monkeypatch, "--num_epochs", "8", "--lr", "0.01", *NARROW)
    assert checkpoint["metrics"]["val_iou"] > 0.9
