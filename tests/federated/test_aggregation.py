"""Updates become one model: each strategy against its formula in plain NumPy, resumes, order, and wrong sites."""

import gc
import random
import re
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import trim_mean

from ml_src.core.errors import CheckpointError, TrainingError
from ml_src.core.federated.aggregation import STRATEGIES, Aggregator, Update, bears, least_sites, norm, sound
from ml_src.core.federated_specs import SELECTIVE, FederatedConfig

Arrays = dict[str, NDArray[np.float32]]
Both = tuple[Arrays, Arrays]
Vector = NDArray[np.float64]

SHAPES = {"encoder.weight": (4, 3, 3), "decoder.bias": (5,), "scale": ()}
SITES = ["berlin", "oslo", "lima", "accra", "quito", "hanoi", "paris"]
IMAGES = [40, 7, 120, 33, 64, 5, 18]


@pytest.fixture(autouse=True, scope="module")
def no_old_objects() -> Iterator[None]:
    """Flower's bulyan collects garbage for each update: among the objects of a whole test run that is slow."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def config(strategy: str, **options: Any) -> FederatedConfig:
    return FederatedConfig.model_validate({"num_sites": 7, "strategy": {"type": strategy, **options}})


def model(seed: int, scale: float = 0.1) -> Both:
    """Parameters (one of them a number without an axis) and buffers."""
    rng = np.random.default_rng(seed)
    parameters = {name: np.asarray(scale * rng.standard_normal(shape), np.float32) for name, shape in SHAPES.items()}
    return parameters, {"norm.running_var": rng.uniform(0.5, 2, 6).astype(np.float32)}


def trained(before: Both, seed: int, num_sites: int = 7, step: float = 0.02) -> list[Update]:
    """What sites send that have walked in much the same direction."""
    rng = np.random.default_rng(seed)
    common = {name: rng.standard_normal(values.shape) for name, values in before[0].items()}
    updates = []
    for site, num_images in zip(SITES[:num_sites], IMAGES, strict=False):
        parameters = {
            name: np.asarray(values + step * (common[name] + 0.5 * rng.standard_normal(values.shape)), np.float32)
            for name, values in before[0].items()
        }
        buffers = {name: rng.uniform(0.5, 2, values.shape).astype(np.float32) for name, values in before[1].items()}
        updates.append(Update(site, num_images, parameters, buffers))
    return updates


def flat(arrays: Arrays) -> Vector:
    return np.concatenate([arrays[name].astype(np.float64).ravel() for name in SHAPES])


def by_name(updates: Sequence[Update]) -> list[Update]:
    return sorted(updates, key=lambda update: update.site)


def table(updates: Sequence[Update]) -> NDArray[np.float64]:
    """One row a site."""
    return np.stack([flat(update.parameters) for update in by_name(updates)])


def weighted(updates: Sequence[Update]) -> Vector:
    mean: Vector = np.average(table(updates), axis=0, weights=[update.num_images for update in by_name(updates)])
    return mean


def same_bits(first: Both, second: Both) -> bool:
    return all(
        set(a) == set(b) and all(a[name].tobytes() == b[name].tobytes() for name in a)
        for a, b in zip(first, second, strict=True)
    )


# ------------------------------------------------------------------------------------------------ the formulas

Rule = Callable[[int, Vector, Sequence[Update]], Vector]


def mean_rule() -> Rule:
    """McMahan et al. 2017, algorithm 1; FedProx changes only what the sites do."""
    return lambda round, before, updates: weighted(updates)


def momentum_rule() -> Rule:
    """Hsu et al. 2019, section 4.3, with a rate of 0.7 and a momentum of 0.8."""
    kept: list[Vector] = [np.zeros(())]

    def rule(round: int, before: Vector, updates: Sequence[Update]) -> Vector:
        kept[0] = 0.8 * kept[0] + (weighted(updates) - before)
        return before + 0.7 * kept[0]

    return rule


def adaptive_rule(second: Callable[[Vector, Vector], Vector], beta_1: float, corrected: bool = False) -> Rule:
    """Reddi et al. 2021, algorithm 2, from v = 0; Flower's Adam corrects the bias as if one round had passed before."""
    m: list[Vector] = [np.zeros(())]
    v: list[Vector] = [np.zeros(())]

    def rule(round: int, before: Vector, updates: Sequence[Update]) -> Vector:
        change = weighted(updates) - before
        m[0] = beta_1 * m[0] + (1 - beta_1) * change
        v[0] = second(v[0], change**2)
        rate = 0.05
        if corrected:
            rate *= np.sqrt(1 - 0.95 ** (round + 1)) / (1 - beta_1 ** (round + 1))
        return before + rate * m[0] / (np.sqrt(v[0]) + 0.01)

    return rule


