"""Images in, label maps out. Read this first.

An image is cut into tiles (`tiling.py`), which other threads read ahead. Tiles of equal size, also of several images,
make a batch. Every member of the ensemble sees the batch, in every view (`views.py`); what they say is merged, blended
into rows and enlarged to the size of the file. So of a scene only the rows of tiles in flight are in memory, and of its
results the bands of a `Plane`. Next to read: `jobs.py`, what is done with the label maps.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import log
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml_src.core.config import Config
from ml_src.core.data.files import read_image
from ml_src.core.errors import DataError
from ml_src.core.inference import planes
from ml_src.core.inference.in_order import in_order
from ml_src.core.inference.inputs import Input
from ml_src.core.inference.members import Intake, Member
from ml_src.core.inference.planes import Plane
from ml_src.core.inference.scene import Scene
from ml_src.core.inference.tiling import Blender, Grid, enlarged
from ml_src.core.inference.views import Aggregation, Levels, Merger, View
from ml_src.core.transforms.source import Size, Window

READERS = 2  # threads
TINY = np.float32(1e-30)  # whose logarithm stands in for that of 0, times 0
CONTEXT = 128  # pixels around each that a network of four levels sees: so much should tiles overlap
WHOLE = 1.25  # an image so many times as long and wide as a tile is not cut


@dataclass(frozen=True)
class Options:
    """How images are predicted."""

    tile: int | None = None  # side in pixels; None is what the network has seen in training
    overlap: float | None = None  # share of a tile's side; None is a quarter, or 128 pixels, but at most half
    blend: str = "gaussian"
    batch_size: int | None = None  # None is that of training
    views: Sequence[View] = (View(),)
    tta_aggregation: Aggregation = "mean"
    ensemble_aggregation: Aggregation = "mean"
    probabilities: bool = False
    uncertainty: bool = False
    folder: Path | None = None  # on whose disk lies what is too large for the memory; None: that of the system


@dataclass
class Predicted:
    """The label map of an image, and what else was asked for. Rows of it are there as they come."""

    item: Input
    labels: Plane  # (H, W) uint8 or uint16
    nodata: int | None  # the label of pixels without data; None where the image has data everywhere
    probs: Plane | None = None  # (H, W, C) float16, NaN where there is no data
    uncertainty: Plane | None = None  # (H, W, 1 or 2) float16: entropy and mutual information, as shares of log C
    image: NDArray[Any] | None = None  # (H, W, channels), if it was read whole

    def guide(self, top: int, bottom: int) -> NDArray[Any]:
        """Return rows of the image, (n, W, channels)."""
        if self.image is not None:
            return self.image[top:bottom]
        return read_image(self.item.path, window=Window(top, 0, bottom - top, self.labels.shape[1])).pixels


class Failed(NamedTuple):
    """An image that could not be read."""

    item: Input
    problem: str


def predict(
    items: Sequence[Input],
    members: Sequence[Member],
    options: Options,
    advance: Callable[[float], None] = lambda done: None,
) -> Iterator[Predicted | Failed]:
    """Predict images one after the other.

    Args:
        items: the images.
        members: networks of the same classes, whose weights sum to 1. Those of equal intake share what is read; the
            others go through the images side by side with them.
        options: how.
        advance: told how many images are done, parts of one included.
    """
    engines = engines_of(members, options)
    streams = [engine.bands(items) if len(engines) == 1 else evened(engine.bands(items)) for engine in engines]
    by_image = (groupby(stream, key=lambda band: band.number) for stream in streams)
    for done, (item, parts) in enumerate(zip(items, zip(*by_image, strict=True), strict=True)):
        yield _put_together(item, [bands for _, bands in parts], members, options, partial(_advance, advance, done))


def engines_of(members: Sequence[Member], options: Options) -> list["Engine"]:
    """Return an engine for each intake that the members have."""
    groups: dict[object, list[Member]] = {}
    for member in members:
        groups.setdefault(member.intake, []).append(member)
    return [Engine(group, options) for group in groups.values()]


def _advance(advance: Callable[[float], None], done: int, share: float) -> None:
    advance(done + share)


class Band(NamedTuple):
    """Some rows of an image's merged probabilities, or why there are none."""

    number: int  # of the image
    scene: Scene | None
    top: int
    # (K, n, W), good until the next band is asked for: C probabilities and, for the uncertainty, the mean entropy
    values: NDArray[np.float32]
    problem: DataError | None = None


def _put_together(
    item: Input,
    streams: Sequence[Iterable[Band]],
    members: Sequence[Member],
    options: Options,
    advance: Callable[[float], None],
) -> Predicted | Failed:
    predicted: Predicted | None = None
    for bands in zip(*streams, strict=False):
        for band in bands:
            if band.problem is not None:
                return Failed(item, str(band.problem))
        scene = bands[0].scene
        assert scene is not None
        if predicted is None:
            predicted = _empty(scene, members, options)
        values = bands[0].values if len(bands) == 1 else sum(band.values for band in bands)
        _put(predicted, scene, bands[0].top, values, members[0].config.data.num_classes)
        advance((bands[0].top + values.shape[1]) / scene.size[0])
    assert predicted is not None
    predicted.image = scene.pixels
    return predicted


