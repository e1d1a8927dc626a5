"""Time and memory as the number of files grows: the loader, ml-split, ml-check."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from ml_src.core.data.sample import draw_sample

TILE = 256
DISTINCT = 50  # so many pictures, linked under as many names as are asked for
SIDE = 32

LOADER = """
import sys
from pathlib import Path
from ml_src.core.data.loaders import Loader
from ml_src.core.data.order import EpochOrder
from ml_src.core.data.segmentation import SegmentationDataset
from ml_src.core.data.split_files import read_split
from ml_src.core.transforms import build_transforms

data = Path(sys.argv[1])
pairs = read_split(data / "splits", data, "fold_0_train")
dataset = SegmentationDataset(pairs, build_transforms([], 255), 3, 0)
loader = Loader(dataset, EpochOrder(len(pairs), 8, 8, shuffle=True), 0, 2, False, 255)
steps = loader.steps(0)
for _ in range(60):
    for _ in next(steps).batches:
        pass
def private(pid):
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_")) / 1024
import multiprocessing
main = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
print(len(pairs), max(private(child.pid) for child in multiprocessing.active_children()), main)
loader.close()
"""


SCENE = """
import sys, time
from pathlib import Path
import numpy as np
from pydantic import TypeAdapter
from ml_src.core.data.files import Pair
from ml_src.core.data.segmentation import SampleKey, SegmentationDataset
from ml_src.core.transform_specs import TrainTransform
from ml_src.core.transforms import build_transforms

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

crop = {"type": "random_crop", "size": [512, 512]} | ({"classes": [1]} if sys.argv[2] else {})
lines = TypeAdapter(list[TrainTransform]).validate_python([crop, {"type": "random_rotation", "degrees": 15}])
folder = Path(sys.argv[1])
pairs = [Pair(folder / "image.tif", folder / "mask.tif")]
dataset = SegmentationDataset(pairs, build_transforms(lines, 255), 3, 0)
before = peak()
start = time.perf_counter()
dataset[SampleKey(0)]
first = time.perf_counter() - start
seconds = []
for sample in range(1, 100):
    start = time.perf_counter()
    dataset[SampleKey(sample)]
    seconds.append(time.perf_counter() - start)
print(first * 1000, np.median(seconds) * 1000, peak() - before)
"""


def scene(folder: Path, side: int) -> list[dict[str, Any]]:
    """One row a way to choose the crop: samples of 512 pixels from a scene, image and mask tiled and compressed."""
    rng = np.random.default_rng(0)
    across = -(-side // TILE)
    pictures = [rng.integers(0, 16, (TILE, TILE, 3), dtype=np.uint8) * 16 for _ in range(8)]
    rare, none = np.eye(TILE, dtype=np.uint8), np.zeros((TILE, TILE), np.uint8)
    write_tiled(folder / "image.tif", side, (pictures[index % 8] for index in range(across**2)), 3)
    write_tiled(folder / "mask.tif", side, (rare if index % 50 == 7 else none for index in range(across**2)), 1)
    rows = []
    for what, flag in (("anywhere", ""), ("on a rare class", "classes")):
        _, _, output = run([sys.executable, "-c", SCENE, str(folder), flag])
        first, median, memory = map(float, output.split())
        rows.append({"crop": what, "side": side, "first ms": first, "median ms": median, "MiB on top": memory})
    return rows


def write_tiled(path: Path, side: int, tiles: Iterable[np.ndarray], channels: int) -> None:
    """Write a square, compressed TIFF from tiles of (TILE, TILE, 3) or (TILE, TILE), row by row; the last are cut."""
    shape, colours = ((side, side, 3), "rgb") if channels == 3 else ((side, side), "minisblack")
    how = {"tile": (TILE, TILE), "compression": "deflate", "photometric": colours}
    tifffile.imwrite(path, tiles, shape=shape, dtype=np.uint8, **how)


def growth(folder: Path, most_files: int, most_pairs: int) -> list[dict[str, Any]]:
    """One row a command and number of pairs."""
    rows = []
    for number in (1000, most_files // 10, most_files):
        data = small_pairs(folder / f"split_{number}", number, DISTINCT)
        words = ["--raw_data", str(data / "images"), "--mask_data", str(data / "masks"), "--folds", "5"]
        rows.append(timed("ml-split", number, [command("ml-split"), *words]))
        seconds, _, output = run([sys.executable, "-c", LOADER, str(data)])
        _, worker, main = map(float, output.split())
        rows.append(row("loader, 2 workers, 60 batches", number, seconds, main, worker))
    for number in (most_pairs // 10, most_pairs):
        data = small_pairs(folder / f"check_{number}", number, number)
        rows.append(timed("ml-check", number, [command("ml-check"), str(data)]))
    return rows


def small_pairs(data: Path, number: int, distinct: int) -> Path:
    """Write a data set of so many pairs; from number `distinct` on they are links to those before."""
    for kind in ("images", "masks"):
        (data / kind).mkdir(parents=True)
    for index in range(number):
        if index < distinct:
            image, mask = draw_sample(0, index, SIDE, SIDE)
            Image.fromarray(image).save(data / "images" / f"{index:06d}.png")
            Image.fromarray(mask).save(data / "masks" / f"{index:06d}.png")
        else:
            for kind in ("images", "masks"):
                os.link(data / kind / f"{index % distinct:06d}.png", data / kind / f"{index:06d}.png")
    return data


def command(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def timed(name: str, number: int, words: list[str]) -> dict[str, Any]:
    seconds, peak, _ = run(words)
    return row(name, number, seconds, peak, None)


def row(name: str, number: int, seconds: float, peak: float, worker: float | None) -> dict[str, Any]:
    return {
        "what": name,
        "pairs": number,
        "s": seconds,
        "ms a pair": seconds / number * 1000,
        "peak MiB": peak,
        "MiB of a worker's own": "" if worker is None else worker,
    }


# A process's own peak counts that of the process it was forked from, so that one must be small.
LAUNCH = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, _, usage = os.wait4(process.pid, 0)
open(sys.argv[1], "w").write(str(usage.ru_maxrss / 1024))
"""


def run(words: list[str], stderr: int | None = None) -> tuple[float, float, str]:
    """Seconds, peak memory in MiB and output of a whole process; `subprocess.STDOUT` adds what it says on stderr."""
    with tempfile.NamedTemporaryFile("r") as peak:
        start = time.perf_counter()
        launch = [sys.executable, "-c", LAUNCH, peak.name, *words]
        done = subprocess.run(launch, stdout=subprocess.PIPE, stderr=stderr, text=True)
        seconds = time.perf_counter() - start
        return seconds, float(peak.read()), done.stdout
