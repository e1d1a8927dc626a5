"""The parameters of every transform, typed: what may stand in a `transforms:` list, with ranges and units.

The classes that carry them out are in `ml_src/core/transforms/`; this file imports no array library, so that a
mistake in the YAML is found at once.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _ordered(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"must be [smallest, largest], not {list(bounds)}")
    return bounds


Probability = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Size = Annotated[tuple[Count, Count], "height, width"]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Factor = Annotated[float, Field(ge=0.01, le=100)]
Ordered = AfterValidator(_ordered)


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
    scale: Annotated[tuple[Share, Share], Ordered] = (0.25, 1.0)
    """Smallest and largest share of the image's area that the part covers."""


class RandomCrop(Section):
    """Cut out a window at the image's own resolution; with `classes`, often one that shows a rare class."""

    type: Literal["random_crop"]
    size: Size
    """Height and width in pixels; a smaller image is wholly inside, mirrored around, and the mask is ignored there."""
    classes: Annotated[list[Annotated[int, Field(ge=0, le=65535)]], Field(min_length=1)] | None = None
    """Mask values to look for: one of those that the mask has is drawn, and one of its pixels lies in the window."""
    class_probability: Probability = 0.5
    """Probability per sample that `classes` decides where the window lies; otherwise every place is as likely."""

    @model_validator(mode="after")
    def _classes_decide(self) -> "RandomCrop":
        if self.classes is None and self.class_probability != 0.5:
            raise ValueError("class_probability is for random_crop with classes: list them, or leave it out")
        if self.classes is not None and len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes has a value twice: {self.classes}")
        return self


class RandomScale(Section):
    """Enlarge or shrink about the centre; the canvas keeps its size, and what comes from outside is ignored."""

    type: Literal["random_scale"]
    scale: Annotated[tuple[Factor, Factor], Ordered] = (0.8, 1.25)
    """Smallest and largest factor: above 1 the image is enlarged, below it shrinks."""
    p: Probability = 0.5
    """Probability per sample."""


class RandomShift(Section):
    """Move by whole pixels; what comes from outside the image is ignored by loss and metric."""

    type: Literal["random_shift"]
    x: Probability = 0.1
    """The shift is drawn from -x to +x, as a share of the width."""
    y: Probability = 0.1
    """The shift is drawn from -y to +y, as a share of the height."""
    p: Probability = 0.5
    """Probability per sample."""


class RandomShear(Section):
    """Slant the image along its width or, as likely, along its height; what comes from outside is ignored."""

    type: Literal["random_shear"]
    degrees: Annotated[float, Field(ge=0, le=60)] = 15.0
    """The angle is drawn from -degrees to +degrees."""
    p: Probability = 0.5
    """Probability per sample."""


class RandomPerspective(Section):
    """View the image at a slant: its four corners move inwards; what comes from outside is ignored."""

    type: Literal["random_perspective"]
    distortion: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    """Each corner moves by 0 to distortion, as a share of half the width and, drawn anew, of half the height."""
    p: Probability = 0.5
    """Probability per sample."""


class RandomRotate90(Section):
    """Turn by 0, 1, 2 or 3 quarters, each as likely; height and width of an image that is not square swap places."""

    type: Literal["random_rotate90"]
    p: Probability = 1.0
    """Probability per sample that the number of quarters is drawn; otherwise it is 0."""


class RandomTranspose(Section):
    """Swap rows and columns, and so height and width of an image that is not square."""

    type: Literal["random_transpose"]
    p: Probability = 0.5
    """Probability per sample."""


class GridDistortion(Section):
    """Displace the inner crossings of a grid; the edges of the image stay, and nothing folds."""

    type: Literal["grid_distortion"]
    num_cells: Annotated[int, Field(ge=2, le=100)] = 5
    """Cells of the grid along the height, and along the width."""
    distortion: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """A crossing moves by up to distortion / 4 of a cell along x and along y; near 1 the strongest nearly fold."""
    p: Probability = 0.5
    """Probability per sample."""


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


class RandomGamma(Section):
    """Raise the grey level, as a share of the full range, to a power: below 1 shadows brighten, above they darken."""

    type: Literal["random_gamma"]
    gamma: Annotated[tuple[Factor, Factor], Ordered] = (0.8, 1.25)
    """Smallest and largest power."""
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


class CoarseDropout(Section):
    """Fill random rectangles of the image with its mean; the mask stays (Cutout, DeVries and Taylor 2017)."""

    type: Literal["coarse_dropout"]
    num_holes: Annotated[tuple[Count, Count], Ordered] = (1, 8)
    """Smallest and largest number of rectangles."""
    size: Annotated[tuple[Share, Share], Ordered] = (0.05, 0.2)
    """Smallest and largest height, as a share of the image's height; and of the width, drawn anew."""
    p: Probability = 0.5
    """Probability per sample."""


class Normalize(Section):
    """Subtract the mean and divide by the standard deviation (`data`: of the training images), on the device."""

    type: Literal["normalize"]
    mean: Annotated[list[float], Field(min_length=1)] | Literal["data"] = "data"
    """Per channel or for all; of the full range for 8- and 16-bit unsigned images, in the file's units otherwise."""
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] | Literal["data"] = "data"
    """As the mean. If not 8-bit, colours take mean - 2 std for black and mean + 2 std for white."""


TrainTransform = Annotated[
    Resize
    | RandomHorizontalFlip
    | RandomVerticalFlip
    | RandomRotation
    | RandomRotate90
    | RandomTranspose
    | RandomScale
    | RandomShift
    | RandomShear
    | RandomPerspective
    | RandomCrop
    | RandomResizeCrop
    | GridDistortion
    | Elastic
    | ColorJitter
    | RandomBrightnessContrast
    | RandomGamma
    | GaussianNoise
    | GaussianBlur
    | CoarseDropout
    | Normalize,
    Field(discriminator="type"),
]
# Nothing random: a measurement is repeatable, and a prediction is carried back to the image's own size.
ValTransform = Annotated[Resize | Normalize, Field(discriminator="type")]
