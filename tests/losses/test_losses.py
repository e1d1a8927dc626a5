"""Each loss against a table worked out by hand, and the laws that all losses keep; the oracles are in another file."""

import math

import pytest
import torch
from torch import Tensor, nn

from ml_src.core.config import DiceBceConfig, FocalConfig, LossConfig
from ml_src.core.errors import ConfigError, DataError
from ml_src.core.losses import build_loss
from ml_src.core.losses.segmentation import LOSS_REGISTRY, balanced_weights, overlap

WORDS = ["dice_loss", "dice_bce_loss", "iou_loss", "cross_entropy", "focal_loss"]
every_loss = pytest.mark.parametrize("word", WORDS)


def loss_of(word: str, **keys) -> nn.Module:
    return build_loss(LossConfig(type=word, **keys))


def sample(num_images: int = 3, num_classes: int = 4, size: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random logits (N, C, H, W) and targets (N, H, W) in which every class is present."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_images, num_classes, size, size, generator=rng) * 2
    targets = torch.randint(0, num_classes, (num_images, size, size), generator=rng)
    targets.view(num_images, -1)[:, :num_classes] = torch.arange(num_classes)
    return logits, targets


# --- by hand -------------------------------------------------------------------------------------------------------

# Two classes, 2 x 2 pixels. Probability of class 1: 0.5 0.2 / 0.9 0.6, truth: 0 0 / 1 1.
HAND_PROBS = torch.tensor([[0.5, 0.2], [0.9, 0.6]])
HAND_LOGITS = torch.stack([(1 - HAND_PROBS).log(), HAND_PROBS.log()]).unsqueeze(0)
HAND_TARGETS = torch.tensor([[[0, 0], [1, 1]]])
# class 0: intersection 0.5 + 0.8 = 1.3, probability 0.5 + 0.8 + 0.1 + 0.4 = 1.8, truth 2
# class 1: intersection 0.9 + 0.6 = 1.5, probability 2.2, truth 2
HAND_DICE = 1 - (2.6 / 3.8 + 3.0 / 4.2) / 2
HAND_IOU = 1 - (1.3 / 2.5 + 1.5 / 2.7) / 2
HAND_CE = -(math.log(0.5) + math.log(0.8) + math.log(0.9) + math.log(0.6)) / 4
HAND_FOCAL = (
    -0.25 * (0.5**2 * math.log(0.5) + 0.2**2 * math.log(0.8) + 0.1**2 * math.log(0.9) + 0.4**2 * math.log(0.6)) / 4
)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("dice_loss", HAND_DICE),
        ("iou_loss", HAND_IOU),
        ("cross_entropy", HAND_CE),
        ("focal_loss", HAND_FOCAL),
        # with two classes p and 1 - p swap places, so that one-vs-rest is the cross-entropy
        ("dice_bce_loss", 0.5 * HAND_DICE + 0.5 * HAND_CE),
    ],
)
def test_four_pixels_by_hand(word, expected):
    assert loss_of(word)(HAND_LOGITS, HAND_TARGETS).item() == pytest.approx(expected, abs=1e-6)


def test_class_weights_by_hand():
    """Overlap losses take the weighted mean over classes; pixel losses weigh pixels and divide by their number."""
    weights = [1.0, 3.0]
    dice = 1 - (2.6 / 3.8 + 3 * 3.0 / 4.2) / 4
    entropy = -(math.log(0.5) + math.log(0.8) + 3 * math.log(0.9) + 3 * math.log(0.6)) / 4
    for word, expected in {"dice_loss": dice, "cross_entropy": entropy, "dice_bce_loss": (dice + entropy) / 2}.items():
        loss = loss_of(word, class_weights=weights)(HAND_LOGITS, HAND_TARGETS)
        assert loss.item() == pytest.approx(expected, abs=1e-6), word


