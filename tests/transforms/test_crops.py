"""random_crop: exact windows, and the classes that it looks for. Next: `test_windows.py`."""

import numpy as np
import pytest
from pydantic import TypeAdapter

from ml_src.core import transform_specs as specs
from ml_src.core.transforms import build_transforms, geometric, steps
from ml_src.core.transforms.geometric import Canvas
from ml_src.core.transforms.source import Arrays

IGNORE = 255


def pipeline(*entries):
    return build_transforms(TypeAdapter(list[specs.TrainTransform]).validate_python(list(entries)), IGNORE)


def crop(**changes):
    return {"type": "random_crop", **changes}


def numbered(height, width):
    """An image (H, W, 1) of uint16 in which every pixel has its own value, and a mask that follows from it."""
    image = np.arange(height * width, dtype=np.uint16).reshape(height, width, 1)
    return image, (image[:, :, 0] % 5).astype(np.uint8)


def call(transforms, image, mask, seed=0):
    return transforms(image, mask, np.random.default_rng(seed), np.random.default_rng(seed))


def test_a_crop_is_a_window_of_the_image_pixel_by_pixel():
    image, mask = numbered(40, 53)
    for seed in range(20):
        cut, labels = call(pipeline(crop(size=[16, 24])), image, mask, seed)
        top, left = divmod(int(cut[0, 0, 0]), 53)
        np.testing.assert_array_equal(cut, image[top : top + 16, left : left + 24])
        np.testing.assert_array_equal(labels, mask[top : top + 16, left : left + 24])


def test_every_place_of_a_crop_is_as_likely():
    image, mask = numbered(6, 5)
    corners = [int(call(pipeline(crop(size=[3, 4])), image, mask, seed)[0][0, 0, 0]) for seed in range(800)]
    counts = {corner: corners.count(corner) for corner in set(corners)}
    assert set(counts) == {row * 5 + column for row in range(4) for column in range(2)}
    assert min(counts.values()) > 65
    assert max(counts.values()) < 135


@pytest.mark.parametrize("size", [(30, 40), (30, 8), (20, 13), (12, 40)])
def test_an_image_smaller_than_the_crop_is_wholly_inside_mirrored_around_and_ignored_there(size):
    image, mask = numbered(12, 13)
    tops = set()
    for seed in range(30):
        cut, labels = call(pipeline(crop(size=size)), image, mask, seed)
        assert cut.shape == (*size, 1)
        inside = labels != IGNORE
        rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        assert (len(rows), len(columns)) == (min(12, size[0]), min(13, size[1]))
        assert inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        np.testing.assert_array_equal(labels[inside], cut[:, :, 0][inside] % 5)
        if rows[0] > 0:
            np.testing.assert_array_equal(cut[rows[0] - 1], cut[rows[0]])
        tops.add(int(rows[0]))
    assert len(tops) > 5 or size[0] == 12


def blobs():
    """Classes 1 to 3 of very unequal size on background 0; class 4 is in no pixel."""
    mask = np.zeros((90, 110), np.uint8)
    mask[10:50, 10:60] = 1
    mask[70:73, 90:93] = 2
    mask[88, 3] = 3
    return np.repeat(mask[:, :, None] * 50, 3, axis=2), mask


def test_each_class_that_is_present_is_sought_as_often_and_found():
    image, mask = blobs()
    transforms = pipeline(crop(size=[8, 8], classes=[1, 2, 3, 4], class_probability=1.0))
    shown = [set(np.unique(call(transforms, image, mask, seed)[1])) - {0} for seed in range(300)]
    assert all(shown)  # never only background: the class that is absent is not sought
    for value in (1, 2, 3):
        assert np.mean([value in classes for classes in shown]) == pytest.approx(1 / 3, abs=0.08)


def test_class_probability_is_the_share_of_crops_that_seek():
    image, mask = blobs()
    for probability in (0.0, 0.5, 1.0):
        transforms = pipeline(crop(size=[8, 8], classes=[3], class_probability=probability))
        found = [(call(transforms, image, mask, seed)[1] == 3).any() for seed in range(400)]
        assert np.mean(found) == pytest.approx(probability, abs=0.08)


