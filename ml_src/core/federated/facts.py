"""The fingerprint of a federation: what all sites' images have in common, summed up without a pixel leaving a site.

From it every site normalises alike, and `class_weights: balanced` balances the classes of all sites together.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from ml_src.core.config import Config
from ml_src.core.data import checks, split_files
from ml_src.core.data.files import read_class_names
from ml_src.core.data.labelled_images import LabelledImages
from ml_src.core.data.statistics import Moments, channel_moments, normalisation
from ml_src.core.errors import DataError, TrainingError
from ml_src.core.federated_specs import Positive
from ml_src.core.transform_specs import Section

MOST_CLASSES = 65535
SECTIONS = ("seed", "model", "loss", "training", "optimizer", "scheduler", "transforms", "federated")
LOCAL = (  # what each side may choose for itself
    ("training", "dp"),
    ("training", "device"),
    ("training", "num_workers"),
    ("training", "pin_memory"),
    ("federated", "rounds"),
    ("federated", "num_sites"),  # of the kits, of which one may be taken out
    ("federated", "min_sites"),
    ("federated", "round_timeout"),
)
Count = Annotated[int, Field(ge=0, lt=2**53)]


class ChannelSums(Section):
    """`Moments` of all training images as plain data, (channels,) each, and the number type of the files."""

    count: list[float]
    mean: list[float]
    squares: list[float]
    dtype: str

    @model_validator(mode="after")
    def _agree(self) -> "ChannelSums":
        if not 0 < len(self.count) == len(self.mean) == len(self.squares):
            raise ValueError("count, mean and squares have one number a channel")
        return self

    def moments(self) -> Moments:
        """Return them as arrays."""
        return Moments(*(np.array(values, np.float64) for values in (self.count, self.mean, self.squares)))


class Facts(Section):
    """What a site tells of its images before the first round; sums and numbers of files, no pixel."""

    num_classes: Positive
    class_names: list[str] | None  # of classes.txt, or of the configuration; None where both are silent
    ignore_index: int | None
    num_images: dict[Literal["train", "val", "test"], Positive]  # no test where the split has none
    class_counts: list[Count] = Field(max_length=MOST_CLASSES)  # pixels of the training masks; none under dp
    sizes: dict[str, Count] = Field(max_length=10_000)  # "height x width" -> training images; none under dp
    channels: ChannelSums | None  # None where the configuration has mean and std
    sections: dict[str, str] = Field(default={}, max_length=20)  # digests of what must be the same at all sites


def sections_of(config: Config) -> dict[str, str]:
    """Return a digest of each section that must be the same at all sites, by its name."""
    whole = config.model_dump(mode="json", include=set(SECTIONS))
    for section, key in LOCAL:
        (whole[section] or {}).pop(key)
    return {name: hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest() for name, part in whole.items()}


def collect(config: Config, sections: dict[str, str]) -> Facts:
    """Return the facts of a site's data; under dp only how many images there are.

    Args:
        config: the site's, with its own data; trainer_type is that of the site.
        sections: see `sections_of`.
    """
    data, is_private = LabelledImages(config), config.training.trainer_type == "dp"
    parts = ["train", "val"] + ["test"] * (not split_files.is_empty(config.splits_dir, "test"))
    facts = checks.scan(data.pairs("train"), split_files.cache_path(config.splits_dir))
    counts = checks.class_counts(facts, config.data.num_classes, config.data.ignore_index)
    sizes = Counter(f"{fact.image_height} x {fact.image_width}" for fact in facts)
    return Facts(
        num_classes=config.data.num_classes,
        class_names=read_class_names(data.data_dir) or config.data.class_names,
        ignore_index=config.data.ignore_index,
        num_images={part: data.num_images(part) for part in parts},
        class_counts=[] if is_private else counts,
        sizes={} if is_private else dict(sizes.most_common(1000)),
        channels=_channel_sums(config, data) if config.needs_statistics else None,
        sections=sections,
    )


def _channel_sums(config: Config, data: LabelledImages) -> ChannelSums:
    moments, dtype = channel_moments(data.pairs("train").images, config.model.in_channels)
    plain = (values.tolist() for values in (moments.count, moments.mean, moments.squares))
    return ChannelSums(**dict(zip(("count", "mean", "squares"), plain, strict=True)), dtype=dtype)


class Fingerprint(Section):
    """All sites together."""

    num_images: dict[str, int]  # training images of each site, by name
    class_names: list[str] | None
    class_counts: list[int]
    sizes: dict[str, int]
    mean: list[float] | None = None  # for normalize, where the configuration left it to the data
    std: list[float] | None = None
    dtype: str | None = None  # of the files, where the statistics are theirs


def parse(values: object, site: str) -> Facts:
    """Return the facts that a site has sent.

    Raises: TrainingError where they are none.
    """
    try:
        facts = Facts.model_validate(values)
        if not {"train", "val"} <= set(facts.num_images):
            raise TrainingError(f"{site} has no training or no validation images: split its data again")
        return facts
    except ValidationError as error:
        raise TrainingError(f"{site} sent facts that cannot be read: give all sites the same version") from error


def merge(facts: dict[str, Facts], config: Config) -> Fingerprint:
    """Sum up the facts of all sites, in the order of their names.

    Raises: DataError that names the sites which differ in their classes, channels or number types.
    """
    names = sorted(facts)
    known = {"the configuration": config.data.class_names} if config.data.class_names else {}
    _require_equal("classes", known | {name: facts[name].class_names for name in names if facts[name].class_names})
    _require_equal("number of classes", {name: facts[name].num_classes for name in names})
    _require_equal("number of counted classes", {name: len(facts[name].class_counts) for name in names})
    _require_equal("value of unlabelled pixels", {name: facts[name].ignore_index for name in names})
    class_names = next((facts[name].class_names for name in names if facts[name].class_names), None)
    if class_names is not None and len(class_names) != config.data.num_classes:
        raise DataError(
            f"the sites name {len(class_names)} classes but data.num_classes is {config.data.num_classes}: set it"
        )
    sizes: Counter[str] = Counter()
    for name in names:
        sizes.update(facts[name].sizes)
    mean, std = _statistics(facts, names) if config.needs_statistics else (None, None)
    return Fingerprint(
        num_images={name: facts[name].num_images["train"] for name in names},
        class_names=class_names,
        class_counts=[sum(column) for column in zip(*(facts[name].class_counts for name in names), strict=True)],
        sizes=dict(sizes),
        mean=mean,
        std=std,
        dtype=next((one.channels.dtype for one in facts.values() if one.channels is not None), None),
    )


def require_fitting(own: Facts, name: str, known: Fingerprint, config: Config) -> None:
    """Raise DataError where a site that comes later does not go with those that began.

    `config` is the one that has what was settled then.
    """
    merge({name: own}, config)
    if known.mean is not None and own.channels is not None:
        _require_equal("number of channels", {"the others": len(known.mean), name: len(own.channels.mean)})
        _require_equal("number type", {"the others": known.dtype, name: own.channels.dtype})


def _statistics(facts: dict[str, Facts], names: Sequence[str]) -> tuple[list[float], list[float]]:
    parts = {name: facts[name].channels for name in names}
    missing = [name for name, part in parts.items() if part is None]
    if missing:
        raise DataError(f"{', '.join(missing)} sent no channel statistics: give all sites the same configuration")
    present = [part for part in parts.values() if part is not None]
    _require_equal("number of channels", {name: len(part.mean) for name, part in parts.items() if part is not None})
    _require_equal("number type", {name: part.dtype for name, part in parts.items() if part is not None})
    total = present[0].moments()
    for part in present[1:]:
        total = total + part.moments()
    mean, std = normalisation(total, present[0].dtype)
    if not all(math.isfinite(value) for value in mean + std) or min(std) <= 0:
        raise DataError(
            f"the channel statistics of {', '.join(names)} give no mean and deviation: look at their images"
        )
    return mean, std


def _require_equal(what: str, values: dict[str, object]) -> None:
    """Raise DataError that names who has what, where not all have the same."""
    if all(value == next(iter(values.values())) for value in values.values()):
        return
    lines = [f"{name}: {', '.join(map(str, v)) if isinstance(v, list) else v}" for name, v in values.items()]
    raise DataError(f"the sites differ in {what}: {'; '.join(lines)}; make them agree before they train together")
