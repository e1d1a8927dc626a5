"""Which images an int8 export is calibrated on."""

import numpy as np
import pytest

from ml_src.core.deployment.calibration import choose_images


def drawn_counts(seed: int, images: int, classes: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(1, 1000, (images, classes)) * (rng.random((images, classes)) < rng.random(classes) * 0.5)


def test_the_only_images_with_the_rare_classes_are_chosen() -> None:
    counts = np.zeros((100, 4), np.int64)
    counts[:, 0] = 1000
    counts[37, 1] = counts[71, 2] = counts[5, 3] = 1
    assert {5, 37, 71} <= set(choose_images(counts, 4))


def test_one_image_with_two_rare_classes_is_taken_before_two_with_one_each() -> None:
    counts = np.array([[9, 1, 0], [9, 0, 2], [9, 1, 2], [9, 0, 0]])
    assert choose_images(counts, 1) == [2]


def test_of_images_that_add_the_same_classes_that_with_the_largest_share_of_the_rarest_is_taken() -> None:
    counts = np.array([[90, 10], [50, 50], [900, 60]])
    assert choose_images(counts, 1) == [1]


@pytest.mark.parametrize("seed", range(20))
def test_every_class_that_any_image_has_is_covered_where_there_is_room(seed: int) -> None:
    counts = drawn_counts(seed, images=60, classes=12)
    chosen = choose_images(counts, 16)
    np.testing.assert_array_equal((counts[chosen] > 0).any(axis=0), (counts > 0).any(axis=0))


@pytest.mark.parametrize(("images", "most"), [(0, 16), (1, 16), (15, 16), (16, 16), (17, 16), (1000, 16), (40, 3)])
def test_as_many_different_images_as_asked_for_or_as_there_are(images: int, most: int) -> None:
    chosen = choose_images(drawn_counts(1, images, classes=5), most)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(images, most)
    assert set(chosen) <= set(range(images))


def test_images_that_need_not_be_there_for_their_classes_are_spread_evenly() -> None:
    chosen = choose_images(np.full((1000, 1), 10), 11)
    gaps = np.diff(chosen[1:])
    assert chosen[0] == 0
    assert gaps.min() >= 99
    assert gaps.max() <= 101


def test_images_without_any_class_can_be_chosen_but_are_not_needed() -> None:
    counts = np.zeros((5, 3), np.int64)
    assert len(choose_images(counts, 3)) == 3
    counts[4, 2] = 7
    assert 4 in choose_images(counts, 1)
