"""Each loss, value and gradient, against an implementation by others, under settings where both mean the same."""

import monai.losses
import pytest
import segmentation_models_pytorch.losses as smp_losses
import torch
import torch.nn.functional as F
from torch import Tensor

from ml_src.core.config import DiceBceConfig, FocalConfig, LossConfig
from ml_src.core.losses import build_loss


def sample(num_images: int = 3, num_classes: int = 4, size: int = 8) -> tuple[Tensor, Tensor]:
    """Random logits in float64, in which naive formulas are exact, and targets.

    Every class is present in every image, where all libraries agree on the mean.
    """
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(num_images, num_classes, size, size, generator=rng, dtype=torch.float64) * 2
    targets = torch.randint(0, num_classes, (num_images, size, size), generator=rng)
    targets.view(num_images, -1)[:, :num_classes] = torch.arange(num_classes)
    return logits, targets


def assert_same(ours, theirs, logits: Tensor, targets: Tensor) -> None:
    """Same value and same gradient."""
    values, gradients = [], []
    for loss in (ours, theirs):
        leaf = logits.clone().requires_grad_()
        value = loss(leaf, targets)
        value.backward()
        values.append(value.detach())
        gradients.append(leaf.grad)
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[1].abs().sum() > 0


@pytest.mark.parametrize(("word", "jaccard"), [("dice_loss", False), ("iou_loss", True)])
def test_overlap_losses_agree_with_monai(word, jaccard):
    theirs = monai.losses.DiceLoss(softmax=True, to_onehot_y=True, jaccard=jaccard, smooth_nr=0, smooth_dr=0)
    ours = build_loss(LossConfig(type=word))
    assert_same(ours, lambda x, y: theirs(x, y.unsqueeze(1)), *sample())


def test_weighted_dice_agrees_with_monai():
    """monai multiplies by the weights and divides by the number of classes; weights with mean 1 make that one mean."""
    weights = [0.4, 0.8, 1.2, 1.6]
    theirs = monai.losses.DiceLoss(softmax=True, to_onehot_y=True, weight=weights, smooth_nr=0, smooth_dr=0)
    ours = build_loss(LossConfig(type="dice_loss", class_weights=weights))
    assert_same(ours, lambda x, y: theirs(x, y.unsqueeze(1)), *sample())


@pytest.mark.parametrize(("word", "theirs"), [("dice_loss", smp_losses.DiceLoss), ("iou_loss", smp_losses.JaccardLoss)])
def test_overlap_losses_agree_with_smp_on_one_image(word, theirs):
    """smp sums over the batch, hence one image at a time; with an absent class, which it counts as 0."""
    logits, targets = sample(num_images=1)
    assert_same(build_loss(LossConfig(type=word)), theirs("multiclass", eps=0), logits, targets)
    targets[targets == 3] = 0
    smp = theirs("multiclass", eps=0)
    assert_same(build_loss(LossConfig(type=word)), lambda x, y: smp(x, y) * 4 / 3, logits, targets)


def test_dice_with_ignored_pixels_agrees_with_smp():
    logits, targets = sample(num_images=1)
    targets[0, 2:4] = 255
    theirs = smp_losses.DiceLoss("multiclass", ignore_index=255, eps=0)
    assert_same(build_loss(LossConfig(type="dice_loss", ignore_index=255)), theirs, logits, targets)


def test_cross_entropy_agrees_with_torch():
    assert_same(build_loss(LossConfig(type="cross_entropy")), F.cross_entropy, *sample())


def test_cross_entropy_with_ignored_pixels_agrees_with_torch():
    """torch averages over the batch: the same where every image has as many valid pixels."""
    logits, targets = sample()
    targets[:, 3] = 255
    ours = build_loss(LossConfig(type="cross_entropy", ignore_index=255))
    assert_same(ours, lambda x, y: F.cross_entropy(x, y, ignore_index=255), logits, targets)


def test_weighted_cross_entropy_agrees_with_torch_up_to_the_divisor():
    """torch divides by the weights of the pixels, this project by their number."""
    logits, targets = sample()
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    ours = build_loss(LossConfig(type="cross_entropy", class_weights=weights.tolist()))
    theirs = lambda x, y: F.cross_entropy(x, y, weights, reduction="sum") / y.numel()  # noqa: E731
    assert_same(ours, theirs, logits, targets)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.0])
def test_focal_agrees_with_monai(gamma):
    """monai averages over the classes too, all but one of which are 0, and applies alpha to some classes only."""
    theirs = monai.losses.FocalLoss(to_onehot_y=True, use_softmax=True, gamma=gamma)
    ours = build_loss(LossConfig(type="focal_loss", focal=FocalConfig(alpha=0.3, gamma=gamma)))
    logits, targets = sample()
    assert_same(ours, lambda x, y: 0.3 * 4 * theirs(x, y.unsqueeze(1)), logits.float(), targets)  # it is float32 inside


@pytest.mark.parametrize("num_classes", [2, 4])
def test_bce_agrees_with_torch_on_softmax_probabilities(num_classes):
    def theirs(logits: Tensor, targets: Tensor) -> Tensor:
        one_hot = F.one_hot(targets, num_classes).permute(0, 3, 1, 2).to(logits.dtype)
        return F.binary_cross_entropy(logits.softmax(1), one_hot)

    config = LossConfig(type="dice_bce_loss", dice_bce=DiceBceConfig(dice_weight=0.0, bce_weight=1.0))
    assert_same(build_loss(config), theirs, *sample(num_classes=num_classes))


def test_bce_keeps_the_digits_that_the_naive_formula_loses():
    """A wrong pixel at logit 40: 1 - p rounds to 0 in float32, while float64 still has log(1 - p) = -40 and a bit."""
    logits = torch.tensor([40.0, 0.0, -1.0]).view(1, 3, 1, 1)
    targets = torch.ones(1, 1, 1, dtype=torch.long)
    log_p = logits.double().log_softmax(1).flatten()
    rest = torch.stack([torch.logaddexp(log_p[1], log_p[2]), torch.logaddexp(log_p[0], log_p[1])])  # not 0, not 2
    expected = -(log_p[1] + rest.sum()) / 3
    config = LossConfig(type="dice_bce_loss", dice_bce=DiceBceConfig(dice_weight=0.0, bce_weight=1.0))
    torch.testing.assert_close(build_loss(config)(logits, targets).double(), expected, rtol=1e-6, atol=0)
