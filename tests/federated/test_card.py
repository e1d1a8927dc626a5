"""The model card of a network that a federation trained says who trained it, wherever its file has been copied to."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import yaml
from known_sites import Configure, history, plain_config

from ml_src.cli import export
from ml_src.core.checkpoint import load_checkpoint, save_checkpoint
from ml_src.core.federated.client import answer
from ml_src.core.federated.from_kits import _conclude
from ml_src.core.federated.kits import read_server_kit, read_site_kit, write_kits
from ml_src.core.federated.link import Link
from ml_src.core.federated.local_grid import LocalGrid
from ml_src.core.federated.rounds import Federation
from ml_src.core.federated.secure_round import Keys
from ml_src.core.federated.simulation import train
from ml_src.core.federated.site import Site

NAMES = ["anna", "berlin", "charite"]
DP = {"noise_multiplier": 1.0, "accountant": "rdp"}


def card_of(path: Path, copied_to: Path | None = None) -> str:
    """Export a checkpoint, from where it lies or from a copy without its run, and return the card."""
    if copied_to is not None:
        copied_to.mkdir(parents=True)
        path = Path(shutil.copy(path, copied_to))
    output = path.with_name(f"{path.stem}.safetensors")
    assert export.main(["--checkpoint", str(path), "--format", "safetensors", "--output", str(output)]) == 0
    found = [path.with_name("MODEL_CARD.md"), path.with_name(f"{output.name}.MODEL_CARD.md")]
    return next(one.read_text() for one in reversed(found) if one.exists())


def row_of(card: str, name: str) -> list[str]:
    """The cells of a line of a table, by the first of them."""
    return next(
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in card.splitlines()
        if line.startswith(f"| {name} |")
    )


@pytest.fixture(scope="module")
def kits(site_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kits of a server and three sites that have trained two rounds, heard of the end, and kept what they write."""
    folder = tmp_path_factory.mktemp("kits")
    raw = plain_config(site_data)
    raw["federated"] = {"rounds": 2, "local_steps": 1, "strategy": {"type": "fedprox", "proximal_mu": 0.5}}
    raw["data"]["data_dir"] = str(folder / "of_who_made_the_kits")
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    output = folder / "kits"
    write_kits(folder / "config.yaml", NAMES, "127.0.0.1:9092", output)
    nodes = {name: number for number, name in enumerate(NAMES, start=1)}
    sites = [site_of(output / name, site_data) for name in NAMES]
    grid = LocalGrid({nodes[site.name]: partial(answer, site, is_private=True) for site in sites})
    kit = read_server_kit(output / "server")
    run_dir = kit.folder / "run"
    (run_dir / "weights").mkdir(parents=True)
    federation = Federation(kit.config(), Link(grid, lambda: nodes, is_patient=True), run_dir, len(NAMES))
    federation.run()
    _conclude(federation, run_dir)
    federation.tell_end(load_checkpoint(run_dir / "weights" / "best.pt"), NAMES)
    federation.journal.close()
    return output


def site_of(folder: Path, data_dir: Path) -> Site:
    """The site of a kit, as its process makes it."""
    kit = read_site_kit(folder)
    keys = Keys(kit.signing_key(), {name: key for name, key in kit.public_keys.items() if name != kit.name})
    return Site(kit.name, kit.config(data_dir), kit.folder / "run", NAMES.index(kit.name), keys=keys)


def test_the_card_of_a_server_names_all_sites_with_their_images_rounds_and_strategy(kits: Path) -> None:
    run_dir = kits / "server" / "run"
    card = card_of(run_dir / "weights" / "best.pt")
    found = history(run_dir)
    images, number = found["fingerprint"]["num_images"], found["best_round"]
    total = sum(images.values())
    assert f"by a federation of 3 sites, with {total} training images in all" in card
    for name in NAMES:
        assert row_of(card, name) == [name, str(images[name]), str(number)]
    assert f"- Round: {number} of 2 that were planned; the federation ended after 2." in card
    assert "- Strategy: fedprox (proximal_mu 0.5)." in card
    assert card.count(": off.") == 3
    assert "It was trained by a federation of 3 sites (anna, berlin, charite)." in card
    assert "of_who_made_the_kits" not in card


def test_the_card_of_a_server_has_the_scores_over_all_sites(kits: Path) -> None:
    run_dir = kits / "server" / "run"
    card = card_of(run_dir / "weights" / "best.pt")
    scores = json.loads((run_dir / "metrics.json").read_bytes())
    for split, words in (("val", "Validation"), ("test", "Test")):
        assert (f"{words} images of the sites that measured it" in card) == (split in scores)
    assert row_of(card, "mean IoU")[1] == f"{scores['val']['all']['iou']:.4f}"
    assert "Not known" not in card


def test_the_card_of_a_site_tells_of_the_federation_and_not_of_its_own_images(kits: Path, site_data: Path) -> None:
    card = card_of(kits / "berlin" / "run" / "weights" / "best.pt")
    total = sum(history(kits / "server" / "run")["fingerprint"]["num_images"].values())
    assert f"by a federation of 3 sites, with {total} training images in all" in card
    assert "The network of all sites, as the site berlin was given it." in card
    assert [row_of(card, name) for name in NAMES] == [[name] for name in NAMES]
    assert "that were planned; the federation ended after 2." in card
    assert f"trained on {site_data.name}" not in card


