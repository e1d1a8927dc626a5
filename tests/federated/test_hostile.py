"""What a server or a site sends to do harm, or by mistake, does none; what is spent is never told as less."""

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from known_federation import CONFIG
from known_sites import Configure, history, led, prepared, weights
from torch.optim.optimizer import register_optimizer_step_pre_hook

from flwr.app import Error, Message
from ml_src.cli import federated as cli
from ml_src.core.config import Config
from ml_src.core.errors import TrainingError
from ml_src.core.federated.client import REFUSED, answer
from ml_src.core.federated.journal import Journal
from ml_src.core.federated.kits import read_server_kit, read_site_kit, write_kits
from ml_src.core.federated.layout import Arrays, Layout
from ml_src.core.federated.link import Link
from ml_src.core.federated.local_grid import LocalGrid
from ml_src.core.federated.rounds import MOST_NUMBERS, Federation
from ml_src.core.federated.session import Session
from ml_src.core.federated.simulation import site_configs
from ml_src.core.federated.site import LONGEST_NAME, Site
from ml_src.core.federated.site_state import MOST_SESSIONS
from ml_src.core.federated.wire import ENVELOPE, Letter, WireError, from_record, to_record
from ml_src.core.network import build_model

Dict = dict[str, Any]
Node = Callable[[Message], Message]
SETTLED = {"mean": None, "std": None, "class_counts": [3, 2, 1], "num_images": 17}
NOISY = {"noise_multiplier": 1.0, "accountant": "rdp", "public_statistics": True}
PRIVATE = {"model.norm": "group", "training.dp": NOISY}


def opened(config: Config, folder: Path, name: str = "site_0") -> Site:
    """The first site of a federation, in a session; sites in several folders have the same images."""
    site = Site(name, site_configs(config, folder.parent / "sites")[name], folder)
    site.answer(Letter("facts", "now", 0))
    site.answer(Letter("settle", "now", 0, values=SETTLED))
    return site


def first_weights(site: Site) -> Arrays:
    torch.manual_seed(0)
    return site.layout.flatten(build_model(site.config.model))


def between(federation: Federation, name: str, change: Callable[[Message, Node], Message]) -> None:
    """Let `change` stand between the server and a site."""
    grid, number = federation.session.link.grid, federation.session.link.nodes()[name]
    assert isinstance(grid, LocalGrid)
    node = grid.nodes[number]
    grid.nodes = {**grid.nodes, number: lambda message: change(message, node)}


def kind_of(message: Message) -> str:
    return str(message.content[ENVELOPE]["kind"])


def told(values: Dict, kind: str = "train") -> Callable[[Message, Node], Message]:
    """A site that says `values` beside what it has to say in answers of one kind."""

    def change(message: Message, node: Node) -> Message:
        reply = node(message)
        if kind_of(message) == kind and not reply.has_error():
            envelope = reply.content[ENVELOPE]
            envelope["values"] = json.dumps(json.loads(envelope["values"]) | values)
        return reply

    return change


def refusing(kinds: Iterable[str], sentence: str = "not today") -> Callable[[Message, Node], Message]:
    """A site that does nothing for letters of these kinds."""

    def change(message: Message, node: Node) -> Message:
        return Message(Error(REFUSED, sentence), reply_to=message) if kind_of(message) in kinds else node(message)

    return change


def ended(federation: Federation) -> Dict:
    """Run a federation to its end; returns its history."""
    try:
        federation.run()
    finally:
        federation.journal.close()
    return history(federation.journal.run_dir)


@contextmanager
def rates_of_steps() -> Iterator[list[float]]:
    """The learning rate with which each optimizer step of the block is taken."""
    rates: list[float] = []
    handle = register_optimizer_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    try:
        yield rates
    finally:
        handle.remove()


# Rates


def half_cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def one_cycle(step: int) -> float:
    """30 % up from 1/25, down to 1/250 000, of 12 steps."""
    progress = step / 12
    if progress < 0.3:
        return 1 / 25 + (1 - 1 / 25) * (1 - half_cosine(progress / 0.3))
    return 1 / 250_000 + (1 - 1 / 250_000) * half_cosine((progress - 0.3) / 0.7)


