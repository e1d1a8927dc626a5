"""A federation that is killed at any moment, and gone on with, ends as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from known_forks import Forks
from known_sites import Configure, differing, history, led, prepared, weights, without_clocks

from ml_src.cli import train as cli
from ml_src.core.checkpoint import load_checkpoint
from ml_src.core.errors import CheckpointError, TrainingError
from ml_src.core.federated.simulation import train

pytestmark = pytest.mark.xdist_group("resume")  # what they share is made once

Order = Callable[..., int]


@pytest.fixture(scope="module")
def order() -> Iterator[Order]:
    """Runs a simulation in a process of its own that kills itself where it is told to; returns the exit code."""
    with Forks("known_sites", folders=[Path(__file__).parent]) as forks:

        def send(folder: Path, config: dict[str, Any], kill_at: int = 0, afresh: bool = True) -> int:
            order = {"config": config, "kill_at": kill_at, "afresh": afresh}
            process = forks.start("known_sites:do", order, folder)
            print(process.communicate(timeout=300)[1])
            assert process.returncode is not None
            return process.returncode

        yield send


def essence(run_dir: Path) -> dict[str, Any]:
    """What a run leaves, but for clocks: weights, the server's momentum, the sites' own state, scores."""
    found: dict[str, Any] = {"history": without_clocks(history(run_dir))}
    found["history"].pop("troubles")
    for path in sorted(run_dir.rglob("*.pt")):
        if "previous" not in path.name and path.name != "round_2.pt":
            contents = load_checkpoint(path)
            found |= {
                f"{path.relative_to(run_dir)}: {key}": contents[key]
                for key in ("model_state_dict", "optimizer_state_dict", "epoch", "step")
            }
            found[f"{path.relative_to(run_dir)}: server"] = contents["backend_state_dict"].get("aggregator")
    return found


def unequal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return not torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() != second.keys() or any(unequal(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) != len(second) or any(map(unequal, first, second))
    return bool(first != second)


MODES: dict[str, dict[str, Any]] = {
    "fedavg": {"local_steps": None, "local_epochs": 1},
    "fedadam": {"strategy": "fedadam"},
    "fedbn": {"personalize": "batch_norm", "fraction": 0.67},
    "a_part_of_the_sites": {"fraction": 0.67, "local_steps": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_federation_goes_on_to_the_same_bits(
    mode: str, raw: dict[str, Any], tmp_path: Path, order: Order
) -> None:
    """Killed before files took their names: in a round with some sites' states saved, before and after its commit."""
    config = raw | {"federated": raw["federated"] | {"rounds": 3} | MODES[mode], "run_name": "run"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    assert order(whole, config) == 0
    expected = essence(whole / "runs" / "run_fold_0")
    total = int((whole / "renamed").read_text())
    for share in (0.45, 0.7, 0.97):
        assert order(cut, config, kill_at=round(share * total)) == -signal.SIGKILL
        assert order(cut, config, afresh=False) == 0
        found = essence(cut / "runs" / "run_fold_0")
        different = [key for key in expected | found if unequal(found.get(key), expected.get(key))]
        assert different == [], f"{share} of {total} files"


def test_a_federation_killed_again_and_again_ends_the_same(raw: dict[str, Any], tmp_path: Path, order: Order) -> None:
    config = raw | {"federated": raw["federated"] | {"strategy": "fedavgm"}, "run_name": "run"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    assert order(whole, config) == 0
    killed = [order(cut, config, kill_at=number, afresh=False) for number in (9, 15, 17, 18)]
    assert killed == [-signal.SIGKILL] * 4
    assert order(cut, config, afresh=False) == 0
    first, second = (essence(folder / "runs" / "run_fold_0") for folder in (whole, cut))
    assert [key for key in first if unequal(first[key], second[key])] == []


def test_ml_train_goes_on_with_a_federation_that_was_killed(
    raw: dict[str, Any], tmp_path: Path, site_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command line, killed from a plugin after the eleventh letter: two sites have trained round 2."""
    (tmp_path / "killer.py").write_text(
        "import os, signal\n"
        "from ml_src.core.federated.local_grid import LocalGrid\n"
        "LocalGrid.letters = 0\n"
        "pull = LocalGrid.pull_messages\n"
        "def counted(self, keys):\n"
        "    if LocalGrid.letters == 11 and os.environ.get('KILL'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    LocalGrid.letters += 1\n"
        "    return pull(self, keys)\n"
        "LocalGrid.pull_messages = counted\n"
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))  # YAML too
    command = [sys.executable, "-m", "ml_src.cli.train", "--config", str(path), "--run_name", "cut"]
    killed = subprocess.run(
        [*command, "--plugin", "killer.py"], env=os.environ | {"KILL": "1"}, capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert sorted(path.name for path in Path("runs/cut_fold_0/sites/site_0/weights").glob("round_*")) == [
        "round_1.pt",
        "round_2.pt",
    ]
    assert not Path("runs/cut_fold_0/sites/site_2/weights/round_2.pt").exists()
    assert cli.main(["--resume", "runs/cut_fold_0", "--set", "plugins=[]"]) == 0
    assert "best round" in capsys.readouterr().out
    assert Path("runs/cut_fold_0/metrics.json").exists()
    assert cli.main(["--config", str(path), "--run_name", "whole"]) == 0
    assert differing(weights(Path("runs/cut_fold_0")), weights(Path("runs/whole_fold_0"))) == []


def test_more_rounds_go_on_from_the_last(configure: Configure) -> None:
    constant = {"scheduler.type": "none"}
    config = configure(also={**constant, "run_name": "short"})
    led(config)
    led(configure(also={**constant, "run_name": "short"}, rounds=4))
    led(configure(also={**constant, "run_name": "long"}, rounds=4))
    assert [entry["round"] for entry in history(Path("runs/short_fold_0"))["rounds"]] == [1, 2, 3, 4]
    assert differing(weights(Path("runs/short_fold_0")), weights(Path("runs/long_fold_0"))) == []


@pytest.mark.parametrize("change", [{"strategy": "fedadam"}, {"num_sites": 2}, {"local_steps": 2}])
def test_going_on_with_another_federation_is_refused(configure: Configure, change: dict[str, Any]) -> None:
    config = configure()
    led(config)
    before = weights(config.run_dir)
    with pytest.raises(
        CheckpointError, match="another section federated, of which only rounds, min_sites, round_timeout may change"
    ):
        train(configure(**change), config.run_dir / "weights" / "last.pt")
    assert differing(before, weights(config.run_dir)) == []


def test_a_round_with_too_few_sites_ends_the_run_and_resume_goes_on(configure: Configure) -> None:
    """Two of three sites cannot read their images; where they have them again, the run ends as one without trouble."""
    config = configure(also={"run_name": "poor"}, rounds=3)
    federation, sites = prepared(config)
    commit = federation.journal.commit
    hidden = [Path(site.config.data.data_dir) for site in sites.values()]

    def lose(entry: dict[str, Any], state: dict[str, Any]) -> None:
        commit(entry, state)
        for name in ("site_1", "site_2"):
            sites[name].config.splits_dir.rename(sites[name].config.splits_dir.with_suffix(".away"))
            sites[name].training = None

    federation.journal.commit = lose  # type: ignore[method-assign]
    assert hidden
    with pytest.raises(TrainingError, match=r"1 of 3 sites can take part, 2 are needed"):
        federation.run()
    federation.journal.close()
    for name in ("site_1", "site_2"):
        folder = sites[name].config.splits_dir
        folder.with_suffix(".away").rename(folder)
    led(config)
    led(configure(also={"run_name": "rich"}, rounds=3))
    assert differing(weights(Path("runs/poor_fold_0")), weights(Path("runs/rich_fold_0"))) == []
