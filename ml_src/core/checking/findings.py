"""What is wrong with a data set, in sentences that say what to do. Pure judgement over the facts of `inspection.py`.

Files and pairs are judged here, masks in `mask_findings.py`, the set as a whole and its splits in `set_findings.py`.
"""

import errno
import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_src.core.checking.inspection import ImageLook, Look, MaskLook
from ml_src.core.checking.kinds import FIX, KINDS, SEVERITIES, Finding, named, of_files, of_set
from ml_src.core.checking.mask_findings import mask_findings, open_question
from ml_src.core.checking.set_findings import FOLDS, Parts, class_findings, image_findings, one_class, split_findings
from ml_src.core.data.checks import UNLABELLED, unlabelled_value
from ml_src.core.data.files import listed, stem_of
from ml_src.core.data.headers import MAX_DECODED, Header

__all__ = ["Finding", "find", "headline"]

# What is said of files that cannot be read, where there are several.
UNREADABLE: Mapping[str, str] = {
    "lfs_pointer": "are Git LFS pointers, not the pictures themselves: run git lfs pull",
    "empty_file": "are empty: restore them, or remove the pairs",
    "not_an_image": "are no images, whatever their names say: replace them, or remove the pairs",
    "no_permission": "cannot be read for want of permission: give it, as by chmod u+r",
    "link_to_itself": "are links that lead to themselves: replace them, or remove the pairs",
    "damaged_file": "are damaged or cut off: replace them, or remove the pairs",
    "too_large": f"would take more than {MAX_DECODED >> 30} GiB of memory each: save them as tiled TIFFs, of which "
    "parts can be read, or cut them up",
    "needs_rasterio": "are GeoTIFFs: run pip install 'ml-src[geo]' to read them",
    "unsupported_colours": "have colours that are not gray, RGB or bands: convert them to RGB",
    "multi_page": "have several pages, but an image is one: save each page as a file of its own",
}
# Causes that the system names.
REFUSED = {"no_permission": os.strerror(errno.EACCES), "link_to_itself": os.strerror(errno.ELOOP)}
ENDINGS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg"),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "WEBP": (".webp",),
}


def find(
    looks: Sequence[Look],
    data_dir: Path,
    names: Sequence[str] | None = None,
    num_classes: int | None = None,
    splits_dir: Path | None = None,
) -> list[Finding]:
    """Judge a data set; the first finding is the true cause, and what follows from another finding is left out.

    Args:
        looks: every image with its masks.
        data_dir: the data set, to which the index files' paths are relative.
        names: of the classes, from classes.txt.
        num_classes: how many classes there are, where `names` does not say it.
        splits_dir: the index files of ml-split; None where there is no split.
    """
    num_classes = num_classes or (len(names) if names else None)
    images = [look.image for look in looks if look.image is not None]
    masks = [mask for look in looks for mask in look.masks]
    single = [look.masks[0] for look in looks if len(look.masks) == 1]
    if 2 * sum(len(look.masks) > 1 for look in looks) > len(looks):  # values say which object, not which class
        single = []
    of_masks = mask_findings(single, num_classes)
    parts = Parts(data_dir, splits_dir)
    found = [
        *_unreadable(looks),
        *_pairing(looks, data_dir),
        *_sizes(looks),
        *_endings([*images, *masks]),
        *of_masks,
        *image_findings(images),
        *split_findings([image for image in images if image.problem is None], parts),
    ]
    bad = {finding.path for finding in of_masks if finding.severity == "error"}
    good = [mask for mask in single if mask.values and mask.path not in bad]
    if len(good) == len(masks):
        found += one_class(good, num_classes)
    if 2 * len(good) > len(masks):
        found += class_findings(good, names, num_classes, len(parts.folds) or FOLDS)
    return _ordered(found)


def _ordered(findings: Sequence[Finding]) -> list[Finding]:
    """Sort: what is worst, then what concerns most files, then what is nearest to the cause."""
    numbers = Counter((finding.severity, finding.kind) for finding in findings)
    return sorted(
        findings,
        key=lambda one: (
            SEVERITIES.index(one.severity),
            -numbers[one.severity, one.kind],
            KINDS.index(one.kind),
            str(one.path or ""),
        ),
    )


