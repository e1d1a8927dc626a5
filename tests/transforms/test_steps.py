"""The laws of each step, against NumPy, torchvision and brute force. Next: `test_windows.py`."""

import cv2
import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from ml_src.core import transform_specs as specs
from ml_src.core.transforms import geometric, geometry, steps
from ml_src.core.transforms.geometric import Canvas
from ml_src.core.transforms.geometry import back, forth, trace
from ml_src.core.transforms.source import Arrays

IGNORE = 255
DTYPES = [np.uint8, np.uint16, np.int16, np.float32]
ALL_CORNERS = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])  # the direction inwards


def resample(image, mask, chain):
    return geometry.resample(Arrays(image, mask), chain, IGNORE)


def canvas(height, width):
    return Canvas(Arrays(np.zeros((height, width, 1), np.uint8)))


def random_image(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def smooth_image(height, width):
    """(H, W, 1) float32, so smooth that a small error of place is a small error of value."""
    y, x = np.mgrid[:height, :width]
    return (127 + 90 * np.sin(5 * x / width) * np.cos(4 * y / height))[:, :, None].astype(np.float32)


def still(height, width):
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1)


def by_torchvision(function, image, **arguments):
    """The image, and where it shows what was inside."""
    tensors = (torch.from_numpy(values).permute(2, 0, 1) for values in (image, np.ones_like(image)))
    bilinear = functional.InterpolationMode.BILINEAR
    warped, inside = (function(one, interpolation=bilinear, fill=0, **arguments) for one in tensors)
    return warped.permute(1, 2, 0).numpy(), inside[0].numpy() > 0.999


def assert_torchvision_agrees(step, function, **arguments):
    image = smooth_image(48, 61)
    expected, inside = by_torchvision(function, image, **arguments)
    warped, labels = resample(image, np.zeros(image.shape[:2], np.uint8), [step])
    assert np.mean(inside) > 0.3
    assert np.abs(warped - expected)[inside].max() < 0.4
    assert not labels[inside].any()
    assert np.mean((labels == IGNORE) == ~inside) > 0.93  # all but the edge


# Quarter turns, transposition, shifts: whole pixels.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 6])
@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_quarter_turns_are_rot90(turns, channels, dtype):
    image, mask = random_image(7, 12, channels).astype(dtype), random_image(7, 12, seed=1).astype(np.uint16)
    step = steps.quarter_turns((7, 12), turns)
    turned, labels = resample(image, mask, [step])
    assert step.size == turned.shape[:2]
    assert turned.dtype == dtype
    np.testing.assert_array_equal(turned, np.rot90(image, turns))
    np.testing.assert_array_equal(labels, np.rot90(mask, turns))


def test_transposition_swaps_rows_and_columns():
    image, mask = random_image(7, 12, 3), random_image(7, 12, seed=1)
    swapped, labels = resample(image, mask, [steps.transpose((7, 12))])
    np.testing.assert_array_equal(swapped, image.transpose(1, 0, 2))
    np.testing.assert_array_equal(labels, mask.T)


def test_four_quarter_turns_or_two_transpositions_are_the_image_itself():
    image = random_image(7, 12, 3)
    for step in (steps.quarter_turns, steps.transpose):
        chain = []
        for _ in range(4):
            size = chain[-1].size if chain else (7, 12)
            chain.append(step(size, 1) if step is steps.quarter_turns else step(size))
        back_again, _ = resample(image, None, chain)
        assert np.shares_memory(back_again, image)
        np.testing.assert_array_equal(back_again, image)


