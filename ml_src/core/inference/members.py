"""Trained networks, each with what its images must be like; an ensemble is a list of them. Next: `predictor.py`.

A member is a checkpoint (`torch_member.py`) or an exported file (`exported_member.py`). Nothing else here knows which.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml_src.core.checking.output_folder import digest_of
from ml_src.core.config import Config
from ml_src.core.data.files import listed
from ml_src.core.data.labelled_images import LabelledImages
from ml_src.core.errors import ConfigError
from ml_src.core.inference.postprocess import load_chain
from ml_src.core.postprocess_specs import PostprocessStep
from ml_src.core.transform_specs import Resize
from ml_src.core.transforms.source import Size

LEAST_TILE = 512  # pixels a side, for networks that were trained on whole images of any size
BEST = Path("weights", "best.pt")
EXPORTED = (".onnx", ".xml")


class Intake(NamedTuple):
    """What a network's images must be like; members of equal intake share every image that is read."""

    channels: int
    size: Size | None  # to which whole images are resized; None where they are not
    mean: tuple[float, ...]
    std: tuple[float, ...]
    tile: Size  # height and width of what it has seen in training, rounded up to multiples of 32
    fixed: bool = False  # whether it takes nothing larger than a tile


@dataclass(frozen=True, kw_only=True)
class Member(ABC):
    """A network ready to predict."""

    path: Path
    config: Config
    weight: float = 1.0

    @cached_property
    def data(self) -> LabelledImages:
        """Its data set and transforms."""
        return LabelledImages(self.config)

    @cached_property
    def intake(self) -> Intake:
        """What its images must be like."""
        sizes = [spec.size for spec in self.config.val_transforms if isinstance(spec, Resize)]
        transforms = self.data.val_transforms
        seen = self.config.train_image_size or (2 * LEAST_TILE, 2 * LEAST_TILE)
        tile = (-(-seen[0] // 32) * 32, -(-seen[1] // 32) * 32)
        return Intake(
            self.config.model.in_channels, sizes[-1] if sizes else None, transforms.mean, transforms.std, tile
        )

    @cached_property
    def digest(self) -> str:
        """A hash of its file."""
        return digest_of(self.path)

    @property
    def folds(self) -> frozenset[int]:
        """The folds that it was trained on: several, where it is a file of several checkpoints."""
        return frozenset({self.config.data.fold})

    @property
    def keeps_memory(self) -> bool:
        """Whether its engine keeps for itself what a prediction took, so that of several members it adds up."""
        return False

    @property
    def chain(self) -> list[PostprocessStep] | None:
        """The steps that were tuned for it; None where none were, and those of the configuration hold."""
        return load_chain(self.path)

    def require_data(self) -> None:
        """Raise ConfigError where the data set is not here."""
        if not Path(self.config.data.data_dir).is_dir():
            raise ConfigError(
                f"{self.config.data.data_dir} is not here: start in the folder where you trained, or give --data_dir"
            )

    @property
    @abstractmethod
    def precision(self) -> str:
        """What it computes in: float32, bfloat16, float16 or int8."""

    def require_type(self, path: Path, dtype: np.dtype[Any]) -> None:  # noqa: B027 - checkpoints take all
        """Raise DataError where it does not take images of a number type."""

    def blank(self, side: int) -> NDArray[Any]:
        """Return a blank tile (1, side, side, channels) of a number type that it takes; no larger than it takes."""
        return np.zeros((1, side, side, self.intake.channels), np.uint8)

    @abstractmethod
    def probabilities(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        """Return (N, C, h, w), summing to 1 over the classes, of pixels (N, h, w, channels) of the files' number type.

        The result may be written to.
        """

    @abstractmethod
    def peak(self, work: Callable[[], object]) -> int:
        """Return the bytes of host memory that are held at most while it does some work, above those held before."""


def open_member(
    path: Path,
    device: str = "cpu",
    plugins: Sequence[str] = (),
    data_dir: Path | None = None,
    precision: str = "auto",
    compiled: bool = False,
) -> Member:
    """Open a checkpoint, or a file that ml-export wrote.

    Args:
        path: of the file.
        device: a word of --device.
        plugins: files that may be imported, if the checkpoint needs them.
        data_dir: where its data set lies now, if it has moved.
        precision: `auto` computes in 16 bits where it was trained so, `float32` never.
        compiled: whether torch compiles the network.

    Raises: CheckpointError for a file that is none; ConfigError where it needs plugins that were not given, or the word
        is not for it.
    """
    overrides = {} if data_dir is None else {"data.data_dir": str(data_dir), "data.splits_dir": None}
    if path.suffix.lower() in EXPORTED:
        from ml_src.core.inference.exported_member import open_exported_member

        if compiled:
            raise ConfigError(f"--compile is for checkpoints: {path} is compiled by its engine, so leave it out")
        return open_exported_member(path, device, overrides, precision)
    try:
        from ml_src.core.inference.torch_member import open_checkpoint
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ConfigError(
            f"{path} is a checkpoint, which needs PyTorch: run pip install 'ml-src[train]', or give a file that "
            "ml-export wrote"
        ) from error
    return open_checkpoint(path, device, plugins, overrides, precision, compiled)


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