def headline(findings: Sequence[Finding], looks: Sequence[Look], names: Sequence[str] | None) -> str:
    """Return the first line of what is printed: the true cause, or that all is well."""
    worst = [finding for finding in findings if finding.severity != "note"]
    if worst:
        return f"{worst[0].severity}: {worst[0].summary}"
    pairs = sum(look.image is not None and bool(look.masks) for look in looks)
    values = sorted({int(value) for look in looks for mask in look.masks for value in mask.values})
    unlabelled = bool(values) and _is_unlabelled_255(values, names)
    known = values[:-1] if unlabelled else values
    classes = f"{len(names)} classes" if names else f"values {known[0]} to {known[-1]}" if known else "no value"
    classes += f", {UNLABELLED} is unlabelled" * unlabelled
    notes = dict.fromkeys(f"; note: {finding.summary}" for finding in findings)
    return f"all is well with {pairs} pair{'s' * (pairs != 1)} of image and mask, {classes}{''.join(notes)}"


def _is_unlabelled_255(values: Sequence[int], names: Sequence[str] | None) -> bool:
    """Whether 255 is beside the classes; where all 256 values are fine and have no names, it is one."""
    return unlabelled_value(values, names) == UNLABELLED and (bool(names) or len(values) <= UNLABELLED)


# Files


def _unreadable(looks: Sequence[Look]) -> list[Finding]:
    by_cause: dict[str, dict[Path, str]] = defaultdict(dict)
    paged: list[MaskLook] = []
    for look in looks:
        for one in (look.image, *look.masks):
            if isinstance(one, MaskLook) and one.cause == "multi_page":
                paged.append(one)
            elif one is not None and one.cause is not None:
                cause = _cause(one)
                by_cause[cause][one.path] = _reason(one, cause)
    is_mask = {mask.path for look in looks for mask in look.masks}
    found = [
        finding
        for cause, says in by_cause.items()
        for finding in of_files(cause, "error", _noun(says, is_mask), says, UNREADABLE[cause])
    ]
    return found + _paged_masks(paged)


def _paged_masks(masks: Sequence[MaskLook]) -> list[Finding]:
    """Name masks of several pages: those that --fix makes one of, and those of which it cannot be told how."""
    mended: dict[Path, str] = {}
    others: dict[Path, str] = {}
    for mask in masks:
        question = open_question(mask.path)
        if question is None:
            pages = mask.header.pages if mask.header is not None else 0
            mended[mask.path] = f"has {pages} pages, but a mask is one page: {FIX} makes one of them"
        else:
            others[mask.path] = question
    together = "have several pages, but a mask is one: "
    remedy = "save class indices, as one page"
    return [
        *of_files("multi_page", "error", "mask", mended, f"{together}{FIX} makes one of them", FIX),
        *of_files("multi_page", "error", "mask", others, f"{together}{remedy}", remedy),
    ]


def _cause(one: ImageLook | MaskLook) -> str:
    system = (cause for cause, words in REFUSED.items() if f"({words})" in (one.problem or ""))
    return next(system, str(one.cause)) if one.header is None else str(one.cause)


def _reason(one: ImageLook | MaskLook, cause: str) -> str:
    reason = (one.problem or "").removeprefix(f"{one.path} ")
    if cause == "no_permission":
        return "cannot be read for want of permission: give it, as by chmod u+r"
    if cause == "link_to_itself":
        return "is a link that leads to itself: replace it, or remove the pair"
    if cause == "multi_page" and one.header is not None:
        return f"has {one.header.pages} pages, but an image is one page: save each as a file of its own"
    return f"is damaged or cut off: it {reason}" if cause == "damaged_file" else reason


def _noun(paths: Mapping[Path, object], masks: set[Path]) -> str:
    of_masks = [path in masks for path in paths]
    return "mask" if all(of_masks) else "file" if any(of_masks) else "image"


def _endings(files: Sequence[ImageLook | MaskLook]) -> list[Finding]:
    wrong = {
        one.path: one.header.format
        for one in files
        if one.header is not None and one.path.suffix.lower() not in ENDINGS.get(one.header.format, ())
    }
    forms = sorted(set(wrong.values()))
    together = (
        f"hold {' and '.join(forms)}, which their names do not say: rename them, for other programs go by the name"
    )
    says = {path: f"holds a {form}: rename it, for other programs go by the name" for path, form in wrong.items()}
    return of_files("wrong_extension", "warning", "file", says, together, "rename the files")


# Pairs


