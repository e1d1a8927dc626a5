"""How fast and how large is a training step with each trainer, beside the plain PyTorch loop that most people write?

Every contender is a process of its own; they take turns, a few steps each, for several rounds. Ours go through the loop
of ml-train (files read and augmented by 2 workers, scores, progress). The plain loop has the same network, loss, files
and number of workers: float32, contiguous images, normalised by the workers.
"""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _report import report
from _turns import Epoch, ours, sample_data, take_turns
from PIL import Image

from ml_src.core.config_file import parse_config
from ml_src.core.losses import build_loss
from ml_src.core.network.custom import SimpleUNet

PLAIN = "plain PyTorch, fp32"
ON_CPU: dict[str, dict[str, Any]] = {
    "standard": {"training.trainer_type": "standard"},
    "mixed_precision bf16": {"training.trainer_type": "mixed_precision", "training.amp_dtype": "bfloat16"},
    "accelerate, 1 process": {"training.trainer_type": "accelerate"},
}
ON_GPU = ON_CPU | {
    "mixed_precision fp16": {"training.trainer_type": "mixed_precision", "training.amp_dtype": "float16"}
}


def raw_config(data: Path, base_channels: int, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "data": {"data_dir": str(data), "num_classes": 3},
        "model": {"base_channels": base_channels},
        "loss": {"type": "dice_bce_loss"},
        "training": {"batch_size": args.batch, "num_workers": args.workers, "device": args.device},
        "transforms": {
            "train": [
                {"type": "random_horizontal_flip"},
                {"type": "random_vertical_flip"},
                {"type": "normalize", "mean": [0.5], "std": [0.25]},
            ]
        },
    }


class PlainDataset(torch.utils.data.Dataset):
    def __init__(self, data: Path) -> None:
        lines = [(data / "splits" / f"fold_0_train_{kind}.txt").read_text().split() for kind in ("images", "masks")]
        self.pairs = [(data / image, data / mask) for image, mask in zip(*lines, strict=True)]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, mask = (np.asarray(Image.open(path)) for path in self.pairs[index])
        if np.random.random() < 0.5:
            image, mask = image[:, ::-1], mask[:, ::-1]
        if np.random.random() < 0.5:
            image, mask = image[::-1], mask[::-1]
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float().div(255)
        return (pixels - 0.5) / 0.25, torch.from_numpy(mask.astype(np.int64))


def plain_epoch(data: Path, base_channels: int, args: argparse.Namespace) -> Epoch:
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    model = SimpleUNet(3, 3, base_channels).to(device)
    criterion = build_loss(parse_config(raw_config(data, base_channels, args)).loss)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(
        PlainDataset(data), args.batch, shuffle=True, num_workers=args.workers, persistent_workers=args.workers > 0
    )

    def epoch() -> int:
        model.train()
        running = 0.0
        for images, masks in loader:
            images, masks = images.to(device), masks.to(device)
            optimizer.zero_grad()
            loss = criterion(model(images), masks)
            loss.backward()
            optimizer.step()
            running += loss.item()
        return len(loader.dataset)

    return epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="training_step", help="of the JSON file")
    args = parser.parse_args()
    trainers = ON_GPU if args.device == "cuda" else ON_CPU
    rows = []
    for base_channels in args.channels:
        with tempfile.TemporaryDirectory() as folder:
            data = sample_data(Path(folder) / "data", args.steps * args.batch, args.size)
            raw = raw_config(data, base_channels, args)
            contenders = {PLAIN: partial(plain_epoch, data, base_channels, args)}
            contenders |= {name: ours(raw, overrides) for name, overrides in trainers.items()}
            speeds, memory = take_turns(contenders, args.rounds, args.threads, args.device == "cuda")
            for name in contenders:
                ratios = [a / b for a, b in zip(speeds[name], speeds[PLAIN], strict=True)]
                to_standard = [a / b for a, b in zip(speeds[name], speeds["standard"], strict=True)]
                rows.append(
                    {
                        "channels": base_channels,
                        "trainer": name,
                        "images/s": statistics.median(speeds[name]),
                        "x plain (median of pairs)": statistics.median(ratios),
                        "min": min(ratios),
                        "max": max(ratios),
                        "x standard": statistics.median(to_standard),
                        "peak GiB": memory[name].peak,
                        "of which steps": memory[name].of_steps,
                    }
                )
    report(args.name, vars(args), rows)


if __name__ == "__main__":
    main()
