"""Chooses the steps of post-processing on predictions of images that were held out. Next to read: `postprocess.py`.

Greedy forward search: in each round every candidate is applied to the predictions as they are by then. Kept is, of
those that raise the mean Dice with a 95 % interval above zero, the one that raises it most; where there is none, the
search ends. The same images choose and judge, so the gain that is reported is a little optimistic.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml_src.core.data.files import Pair
from ml_src.core.data.segmentation import open_source
from ml_src.core.errors import ConfigError, DataError
from ml_src.core.inference.components import Ints, find_regions
from ml_src.core.inference.cross_validation import Fold, for_each_fold, groups_of_folds, open_folds
from ml_src.core.inference.inputs import Input
from ml_src.core.inference.jobs import Request
from ml_src.core.inference.measure import label_maps, true_bands
from ml_src.core.inference.members import EXPORTED
from ml_src.core.inference.planes import Plane
from ml_src.core.inference.postprocess import apply_postprocessing, chain_path, save_chain
from ml_src.core.inference.predictor import Failed, Predicted
from ml_src.core.inference.refine import Guide
from ml_src.core.metrics.intervals import Counts, paired_interval
from ml_src.core.metrics.segmentation import ConfusionMatrix, mean_over_present
from ml_src.core.postprocess_specs import (
    Closing,
    Crf,
    FillHoles,
    KeepLargest,
    Opening,
    PostprocessStep,
    RemoveSmall,
    as_word,
    named_classes,
)
from ml_src.core.progress import progress_bar

MOST_STEPS = 6
RADII = (1, 2, 3)  # of opening and closing
NUM_SIZES = 6  # of regions, and of holes
CRF_RADII, CRF_EPS = (3, 5), (1e-3, 1e-2)
LEAST_GAIN = 5e-5  # of mean Dice: no step is kept for what four decimals do not show
MOST_ALONE = 8  # classes for which steps are tried alone
SHOWN = 3  # candidates of each round


class Case(NamedTuple):
    """An image that was held out: its label map, post-processed as far as the search is, beside its truth."""

    labels: Plane  # (H, W)
    truth: Plane  # (H, W)
    counts: Counts  # (C,) each, of these two
    nodata: int | None
    guide: Guide  # reads the image when it is asked: those of all cases would fill the memory


@dataclass(frozen=True)
class Judging:
    """How label maps are judged."""

    num_classes: int
    ignore_index: int
    groups: Sequence[str] | None = None  # of each image, where images belong together


class Tried(NamedTuple):
    """What a candidate comes to on top of the steps that were kept before it."""

    step: PostprocessStep
    dice: float
    interval: tuple[float, float] | None  # of the gain; None where there is none worth a step

    @property
    def helps(self) -> bool:
        """Whether the gain is more than the choice of images explains."""
        return self.interval is not None and self.interval[0] > 0


class Round(NamedTuple):
    """One round of the search."""

    dice: float  # before it
    tried: list[Tried]  # the best first

    @property
    def kept(self) -> Tried | None:
        """The best of the candidates that help."""
        return next((one for one in self.tried if one.helps), None)


class Tuned(NamedTuple):
    """The chain that was chosen, how that came about in words, and where it was written."""

    steps: list[PostprocessStep]
    block: str
    paths: list[Path]


def tune(request: Request) -> Tuned:
    """Choose the post-processing of one checkpoint, or of the folds of a cross-validation together, and keep it.

    Every checkpoint predicts the validation images of its own fold, without post-processing; the chain is chosen on
    all of these and written beside every checkpoint, also where it has no step. It takes the place of a chain that was
    there before, and of the configuration's, whose steps are candidates too.
    Raises: MLError for all that the user can mend; DataError for fewer than two images (groups, where there are any).
    """
    for path in request.checkpoints:
        if path.suffix.lower() in EXPORTED:
            raise ConfigError(f"{path} keeps the steps that it was exported with: tune the checkpoint, then export it")
    folds = open_folds(replace(request, postprocess=["none"]))
    groups = groups_of_folds(folds)
    _require_two(folds, groups)
    config = folds[0].job.config
    judging = Judging(config.data.num_classes, config.ignore_index, groups)
    by_fold = for_each_fold(folds, "predicting each fold", partial(cases_of, judging=judging))
    before = [case for cases in by_fold for case in cases]
    rounds, after = search(before, judging, config.inference.postprocess)
    gain = paired_interval(_counts(before), _counts(after), judging.ignore_index, groups)
    facts = {
        "mean_dice_before": round(_mean_dice(_counts(before), judging), 6),
        "mean_dice_after": round(_mean_dice(_counts(after), judging), 6),
        "interval_of_gain": None if gain is None else [round(bound, 6) for bound in gain],
        "interval_over": "images" if groups is None else "groups",
        "num_images": len(before),
        "num_tried": sum(len(one.tried) for one in rounds),
        "tta": [view.name for view in folds[0].job.options.views[1:]],
    }
    steps = [one.kept.step for one in rounds if one.kept is not None]
    beside: dict[Path, list[Path]] = {}
    for fold in folds:
        beside.setdefault(chain_path(fold.member.path), []).append(fold.member.path)
    for first, *others in beside.values():
        save_chain(first, steps, facts, others)
    return Tuned(steps, _in_words(rounds, facts), list(beside))


def _require_two(folds: Sequence[Fold], groups: list[str] | None) -> None:
    num, what = sum(fold.num_images for fold in folds), "images"
    if groups is not None:
        num, what = len(set(groups)), "groups"
    if num < 2:
        raise DataError(
            f"the validation images of {folds[0].member.path} are {num} {what.removesuffix('s')}, and a step is only "
            f"kept if it helps on several {what}: give all folds with --cv"
        )


def cases_of(fold: Fold, advance: Callable[[float], None], judging: Judging) -> list[Case]:
    """Predict the validation images of a fold."""
    transforms, channels = fold.member.data.val_transforms, fold.member.intake.channels

    @lru_cache(maxsize=os.cpu_count())  # so many are worked on at a time, and each step asks for bands
    def read(path: Path) -> NDArray[Any]:
        return open_source(Pair(path, path), transforms, channels, with_masks=False).read(None)[0]

    pairs = fold.member.data.pairs("val")
    items = [Input(PurePosixPath(pair.image.stem), pair.image) for pair in pairs]
    by_item = dict(zip(items, pairs, strict=True))

    def finish(predicted: Predicted) -> Case:
        return case_of(by_item[predicted.item], predicted, judging, read)

    found = []
    for result in label_maps(items, fold.job.members, fold.job.options, [], finish, advance):
        if isinstance(result, Failed):
            raise DataError(result.problem)
        found.append(result)
    return found


def case_of(pair: Pair, predicted: Predicted, judging: Judging, read: Callable[[Path], NDArray[Any]]) -> Case:
    """Put a prediction beside its truth.

    `read` gives an image, (H, W, channels), as it was when it was predicted, where it was read whole then.
    Raises: DataError where the mask has another size than its image.
    """
    labels = predicted.labels
    truth = Plane(labels.shape, np.uint8 if max(judging.num_classes - 1, judging.ignore_index) <= 255 else np.uint16)
    confusion = ConfusionMatrix(judging.num_classes, judging.ignore_index)
    for top, bottom, mask in true_bands(pair, labels, judging.ignore_index):
        confusion.update(labels.rows(top, bottom), mask)
        truth.put(top, mask)
    guide = predicted.guide if predicted.image is None else partial(_rows_of, read, pair.image)
    return Case(labels, truth, Counts.of(confusion.matrix), predicted.nodata, guide)


def _rows_of(read: Callable[[Path], NDArray[Any]], path: Path, top: int, bottom: int) -> NDArray[Any]:
    return read(path)[top:bottom]


def _counted(labels: NDArray[Any], mask: NDArray[Any], judging: Judging) -> Counts:
    confusion = ConfusionMatrix(judging.num_classes, judging.ignore_index)
    confusion.update(labels, mask)
    return Counts.of(confusion.matrix)


def _mean_dice(counts: Counts, judging: Judging) -> float:
    """Mean Dice over the classes, from counts (N, C)."""
    return mean_over_present(counts.summed().dice(judging.ignore_index))


def _counts(cases: Sequence[Case]) -> Counts:
    return Counts.stacked([case.counts for case in cases])


def search(
    cases: Sequence[Case], judging: Judging, more: Sequence[PostprocessStep] = ()
) -> tuple[list[Round], list[Case]]:
    """Find the steps, one a round, that help most; return the rounds, and the images after the steps that were kept.

    Args:
        cases: at least two images.
        judging: how.
        more: candidates besides those of `candidates`.
    """
    rounds: list[Round] = []
    kinds: list[tuple[str, list[int] | None]] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while len(rounds) < MOST_STEPS:
            steps = candidates(cases, judging, pool)
            steps += [step for step in more if step not in steps]
            steps = [step for step in steps if _kind(step) not in kinds]
            tried = []
            with progress_bar(f"round {len(rounds) + 1}: trying steps", len(steps), least=1) as advance:
                for number, step in enumerate(steps, start=1):
                    tried.append(_tried(cases, step, judging, pool))
                    advance(number)
            rounds.append(Round(_mean_dice(_counts(cases), judging), sorted(tried, key=lambda one: -one.dice)))
            kept = rounds[-1].kept
            if kept is None:
                break
            kinds.append(_kind(kept.step))
            cases = list(pool.map(partial(_after, step=kept.step, judging=judging), cases))
    return rounds, list(cases)


def _kind(step: PostprocessStep) -> tuple[str, list[int] | None]:
    """What a chain has once: a type of step for the same classes. With other sizes it would only go on."""
    return step.type, named_classes(step)


def _tried(cases: Sequence[Case], step: PostprocessStep, judging: Judging, pool: ThreadPoolExecutor) -> Tried:
    before = _counts(cases)
    after = Counts.stacked(list(pool.map(lambda case: _after(case, step, judging).counts, cases)))
    score, interval = _mean_dice(after, judging), None
    if score >= _mean_dice(before, judging) + LEAST_GAIN:
        interval = paired_interval(before, after, judging.ignore_index, judging.groups)
    return Tried(step, score, interval)


def _after(case: Case, step: PostprocessStep, judging: Judging) -> Case:
    """Apply a step. Only pixels that it changes are counted again."""
    labels = apply_postprocessing(case.labels, [step], judging.num_classes, case.nodata, case.guide)
    counts = case.counts
    for top, bottom in labels.bands():
        old, new = case.labels.rows(top, bottom), labels.rows(top, bottom)
        changed = old != new
        truth = case.truth.rows(top, bottom)[changed]
        now, before = (_counted(values[changed], truth, judging) for values in (new, old))
        counts = Counts(*(known + more - less for known, more, less in zip(counts, now, before, strict=True)))
    return case._replace(labels=labels, counts=counts)


class Regions(NamedTuple):
    """What a class consists of in the label maps. Of scenes, regions count as the parts that bands of rows cut."""

    areas: Ints  # of its regions
    holes: Ints  # areas of what it surrounds
    divided: bool  # whether it has several regions in one image


def candidates(cases: Sequence[Case], judging: Judging, pool: ThreadPoolExecutor) -> list[PostprocessStep]:
    """Return the steps to try: of every type, with sizes that the label maps suggest.

    Class 0 stands for what is around the others, as in the defaults of the steps. Where there are several others, each
    step is tried for all of them together, and alone for those MOST_ALONE whose Dice is lowest.
    """
    values = [value for value in range(1, judging.num_classes) if value != judging.ignore_index]
    found = {value: _joined(list(pool.map(partial(_regions, value=value), cases))) for value in values}
    found = {value: regions for value, regions in found.items() if regions.areas.size}
    scores = _counts(cases).summed().dice(judging.ignore_index)
    alone = sorted(found, key=lambda value: float(scores[value]))[:MOST_ALONE] if len(found) > 1 else []
    steps: list[PostprocessStep] = []
    for named in [None, *([value] for value in sorted(alone))]:
        steps += _of_classes({value: found[value] for value in named or found}, named)
    return steps + [Crf(type="crf", radius=radius, eps=eps) for radius, eps in product(CRF_RADII, CRF_EPS)]


def _of_classes(found: Mapping[int, Regions], named: list[int] | None) -> list[PostprocessStep]:
    """The candidates for some classes together; `named` is None where these are all."""
    if not found:
        return []
    steps: list[PostprocessStep] = []
    steps += [Opening(type="opening", radius=radius, classes=named) for radius in RADII]
    steps += [Closing(type="closing", radius=radius, classes=named) for radius in RADII]
    holes = np.concatenate([regions.holes for regions in found.values()])
    if holes.size:
        steps += [
            FillHoles(type="fill_holes", area=area, classes=named) for area in (*sorted(set(_sizes(holes))), None)
        ]
    for areas in dict.fromkeys(zip(*(_sizes(regions.areas) for regions in found.values()), strict=True)):
        limits = {value: area + 1 for value, area in zip(found, areas, strict=True)}
        if len(found) > 1:
            steps.append(RemoveSmall(type="remove_small", area=limits))
        else:
            steps.append(RemoveSmall(type="remove_small", area=areas[0] + 1, classes=named))
    if any(regions.divided for regions in found.values()):
        steps.append(KeepLargest(type="keep_largest", classes=named))
    return steps


def _regions(case: Case, value: int) -> Regions:
    areas, holes = [], []
    for top, bottom in case.labels.bands():
        mask = case.labels.rows(top, bottom) == value
        areas.append(find_regions(mask, connectivity=8).area[1:])
        around = find_regions(~mask, connectivity=4)
        holes.append(around.area[1:][~around.is_open[1:]])
    found = np.concatenate(areas)
    return Regions(found, np.concatenate(holes), len(found) > 1)


def _joined(parts: Sequence[Regions]) -> Regions:
    areas, holes = (np.concatenate([part[index] for part in parts]) for index in (0, 1))
    return Regions(areas, holes, any(part.divided for part in parts))


def _sizes(areas: Ints) -> list[int]:
    """Areas up to which regions are small: from the smallest up to where half of all pixels lie in smaller ones.

    Evenly spaced as logarithms, NUM_SIZES of them, of which some may be equal.
    """
    areas = np.sort(areas)
    half = areas[np.searchsorted(np.cumsum(areas), areas.sum() / 2)]
    return [round(size) for size in np.geomspace(areas[0], half, NUM_SIZES).tolist()]


def _in_words(rounds: Sequence[Round], facts: Mapping[str, Any]) -> str:
    over = facts["interval_over"]
    lines = [f"Post-processing, chosen on {facts['num_images']} validation images (95 % intervals over {over}):"]
    for number, one in enumerate(rounds, start=1):
        lines += ["", f"  Round {number}: mean Dice is {one.dice:.4f}, {len(one.tried)} steps tried, the best of them:"]
        lines += _rows(one)
        if one.kept is not None:
            lines.append(f"  Kept: {as_word(one.kept.step)}")
        else:
            lines.append("  None raises mean Dice with an interval above zero, so the search ends.")
    steps = [as_word(one.kept.step) for one in rounds if one.kept is not None]
    before, after, interval = (facts[key] for key in ("mean_dice_before", "mean_dice_after", "interval_of_gain"))
    if steps:
        lines += [
            "",
            f"Chosen: {' '.join(steps)}",
            f"Mean Dice rises from {before:.4f} to {after:.4f}: {_gain(after - before, interval)}.",
            "The same images have chosen and judged the steps, so this gain is a little too good.",
        ]
    else:
        lines += ["", "Chosen: no post-processing, as no step helps."]
    return "\n".join(lines)


def _rows(one: Round) -> list[str]:
    """The best few as a table, with the one that was kept."""
    shown = one.tried[:SHOWN]
    if one.kept is not None and one.kept not in shown:
        shown = [*shown, one.kept]
    width = max((len(as_word(each.step)) for each in shown), default=0)
    return [
        f"    {as_word(each.step):{width}}  {each.dice:.4f}  {_gain(each.dice - one.dice, each.interval)}"
        for each in shown
    ]


def _gain(gain: float, interval: Sequence[float] | None) -> str:
    return f"{gain:+.4f}" + ("" if interval is None else f" ({interval[0]:+.4f} to {interval[1]:+.4f})")
