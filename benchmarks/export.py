"""An exported network beside PyTorch: images a second of the network alone, in turn.

simple_unet, trained for a moment, and 512 px images of noise, batch 1, from uint8 to labels: speed does not depend on
what a network has learned. Goals: ONNX Runtime fp32 at least 1.25 times PyTorch float32; int8 at least 3 times that,
and 1.3 times bfloat16. "As usual" is contiguous and without our setting of the allocator. Cold starts: whole processes
that predict one image, by a network of 16 channels.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _checkpoints import trained
from _growth import command
from _report import report
from _turns import Epoch, take_turns
from PIL import Image

from ml_src.core.allocator import keep_freed_memory
from ml_src.core.data.sample import draw_sample
from ml_src.core.inference.predictor import most_probable
from ml_src.core.inference.torch_member import open_checkpoint

SIDE = 512  # pixels


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3)).astype(np.uint8)


def turns(work: Callable[[], object], images: int) -> Epoch:
    def epoch() -> int:
        for _ in range(images):
            work()
        return images

    work()
    return epoch


def by_torch(checkpoint: Path, precision: str, layout: str, images: int, keeps: bool = True) -> Epoch:
    if keeps:
        keep_freed_memory()
    member = open_checkpoint(checkpoint, "cpu", (), {}, "float32", False)
    if precision == "bfloat16":
        mixed = member.config.training.model_copy(update={"trainer_type": "mixed_precision"})
        member = replace(member, config=member.config.model_copy(update={"training": mixed}), precision_word="auto")
    assert member.precision == precision
    member.network.to(memory_format=getattr(torch, layout))
    given = pixels()
    return turns(lambda: most_probable(member.probabilities(given)[0], np.dtype(np.uint8)), images)


def by_file(path: Path, threads: int, images: int) -> Epoch:
    from ml_src.core.export.runtime import open_exported

    network, given = open_exported(path, threads=threads), pixels()
    return turns(lambda: network.labels(given), images)


def exported(checkpoint: Path, path: Path, *words: str) -> Path:
    """Write the checkpoint as a file, in a process of its own: a child's peak memory would begin with that of this."""
    folder = checkpoint.parents[3]  # where it was trained, and its images are found
    line = [command("ml-export"), "--checkpoint", checkpoint, "--output", path, *words]
    subprocess.run(line, cwd=folder, stdout=subprocess.DEVNULL, check=True)
    return path


def cold_starts(commands: dict[str, list[Any]], rounds: int) -> list[dict[str, Any]]:
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, words in commands.items():
            start = time.perf_counter()
            subprocess.run(words, capture_output=True, check=True)
            if number:
                seconds[name].append(time.perf_counter() - start)
    return [
        {"command": name, "median s": statistics.median(each), "min s": min(each), "max s": max(each)}
        for name, each in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=2, help="of each turn")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for channels in args.channels:
            folder = Path(name, str(channels))
            folder.mkdir()
            checkpoint = trained(folder, channels, "standard", 1)
            contenders: dict[str, Callable[[], Epoch]] = {
                "PyTorch float32": partial(by_torch, checkpoint, "float32", "channels_last", args.images),
                "PyTorch float32, as usual": partial(
                    by_torch, checkpoint, "float32", "contiguous_format", args.images, False
                ),
                "PyTorch bfloat16": partial(by_torch, checkpoint, "bfloat16", "channels_last", args.images),
            }
            plain = exported(checkpoint, folder / "a.onnx")
            files = {
                "ONNX Runtime fp32": plain,
                "ONNX Runtime int8": exported(checkpoint, folder / "b.onnx", "--precision", "int8"),
                "OpenVINO fp32": exported(checkpoint, folder / "a.xml", "--format", "openvino"),
            }
            for each, path in files.items():
                contenders[each] = partial(by_file, path, args.threads, args.images)
            speeds, memory = take_turns(contenders, args.rounds, args.threads)
            rows += rows_of(channels, speeds, {each: found.peak for each, found in memory.items()})
        start = Path(name, "start")
        start.mkdir()
        checkpoint = trained(start, 16, "standard", 1)
        plain = exported(checkpoint, start / "a.onnx")
        Image.fromarray(draw_sample(1, 0, SIDE, SIDE)[0]).save(start / "one.png")
        inference = [sys.executable, "-m", "ml_src.cli.inference", "--input", start / "one.png", "--checkpoint_path"]
        starts = cold_starts(
            {
                each: [*inference, path, "--output", start / str(number)]
                for number, (each, path) in enumerate({"best.pt": checkpoint, "best.onnx": plain}.items())
            },
            args.rounds,
        )
    report("export", vars(args), rows)
    report("export_cold_start", vars(args), starts)


def rows_of(channels: int, speeds: dict[str, list[float]], peaks: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for name, each in speeds.items():
        beside = {other: [a / b for a, b in zip(each, speeds[other], strict=True)]
                  for other in ("PyTorch float32", "PyTorch float32, as usual", "PyTorch bfloat16")}  # fmt: skip
        rows.append(
            {
                "channels": channels,
                "what": name,
                "ms an image": 1000 / statistics.median(each),
                "x float32 (median of pairs)": statistics.median(beside["PyTorch float32"]),
                "x as usual": statistics.median(beside["PyTorch float32, as usual"]),
                "x bfloat16": statistics.median(beside["PyTorch bfloat16"]),
                "min x float32": min(beside["PyTorch float32"]),
                "max x float32": max(beside["PyTorch float32"]),
                "peak GiB": peaks[name],
            }
        )
    return rows


if __name__ == "__main__":
    main()
