"""Samples of large scenes: crops are read alone, classes are found, nodata is ignored."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter

from ml_src.core.data import headers, segmentation
from ml_src.core.data.checks import scan
from ml_src.core.data.files import Pair
from ml_src.core.data.segmentation import LargePair, SampleKey, SegmentationDataset, read_truth
from ml_src.core.errors import DataError
from ml_src.core.transform_specs import TrainTransform
from ml_src.core.transforms import build_transforms

SIDE = 96


def pipeline(*lines: dict[str, Any], ignore_index: int = 255) -> Any:
    return build_transforms(TypeAdapter(list[TrainTransform]).validate_python(list(lines)), ignore_index)


def scene(tmp_path: Path, mask_suffix: str = ".tif") -> tuple[Pair, NDArray[Any], NDArray[Any]]:
    """An image whose pixels tell their place, a mask with one rare class."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    image = np.stack([rows, columns, rows + columns], axis=2).astype(np.uint8)
    mask = (columns // 32).astype(np.uint8)
    mask[70:73, 80:84] = 7
    pair = Pair(tmp_path / "a.tif", tmp_path / f"a_mask{mask_suffix}")
    tifffile.imwrite(pair.image, image, photometric="rgb", tile=(16, 16))
    if mask_suffix == ".tif":
        tifffile.imwrite(pair.mask, mask, tile=(16, 16))
    else:
        Image.fromarray(mask).save(pair.mask)
    return pair, image, mask


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scene of 96 pixels is large, and its classes are counted in blocks of 20."""
    monkeypatch.setattr(headers, "MIN_WINDOWED", 1)
    monkeypatch.setattr(segmentation, "BLOCK", 20)
    segmentation._blocks_with.cache_clear()


def source_of(pair: Pair) -> LargePair:
    return LargePair(pair, (SIDE, SIDE), 3, np.zeros(1), 255, with_masks=True)


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_a_crop_of_a_scene_is_that_part_of_it(tmp_path, large, suffix):
    pair, image, mask = scene(tmp_path, suffix)
    dataset = SegmentationDataset([pair], pipeline({"type": "random_crop", "size": [24, 30]}), 3, seed=0)
    for sample in range(20):
        pixels, labels, size = dataset[SampleKey(sample)]
        top, left = int(pixels[0, 0, 0]), int(pixels[0, 0, 1])
        assert np.array_equal(pixels, image[top : top + 24, left : left + 30])
        assert np.array_equal(labels, mask[top : top + 24, left : left + 30])
        assert size == (SIDE, SIDE)


@pytest.mark.parametrize(
    "lines",
    [
        [{"type": "random_crop", "size": [24, 30]}, {"type": "random_rotate90", "p": 1}],
        [{"type": "random_horizontal_flip"}, {"type": "random_crop", "size": [24, 30], "classes": [7]}],
        [{"type": "resize", "size": [40, 50]}],
    ],
)
def test_a_scene_gives_the_samples_that_it_would_give_in_memory(tmp_path, monkeypatch, lines):
    pair, _, _ = scene(tmp_path)
    samples = []
    for least in (1 << 40, 1):
        monkeypatch.setattr(headers, "MIN_WINDOWED", least)
        dataset = SegmentationDataset([pair], pipeline(*lines), 3, seed=0)
        samples.append([dataset[SampleKey(0, epoch)] for epoch in range(4)])
    for whole, part in zip(*samples, strict=True):
        if "classes" not in str(lines):  # there the place is drawn from blocks, in another order
            assert np.array_equal(whole.image, part.image) and np.array_equal(whole.mask, part.mask)
        assert whole.image.shape == part.image.shape and whole.size == part.size


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_a_pixel_of_a_class_is_drawn_evenly_from_all_that_it_has(tmp_path, large, suffix):
    pair, _, mask = scene(tmp_path, suffix)
    source, rng = source_of(pair), np.random.default_rng(0)
    found = [source.find(7, rng) for _ in range(600)]
    places = {place for place in found if place is not None}
    assert places == {(int(row), int(column)) for row, column in np.argwhere(mask == 7)}
    counts = [found.count(place) for place in places]
    assert min(counts) > 25 and max(counts) < 85  # 50 each, five standard deviations
    assert source.find(9, rng) is None


def test_a_mask_that_changes_is_searched_again(tmp_path, large):
    pair, _, mask = scene(tmp_path)
    rng = np.random.default_rng(0)
    assert source_of(pair).find(9, rng) is None
    mask[3, 4] = 9
    tifffile.imwrite(pair.mask, mask, tile=(16, 16))
    assert source_of(pair).find(9, rng) == (3, 4)


def test_a_scene_and_a_mask_of_another_size_are_named(tmp_path, large):
    pair, _, mask = scene(tmp_path)
    tifffile.imwrite(pair.mask, mask[:-1], tile=(16, 16))
    with pytest.raises(DataError, match=r"a_mask\.tif is 96x95 but .*a\.tif is 96x96"):
        source_of(pair)


def with_holes(tmp_path: Path) -> Pair:
    image = np.full((6, 8, 2), 10, np.float32)
    image[0], image[1, :, 0], image[2, 3, 1] = np.nan, np.nan, 4
    pair = Pair(tmp_path / "a.tif", tmp_path / "a.png")
    tifffile.imwrite(pair.image, image, photometric="minisblack", planarconfig="contig")
    Image.fromarray(np.ones((6, 8), np.uint8)).save(pair.mask)
    return pair


@pytest.mark.parametrize("least", [1, 1 << 40])
def test_where_no_band_has_data_the_mask_is_ignored_and_pixels_become_the_mean(tmp_path, monkeypatch, least):
    monkeypatch.setattr(headers, "MIN_WINDOWED", least)
    pair = with_holes(tmp_path)
    transforms = pipeline({"type": "normalize", "mean": [5, 6], "std": [1, 1]}, ignore_index=9)
    pixels, labels, _ = SegmentationDataset([pair], transforms, 2, seed=0)[SampleKey(0)]
    assert pixels[0].tolist() == [[5, 6]] * 8 and pixels[1].tolist() == [[5, 10]] * 8
    assert pixels[2, 3].tolist() == [10, 4]
    assert labels.tolist() == [[9] * 8] + [[1] * 8] * 5
    assert read_truth(pair, 9).tolist() == labels.tolist()


def test_a_value_for_ignored_that_8_bits_cannot_hold_is_held_by_16(tmp_path):
    pair = with_holes(tmp_path)
    _, labels, _ = SegmentationDataset([pair], pipeline(ignore_index=65535), 2, seed=0)[SampleKey(0)]
    assert labels.dtype == np.uint16 and labels[0].tolist() == [65535] * 8


def test_samples_beyond_the_number_of_pairs_are_other_draws_of_them(tmp_path, large):
    pair, _, _ = scene(tmp_path)
    dataset = SegmentationDataset([pair], pipeline({"type": "random_crop", "size": [8, 8]}), 3, seed=0)
    corners = {tuple(dataset[SampleKey(sample)].image[0, 0, :2]) for sample in range(10)}
    assert len(corners) > 5


@pytest.mark.parametrize("least", [1, 1 << 40])
def test_classes_are_looked_for_and_counted_only_where_there_is_data(tmp_path, monkeypatch, least):
    monkeypatch.setattr(headers, "MIN_WINDOWED", least)
    monkeypatch.setattr(segmentation, "BLOCK", 20)
    segmentation._blocks_with.cache_clear()
    image, mask = np.ones((SIDE, SIDE, 2), np.float32), np.zeros((SIDE, SIDE), np.uint8)
    image[:90] = np.nan
    mask[:, :10] = 3
    pair = Pair(tmp_path / "a.tif", tmp_path / "m.tif")
    tifffile.imwrite(pair.image, image, photometric="minisblack", planarconfig="contig", tile=(16, 16))
    tifffile.imwrite(pair.mask, mask, tile=(16, 16))
    source = SegmentationDataset([pair], pipeline(), 2, seed=0).source(0)
    assert source.windowed is (least == 1)
    rows = {place[0] for _ in range(30) if (place := source.find(3, np.random.default_rng(_)))}
    assert rows and min(rows) >= 90
    (facts,) = scan([pair], None)
    assert facts.counts == {0: 6 * 86, 3: 6 * 10}
