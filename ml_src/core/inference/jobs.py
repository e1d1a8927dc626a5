"""What ml-inference is asked for: files to predict, or a split to measure. Next to read: `predictor.py`."""

import json
import logging
import math
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ml_src.core.allocator import give_back_freed_memory, keep_freed_memory
from ml_src.core.atomic import only_writer, remove_leftovers, write_json
from ml_src.core.config import Config
from ml_src.core.data.files import image_info
from ml_src.core.data.geotiffs import require_rasterio
from ml_src.core.errors import ConfigError, DataError
from ml_src.core.inference.budget import Extras, within
from ml_src.core.inference.inputs import Input, find_inputs
from ml_src.core.inference.journal import JOURNAL, Done, Journal, Stamp, stamp_of
from ml_src.core.inference.measure import TITLES, Measuring, label_maps, results, split_items, split_report
from ml_src.core.inference.members import Member, checkpoints, open_member, require_same_classes, weighted
from ml_src.core.inference.memory import MIB, format_size, parse_size
from ml_src.core.inference.postprocess import chain_path
from ml_src.core.inference.predictor import Failed, Options, Predicted
from ml_src.core.inference.tiling import ALIGN
from ml_src.core.inference.views import Aggregation, Levels, View, default_views, parse_views
from ml_src.core.inference.writers import (
    SCRATCH,
    place_of,
    write_mask,
    write_overlay,
    write_polygons,
    write_probabilities,
    write_uncertainty,
)
from ml_src.core.postprocess_specs import PostprocessStep, as_word, misfits, parse_steps, steps_to_yaml
from ml_src.core.progress import progress_bar

MERGES: dict[str, Aggregation] = {"soft_voting": "mean", "hard_voting": "voting", "weighted": "mean"}
"""Word of --ensemble_aggregation -> how probabilities are merged."""

SMALLEST_TILE = 64  # pixels a side, of --tile
MOST_OVERLAP = 0.9

NOISE = 16 * MIB  # what a process holds before it predicts differs by less than this from run to run

KINDS = ("masks", "overlays", "probabilities", "uncertainty", "polygons")
"""The folders of outputs."""

log = logging.getLogger("ml_src")


@dataclass(frozen=True)
class Request:
    """The words of the command line that all of its uses share."""

    checkpoints: Sequence[Path]
    output: Path | None = None
    data_dir: Path | None = None
    device: str = "auto"
    precision: str = "auto"
    compile: bool = False
    plugins: Sequence[str] = ()
    tile: int | None = None
    overlap: float | None = None
    blend: str = Options.blend
    batch_size: int | None = None
    max_ram: str | None = None
    tta: bool = False
    tta_augmentations: Sequence[str] | None = None
    tta_aggregation: Aggregation = "mean"
    ensemble_aggregation: str = "soft_voting"
    ensemble_weights: Sequence[float] | None = None
    postprocess: Sequence[str] | None = None
    overlay: bool = False
    save_probs: Literal["tiff", "npz"] | None = None
    uncertainty: bool = False
    polygons: bool = False
    tolerance: float = Measuring.tolerance
    pixel_size: float = Measuring.pixel_size


class Measured(NamedTuple):
    """What a split came to, and where it was written."""

    block: str
    output_dir: Path


class Summary(NamedTuple):
    """What became of the files."""

    num_predicted: int
    num_before: int  # finished by an earlier run
    problems: list[str]
    output_dir: Path


@dataclass(frozen=True)
class Prepared:
    """A request with its networks opened and its words understood."""

    request: Request
    members: list[Member]
    options: Options
    steps: list[PostprocessStep]

    @property
    def config(self) -> Config:
        """Of the first member; classes and ignore_index are those of all."""
        return self.members[0].config

    @property
    def how(self) -> dict[str, Any]:
        """All that the outputs depend on, as plain data."""
        options = self.options
        return {
            "checkpoints": [member.digest for member in self.members],
            "weights": [round(member.weight, 6) for member in self.members],
            "ensemble": self.request.ensemble_aggregation if len(self.members) > 1 else None,
            "tta": [view.name for view in options.views[1:]],
            "tta_aggregation": options.tta_aggregation if len(options.views) > 1 else None,
            "tile": options.tile,
            "overlap": options.overlap,
            "blend": options.blend,
            "precision": [member.precision for member in self.members],
            "postprocess": steps_to_yaml(self.steps),
        }


