"""Privacy of whole sites: what one site can change, how much noise there is, what it costs, and that it stays paid."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent
from dp_accounting.dp_event import ComposedDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from ml_src.core.atomic import write_json
from ml_src.core.errors import ConfigError, TrainingError
from ml_src.core.federated.aggregation import Update
from ml_src.core.federated.central import CentralPrivacy, clipped_sum
from ml_src.core.federated_specs import CentralDP
from ml_src.core.trainers.dp.noise import Noise

Arrays = dict[str, NDArray[np.float32]]
DELTA = 1e-5
BEFORE: Arrays = {"w": np.array([1, -2, 0.5], np.float32), "b": np.array(3, np.float32)}


def update(site: str, change: list[float], num_images: int = 10) -> Update:
    moved = np.array(change, np.float32)
    return Update(site, num_images, {"w": BEFORE["w"] + moved[:3], "b": np.asarray(BEFORE["b"] + moved[3])}, {})


def private(num_chosen: int = 4, key: int | None = 3, **options: Any) -> CentralPrivacy:
    return CentralPrivacy(CentralDP(**options), num_chosen, None if key is None else Noise(key))


def exact(sigma: float, rounds: int, delta: float = DELTA) -> float:
    """Google's dp_accounting, by privacy loss distributions."""
    judge = PLDAccountant()
    judge.compose(SelfComposedDpEvent(GaussianDpEvent(sigma), rounds))
    return float(judge.get_epsilon(delta))


def vector(arrays: dict[str, NDArray[Any]]) -> NDArray[np.float64]:
    return np.concatenate([arrays[name].astype(np.float64).ravel() for name in BEFORE])


# ------------------------------------------------------------------------------------------ what a site can change

change = st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4)


@settings(deadline=None, max_examples=150)
@given(st.lists(change, min_size=1, max_size=5), st.integers(0, 4), st.floats(1e-3, 1e3), st.integers(1, 10**9))
def test_one_site_changes_the_sum_by_no_more_than_the_clip_norm(
    changes: list[list[float]], which: int, clip_norm: float, num_images: int
) -> None:
    """Before the noise; whatever it sends and however many images it says to have."""
    updates = [update(f"site {index}", values) for index, values in enumerate(changes)]
    one = which % len(updates)
    updates[one] = update(updates[one].site, changes[one], num_images)
    without = [other for index, other in enumerate(updates) if index != one]
    difference = vector(clipped_sum(BEFORE, updates, clip_norm)) - vector(clipped_sum(BEFORE, without, clip_norm))
    assert np.linalg.norm(difference) <= clip_norm * (1 + 1e-9)


@settings(deadline=None, max_examples=50)
@given(st.lists(change, min_size=1, max_size=4), st.integers(0, 3))
def test_what_is_released_changes_by_no_more_than_the_clip_norm_over_the_sites_asked(
    changes: list[list[float]], which: int
) -> None:
    """With the same noise; the divisor does not depend on who answered. Beyond it there is rounding to float32 only."""
    updates = [update(f"site {index}", values) for index, values in enumerate(changes)]
    without = [other for index, other in enumerate(updates) if index != which % len(updates)]
    released = [vector(private(num_chosen=5, clip_norm=2.0).release(BEFORE, some)) for some in (updates, without)]
    assert np.linalg.norm(released[0] - released[1]) <= 2.0 / 5 + 1e-5


def test_a_short_update_is_left_as_it_is_and_a_long_one_keeps_its_direction() -> None:
    """Over all weights together, not each array for itself."""
    short, long = update("a", [0.5, 0, 0, 0.5]), update("b", [3, 0, 0, 4])
    np.testing.assert_allclose(vector(clipped_sum(BEFORE, [short], 1.0)), [0.5, 0, 0, 0.5], atol=1e-6)
    np.testing.assert_allclose(vector(clipped_sum(BEFORE, [long], 1.0)), [0.6, 0, 0, 0.8], atol=1e-6)
    np.testing.assert_allclose(vector(clipped_sum(BEFORE, [long, short], 1.0)), [1.1, 0, 0, 1.3], atol=1e-6)
    assert not vector(clipped_sum(BEFORE, [update("c", [0, 0, 0, 0])], 1.0)).any()


def test_the_mean_is_over_the_sites_asked_and_in_any_order_the_same_bits() -> None:
    """Almost without noise: two of four sites answered, so the mean is half as long."""
    updates = [update("b", [0.4, 0, 0, 0], 1), update("a", [0, 0.2, 0.2, 0.1], 1000)]
    first, second = (private(noise_multiplier=1e-9).release(BEFORE, some) for some in (updates, updates[::-1]))
    np.testing.assert_allclose(vector(first) - vector(BEFORE), [0.1, 0.05, 0.05, 0.025], atol=1e-6)
    assert all(first[name].tobytes() == second[name].tobytes() for name in BEFORE)
    assert {name: (a.dtype, a.shape) for name, a in first.items()} == {
        name: (a.dtype, a.shape) for name, a in BEFORE.items()
    }


