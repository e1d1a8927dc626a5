"""Looks at a folder of images and masks and writes a configuration that says why each value is there."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

from ml_src.core.config import Config
from ml_src.core.config_file import parse_config
from ml_src.core.data import checks
from ml_src.core.data.files import Pair, find_pairs, image_info, read_class_names
from ml_src.core.data.split_files import cache_path, pairs_of_split, read_split
from ml_src.core.data.statistics import channel_moments, normalisation
from ml_src.core.errors import DataError

MAX_SIDE = 512
STATISTICS_IMAGES = 200


@dataclass(frozen=True)
class Description:
    """What a data set is like."""

    data_dir: Path
    num_images: int
    num_training: int  # about, in a fold
    sizes: list[tuple[int, int]]  # height, width of each image
    channels: int
    dtype: str  # of the pixels
    mean: list[float] | str  # per channel, 0..1; "data": to be computed when training starts
    std: list[float] | str
    geo: bool  # all are GeoTIFFs, whose pixels have a size on the ground
    class_names: list[str]
    named: bool  # the names come from classes.txt
    shares: list[float]  # of the labelled pixels, per class
    ignore_index: int | None  # the value of unlabelled pixels
    ignored: float  # their share of all pixels
    folds: int  # 0: not split yet
    splits_dir: Path


def describe(data_dir: Path, splits_dir: Path | None = None) -> Description:
    """Read every mask, every image's header and the pixels of up to 200 images.

    Raises: DataError where the folder is not a data set that can be trained on.
    """
    splits_dir = splits_dir or data_dir / "splits"
    pairs = pairs_of_split(splits_dir, data_dir) or find_pairs(data_dir / "images", data_dir / "masks")
    facts = checks.scan(pairs, cache_path(splits_dir) if splits_dir.is_dir() else None)
    checks.check_files(pairs, facts)
    infos = [image_info(pair.image) for pair in pairs]
    channels = max(info.channels for info in infos)
    checks.check_images(pairs, facts, channels)
    names = read_class_names(data_dir)
    values = set().union(*(fact.counts for fact in facts))
    ignore_index = checks.unlabelled_value(values, names)
    largest = max((value for value in values if value != ignore_index), default=0)
    num_classes = len(names) if names else largest + 1
    if values == {0, checks.UNLABELLED} and ignore_index == checks.UNLABELLED:
        raise DataError(
            f"the masks in {data_dir / 'masks'} have the values 0 and 255 only: write class 1 as 1, not 255; "
            f"ml-check {data_dir} --fix does it"
        )
    if num_classes < 2:
        raise DataError(f"the masks in {data_dir / 'masks'} know one class only: draw and name a second")
    checks.check_masks(pairs, facts, num_classes, ignore_index)
    counts = checks.class_counts(facts, num_classes, ignore_index)
    if not any(counts):
        raise DataError(f"the masks in {data_dir / 'masks'} have no labelled pixel, only {ignore_index}")
    pixels = sum(sum(fact.counts.values()) for fact in facts)
    mean: list[float] | str = "data"
    std: list[float] | str = "data"
    if channels in (1, 3) and infos[0].dtype == "uint8":
        mean, std = sampled_statistics(pairs, channels)
    folds = len(list(splits_dir.glob("fold_*_train_images.txt")))
    return Description(
        data_dir=data_dir,
        num_images=len(pairs),
        num_training=len(read_split(splits_dir, data_dir, "fold_0_train")) if folds else len(pairs) * 2 // 3,
        sizes=[(info.height, info.width) for info in infos],
        channels=channels,
        dtype=infos[0].dtype,
        mean=mean,
        std=std,
        geo=all(info.geo for info in infos),
        class_names=names or ["background", *(f"class_{index}" for index in range(1, num_classes))],
        named=bool(names),
        shares=[count / max(sum(counts), 1) for count in counts],
        ignore_index=ignore_index,
        ignored=1 - sum(counts) / pixels,
        folds=folds,
        splits_dir=splits_dir,
    )


def sampled_statistics(pairs: Sequence[Pair], channels: int) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel, as shares of the full range, over at most 200 images."""
    chosen = np.unique(np.linspace(0, len(pairs) - 1, STATISTICS_IMAGES).astype(int))
    mean, std = normalisation(*channel_moments([pairs[index].image for index in chosen], channels))
    return [round(value, 4) for value in mean], [max(round(value, 4), 0.001) for value in std]


