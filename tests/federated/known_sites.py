"""Simulations of a few sites over a few small images, what the tests look at afterwards, and a way to kill them."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ml_src.core.checkpoint import load_checkpoint
from ml_src.core.config import Config
from ml_src.core.config_file import parse_config
from ml_src.core.federated.client import answer
from ml_src.core.federated.link import Link
from ml_src.core.federated.local_grid import LocalGrid
from ml_src.core.federated.rounds import Federation
from ml_src.core.federated.simulation import site_configs
from ml_src.core.federated.site import Site
from ml_src.core.trainers.resume import checkpoint_of

Configure = Callable[..., Config]


def plain_config(data: Path) -> dict[str, Any]:
    """A federation of three sites over two rounds, with dropout, which draws from generators that must not shift."""
    return {
        "data": {"data_dir": str(data), "num_classes": 3, "class_names": ["background", "cell", "fibre"]},
        "model": {"base_channels": 4, "dropout": 0.1},
        "loss": {"type": "dice_bce_loss"},
        "training": {"trainer_type": "federated", "batch_size": 4, "num_workers": 0, "device": "cpu"},
        "federated": {"num_sites": 3, "rounds": 2, "local_steps": 1},
        "optimizer": {"type": "adam", "lr": 0.003},
        "transforms": {
            "train": [
                {"type": "random_crop", "size": [32, 32]},
                {"type": "random_horizontal_flip"},
                {"type": "normalize", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
            ],
        },
    }


def prepared(config: Config) -> tuple[Federation, dict[str, Site]]:
    """Build a simulation without the measuring at its end; where the run's folder holds a last.pt, it goes on."""
    run_dir = config.run_dir
    (run_dir / "weights").mkdir(parents=True, exist_ok=True)
    goes_on = (run_dir / "weights" / "last.pt").exists()
    if not goes_on:  # else a partition that was cut short would count as one
        shutil.rmtree(run_dir / "sites" / "splits", ignore_errors=True)
    configs = site_configs(config, run_dir / "sites")
    sites = {
        name: Site(name, one, run_dir / "sites" / name, index, keep_workers=False)
        for index, (name, one) in enumerate(configs.items())
    }
    nodes = {name: number for number, name in enumerate(sites, start=1)}
    grid = LocalGrid({nodes[name]: partial(answer, site) for name, site in sites.items()})
    federation = Federation(config, Link(grid, lambda: nodes, is_patient=True), run_dir, len(sites))
    if goes_on:
        federation.restore(load_checkpoint(checkpoint_of(run_dir)))
    return federation, sites


def led(config: Config) -> tuple[Federation, dict[str, Site]]:
    """Run a simulation to its last round, or go on with it."""
    federation, sites = prepared(config)
    try:
        federation.run()
    finally:
        federation.journal.close()
    return federation, sites


def weights(run_dir: Path, name: str = "last.pt") -> dict[str, torch.Tensor]:
    """The weights of a run, by name."""
    return load_checkpoint(run_dir / "weights" / name)["model_state_dict"]


def differing(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """Names of the weights that are not the same to the bit."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def history(run_dir: Path) -> dict[str, Any]:
    """The contents of federation.json."""
    contents: dict[str, Any] = json.loads((run_dir / "federation.json").read_bytes())
    return contents


def without_clocks(contents: Any) -> Any:
    """The same without what a second run cannot repeat: seconds."""
    if isinstance(contents, dict):
        return {key: without_clocks(value) for key, value in contents.items() if "seconds" not in key}
    if isinstance(contents, list):
        return [without_clocks(value) for value in contents]
    return contents


def do(order: dict[str, Any]) -> None:
    """Lead a simulation; die in the moment before the `kill_at`-th file of it takes its name."""
    renamed = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal renamed
        if event == "os.rename":
            renamed += 1
            if renamed == order["kill_at"]:
                os.kill(os.getpid(), signal.SIGKILL)

    if order["afresh"]:
        shutil.rmtree("runs", ignore_errors=True)
    sys.addaudithook(watch)
    led(parse_config(order["config"]))
    Path("renamed").write_text(str(renamed))
