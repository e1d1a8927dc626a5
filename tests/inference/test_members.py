"""From the words of the command line to networks: which files they name, in which order, with what share."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from known_networks import Blurred, ByBrightness, member_of

from ml_src.core.errors import ConfigError
from ml_src.core.inference.members import BEST, Member, checkpoints, require_same_classes, weighted


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folds 0, 9 and 10 of a run, and one that has not been trained."""
    monkeypatch.chdir(tmp_path)
    for fold in (10, 9, 0):
        path = Path(f"runs/cells_fold_{fold}") / BEST
        path.parent.mkdir(parents=True)
        path.touch()
    Path("runs/roots_fold_0").mkdir()
    return Path("runs")


def found(*words: Path | str) -> list[str]:
    return [path.as_posix() for path in checkpoints([Path(word) for word in words])]


FOLDS = [f"runs/cells_fold_{fold}/weights/best.pt" for fold in (0, 9, 10)]


def test_a_pattern_names_folds_in_the_order_of_their_numbers(runs: Path) -> None:
    assert found("runs/cells_fold_*") == FOLDS


def test_a_pattern_may_name_files_too_and_may_be_absolute(runs: Path, tmp_path: Path) -> None:
    assert found("runs/cells_fold_*/weights/best.pt") == FOLDS
    assert found(tmp_path / "runs/cells_*") == [str(tmp_path / path) for path in FOLDS]
    assert found("runs/cells_fold_[!0]*") == FOLDS[1:]
    assert found("ru?s/cells_fold_9") == FOLDS[1:2]


def test_files_and_run_folders_stay_in_the_order_given(runs: Path) -> None:
    assert found("runs/cells_fold_10", FOLDS[0], "runs/cells_fold_9/") == [FOLDS[2], FOLDS[0], FOLDS[1]]


@pytest.mark.parametrize("other", ["runs/cells_fold_9", "runs/../runs/cells_fold_9", "link.pt", "runs/cells_fold_*"])
def test_a_checkpoint_that_is_named_twice_is_refused(runs: Path, tmp_path: Path, other: str) -> None:
    """It would have two votes, and one number among the weights."""
    Path("link.pt").symlink_to(tmp_path / FOLDS[1])
    with pytest.raises(ConfigError, match="is named twice: give each checkpoint once"):
        found(FOLDS[1], other)


def test_a_file_whose_name_has_brackets_is_no_pattern(runs: Path) -> None:
    Path("best [2].pt").touch()
    Path("runs/cells [old]", BEST.parent).mkdir(parents=True)
    Path("runs/cells [old]", BEST).touch()
    assert found("best [2].pt", "runs/cells [old]") == ["best [2].pt", "runs/cells [old]/weights/best.pt"]


def test_a_file_that_is_not_there_is_left_to_the_reader_to_name(runs: Path) -> None:
    assert found("gone.pt") == ["gone.pt"]


@pytest.mark.parametrize(
    "word", ["runs/tree_*", "nowhere/*/best.pt", "runs/roots_fold_0", "runs/roots*", "runs/*", "."]
)
def test_a_pattern_that_fits_nothing_and_a_run_without_weights_are_one_sentence(runs: Path, word: str) -> None:
    with pytest.raises(ConfigError, match=r"^[^\n]*: give [^\n]*$") as refusal:
        found(word)
    named = "runs/roots_fold_0" if word in ("runs/roots*", "runs/*") else word
    assert str(refusal.value).startswith(named)


def test_shares_sum_to_one_and_are_equal_where_none_are_given() -> None:
    members = [member_of(ByBrightness()), member_of(Blurred()), member_of(Blurred())]
    assert [member.weight for member in weighted(members, [1, 0, 3])] == [0.25, 0.75]  # who has no say is left out
    assert [member.weight for member in weighted(members, None)] == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("given", [[1], [1, 2, 3], [-1, 2], [0, 0], [float("nan"), 1], [1, float("inf")]])
def test_weights_are_one_number_of_zero_or_more_for_each_member(given: list[float]) -> None:
    with pytest.raises(ConfigError, match="--ensemble_weights"):
        weighted([member_of(ByBrightness()), member_of(Blurred())], given)


def named(path: str, **overrides: object) -> Member:
    return replace(member_of(ByBrightness(), **overrides), path=Path(path))


def test_members_that_mean_different_things_by_a_class_are_refused() -> None:
    alike = [named("a.pt"), named("b.pt", **{"model.in_channels": 3, "training.batch_size": 7,
             "transforms.train": [{"type": "normalize", "mean": [0.1], "std": [0.9]}]})]  # fmt: skip
    require_same_classes(alike)
    for overrides, what in (
        ({"data.class_names": ["background", "fibre", "cell"]}, "background, fibre, cell"),
        ({"data.class_names": None, "data.num_classes": 4}, "class_3"),
        ({"data.ignore_index": 2}, "ignore_index"),
    ):
        with pytest.raises(ConfigError, match=rf"a\.pt.*{re.escape(what)}") as refusal:
            require_same_classes([*alike, named("c.pt", **overrides)])
        assert "c.pt" in str(refusal.value)
