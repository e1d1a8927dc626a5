"""Real trainings of a server and three sites: processes, keys and TLS, on this machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from known_federation import (
    SECRET,
    alive,
    descendants,
    ends_of_sockets,
    free_port,
    running,
    start,
    start_command,
    wait_for,
    write_data,
)
from known_sites import differing, history, plain_config, weights
from PIL import Image

from ml_src.core.config_file import parse_config
from ml_src.core.federated.processes.status import status
from ml_src.core.federated.simulation import train
from ml_src.core.inference.members import open_member

pytestmark = [
    pytest.mark.xdist_group("processes"),
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]
whole = pytest.mark.skipif("ML_SRC_WHOLE_FEDERATION" not in os.environ, reason="takes minutes: make federated")

NAMES = ["anna", "berlin", "charite"]
Also = dict[str, Any]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The data folder of each site. Tests must not write into it."""
    return write_data(tmp_path_factory.mktemp("sites"), NAMES)


def raw_config(data: dict[str, Path], also: Also) -> dict[str, Any]:
    """A federation whose sites normalise alike and balance their classes, which takes sums over all of them."""
    raw = plain_config(data[NAMES[0]])
    raw["transforms"]["train"][-1] = {"type": "normalize"}
    raw["loss"]["class_weights"] = "balanced"
    raw["federated"] = {"sites": [str(data[name]) for name in sorted(data)], "rounds": 2, "local_epochs": 1}
    raw["federated"] |= also.get("federated", {})
    return raw | {key: raw.get(key, {}) | section for key, section in also.items() if key != "federated"}


def simulated(folders: dict[str, Path], folder: Path, **also: Any) -> Path:
    """Train in this process over the same sites; returns the run."""
    folder.mkdir()
    with chdir(folder):
        return train(parse_config(raw_config(folders, also))).run_dir.resolve()


class Deployment:
    """A server and its sites, each a process that is started by `start`."""

    def __init__(self, folders: dict[str, Path], folder: Path, **also: Any) -> None:
        folder.mkdir(exist_ok=True)
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(raw_config(folders, also)))
        self.folders, self.kits = folders, folder / "kits"
        words = ["--address", f"127.0.0.1:{free_port()}", "--output", str(self.kits)]
        init = start_command("init", "--config", str(config), "--sites", *folders, *words)
        assert init.wait(60) == 0, init.communicate()[0].decode()
        self.run = self.kits / "server" / "run"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, function: str | None = None) -> None:
        """Start the server or a site, with a function of known_federation in place of its own where one is given."""
        use = "server" if name == "server" else "site"
        words = [str(self.kits / name), *([] if use == "server" else [str(self.folders[name])])]
        if function is not None:
            self.processes[name] = start(use, *words, function=function)
        else:
            words = words[:1] + [word for path in words[1:] for word in ("--data_dir", path)]
            self.processes[name] = start_command(use, *words)

    def kill(self, name: str) -> None:
        """Kill with signal 9, and wait until all that it has started has ended."""
        process = self.processes.pop(name)
        left = descendants(process.pid)
        process.send_signal(signal.SIGKILL)
        wait_for(f"the end of {name}", lambda: process.poll() is not None and not alive(left))

    def wait_for(self, what: str, found: Callable[[], object]) -> None:
        wait_for(what, found, *self.processes.values())

    def wait_for_sites(self) -> None:
        """Return when all sites are connected and their workers have imported what they need."""
        self.wait_for("the server", lambda: (self.kits / "server" / "state" / "token").exists())

        def ready() -> bool:
            logs = [self.kits / name / "state" / "worker.log" for name in self.folders]
            if not all(log.exists() and " ready\n" in log.read_text() for log in logs):
                return False
            said = list(status(self.kits / "server"))
            return all(f"site {name}: connected" in said for name in self.folders)

        self.wait_for("all sites", ready)

    def end(self) -> str:
        """Return what the server has said when it ends; it must not wait for more than its rounds."""
        server = self.processes["server"]
        said = server.communicate(timeout=120)[0].decode()
        assert server.returncode == 0, said
        return said

    def troubles(self) -> list[str]:
        """Return what went wrong, as `round site what`."""
        if not (self.run / "federation.json").exists():
            return []
        return ["{round} {site} {what}".format(**one) for one in history(self.run)["troubles"]]


@contextmanager
def deployed(folders: dict[str, Path], folder: Path, **also: Any) -> Iterator[Deployment]:
    """A federation whose processes are ended with the block."""
    deployment = Deployment(folders, folder, **also)
    try:
        yield deployment
    finally:
        with running(*deployment.processes.values()):
            pass


# Two rounds, as the commands do them


class Ended:
    """What two rounds of the plain commands have left."""

    def __init__(self, deployment: Deployment, ends: set[str], codes: dict[str, int], left: set[int]) -> None:
        self.kits, self.run = deployment.kits, deployment.run
        self.ends, self.codes, self.left = ends, codes, left


