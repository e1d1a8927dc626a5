"""Which losses and networks can be clipped image by image: those in which no image has a say in another's gradient."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ml_src.core.errors import ConfigError


def require_uncoupled(criterion: nn.Module, name: str, num_classes: int) -> None:
    """Refuse a loss in which one image's gradient depends on the others of its batch.

    Clipping bounds what an image adds to a sum of gradients; of a Dice over the batch, or of a mean over all its
    pixels that are not ignored, that would be no bound (three times the clip norm has been measured).
    A batch must have the gradients of the mean of its images' losses, whatever these differ in.
    Raises: ConfigError.
    """
    criterion = copy.deepcopy(criterion).cpu()  # a target that a loss cannot take would end a GPU's process
    for logits, targets in trials(num_classes):
        try:
            together = gradient(criterion, logits, targets)
            alone = torch.cat([gradient(criterion, logits[i : i + 1], targets[i : i + 1]) for i in range(len(logits))])
        except (RuntimeError, IndexError, ValueError):
            if (targets < 0).any():  # it does not know of ignored pixels, and will end training where it meets one
                continue
            raise
        known = alone.isfinite()  # of an image without labels, some losses have none
        if not torch.allclose(together[known], alone[known] / len(logits), rtol=1e-4, atol=1e-7):
            raise ConfigError(
                f"loss.type {name!r} couples the images of a batch, so that clipping each gradient would not bound "
                "what one image does: give one that is the mean over images of a loss of each, such as dice_loss, "
                "or derive yours from SegmentationLoss and its per_image"
            )


def trials(num_classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits (3, C, 8, 8) and targets (3, 8, 8) of images that differ in all that a loss may divide by.

    One has all classes, one mostly a single one, one nothing else; of the first no rows, some or all are ignored.
    Predictions are doubtful in half of the trials, and sure in the others.
    """
    generator = torch.Generator().manual_seed(0)
    for scale in (1, 8):
        for num_ignored in (0, 5, 8):
            targets = torch.randint(num_classes, (3, 8, 8), generator=generator)
            targets[1, 2:], targets[2] = targets[1, 0, 0], targets[2, 0, 0]
            targets[0, :num_ignored] = -100
            yield scale * torch.randn(3, num_classes, 8, 8, generator=generator), targets


def gradient(criterion: nn.Module, logits: Tensor, targets: Tensor) -> Tensor:
    """Return the gradient of a loss with respect to its logits, in their shape."""
    logits = logits.clone().requires_grad_()
    (result,) = torch.autograd.grad(criterion(logits, targets), logits)
    return result


@torch.no_grad()
def require_separate(network: nn.Module, name: str, shape: tuple[int, int, int], device: torch.device) -> None:
    """Refuse a network in which one image's output depends on the others of its batch, or that remembers images.

    Two batches differ in their second image: the first one's logits must be the same, and every buffer what it was,
    for a checkpoint keeps buffers, without noise.
    Shape: (channels, height, width) of an image.
    Raises: ConfigError.
    """
    first, second, other = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    buffers = [buffer.clone() for buffer in network.buffers()]
    logits = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for beside in (second, 100 * other):
            torch.manual_seed(0)  # the same dropout
            logits.append(network(torch.stack([first, beside]))[0])
    why = ""
    if not torch.linalg.norm(logits[0] - logits[1]) <= 1e-3 * torch.linalg.norm(logits[0]):
        why = "what it makes of an image depends on the others of its batch"
    elif not all(torch.equal(*pair) for pair in zip(buffers, network.buffers(), strict=True)):
        why = "images leave a mark on its buffers, which checkpoints keep"
    if why:
        raise ConfigError(
            f"model.custom_architecture {name!r} cannot be trained with trainer_type dp: {why}; "
            "normalise with nn.GroupNorm, or each image alone"
        )
