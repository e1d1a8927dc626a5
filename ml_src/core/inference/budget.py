"""`--max_ram`: what a job holds in memory, piece by piece, and the tiles with which that fits.

Next to read: `memory.py`, where the network is measured and the choice is made.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import prod
from typing import NamedTuple

import numpy as np

from ml_src.core.data.files import ImageInfo, image_info
from ml_src.core.errors import DataError
from ml_src.core.inference import planes
from ml_src.core.inference.inputs import Input
from ml_src.core.inference.measure import MOST_PIXELS
from ml_src.core.inference.members import Member
from ml_src.core.inference.memory import Need, choose, measure, parse_size, resident
from ml_src.core.inference.predictor import READERS, Engine, Options, engines_of
from ml_src.core.inference.scene import KEPT_BYTES, MOST_BYTES
from ml_src.core.inference.writers import MAX_SIDE

PICTURE = 26  # bytes a pixel of an overlay or a picture of uncertainty, while it is drawn
OUTLINES = 24  # bytes a pixel of an image whose outlines are compared
IN_FLIGHT = 3  # images: one is read, one predicted, one written
MERGED = 4  # arrays of values of a batch: of a view, turned back, merged, and with the entropy
WRITING = 96 << 20  # rows of tiles that are compressed, and what decoders keep

log = logging.getLogger("ml_src")


class Extras(NamedTuple):
    """What is done with the label maps."""

    pictures: bool
    measured: bool
    postprocessed: bool


def within(limit: str, items: Sequence[Input], members: Sequence[Member], options: Options, extras: Extras) -> Options:
    """Return options with the tiles and the batch that keep the process within a limit such as `2G`.

    Called before anything is predicted, and after `give_back_freed_memory`.
    Raises: ConfigError where no tiles do.
    """
    infos = list(_infos(items))
    if not infos:  # none can be read, which is said of each
        return options
    engines = engines_of(members, options)
    need = _together(
        [(member, measure(partial(_peak, engine, member))) for engine in engines for member in engine.members]
    )
    around = max(_around(info, members, options, extras) for info in infos) + sum(
        max(_decoded(info, engine) for info in infos) for engine in engines
    )

    def in_flight(tile: int) -> int:
        return around + sum(_of_tiles(infos, engine, options, tile) for engine in engines)

    choice = choose(
        parse_size(limit),
        resident() + need.fixed,
        need.per_pixel,
        in_flight,
        options.tile or max(max(engine.intake.size or engine.intake.tile) for engine in engines),
        max(engine.batch_size for engine in engines),
    )
    log.info("--max_ram %s: %s", limit, choice)
    return replace(options, tile=choice.tile, batch_size=choice.batch)


def _infos(items: Sequence[Input]) -> Iterator[ImageInfo]:
    for item in items:
        with suppress(DataError):  # whoever reads it names it
            yield image_info(item.path)


def _together(needs: Sequence[tuple[Member, Need]]) -> Need:
    """What members take one after the other: the most of any, and all of those whose engines keep it."""
    kept = [need for member, need in needs if member.keeps_memory]
    passing = [need for member, need in needs if not member.keeps_memory] or [Need(0, 0.0)]
    return Need(
        sum(need.fixed for need in kept) + max(need.fixed for need in passing),
        sum(need.per_pixel for need in kept) + max(need.per_pixel for need in passing),
    )


def _peak(engine: Engine, member: Member, side: int) -> int:
    """Bytes that a blank tile takes: what a member takes, and what merges it with others."""
    alone, blank = Engine([member], replace(engine.options, uncertainty=False)), member.blank(side)
    values = 4 * MERGED * side**2 * (member.config.data.num_classes + engine.options.uncertainty)
    return values + member.peak(partial(alone.values, blank))


def _around(info: ImageInfo, members: Sequence[Member], options: Options, extras: Extras) -> int:
    """Bytes for an image that do not depend on the tiles: what is decoded whole, planes, pictures."""
    pixels, num_classes = info.height * info.width, members[0].config.data.num_classes
    label_bytes = 1 if num_classes <= 256 else 2
    kept = [label_bytes] * (1 + extras.postprocessed)
    kept += [2 * num_classes] * options.probabilities + [4] * options.uncertainty
    total = IN_FLIGHT * sum(min(planes.IN_MEMORY, pixels * each) for each in kept) + WRITING
    if extras.pictures:
        total += PICTURE * min(pixels, MAX_SIDE**2)
    if extras.measured and pixels <= MOST_PIXELS:
        total += OUTLINES * pixels
    return total


def _decoded(info: ImageInfo, engine: Engine) -> int:
    """Bytes of images that are decoded whole: those in the batch, those that wait for it, and those in other hands."""
    decoded = info.height * info.width * info.channels * np.dtype(info.dtype).itemsize
    waiting = 2 * engine.batch_size + READERS
    if engine.intake.size:
        canvas = decoded * prod(engine.intake.size) // (info.height * info.width)
        return (waiting + IN_FLIGHT) * (min(decoded, KEPT_BYTES) + canvas) + READERS * decoded
    if info.windowed:
        return 0
    tiles = len(engine.grid((info.height, info.width)))
    return (-(-waiting // tiles) + IN_FLIGHT) * decoded


def _of_tiles(infos: Sequence[ImageInfo], engine: Engine, options: Options, tile: int) -> int:
    """Bytes of tiles that are read ahead, and of rows of tiles while they are blended and become labels."""
    info = max(infos, key=lambda info: info.width * info.channels * np.dtype(info.dtype).itemsize)
    most_pixels = max(info.height * info.width for info in infos)
    num_values = engine.members[0].config.data.num_classes + options.uncertainty
    width = engine.intake.size[1] if engine.intake.size else info.width
    sums = 4 * num_values * tile * max(width, info.width)
    # a band of values that becomes int64 labels, and is put into other orders
    band = min(planes.BAND, most_pixels) * (9 + 4 * num_values * (1 + options.probabilities))
    blended = sums + 2 * band
    ahead = (engine.batch_size + READERS) * tile**2 * info.channels * np.dtype(info.dtype).itemsize
    row = min(MOST_BYTES, tile * info.width * info.channels * np.dtype(info.dtype).itemsize)
    return blended + ahead + 2 * row * info.windowed