@pytest.fixture(scope="module")
def ended(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Ended:
    with deployed(data, tmp_path_factory.mktemp("federation")) as deployment:
        for name in ["server", *NAMES]:
            deployment.start(name)
        processes, ends, left = deployment.processes, set(), set()
        for _ in range(200):
            for process in processes.values():
                left |= {process.pid} | descendants(process.pid)
            ends |= set().union(*map(ends_of_sockets, left))
            with suppress(subprocess.TimeoutExpired):
                processes["server"].wait(0.5)
                break
        codes = {name: process.wait(60) for name, process in processes.items()}
        assert codes["server"] == 0, processes["server"].communicate()[0].decode()
    return Ended(deployment, ends, codes, left)


def test_all_processes_end_well_and_leave_none(ended: Ended) -> None:
    assert ended.codes == dict.fromkeys(["server", *NAMES], 0)
    assert not alive(ended.left)


def test_the_history_has_every_site_in_every_round_and_no_trouble(ended: Ended) -> None:
    found = history(ended.run)
    assert [sorted(one["sites"]) for one in found["rounds"]] == [NAMES, NAMES]
    assert found["troubles"] == []


def test_the_weights_are_to_the_bit_those_of_a_simulation(ended: Ended, data: dict[str, Path], tmp_path: Path) -> None:
    run = simulated(data, tmp_path / "simulation")
    for name in ("best.pt", "last.pt"):
        assert not differing(weights(ended.run, name), weights(run, name))
    ours, theirs = history(ended.run), history(run)
    for key in ("fingerprint", "best_round"):
        assert ours[key] == theirs[key]
    for mine, other in zip(ours["rounds"], theirs["rounds"], strict=True):
        assert (mine["metrics"], mine["metrics_of_sites"]) == (other["metrics"], other["metrics_of_sites"])


def test_the_best_weights_are_opened_as_those_of_any_training(ended: Ended, data: dict[str, Path]) -> None:
    member = open_member(ended.run / "weights" / "best.pt", data_dir=data["anna"])
    probabilities = member.probabilities(np.zeros((1, 64, 64, 3), np.uint8))
    assert probabilities.shape == (1, 3, 64, 64)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert member.config.class_names == ["background", "cell", "fibre"]


def test_the_summary_has_the_scores_of_each_site_and_of_all(ended: Ended) -> None:
    _, _, of_test = (ended.run / "summary.txt").read_text().partition("test, at the images' own size:\n")
    scores = json.loads((ended.run / "metrics.json").read_bytes())["test"]
    assert of_test.splitlines() == [
        f"  {name}: mean IoU {scores[name]['iou']:.4f}, mean Dice {scores[name]['dice']:.4f}"
        for name in [*NAMES, "all"]
    ]


def test_all_sockets_of_a_training_are_on_this_machine(ended: Ended) -> None:
    assert ended.ends == {"0100007F", "00000000"}  # 127.0.0.1; the other end of a socket that listens


def test_the_server_has_no_name_of_an_image(ended: Ended) -> None:
    files = [path for path in (ended.kits / "server").rglob("*") if path.is_file()]
    assert ended.run / "weights" / "last.pt" in files
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


# The whole: what goes wrong, and what else can be asked for


def begun(deployment: Deployment, **functions: str) -> Deployment:
    """Start all, each with its function of known_federation where one is given; begin when all are there."""
    for name in ["server", *deployment.folders]:
        deployment.start(name, functions.get(name, "lead_when_told" if name == "server" else None))
    deployment.wait_for_sites()
    (deployment.kits / "server" / "begin").touch()
    return deployment


def named_in(run: Path, round: int) -> list[str]:
    """The sites whose updates are in a round."""
    return sorted(history(run)["rounds"][round - 1]["sites"])


@whole
def test_a_site_that_hangs_or_is_killed_is_gone_without_and_named_and_comes_back(
    data: dict[str, Path], tmp_path: Path
) -> None:
    with deployed(data, tmp_path, federated={"rounds": 500, "min_sites": 2, "round_timeout": 12}) as deployment:
        begun(deployment, charite="hold")
        hanging = "2 charite has not answered within 12 s"
        deployment.wait_for("a round without it", lambda: hanging in deployment.troubles())
        deployment.kill("charite")  # nobody waits for it any more
        deployment.wait_for("rounds without it", lambda: len(history(deployment.run)["rounds"]) > 3)
        deployment.start("charite")
        deployment.wait_for("its return", lambda: "charite" in history(deployment.run)["rounds"][-1]["sites"])
        run, troubles = deployment.run, deployment.troubles()
    assert named_in(run, 1) == NAMES
    assert named_in(run, 2) == named_in(run, 3) == named_in(run, 4) == NAMES[:2]
    assert not [one for one in troubles if one.startswith("1 ")]
    assert {one.split()[1] for one in troubles} == {"charite"}


@whole
def test_a_server_that_is_killed_in_a_round_and_started_again_comes_to_the_same_bits(
    data: dict[str, Path], tmp_path: Path
) -> None:
    federated = {"rounds": 3, "min_sites": 3}
    with deployed(data, tmp_path, federated=federated) as deployment:
        begun(deployment, charite="hold")
        deployment.wait_for("round 2", (deployment.kits / "charite" / "working").exists)
        deployment.kill("server")
        (deployment.kits / "charite" / "release").touch()
        assert len(history(deployment.run)["rounds"]) == 1
        deployment.start("server")
        assert "going on after round 1" in deployment.end()
        run = deployment.run
    assert not differing(weights(run), weights(simulated(data, tmp_path / "simulation", federated=federated)))
    assert [named_in(run, number) for number in (1, 2, 3)] == [NAMES] * 3


@whole
def test_sums_under_masks_give_the_plain_weights_and_no_score_of_a_single_site(
    data: dict[str, Path], tmp_path: Path
) -> None:
    with deployed(data, tmp_path, federated={"secure_aggregation": True}) as deployment:
        for name in ["server", *NAMES]:
            deployment.start(name)
        deployment.end()
        run = deployment.run
    plain = weights(simulated(data, tmp_path / "simulation"))
    for name, values in weights(run).items():
        if values.is_floating_point():
            torch.testing.assert_close(values, plain[name], rtol=0, atol=1e-6)
    found = history(run)
    assert found["troubles"] == []
    for one in found["rounds"]:
        assert sorted(one["sites"]) == NAMES
        assert one["metrics_of_sites"] == {}
        assert {site[key] for site in one["sites"].values() for key in ("train_loss", "norm", "num_steps")} == {None}
        assert 0 <= one["metrics"]["val_iou"] <= 1
    for name in ("summary.txt", "metrics.json"):
        assert not any(site in (run / name).read_text() for site in NAMES)


@whole
def test_the_server_knows_what_privacy_has_cost_at_each_site(data: dict[str, Path], tmp_path: Path) -> None:
    transforms = plain_config(tmp_path)["transforms"]
    with deployed(
        data,
        tmp_path,
        federated={"backend": "dp"},
        training={"dp": {"noise_multiplier": 1.0, "target_epsilon": None, "target_delta": 1e-3}},
        model={"norm": "group"},
        loss={"class_weights": None},
        transforms=transforms,
    ) as deployment:
        for name in ["server", *NAMES]:
            deployment.start(name)
        deployment.end()
        run, kits = deployment.run, deployment.kits
    told = json.loads((run / "privacy.json").read_bytes())
    assert sorted(told["sites"]) == NAMES
    for name, report in told["sites"].items():
        assert report["epsilon"] == json.loads((kits / name / "run" / "privacy.json").read_bytes())["epsilon"]
        assert 0 < report["epsilon"] <= told["epsilon"]
    assert told["epsilon"] == max(report["epsilon"] for report in told["sites"].values())


@whole
def test_spoiled_weights_are_dropped_repeated_messages_refused_and_no_image_is_heard_of(
    data: dict[str, Path], tmp_path: Path
) -> None:
    with deployed(data, tmp_path) as deployment:
        for name in ["server", *NAMES]:
            deployment.start(name, {"server": "lead_and_repeat", "charite": "spoil"}.get(name))
        deployment.end()
        run, server = deployment.run, deployment.kits / "server"
        troubles = deployment.troubles()
    assert troubles == ["1 charite sent an answer that cannot be used: parameters has values that are no finite number"]
    assert (named_in(run, 1), named_in(run, 2)) == (NAMES[:2], NAMES)
    assert all(values.isfinite().all() for values in weights(run).values())
    refusals = (server / "refusals").read_text().splitlines()
    assert sorted(refusals) == [
        f"round {number} was answered before: a replayed message is refused" for number in (1, 1, 1, 1, 1, 1, 2, 2, 2)
    ]
    heard = (server / "heard").read_bytes()
    assert b"train_loss" in heard and b"channels" in heard
    assert SECRET.encode() not in heard
    for folder in data.values():
        for path in folder.glob("images/*.png"):
            row = np.asarray(Image.open(path))[32]
            assert not any(row.astype(kind).tobytes() in heard for kind in (np.uint8, np.float32, np.float64))


@whole
def test_sites_of_other_classes_end_the_federation_with_the_names_of_those_that_differ(
    data: dict[str, Path], tmp_path: Path
) -> None:
    other = shutil.copytree(data["charite"], tmp_path / "charite")
    (other / "classes.txt").write_text("background\nfibre\ncell\n")
    also = {"data": {"class_names": None, "num_classes": 3}}
    with deployed(data | {"charite": other}, tmp_path / "federation", **also) as deployment:
        for name in ["server", *NAMES]:
            deployment.start(name)
        server = deployment.processes["server"]
        said = server.communicate(timeout=120)[0].decode()
    assert server.returncode == 2
    assert (
        "the sites differ in classes: anna: background, cell, fibre; berlin: background, cell, fibre; "
        "charite: background, fibre, cell; make them agree before they train together"
    ) in said
    assert "Traceback" not in said