def prepare(request: Request) -> Prepared:
    """Open the checkpoints and read the words.

    Raises: MLError for all that the user can mend.
    """
    _require_possible(request)
    keep_freed_memory() if request.max_ram is None else give_back_freed_memory()
    how = (request.device, request.plugins, request.data_dir, request.precision, request.compile)
    members = [open_member(path, *how) for path in checkpoints(request.checkpoints)]
    require_same_classes(members)
    given = request.ensemble_weights
    if (given is not None) != (request.ensemble_aggregation == "weighted"):
        raise ConfigError("--ensemble_aggregation weighted and --ensemble_weights go together: give both or neither")
    members = weighted(members, given)
    if request.polygons:
        require_rasterio("--polygons needs rasterio", "to write them")
    options = Options(
        tile=request.tile and math.ceil(request.tile / ALIGN) * ALIGN,
        overlap=request.overlap,
        blend=request.blend,
        batch_size=request.batch_size,
        views=parse_views(_views(request, members[0].config), all(member.config.data.mirror for member in members)),
        tta_aggregation=request.tta_aggregation,
        ensemble_aggregation=MERGES[request.ensemble_aggregation],
        probabilities=request.save_probs is not None,
        uncertainty=request.uncertainty,
    )
    _require_views_that_fit(members, options.views)
    return Prepared(request, members, options, _steps(request, members))


def _require_views_that_fit(members: Sequence[Member], views: Sequence[View]) -> None:
    """Refuse views that are larger than the one size that an exported file takes."""
    for member in members:
        if not member.intake.fixed:
            continue
        height, width = member.intake.tile
        blank = np.zeros((1, height, width, 1), np.uint8)
        for view in views:
            shape = view.apply(blank, Levels.of(blank.dtype, (0.0,), (1.0,))).shape
            if shape[1] > height or shape[2] > width:
                raise ConfigError(
                    f"{member.path} takes {height}x{width} pixels only, and the view {view.name} of them is larger: "
                    "leave it out, or export the checkpoint without --input_size"
                )


def _require_possible(request: Request) -> None:
    """Raise ConfigError for a number that cannot be; no comparison holds for NaN."""
    for name, possible, advice in (
        ("tile", request.tile is None or request.tile >= SMALLEST_TILE, f"{SMALLEST_TILE} pixels or more"),
        ("overlap", request.overlap is None or 0 <= request.overlap <= MOST_OVERLAP, f"a share of 0 to {MOST_OVERLAP}"),
        ("batch_size", request.batch_size is None or request.batch_size >= 1, "1 or more"),
        ("tolerance", 0 < request.tolerance < math.inf, "a number above 0"),
        ("pixel_size", 0 < request.pixel_size < math.inf, "a number above 0"),
    ):
        if not possible:
            raise ConfigError(f"--{name} {getattr(request, name)} cannot be: give {advice}")


def bounded(job: Prepared, items: Sequence[Input], measured: bool) -> Options:
    """Return the options of a job with the tiles that --max_ram allows for these images, where it is given."""
    request = job.request
    if request.max_ram is None:
        return job.options
    extras = Extras(request.overlay or request.uncertainty or measured, measured, bool(job.steps))
    return within(request.max_ram, items, job.members, job.options, extras)