@pytest.mark.parametrize("seed", range(30))
def test_whole_pixels_that_are_mirrored_turned_and_cut_are_copied_exactly(seed):
    """Each is done by NumPy too, one after the other."""
    rng = np.random.default_rng(seed)
    dtype = DTYPES[seed % 4]
    image, mask = random_image(40, 30, 3, seed=seed).astype(dtype), random_image(40, 30, seed=seed + 1)
    chain, expected, labels = [], image, mask
    for kind in rng.integers(0, 4, 6):
        (height, width), turns = expected.shape[:2], int(rng.integers(4))
        top, left = rng.integers(0, 3, 2)
        horizontal, vertical = rng.random(2) < 0.5
        axes = [axis for axis, flipped in enumerate((vertical, horizontal)) if flipped]
        cut = (slice(top, top + height - 3), slice(left, left + width - 3))
        step, change = [
            (steps.quarter_turns((height, width), turns), lambda v, n=turns: np.rot90(v, n)),
            (steps.transpose((height, width)), lambda v: v.swapaxes(0, 1)),
            (steps.mirror((height, width), horizontal, vertical), lambda v, a=axes: np.flip(v, a)),
            (steps.window(left, top, width - 3, height - 3, (height - 3, width - 3)), lambda v, c=cut: v[c]),
        ][kind]
        chain.append(step)
        expected, labels = change(expected), change(labels)
    warped, warped_labels = resample(image, mask, chain)
    np.testing.assert_array_equal(warped, expected)
    np.testing.assert_array_equal(warped_labels, labels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shift_moves_whole_pixels_and_ignores_what_comes_in(dtype):
    image, mask = random_image(20, 25, 3).astype(dtype), random_image(20, 25, seed=1) % 9
    shifted, labels = resample(image, mask, [steps.shift((20, 25), right=4, down=-3)])
    np.testing.assert_array_equal(shifted[:17, 4:], image[3:, :21])
    np.testing.assert_array_equal(labels[:17, 4:], mask[3:, :21])
    assert (labels[17:] == IGNORE).all()
    assert (labels[:, :4] == IGNORE).all()
    np.testing.assert_array_equal(shifted[:17, :4], image[3:, :4][:, ::-1])  # mirrored


def test_there_and_back_again_by_shifts_is_the_image_itself():
    image, mask = random_image(9, 9, 3), random_image(9, 9, seed=1)
    chain = [steps.shift((9, 9), 5, -8), steps.shift((9, 9), -5, 8)]
    warped, labels = resample(image, mask, chain)
    np.testing.assert_array_equal(warped, image)
    np.testing.assert_array_equal(labels, mask)


# Scale, shear, perspective: against torchvision.


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.6])
def test_zoom_is_torchvisions_scale(factor):
    neutral = {"angle": 0, "translate": [0, 0], "shear": [0, 0]}
    assert_torchvision_agrees(steps.zoom((48, 61), factor), functional.affine, scale=factor, **neutral)


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("degrees", [-40.0, 0.0, 15.0])
def test_shear_is_torchvisions(degrees, upright):
    neutral = {"angle": 0, "translate": [0, 0], "scale": 1}
    angles = [0, degrees] if upright else [degrees, 0]
    assert_torchvision_agrees(steps.shear((48, 61), degrees, upright), functional.affine, shear=angles, **neutral)


def test_columns_lean_to_the_right_and_rows_rise_to_the_right():
    image = np.zeros((41, 41, 1), np.uint8)
    image[:, 20] = 255
    leaning, _ = resample(image, None, [steps.shear((41, 41), 45.0, upright=False)])
    np.testing.assert_array_equal(leaning[:, :, 0], np.fliplr(np.eye(41)) * 255)
    rising, _ = resample(image.swapaxes(0, 1), None, [steps.shear((41, 41), 45.0, upright=True)])
    np.testing.assert_array_equal(rising[:, :, 0], np.fliplr(np.eye(41)) * 255)


INWARDS = np.array([[9.0, 4.0], [3.0, 11.0], [0.0, 2.0], [14.0, 0.0]])


def test_perspective_is_torchvisions():
    start = [[0, 0], [61, 0], [61, 48], [0, 48]]
    end = (np.array(start) + ALL_CORNERS * INWARDS).astype(int).tolist()
    step = steps.perspective((48, 61), INWARDS)
    assert_torchvision_agrees(step, functional.perspective, startpoints=start, endpoints=end)