def test_the_pixel_sought_is_uniform_in_its_class_and_its_place_uniform_in_the_window():
    mask = np.zeros((60, 60), np.uint8)
    mask[30, 20] = mask[41, 35] = 1  # both away from the edges, more than a window apart
    image, _ = numbered(60, 60)
    transforms = pipeline(crop(size=[9, 9], classes=[1], class_probability=1.0))
    places, sought = [], []
    for seed in range(600):
        cut, labels = call(transforms, image, mask, seed)
        places.append(np.argwhere(labels == 1)[0])
        sought.append(int(cut[tuple(places[-1])][0]) == 30 * 60 + 20)
    assert np.mean(sought) == pytest.approx(0.5, abs=0.06)
    for axis in range(2):
        counts = np.bincount(np.array(places)[:, axis], minlength=9)
        assert counts.min() > 40
        assert counts.max() < 95


def test_a_class_at_the_corner_is_found_inside_the_canvas():
    image, mask = numbered(20, 20)
    mask = np.zeros_like(mask)
    mask[19, 0] = 1
    for seed in range(20):
        _, labels = call(pipeline(crop(size=[6, 6], classes=[1], class_probability=1.0)), image, mask, seed)
        assert labels[5, 0] == 1


def test_without_the_class_or_without_a_mask_the_place_is_uniform():
    image, mask = numbered(30, 30)
    transforms = pipeline(crop(size=[8, 8], classes=[77], class_probability=1.0))
    for labels in (mask, None):
        corners = {int(call(transforms, image, labels, seed)[0][0, 0, 0]) for seed in range(60)}
        assert len(corners) > 50


@pytest.mark.parametrize(
    "before",
    [
        [{"type": "random_horizontal_flip", "p": 1.0}, {"type": "random_rotate90"}],
        [{"type": "random_rotation", "degrees": 180}],
        [{"type": "resize", "size": [300, 200]}],
        [{"type": "elastic", "alpha": 6, "sigma": 12, "p": 1.0}],
        [{"type": "grid_distortion", "distortion": 0.9, "p": 1.0}],
        [{"type": "random_perspective", "distortion": 0.5, "p": 1.0}, {"type": "random_transpose"}],
        [
            {"type": "random_rotation", "degrees": 30},
            {"type": "elastic", "alpha": 6, "sigma": 12, "p": 1.0},
            {"type": "random_shear", "degrees": 20, "p": 1.0},
        ],
    ],
)
def test_a_class_is_found_where_the_earlier_steps_have_moved_it(before):
    mask = np.zeros((120, 100), np.uint8)
    mask[57:62, 64:69] = 1
    image = np.repeat(mask[:, :, None] * 200, 3, axis=2)
    transforms = pipeline(*before, crop(size=[16, 16], classes=[1], class_probability=1.0))
    found = [(call(transforms, image, mask, seed)[1] == 1).any() for seed in range(40)]
    assert np.mean(found) >= 0.95


def test_what_an_earlier_crop_has_cut_off_is_not_sought():
    mask = np.zeros((40, 40), np.uint8)
    mask[2, 2] = mask[30, 30] = 1
    kept = steps.window(20, 20, 20, 20, (20, 20))
    canvas = Canvas(Arrays(np.zeros((40, 40, 1), np.uint8), mask), [kept])
    assert {canvas.find(1, np.random.default_rng(seed)) for seed in range(10)} == {(10, 10)}
    assert canvas.find(2, np.random.default_rng(0)) is None
    mask[30, 30] = 0
    assert canvas.find(1, np.random.default_rng(0)) is None
    seek = geometric.RandomCrop(
        specs.RandomCrop(type="random_crop", size=(4, 4), classes=[1], class_probability=1.0)
    ).draw(canvas, np.random.default_rng(0), np.random.default_rng(0))
    assert seek.size == (4, 4)