def test_two_updates_of_one_site_are_refused() -> None:
    with pytest.raises(ValueError, match="twice the clip norm"):
        private().release(BEFORE, [update("a", [1, 0, 0, 0]), update("a", [0, 1, 0, 0])])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_no_number_is_refused_and_nothing_is_paid(value: float) -> None:
    mine = private()
    with pytest.raises(ValueError, match="the update of a has no finite norm"):
        mine.release(BEFORE, [update("a", [value, 0, 0, 0])])
    assert mine.ledger.num_steps == 0


def test_running_statistics_are_refused() -> None:
    one = Update("a", 5, BEFORE, {"norm.running_mean": np.zeros(2, np.float32)})
    with pytest.raises(ConfigError, match=r"not running statistics: use model\.norm group"):
        private().release(BEFORE, [one])


# ------------------------------------------------------------------------------------------------ the noise


def released_noise(mine: CentralPrivacy, size: int = 200_000) -> NDArray[np.float64]:
    before = {"w": np.zeros(size, np.float32)}
    return mine.release(before, [Update("a", 5, before, {})])["w"].astype(np.float64)


@pytest.mark.parametrize(("multiplier", "clip_norm", "num_chosen"), [(1.0, 1.0, 1), (0.5, 4.0, 4), (3.0, 0.1, 10)])
@pytest.mark.parametrize("key", [11, None], ids=["key", "system"])
def test_the_noise_is_normal_with_the_stated_standard_deviation(
    key: int | None, multiplier: float, clip_norm: float, num_chosen: int
) -> None:
    """On the sum noise_multiplier * clip_norm, whatever the number of answers. False alarms: one in a million."""
    drawn = released_noise(private(num_chosen, key, noise_multiplier=multiplier, clip_norm=clip_norm))
    std = multiplier * clip_norm / num_chosen
    assert drawn.std() == pytest.approx(std, rel=5 / math.sqrt(2 * drawn.size))
    assert stats.kstest(drawn / std, "norm").pvalue > 1e-6


def test_no_two_rounds_and_no_two_runs_have_the_same_noise() -> None:
    mine = private()
    rounds = [released_noise(mine, 100) for _ in range(3)]
    runs = [released_noise(private(key=None), 100) for _ in range(2)]
    drawn = [*rounds, *runs]
    assert all(len(np.intersect1d(a, b)) == 0 for index, a in enumerate(drawn) for b in drawn[:index])


def test_a_resumed_run_never_repeats_noise_that_was_released() -> None:
    """Even with a key, and where the checkpoint is older than what was paid."""
    first = private()
    saved = first.state_dict()
    released = released_noise(first, 100)
    resumed = private()
    resumed.load_state_dict(saved)
    resumed.ledger = resumed.ledger.at_least(first.ledger)
    assert len(np.intersect1d(released, released_noise(resumed, 100))) == 0


# ------------------------------------------------------------------------------------------------ the price


@pytest.mark.parametrize(("sigma", "rounds"), [(1.0, 1), (1.0, 10), (4.0, 100), (0.5, 3), (20.0, 50)])
def test_epsilon_is_that_of_composed_gaussian_mechanisms(sigma: float, rounds: int) -> None:
    """By another accountant, within 1 % and not below; and by the exact formula of Balle and Wang (2018)."""
    mine = private(noise_multiplier=sigma, clip_norm=0.7)
    for _ in range(rounds):
        mine.release(BEFORE, [])
    assert mine.ledger.num_steps == rounds
    assert exact(sigma, rounds) * 0.999 < mine.epsilon() < exact(sigma, rounds) * 1.01
    mu, epsilon = math.sqrt(rounds) / sigma, mine.epsilon()
    delta = stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + stats.norm.logcdf(-mu / 2 - epsilon / mu))
    assert 0.8 * DELTA < delta <= DELTA


def test_a_change_of_the_noise_between_rounds_is_accounted_for() -> None:
    """Of a run that was resumed with another multiplier."""
    first = private(noise_multiplier=1.0)
    first.release(BEFORE, [])
    second = private(noise_multiplier=3.0)
    second.load_state_dict(first.state_dict())
    second.release(BEFORE, [])
    judge = PLDAccountant()
    judge.compose(ComposedDpEvent([GaussianDpEvent(1.0), GaussianDpEvent(3.0)]))
    assert second.epsilon() == pytest.approx(judge.get_epsilon(DELTA), rel=0.01)


class Watching(Noise):
    """Looks at the ledger when noise is asked for."""

    def __init__(self, key: int) -> None:
        super().__init__(key)
        self.paid: list[int] = []

    def stream(self, step: int) -> Any:
        self.paid.append(self.watched.ledger.num_steps)
        return super().stream(step)


def test_the_ledger_is_charged_before_the_noise_is_even_drawn() -> None:
    noise = Watching(5)
    mine = CentralPrivacy(CentralDP(), 2, noise)
    noise.watched = mine
    for _ in range(3):
        mine.release(BEFORE, [])
    assert noise.paid == [1, 2, 3]


