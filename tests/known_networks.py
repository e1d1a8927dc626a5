"""Networks whose answers are known, as members that predict; and data that they are right about."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ml_src.core.config_file import parse_config
from ml_src.core.inference.torch_member import TorchMember, placed

NAMES = ["background", "cell", "fibre"]
PLAIN = [{"type": "normalize", "mean": [0.0], "std": [1.0]}]


class ByBrightness(nn.Module):
    """A network that is always right on masks drawn as gray levels: class = round(2 * brightness)."""

    def forward(self, images: Tensor) -> Tensor:
        level = images[:, :1]
        return torch.cat([-(level - centre).abs() for centre in (0.0, 0.5, 1.0)], dim=1) * 100


class Blurred(nn.Module):
    """Sees 9 x 9 pixels around each, alike in all directions, so that the edges of tiles matter."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.centres = torch.linspace(0, 1, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        level = nn.functional.avg_pool2d(images[:, :1], 9, stride=1, padding=4, count_include_pad=False)
        return torch.cat([-(level - centre).abs() for centre in self.centres], dim=1) * 10


def member_of(network: nn.Module, data_dir: Path | str = "nowhere", **overrides: Any) -> TorchMember:
    raw = {
        "data": {"data_dir": str(data_dir), "num_classes": 3, "class_names": NAMES},
        "model": {"in_channels": 1},
        "training": {"batch_size": 3, "num_workers": 0},
        "transforms": {"train": PLAIN},
    }
    device = torch.device("cpu")
    config = parse_config(raw, overrides)
    return TorchMember(path=Path("best.pt"), config=config, network=placed(network, device), device=device)


def write_gray(path: Path, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Write a smooth gray picture and return it."""
    noise = np.random.default_rng(seed).random((height, width), np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 4)
    gray = np.uint8(255 * (smooth - smooth.min()) / max(float(np.ptp(smooth)), 1e-6))
    Image.fromarray(gray).save(path)
    return gray


def drawn_data(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    """Images whose gray level is the class, in three blocks; one file of each size in every split."""
    rng = np.random.default_rng(0)
    (folder / "splits").mkdir(parents=True)
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    names = []
    for number, (height, width) in enumerate(sizes):
        mask = cv2.resize(rng.integers(0, 3, (4, 4)).astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
        Image.fromarray(mask).save(folder / f"masks/{number}.png")
        Image.fromarray((mask * 127.5).astype(np.uint8)).save(folder / f"images/{number}.png")
        names.append(f"{number}.png")
    for split in ("test", "fold_0_train", "fold_0_val"):
        for kind in ("images", "masks"):
            (folder / "splits" / f"{split}_{kind}.txt").write_text("".join(f"{kind}/{name}\n" for name in names))
    return folder
