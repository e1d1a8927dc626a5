"""The segmentation losses, from raw logits to one number an image. Next to read: `core/metrics/segmentation.py`.

Every loss is the mean over the batch of `per_sample`: an image's gradient never depends on the other images of its
batch, which the per-sample clipping of differential privacy needs.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ml_src.core.config import LossConfig
from ml_src.core.errors import ConfigError, DataError


class SegmentationLoss(nn.Module, ABC):
    """What all losses share: the ignore rule, the class weights, and the mean over images of a per-image loss.

    A pixel whose target is ignore_index counts for nothing, also where ignore_index is one of the classes; an image
    that has only such pixels has loss 0 and gradient 0. Arithmetic is in float32 whatever comes in (float64 stays).

    Shape: logits (N, C, H, W), raw; targets (N, H, W), class indices of any integer type. Returns a scalar.
    Raises: ValueError if the shapes do not fit, or a target lies outside 0..C-1 and is not ignore_index;
        ConfigError if config.class_weights is still "balanced".
    """

    class_weights: Tensor | None

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        if config.class_weights == "balanced":
            raise ConfigError(
                "loss.class_weights: 'balanced' has to be counted from the training masks before the loss is built"
            )
        weights = None if config.class_weights is None else torch.tensor(config.class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)  # the config has them; a checkpoint need not
        self.ignore_index = config.ignore_index

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean of `per_sample`, a scalar."""
        return self.per_sample(logits, targets).mean()

    def per_sample(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return one loss an image, (N,)."""
        if logits.dtype != torch.float64:
            logits = logits.float()  # fp16 sums overflow above 65 504 pixels
        labels, valid = split_targets(logits, targets, self.ignore_index)
        return self.per_image(logits, labels, valid)

    @abstractmethod
    def per_image(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """Return the loss of each image, (N,), from the outcome of `split_targets`."""

    def pixel_mean(self, pixel_losses: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """Weigh each pixel by its true class and average over the valid pixels of each image.

        The sum is divided by the number of pixels, not by the sum of their weights: that would cancel the weight of
        an image with one class, and, taken over the batch, would couple its images.

        Shape: pixel_losses, labels, valid (N, H, W). Returns (N,).
        """
        if self.class_weights is not None:
            pixel_losses = pixel_losses * self.class_weights.to(pixel_losses.dtype)[labels]
        return torch.where(valid, pixel_losses, 0).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)


class DiceLoss(SegmentationLoss):
    """One minus soft Dice, per image and class, then averaged (V-Net, Milletari et al. 2016, without the squares).

    The mean is over the classes that are present in the image's truth, weighted by class_weights where there are
    any. An absent class has Dice 0 whatever is predicted, hence no gradient: it would only add a constant. Pixels
    wrongly given to it are punished all the same, for they lack in the Dice of the classes that are there.

    Shape: logits (N, C, H, W), raw; targets (N, H, W), class indices. Returns a scalar in [0, 1].
    Raises: ValueError if a target lies outside 0..C-1 and is not ignore_index.
    """

    def per_image(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        return dice_loss(logits.softmax(1), labels, valid, self.class_weights)


class IoULoss(SegmentationLoss):
    """One minus soft Jaccard index, intersection over union (Rahman and Wang 2016), averaged as in `DiceLoss`.

    Shape: logits (N, C, H, W), raw; targets (N, H, W), class indices. Returns a scalar in [0, 1].
    Raises: ValueError if a target lies outside 0..C-1 and is not ignore_index.
    """

    def per_image(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        intersection, predicted, true = overlap(logits.softmax(1), labels, valid)
        return one_minus_mean_ratio(intersection, predicted + true - intersection, true > 0, self.class_weights)


class CrossEntropyLoss(SegmentationLoss):
    """Minus the log-probability of the true class, times its weight, averaged over the valid pixels of each image.

    Shape: logits (N, C, H, W), raw; targets (N, H, W), class indices. Returns a scalar in [0, inf).
    Raises: ValueError if a target lies outside 0..C-1 and is not ignore_index.
    """

    def per_image(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        return self.pixel_mean(cross_entropy(logits, labels), labels, valid)


class FocalLoss(SegmentationLoss):
    """Cross-entropy times alpha * (1 - p)^gamma, p the probability of the true class (Lin et al. 2017, eq. 5).

    With several classes alpha is one factor for all of them; class_weights multiply it, and the mean is over the
    valid pixels of each image.

    Shape: logits (N, C, H, W), raw; targets (N, H, W), class indices. Returns a scalar in [0, inf).
    Raises: ValueError if a target lies outside 0..C-1 and is not ignore_index.
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__(config)
        self.alpha, self.gamma = config.focal.alpha, config.focal.gamma

    def per_image(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        entropy = cross_entropy(logits, labels)
        doubt = -torch.expm1(-entropy)  # 1 - p
        # The slope of doubt ** gamma at 0 is infinite for gamma < 1, and infinity times entropy 0 is not a number.
        doubt = doubt.clamp(min=torch.finfo(doubt.dtype).eps)
        return self.pixel_mean(self.alpha * doubt**self.gamma * entropy, labels, valid)


class DiceBCELoss(SegmentationLoss):
    """dice_weight * Dice loss + bce_weight * binary cross-entropy, both on the softmax probabilities.

    The binary cross-entropy is one-vs-rest on the softmax probability p of each class, -[y log p + (1-y) log(1-p)],
    averaged over classes and valid pixels (a pixel weighs as its true class in class_weights). On softmax, not on a
    sigmoid a class, so that what is trained is what the argmax of a prediction ranks.

    Shape: logits (N, C, H, W), raw; targets (N, H, W), class indices. Returns a scalar in [0, inf).
    Raises: ValueError if a target lies outside 0..C-1 and is not ignore_index.
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__(config)
        self.dice_weight, self.bce_weight = config.dice_bce.dice_weight, config.dice_bce.bce_weight

    def per_image(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        log_probs = logits.log_softmax(1)
        probs = log_probs.exp()
        dice = dice_loss(probs, labels, valid, self.class_weights)
        bce = self.pixel_mean(one_vs_rest_bce(log_probs, probs, labels), labels, valid)
        return self.dice_weight * dice + self.bce_weight * bce


def split_targets(logits: Tensor, targets: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Split targets into class indices and a map of the pixels that count: the one ignore rule of all losses.

    Looking at the values costs a wait for the GPU; an index out of range inside a kernel would end the process.

    Shape: logits (N, C, H, W); targets (N, H, W), any integer type. Returns labels (N, H, W), int64, 0 where the
        target is ignored, and valid (N, H, W), bool.
    Raises: ValueError if the shapes do not fit, or a target lies outside 0..C-1 and is not ignore_index.
    """
    expected = (logits.shape[0], *logits.shape[2:])
    if logits.ndim != 4 or targets.shape != expected:
        raise ValueError(
            f"logits must be (N, C, H, W) and targets (N, H, W): they are {tuple(logits.shape)} and "
            f"{tuple(targets.shape)}"
        )
    labels = targets.long()
    if ignore_index is None:
        valid = torch.ones_like(labels, dtype=torch.bool)
    else:
        valid = labels != ignore_index
        labels = torch.where(valid, labels, 0)
    num_classes = logits.shape[1]
    lowest, highest = torch.stack(labels.aminmax()).tolist()
    if lowest < 0 or highest >= num_classes:
        raise ValueError(
            f"target value {lowest if lowest < 0 else highest} is no class (0 to {num_classes - 1}) "
            f"and not ignore_index ({ignore_index})"
        )
    return labels, valid


def overlap(probs: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, per image and class over the valid pixels: probability on the true class, probability, true pixels.

    Shape: probs (N, C, H, W); labels, valid (N, H, W). Returns three tensors (N, C).
    """
    classes = torch.arange(probs.shape[1], device=probs.device).view(1, -1, 1, 1)
    one_hot = (labels.unsqueeze(1) == classes) & valid.unsqueeze(1)
    # Floats, not bools: of the eight ways measured (gather and scatter, einsum, where, ...) this was the fastest on a
    # CPU, twice as fast as bool. No matrix product either: autocast would compute it in fp16.
    true = one_hot.flatten(2).to(probs.dtype)  # (N, C, H*W)
    probs = probs.flatten(2)
    counts = valid.flatten(1).unsqueeze(1).to(probs.dtype)  # (N, 1, H*W)
    return (probs * true).sum(2), (probs * counts).sum(2), true.sum(2)


def dice_loss(probs: Tensor, labels: Tensor, valid: Tensor, class_weights: Tensor | None) -> Tensor:
    """Return one minus soft Dice of each image, (N,); see `DiceLoss`."""
    intersection, predicted, true = overlap(probs, labels, valid)
    return one_minus_mean_ratio(2 * intersection, predicted + true, true > 0, class_weights)


def one_minus_mean_ratio(
    numerators: Tensor, denominators: Tensor, present: Tensor, class_weights: Tensor | None
) -> Tensor:
    """Return one minus the (weighted) mean over the present classes of numerator / denominator; 0 where there is none.

    Shape: numerators, denominators, present (N, C); class_weights (C,). Returns (N,).
    """
    # A present class has at least one true pixel below the line: only absent ones, which are left out, risk 0 / 0.
    losses = 1 - numerators / torch.where(present, denominators, 1)
    weights = present.to(losses.dtype)
    if class_weights is not None:
        weights = weights * class_weights.to(losses.dtype)
    total = weights.sum(1)
    return (losses * weights).sum(1) / torch.where(total > 0, total, 1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return minus the log-probability of the true class of each pixel, (N, H, W).

    Gathered by hand: torch's own 2-d version has no deterministic form on a GPU.
    """
    return -logits.log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)


def one_vs_rest_bce(log_probs: Tensor, probs: Tensor, labels: Tensor) -> Tensor:
    """Return -[y log p + (1-y) log(1-p)] of each pixel, averaged over the classes, (N, H, W).

    log(1-p) is log1p(-p) where p <= 1/2. A wrong class above 1/2, whose p may round to 1, is the largest, and there
    log(1-p) is the logsumexp of the others minus that of all: what the log-probability of the true class loses by
    leaving the largest class in the softmax. So value and gradient are finite and exact for logits of any size.

    Shape: log_probs, probs (N, C, H, W), of the same softmax over at least two classes; labels (N, H, W).
    """
    true = labels.unsqueeze(1)  # (N, 1, H, W)
    wrong = probs.scatter(1, true, 0)  # (N, C, H, W), what each class has that it should not
    large = wrong > 0.5  # at most one class a pixel; not found by argmax, which is ten times slower on a CPU
    log_true = log_probs.gather(1, true)
    log_true_among_others = log_probs.masked_fill(large, -torch.inf).log_softmax(1).gather(1, true)
    log_rest_of_large = log_true - log_true_among_others  # 0 where no wrong class is large
    log_rest = torch.log1p(-wrong.masked_fill(large, 0)).sum(1, keepdim=True)
    return -(log_true + log_rest_of_large + log_rest).squeeze(1) / probs.shape[1]


def balanced_weights(pixel_counts: Sequence[int]) -> list[float]:
    """Return class weights inversely proportional to each class's share, with mean 1 over the pixels.

    w_c = total / (number of present classes * n_c): every class then has the same say. A class without pixels gets
    weight 0.

    Args:
        pixel_counts: number of training pixels of each class, ignored ones left out.

    Raises: DataError if there is no pixel at all.
    """
    total = sum(pixel_counts)
    if total == 0:
        raise DataError("loss.class_weights: 'balanced' needs labelled pixels, but the training masks have none")
    num_present = sum(count > 0 for count in pixel_counts)
    return [total / (num_present * count) if count else 0.0 for count in pixel_counts]


LOSS_REGISTRY: dict[str, type[nn.Module]] = {
    "dice_loss": DiceLoss,
    "dice_bce_loss": DiceBCELoss,
    "iou_loss": IoULoss,
    "cross_entropy": CrossEntropyLoss,
    "focal_loss": FocalLoss,
}
