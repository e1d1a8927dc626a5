"""The parameters of every step of post-processing, typed: what may stand in `inference.postprocess:`.

Also how the command line says them. What carries them out is in `ml_src/core/inference/postprocess.py`; this file
imports no array library, so that a mistake is found at once.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter, ValidationError, model_validator

from ml_src.core.errors import ConfigError
from ml_src.core.registry import lookup, suggest
from ml_src.core.transform_specs import Count, Section

ClassIndex = Annotated[int, Field(ge=0, le=65535)]
Radius = Annotated[int, Field(ge=1, le=50)]
AreaByClass = Annotated[dict[ClassIndex, Count], Field(min_length=1)]
# The tags choose what a mistake is measured by; brackets keep them out of its sentence.
Areas = Annotated[
    Annotated[Count, Tag("[one]")] | Annotated[AreaByClass, Tag("[each]")],
    Discriminator(lambda raw: "[each]" if isinstance(raw, dict) else "[one]"),
]


class Step(Section):
    """A step for some classes, each in turn."""

    classes: Annotated[list[ClassIndex], Field(min_length=1)] | None = None
    """The classes, in the order in which it is done to them; left out: 1, 2, ..., all but class 0."""

    @model_validator(mode="after")
    def _each_once(self) -> "Step":
        if self.classes is not None and len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes has a value twice: {self.classes}")
        return self


class Opening(Step):
    """Remove what is thinner than a disk. A removed part becomes the class along most of its border."""

    type: Literal["opening"]
    radius: Radius = 1
    """Radius of the disk in pixels."""


class Closing(Step):
    """Close gaps that are thinner than a disk: they become the class."""

    type: Literal["closing"]
    radius: Radius = 1
    """Radius of the disk in pixels."""


class FillHoles(Step):
    """Fill what the class surrounds, whatever is in it, unless that touches the edge or pixels without data."""

    type: Literal["fill_holes"]
    area: Count | None = None
    """Pixels of the largest hole that is filled; left out: of any size."""


class RemoveSmall(Step):
    """Remove regions (8-connected) of few pixels. Each becomes the class along most of its border."""

    type: Literal["remove_small"]
    area: Areas
    """Smallest area in pixels that stays: one for all classes, or one for each class, as in {1: 30, 2: 100}."""

    @model_validator(mode="after")
    def _classes_once(self) -> "RemoveSmall":
        if isinstance(self.area, dict) and self.classes is not None:
            raise ValueError("classes are said twice: area names them, so leave out classes")
        return self


class KeepLargest(Step):
    """Keep the largest region (8-connected). Each of the others becomes the class along most of its border."""

    type: Literal["keep_largest"]


class Crf(Step):
    """Move borders between classes to edges of the image: a guided filter (He, Sun and Tang 2013), no dense CRF."""

    type: Literal["crf"]
    classes: Annotated[list[ClassIndex], Field(min_length=2)] | None = None
    """The classes between which borders move; left out: all, class 0 too."""
    radius: Radius = 5
    """How far in pixels a border can move, and how far the filter looks."""
    eps: Annotated[float, Field(ge=1e-6, le=1)] = 1e-3
    """Variance of the image, in units of the full range squared, above which something is an edge."""


PostprocessStep = Annotated[
    Opening | Closing | FillHoles | RemoveSmall | KeepLargest | Crf, Field(discriminator="type")
]
_ADAPTER: TypeAdapter[PostprocessStep] = TypeAdapter(PostprocessStep)
STEPS: dict[str, type[Step]] = {
    "opening": Opening,
    "closing": Closing,
    "fill_holes": FillHoles,
    "remove_small": RemoveSmall,
    "keep_largest": KeepLargest,
    "crf": Crf,
}


def named_classes(step: PostprocessStep) -> list[int] | None:
    """Return the classes that a step names, or None where it leaves them out."""
    return list(step.area) if isinstance(step, RemoveSmall) and isinstance(step.area, dict) else step.classes


def misfits(steps: Iterable[PostprocessStep], num_classes: int) -> list[str]:
    """Return a sentence for each class that a step names and that there is not."""
    return [
        f"{step.type} has class {each} but num_classes is {num_classes}"
        for step in steps
        for each in named_classes(step) or []
        if each >= num_classes
    ]


def parse_steps(words: Sequence[str]) -> list[PostprocessStep]:
    """Read steps as the command line says them: `opening,radius=2`, `remove_small,area=1:30+2:100`, or `none` alone.

    Raises: ConfigError for an unknown step or key, or a value that cannot be.
    """
    return [] if list(words) == ["none"] else [_parse(word) for word in words]


def as_word(step: PostprocessStep) -> str:
    """Return a step as --postprocess takes it."""
    contents = steps_to_yaml([step])[0]
    return ",".join([contents.pop("type"), *(f"{key}={_as_word(value)}" for key, value in contents.items())])


def _as_word(value: Any) -> str:
    if isinstance(value, dict):
        return "+".join(f"{key}:{each}" for key, each in value.items())
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def steps_to_yaml(steps: Iterable[PostprocessStep]) -> list[dict[str, Any]]:
    """Return steps as plain data, without what they leave to the defaults."""
    return [{"type": step.type, **step.model_dump(exclude_defaults=True)} for step in steps]


def steps_from_yaml(raw: Any, source: str = "postprocess") -> list[PostprocessStep]:
    """Read steps from plain data; `source` says in an error where they stand.

    Raises: ConfigError where they are none.
    """
    if not isinstance(raw, list):
        raise ConfigError(f"{source} is no list of steps: write one as [{{type: fill_holes}}], or [] for none")
    return [_validate(one, f"{source}: step {number}") for number, one in enumerate(raw, 1)]


def _parse(word: str) -> PostprocessStep:
    """One step: its type, then its keys with their values, all between commas."""
    source = f"--postprocess {word}"
    if word == "none":
        raise ConfigError(f"{source}: it stands alone, so leave out either it or the steps beside it")
    name, *assignments = word.replace(" ", "").split(",")
    raw: dict[str, Any] = {"type": name}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or key in raw:
            raise ConfigError(f"{source}: write each key once, with its value, as in remove_small,area=30,classes=1+2")
        raw[key] = _value(key, value)
    return _validate(raw, source)


def _value(key: str, text: str) -> Any:
    """`1+2` of classes is a list, `1:30+2:100` a mapping; of anything else pydantic reads the text."""
    pairs = [pair.partition(":")[::2] for pair in text.split("+")]
    if ":" in text and len(dict(pairs)) == len(pairs):
        return dict(pairs)
    return text.split("+") if key == "classes" else text


def _validate(raw: Any, source: str) -> PostprocessStep:
    """One step of plain data, with the first of its mistakes in a sentence."""
    if not isinstance(raw, dict) or not isinstance(raw.get("type"), str):
        raise ConfigError(f"{source}: `type` is missing; known: {', '.join(sorted(STEPS))}")
    section = lookup(STEPS, raw["type"], source)
    try:
        return _ADAPTER.validate_python(raw)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ConfigError(f"{source}: {_sentence(problem, section)}") from None


def _sentence(problem: Any, section: type[Step]) -> str:
    """What is wrong with one key, and what it may be."""
    keys = [str(part) for part in problem["loc"][1:]]  # the first is the type
    if problem["type"] == "extra_forbidden":
        return f"unknown key {keys[0]!r}; {suggest(keys[0], set(section.model_fields) - {'type'})}"
    if problem["type"] == "missing":
        return f"{keys[0]} is missing: give it a value"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{keys[0]}: {message}, got {problem['input']!r}" if keys else message
