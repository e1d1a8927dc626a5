"""A site answers what is due and refuses all else in a sentence, without a change; its loss has FedProx's term."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from known_sites import Configure, differing, prepared
from torch import nn

from ml_src.core.checkpoint import load_checkpoint
from ml_src.core.errors import MLError
from ml_src.core.federated.client import answer
from ml_src.core.federated.layout import Arrays
from ml_src.core.federated.link import Link
from ml_src.core.federated.local_grid import LocalGrid
from ml_src.core.federated.local_round import Proximal
from ml_src.core.federated.simulation import site_configs
from ml_src.core.federated.site import Site, site_seed
from ml_src.core.federated.site_state import ENDED, End, read_end
from ml_src.core.federated.wire import Letter, WireError
from ml_src.core.inference.members import open_member
from ml_src.core.network import build_model

SETTLED = {"mean": None, "std": None, "class_counts": [3, 2, 1], "num_images": 17}


@pytest.fixture
def site(configure: Configure, tmp_path: Path) -> Site:
    """One of three sites, in a session, with the statistics of all."""
    return opened(configure(), tmp_path)


def opened(config: Any, folder: Path) -> Site:
    site = Site("site_0", site_configs(config, folder / "sites")["site_0"], folder / "site_0")
    site.answer(Letter("facts", "now", 0))
    site.answer(Letter("settle", "now", 0, values=SETTLED))
    return site


def first_weights(site: Site) -> Arrays:
    torch.manual_seed(0)
    return site.layout.flatten(build_model(site.config.model))


def on_disk(site: Site) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(site.folder.rglob("*")) if path.is_file()}


def in_memory(site: Site) -> dict[str, Any]:
    assert site.training is not None
    weights = {name: values.clone() for name, values in site.training.network.state_dict().items()}
    moments = [value.clone() for state in site.training.optimizer.state.values() for value in state.values()]
    return {"weights": weights, "moments": moments, "random": site.random["torch"].clone(), "done": site.done}


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    weights = all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
    moments = all(map(torch.equal, first["moments"], second["moments"]))
    return weights and moments and torch.equal(first["random"], second["random"]) and first["done"] == second["done"]


def test_what_is_not_due_is_refused_and_changes_nothing(site: Site) -> None:
    weights = first_weights(site)
    site.answer(Letter("train", "now", 1, weights))
    site.answer(Letter("evaluate", "now", 2, weights))
    refused: list[tuple[Letter, str]] = [
        (Letter("facts", "now", 2), "session now has begun before: a replayed message is refused"),
        (Letter("train", "now", 1, weights), "round 1 was answered before: a replayed message is refused"),
        (Letter("evaluate", "now", 2, weights), "round 2 was answered before: a replayed message is refused"),
        (Letter("train", "now", 2, weights), "round 2 was answered before"),
        (Letter("train", "old", 3, weights), "session old, which is not under way"),
        (Letter("train", "", 3, weights), "which is not under way"),
        (Letter("settle", "old", 0, values=SETTLED), "session old, which is not under way"),
        (Letter("train", "now", 3, weights), "round 3 is beyond the 2 of this site's kit"),
        (Letter("evaluate", "now", 4, weights), "round 4 is beyond the 2"),
        (Letter("measure", "now", 3, weights), "round 3 is beyond the 2"),
        (Letter("train", "now", -1, weights), "answered before"),
        (Letter("measure", "now", 0, weights), "round 0 is beyond"),
        (Letter("keys", "now", 2), "no round is being summed up here"),
    ]
    files, memory = on_disk(site), in_memory(site)
    for letter, sentence in refused:
        with pytest.raises(WireError, match=sentence):
            site.answer(letter)
        assert on_disk(site) == files, letter
        assert same(in_memory(site), memory), letter


def test_who_runs_a_site_is_told_its_own_numbers_and_why_it_takes_no_part(configure: Configure, tmp_path: Path) -> None:
    site, notes = opened(configure(), tmp_path), []
    site.note = notes.append
    weights = first_weights(site)
    trained = site.answer(Letter("train", "now", 1, weights))
    seen = site.answer(Letter("evaluate", "now", 2, weights))
    site.answer(Letter("out", "now", 2, values={"why": "has another\nconfig.yaml" + "!" * 1000}))
    assert notes[:2] == [
        f"round 1/2: {trained.values['num_steps']} steps, train_loss {trained.values['train_loss']:.4f}",
        f"round 1/2: val_loss {seen.values['val_loss']:.4f}, {notes[1].split(', ')[1]}",
    ]
    counts = seen.arrays["counts"].reshape(3, 3)
    union = counts.sum(0) + counts.sum(1) - np.diag(counts)
    iou = (np.diag(counts)[union > 0] / union[union > 0]).mean()
    assert notes[1].endswith(f"val_iou {iou:.4f} on the validation images of this site")
    assert notes[2].startswith("this site takes no part, says the server: has another config.yaml!!!")
    assert len(notes[2]) < 600 and "\n" not in notes[2] and len(notes) == 3
    with pytest.raises(WireError, match="not under way"):
        site.answer(Letter("out", "old", 2))


def test_a_message_of_a_former_session_stays_refused_after_a_restart(site: Site) -> None:
    weights = first_weights(site)
    site.answer(Letter("train", "now", 1, weights))
    site.answer(Letter("facts", "next", 1))
    again = Site("site_0", site.config.model_copy(update={"federated": site.federated}), site.folder)
    for letter in (Letter("facts", "now", 0), Letter("train", "now", 2, weights), Letter("settle", "now", 0)):
        with pytest.raises(WireError, match=r"replayed|not under way"):
            again.answer(letter)
    with pytest.raises(WireError, match="send settle first"):
        again.answer(Letter("train", "next", 2, weights))


def test_before_the_first_session_nothing_is_done(configure: Configure, tmp_path: Path) -> None:
    site = Site("site_0", site_configs(configure(), tmp_path / "sites")["site_0"], tmp_path / "site_0")
    for kind in ("settle", "train", "evaluate", "measure", "keys"):
        with pytest.raises(WireError, match="not under way"):
            site.answer(Letter(kind, "", 1, values=SETTLED))


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_images": 0},
        {"num_images": "17"},
        {"class_counts": [1, 2]},
        {"class_counts": ["1", 2, 3]},
        {"mean": [float("inf")] * 3},
        {"std": [1.0, True, 1.0]},
    ],
)
def test_statistics_that_cannot_be_are_refused(configure: Configure, tmp_path: Path, wrong: dict[str, Any]) -> None:
    site = opened(configure(), tmp_path)
    site.answer(Letter("facts", "next", 0))
    files = on_disk(site)
    with pytest.raises(WireError, match="of all sites"):
        site.answer(Letter("settle", "next", 0, values=SETTLED | wrong))
    assert on_disk(site) == files


def test_normalisation_and_balance_need_the_statistics(configure: Configure, tmp_path: Path) -> None:
    normalize = [{"type": "normalize", "mean": "data", "std": "data"}]
    also = {"transforms.train": normalize, "loss.class_weights": "balanced"}
    site = Site("site_0", site_configs(configure(also), tmp_path / "sites")["site_0"], tmp_path / "site_0")
    site.answer(Letter("facts", "now", 0))
    good = SETTLED | {"mean": [0.5] * 3, "std": [0.2] * 3}
    for wrong in ({"mean": None}, {"std": None}, {"std": [0.2, 0.0, 0.2]}, {"class_counts": None}):
        with pytest.raises(WireError, match="are needed"):
            site.answer(Letter("settle", "now", 0, values=good | wrong))
    site.answer(Letter("settle", "now", 0, values=good))


def test_a_message_with_wrong_arrays_goes_back_with_a_sentence(site: Site) -> None:
    """Through the grid, as a server would send it: shape, number type, NaN, foreign names, too many bytes."""
    weights = first_weights(site)
    link = Link(LocalGrid({1: lambda message: answer(site, message)}), lambda: {"site_0": 1})
    parameters = weights["parameters"]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"parameters": parameters[:-1]}, "expected was float32"),
        ({"parameters": parameters.astype(np.float64)}, "is float64"),
        ({"parameters": parameters * np.float32(np.nan)}, "no finite number"),
        ({"code": parameters}, "has the arrays buffers, code, parameters"),
        ({"parameters": np.zeros(10 * len(parameters), np.float32)}, "expected was float32"),
    ]
    files = on_disk(site)
    for change, sentence in wrong:
        letter = Letter("train", "now", 1, {**weights, **change})
        (came,) = link.ask({"site_0": letter}, site.expected(), 60.0)
        assert came.letter is None
        assert came.problem.startswith("refused: ")
        assert sentence in came.problem
        assert on_disk(site) == files


def test_an_answer_to_another_message_is_not_taken(site: Site) -> None:
    """A site, or someone in its place, sends again what it sent in an earlier round."""
    weights = first_weights(site)
    kept: list[Any] = []

    def replay(message: Any) -> Any:
        reply = answer(site, message)
        if not kept:
            kept.append(reply.content)
        else:
            reply.content = kept[0]
        return reply

    link = Link(LocalGrid({1: replay}), lambda: {"site_0": 1})
    (first,) = link.ask({"site_0": Letter("train", "now", 1, weights)}, site.expected(), 60.0)
    assert first.letter is not None
    (second,) = link.ask({"site_0": Letter("train", "now", 2, weights)}, site.expected(), 60.0)
    assert second.letter is None
    assert "the answer is to another message: refused as replayed" in second.problem


def test_a_restarted_site_is_measured_and_trains_as_if_it_had_not_been(configure: Configure, tmp_path: Path) -> None:
    """It was only measured in the round after its restart, and keeps its batch normalisation, moments and dropout."""
    config = configure(rounds=4, personalize="batch_norm")
    answers = []
    for restarts in (False, True):
        site = opened(config, tmp_path / str(restarts))
        weights = first_weights(site)
        site.answer(Letter("train", "now", 1, weights))
        if restarts:
            site = Site("site_0", site.config.model_copy(update={"federated": config.federated}), site.folder)
        measured = site.answer(Letter("evaluate", "now", 2, weights))
        trained = site.answer(Letter("train", "now", 3, weights))
        answers.append((measured.values["val_loss"], trained.arrays["parameters"].tobytes()))
    assert answers[0] == answers[1]


def test_only_the_first_site_has_the_seed_of_the_run() -> None:
    seeds = [site_seed(42, index) for index in range(100)]
    assert seeds[0] == 42
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_gradient_of_fedprox_is_that_of_the_formula() -> None:
    """L(w) + mu / 2 * |w - w_global|^2 over all parameters, written out and differentiated by autograd."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)).double()
    images, targets = torch.rand(2, 3, 8, 8, dtype=torch.float64), torch.randint(0, 3, (2, 8, 8))
    mu, plain = 0.7, nn.CrossEntropyLoss()
    criterion = Proximal(plain, network, mu)
    start = torch.cat([p.detach().flatten().clone() for p in network.parameters()])
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p))
    loss = criterion(network(images), targets)
    found = torch.autograd.grad(loss, list(network.parameters()))
    now = torch.cat([p.flatten() for p in network.parameters()])
    written = plain(network(images), targets) + mu / 2 * torch.linalg.vector_norm(now - start) ** 2
    expected = torch.autograd.grad(written, list(network.parameters()))
    torch.testing.assert_close(loss, written)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_round_that_fails_leaves_no_trace_in_the_next(configure: Configure, tmp_path: Path) -> None:
    """Neither half a round of moments, nor FedProx's term of the round that failed."""
    config = configure(rounds=3, local_steps=3, strategy={"type": "fedprox", "proximal_mu": 1.0})
    sent = []
    for fails in (False, True):
        site = opened(config, tmp_path / str(fails))
        weights = first_weights(site)
        site.answer(Letter("train", "now", 1, weights))
        if fails:
            spoil(site, after=2)
            with pytest.raises(MLError, match="a disk has failed"):
                site.answer(Letter("train", "now", 2, weights))
        sent.append(site.answer(Letter("train", "now", 3, weights)))
    assert sent[0].arrays["parameters"].tobytes() == sent[1].arrays["parameters"].tobytes()
    assert sent[0].values["train_loss"] == sent[1].values["train_loss"]


