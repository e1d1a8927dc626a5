"""Steps that tidy a label map: gaps, specks, holes, borders. Next to read: `components.py`, then `refine.py`.

All work by bands of rows, and give what they would give on the whole map. Pixels without data are to them what lies
beyond the edge of the image: they never change, and they count for nothing.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import yaml
from numpy.typing import NDArray

from ml_src.core.atomic import write_text
from ml_src.core.checking.output_folder import digest_of
from ml_src.core.config_file import read_yaml
from ml_src.core.errors import ConfigError
from ml_src.core.inference.components import (
    NONE,
    Band,
    Bools,
    Ints,
    Joined,
    Survey,
    Votes,
    border_votes,
    find_regions,
    rows_around,
)
from ml_src.core.inference.planes import Plane
from ml_src.core.inference.refine import Guide, refine_map
from ml_src.core.postprocess_specs import (
    Closing,
    Crf,
    FillHoles,
    KeepLargest,
    Opening,
    PostprocessStep,
    RemoveSmall,
    misfits,
    named_classes,
    steps_from_yaml,
    steps_to_yaml,
)

CHAIN_NAME = "postprocess.yaml"
HEAD = "# Chosen on held-out predictions for the checkpoints of these SHA-256, which are used with it from then on.\n"

log = logging.getLogger("ml_src")

Choice = Callable[[Band], Bools]  # which regions (k + 1,) of a band are given away; the first entry does not matter


def apply_postprocessing(
    labels: Plane, steps: Sequence[PostprocessStep], num_classes: int, nodata: int | None, image: Guide | None
) -> Plane:
    """Apply steps to a label map, in their order, and return the new one; the given one is not written to.

    Args:
        labels: (H, W), uint8 or uint16.
        steps: each acts on what the one before has left, and so does each class of a step.
        num_classes: values from 0 to num_classes - 1 are classes.
        nodata: the value of pixels without data, which stay as they are; None where there are none.
        image: gives rows (top, bottom) of the image, (n, W, channels); only `crf` asks for it.

    Raises: ConfigError for a step that names a class which there is not; ValueError for `crf` without an image.
    """
    if problems := misfits(steps, num_classes):
        raise ConfigError(f"postprocess: {'; '.join(problems)}")
    for step in steps:
        if isinstance(step, Crf):
            if image is None:
                raise ValueError("crf needs the image")
            labels = refine_map(labels, step, num_classes, nodata, image)
            continue
        present = _present(labels)
        for value in named_classes(step) or range(1, num_classes):
            if present[value] and value != nodata:
                labels = _apply(step, Layer(labels, value, nodata))
    return labels


def chain_path(checkpoint_path: Path) -> Path:
    """Return where the chain of steps that was chosen for a checkpoint lies: one of a folder."""
    return checkpoint_path.with_name(CHAIN_NAME)


def load_chain(checkpoint_path: Path) -> list[PostprocessStep] | None:
    """Return the steps that were chosen for a checkpoint, or None where none were.

    Steps for another checkpoint, such as an older one of this name, are passed over with a warning.
    Raises: ConfigError where the file is damaged.
    """
    path = chain_path(checkpoint_path)
    if not path.exists():
        return None
    contents = read_yaml(path)
    steps = steps_from_yaml(contents.get("postprocess") if isinstance(contents, dict) else None, str(path))
    if has_chain(checkpoint_path):
        return steps
    log.warning(
        "%s was tuned for another checkpoint than %s and is not used: tune the steps again",
        path,
        checkpoint_path.name,
    )
    return None


def has_chain(checkpoint_path: Path) -> bool:
    """Whether steps were chosen for this very checkpoint.

    Raises: ConfigError where the file is damaged.
    """
    path = chain_path(checkpoint_path)
    contents = read_yaml(path) if path.exists() and checkpoint_path.exists() else None
    digests = contents.get("checkpoints") if isinstance(contents, dict) else None
    return isinstance(digests, list) and digest_of(checkpoint_path) in digests


def save_chain(
    checkpoint_path: Path, steps: Sequence[PostprocessStep], facts: Mapping[str, Any], others: Sequence[Path] = ()
) -> None:
    """Write the steps that were chosen for a checkpoint, and facts (plain data) about the choice, beside it.

    `others` are checkpoints of the same folder that the steps were chosen for too.
    """
    digests = [digest_of(path) for path in (checkpoint_path, *others)]
    contents = {"postprocess": steps_to_yaml(steps), "checkpoints": digests, "facts": dict(facts)}
    text = yaml.safe_dump(contents, sort_keys=False, allow_unicode=True)
    write_text(chain_path(checkpoint_path), HEAD + text)


class Layer(NamedTuple):
    """One class of a label map: what a step acts on."""

    plane: Plane  # (H, W)
    value: int
    nodata: int | None

    @property
    def height(self) -> int:
        """H."""
        return int(self.plane.shape[0])

    def mask(self, top: int, bottom: int) -> Bools:
        """Where the class is, (n, W)."""
        return np.asarray(self.plane.rows(top, bottom) == self.value)

    def outside(self, rows: NDArray[Any]) -> Bools:
        """Where rows have no data."""
        return np.zeros(rows.shape, bool) if self.nodata is None else np.asarray(rows == self.nodata)

    def votes(self, band: Band, chosen: Bools, top: int, bottom: int) -> Votes:
        """Count the other classes along the borders of some regions of a band."""
        values, inner = rows_around(self.plane, top, bottom, 1)
        missing = (1 - inner.start, 1 - len(values) + inner.stop)
        values = np.pad(values, (missing, (0, 0)), constant_values=self.value)
        if self.nodata is not None:
            values[values == self.nodata] = self.value
        return border_votes(band.labels, chosen, values, no_vote=self.value)

    def painted(self, paint: Callable[[int, int, int], NDArray[Any]]) -> Plane:
        """Return the map that has the rows which `paint` gives for (number of the band, top, bottom)."""
        plane = Plane(self.plane.shape, self.plane.dtype, self.plane.folder)
        for index, (top, bottom) in enumerate(self.plane.bands()):
            plane.put(top, paint(index, top, bottom))
        return plane


def _present(plane: Plane) -> Bools:
    """Which values occur."""
    present = np.zeros(np.iinfo(plane.dtype).max + 1, bool)
    for top, bottom in plane.bands():
        present[plane.rows(top, bottom)] = True
    return present


def _apply(step: Opening | Closing | FillHoles | RemoveSmall | KeepLargest, layer: Layer) -> Plane:
    match step:
        case Opening():
            return _open(layer, step.radius)
        case Closing():
            return _close(layer, step.radius)
        case FillHoles():
            return _fill_holes(layer, step.area or layer.plane.shape[0] * layer.plane.shape[1])
        case RemoveSmall():
            return _remove_small(layer, step.area[layer.value] if isinstance(step.area, dict) else step.area)
        case KeepLargest():
            return _keep_largest(layer)


def _open(layer: Layer, radius: int) -> Plane:
    """Remove what no disk within the class covers. A disk may reach beyond the edge of the image."""

    def removed(top: int, bottom: int) -> Bools:
        rows, inner = rows_around(layer.plane, top, bottom, 2 * radius)
        mask, outside = (rows == layer.value).view(np.uint8), layer.outside(rows).view(np.uint8)
        centres = cv2.erode(mask | outside, _disk(radius)) & ~outside
        return np.asarray((mask > 0) & (cv2.dilate(centres, _disk(radius)) == 0))[inner]

    return _give_away(layer, removed, lambda _: lambda band: np.ones(len(band.area), bool))


def _close(layer: Layer, radius: int) -> Plane:
    """Add what no disk without the class covers. A disk may reach beyond the edge of the image."""

    def closed(_: int, top: int, bottom: int) -> NDArray[Any]:
        rows, inner = rows_around(layer.plane, top, bottom, 2 * radius)
        mask, outside = (rows == layer.value).view(np.uint8), layer.outside(rows)
        near = cv2.dilate(mask, _disk(radius)) | outside.view(np.uint8)
        added = (cv2.erode(near, _disk(radius)) > 0) & ~outside
        return np.where(added, rows.dtype.type(layer.value), rows)[inner]

    return layer.painted(closed)


def _disk(radius: int) -> NDArray[np.uint8]:
    """The pixels no further than `radius` from the middle; OpenCV's ellipse is not the same when it is turned."""
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return np.asarray(x**2 + y**2 <= radius**2, np.uint8)