@pytest.mark.parametrize(
    ("scheduler", "factor"),
    [
        ({"type": "cosine"}, lambda step: half_cosine(step / 12)),
        ({"type": "none", "warmup_epochs": 2}, lambda step: min((step + 1) / 6, 1.0)),
        (
            {"type": "cosine", "warmup_epochs": 2},
            lambda step: (step + 1) / 6 if step < 6 else half_cosine((step - 6) / 6),
        ),
        ({"type": "one_cycle", "pct_start": 0.3}, one_cycle),
    ],
)
def test_with_local_steps_the_rate_follows_the_schedule_in_rounds_from_the_configured_rate(
    configure: Configure, tmp_path: Path, scheduler: Dict, factor: Callable[[int], float]
) -> None:
    """Four rounds of three steps, with a restart after the second one."""
    config = configure({"scheduler": scheduler}, rounds=4, local_steps=3)
    site = opened(config, tmp_path / "site")
    start = first_weights(site)
    with rates_of_steps() as rates:
        for number in (1, 2, 3, 4):
            if number == 3:
                site = Site("site_0", site.config.model_copy(update={"federated": config.federated}), site.folder)
            site.answer(Letter("train", "now", number, start))
    assert rates == pytest.approx([0.003 * factor(step) for step in range(12)], rel=1e-9, abs=1e-12)


# Sums


@pytest.mark.parametrize("what", ["num_images", "weights"])
def test_there_is_no_sum_where_one_site_was_told_something_else(configure: Configure, what: str) -> None:
    """Were site_1 told that all have one image, its update would be all that is to be seen of the sum."""
    federation, sites = prepared(configure(secure_aggregation=True))

    def lie(message: Message, node: Node) -> Message:
        letter = from_record(message.content, sites["site_1"].expected())
        if what == "num_images" and letter.kind == "settle":
            letter = replace(letter, values=letter.values | {"num_images": 1})
        if what == "weights" and letter.kind == "train":
            changed = {name: values + np.float32(1) for name, values in letter.arrays.items()}
            letter = replace(letter, arrays=changed)
        message.content = to_record(letter)
        return node(message)

    between(federation, "site_1", lie)
    before = {kind: values.copy() for kind, values in federation.weights.items()}
    federation.session.open(0)
    federation.train_round(1)
    federation.journal.close()
    assert federation.journal.is_skipped(1)
    assert all((federation.weights[kind] == values).all() for kind, values in before.items())
    assert [site.state.summed for site in sites.values()] == [{}, {}, {}]  # no mask was taken off


