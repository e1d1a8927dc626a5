"""What one image can do to a private step: a search for more than the clip norm, and the checks that refuse it."""

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ml_src.core.config import LossConfig
from ml_src.core.config_file import parse_config
from ml_src.core.errors import ConfigError, TrainingError
from ml_src.core.losses import build_loss
from ml_src.core.losses.segmentation import LOSS_REGISTRY, SegmentationLoss
from ml_src.core.network.custom import MODEL_REGISTRY, SimpleUNet
from ml_src.core.tasks import task_for
from ml_src.core.trainers import build_training, choose_backend, train
from ml_src.core.trainers.dp import DP, Noise, private_optimizer
from ml_src.core.trainers.dp.coupling import require_uncoupled
from ml_src.core.trainers.loop import fit
from ml_src.core.trainers.training import Training

Criterion = Callable[[Tensor, Tensor], Tensor]
BUILT_IN = ["dice_loss", "dice_bce_loss", "iou_loss", "cross_entropy", "focal_loss"]
CLIPPINGS = ["flat", "per_layer", "adaptive"]
UNEVEN = [0.2, 1.0, 5.0]
IGNORED = -100
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    models, losses = dict(MODEL_REGISTRY), dict(LOSS_REGISTRY)
    yield
    for registry, before in ((MODEL_REGISTRY, models), (LOSS_REGISTRY, losses)):
        registry.clear()
        registry.update(before)


@pytest.fixture
def raw(small_config: dict[str, Any]) -> dict[str, Any]:
    """Private training without noise: what is clipped can be seen."""
    small_config["transforms"]["train"] = [{"type": "normalize", "mean": [0.5], "std": [0.25]}]
    small_config["training"] |= {"trainer_type": "dp", "device": "cpu", "num_epochs": 1}
    small_config["training"]["dp"] = {"noise_multiplier": 0.0, "accountant": "rdp"}
    small_config["optimizer"] = {"type": "sgd", "lr": 1.0, "momentum": 0.0}
    return small_config


def training_of(raw: dict[str, Any], **overrides: Any) -> Training:
    config = parse_config(raw, overrides)
    training = build_training(config, task_for(config), choose_backend(config), config.run_dir)
    training.callbacks = []
    return training


def built(name: str, weights: list[float] | None = None, **others: Any) -> nn.Module:
    """The loss as a task builds it: with the value that ignored pixels have on the device."""
    config = LossConfig(type=name, class_weights=weights, **others)
    return build_loss(config.model_copy(update={"ignore_index": IGNORED}))


# What couples the images of a batch


class BatchDice(nn.Module):
    """Sums over the batch before it divides."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        valid = (targets != IGNORED).unsqueeze(1)
        true = F.one_hot(targets.clamp(min=0), logits.shape[1]).movedim(-1, 1) * valid
        probs = logits.softmax(1) * valid
        return 1 - (2 * (probs * true).sum((0, 2, 3)) / (probs + true).sum((0, 2, 3)).clamp(min=1)).mean()


class MeanOverLabelled(nn.Module):
    """The loss of each image alone, but divided by the number of images that have labels."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        per_image = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none").mean((1, 2))
        return per_image.sum() / (targets != IGNORED).any(2).any(1).sum().clamp(min=1)