def test_weights_of_dice_bce_and_focal_come_from_their_sections():
    logits, targets = sample()
    both = loss_of("dice_bce_loss", dice_bce=DiceBceConfig(dice_weight=2.0, bce_weight=3.0))(logits, targets)
    dice = loss_of("dice_bce_loss", dice_bce=DiceBceConfig(dice_weight=1.0, bce_weight=0.0))(logits, targets)
    bce = loss_of("dice_bce_loss", dice_bce=DiceBceConfig(dice_weight=0.0, bce_weight=1.0))(logits, targets)
    torch.testing.assert_close(both, 2 * dice + 3 * bce)
    torch.testing.assert_close(dice, loss_of("dice_loss")(logits, targets))
    focal = loss_of("focal_loss", focal=FocalConfig(alpha=0.5, gamma=0.0))(logits, targets)
    torch.testing.assert_close(focal, 0.5 * loss_of("cross_entropy")(logits, targets))


# --- laws of all losses --------------------------------------------------------------------------------------------


@every_loss
def test_gradient_is_that_of_the_value(word):
    """Finite differences in float64, with ignored pixels, an absent class and class weights."""
    logits, targets = sample(num_images=2, num_classes=3, size=3)
    targets[0][targets[0] == 2] = 1
    targets[1, 0, 0] = 255
    loss = loss_of(word, ignore_index=255, class_weights=[0.5, 1.0, 2.0])
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), logits.double().requires_grad_())


@every_loss
def test_float64_stays_float64_and_all_else_becomes_float32(word):
    logits, targets = sample()
    loss = loss_of(word, class_weights=[1.0, 2.0, 3.0, 4.0])
    assert loss(logits.double(), targets).dtype == torch.float64
    assert loss(logits.half(), targets).dtype == torch.float32


@every_loss
def test_renaming_the_classes_changes_nothing(word):
    logits, targets = sample()
    weights, order = [0.5, 1.0, 2.0, 4.0], [2, 0, 3, 1]
    renamed = torch.tensor(order).argsort()[targets]  # class order[k] is now called k
    loss = loss_of(word, class_weights=weights)(logits, targets)
    again = loss_of(word, class_weights=[weights[c] for c in order])(logits[:, order], renamed)
    torch.testing.assert_close(again, loss)


