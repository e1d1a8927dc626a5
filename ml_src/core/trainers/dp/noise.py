"""Where the Gaussian noise of private training comes from, and the optimizers that add it.

The three optimizers are Opacus' with noise of our own; the accounting of what they release is in `ledger.py`.
"""

import hashlib
import math
import os
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.optimizers import DPOptimizer, DPPerLayerOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch import Tensor

Clipping = Literal["flat", "per_layer", "adaptive"]
Stream = Callable[[Tensor], Tensor]
"""Gives standard normal values of the shape, dtype and device of a tensor; every call gives new ones."""

CHUNK = 2**16  # values; what a core's cache holds
COUNT_RATE = 0.2  # of adaptive clipping (Andrew et al. 2021, section 3.1)
TARGET_QUANTILE = 0.5  # likewise: half of the samples stay unclipped


class Noise:
    """Standard normal noise, one stream a step; a stream is a function of (key, step).

    With a key (0 to 2**63 - 1) a resumed run repeats its noise to the bit, on the same kind of device. Without one the
    key is drawn afresh from the system, so that no two processes ever share noise. `secure` takes every bit from the
    system and withstands attacks on the rounding of Gaussian samples; it never repeats.
    """

    def __init__(self, key: int | None = None, secure: bool = False) -> None:
        self.key = secrets.randbits(63) if key is None else key
        self.secure = secure
        self.repeats = key is not None and not secure
        self._last_step = -1

    def stream(self, step: int) -> Stream:
        """Return the noise of a step.

        Raises: ValueError where the step is not after the last one: noise that is used twice can be subtracted.
        """
        if step <= self._last_step:
            raise ValueError(f"the noise of step {step} was given before, for step {self._last_step} has come")
        self._last_step = step
        return _secure if self.secure else _Stream(self.key, step)


class _Stream:
    """On a CPU numpy's Philox, on any other device torch's generator."""

    def __init__(self, key: int, step: int) -> None:
        self.key, self.step, self.num_chunks = key, step, 0
        self.seed = int.from_bytes(hashlib.sha256(f"{key} {step}".encode()).digest()[:8]) >> 1
        self.generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, like: Tensor) -> Tensor:
        if like.device.type == "cpu":
            first = self.num_chunks
            self.num_chunks += -(-like.numel() // CHUNK)
            return _on_cpu(like, lambda values, number: self._fill(values, first + number))
        if like.device not in self.generators:
            self.generators[like.device] = torch.Generator(like.device).manual_seed(self.seed)
        return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=self.generators[like.device])

    def _fill(self, values: NDArray[np.float64], number: int) -> None:
        # Torch's CPU generator looks at 32 bits of its seed: among 77 000 steps, two would likely share their noise.
        # Philox counts from any number on: no two keys, steps or chunks can meet, whichever thread draws them.
        philox = np.random.Philox(key=self.key, counter=(self.step << 192) + (number << 128))
        np.random.Generator(philox).standard_normal(out=values)


def _secure(like: Tensor) -> Tensor:
    return _on_cpu(like, lambda values, _: fill_secure(values)).to(like.device)


