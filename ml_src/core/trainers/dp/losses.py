"""Which losses can be clipped image by image: those that are a mean of what each image costs alone."""

import torch
from torch import Tensor, nn

from ml_src.core.errors import ConfigError


def require_uncoupled(criterion: nn.Module, name: str, num_classes: int, device: torch.device) -> None:
    """Refuse a loss in which one image's gradient depends on the others of its batch.

    Clipping bounds what an image adds to a sum of gradients; of a Dice over the batch, or of a mean over all its
    pixels that are not ignored, that would be no bound (sensitivities up to 1.5 times the clip norm were measured).
    Two images are tried, with other classes, weights and numbers of ignored pixels: their batch must cost the mean of
    both, and give the gradients of both.
    Raises: ConfigError.
    """
    generator = torch.Generator().manual_seed(0)
    for trial in range(4):
        logits = torch.randn(2, num_classes, 8, 8, generator=generator).to(device)
        targets = torch.randint(num_classes, (2, 8, 8), generator=generator).to(device)
        targets[0, : 2 * trial] = -100  # rows of the first image
        targets[1, 4:] = targets[1, 4, 0]  # one class has more pixels in the second
        together = gradient(criterion, logits, targets)
        alone = torch.cat([gradient(criterion, logits[i : i + 1], targets[i : i + 1]) for i in range(2)]) / 2
        if not torch.allclose(together, alone, rtol=1e-4, atol=1e-7):
            raise ConfigError(
                f"loss.type {name!r} couples the images of a batch, so that clipping each gradient would not bound "
                "what one image does: give one that is the mean over images of a loss of each, such as dice_loss, "
                "or derive yours from SegmentationLoss and its per_image"
            )


def gradient(criterion: nn.Module, logits: Tensor, targets: Tensor) -> Tensor:
    """Return the gradient of a loss with respect to its logits, in their shape."""
    logits = logits.clone().requires_grad_()
    (result,) = torch.autograd.grad(criterion(logits, targets), logits)
    return result
