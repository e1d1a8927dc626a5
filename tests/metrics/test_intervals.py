"""Bootstrap intervals: a plain loop as oracle, and the laws of drawing again."""

import json

import numpy as np
import pytest

from ml_src.core.metrics import intervals
from ml_src.core.metrics.boundary import BoundaryScores, boundary_scores, summarize_boundaries
from ml_src.core.metrics.intervals import Counts, paired_interval, resamples, score_intervals
from ml_src.core.metrics.segmentation import dice, summarize

SCORES = ("iou", "dice", "pixel_accuracy", "iou_per_class", "dice_per_class")
BOUNDARIES = tuple(f"{name}{over}" for name in ("hd95", "surface_dice", "boundary_iou") for over in ("", "_per_class"))


def images(num: int, seed: int = 0, right: float = 0.7) -> list[tuple[np.ndarray, np.ndarray]]:
    """Predictions and truths of 12 x 12 pixels and 4 classes; how many pixels are right differs among images."""
    generator = np.random.default_rng(seed)
    pairs = []
    for share in np.clip(generator.normal(right, 0.15, num), 0, 1):
        truth = np.repeat(np.repeat(generator.integers(0, 3, (3, 3)), 4, axis=0), 4, axis=1)
        pairs.append(
            (np.where(generator.random(truth.shape) < share, truth, generator.integers(0, 4, truth.shape)), truth)
        )
    return pairs


