"""What private training costs: epsilon against an independent accountant, budgets, resumes, privacy.json."""

import json
import logging
import math
from pathlib import Path

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from ml_src.core.atomic import write_json
from ml_src.core.errors import ConfigError, TrainingError
from ml_src.core.trainers.dp.ledger import Accountant, Ledger, Mechanism, plan, privacy_report, read_privacy

DELTA = 1e-5
BOTH: list[Accountant] = ["prv", "rdp"]


def ledger(*mechanisms: tuple[float, float, int]) -> Ledger:
    return Ledger(Mechanism(sigma, rate, steps, 1.0) for sigma, rate, steps in mechanisms)


def oracle(accountant: Accountant, delta: float, *mechanisms: tuple[float, float, int]) -> float:
    """Google's dp_accounting: Renyi orders, or privacy loss distributions."""
    judge = PLDAccountant() if accountant == "prv" else RdpAccountant()
    for sigma, rate, steps in mechanisms:
        judge.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(sigma)), steps)
    return float(judge.get_epsilon(delta))


@pytest.mark.parametrize("accountant", BOTH)
@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "delta"),
    [
        (1.1, 0.04, 3750, 1e-5),
        (1.1, 0.04, 181, 1e-5),
        (3.5, 0.04, 3750, 1e-5),
        (1.0, 0.001, 20_000, 1e-6),
        (0.6, 0.01, 1000, 1e-5),
        (1.1, 0.5, 10, 1e-4),
        (1.1, 1.0, 10, 1e-5),
        (8.0, 0.04, 1000, 1e-5),
        (40.0, 0.04, 3750, 1e-5),
        (1.1, 0.04, 181, 1e-10),
    ],
)
def test_epsilon_agrees_with_an_independent_accountant(
    accountant: Accountant, sigma: float, rate: float, steps: int, delta: float
) -> None:
    """Within 1 %; the prv bound also never lies below the other's estimate by more than that one's own rounding."""
    mine = ledger((sigma, rate, steps)).bound(delta, accountant)
    theirs = oracle(accountant, delta, (sigma, rate, steps))
    assert mine.accountant == accountant
    assert mine.epsilon == pytest.approx(theirs, rel=0.01)
    assert mine.epsilon > theirs * 0.999 or accountant == "rdp"


@pytest.mark.parametrize("accountant", BOTH)
def test_epsilon_of_several_mechanisms_agrees_too_in_any_order(accountant: Accountant) -> None:
    parts = [(1.1, 0.04, 100), (2.0, 0.02, 500), (0.9, 0.01, 50)]
    forward, backward = ledger(*parts).epsilon(DELTA, accountant), ledger(*parts[::-1]).epsilon(DELTA, accountant)
    assert forward == pytest.approx(oracle(accountant, DELTA, *parts), rel=0.01)
    assert forward == pytest.approx(backward, rel=1e-6)


def test_equal_neighbours_are_one_entry_and_steps_may_come_one_by_one() -> None:
    charged = Ledger()
    for _ in range(5):
        charged.charge(1.1, 0.04, 1, 1.0)
    charged.charge(1.1, 0.04, 3, 2.0)
    assert charged.mechanisms == [Mechanism(1.1, 0.04, 5, 1.0), Mechanism(1.1, 0.04, 3, 2.0)]
    assert charged.num_steps == 8
    assert charged.epsilon(DELTA, "rdp") == ledger((1.1, 0.04, 8)).epsilon(DELTA, "rdp")


