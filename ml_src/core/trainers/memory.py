"""What to do when a step does not fit into memory: say what to set, or, with `training.auto_batch`, take smaller bites.

A smaller batch changes no step: its images are the same, in more batches whose gradients are averaged.
"""

import logging

import torch

from ml_src.core.errors import TrainingError
from ml_src.core.trainers.training import Training

log = logging.getLogger("ml_src")


def make_room(t: Training, error: RuntimeError) -> None:
    """Halve the batches of the loaders, where the user has allowed it; the step that failed can be taken again.

    Raises: TrainingError that says what to set, where that is not allowed or not possible; `error` itself, where it is
        about something else.
    """
    if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
        raise error
    size = t.train_loader.order.batch_size
    step_size = t.config.training.batch_size * t.accumulation
    half = -(-size // 2)
    image = t.config.train_image_size
    crop = f" and the images of transforms.train ({image[0]}x{image[1]}) smaller" if image else ""
    advice = f"training.batch_size: {half} and training.gradient_accumulation_steps: {-(-step_size // half)}"
    where = f"a batch of {size} does not fit into the memory of {t.device} (epoch {t.progress.epoch + 1})"
    if size == 1:
        raise TrainingError(
            f"{where}: set trainer_type: mixed_precision, a smaller model.base_channels{crop}"
        ) from error
    if not t.config.training.auto_batch:
        raise TrainingError(
            f"{where}: set {advice} (the same step in smaller batches), or training.auto_batch: true to have it done, "
            f"or make model.base_channels{crop}"
        ) from error
    log.warning("%s: going on with batches of %d, %d a step", where[0].upper() + where[1:], half, -(-step_size // half))
    for loader in (t.train_loader, t.val_loader):
        loader.order.batch_size = min(half, loader.order.batch_size)
    if t.device.type == "cuda":
        torch.cuda.empty_cache()
