"""Reading by windows: the same sample as from the whole, and no more pixels read than it needs."""

import cv2
import numpy as np
import pytest
from pydantic import TypeAdapter

from ml_src.core import transform_specs as specs
from ml_src.core.errors import DataError
from ml_src.core.transforms import build_transforms
from ml_src.core.transforms.source import Arrays, Window

IGNORE = 255
SIZE = (700, 900)


class Scene(Arrays):
    """A source that is read by windows, and counts the pixels."""

    windowed = True

    def __init__(self, image, mask):
        super().__init__(image, mask)
        self.reads = []

    def read(self, window):
        self.reads.append(window)
        return super().read(window)


def scene(dtype=np.uint8, channels=3, size=SIZE):
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.integers(0, 256, (*size, channels)).astype(np.float32), (0, 0), 4)
    image = (np.clip((image.reshape(*size, channels) - 127) * 8 + 127, 0, 255)).astype(dtype)
    return image, (image[:, :, 0] // 43).astype(np.uint8)


def pipeline(*entries):
    return build_transforms(TypeAdapter(list[specs.TrainTransform]).validate_python(list(entries)), IGNORE)


def both(transforms, image, mask, seed):
    """The sample from the whole arrays, that by windows, and the windows read."""
    windowed = Scene(image, mask)
    samples = [
        transforms.apply(source, np.random.default_rng(seed), np.random.default_rng(seed))
        for source in (Arrays(image, mask), windowed)
    ]
    return *samples, windowed.reads


CROP = {"type": "random_crop", "size": [128, 160]}
SEEK = {**CROP, "classes": [0, 5], "class_probability": 0.7}
FLIPS = [{"type": "random_horizontal_flip"}, {"type": "random_vertical_flip"}]
TURNS = [{"type": "random_rotate90"}, {"type": "random_transpose"}]
ROTATION = {"type": "random_rotation", "degrees": 180}
ELASTIC = {"type": "elastic", "alpha": 8, "sigma": 15, "p": 1.0}
PERSPECTIVE = {"type": "random_perspective", "distortion": 0.4, "p": 1.0}
GRID = {"type": "grid_distortion", "p": 1.0}
RESIZE_CROP = {"type": "random_resize_crop", "sizes": [[64, 48], [96, 96]], "scale": [0.1, 0.9], "p": 1.0}
NOISE = {"type": "gaussian_noise", "p": 1.0}

EXACT = [[CROP], [SEEK], [CROP, *FLIPS], [*FLIPS, CROP], [*TURNS, SEEK, *FLIPS], [CROP, *TURNS, NOISE], [*FLIPS], []]
SAMPLED = {
    "rotation": [CROP, ROTATION],
    "rotation before": [ROTATION, SEEK],
    "perspective": [CROP, PERSPECTIVE],
    "perspective before": [PERSPECTIVE, CROP],
    "elastic": [SEEK, ELASTIC],
    "grid": [CROP, GRID],
    "shift": [CROP, {"type": "random_shift", "x": 1.0, "y": 1.0, "p": 1.0}],
    "smaller": [CROP, {"type": "random_scale", "scale": [0.2, 0.5], "p": 1.0}],
    "halved": [CROP, {"type": "resize", "size": [64, 80]}],
    "much smaller": [CROP, {"type": "resize", "size": [23, 31]}],
    "whole, smaller": [{"type": "resize", "size": [100, 130]}],
    "parts": [RESIZE_CROP],
    "parts, elastic": [RESIZE_CROP, {"type": "elastic", "alpha": 4, "sigma": 9, "p": 1.0}],
    "all": [*TURNS, CROP, ROTATION, ELASTIC, PERSPECTIVE, {"type": "resize", "size": [50, 60]}],
}


@pytest.mark.parametrize("entries", EXACT)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_what_is_only_cut_and_turned_is_the_same_bit_by_bit(entries, dtype):
    image, mask = scene(dtype)
    for seed in range(6):
        whole, windowed, _ = both(pipeline(*entries), image, mask, seed)
        np.testing.assert_array_equal(whole[0], windowed[0])
        np.testing.assert_array_equal(whole[1], windowed[1])
        assert windowed[0].flags.c_contiguous


@pytest.mark.parametrize("name", SAMPLED)
def test_what_is_sampled_is_the_same_up_to_rounding(name):
    image, mask = scene()
    near, same = [], []
    for seed in range(6):
        whole, windowed, _ = both(pipeline(*SAMPLED[name]), image, mask, seed)
        assert whole[0].shape == windowed[0].shape
        near.append(np.abs(whole[0].astype(int) - windowed[0]) <= 1)
        same.append(whole[1] == windowed[1])
    assert np.mean(np.concatenate([each.ravel() for each in near])) >= 0.999
    assert np.mean(np.concatenate([each.ravel() for each in same])) >= 0.999


@pytest.mark.parametrize("seed", range(40))
def test_at_the_edges_the_mirror_shows_the_same(seed):
    """Small scenes, from which everything looks out, some of them by more than their own size."""
    rng = np.random.default_rng(seed)
    image, mask = scene(size=tuple(rng.integers(20, 90, 2)))
    entries = [
        {"type": "random_shift", "x": 1.0, "y": 1.0, "p": 1.0},
        {"type": "random_scale", "scale": [0.1, 1.5], "p": 1.0},
        {"type": "random_crop", "size": rng.integers(5, 120, 2).tolist()},
        {"type": "random_shift", "x": 1.0, "y": 1.0, "p": 0.5},
    ]
    whole, windowed, _ = both(pipeline(*entries), image, mask, seed)
    assert np.mean(np.abs(whole[0].astype(int) - windowed[0]) <= 1) >= 0.995
    assert np.mean(whole[1] == windowed[1]) >= 0.99


@pytest.mark.parametrize(
    ("entries", "most"),
    [
        ([CROP], 1.1),
        ([SEEK, *FLIPS, *TURNS], 1.1),
        ([CROP, ROTATION], 2.4),
        ([SEEK, ELASTIC], 2.5),
        ([CROP, GRID], 1.1),
        ([CROP, PERSPECTIVE], 9.0),
        ([CROP, {"type": "random_scale", "scale": [0.5, 0.5], "p": 1.0}], 4.5),
        ([CROP, {"type": "resize", "size": [16, 20]}], 1.6),
    ],
)
def test_no_more_is_read_than_the_crop_needs(entries, most):
    """In areas of the crop, of a scene of thirty."""
    image, mask = scene()
    for seed in range(8):
        _, _, reads = both(pipeline(*entries), image, mask, seed)
        (window,) = reads
        assert window.top >= 0
        assert window.left >= 0
        assert window.top + window.height <= SIZE[0]
        assert window.left + window.width <= SIZE[1]
        assert 0.2 < window.height * window.width / (128 * 160) < most


def test_without_a_crop_everything_is_read():
    image, mask = scene()
    _, _, reads = both(pipeline({"type": "resize", "size": [64, 64]}), image, mask, 0)
    assert reads == [Window(0, 0, *SIZE)]


def test_a_prediction_by_windows_needs_no_mask():
    image, _ = scene()
    whole, windowed, _ = both(pipeline(SEEK, *FLIPS), image, None, 0)
    assert windowed[1] is None
    np.testing.assert_array_equal(whole[0], windowed[0])


def test_a_window_whose_mask_has_another_size_is_refused():
    image, mask = scene(size=(60, 70))
    with pytest.raises(DataError, match="has a mask of shape"):
        pipeline().apply(Scene(image, mask[:50]), np.random.default_rng(0), np.random.default_rng(0))


def test_arrays_find_every_pixel_of_a_class_as_often():
    mask = np.array([[0, 1, 2], [1, 0, 1]], np.uint8)
    source = Arrays(np.zeros((2, 3, 1), np.uint8), mask)
    found = [source.find(1, np.random.default_rng(seed)) for seed in range(300)]
    assert set(found) == {(0, 1), (1, 0), (1, 2)}
    assert min(found.count(place) for place in set(found)) > 70
    assert source.find(7, np.random.default_rng(0)) is None
    assert Arrays(source.image).find(1, np.random.default_rng(0)) is None