@pytest.mark.parametrize("accountant", BOTH)
def test_nothing_charged_is_zero_and_no_noise_is_infinite(accountant: Accountant) -> None:
    assert Ledger().epsilon(DELTA, accountant) == 0
    assert ledger((1.1, 0.04, 0)).epsilon(DELTA, accountant) == 0
    assert ledger((1.1, 0.0, 10)).epsilon(DELTA, accountant) == 0
    assert ledger((1.1, 0.04, 10), (0.0, 0.04, 1)).epsilon(DELTA, accountant) == math.inf


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "delta"),
    [(0.02, 0.04, 1, 1e-5), (0.001, 0.5, 10_000, 1e-5), (1.1, 0.04, 181, 1e-14), (1.0, 0.001, 10**11, 1e-5)],
)
def test_where_prv_cannot_answer_rdp_does_and_says_so_once(
    sigma: float, rate: float, steps: int, delta: float, caplog: pytest.LogCaptureFixture
) -> None:
    """At the first, Opacus' prv answers 706, less than half of the truth."""
    charged = ledger((sigma, rate, steps))
    with caplog.at_level(logging.WARNING, "ml_src"):
        assert charged.epsilon(delta, "prv") == charged.epsilon(delta, "prv") == charged.epsilon(delta, "rdp")
    assert [record.getMessage().startswith("epsilon is that of the rdp accountant") for record in caplog.records] == [
        True
    ]
    assert privacy_report(charged, delta, "prv", "image", [], {})["accountant"] == "rdp"


@pytest.mark.parametrize("delta", [1e-5, 0.9])
def test_prv_is_a_bound_that_is_never_above_rdp_nor_negative(delta: float) -> None:
    for sigma in (0.3, 10.0, 1e6):
        charged = ledger((sigma, 0.04, 100))
        assert 0 <= charged.epsilon(delta, "prv") <= charged.epsilon(delta, "rdp")


def test_rdp_looks_at_orders_large_enough_for_much_noise() -> None:
    """With Opacus' own orders, up to 63, it would be 0.108."""
    assert ledger((100.0, 0.04, 1000)).epsilon(DELTA, "rdp") < 0.041


@pytest.mark.parametrize("wrong", [(-1.0, 0.04, 1), (math.nan, 0.04, 1), (1.0, 1.5, 1), (1.0, 0.04, -1)])
def test_what_is_no_mechanism_is_refused(wrong: tuple[float, float, int]) -> None:
    with pytest.raises(ValueError, match="is no mechanism"):
        ledger(wrong)


@pytest.mark.parametrize(
    ("accountant", "at_the_end", "fewest", "most"), [("prv", 15.3, 178, 184), ("rdp", 16.5, 130, 140)]
)
def test_noise_1_1_reaches_epsilon_3_early_in_the_example(
    accountant: Accountant, at_the_end: float, fewest: int, most: int
) -> None:
    """400 images, batch 16, 150 epochs. One step more than the plan would be over the budget."""
    whole = plan(1.1, None, DELTA, 0.04, 3750, accountant, Ledger())
    assert whole.num_steps == 3750
    assert whole.epsilon == pytest.approx(at_the_end, abs=0.1)
    part = plan(1.1, 3.0, DELTA, 0.04, 3750, accountant, Ledger())
    assert fewest <= part.num_steps <= most
    assert part.epsilon == ledger((1.1, 0.04, part.num_steps)).epsilon(DELTA, accountant) <= 3.0
    assert ledger((1.1, 0.04, part.num_steps + 1)).epsilon(DELTA, accountant) > 3.0


@pytest.mark.parametrize("accountant", BOTH)
@pytest.mark.parametrize("target", [0.3, 3.0, 20.0])
def test_noise_is_calibrated_to_within_a_hundredth_of_epsilon(accountant: Accountant, target: float) -> None:
    found = plan(None, target, DELTA, 0.04, 500, accountant, Ledger())
    assert found.num_steps == 500
    assert 0.99 * target < found.epsilon <= target
    assert oracle("prv", DELTA, (found.noise_multiplier, 0.04, 500)) <= target


def test_the_example_needs_noise_3_5_for_all_its_epochs() -> None:
    assert plan(None, 3.0, DELTA, 0.04, 3750, "prv", Ledger()).noise_multiplier == pytest.approx(3.5, abs=0.05)