def choose(data: Description, overrides: Mapping[str, Any]) -> tuple[Config, dict[str, str]]:
    """Return a configuration for the data set, and for each key that was chosen the reason why."""
    gpu = shutil.which("nvidia-smi") is not None
    height, width = training_size(data.sizes)
    same = len(set(data.sizes)) == 1
    side = scene_crop(data, gpu)
    fit: dict[str, Any] = {"type": "resize", "size": [height, width]}
    num_samples = 1
    if side is not None:  # the ground's resolution stays as it is: a house of ten pixels is one everywhere
        fit = {"type": "random_crop", "size": [side, side]}
        num_samples = max(1, round(median(h * w for h, w in data.sizes) / side**2))
    batch = int(np.clip(data.num_training * num_samples // 10, 2, 8))
    normalize = {"type": "normalize", "mean": data.mean, "std": data.std}
    rarest = min(share for share in data.shares if share > 0)
    raw: dict[str, Any] = {
        "data": {
            "task": "segmentation",
            "data_dir": data.data_dir.as_posix(),
            "num_classes": len(data.class_names),
            "class_names": data.class_names,
            "fold": 0,
        },
        "model": {
            "type": "custom",
            "custom_architecture": "simple_unet",
            "in_channels": data.channels,
            "num_classes": len(data.class_names),
            "base_channels": 64 if gpu else 16,
            "dropout": 0.1,
        },
        "loss": {"type": "dice_bce_loss", "dice_bce": {"dice_weight": 0.7, "bce_weight": 0.3}},
        "training": {
            "trainer_type": "standard",
            "batch_size": batch,
            "num_epochs": 100,
            "num_workers": 4 if gpu else 2,
            "callbacks": [
                {"type": "early_stopping", "monitor": "val_iou", "patience": 20, "mode": "max"},
                {"type": "model_checkpoint", "monitor": "val_iou", "mode": "max"},
            ],
        },
        "optimizer": {"type": "adam", "lr": 0.001},
        "scheduler": {"type": "cosine"},
        "transforms": {
            "train": [
                fit,
                {"type": "random_horizontal_flip", "p": 0.5},
                {"type": "random_vertical_flip", "p": 0.5},
                {"type": "random_rotation", "degrees": 15},
                {"type": "random_brightness_contrast", "brightness": 0.2, "contrast": 0.2},
                normalize,
            ],
            "val": [fit, normalize] if side is None else [normalize],
        },
    }
    if num_samples > 1:
        raw["data"]["samples_per_image"] = num_samples
    if data.ignore_index is not None:
        raw["data"]["ignore_index"] = data.ignore_index
    if data.splits_dir != data.data_dir / "splits":
        raw["data"]["splits_dir"] = data.splits_dir.as_posix()
    by_name = data.ignore_index in range(len(data.class_names)) and "taken as unlabelled by the name of this class"
    smallest, largest = min(data.sizes), max(data.sizes)
    reasons = {
        "data.num_classes": "from classes.txt" if data.named else "largest value in the masks, plus one",
        "data.class_names": "from classes.txt" if data.named else "write your own, or put them into classes.txt",
        "data.ignore_index": f"{data.ignored:.1%} of the mask pixels: {by_name or 'taken as unlabelled'}",
        "data.fold": f"one of {data.folds}; ml-train --fold K trains another" if data.folds else "run ml-split first",
        "data.samples_per_image": "so many crops cover an image about once an epoch",
        "model.in_channels": {1: "the images are gray", 3: "the images are in colour"}.get(
            data.channels, "the bands of the images"
        ),
        "model.base_channels": "the full width: there is a GPU"
        if gpu
        else "a quarter of the full width (64), which trains about ten times as fast: there is no GPU here",
        "loss.type": f"Dice minds the rarest class ({rarest:.1%} of the pixels), BCE steadies it",
        "training.batch_size": f"about ten steps or more an epoch, of {data.num_training} training images",
        "training.num_epochs": "at most: early_stopping ends it sooner",
        "transforms.train": "in order; all geometry together is one resampling",
        "transforms.train.resize": f"all images have this size, {smallest[0]}x{smallest[1]}"
        if same and smallest == (height, width)
        else f"images are {smallest[0]}x{smallest[1]} to {largest[0]}x{largest[1]}; predictions are scaled back",
        "transforms.train.random_crop": "read from the scenes at their own resolution; validation sees them whole",
        "transforms.train.random_vertical_flip": "remove it where up and down differ, as in street scenes",
        "transforms.train.normalize": "of the training images, computed when training starts"
        if data.mean == "data"
        else "mean and standard deviation of these images",
    }
    return parse_config(raw, overrides, source="the command line"), reasons | dict.fromkeys(overrides, "your choice")


def scene_crop(data: Description, gpu: bool) -> int | None:
    """Return the side of the crops where all images are GeoTIFFs larger than that, else None."""
    side = 512 if gpu else 256
    return side if data.geo and min(min(size) for size in data.sizes) > side else None


def training_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the median height and width, at most 512 on the longer side, in multiples of 16 where they vary."""
    height, width = (float(median(size[axis] for size in sizes)) for axis in (0, 1))
    shrink = min(1.0, MAX_SIDE / max(height, width))
    if shrink == 1.0 and len(set(sizes)) == 1:
        return sizes[0]
    return max(16, round(height * shrink / 16) * 16), max(16, round(width * shrink / 16) * 16)


def starter_yaml(config: Config, reasons: Mapping[str, str], schema_name: str) -> str:
    """Return the configuration as YAML, each chosen value with its reason behind it."""
    plain = config.model_dump(mode="json", exclude_unset=True)
    plain.get("loss", {}).pop("ignore_index", None)
    lines = [f"# yaml-language-server: $schema={schema_name}"]
    lines.append(f"# Written by ml-init-config from {config.data.data_dir}. docs/configuration.md lists every key.")
    for section, values in plain.items():
        if not isinstance(values, dict):
            lines.append(f"{section}: {_inline(values)}")
            continue
        lines += ["", f"{section}:"]
        for key, value in values.items():
            lines += _entry(f"{section}.{key}", key, value, reasons)
    return "\n".join(lines) + "\n"


def _entry(path: str, key: str, value: Any, reasons: Mapping[str, str]) -> list[str]:
    reason = f"  # {reasons[path]}" if path in reasons else ""
    if not (isinstance(value, list) and value and isinstance(value[0], dict)):
        return [f"  {key}: {_inline(value)}{reason}"]
    lines = [f"  {key}:{reason}"]
    for item in value:
        why = reasons.get(f"{path}.{item['type']}")
        lines.append(f"    - {_inline(item)}" + (f"  # {why}" if why else ""))
    return lines


def _inline(value: Any) -> str:
    if isinstance(value, dict) and "type" in value:
        value = {"type": value["type"], **value}
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000, allow_unicode=True)
    return text.strip().removesuffix("\n...").strip()
