"""How one optimisation step runs. This base class is the standard trainer; another one overrides what differs."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ml_src.core.callbacks import Callback
from ml_src.core.checkpoint import load_weights
from ml_src.core.config import Config
from ml_src.core.data.order import EpochOrder, Order, ShareOfBatches
from ml_src.core.device import allow_tf32, choose_device
from ml_src.core.tasks import Task


class Backend:
    """Float32 on one device: a CPU or a GPU."""

    rank, num_processes = 0, 1

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = choose_device(config.training.device)
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # whose streams and pinned memory torch uses unasked
        allow_tf32(config.training.tf32)

    # What a step takes.

    def train_order(self, task: Task) -> Order:
        """Which training images each step takes."""
        training = self.config.training
        return EpochOrder(
            task.num_images("train") * self.config.data.samples_per_image,
            training.batch_size,
            training.batch_size * training.gradient_accumulation_steps * self.num_processes,
            self.config.seed,
            shuffle=True,
            rank=self.rank,
            num_processes=self.num_processes,
        )

    def val_order(self, task: Task) -> Order:
        """Which validation images this process measures: each image is one process's."""
        return ShareOfBatches(task.num_images("val"), self.config.training.batch_size, self.rank, self.num_processes)

    # What is trained.

    def require_fitting(self, criterion: nn.Module) -> None:
        """Raise ConfigError where the loss does not go with this trainer."""

    def place(self, network: nn.Module) -> nn.Module:
        """Put the network where it is trained. Channels-last is how the loader lays out images."""
        return network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return what the loop calls and steps; the parameters stay those of `network`."""
        model = torch.compile(network) if self.config.training.compile else network
        return model, optimizer  # type: ignore[return-value]

    # A step.

    def autocast(self) -> AbstractContextManager[Any]:
        """The number format of the forward pass."""
        return nullcontext()

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a batch; `last` says that its step follows."""
        return nullcontext()

    def backward(self, loss: Tensor, batch_size: int, step_size: int) -> None:
        """Add the gradients of a batch's mean loss to those of its step; it weighs as much as its images."""
        (loss * (batch_size / step_size)).backward()  # type: ignore[no-untyped-call]

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None) -> None:
        """Clip the gradients to `max_norm` (L2, over all parameters), take the step, and forget the gradients."""
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # What is measured and kept, where a process may hold only a part of it. All processes call all but `measured`.

    def measured(self, network: nn.Module) -> nn.Module:
        """The network as it can be called by one process alone, with the weights that it had at its `eval()`."""
        return network

    def weights(self, model: nn.Module, network: nn.Module) -> dict[str, Any]:
        """The state dict of the whole network, under the names that it has on one process."""
        return network.state_dict()

    def load_weights(self, model: nn.Module, network: nn.Module, weights: dict[str, Any], path: Path) -> None:
        """Go on from `weights`, which the file at `path` holds.

        Raises: CheckpointError where names or shapes differ.
        """
        load_weights(network, weights, path)

    def optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The state dict of the whole optimizer; what other processes than the main one return is not looked at."""
        return optimizer.state_dict()

    def load_optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Go on from `optimizer_state`."""
        optimizer.load_state_dict(state)

    # Around the steps.

    def metrics(self) -> dict[str, float]:
        """Numbers of its own for the epoch's metrics."""
        return {}

    def summary(self) -> list[str]:
        """Lines of its own for the run's summary."""
        return []

    def callbacks(self) -> list[Callback]:
        """Callbacks of its own; they come before those that write checkpoints."""
        return []

    def describe(self) -> str:
        """What of its state matters when a loss is no number; empty where nothing does."""
        return ""

    def before_save(self, run_dir: Path) -> None:
        """Write what must be on the disk before a checkpoint is."""

    def rekey(self, context: bytes) -> None:
        """Take note of what came from outside, such as weights that other sites have trained."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep of the backend itself."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""

    # Several processes: each of these is called by all of them at the same place.

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process."""
        return flag

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes."""
        return values

    def gather(self, value: Any) -> list[Any]:
        """Plain data of every process, in the order of their ranks."""
        return [value]

    def main_first(self) -> AbstractContextManager[Any]:
        """A block that the main process ends before the others begin it."""
        return nullcontext()

    def close(self) -> None:
        """Part with the other processes: from here on each is on its own."""
