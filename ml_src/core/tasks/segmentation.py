"""What segmentation means: pairs of image and mask in, a label map out, scores from one confusion matrix."""

import logging
import math
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ml_src.core.config import Config
from ml_src.core.data import checks
from ml_src.core.data.labelled_images import LabelledImages
from ml_src.core.data.loaders import Batch, Loader
from ml_src.core.data.order import Order, ShareOfBatches
from ml_src.core.data.segmentation import SampleKey, SegmentationDataset
from ml_src.core.data.split_files import cache_path, is_empty, statistics_path
from ml_src.core.data.statistics import channel_statistics
from ml_src.core.errors import DataError
from ml_src.core.losses import build_loss
from ml_src.core.losses.segmentation import balanced_weights
from ml_src.core.metrics.segmentation import ConfusionMatrix, summarize
from ml_src.core.pictures import Image, side_by_side
from ml_src.core.progress import progress_bar
from ml_src.core.transforms import Pipeline
from ml_src.core.transforms.intensity import full_range

PANEL_ROWS, PANEL_SIDE = 4, 256
DEVICE_IGNORE = (
    -100
)  # in the masks on the device, whatever the files have: losses from elsewhere pass over it by default
FULL_RANGE = {torch.uint8: full_range("uint8"), torch.uint16: full_range("uint16")}  # of all others it is 1


log = logging.getLogger("ml_src")


