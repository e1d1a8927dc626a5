"""How much of the bare step's speed does the loop keep?

ml-train's loop (files decoded and augmented by 2 workers, normalisation, scores, progress) against forward, backward
and step of the same network on tensors in memory; in one process, in turn, medians over the rounds.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from _report import report

from ml_src.cli import split
from ml_src.core.callbacks import ProgressLines
from ml_src.core.config_file import parse_config
from ml_src.core.data.sample import write_sample
from ml_src.core.tasks import task_for
from ml_src.core.trainers import build_training
from ml_src.core.trainers.loop import train_epoch
from ml_src.core.trainers.training import Progress, Training


def build(folder: Path, base_channels: int, size: int, batch_size: int, num_steps: int) -> Training:
    num_images = num_steps * batch_size
    write_sample(folder / "data", num_images=num_images * 2 + 2, height=size, width=size)
    paths = ["--raw_data", str(folder / "data/images"), "--mask_data", str(folder / "data/masks")]
    split.main([*paths, "--folds", "2", "--test_split", str(2 / (num_images * 2 + 2))])
    raw = {
        "data": {"data_dir": str(folder / "data"), "num_classes": 3},
        "model": {"base_channels": base_channels},
        "loss": {"type": "dice_bce_loss"},
        "training": {"batch_size": batch_size, "num_workers": 2, "device": "cpu"},
        "transforms": {
            "train": [
                {"type": "resize", "size": [size, size]},
                {"type": "random_horizontal_flip"},
                {"type": "random_vertical_flip"},
                {"type": "random_rotation", "degrees": 15},
                {"type": "random_brightness_contrast"},
                {"type": "normalize", "mean": [0.5], "std": [0.25]},
            ]
        },
    }
    config = parse_config(raw)
    training = build_training(config, task_for(config), torch.device("cpu"), folder / "run")
    training.callbacks = [ProgressLines()]
    return training


def bare(t: Training, images: torch.Tensor, masks: torch.Tensor, num_steps: int) -> None:
    t.model.train()
    for _ in range(num_steps):
        t.criterion(t.model(images), masks).backward()
        t.optimizer.step()
        t.optimizer.zero_grad(set_to_none=True)


def timed(what, *args) -> float:
    start = time.perf_counter()
    what(*args)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for base_channels, size, batch_size in ((16, 256, 4), (32, 256, 4)):
        with tempfile.TemporaryDirectory() as folder:
            t = build(Path(folder), base_channels, size, batch_size, args.steps)
            batch = next(iter(t.train_loader.epoch()))
            images, masks = t.task.prepare(batch, t.device)
            seconds: dict[str, list[float]] = {"loop": [], "bare": []}
            for number in range(args.rounds + 1):  # the first is the warm-up
                t.progress = Progress(epoch=number)
                t.callbacks[0].on_start(t)
                loop = timed(train_epoch, t)
                step = timed(bare, t, images, masks, t.progress.step)
                if number:
                    seconds["loop"].append(loop)
                    seconds["bare"].append(step)
            num_images = t.progress.num_samples
            ratios = [b / a for a, b in zip(seconds["loop"], seconds["bare"], strict=True)]
            rows.append(
                {
                    "channels": base_channels,
                    "size": size,
                    "batch": batch_size,
                    "loop images/s": num_images / statistics.median(seconds["loop"]),
                    "bare images/s": num_images / statistics.median(seconds["bare"]),
                    "kept (median of pairs)": statistics.median(ratios),
                    "kept min": min(ratios),
                    "kept max": max(ratios),
                }
            )
    report("train_loop", vars(args) | {"num_workers": 2}, rows)


if __name__ == "__main__":
    main()
