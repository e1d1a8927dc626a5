"""How much memory does a scene take that is larger than memory should be, and do its tiles leave seams?

The scene goes through `ml-inference`, a process of its own; the same command on one tile is what the program and its
model take. Tiled and whole predictions are compared on an image that fits.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from _checkpoints import trained
from _growth import TILE, command, run, write_tiled
from _report import report
from PIL import Image

from ml_src.core.data.sample import draw_sample
from ml_src.core.inference.inputs import Input
from ml_src.core.inference.members import Member, open_member
from ml_src.core.inference.predictor import Options, Predicted, predict

GOAL_GIB, GOAL_EQUAL = 1.5, 99.9  # percent
NUM_PICTURES = 8  # of which the scene is put together


def write_scene(path: Path, side: int) -> None:
    pictures = [draw_sample(2, index, TILE, TILE)[0] for index in range(NUM_PICTURES)]
    order = np.random.default_rng(0).integers(0, NUM_PICTURES, (-(-side // TILE)) ** 2)
    write_tiled(path, side, (pictures[index] for index in order), 3)


def memory(folder: Path, checkpoint: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a process: one tile, the scene, the scene within a bound."""
    one, scene = folder / "one.tif", folder / "scene.tif"
    write_scene(one, args.tile)
    write_scene(scene, args.side)
    tile, batch = ["--tile", str(args.tile)], ["--batch_size", str(args.batch)]
    rows: list[dict[str, Any]] = []
    for what, path, words in (
        ("one tile", one, tile + batch),
        ("scene", scene, tile + batch),
        (f"scene, --max_ram {args.max_ram}", scene, [*tile, *batch, "--max_ram", args.max_ram]),
    ):
        output = folder / f"out_{len(rows)}"
        given = ["--checkpoint_path", str(checkpoint), "--input", str(path), "--output", str(output), "--device", "cpu"]
        seconds, peak, said = run([command("ml-inference"), *given, *words], subprocess.STDOUT)
        if not (output / "predictions.csv").is_file():
            raise SystemExit(f"ml-inference failed:\n{said}")
        rows.append(
            {
                "what": what,
                "side": args.tile if path == one else args.side,
                "s": seconds,
                "peak GiB": peak / 1024,
                "GiB beyond one tile": peak / 1024 - (rows[0]["peak GiB"] if rows else peak / 1024),
                "chosen": next((line for line in said.splitlines() if line.startswith("--max_ram")), ""),
            }
        )
    return rows


def agreement(folder: Path, checkpoint: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a tile and overlap: the share of pixels whose label is that of the image predicted whole."""
    path = folder / "fits.png"
    Image.fromarray(draw_sample(1, 0, args.fits, args.fits)[0]).save(path)
    member = open_member(checkpoint)
    whole = labels_of(path, member, Options(tile=args.fits))
    rows = []
    for tile in (256, 512):
        for overlap in (0.125, 0.25, 0.5):
            labels = labels_of(path, member, Options(tile=tile, overlap=overlap, batch_size=args.batch))
            rows.append({"tile": tile, "overlap": overlap, "% equal pixels": float(np.mean(labels == whole)) * 100})
    print(f"shares of the classes: {np.bincount(whole.ravel()) / whole.size}")
    return rows


def labels_of(path: Path, member: Member, options: Options) -> np.ndarray:
    (predicted,) = predict([Input(PurePosixPath(path.stem), path)], [member], options)
    assert isinstance(predicted, Predicted)
    return predicted.labels.whole()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=20_000, help="of the scene")
    parser.add_argument("--fits", type=int, default=2048, help="side of the image that is also predicted whole")
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max_ram", default="2G")
    parser.add_argument("--channels", type=int, default=8, help="of the network that is trained for a moment")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--checkpoint", type=Path, help="a trained one instead, for images of three channels")
    parser.add_argument("--parts", nargs="+", choices=("memory", "agreement"), default=["memory", "agreement"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = args.checkpoint or trained(folder, args.channels, "standard", args.epochs)
        settings = vars(args) | {"checkpoint": str(args.checkpoint or "trained for a moment")}
        if "memory" in args.parts:
            rows = memory(folder, checkpoint.absolute(), args)
            report("large_image", settings, rows)
            print(f"goal: less than {GOAL_GIB} GiB beyond one tile; {rows[1]['GiB beyond one tile']:.2f} were taken")
        if "agreement" in args.parts:
            rows = agreement(folder, checkpoint, args)
            report("large_image_agreement", settings, rows)
            (usual,) = (row for row in rows if (row["tile"], row["overlap"]) == (512, Options.overlap))
            print(f"goal: at least {GOAL_EQUAL} % equal; {usual['% equal pixels']:.3f} % are with the usual overlap")


if __name__ == "__main__":
    main()