@pytest.mark.parametrize("size", [(48, 61), (300, 200)])
def test_perspective_traces_every_pixel_where_the_matrix_sends_it(size):
    """Points between the nodes are interpolated: not quite straight lines, but nearly."""
    inwards = INWARDS * (size[1] / 61, size[0] / 48)
    step = steps.perspective(size, inwards)
    expected = cv2.perspectiveTransform(still(*size).astype(np.float64), step.matrix)
    _, points = trace([step], size)
    assert np.abs(points - expected).max() < 0.1


def test_perspective_composes_with_what_stands_around_it():
    """Reference: every point through the matrices, one by one, and the deformation between them."""
    size = (64, 64)
    chain = [
        steps.rotate(size, 25.0),
        steps.deform(size, 2.0, 9.0, np.random.default_rng(0)),
        steps.perspective(size, INWARDS),
        steps.window(0, 0, 64, 64, (48, 80)),
    ]
    _, points = trace(chain, (48, 80))
    at = cv2.perspectiveTransform(still(48, 80).astype(np.float64), chain[3].matrix)
    at = cv2.perspectiveTransform(at, chain[2].matrix).astype(np.float32)
    expected = cv2.perspectiveTransform(back(chain[1], at), chain[0].matrix)
    assert np.abs(points - expected).max() < 0.3


@pytest.mark.parametrize("seed", range(4))
def test_a_checkerboard_shrunk_eightfold_in_perspective_is_flat_grey(seed):
    image = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)[:, :, None]
    rng = np.random.default_rng(seed)
    perspective = geometric.RandomPerspective(specs.RandomPerspective(type="random_perspective", distortion=0.5, p=1))
    chain = [steps.window(0, 0, 256, 256, (32, 32)), perspective.draw(canvas(32, 32), rng, rng)]
    warped, labels = resample(image, np.zeros((256, 256), np.uint8), chain)
    assert np.abs(warped[labels == 0].astype(int) - 127).max() <= 16