def _pairing(looks: Sequence[Look], data_dir: Path) -> list[Finding]:
    images = [look.image.path for look in looks if look.image is not None]
    stems = Counter(stem_of(path) for path in images if path.parent == data_dir / "images")
    twice = {path for path in images if stems[stem_of(path)] > 1}
    no_mask = [
        look.image.path for look in looks if look.image is not None and not look.masks and look.image.path not in twice
    ]
    no_image = [mask.path for look in looks if look.image is None for mask in look.masks]
    return [
        *_same_stems(looks, twice),
        *_several(looks),
        *_folders(looks, data_dir),
        *_other_names(looks, data_dir),
        *of_files(
            "missing_mask",
            "error",
            "image",
            dict.fromkeys(no_mask, "has no mask: add one of the same name, or remove the image"),
            f"have no mask: add masks of the same name, or remove the images{_also(no_image, 'mask', 'image')}",
        ),
        *of_files(
            "missing_image",
            "error",
            "mask",
            dict.fromkeys(no_image, "belongs to no image: add the image, or remove the mask"),
            f"belong to no image: add the images, or remove the masks{_also(no_mask, 'image', 'mask')}",
        ),
    ]


def _also(paths: Sequence[Path], noun: str, lacks: str) -> str:
    if not paths:
        return ""
    return f"; and {len(paths)} {noun}{' has' if len(paths) == 1 else 's have'} no {lacks} ({named(paths)})"


def _same_stems(looks: Sequence[Look], twice: set[Path]) -> list[Finding]:
    files = {path: stem_of(path) for path in sorted(twice)}
    for look in looks:
        stems = Counter((mask.path.parent, stem_of(mask.path)) for mask in look.masks)
        files |= {mask.path: stem for mask in look.masks
                  if stems[mask.path.parent, stem := stem_of(mask.path)] > 1}  # fmt: skip
    remedy = "which belong together is told by the stem: rename or remove one"
    says = {path: f"has the stem of another file, {stem!r}: {remedy}" for path, stem in files.items()}
    together = f"share their stem with another, {listed(sorted(set(map(repr, files.values()))), 5)}: {remedy}"
    return of_files("same_stem", "error", "file", says, together)


def _several(looks: Sequence[Look]) -> list[Finding]:
    several = {
        look.image.path: look.masks
        for look in looks
        if look.image is not None and len({stem_of(mask.path) + str(mask.path.parent) for mask in look.masks}) > 1
    }
    if not several:
        return []
    by_class = all(len({mask.path.parent for mask in masks}) == len(masks) for masks in several.values())
    if by_class:
        classes = sorted({mask.path.parent.name for masks in several.values() for mask in masks})
        remedy = f"in a folder a class ({listed(classes, 10)}): {FIX} makes them one, with a class for each folder"
        fix = FIX
    else:
        remedy = f"but one is needed: {FIX} --merge union makes them one if all show the same class"
        fix = f"{FIX} --merge union"
    numbers = sorted({len(masks) for masks in several.values()})
    span = f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"
    says = {path: f"has {len(masks)} masks, {remedy}" for path, masks in several.items()}
    return of_files("several_masks", "error", "image", says, f"have several masks each ({span}), {remedy}", fix)


def _folders(looks: Sequence[Look], data_dir: Path) -> list[Finding]:
    """Say how images that lie each in a folder of its own, and their masks, come into one folder each."""
    pairs = {look.image.path: [mask.path for mask in look.masks] for look in looks if look.image is not None}
    if not pairs or next(iter(pairs)).parent == data_dir / "images":
        return []
    lie = f"{len(pairs)} {'images lie each' if len(pairs) > 1 else 'image lies'} in a folder of its own"
    if len({stem_of(path) for path in pairs}) < len(pairs):
        where = f"put all into {data_dir / 'images'}, each under a name of its own, and its mask under the same name"
        return [of_set("layout", "error", f"{lie}: {where} into {data_dir / 'masks'}", f"{where} into masks")]
    command = _copy(data_dir, "images")
    if any(path.parent.parent == mask.parent.parent for path, masks in pairs.items() for mask in masks):
        if all([stem_of(mask) for mask in masks] in ([], [stem_of(path)]) for path, masks in pairs.items()):
            command += f" && {_copy(data_dir, 'masks')}"
        else:
            merge = " --merge union" if any(len(masks) > 1 for masks in pairs.values()) else ""
            command = f"{FIX.replace('DATA', shlex.quote(str(data_dir)))}{merge}, then {command}"
    return [of_set("layout", "error", f"{lie}: put them into one: run {command}", f"run {command}")]


