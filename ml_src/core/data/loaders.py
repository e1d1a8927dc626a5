"""From a dataset to batches on their way to the device: order, seeds, collation, workers.

Which images come when is said in `order.py`; a resumed run skips the finished steps of its epoch and goes on.
"""

import gc
import os
import signal
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ml_src.core.data.order import Order, PlannedStep
from ml_src.core.data.segmentation import Sample, SampleKey, SegmentationDataset
from ml_src.core.errors import MLError

# How many processes read is the user's choice; torch would warn of more than there are cores, for every loader.
warnings.filterwarnings("ignore", message="This DataLoader will create")


class Batch:
    """Images (N, C, H, W) of the files' number type, channels last in memory, masks (N, H, W) integer or None, and the
    sizes of the files.
    """

    def __init__(self, images: Tensor, masks: Tensor | None, sizes: list[tuple[int, int]]) -> None:
        self.images, self.masks, self.sizes = images, masks, sizes

    def __len__(self) -> int:
        return len(self.images)

    def emptied(self) -> "Batch":
        """Return a batch of no image, of the same size."""
        return Batch(self.images[:0], None if self.masks is None else self.masks[:0], [])

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader where a GPU is used."""
        masks = None if self.masks is None else self.masks.pin_memory()
        return Batch(self.images.pin_memory(), masks, self.sizes)


class Step(NamedTuple):
    """The batches of one optimizer step, read as they are asked for."""

    num_samples: int  # images, over all processes
    num_batches: int  # of this process
    batches: Iterator[Batch]


class StepSampler(Sampler[list[SampleKey]]):
    """Yields the batches of one epoch as lists of SampleKey, from a step on."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.start_at(0)

    def start_at(self, epoch: int, first_step: int = 0) -> list[PlannedStep]:
        """Let the next iteration give the batches of this epoch from step number `first_step` on; return the steps."""
        self.epoch, self.first_step = epoch, first_step
        self.steps = self.order.epoch(epoch)[first_step:]
        return self.steps

    def __len__(self) -> int:
        return sum(len(step.batches) for step in self.steps)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for number, step in enumerate(self.steps, self.first_step):
            for batch in step.batches:
                # sample 0 gives an empty batch the size of an image; `Loader` takes it out again
                yield [SampleKey(index, self.epoch, number) for index in batch or [0]]


class Loader:
    """Batches of a dataset, step by step: `for step in loader.steps(3)`; workers live from one epoch to the next."""

    def __init__(
        self,
        dataset: SegmentationDataset,
        order: Order,
        seed: int,
        num_workers: int,
        pin_memory: bool,
        ignore_index: int,
    ) -> None:
        self.dataset, self.order = dataset, order
        self.sampler = StepSampler(order)
        num_workers = min(num_workers, len(self.sampler))
        self.batches: DataLoader[Sample] = DataLoader(
            cast("Dataset[Sample]", dataset),
            batch_sampler=self.sampler,
            num_workers=num_workers,
            collate_fn=Collate(ignore_index),
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            worker_init_fn=_start_worker,
            # its own, or each epoch would draw from the global generator and shift every later dropout
            generator=torch.Generator().manual_seed(seed),
        )

    @property
    def num_steps(self) -> int:
        """Optimizer steps an epoch."""
        return self.order.num_steps

    def steps(self, epoch: int = 0, first_step: int = 0) -> Iterator[Step]:
        """Iterate over the steps of one epoch, from number `first_step` on."""
        planned = self.sampler.start_at(epoch, first_step)
        batches = iter(self.batches)
        for step in planned:
            yield Step(step.num_samples, len(step.batches), self._read(batches, step))

    def _read(self, batches: Iterator[Batch], step: PlannedStep) -> Iterator[Batch]:
        try:
            for chosen in step.batches:
                batch = next(batches)
                yield batch if chosen else batch.emptied()
        except MLError as error:
            self.close()
            # torch wraps what a worker raised into the text of its traceback
            sentence = str(error).rpartition(f"{type(error).__name__}: ")[2].strip()
            raise type(error)(sentence) from None

    def close(self) -> None:
        """End the workers now; left to the end of Python they would complain that they were ended."""
        iterator = self.batches._iterator
        if iterator is not None:
            iterator._shutdown_workers()  # type: ignore[attr-defined]
            self.batches._iterator = None

    def epoch(self, epoch: int = 0, first_step: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of one epoch, whatever step they belong to."""
        for step in self.steps(epoch, first_step):
            yield from step.batches


class Collate:
    """Stacks samples; smaller ones are filled up at the right and bottom, and the filling is ignored by the loss."""

    def __init__(self, ignore_index: int) -> None:
        self.ignore_index = ignore_index

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        height = max(sample.image.shape[0] for sample in samples)
        width = max(sample.image.shape[1] for sample in samples)
        images = np.zeros((len(samples), height, width, samples[0].image.shape[2]), samples[0].image.dtype)
        masks = None
        if samples[0].mask is not None:
            dtypes = {sample.mask.dtype for sample in samples if sample.mask is not None}
            small = self.ignore_index <= 255 and dtypes == {np.dtype(np.uint8)}  # a quarter of the bytes
            masks = np.full((len(samples), height, width), self.ignore_index, np.uint8 if small else np.int32)
        for index, sample in enumerate(samples):
            h, w = sample.image.shape[:2]
            images[index, :h, :w] = sample.image
            if masks is not None:
                masks[index, :h, :w] = sample.mask
        return Batch(
            torch.from_numpy(images).permute(0, 3, 1, 2),  # (N, C, H, W), channels last in memory
            None if masks is None else torch.from_numpy(masks),
            [sample.size for sample in samples],
        )


def _start_worker(_: int) -> None:
    """Workers share the machine with each other: one thread each. Ctrl-C is for the main process to answer."""
    gc.freeze()  # or a collection would touch, and thereby copy, every object of the main process
    os.setpgrp()  # a terminal, or `timeout`, sends its signal to the whole group of the main process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
