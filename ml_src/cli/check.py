"""The command ml-check: what is wrong with a data set, and what mends it. Next to read: `core/checking/findings.py`."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ml_src.cli._app import Parser, run

if TYPE_CHECKING:
    from pathlib import Path

    from ml_src.core.checking.inspection import Look


def main(argv: Sequence[str] | None = None) -> int:
    """Run ml-check and return its exit code: 1 where training would fail or learn wrong things."""
    return run(_check, argv)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("ml-check", "Find what is wrong with a data set before training does, and mend the masks.")
    add = parser.add_argument
    add("data", metavar="DATA", help="the folder that holds images/ and masks/")
    add("--mask_dir", metavar="DIR", help="where the masks are (default DATA/masks), such as DATA/masks_fixed")
    add("--splits_dir", metavar="DIR", help="the index files of ml-split (default DATA/splits)")
    add("--num_classes", type=int, metavar="N", help="how many classes there are (default: the lines of classes.txt)")
    add("--report", metavar="FILE", help="write all that was found, as .html to read or .json for programs")
    add("--fix", action="store_true", help="write repaired copies of the masks and fixes.json; originals stay")
    add("--output", metavar="DIR", help="where --fix writes (default DATA/masks_fixed); the file of --preview")
    add("--undo", action="store_true", help="remove what --fix has written")
    add("--colors", metavar="FILE.csv", help="for --fix: columns r,g,b,class, or color (#ff0000) and class")
    add("--merge", choices=["union"], help="for --fix: make one mask, 0 and 1, of several masks of an image")
    add("--preview", metavar="CONFIG", help="write a sheet of augmented training samples with their masks, as PNG")
    return parser.parse(argv)


def _check(argv: Sequence[str]) -> int:
    args = _arguments(argv)

    from pathlib import Path

    _require_sense(args)
    data_dir = Path(args.data)
    if args.preview is not None:
        return _preview(Path(args.preview), data_dir, args.output)
    output_dir = Path(args.output) if args.output else data_dir / "masks_fixed"
    if args.undo:
        return _undo(output_dir)

    from ml_src.core.checking import report
    from ml_src.core.checking.findings import find, headline
    from ml_src.core.data.files import read_class_names

    names = read_class_names(data_dir)
    looks = _look(data_dir, None if args.mask_dir is None else Path(args.mask_dir))
    splits_dir = Path(args.splits_dir) if args.splits_dir else data_dir / "splits"
    findings = find(looks, data_dir, names, args.num_classes, splits_dir)

    _say([headline(findings, looks, names)])
    print()
    report.print_report(findings, sum(look.image is not None and bool(look.masks) for look in looks))
    if args.report is not None:
        report.write_report(Path(args.report), findings, looks, data_dir)
        _say([f"report in {args.report}"])
    errors = [finding for finding in findings if finding.severity == "error"]
    if not args.fix:
        return 1 if errors else 0
    refused = _fix(looks, data_dir, output_dir, args)
    return 1 if refused or not all(finding.mended for finding in errors) else 0


def _require_sense(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, before thousands of files are read."""
    from pathlib import Path

    from ml_src.core.checking.report import require_ending
    from ml_src.core.errors import ConfigError, DataError

    tasks = {"--fix": args.fix, "--undo": args.undo, "--preview": args.preview is not None}
    if len(given := [flag for flag, wanted in tasks.items() if wanted]) > 1:
        raise ConfigError(f"{' and '.join(given)} do not go together: give one of them")
    if Path(args.data).is_file():
        raise DataError(f"{args.data} is a file: give the folder that holds images/ and masks/")
    if args.num_classes is not None and args.num_classes < 2:
        raise ConfigError(f"--num_classes is {args.num_classes}: give a number from 2 up")
    if (args.colors or args.merge) and not args.fix:
        raise ConfigError(f"{'--colors' if args.colors else '--merge'} says how to mend masks: add --fix")
    if args.splits_dir is not None and not Path(args.splits_dir).is_dir():
        raise ConfigError(f"--splits_dir {args.splits_dir} does not exist: give the folder that ml-split wrote")
    if args.report is not None:
        require_ending(Path(args.report))


def _look(data_dir: "Path", mask_dir: "Path | None") -> "list[Look]":
    from ml_src.core.checking.inspection import inspect_all
    from ml_src.core.checking.layouts import find_files
    from ml_src.core.progress import progress_bar

    files = find_files(data_dir, mask_dir)
    with progress_bar("reading images and masks", len(files)) as advance:
        return inspect_all(files, advance)


def _fix(looks: "list[Look]", data_dir: "Path", output_dir: "Path", args: argparse.Namespace) -> int:
    """Write repaired masks and say what was done; returns how many were refused."""
    from pathlib import Path

    from ml_src.core.checking import repair

    colors = None if args.colors is None else Path(args.colors)
    mask_dir = None if args.mask_dir is None else Path(args.mask_dir)
    outcome = repair.fix(looks, data_dir, output_dir, colors, args.merge, args.num_classes, mask_dir)
    print()
    _say(outcome.lines)
    return outcome.refused


def _undo(output_dir: "Path") -> int:
    from ml_src.core.checking import repair

    _say(repair.undo(output_dir))
    return 0


def _preview(config_path: "Path", data_dir: "Path", output: str | None) -> int:
    from pathlib import Path

    from ml_src.core.checking.preview import write_preview

    sheet = Path(output) if output else Path(f"{data_dir.resolve().name}_preview.png")
    _say([f"samples as the model will see them in {write_preview(config_path, data_dir, sheet)}"])
    return 0


def _say(lines: Sequence[str]) -> None:
    from ml_src.core.checking.grouping import printable

    for line in lines:
        print(printable(line))
