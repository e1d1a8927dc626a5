"""Ground rectangles: who shares ground with whom, and how much of it."""

import numpy as np
import pytest

from ml_src.core.checking.overlaps import overlaps

UTM = "EPSG:32633"


def all_pairs(boxes: np.ndarray, names: list[str]) -> list[tuple[int, int, float]]:
    """Compare every rectangle with every other, one by one."""
    found = []
    for i, (left, bottom, right, top) in enumerate(boxes):
        for j in range(i + 1, len(boxes)):
            width = min(right, boxes[j][2]) - max(left, boxes[j][0])
            height = min(top, boxes[j][3]) - max(bottom, boxes[j][1])
            smaller = min((right - left) * (top - bottom), (boxes[j][2] - boxes[j][0]) * (boxes[j][3] - boxes[j][1]))
            if names[i] == names[j] and width > 0 and height > 0 and width * height > 0.01 * smaller:
                found.append((i, j, width * height / smaller))
    return found


@pytest.mark.parametrize(("num_boxes", "extent"), [(1, (1, 1)), (120, (20, 20)), (120, (400, 1)), (120, (1, 400))])
def test_the_sweep_finds_what_comparing_all_pairs_finds(num_boxes, extent):
    draw = np.random.default_rng(num_boxes + extent[0])
    corners = draw.uniform(0, 1, (num_boxes, 2)) * extent
    boxes = np.hstack([corners, corners + draw.uniform(0.1, 4, (num_boxes, 2))])
    names = draw.choice([UTM, "EPSG:32632"], num_boxes).tolist()
    expected = all_pairs(boxes, names)
    found = overlaps(boxes, names)
    assert [pair[:2] for pair in found] == [pair[:2] for pair in expected]
    assert [pair[2] for pair in found] == pytest.approx([pair[2] for pair in expected])
    assert num_boxes == 1 or len(found) > 20


def test_tiles_of_a_grid_that_share_their_edges_do_not_overlap():
    step = 0.1 * 512  # no binary fraction: neighbours' edges differ in the last digits
    x, y = (axis.ravel() * step + 458_000.3 for axis in np.mgrid[:12, :12])
    assert overlaps(np.stack([x, y, x + step, y + step], axis=1), [UTM] * 144) == []


def test_one_percent_of_the_smaller_area_is_the_limit():
    tile, scene = (0, 0, 10, 10), (9.9, 0, 1000, 1000)
    assert overlaps([tile, scene], [UTM] * 2) == []
    assert overlaps([tile, (9.89, *scene[1:])], [UTM] * 2) == [(0, 1, pytest.approx(0.011))]


def test_a_tile_inside_a_scene_shares_all_of_itself():
    assert overlaps([(0, 0, 100, 100), (40, 40, 50, 50)], [UTM] * 2) == [(0, 1, 1.0)]


def test_equal_coordinates_in_different_reference_systems_are_different_places():
    assert overlaps([(0, 0, 10, 10)] * 2, [UTM, "EPSG:32632"]) == []


def test_a_raster_whose_rows_run_south_to_north_covers_the_same_ground():
    assert overlaps([(0, 0, 10, 10), (0, 10, 10, 0)], [UTM] * 2) == [(0, 1, 1.0)]


def test_what_has_no_area_or_no_numbers_overlaps_nothing():
    boxes = [(0, 0, 10, 10), (5, 0, 5, 10), (np.nan, 0, 10, 10), (0, 0, np.inf, 10)]
    assert overlaps(boxes, [UTM] * 4) == []
    assert overlaps([], []) == []