def adam(v: Vector, square: Vector) -> Vector:
    return 0.95 * v + 0.05 * square


def yogi(v: Vector, square: Vector) -> Vector:
    return v - 0.05 * square * np.sign(v - square)


def adagrad(v: Vector, square: Vector) -> Vector:
    return v + square


def median_rule() -> Rule:
    """Yin et al. 2018, definition 1."""
    return lambda round, before, updates: np.median(table(updates), axis=0)


def trimmed_rule() -> Rule:
    """Yin et al. 2018, definition 2, as SciPy has it."""
    return lambda round, before, updates: trim_mean(table(updates), 0.3, axis=0)


def nearest(updates: Sequence[Update], wrong: int, number: int) -> NDArray[np.float64]:
    """Blanchard et al. 2017, section 4: the rows with the least sums of squared distances to n - f - 2 neighbours."""
    rows = table(updates)
    scores = []
    for index, row in enumerate(rows):
        distances = sorted(float(((row - other) ** 2).sum()) for o, other in enumerate(rows) if o != index)
        scores.append(sum(distances[: len(rows) - wrong - 2]))
    return rows[np.argsort(scores)[:number]]


def krum_rule(number: int, wrong: int) -> Rule:
    return lambda round, before, updates: nearest(updates, wrong, number).mean(0)


def bulyan_rule() -> Rule:
    """El Mhamdi et al. 2018, section 4, with f = 1, but that Flower selects all n - 2 f at once.

    Then for each weight the mean of the n - 4 f values that are nearest to the median of the selected.
    """

    def rule(round: int, before: Vector, updates: Sequence[Update]) -> Vector:
        chosen = nearest(updates, 1, len(updates) - 2)
        order = np.abs(chosen - np.median(chosen, axis=0)).argsort(axis=0)
        means: Vector = np.take_along_axis(chosen, order[: len(updates) - 4], axis=0).mean(0)
        return means

    return rule


ADAPTIVE = {"eta": 0.05, "tau": 0.01}
BETAS = {"beta_1": 0.8, "beta_2": 0.95}
CASES: dict[str, tuple[dict[str, Any], Callable[[], Rule]]] = {
    "fedavg": ({}, mean_rule),
    "fedprox": ({"proximal_mu": 0.1}, mean_rule),
    "fedavgm": ({"server_learning_rate": 0.7, "server_momentum": 0.8}, momentum_rule),
    "fedadam": (ADAPTIVE | BETAS, lambda: adaptive_rule(adam, 0.8, corrected=True)),
    "fedyogi": (ADAPTIVE | BETAS, lambda: adaptive_rule(yogi, 0.8)),
    "fedadagrad": (ADAPTIVE, lambda: adaptive_rule(adagrad, 0.0)),
    "fedmedian": ({}, median_rule),
    "fedtrimmedavg": ({"beta": 0.3}, trimmed_rule),
    "krum": ({"num_malicious": 1}, lambda: krum_rule(1, 1)),
    "multikrum": ({"num_malicious": 1, "num_selected": 3}, lambda: krum_rule(3, 1)),
    "bulyan": ({"num_malicious": 1}, bulyan_rule),
}
MEANS = sorted(set(CASES) - set(SELECTIVE))


