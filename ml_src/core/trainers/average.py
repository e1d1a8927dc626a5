"""The exponential moving average of the weights: what is measured and kept as best.pt where `training.ema` is set."""

import copy

import torch
from torch import nn


class WeightAverage:
    """Averages the weights of a network over its steps (Polyak and Juditsky 1992); buffers are copied.

    After step n the average moves by 1 - min(decay, (1 + n) / (10 + n)) towards the weights: at the start, when they
    still change much, it follows them faster. A function of n alone, it needs no state beyond the average itself.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network).requires_grad_(False)

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step number `step`, counted from 1."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), weight)
        for mine, other in zip(self.network.buffers(), network.buffers(), strict=True):
            mine.copy_(other)
