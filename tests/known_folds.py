"""Folds of a cross-validation whose networks make known mistakes: specks of class 1 at known places."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from known_networks import NAMES, PLAIN, ByBrightness
from PIL import Image
from torch import Tensor

from ml_src.core.checkpoint import CONTENTS, save_checkpoint
from ml_src.core.config_file import parse_config, plain
from ml_src.core.network import MODEL_REGISTRY

SIDE = 56
PERIOD = 7  # pixels from speck to speck; blocks are so drawn that none of up to 2 pixels touches an edge


class Speckled(ByBrightness):
    """Right on masks drawn as gray levels, but for specks of so many pixels a side that it takes for class 1."""

    def __init__(self, speck: int = 0, **_: object) -> None:
        super().__init__()
        self.register_buffer("speck", torch.tensor(speck))

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        rows, columns = ((torch.arange(side) - 3) % PERIOD < self.speck for side in images.shape[-2:])
        logits[:, 1, rows[:, None] & columns] += 1000
        return logits


def drawn_folds(folder: Path, num_folds: int = 3, per_fold: int = 2) -> Path:
    """Images whose gray level is the class, in blocks; every fold has its own validation images."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks", "splits"):
        (folder / kind).mkdir(parents=True)
    names = [f"{number}.png" for number in range(num_folds * per_fold)]
    for name in names:
        mask = np.zeros((SIDE, SIDE), np.uint8)
        for value in (1, 2, 1, 2):
            (top, bottom), (left, right) = (PERIOD * np.sort(rng.permutation(7)[:2]) for _ in range(2))
            mask[top + 6 : bottom + 9, left + 6 : right + 9] = value
        Image.fromarray(mask).save(folder / "masks" / name)
        Image.fromarray((mask * 127.5).astype(np.uint8)).save(folder / "images" / name)
    for fold in range(num_folds):
        val = names[fold * per_fold : (fold + 1) * per_fold]
        for kind in ("images", "masks"):
            for split, chosen in (("val", val), ("train", [name for name in names if name not in val])):
                lines = "".join(f"{kind}/{name}\n" for name in chosen)
                (folder / "splits" / f"fold_{fold}_{split}_{kind}.txt").write_text(lines)
    return folder


def write_groups(data: Path, groups: dict[int, str]) -> None:
    """Say which image is of which group."""
    rows = [f"{number}.png,{group}\n" for number, group in groups.items()]
    (data / "splits" / "groups.csv").write_text("image,group\n" + "".join(rows))


def speckled_run(run_dir: Path, data: Path, fold: int, speck: int, **overrides: Any) -> Path:
    """Write the best.pt of a run whose network makes specks; return the run's folder."""
    MODEL_REGISTRY["speckled"] = Speckled
    raw = {
        "data": {"data_dir": str(data), "num_classes": 3, "class_names": NAMES, "fold": fold},
        "model": {"custom_architecture": "speckled", "in_channels": 1},
        "training": {"batch_size": 2, "num_workers": 0},
        "transforms": {"train": PLAIN},
    }
    path = run_dir / "weights" / "best.pt"
    path.parent.mkdir(parents=True)
    own = {"config": plain(parse_config(raw, overrides)), "model_state_dict": Speckled(speck).state_dict()}
    save_checkpoint(path, {key: kind() for key, kind in CONTENTS.items()} | own)
    return run_dir
