"""What is wrong with the masks, by their format; of each mask the first thing. Next to read: `value_findings.py`.

Whether an alpha channel hides something, and whether pages are classes, is asked of the files again: such are few.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ml_src.core.checking.inspection import MOST_VALUES, MaskLook
from ml_src.core.checking.kinds import FIX, Finding, of_files
from ml_src.core.checking.mask_colours import EXPORT_AGAIN, proposed_table
from ml_src.core.checking.mask_values import shown
from ml_src.core.checking.stored import read_stored
from ml_src.core.checking.value_findings import (
    COMMON_SHARE,
    MOST_CERTAIN,
    MOST_CLASSES,
    NUM_LISTED,
    Counts,
    Masks,
    counts_of,
    planned,
    some,
    value_findings,
)
from ml_src.core.data.files import listed
from ml_src.core.data.headers import Header
from ml_src.core.errors import DataError

RIGHT_FORMATS = ("PNG", "TIFF")
Colour = tuple[int, ...]


def mask_findings(masks: Masks, num_classes: int | None) -> list[Finding]:
    """Judge the masks that can be read.

    Args:
        masks: one for each image; masks that are still to be merged say nothing about classes.
        num_classes: None where it is not known.
    """
    transparent = _questions_of_alpha(masks)
    masks = [mask for mask in masks if mask.path not in transparent]
    groups: dict[str, list[MaskLook]] = {}
    for mask in masks:
        if mask.header is not None and mask.problem is None:
            groups.setdefault(_group(mask, mask.header), []).append(mask)
    fix = _fix_of([mask for mask in masks if mask.values or _is_gray(mask)], num_classes)
    found = [finding for name, judge in JUDGES.items() if name in groups for finding in judge(groups[name], fix)]
    indices = groups.get("indices", [])
    return _transparent(transparent) + found + value_findings(indices, num_classes, fix) + _formats(indices)


def _fix_of(masks: Masks, num_classes: int | None) -> str:
    """Return the command that mends the values, or the question that it would ask."""
    try:
        planned(masks, num_classes)
    except DataError as error:
        return str(error)
    return FIX


def _group(mask: MaskLook, header: Header) -> str:
    """Name what is wrong with a mask's format; "indices" where it holds whole numbers from 0 up in one channel."""
    single = bool(mask.values) or _is_gray(mask)
    cases = {
        "jpeg": header.lossy,
        "colours": bool(mask.colours) and header.colours == 3 and not single,
        "equal channels": header.samples > 1 and single,
        "channels": header.samples > 1,
        "not finite": mask.num_not_finite > 0,
        "negative": any(value < 0 for value in mask.values),
        "fractions": any(not float(value).is_integer() for value in mask.values),
        "floats": header.number == "float",
        "wide": header.number != "uint" or header.bits > 16,
    }
    return next((name for name, true in cases.items() if true), "indices")


def open_question(path: Path) -> str | None:
    """Return why --fix refuses a mask whatever the others hold, as what completes "<path> ..."; None where it does not.

    Reads the whole file.
    """
    try:
        return None if read_stored(path).kind else ""
    except DataError as error:
        return str(error).removeprefix(f"{path} ")


def _is_gray(mask: MaskLook) -> bool:
    return bool(mask.colours) and all(len(set(colour)) == 1 for colour in mask.colours)


def _some_of(masks: Masks) -> str:
    """Name the values; of a mask with very many, whose rare ones were not kept, the number alone."""
    most = max(mask.num_distinct for mask in masks)
    return f"up to {most} different values" if most > MOST_VALUES else some(counts_of(masks))


def _questions_of_alpha(masks: Masks) -> dict[Path, str]:
    """Return what is asked of the masks that are transparent somewhere."""
    alpha = [
        mask.path
        for mask in masks
        if mask.header is not None and mask.problem is None and mask.header.number == "uint"
        and len(mask.header.alphas) == 1 and mask.header.colours in (1, 3)
    ]  # fmt: skip
    return {path: question for path in alpha if (question := open_question(path)) is not None}