def aggregator(kind: str) -> Aggregator:
    return Aggregator(config(kind, **CASES[kind][0]))


def test_every_strategy_has_a_formula_here() -> None:
    assert set(CASES) == set(STRATEGIES)


@pytest.mark.parametrize("kind", CASES)
def test_three_rounds_give_what_the_formula_gives(kind: str) -> None:
    """In float64 from the weights that each round began with; the result is float32 of the same names and shapes."""
    mine, rule = aggregator(kind), CASES[kind][1]()
    state = model(1)
    for round in (1, 2, 3):
        updates = trained(state, 10 * round)
        expected = rule(round, flat(state[0]), updates)
        before, state = state, mine.combine(round, state, updates)
        np.testing.assert_allclose(flat(state[0]), expected, rtol=0, atol=2e-7)
        assert not np.allclose(flat(state[0]), flat(before[0]), atol=1e-4)
        for new, old in zip(state, before, strict=True):
            assert {name: (a.dtype, a.shape) for name, a in new.items()} == {
                name: (a.dtype, a.shape) for name, a in old.items()
            }


@pytest.mark.parametrize("kind", CASES)
def test_running_statistics_are_averaged_apart_from_the_strategy(kind: str) -> None:
    """Their weighted mean, or for robust strategies the median; whatever the server's optimizer remembers."""
    mine, state = aggregator(kind), model(1)
    for round in (1, 2):
        updates = by_name(trained(state, round))
        rows = np.stack([update.buffers["norm.running_var"] for update in updates]).astype(np.float64)
        state = mine.combine(round, state, updates)
        shares = [update.num_images for update in updates]
        expected = np.median(rows, axis=0) if kind in SELECTIVE else np.average(rows, axis=0, weights=shares)
        np.testing.assert_allclose(state[1]["norm.running_var"], expected, rtol=3e-7)


def test_a_network_may_have_no_running_statistics() -> None:
    parameters, _ = model(1)
    updates = [Update(u.site, u.num_images, u.parameters, {}) for u in trained((parameters, {}), 2)]
    assert aggregator("fedadam").combine(1, (parameters, {}), updates)[1] == {}


# ------------------------------------------------------------------------------------------------ to the bit


@pytest.mark.parametrize("kind", ["fedavg", "fedprox"])
def test_one_update_comes_back_to_the_bit(kind: str) -> None:
    """With values of every size, none of which survives a subtraction and an addition, and a negative zero."""
    rng = np.random.default_rng(5)
    wild = (rng.standard_normal(1000) * 10.0 ** rng.uniform(-30, 30, 1000)).astype(np.float32)
    wild[0] = -0.0
    before = ({"w": rng.standard_normal(1000).astype(np.float32)}, {"b": wild[::-1].copy()})
    update = Update("oslo", 37, {"w": wild}, {"b": wild * 3})
    assert same_bits(aggregator(kind).combine(1, before, [update]), (update.parameters, update.buffers))


@pytest.mark.parametrize("kind", CASES)
def test_the_order_of_arrival_changes_no_bit(kind: str) -> None:
    before = model(1)
    updates = trained(before, 2)
    forward = aggregator(kind).combine(1, before, updates)
    rng = np.random.default_rng(3)
    for _ in range(3):
        shuffled = [updates[index] for index in rng.permutation(len(updates))]
        assert same_bits(aggregator(kind).combine(1, before, shuffled), forward)


@pytest.mark.parametrize("kind", CASES)
def test_the_order_of_the_weights_in_an_update_does_not_matter(kind: str) -> None:
    """Flower's momentum matches arrays by their position."""
    before = model(1)
    updates = trained(before, 2)
    turned = [
        Update(u.site, u.num_images, dict(reversed(u.parameters.items())), u.buffers) if index % 2 else u
        for index, u in enumerate(updates)
    ]
    assert same_bits(aggregator(kind).combine(1, before, turned), aggregator(kind).combine(1, before, updates))


