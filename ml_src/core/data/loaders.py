"""From a dataset to batches on their way to the device: order, seeds, collation, workers.

The order of an epoch is a function of (seed, epoch), so that a resumed run skips the finished batches and goes on.
"""

import os
import signal
import warnings
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from ml_src.core.data.segmentation import Sample, SampleKey, SegmentationDataset
from ml_src.core.errors import MLError

# How many processes read is the user's choice; torch would warn of more than there are cores, for every loader.
warnings.filterwarnings("ignore", message="This DataLoader will create")


class Batch:
    """Images (N, C, H, W) uint8 in channels-last memory, masks (N, H, W) integer or None, sizes of the files."""

    def __init__(self, images: Tensor, masks: Tensor | None, sizes: list[tuple[int, int]]) -> None:
        self.images, self.masks, self.sizes = images, masks, sizes

    def __len__(self) -> int:
        return len(self.images)

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader where a GPU is used."""
        masks = None if self.masks is None else self.masks.pin_memory()
        return Batch(self.images.pin_memory(), masks, self.sizes)


class EpochSampler(Sampler[list[SampleKey]]):
    """Yields the batches of one epoch as lists of SampleKey; `start_at` sets which epoch and from which batch."""

    def __init__(self, num_samples: int, batch_size: int, seed: int, shuffle: bool) -> None:
        self.num_samples, self.batch_size, self.seed, self.shuffle = num_samples, batch_size, seed, shuffle
        self.epoch, self.first_batch = 0, 0

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """The next iteration gives this epoch's batches from number `batch` on."""
        self.epoch, self.first_batch = epoch, batch

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order = np.arange(self.num_samples)
        if self.shuffle:
            np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, 2, self.epoch)))).shuffle(order)
        for batch in range(self.first_batch, len(self)):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [SampleKey(int(index), self.epoch, batch) for index in chosen]


class Loader:
    """Batches of a dataset: `for batch in loader.epoch(3)`; workers live from one epoch to the next."""

    def __init__(
        self,
        dataset: SegmentationDataset,
        batch_size: int,
        seed: int,
        shuffle: bool,
        num_workers: int,
        pin_memory: bool,
        ignore_index: int,
    ) -> None:
        self.sampler = EpochSampler(len(dataset), batch_size, seed, shuffle)
        self.dataset = dataset
        num_workers = min(num_workers, len(self.sampler))
        self.batches = DataLoader(
            dataset,
            batch_sampler=self.sampler,
            num_workers=num_workers,
            collate_fn=Collate(ignore_index),
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            worker_init_fn=_start_worker,
            # its own, or each epoch would draw from the global generator and shift every later dropout
            generator=torch.Generator().manual_seed(seed),
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def epoch(self, epoch: int = 0, first_batch: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of one epoch, from number `first_batch` on."""
        self.sampler.start_at(epoch, first_batch)
        try:
            yield from self.batches
        except MLError as error:  # torch wraps what a worker raised into the text of its traceback
            sentence = str(error).rpartition(f"{type(error).__name__}: ")[2].strip()
            raise type(error)(sentence) from None


class Collate:
    """Stacks samples; smaller ones are filled up at the right and bottom, and the filling is ignored by the loss."""

    def __init__(self, ignore_index: int) -> None:
        self.ignore_index = ignore_index

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        height = max(sample.image.shape[0] for sample in samples)
        width = max(sample.image.shape[1] for sample in samples)
        images = np.zeros((len(samples), height, width, samples[0].image.shape[2]), np.uint8)
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
    os.setpgrp()  # a terminal, or `timeout`, sends its signal to the whole group of the main process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
