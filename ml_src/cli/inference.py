"""ml-inference: predicted masks, overlays and scores of a split."""

from collections.abc import Sequence
from pathlib import Path

from ml_src.cli._app import Parser, run


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ml-inference."""
    return run(_inference, argv)


def _inference(argv: Sequence[str]) -> int:
    parser = Parser("ml-inference", "Predict and measure the images of a split with a trained model.")
    parser.add_argument("--checkpoint_path", type=Path, required=True, help="RUN/weights/best.pt")
    parser.add_argument("--split", choices=("test", "val", "train"), default="test")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: inference/<split> in the run's folder")
    parser.add_argument("--data_dir", type=Path, metavar="DIR", help="where the data set lies now, if it has moved")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--plugin", nargs="+", default=[], metavar="FILE.py", help="own models to import")
    args = parser.parse(argv)

    from ml_src.core.inference.predictor import measure_split

    measured = measure_split(args.checkpoint_path, args.split, args.output, args.data_dir, args.device, args.plugin)
    print(measured.block)
    print(f"\nMasks, overlays and metrics.json are in {measured.output_dir}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
