"""ml-export: a checkpoint, or several, as one file that predicts without PyTorch."""

from argparse import ArgumentTypeError
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ml_src.cli._app import Parser, run
from ml_src.core.errors import ConfigError

NEEDED = ("torch", "onnx", "onnxscript", "onnxruntime", "safetensors")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ml-export."""
    return run(_export, argv)


def _parser() -> Parser:
    parser = Parser("ml-export", "Write a trained model as one file that predicts without PyTorch, and prove it.")
    what = parser.add_argument_group("which network")
    what.add_argument("--checkpoint", type=Path, nargs="+", action="extend", required=True, metavar="FILE|RUN|GLOB",
                      help="RUN/weights/best.pt; several become one graph that averages")  # fmt: skip
    what.add_argument("--ensemble_weights", type=float, nargs="+", action="extend", metavar="W",
                      help="one a checkpoint; default: equal shares")  # fmt: skip
    what.add_argument(
        "--plugin", nargs="+", action="extend", default=[], metavar="FILE.py", help="own models to import"
    )
    out = parser.add_argument_group("what is written")
    out.add_argument("--output", type=Path, metavar="FILE", help="default: best.onnx beside the checkpoint")
    out.add_argument("--format", choices=("onnx", "openvino", "torchscript", "safetensors"), default="onnx")
    out.add_argument("--opset", type=int, metavar="N", help="of ONNX, 18 or more (default 20)")
    out.add_argument("--precision", choices=("fp32", "fp16", "int8"), default="fp32",
                     help="of the weights; int8 needs validation images")  # fmt: skip
    graph = parser.add_argument_group("what the graph takes")
    graph.add_argument("--layout", choices=("NHWC", "NCHW"), type=str.upper,
                       help="order of the axes; default NHWC")  # fmt: skip
    graph.add_argument("--input_type", choices=("uint8", "uint16", "float32"),
                       help="default: the number type of the data set's images")  # fmt: skip
    graph.add_argument("--input_size", type=_size, metavar="H,W", help="one size only; default: any height and width")
    checks = parser.add_argument_group("how it is checked")
    checks.add_argument("--validate", action="store_true",
                        help="compare with PyTorch on the validation images; exits 1 where it fails")  # fmt: skip
    checks.add_argument("--benchmark", action="store_true", help="time it beside PyTorch")
    checks.add_argument("--data_dir", type=Path, metavar="DIR", help="where the data set lies now, if it has moved")
    return parser


def _size(text: str) -> tuple[int, int]:
    sides = text.split(",")
    if len(sides) != 2 or not all(side.strip().isascii() and side.strip().isdigit() and int(side) for side in sides):
        raise ArgumentTypeError(f"{text!r} is no size: write height and width in pixels, such as 512,512")
    return int(sides[0]), int(sides[1])


def _export(argv: Sequence[str]) -> int:
    args = _parser().parse(argv)

    _require_installed()

    from ml_src.core.deployment import jobs

    request = jobs.Request(
        checkpoints=args.checkpoint,
        weights=args.ensemble_weights,
        plugins=args.plugin,
        **{name: getattr(args, name) for name in (
            "output", "format", "opset", "precision", "layout", "input_type", "input_size", "data_dir", "validate",
            "benchmark",
        )},
    )  # fmt: skip
    written = jobs.export(request)
    for block in written.blocks:
        print(f"\n{block}")
    print("\nWritten:", *written.files, sep="\n  ")
    if not written.passed:
        print(f"\nNot to be used: {written.path.name} does not predict what the checkpoint does.", end="")
        print(" Take fp32, or int8, which is judged by its scores." if args.precision == "fp16" else "")
        return 1
    if written.path.suffix in (".onnx", ".xml"):
        print(f"\nNext: ml-inference --checkpoint_path {written.path} --input FOLDER")
    return 0


def _require_installed() -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(f"ml-export needs {', '.join(missing)}: run pip install 'ml-src[export]'")


if __name__ == "__main__":
    raise SystemExit(main())
