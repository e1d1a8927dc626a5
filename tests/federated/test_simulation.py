"""Whole federations in one process: what they train, who takes part, what they leave, what no single site tells."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from known_sites import Configure, differing, history, led, prepared, weights

from ml_src.cli import export, inference
from ml_src.cli import train as cli
from ml_src.core.config_file import parse_config
from ml_src.core.federated.layout import Layout
from ml_src.core.federated.summary import measure
from ml_src.core.network import build_model
from ml_src.core.trainers import train as train_centrally

Dict = dict[str, Any]


@pytest.mark.parametrize(
    ("backend", "also"),
    [
        ("standard", {}),
        ("standard", {"optimizer": {"type": "sgd", "lr": 0.02, "momentum": 0.9}, "scheduler.type": "cosine"}),
        ("mixed_precision", {"scheduler": {"type": "step", "step_size": 1, "gamma": 0.5}}),
    ],
)
def test_one_site_trains_as_without_a_federation(configure: Configure, raw: Dict, backend: str, also: Dict) -> None:
    """To the bit, over 2 rounds of 2 epochs, with dropout: momentum, schedule and random state are carried."""
    config = configure(also, num_sites=1, local_epochs=2, local_steps=None, backend=backend)
    led(config)
    central = raw | {"federated": None, "run_name": "central"}
    central["training"] = raw["training"] | {"trainer_type": backend, "num_epochs": 4, "callbacks": []}
    train_centrally(parse_config(central, also))
    different = differing(weights(config.run_dir), weights(Path("runs/central_fold_0")))
    assert [name for name in different if not name.endswith("num_batches_tracked")] == []


def test_a_part_of_the_sites_is_the_same_part_in_two_runs_and_all_are_measured(configure: Configure) -> None:
    runs = [configure({"run_name": name}, rounds=4, num_sites=4, fraction=0.5) for name in ("first", "second")]
    for config in runs:
        led(config)
    first, second = (history(config.run_dir)["rounds"] for config in runs)
    trained = [sorted(entry["sites"]) for entry in first]
    assert trained == [sorted(entry["sites"]) for entry in second]
    assert [len(sites) for sites in trained] == [2] * 4
    assert len({tuple(sites) for sites in trained}) > 1
    assert all(len(entry["metrics_of_sites"]) == 4 for entry in first)
    assert differing(*(weights(config.run_dir) for config in runs)) == []


def test_fedbn_leaves_batch_normalisation_at_the_sites_and_nothing_else(configure: Configure) -> None:
    config = configure({"optimizer.lr": 0.02}, personalize="batch_norm")
    led(config)
    own = [weights(config.run_dir / "sites" / f"site_{number}", "personal_2.pt") for number in range(3)]
    of_batch_norm = Layout.of(build_model(config.model)).of_batch_norm
    common = weights(config.run_dir)
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert set(differing(own[one], own[other])) <= of_batch_norm
        values = [name for name in of_batch_norm if "num_batches" not in name]
        assert set(values) <= set(differing(own[one], own[other]))
    assert set(differing(own[0], common)) <= of_batch_norm


def test_a_large_mu_holds_the_sites_near_the_global_weights(configure: Configure) -> None:
    norms = []
    for number, strategy in enumerate(["fedavg", {"type": "fedprox", "proximal_mu": 20.0}]):
        also = {"run_name": f"run_{number}", "optimizer": {"type": "sgd", "lr": 0.05, "momentum": 0.0}}
        config = configure(also, rounds=1, local_steps=6, strategy=strategy)
        led(config)
        norms.append([site["norm"] for site in history(config.run_dir)["rounds"][0]["sites"].values()])
    assert all(near < 0.7 * far for far, near in zip(*norms, strict=True))


def test_secure_aggregation_gives_the_same_model_and_tells_of_no_single_site(configure: Configure) -> None:
    runs = [configure({"run_name": str(secure)}, rounds=1, secure_aggregation=secure) for secure in (False, True)]
    for config in runs:
        led(config)
    plain, hidden = (weights(config.run_dir) for config in runs)
    for name, values in plain.items():
        torch.testing.assert_close(hidden[name], values, rtol=0, atol=1e-6)
    first, second = (history(config.run_dir) for config in runs)
    for one, other in zip(first["rounds"], second["rounds"], strict=True):
        for key, value in one["metrics"].items():
            assert other["metrics"][key] == pytest.approx(value, rel=1e-4, abs=1e-6)
        assert other["metrics_of_sites"] == {}
        for site in other["sites"].values():
            assert (site["train_loss"], site["norm"], site["num_steps"]) == (None, None, None)
    assert '"val_iou"' not in json.dumps([entry["sites"] for entry in second["rounds"]])


def test_central_privacy_is_paid_on_the_disk_before_the_weights_are_there(configure: Configure) -> None:
    config = configure({"model.norm": "group"}, central_dp={"noise_multiplier": 1.0, "clip_norm": 0.5})
    federation, _ = prepared(config)
    commit, paid = federation.journal.commit, []

    def look(entry: Dict, state: Dict) -> None:
        paid.append(json.loads((config.run_dir / "privacy.json").read_bytes())["epsilon"])
        commit(entry, state)

    federation.journal.commit = look  # type: ignore[method-assign]
    federation.run()
    federation.journal.close()
    assert 0 < paid[0] < paid[1]
    assert [entry["epsilon"] for entry in history(config.run_dir)["rounds"]] == pytest.approx(paid)


def test_each_site_has_its_own_ledger_which_grows(configure: Configure) -> None:
    also = {"model.norm": "group", "training.dp": {"noise_multiplier": 1.0, "accountant": "rdp"}}
    config = configure(also, backend="dp")
    led(config)
    rounds = history(config.run_dir)["rounds"]
    for number in range(3):
        spent = [entry["sites"][f"site_{number}"]["backend"]["dp_epsilon"] for entry in rounds]
        own = json.loads((config.run_dir / "sites" / f"site_{number}" / "privacy.json").read_bytes())
        assert 0 < spent[0] < spent[1]
        assert own["epsilon"] == pytest.approx(spent[1])


def test_a_site_whose_budget_has_ended_is_named_and_measured_and_the_others_go_on(configure: Configure) -> None:
    """One of three may spend a fraction of what the others may."""
    dp = {"noise_multiplier": 1.0, "target_epsilon": 1000.0, "accountant": "rdp", "public_statistics": True}
    config = configure({"model.norm": "group", "training.dp": dp}, backend="dp", rounds=3, local_steps=2)
    federation, sites = prepared(config)
    poor = sites["site_1"]
    assert poor.config.training.dp is not None
    spent = 0.0
    commit = federation.journal.commit

    def spend(entry: Dict, state: Dict) -> None:
        nonlocal spent
        commit(entry, state)
        if entry["round"] == 1:  # from here on hardly anything is left
            spent = entry["sites"]["site_1"]["backend"]["dp_epsilon"]
            less = poor.config.training.dp.model_copy(update={"target_epsilon": spent})  # type: ignore[union-attr]
            training = poor.config.training.model_copy(update={"dp": less})
            poor.config, poor.training = poor.config.model_copy(update={"training": training}), None

    federation.journal.commit = spend  # type: ignore[method-assign]
    federation.run()
    federation.journal.close()
    found = history(config.run_dir)
    assert [sorted(entry["sites"]) for entry in found["rounds"][1:]] == [["site_0", "site_2"]] * 2
    assert all(len(entry["metrics_of_sites"]) == 3 for entry in found["rounds"])
    said = [one["what"] for one in found["troubles"] if one["site"] == "site_1"]
    assert len(said) == 1  # it is not asked to train again
    assert "takes part no longer: the privacy budget is spent" in said[0]
    assert json.loads((poor.folder / "privacy.json").read_bytes())["epsilon"] == pytest.approx(spent)


def test_a_site_that_fails_is_named_the_others_go_on_and_it_comes_back(
    configure: Configure, site_data: Path, tmp_path: Path
) -> None:
    """Its images are gone in round 2, and there again in round 3."""
    federation, sites = prepared(configure(rounds=3))
    data, away, lost = tmp_path / "own", tmp_path / "away", sites["site_1"]
    shutil.copytree(site_data, data)
    update = {"data": lost.config.data.model_copy(update={"data_dir": str(data)})}
    lost.config = lost.config.model_copy(update=update)
    commit = federation.journal.commit

    def lose(entry: Dict, state: Dict) -> None:
        commit(entry, state)
        if entry["round"] == 1:
            data.rename(away)
        if entry["round"] == 2:
            away.rename(data)

    federation.journal.commit = lose  # type: ignore[method-assign]
    federation.run()
    federation.journal.close()
    found = history(federation.journal.run_dir)
    assert [sorted(entry["sites"]) for entry in found["rounds"]] == [
        ["site_0", "site_1", "site_2"],
        ["site_0", "site_2"],
        ["site_0", "site_1", "site_2"],
    ]
    assert {(one["round"], one["site"]) for one in found["troubles"]} == {(2, "site_1")}
    assert "refused" in found["troubles"][0]["what"]


def test_an_update_that_is_too_large_is_dropped_and_named(configure: Configure) -> None:
    federation, sites = prepared(configure(rounds=1, max_update_norm=5.0))
    wild = sites["site_2"]
    flatten = wild.layout.flatten

    class Wild(Layout):
        def flatten(self, network: torch.nn.Module) -> dict[str, Any]:
            return {kind: values + np.float32(1) for kind, values in flatten(network).items()}

    wild.layout = Wild(wild.layout.parameters, wild.layout.buffers, wild.layout.of_batch_norm)
    federation.run()
    federation.journal.close()
    (entry,) = history(federation.journal.run_dir)["rounds"]
    assert set(entry["dropped"]) == {"site_2"}
    assert "is over 5" in entry["dropped"]["site_2"]
    assert set(entry["sites"]) == {"site_0", "site_1"}


def test_sites_of_a_simulation_are_waited_for_however_long_the_others_take(configure: Configure) -> None:
    """They work in turn, so that the last one answers after all others; what is left out must not hang on the clock."""
    led(config := configure(round_timeout=1e-3))
    assert [len(entry["sites"]) for entry in history(config.run_dir)["rounds"]] == [3, 3]


def test_early_stopping_ends_the_rounds_and_the_history_has_the_last_score(configure: Configure) -> None:
    stopping = [{"type": "early_stopping", "monitor": "val_loss", "mode": "min", "patience": 1, "min_delta": 100.0}]
    config = configure({"training.callbacks": stopping}, rounds=6)
    federation, _ = led(config)
    rounds = history(config.run_dir)["rounds"]
    assert len(rounds) == 2
    assert "val_loss has not improved" in federation.journal.stop
    assert all("val_loss" in entry["metrics"] for entry in rounds)


def test_what_a_federation_leaves_is_a_run_as_any_other(
    raw: Dict, site_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """best.pt goes into ml-inference and ml-export; TensorBoard has the curves of the rounds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Path("config.json").write_text(json.dumps(raw | {"run_name": "run"}))
    assert cli.main(["--config", "config.json"]) == 0
    assert "Validation of each site" in capsys.readouterr().out
    run = Path("runs/run_fold_0")
    best = str(run / "weights" / "best.pt")
    images = sorted((site_data / "images").iterdir())[:2]
    words = ["--checkpoint_path", best, "--input", *map(str, images), "--output", "predictions"]
    assert inference.main(words) == 0
    assert export.main(["--checkpoint", best, "--format", "safetensors"]) == 0
    curves = EventAccumulator(str(run / "tensorboard")).Reload()
    tags = set(curves.Tags()["scalars"])
    assert {"iou/val", "dice/val", "loss/val", "iou_of_sites/site_0", "dice_of_sites/site_2"} <= tags
    assert [event.step for event in curves.Scalars("iou/val")] == [1, 2]
    entry = history(run)["rounds"][0]
    assert set(entry["sites"]["site_0"]) >= {"num_images", "bytes_up", "bytes_down", "seconds", "train_loss", "norm"}
    assert (run / "metrics.json").exists()


def test_a_site_that_is_gone_at_the_end_is_left_out_of_the_summary(
    configure: Configure, site_data: Path, tmp_path: Path
) -> None:
    federation, sites = prepared(configure(rounds=1))
    federation.run()
    federation.journal.close()
    lost = sites["site_1"]
    data = lost.config.data.model_copy(update={"data_dir": str(tmp_path / "gone")})
    lost.config = lost.config.model_copy(update={"data": data})
    summary = measure(federation.journal, sites)
    assert "site_0: mean IoU" in summary
    assert "site_1: mean IoU" not in summary
    metrics = json.loads((federation.journal.run_dir / "metrics.json").read_bytes())
    assert metrics["sites"]["site_1"] == {}
