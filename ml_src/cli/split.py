"""The command ml-split: which images are for testing, training and validation. Next to read: `core/data/splits.py`."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ml_src.cli._app import Parser, run

if TYPE_CHECKING:
    from ml_src.core.data.split_report import Row


def main(argv: Sequence[str] | None = None) -> int:
    """Run ml-split and return its exit code."""
    return run(_split, argv)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("ml-split", "Divide pairs of image and mask into a test split and folds; writes DATA/splits/.")
    add = parser.add_argument
    add("--raw_data", required=True, metavar="DATA/images", help="the folder of the images")
    add("--mask_data", required=True, metavar="DATA/masks", help="the folder of the masks, matched by stem")
    add("--folds", type=int, default=5, metavar="K", help="number of folds (default 5)")
    add("--task", default="segmentation", help="what is learned: segmentation")
    add("--test_split", type=float, default=0.15, metavar="F", help="share of the images for testing (default 0.15)")
    add(
        "--val_split",
        type=float,
        metavar="F",
        help="draw this share of what is not test for validation, anew for each fold; without it the folds are a "
        "partition: each image validates exactly once",
    )
    add("--stratified", action="store_true", help="give every part its share of every class, rare ones first")
    grouping = parser.add_mutually_exclusive_group()
    grouping.add_argument(
        "--groups",
        metavar="FILE.csv",
        help="columns image (name or stem) and group (patient, slide, scene): no group is divided",
    )
    grouping.add_argument(
        "--group_regex", metavar="RE", help="searched in the stem; its first group, or all of it, names the group"
    )
    add("--federated", action="store_true", help="also divide every part among sites; writes DATA/splits/site_0/, ...")
    add("--num_clients", type=int, metavar="N", help="with --federated: number of sites")
    add(
        "--partition_strategy",
        choices=("iid", "dirichlet", "group"),
        help="with --federated: iid (default) at random; dirichlet by class, unevenly; group keeps groups whole",
    )
    add(
        "--alpha",
        type=float,
        metavar="A",
        help="with dirichlet: 0.1 makes the sites very uneven in their classes, 100 even (default 0.5)",
    )
    add("--seed", type=int, default=42, help="the same seed gives the same split (default 42)")
    add("--output", metavar="DIR", help="where to write (default DATA/splits)")
    add("--force", action="store_true", help="replace another split that is already there")
    return parser.parse(argv)


def _split(argv: Sequence[str]) -> int:
    args = _arguments(argv)

    import shlex
    import shutil
    from contextlib import suppress
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from ml_src.core.data import checks, split_files, split_report, splits
    from ml_src.core.data.files import find_pairs, read_class_names
    from ml_src.core.errors import ConfigError
    from ml_src.core.federated import partition
    from ml_src.core.progress import progress_bar
    from ml_src.core.registry import suggest

    if args.task != "segmentation":
        raise ConfigError(f"--task: unknown task {args.task!r}; {suggest(args.task, ['segmentation'])}")
    if not 0 <= args.seed < 2**64:
        raise ConfigError(f"--seed is {args.seed}: give a number from 0 up")
    with_groups = args.groups is not None or args.group_regex is not None
    plan = partition.plan_of_flags(args.federated, args.num_clients, args.partition_strategy, args.alpha, with_groups)
    image_dir, mask_dir = Path(args.raw_data), Path(args.mask_data)
    if image_dir.name in ("", ".."):  # "." and the like have no parent in their name
        image_dir = image_dir.resolve()
    data_dir = image_dir.parent
    splits_dir = Path(args.output) if args.output else data_dir / "splits"

    pairs = find_pairs(image_dir, mask_dir)
    names = read_class_names(data_dir)
    groups = None
    if args.groups is not None:
        groups = splits.groups_from_csv(pairs, Path(args.groups))
    elif args.group_regex is not None:
        groups = splits.groups_from_regex(pairs, args.group_regex)
    cache = split_files.cache_path(splits_dir)
    with TemporaryDirectory() as scratch:  # nothing is written beside the data before all is known to be well
        draft = Path(scratch) / cache.name
        with suppress(OSError):
            shutil.copyfile(cache, draft)
        with progress_bar("reading masks", len(pairs)) as advance:
            facts = checks.scan(pairs, draft, advance)
        checks.check_files(pairs, facts)
        classes, unlabelled = split_report.class_values(facts, names)
        counts = [{value: fact.counts[value] for value in classes if value in fact.counts} for fact in facts]
        drawn = splits.make_splits(
            counts, groups, args.folds, args.test_split, args.val_split, args.stratified, args.seed
        )
        files, site_of, folders = split_files.index_files(drawn, pairs, data_dir), None, []
        if plan:
            folders = partition.site_folders(splits_dir, plan.num_sites)
            site_of = partition.assign_sites(
                counts, drawn.parts, groups, plan.num_sites, plan.strategy, plan.alpha, args.seed
            )
            files |= partition.site_files(site_of, drawn.parts, groups, pairs, data_dir)
        changed = split_files.write_files(files, splits_dir, args.force)
        with suppress(OSError):
            shutil.copyfile(draft, cache)
        partition.share_facts(cache, folders)

    rows = split_report.rows_of(drawn, facts, classes, groups)
    labels = [names[value] if names and value < len(names) else str(value) for value in classes]
    _print_table(rows, labels, unlabelled, groups is not None)
    for doubt in (split_report.odd_values(facts, names), split_report.absent_classes(rows, labels, args.stratified)):
        if doubt:
            print(f"warning: {doubt}")
    if site_of is not None:
        sites = split_report.rows_of_sites(site_of, facts, classes, groups)
        _print_table(sites, labels, unlabelled, groups is not None)
        print(split_report.distance_of_sites(sites))
    print(f"{len(pairs)} pairs; index files in {splits_dir}{'' if changed else ' (unchanged)'}")
    where = f" --splits_dir {shlex.quote(str(splits_dir))}" if args.output else ""
    print(f"next: ml-init-config {shlex.quote(str(data_dir))} --task segmentation{where}")
    if site_of is not None:
        print(f"then write into its YAML file, where trainer_type is federated:\n{partition.sites_as_yaml(folders)}")
    return 0


def _print_table(rows: "list[Row]", labels: list[str], unlabelled: int | None, with_groups: bool) -> None:
    """Print one line a part; as many tables below each other as the terminal's width asks for."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width
        console.width = 10_000
    fixed = {"": [row.name for row in rows], "images": [str(row.num_images) for row in rows]}
    if with_groups:
        fixed["groups"] = [str(row.num_groups) for row in rows]
    shares = [
        (f"{label} %", [_percent(row.pixels[index], sum(row.pixels)) for row in rows])
        for index, label in enumerate(labels)
    ]
    if any(row.ignored for row in rows):
        ignored = [_percent(row.ignored, row.ignored + sum(row.pixels)) for row in rows]
        shares.append((f"{unlabelled} (ignored) %", ignored))

    used = first_width = sum(max(map(len, [title, *cells])) + 3 for title, cells in fixed.items())
    tables = [list(fixed.items())]
    for title, cells in shares:
        width = max(map(len, [title, *cells])) + 3
        if used + width > console.width and used > first_width:
            tables.append(list(fixed.items()))
            used = first_width
        tables[-1].append((title, cells))
        used += width
    for columns in tables:
        table = Table(box=SIMPLE if console.is_terminal else None, pad_edge=False)
        for title, _ in columns:
            table.add_column(Text(title), justify="right" if title else "left", no_wrap=True)
        for line in zip(*(cells for _, cells in columns), strict=True):
            table.add_row(*map(Text, line))
        console.print(table)


def _percent(part: int, whole: int) -> str:
    if part == 0:
        return "0" if whole else "-"
    return f"{100 * part / whole:.2f}" if part / whole >= 0.00005 else "<0.01"
