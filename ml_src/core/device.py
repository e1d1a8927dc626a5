"""From the config's word to a torch device, and everything about a process that a result may depend on."""

import os
import random

import numpy as np
import torch

from ml_src.core.errors import ConfigError


def choose_device(word: str) -> torch.device:
    """Return the device that `word` names; `auto` is a GPU where there is one.

    Raises: ConfigError for a word that torch does not know, or a device that this machine lacks.
    """
    if word == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(word)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {word!r} is not on this machine: use auto, cpu, cuda or mps") from error
    return device


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed torch, NumPy and Python; with `deterministic`, forbid operations whose result varies."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch then asks for on a GPU
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if torch.are_deterministic_algorithms_enabled() != deterministic:  # the call imports torch's compiler, for seconds
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


class Peek:
    """A number on its way from the device to the host; reading it waits for it, and not for what was queued later."""

    def __init__(self, number: torch.Tensor) -> None:
        self._number = number.to("cpu", non_blocking=number.is_cuda)
        self._arrived = None
        if number.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(number.device))

    def value(self) -> float:
        """The number."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._number)


def allow_tf32(allowed: bool) -> None:
    """Let CUDA GPUs compute float32 products with a mantissa of ten bits, or forbid it."""
    precision = "tf32" if allowed else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
