"""Several processes train one network together, one a GPU or a share of the cores. The only importer of accelerate.

Next to read: `launch.py`, who starts them; `data/order.py`, how they share the images of a step; `sharded.py`, where
each has only a part of the network.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn

from ml_src.core.config import Config
from ml_src.core.device import allow_tf32, choose_device
from ml_src.core.errors import ConfigError
from ml_src.core.network.cross_process_norm import convert
from ml_src.core.trainers.backend import Backend
from ml_src.core.trainers.launch import require_num_processes

log = logging.getLogger("ml_src")
STRATEGIES = {"ACCELERATE_USE_FSDP": DistributedType.FSDP, "ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED}
PATIENCE = timedelta(days=1)  # the first process may read every mask; one that dies is noticed at once all the same


def choose_strategy(config: Config) -> "Accelerate":
    """Return the backend for what `accelerate config` has set up: DDP, FSDP or DeepSpeed.

    Raises: ConfigError for another number of processes than asked for, or what accelerate cannot start.
    """
    accelerator = start(config)
    match accelerator.distributed_type:
        case DistributedType.FSDP:
            from ml_src.core.trainers.sharded import FSDP

            return FSDP(config, accelerator)
        case DistributedType.DEEPSPEED:
            from ml_src.core.trainers.sharded import DeepSpeed

            return DeepSpeed(config, accelerator)
        case _:
            return Accelerate(config, accelerator)


def start(config: Config) -> Accelerator:
    """Find the other processes. What `accelerate config` has set up reaches accelerate through its own environment.

    Raises: ConfigError.
    """
    # broadcast: joined statistics are equal anyway
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    try:
        # on a CPU it must be said: without a GPU accelerate would take each process for the only one
        accelerator = Accelerator(cpu=choose_device(config.training.device).type == "cpu", kwargs_handlers=handlers)
    except (ImportError, ValueError, RuntimeError, NotImplementedError) as error:
        sentence = " ".join(str(error).split())
        raise ConfigError(f"accelerate cannot start as `accelerate config` has it: {sentence}") from error
    require_num_processes(config.training.num_processes, accelerator.num_processes)
    return accelerator


class Accelerate(Backend):
    """Each process has the whole network and a share of each batch; gradients are averaged, batch statistics joined."""

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        allow_tf32(config.training.tf32)
        self.rank, self.num_processes = accelerator.process_index, accelerator.num_processes
        on_cpu = accelerator.device.type == "cpu"
        self.device = torch.device("cpu") if on_cpu else accelerator.device  # no file can be read to a "cpu:0"
        # flags and sums go between the hosts: on the GPUs they would wait for all that is queued there
        self._control: Any = dist.new_group(backend="gloo", timeout=PATIENCE) if self.num_processes > 1 else None

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        if self.num_processes > 1:
            convert(network)
        model, optimizer = super().prepare(network, optimizer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # its successor is newer than 2.10
            model, optimizer = self.accelerator.prepare(model, optimizer)
        if self.rank:
            torch.manual_seed(self.config.seed + self.rank)  # dropout of its own; the weights are those of the first
        strategy = self.accelerator.distributed_type
        log.info(
            "accelerate with %d process%s (%s)", self.num_processes, "es" * (self.num_processes > 1), strategy.value
        )
        for key, asked in STRATEGIES.items():
            if os.environ.get(key, "false").lower() == "true" and strategy != asked:
                log.info(
                    "Not used: the %s of `accelerate config`, which is for several GPUs; each process has the whole "
                    "network",
                    asked.value,
                )
        return model, optimizer

    def autocast(self) -> AbstractContextManager[Any]:
        """The number format of `accelerate config`, also where the network is called without its wrapping."""
        block: AbstractContextManager[Any] = self.accelerator.autocast()
        return block

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Gradients travel once a step, with its last batch."""
        return nullcontext() if last else self.accelerator.no_sync(model)

    def backward(self, loss: Tensor, batch_size: int, step_size: int) -> None:
        """As in `Backend`; the processes' gradients will be averaged, not summed."""
        self.accelerator.backward(loss * (batch_size * self.num_processes / step_size))

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None) -> None:
        if max_norm is not None:
            self.accelerator.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {} if scaler is None else {"scaler": scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.accelerator.scaler is not None and state.get("scaler"):
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def any(self, flag: bool) -> bool:
        return bool(self.sum(torch.tensor(int(flag))))

    def sum(self, values: Tensor) -> Tensor:
        if self._control is None:
            return values
        total = values.detach().cpu().clone()
        dist.all_reduce(total, group=self._control)
        return total.to(values.device)

    def gather(self, value: Any) -> list[Any]:
        if self._control is None:
            return [value]
        values: list[Any] = [None] * self.num_processes
        dist.all_gather_object(values, value, group=self._control)
        return values

    @contextmanager
    def main_first(self) -> Iterator[None]:
        if self.rank:
            self.any(False)  # returns when the first process has come to its own call
        yield
        if not self.rank:
            self.any(False)

    def close(self) -> None:
        """As in `Backend`; these processes cannot train together again."""
        self.accelerator.end_training()
