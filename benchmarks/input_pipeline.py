"""Is the input pipeline ever the bottleneck? Transforms beside other libraries, a whole loader beside decoding alone,
memory and time as the number of files grows. One core each, in turn, medians.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import albumentations
import cv2
import monai.transforms
import numpy as np
import torch
from _growth import growth, scene
from _report import report
from pydantic import TypeAdapter
from torchvision import tv_tensors
from torchvision.transforms import v2

from ml_src.core.data.files import Pair, find_pairs, read_image, read_mask
from ml_src.core.data.loaders import Loader
from ml_src.core.data.order import EpochOrder
from ml_src.core.data.sample import draw_sample, write_sample
from ml_src.core.data.segmentation import SegmentationDataset
from ml_src.core.transform_specs import TrainTransform
from ml_src.core.transforms import Pipeline, build_transforms

SIDE, ANGLE, COLOUR, ALPHA, SIGMA = 512, 30, 0.2, 10.0, 20.0
IGNORED = 255
Work = Callable[[int], Any]


def our_transforms(elastic: bool) -> Pipeline:
    lines: list[dict[str, Any]] = [
        {"type": "resize", "size": [SIDE, SIDE]},
        {"type": "random_horizontal_flip", "p": 1},
        {"type": "random_vertical_flip", "p": 1},
        {"type": "random_rotation", "degrees": ANGLE},
        *[{"type": "elastic", "alpha": ALPHA, "sigma": SIGMA, "p": 1}] * elastic,
        {"type": "color_jitter", "brightness": COLOUR, "contrast": COLOUR, "saturation": COLOUR},
    ]
    return build_transforms(TypeAdapter(list[TrainTransform]).validate_python(lines), IGNORED)


def ours(elastic: bool, image: np.ndarray, mask: np.ndarray) -> Work:
    pipeline, step = our_transforms(elastic), np.random.default_rng(0)
    return lambda index: pipeline(image, mask, np.random.default_rng(index), step)


def with_albumentations(elastic: bool, image: np.ndarray, mask: np.ndarray) -> Work:
    compose = albumentations.Compose(
        [
            albumentations.Resize(SIDE, SIDE),
            albumentations.HorizontalFlip(p=1),
            albumentations.VerticalFlip(p=1),
            albumentations.Rotate(limit=ANGLE, p=1, border_mode=cv2.BORDER_REFLECT, fill_mask=IGNORED),
            *[albumentations.ElasticTransform(alpha=ALPHA * SIGMA, sigma=SIGMA, p=1)] * elastic,
            albumentations.ColorJitter(COLOUR, COLOUR, COLOUR, 0, p=1),
        ]
    )
    return lambda index: compose(image=image, mask=mask)


def with_torchvision(elastic: bool, image: np.ndarray, mask: np.ndarray) -> Work:
    fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}
    compose = v2.Compose(
        [
            v2.Resize((SIDE, SIDE)),
            v2.RandomHorizontalFlip(1),
            v2.RandomVerticalFlip(1),
            v2.RandomRotation(ANGLE, v2.InterpolationMode.BILINEAR, fill=fill),
            *[v2.ElasticTransform(alpha=ALPHA * SIGMA, sigma=SIGMA)] * elastic,
            v2.ColorJitter(COLOUR, COLOUR, COLOUR),
        ]
    )
    pair = tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1)), tv_tensors.Mask(torch.from_numpy(mask))
    return lambda index: compose(*pair)


def with_monai(elastic: bool, image: np.ndarray, mask: np.ndarray) -> Work:
    """MONAI has no saturation: scaling and shifting of intensities stand for the colours."""
    transforms, both, modes = monai.transforms, ["image", "mask"], ["bilinear", "nearest"]
    bend = partial(transforms.Rand2DElasticd, spacing=(SIGMA, SIGMA), magnitude_range=(1, 2), prob=1, mode=modes)
    compose = transforms.Compose(
        [
            transforms.Resized(both, (SIDE, SIDE), mode=modes),
            transforms.RandFlipd(both, prob=1, spatial_axis=1),
            transforms.RandFlipd(both, prob=1, spatial_axis=0),
            transforms.RandRotated(both, range_x=np.radians(ANGLE), prob=1, mode=modes, padding_mode="reflection"),
            *[bend(both)] * elastic,
            transforms.RandScaleIntensityd("image", factors=COLOUR, prob=1),
            transforms.RandShiftIntensityd("image", offsets=COLOUR * 255, prob=1),
        ]
    )
    pair = {"image": torch.from_numpy(image).permute(2, 0, 1).float(), "mask": torch.from_numpy(mask)[None].float()}
    return lambda index: compose(dict(pair))


CONTENDERS = {
    "ours": ours,
    "albumentations": with_albumentations,
    "torchvision v2": with_torchvision,
    "monai": with_monai,
}


def take_turns(works: dict[str, Work], rounds: int, times: dict[str, int]) -> dict[str, list[float]]:
    """Milliseconds a call of every round; the first round is the warm-up, the order is turned round each time."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name in works if number % 2 else reversed(works):
            start = time.perf_counter()
            for index in range(times[name]):
                works[name](number * 1000 + index)
            if number:
                found[name].append((time.perf_counter() - start) / times[name] * 1000)
    return found


