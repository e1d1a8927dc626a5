"""Several processes, each with only a part of the network or of the optimizer, as `accelerate config` sets it up.

Steps, sums and clipping are those of `accelerate.py`; here is how the parts become one checkpoint, and part again.
"""

import copy
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ml_src.core.checkpoint import load_weights
from ml_src.core.errors import ConfigError
from ml_src.core.trainers.accelerate import Accelerate

log = logging.getLogger("ml_src")
WHOLE = StateDictOptions(full_state_dict=True)


class FSDP(Accelerate):
    """Weights, gradients and optimizer are divided among the processes (FSDP 1 or 2).

    A whole copy of the weights, no more, is put together wherever they are measured or saved. So processes with
    unequally many validation images need not wait for each other, and the checkpoints are those of any other trainer.
    """

    def place(self, network: nn.Module) -> nn.Module:
        """Put the network where it is trained; FSDP 2 cannot divide weights in channels-last order."""
        return network.to(self.device)

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        require_no_average(self, "FSDP")
        plugin = self.accelerator.state.fsdp_plugin
        if plugin.fsdp_version == 1:
            plugin.use_orig_params = True  # else the optimizer would hold weights that are no longer used
        # of FSDP 2, about logits that are a part of a padded tensor: nobody writes into them
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")
        self.whole = Whole(network)
        model, optimizer = super().prepare(network, optimizer)
        self.whole.gather = lambda: get_model_state_dict(model, options=WHOLE)
        return model, optimizer

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None) -> None:
        super().step(model, optimizer, max_norm)
        self.whole.is_current = False

    def measured(self, network: nn.Module) -> nn.Module:
        return self.whole

    def weights(self, model: nn.Module, network: nn.Module) -> dict[str, Any]:
        self.whole.put_together()
        return self.whole.network.state_dict()

    def load_weights(self, model: nn.Module, network: nn.Module, weights: dict[str, Any], path: Path) -> None:
        load_weights(self.whole.network, weights, path)  # says what does not fit
        set_model_state_dict(model, weights, options=WHOLE)

    def optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        optimizer = self._own(optimizer)
        if not self.any(bool(optimizer.state)):  # torch would fill it, by a step that counts
            return optimizer.state_dict()
        # FSDP 1 gathers all moments into one buffer and relies on the copy to the host: where it is there already, the
        # last one would stand in the place of all (torch 2.15)
        plugin = self.accelerator.state.fsdp_plugin
        to_host = StateDictOptions(full_state_dict=True, cpu_offload=True)
        options = WHOLE if plugin.fsdp_version == 1 and self.device.type == "cpu" else to_host
        state = get_optimizer_state_dict(model, optimizer, options=options)
        return numbered(state, self.whole.names()) if self.is_main else {}

    def load_optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        if state["state"]:
            set_optimizer_state_dict(model, self._own(optimizer), named(state, self.whole.names()), options=WHOLE)

    def _own(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Torch's optimizer inside of accelerate's."""
        inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        return inner


class Whole(nn.Module):
    """A whole copy of a divided network; all processes put it together at the first `eval()` after a step."""

    gather: Callable[[], dict[str, Any]]  # the weights of all processes

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.is_current = True

    def train(self, mode: bool = True) -> "Whole":
        super().train(mode)
        if not mode:
            self.put_together()
        return self

    def put_together(self) -> None:
        """Take over the weights, unless nothing has changed since."""
        if not self.is_current:
            with torch.inference_mode(False), torch.no_grad():  # FSDP keeps what it makes here
                self.network.load_state_dict(self.gather())
            self.is_current = True

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits

    def names(self) -> list[str]:
        """The names of the weights in the order in which an optimizer numbers them."""
        return [name for name, _ in self.network.named_parameters()]


def numbered(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Return the state of an optimizer by names as its own `state_dict` has it, by numbers."""
    number = {name: index for index, name in enumerate(names)}
    return {
        "state": {number[name]: values for name, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [number[name] for name in group["params"]]} for group in state["param_groups"]
        ],
    }


def named(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Undo `numbered`."""
    return {
        "state": {names[number]: values for number, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }


class DeepSpeed(Accelerate):
    """The optimizer's state, and with ZeRO stage 2 the gradients, are divided; DeepSpeed itself takes the steps."""

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        require_no_average(self, "DeepSpeed")
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin.zero_stage == 3:
            raise ConfigError(
                "ZeRO stage 3 of DeepSpeed divides the weights, which no checkpoint of ours can hold: use "
                "stage 1 or 2, or FSDP"
            )
        training = self.config.training
        if training.gradient_accumulation_steps > 1:
            raise ConfigError(
                "DeepSpeed counts the batches of a step itself, and the last step of an epoch has fewer: "
                "set training.gradient_accumulation_steps: 1"
            )
        settings = {"train_micro_batch_size_per_gpu": training.batch_size, "gradient_accumulation_steps": 1}
        plugin.deepspeed_config.update(
            settings | ({} if self.config.max_norm is None else {"gradient_clipping": self.config.max_norm})
        )
        log.info("DeepSpeed keeps the state of its optimizer to itself: after --resume it starts anew")
        return super().prepare(network, optimizer)

    def optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {}

    def load_optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        pass


def require_no_average(backend: Accelerate, strategy: str) -> None:
    """Raise ConfigError where training.ema is set: a process has only a part of what it averages."""
    if backend.config.training.ema is not None:
        raise ConfigError(f"training.ema does not go with {strategy}, which divides the weights: leave it out")
