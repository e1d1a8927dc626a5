"""What a task must offer, so that the loop, the callbacks and the commands can train it without naming it.

Next to read: `segmentation.py`, the one task so far. A second one is a class here, a dataset and a metric.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ml_src.core.config import Config
from ml_src.core.data.loaders import Batch, Loader
from ml_src.core.data.order import Order
from ml_src.core.pictures import Image
from ml_src.core.registry import lookup
from ml_src.core.tasks.segmentation import Segmentation


class Metric(Protocol):
    """Counts over a data set."""

    counts: Tensor

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Count one batch."""

    def compute(self) -> dict[str, float]:
        """Return the values so far; names with a "/" are per class."""


class Task(Protocol):
    """Datasets, criterion, metric and picture of one kind of problem."""

    monitors: tuple[str, ...]

    def num_images(self, split: str) -> int:
        """How many images a split has."""

    def fingerprint(self, split: str) -> str:
        """A text that changes when the files of a split do."""

    def groups(self, split: str) -> list[str]:
        """The group of each image of a split, such as its patient.

        Raises: DataError where the split was made without groups.
        """

    def check_data(self) -> None:
        """Raise DataError where the data of the fold cannot be trained on."""

    def settle(self) -> Config:
        """Return, and use from now on, the configuration with all that it left to the data."""

    def loader(
        self, split: str, order: Order | None = None, training: bool = False, pin_memory: bool = False
    ) -> Loader:
        """Batches of `train`, `val` or `test`, in some order; with `training` augmented."""

    def criterion(self) -> nn.Module:
        """The loss."""

    def prepare(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        """Move a batch to the device and normalise it there."""

    def metric(self) -> Metric:
        """A fresh metric."""

    def measured_splits(self) -> list[str]:
        """The splits that are measured after training; `val`, and `test` where it has images."""

    def findings(self, metrics: dict[str, float], reports: dict[str, dict[str, Any]]) -> list[str]:
        """Return, in plain words, what the numbers show to be wrong and what to try."""

    def panel(self, model: nn.Module, device: torch.device) -> Image:
        """Return a picture of a few fixed validation samples with truth and prediction."""


TASKS: dict[str, Callable[[Config], Task]] = {"segmentation": Segmentation}


def task_for(config: Config) -> Task:
    """Return the task that `data.task` names.

    Raises: ConfigError for an unknown one.
    """
    return lookup(TASKS, config.data.task, "data.task")(config)
