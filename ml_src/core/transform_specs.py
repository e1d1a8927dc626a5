"""The parameters of every transform, typed: what may stand in a `transforms:` list, with ranges and units.

The classes that carry them out are in `ml_src/core/transforms/`; this file imports no array library, so that a
mistake in the YAML is found at once.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Probability = Annotated[float, Field(ge=0, le=1)]
Size = Annotated[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], "height, width"]
NonNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A part of the configuration: frozen, and no key is accepted that is not declared."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Resize(Section):
    """Stretch image and mask to one size."""

    type: Literal["resize"]
    size: Size
    """Height and width in pixels."""


class RandomHorizontalFlip(Section):
    """Mirror left and right."""

    type: Literal["random_horizontal_flip"]
    p: Probability = 0.5
    """Probability per sample."""


class RandomVerticalFlip(Section):
    """Mirror top and bottom."""

    type: Literal["random_vertical_flip"]
    p: Probability = 0.5
    """Probability per sample."""


class RandomRotation(Section):
    """Rotate about the centre; what comes from outside the image is ignored by loss and metric."""

    type: Literal["random_rotation"]
    degrees: Annotated[float, Field(ge=0, le=180)]
    """The angle is drawn from -degrees to +degrees."""
    p: Probability = 1.0
    """Probability per sample."""


class RandomResizeCrop(Section):
    """Multi-scale training: one of several sizes is drawn for each batch, and a random part of the image fills it."""

    type: Literal["random_resize_crop"]
    sizes: Annotated[list[Size], Field(min_length=1)]
    """Heights and widths; one pair is drawn for the whole batch, so that its samples have one size."""
    p: Probability = 0.5
    """Probability per sample that a part is taken; otherwise the whole image is resized to the drawn size."""
    scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] = (0.25, 1.0)
    """Smallest and largest share of the image's area that the part covers."""

    @model_validator(mode="after")
    def _ordered(self) -> "RandomResizeCrop":
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale must be [smallest, largest], got {list(self.scale)}")
        return self


class Elastic(Section):
    """A smooth random deformation (Simard, Steinkraus, Platt 2003)."""

    type: Literal["elastic"]
    alpha: NonNegative = 10.0
    """Typical displacement (its root mean square) in pixels."""
    sigma: Annotated[float, Field(gt=0)] = 20.0
    """Width in pixels of the Gaussian that smooths the displacement: larger is smoother."""
    p: Probability = 0.5
    """Probability per sample."""


class ColorJitter(Section):
    """Random brightness, contrast, saturation and hue."""

    type: Literal["color_jitter"]
    brightness: NonNegative = 0.0
    """The factor is drawn from max(0, 1 - brightness) to 1 + brightness."""
    contrast: NonNegative = 0.0
    """The factor is drawn from max(0, 1 - contrast) to 1 + contrast."""
    saturation: NonNegative = 0.0
    """The factor is drawn from max(0, 1 - saturation) to 1 + saturation; RGB images only."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """The shift is drawn from -hue to +hue, in turns of the colour circle; RGB images only."""
    p: Probability = 1.0
    """Probability per sample."""


class RandomBrightnessContrast(Section):
    """Add brightness and multiply contrast about the middle of the range."""

    type: Literal["random_brightness_contrast"]
    brightness: Annotated[float, Field(ge=0, le=1)] = 0.2
    """The shift is drawn from -brightness to +brightness, as a share of the full range."""
    contrast: Annotated[float, Field(ge=0, le=1)] = 0.2
    """The factor is drawn from 1 - contrast to 1 + contrast."""
    p: Probability = 0.5
    """Probability per sample."""


class GaussianNoise(Section):
    """Add independent normal noise to every pixel and channel."""

    type: Literal["gaussian_noise"]
    std: Annotated[float, Field(ge=0, le=1)] = 0.05
    """The standard deviation is drawn from 0 to std, as a share of the full range."""
    p: Probability = 0.5
    """Probability per sample."""


class GaussianBlur(Section):
    """Blur the image (the mask stays sharp)."""

    type: Literal["gaussian_blur"]
    sigma: Annotated[float, Field(gt=0, le=50)] = 1.5
    """The width is drawn from 0.1 to sigma, in pixels."""
    p: Probability = 0.5
    """Probability per sample."""


class Normalize(Section):
    """Subtract the mean and divide by the standard deviation, per channel; carried out on the device."""

    type: Literal["normalize"]
    mean: Annotated[list[float], Field(min_length=1)]
    """Per channel (or one for all), in units of the full range: 0 is black, 1 is white."""
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)]
    """Per channel (or one for all), in units of the full range."""


TrainTransform = Annotated[
    Resize
    | RandomHorizontalFlip
    | RandomVerticalFlip
    | RandomRotation
    | RandomResizeCrop
    | Elastic
    | ColorJitter
    | RandomBrightnessContrast
    | GaussianNoise
    | GaussianBlur
    | Normalize,
    Field(discriminator="type"),
]
# Nothing random: a measurement is repeatable, and a prediction is carried back to the image's own size.
ValTransform = Annotated[Resize | Normalize, Field(discriminator="type")]
