"""The geometric transforms, as the configuration names them: each draws a step. Next to read: `intensity.py`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import sqrt

import numpy as np
from numpy.random import Generator

from ml_src.core import transform_specs as specs
from ml_src.core.transforms import steps
from ml_src.core.transforms.geometry import back, forth
from ml_src.core.transforms.source import Source
from ml_src.core.transforms.steps import Step, keep

TRIES = 10  # to find a pixel of a class that the earlier steps left on the canvas


class Canvas:
    """What a step acts on: the source, as the steps before leave it."""

    def __init__(self, source: Source, before: Sequence[Step] = ()):
        self.source, self.before = source, before
        self.size = before[-1].size if before else source.size

    def find(self, value: int, rng: Generator) -> tuple[int, int] | None:
        """Return (row, column) of a random pixel of the canvas with this mask value.

        It is drawn uniformly from such pixels of the source, again where it is no longer on the canvas. None where
        there is none, or none was found on the canvas in a few draws.
        """
        for _ in range(TRIES):
            found = self.source.find(value, rng)
            place = None if found is None else forth(self.before, *found)
            if found is None:
                return None
            if place is not None and all(-0.5 <= at < side - 0.5 for at, side in zip(place, self.size, strict=True)):
                return round(place[0]), round(place[1])
        return None


class Geometric(ABC):
    """Moves pixels: image and mask alike."""

    @abstractmethod
    def draw(self, canvas: Canvas, rng: Generator, step_rng: Generator) -> Step:
        """Draw this sample's step.

        Args:
            canvas: that the step acts on.
            rng: of this sample.
            step_rng: the same for all samples of a step; for what must agree in a batch.
        """


class Resize(Geometric):
    """Stretch to one size."""

    def __init__(self, spec: specs.Resize):
        self.size = spec.size

    def draw(self, canvas: Canvas, rng: Generator, step_rng: Generator) -> Step:
        return steps.window(0, 0, canvas.size[1], canvas.size[0], self.size)


class RandomHorizontalFlip(Geometric):
    """Swap left and right, or not."""

    def __init__(self, spec: specs.RandomHorizontalFlip):
        self.p = spec.p

    def draw(self, canvas: Canvas, rng: Generator, step_rng: Generator) -> Step:
        return steps.mirror(canvas.size, horizontal=rng.random() < self.p, vertical=False)


class RandomVerticalFlip(Geometric):
    """Swap top and bottom, or not."""

    def __init__(self, spec: specs.RandomVerticalFlip):
        self.p = spec.p

    def draw(self, canvas: Canvas, rng: Generator, step_rng: Generator) -> Step:
        return steps.mirror(canvas.size, horizontal=False, vertical=rng.random() < self.p)


class RandomTranspose(Geometric):
    """Swap rows and columns, or not."""

    def __init__(self, spec: specs.RandomTranspose):
        self.p = spec.p

    def draw(self, canvas: Canvas, rng: Generator, step_rng: Generator) -> Step:
        return steps.transpose(canvas.size) if rng.random() < self.p else keep(canvas.size)


class RandomRotate90(Geometric):
    """Turn by 0, 1, 2 or 3 quarters, each as likely as the others."""

    def __init__(self, spec: specs.RandomRotate90):
        self.p = spec.p

    def draw(self, canvas: Canvas, rng: Generator, step_rng: Generator) -> Step:
        return steps.quarter_turns(canvas.size, int(rng.integers(4)) if rng.random() < self.p else 0)


class RandomRotation(Geometric):
    """Turn about the centre by an angle between -degrees and +degrees."""

    def __init__(self, spec: specs.RandomRotation):
        self.degrees, self.p = spec.degrees, spec.p

    def draw(self, canvas: Canvas, rng: Generator, step_rng: Generator) -> Step:
        if rng.random() >= self.p:
            return keep(canvas.size)
        return steps.rotate(canvas.size, rng.uniform(-self.degrees, self.degrees))


class RandomScale(Geometric):
    """Enlarge or shrink about the centre by a factor between the two of `scale`; the canvas keeps its size."""

    def __init__(self, spec: specs.RandomScale):
        self.scale, self.p = spec.scale, spec.p

    def draw(self, canvas: Canvas, rng: Generator, step_rng: Generator) -> Step:
        return steps.zoom(canvas.size, rng.uniform(*self.scale)) if rng.random() < self.p else keep(canvas.size)


class RandomShift(Geometric):
    """Move by whole pixels, so that nothing is blurred."""

    def __init__(self, spec: specs.RandomShift):
        self.x, self.y, self.p = spec.x, spec.y, spec.p

    def draw(self, canvas: Canvas, rng: Generator, step_rng: Generator) -> Step:
        if rng.random() >= self.p:
            return keep(canvas.size)
        height, width = canvas.size
        right, down = rng.uniform(-self.x, self.x) * width, rng.uniform(-self.y, self.y) * height
        return steps.shift(canvas.size, round(right), round(down))


class RandomShear(Geometric):
    """Slant either the columns or the rows, each as likely, by an angle between -degrees and +degrees."""

    def __init__(self, spec: specs.RandomShear):
        self.degrees, self.p = spec.degrees, spec.p

    def draw(self, canvas: Canvas, rng: Generator, step_rng: Generator) -> Step:
        if rng.random() >= self.p:
            return keep(canvas.size)
        upright = rng.random() < 0.5
        return steps.shear(canvas.size, rng.uniform(-self.degrees, self.degrees), upright)


class RandomPerspective(Geometric):
    """Move each corner of the picture inwards by up to `distortion` times half the width and half the height.

    As torchvision's RandomPerspective, but not in whole pixels; and where a corner of the canvas would show what lies
    more than a side's length outside of it (1 draw in 40 at a distortion of 0.5, none up to 0.4), all is drawn again.
    """

    def __init__(self, spec: specs.RandomPerspective):
        self.distortion, self.p = spec.distortion, spec.p

    def draw(self, canvas: Canvas, rng: Generator, step_rng: Generator) -> Step:
        if rng.random() >= self.p:
            return keep(canvas.size)
        while True:
            height, width = canvas.size
            step = steps.perspective(canvas.size, rng.uniform(0, self.distortion / 2, (4, 2)) * (width, height))
            corners = np.array([[(0, 0), (width, 0), (0, height), (width, height)]], np.float32) - np.float32(0.5)
            seen = back(step, corners) / (width, height)
            if seen.min() > -1 and seen.max() < 2:
                return step


class GridDistortion(Geometric):
    """Displace the crossings of a grid, but not those on the edges of the canvas, and blend in between.

    Each inner crossing is moved by up to distortion / 4 of a cell along x and along y, both uniform and independent.
    At a distortion below 1 nothing folds; `steps.move_crossings` says why.
    """

    def __init__(self, spec: specs.GridDistortion):
        self.num_cells, self.distortion, self.p = spec.num_cells, spec.distortion, spec.p

    def draw(self, canvas: Canvas, rng: Generator, step_rng: Generator) -> Step:
        if rng.random() >= self.p:
            return keep(canvas.size)
        moves = np.zeros((self.num_cells + 1, self.num_cells + 1, 2))
        inner = (self.num_cells - 1, self.num_cells - 1, 2)
        moves[1:-1, 1:-1] = rng.uniform(-self.distortion / 4, self.distortion / 4, inner)
        return steps.move_crossings(canvas.size, moves)


class RandomResizeCrop(Geometric):
    """Stretch a random rectangle, or the whole canvas, to a size that is drawn once for the batch.

    The rectangle has the proportions of that size, so that nothing is distorted; it is made smaller where it would not
    fit into the canvas, and its place is uniform.
    """

    def __init__(self, spec: specs.RandomResizeCrop):
        self.sizes, self.p, self.scale = spec.sizes, spec.p, spec.scale

    def draw(self, canvas: Canvas, rng: Generator, step_rng: Generator) -> Step:
        target = self.sizes[step_rng.integers(len(self.sizes))]
        (height, width), (rows, columns) = canvas.size, target
        if rng.random() >= self.p:
            return steps.window(0, 0, width, height, target)
        zoom = sqrt(rng.uniform(*self.scale) * height * width / (rows * columns))  # canvas pixels an output pixel spans
        zoom = min(zoom, height / rows, width / columns)
        # max: rounding may leave a room of -1e-14
        left, top = rng.uniform(0, max(0.0, width - zoom * columns)), rng.uniform(0, max(0.0, height - zoom * rows))
        return steps.window(left, top, zoom * columns, zoom * rows, target)


class RandomCrop(Geometric):
    """Cut out a window at the picture's own resolution; where the canvas is smaller, the window holds all of it.

    With `classes`, with probability class_probability: one class of those that are present is drawn, one of its
    pixels, and the place of the window among all that hold this pixel. Otherwise the place is uniform.
    """

    def __init__(self, spec: specs.RandomCrop):
        self.size, self.classes, self.class_probability = spec.size, spec.classes, spec.class_probability

    def draw(self, canvas: Canvas, rng: Generator, step_rng: Generator) -> Step:
        place = None
        if self.classes is not None and rng.random() < self.class_probability:
            # the first that is present in a random order: each of the present ones is as likely
            found = (canvas.find(int(value), rng) for value in rng.permutation(self.classes))
            place = next((each for each in found if each is not None), None)
        row, column = place or (None, None)
        top, left = (
            _start(length, wanted, holding, rng)
            for length, wanted, holding in zip(canvas.size, self.size, (row, column), strict=True)
        )
        return steps.window(left, top, self.size[1], self.size[0], self.size)


def _start(length: int, wanted: int, holding: int | None, rng: Generator) -> int:
    """Where an interval of `wanted` pixels begins that lies in an axis or holds all of it, and perhaps one pixel."""
    first, last = sorted((0, length - wanted))
    if holding is not None:
        first, last = max(first, holding - wanted + 1), min(last, holding)
    return int(rng.integers(first, last + 1))


class Elastic(Geometric):
    """Deform smoothly, or not."""

    def __init__(self, spec: specs.Elastic):
        self.alpha, self.sigma, self.p = spec.alpha, spec.sigma, spec.p

    def draw(self, canvas: Canvas, rng: Generator, step_rng: Generator) -> Step:
        return steps.deform(canvas.size, self.alpha, self.sigma, rng) if rng.random() < self.p else keep(canvas.size)