class SegmentationMetric:
    """The confusion matrix of all batches so far, and the scores that follow from it."""

    def __init__(self, class_names: list[str], ignore_index: int) -> None:
        self.class_names, self.ignore_index = class_names, ignore_index
        self.confusion = ConfusionMatrix(len(class_names), DEVICE_IGNORE)

    @property
    def counts(self) -> Tensor:
        """The counts of all pairs of classes as a tensor: what a checkpoint keeps in the middle of an epoch."""
        return torch.as_tensor(self.confusion.counts)

    @counts.setter
    def counts(self, counts: Tensor) -> None:
        self.confusion.counts = counts

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Count logits (N, C, H, W) against masks (N, H, W), where DEVICE_IGNORE is passed over."""
        self.confusion.update(outputs.argmax(dim=1), targets)

    def compute(self) -> dict[str, float]:
        """Return iou, dice, pixel_accuracy, and iou/<class>, dice/<class>; NaN for an absent class."""
        scores = summarize(self.confusion.matrix, self.ignore_index)
        values = {"iou": scores["iou"], "dice": scores["dice"], "pixel_accuracy": scores["pixel_accuracy"]}
        for key, per_class in (("iou", scores["iou_per_class"]), ("dice", scores["dice_per_class"])):
            for name, value in zip(self.class_names, per_class, strict=True):
                values[f"{key}/{name}"] = math.nan if value is None else value
        return values


class Segmentation(LabelledImages):
    """The task `segmentation` of a configuration."""

    monitors: tuple[str, ...] = (
        "val_iou", "val_dice", "val_pixel_accuracy", "val_loss",
        "train_iou", "train_dice", "train_pixel_accuracy", "train_loss",
    )  # fmt: skip

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._statistics: dict[torch.device, list[Tensor]] = {}

    def settle(self) -> Config:
        """Return, and use from now on, the configuration with the statistics that it left to the training images."""
        if self.config.needs_statistics:
            images, channels = self.pairs("train").images, self.config.model.in_channels
            with progress_bar("reading images for their statistics", len(images)) as advance:
                found = channel_statistics(images, channels, statistics_path(self.config.splits_dir), advance)
            self.config = self.config.with_statistics(*found)
        return self.config

    def fingerprint(self, split: str) -> str:
        """Return a text that changes when an image or mask of the split does: names, sizes, times of change."""
        files = [(path, path.stat()) for pair in self.pairs(split) for path in (pair.image, pair.mask)]
        return " ".join(f"{path.name} {found.st_size} {found.st_mtime_ns}" for path, found in files)

    @cached_property
    def _train_counts(self) -> list[int]:
        facts = checks.scan(self.pairs("train"), cache_path(self.config.splits_dir))
        return checks.class_counts(facts, self.config.data.num_classes, self.ignore_index)

    def check_data(self) -> None:
        """Check every image and mask of the fold: what `ml-check` finds that would stop the training, or spoil it.

        Raises: DataError that names the files.
        """
        data, model = self.config.data, self.config.model
        parts = [self.pairs(split) for split in ("train", *self.measured_splits())]
        pairs = [pair for part in parts for pair in part]
        with progress_bar("reading masks", len(pairs)) as advance:
            facts = checks.scan(pairs, cache_path(self.config.splits_dir), advance)
        checks.check_masks(pairs, facts, data.num_classes, data.ignore_index)
        checks.check_images(pairs, facts, model.in_channels)
        self._train_counts = checks.class_counts(facts[: len(parts[0])], data.num_classes, self.ignore_index)
        if not any(self._train_counts):
            raise DataError(
                f"no pixel of the {len(parts[0])} training masks is labelled where its image has data: "
                f"look at them with ml-check {self.data_dir}"
            )
        num_alpha = sum(fact.alpha for fact in facts)
        if num_alpha:
            log.info("%d of %d images have an alpha channel, which is dropped", num_alpha, len(facts))

    def loader(
        self, split: str, order: Order | None = None, training: bool = False, pin_memory: bool = False
    ) -> Loader:
        """Return the batches of a split, in the order of the split where none is given."""
        transforms = self.train_transforms if training else self.val_transforms
        return self._batches(self._dataset(split, transforms), order, pin_memory)

    def _dataset(self, split: str, transforms: Pipeline, with_masks: bool = True) -> SegmentationDataset:
        channels = self.config.model.in_channels
        return SegmentationDataset(self.pairs(split), transforms, channels, self.config.seed, with_masks)

    def _batches(self, dataset: SegmentationDataset, order: Order | None = None, pin_memory: bool = False) -> Loader:
        training = self.config.training
        return Loader(
            dataset,
            order or ShareOfBatches(len(dataset), training.batch_size),
            seed=self.config.seed,
            num_workers=training.num_workers,
            pin_memory=pin_memory,
            ignore_index=self.ignore_index,
        )

    def criterion(self) -> nn.Module:
        """Return the loss, with `balanced` turned into the weights of the training masks."""
        loss = self.config.loss
        if loss.class_weights == "balanced":
            loss = loss.model_copy(update={"class_weights": balanced_weights(self._train_counts)})
        return build_loss(loss.model_copy(update={"ignore_index": DEVICE_IGNORE}))

    def prepare(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return images (N, C, H, W), normalised, and masks (N, H, W) int64 with DEVICE_IGNORE, on the device."""
        assert batch.masks is not None
        masks = batch.masks.to(device, non_blocking=True).long()
        return self.normalize(batch.images, device), masks.masked_fill_(masks == self.ignore_index, DEVICE_IGNORE)

    def normalize(self, images: Tensor, device: torch.device) -> Tensor:
        """Return images (N, C, H, W) of the files' number type as normalised float32 on the device."""
        if device not in self._statistics:  # once: each is a wait for the GPU
            both = (self.val_transforms.mean, self.val_transforms.std)
            self._statistics[device] = [torch.tensor(one, device=device).view(1, -1, 1, 1) for one in both]
        mean, std = self._statistics[device]
        scale = FULL_RANGE.get(images.dtype, 1.0)
        return (images.to(device, non_blocking=True).float() - mean * scale) / (std * scale)

    def metric(self) -> SegmentationMetric:
        """Return a metric that has counted nothing."""
        return SegmentationMetric(self.class_names, self.ignore_index)

    def measured_splits(self) -> list[str]:
        """Return `val`, and `test` unless ml-split was asked for none."""
        return ["val"] if is_empty(self.config.splits_dir, "test") else ["val", "test"]

    def findings(self, metrics: dict[str, float], reports: dict[str, dict[str, Any]]) -> list[str]:
        """Return the guide's signs of trouble that the numbers show, each with what to try."""
        return findings(self.class_names, self._train_counts, metrics, reports["val"], self.ignore_index)

    @torch.inference_mode()
    def panel(self, model: nn.Module, device: torch.device) -> Image:
        """Return rows of image | truth | prediction for validation samples spread evenly over the split."""
        model.eval()
        dataset = self._dataset("val", self.val_transforms)
        rows = []
        for index in np.unique(np.linspace(0, len(dataset) - 1, PANEL_ROWS).astype(int)):
            image, mask, _ = dataset[SampleKey(int(index))]
            pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
            labels = model(self.normalize(pixels, device))[0].argmax(dim=0).cpu().numpy()
            assert mask is not None
            every = -(-max(mask.shape) // PANEL_SIDE)  # a look is enough: whole pictures would fill the disk
            small = [image[::every, ::every], mask[::every, ::every], labels[::every, ::every]]
            rows.append(side_by_side(*small, ignore_index=self.ignore_index))
        width = max(row.shape[1] for row in rows)
        rows = [np.pad(row, ((0, 4), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
        return np.concatenate(rows)


def findings(
    class_names: list[str],
    train_counts: list[int],
    metrics: dict[str, float],
    val: dict[str, Any],
    ignore_index: int | None = None,
) -> list[str]:
    """Return what is worth a second look, in plain words.

    Args:
        class_names: one a class.
        train_counts: pixels of each class in the training masks.
        metrics: of the best epoch, with train_iou and val_iou.
        val: the report of the validation split.
        ignore_index: the class that is not learned, if it is one.
    """
    found = []
    gap = metrics.get("train_iou", math.nan) - metrics.get("val_iou", math.nan)
    if gap > 0.15:
        found.append(
            f"Overfitting: mean IoU is {metrics['train_iou']:.2f} on the training images and {metrics['val_iou']:.2f} "
            "on the validation images. Try more augmentation, model.dropout, optimizer.weight_decay or more images."
        )
    predicted = np.asarray(val["confusion_matrix"]).sum(axis=0)
    truth = np.asarray(val["confusion_matrix"]).sum(axis=1)
    best = max((value for value in val["iou_per_class"] if value is not None), default=0.0)
    absent, silent, low = [], [], []
    for index, (name, value) in enumerate(zip(class_names, val["iou_per_class"], strict=True)):
        share = train_counts[index] / max(sum(train_counts), 1)
        if index == ignore_index:
            continue
        if share == 0:
            absent.append(f"{index} ({name})")
        elif truth[index] > 0 and predicted[index] == 0:
            silent.append(f"{index} ({name}, {share:.1%} of the training pixels)")
        elif value is not None and value < 0.3 and value < 0.6 * best:
            low.append(f"{index} ({name}, IoU {value:.2f}, {share:.1%} of the training pixels)")
    if absent:
        found.append(
            f"No pixel in the training masks has class {', '.join(absent)}. Check the values of the masks and "
            "num_classes, or split again with --stratified."
        )
    if silent:
        found.append(
            f"Never predicted: class {', '.join(silent)}. Train longer, try class_weights: balanced or another loss, "
            "and check the masks."
        )
    if low:
        found.append(
            f"Very low IoU: class {', '.join(low)}. Class imbalance or poor masks: try class_weights: balanced or "
            "dice_loss, and look at the overlays."
        )
    accuracy, mean = val["pixel_accuracy"], val["iou"]
    if accuracy is not None and mean is not None and accuracy > 0.85 and mean < 0.6:
        common = class_names[int(np.argmax(truth))]
        found.append(
            f"Pixel accuracy is {accuracy:.2f} but mean IoU only {mean:.2f}: the model predicts mostly {common}. "
            "Judge it by IoU and Dice, and try dice_loss."
        )
    return found
