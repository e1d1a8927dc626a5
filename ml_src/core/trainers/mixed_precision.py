"""Forward passes in 16 bits, weights and sums in 32: twice the speed of `standard`, and half its activations.

float16 needs its gradients scaled up, or small ones would vanish (Micikevicius et al. 2018); bfloat16 has the range of
float32 and needs nothing.
"""

import logging
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ml_src.core.config import Config
from ml_src.core.trainers.backend import Backend

log = logging.getLogger("ml_src")


class MixedPrecision(Backend):
    """Autocast to `training.amp_dtype`; on anything but a CUDA GPU to bfloat16."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.dtype = getattr(torch, config.training.amp_dtype)
        if self.dtype == torch.float16 and self.device.type != "cuda":
            log.info("float16 is for CUDA GPUs: bfloat16 is used on %s", self.device)
            self.dtype = torch.bfloat16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.num_skipped = 0

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.dtype)

    def backward(self, loss: Tensor, batch_size: int, step_size: int) -> None:
        self.scaler.scale(loss * (batch_size / step_size)).backward()  # type: ignore[no-untyped-call]

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None) -> None:
        """As in `Backend`; a step whose gradients overflow float16 is skipped and counted, and the scale lowered."""
        if max_norm is not None:
            self.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        self.scaler.step(optimizer)
        scale = self.scaler.get_scale()
        self.scaler.update()
        self.num_skipped += self.scaler.get_scale() < scale
        optimizer.zero_grad(set_to_none=True)

    def metrics(self) -> dict[str, float]:
        if not self.scaler.is_enabled():
            return {}
        return {"amp_scale": self.scaler.get_scale(), "amp_skipped_steps": self.num_skipped}

    def describe(self) -> str:
        if not self.scaler.is_enabled():
            return f"in {str(self.dtype).removeprefix('torch.')}"
        return f"in float16 with gradient scale {self.scaler.get_scale():g} and {self.num_skipped} skipped steps"

    def state_dict(self) -> dict[str, Any]:
        return {"scaler": self.scaler.state_dict(), "num_skipped": self.num_skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("scaler"):  # empty where float16 was not in use
            self.scaler.load_state_dict(state["scaler"])
        self.num_skipped = state.get("num_skipped", 0)