class PresentInBatch(nn.Module):
    """A Dice for each image, averaged over the classes that any image of the batch has."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        valid = (targets != IGNORED).unsqueeze(1)
        true = F.one_hot(targets.clamp(min=0), logits.shape[1]).movedim(-1, 1) * valid
        probs = logits.softmax(1) * valid
        dice = 2 * (probs * true).sum((2, 3)) / (probs + true).sum((2, 3)).clamp(min=1e-6)  # (N, C)
        return 1 - dice[:, true.sum((0, 2, 3)) > 0].mean()


class HardPixels(nn.Module):
    """The mean of the worst quarter of the batch's pixels."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none").flatten()
        return losses.topk(len(losses) // 4).values.mean()


class SurePixels(nn.Module):
    """The mean over the pixels of the batch that are predicted with a probability above 0.98."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        sure = logits.softmax(1).amax(1) > 0.98
        return (losses * sure).sum() / sure.sum().clamp(min=1)


class Memory(nn.Module):
    """Weighs classes by how often it has seen them so far."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(3))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, targets, 1 / self.seen, ignore_index=IGNORED, reduction="none").mean()
        self.seen += targets[targets != IGNORED].bincount(minlength=3)
        return loss


COUPLED: dict[str, Callable[[], nn.Module]] = {
    "batch_dice": BatchDice,
    "ce_over_batch": lambda: nn.CrossEntropyLoss(ignore_index=IGNORED),
    "weighted_ce_over_batch": lambda: nn.CrossEntropyLoss(torch.tensor(UNEVEN), ignore_index=IGNORED),
    "mean_over_labelled": MeanOverLabelled,
    "present_in_batch": PresentInBatch,
    "hard_pixels": HardPixels,
    "sure_pixels": SurePixels,
    "memory": Memory,
}


@pytest.mark.parametrize("name", COUPLED)
def test_a_loss_that_couples_images_is_refused_with_the_reason_and_the_alternative(name: str) -> None:
    sentence = rf"'{name}' couples the images.*clipping each gradient would not bound.*mean over images.*dice_loss"
    with pytest.raises(ConfigError, match=sentence):
        require_uncoupled(COUPLED[name](), name, 3)


def refusal(criterion: nn.Module, name: str, num_classes: int) -> str:
    """The sentence with which a loss is refused, "" where it is accepted."""
    try:
        require_uncoupled(criterion, name, num_classes)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("weights", [None, UNEVEN, [0.0, 1.0, 1.0]])
def test_every_loss_of_ours_is_accepted(name: str, weights: list[float] | None) -> None:
    assert set(BUILT_IN) == set(LOSS_REGISTRY)
    assert refusal(built(name, weights), name, 3) == ""


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (1.0, 0.0), (0.7, 0.5), (1.0, 5.0)])
@pytest.mark.parametrize("num_classes", [2, 3, 20])
def test_focal_parameters_and_numbers_of_classes_are_accepted(alpha: float, gamma: float, num_classes: int) -> None:
    criterion = built("focal_loss", None, focal={"alpha": alpha, "gamma": gamma})
    assert refusal(criterion, "focal_loss", num_classes) == ""


class PerImage(nn.Module):
    """The mean over images of what each costs, 0 / 0 where it has no labels."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none").sum((1, 2))
        return (losses / (targets != IGNORED).sum((1, 2))).mean()


class NoIgnore(nn.Module):
    """Cannot take an ignored pixel, which it never meets where there is none."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(logits.softmax(1), F.one_hot(targets, logits.shape[1]).movedim(-1, 1).float())


@pytest.mark.parametrize("criterion", [PerImage(), NoIgnore()])
def test_an_uncoupled_loss_from_elsewhere_is_accepted(criterion: nn.Module) -> None:
    assert refusal(criterion, "mine", 3) == ""


def test_a_coupled_loss_of_a_plugin_stops_before_a_run_folder_is_made(raw: dict[str, Any]) -> None:
    Path("mine.py").write_text(
        "from torch import nn\nfrom ml_src.core.losses.segmentation import LOSS_REGISTRY\n"
        "class Mine(nn.CrossEntropyLoss):\n    def __init__(self, config):\n"
        "        super().__init__(ignore_index=config.ignore_index)\n"
        "LOSS_REGISTRY['mine'] = Mine\n"
    )
    with pytest.raises(ConfigError, match=r"loss\.type 'mine' couples the images"):
        train(parse_config(raw, {"plugins": ["mine.py"], "loss.type": "mine"}))
    assert not Path("runs").exists()


# The search