def rows_of(found: dict[str, list[float]], reference: str, **settings: Any) -> list[dict[str, Any]]:
    """One row a contender: its median, and the median of its ratios to the reference of the same round."""
    return [
        settings
        | {
            "what": name,
            "median ms": statistics.median(values),
            "min ms": min(values),
            f"x {reference}": statistics.median(a / b for a, b in zip(values, found[reference], strict=True)),
        }
        for name, values in found.items()
    ]


def transforms(args: argparse.Namespace) -> None:
    image, mask = draw_sample(0, 0, args.source, args.source)
    rows = []
    for elastic in (False, True):
        works = {name: make(elastic, image, mask) for name, make in CONTENDERS.items()}
        slow = {"torchvision v2": 1 if elastic else 5, "monai": 5}
        found = take_turns(works, args.rounds, {name: slow.get(name, 20) for name in works})
        rows += rows_of(found, "ours", elastic=elastic)
    report("input_pipeline_transforms", vars(args), rows)


def whole_loader(args: argparse.Namespace, folder: Path) -> None:
    """An epoch of the loader in this process against the decoding of the same files."""
    rows = []
    for suffix, side in ((".png", SIDE), (".jpg", SIDE), (".jpg", 2 * SIDE)):
        data = folder / f"{suffix[1:]}_{side}"
        write_sample(data, num_images=8, height=side, width=side)
        if suffix == ".jpg":
            for path in (data / "images").glob("*.png"):
                cv2.imwrite(str(path.with_suffix(suffix)), cv2.imread(str(path)), [cv2.IMWRITE_JPEG_QUALITY, 92])
                path.unlink()
        pairs = find_pairs(data / "images", data / "masks")
        works = {"decode alone": partial(decode, pairs)}
        for elastic in (False, True):
            works[f"whole loader{', elastic' * elastic}"] = epoch_of(pairs, elastic)
        found = take_turns(works, args.rounds, dict.fromkeys(works, 2))
        found = {name: [value / len(pairs) for value in values] for name, values in found.items()}
        rows += rows_of(found, "decode alone", files=f"{suffix} {side} px")
    report("input_pipeline_loader", vars(args), rows)


def decode(pairs: list[Pair], _: int) -> None:
    for pair in pairs:
        read_image(pair.image, 3)
        read_mask(pair.mask)


def epoch_of(pairs: list[Pair], elastic: bool) -> Work:
    dataset = SegmentationDataset(pairs, our_transforms(elastic), 3, 0)
    order = EpochOrder(len(pairs), 4, 4, shuffle=True)
    loader = Loader(dataset, order, seed=0, num_workers=0, pin_memory=False, ignore_index=IGNORED)

    def epoch(number: int) -> None:
        for _ in loader.epoch(number):
            pass

    return epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--source", type=int, default=768, help="side of the image before the resize")
    parser.add_argument("--side", type=int, default=20_000, help="of the large scene")
    parser.add_argument("--files", type=int, default=100_000, help="of the largest data set")
    parser.add_argument("--pairs", type=int, default=5_000, help="of the largest check")
    parser.add_argument("--parts", nargs="+", default=["transforms", "loader", "scene", "growth"])
    args = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if "transforms" in args.parts:
            transforms(args)
        if "loader" in args.parts:
            whole_loader(args, Path(folder))
        if "scene" in args.parts:
            report("input_pipeline_scene", vars(args), scene(Path(folder), args.side))
        if "growth" in args.parts:
            report("input_pipeline_growth", vars(args), growth(Path(folder), args.files, args.pairs))


if __name__ == "__main__":
    main()
