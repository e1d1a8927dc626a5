"""What to do when a step does not fit into memory: say what to set, or, with `training.auto_batch`, take smaller bites.

A smaller batch leaves a step its images, in more batches whose gradients are averaged. Batch normalisation then looks
at fewer images at once; nothing else changes.
"""

import logging

import torch

from ml_src.core.errors import TrainingError
from ml_src.core.trainers.training import Training

OUT_OF_MEMORY = ("can't allocate memory", "_STATUS_ALLOC_FAILED")  # of a CPU, and of a GPU's libraries
log = logging.getLogger("ml_src")


def make_room(t: Training, error: RuntimeError) -> None:
    """Halve the batches of the loaders, where the user has allowed it; the step that failed can be taken again.

    Raises: TrainingError that says what to set, where that is not allowed or not possible; `error` itself, where it is
        about something else.
    """
    if not (isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)):
        raise error
    training = t.config.training
    size, image = t.train_loader.order.batch_size, t.config.train_image_size
    half, step_size = -(-size // 2), training.batch_size * t.accumulation
    advice = f"training.batch_size: {half} and training.gradient_accumulation_steps: {-(-step_size // half)}"
    if training.trainer_type == "dp":
        advice = f"training.dp.max_physical_batch_size: {half}"
    others = ["a smaller model.base_channels"]
    others += [f"images smaller than {image[0]}x{image[1]} in transforms.train"] if image else []
    others += ["trainer_type: mixed_precision"] if training.trainer_type == "standard" else []
    where = f"a batch of {size} does not fit into the memory of {t.device} (epoch {t.progress.epoch + 1})"
    if size == 1:
        raise TrainingError(f"{where}: set {', or '.join(others)}") from error
    if not training.auto_batch or t.stepping:
        auto = "" if training.trainer_type in ("dp", "accelerate") else ", or training.auto_batch: true to have it done"
        raise TrainingError(f"{where}: set {advice}{auto}, or {', or '.join(others)}") from error
    log.warning("%s: going on with batches of %d, %d a step", where[0].upper() + where[1:], half, -(-step_size // half))
    t.shrink_batches(half)
