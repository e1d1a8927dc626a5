"""The loop that trains any task: read this first, top to bottom.

`training.py` says what a Training holds, `backend.py` how a step runs, `callbacks.py` what happens around it.
"""

from contextlib import ExitStack

import torch

from ml_src.core.tasks import Metric
from ml_src.core.trainers.memory import make_room
from ml_src.core.trainers.training import Losses, Progress, Training


def fit(t: Training) -> None:
    """Train until the last epoch, or until a callback or Ctrl-C stops it; goes on from `t.progress`."""
    with ExitStack() as stack:
        for callback in t.callbacks:
            callback.on_start(t)
            stack.callback(callback.on_end, t)  # the last one first, each one whatever the others raise
        while t.progress.epoch < t.num_epochs and not t.stop:
            try:
                train = train_epoch(t)
                val = {} if t.interrupted else evaluate(t)
            except RuntimeError as error:
                make_room(t, error)  # raises it again, unless it was the memory and there is a way
                continue  # with the step that did not fit
            if t.interrupted:
                break
            t.metrics = {f"train_{key}": value for key, value in train.items()}
            t.metrics |= {f"val_{key}": value for key, value in val.items()} | t.backend.metrics()
            t.schedule.end_epoch(t.metrics)
            t.progress = Progress(epoch=t.progress.epoch + 1, step=t.progress.step)
            for callback in t.callbacks:
                callback.on_epoch_end(t)


def train_epoch(t: Training) -> dict[str, float]:
    """Take the steps of one epoch that are left; return its loss and scores, measured while training."""
    t.model.train()
    t.optimizer.zero_grad(set_to_none=True)
    metric = t.task.metric()
    if t.progress.counts is not None:
        metric.counts = t.progress.counts
    for step in t.train_loader.steps(t.progress.epoch, t.progress.epoch_step):
        losses = Losses()
        for number, batch in enumerate(step.batches, start=1):
            images, targets = t.task.prepare(batch, t.device)
            with t.backend.accumulate(t.model, last=number == step.num_batches):
                with t.backend.autocast():
                    logits = t.model(images)
                loss = t.criterion(logits.float(), targets) if len(batch) else logits.sum()  # of nothing: 0
                losses.add(loss, len(batch))
                metric.update(logits.detach(), targets)  # before the backward pass, for which it would wait on a GPU
                t.backend.backward(loss, len(batch), step.num_samples)
        t.require_finite(losses)
        t.stepping = True
        t.backend.step(t.model, t.optimizer, t.max_norm)
        t.schedule.step()
        t.progress.count_step(losses, metric.counts)
        t.stepping = False
        if t.average is not None:
            t.average.update(t.network, t.progress.step)
        for callback in t.callbacks:
            callback.on_step(t, step.num_samples)
        t.heed_signals()
        if t.stop:
            break
    return scores(t, t.progress, metric)


@torch.inference_mode()
def evaluate(t: Training, metric: Metric | None = None) -> dict[str, float]:
    """Return loss and scores over the validation split, at the size of its transforms; `metric` keeps the counts."""
    t.measured.eval()
    metric = metric or t.task.metric()
    losses = Losses()
    for batch in t.val_loader.epoch():
        images, targets = t.task.prepare(batch, t.device)
        with t.backend.autocast():
            logits = t.measured(images)
        losses.add(t.criterion(logits.float(), targets), len(batch))
        metric.update(logits, targets)
        if t.signalled:
            break
    t.heed_signals()
    return scores(t, losses, metric)


def scores(t: Training, losses: Losses | Progress, metric: Metric) -> dict[str, float]:
    """Return loss and scores over what all processes have counted."""
    total = t.backend.sum(torch.tensor([float(losses.loss_sum), losses.num_samples], dtype=torch.float64))
    metric.counts = t.backend.sum(metric.counts)
    return {"loss": float(total[0] / total[1]), **metric.compute()}