def _on_cpu(like: Tensor, fill: Callable[[NDArray[np.float64], int], None]) -> Tensor:
    """Values drawn in float64, chunk by chunk (vector, number), and rounded to the dtype of `like`."""
    noise = torch.empty(like.shape, dtype=like.dtype)
    flat = noise.view(-1)

    def draw(number: int) -> None:
        part = flat[number * CHUNK : (number + 1) * CHUNK]
        values = np.empty(len(part))
        fill(values, number)
        part.copy_(torch.from_numpy(values))

    numbers = range(-(-len(flat) // CHUNK))
    if len(numbers) < 2 or torch.get_num_threads() == 1:
        for number in numbers:
            draw(number)
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(draw, numbers))
    return noise


def fill_secure(values: NDArray[np.float64]) -> None:
    """Fill a vector with standard normal values made of the system's random bits.

    Each is half the sum of four Gaussians of Box and Muller (1958): to recover the bits behind one rounded sum takes
    2**159 trials (Holohan and Braghin 2021, section 5.1, n = 2); one Gaussian could be recognised by its rounding.
    """
    num_pairs = -(-len(values) // 2)  # the cosines give one half, the sines the other
    bits = np.frombuffer(os.urandom(64 * num_pairs), np.uint64).reshape(2, 4, num_pairs)
    uniform = ((bits >> np.uint64(11)) + np.uint64(1)) * 2.0**-53  # in (0, 1]
    radius = np.sqrt(-0.5 * np.log(uniform[0]))  # half of Box and Muller's
    angle = 2 * math.pi * uniform[1]
    values[:num_pairs] = (radius * np.cos(angle)).sum(0)
    values[num_pairs:] = (radius * np.sin(angle)).sum(0)[: len(values) - num_pairs]


class _OwnNoise(DPOptimizer):  # type: ignore[misc]
    """Adds the noise of `noise`; `num_steps` counts the steps of the whole run, and is set anew by a resume."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, noise: Noise, **arguments: Any) -> None:
        super().__init__(optimizer, **arguments)
        self.noise = noise
        self.num_steps = 0

    def add_noise(self) -> None:
        """Write the noisy sum of the clipped gradients into `grad`; called by Opacus once a step."""
        self._add(self.noise.stream(self.num_steps), self.noise_multiplier * self.max_grad_norm)
        self.num_steps += 1

    def _add(self, stream: Stream, std: float) -> None:
        for p in self.params:
            _check_processed_flag(p.summed_grad)
            p.grad = torch.add(p.summed_grad, stream(p.summed_grad), alpha=std).view_as(p)
            _mark_as_processed(p.summed_grad)


class FlatOptimizer(_OwnNoise):
    """Clips the gradient of a sample over all parameters (Abadi et al. 2016)."""


class PerLayerOptimizer(_OwnNoise, DPPerLayerOptimizer):  # type: ignore[misc]
    """Clips the gradient of a sample for each parameter."""


class AdaptiveOptimizer(_OwnNoise):
    """Moves the clip norm towards a quantile of the norms, from a noisy count (Andrew et al. 2021, algorithm 1).

    Not Opacus' AdaClipDPOptimizer, which charges for a count of sensitivity 1/2 but releases one of sensitivity 1 over
    the true size of the batch, forgets all but the last physical batch, and fails on an empty one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, unclipped_num_std: float, **arguments: Any) -> None:
        super().__init__(optimizer, **arguments)
        self.unclipped_num_std = unclipped_num_std
        self.centred_count: Tensor | float = 0.0  # sum over samples of +1/2 (unclipped) or -1/2

    def clip_and_accumulate(self) -> None:
        """Count, then clip; called by Opacus once a physical batch."""
        norms = [g.unsqueeze(-1).flatten(1).norm(2, dim=1) for g in self.grad_samples]
        unclipped = torch.stack(norms, dim=1).norm(2, dim=1) <= self.max_grad_norm
        self.centred_count = self.centred_count + (unclipped.float() - 0.5).sum()
        super().clip_and_accumulate()

    def add_noise(self) -> None:
        """Release gradients and count with independent noise, then move the clip norm for the next step."""
        stream = self.noise.stream(self.num_steps)
        std = gradient_noise(self.noise_multiplier, self.unclipped_num_std) * self.max_grad_norm
        self._add(stream, std)
        count = float(self.centred_count) + self.unclipped_num_std * float(stream(torch.zeros(1)))
        fraction = count / self.expected_batch_size + 0.5  # by the true size, it would tell how many took part
        fraction = min(max(fraction, 0.0), 1.0)  # of a small batch it is mostly noise
        self.max_grad_norm *= math.exp(-COUNT_RATE * (fraction - TARGET_QUANTILE))
        self.centred_count = 0.0
        self.num_steps += 1


def gradient_noise(noise_multiplier: float, unclipped_num_std: float) -> float:
    """Return the noise multiplier of the gradients with which gradients and count together have `noise_multiplier`.

    z_g = (z**-2 - (2 s)**-2)**-1/2 (Andrew et al. 2021, theorem 1): a count of +-1/2 has sensitivity 1/2.
    """
    if noise_multiplier == 0:
        return 0.0
    return float((noise_multiplier**-2 - (2 * unclipped_num_std) ** -2) ** -0.5)


def clipping_arguments(
    clipping: Clipping, noise_multiplier: float, max_grad_norm: float, num_parameters: int, expected_batch_size: float
) -> dict[str, Any]:
    """Return the arguments with which an optimizer spends what a ledger is charged for `noise_multiplier`.

    flat: the sum has sensitivity max_grad_norm. per_layer: each parameter gets an equal share of the square, so that
    their joint norm, by which Opacus scales the noise, is max_grad_norm too. adaptive: it is the first clip norm; the
    count has a noise of a twentieth of the batch, or more, so that the gradients need at most 3.3 % more.
    """
    arguments: dict[str, Any] = {"noise_multiplier": noise_multiplier, "max_grad_norm": max_grad_norm}
    if clipping == "per_layer":
        arguments["max_grad_norm"] = [max_grad_norm / math.sqrt(num_parameters)] * num_parameters
    elif clipping == "adaptive":
        arguments["unclipped_num_std"] = max(expected_batch_size / 20, 2 * noise_multiplier)
    return arguments


def private_optimizer(
    clipping: Clipping,
    optimizer: torch.optim.Optimizer,
    noise: Noise,
    noise_multiplier: float,
    max_grad_norm: float,
    expected_batch_size: float,
) -> DPOptimizer:
    """Return an optimizer around `optimizer` that clips each sample's gradient and adds noise to their sum.

    `expected_batch_size`: sample rate times units, by which the sum is divided. The loss is a mean over samples.
    """
    num_parameters = sum(p.requires_grad for group in optimizer.param_groups for p in group["params"])
    arguments = clipping_arguments(clipping, noise_multiplier, max_grad_norm, num_parameters, expected_batch_size)
    kinds = {"flat": FlatOptimizer, "per_layer": PerLayerOptimizer, "adaptive": AdaptiveOptimizer}
    return kinds[clipping](optimizer, noise=noise, expected_batch_size=expected_batch_size, **arguments)
