"""ml-init-config: a configuration that fits a data set."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ml_src.cli._app import Parser, run

OVERRIDES = {
    "batch_size": ("training.batch_size", int),
    "num_epochs": ("training.num_epochs", int),
    "lr": ("optimizer.lr", float),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ml-init-config."""
    return run(_init_config, argv)


def _init_config(argv: Sequence[str]) -> int:
    parser = Parser("ml-init-config", "Look at a data set and write a configuration for it, with the reasons.")
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with images/ and masks/")
    parser.add_argument("--task", default="segmentation", choices=["segmentation"])
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: configs/<folder>_config.yaml")
    parser.add_argument("--splits_dir", type=Path, metavar="DIR", help="what --output was for ml-split")
    parser.add_argument("--yes", action="store_true", help="overwrite an existing file without asking")
    for flag, (key, kind) in OVERRIDES.items():
        parser.add_argument(f"--{flag}", type=kind, help=key)
    args = parser.parse(argv)

    from rich.console import Console
    from rich.table import Table

    from ml_src.core.atomic import write_text
    from ml_src.core.config import Config
    from ml_src.core.errors import ConfigError
    from ml_src.core.starter import choose, describe, starter_yaml

    output = args.output or Path("configs") / f"{args.data.resolve().name}_config.yaml"
    data = describe(args.data, args.splits_dir)
    overrides = {key: getattr(args, flag) for flag, (key, _) in OVERRIDES.items() if getattr(args, flag) is not None}
    config, reasons = choose(data, overrides)
    schema = output.parent / "config.schema.json"
    text = starter_yaml(config, reasons, schema.name)
    if output.exists() and output.read_text(encoding="utf-8") != text and not args.yes:
        ask = f"{output} exists and differs"
        if not sys.stdin.isatty():
            raise ConfigError(f"{ask}: give --yes to overwrite it, or --output FILE")
        if input(f"{ask}. Overwrite it? [y/N] ").strip().lower() not in ("y", "yes"):
            print("Nothing was written.")
            return 0
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(schema, json.dumps(Config.model_json_schema(), indent=1) + "\n")
    write_text(output, text)

    table = Table(title=str(args.data), show_header=False)
    heights, widths = zip(*data.sizes, strict=True)
    colours = {1: "gray", 3: "RGB"}.get(data.channels, f"{data.channels} bands")
    rows = {
        "images": f"{data.num_images}, {colours}, {data.dtype}{', GeoTIFF' if data.geo else ''}",
        "height x width": f"{min(heights)}x{min(widths)} to {max(heights)}x{max(widths)}",
        "mean, std": "of the training images, computed when training starts"
        if data.mean == "data"
        else f"{data.mean}, {data.std} of the full range",
        "classes": ", ".join(f"{n} {s:.1%}" for n, s in zip(data.class_names, data.shares, strict=True)),
        "ignored": f"{data.ignored:.1%} (value {data.ignore_index})" if data.ignored else "nothing",
        "folds": str(data.folds) if data.folds else "none yet",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(f"Wrote {output}")
    if not data.folds:
        folders = [
            f"--raw_data {shlex.quote(str(args.data / 'images'))}",
            f"--mask_data {shlex.quote(str(args.data / 'masks'))}",
        ]
        print(f"Next: ml-split {' '.join(folders)} --folds 5 --task segmentation")
    print(f"{'Next' if data.folds else 'Then'}: ml-train --config {shlex.quote(str(output))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