class Clippings:
    """Takes the place of a backend's optimizer: notes what each kind of clipping would make of a batch's gradients."""

    def __init__(self, params: list[nn.Parameter], norms: list[float]) -> None:
        self.params, self.norms = params, norms
        self.sums: dict[tuple[str, float], Tensor] = {}

    def clip_and_accumulate(self) -> None:
        grads = [p.grad_sample for p in self.params]
        if not self.norms:
            typical = float(torch.cat([grad.flatten(1) for grad in grads], dim=1).norm(dim=1).median())
            self.norms = [factor * max(typical, 1e-6) for factor in (0.5, 1.1, 2.0)]  # all, some and few are clipped
        for clipping, norm in product(CLIPPINGS, self.norms):
            sgd = torch.optim.SGD(self.params, lr=1.0)
            optimizer = private_optimizer(clipping, sgd, Noise(0), 0.0, norm, 4.0)
            for p, grad in zip(self.params, grads, strict=True):
                p.grad_sample = grad.clone()
            optimizer.clip_and_accumulate()
            self.sums[clipping, norm] = torch.cat([p.summed_grad.flatten() for p in self.params])
            optimizer.zero_grad()


class Rig:
    """A private network and the way of its gradients to the noise, for batches that can be made up."""

    def __init__(self, raw: dict[str, Any]) -> None:
        training = training_of(raw, **{"training.batch_size": 16})
        assert isinstance(training.backend, DP)
        self.backend, self.model, self.network = training.backend, training.model.train(), training.network
        images, masks = training.task.prepare(next(training.task.loader("train").epoch()), CPU)
        self.images, self.masks = images[..., ::2, ::2], masks[..., ::2, ::2]  # nine of 32x32

    def batch(self, seed: int, kind: str) -> tuple[Tensor, Tensor]:
        """A new network, one image and five copies of another: what couples them acts on all copies alike.

        Of the first image, or of the others, most rows are ignored, or all of it; or it has a class of its own.
        """
        torch.manual_seed(seed)
        for layer in self.network.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                layer.reset_parameters()
        chosen = torch.randperm(len(self.images))[:2].repeat_interleave(torch.tensor([1, 5]))
        masks = self.masks[chosen]
        match kind:
            case "rows":
                masks[0, :26] = IGNORED
            case "image":
                masks[0] = IGNORED
            case "others' rows":
                masks[1:, :26] = IGNORED
            case "rare":
                masks[0], masks[1:] = 2, masks[1:] % 2
        return self.images[chosen], masks

    def sums(self, criterion: Criterion, images: Tensor, masks: Tensor, norms: list[float]) -> Clippings:
        """The sums of clipped gradients, as the backend has them before it adds noise."""
        found = Clippings([*self.network.parameters()], norms)
        self.backend.optimizer = found
        self.backend.backward(criterion(self.model(images), masks), len(images), len(images))
        return found


def worst(rig: Rig, criterion: Criterion, seeds: range) -> float:
    """The largest change of a step's sum, in clip norms, that the search finds by leaving out an image."""
    found = 0.0
    for seed, kind in product(seeds, ("rows", "image", "others' rows", "rare")):
        images, masks = rig.batch(seed, kind)
        whole = rig.sums(criterion, images, masks, [])
        for kept in ([1, 2, 3, 4, 5], [0, 1, 2, 3, 4]):
            part = rig.sums(criterion, images[kept], masks[kept], whole.norms)
            changes = [float((whole.sums[key] - part.sums[key]).norm()) / key[1] for key in whole.sums]
            found = max(found, *changes)
    return found


@pytest.fixture
def rig(raw: dict[str, Any]) -> Rig:
    return Rig(raw)


@pytest.mark.parametrize("weights", [None, UNEVEN])
@pytest.mark.parametrize("name", BUILT_IN)
def test_no_image_moves_a_step_by_more_than_the_clip_norm(rig: Rig, name: str, weights: list[float] | None) -> None:
    """For every clipping, with none to all of the images clipped; adaptive: before its norm has moved."""
    found = worst(rig, built(name, weights), range(2))
    assert 0.9 < found <= 1 + 1e-5