@every_loss
def test_forward_is_the_mean_of_per_sample(word):
    logits, targets = sample()
    loss = loss_of(word)
    each = loss.per_sample(logits, targets)
    assert each.shape == (3,)
    torch.testing.assert_close(loss(logits, targets), each.mean())
    alone = torch.stack([loss(logits[i : i + 1], targets[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(each, alone)


@every_loss
def test_gradient_of_an_image_does_not_depend_on_the_others(word):
    """Image 1 gets other logits, classes and fewer valid pixels: the gradient of image 0 is the same to the bit."""
    logits, targets = sample(num_images=2)
    loss = loss_of(word, ignore_index=255, class_weights=[0.5, 1.0, 2.0, 4.0])

    def gradient_of_first(logits, targets):
        logits = logits.clone().requires_grad_()
        loss(logits, targets).backward()
        return logits.grad[0]

    before = gradient_of_first(logits, targets)
    logits[1] = -3 * logits[1]
    targets[1] = 0
    targets[1, :4] = 255
    assert torch.equal(gradient_of_first(logits, targets), before)
    assert before.abs().sum() > 0


@every_loss
@pytest.mark.parametrize("ignored", [255, 0], ids=["outside the classes", "one of the classes"])
def test_ignoring_pixels_is_deleting_them(word, ignored):
    """Two ignored rows, with other logits under them, equal an image without these rows."""
    logits, targets = sample(num_classes=4)
    if ignored == 0:
        targets[targets == 0] = 1
    loss = loss_of(word, ignore_index=ignored, class_weights=[0.5, 1.0, 2.0, 4.0])
    short = loss(logits[:, :, 2:], targets[:, 2:])
    targets[:, :2] = ignored
    logits[:, :, :2] *= 100
    torch.testing.assert_close(loss(logits, targets), short)


@every_loss
def test_image_with_only_ignored_pixels_has_loss_and_gradient_zero(word):
    logits, targets = sample(num_images=2)
    targets[1] = 255
    logits.requires_grad_()
    loss = loss_of(word, ignore_index=255)
    each = loss.per_sample(logits, targets)
    assert each[1] == 0 and each[0] > 0
    each.mean().backward()
    assert torch.equal(logits.grad[1], torch.zeros_like(logits[1]))
    assert logits.grad[0].abs().sum() > 0


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats_give_nearly_the_loss_of_float32(word, dtype):
    logits, targets = sample()
    logits = logits.to(dtype).requires_grad_()
    short = loss_of(word)(logits, targets)
    short.backward()
    assert logits.grad.isfinite().all()
    torch.testing.assert_close(short.detach(), loss_of(word)(logits.detach().float(), targets))
    torch.testing.assert_close(short.detach(), loss_of(word)(sample()[0], targets), rtol=0.02, atol=0.01)


@every_loss
def test_autocast_changes_nothing(word):
    logits, targets = sample()
    loss = loss_of(word)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(logits, targets)
    torch.testing.assert_close(inside, loss(logits, targets))


@every_loss
def test_sums_beyond_the_range_of_fp16_are_right(word):
    """Over 65 504, the largest fp16 number, an image of one repeated pixel has the loss of a small one."""
    logits, targets = torch.tensor([0.5, -0.25]), 1
    big = logits.half().view(1, 2, 1, 1).expand(1, 2, 300, 300), torch.full((1, 300, 300), targets)
    small = logits.view(1, 2, 1, 1).expand(1, 2, 2, 2), torch.full((1, 2, 2), targets)
    torch.testing.assert_close(loss_of(word)(*big), loss_of(word)(*small), rtol=1e-5, atol=1e-6)


@every_loss
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_extreme_logits_give_finite_values_and_gradients(word, scale):
    """Right, wrong and tied pixels at once."""
    logits, targets = sample(num_classes=3)
    logits = scale * logits.sign()
    logits.requires_grad_()
    loss = loss_of(word)(logits, targets)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@every_loss
def test_perfect_prediction_has_loss_zero(word):
    _, targets = sample()
    logits = 1e4 * (2 * nn.functional.one_hot(targets, 4).permute(0, 3, 1, 2).float() - 1)
    assert abs(loss_of(word)(logits, targets).item()) < 1e-6


@every_loss
def test_descent_along_the_gradient_reaches_the_truth(word):
    logits, targets = sample(num_images=1)
    logits.requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.3)
    loss = loss_of(word)
    for _ in range(60):
        optimizer.zero_grad()
        loss(logits, targets).backward()
        optimizer.step()
    assert torch.equal(logits.argmax(1), targets)


@every_loss
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_targets_of_any_integer_type_are_the_same(word, dtype):
    logits, targets = sample()
    targets[0, 0, 0] = 255
    loss = loss_of(word, ignore_index=255)
    assert torch.equal(loss(logits, targets.to(dtype)), loss(logits, targets))


@every_loss
@pytest.mark.parametrize(("value", "ignored"), [(4, None), (255, 254), (-1, 255)])
def test_target_that_is_no_class_is_named(word, value, ignored):
    logits, targets = sample(num_classes=4)
    targets[1, 2, 3] = value
    with pytest.raises(ValueError, match=rf"target value {value} is no class \(0 to 3\)"):
        loss_of(word, ignore_index=ignored)(logits, targets)


def test_targets_of_another_shape_are_refused():
    logits, targets = sample()
    with pytest.raises(ValueError, match=r"\(3, 4, 8, 8\) and \(3, 1, 8, 8\)"):
        loss_of("dice_loss")(logits, targets.unsqueeze(1))


# --- absent classes, weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["dice_loss", "iou_loss"])
def test_absent_class_does_not_enter_the_mean_of_its_image(word):
    """A third class that is neither true nor predicted leaves the loss of the two others as it is."""
    third = torch.full((1, 1, 2, 2), -1e4)
    with_third = loss_of(word)(torch.cat([HAND_LOGITS, third], dim=1), HAND_TARGETS)
    torch.testing.assert_close(with_third, loss_of(word)(HAND_LOGITS, HAND_TARGETS))


@pytest.mark.parametrize("word", ["dice_loss", "iou_loss"])
def test_probability_given_to_an_absent_class_is_still_pushed_down(word):
    third = torch.zeros(1, 1, 2, 2)
    logits = torch.cat([HAND_LOGITS, third], dim=1).requires_grad_()
    loss_of(word)(logits, HAND_TARGETS).backward()
    assert (logits.grad[0, 2] > 0).all()


@pytest.mark.parametrize("word", ["dice_loss", "iou_loss"])
def test_overlap_loss_lies_between_0_and_1(word):
    _, targets = sample()
    wrong = 1e4 * (1 - 2 * nn.functional.one_hot(targets, 4).permute(0, 3, 1, 2).float())
    assert loss_of(word)(wrong, targets).item() == pytest.approx(1, abs=1e-6)
    assert 0 < loss_of(word)(*sample()).item() < 1


@every_loss
def test_image_whose_classes_all_weigh_nothing_has_loss_zero(word):
    logits, _ = sample(num_classes=3)
    logits.requires_grad_()
    loss = loss_of(word, class_weights=[0.0, 1.0, 1.0])(logits, torch.zeros(3, 8, 8, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_gradient_is_finite_where_the_probability_is_one(gamma):
    """The slope of (1 - p)^gamma is infinite there for gamma below 1."""
    logits = torch.tensor([50.0, -50.0]).view(1, 2, 1, 1).requires_grad_()
    loss_of("focal_loss", focal=FocalConfig(gamma=gamma))(logits, torch.zeros(1, 1, 1, dtype=torch.long)).backward()
    assert logits.grad.isfinite().all()


def test_class_weights_move_with_the_module_and_are_not_saved():
    loss = loss_of("cross_entropy", class_weights=[1.0, 2.0])
    assert loss.to("meta").class_weights.device.type == "meta"
    assert loss.state_dict() == {}


def test_balanced_weights_give_every_class_the_same_say():
    weights = balanced_weights([900, 90, 0, 10])
    assert weights[2] == 0
    assert weights[0] * 900 == pytest.approx(weights[1] * 90) == pytest.approx(weights[3] * 10)


def test_balanced_weights_have_mean_one_over_the_pixels():
    counts = [900, 90, 0, 10]
    weights = balanced_weights(counts)
    assert sum(w * n for w, n in zip(weights, counts, strict=True)) / sum(counts) == pytest.approx(1)
    assert balanced_weights([7, 7]) == [1.0, 1.0]


def test_balanced_weights_of_nothing_are_refused():
    with pytest.raises(DataError, match="labelled pixels"):
        balanced_weights([0, 0])


def test_overlap_counts_only_valid_pixels():
    probs = torch.stack([1 - HAND_PROBS, HAND_PROBS]).unsqueeze(0)
    valid = torch.tensor([[[True, False], [True, True]]])
    intersection, predicted, true = overlap(probs, HAND_TARGETS, valid)
    torch.testing.assert_close(intersection, torch.tensor([[0.5, 1.5]]))
    torch.testing.assert_close(predicted, torch.tensor([[1.0, 2.0]]))
    assert true.tolist() == [[1.0, 2.0]]


# --- the registry --------------------------------------------------------------------------------------------------


def test_unknown_loss_gets_a_suggestion():
    with pytest.raises(ConfigError, match=r"loss\.type: unknown name 'dise_loss'; did you mean 'dice_loss'\?"):
        loss_of("dise_loss")


@every_loss
def test_balanced_that_nobody_resolved_is_refused(word):
    with pytest.raises(ConfigError, match="balanced"):
        loss_of(word, class_weights="balanced")


def test_own_loss_is_registered_by_one_line(monkeypatch):
    class MyCustomLoss(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.ignored = config.ignore_index

    monkeypatch.setitem(LOSS_REGISTRY, "my_custom_loss", MyCustomLoss)
    assert loss_of("my_custom_loss", ignore_index=7).ignored == 7
