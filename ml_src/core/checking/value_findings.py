"""What is wrong with the values of masks whose format is right, judged over all masks together.

What a value may mean is decided in `mask_values.py`, which `ml-check --fix` follows as well, so that what is said here
is what is done there. Next to read: `set_findings.py`.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile

from ml_src.core.checking.inspection import MaskLook
from ml_src.core.checking.kinds import FIX, Finding, Severity, of_files
from ml_src.core.checking.mask_values import ValueMap, plan_values, shown
from ml_src.core.checking.tallies import Tally
from ml_src.core.data.checks import UNLABELLED
from ml_src.core.data.files import listed
from ml_src.core.errors import DataError

# More values than this are probabilities, blends or numbers of objects, unless the number of classes says otherwise.
MOST_CLASSES = 64
# A value is common from this share of the pixels on, and one of the classes if the others are blends.
COMMON_SHARE = 0.005
# Values so far apart, at least, were stretched so that a person can see the classes; nearer ones leave classes out.
LEAST_STEP = 4
NUM_LISTED = 10
MOST_CERTAIN = 4  # common values that are named as the classes behind blends, where --fix is not sure

ALIKE = "save these masks like the others"  # no command: --fix goes by all masks together

Masks = Sequence[MaskLook]
Counts = Counter[float]


def counts_of(masks: Masks) -> Counts:
    """Return pixels per value over masks of one channel, or of several that are equal."""
    counts: Counts = Counter()
    for mask in masks:
        counts.update(mask.values or {colour[0]: pixels for colour, pixels in mask.colours.items()})
    return counts


def planned(masks: Masks, num_classes: int | None) -> ValueMap:
    """Return which class each value becomes when --fix has only these masks.

    Raises: DataError with the question that it would ask.
    """
    counts = Counter({float(value): pixels for value, pixels in counts_of(masks).items()})
    num_not_finite = sum(mask.num_not_finite for mask in masks)
    lossy = any(mask.header is not None and mask.header.lossy for mask in masks)
    compact: Counts = Counter()
    for mask in masks:
        compact.update(mask.compact)
    holders = Counter(float(value) for mask in masks for value in counts_of([mask]))
    num_pixels = counts.total() + num_not_finite
    tally = Tally(counts, num_pixels, num_not_finite, set(), lossy, compact, holders, len(masks))
    return plan_values(tally, num_classes)


def some(values: Collection[float], noun: str = "value") -> str:
    """Values in words: all of a few, number and ends of many."""
    if len(values) > NUM_LISTED:
        return f"{len(values)} {noun}s from {shown(min(values))} to {shown(max(values))}"
    words = [shown(value) for value in sorted(values)]
    return f"no {noun}" if not words else f"the {noun}{'s' * (len(words) > 1)} {joined(words)}"


def joined(words: Sequence[str]) -> str:
    """Join by commas and a last "and"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def value_findings(masks: Masks, num_classes: int | None, fix: str) -> list[Finding]:
    """Judge class indices of 8 and 16 bits: all masks alike where one reason explains them, else those that differ.

    Args:
        masks: of one channel of unsigned integers.
        num_classes: None where it is not known: then the values are judged by themselves.
        fix: the command that mends the values, or the question that it would ask.
    """
    soft = [mask for mask in masks if _is_soft(mask, num_classes)]
    rest = [mask for mask in masks if mask.values and not _is_soft(mask, num_classes)]
    return (_soft(soft, masks, num_classes, fix) if soft else []) + (_indices(rest, num_classes, fix) if rest else [])


def _is_soft(mask: MaskLook, num_classes: int | None) -> bool:
    deep = mask.header is not None and mask.header.bits > 8
    return deep and bool(mask.values) and mask.num_distinct > MOST_CLASSES and max(mask.values) >= (num_classes or 0)


def _soft(masks: Masks, whole: Masks, num_classes: int | None, fix: str) -> list[Finding]:
    counts = counts_of(whole)
    num_distinct = max(len(counts), *(mask.num_distinct for mask in masks))  # of very many, some were not kept
    if num_classes is None and min(counts) == 0 and max(counts) < num_distinct:
        return _many_classes(masks)

    def says(counts: Counts, number: int) -> str:
        dense = max(counts) - min(counts) < 2 * number
        what = "numbers of objects" if dense else "probabilities"
        remedy = "save the class of each object" if dense else "choose a threshold and save class indices"
        ends = f"from {shown(min(counts))} to {shown(max(counts))}"
        return f"{number} different 16-bit values {ends}, as {what} have: {remedy}"

    each = {mask.path: f"has {says(counts_of([mask]), mask.num_distinct)}" for mask in masks}
    together = f"have up to {says(counts_of(masks), max(mask.num_distinct for mask in masks))}"
    return of_files("soft_mask", "error", "mask", each, together, fix)


