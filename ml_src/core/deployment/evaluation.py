"""Images predicted by an exported file, and by what it was exported from, beside their masks.

What is compared is what is shown: tiles, blending and resizing are those of ml-inference. Next to read: `parity.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from ml_src.core.data.files import Pair
from ml_src.core.data.segmentation import ignored, read_truth, require_size
from ml_src.core.data.truth import Truth
from ml_src.core.deployment.parity import Output, Parity
from ml_src.core.inference.inputs import Input
from ml_src.core.inference.members import Member
from ml_src.core.inference.predictor import Engine, Options, most_probable
from ml_src.core.metrics.segmentation import ConfusionMatrix, iou, mean_over_present
from ml_src.core.transforms.intensity import full_range
from ml_src.core.transforms.source import Window

Advance = Callable[[float], None]
NUM_RANDOM = 8  # images, where there are none to validate on


class Rows(NamedTuple):
    """Some rows of an image, as every member predicts them."""

    pair: Pair
    outputs: list[Output]
    mask: NDArray[Any]  # (n, W), ignored where the image has no data
    nodata: NDArray[np.bool_] | None  # (n, W)


def predicted_rows(
    ensembles: Sequence[Sequence[Member]], pairs: Sequence[Pair], options: Options, advance: Advance
) -> Iterator[Rows]:
    """Predict images by several ensembles side by side, each of members of one intake; yield their rows.

    The last of them says which tiles all of them see: an exported file may take no others.

    The arrays are good until the next rows are asked for.
    Raises: DataError for a file that cannot be read, or a mask of another size than its image.
    """
    items = [Input(PurePosixPath(str(number)), pair.image) for number, pair in enumerate(pairs)]
    num_classes, ignore_index = ensembles[0][0].config.data.num_classes, ensembles[0][0].config.ignore_index
    label_type = np.dtype(np.uint8 if num_classes <= 256 else np.uint16)
    known: tuple[int, Truth, NDArray[Any] | None] | None = None
    engines = [Engine(members, options, ensembles[-1][0].intake) for members in ensembles]
    for bands in zip(*(engine.bands(items) for engine in engines), strict=True):
        for band in bands:
            if band.problem is not None:
                raise band.problem
        first, pair = bands[0], pairs[bands[0].number]
        assert first.scene is not None
        if known is None or known[0] != first.number:
            truth = Truth(pair)
            require_size((truth.mask.height, truth.mask.width), first.scene.size, pair)
            known = first.number, truth, None if truth.windowed else read_truth(pair, ignore_index)
        bottom = first.top + first.values.shape[1]
        nodata = first.scene.nowhere(first.top, bottom)
        mask = _mask_rows(known[1], known[2], Window(first.top, 0, bottom - first.top, first.values.shape[2]))
        if nodata is not None:
            mask = ignored(mask, nodata, ignore_index)
        outputs = [Output(band.values, most_probable(band.values, label_type)) for band in bands]
        yield Rows(pair, outputs, mask, nodata)
        advance(first.number + bottom / first.scene.size[0])


def _mask_rows(truth: Truth, whole: NDArray[Any] | None, window: Window) -> NDArray[Any]:
    return truth.read(window)[0] if whole is None else whole[window.top : window.top + window.height]


def compare_on(
    parity: Parity,
    reference: Sequence[Member],
    exported: Member,
    pairs: Sequence[Pair],
    options: Options,
    advance: Advance = lambda done: None,
) -> None:
    """Count into `parity` how an exported file predicts images, beside the members that it was exported from."""
    for rows in predicted_rows([reference, [exported]], pairs, options, advance):
        one, other = rows.outputs
        parity.update(str(rows.pair.image), one, other, rows.mask, rows.nodata)


def compare_on_random(parity: Parity, reference: Sequence[Member], exported: Member, dtype: str) -> None:
    """The same on pictures of smooth noise, where no images are at hand: one of the usual size, and smaller ones."""
    rng, intake = np.random.default_rng(0), exported.intake
    size = intake.tile if intake.fixed else intake.size or intake.tile
    for number in range(NUM_RANDOM):
        height, width = (max(1, side - 3 * number) for side in size)
        pixels = noise(rng, (height, width, reference[0].intake.channels), dtype)[None]
        label_type = np.dtype(np.uint8 if reference[0].config.data.num_classes <= 256 else np.uint16)
        outputs = []
        for members in (reference, [exported]):
            values = Engine(members, Options()).values(pixels)[0]
            outputs.append(Output(values, most_probable(values, label_type)))
        parity.update(f"noise {number + 1}", outputs[0], outputs[1])


def noise(rng: np.random.Generator, shape: tuple[int, int, int], dtype: str) -> NDArray[Any]:
    """Return smooth noise (H, W, channels) over the full range of a number type."""
    channels = [cv2.GaussianBlur(rng.random(shape[:2], np.float32), (0, 0), 3) for _ in range(shape[2])]
    image = np.stack(channels, axis=2)
    image = (image - image.min()) / max(float(np.ptp(image)), 1e-6)
    return np.asarray((image * full_range(dtype)).astype(dtype))


def mean_iou(member: Member, pairs: Sequence[Pair], options: Options, advance: Advance = lambda done: None) -> float:
    """Return the mean IoU of a member over the classes that the masks have; NaN where no pixel is labelled.

    Not over those that are predicted too, as scores are: a stray pixel of another class would weigh as much as a class.
    """
    config = member.config
    confusion = ConfusionMatrix(config.data.num_classes, config.ignore_index)
    for rows in predicted_rows([[member]], pairs, options, advance):
        labels, mask = rows.outputs[0].labels, rows.mask
        if rows.nodata is not None:
            labels, mask = labels[~rows.nodata], mask[~rows.nodata]
        confusion.update(labels, mask)
    matrix = confusion.matrix
    scores = iou(matrix, config.ignore_index)
    return mean_over_present(np.where(matrix.sum(axis=1) > 0, scores, np.nan))