def _bounded_as_before(job: Prepared, items: Sequence[Input], folder: Path) -> Options:
    """Return `bounded` options with the tiles that the journal in a folder records, if it has one.

    --max_ram chooses by what the process holds, so that it may choose otherwise in each run; but outputs of different
    tiles are not to be mixed. The tiles of work that goes on are those with which it began, also if it began without
    --max_ram (recorded as None if without --tile too); only the batch is chosen anew. --tile stays the most that is
    allowed: what is above it is left to the journal to refuse.
    Raises: ConfigError where the limit is too little for those tiles.
    """
    limit, recorded = job.request.max_ram, Journal.recorded_job(folder)
    if limit is None or recorded is None:
        return bounded(job, items, measured=False)
    tile, most = recorded.get("tile"), job.options.tile
    if most is not None and (tile is None or tile > most):
        return bounded(job, items, measured=False)
    # what has just fitted shall fit again
    request = replace(job.request, max_ram=format_size(parse_size(limit) + NOISE))
    before = replace(job.options, tile=tile)
    options = bounded(replace(job, request=request, options=before), items, measured=False)
    if options.tile is not None and options.tile < _largest_tile(before, job.members):
        raise ConfigError(
            f"--max_ram {limit} is too little for the tiles of the interrupted work in {folder}, of "
            f"{_largest_tile(before, job.members)} pixels: give more, or leave out --resume to begin anew"
        )
    return replace(options, tile=tile)


def _largest_tile(options: Options, members: Sequence[Member]) -> int:
    """The longest side in pixels that a network is given."""
    return options.tile or max(max(member.intake.size or member.intake.tile) for member in members)


def _views(request: Request, config: Config) -> Sequence[str]:
    if request.tta_augmentations is not None:
        return request.tta_augmentations
    return default_views(config) if request.tta else ()


def _steps(request: Request, members: Sequence[Member]) -> list[PostprocessStep]:
    """The chain of the command line, else the tuned one that lies beside the checkpoints, else the configuration's."""
    if request.postprocess is not None:
        source, steps = "--postprocess", parse_steps(request.postprocess)
    else:
        source = str(chain_path(members[0].path))
        tuned = [member.chain for member in members]
        chains = [
            member.config.inference.postprocess if chain is None else chain
            for member, chain in zip(members, tuned, strict=True)
        ]
        steps = chains[0]
        if any(chain != steps for chain in chains):
            raise ConfigError(
                "the checkpoints have different chains of post-processing: give one with --postprocess, or none"
            )
        if tuned[0] is not None and steps != members[0].config.inference.postprocess:
            log.info("post-processing as tuned: %s", " ".join(map(as_word, steps)) or "none")
    if problems := misfits(steps, members[0].config.data.num_classes):
        raise ConfigError(f"{source}: {problems[0]}")
    return steps


def predict_files(request: Request, words: Sequence[str], recursive: bool, strict: bool, resume: bool) -> Summary:
    """Predict the images that files, folders and globs name, into the folders of `request.output`.

    Raises: MLError for what the user can mend; with `strict` also for the first file that cannot be read, which
        otherwise is named, counted and passed over.
    """
    job = prepare(request)
    folder = request.output or home_of(job.members) / "inference" / _folder_name(words)
    items = find_inputs(words, recursive, folder)
    require_own(folder, None)
    with only_writer(folder):
        return _predict_into(folder, job, items, strict, resume)


