"""ml-inference: images in, masks out; or a split, measured."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ml_src.cli._app import Parser, run
from ml_src.core.errors import ConfigError

if TYPE_CHECKING:
    from ml_src.core.inference.jobs import Request

VIEWS = "horizontal_flip, vertical_flip, rotate_90, rotate_180, rotate_270, transpose, scale_0.75, brightness, contrast"
VOTING = ("soft_voting", "hard_voting", "weighted")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ml-inference."""
    return run(_inference, argv)


def _parser() -> Parser:
    parser = Parser("ml-inference", "Predict images with a trained model, or measure it on a split of its data.")
    what = parser.add_argument_group("which networks")
    what.add_argument("--checkpoint_path", type=Path, metavar="FILE", help="RUN/weights/best.pt, or the run's folder")
    what.add_argument(
        "--ensemble", type=Path, nargs="+", action="extend", metavar="FILE", help="several of them, merged"
    )
    what.add_argument("--ensemble_aggregation", choices=VOTING, default=VOTING[0])
    what.add_argument(
        "--ensemble_weights", type=float, nargs="+", action="extend", metavar="W", help="one a checkpoint, for weighted"
    )
    what.add_argument(
        "--cv",
        type=Path,
        nargs="+",
        action="extend",
        metavar="RUN",
        help="folds, each on the images that it has not seen",
    )
    what.add_argument(
        "--plugin", nargs="+", action="extend", default=[], metavar="FILE.py", help="own models to import"
    )
    images = parser.add_argument_group("which images")
    images.add_argument(
        "--input", nargs="+", action="extend", metavar="FILE|FOLDER|GLOB", help="without it, a split is measured"
    )
    images.add_argument("--recursive", action="store_true", help="sub-folders of --input too")
    images.add_argument("--split", choices=("test", "val", "train"), help="default: test")
    images.add_argument("--data_dir", type=Path, metavar="DIR", help="where the data set lies now, if it has moved")
    images.add_argument("--strict", action="store_true", help="stop at the first file that cannot be read")
    images.add_argument("--resume", action="store_true", help="go on with interrupted work")
    out = parser.add_argument_group("what is written")
    out.add_argument("--output", type=Path, metavar="DIR", help="default: inference/<images> in the run's folder")
    out.add_argument("--overlay", action="store_true", help="the images with their masks drawn over them")
    out.add_argument("--save_probs", nargs="?", const="tiff", choices=("tiff", "npz"), help="probabilities, float16")
    out.add_argument("--uncertainty", action="store_true", help="maps of entropy and, for ensembles, disagreement")
    out.add_argument("--polygons", action="store_true", help="regions as GeoJSON")
    out.add_argument("--tolerance", type=float, default=2.0, help="of surface Dice, in units of --pixel_size")
    out.add_argument("--pixel_size", type=float, default=1.0, help="side of a pixel, such as 0.5 for half a millimetre")
    how = parser.add_argument_group("how")
    how.add_argument("--tta", action="store_true", help="test-time augmentation: the flips and turns of training")
    how.add_argument("--tta_augmentations", nargs="+", action="extend", metavar="VIEW", help=f"these instead: {VIEWS}")
    how.add_argument("--tta_aggregation", choices=("mean", "max", "voting"), default="mean")
    how.add_argument(
        "--postprocess",
        nargs="+",
        action="extend",
        metavar="STEP",
        help="such as remove_small,area=30,classes=1; or none",
    )
    how.add_argument("--tune_postprocess", action="store_true", help="choose the steps on validation images and keep "
                     "them beside the checkpoints")  # fmt: skip
    how.add_argument("--tile", type=int, metavar="PIXELS", help="side of a tile; default: the size of training")
    how.add_argument(
        "--overlap", type=float, metavar="F", help="share of a tile, 0 to 0.9; default: 0.25 or 128 pixels"
    )
    how.add_argument("--blend", choices=("gaussian", "cosine"), default="gaussian", help="weights inside a tile")
    how.add_argument("--batch_size", type=int, metavar="N", help="tiles at once; default: that of training")
    how.add_argument("--max_ram", metavar="SIZE", help="such as 2G: choose tiles and batch so that it is kept")
    how.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    how.add_argument("--precision", choices=("auto", "float32"), default="auto", help="auto: 16 bits where trained so")
    how.add_argument("--compile", action="store_true", help="torch.compile: a minute at the start, for long work")
    return parser


