"""Streaming mean and deviation against two passes in float64."""

import json

import numpy as np
import pytest
import tifffile
from PIL import Image

from ml_src.core.data import headers, statistics
from ml_src.core.data.statistics import Moments, channel_moments, channel_statistics, normalisation


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("large", [False, True])
def test_one_pass_gives_what_two_give_to_a_millionth(tmp_path, monkeypatch, dtype, large):
    """Also where the mean is large beside the deviation, and in blocks that end in the middle of a row's tile."""
    if large:
        monkeypatch.setattr(headers, "MIN_WINDOWED", 1)
        monkeypatch.setattr("ml_src.core.data.files.BAND", 7)
        monkeypatch.setattr(statistics, "AT_ONCE", 100)
    rng = np.random.default_rng(0)
    level = {"uint8": 200, "uint16": 60_000, "int16": -30_000, "float32": 1e6}[dtype]
    images = [(level + rng.normal(0, 3, (20 + index, 30, 5))).astype(dtype) for index in range(7)]
    paths = [tmp_path / f"{index}.tif" for index in range(7)]
    for path, image in zip(paths, images, strict=True):
        tifffile.imwrite(path, image, photometric="minisblack", planarconfig="contig", rowsperstrip=8)
    pixels = np.concatenate([image.reshape(-1, 5) for image in images]).astype(np.float64)
    moments, found = channel_moments(paths, 5)
    assert found == dtype
    np.testing.assert_allclose(moments.mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.std, pixels.std(axis=0), rtol=1e-6)


def test_the_sum_of_parts_is_the_whole_in_any_grouping():
    rng = np.random.default_rng(1)
    pixels = rng.normal(1e4, 1, (60, 50, 3))
    missing = rng.random((60, 50, 3)) < 0.3
    whole = Moments.of(pixels, missing)
    left = right = None
    for top in range(0, 60, 7):
        part = Moments.of(pixels[top : top + 7], missing[top : top + 7])
        left = part if left is None else left + part
        right = part if right is None else part + right
    for one in (left, right):
        np.testing.assert_allclose(one.mean, whole.mean, rtol=1e-13)
        np.testing.assert_allclose(one.std, whole.std, rtol=1e-9)
        assert np.array_equal(one.count, whole.count)


def test_what_is_missing_does_not_count():
    pixels = np.array([[[1.0, 5.0], [3.0, -9999.0]]])
    moments = Moments.of(pixels, pixels == -9999)
    assert moments.mean.tolist() == [2, 5] and moments.count.tolist() == [2, 1]


def test_a_channel_without_numbers_or_without_change_is_0_after_normalisation():
    pixels = np.zeros((4, 4, 3), np.float32)
    pixels[:, :, 1], pixels[:, :, 2] = np.nan, 7
    mean, std = normalisation(Moments.of(pixels, np.isnan(pixels)), "float32")
    assert mean == [0, 0, 7] and std == [1, 1, 1]


@pytest.mark.parametrize(("dtype", "scale"), [("uint8", 255), ("uint16", 65535), ("int16", 1), ("float32", 1)])
def test_statistics_of_unsigned_images_are_shares_of_the_full_range(tmp_path, dtype, scale):
    image = np.arange(64).reshape(8, 8).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", image)
    (mean,), (std,) = normalisation(*channel_moments([tmp_path / "a.tif"], 1))
    assert mean == pytest.approx(31.5 / scale, rel=1e-6) and std == pytest.approx(np.arange(64).std() / scale, rel=1e-6)


def test_statistics_are_kept_until_an_image_changes(tmp_path):
    path, cache = tmp_path / "a.png", tmp_path / "statistics.json"
    Image.fromarray(np.full((4, 4), 51, np.uint8)).save(path)
    assert channel_statistics([path], 1, cache)[0] == [0.2]
    known = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: [[0.7], [1.0]] for key in known}))
    assert channel_statistics([path], 1, cache)[0] == [0.7]
    Image.fromarray(np.full((5, 4), 102, np.uint8)).save(path)
    assert channel_statistics([path], 1, cache)[0] == [0.4]


@pytest.mark.parametrize("text", ["", "[", "[1]", "null"])
def test_a_broken_cache_of_statistics_is_passed_over(tmp_path, text):
    Image.fromarray(np.full((4, 4), 51, np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "statistics.json").write_text(text)
    assert channel_statistics([tmp_path / "a.png"], 1, tmp_path / "statistics.json")[0] == [0.2]


def test_progress_counts_images(tmp_path):
    for index in range(3):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / f"{index}.png")
    seen: list[int] = []
    channel_moments(sorted(tmp_path.glob("*.png")), 1, seen.append)
    assert seen == [1, 2, 3]