def _many_classes(masks: Masks) -> list[Finding]:
    """Warn of values 0 to k without gaps: they may be classes, but as often they are numbers of objects."""
    values = counts_of(masks)
    ask = (
        f"from {shown(min(values))} to {shown(max(values))}, as numbers of objects have: are these "
        "classes? Then write one class name a line into classes.txt, "
        "else save the class of each object"
    )
    each = {mask.path: f"has {mask.num_distinct} different 16-bit values {ask}" for mask in masks}
    together = f"have up to {max(mask.num_distinct for mask in masks)} different 16-bit values {ask}"
    return of_files("soft_mask", "warning", "mask", each, together, ask)


@dataclass(frozen=True)
class _Case:
    """Masks whose values have one reason, and what is needed to find it."""

    masks: Masks
    num_classes: int | None
    legal: set[int]  # values that are classes, 0, 1, 2, ...
    plan: ValueMap | None  # of --fix, if it had only these masks
    fix: str
    others: str = ""  # what is said of the other masks, where these are the odd ones

    @property
    def counts(self) -> Counts:
        return counts_of(self.masks)

    @property
    def values(self) -> list[float]:
        return sorted(self.counts)

    def findings(self, kind: str, reason: str) -> list[Finding]:
        """Return a finding a mask: the values that it has, and one reason for all."""
        each = {mask.path: f"has {some(mask.values)}, {reason}" for mask in self.masks}
        return of_files(kind, "error", "mask", each, f"have {some(self.values)}, {reason}", self.fix)


def _indices(masks: Masks, num_classes: int | None, fix: str) -> list[Finding]:
    found = set(counts_of(masks))
    legal = set(range(num_classes)) if num_classes else set(takewhile(found.__contains__, range(len(found))))
    whole = _Case(masks, num_classes, legal, _plan(masks, num_classes), fix)
    odd = found - legal - {UNLABELLED}
    if found == {0, UNLABELLED} and (num_classes or 0) <= UNLABELLED:
        return _stretched(whole)
    if (whole.plan is not None and whole.plan.identity) or (num_classes and not odd):
        return _lone_255(whole)
    crowded = [mask for mask in masks if mask.num_distinct > MOST_CLASSES]
    if crowded and 2 * len(crowded) <= len(masks):
        rest = [mask for mask in masks if mask.num_distinct <= MOST_CLASSES]
        return _judged(_different(crowded, rest, whole)) + _indices(rest, num_classes, fix)
    strays = [mask for mask in masks if _is_stray(mask, legal)]
    rest = [mask for mask in masks if not _is_stray(mask, legal)]
    near = num_classes is None and min(odd, default=0) <= 2 * len(legal)  # classes, perhaps, that other masks lack
    if near or 2 * len(strays) > len(masks) or len(counts_of(rest).keys() - {UNLABELLED}) < 2:
        return _judged(whole)
    return _judged(_different(strays, rest, whole))


def _different(masks: Masks, rest: Masks, whole: _Case) -> _Case:
    plan = _plan(masks, whole.num_classes)
    return _Case(masks, whole.num_classes, whole.legal, plan, ALIKE, f"the other masks have {some(counts_of(rest))}")


def _is_stray(mask: MaskLook, legal: set[int]) -> bool:
    return not mask.values.keys() - {UNLABELLED} <= legal


def _plan(masks: Masks, num_classes: int | None) -> ValueMap | None:
    try:
        return planned(masks, num_classes)
    except DataError:
        return None


def _lone_255(whole: _Case) -> list[Finding]:
    """Name masks of 0 and 255 among masks of 0 and 1: there 255 is class 1 and not unlabelled."""
    lone = [mask for mask in whole.masks if _is_lone(mask)]
    rest = counts_of([mask for mask in whole.masks if not _is_lone(mask)])
    if not lone or set(rest) != {0, 1}:
        return []
    reason = f"but the other masks {some(rest)}: save 255 as 1 if it is class 1, for as it is it counts as unlabelled"
    return _Case(lone, None, whole.legal, None, ALIKE).findings("stretched_mask", reason)


def _is_lone(mask: MaskLook) -> bool:
    return UNLABELLED in mask.values and mask.values.keys() <= {0, UNLABELLED}


def _judged(case: _Case) -> list[Finding]:
    if case.plan.blends if case.plan is not None else _is_blended(case):
        return _blended(case)
    if case.plan is not None and _is_stretched(case.values):
        return _stretched(case)
    if case.num_classes and (case.plan is None or case.others):
        return _too_high(case, case.num_classes)
    return _gaps(case)


def _is_stretched(values: Sequence[float]) -> bool:
    """Whether values lie evenly, but for rounding, from 0 to the last, and far apart."""
    step = values[-1] / max(len(values) - 1, 1)
    even = all(abs(value - index * step) <= 1 for index, value in enumerate(values))
    return even and values[0] == 0 and step >= LEAST_STEP


