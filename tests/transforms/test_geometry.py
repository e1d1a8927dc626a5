"""The steps and the one resampling, against NumPy references that share no code with them. Next: `test_pipeline.py`."""

import cv2
import numpy as np
import pytest

from ml_src.core import transform_specs as specs
from ml_src.core.transforms import geometric, geometry
from ml_src.core.transforms.geometric import Canvas
from ml_src.core.transforms.geometry import trace
from ml_src.core.transforms.source import Arrays
from ml_src.core.transforms.steps import deform, keep, mirror, rotate, window

IGNORE = 255


def resample(image, mask, steps, ignore_index):
    return geometry.resample(Arrays(image, mask), steps, ignore_index)


def canvas(height, width):
    return Canvas(Arrays(np.zeros((height, width, 1), np.uint8)))


def random_image(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def smooth_image(height, width):
    y, x = np.mgrid[:height, :width]
    return 127 + 90 * np.sin(2 * np.pi * x / width) * np.cos(2 * np.pi * y / height)


def folded(index, length):
    """Indices beyond the edge, mirrored at the edge of the outer pixel."""
    index = np.mod(index, 2 * length)
    return np.where(index < length, index, 2 * length - 1 - index)


def bilinear(image, x, y):
    """Sample (H, W) at points, in float64."""
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    right_share, bottom_share = x - left, y - top
    total = np.zeros(x.shape)
    for down in (0, 1):
        for right in (0, 1):
            share = (right_share if right else 1 - right_share) * (bottom_share if down else 1 - bottom_share)
            total += share * image[folded(top + down, image.shape[0]), folded(left + right, image.shape[1])]
    return total


def nearest(mask, x, y, ignore):
    """Sample (H, W) at points; `ignore` outside."""
    column, row = np.floor(x + 0.5).astype(int), np.floor(y + 0.5).astype(int)
    inside = (column >= 0) & (column < mask.shape[1]) & (row >= 0) & (row < mask.shape[0])
    return np.where(inside, mask[np.clip(row, 0, mask.shape[0] - 1), np.clip(column, 0, mask.shape[1] - 1)], ignore)


def sources(kind, size):
    """Where the pixels of one step's output come from, (x, y), written out without matrices. Returns also the size."""
    name, *values = kind
    if name == "resize":
        y, x = np.mgrid[: values[0][0], : values[0][1]].astype(float)
        return (x + 0.5) * size[1] / values[0][1] - 0.5, (y + 0.5) * size[0] / values[0][0] - 0.5, values[0]
    y, x = np.mgrid[: size[0], : size[1]].astype(float)
    if name == "mirror":
        return size[1] - 1 - x if values[0] else x, size[0] - 1 - y if values[1] else y, size
    centre = complex((size[1] - 1) / 2, (size[0] - 1) / 2)  # y points down: counter-clockwise to the eye is exp(-i a)
    points = (x + 1j * y - centre) * np.exp(1j * np.radians(values[0])) + centre
    return points.real, points.imag, size


def step_of(kind, size):
    name, *values = kind
    if name == "resize":
        return window(0, 0, size[1], size[0], values[0])
    return mirror(size, *values) if name == "mirror" else rotate(size, *values)


def steps_of(kinds, size):
    steps = []
    for kind in kinds:
        steps.append(step_of(kind, size))
        size = steps[-1].size
    return steps


SINGLE = [("resize", (50, 37)), ("resize", (23, 31)), ("rotate", 31.0), ("rotate", -170.0)]
LISTS = [
    [("resize", (48, 60)), ("mirror", True, False), ("rotate", 20.0)],
    [("rotate", 12.0), ("resize", (30, 36)), ("mirror", True, True)],
    [("mirror", False, True), ("rotate", -25.0), ("rotate", 10.0), ("resize", (41, 39))],
]


@pytest.mark.parametrize("kind", SINGLE)
def test_a_step_samples_the_image_where_a_numpy_map_does(kind):
    image = random_image(33, 40, 1)
    x, y, _ = sources(kind, (33, 40))
    warped, _ = resample(image, None, [step_of(kind, (33, 40))], IGNORE)
    difference = np.abs(warped[:, :, 0] - bilinear(image[:, :, 0], x, y))
    assert np.mean(difference) < 0.3  # rounding
    assert difference.max() < 2.5


@pytest.mark.parametrize("kind", SINGLE)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_step_samples_the_mask_where_a_numpy_map_does(kind, dtype):
    """Each pixel of the mask names itself, so that a mask one pixel off could not agree."""
    mask = np.random.default_rng(1).permutation(33 * 40).reshape(33, 40)
    mask = (mask % 251 if dtype == np.uint8 else mask * 40).astype(dtype)
    ignore = int(np.iinfo(dtype).max)
    x, y, _ = sources(kind, mask.shape)
    _, warped = resample(random_image(33, 40, 3), mask, [step_of(kind, mask.shape)], ignore)
    tie = (np.abs(np.mod(x, 1) - 0.5) < 1e-3) | (np.abs(np.mod(y, 1) - 0.5) < 1e-3)
    assert np.mean(tie) < 0.1
    assert warped.dtype == dtype
    np.testing.assert_array_equal(warped[~tie], nearest(mask, x, y, ignore)[~tie])


@pytest.mark.parametrize("kinds", LISTS)
def test_a_list_equals_its_steps_one_after_the_other(kinds):
    """On a smooth image, where resampling many times costs little; compared where every step stayed inside."""
    image = smooth_image(45, 52)
    chained, inside = image, np.zeros(image.shape)
    for kind in kinds:
        x, y, _ = sources(kind, chained.shape)
        chained, inside = bilinear(chained, x, y), nearest(inside, x, y, 1)
    inside = cv2.dilate(inside.astype(np.uint8), np.ones((5, 5), np.uint8)) == 0
    warped, mask = resample(
        np.rint(image).astype(np.uint8)[:, :, None], np.zeros(image.shape, np.uint8), steps_of(kinds, image.shape), 9
    )
    assert np.mean(inside) > 0.3
    assert np.abs(warped[:, :, 0] - chained)[inside].max() < 3
    assert not mask[inside].any()


def test_what_leaves_the_canvas_comes_back_with_its_labels():
    """A rotation and its inverse: one step at a time would lose the corners."""
    image, mask = random_image(20, 24, 3), random_image(20, 24, seed=1) % 5
    steps = [rotate((20, 24), 40.0), rotate((20, 24), -40.0)]
    warped, labels = resample(image, mask, steps, IGNORE)
    assert np.abs(warped.astype(int) - image).max() <= 1
    np.testing.assert_array_equal(labels, mask)


@pytest.mark.parametrize(("horizontal", "vertical"), [(False, False), (True, False), (False, True), (True, True)])
def test_flips_are_exact(horizontal, vertical):
    image, mask = random_image(7, 10, 3), random_image(7, 10, seed=1)
    steps = [mirror((7, 10), horizontal, False), keep((7, 10)), mirror((7, 10), False, vertical)]
    warped, labels = resample(image, mask, steps, IGNORE)
    axes = [axis for axis, flipped in enumerate((vertical, horizontal)) if flipped]
    np.testing.assert_array_equal(warped, np.flip(image, axes))
    np.testing.assert_array_equal(labels, np.flip(mask, axes))


@pytest.mark.parametrize("size", [(20, 26), (33, 47), (64, 13), (10, 13)])
def test_enlarging_agrees_with_cv2_resize(size):
    image = random_image(10, 13, 3)
    warped, _ = resample(image, None, [window(0, 0, 13, 10, size)], IGNORE)
    expected = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    assert np.abs(warped.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("source", "size"), [((24, 30), (8, 10)), ((24, 30), (24, 10)), ((32, 32), (2, 4))])
def test_shrinking_by_whole_numbers_averages_blocks(source, size):
    image = random_image(*source, 3)
    warped, _ = resample(image, None, [window(0, 0, source[1], source[0], size)], IGNORE)
    blocks = image.reshape(size[0], source[0] // size[0], size[1], source[1] // size[1], 3).mean(axis=(1, 3))
    assert np.abs(warped - blocks).max() <= 1


@pytest.mark.parametrize("source", [(64, 64), (65, 67)])
@pytest.mark.parametrize("degrees", [0.0, 30.0])
def test_a_checkerboard_shrunk_eightfold_is_flat_grey(source, degrees):
    image = (np.indices(source).sum(axis=0) % 2 * 255).astype(np.uint8)[:, :, None]
    warped, _ = resample(image, None, [window(0, 0, source[1], source[0], (8, 8)), rotate((8, 8), degrees)], IGNORE)
    assert np.abs(warped.astype(int) - 127).max() <= 2


def test_a_deformed_checkerboard_shrunk_eightfold_is_nearly_flat():
    image = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)[:, :, None]
    steps = [window(0, 0, 64, 64, (8, 8)), deform((8, 8), 0.5, 4.0, np.random.default_rng(0))]
    warped, _ = resample(image, None, steps, IGNORE)
    assert np.abs(warped.astype(int) - 127).max() <= 2


@pytest.mark.parametrize("turns", [1, 2, 3, -1])
def test_rotation_by_quarter_turns_is_rot90(turns):
    image, mask = random_image(9, 9, 3), random_image(9, 9, seed=1) % 7
    warped, labels = resample(image, mask, [rotate((9, 9), 90.0 * turns)], IGNORE)
    np.testing.assert_array_equal(warped, np.rot90(image, turns))
    np.testing.assert_array_equal(labels, np.rot90(mask, turns))


def test_rotation_ignores_the_corners_and_mirrors_the_image_there():
    image, mask = np.full((21, 21, 3), 200, np.uint8), np.ones((21, 21), np.uint8)
    warped, labels = resample(image, mask, [rotate((21, 21), 45.0)], IGNORE)
    assert labels[0, 0] == labels[0, -1] == labels[-1, 0] == labels[-1, -1] == IGNORE
    assert labels[10, 10] == labels[0, 10] == 1
    assert set(np.unique(labels)) == {1, IGNORE}
    assert (warped == 200).all()


@pytest.mark.parametrize("source", [(1, 1), (7, 5), (64, 3)])
@pytest.mark.parametrize("size", [(1, 1), (3, 8), (65, 33)])
def test_resizing_never_reaches_outside(source, size):
    mask = np.ones(source, np.uint8)
    steps = [window(0, 0, source[1], source[0], size), mirror(size, True, True)]
    warped, labels = resample(np.full((*source, 3), 90, np.uint8), mask, steps, IGNORE)
    assert labels.shape == size
    assert (labels == 1).all()
    assert (warped == 90).all()


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 8, 130])
@pytest.mark.parametrize("with_elastic", [False, True])
def test_each_channel_is_warped_as_if_it_were_alone(channels, with_elastic):
    """Up to OpenCV's rounding of coordinates, which is coarser for two channels (1/32 pixel) than for 1, 3 and 4."""
    image = random_image(40, 26, channels)
    steps = [window(0, 0, 26, 40, (9, 11)), rotate((9, 11), 20.0)]
    steps += [deform((9, 11), 1.0, 4.0, np.random.default_rng(0))] if with_elastic else []
    warped, _ = resample(image, None, steps, IGNORE)
    assert warped.shape == (9, 11, channels)
    for channel in {0, channels // 2, channels - 1}:
        alone, _ = resample(image[:, :, channel : channel + 1], None, steps, IGNORE)
        assert np.abs(warped[:, :, channel].astype(int) - alone[:, :, 0]).max() <= 4


@pytest.mark.parametrize("sigma", [1.0, 6.0, 30.0])
def test_elastic_displaces_by_alpha_in_the_mean(sigma):
    """Root mean square length of the displacement that reaches the pixels."""
    size = (60, 50)
    _, points = trace([deform(size, 3.0, sigma, np.random.default_rng(0))], size)
    still = np.stack(np.meshgrid(np.arange(50), np.arange(60)), axis=-1)
    assert np.sqrt(np.mean(np.sum((points - still) ** 2, axis=2))) == pytest.approx(3.0, rel=0.05)


def test_elastic_is_as_smooth_as_sigma_says():
    """The mean square slope of noise under a Gaussian is its variance over 2 sigma^2."""
    ratios = []
    for seed in range(8):
        _, points = trace([deform((96, 96), 1.0, 6.0, np.random.default_rng(seed))], (96, 96))
        shift = points[:, :, 0] - np.arange(96)
        ratios.append(np.mean(np.diff(shift, axis=1) ** 2) / np.var(shift))
    assert np.mean(ratios) == pytest.approx(1 / (2 * 6.0**2), rel=0.25)


def test_elastic_moves_the_edges_as_much_as_the_middle():
    squares = np.zeros((48, 48))
    for seed in range(60):
        _, points = trace([deform((48, 48), 1.0, 5.0, np.random.default_rng(seed))], (48, 48))
        squares += np.sum((points - np.stack(np.meshgrid(np.arange(48), np.arange(48)), axis=-1)) ** 2, axis=2)
    edge = np.concatenate([squares[0], squares[-1], squares[:, 0], squares[:, -1]]).mean()
    assert edge / squares[12:36, 12:36].mean() == pytest.approx(1, abs=0.2)


def test_elastic_between_affine_steps_is_followed_point_by_point():
    """Reference: every pixel through the last rotation, the displacement there, then through the first rotation."""
    size = (40, 44)
    elastic = deform(size, 3.0, 9.0, np.random.default_rng(0))
    _, points = trace([rotate(size, 15.0), elastic, rotate(size, 30.0)], size)
    x, y, _ = sources(("rotate", 30.0), size)
    rows, columns = elastic.displacement.shape[:2]
    at = (x + 0.5) * columns / size[1] - 0.5, (y + 0.5) * rows / size[0] - 0.5
    at = np.clip(at[0], 0, columns - 1), np.clip(at[1], 0, rows - 1)  # beyond the grid, its outer value
    moved = x + bilinear(elastic.displacement[:, :, 0], *at) + 1j * (y + bilinear(elastic.displacement[:, :, 1], *at))
    centre = complex((size[1] - 1) / 2, (size[0] - 1) / 2)
    expected = (moved - centre) * np.exp(1j * np.radians(15.0)) + centre
    assert np.abs(points[:, :, 0] + 1j * points[:, :, 1] - expected).max() < 0.25  # pixels


def test_elastic_samples_image_and_mask_at_the_traced_points():
    image, mask = random_image(30, 34, 1), random_image(30, 34, seed=1) % 200
    steps = [rotate((30, 34), 20.0), deform((30, 34), 2.0, 5.0, np.random.default_rng(0))]
    warped, labels = resample(image, mask, steps, IGNORE)
    x, y = np.moveaxis(trace(steps, (30, 34))[1].astype(np.float64), 2, 0)
    tie = (np.abs(np.mod(x, 1) - 0.5) < 0.02) | (np.abs(np.mod(y, 1) - 0.5) < 0.02)
    np.testing.assert_array_equal(labels[~tie], nearest(mask, x, y, IGNORE)[~tie])
    assert (labels == IGNORE).any()
    assert np.mean(np.abs(warped[:, :, 0] - bilinear(image[:, :, 0], x, y))) < 0.6


def test_elastic_of_alpha_zero_shrinks_as_no_elastic_does():
    """Both shrink by averaging blocks first, from where the map must go on in coordinates of blocks."""
    image, shrink = random_image(80, 60, 3), window(0, 0, 60, 80, (16, 15))
    plain, _ = resample(image, None, [shrink], IGNORE)
    deformed, _ = resample(image, None, [shrink, deform((16, 15), 0.0, 6.0, np.random.default_rng(0))], IGNORE)
    assert np.abs(deformed.astype(int) - plain).max() <= 1


def test_elastic_of_alpha_zero_moves_nothing():
    image, mask = random_image(30, 34, 3), random_image(30, 34, seed=1) % 200
    warped, labels = resample(image, mask, [deform((30, 34), 0.0, 9.0, np.random.default_rng(0))], IGNORE)
    assert np.abs(warped.astype(int) - image).max() <= 1
    np.testing.assert_array_equal(labels, mask)


def crop(**changes):
    return geometric.RandomResizeCrop(specs.RandomResizeCrop(type="random_resize_crop", **changes))


def test_a_crop_has_the_proportions_and_the_share_that_were_asked_for():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        step = crop(sizes=[(16, 24)], p=1.0, scale=(0.2, 0.5)).draw(canvas(60, 80), rng, rng)
        across, down = step.matrix[0, 0], step.matrix[1, 1]
        assert across == pytest.approx(down)
        assert 0.2 <= across * 24 * down * 16 / (60 * 80) <= 0.5


def test_a_crop_stays_inside_even_where_its_proportions_do_not_fit():
    mask = np.ones((40, 12), np.uint8)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        step = crop(sizes=[(8, 24)], p=1.0, scale=(0.9, 1.0)).draw(canvas(40, 12), rng, rng)
        _, labels = resample(np.zeros((40, 12, 3), np.uint8), mask, [step], IGNORE)
        assert (labels == 1).all()


def test_crops_are_placed_all_over_the_canvas():
    lefts = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        lefts.append(crop(sizes=[(8, 8)], p=1.0, scale=(0.25, 0.25)).draw(canvas(40, 40), rng, rng).matrix[0, 2])
    left = np.array(lefts) + 0.5 - 1.25  # edges; the crop spans 20 pixels, so that they lie between 0 and 20
    assert left.min() > -1e-6
    assert left.max() < 20 + 1e-6
    assert np.mean(left) == pytest.approx(10, abs=1.5)


def test_without_a_crop_the_whole_canvas_is_resized():
    rng = np.random.default_rng(0)
    step = crop(sizes=[(16, 24)], p=0.0).draw(canvas(60, 80), rng, rng)
    np.testing.assert_array_equal(step.matrix, window(0, 0, 80, 60, (16, 24)).matrix)


def test_rotation_angles_fill_the_range():
    rotation = geometric.RandomRotation(specs.RandomRotation(type="random_rotation", degrees=30))
    rng = np.random.default_rng(0)
    matrices = [rotation.draw(canvas(9, 9), rng, rng).matrix for _ in range(300)]
    angles = np.degrees([np.arctan2(matrix[1, 0], matrix[0, 0]) for matrix in matrices])
    assert -30 <= angles.min() < -28
    assert 28 < angles.max() <= 30