@pytest.mark.parametrize("name", ["batch_dice", "ce_over_batch", "weighted_ce_over_batch"])
def test_the_search_is_not_blind(rig: Rig, name: str) -> None:
    """Losses that are refused, with the refusal passed over: the search finds 1.4, 1.9 and 3.0 clip norms."""
    assert worst(rig, COUPLED[name](), range(1)) > 1.2


def test_leaving_out_an_image_moves_the_weights_by_at_most_the_clip_norm(raw: dict[str, Any], sample_dir: Path) -> None:
    """The whole way: files, loader, physical batches, loop, optimizer. With a sample rate of 1 everyone takes part."""
    lines = {path.name: path.read_text() for path in (sample_dir / "splits").glob("*.txt")}
    moved = {}
    for left_out in (0, 1):
        splits_dir = Path(f"without_{left_out}")
        splits_dir.mkdir()
        for name, text in lines.items():
            kept = text.splitlines(keepends=True)[left_out if name.startswith("fold_0_train") else 0 :]
            (splits_dir / name).write_text("".join(kept))
        private = {"noise_multiplier": 0.0, "max_grad_norm": 0.1, "max_physical_batch_size": 4, "accountant": "rdp"}
        changes = {"data.splits_dir": str(splits_dir), "training.batch_size": 16, "training.dp": private}
        training = training_of(raw, **changes)
        before = [p.detach().clone() for p in training.network.parameters()]
        fit(training)
        after = training.network.parameters()
        assert isinstance(training.backend, DP) and training.backend.order.expected_size == 9 - left_out
        change = torch.cat([(a - b).flatten() for a, b in zip(before, after, strict=True)])
        moved[left_out] = change.detach() * training.backend.order.expected_size
    assert 0.0999 <= (moved[0] - moved[1]).norm() <= 0.1 * (1 + 1e-4)  # the weights that carry it are rounded


# The form for each image


@pytest.mark.parametrize("weights", [None, UNEVEN, [0.0, 1.0, 1.0]])
@pytest.mark.parametrize("name", BUILT_IN)
def test_the_loss_of_a_batch_is_the_mean_of_its_images_losses_and_so_are_the_gradients(
    name: str, weights: list[float] | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    criterion = built(name, weights)
    assert isinstance(criterion, SegmentationLoss)
    for ignored in ([0, 0, 0], [9, 3, 0], [16, 0, 7]):  # rows of each image; 16 are all of it
        logits = 3 * torch.randn(3, 3, 16, 16, generator=generator)
        targets = torch.randint(3, (3, 16, 16), generator=generator)
        targets[1, 4:] = 1
        for index, rows in enumerate(ignored):
            targets[index, :rows] = IGNORED
        together, one_by_one = (logits.clone().requires_grad_() for _ in range(2))
        loss = criterion(together, targets)
        alone = torch.stack([criterion(one_by_one[i : i + 1], targets[i : i + 1]) for i in range(3)])
        loss.backward()
        alone.mean().backward()
        torch.testing.assert_close(loss, alone.mean(), atol=1e-6, rtol=0)
        torch.testing.assert_close(criterion.per_sample(logits, targets), alone.detach(), atol=1e-6, rtol=0)
        torch.testing.assert_close(together.grad, one_by_one.grad, atol=1e-6, rtol=1e-5)
        assert all((one_by_one.grad[i].abs().sum() == 0) == (ignored[i] == 16) for i in range(3))


# Networks


class Net(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, in_channels: int, num_classes: int, **_: object) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(in_channels, 4, 3, padding=1), nn.Conv2d(4, num_classes, 1)
        self.between = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.between(self.first(images)))


