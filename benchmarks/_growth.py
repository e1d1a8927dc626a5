"""Time and memory as the number of files grows: the loader, ml-split, ml-check."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

from ml_src.core.data.sample import draw_sample

DISTINCT = 50  # so many pictures, linked under as many names as are asked for
SIDE = 32

LOADER = """
import sys, time
from pathlib import Path
from pydantic import TypeAdapter
from ml_src.core.data.loaders import Loader
from ml_src.core.data.order import EpochOrder
from ml_src.core.data.segmentation import SegmentationDataset
from ml_src.core.data.splits import read_split
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
import psutil
workers = [child.pid for child in psutil.Process().children() if "resource_tracker" not in " ".join(child.cmdline())]
print(len(pairs), max(private(pid) for pid in workers), psutil.Process().memory_info().rss / 2**20)
"""


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


def run(words: list[str]) -> tuple[float, float, str]:
    """Seconds, peak memory in MiB and output of a whole process."""
    start = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0
    return time.perf_counter() - start, usage.ru_maxrss / 1024, output
