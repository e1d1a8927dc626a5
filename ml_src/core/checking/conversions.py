"""The ways to turn a mask's samples into classes. Next to read: `repair_plan.py`, which chooses one for a whole set."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ml_src.core.checking.mask_colours import ColourMap
from ml_src.core.checking.mask_values import ValueMap, class_dtype, shown
from ml_src.core.checking.stored import Stored
from ml_src.core.checking.tallies import Tally, tally_of
from ml_src.core.data.checks import UNLABELLED
from ml_src.core.data.files import listed
from ml_src.core.errors import DataError

BACKGROUND = "background"  # a class folder of this name is class 0


@dataclass(frozen=True)
class Converted:
    """Classes (H, W), what was done in words that fit all masks to which the same was done, and as plain data."""

    classes: NDArray[np.uint8 | np.uint16]
    done: list[str]
    data: dict[str, Any] = field(default_factory=dict)


class Conversion(Protocol):
    """Turns the samples of a mask's file, or files, into classes."""

    @property
    def unlabelled(self) -> bool:
        """Whether 255 marks unlabelled pixels."""
        ...

    def __call__(self, parts: Sequence[Stored]) -> Converted:
        """Raises: DataError, with the question, where this mask cannot be converted."""
        ...


@dataclass(frozen=True)
class ByValue:
    """One value a pixel, or gray stored as RGB."""

    map: ValueMap

    @property
    def unlabelled(self) -> bool:
        return bool(self.map.unlabelled)

    def __call__(self, parts: Sequence[Stored]) -> Converted:
        plane = parts[0].samples[:, :, 0]
        pairs = [[_plain(value), index] for value, index in zip(self.map.values, self.map.classes, strict=True)]
        pairs += [[_plain(value), UNLABELLED] for value in self.map.unlabelled]
        data: dict[str, Any] = {} if self.map.identity else {"values": pairs}
        if blended := self.map.num_blended(plane):
            data["blended_pixels"] = blended
        done = [] if self.map.identity else [self.map.described]
        return Converted(self.map.classes_of(plane), done, data)


def _plain(value: float) -> float | int | str:
    """A number as JSON has it."""
    return int(value) if value.is_integer() else value if np.isfinite(value) else str(value)


@dataclass(frozen=True)
class ByColour:
    """Colours, of which a table says the class; gray is a colour of three equal numbers."""

    map: ColourMap

    @property
    def unlabelled(self) -> bool:
        return UNLABELLED in self.map.classes.values() and len(set(self.map.classes.values())) <= UNLABELLED

    def __call__(self, parts: Sequence[Stored]) -> Converted:
        if parts[0].header.palette and parts[0].samples.shape[2] == 1:
            raise DataError(
                f"{parts[0].path} holds numbers of a palette: are these classes, or do they stand for colours? "
                "Leave out --colors, or save it as RGB"
            )
        colours = [[*colour, index] for colour, index in self.map.classes.items()]
        classes = self.map.classes_of(parts[0].samples, parts[0].path)
        return Converted(classes, [f"colours became classes by {self.map.table.name}"], {"colours": colours})


@dataclass(frozen=True)
class ByChannel:
    """One channel, or page, a class, of which every pixel has exactly one."""

    unlabelled = False

    def __call__(self, parts: Sequence[Stored]) -> Converted:
        samples = parts[0].samples
        classes = (samples != 0).argmax(axis=2)
        what = "pages" if parts[0].header.pages > 1 else "channels"
        done = f"{samples.shape[2]} {what}, of which each pixel has one, became classes 0 to {samples.shape[2] - 1}"
        return Converted(classes.astype(class_dtype(samples.shape[2] - 1)), [done], {"channels": samples.shape[2]})


@dataclass(frozen=True)
class Union:
    """Class 1 where any of an image's masks is not zero."""

    unlabelled = False

    def __call__(self, parts: Sequence[Stored]) -> Converted:
        drawn = [_drawn(part) for part in parts]
        classes = np.logical_or.reduce(drawn).astype(np.uint8)
        return Converted(classes, ["all masks of the image became one: class 1 where any of them is not zero"])


def _drawn(part: Stored) -> NDArray[np.bool_]:
    """Return where a mask shows its object, (H, W)."""
    if part.kind == "one-hot":
        raise DataError(f"{part.path} has one channel a class: which of them is the mask? Save it as one channel")
    drawn: NDArray[np.bool_] = (part.samples != 0).any(axis=2)
    return drawn


@dataclass(frozen=True)
class ByFolder:
    """Each mask shows the pixels of one class, whose name is that of its folder."""

    names: tuple[str, ...]  # classes 1, 2, ...
    unlabelled = False

    def __call__(self, parts: Sequence[Stored]) -> Converted:
        classes = np.zeros(parts[0].samples.shape[:2], class_dtype(len(self.names)))
        taken = np.zeros(classes.shape, bool)
        for part in parts:
            tally = tally_of(part.samples[:, :, 0])
            if part.kind not in ("values", "gray") or len(tally.counts.keys() - {0.0}) > 1:
                raise DataError(
                    f"{part.path} holds more than zero and one other value ({_values(tally)}): which pixels show "
                    f"{part.path.parent.name}? Save it with two values"
                )
            drawn = _drawn(part)
            if overlap := int((taken & drawn).sum()):
                raise DataError(
                    f"{part.path} overlaps another mask of its image in {overlap} pixels: which class do these have? "
                    "Cut them out of one of the two"
                )
            taken |= drawn
            if part.path.parent.name in self.names:
                classes[drawn] = self.names.index(part.path.parent.name) + 1
        table = {BACKGROUND: 0} | {name: index + 1 for index, name in enumerate(self.names)}
        words = ", ".join(f"{name} {index}" for name, index in table.items())
        return Converted(classes, [f"one mask a class became one, by their folders: {words}"], {"folders": table})


def _values(tally: Tally) -> str:
    return listed([shown(value) for value in sorted(tally.counts)], 10)