@pytest.mark.parametrize("kind", ["fedavgm", "fedadam", "fedyogi", "fedadagrad", "krum", "multikrum", "bulyan"])
def test_weights_that_no_site_has_changed_do_not_drift(kind: str) -> None:
    """A frozen encoder stays to the bit, though a float32 mean of equal values is not always that value."""
    before = model(4)
    frozen = before[0]["encoder.weight"]
    updates = [
        Update(u.site, u.num_images, u.parameters | {"encoder.weight": frozen.copy()}, u.buffers)
        for u in trained(before, 2)
    ]
    after, _ = aggregator(kind).combine(1, before, updates)
    assert after["encoder.weight"].tobytes() == frozen.tobytes()
    assert not np.array_equal(after["decoder.bias"], before[0]["decoder.bias"])


@pytest.mark.parametrize("kind", CASES)
def test_a_resumed_federation_goes_on_to_the_same_bits(kind: str) -> None:
    """Through a checkpoint that is opened with weights_only=True, after each of the first two rounds."""
    straight, state = aggregator(kind), model(1)
    resumed = aggregator(kind)
    for round in (1, 2, 3):
        updates = trained(state, round)
        after = straight.combine(round, state, updates)
        assert same_bits(resumed.combine(round, state, updates), after)
        state = after
        file = BytesIO()
        torch.save(resumed.state_dict(), file)
        file.seek(0)
        resumed = aggregator(kind)
        resumed.load_state_dict(torch.load(file, weights_only=True))


def test_saved_state_does_not_change_with_later_rounds() -> None:
    mine, before = aggregator("fedavgm"), model(1)
    after = mine.combine(1, before, trained(before, 1))
    saved = mine.state_dict()
    first = [tensor.clone() for tensor in saved["kept"]["momentum_vector"]]
    mine.combine(2, after, trained(after, 2))
    assert all(torch.equal(a, b) for a, b in zip(saved["kept"]["momentum_vector"], first, strict=True))


def test_the_state_of_another_strategy_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"federated\.strategy is fedadam, .* made with fedavg: set it back"):
        aggregator("fedadam").load_state_dict(aggregator("fedavg").state_dict())


