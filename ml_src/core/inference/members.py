"""Trained networks, each with what its images must be like; an ensemble is a list of them. Next: `predictor.py`."""

import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ml_src.core.checkpoint import load_checkpoint, load_weights
from ml_src.core.config import Config
from ml_src.core.config_file import parse_config
from ml_src.core.data.files import listed
from ml_src.core.errors import ConfigError
from ml_src.core.network import build_model
from ml_src.core.plugins import check_plugins, import_plugins
from ml_src.core.tasks.segmentation import Segmentation
from ml_src.core.transform_specs import Resize
from ml_src.core.transforms.source import Size

LEAST_TILE = 512  # pixels a side, for networks that were trained on whole images of any size
BEST = Path("weights", "best.pt")


class Intake(NamedTuple):
    """What a network's images must be like; members of equal intake share every image that is read."""

    channels: int
    size: Size | None  # to which whole images are resized; None where they are not
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tile: Size  # height and width of what it has seen in training, rounded up to multiples of 32


@dataclass(frozen=True)
class Member:
    """A network ready to predict: on its device, in evaluation mode."""

    path: Path
    config: Config
    network: nn.Module
    device: torch.device
    weight: float = 1.0
    precision: str = "auto"  # or float32

    @cached_property
    def task(self) -> Segmentation:
        """Its data, classes and transforms."""
        return Segmentation(self.config)

    @cached_property
    def intake(self) -> Intake:
        """What its images must be like."""
        sizes = [spec.size for spec in self.config.val_transforms if isinstance(spec, Resize)]
        transforms = self.task.val_transforms
        seen = self.config.train_image_size or (2 * LEAST_TILE, 2 * LEAST_TILE)
        tile = (-(-seen[0] // 32) * 32, -(-seen[1] // 32) * 32)
        return Intake(
            self.config.model.in_channels, sizes[-1] if sizes else None, transforms.mean, transforms.std, tile
        )

    def require_data(self) -> None:
        """Raise ConfigError where the data set is not here."""
        if not Path(self.config.data.data_dir).is_dir():
            raise ConfigError(
                f"{self.config.data.data_dir} is not here: start in the folder where you trained, or give --data_dir"
            )

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """The 16-bit type that it computes in: that of mixed-precision training, where the device is fast in it."""
        if self.precision == "float32" or self.config.training.trainer_type != "mixed_precision":
            return None
        if self.device.type == "cpu":
            return torch.bfloat16 if fast_bfloat16() else None
        return torch.bfloat16 if self.device.type != "cuda" else getattr(torch, self.config.training.amp_dtype)

    def probabilities(self, images: Tensor) -> Tensor:
        """Return (N, C, H, W) float32, summing to 1 over the classes, of normalised images (N, channels, H, W)."""
        context: AbstractContextManager[Any] = nullcontext()
        if self.amp_dtype is not None:
            context = torch.autocast(self.device.type, dtype=self.amp_dtype)
        with context:
            logits = self.network(images)
        return logits.float().softmax(dim=1)  # type: ignore[no-any-return]


def fast_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16; without them it would be slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def open_member(path: Path, device: torch.device, plugins: Sequence[str] = (), data_dir: Path | None = None) -> Member:
    """Open a checkpoint.

    Raises: CheckpointError for a file that is none; ConfigError where it needs plugins that were not given.
    """
    contents = load_checkpoint(path, device)
    overrides = {} if data_dir is None else {"data.data_dir": str(data_dir), "data.splits_dir": None}
    config = parse_config(contents["config"], overrides, source=str(path))
    check_plugins(config.plugins, plugins, path)
    import_plugins(plugins)
    network = build_model(config.model)
    load_weights(network, contents["model_state_dict"], path)
    return Member(path, config, placed(network, device), device)


def placed(network: nn.Module, device: torch.device) -> nn.Module:
    """Put a network where it predicts. Channels-last is how images are read, and what CPUs and GPUs are faster in."""
    return network.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload, no-any-return]


def checkpoints(words: Sequence[Path]) -> list[Path]:
    """Return the checkpoints that files, run folders and patterns of either name, in the order given.

    Raises: ConfigError for a pattern that nothing fits, a run without a best.pt, and what is named twice.
    """
    found: dict[Path, Path] = {}
    for word in words:
        paths = [word]
        if not word.exists() and re.search(r"[*?\[]", str(word)):
            paths = sorted(Path(word.anchor or ".").glob(str(word.relative_to(word.anchor))), key=_natural)
            if not paths:
                raise ConfigError(f"{word} fits no file or folder: give checkpoints, or the folders of runs")
        for path in paths:
            if path.is_dir():
                if not (path / BEST).is_file():
                    raise ConfigError(f"{path} has no {BEST}: give the folders of runs that have been trained")
                path = path / BEST
            if path.resolve() in found:
                raise ConfigError(f"{path} is named twice: give each checkpoint once")
            found[path.resolve()] = path
    return list(found.values())


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts fold_10 behind fold_9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def weighted(members: Sequence[Member], weights: Sequence[float] | None) -> list[Member]:
    """Give each member its share; equal ones where none are given. Those whose share is 0 are left out.

    Raises: ConfigError unless there is a number of 0 or more for each member, and one that is more.
    """
    given = [1.0] * len(members) if weights is None else list(weights)
    if len(given) != len(members):
        raise ConfigError(f"--ensemble_weights has {len(given)} numbers for {len(members)} checkpoints: give each one")
    if not all(0 <= weight < math.inf for weight in given) or not sum(given):
        raise ConfigError(f"--ensemble_weights {' '.join(map(str, given))} cannot be: give 0 or more, not all 0")
    shares = [weight / sum(given) for weight in given]
    return [replace(member, weight=share) for member, share in zip(members, shares, strict=True) if share]


def require_same_classes(members: Sequence[Member]) -> None:
    """Raise ConfigError where two members mean different things by a class."""
    first = members[0]
    for other in members[1:]:
        for what, one, two in (
            ("classes", first.config.class_names, other.config.class_names),
            ("ignore_index", first.config.ignore_index, other.config.ignore_index),
        ):
            if one != two:
                names = [listed(each, 6) if isinstance(each, list) else str(each) for each in (one, two)]
                raise ConfigError(
                    f"{first.path} has the {what} {names[0]}, but {other.path} has {names[1]}: "
                    "give networks of the same classes"
                )
