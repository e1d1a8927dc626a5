"""The loop that trains any task: read this first, top to bottom.

`training.py` says what a Training holds, `backend.py` how a step runs, `callbacks.py` what happens around it.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

import torch

from ml_src.core.trainers.training import Progress, Training

T = TypeVar("T")


def fit(t: Training) -> None:
    """Train until the last epoch, or until a callback or Ctrl-C stops it; goes on from `t.progress`."""
    started = []
    try:
        for callback in t.callbacks:
            callback.on_start(t)
            started.append(callback)
        while t.progress.epoch < t.num_epochs and not t.stop:
            train = train_epoch(t)
            val = {} if t.interrupted else evaluate(t)
            if t.interrupted:
                break
            t.metrics = {f"train_{key}": value for key, value in train.items()}
            t.metrics |= {f"val_{key}": value for key, value in val.items()}
            t.schedule.end_epoch(t.metrics)
            t.progress = Progress(epoch=t.progress.epoch + 1, step=t.progress.step)
            for callback in t.callbacks:
                callback.on_epoch_end(t)
    finally:
        for callback in started:
            callback.on_end(t)


def train_epoch(t: Training) -> dict[str, float]:
    """Take the steps of one epoch that are left; return its loss and scores, measured while training."""
    t.model.train()
    metric = t.task.metric()
    if t.progress.counts is not None:
        metric.counts = t.progress.counts
    for group in grouped(t.train_loader.epoch(t.progress.epoch, t.progress.batch), t.accumulation):
        num_samples = sum(len(batch) for batch in group)
        for batch in group:
            images, targets = t.task.prepare(batch, t.device)
            with t.backend.autocast():
                logits = t.model(images)
            loss = t.criterion(logits.float(), targets)
            t.backend.backward(loss * (len(batch) / num_samples))  # a short batch weighs as much as its images
            metric.update(logits.detach(), targets)
            t.progress.add(loss.detach(), len(batch))
        t.backend.step(t.model, t.optimizer, t.max_norm)
        t.schedule.step()
        t.progress.count_step(len(group), metric.counts)
        for callback in t.callbacks:
            callback.on_step(t, num_samples)
        if t.interrupted:
            break
    return {"loss": t.progress.mean_loss(), **metric.compute()}


@torch.inference_mode()
def evaluate(t: Training) -> dict[str, float]:
    """Return loss and scores over the validation split, at the size of its transforms."""
    t.model.eval()
    metric = t.task.metric()
    total = Progress()
    for batch in t.val_loader.epoch():
        images, targets = t.task.prepare(batch, t.device)
        with t.backend.autocast():
            logits = t.model(images)
        total.add(t.criterion(logits.float(), targets), len(batch))
        metric.update(logits, targets)
        if t.interrupted:
            break
    return {"loss": total.mean_loss(), **metric.compute()}


def grouped(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