def test_beyond_the_horizon_everything_is_ignored():
    """The corners are so far inwards that the horizon runs through the canvas: no draw does this."""
    inwards = np.array([[30.0, 30.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]) * 1.6
    step = steps.perspective((100, 100), inwards)
    _, _, third = np.moveaxis(still(100, 100) @ step.matrix[:, :2].T + step.matrix[:, 2], 2, 0)
    behind = third < 0
    assert 0 < np.mean(behind) < 0.5
    warped, labels = resample(random_image(100, 100, 3), np.zeros((100, 100), np.uint8), [step])
    assert warped.shape == (100, 100, 3)
    assert (labels[behind] == IGNORE).all()
    assert (labels[60:, 60:] == 0).any()


def perspective_draws(distortion, count=300):
    transform = geometric.RandomPerspective(
        specs.RandomPerspective(type="random_perspective", distortion=distortion, p=1.0)
    )
    rng = np.random.default_rng(0)
    return [transform.draw(canvas(50, 80), rng, rng) for _ in range(count)]


def test_corners_move_inwards_by_up_to_the_distortion():
    edges = np.array([[[0, 0], [80, 0], [80, 50], [0, 50]]], np.float64) - 0.5
    moved = [cv2.perspectiveTransform(edges, np.linalg.inv(step.matrix))[0] for step in perspective_draws(0.4)]
    shares = (np.array(moved) - edges) * ALL_CORNERS / (80 * 0.2, 50 * 0.2)
    assert -1e-3 < shares.min() < 0.01
    assert 0.99 < shares.max() < 1 + 1e-3
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    assert np.abs(np.corrcoef(shares.reshape(300, 8).T) - np.eye(8)).max() < 0.25


def test_no_view_in_perspective_shows_what_is_more_than_a_side_away():
    edges = np.array([[[0, 0], [80, 0], [80, 50], [0, 50]]], np.float64) - 0.5
    seen = np.array([cv2.perspectiveTransform(edges, step.matrix) for step in perspective_draws(0.5)])
    seen = (seen + 0.5) / (80, 50)
    assert -1.01 < seen.min() < -0.8
    assert 1.8 < seen.max() < 2.01


def test_what_the_steps_undo_is_the_image_itself():
    """So there is one resampling: two would have blurred, and lost what was off the canvas in between."""
    size, image, mask = (37, 52), random_image(37, 52, 3), random_image(37, 52, seed=1)
    chain = [
        steps.zoom(size, 2.5),
        steps.shift(size, 30, -9),
        steps.shear(size, 35.0, upright=True),
        steps.shear(size, -35.0, upright=True),
        steps.shift(size, -30, 9),
        steps.zoom(size, 0.4),
    ]
    warped, labels = resample(image, mask, chain)
    np.testing.assert_array_equal(warped, image)
    np.testing.assert_array_equal(labels, mask)


# Grid distortion.


def grid_draw(seed, size=(60, 90), num_cells=4, distortion=0.99):
    spec = specs.GridDistortion(type="grid_distortion", num_cells=num_cells, distortion=distortion, p=1.0)
    rng = np.random.default_rng(seed)
    return geometric.GridDistortion(spec).draw(canvas(*size), rng, rng)


def smoothstep_displacement(size, moves):
    """Brute force: every pixel from the four crossings around it."""
    rows, columns = moves.shape[0] - 1, moves.shape[1] - 1
    cell_height, cell_width = size[0] / rows, size[1] / columns
    displacement = np.zeros((*size, 2))
    for y in range(size[0]):
        for x in range(size[1]):
            row, down = divmod((y + 0.5) / cell_height, 1)
            column, right = divmod((x + 0.5) / cell_width, 1)
            row, column = int(row), int(column)
            down, right = 3 * down**2 - 2 * down**3, 3 * right**2 - 2 * right**3
            above = (1 - right) * moves[row, column] + right * moves[row, column + 1]
            below = (1 - right) * moves[row + 1, column] + right * moves[row + 1, column + 1]
            displacement[y, x] = ((1 - down) * above + down * below) * (cell_width, cell_height)
    return displacement


@pytest.mark.parametrize(("size", "cells"), [((60, 90), (3, 3)), ((96, 64), (2, 5)), ((12, 9), (4, 4))])
def test_crossings_are_displaced_and_blended_by_smoothstep(size, cells):
    moves = np.zeros((cells[0] + 1, cells[1] + 1, 2))
    moves[1:-1, 1:-1] = np.random.default_rng(0).uniform(-0.25, 0.25, (cells[0] - 1, cells[1] - 1, 2))
    _, points = trace([steps.move_crossings(size, moves)], size)
    difference = np.abs(points - still(*size) - smoothstep_displacement(size, moves))
    assert (difference / (size[1] / cells[1], size[0] / cells[0])).max() < 0.01  # cells


@pytest.mark.parametrize("num_cells", [2, 5, 20])
def test_the_edges_of_a_distorted_grid_stay(num_cells):
    for seed in range(5):
        _, points = trace([grid_draw(seed, (200, 300), num_cells)], (200, 300))
        moved = np.abs(points - still(200, 300)) / (300 / num_cells, 200 / num_cells)  # in cells
        for edge in (moved[0], moved[-1], moved[:, 0], moved[:, -1]):
            assert edge.max() < 0.02
        assert moved.max() > 0.1


@pytest.mark.parametrize("extreme", [False, True])
def test_no_distorted_grid_folds(extreme):
    """The Jacobian is positive everywhere, even where every crossing moves by as much as it can."""
    lowest = []
    for seed in range(100):
        step = grid_draw(seed, (240, 240), 3)
        if extreme:
            moves = np.zeros((4, 4, 2))
            moves[1:-1, 1:-1] = np.random.default_rng(seed).choice([-0.25, 0.25], (2, 2, 2))
            step = steps.move_crossings((240, 240), moves)
        _, points = trace([step], (240, 240))
        down, right = np.diff(points, axis=0)[:, :-1], np.diff(points, axis=1)[:-1]
        lowest.append((right[..., 0] * down[..., 1] - right[..., 1] * down[..., 0]).min())
    assert min(lowest) > 0
    assert min(lowest) < 0.4  # but it is a distortion


def test_a_crossing_moves_by_up_to_a_quarter_of_a_cell_times_the_distortion():
    at = (60, 60)  # the crossing in the middle of 120 x 120 lies between this pixel and those before it
    moves = []
    for seed in range(200):
        _, points = trace([grid_draw(seed, (120, 120), 2, 0.8)], (120, 120))
        moves.append((points[at] - at) / (60 * 0.8 / 4))
    assert 0.95 < np.abs(moves).max() < 1.02
    assert np.abs(np.mean(moves, axis=0)).max() < 0.15
    assert np.var(moves) == pytest.approx(1 / 3, abs=0.05)


# Draws.


def test_scales_shifts_and_shears_fill_their_ranges():
    rng = np.random.default_rng(0)
    scale = geometric.RandomScale(specs.RandomScale(type="random_scale", scale=[0.5, 2.0], p=1.0))
    factors = [1 / scale.draw(canvas(30, 40), rng, rng).matrix[0, 0] for _ in range(300)]
    assert 0.5 <= min(factors) < 0.55
    assert 1.95 < max(factors) <= 2
    shift = geometric.RandomShift(specs.RandomShift(type="random_shift", x=0.25, y=0.5, p=1.0))
    moves = -np.array([shift.draw(canvas(30, 40), rng, rng).matrix[:2, 2] for _ in range(300)])
    assert set(moves[:, 0]) == set(range(-10, 11))
    assert set(moves[:, 1]) == set(range(-15, 16))
    shear = geometric.RandomShear(specs.RandomShear(type="random_shear", degrees=40, p=1.0))
    matrices = [shear.draw(canvas(30, 40), rng, rng).matrix for _ in range(300)]
    along_x, along_y = (np.degrees(np.arctan([m[place] for m in matrices if m[place]])) for place in ((0, 1), (1, 0)))
    for angles in (along_x, along_y):
        assert len(angles) == pytest.approx(150, abs=30)
        assert -40 <= angles.min() < -36
        assert 36 < angles.max() <= 40


def test_every_number_of_quarter_turns_is_as_likely():
    turn = geometric.RandomRotate90(specs.RandomRotate90(type="random_rotate90"))
    rng = np.random.default_rng(0)
    firsts = [tuple(turn.draw(canvas(3, 5), rng, rng).matrix[:2, :2].ravel()) for _ in range(400)]
    counts = [firsts.count(first) for first in set(firsts)]
    assert len(counts) == 4
    assert min(counts) > 70


# Where a pixel of the source goes.


@pytest.mark.parametrize("seed", range(5))
def test_forth_is_the_inverse_of_the_trace(seed):
    rng = np.random.default_rng(seed)
    size = (70, 90)
    chain = [
        steps.mirror(size, True, False),
        steps.rotate(size, 20.0),
        steps.deform(size, 4.0, 15.0, rng),
        steps.perspective(size, INWARDS),
        steps.move_crossings(size, np.pad(rng.uniform(-0.1, 0.1, (2, 2, 2)), ((1, 1), (1, 1), (0, 0)))),
        steps.window(5, 7, 60, 50, (40, 45)),
    ]
    _, points = trace(chain, (40, 45))
    for row, column in rng.integers(0, 40, (20, 2)):
        x, y = points[row, column]
        place = forth(chain, y, x)  # the source's coordinates need not be whole
        assert np.abs(np.array(place) - (row, column)).max() < 0.3


def test_what_lies_behind_the_horizon_has_no_place():
    """Seen from the other side: a source so large that a part of it is behind the viewer."""
    step = steps.perspective((60, 60), np.array([[12.0, 12.0], [0, 0], [0, 0], [0, 0]]))
    inverse = np.linalg.inv(step.matrix)
    places = [(row, column) for row in range(-400, 400, 80) for column in range(-400, 400, 80)]
    behind = [place for place in places if inverse[2] @ (place[1], place[0], 1) < 0]
    assert 0 < len(behind) < len(places)
    assert [place for place in places if forth([step], *place) is None] == behind
