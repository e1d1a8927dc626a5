"""What is wrong with the data set as a whole: images that differ, classes that are missing, splits that leak.

Next to read: `duplicates.py` and `overlaps.py`, which compare the images.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_src.core.checking.duplicates import near_duplicates
from ml_src.core.checking.inspection import ImageLook, MaskLook
from ml_src.core.checking.kinds import Finding, named, of_files, of_set
from ml_src.core.checking.overlaps import overlaps
from ml_src.core.data.checks import unlabelled_value
from ml_src.core.data.files import Pair, listed
from ml_src.core.data.headers import Header
from ml_src.core.data.split_files import GROUPS, existing_files
from ml_src.core.data.splits import groups_from_csv
from ml_src.core.errors import DataError

FOLDS = 5  # of ml-split, unless told otherwise
ONE_CLASS = (
    "the masks know one class only, 0, but a network learns to tell classes apart: draw a second one into the masks, "
    "or name the classes in classes.txt, one a line, if it is only missing here"
)
TOGETHER = "keep them in one part by ml-split --groups"


def image_findings(images: Sequence[ImageLook]) -> list[Finding]:
    """Compare the images among each other."""
    headers = {image.path: image.header for image in images if image.header is not None and image.problem is None}
    channels = {path: 3 if header.palette else header.colours for path, header in headers.items()}
    alike = _gray_and_colour(channels) if set(channels.values()) == {1, 3} else _odd_ones(
        "channels_differ", channels, "channels", "channel", "save all alike, for a network takes one number of channels"
    )  # fmt: skip
    return [
        *alike,
        *_odd_ones(
            "number_types_differ",
            {path: header.dtype.name for path, header in headers.items()},
            "numbers",
            "numbers",
            "convert them, for statistics and model are of one number type",
        ),
        *_alpha(headers),
        *_constant([image.path for image in images if image.constant]),
    ]


def _odd_ones(kind: str, facts: Mapping[Path, object], many: str, one: str, remedy: str) -> list[Finding]:
    """Name the files that are not as most are."""
    counts = Counter(facts.values())
    if len(counts) < 2:
        return []
    (common, number), *_ = counts.most_common()
    odd = {path: fact for path, fact in facts.items() if fact != common}
    ending = f"but {number} other images have {common}: {remedy}"
    says = {path: f"has {fact} {one if fact == 1 else many} {ending}" for path, fact in odd.items()}
    kinds = listed(sorted({str(fact) for fact in odd.values()}))
    return of_files(kind, "error", "image", says, f"have {kinds} {many} {ending}", "convert the images")


def _gray_and_colour(channels: Mapping[Path, int]) -> list[Finding]:
    number = Counter(channels.values())
    message = f"images are of two kinds, {number[3]} RGB and {number[1]} gray: all are read as model.in_channels says"
    return [of_set("gray_and_colour", "note", message)]


def _alpha(headers: Mapping[Path, Header]) -> list[Finding]:
    number = sum(header.colours < header.samples for header in headers.values())
    verb = f"{number} image{'s have' if number > 1 else ' has'}"
    return [of_set("alpha_channel", "note", f"{verb} an alpha channel, which is dropped")] if number else []


def _constant(paths: Sequence[Path]) -> list[Finding]:
    says = "one value in all pixels, so that nothing is to be seen: look at them, and remove what is no picture"
    return of_files("constant_image", "warning", "image", dict.fromkeys(paths, f"has {says}"), f"have {says}")


def class_findings(
    masks: Sequence[MaskLook], names: Sequence[str] | None, num_classes: int | None, num_folds: int
) -> list[Finding]:
    """Name classes that no mask has, and those that too few have for every fold to be measured on them.

    Where the number of classes is not known, gaps between several values are the matter of `value_findings.py`.
    """
    images = Counter(int(value) for mask in masks for value in mask.values)  # how many have it
    unlabelled = unlabelled_value(images.keys(), names) if images else None
    found_classes = sorted(images.keys() - {unlabelled})
    lone = num_classes is None and len(found_classes) == 1
    expected = range(num_classes) if num_classes else range(found_classes[0] + 1) if lone else found_classes
    classes = [value for value in expected if value != unlabelled]

    def label(value: int) -> str:
        return f"{value} ({names[value]})" if names and value < len(names) else str(value)

    absent = [label(value) for value in classes if not images[value]]
    rare = [f"{label(value)} in {images[value]}" for value in classes if 0 < images[value] < num_folds]
    found = []
    if absent:
        have = "classes have" if len(absent) > 1 else "class has"
        remedy = "nothing can be learned of what is not there; correct the masks or classes.txt"
        found.append(
            of_set(
                "absent_class",
                "warning",
                f"{len(absent)} {have} no pixel in any mask, class {listed(absent)}: {remedy}",
            )
        )
    if rare and len(masks) >= num_folds:
        what = f"{len(rare)} class{'es are' if len(rare) > 1 else ' is'} in fewer images than there are folds"
        remedy = "some folds cannot measure such a class; add images, or give ml-split fewer --folds and --stratified"
        found.append(of_set("rare_class", "warning", f"{what} ({num_folds}), class {listed(rare)}: {remedy}"))
    return found


def one_class(masks: Sequence[MaskLook], num_classes: int | None) -> list[Finding]:
    """Name it where there is no second class to learn: by the masks, or by classes.txt where that counts them."""
    values = {int(value) for mask in masks for value in mask.values}
    only = num_classes == 1 or (num_classes is None and values == {0})
    return [of_set("one_class", "error", ONE_CLASS)] if only else []


# Splits


class Parts:
    """In which part of the split each image is, for every fold."""

    def __init__(self, data_dir: Path, splits_dir: Path | None) -> None:
        self.splits_dir = splits_dir or data_dir
        self.files = {} if splits_dir is None else existing_files(splits_dir)
        self.folds: list[dict[str, str]] = []  # path of an image -> test, train or val
        lists = {name: _paths(text, data_dir) for name, text in self.files.items() if name != GROUPS}
        self.twice: dict[Path, str] = {}  # images that are in two parts themselves, and in which
        while f"fold_{len(self.folds)}_train_images.txt" in lists:
            fold, parts = len(self.folds), dict.fromkeys(lists.get("test_images.txt", []), "test")
            for part in ("train", "val"):
                paths = lists.get(f"fold_{fold}_{part}_images.txt", [])
                self.twice |= {
                    Path(path): f"{parts[path]} and {part} of fold {fold}" for path in paths if path in parts
                }
                parts |= dict.fromkeys(paths, part)
            self.folds.append(parts)
        self.gone = {
            name: gone
            for name, paths in lists.items()
            if (gone := [path for path in paths if not Path(path).is_file()])
        }

    def between(self, first: Path, second: Path) -> str | None:
        """Say which parts two images are in, where these differ in some fold; else None."""
        one, other = _normal(first), _normal(second)
        for fold, parts in enumerate(self.folds):
            both = parts.get(one), parts.get(other)
            if None not in both and both[0] != both[1]:
                return f"{both[0]} and {both[1]} of fold {fold}"
        return None


def _normal(path: Path | str) -> str:
    return os.path.normpath(path)


def _paths(text: str, data_dir: Path) -> list[str]:
    return [_normal(data_dir / line) for line in text.split("\n") if line]


def split_findings(images: Sequence[ImageLook], parts: Parts) -> list[Finding]:
    """Name what index files list but is gone, groups that are divided, and images in two parts that show the same."""
    copies, same = _duplicates(images, parts)
    groups = _divided_groups([image.path for image in images], parts)
    return [*_gone(parts), *_twice(parts), *groups, *copies, *_overlaps(images, parts, same)]


def _gone(parts: Parts) -> list[Finding]:
    says = {
        parts.splits_dir
        / name: f"names {len(paths)} file{'s' * (len(paths) > 1)} that {'are' if len(paths) > 1 else 'is'} "
        f"not there: {named([Path(path) for path in paths])}; restore, or run ml-split again"
        for name, paths in parts.gone.items()
    }
    number = len({path for paths in parts.gone.values() for path in paths})
    together = f"name {number} files that are not there: restore them, or run ml-split again"
    return of_files("missing_files", "error", "index file", says, together, "run ml-split again")


def _twice(parts: Parts) -> list[Finding]:
    remedy = "scores would be too good: run ml-split again"
    says = {path: f"is in {where} at once: {remedy}" for path, where in parts.twice.items()}
    return of_files("listed_twice", "error", "image", says, f"are in two parts of the split at once: {remedy}")


def _divided_groups(images: Sequence[Path], parts: Parts) -> list[Finding]:
    if GROUPS not in parts.files or not parts.folds:
        return []
    kept = [path for path in images if _normal(path) in parts.folds[0]]
    try:
        groups = groups_from_csv([Pair(path, path) for path in kept], parts.splits_dir / GROUPS)
    except DataError as error:
        return [of_set("split_groups", "error", f"{error}; run ml-split again with --groups")]
    members: dict[str, list[Path]] = defaultdict(list)
    for path, group in zip(kept, groups, strict=True):
        members[group].append(path)
    divided = [
        f"{group!r} ({between})"
        for group, paths in members.items()
        if (between := next(filter(None, (parts.between(paths[0], path) for path in paths[1:])), None))
    ]
    if not divided:
        return []
    are = "groups are" if len(divided) > 1 else "group is"
    message = (
        f"{len(divided)} {are} in two parts of the split at once, {listed(divided, 5)}: scores would be too good; "
        "run ml-split again with --groups"
    )
    return [of_set("split_groups", "error", message, "run ml-split again with --groups")]


class Doubt(NamedTuple):
    """Two images that should not be in different parts."""

    first: Path
    second: Path
    what: str  # completes "<second> ..."


def _duplicates(images: Sequence[ImageLook], parts: Parts) -> tuple[list[Finding], set[tuple[Path, Path]]]:
    known = [(image.path, image.fingerprint) for image in images if image.fingerprint is not None]
    by_kind: dict[str, list[Doubt]] = {"exact": [], "near": []}
    for found in near_duplicates([fingerprint for _, fingerprint in known]):
        first, second = known[found.first][0], known[found.second][0]
        turned = "" if found.symmetry in (None, "the same way up") else f" {found.symmetry}"
        words = "is the same picture as" if found.kind == "exact" else "shows nearly the same as"
        by_kind[found.kind].append(Doubt(first, second, f"{words} {first}{turned}"))
    findings = [
        *_doubtful("duplicates", by_kind["exact"], "are the same pictures as others", "remove one of each", parts),
        *_doubtful("near_duplicates", by_kind["near"], "show nearly the same as others", TOGETHER, parts),
    ]
    return findings, {(doubt.first, doubt.second) for doubts in by_kind.values() for doubt in doubts}


def _overlaps(images: Sequence[ImageLook], parts: Parts, same: set[tuple[Path, Path]]) -> list[Finding]:
    placed = [(image.path, image.place) for image in images if image.place is not None]
    boxes = [(place.left, place.bottom, place.right, place.top) for _, place in placed]
    doubts = [
        Doubt(placed[i][0], placed[j][0], f"covers {100 * share:.0f} % of the same ground as {placed[i][0]}")
        for i, j, share in (overlaps(boxes, [place.crs for _, place in placed]) if boxes else [])
        if (placed[i][0], placed[j][0]) not in same
    ]
    return _doubtful("overlapping_tiles", doubts, "overlap others on the ground", TOGETHER, parts)


def _doubtful(kind: str, doubts: Sequence[Doubt], together: str, remedy: str, parts: Parts) -> list[Finding]:
    """Turn doubts into errors where the split divides the images, and else into warnings."""
    across: dict[Path, str] = {}
    within: dict[Path, str] = {}
    for doubt in doubts:
        between = parts.between(doubt.first, doubt.second)
        if between is not None:
            across[doubt.second] = f"{doubt.what} but they are in {between}: {remedy}"
        else:
            within[doubt.second] = f"{doubt.what}: {remedy}"
    leak = f"{together} in another part of the split, so that scores would be too good: {remedy}"
    return [
        *of_files(kind, "error", "image", across, leak, remedy),
        *of_files(kind, "warning", "image", within, f"{together}: {remedy}", remedy),
    ]