def _inference(argv: Sequence[str]) -> int:
    args = _parser().parse(argv)
    _require_one_way(args)

    from ml_src.core.inference import jobs

    names = set(jobs.Request.__dataclass_fields__) - {"checkpoints", "plugins", "tta"}
    request = jobs.Request(
        checkpoints=args.cv or args.ensemble or [args.checkpoint_path],
        plugins=args.plugin,
        tta=args.tta,
        **{name: getattr(args, name) for name in names},
    )
    if args.input is not None:
        return _predict(args, request)
    if args.tune_postprocess:
        return _tune(request)
    if args.cv is not None:
        from ml_src.core.inference.cross_validation import measure_folds

        measured = measure_folds(request)
    else:
        measured = jobs.measure_split(request, args.split or "test")
    print(measured.block)
    print(f"\nMasks, overlays and metrics.json are in {measured.output_dir}")
    return 0


def _tune(request: "Request") -> int:
    from ml_src.core.inference.tune import tune

    tuned = tune(request)
    print(tuned.block)
    print("\nUsed from now on, and written to:", *tuned.paths, sep="\n  ")
    return 0


def _predict(args: Namespace, request: "Request") -> int:
    from ml_src.core.inference import jobs

    summary = jobs.predict_files(request, args.input, args.recursive, args.strict, args.resume)
    before = f", {summary.num_before} were there already" if summary.num_before else ""
    print(f"{summary.num_predicted} image{'s' * (summary.num_predicted != 1)} predicted{before}")
    if summary.problems:
        print(f"{len(summary.problems)} could not be read, as said above and in predictions.csv")
    masks = "Masks and " if summary.num_predicted or summary.num_before else ""
    print(f"{masks}predictions.csv {'are' if masks else 'is'} in {summary.output_dir}")
    return 2 if summary.problems else 0


def _require_one_way(args: Namespace) -> None:
    """Refuse flags that contradict each other."""
    ways = [flag for flag in ("checkpoint_path", "ensemble", "cv") if getattr(args, flag) is not None]
    if len(ways) != 1:
        raise ConfigError("give one of --checkpoint_path, --ensemble and --cv" + (f", not {len(ways)}" if ways else ""))
    if args.input is not None and (args.split or args.cv):
        raise ConfigError("--input predicts images without masks, so --split and --cv do not go with it")
    if args.cv is not None and args.split:
        raise ConfigError("--cv measures the validation images of each fold, so leave out --split")
    if args.tune_postprocess:
        _require_tuning_alone(args)
    for flag, needed in (("recursive", "input"), ("strict", "input"), ("resume", "input")):
        if getattr(args, flag) and getattr(args, needed) is None:
            raise ConfigError(f"--{flag} is for --{needed}: give files, a folder or a glob")


def _require_tuning_alone(args: Namespace) -> None:
    """Refuse what --tune_postprocess would pass over: it only writes a chain beside the checkpoints."""
    if args.ensemble is not None:
        raise ConfigError(
            "--tune_postprocess is for --checkpoint_path or --cv: nothing is held out from a whole ensemble"
        )
    for flag in ("input", "split", "output", "postprocess", "overlay", "save_probs", "uncertainty", "polygons"):
        if getattr(args, flag):
            raise ConfigError(f"--tune_postprocess only chooses steps, on validation images, so leave out --{flag}")


if __name__ == "__main__":
    raise SystemExit(main())