def _empty(scene: Scene, members: Sequence[Member], options: Options) -> Predicted:
    config = members[0].config
    num_classes, nodata = config.data.num_classes, _no_class(config) if scene.can_miss else None
    dtype = np.uint8 if max(num_classes - 1, nodata or 0) <= 255 else np.uint16
    predicted = Predicted(scene.item, Plane(scene.size, dtype, options.folder), nodata)
    if options.probabilities:
        predicted.probs = Plane((*scene.size, num_classes), np.float16, options.folder)
    if options.uncertainty:
        predicted.uncertainty = Plane((*scene.size, 1 if len(members) == 1 else 2), np.float16, options.folder)
    return predicted


def _no_class(config: Config) -> int:
    """The label of pixels without data: ignore_index, unless that is a class."""
    if config.ignore_index >= config.data.num_classes:
        return config.ignore_index
    return 255 if config.data.num_classes <= 255 else 65535


def _put(predicted: Predicted, scene: Scene, top: int, values: NDArray[np.float32], num_classes: int) -> None:
    probs = values[:num_classes]
    labels = most_probable(probs, predicted.labels.dtype)
    nowhere = scene.nowhere(top, top + len(labels))
    if nowhere is not None:
        labels[nowhere] = predicted.nodata
    predicted.labels.put(top, labels)
    if predicted.probs is not None:
        predicted.probs.put(top, _without(nowhere, probs.transpose(1, 2, 0)))
    if predicted.uncertainty is not None:
        total = _entropy(probs[None])[0]  # (n, W)
        parts = [total, (total - values[num_classes]).clip(min=0)]
        predicted.uncertainty.put(top, _without(nowhere, np.stack(parts[: predicted.uncertainty.shape[2]], axis=2)))