def spoil(site: Site, after: int) -> None:
    """Let the site's images become unreadable after some steps."""
    assert site.training is not None
    prepare: Callable[..., Any] = site.training.task.prepare
    seen = []

    def fail(batch: Any, device: torch.device) -> Any:
        if site.training is not None and site.training.model.training:
            seen.append(1)
            if len(seen) > after:
                raise MLError("a disk has failed")
        return prepare(batch, device)

    site.training.task.prepare = fail  # type: ignore[method-assign]


# The end


NORMALIZE = [{"type": "normalize", "mean": "data", "std": "data"}]
NOISY = {"noise_multiplier": 1.0, "accountant": "rdp", "public_statistics": True}
OVER = {"best_round": 1, "num_rounds": 2, "stop": ""}


@pytest.mark.parametrize(
    ("federated", "also"),
    [
        ({}, {"transforms.train": NORMALIZE}),
        ({"personalize": "batch_norm"}, {"transforms.train": NORMALIZE}),
        ({"secure_aggregation": True}, {}),
        ({"backend": "dp"}, {"model.norm": "group", "training.dp": NOISY}),
        ({"central_dp": {"clip_norm": 1.0, "noise_multiplier": 1.0}}, {"model.norm": "group"}),
    ],
)
def test_at_the_end_a_site_has_the_best_network_as_a_checkpoint_like_any_other(
    configure: Configure, tmp_path: Path, federated: dict[str, Any], also: dict[str, Any]
) -> None:
    """It predicts what the network that was sent does, on images normalised with the statistics of all sites."""
    site = Site("site_0", site_configs(configure(also, **federated), tmp_path / "sites")["site_0"], tmp_path / "run")
    site.answer(Letter("facts", "now", 0))
    site.answer(Letter("settle", "now", 0, values=SETTLED | {"mean": [0.4] * 3, "std": [0.2] * 3}))
    weights = first_weights(site)
    site.answer(Letter("end", "now", 2, weights, OVER))
    best = tmp_path / "run" / "weights" / "best.pt"
    images = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    network = build_model(site.config.model).eval()
    site.layout.load(network, weights)
    mean, std = (0.4, 0.2) if also.get("transforms.train") == NORMALIZE else (0.5, 0.25)
    with torch.no_grad():
        logits = network((torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std)
    found = open_member(best).probabilities(images)
    np.testing.assert_allclose(found, logits.softmax(dim=1).numpy(), atol=1e-5)
    assert load_checkpoint(best)["epoch"] == 1
    assert read_end(tmp_path / "run") == End(2, 1, "")
    assert best.stat().st_mtime_ns <= (tmp_path / "run" / ENDED).stat().st_mtime_ns


def test_the_end_comes_once_and_after_the_statistics_and_nothing_comes_after_it(
    configure: Configure, tmp_path: Path
) -> None:
    site = Site("site_0", site_configs(configure(), tmp_path / "sites")["site_0"], tmp_path / "site_0")
    weights = first_weights(site)
    over = Letter("end", "now", 2, weights, OVER)
    with pytest.raises(WireError, match="which is not under way"):
        site.answer(over)
    site.answer(Letter("facts", "now", 0))
    with pytest.raises(WireError, match="send settle first"):
        site.answer(over)
    site.answer(Letter("settle", "now", 0, values=SETTLED))
    assert read_end(site.folder) is None
    site.answer(over)
    files = on_disk(site)
    for letter in (over, Letter("train", "now", 2, weights), Letter("facts", "next", 0)):
        with pytest.raises(WireError, match="was told that the federation has ended"):
            site.answer(letter)
        assert on_disk(site) == files


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"best_round": 3}, "the best round is none"),
        ({"best_round": 0}, "the best round is none"),
        ({"best_round": 1.0}, "best round is no"),
        ({"best_round": None}, "best round is no"),
        ({"num_rounds": 7}, "the best round is none"),
        ({"num_rounds": True}, "the best round is none"),
        ({"stop": None}, "is no line of text"),
        ({"stop": "first\nsecond"}, "is no line of text"),
        ({"stop": "\x1b[2J"}, "is no line of text"),
        ({"stop": "x" * 501}, "is no line of text"),
    ],
)
def test_an_end_that_cannot_be_is_refused_and_leaves_no_trace(site: Site, wrong: dict[str, Any], sentence: str) -> None:
    files = on_disk(site)
    with pytest.raises(WireError, match=sentence):
        site.answer(Letter("end", "now", 2, first_weights(site), OVER | wrong))
    assert on_disk(site) == files


