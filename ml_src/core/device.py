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
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