def _transparent(each: Mapping[Path, str]) -> list[Finding]:
    remedy = "paint what is transparent in the colour of its class, and save without transparency"
    together = f"are transparent in some pixels, which then have no class: {remedy}"
    return of_files("transparent_mask", "error", "mask", each, together, remedy)


def _jpegs(masks: Masks, fix: str) -> list[Finding]:
    gray = all(mask.values or _is_gray(mask) for mask in masks)
    noun = "values" if gray else "colours"
    remedy = f"{EXPORT_AGAIN}, or run {FIX}, which takes the nearest class" if gray and fix == FIX else EXPORT_AGAIN
    fix = fix if gray else EXPORT_AGAIN
    why = "whose compression has changed the class indices"
    each = {mask.path: f"is a JPEG, {why} ({mask.num_distinct} {noun} now): {remedy}" for mask in masks}
    most = max(mask.num_distinct for mask in masks)
    return of_files("jpeg_mask", "error", "mask", each, f"are JPEGs, {why} (up to {most} {noun} now): {remedy}", fix)


def _colours(masks: Masks, _: str) -> list[Finding]:
    """Judge colours over all masks: few are classes; among many are blends, or traces of compression."""
    colours: Counter[Colour] = Counter()
    for mask in masks:
        colours.update(mask.colours)
    least = COMMON_SHARE * colours.total()
    common = Counter({colour: n for colour, n in colours.items() if n >= least})
    if len(colours) > MOST_CLASSES and not common:
        return _photos(masks, len(colours))
    if len(colours) > MOST_CLASSES and len(common) < len(colours) / 2:
        remedy = "export them again without smoothing (anti-aliasing), resizing or compression"
        blends = f"a few common ones, {_shares(common, colours, MOST_CERTAIN)}, and blends of them: {remedy}"
        each = {mask.path: f"holds {mask.num_distinct} colours, {blends}" for mask in masks}
        return of_files("blended_mask", "error", "mask", each, f"hold {len(colours)} colours, {blends}", remedy)
    table = proposed_table(Counter({(c[0], c[1], c[2]): n for c, n in colours.items()}))
    command = f"{FIX} --colors colors.csv"
    remedy = f"save the table below as colors.csv, correct it, and run {command}"
    what = "{} colours instead of class indices, {}: " + remedy
    own = {mask.path: Counter(mask.colours) for mask in masks}
    each = {path: what.format("holds", _shares(counts, counts)) for path, counts in own.items()}
    together = what.format("hold", _shares(colours, colours))
    return of_files("colour_mask", "error", "mask", each, together, command, table)


def _photos(masks: Masks, num_colours: int) -> list[Finding]:
    remedy = "put the masks here, as class indices"
    reason = f"of which none is common, as photos have and masks have not: {remedy}"
    each = {mask.path: f"holds {mask.num_distinct} colours, {reason}" for mask in masks}
    return of_files("blended_mask", "error", "mask", each, f"hold {num_colours} colours, {reason}", remedy)


def _shares(colours: Counter[Colour], of: Counter[Colour], most: int = NUM_LISTED) -> str:
    """Say which colours there are, as r,g,b, and their shares of the pixels."""
    total = of.total()
    words = [f"{','.join(map(str, c))} ({100 * n / total:.2g} %)" for c, n in colours.most_common()]
    return listed(words, most)


def _equal_channels(masks: Masks, fix: str) -> list[Finding]:
    remedy = f"{FIX} keeps one of them, as class indices" if fix == FIX else "save one of them, as class indices"
    what = "{} {} channels where one is enough ({}): " + remedy
    each = {mask.path: what.format("has", _num_channels([mask]), _some_of([mask])) for mask in masks}
    together = what.format("have", _num_channels(masks), _some_of(masks))
    return of_files("multi_channel_mask", "error", "mask", each, together, fix)


def _channels(masks: Masks, _: str) -> list[Finding]:
    what = "{} {} channels but a mask has one, of class indices: " + (
        f"run {FIX} if each is a class and just one is set in every pixel, else save class indices"
    )
    each = {mask.path: what.format("has", _num_channels([mask])) for mask in masks}
    return of_files("multi_channel_mask", "error", "mask", each, what.format("have", _num_channels(masks)), FIX)