def _fill_holes(layer: Layer, most: int) -> Plane:
    """Give the class what it surrounds: regions (4-connected) of other pixels, of at most `most` pixels."""

    @lru_cache(maxsize=1)  # a map of one band is looked at once
    def look(top: int, bottom: int) -> Band:
        outside = layer.outside(layer.plane.rows(top, bottom))
        return find_regions(~layer.mask(top, bottom), 4, top == 0, bottom == layer.height, outside)

    survey = Survey(connectivity=4)
    for rows in layer.plane.bands():
        survey.add(look(*rows))
    joined = survey.join()

    def filled(index: int, top: int, bottom: int) -> NDArray[Any]:
        band = joined.complete(index, look(top, bottom))
        values = np.where(~band.is_open & (band.area <= most), layer.value, NONE)
        return _recolored(layer.plane.rows(top, bottom), band, values)

    return layer.painted(filled)


def _remove_small(layer: Layer, least: int) -> Plane:
    return _give_away(layer, layer.mask, lambda _: lambda band: band.area < least)


def _keep_largest(layer: Layer) -> Plane:
    return _give_away(layer, layer.mask, lambda joined: _AllButLargest(joined.largest))


class _AllButLargest:
    """Chooses all regions but the largest; of several, all but the one that begins furthest up, then furthest left.

    It is asked for the bands of a map in turn, from the top.
    """

    def __init__(self, area: int) -> None:
        self._area = area
        self._kept = 0  # the number of no region
        self._found = False

    def __call__(self, band: Band) -> Bools:
        kept = self._kept
        if not self._found and (band.area[1:] == self._area).any():
            is_largest = band.area == self._area
            is_largest[0] = False
            kept = int(band.region[band.labels.flat[np.argmax(is_largest[band.labels])]])
            self._found, self._kept = True, min(kept, 0)  # one that ends in this band, above 0, is not met again
        return np.asarray(band.region != kept)