@pytest.mark.parametrize("has_gone", [False, True])
def test_a_masked_round_is_summed_up_again_over_the_same_sites_only_else_it_is_passed_over(
    configure: Configure, has_gone: bool
) -> None:
    """All four have given what takes the masks off, but two of these answers are lost, and then perhaps a site."""
    config = configure(secure_aggregation=True, num_sites=4)
    federation, sites = prepared(config)
    nodes = federation.session.link.nodes
    lost = []

    def lose(message: Message, node: Node) -> Message:
        reply = node(message)
        if kind_of(message) != "reveal" or len(lost) == 2:
            return reply
        lost.append(1)
        if has_gone:
            federation.session.link.nodes = lambda: {n: k for n, k in nodes().items() if n != "site_3"}
            federation.session.num_sites = 3  # nobody waits for it
        return Message(Error(REFUSED, "lost"), reply_to=message)

    between(federation, "site_2", lose)
    between(federation, "site_3", lose)
    found = ended(federation)
    names = ["site_0", "site_1", "site_2", "site_3"]
    assert sites["site_0"].state.summed["1"] == names
    trained = [sorted(entry["sites"]) for entry in found["rounds"]]
    assert trained == ([[], names[:3]] if has_gone else [names, names])
    if not has_gone:
        led(plain := configure({"run_name": "plain"}, num_sites=4))
        for name, values in weights(plain.run_dir).items():
            torch.testing.assert_close(weights(config.run_dir)[name], values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_sites", [3, 4])
def test_a_site_without_a_budget_is_in_no_sum_and_two_are_too_few(configure: Configure, num_sites: int) -> None:
    config = configure(PRIVATE, backend="dp", secure_aggregation=True, num_sites=num_sites)
    federation, sites = prepared(config)
    commit = federation.journal.commit

    def spend(entry: Dict, state: Dict) -> None:
        commit(entry, state)
        if entry["round"] == 1:
            less = NOISY | {"target_epsilon": entry["sites"]["site_1"]["backend"]["dp_epsilon"]}
            impoverish(sites["site_1"], less)

    federation.journal.commit = spend  # type: ignore[method-assign]
    found = ended(federation)
    names = [f"site_{number}" for number in range(num_sites)]
    trained = [sorted(entry["sites"]) for entry in found["rounds"]]
    assert trained == ([names] if num_sites == 3 else [names, ["site_0", "site_2", "site_3"]])
    assert all("val_loss" in entry["metrics"] for entry in found["rounds"])
    assert (federation.journal.stop == "the privacy budgets of the sites are spent") == (num_sites == 3)
    assert any("privacy budget is spent" in one["what"] for one in found["troubles"] if one["site"] == "site_1")
    if num_sites == 4:
        assert sites["site_0"].state.summed["2"] == trained[1]


def impoverish(site: Site, dp: Dict) -> None:
    """Give a site another budget."""
    assert site.config.training.dp is not None
    training = site.config.training.model_copy(update={"dp": site.config.training.dp.model_copy(update=dp)})
    site.config, site.training = site.config.model_copy(update={"training": training}), None


# Privacy


def test_noise_comes_again_only_where_weights_rate_and_moments_do(configure: Configure, tmp_path: Path) -> None:
    config = configure(PRIVATE | {"deterministic": True}, backend="dp", rounds=3)

    def key(folder: str, change: Callable[[Site, Arrays], object]) -> int:
        """The key of round 2, where something was changed before it."""
        site = opened(config, tmp_path / folder)
        start = first_weights(site)
        site.answer(Letter("train", "now", 1, start))
        change(site, start)
        site.answer(Letter("train", "now", 2, start))
        assert site.training is not None
        return int(site.training.backend.noise.key)  # type: ignore[attr-defined]

    def weigh(site: Site, start: Arrays) -> None:
        start["parameters"] = start["parameters"].copy()
        start["parameters"][7] += np.float32(1e-3)

    def rate(site: Site, start: Arrays) -> None:
        assert site.training is not None
        site.training.schedule.base_lrs = [0.004]

    def move(site: Site, start: Arrays) -> None:
        assert site.training is not None
        next(iter(site.training.optimizer.state_dict()["state"].values()))["exp_avg"].mul_(2)

    same = [key(f"same_{number}", lambda *_: None) for number in range(2)]
    others = [key(change.__name__, change) for change in (weigh, rate, move)]
    assert same[0] == same[1]
    assert len({same[0], *others}) == 4


STOPPING = [{"type": "early_stopping", "monitor": "val_loss", "mode": "min", "patience": 1, "min_delta": 100.0}]


@pytest.mark.parametrize("how", ["early_stopping", "too_few", "masks_stay"])
def test_the_run_never_tells_of_less_privacy_spent_than_the_sites_do(configure: Configure, how: str) -> None:
    """Also for what was trained in a round, and an attempt, that does not count."""
    also = PRIVATE | ({"training.callbacks": STOPPING} if how == "early_stopping" else {})
    config = configure(also, backend="dp", rounds=4, min_sites=3, secure_aggregation=how == "masks_stay")
    federation, sites = prepared(config)
    commit = federation.journal.commit

    def fail(entry: Dict, state: Dict) -> None:
        commit(entry, state)
        if entry["round"] == 1 and how != "early_stopping":
            between(federation, "site_2", refusing(["train"] if how == "too_few" else ["shares"]))

    federation.journal.commit = fail  # type: ignore[method-assign]
    if how == "early_stopping":
        assert len(ended(federation)["rounds"]) == 2
    else:
        with pytest.raises(TrainingError, match="failed 3 times"):
            ended(federation)
    known = json.loads((config.run_dir / "privacy.json").read_bytes())
    own = {name: json.loads((site.folder / "privacy.json").read_bytes()) for name, site in sites.items()}
    assert {name: one["epsilon"] for name, one in known["sites"].items()} == {
        name: one["epsilon"] for name, one in own.items()
    }
    assert known["epsilon"] == max(one["epsilon"] for one in own.values())
    counted = history(config.run_dir)["rounds"][0]["sites"]["site_0"]["backend"]["dp_epsilon"]
    assert own["site_0"]["epsilon"] > counted  # it has trained for what does not count


def test_a_step_for_which_nobody_was_drawn_has_a_loss_that_is_a_number(configure: Configure, tmp_path: Path) -> None:
    """Who is drawn is a secret: it takes as many steps as it takes, of which one in three draws nobody."""
    config = configure(PRIVATE | {"training.batch_size": 1}, backend="dp", rounds=60, num_sites=3)
    site = opened(config, tmp_path / "site")
    start = first_weights(site)
    losses: list[float | None] = []
    while len(losses) < 60 and not (any(losses) and not all(losses)):
        losses.append(site.answer(Letter("train", "now", len(losses) + 1, start)).values["train_loss"])
    assert all(loss is None or math.isfinite(loss) for loss in losses)
    assert any(losses) and not all(losses)


def test_a_damaged_ledger_is_refused_and_its_file_is_not_named(configure: Configure, tmp_path: Path) -> None:
    config = configure(PRIVATE, backend="dp")
    site = opened(config, tmp_path / "site")
    start = first_weights(site)
    site.answer(Letter("train", "now", 1, start))
    (site.folder / "privacy.json").write_text("{")
    site = Site("site_0", site.config.model_copy(update={"federated": config.federated}), site.folder)
    link = Link(LocalGrid({1: lambda message: answer(site, message, is_private=True)}), lambda: {"site_0": 1})
    (came,) = link.ask({"site_0": Letter("train", "now", 2, start)}, site.expected(), 60.0)
    assert came.letter is None
    assert came.problem == "refused: it cannot take part, and its log says why (TrainingError)"


# Numbers and words of sites


def nested(depth: int) -> Dict:
    found: Dict = {}
    for _ in range(depth):
        found = {"in": found}
    return found


@pytest.mark.parametrize(
    ("backend", "kept"),
    [
        (nested(600), {}),
        ({f"number_{k}": k for k in range(1000)}, {f"number_{k}": k for k in range(MOST_NUMBERS)}),
        ({"a": "text", "b": [1], "c": None, "d": True, "e": 1e300, "f": 0.5}, {"f": 0.5}),
        ("text", {}),
    ],
)
def test_of_what_a_backend_tells_a_few_numbers_are_kept(configure: Configure, backend: object, kept: Dict) -> None:
    federation, _ = prepared(configure(rounds=1))
    between(federation, "site_1", told({"backend": backend}))
    (entry,) = ended(federation)["rounds"]
    assert entry["sites"]["site_1"]["backend"] == kept


@pytest.mark.parametrize("privacy", [{"epsilon": "little"}, {"epsilon": True}, "none", nested(600), None])
def test_an_epsilon_that_is_no_number_bounds_nothing(configure: Configure, privacy: object) -> None:
    federation, _ = prepared(config := configure(PRIVATE, backend="dp", rounds=1))
    between(federation, "site_1", told({"privacy": privacy}))
    ended(federation)
    found = json.loads((config.run_dir / "privacy.json").read_bytes())
    assert found["epsilon"] is None
    assert found["sites"]["site_1"]["epsilon"] is None
    assert found["sites"]["site_0"]["epsilon"] > 0


def test_what_is_not_finite_arrives_as_none(configure: Configure) -> None:
    values = {"a": math.nan, "b": {"c": [1.5, math.inf, {"d": -math.inf}]}, "e": "inf"}
    found = from_record(to_record(Letter("train", "now", 1, values=values)), {"train": {}})
    assert found.values == {"a": None, "b": {"c": [1.5, None, {"d": None}]}, "e": "inf"}


@pytest.mark.parametrize("secure", [False, True])
def test_weights_that_have_diverged_at_one_site_end_nothing(configure: Configure, secure: bool) -> None:
    """What it measures has no finite loss, which is not told as a small one of all."""
    federation, sites = prepared(config := configure(secure_aggregation=secure, num_sites=4))

    class Diverged(Layout):
        def load(self, network: torch.nn.Module, arrays: Arrays, kept: Any = ()) -> None:
            large = {kind: values * np.float32(1e30) for kind, values in arrays.items()}
            super().load(network, large, kept)

    wild = sites["site_3"].layout
    sites["site_3"].layout = Diverged(wild.parameters, wild.buffers, wild.of_batch_norm)
    rounds = ended(federation)["rounds"]
    assert [set(entry["sites"]) for entry in rounds] == [{"site_0", "site_1", "site_2"}] * 2
    for entry in rounds:
        if not secure and "site_3" in entry["metrics_of_sites"]:
            assert entry["metrics_of_sites"]["site_3"]["val_loss"] is None
            assert entry["metrics"]["val_loss"] is None
    assert (config.run_dir / "weights" / "best.pt").exists()


def test_line_breaks_in_the_sentences_of_a_site_are_not_written_to_the_log(
    configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    """Else a site could write lines of its own there."""
    line = "tired\nWARNING the server is on fire"

    def misname(message: Message, node: Node) -> Message:
        reply = node(message)
        if kind_of(message) == "train":
            reply.content["arrays"][line] = reply.content["arrays"].pop("parameters")
        return reply

    federation, _ = prepared(configure(num_sites=5))
    between(federation, "site_1", refusing(["train"], line))
    between(federation, "site_2", told({"ended": line}))
    between(federation, "site_3", misname)
    with caplog.at_level(logging.INFO, logger="ml_src"):
        federation.session.open(0)
        federation.train_round(1)
    found = [record.getMessage() for record in caplog.records]
    assert sum("the server is on fire" in message for message in found) == 3
    assert not [message for message in found if "\n" in message]
    assert not [one for one in federation.journal.troubles if "\n" in one["what"]]
    federation.journal.close()


# Who is waited for


@pytest.mark.parametrize(
    ("federated", "needed"),
    [
        ({"min_sites": 1, "secure_aggregation": True}, 3),
        ({"min_sites": 1, "strategy": "krum"}, 3),
        ({"strategy": {"type": "krum", "num_malicious": 1}}, 5),
        ({"strategy": {"type": "fedtrimmedavg", "beta": 0.25}}, 4),
        ({"min_sites": 1}, 1),
        ({"min_sites": 5, "strategy": "krum"}, 5),
    ],
)
def test_a_session_waits_for_as_many_sites_as_the_round_needs(
    configure: Configure, federated: Dict, needed: int
) -> None:
    config = configure(num_sites=5, round_timeout=0.01, **federated)
    names = [f"site_{number}" for number in range(5)]
    for there in (needed, needed - 1):
        nodes = {name: number for number, name in enumerate(names[:there])}
        session = Session(config, Link(LocalGrid({}), lambda nodes=nodes: nodes), Journal(config, Path("run")), 5)
        if there == needed:
            assert session.wait(needed) == names[:needed]
            continue
        with pytest.raises(TrainingError, match=f"{there} of 5 sites are connected .*, {needed} are needed"):
            session.wait(needed)


ABSENT, MOST_LOOKS = 1, 20


@dataclass
class Halting(LocalGrid):
    """A grid on which the first node may be mute, and answers before the others where it is not."""

    is_mute: bool = True
    num_looks: int = 0  # for its answer, in vain

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (key,) = message_ids
        of_absent = [key for key, one in list(self.waiting.items()) if one.metadata.dst_node_id == ABSENT]
        if self.is_mute and key in of_absent:
            self.num_looks += 1
            return []
        is_early = not self.is_mute and of_absent and key not in of_absent
        return [] if is_early else super().pull_messages([key])


def test_a_silent_site_is_waited_for_once_until_it_answers_again(configure: Configure) -> None:
    """Between two looks for answers at least 0.05 s pass, so that 20 looks are waiting."""

    def echo(message: Message) -> Message:
        return Message(message.content, reply_to=message)

    nodes = {"absent": ABSENT, "busy": 2, "calm": 3}
    grid = Halting(dict.fromkeys(nodes.values(), echo))
    journal = Journal(configure(), Path("run"))
    session = Session(journal.config, Link(grid, lambda: nodes), journal, 3)
    others = ["busy", "calm"]

    def round_of(number: int, is_mute: bool, timeout: float) -> list[str]:
        """Who has answered."""
        grid.is_mute, grid.num_looks = is_mute, 0
        session.federated = session.federated.model_copy(update={"round_timeout": timeout})
        letters = dict.fromkeys(nodes, session.letter("evaluate", number))
        return [one.site for one, _ in session.ask(letters, {"evaluate": {}})]

    def last_words() -> str:
        return str(journal.troubles[-1]["what"])

    assert round_of(1, True, 0.5) == others
    assert (last_words(), session.silent) == ("has not answered within 0.5 s", {"absent"})
    grid.waiting.clear()  # as Flower does, when the time for an answer is over
    for number, words in ((2, "is still silent"), (3, "is still at work on an earlier message")):
        assert round_of(number, True, 10.0) == others
        assert (last_words(), session.silent) == (words, {"absent"})
        assert grid.num_looks < MOST_LOOKS
        assert [one.metadata.group_id for one in grid.waiting.values()] == ["2"]  # letters do not pile up
    assert round_of(4, False, 30.0) == others  # what comes now is the answer to the second letter
    assert (last_words(), session.silent) == ("is still at work on an earlier message", {"absent"})
    assert round_of(5, False, 30.0) == ["absent", *others]
    assert session.silent == set()
    assert round_of(6, True, 0.5) == others
    assert (last_words(), session.silent) == ("has not answered within 0.5 s", {"absent"})


@pytest.mark.parametrize(
    ("change", "what"),
    [({"dtype": "uint16"}, "number type"), ({name: [9.0] * 4 for name in ("count", "mean", "squares")}, "channels")],
)
def test_a_late_site_with_other_images_stays_out(configure: Configure, change: Dict, what: str) -> None:
    normalize = [{"type": "random_horizontal_flip"}, {"type": "normalize", "mean": "data", "std": "data"}]
    federation, sites = prepared(configure({"transforms.train": normalize}))
    nodes = federation.session.link.nodes

    def differ(message: Message, node: Node) -> Message:
        reply = node(message)
        if kind_of(message) == "facts":
            envelope = reply.content[ENVELOPE]
            values = json.loads(envelope["values"])
            values["channels"] |= change
            envelope["values"] = json.dumps(values)
        return reply

    between(federation, "site_2", differ)
    federation.session.link.nodes = lambda: {name: k for name, k in nodes().items() if name != "site_2"}
    federation.session.num_sites = 2
    federation.session.open(0)
    federation.session.link.nodes = nodes
    assert federation.session.present(1) == ["site_0", "site_1"]
    (trouble,) = federation.journal.troubles
    assert trouble["site"] == "site_2"
    assert f"the sites differ in number {'of ' * (what == 'channels')}{what.removeprefix('number ')}" in trouble["what"]
    assert sites["site_2"].state.shared is None


# What a site remembers


def test_a_bounded_number_of_short_names_of_sessions_is_remembered(configure: Configure, tmp_path: Path) -> None:
    site = opened(configure(), tmp_path / "site")
    site.state.sessions = [f"session {number}" for number in range(MOST_SESSIONS)]
    site.answer(Letter("facts", "x" * LONGEST_NAME, 0))
    with pytest.raises(WireError, match="name of the session is too long"):
        site.answer(Letter("facts", "y" * (LONGEST_NAME + 1), 0))
    stored = json.loads((site.folder / "site.json").read_bytes())["sessions"]
    assert stored == site.state.sessions
    assert len(stored) == MOST_SESSIONS
    assert (stored[0], stored[-1]) == ("session 1", "x" * LONGEST_NAME)


def test_statistics_and_measurements_are_taken_once_a_session(configure: Configure, tmp_path: Path) -> None:
    """Asked again with other weights, the scores of single images could be told from the differences."""
    site = opened(configure(), tmp_path / "site")
    start = first_weights(site)
    with pytest.raises(WireError, match="settle was answered before in this session"):
        site.answer(Letter("settle", "now", 0, values=SETTLED | {"num_images": 1}))
    assert site.state.shared == SETTLED
    assert set(site.answer(Letter("measure", "now", 1, start)).arrays) == {"val", "test"}
    with pytest.raises(WireError, match="measure was answered before in this session"):
        site.answer(Letter("measure", "now", 2, start))
    again = Site("site_0", site.config.model_copy(update={"federated": site.federated}), site.folder)
    with pytest.raises(WireError, match="measure was answered before in this session"):
        again.answer(Letter("measure", "now", 2, start))
    again.answer(Letter("facts", "next", 0))
    again.answer(Letter("settle", "next", 0, values=SETTLED))
    assert again.answer(Letter("measure", "next", 1, start)).arrays["val"].any()


@pytest.mark.parametrize("best", ["1", "../../site", True, 1.0, None, [1], {}])
def test_a_best_round_that_is_no_number_is_refused(configure: Configure, tmp_path: Path, best: object) -> None:
    """It becomes part of the name of a file."""
    site = opened(configure(personalize="batch_norm"), tmp_path / "site")
    start = first_weights(site)
    for kind in ("train", "evaluate", "measure"):
        with pytest.raises(WireError, match="the best round is no number"):
            site.answer(Letter(kind, "now", 1, start, {"best_round": best}))
    assert site.answer(Letter("train", "now", 1, start, {"best_round": 0})).arrays


def test_what_killed_writers_left_is_removed_at_the_start_of_a_site(configure: Configure, tmp_path: Path) -> None:
    folder, config = tmp_path / "site", site_configs(configure(), tmp_path / "sites")["site_0"]
    (folder / "weights").mkdir(parents=True)
    left = [folder / "weights" / "round_1.pt.4711.tmp", folder / "site.json.12.tmp"]
    kept = [folder / "weights" / "round_1.pt", folder / "weights" / "notes.tmp"]
    for path in left + kept:
        path.write_bytes(b"half")
    Site("site_0", config, folder)
    assert [path for path in left if path.exists()] == []
    assert [path for path in kept if not path.exists()] == []


# Kits


@pytest.mark.parametrize("simulated", ["num_sites: 1", "sites: [somewhere]"])
def test_a_kit_has_the_sites_whose_keys_it_holds_whatever_is_simulated(tmp_path: Path, simulated: str) -> None:
    """Simulated alone, one site is a quorum; the sites of kits are more."""
    (tmp_path / "config.yaml").write_text(
        CONFIG.replace("num_sites: 3", simulated).replace(", min_sites: 1", "").replace("DATA", str(tmp_path))
    )
    write_kits(tmp_path / "config.yaml", ["a", "b", "c"], "127.0.0.1:9092", tmp_path / "kits")
    for kit in (read_server_kit(tmp_path / "kits" / "server"), read_site_kit(tmp_path / "kits" / "a")):
        federated = kit.config(tmp_path).federated
        assert federated is not None
        assert (federated.num_sites, federated.sites, federated.quorum) == (3, None, 2)


def test_kits_for_too_few_sites_are_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG.replace("rounds: 2", "rounds: 2, strategy: krum"))
    words = ["init", "--config", str(tmp_path / "config.yaml"), "--address", "127.0.0.1:9092"]
    words += ["--output", str(tmp_path / "kits"), "--sites", "a", "b"]
    assert cli.main(words) != 0
    assert "federated.strategy krum needs 3 sites in a round, and there are 2" in capsys.readouterr().err
    assert not (tmp_path / "kits").exists()
    assert cli.main([*words, "c"]) == 0
