"""Differential privacy for whole sites: each update is clipped, and the server adds noise to their sum.

Flower's DifferentialPrivacyServerSideFixedClipping is not used: its noise comes from NumPy's global generator, which
can be guessed; it weighs sites by their images and divides by how many answered, so that one site can change the mean
by more than the noise is made for. Source: McMahan et al. 2018. Next to read: `trainers/dp/ledger.py`, the accounting.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ml_src.core.errors import ConfigError, TrainingError
from ml_src.core.federated.aggregation import Update, norm
from ml_src.core.federated.layout import Arrays
from ml_src.core.federated_specs import CentralDP
from ml_src.core.trainers.dp.ledger import Accountant, Ledger, privacy_report, read_privacy
from ml_src.core.trainers.dp.noise import Noise

ACCOUNTANT: Accountant = "prv"  # at a sample rate of 1 within 1 % of the exact epsilon
# Which sites train is drawn in the open, so that it hides nobody: no amplification by sampling.
SAMPLE_RATE = 1.0
NOT_COVERED = (
    "the server, which sees the update of each site before the noise is added",
    "what is summed over the sites before round 1: numbers and sizes of images, means, variances, class counts",
    "the losses and scores that the sites report in each round, and the choice of best.pt by them",
    "which sites answered in which round, and whose updates were dropped",
)


class CentralPrivacy:
    """Clips, sums, pays, adds noise. The unit is one site: all its images and all its rounds."""

    def __init__(self, config: CentralDP, num_chosen: int, noise: Noise | None = None) -> None:
        """Prepare to train.

        Args:
            config: noise multiplier, clip norm and budget.
            num_chosen: how many sites are asked to train in each round, known beforehand; at least 1.
            noise: every bit from the system when left out.
        """
        self.config, self.num_chosen = config, num_chosen
        self.noise = noise or Noise(secure=True)
        self.ledger = Ledger()

    def release(self, before: Arrays, updates: Sequence[Update]) -> Arrays:
        """Return weights before the round plus the noisy mean of the clipped updates; charges the ledger first.

        Every site counts the same, and the sum is divided by `num_chosen` however many have answered: both must not
        depend on any one site.

        Args:
            before: parameters that the round began with, float32.
            updates: at most one of each site, each found sound by itself (`sound` with a number as bound).

        Raises: ConfigError where there are buffers, for a mean of these is not protected; ValueError for two updates of
            a site, or one that is no finite number.
        """
        if any(update.buffers for update in updates):
            raise ConfigError("federated.central_dp protects weights, not running statistics: use model.norm group")
        total = clipped_sum(before, updates, self.config.clip_norm)
        self.ledger.charge(self.config.noise_multiplier, SAMPLE_RATE, 1, self.config.clip_norm)
        # Its number of payments is the name of a round's noise: it never comes twice, not after a resume either.
        stream = self.noise.stream(self.ledger.num_steps)
        std = self.config.noise_multiplier * self.config.clip_norm
        noisy = {name: values + std * stream(torch.from_numpy(values)).numpy() for name, values in total.items()}
        return {name: np.asarray(before[name] + noisy[name] / self.num_chosen, np.float32) for name in before}

    def epsilon(self) -> float:
        """Return what has been spent so far."""
        return self.ledger.epsilon(self.config.target_delta, ACCOUNTANT)

    def allowed_rounds(self, wanted: int) -> int:
        """Return how many of `wanted` further rounds the budget allows: the most that stay within it.

        Raises: TrainingError where that is none.
        """
        target = self.config.target_epsilon
        if target is None or wanted == 0:
            return wanted
        allowed = bisect_right(range(1, wanted + 1), target, key=self._epsilon_after)
        if allowed == 0:
            raise TrainingError(
                f"the privacy budget allows no round: the next one brings epsilon to {self._epsilon_after(1):.4g}, "
                f"over federated.central_dp.target_epsilon {target:g}; raise it, or noise_multiplier "
                f"({self.config.noise_multiplier:g})"
            )
        return allowed

    def sentence(self, wanted: int, done: int = 0) -> str:
        """Return what is told before `wanted` further rounds, after `done`.

        Raises: TrainingError as `allowed_rounds`.
        """
        allowed = self.allowed_rounds(wanted)
        terms = (
            f"with noise multiplier {self.config.noise_multiplier:.4g} (delta {self.config.target_delta:g}, "
            f"unit of privacy one site, accountant {ACCOUNTANT})"
        )
        epsilon = f"epsilon {self._epsilon_after(allowed):.4g}"
        if allowed < wanted:
            return f"Privacy: the budget ends after round {done + allowed} of {done + wanted}, at {epsilon} {terms}"
        return f"Privacy: {epsilon} after {done + wanted} rounds {terms}"

    def _epsilon_after(self, rounds: int) -> float:
        ledger = self.ledger.plus(self.config.noise_multiplier, SAMPLE_RATE, rounds)
        return ledger.bound(self.config.target_delta, ACCOUNTANT).epsilon

    def report(self) -> dict[str, Any]:
        """Return the contents of privacy.json; write it before the weights that it is the price of."""
        report = privacy_report(self.ledger, self.config.target_delta, ACCOUNTANT, "site", NOT_COVERED, {})
        return report | {"adjacency": "one site, of a list that is public, takes part in all rounds or in none"}

    def recover(self, path: Path) -> None:
        """Add what the privacy.json of an interrupted run has charged since its checkpoint; no file adds nothing.

        Raises: TrainingError where it cannot be read: a lost ledger is not an empty one.
        """
        charged = read_privacy(path)
        if charged is not None:
            self.ledger = self.ledger.at_least(charged[0])

    def state_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"ledger": self.ledger.plain()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; what is known to be spent stays so."""
        self.ledger = Ledger.from_plain(state["ledger"]).at_least(self.ledger)


def clipped_sum(before: Arrays, updates: Sequence[Update], clip_norm: float) -> dict[str, NDArray[np.float64]]:
    """Return the sum of what the sites have changed, each clipped to an L2 norm over all weights: the sensitivity.

    Raises: ValueError for two updates of a site, or one that is no finite number.
    """
    if len({update.site for update in updates}) < len(updates):
        raise ValueError("a site has two updates: together they may change the sum by twice the clip norm")
    total = {name: np.zeros(values.shape) for name, values in before.items()}
    for update in sorted(updates, key=lambda update: update.site):  # in any order the same bits
        length = norm((before, {}), update)
        if not math.isfinite(length):
            raise ValueError(f"the update of {update.site} has no finite norm")
        scale = min(1.0, clip_norm / length) if length > 0 else 1.0
        for name, values in total.items():
            values += scale * np.subtract(update.parameters[name], before[name], dtype=np.float64)
    return total