def most_probable(probs: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the first class (n, W) of the largest probability (C, n, W).

    Class by class, in their order in memory: ten times as fast as an argmax across them.
    """
    best, labels = probs[0].copy(), np.zeros(probs.shape[1:], dtype)
    for label in range(1, len(probs)):
        better = probs[label] > best
        labels[better] = label
        np.maximum(best, probs[label], out=best)
    return labels


def _without(nowhere: NDArray[np.bool_] | None, values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Values (n, W, K) as they are kept: NaN where there is no data."""
    kept = values.astype(np.float16)
    if nowhere is not None:
        kept[nowhere] = np.nan
    return kept


def _entropy(probs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Entropy (N, H, W) of probabilities (N, C, H, W) as a share of its largest value, log C."""
    entropy = np.zeros((len(probs), *probs.shape[2:]), np.float32)
    for label in range(probs.shape[1]):
        share = probs[:, label]
        entropy -= share * np.log(np.maximum(share, TINY))
    entropy /= np.float32(max(log(probs.shape[1]), 1e-12))
    return entropy


@dataclass(frozen=True)
class Work:
    """A tile to predict, or the reason why its image cannot be."""

    index: int
    scene: Scene | None = None
    grid: Grid | None = None
    row: int = 0
    column: int = 0
    problem: DataError | None = None


def _read(work: Work) -> NDArray[Any] | DataError:
    if work.problem is not None:
        return work.problem
    assert work.scene is not None and work.grid is not None
    try:
        return work.scene.tile(work.grid.window(work.row, work.column))
    except DataError as error:
        return error


class Engine:
    """Members of one intake, which see the same tiles: those of another intake, if that is given."""

    def __init__(self, members: Sequence[Member], options: Options, intake: Intake | None = None) -> None:
        self.members, self.options = members, options
        self.intake = intake or members[0].intake
        self.share = sum(member.weight for member in members)
        self.batch_size = options.batch_size or members[0].config.training.batch_size
        self._failed = -1  # the image that last could not be read
        self._blender: Blender | None = None
        self._canvas = np.empty((0, 0, 0), np.float32)

    def bands(self, items: Sequence[Input]) -> Iterator[Band]:
        """Yield the bands of every image, in order; of one that fails, a band with the problem."""
        batch: list[tuple[Work, NDArray[Any]]] = []
        for work, pixels in in_order(_read, self._works(items), self.batch_size + READERS, READERS):
            if work.index == self._failed:  # one problem of an image is enough
                continue
            if batch and (isinstance(pixels, DataError) or not self._fits(batch, pixels)):
                yield from self._predicted(batch)
                batch = []
            if isinstance(pixels, DataError):
                self._failed = work.index
                yield Band(work.index, None, 0, np.empty(0, np.float32), pixels)
            else:
                batch.append((work, pixels))
        if batch:
            yield from self._predicted(batch)

    def _fits(self, batch: Sequence[tuple[Work, NDArray[Any]]], pixels: NDArray[Any]) -> bool:
        last = batch[-1][1]
        return len(batch) < self.batch_size and last.shape == pixels.shape and last.dtype == pixels.dtype

    def _works(self, items: Sequence[Input]) -> Iterator[Work]:
        for index, item in enumerate(items):
            try:
                scene = Scene(item, self.members[0])
                for member in self.members:
                    member.require_type(item.path, scene.dtype)
            except DataError as error:
                yield Work(index, problem=error)
                continue
            grid = self.grid(scene.canvas)
            for row in range(len(grid.rows.parts)):
                for column in range(len(grid.columns.parts)):
                    if index != self._failed:
                        yield Work(index, scene, grid, row, column)

    def grid(self, canvas: Size) -> Grid:
        """The tiles of a canvas."""
        tile = self.intake.tile
        if self.options.tile is not None:
            tile = (self.options.tile, self.options.tile)
            if self.intake.fixed:
                tile = (min(tile[0], self.intake.tile[0]), min(tile[1], self.intake.tile[1]))
        elif not self.intake.fixed and all(side <= WHOLE * limit for side, limit in zip(canvas, tile, strict=True)):
            tile = canvas
        overlap = self.options.overlap
        if overlap is None:
            overlap = min(0.5, max(0.25, CONTEXT / min(tile)))
        return Grid(canvas, tile, overlap, self.options.blend)

    def _predicted(self, batch: Sequence[tuple[Work, NDArray[Any]]]) -> Iterator[Band]:
        values = self.values(np.stack([pixels for _, pixels in batch]))
        for (work, _), tile in zip(batch, values, strict=True):
            yield from self._finished(work, tile)

    def values(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        """Merged values (N, K, h, w) of tiles (N, h, w, channels)."""
        if len(self.members) == 1 and not self.options.uncertainty:
            values = self._augmented(self.members[0], pixels)
        else:
            values = self._merged(pixels)
        return values if self.share == 1 else values * np.float32(self.share)

    def _merged(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        """What all members say, and, for the uncertainty, the mean of their entropies."""
        merged = Merger(self.options.ensemble_aggregation)
        entropy = np.zeros((len(pixels), *pixels.shape[1:3]), np.float32)
        for member in self.members:
            probs = self._augmented(member, pixels)
            merged.add(probs, member.weight)
            if self.options.uncertainty:
                entropy += _entropy(probs) * np.float32(member.weight / self.share)
        values = merged.result()
        return np.concatenate([values, entropy[:, None]], axis=1) if self.options.uncertainty else values

    def _augmented(self, member: Member, pixels: NDArray[Any]) -> NDArray[np.float32]:
        """What one member says of all views."""
        if len(self.options.views) == 1:
            return member.probabilities(pixels)
        levels = Levels.of(pixels.dtype, self.intake.mean, self.intake.std)
        merged, size = Merger(self.options.tta_aggregation), (pixels.shape[1], pixels.shape[2])
        for view in self.options.views:
            merged.add(view.invert(member.probabilities(view.apply(pixels, levels)), size))
        return merged.result()

    def _finished(self, work: Work, tile: NDArray[np.float32]) -> Iterator[Band]:
        """The bands that are done with this tile: of many tiles, those of a row of them."""
        scene, grid = work.scene, work.grid
        assert scene is not None and grid is not None
        if len(grid) == 1:
            yield from self._of_file(work, 0, tile)
            return
        if work.row == work.column == 0:
            self._blender = Blender(grid, len(tile))
        assert self._blender is not None
        self._blender.add(work.row, work.column, tile)
        if work.column + 1 == len(grid.columns.parts):
            for top, values in self._blender.finished(work.row, band_height(scene.canvas)):
                yield from self._of_file(work, top, values)

    def _of_file(self, work: Work, top: int, values: NDArray[np.float32]) -> Iterator[Band]:
        """Bands at the size of the file; where the network sees another size, once its whole canvas is done."""
        scene = work.scene
        assert scene is not None
        if scene.canvas == scene.size:
            yield Band(work.index, scene, top, values)
            return
        if top == 0:
            self._canvas = np.empty((len(values), *scene.canvas), np.float32)
        self._canvas[:, top : top + values.shape[1]] = values
        if top + values.shape[1] == scene.canvas[0]:
            height = band_height(scene.size)
            for start in range(0, scene.size[0], height):
                stop = min(scene.size[0], start + height)
                yield Band(work.index, scene, start, enlarged(self._canvas, scene.size, start, stop))


def band_height(size: Size) -> int:
    """How many rows of an image are handled at once."""
    return max(1, planes.BAND // size[1])


def evened(bands: Iterable[Band]) -> Iterator[Band]:
    """Cut the bands of each image anew, so that those of all engines have the same rows."""
    for _, stream in groupby(bands, key=lambda band: band.number):
        top, rest = 0, np.empty((0, 0, 0), np.float32)
        for band in stream:
            if band.scene is None:
                yield band
                continue
            rest = np.concatenate([rest, band.values], axis=1) if rest.size else band.values.copy()
            height, bottom = band_height(band.scene.size), band.top + band.values.shape[1]
            while rest.shape[1] >= height or (rest.size and bottom == band.scene.size[0]):
                yield Band(band.number, band.scene, top, rest[:, :height])
                top, rest = top + min(height, rest.shape[1]), rest[:, height:]