def _predict_into(folder: Path, job: Prepared, items: Sequence[Input], strict: bool, resume: bool) -> Summary:
    request = job.request
    if any(_is_scene(item) for item in items):  # whose memory is to be that of its rows of tiles
        give_back_freed_memory()
    options = _bounded_as_before(job, items, folder) if resume else bounded(job, items, measured=False)
    job = replace(job, options=replace(options, folder=folder))
    chosen = () if request.max_ram is None else ("tile",)
    journal = Journal(folder, {**job.how, **_outputs(request)}, resume, chosen)
    _remove_leftovers(folder)
    waiting = [item for item in items if not journal.finished(item)]
    stamps = {item: _stamp(item.path) for item in waiting}
    clock = [time.perf_counter()]

    def finish(predicted: Predicted) -> None:
        files = write_outputs(folder, predicted, request, job.config)
        place = place_of(predicted.item.path)
        pixels, nodata = _count(predicted, job.config.data.num_classes)
        clock.append(time.perf_counter())
        done = Done(
            stamp=stamps[predicted.item],
            height=predicted.labels.shape[0],
            width=predicted.labels.shape[1],
            pixels=pixels,
            pixels_nodata=nodata,
            seconds=clock[-1] - clock[-2],
            files=files,
            pixel_area=None if place is None else place.pixel_area,
        )
        journal.record(predicted.item, done)

    problems = []
    try:
        with progress_bar("predicting", len(waiting), least=1) as advance:
            found = label_maps(waiting, job.members, job.options, job.steps, finish, advance)
            for item, result in zip(waiting, found, strict=True):
                if isinstance(result, Failed):
                    if strict:
                        raise DataError(result.problem)
                    log.warning("skipped: %s", result.problem)
                    journal.record_error(item, result.problem)
                    problems.append(result.problem)
    except KeyboardInterrupt:
        log.info("To go on, give the same command with --resume")
        raise
    journal.finish(job.config.class_names)
    return Summary(len(waiting) - len(problems), len(items) - len(waiting), problems, folder)


def measure_split(request: Request, split: str) -> Measured:
    """Predict and measure `test`, `val` or `train` of the fold that the checkpoints were trained on.

    Writes masks, overlays and what else was asked for, and, when all is done, metrics.json into `request.output`
    (default: inference/<split> in the run's folder).
    Raises: MLError for all that the user can mend.
    """
    job = prepare(request)
    for member in job.members:
        member.require_data()
    _require_unseen(job.members, split)
    folder = request.output or home_of(job.members) / "inference" / split
    require_own(folder, split)
    options = bounded(job, split_items(job.members[0], split), measured=True)
    job = replace(job, options=replace(options, folder=folder))
    with only_writer(folder):
        begin_anew(folder)
        return _measure_into(folder, job, split)


def begin_anew(folder: Path) -> None:
    """Remove what an earlier measurement wrote into a folder, and what a killed one left half-written.

    metrics.json goes first: its presence says that what lies beside it is complete.
    """
    path = folder / "metrics.json"
    before = {}
    if path.is_file():
        with suppress(ValueError):
            before = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
    for one in before.get("per_image", []):
        for kind in KINDS:
            for suffix in (".png", ".tif", ".npz", ".geojson"):
                (folder / kind / (Path(one["image"]).stem + suffix)).unlink(missing_ok=True)
    _remove_leftovers(folder)


def _measure_into(folder: Path, job: Prepared, split: str) -> Measured:
    request = job.request
    contents = {"split": split, "checkpoints": [str(member.path) for member in job.members], "how": job.how}
    drawn = replace(request, overlay=True)

    def keep(predicted: Predicted) -> None:
        write_outputs(folder, predicted, drawn, job.config)

    how = Measuring(request.tolerance, request.pixel_size)
    with progress_bar(f"predicting {split}", job.members[0].data.num_images(split), least=1) as advance:
        report = split_report(job.members, split, job.options, job.steps, how, keep, advance)
    write_json(folder / "metrics.json", {**contents, **report})
    return Measured(results(TITLES[split], report, job.config.ignore_index), folder)


def write_outputs(folder: Path, predicted: Predicted, request: Request, config: Config) -> list[Path]:
    """Write what a request asks of a prediction; return the files."""
    item, labels, nodata = predicted.item, predicted.labels, predicted.nodata

    def at(kind: str) -> Path:
        path = folder / kind / item.name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    files = [write_mask(at("masks"), labels, config.data.num_classes, nodata, item.path)]
    if request.overlay:
        image, channels = predicted.image, config.model.in_channels
        files.append(write_overlay(at("overlays"), labels, nodata, item.path, channels, image))
    if request.save_probs is not None:
        assert predicted.probs is not None
        path = at("probabilities")
        files.append(write_probabilities(path, predicted.probs, config.class_names, request.save_probs, item.path))
    if request.uncertainty:
        assert predicted.uncertainty is not None
        files.extend(write_uncertainty(at("uncertainty"), predicted.uncertainty, item.path))
    if request.polygons:
        files.append(write_polygons(at("polygons"), labels, config.class_names, nodata, item.path))
    return files