def test_a_round_of_which_nobody_answered_is_noise_and_is_paid() -> None:
    mine = private()
    released = mine.release(BEFORE, [])
    assert (vector(released) != vector(BEFORE)).all()
    assert mine.epsilon() == pytest.approx(exact(1.0, 1), rel=0.01)


@pytest.mark.parametrize(
    ("sigma", "target", "wanted"), [(1.0, 8.0, 10), (2.0, 8.0, 100), (5.0, 3.0, 60), (5.0, 90.0, 7)]
)
def test_the_budget_allows_as_many_rounds_as_stay_within_it_and_no_fewer(
    sigma: float, target: float, wanted: int
) -> None:
    mine = private(noise_multiplier=sigma, target_epsilon=target)
    allowed = mine.allowed_rounds(wanted)
    assert 1 <= allowed <= wanted
    assert exact(sigma, allowed) <= target
    assert allowed == wanted or exact(sigma, allowed + 1) * 1.01 > target
    for _ in range(allowed):
        mine.release(BEFORE, [])
    assert mine.epsilon() <= target


def test_without_a_target_every_round_is_allowed() -> None:
    assert private(noise_multiplier=0.1).allowed_rounds(1000) == 1000
    assert private(target_epsilon=5.0).allowed_rounds(0) == 0


def test_the_budget_of_a_resumed_run_counts_what_was_spent() -> None:
    mine = private(noise_multiplier=2.0, target_epsilon=8.0)
    allowed = mine.allowed_rounds(100)
    for done in range(1, 4):
        mine.release(BEFORE, [])
        resumed = private(noise_multiplier=2.0, target_epsilon=8.0)
        resumed.load_state_dict(mine.state_dict())
        assert resumed.allowed_rounds(100 - done) == allowed - done


def test_what_is_said_before_training_names_rounds_epsilon_and_unit() -> None:
    sentence = private(noise_multiplier=5.0).sentence(6, done=4)
    assert sentence.startswith("Privacy: epsilon ")
    assert " after 10 rounds with noise multiplier 5 (delta 1e-05, unit of privacy one site, " in sentence
    short = private(noise_multiplier=2.0, target_epsilon=8.0)
    allowed = short.allowed_rounds(100)
    assert f"the budget ends after round {allowed + 3} of 103, at epsilon 7." in short.sentence(100, done=3)


def test_a_budget_that_allows_no_round_ends_with_what_to_raise() -> None:
    with pytest.raises(TrainingError, match=r"brings epsilon to 4\.\d+, over federated\.central_dp\.target_epsilon 1;"):
        private(target_epsilon=1.0).sentence(10)


# ------------------------------------------------------------------------------------------------ reports and resumes


def test_the_report_states_unit_adjacency_and_what_is_not_covered() -> None:
    mine = private(clip_norm=0.5)
    mine.release(BEFORE, [])
    report = mine.report()
    assert (report["unit"], report["delta"], report["epsilon"]) == ("site", DELTA, mine.epsilon())
    assert report["mechanisms"] == [{"noise_multiplier": 1.0, "sample_rate": 1.0, "steps": 1, "max_grad_norm": 0.5}]
    assert "one site" in report["adjacency"]
    for part in ("losses and scores", "class counts", "the server", "which sites answered"):
        assert any(part in sentence for sentence in report["not_covered"])


def test_a_resumed_run_never_reports_less_than_was_spent(tmp_path: Path) -> None:
    """Killed between the release of round 3 and its checkpoint: round 3 is paid, and so is its second time."""
    first, path = private(), tmp_path / "privacy.json"
    for _ in range(2):
        first.release(BEFORE, [])
    checkpoint = first.state_dict()
    first.release(BEFORE, [])
    write_json(path, first.report())

    for order in ("checkpoint first", "report first"):
        resumed = private()
        if order == "report first":
            resumed.recover(path)
        resumed.load_state_dict(checkpoint)
        resumed.recover(path)
        assert resumed.epsilon() == first.epsilon()
        resumed.release(BEFORE, [])
        assert resumed.epsilon() == pytest.approx(exact(1.0, 4), rel=0.01)


def test_loading_an_old_checkpoint_does_not_give_anything_back() -> None:
    mine = private()
    old = mine.state_dict()
    mine.release(BEFORE, [])
    spent = mine.epsilon()
    mine.load_state_dict(old)
    assert mine.epsilon() == spent > 0


def test_no_report_yet_adds_nothing_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    mine = private()
    mine.recover(tmp_path / "privacy.json")
    assert mine.epsilon() == 0
    (tmp_path / "privacy.json").write_text("{")
    with pytest.raises(TrainingError, match="what this run has spent is not known"):
        mine.recover(tmp_path / "privacy.json")


def test_the_state_is_opened_with_weights_only(tmp_path: Path) -> None:
    mine = private()
    mine.release(BEFORE, [])
    torch.save(mine.state_dict(), tmp_path / "state.pt")
    resumed = private()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.epsilon() == mine.epsilon() > 0
