"""Which images each optimizer step takes, as a function of (seed, epoch). Next to read: `loaders.py`, which reads them.

A step is planned as a whole, so that it takes the same images however many batches or processes it is divided into.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class PlannedStep(NamedTuple):
    """The images of one step, by number."""

    num_samples: int  # of all processes
    batches: list[list[int]]  # of this process; all processes have equally many, and a batch may be empty


class Order(Protocol):
    """The steps of every epoch."""

    batch_size: int  # images that one process handles at once; a shorter one changes no step

    @property
    def num_steps(self) -> int:
        """Steps in an epoch."""

    def epoch(self, epoch: int) -> list[PlannedStep]:
        """Return the steps of an epoch."""


@dataclass
class EpochOrder:
    """Every image once an epoch; the last step, and the last batch of a step, may be short.

    Process `rank` of `num_processes` takes its part of each batch, so that a step of two processes with batches of 2
    has the images of one process with batches of 4.
    """

    num_samples: int
    batch_size: int
    step_size: int  # images a step takes, over all processes
    seed: int = 0
    shuffle: bool = False
    rank: int = 0
    num_processes: int = 1

    @property
    def num_steps(self) -> int:
        """Steps in an epoch."""
        return -(-self.num_samples // self.step_size)

    def epoch(self, epoch: int) -> list[PlannedStep]:
        """Return the steps of an epoch."""
        order = np.arange(self.num_samples)
        if self.shuffle:
            np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, 2, epoch)))).shuffle(order)
        return [self._step(step) for step in chunks(order, self.step_size)]

    def _step(self, chosen: NDArray[np.int64]) -> PlannedStep:
        whole = chunks(chosen, self.batch_size * self.num_processes)
        parts = [np.array_split(batch, self.num_processes)[self.rank].tolist() for batch in whole]
        return PlannedStep(len(chosen), parts)


@dataclass
class ShareOfBatches:
    """Every image once over all processes, in order, in whole batches dealt out in turn: for measuring."""

    num_samples: int
    batch_size: int
    rank: int = 0
    num_processes: int = 1

    @property
    def num_steps(self) -> int:
        """Steps in an epoch."""
        return len(self.epoch(0))

    def epoch(self, epoch: int) -> list[PlannedStep]:
        """Return the steps of an epoch."""
        batches = chunks(np.arange(self.num_samples), self.batch_size)[self.rank :: self.num_processes]
        return [PlannedStep(len(batch), [batch.tolist()]) for batch in batches]


def chunks(items: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Cut into pieces of `size`; the last may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]