def _stretched(case: _Case) -> list[Finding]:
    last = len(case.values) - 1
    stored = "/".join(map(shown, case.values)) if last < 4 else f"evenly stretched values 0..{shown(case.values[-1])}"
    wanted = "0/1" if last == 1 else f"0..{last}"
    what = "binary masks" if last == 1 else f"{last + 1} classes"
    remedy = f"{case.others}, so save these alike" if case.others else f"{FIX} writes them as {wanted}"
    return case.findings("stretched_mask", f"{what} stored as {stored} instead of {wanted}: {remedy}")


def _is_blended(case: _Case) -> bool:
    """Whether there are far more values than classes, or rare ones between common ones that are far apart."""
    counts, common = case.counts, _common(case.counts)
    if len(counts) > max(MOST_CLASSES, 2 * (case.num_classes or 0)):
        return True
    if not 2 <= len(common) < len(counts) or common[-1] - common[0] < LEAST_STEP * len(counts):
        return False
    return all(common[0] <= value <= common[-1] for value in counts)


def _common(counts: Counts) -> list[float]:
    least = COMMON_SHARE * counts.total()
    return sorted(value for value, pixels in counts.items() if pixels >= least)


def _blended(case: _Case) -> list[Finding]:
    """Name the masks that have other values than the few which are classes."""
    few = set(case.plan.values if case.plan is not None else _common(case.counts))
    harmed = [mask for mask in case.masks if not mask.values.keys() <= few] or case.masks
    if case.plan is None and not 2 <= len(few) <= MOST_CERTAIN:
        cause = "too many for classes: blends from smoothing or resizing, or probabilities? Save class indices"
        return _Case(harmed, case.num_classes, case.legal, None, case.fix).findings("blended_mask", cause)

    def says(counts: Counts) -> str:
        between = sum(pixels for value, pixels in counts.items() if value not in few)
        share = f"{100 * between / counts.total():.2g} % of the pixels"
        classes = joined([shown(value) for value in sorted(few)])
        return f"{len(counts)} different values, {classes} and, in {share}, blends of these as {cause}: {remedy}"

    cause = "smoothing (anti-aliasing), resizing with interpolation or JPEG makes them"
    if case.others:
        remedy = f"{case.others}; export these again"
    elif case.plan is None:
        remedy = "export them again without that"
    else:
        remedy = f"{FIX} takes the nearest class"
    each = {mask.path: f"has {says(counts_of([mask]))}" for mask in harmed}
    return of_files("blended_mask", "error", "mask", each, f"have {says(counts_of(harmed))}", case.fix)


def _too_high(case: _Case, num_classes: int) -> list[Finding]:
    """Name the masks that have values which are no class, with these values only."""
    odd = {value for value in case.values if value >= num_classes and value != UNLABELLED}
    reason = (
        f"but there are {num_classes} classes, 0 to {num_classes - 1}: correct the masks, or the number of classes "
        "(--num_classes, or one line each in classes.txt)"
    )
    own = {mask.path: odd & mask.values.keys() for mask in case.masks if odd & mask.values.keys()}
    each = {path: f"has {some(values)}, {reason}" for path, values in own.items()}
    return of_files("values_too_high", "error", "mask", each, f"have {some(odd)}, {reason}", case.fix)


def _gaps(case: _Case) -> list[Finding]:
    """Judge values that are not 0, 1, 2, ...: where only a few are missing it is a warning, for a class may be rare."""
    classes = [int(value) for value in case.values if value != UNLABELLED or case.plan is None]
    missing = sorted(set(range(classes[-1])) - set(classes))
    few_missing = len(missing) < len(classes) and case.num_classes is None and not case.others
    if case.plan is None and UNLABELLED not in classes:
        reason = (
            "but classes are counted 0, 1, 2, ...: correct the masks, or write one class name a line into classes.txt"
        )
    elif case.plan is None:
        reason = (
            f"but classes are counted 0, 1, 2, ..., and {UNLABELLED} may be a class or mark unlabelled pixels: write "
            "one class name a line into classes.txt"
        )
    elif case.others:
        reason = f"but {case.others}: correct these"
    else:
        out = f"which leaves out {listed(missing)}" if len(missing) <= 5 else "but classes are counted 0, 1, 2, ..."
        reason = f"{out}: {FIX} numbers them 0 to {len(classes) - 1} in this order"
        if case.num_classes is None:
            reason += f", else {classes[-1] + 1} classes are learned, {len(missing)} of them without a pixel"
    severity: Severity = "warning" if few_missing else "error"
    all_have = f"; all masks together {some(case.values)}"
    each = {
        mask.path: f"has {some(mask.values)}{all_have if len(mask.values) < len(case.values) else ''}, {reason}"
        for mask in case.masks
    }
    return of_files("value_gaps", severity, "mask", each, f"have {some(case.values)}, {reason}", case.fix)