class Centred(Net):
    """Takes the mean of the batch away; the backward pass does not see it."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        return self.last(x - x.detach().mean(0))


class FunctionalNorm(Net):
    """A batch normalisation that is no layer."""

    def forward(self, images: Tensor) -> Tensor:
        return self.last(F.batch_norm(self.first(images), None, None, training=True))


class Tracking(Net):
    """Keeps running statistics, and has no weights."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.between = nn.InstanceNorm2d(4, track_running_stats=True)


class Remembers(Net):
    """Keeps the mean of what it has seen."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, images: Tensor) -> Tensor:
        self.mean += images.mean((0, 2, 3))
        return super().forward(images)


class Recurrent(Net):
    """Reads the rows with an LSTM."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.lstm = nn.LSTM(4, 4, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        rows, _ = self.lstm(x.mean(3).mT)  # (N, H, 4)
        return self.last(x + rows.mT.unsqueeze(3))


class Folds(Net):
    """Treats each quarter of an image as an image."""

    def forward(self, images: Tensor) -> Tensor:
        n, c, h, w = images.shape
        quarters = images.reshape(n * 4, c, h // 4, w)
        return super().forward(quarters).reshape(n, -1, h, w)


class Unused(Net):
    """Has a layer that nothing goes through."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.spare = nn.Conv2d(4, 4, 1)


class Separate(Net):
    """All of this looks at one image at a time."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.between = nn.Sequential(nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True), nn.ReLU(inplace=True))
        self.offset = nn.Module()
        self.offset.register_buffer("ramp", torch.linspace(0, 1, 4).view(1, 4, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.last(F.dropout2d(self.between(self.first(images)), 0.5, self.training) + self.offset.ramp)


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        (Centred, "what it makes of an image depends on the others of its batch"),
        (FunctionalNorm, "what it makes of an image depends on the others of its batch"),
        (Tracking, r"between \(InstanceNorm2d\) keeps statistics, or has no gradient for each image"),
        (Remembers, "images leave a mark on its buffers"),
        (Recurrent, r"lstm \(LSTM\) keeps statistics, or has no gradient for each image"),
    ],
)
def test_a_network_that_cannot_be_private_is_refused_in_a_sentence(
    raw: dict[str, Any], network: type[nn.Module], sentence: str
) -> None:
    MODEL_REGISTRY["mine"] = network
    with pytest.raises(ConfigError, match=rf"'mine' cannot be trained with trainer_type dp: {sentence}.*;") as refusal:
        training_of(raw, **{"model.custom_architecture": "mine"})
    assert "\n" not in str(refusal.value) and ". " not in str(refusal.value)


@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize(("network", "layer"), [(Folds, "first.weight"), (Unused, "spare.weight")])
def test_a_layer_whose_gradients_are_not_one_an_image_ends_training_before_the_first_step(
    raw: dict[str, Any], network: type[nn.Module], layer: str, clipping: str
) -> None:
    """Clipped quarter by quarter, an image would move the sum by four clip norms."""
    MODEL_REGISTRY["mine"] = network
    sizes = {"training.batch_size": 16}
    training = training_of(raw, **{"model.custom_architecture": "mine", "training.dp.clipping": clipping, **sizes})
    with pytest.raises(TrainingError, match=rf"the weights {layer} of .*'mine' have no gradient for each of 8 images"):
        fit(training)


def test_a_network_that_looks_at_one_image_at_a_time_is_trained(raw: dict[str, Any]) -> None:
    MODEL_REGISTRY["mine"] = Separate
    training = training_of(raw, **{"model.custom_architecture": "mine"})
    assert isinstance(training.backend, DP) and training.backend.converted == ["between.0"]
    fit(training)
    assert training.progress.step == 3


def test_the_checks_draw_no_random_number_of_the_run(raw: dict[str, Any]) -> None:
    """Weights and dropout of a private run start as they would without the checks."""
    training = training_of(raw)
    torch.manual_seed(training.config.seed)
    SimpleUNet(in_channels=3, num_classes=3, base_channels=4)
    state = torch.get_rng_state()
    training_of(raw)
    assert torch.equal(torch.get_rng_state(), state)
