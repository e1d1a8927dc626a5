"""Which conversion mends a set of masks, decided over all of them at once; or the question that is open.

Next to read: `repair.py`, which carries it out.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from ml_src.core.checking.conversions import BACKGROUND, ByChannel, ByColour, ByFolder, ByValue, Conversion, Union
from ml_src.core.checking.inspection import ImageLook, Look, MaskLook
from ml_src.core.checking.mask_colours import EXPORT_AGAIN, Colour, ColourMap, colours_of, proposed_table
from ml_src.core.checking.mask_values import ValueMap, plan_values, shown
from ml_src.core.checking.stored import Kind, Stored, read_stored
from ml_src.core.checking.tallies import MOST_CLASSES_WITH_GAPS, Tally, tally_of
from ml_src.core.data.checks import UNLABELLED
from ml_src.core.data.files import listed, stem_of, upright
from ml_src.core.data.headers import Header
from ml_src.core.errors import DataError

MOST_THREADS = 4  # each holds a whole mask
MOST_COLOURS = 1 << 16  # of the set that are kept, the commonest: a JPEG may have a million

Refusals = dict[Path, str]
T = TypeVar("T")
R = TypeVar("R")


class Question(DataError):
    """What must be answered before any mask can be written; `details` are further lines to print."""

    def __init__(self, text: str, details: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.details = list(details)


@dataclass(frozen=True)
class Job:
    """One mask to write: the image's stem, the files it comes from, and how each is turned (EXIF, 1 is not at all)."""

    stem: str
    sources: tuple[Path, ...]
    turns: tuple[int, ...]


def find_jobs(looks: Sequence[Look]) -> tuple[list[Job], Refusals]:
    """Return what can be written, sorted by stem, and why the rest cannot."""
    jobs: dict[str, Job] = {}
    refusals: Refusals = {}
    for look in looks:
        try:
            job = _job(look)
            if job.stem in jobs:
                raise DataError(f"{look.image and look.image.path} has the stem of another image: rename one of them")
            jobs[job.stem] = job
        except DataError as error:
            refusals[look.masks[0].path if look.masks or look.image is None else look.image.path] = str(error)
    return [jobs[stem] for stem in sorted(jobs)], refusals


def _job(look: Look) -> Job:
    if look.image is None:
        raise DataError(f"{look.masks[0].path} belongs to no image: give both the same stem")
    if not look.masks:
        raise DataError(f"{look.image.path} has no mask: add one of the same stem, or remove the image")
    if look.image.header is None or look.image.problem is not None:
        raise DataError(look.image.problem or f"{look.image.path} cannot be read")
    turns = [_turn(look.image, look.image.header, mask) for mask in look.masks]
    return Job(stem_of(look.image.path), tuple(mask.path for mask in look.masks), tuple(turns))


def _turn(image: ImageLook, header: Header, mask: MaskLook) -> int:
    """Return the orientation that makes a mask lie like its image: that of the image where only its raw size fits."""
    if mask.header is None:
        raise DataError(mask.problem or f"{mask.path} cannot be read")
    size, wanted = (mask.header.width, mask.header.height), (header.width, header.height)
    if size == wanted:
        return 1
    if header.orientation >= 5 and mask.header.orientation == 1 and size == wanted[::-1]:
        return header.orientation
    raise DataError(
        f"{mask.path} is {size[0]}x{size[1]} pixels (width x height) but {image.path} is {wanted[0]}x{wanted[1]}: "
        "which size is right? Export one of them again; to resize labels is to guess"
    )


def read_parts(job: Job) -> list[Stored]:
    """Read a job's files, turned as its image.

    Raises: DataError.
    """
    return [_turned(read_stored(path), turn) for path, turn in zip(job.sources, job.turns, strict=True)]


