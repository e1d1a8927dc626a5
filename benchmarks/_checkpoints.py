"""A network for the benchmarks of inference: trained for a moment, so that its labels are mixed, its edges smooth."""

import subprocess
from pathlib import Path

from _growth import command
from _turns import sample_data

from ml_src.core.atomic import write_text
from ml_src.core.config_file import parse_config, to_yaml

NUM_TRAIN, SIDE = 48, 128  # images, pixels


def trained(folder: Path, base_channels: int, trainer: str, epochs: int) -> Path:
    """Train a simple_unet of three classes on generated images with ml-train, and return its checkpoint."""
    raw = {
        "run_name": "moment",
        "data": {"data_dir": str(sample_data(folder / "data", NUM_TRAIN, SIDE)), "num_classes": 3},
        "model": {"base_channels": base_channels},
        "loss": {"type": "dice_bce_loss"},
        "training": {"trainer_type": trainer, "num_epochs": epochs, "batch_size": 4, "num_workers": 1, "device": "cpu"},
        "optimizer": {"lr": 0.002},
        "transforms": {
            "train": [{"type": "random_horizontal_flip"}, {"type": "normalize", "mean": [0.5], "std": [0.25]}]
        },
    }
    write_text(folder / "config.yaml", to_yaml(parse_config(raw)))
    words = [command("ml-train"), "--config", "config.yaml"]
    subprocess.run(words, cwd=folder, stdout=subprocess.DEVNULL, check=True)
    return folder / "runs" / "moment_fold_0" / "weights" / "best.pt"
