"""Which images take part in a private step: Poisson sampling, which is what the accountants count on.

The draws are a function of (key, epoch, step); whoever knows the key knows who took part, so it is kept secret.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ml_src.core.data.order import PlannedStep, chunks

# the loaders and the augmentation use 0 to 2 with the same seed
POISSON, MEMBER = 3, 4


def poisson_steps(num_units: int, sample_rate: float, num_steps: int, key: int, epoch: int) -> list[NDArray[np.int64]]:
    """Return the units, in order, of each step of an epoch: every unit is drawn in every step with `sample_rate`.

    A unit is an image, or a group of images; a step may be empty. `key`: 0 to 2**63 - 1.
    """
    rng = _generator(key, POISSON, epoch)
    return [np.flatnonzero(rng.random(num_units) < sample_rate) for _ in range(num_steps)]


def one_of_each(
    groups: Sequence[str], chosen_units: NDArray[np.int64], key: int, epoch: int, step: int
) -> NDArray[np.int64]:
    """Return one image of each chosen group, uniformly drawn: at most one image of a patient is in a step.

    `groups` has the group of every image; unit u is the u-th of their sorted names.
    """
    _, unit_of_image, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    images = np.argsort(unit_of_image, kind="stable")  # group after group
    first = np.cumsum(sizes) - sizes
    rng = _generator(key, MEMBER, epoch, step)
    chosen: NDArray[np.int64] = images[first[chosen_units] + rng.integers(sizes[chosen_units])]
    return chosen


def _generator(*entropy: int) -> np.random.Generator:
    """A generator that is a function of its arguments, not of what was drawn before."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


@dataclass
class PoissonOrder:
    """The steps of every epoch, drawn image by image; of groups, one image of each that is drawn.

    A step takes `step_size` images on average. An epoch has as many steps as would be needed to take every unit once;
    one divided by their number is the sample rate, as in Opacus.
    """

    num_samples: int
    batch_size: int  # images whose gradients are held at once
    step_size: int
    key: int
    groups: list[str] | None = None

    @property
    def num_units(self) -> int:
        """Images or groups."""
        return self.num_samples if self.groups is None else len(set(self.groups))

    @property
    def num_steps(self) -> int:
        """Steps in an epoch."""
        return -(-self.num_units // self.step_size)

    @property
    def sample_rate(self) -> float:
        """Probability with which a unit is in a step."""
        return 1 / self.num_steps

    @property
    def expected_size(self) -> float:
        """Images that a step takes on average."""
        return self.num_units * self.sample_rate

    def epoch(self, epoch: int) -> list[PlannedStep]:
        """Return the steps of an epoch; one that nobody was drawn for has no batch."""
        steps = poisson_steps(self.num_units, self.sample_rate, self.num_steps, self.key, epoch)
        if self.groups is not None:
            steps = [one_of_each(self.groups, units, self.key, epoch, step) for step, units in enumerate(steps)]
        return [PlannedStep(len(step), [b.tolist() for b in chunks(step, self.batch_size)]) for step in steps]
