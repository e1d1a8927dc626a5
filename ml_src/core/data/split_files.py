"""The index files of a split, and what else is kept beside them. Next to read: `labelled_images.py`.

They are written all or none, because a mixture of two splits would leak test images into training.
"""

import csv
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from ml_src.core.data.files import Pair, listed, stem_of
from ml_src.core.data.pairs import Pairs
from ml_src.core.data.splits import Splits, groups_from_csv
from ml_src.core.errors import DataError

GROUPS = "groups.csv"
SPLIT_FILE = re.compile(r"(test|fold_\d+_(train|val))_(images|masks)\.txt|groups\.csv")
SITE_FOLDER = re.compile(r"site_\d+")


def cache_path(splits_dir: Path) -> Path:
    """Return where the facts of `checks.scan` are kept."""
    return splits_dir / ".mask_facts.json"


def statistics_path(splits_dir: Path) -> Path:
    """Return where the statistics of the training images are kept."""
    return splits_dir / ".statistics.json"


def index_files(splits: Splits, pairs: Sequence[Pair], data_dir: Path) -> dict[str, str]:
    """Return file name -> text of all parts, and of the groups where there are some."""
    return files_of_parts(splits.parts, splits.groups, pairs, data_dir)


def files_of_parts(
    parts: Mapping[str, Sequence[int]], groups: Sequence[str] | None, pairs: Sequence[Pair], data_dir: Path
) -> dict[str, str]:
    """Return file name -> text: one path a line, POSIX, relative to `data_dir`, in the order of the indices."""
    lines = {
        "images": _relative_lines([pair.image for pair in pairs], data_dir),
        "masks": _relative_lines([pair.mask for pair in pairs], data_dir),
    }
    table = {} if groups is None else {GROUPS: _groups_csv(pairs, groups)}
    return {
        f"{name}_{kind}.txt": "".join(of_kind[index] for index in indices)
        for name, indices in parts.items()
        for kind, of_kind in lines.items()
    } | table


def _groups_csv(pairs: Sequence[Pair], groups: Sequence[str]) -> str:
    """Return what `groups_from_csv` reads."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "group"])
    writer.writerows(zip([pair.image.name for pair in pairs], groups, strict=True))
    return text.getvalue()


def _relative_lines(paths: Sequence[Path], data_dir: Path) -> list[str]:
    folders = {folder: Path(os.path.relpath(folder, data_dir)) for folder in {path.parent for path in paths}}
    return [f"{(folders[path.parent] / path.name).as_posix()}\n" for path in paths]


def existing_files(splits_dir: Path) -> dict[str, str]:
    """Return the index files of a folder like `index_files`; empty where there are none."""
    if not splits_dir.is_dir():
        return {}
    return {
        path.name: _read(path) for path in splits_dir.iterdir() if path.is_file() and SPLIT_FILE.fullmatch(path.name)
    }


def existing_site_files(splits_dir: Path) -> dict[str, str]:
    """Return the index files of the folders of sites in a folder, as `site_0/test_images.txt` -> text."""
    if not splits_dir.is_dir():
        return {}
    folders = [path for path in splits_dir.iterdir() if SITE_FOLDER.fullmatch(path.name)]
    return {f"{path.name}/{name}": text for path in folders for name, text in existing_files(path).items()}


def write_splits(splits: Splits, pairs: Sequence[Pair], data_dir: Path, splits_dir: Path, force: bool) -> None:
    """Write the index files as `write_files` does."""
    write_files(index_files(splits, pairs, data_dir), splits_dir, force)


def write_files(new: Mapping[str, str], splits_dir: Path, force: bool) -> bool:
    """Write index files, all or none, and return whether anything changed: the same split again changes nothing.

    The index files of sites, `site_0/...`, go with the split that they divide: they stay with it where it is written
    again without them, and leave with it where another one takes its place.

    Raises: DataError where another split exists and `force` is not given, and where the folder cannot be written.
    """
    old = existing_files(splits_dir)
    if new == old:
        return False
    old |= existing_site_files(splits_dir)
    if new == old:
        return False
    if not old.items() <= new.items() and not force:
        raise DataError(f"{splits_dir} holds another split: give --force to replace it, or --output another folder")
    try:
        replace_files(splits_dir, old, new)
    except OSError as error:
        raise DataError(f"{splits_dir} cannot be written ({error.strerror}): give --output another folder") from error
    return True


def replace_files(folder: Path, old: Mapping[str, str], new: Mapping[str, str]) -> None:
    """Put the new files in the place of the old ones; whatever goes wrong, the old ones are there again.

    All old files leave before the first new one comes: even a power cut leaves no mixture, only too few files. Names
    are relative to `folder`; folders in it that all files have left go too, where nothing else is in them.
    """
    parents = sorted({(folder / name).parent for name in new} | {folder})
    created = [parent for parent in parents if not parent.exists()]
    try:
        _make_all(parents)
        with TemporaryDirectory(prefix=".split-", dir=folder) as scratch:
            drafts, backups = Path(scratch, "new"), Path(scratch, "old")
            _make_all([(drafts / name).parent for name in new] + [(backups / name).parent for name in old])
            for name, text in new.items():
                (drafts / name).write_text(text, encoding="utf-8", errors="surrogateescape", newline="\n")
            try:
                for name in old:
                    (folder / name).replace(backups / name)
                for name in new:
                    (drafts / name).replace(folder / name)
            except BaseException:
                for name in new:
                    if not (drafts / name).exists():
                        (folder / name).unlink()
                for name in old:
                    if (backups / name).exists():
                        (backups / name).replace(folder / name)
                raise
    except BaseException:
        _remove_empty(created)
        raise
    _remove_empty({(folder / name).parent for name in old} - set(parents))


def _make_all(folders: Iterable[Path]) -> None:
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders that hold at most what can be computed again."""
    for folder in sorted(folders, reverse=True):
        with suppress(OSError):
            held, caches = set(folder.iterdir()), {cache_path(folder), statistics_path(folder)}
            if held <= caches:
                for path in held:
                    path.unlink()
                folder.rmdir()


