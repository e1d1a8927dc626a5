"""Predictions of a split beside its masks: scores, intervals, and the block that is printed."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml_src.core.data.files import Pair
from ml_src.core.data.segmentation import ignored, require_size
from ml_src.core.data.truth import Truth
from ml_src.core.errors import DataError
from ml_src.core.inference.in_order import in_order
from ml_src.core.inference.inputs import Input
from ml_src.core.inference.members import Member
from ml_src.core.inference.planes import Plane
from ml_src.core.inference.postprocess import apply_postprocessing
from ml_src.core.inference.predictor import Failed, Options, Predicted, predict
from ml_src.core.metrics.boundary import BoundaryScores, boundary_scores, summarize_boundaries
from ml_src.core.metrics.intervals import Counts, score_intervals
from ml_src.core.metrics.segmentation import ConfusionMatrix, Matrix, summarize
from ml_src.core.postprocess_specs import PostprocessStep
from ml_src.core.transforms.source import Window

MOST_PIXELS = 16 << 20  # of an image whose outlines are compared: distances take many times its memory
TITLES = {"test": "Test", "val": "Validation", "train": "Training"}


@dataclass(frozen=True)
class Measuring:
    """How outlines are compared."""

    tolerance: float = 2.0  # of surface Dice, in units of pixel_size
    pixel_size: float = 1.0


class Compared(NamedTuple):
    """A label map beside its truth. Its matrix is not kept: of many images and classes that would be gigabytes."""

    pair: Pair
    counts: Counts  # (C,) each
    scores: dict[str, Any]  # of this image alone, as in metrics.json
    boundaries: BoundaryScores | None  # None for images above MOST_PIXELS


class Comparison(NamedTuple):
    """Label maps beside their truths."""

    images: list[Compared]
    matrix: Matrix  # (C, C), over all of them


def compare_split(
    members: Sequence[Member],
    split: str,
    options: Options,
    steps: Sequence[PostprocessStep],
    how: Measuring,
    keep: Callable[[Predicted], object] | None = None,
    advance: Callable[[float], None] = lambda done: None,
    home: Path | None = None,
) -> Comparison:
    """Predict the images of a split of the first member's data, and compare each with its mask.

    `keep` is given every prediction, post-processed, in a thread of its own; `home` is as in `split_items`.
    Raises: DataError for a file that cannot be read.
    """
    config, items = members[0].config, split_items(members[0], split, home)
    by_item = dict(zip(items, members[0].data.pairs(split), strict=True))

    def finish(predicted: Predicted) -> tuple[Compared, Matrix]:
        if keep is not None:
            keep(predicted)
        num_classes, ignore_index = config.data.num_classes, config.ignore_index
        return compare(by_item[predicted.item], predicted.labels, num_classes, ignore_index, how)

    images = []
    total = np.zeros((config.data.num_classes, config.data.num_classes), np.int64)
    for result in label_maps(items, members, options, steps, finish, advance):
        if isinstance(result, Failed):
            raise DataError(result.problem)
        compared, matrix = result
        images.append(compared)
        total += matrix
    return Comparison(images, total)


def split_items(member: Member, split: str, home: Path | None = None) -> list[Input]:
    """Return the images of a split, named by where they lie in `home`; None is `common_folder` of this split alone."""
    home = home or common_folder([member], split)
    paths = [pair.image for pair in member.data.pairs(split)]
    names = [_place(path, member.data.data_dir).relative_to(home).with_suffix("") for path in paths]
    return [Input(PurePosixPath(name.as_posix()), path) for name, path in zip(names, paths, strict=True)]


def common_folder(members: Sequence[Member], split: str) -> Path:
    """Return the deepest folder that has all images of a split of each member, as an absolute path."""
    folders = {
        _place(pair.image, member.data.data_dir).parent for member in members for pair in member.data.pairs(split)
    }
    return Path(os.path.commonpath(folders))


def _place(image: Path, data_dir: Path) -> Path:
    """Where an image lies, in the same words however the folder of the data is given."""
    if image.is_relative_to(data_dir):
        image = data_dir.resolve() / image.relative_to(data_dir)
    return Path(os.path.abspath(image))  # noqa: PTH100 - resolved, a link would lose its name


def label_maps(
    items: Sequence[Input],
    members: Sequence[Member],
    options: Options,
    steps: Sequence[PostprocessStep],
    finish: Callable[[Predicted], Any],
    advance: Callable[[float], None] = lambda done: None,
) -> Iterator[Any]:
    """Predict and post-process images; yield what `finish`, in a thread of its own, makes of each, or its Failed."""
    num_classes = members[0].config.data.num_classes

    def work(predicted: Predicted | Failed) -> Any:
        if isinstance(predicted, Failed):
            return predicted
        try:
            if steps:
                rows = predicted.guide
                predicted.labels = apply_postprocessing(predicted.labels, steps, num_classes, predicted.nodata, rows)
            return finish(predicted)
        except DataError as error:  # the file has gone or changed since it was read
            return Failed(predicted.item, str(error))

    for _, result in in_order(work, predict(items, members, options, advance), ahead=1):
        yield result


def compare(pair: Pair, labels: Plane, num_classes: int, ignore_index: int, how: Measuring) -> tuple[Compared, Matrix]:
    """Count a label map against the mask of its image, by bands, and compare the outlines; return the matrix too.

    Raises: DataError where the mask has another size than its image.
    """
    confusion, masks = ConfusionMatrix(num_classes, ignore_index), []
    with_outlines = math.prod(labels.shape) <= MOST_PIXELS
    for top, bottom, mask in true_bands(pair, labels, ignore_index):
        confusion.update(labels.rows(top, bottom), mask)
        if with_outlines:
            masks.append(mask)
    outlines = None
    if with_outlines:
        mask = np.concatenate(masks)
        outlines = boundary_scores(labels.whole(), mask, num_classes, ignore_index, how.tolerance, how.pixel_size)
    matrix = confusion.matrix
    return Compared(pair, Counts.of(matrix), _scores(matrix, ignore_index), outlines), matrix


def true_bands(pair: Pair, labels: Plane, ignore_index: int) -> Iterator[tuple[int, int, NDArray[Any]]]:
    """Yield the mask of a pair by the bands of its label map: top, bottom, rows (n, W), ignored where there is no data.

    Raises: DataError where the mask has another size than its image.
    """
    truth = Truth(pair)
    require_size((truth.mask.height, truth.mask.width), labels.shape, pair)
    whole = None if truth.windowed else _counted(truth, None, ignore_index)  # each band would decode all of it
    for top, bottom in labels.bands():
        window = Window(top, 0, bottom - top, labels.shape[1])
        yield top, bottom, _counted(truth, window, ignore_index) if whole is None else whole[top:bottom]


def _counted(truth: Truth, window: Window | None, ignore_index: int) -> NDArray[Any]:
    mask, nowhere = truth.read(window)
    return mask if nowhere is None else ignored(mask, nowhere, ignore_index)


def split_report(
    members: Sequence[Member],
    split: str,
    options: Options,
    steps: Sequence[PostprocessStep],
    how: Measuring,
    keep: Callable[[Predicted], object] | None = None,
    advance: Callable[[float], None] = lambda done: None,
) -> dict[str, Any]:
    """Predict, compare and score a split; all is as in `compare_split` and `report`."""
    found = compare_split(members, split, options, steps, how, keep, advance)
    config = members[0].config
    return report(found, config.class_names, config.ignore_index, groups_of(members[0], split), how)


def report(
    found: Comparison,
    class_names: Sequence[str],
    ignore_index: int,
    groups: Sequence[str] | None,
    how: Measuring,
) -> dict[str, Any]:
    """Return the scores over all images and of each, as plain data: what metrics.json has.

    Args:
        found: the images, and the matrix over all of them.
        class_names: one a class.
        ignore_index: may be one of the classes.
        groups: of each image, where images belong together; intervals are then over groups.
        how: what was compared.
    """
    images, one_group = found.images, groups is not None and len(set(groups)) == 1
    outlines = [one.boundaries for one in images if one.boundaries is not None]
    complete = outlines if len(outlines) == len(images) else None
    counts = Counts.stacked([one.counts for one in images])
    intervals = score_intervals(counts, complete, ignore_index, None if one_group else groups)
    return {
        "num_images": len(images),
        "class_names": list(class_names),
        **_scores(found.matrix, ignore_index),
        "boundaries": {
            "num_images": len(outlines),
            "tolerance": how.tolerance,
            "pixel_size": how.pixel_size,
            **(summarize_boundaries(outlines) if outlines else {}),
        },
        "intervals": intervals and {"one_group": one_group, **intervals},
        "confusion_matrix": found.matrix.tolist(),
        "per_image": [{"image": one.pair.image.name, **one.scores, **_outlines(one.boundaries)} for one in images],
    }


def groups_of(member: Member, split: str) -> list[str] | None:
    """Return the group of each image of a split, or None where ml-split was told of none."""
    try:
        return member.data.groups(split)
    except DataError:
        return None


def _scores(matrix: Matrix, ignore_index: int) -> dict[str, Any]:
    """The scores of one matrix, with None for what is not defined (JSON knows no NaN)."""
    return {key: _defined(value) for key, value in summarize(matrix, ignore_index).items()}


def _outlines(scores: BoundaryScores | None) -> dict[str, Any]:
    if scores is None:
        return {}
    return {
        "hd95_per_class": [_defined(value) for value in scores.hd95.tolist()],
        "surface_dice_per_class": [_defined(value) for value in scores.surface_dice.tolist()],
        "boundary_iou_per_class": [_defined(value) for value in scores.boundary_iou.tolist()],
        "missed": scores.missed,
        "invented": scores.invented,
    }


def _defined(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def results(title: str, report: dict[str, Any], ignore_index: int) -> str:
    """Return a report as the block that is printed."""
    names, per_class = report["class_names"], report["iou_per_class"]
    lines = [
        f"{title} Results:",
        f"  Mean IoU: {_number(report['iou'])}",
        f"  Mean Dice: {_number(report['dice'])}",
        f"  Pixel Accuracy: {_number(report['pixel_accuracy'])}",
        "",
        "  Per-class IoU:",
    ]
    for index, (name, value) in enumerate(zip(names, per_class, strict=True)):
        lines.append(f"    Class {index} ({name}): {'ignored' if index == ignore_index else _number(value)}")
    lines += ["", *_outline_lines(report, ignore_index)]
    present = sum(value is not None for value in per_class)
    lines += [
        "",
        f"Means are over {present} of {len(names)} classes (those present in truth or prediction), from "
        f"one confusion matrix over all pixels of {report['num_images']} images at their own size.",
        _interval_line(report["intervals"]),
    ]
    return "\n".join(lines)


def _outline_lines(report: dict[str, Any], ignore_index: int) -> list[str]:
    """A line for each class; of what is missed and invented, the counts, for they weigh most."""
    outlines = report["boundaries"]
    if not outlines["num_images"]:
        return ["  Outlines were not compared: the images are too large."]
    unit = "pixels" if outlines["pixel_size"] == 1 else "units"
    lines = [f"  Outlines (HD95 in {unit}; surface Dice within {outlines['tolerance']:g} {unit}; boundary IoU):"]
    for index, name in enumerate(report["class_names"]):
        if index == ignore_index or outlines["hd95_per_class"][index] is None:
            continue
        scores = [outlines[f"{key}_per_class"][index] for key in ("hd95", "surface_dice", "boundary_iou")]
        counts = outlines["counts_per_class"][index]
        lines.append(
            f"    Class {index} ({name}): {scores[0]:.2f}, {scores[1]:.4f}, {scores[2]:.4f}; "
            f"missed in {counts['missed']} and invented in {counts['invented']} of {counts['images']} images"
        )
    return lines


def _interval_line(intervals: dict[str, Any] | None) -> str:
    if intervals is None:
        return "One image alone gives no intervals."
    ends = [
        f"{what} {intervals[key][0]:.4f} to {intervals[key][1]:.4f}"
        for what, key in (("mean IoU", "iou"), ("mean Dice", "dice"), ("pixel accuracy", "pixel_accuracy"))
        if intervals[key] is not None
    ]
    alike = ", all of one group, so that new groups may differ by more" if intervals["one_group"] else ""
    return f"95 % intervals, by resampling {intervals['num']} {intervals['over']}{alike}: {', '.join(ends)}."


def _number(value: float | None) -> str:
    return "not present" if value is None else f"{value:.4f}"