def matrix_of(labels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.bincount((truth * 4 + labels).ravel(), minlength=16).reshape(4, 4)


def matrices_of(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    return np.array([matrix_of(*pair) for pair in pairs])


def counts_of(pairs: list[tuple[np.ndarray, np.ndarray]]) -> Counts:
    return Counts.stacked([Counts.of(matrix_of(*pair)) for pair in pairs])


def boundaries_of(pairs: list[tuple[np.ndarray, np.ndarray]], ignore_index: int | None = None) -> list[BoundaryScores]:
    return [boundary_scores(*pair, 4, ignore_index) for pair in pairs]


def width(interval: list[float]) -> float:
    return interval[1] - interval[0]


# --- what is kept of a matrix ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignore_index", [None, 2, 255])
def test_counts_give_the_dice_of_the_matrix(ignore_index):
    matrices, counts = matrices_of(images(4)), counts_of(images(4))
    assert np.array_equal(counts.summed().dice(ignore_index), dice(matrices.sum(axis=0), ignore_index), equal_nan=True)
    assert np.array_equal(counts.dice(ignore_index), [dice(each, ignore_index) for each in matrices], equal_nan=True)
    assert all(np.array_equal(*both) for both in zip(counts, Counts.of(matrices), strict=True))


def test_counts_of_a_matrix_do_not_keep_it():
    counts = Counts.of(matrix_of(*images(1)[0]))
    assert all(part.base is None and part.shape == (4,) for part in counts)


# --- the draws -----------------------------------------------------------------------------------------------------


def test_as_many_images_are_drawn_as_there_are():
    draws = resamples(7, None, num=50)
    assert draws.shape == (50, 7)
    assert (draws.sum(axis=1) == 7).all()
    assert draws.min() == 0


def test_draws_depend_on_the_seed_alone():
    assert np.array_equal(resamples(9, None), resamples(9, None))
    assert not np.array_equal(resamples(9, None), resamples(9, None, seed=1))


def test_every_image_is_drawn_once_on_average():
    np.testing.assert_allclose(resamples(10, None, num=20_000).mean(axis=0), 1, atol=0.03)


def test_images_of_a_group_are_drawn_together():
    draws = resamples(6, ["b", "a", "b", "c", "a", "b"], num=100)
    assert np.array_equal(draws[:, 0], draws[:, 2])
    assert np.array_equal(draws[:, 0], draws[:, 5])
    assert np.array_equal(draws[:, 1], draws[:, 4])
    assert (draws[:, [0, 1, 3]].sum(axis=1) == 3).all()


def test_groups_of_one_image_are_drawn_like_images():
    assert np.array_equal(resamples(4, ["z", "y", "b", "a"]), resamples(4, None))


def test_there_must_be_a_group_for_each_image():
    with pytest.raises(ValueError, match="3 images but groups of 2"):
        resamples(3, ["a", "b"])


# --- the intervals -------------------------------------------------------------------------------------------------


def plain_intervals(pairs, ignore_index, groups=None) -> dict:
    """Repeat whole images as drawn, score each resample by the functions for one data set, take the percentiles."""
    matrices, boundaries = matrices_of(pairs), boundaries_of(pairs, ignore_index)
    scores = []
    for draw in resamples(len(pairs), groups):
        chosen = np.repeat(np.arange(len(pairs)), draw)
        scores.append(
            summarize(matrices[chosen].sum(axis=0), ignore_index)
            | summarize_boundaries([boundaries[index] for index in chosen])
        )
    lists = {name: [score[name] for score in scores] for name in (*SCORES, *BOUNDARIES)}
    return {
        name: [bounds(column) for column in zip(*values, strict=True)] if "per_class" in name else bounds(values)
        for name, values in lists.items()
    }


def bounds(values) -> list[float] | None:
    known = [value for value in values if value is not None]
    return np.percentile(known, [2.5, 97.5]).tolist() if known else None


@pytest.mark.parametrize(
    ("ignore_index", "groups"), [(None, None), (2, None), (255, ["a", "b", "b", "c", "a", "d"])], ids=str
)
def test_intervals_are_those_of_a_plain_loop(ignore_index, groups):
    pairs = images(6)
    if ignore_index == 2:  # matrix_of would count ignored pixels, so there are none
        pairs = [(labels, np.where(truth == 2, 1, truth)) for labels, truth in pairs]
    ours = score_intervals(counts_of(pairs), boundaries_of(pairs, ignore_index), ignore_index, groups)
    for name, expected in plain_intervals(pairs, ignore_index, groups).items():
        mine = ours[name] if "per_class" in name else [ours[name]]
        theirs = expected if "per_class" in name else [expected]
        for one, other in zip(mine, theirs, strict=True):
            assert one == (None if other is None else pytest.approx(other, rel=1e-9)), name
    assert (ours["over"], ours["num"]) == (("images", 6) if groups is None else ("groups", 4))


def test_work_in_small_portions_gives_the_same(monkeypatch):
    pairs = images(6)
    whole = score_intervals(counts_of(pairs), boundaries_of(pairs), None)
    monkeypatch.setattr(intervals, "CHUNK", 100)
    assert score_intervals(counts_of(pairs), boundaries_of(pairs), None) == whole


def test_equal_images_leave_nothing_to_chance():
    pairs = images(1) * 5
    scores = score_intervals(counts_of(pairs), boundaries_of(pairs), None)
    summary = summarize(matrices_of(pairs).sum(axis=0)) | summarize_boundaries(boundaries_of(pairs))
    for name in ("iou", "dice", "pixel_accuracy", "hd95", "surface_dice", "boundary_iou"):
        assert scores[name] == pytest.approx([summary[name]] * 2)


def test_the_score_itself_lies_within():
    pairs = images(30)
    scores, summary = score_intervals(counts_of(pairs), None, None), summarize(matrices_of(pairs).sum(axis=0))
    for name in ("iou", "dice", "pixel_accuracy"):
        assert scores[name][0] < summary[name] < scores[name][1]


def test_images_that_are_alike_in_groups_widen_the_interval():
    """Ten patients with ten equal slices each are ten observations, not a hundred."""
    pairs = [pair for pair in images(10) for _ in range(10)]
    groups = [f"patient {number}" for number in range(10) for _ in range(10)]
    alone = score_intervals(counts_of(images(10)), None, None)
    ungrouped, grouped = (score_intervals(counts_of(pairs), None, None, names) for names in (None, groups))
    assert grouped["dice"] == pytest.approx(alone["dice"])
    assert width(grouped["dice"]) > 2 * width(ungrouped["dice"])


def test_more_images_narrow_the_interval():
    few, many = (score_intervals(counts_of(images(num)), None, None)["pixel_accuracy"] for num in (20, 320))
    assert 2 < width(few) / width(many) < 8  # by the square root of 16


def test_about_95_of_100_intervals_hold_the_truth():
    """Right pixels are drawn with a known chance, which differs among images."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        right = generator.binomial(100, generator.beta(8, 2, 40))
        matrices = np.array([[[hits, 100 - hits], [0, 0]] for hits in right])
        low, high = score_intervals(Counts.of(matrices), None, None)["pixel_accuracy"]
        held += low <= 0.8 <= high
    assert 88 <= held <= 99


def test_a_class_in_a_single_image_has_no_interval():
    """Whatever is drawn, its score would be the same, as if it were certain."""
    pairs = images(5, right=1.1)
    pairs[2][1][0, 0] = 3
    scores = score_intervals(counts_of(pairs), boundaries_of(pairs), None)
    for name in (
        "iou_per_class",
        "dice_per_class",
        "hd95_per_class",
        "surface_dice_per_class",
        "boundary_iou_per_class",
    ):
        assert scores[name][3] is None
        assert scores[name][0] is not None


def test_a_class_in_a_single_group_has_no_interval_either():
    pairs = images(5, right=1.1)
    for image in (2, 3):
        pairs[image][1][0, 0] = 3
    assert score_intervals(counts_of(pairs), None, None)["dice_per_class"][3] is not None
    assert score_intervals(counts_of(pairs), None, None, ["a", "b", "c", "c", "d"])["dice_per_class"][3] is None


def test_one_image_or_one_group_has_no_interval():
    one, three = counts_of(images(1)), counts_of(images(3))
    assert score_intervals(one, None, None) is None
    assert score_intervals(three, None, None, ["a"] * 3) is None
    assert paired_interval(one, one, None) is None
    assert paired_interval(three, three, None, ["a"] * 3) is None


def test_boundaries_are_left_out_where_they_were_not_measured():
    scores = score_intervals(counts_of(images(3)), None, None)
    assert set(scores) == {"over", "num", *SCORES}


def test_intervals_are_plain_data():
    pairs = images(3)
    scores = score_intervals(counts_of(pairs), boundaries_of(pairs), None)
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores


def test_nothing_counted_gives_none_and_no_warning(recwarn):
    nothing = Counts.of(np.zeros((3, 2, 2), np.int64))
    scores = score_intervals(nothing, None, None)
    assert [scores[name] for name in SCORES] == [None, None, None, [None, None], [None, None]]
    assert paired_interval(nothing, nothing, None) is None
    assert len(recwarn) == 0


def test_there_must_be_boundaries_of_each_image():
    pairs = images(3)
    with pytest.raises(ValueError, match="counts of 3 images but boundary scores of 2"):
        score_intervals(counts_of(pairs), boundaries_of(pairs[:2]), None)


# --- before and after ----------------------------------------------------------------------------------------------


def repaired(pairs: list[tuple[np.ndarray, np.ndarray]], rows: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The predictions with some rows made right."""
    return [(np.where(np.arange(12)[:, None] < rows, truth, labels), truth) for labels, truth in pairs]


def test_paired_interval_is_that_of_a_plain_loop():
    pairs = images(6)
    before, after = matrices_of(pairs), matrices_of(repaired(pairs, 2))
    groups = ["a", "b", "b", "c", "a", "d"]
    rises = [
        summarize((after * draw[:, None, None]).sum(axis=0), 0)["dice"]
        - summarize((before * draw[:, None, None]).sum(axis=0), 0)["dice"]
        for draw in resamples(6, groups)
    ]
    ours = paired_interval(Counts.of(before), Counts.of(after), 0, groups)
    assert ours == pytest.approx(tuple(np.percentile(rises, [2.5, 97.5])))


def test_no_change_is_no_rise():
    counts = counts_of(images(5))
    assert paired_interval(counts, counts, None) == (0.0, 0.0)


def test_a_change_that_always_helps_lies_above_zero_though_the_intervals_overlap():
    pairs = images(20)
    before, after = counts_of(pairs), counts_of(repaired(pairs, 1))
    low, high = paired_interval(before, after, None)
    assert 0 < low < high
    assert score_intervals(before, None, None)["dice"][1] > score_intervals(after, None, None)["dice"][0]


def test_back_and_forth_are_opposite():
    pairs = images(8)
    before, after = counts_of(pairs), counts_of(repaired(pairs, 3))
    low, high = paired_interval(before, after, None)
    assert paired_interval(after, before, None) == pytest.approx((-high, -low))


def test_before_and_after_must_be_the_same_images():
    with pytest.raises(ValueError, match="differ in shape"):
        paired_interval(counts_of(images(3)), counts_of(images(2)), None)