def test_at_the_end_a_site_keeps_its_own_network_of_the_best_round(configure: Configure, tmp_path: Path) -> None:
    site = opened(configure(personalize="batch_norm"), tmp_path)
    weights = first_weights(site)
    site.answer(Letter("train", "now", 1, weights))
    site.answer(Letter("train", "now", 2, weights, {"best_round": 0}))
    own = load_checkpoint(site.folder / "weights" / "personal_1.pt")["model_state_dict"]
    site.answer(Letter("end", "now", 2, weights, OVER))
    assert sorted(path.name for path in site.folder.glob("weights/[bp]*.pt")) == ["best.pt", "personal.pt"]
    assert not differing(load_checkpoint(site.folder / "weights" / "personal.pt")["model_state_dict"], own)
    end = read_end(site.folder)
    assert end is not None
    assert str(site.folder / "weights" / "personal.pt") in end.sentence(site.folder)


# Two programs with one key


def test_two_programs_with_the_key_of_one_site_are_named_and_a_restart_is_not(
    configure: Configure, tmp_path: Path
) -> None:
    """Programs that answer in turn, and refuse what they have answered before; answers carry no trace of it."""
    federation, sites = prepared(configure())
    config = site_configs(configure(), tmp_path / "sites")["site_0"]
    first, second, third = sites["site_0"], *(Site("site_0", config, tmp_path / name) for name in ("two", "three"))
    session, grid = federation.session, federation.session.link.grid
    assert isinstance(grid, LocalGrid)
    letter = Letter("facts", "now", 0)

    def answered_by(site: Site) -> list[str]:
        before = len(federation.journal.troubles)
        grid.nodes = {**grid.nodes, 1: lambda message: answer(site, message)}
        for _, told in session.ask({"site_0": letter}, {"facts": {}}):
            assert "program" not in told.values
        return [one["what"] for one in federation.journal.troubles[before:] if "two programs" in one["what"]]

    assert [answered_by(site) for site in (first, first, second, second, third)] == [[]] * 5
    first.state.settle({})  # it refuses what it has answered
    (sentence,) = answered_by(first)
    assert "two programs take part with the key of site_0; end one of them" in sentence
    assert answered_by(first) == []