def _copy(data_dir: Path, kind: str) -> str:
    """Return the command that copies what lies in the folders of one image each into one folder."""
    folder = shlex.quote(str(data_dir))
    return f"mkdir {folder}/{kind} && cp {folder}/*/{kind}/* {folder}/{kind}"


def _other_names(looks: Sequence[Look], data_dir: Path) -> list[Finding]:
    """Name masks that seem to belong to an image although its name is another."""
    pairs = {
        look.masks[0].path: look.image.path
        for look in looks
        if look.image is not None
        and look.image.path.parent == data_dir / "images"
        and len(look.masks) == 1
        and stem_of(look.image.path) not in (stem_of(look.masks[0].path), look.masks[0].path.parent.name)
    }
    example = next((f"{image.name} with {mask.name}" for mask, image in pairs.items()), "")
    remedy = f"rename them, or run {FIX}, which names the masks like their images"
    return of_files(
        "stems_differ",
        "error",
        "mask",
        {
            mask: f"has another name than {image}, to which it seems to belong: {remedy}"
            for mask, image in pairs.items()
        },
        f"have other names than the images to which they seem to belong, {example}: {remedy}",
        FIX,
    )


# Sizes


def _sizes(looks: Sequence[Look]) -> list[Finding]:
    turned: dict[Path, str] = {}
    differ: dict[Path, str] = {}
    doubtful: dict[Path, str] = {}
    for look in looks:
        if look.image is None or look.image.header is None or look.image.problem is not None:
            continue
        for mask in look.masks:
            if mask.header is None or mask.problem is not None:
                continue
            image, both = look.image.header, f"{_size(mask.header)} pixels (width x height) but {look.image.path}"
            same = _size(image) == _size(mask.header)
            raw = image.orientation >= 5 and mask.header.orientation == 1
            if not same and raw and (mask.header.width, mask.header.height) == (image.height, image.width):
                turned[mask.path] = f"is {both} is shown turned by its EXIF tag, {_size(image)}: {FIX} turns the mask"
            elif not same:
                differ[mask.path] = (
                    f"is {both} is {_size(image)}{_relation(image, mask.header)}: export one of them again"
                )
            elif _may_not_be_turned(image, mask.header):
                doubtful[mask.path] = (
                    f"has no EXIF tag but {look.image.path} is {TURNED[image.orientation]} by its own, and the sizes "
                    "do not tell whether the mask was drawn on the turned image: look at one of them"
                )
    return [
        *of_files(
            "exif_not_applied",
            "error",
            "mask",
            turned,
            f"lie as their images are stored, not as the EXIF tag of these turns them: {FIX} turns the masks",
            FIX,
        ),
        *of_files(
            "size_differs",
            "error",
            "mask",
            differ,
            "have another size than their images: export one of the two again, for to resize labels is to guess",
            "which size is right? Export the other again",
        ),
        *of_files(
            "exif_doubtful",
            "warning",
            "mask",
            doubtful,
            "have no EXIF tag but their images are turned by one, and the sizes do not tell whether the masks were "
            "drawn on the turned images: look at some",
        ),
    ]


# EXIF orientations in words.
TURNED = {
    2: "mirrored",
    3: "turned by 180 degrees",
    4: "mirrored top to bottom",
    5: "mirrored at the diagonal",
    6: "turned right",
    7: "mirrored at the other diagonal",
    8: "turned left",
}


def _size(header: Header) -> str:
    return f"{header.width}x{header.height}"


def _may_not_be_turned(image: Header, mask: Header) -> bool:
    """Whether an image is turned in a way that leaves its size, and its mask is not."""
    keeps_size = image.orientation in (2, 3, 4) or (image.orientation in (5, 6, 7, 8) and image.height == image.width)
    return keeps_size and mask.orientation != image.orientation


def _relation(image: Header, mask: Header) -> str:
    """Say how the sizes are related, where they are."""
    if (mask.width, mask.height) == (image.height, image.width):
        return ", with width and height swapped"
    if mask.width * image.height == mask.height * image.width:
        return f", {mask.width / image.width:.3g} times that size"
    return ""
