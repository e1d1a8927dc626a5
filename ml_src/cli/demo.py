"""ml-demo: the whole main job on a generated data set, with each command shown before it runs."""

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from ml_src.cli import export, inference, init_config, split, train
from ml_src.cli._app import Parser, run

Main = Callable[[Sequence[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ml-demo."""
    return run(_demo, argv)


def _demo(argv: Sequence[str]) -> int:
    parser = Parser("ml-demo", "Generate a small data set, then split, configure, train, measure and export.")
    parser.add_argument("--output", type=Path, default=Path("demo"), metavar="DIR", help="default: demo")
    parser.add_argument("--num_epochs", type=int, default=24, help="passes over the training images")
    args = parser.parse(argv)

    from ml_src.core.data.sample import write_sample

    data = Path("data/sample")
    (args.output / data).mkdir(parents=True, exist_ok=True)
    os.chdir(args.output)
    write_sample(data)
    print(f"Generated images with masks are in {args.output / data}. From here on, what you would type in there:")
    config, fold = "configs/sample_config.yaml", Path("runs/sample_fold_0")
    commands: list[tuple[Main, str]] = [
        (split.main, f"ml-split --raw_data {data}/images --mask_data {data}/masks --folds 5 --task segmentation"),
        (
            init_config.main,
            f"ml-init-config {data} --task segmentation --num_epochs {args.num_epochs} --lr 0.002 --yes",
        ),
        (train.main, f"ml-train --config {config} --overwrite"),
        (inference.main, f"ml-inference --checkpoint_path {fold}/weights/best.pt"),
        (export.main, f"ml-export --checkpoint {fold}/weights/best.pt --validate"),
    ]
    for command, line in commands:
        print(f"\n$ {line}", flush=True)
        if code := command([*shlex.split(line)[1:], *["--debug"] * args.debug]):
            return code  # the command has said why
    print("\nPictures to look at:")
    for path in sorted((fold / "inference" / "test" / "overlays").iterdir())[:3]:
        print(f"  {args.output / path}")
    print(f"\nNext: cd {shlex.quote(str(args.output))} && tensorboard --logdir {fold}/tensorboard")
    print("Your own data: the same five commands, with your folder in place of data/sample.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
