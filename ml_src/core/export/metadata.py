"""What an exported file says about itself: classes, input, normalisation, scores, where it comes from.

Plain strings (`ml_src.<field>` -> JSON), because all formats can hold those: ONNX in `metadata_props`, OpenVINO in
`rt_info`, TorchScript in its extra files, safetensors in `__metadata__`. `runtime.py` reads them back.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ml_src.core.errors import CheckpointError

FORMAT_VERSION = 1
PREFIX = "ml_src."
DESCRIPTION = "description"
LIMIT_CLASSES = 65535
LIMIT_CHANNELS = 65536

InputType = Literal["uint8", "uint16", "float32"]
Layout = Literal["NHWC", "NCHW"]
Precision = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True)
class Metadata:
    """All that has to be known to use an exported file. The fields hold plain data, as JSON gives it back."""

    class_names: list[str]
    colours: list[list[int]]
    """Red, green, blue of each class, 0..255."""
    channels: int
    input_type: InputType
    layout: Layout
    mean: list[float]
    """What the graph subtracts, as a share of the full range: one for each channel, or one for all."""
    std: list[float]
    """What the graph divides by then, likewise."""
    resize: list[int] | None
    """Height and width that whole images are resized to before; None: they keep their size."""
    training_size: list[int] | None
    """Height and width of the training samples, where they had one."""
    ignore_index: int
    postprocess: list[dict[str, Any]]
    """The steps of post-processing, as in the YAML file."""
    mirror: bool
    """Whether images may be mirrored: false where left and right are different classes."""
    metrics: dict[str, Any]
    """Scores of val and test with their intervals; empty where they are not known."""
    privacy: dict[str, Any] | None
    """The totals of the privacy ledger; None for a training without privacy."""
    versions: dict[str, str]
    """Versions of the programs that took part: ml_src, torch, onnx, ..."""
    checkpoints: list[dict[str, Any]]
    """The members: name, sha256 and weight of each."""
    encoder_licence: str | None
    """The licence of the encoder's weights, where it has some from elsewhere."""
    precision: Precision
    config: dict[str, Any]
    """The whole configuration of the first member."""
    format_version: int = field(default=FORMAT_VERSION)

    @property
    def num_classes(self) -> int:
        """Number of classes, which is that of the probabilities' channels."""
        return len(self.class_names)

    @property
    def label_type(self) -> Literal["uint8", "uint16"]:
        """The number type of the label map."""
        return "uint8" if self.num_classes <= 256 else "uint16"

    @property
    def description(self) -> str:
        """One paragraph for people who look at the file with another program."""
        shape = "(N, H, W, C)" if self.layout == "NHWC" else "(N, C, H, W)"
        return (
            f"Semantic segmentation, exported by ml_src {self.versions.get('ml_src', '')}".rstrip()
            + f". Input images: {shape} {self.input_type}, C = {self.channels}, not normalised. "
            f"Output labels: (N, H, W) {self.label_type}; output probabilities: (N, {self.num_classes}, H, W) float32. "
            f"Classes: {', '.join(f'{index} {name}' for index, name in enumerate(self.class_names))}."
        )

    def to_strings(self) -> dict[str, str]:
        """Return the description, and every field as `ml_src.<field>`: JSON."""
        values = {f"{PREFIX}{one.name}": json.dumps(getattr(self, one.name)) for one in fields(self)}
        return {DESCRIPTION: self.description, **values}

    @classmethod
    def from_strings(cls, strings: Mapping[str, str], source: Path | str = "the file") -> "Metadata":
        """Return what `to_strings` wrote. Other keys are passed over; `source` is named in errors.

        Raises: CheckpointError where a field is missing or has a wrong type, or the file is of a later version.
        """
        names = [one.name for one in fields(cls)]
        if not any(f"{PREFIX}{name}" in strings for name in names):
            raise CheckpointError(
                f"{source} does not say how ml-export wrote it (it has no metadata of ml_src): "
                "give a file that ml-export wrote"
            )
        version = _value(strings, "format_version", source)
        if _is_whole(version) and version > FORMAT_VERSION:
            raise CheckpointError(f"{source} was written by a later version of this program: update it with pip")
        values = {name: _value(strings, name, source) for name in names}
        for name, value in values.items():
            if not CHECKS[name](value):
                raise _damaged(source, f"{name} has a value that it cannot have")
        number, channels = len(values["class_names"]), values["channels"]
        if len(values["colours"]) != number:
            raise _damaged(source, f"class_names has {number} entries, but colours {len(values['colours'])}")
        for name in ("mean", "std"):
            if len(values[name]) not in (1, channels):
                raise _damaged(source, f"channels is {channels}, but {name} has {len(values[name])} entries")
        return cls(**values)


def _value(strings: Mapping[str, str], name: str, source: Path | str) -> Any:
    """Return a field's plain data."""
    text = strings.get(PREFIX + name)
    if text is None:
        raise _damaged(source, f"{name} is missing")
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise _damaged(source, f"{name} is not JSON") from None


def _damaged(source: Path | str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the metadata in {source} is damaged ({reason}): export the checkpoint again with ml-export"
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if not isinstance(value, float) and not _is_whole(value):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _is_count(value: Any, limit: float = math.inf) -> bool:
    return _is_whole(value) and 1 <= value <= limit


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _is_size(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 2 and all(map(_is_count, value)))


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_whole(one) and 0 <= one <= 255 for one in value)


def _is_checkpoint(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and isinstance(value.get("sha256"), str)
        and _is_number(value.get("weight"))
    )


def _list_of(check: Callable[[Any], bool], at_least: int = 0, at_most: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and at_least <= len(value) <= at_most and all(map(check, value))


def _one_of(*words: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in words


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


CHECKS: dict[str, Callable[[Any], bool]] = {
    "class_names": _list_of(_is_text, 1, LIMIT_CLASSES),
    "colours": _list_of(_is_colour),
    "channels": lambda value: _is_count(value, LIMIT_CHANNELS),
    "input_type": _one_of("uint8", "uint16", "float32"),
    "layout": _one_of("NHWC", "NCHW"),
    "mean": _list_of(_is_number, 1),
    "std": _list_of(lambda value: _is_number(value) and value > 0, 1),
    "resize": _is_size,
    "training_size": _is_size,
    "ignore_index": _is_whole,
    "postprocess": _list_of(_is_mapping),
    "mirror": lambda value: isinstance(value, bool),
    "metrics": _is_mapping,
    "privacy": lambda value: value is None or isinstance(value, dict),
    "versions": lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
    "checkpoints": _list_of(_is_checkpoint, 1),
    "encoder_licence": lambda value: value is None or isinstance(value, str),
    "precision": _one_of("fp32", "fp16", "int8"),
    "config": _is_mapping,
    "format_version": _is_count,
}