def _num_channels(masks: Masks) -> str:
    return listed(sorted({mask.header.samples for mask in masks if mask.header is not None}))


def _not_finite(masks: Masks, fix: str) -> list[Finding]:
    def says(masks: Masks) -> str:
        pixels = sum(mask.num_not_finite for mask in masks)
        return f"NaN or infinite in {pixels} pixels, else {_some_of(masks)}: save class indices, and 255 for unlabelled"

    each = {mask.path: f"is {says([mask])}" for mask in masks}
    return of_files("nan_values", "error", "mask", each, f"are {says(masks)}", fix)


def _negative(masks: Masks, fix: str) -> list[Finding]:
    remedy = f"{FIX} makes it unlabelled, 255" if fix == FIX else "save class indices from 0 up, and 255 for unlabelled"

    def says(counts: Counts) -> str:
        negative = sorted(value for value in counts if value < 0)
        pixels = sum(counts[value] for value in negative)
        return f"negative values, {listed([shown(value) for value in negative], 5)}, in {pixels} pixels: {remedy}"

    each = {mask.path: f"has {says(counts_of([mask]))}" for mask in masks}
    return of_files("negative_values", "error", "mask", each, f"have {says(counts_of(masks))}", fix)


def _fractions(masks: Masks, fix: str) -> list[Finding]:
    remedy = "choose a threshold and save class indices"
    remedy = f"{FIX} makes class indices of them" if fix == FIX else f"if they are probabilities, {remedy}"
    what = "{} fractions as float numbers, {}, where class indices are needed: " + remedy
    each = {mask.path: what.format("stores", _some_of([mask])) for mask in masks}
    return of_files("float_mask", "error", "mask", each, what.format("store", _some_of(masks)), fix)


def _floats(masks: Masks, fix: str) -> list[Finding]:
    remedy = f"{FIX} writes whole numbers" if fix == FIX else "save 8-bit class indices"
    what = "{} class indices as float numbers, {}: " + remedy
    each = {mask.path: what.format("stores", _some_of([mask])) for mask in masks}
    return of_files("float_mask", "error", "mask", each, what.format("store", _some_of(masks)), fix)


def _wide(masks: Masks, fix: str) -> list[Finding]:
    remedy = f"{FIX} writes 8 bits" if fix == FIX else "save 8-bit class indices"
    what = "{} signed numbers, or more than 16 bits, where 8 or 16 unsigned bits are needed: " + remedy
    each = {mask.path: what.format("has") for mask in masks}
    return of_files("wide_mask", "error", "mask", each, what.format("have"), fix)


JUDGES = {
    "jpeg": _jpegs,
    "colours": _colours,
    "equal channels": _equal_channels,
    "channels": _channels,
    "not finite": _not_finite,
    "negative": _negative,
    "fractions": _fractions,
    "floats": _floats,
    "wide": _wide,
}


def _formats(masks: Masks) -> list[Finding]:
    headers = {mask.path: mask.header for mask in masks if mask.header is not None}
    other = {path: header.format for path, header in headers.items() if header.format not in RIGHT_FORMATS}
    one_bit = [path for path, header in headers.items() if header.bits == 1 and not header.palette]
    palette = [path for path, header in headers.items() if header.palette]
    remedy = f"save masks as PNG or TIFF, or run {FIX}"
    bits = "one bit a pixel, which is fine: it is read as classes 0 and 1"
    indices = "a palette, which is fine: its indices are the classes, whatever colours they show"
    return [
        *of_files(
            "mask_format",
            "error",
            "mask",
            {path: f"is a {form} file: {remedy}" for path, form in other.items()},
            f"are {listed(sorted(set(other.values())))} files: {remedy}",
            FIX,
        ),
        *of_files("one_bit_mask", "note", "mask", dict.fromkeys(one_bit, f"has {bits}"), f"have {bits}"),
        *of_files("palette_mask", "note", "mask", dict.fromkeys(palette, f"has {indices}"), f"have {indices}"),
    ]
