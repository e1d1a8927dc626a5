"""Tiles cover an image, begin where the network pools, and blend to what was in them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from ml_src.core.inference.tiling import ALIGN, PROFILES, Blender, Grid, enlarged

SIDES = st.integers(1, 300)
TILES = st.sampled_from([32, 64, 96, 128])
OVERLAPS = st.sampled_from([0.0, 0.25, 0.5, 0.9])


@given(SIDES, SIDES, TILES, OVERLAPS)
def test_tiles_are_aligned_overlap_and_cover_every_pixel(height: int, width: int, tile: int, overlap: float) -> None:
    grid = Grid((height, width), (tile, tile), overlap)
    for length, axis in ((height, grid.rows), (width, grid.columns)):
        assert axis.parts[0].start == 0 and axis.parts[-1].stop == length
        for start, stop in axis.parts:
            assert start % ALIGN == 0 and 0 < stop - start <= tile
        for one, other in zip(axis.parts, axis.parts[1:], strict=False):
            assert one.start < other.start <= one.stop
            assert one.stop - other.start >= overlap * tile - ALIGN or other.stop == length


@given(SIDES, SIDES, TILES, OVERLAPS, st.sampled_from(sorted(PROFILES)), st.sampled_from([7, 1000]))
def test_tiles_cut_from_a_picture_blend_to_that_picture(
    height: int, width: int, tile: int, overlap: float, profile: str, most: int
) -> None:
    picture = np.random.default_rng(0).random((2, height, width), np.float32)
    grid = Grid((height, width), (tile, tile), overlap, profile)
    blender, rows, expected_top = Blender(grid, 2), [], 0
    for row in range(len(grid.rows.parts)):
        for column in range(len(grid.columns.parts)):
            top, left, tall, wide = grid.window(row, column)
            blender.add(row, column, picture[:, top : top + tall, left : left + wide])
        for top, done in blender.finished(row, most):
            assert top == expected_top and done.shape[1] <= most
            expected_top += done.shape[1]
            rows.append(done.copy())
    assert np.allclose(np.concatenate(rows, axis=1), picture, atol=1e-5)


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_the_edge_of_a_tile_counts_little_where_another_sees_it_from_inside(profile: str) -> None:
    axis = Grid((1, 192), (32, 128), 0.5, profile).columns
    (first, second), (weights, others) = axis.parts[:2], axis.weights[:2]
    for place in range(second.start, first.stop):
        assert weights[place - first.start] + others[place - second.start] == pytest.approx(1, abs=1e-5)
    assert others[0] < 0.01 and weights[-1] < 0.01


@given(st.integers(1, 40), st.integers(1, 40), SIDES, SIDES, st.integers(1, 50))
def test_a_canvas_is_enlarged_by_bands_as_torch_does_it_at_once(
    height: int, width: int, tall: int, wide: int, band: int
) -> None:
    canvas = np.random.default_rng(0).random((3, height, width), np.float32)
    whole = F.interpolate(torch.from_numpy(canvas)[None], size=(tall, wide), mode="bilinear", align_corners=False)[0]
    bands = [enlarged(canvas, (tall, wide), top, min(tall, top + band)) for top in range(0, tall, band)]
    assert np.allclose(np.concatenate(bands, axis=1), whole.numpy(), atol=1e-5)