def test_a_copy_without_its_run_still_tells_of_the_federation(kits: Path, tmp_path: Path) -> None:
    for name in ("server", "anna"):
        card = card_of(kits / name / "run" / "weights" / "best.pt", tmp_path / name)
        assert "It was trained by a federation of 3 sites (anna, berlin, charite)." in card
        assert "- Strategy: fedprox (proximal_mu 0.5)." in card
        assert "ended after" not in card


def test_a_sites_network_of_before_the_average_is_said_to_be_that(kits: Path, tmp_path: Path) -> None:
    card = card_of(kits / "anna" / "run" / "weights" / "round_1.pt", tmp_path / "copy")
    assert "The network of the site anna after its own part of a round" in card
    assert "- Round: 1 of 2" in card


def test_a_sites_checkpoint_without_the_entry_is_known_by_the_run_around_it(kits: Path, tmp_path: Path) -> None:
    """As sites wrote them before there was one."""
    run_dir = Path(shutil.copytree(kits / "charite" / "run", tmp_path / "run"))
    path = run_dir / "weights" / "best.pt"
    contents = load_checkpoint(path)
    del contents["federation"]
    save_checkpoint(path, contents)
    card = card_of(path)
    assert "It was trained by a federation of several sites." in card
    assert "are not known here" in card


def test_what_a_checkpoint_says_wrongly_of_its_federation_is_left_out_and_said(
    kits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    contents = load_checkpoint(kits / "anna" / "run" / "weights" / "best.pt")
    contents["federation"]["round"] = "many"
    path = tmp_path / "best.pt"
    save_checkpoint(path, contents)
    assert "It was trained by a federation of several sites." in card_of(path)
    assert f"what {path} says of its federation is damaged" in caplog.text


def test_the_card_of_a_simulation_has_its_scores_and_sites(configure: Configure, site_data: Path) -> None:
    run_dir = train(configure(rounds=1, secure_aggregation=True)).run_dir
    card = card_of(run_dir / "weights" / "best.pt")
    images = history(run_dir)["fingerprint"]["num_images"]
    assert [row_of(card, name) for name in images] == [[name, str(number), "1"] for name, number in images.items()]
    scores = json.loads((run_dir / "metrics.json").read_bytes())
    assert f"{scores['val']['num_images']} validation images" in card
    assert row_of(card, "mean IoU")[1] == f"{scores['val']['iou']:.4f}"
    assert "- Secure aggregation: on" in card
    assert f"trained on {site_data.name}" not in card


def test_scores_of_networks_with_own_batch_normalisation_are_not_taken_for_those_of_the_common_one(
    configure: Configure,
) -> None:
    run_dir = train(configure(rounds=1, personalize="batch_norm")).run_dir
    card = card_of(run_dir / "weights" / "best.pt")
    assert "Not known: the federation measured the network of each site" in card
    assert "(FedBN)" in card
    own = card_of(run_dir / "sites" / "site_1" / "weights" / "personal.pt")
    assert "with the batch normalisation of the site site_1" in own.replace("\\", "")
    assert "The names of its sites are not all known here." in own


def test_what_privacy_of_whole_sites_has_cost_is_in_the_card(configure: Configure) -> None:
    also = {"model.norm": "group"}
    run_dir = train(configure(also, rounds=1, central_dp={"noise_multiplier": 2.0, "clip_norm": 0.5})).run_dir
    card = card_of(run_dir / "weights" / "best.pt")
    epsilon = json.loads((run_dir / "privacy.json").read_bytes())["epsilon"]
    assert f"epsilon {epsilon:.4g} at delta 1e-05; the unit of privacy is one site" in card
    assert "- Differential privacy at the server: on, noise multiplier 2, clip norm 0.5" in card


def test_what_each_site_has_spent_is_in_the_card_and_a_site_tells_of_its_own(
    configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = train(configure({"model.norm": "group", "training.dp": DP}, rounds=1, backend="dp")).run_dir
    card = card_of(run_dir / "weights" / "best.pt")
    spent = json.loads((run_dir / "privacy.json").read_bytes())["sites"]
    assert len(spent) == 3
    for name, ledger in spent.items():
        assert row_of(card, name)[-1] == f"{ledger['epsilon']:.4g}"
    assert "- Differential privacy at the sites: on" in card
    own = card_of(run_dir / "sites" / "site_0" / "weights" / "round_1.pt")
    assert f"epsilon {spent['site_0']['epsilon']:.4g} at delta" in own
    assert "It covers the images of site_0 alone" in own.replace("\\", "")
    assert "damaged" not in caplog.text


def test_an_ensemble_with_a_network_from_elsewhere_names_both_origins(kits: Path, tmp_path: Path) -> None:
    contents = load_checkpoint(kits / "anna" / "run" / "weights" / "best.pt")
    alone = {key: value for key, value in contents.items() if key != "federation"}
    for name, one in (("alone", alone), ("together", contents)):
        save_checkpoint(tmp_path / f"{name}.pt", one)
    paths = [str(tmp_path / f"{name}.pt") for name in ("alone", "together")]
    output = str(tmp_path / "both.torchscript")
    assert export.main(["--checkpoint", *paths, "--format", "torchscript", "--output", output]) == 0
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert "## Federation of" in card
    assert "on data that have no name here; by a federation of 3 sites" in card