def _give_away(layer: Layer, part: Callable[[int, int], Bools], choice: Callable[[Joined], Choice]) -> Plane:
    """Give chosen regions of a class to others: each becomes the class that lies along most of its border.

    Only classes other than its own count, each side of a pixel once; of several the lowest wins. A region along which
    there is no other, because all around is the edge, missing data or its own class, stays.

    Args:
        layer: the class, and the map.
        part: gives rows (top, bottom) of the pixels, all of the class, whose regions (8-connected) are meant.
        choice: says, knowing what they come to, which of them are given away.
    """

    @lru_cache(maxsize=1)  # a map of one band is looked at once
    def look(top: int, bottom: int) -> Band:
        return find_regions(part(top, bottom), 8, top == 0, bottom == layer.height)

    survey = Survey(connectivity=8)
    for rows in layer.plane.bands():
        band = look(*rows)
        survey.add(band, layer.votes(band, band.is_shared, *rows))
    joined = survey.join()
    chosen_of = choice(joined)

    def given(index: int, top: int, bottom: int) -> NDArray[Any]:
        band = joined.complete(index, look(top, bottom))
        chosen = chosen_of(band)
        votes = layer.votes(band, chosen & ~band.is_shared, top, bottom)
        values = np.where(chosen, joined.winners(index, band, votes), NONE)
        return _recolored(layer.plane.rows(top, bottom), band, values)

    return layer.painted(given)


def _recolored(rows: NDArray[Any], band: Band, values: Ints) -> NDArray[Any]:
    """Return rows (n, W) in which each region has the value (k + 1,) that stands for it, unless that is NONE."""
    values[0] = NONE
    if np.all(values == NONE):
        return rows
    new, changed = rows.copy(), (values != NONE)[band.labels]
    new[changed] = values[band.labels[changed]]
    return new