def read_split(splits_dir: Path, data_dir: Path, name: str) -> Pairs:
    """Read the pairs of `test`, `fold_0_train`, `fold_0_val`, ...

    Raises: DataError where a file is missing or empty, the two do not pair line by line, or a listed file is gone.
    """
    image_list, mask_list = (splits_dir / f"{name}_{kind}.txt" for kind in ("images", "masks"))
    for path in (image_list, mask_list):
        if not path.is_file():
            raise DataError(f"{path} does not exist: {_hint(splits_dir, name)}")
    images, masks = _lines(image_list), _lines(mask_list)
    if len(images) != len(masks):
        raise DataError(
            f"{image_list} has {len(images)} lines but {mask_list.name} has {len(masks)}: run ml-split again"
        )
    if not images:
        raise DataError(f"{image_list} is empty, the split has no {name.rpartition('_')[2]} images: run ml-split again")
    pairs = Pairs(*([str(data_dir / line) for line in lines] for lines in (images, masks)))
    gone: list[Path] = []
    for number, pair in enumerate(pairs, start=1):
        gone += [path for path in (pair.image, pair.mask) if not path.is_file()]
        if stem_of(pair.image) != stem_of(pair.mask):
            raise DataError(
                f"line {number} pairs {pair.image.name} in {image_list} with {pair.mask.name} in {mask_list.name}: "
                "run ml-split again"
            )
    if gone:
        lists = f"{image_list} and {mask_list.name}"
        raise DataError(f"{lists} name files that do not exist: {listed(gone)}; restore them or run ml-split again")
    return pairs


def pairs_of_split(splits_dir: Path, data_dir: Path) -> list[Pair] | None:
    """Return all pairs that ml-split divided, whatever folder their masks are in, sorted; None without a split.

    Raises: DataError as `read_split` does.
    """
    if not (splits_dir / "fold_0_train_images.txt").is_file():
        return None
    names = ["fold_0_train", "fold_0_val"] + ["test"] * (not is_empty(splits_dir, "test"))
    pairs = [pair for name in names for pair in read_split(splits_dir, data_dir, name)]
    return sorted(pairs, key=lambda pair: pair.image)


def read_groups(splits_dir: Path, pairs: Sequence[Pair]) -> list[str]:
    """Return the group of each pair, as ml-split kept them together.

    Raises: DataError where the split was made without groups.
    """
    path = splits_dir / GROUPS
    if not path.is_file():
        raise DataError(f"{path} does not exist: run ml-split again with --groups or --group_regex")
    return groups_from_csv(pairs, path)


def is_empty(splits_dir: Path, name: str) -> bool:
    """Return whether a part was split off with no image in it, as by --test_split 0."""
    path = splits_dir / f"{name}_images.txt"
    return path.is_file() and not _lines(path)


def _hint(splits_dir: Path, name: str) -> str:
    """Tell a fold number that is too high from a split that is missing or torn."""
    folds = [file for file in existing_files(splits_dir) if file.endswith("_val_images.txt")]
    fold = name.removeprefix("fold_").partition("_")[0]
    if folds and fold.isdigit() and int(fold) >= len(folds):
        return f"choose a fold from 0 to {len(folds) - 1}"
    return "run ml-split"


def _lines(path: Path) -> list[str]:
    # Not splitlines(): it also breaks at characters that a file name may hold.
    return [line for line in _read(path).split("\n") if line]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error