def _stamp(path: Path) -> Stamp | None:
    with suppress(DataError):  # it may yet come, but what it is then was not known before it was read
        return stamp_of(path)
    return None


def _is_scene(item: Input) -> bool:
    """Whether an image is read by windows."""
    with suppress(DataError):  # whoever reads it names it
        return item.path.suffix.lower() in (".tif", ".tiff") and image_info(item.path).windowed
    return False


def _outputs(request: Request) -> Mapping[str, Any]:
    return {key: getattr(request, key) for key in ("overlay", "save_probs", "uncertainty", "polygons")}


def _count(predicted: Predicted, num_classes: int) -> tuple[list[int], int]:
    """Pixels of each class, and those without data."""
    labels = predicted.labels
    counts = np.zeros(np.iinfo(labels.dtype).max + 1, np.int64)
    for top, bottom in labels.bands():
        counts += np.bincount(labels.rows(top, bottom).ravel(), minlength=len(counts))
    nodata = 0
    if predicted.nodata is not None:
        nodata, counts[predicted.nodata] = int(counts[predicted.nodata]), 0
    return counts[:num_classes].tolist(), nodata


def home_of(members: Sequence[Member]) -> Path:
    """The folder of the run, or of a checkpoint that lies in none.

    Of an ensemble it is one beside the run of the first member, `<run without its fold>_ensemble`, or `ensemble` beside
    the checkpoint.
    """
    folder = members[0].path.parent
    home = folder.parent if folder.name == "weights" else folder
    if len(members) == 1:
        return home
    if folder.name != "weights":
        return home / "ensemble"
    if not home.name.strip("."):  # . and .. are no names of runs
        home = home.resolve()
    return home.with_name(re.sub(r"_fold_\d+$", "", home.name) + "_ensemble")


def _folder_name(words: Sequence[str]) -> str:
    """What a folder of outputs is called after: the input file, or folder; of a glob that in which it begins."""
    path = Path(words[0]).expanduser() if words[0].startswith("~/") else Path(words[0])
    while not path.exists():
        path = path.parent
    path = path.resolve()
    return (path.stem if path.is_file() else path.name) or "images"


def _require_unseen(members: Sequence[Member], split: str) -> None:
    """Refuse to measure an ensemble on images that are not the same part of the data to all of its members."""
    for member in members:
        require_one_fold(member, split)
    first = members[0].data.pairs(split)
    known = {pair.image.name for pair in first}
    for other in members[1:]:
        if known != {pair.image.name for pair in other.data.pairs(split)}:
            raise ConfigError(
                f"the {split} images of {members[0].path} and {other.path} are not the same: measure an ensemble of "
                "folds on --split test, or each fold on its own images with --cv"
            )


def require_one_fold(member: Member, split: str) -> None:
    """Refuse to measure a file of several folds on images that some of them were trained on."""
    if split != "test" and len(member.folds) > 1:
        raise ConfigError(
            f"{member.path} holds networks of {len(member.folds)} folds, some of which were trained on the {split} "
            "images: measure it on --split test"
        )


def require_own(folder: Path, split: str | None) -> None:
    """Refuse a folder that holds predictions of another split: the two would lie in one heap. None stands for files."""
    other = "files" if split is not None and (folder / JOURNAL).exists() else None
    with suppress(OSError, ValueError, AttributeError):
        other = other or json.loads((folder / "metrics.json").read_text(encoding="utf-8")).get("split")
    if other not in (None, split):
        raise ConfigError(f"{folder} holds the predictions of {other}: give another --output")


def _remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed have left among the outputs."""
    for kind in KINDS:
        for below in (folder / kind, *(folder / kind).rglob("*/")):
            remove_leftovers(below)
    for scratch in folder.glob(f"{SCRATCH}*/"):
        shutil.rmtree(scratch)
