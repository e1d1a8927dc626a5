"""A cross-validation as a whole: each fold predicts the images that were held out from it. Next to read: `tune.py`.

So every image is predicted once, by a network that was not trained on it, and all of them make one table. But each
fold's best epoch was chosen on its images, which makes the scores a little too good.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ml_src.core.atomic import only_writer, write_json
from ml_src.core.errors import ConfigError
from ml_src.core.inference.jobs import (
    Measured,
    Prepared,
    Request,
    begin_anew,
    bounded,
    home_of,
    prepare,
    require_one_fold,
    require_own,
    write_outputs,
)
from ml_src.core.inference.measure import (
    Comparison,
    Measuring,
    common_folder,
    compare_split,
    groups_of,
    report,
    results,
    split_items,
)
from ml_src.core.inference.members import Member, checkpoints, require_same_classes
from ml_src.core.inference.postprocess import has_chain
from ml_src.core.inference.predictor import Options, Predicted
from ml_src.core.progress import progress_bar

VAL_LIST = re.compile(r"fold_(\d+)_val_images\.txt")
OF_A_FOLD = ("num_images", "iou", "dice", "pixel_accuracy", "iou_per_class", "dice_per_class", "intervals")

Found = TypeVar("Found")


@dataclass(frozen=True)
class Fold:
    """A network that is ready to predict the images that were held out from it."""

    job: Prepared  # with one member

    @property
    def member(self) -> Member:
        """The network."""
        return self.job.members[0]

    @property
    def number(self) -> int:
        """Which fold of the splits it is."""
        return self.job.config.data.fold

    @property
    def num_images(self) -> int:
        """How many images were held out."""
        return self.member.data.num_images("val")


def open_folds(request: Request) -> list[Fold]:
    """Open each checkpoint of a request as a job of its own.

    Raises: MLError for all that the user can mend, such as folds of different data sets or classes, or an image that
        two of them have for validation.
    """
    paths = checkpoints(request.checkpoints)
    folds = [Fold(prepare(replace(request, checkpoints=[path]))) for path in paths]
    for fold in folds:
        fold.member.require_data()
        require_one_fold(fold.member, "val")
        _require_same_data(folds[0].member, fold.member)
    require_same_classes([fold.member for fold in folds])
    _require_each_image_once(folds)
    return [Fold(replace(fold.job, options=_bounded(fold))) for fold in folds]


def _bounded(fold: Fold) -> Options:
    return bounded(fold.job, split_items(fold.member, "val"), measured=True)


def _require_same_data(first: Member, other: Member) -> None:
    one, two = ((Path(member.config.data.data_dir), member.config.splits_dir) for member in (first, other))
    if [path.resolve() for path in one] != [path.resolve() for path in two]:
        place = int(one[0].resolve() == two[0].resolve())
        raise ConfigError(
            f"{first.path} was trained on {one[place]}, but {other.path} on {two[place]}: give folds of one data set"
        )


def _require_each_image_once(folds: Sequence[Fold]) -> None:
    known: dict[Path, Fold] = {}
    for fold in folds:
        for pair in fold.member.data.pairs("val"):
            other = known.setdefault(pair.image.resolve(), fold)
            if other is not fold:
                raise ConfigError(
                    f"{pair.image} is a validation image of both {other.member.path} and {fold.member.path}: give each "
                    "fold once, of a split that was made without --val_split"
                )


def for_each_fold(
    folds: Sequence[Fold], text: str, work: Callable[[Fold, Callable[[float], None]], Found]
) -> list[Found]:
    """Do the work on every fold; it is told how to report the number of its images that are done."""
    ends = list(accumulate(fold.num_images for fold in folds))
    with progress_bar(text, ends[-1], least=1) as advance:

        def from_on(start: int) -> Callable[[float], None]:
            return lambda done: advance(start + done)

        return [work(fold, from_on(start)) for fold, start in zip(folds, [0, *ends], strict=False)]


def groups_of_folds(folds: Sequence[Fold]) -> list[str] | None:
    """Return the group of each held-out image, fold by fold, or None where ml-split was told of none."""
    groups: list[str] = []
    for fold in folds:
        of_fold = groups_of(fold.member, "val")
        if of_fold is None:
            return None
        groups += of_fold
    return groups


def measure_folds(request: Request) -> Measured:
    """Predict the validation images of every fold with that fold's network, and measure all of them as one set.

    Writes what `jobs.measure_split` writes, with a table of the folds in metrics.json, into `request.output` (default:
    <run>_cv beside the runs' folders).
    Raises: MLError for all that the user can mend.
    """
    folds = open_folds(request)
    folder = request.output or _default_folder(folds[0])
    require_own(folder, "cv")
    with only_writer(folder):
        begin_anew(folder)
        return _measure_into(folder, request, folds)


def _measure_into(folder: Path, request: Request, folds: Sequence[Fold]) -> Measured:
    config = folds[0].job.config
    drawn, how = replace(request, overlay=True), Measuring(request.tolerance, request.pixel_size)
    home = common_folder([fold.member for fold in folds], "val")

    def measured(fold: Fold, advance: Callable[[float], None]) -> Comparison:
        def keep(predicted: Predicted) -> None:
            write_outputs(folder, predicted, drawn, fold.job.config)

        options = replace(fold.job.options, folder=folder)
        return compare_split(fold.job.members, "val", options, fold.job.steps, how, keep, advance, home)

    def scored(found: Comparison, groups: list[str] | None) -> dict[str, Any]:
        return report(found, config.class_names, config.ignore_index, groups, how)

    by_fold = for_each_fold(folds, "predicting each fold", measured)
    images = [one for found in by_fold for one in found.images]
    total = np.sum([found.matrix for found in by_fold], axis=0)
    merged = scored(Comparison(images, total), groups_of_folds(folds))
    alone = [scored(found, groups_of(fold.member, "val")) for fold, found in zip(folds, by_fold, strict=True)]
    shared, own = _shared([fold.job.how for fold in folds])
    table = [
        {
            "fold": fold.number,
            "checkpoint": str(fold.member.path),
            "how": differing,
            **{key: scores[key] for key in OF_A_FOLD},
        }
        for fold, differing, scores in zip(folds, own, alone, strict=True)
    ]
    write_json(folder / "metrics.json", {"split": "cv", "how": shared, **merged, "folds": table})
    block = [results("Cross-validated", merged, config.ignore_index), "", *_fold_lines(table), "", *_remarks(folds)]
    return Measured("\n".join(block), folder)


def _default_folder(fold: Fold) -> Path:
    home = home_of([fold.member])
    return home.parent / (re.sub(r"_fold_\d+$", "", home.resolve().name) + "_cv")


def _shared(hows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Divide what the outputs of each fold depend on into what holds for all of them and what is its own."""
    shared = {key: value for key, value in hows[0].items() if all(how[key] == value for how in hows)}
    return shared, [{key: value for key, value in how.items() if key not in shared} for how in hows]


def _fold_lines(table: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["  Per fold:"]
    for row in table:
        iou, dice = ("not present" if row[key] is None else f"{row[key]:.4f}" for key in ("iou", "dice"))
        lines.append(f"    Fold {row['fold']}: {row['num_images']} images, mean IoU {iou}, mean Dice {dice}")
    return lines


def _remarks(folds: Sequence[Fold]) -> list[str]:
    splits_dir = folds[0].job.config.splits_dir
    lists = (VAL_LIST.fullmatch(path.name) for path in splits_dir.iterdir())
    missing = {int(found[1]) for found in lists if found} - {fold.number for fold in folds}
    lines = []
    if missing:
        numbers = ", ".join(map(str, sorted(missing)))
        lines.append(f"Without fold {numbers} of {splits_dir}, for which no checkpoint was given.")
    chosen = "best epoch was"
    if folds[0].job.request.postprocess is None and any(has_chain(fold.member.path) for fold in folds):
        chosen = "best epoch and its post-processing were"
    lines.append(f"Each fold's {chosen} chosen on these very images, so the scores are a little too good.")
    return lines
