"""Which files lie in a data set and which masks belong to which image, however they are arranged and named.

`files.find_pairs` takes only what training can use; this proposes pairs also where names do not match, so that the
masks can be looked at and the user told how to arrange them. Next to read: `inspection.py`.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ml_src.core.data.files import SUFFIXES, is_image_name, listed, stem_of
from ml_src.core.errors import DataError

WORDS = re.compile(r"\d+|[^\W\d_]+")  # of a stem: its numbers and its words
SIGN = re.compile(r"[\W_]")  # what may stand between an image's stem and the rest of its mask's
# Names are compared loosely only where fewer than one in so many is the same: else what is left over has no partner.
ONE_IN = 10


class Files(NamedTuple):
    """An image with all that seem to be its masks; or a mask that belongs to none."""

    image: Path | None
    masks: tuple[Path, ...]


def find_files(data_dir: Path, mask_dir: Path | None = None) -> list[Files]:
    """Find the images under DATA/images with their masks under DATA/masks, or else one folder an image in DATA.

    A mask belongs to the image of its stem. It may lie in a folder of the image's stem, or in one of a class. Where
    (nearly) no image has a mask of its stem, masks whose names begin with its stem are taken; then those with the same
    numbers and words, but for words that only and all masks, or images, have.

    Raises: DataError where there are no images or masks at all.
    """
    image_dir, masks_dir = data_dir / "images", mask_dir or data_dir / "masks"
    if not data_dir.is_dir():
        raise DataError(f"{data_dir} does not exist: give the folder that holds images/ and masks/")
    images = _files_in(image_dir)
    if not image_dir.is_dir():
        apart = _one_folder_an_image(data_dir)
        images = [found.image for found in apart if found.image is not None]
        if not images:
            raise DataError(f"{data_dir} has no folder images: {_advice(data_dir)}")
        if mask_dir is None:
            return apart
    if not images:
        raise DataError(f"{image_dir} holds no image files ({', '.join(SUFFIXES)}){_holds(image_dir)}")
    if not masks_dir.is_dir():
        raise DataError(f"{masks_dir} does not exist: put the masks there")
    masks = _masks_by_stem(masks_dir, {stem_of(path) for path in images})
    if not masks:
        raise DataError(f"{masks_dir} holds no masks ({', '.join(SUFFIXES)}){_holds(masks_dir)}")
    return _matched(images, masks)


def _advice(data_dir: Path) -> str:
    inside = [folder.name for folder in _folders_in(data_dir) if _is_data_set(folder)]
    if data_dir.name in ("images", "masks"):
        return f"give the folder above, {data_dir.parent}"
    if inside:
        return f"give one of its folders that has, {listed(inside)}"
    return "put the images there, and the masks in a folder masks beside it"


def _is_data_set(folder: Path) -> bool:
    return (folder / "images").is_dir() or bool(_one_folder_an_image(folder))


def _holds(folder: Path) -> str:
    """Say what a folder holds instead of pictures."""
    endings = sorted({path.suffix or "no ending" for path in folder.iterdir() if path.is_file()})
    folders = [path.name for path in _folders_in(folder)]
    holds = [f"files with {listed(endings, 5)}"] * bool(endings) + [f"the folders {listed(folders, 5)}"] * bool(folders)
    return f" but {' and '.join(holds)}" if holds else ""


def _files_in(folder: Path) -> list[Path]:
    """Return the image files directly in a folder, sorted; none where there is no folder."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if is_image_name(entry.name) and _is_file(entry)]
    return [folder / name for name in sorted(names)]


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file, or what cannot even be asked, such as a link to itself, and is to be named."""
    try:
        return entry.is_file()
    except OSError:
        return True


def _folders_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _one_folder_an_image(data_dir: Path) -> list[Files]:
    """Return DATA/<any>/images/<one file> with DATA/<any>/masks/*; empty where a folder holds several images."""
    found = []
    for folder in _folders_in(data_dir):
        images, masks = _files_in(folder / "images"), _files_in(folder / "masks")
        if len(images) > 1:
            return []
        if images:
            found.append(Files(images[0], tuple(masks)))
        else:
            found += [Files(None, (mask,)) for mask in masks]
    return found


def _masks_by_stem(mask_dir: Path, image_stems: set[str]) -> dict[str, list[Path]]:
    """Return the masks by the stem of the image that they name: by their own, or by that of their folder."""
    found = defaultdict(list)
    for path in _files_in(mask_dir):
        found[stem_of(path)].append(path)
    for folder in _folders_in(mask_dir):
        of_one_image = folder.name in image_stems
        for path in _files_in(folder):
            found[folder.name if of_one_image else stem_of(path)].append(path)
    return found


def _matched(images: Sequence[Path], masks: Mapping[str, list[Path]]) -> list[Files]:
    first = {stem_of(path): path for path in reversed(images)}  # of images of one stem the first gets the masks
    match = {stem: [stem] for stem in first.keys() & masks.keys()}
    if ONE_IN * len(match) < min(len(first), len(masks)):
        match |= _by_beginning(*_unmatched(first, masks, match))
        match |= _by_words(*_unmatched(first, masks, match), _signs(first, masks), _signs(masks, first))
    masks_of = {first[stem]: [path for mask in found for path in masks[mask]] for stem, found in match.items()}
    used = {mask for found in match.values() for mask in found}
    files = [Files(path, tuple(masks_of.get(path, ()))) for path in images]
    return files + [Files(None, (path,)) for stem in masks if stem not in used for path in masks[stem]]


Match = dict[str, list[str]]  # the stem of an image -> the stems of its masks


def _unmatched(images: Iterable[str], masks: Iterable[str], match: Match) -> tuple[list[str], list[str]]:
    used = {mask for found in match.values() for mask in found}
    return [stem for stem in images if stem not in match], sorted(stem for stem in masks if stem not in used)


def _by_beginning(images: Iterable[str], masks: Iterable[str]) -> Match:
    """Return for images the masks that begin with their stem and go on with a sign; the longest stem wins."""
    known = set(images)
    found = defaultdict(list)
    for mask in masks:
        ends = [sign.start() for sign in SIGN.finditer(mask)]
        stem = next((mask[:end] for end in reversed(ends) if mask[:end] in known), None)
        if stem is not None:
            found[stem].append(mask)
    return found


def _by_words(images: Iterable[str], masks: Iterable[str], image_signs: set[str], mask_signs: set[str]) -> Match:
    """Return for images the mask with the same words, signs left out, where only one of each has them."""
    by_key: dict[tuple[str, ...], tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for side, (stems, signs) in enumerate(((images, image_signs), (masks, mask_signs))):
        for stem in stems:
            by_key[tuple(word for word in _words(stem) if word not in signs)][side].append(stem)
    unique = {key: both for key, both in by_key.items() if key and len(both[0]) == len(both[1]) == 1}
    return {image: found for (image,), found in unique.values()}


def _signs(stems: Iterable[str], others: Iterable[str]) -> set[str]:
    """Return the words that all of these stems have and none of the others: what says "image", or "mask"."""
    common = set.intersection(*(set(_words(stem)) for stem in stems))
    return common.difference(*map(_words, others))


def _words(stem: str) -> list[str]:
    """Return numbers without leading zeros, and words in small letters."""
    return [str(int(word)) if word.isdecimal() else word.casefold() for word in WORDS.findall(stem)]