@pytest.mark.parametrize("accountant", BOTH)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(accountant: Accountant) -> None:
    whole = plan(1.1, 3.0, DELTA, 0.04, 3750, accountant, Ledger())
    rest = plan(1.1, 3.0, DELTA, 0.04, 3650, accountant, ledger((1.1, 0.04, 100)))
    assert rest.num_steps == whole.num_steps - 100
    assert rest.epsilon == whole.epsilon
    calibrated = plan(None, 3.0, DELTA, 0.04, 500, accountant, Ledger())
    spent = ledger((calibrated.noise_multiplier, 0.04, 200))
    assert plan(calibrated.noise_multiplier, 3.0, DELTA, 0.04, 300, accountant, spent).num_steps == 300


@pytest.mark.parametrize("accountant", BOTH)
def test_other_mechanisms_before_leave_less_of_the_budget(accountant: Accountant) -> None:
    spent = ledger((2.0, 0.05, 200))
    fresh, later = (plan(1.1, 4.0, DELTA, 0.04, 1000, accountant, before) for before in (Ledger(), spent))
    assert 0 < later.num_steps < fresh.num_steps
    assert later.epsilon <= 4.0
    quiet = plan(None, 4.0, DELTA, 0.04, 300, accountant, spent)
    assert quiet.noise_multiplier > plan(None, 4.0, DELTA, 0.04, 300, accountant, Ledger()).noise_multiplier
    assert 3.96 < quiet.epsilon <= 4.0


def test_neither_noise_nor_epsilon_is_an_error() -> None:
    with pytest.raises(ConfigError, match="neither noise_multiplier nor target_epsilon"):
        plan(None, None, DELTA, 0.04, 10, "rdp", Ledger())


def test_a_budget_without_a_step_is_an_error_that_names_the_cost() -> None:
    with pytest.raises(ConfigError, match=r"allows no step.*noise_multiplier \(0.4\)"):
        plan(0.4, 1.0, DELTA, 0.04, 10, "rdp", Ledger())
    with pytest.raises(ConfigError, match=r"epsilon to inf"):
        plan(0.0, 1.0, DELTA, 0.04, 10, "prv", Ledger())
    with pytest.raises(TrainingError, match=r"is spent: epsilon 3\.\d+ of training.dp.target_epsilon 3"):
        plan(1.1, 3.0, DELTA, 0.04, 10, "prv", ledger((1.1, 0.04, 200)))
    with pytest.raises(TrainingError, match="allows no step"):
        plan(0.3, 3.0, DELTA, 0.04, 10, "rdp", ledger((1.1, 0.04, 130)))


def test_an_epsilon_below_what_any_noise_reaches_is_an_error() -> None:
    with pytest.raises(ConfigError, match="out of reach"):
        plan(None, 1e-4, DELTA, 0.04, 10, "rdp", Ledger())


def test_a_finished_run_has_a_plan_of_no_steps() -> None:
    done = plan(1.1, 3.0, DELTA, 0.04, 0, "rdp", ledger((1.1, 0.04, 200)))
    assert (done.num_steps, done.epsilon) == (0, ledger((1.1, 0.04, 200)).epsilon(DELTA, "rdp"))


def test_the_plan_says_what_it_costs_or_where_the_budget_ends() -> None:
    budget = plan(1.1, 3.0, DELTA, 0.04, 3750, "rdp", Ledger())
    assert budget.sentence(25) == (
        "Privacy: the budget ends after step 135 of 3750, in epoch 6 of 150, at epsilon 2.996 with noise multiplier 1.1"
        " (delta 1e-05, unit of privacy one image, accountant rdp)"
    )
    resumed = plan(1.1, 3.0, DELTA, 0.04, 3650, "rdp", ledger((1.1, 0.04, 100)))
    assert resumed.sentence(25, first_step=100) == budget.sentence(25)
    whole = plan(1.1, None, DELTA, 0.04, 3750, "rdp", Ledger(), "patient")
    assert whole.sentence(25) == (
        "Privacy: epsilon 16.51 after 3750 steps, 150 epochs, with noise multiplier 1.1 "
        "(delta 1e-05, unit of privacy one patient, accountant rdp)"
    )
    assert "none: epsilon has no bound" in plan(0.0, None, DELTA, 0.04, 10, "prv", Ledger()).sentence(25)
    small = plan(0.05, None, DELTA, 0.04, 100, "prv", Ledger()).sentence(25)
    assert "accountant rdp, because prv overflows" in small