@pytest.mark.parametrize("kind", MEANS)
def test_a_mean_alone_gives_what_its_updates_give(kind: str) -> None:
    """As under secure aggregation, over two rounds."""
    single, summed, state = aggregator(kind), aggregator(kind), model(1)
    for round in (1, 2):
        updates = trained(state, round)
        total = sum(update.num_images for update in updates)
        means: list[Arrays] = [
            {
                name: np.asarray(
                    sum(getattr(u, part)[name].astype(np.float64) * u.num_images for u in updates) / total, np.float32
                )
                for name in before
            }
            for part, before in zip(("parameters", "buffers"), state, strict=True)
        ]
        known = summed.combine_mean(round, state, means[0], means[1], total)
        state = single.combine(round, state, updates)
        for a, b in zip(known, state, strict=True):
            for name in a:
                np.testing.assert_allclose(a[name], b[name], rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("kind", SELECTIVE)
def test_a_strategy_that_looks_at_single_updates_refuses_a_mean(kind: str) -> None:
    before = model(1)
    with pytest.raises(ValueError, match="cannot work with a mean"):
        aggregator(kind).combine_mean(1, before, *before, 10)


def test_the_generators_of_others_are_left_alone() -> None:
    """Flower draws its nodes from Python's global generator."""
    before = model(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    for kind in CASES:
        aggregator(kind).combine(1, before, trained(before, 2))
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_sent_arrays_and_the_weights_before_are_not_changed() -> None:
    for kind in CASES:
        before = model(1)
        updates = trained(before, 2)
        aggregator(kind).combine(1, before, updates)
        assert same_bits(before, model(1))
        for old, new in zip(trained(before, 2), updates, strict=True):
            assert same_bits((old.parameters, old.buffers), (new.parameters, new.buffers))


# ------------------------------------------------------------------------------------------------ wrong sites


def poisoned(update: Update, value: float) -> Update:
    return Update(
        update.site,
        10**9,  # what it says of itself
        {name: np.full_like(values, value) for name, values in update.parameters.items()},
        {name: np.full_like(values, value) for name, values in update.buffers.items()},
    )


@pytest.mark.parametrize("value", [1e4, -1e4, 0.5])
@pytest.mark.parametrize("kind", SELECTIVE)
def test_robust_strategies_bear_one_wrong_site(kind: str, value: float) -> None:
    """Each weight stays within what the right sites sent, whatever the wrong one sends and wherever it is."""
    before = model(1)
    updates = trained(before, 2)
    for wrong in range(len(updates)):
        right = [update for index, update in enumerate(updates) if index != wrong]
        sent = [*right, poisoned(updates[wrong], value)]
        parameters, buffers = aggregator(kind).combine(1, before, sent)
        rows = table(right)
        assert (flat(parameters) >= rows.min(0) - 1e-6).all() and (flat(parameters) <= rows.max(0) + 1e-6).all()
        spread = np.stack([update.buffers["norm.running_var"] for update in right])
        assert (buffers["norm.running_var"] >= spread.min(0)).all()
        assert (buffers["norm.running_var"] <= spread.max(0)).all()


@pytest.mark.parametrize("kind", ["krum", "multikrum", "bulyan"])
@pytest.mark.parametrize("num_malicious", [0, 1, 2])
def test_krum_bears_as_many_wrong_sites_as_it_promises_with_the_least_sites(kind: str, num_malicious: int) -> None:
    """Even where the wrong ones agree with each other; with fewer sites than the least, two of them would win."""
    options = {"num_malicious": num_malicious} | ({"num_selected": 2} if kind == "multikrum" else {})
    chosen = config(kind, **options)
    before = ({"w": np.zeros(50, np.float32)}, {})
    rng = np.random.default_rng(3)
    updates = [
        Update(f"site {index}", 5, {"w": rng.normal(1, 0.1, 50).astype(np.float32)}, {})
        for index in range(least_sites(chosen) - num_malicious)
    ]
    wrong = [Update(f"wrong {i}", 5, {"w": np.full(50, -3, np.float32)}, {}) for i in range(num_malicious)]
    after, _ = Aggregator(chosen).combine(1, before, updates + wrong)
    assert (after["w"] > 0.5).all()


@pytest.mark.parametrize(
    ("kind", "num_sites", "borne"),
    [
        *[("krum", 3, 0), ("krum", 4, 0), ("krum", 5, 1), ("krum", 7, 2)],
        *[("multikrum", 3, 0), ("multikrum", 5, 1), ("bulyan", 6, 0), ("bulyan", 7, 1)],
    ],
)
def test_as_many_wrong_sites_as_a_round_allows_are_borne_where_nothing_else_is_said(
    kind: str, num_sites: int, borne: int
) -> None:
    chosen = config(kind)
    assert bears(chosen.strategy, num_sites) == borne
    before = ({"w": np.zeros(50, np.float32)}, {})
    rng = np.random.default_rng(3)
    right = [rng.normal(1, 0.1, 50).astype(np.float32) for _ in range(num_sites - borne)]
    wrong = [np.full(50, -3, np.float32)] * borne
    updates = [Update(f"site {i}", 5, {"w": w}, {}) for i, w in enumerate(right + wrong)]
    made = Aggregator(chosen)
    after, _ = made.combine(1, before, updates)
    assert (after["w"] > 0.5).all()
    assert made.combine(2, before, updates[:3])  # in a round of fewer, as many as that allows
    explicit = Aggregator(config(kind, num_malicious=borne))
    assert np.array_equal(explicit.combine(1, before, updates)[0]["w"], after["w"])


@pytest.mark.parametrize("seed", range(5))
def test_krum_finds_the_nearest_among_weights_that_are_nearly_equal(seed: int) -> None:
    """Late in training: large weights, small updates, and the wrong site's is only twice as long as the others'."""
    rng = np.random.default_rng(seed)
    before = ({"w": (5 * rng.standard_normal(20_000)).astype(np.float32)}, {})
    spreads = [1e-4, 0.9e-4, 1.1e-4, 1.2e-4, 2e-4]
    updates = [
        Update(site, 5, {"w": (before[0]["w"] + s * rng.standard_normal(20_000)).astype(np.float32)}, {})
        for site, s in zip(SITES, spreads, strict=False)
    ]
    rows = {update.site: update.parameters["w"].astype(np.float64) for update in updates}
    scores = {
        site: sum(sorted(float(((row - other) ** 2).sum()) for other in rows.values())[1:3])
        for site, row in rows.items()
    }
    chosen = Aggregator(config("krum", num_malicious=1)).combine(1, before, updates)[0]["w"]
    best = min(scores, key=scores.__getitem__)
    # the chosen one, but for one rounding of weight minus weight plus weight
    assert np.abs(chosen - rows[best]).max() < 2e-6 < np.abs(chosen - rows[SITES[4]]).max()


def test_robust_strategies_do_not_believe_how_many_images_a_site_has() -> None:
    before = model(1)
    updates = trained(before, 2)
    boasting = [Update(u.site, 10**9 if u.site == "oslo" else 1, u.parameters, u.buffers) for u in updates]
    for kind in SELECTIVE:
        assert same_bits(aggregator(kind).combine(1, before, boasting), aggregator(kind).combine(1, before, updates))


@pytest.mark.parametrize(
    ("kind", "options", "least"),
    [
        ("fedavg", {}, 1),
        ("fedadam", {}, 1),
        ("fedmedian", {}, 3),
        ("fedtrimmedavg", {"beta": 0.2}, 5),
        ("fedtrimmedavg", {"beta": 0.3}, 4),
        ("fedtrimmedavg", {"beta": 0.49}, 3),
        ("fedtrimmedavg", {"beta": 1 / 49}, 50),  # 49 * (1 / 49) is less than 1
        ("krum", {}, 3),
        ("krum", {"num_malicious": 2}, 7),
        ("multikrum", {"num_malicious": 1, "num_selected": 2}, 5),
        ("multikrum", {"num_malicious": 1, "num_selected": 6}, 7),
        ("bulyan", {"num_malicious": 1}, 7),
        ("bulyan", {}, 3),
    ],
)
def test_too_few_updates_end_with_a_sentence(kind: str, options: dict[str, Any], least: int) -> None:
    chosen = config(kind, **options)
    assert least_sites(chosen) == least
    before = model(1)
    one = trained(before, 2, 1)[0]
    updates = [Update(f"site {index}", 5, one.parameters, one.buffers) for index in range(least)]
    assert Aggregator(chosen).combine(4, before, updates)
    with pytest.raises(TrainingError, match=rf"round 4: federated\.strategy {kind} needs .* {least} sites and has"):
        Aggregator(chosen).combine(4, before, updates[:-1])


@pytest.mark.parametrize("beta", [0.01, 1 / 49, 0.1, 0.2, 0.3, 1 / 3, 0.45])
def test_a_trimmed_mean_cuts_somebody_off_from_its_least_sites_on(beta: float) -> None:
    """By the rule of Flower and of SciPy: int(beta * n) at either end."""
    least = least_sites(config("fedtrimmedavg", beta=beta))
    assert int(beta * least) == 1
    assert int(beta * (least - 1)) == 0


def test_a_server_that_diverges_says_so() -> None:
    before = ({"w": np.full(3, 3e38, np.float32)}, {})
    update = Update("oslo", 1, {"w": np.full(3, -3e38, np.float32)}, {})
    mine = Aggregator(config("fedavgm", server_learning_rate=10.0, server_momentum=0.0))
    with (
        np.errstate(all="ignore"),
        pytest.raises(TrainingError, match=r"round 2: .* fedavgm makes are no finite numbers: lower its learning"),
    ):
        mine.combine(2, before, [update])


# ------------------------------------------------------------------------------------------------ sound or not


def changed(update: Update, **fields: Any) -> Update:
    parts = {"num_images": update.num_images, "parameters": update.parameters, "buffers": update.buffers}
    return Update(update.site, **(parts | fields))


def with_value(arrays: Arrays, name: str, value: float) -> Arrays:
    copy = arrays[name].copy()
    copy.flat[0] = value
    return arrays | {name: copy}


def faults() -> dict[str, tuple[Callable[[Update], Update], str]]:
    return {
        "nan": (
            lambda u: changed(u, parameters=with_value(u.parameters, "decoder.bias", np.nan)),
            "decoder.bias has values that are no finite number",
        ),
        "inf": (lambda u: changed(u, parameters=with_value(u.parameters, "scale", -np.inf)), "scale has values"),
        "nan in a buffer": (
            lambda u: changed(u, buffers=with_value(u.buffers, "norm.running_var", np.nan)),
            "norm.running_var has values that are no finite number",
        ),
        "huge": (
            lambda u: changed(u, parameters=with_value(u.parameters, "decoder.bias", 3e38)),
            r"its L2 norm 3e\+38 is over .* 10 times the median of this round",
        ),
        "missing": (lambda u: changed(u, parameters={}), "other parameters than the model .*scale"),
        "one too many": (
            lambda u: changed(u, buffers=u.buffers | {"num_batches_tracked": u.parameters["scale"]}),
            r"other buffers than the model \(num_batches_tracked\)",
        ),
        "another shape": (
            lambda u: changed(u, parameters=u.parameters | {"decoder.bias": np.zeros((5, 1), np.float32)}),
            r"decoder.bias is float32 \(5, 1\), not float32 \(5,\)",
        ),
        "another dtype": (
            lambda u: changed(u, parameters=u.parameters | {"decoder.bias": np.zeros(5)}),
            "decoder.bias is float64",
        ),
        "no images": (lambda u: changed(u, num_images=0), "it comes from 0 images"),
    }


@pytest.mark.parametrize("fault", faults())
def test_a_wrong_update_is_dropped_and_named(fault: str) -> None:
    before = model(1)
    updates = trained(before, 2, 4)
    damage, sentence = faults()[fault]
    with np.errstate(all="raise"):
        good, dropped = sound(before, [updates[0], damage(updates[1]), *updates[2:]], None)
    assert [update.site for update in good] == ["berlin", "lima", "accra"]
    assert list(dropped) == ["oslo"]
    assert re.search(sentence, dropped["oslo"]), dropped["oslo"]


def test_sound_updates_are_all_kept_as_they_are() -> None:
    before = model(1)
    updates = trained(before, 2)
    good, dropped = sound(before, updates, None)
    assert dropped == {}
    assert all(a is b for a, b in zip(good, updates, strict=True))


def test_a_bound_that_is_given_holds_to_the_digit() -> None:
    before = model(1)
    updates = trained(before, 2, 2)
    lengths = [float(np.linalg.norm(flat(update.parameters) - flat(before[0]))) for update in updates]
    assert [norm(before, update) for update in updates] == pytest.approx(lengths, rel=1e-12)
    for bound, kept in ((max(lengths) * 1.001, 2), (max(lengths) * 0.999, 1), (min(lengths) * 0.999, 0)):
        good, dropped = sound(before, updates, bound)
        assert (len(good), len(dropped)) == (kept, 2 - kept)
        assert all("federated.max_update_norm" in why for why in dropped.values())


def test_two_updates_have_no_median_to_judge_them() -> None:
    before = model(1)
    near, far = trained(before, 2, 2)
    updates = [near, changed(far, parameters=with_value(far.parameters, "scale", 1e9))]
    assert sound(before, updates, None)[1] == {}


def test_where_most_sites_stood_still_one_that_moved_is_kept() -> None:
    before = model(1)
    still = [Update(site, 5, *before) for site in SITES[:3]]
    assert sound(before, [*still, trained(before, 2)[4]], None)[1] == {}
