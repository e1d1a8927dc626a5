"""What a section `federated` contradicts is said in one sentence before anything is read or written."""

import json
from pathlib import Path
from typing import Any

import pytest
from known_sites import Configure

from ml_src.cli import train as cli
from ml_src.core.errors import ConfigError

GROUP = {"model.norm": "group"}
SECURE = {"secure_aggregation": True}
CENTRAL: dict[str, Any] = {"central_dp": {"noise_multiplier": 1.0}}
DP = GROUP | {"training.dp": {"noise_multiplier": 1.0}}


@pytest.mark.parametrize(
    ("federated", "also", "sentence"),
    [
        ({"sites": ["a", "b"]}, {}, "give sites or num_sites, not both"),
        ({"num_sites": None, "sites": []}, {}, "federated.sites is empty"),
        ({"num_sites": None, "sites": ["a", "a"]}, {}, "federated.sites has a folder twice"),
        ({"local_epochs": 1}, {}, "give local_epochs or local_steps, not both"),
        ({"min_sites": 4}, {}, "federated.min_sites is 4 but there are 3 sites"),
        ({"num_sites": 2} | SECURE, {}, "secure_aggregation needs three sites at least"),
        ({"strategy": "krum"} | SECURE, {}, "strategy krum looks at single updates"),
        ({"strategy": "fedmedian"} | CENTRAL, GROUP, "strategy fedmedian looks at single updates"),
        (SECURE | CENTRAL, GROUP, "clips single updates, which secure_aggregation hides"),
        (CENTRAL, {}, "federated.central_dp needs model.norm group"),
        ({"personalize": "batch_norm"}, GROUP, "personalize batch_norm needs model.norm batch"),
        ({"strategy": "fedprox", "backend": "dp"}, DP, "fedprox does not go with backend dp"),
        ({"backend": "dp"}, DP | {"model.norm": "batch"}, "model.norm must be group"),
        ({"backend": "dp"}, GROUP, "training.dp needs a noise_multiplier"),
        ({"backend": "dp"}, DP | {"loss.class_weights": "balanced"}, "counts the private masks"),
        ({}, {"training.ema": 0.9}, "training.ema does not go"),
        ({}, {"scheduler.type": "plateau"}, "scheduler plateau does not go"),
        ({}, {"training.auto_batch": True}, "training.auto_batch does not go"),
        ({}, {"training.profile": True}, "training.profile does not go"),
        ({}, {"training.callbacks": [{"type": "early_stopping", "monitor": "train_loss", "mode": "min"}]}, "use val_"),
        ({}, {"training.callbacks": [{"type": "model_checkpoint", "save_top_k": 2}]}, "save_top_k above 1"),
        ({"roundz": 3}, {}, "roundz: unknown key"),
        ({"strategy": "fedsgd"}, {}, "fedsgd"),
        ({"strategy": {"type": "fedavg", "eta": 1.0}}, {}, "eta: unknown key"),
        ({"backend": "accelerate"}, {}, "federated.backend"),
        ({"rounds": 0}, {}, "federated.rounds"),
        ({"fraction": 0.0}, {}, "federated.fraction"),
        ({"partition": "dirichlet", "alpha": -1.0}, {}, "federated.alpha"),
    ],
)
def test_a_contradiction_is_one_sentence(
    configure: Configure, federated: dict[str, Any], also: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as error:
        configure(also, **federated)
    assert sentence in str(error.value)


def test_a_federation_without_its_section_is_refused(configure: Configure) -> None:
    with pytest.raises(ConfigError, match="needs a section federated: with sites or num_sites"):
        configure({"federated": None})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"min_sites": 4}, "federated.min_sites is 4"),
        ({"num_sites": None}, "federated needs sites (a list of folders) or num_sites"),
        ({"num_sites": None, "sites": ["nowhere", "data"]}, "nowhere is no folder"),
        ({"strategy": {"type": "krum", "num_malicious": 1}}, "federated.strategy krum needs 5 sites"),
        ({"num_sites": 20}, "fold_0_train has 17 images"),
    ],
)
def test_the_command_ends_with_2_and_leaves_nothing(
    raw: dict[str, Any], changes: dict[str, Any], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("config.json").write_text(json.dumps(raw | {"federated": raw["federated"] | changes}))
    assert cli.main(["--config", "config.json"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert sentence in lines[0]
    assert not Path("runs").exists()


def test_a_monitor_that_there_is_not_ends_with_2_and_names_those_that_are(
    raw: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    raw["training"]["callbacks"] = [{"type": "early_stopping", "monitor": "val_beauty", "mode": "max"}]
    Path("config.json").write_text(json.dumps(raw))
    assert cli.main(["--config", "config.json"]) == 2
    assert "val_beauty" in capsys.readouterr().err.splitlines()[-1]
    assert not Path("runs").exists()
