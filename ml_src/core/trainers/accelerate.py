"""Several processes train one network together, one a GPU or a share of the cores. The only importer of accelerate.

Next to read: `launch.py`, who starts them; `data/order.py`, how they share the images of a step.
"""

import logging
from contextlib import AbstractContextManager, nullcontext
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
REPLICATED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Accelerate(Backend):
    """Every process has the whole network and a share of each batch; gradients are averaged, batch statistics shared.

    What `accelerate config` has set up (number format, FSDP, DeepSpeed) reaches accelerate through its own environment.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        allow_tf32(config.training.tf32)
        on_cpu = choose_device(config.training.device).type == "cpu"
        try:
            # on_cpu is said: without a GPU accelerate would take each process for the only one
            self.accelerator = Accelerator(
                cpu=on_cpu, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)]
            )
        except (ImportError, ValueError, RuntimeError) as error:
            raise ConfigError(f"accelerate cannot start as `accelerate config` has it: {error}") from error
        self.device = self.accelerator.device
        self.rank, self.num_processes = self.accelerator.process_index, self.accelerator.num_processes
        require_num_processes(config.training.num_processes, self.num_processes)
        # flags and sums go between the hosts: on the GPUs they would wait for all that is queued there
        self._control: Any = dist.new_group(backend="gloo") if self.num_processes > 1 else None

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        if self.num_processes > 1:
            convert(network)
        model, optimizer = super().prepare(network, optimizer)
        model, optimizer = self.accelerator.prepare(model, optimizer)
        if self.rank:
            torch.manual_seed(self.config.seed + self.rank)  # dropout of its own; the weights are those of the first
        log.info("%d processes of accelerate (%s)", self.num_processes, self.accelerator.distributed_type.value)
        return model, optimizer

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

    def main_first(self) -> AbstractContextManager[Any]:
        block: AbstractContextManager[Any] = self.accelerator.main_process_first()
        return block