def _turned(stored: Stored, turn: int) -> Stored:
    return stored if turn == 1 else Stored(stored.path, stored.header, upright(stored.samples, turn), stored.nodata)


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Map in order; decoders let go of the interpreter lock."""
    with ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        yield from pool.map(function, items)


@dataclass(frozen=True)
class Plan:
    """The conversion for all jobs that are left, and why the others are refused."""

    conversion: Conversion
    jobs: list[Job]
    refusals: Refusals


def plan(jobs: Sequence[Job], table: ColourMap | None, merge: str | None, num_classes: int | None) -> Plan:
    """Choose what is done to all masks; reads them all, unless they are only merged.

    Raises: Question where the answer would be a guess.
    """
    if merge == "union":
        return Plan(Union(), list(jobs), {})
    several = [job for job in jobs if len(job.sources) > 1]
    if several:
        names = _class_folders(jobs)
        if names is None:
            raise Question(
                f"several masks belong to one image in {len(several)} of {len(jobs)} cases ({several[0].stem} has "
                f"{len(several[0].sources)}): how do they become one? Add --merge union where all show the same class, "
                "or put the masks of each class into a folder of its own, masks/CLASS/STEM.png"
            )
        return Plan(ByFolder(names), list(jobs), {})
    survey = _Survey(jobs)
    if not survey.jobs:
        return Plan(Union(), [], survey.refusals)
    conversion = survey.conversion(table, num_classes)
    names = _class_folders(jobs)
    if names is not None and isinstance(conversion, ByValue) and conversion.map.classes == (0, 1):
        raise Question(
            f"the masks lie in the folders {listed(names)} and hold two values: is each folder a class? Add --merge "
            "union if all show the same class, else save class indices"
        )
    return Plan(conversion, survey.jobs, survey.refusals)


def _class_folders(jobs: Sequence[Job]) -> tuple[str, ...] | None:
    """Return the names of the folders, one a class, that hold the masks by the stem of their image; else None."""
    folders: set[str] = set()
    for job in jobs:
        parents = [path.parent.name for path in job.sources]
        if len(set(parents)) < len(parents) or any(stem_of(path) != job.stem for path in job.sources):
            return None
        folders.update(parents)
    return tuple(sorted(folders - {BACKGROUND})) if len(folders) > 1 else None


@dataclass(frozen=True)
class _Facts:
    """What the choice needs of one mask."""

    kind: Kind
    channels: int
    tally: Tally
    colours: Counter[Colour]


def _facts(job: Job) -> _Facts | DataError:
    try:
        stored = read_parts(job)[0]
        kind = stored.kind
    except DataError as error:
        return error
    single = kind in ("values", "gray")
    lossy = stored.header.lossy
    tally = tally_of(stored.samples[:, :, 0], stored.nodata, lossy) if single else Tally(lossy=lossy)
    return _Facts(kind, stored.samples.shape[2], tally, colours_of(stored.samples) if kind == "colours" else Counter())


def _telling(tally: Tally) -> tuple[float, ...]:
    """Return values that are not all of one class: the lowest and highest, or of a lossy file the common ones.

    Three of each end, for some may be unlabelled.
    """
    values = sorted(tally.counts)
    if not tally.lossy:
        return tuple(dict.fromkeys([*values[:3], *values[-3:]]))
    return tally.common if len(tally.common) > 1 else ()


def _linked(sets: Sequence[frozenset[float]]) -> list[frozenset[float]]:
    """Join sets that share a value, until none do."""
    groups: list[frozenset[float]] = []
    for values in sets:
        touching = [group for group in groups if group & values]
        groups = [group for group in groups if not group & values] + [values.union(*touching)]
    return groups


def _require_legal(table: ColourMap, num_classes: int | None) -> None:
    """Refuse a table of colours with more classes than there are."""
    odd = sorted({index for index in table.classes.values() if index >= (num_classes or index + 1)} - {UNLABELLED})
    if odd:
        raise Question(
            f"{table.table} lists the classes {listed(odd, 5)} but there are {num_classes}, 0 to {num_classes}-1: "
            "correct the table, or the number of classes (one line each in classes.txt)"
        )


def _some(values: Sequence[float]) -> str:
    return f"the value{'s' * (len(values) > 1)} {listed([shown(value) for value in values], 5)}"


class _Survey:
    """What the masks of a set hold together."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs: list[Job] = []
        self.refusals: Refusals = {}
        self.tally = Tally()
        self.colours: Counter[Colour] = Counter()
        self.kinds: Counter[str] = Counter()
        self.richest = 0, Path()  # how many values, and in which mask
        self.telling: list[tuple[Path, tuple[float, ...]]] = []  # of each mask, the values that may not become one
        self.holdings: dict[frozenset[float], Path] = {}  # the values of masks that have few, and one such mask
        for job, facts in zip(jobs, in_threads(_facts, jobs), strict=True):
            if isinstance(facts, DataError):
                self.refusals[job.sources[0]] = str(facts)
            else:
                self.jobs.append(job)
                self._add(job.sources[0], facts)

    def _add(self, path: Path, facts: _Facts) -> None:
        words = {"one-hot": f"{facts.channels} channels of which each pixel has one", "colours": "colours"}
        self.kinds[words.get(facts.kind, "one value a pixel")] += 1
        self.telling.append((path, _telling(facts.tally)))
        if len(facts.tally.counts) <= MOST_CLASSES_WITH_GAPS:
            self.holdings.setdefault(frozenset(facts.tally.counts), path)
        self.tally.add(facts.tally)
        self.colours.update(facts.colours)
        if len(self.colours) > 4 * MOST_COLOURS:
            self.colours = Counter(dict(self.colours.most_common(MOST_COLOURS)))
        self.richest = max(self.richest, (len(facts.tally.counts), path), key=lambda pair: pair[0])

    def conversion(self, table: ColourMap | None, num_classes: int | None) -> Conversion:
        by_channel = [kind for kind in self.kinds if "channels" in kind]
        if by_channel and len(self.kinds) > 1:
            kinds = ", ".join(f"{number} with {kind}" for kind, number in self.kinds.most_common())
            raise Question(f"the masks are of different kinds ({kinds}): which classes are the same? Save all alike")
        if by_channel:
            return ByChannel()
        if table is not None:
            _require_legal(table, num_classes)
            return ByColour(table)
        if self.colours:
            raise self._colour_question()
        try:
            chosen = plan_values(self.tally, num_classes)
        except DataError as error:
            raise Question(str(error), [f"for example {self.richest[1]}"]) from error
        self._require_kept(chosen)
        self._require_one_code(chosen, num_classes)
        return ByValue(chosen)

    def _require_kept(self, chosen: ValueMap) -> None:
        """Refuse to make one class of all that a mask tells apart: beside masks of 0..255, class 1 is no shade of 0."""
        for path, values in self.telling if chosen.blends else []:
            labels = [value for value in values if value not in chosen.unlabelled]
            classes = set(chosen.classes_of(np.array(labels)).tolist())
            if len(classes) == 1 and not set(labels) <= set(chosen.values):
                raise Question(
                    f"{path} holds {_some(labels)}, which would all become "
                    f"class {classes.pop()} beside the others: are they classes already? Save all masks alike"
                )

    def _require_one_code(self, chosen: ValueMap, num_classes: int | None) -> None:
        """Refuse where one mask may say 255 for what another says 1: no mask holds both, so nobody can tell."""
        apart = UNLABELLED in chosen.unlabelled and set(chosen.values) <= {0, 1}
        own_classes = not chosen.identity and len(chosen.values) != num_classes and UNLABELLED not in chosen.unlabelled
        if chosen.blends or not (apart or own_classes):
            return
        kept = {*chosen.values, UNLABELLED} - {0}
        objects = {values & kept: path for values, path in self.holdings.items() if values & kept}
        first, *rest = _linked(list(objects))
        if rest:
            one, other = (next(values for values in objects if values <= group) for group in (first, rest[0]))
            raise Question(
                f"{objects[one]} holds {_some(sorted(one))} and {objects[other]} {_some(sorted(other))}, and no mask "
                "both: do they mean the same class? Save all masks alike; if they are classes of their own, save class "
                "indices 0, 1, 2, ..."
            )

    def _colour_question(self) -> Question:
        shades = {(int(value),) * 3: pixels for value, pixels in self.tally.counts.items() if value.is_integer()}
        colours = self.colours + Counter(shades)
        if self.tally.lossy:
            return Question(f"compression has changed the colours of the masks, {len(colours)} now: {EXPORT_AGAIN}")
        lines = proposed_table(colours)
        if (more := len(colours) - len(lines) + 1) > 0:
            lines.append(f"{more} rarer colours are left out; blends and traces of JPEG are no classes")
        return Question(
            f"the masks hold {len(colours)} colours: which class is each? Save this table as colors.csv, correct it, "
            "and add --colors colors.csv",
            lines,
        )