def test_two_resumes_of_a_checkpoint_are_both_charged() -> None:
    """The folder went on from 100 to 130 steps; going on from 100 again, its 30 stay charged."""
    checkpoint, folder = ledger((1.1, 0.04, 100)), ledger((1.1, 0.04, 130))
    second = checkpoint.at_least(folder)
    assert second.mechanisms == folder.mechanisms
    second.charge(1.1, 0.04, 30, 1.0)
    assert second.num_steps == 160
    assert folder.at_least(checkpoint).mechanisms == folder.mechanisms


def test_of_two_ledgers_neither_is_shortened() -> None:
    a, b = ledger((1.1, 0.04, 100), (2.0, 0.04, 10)), ledger((1.1, 0.04, 60), (0.8, 0.02, 5), (1.1, 0.04, 50))
    for merged in (a.at_least(b), b.at_least(a)):
        assert merged.epsilon(DELTA, "rdp") >= max(a.epsilon(DELTA, "rdp"), b.epsilon(DELTA, "rdp"))
        assert merged.num_steps == 110 + 10 + 5
    assert (len(a.mechanisms), len(b.mechanisms)) == (2, 3)
    assert Ledger().at_least(a).mechanisms == a.mechanisms


def test_privacy_json_has_its_keys_and_comes_back_as_the_same_ledger(tmp_path: Path) -> None:
    charged = ledger((1.1, 0.1 + 0.2, 100), (3.512504320746599, 0.04, 7))
    path = tmp_path / "privacy.json"
    choices = ["best.pt was chosen on private images"]
    write_json(path, privacy_report(charged, DELTA, "prv", "patient", choices, {"a": 7}))
    contents = json.loads(path.read_text())
    assert contents == {
        "epsilon": charged.epsilon(DELTA, "prv"),
        "delta": DELTA,
        "accountant": "prv",
        "unit": "patient",
        "mechanisms": [
            {"noise_multiplier": 1.1, "sample_rate": 0.1 + 0.2, "steps": 100, "max_grad_norm": 1.0},
            {"noise_multiplier": 3.512504320746599, "sample_rate": 0.04, "steps": 7, "max_grad_norm": 1.0},
        ],
        "not_covered": choices,
        "replays": {"a": 7},
    }
    again = read_privacy(path)
    assert again is not None
    assert again[0].mechanisms == charged.mechanisms and again[1] == {"a": 7}


def test_an_epsilon_without_bound_is_null(tmp_path: Path) -> None:
    write_json(tmp_path / "p.json", privacy_report(ledger((0.0, 0.04, 1)), DELTA, "prv", "image", [], {}))
    assert json.loads((tmp_path / "p.json").read_text(), parse_constant=pytest.fail)["epsilon"] is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"mechanisms": [{"steps": 3}]}',
        '{"mechanisms": null}',
        '{"mechanisms": [1]}',
        '{"mechanisms": []}',
        '{"mechanisms": [], "replays": [1]}',
    ],
)
def test_a_damaged_privacy_json_is_not_an_empty_ledger(tmp_path: Path, text: str) -> None:
    path = tmp_path / "privacy.json"
    path.write_text(text)
    with pytest.raises(TrainingError, match=r"privacy\.json cannot be read"):
        read_privacy(path)
    assert read_privacy(tmp_path / "none.json") is None
