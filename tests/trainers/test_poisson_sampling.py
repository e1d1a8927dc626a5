"""Who takes part in a private step: every unit by its own coin, every time."""

import math

import numpy as np

from ml_src.core.trainers.dp.sampling import one_of_each, poisson_steps

SECRET = 2**63 - 1


def test_every_unit_is_drawn_at_the_sample_rate() -> None:
    """Each of 50 units within 5 standard errors over 4000 steps, and all together within 4."""
    drawn = np.bincount(np.concatenate(poisson_steps(50, 0.04, 4000, SECRET, 0)), minlength=50)
    assert len(drawn) == 50
    assert np.abs(drawn - 160).max() < 5 * math.sqrt(4000 * 0.04 * 0.96)
    assert abs(drawn.sum() - 8000) < 4 * math.sqrt(200_000 * 0.04 * 0.96)


def test_units_and_steps_are_drawn_independently() -> None:
    """Sizes have the binomial's variance; two units meet, and one returns, at the square of the rate."""
    steps = poisson_steps(60, 0.3, 5000, SECRET, 0)
    drawn = np.zeros((5000, 60))
    for row, units in zip(drawn, steps, strict=True):
        row[units] = 1
    assert abs(drawn.sum(1).var() - 60 * 0.3 * 0.7) < 1.3  # four standard errors
    meet = drawn.T @ drawn / 5000
    assert np.abs(meet[~np.eye(60, dtype=bool)] - 0.09).max() < 5.5 * math.sqrt(0.09 * 0.91 / 5000)
    again = (drawn[1:] * drawn[:-1]).mean(0)
    assert np.abs(again - 0.09).max() < 5 * math.sqrt(0.09 * 0.91 / 5000)


def test_a_step_holds_each_unit_at_most_once_and_may_be_empty() -> None:
    steps = poisson_steps(5, 0.1, 200, SECRET, 3)
    assert len(steps) == 200
    assert any(len(units) == 0 for units in steps)
    assert all((np.diff(units) > 0).all() for units in steps)
    assert [len(units) for units in poisson_steps(5, 1.0, 2, 0, 0)] == [5, 5]
    assert [len(units) for units in poisson_steps(5, 0.0, 2, 0, 0)] == [0, 0]


def test_an_epoch_is_a_function_of_key_and_epoch() -> None:
    """Not of what was drawn before; a shorter epoch is the beginning of a longer one."""
    first = poisson_steps(100, 0.1, 20, 7, 5)
    np.random.default_rng().random(3)
    poisson_steps(100, 0.1, 20, 7, 4)
    for again in (poisson_steps(100, 0.1, 20, 7, 5), poisson_steps(100, 0.1, 30, 7, 5)[:20]):
        assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (poisson_steps(100, 0.1, 20, 8, 5), poisson_steps(100, 0.1, 20, 7, 6)):
        assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True) if len(a))


def test_each_chosen_group_gives_one_image_of_its_own() -> None:
    groups = ["p2", "p10", "p1", "p2", "p2", "p10"]  # sorted: p1, p10, p2
    for step in range(20):
        images = one_of_each(groups, np.array([1, 2]), SECRET, 0, step)
        assert [groups[image] for image in images] == ["p10", "p2"]
    assert one_of_each(groups, np.array([0]), SECRET, 0, 0).tolist() == [2]
    assert one_of_each(groups, np.array([], np.int64), SECRET, 0, 0).tolist() == []


def test_the_images_of_a_group_come_equally_often() -> None:
    groups = ["a"] * 4 + ["b"] * 3
    drawn = np.stack([one_of_each(groups, np.array([0, 1]), 5, 1, step) for step in range(1200)])
    for column, images in ((0, range(4)), (1, range(4, 7))):
        counts = np.array([(drawn[:, column] == image).sum() for image in images])
        mean = 1200 / len(images)
        assert counts.sum() == 1200
        assert np.abs(counts - mean).max() < 4 * math.sqrt(mean)
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 4 / math.sqrt(1200)


def test_the_image_of_a_group_is_a_function_of_key_epoch_and_step() -> None:
    groups, units = [f"p{index % 20:02}" for index in range(400)], np.arange(20)

    def draw(key: int, epoch: int, step: int) -> list[int]:
        images: list[int] = one_of_each(groups, units, key, epoch, step).tolist()
        return images

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({tuple(draw(*where)) for where in ((1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0))}) == 4
