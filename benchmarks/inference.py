"""How much of the bare network's speed does ml-inference keep from files to masks, and what do usual loops reach?

Every contender is a process of its own; they take turns, an equal share of the images a round. `ml-inference` decodes,
predicts, merges and writes masks, as the command does. `bare network` is the same network on a batch in memory, and
nothing else. `plain loop` is Pillow, torchvision, argmax and Pillow again; with smp.Unet, and with our network.
"""

import argparse
import importlib.metadata
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import segmentation_models_pytorch as smp
import torch
from _checkpoints import trained
from _report import report
from _turns import Epoch, take_turns
from PIL import Image
from torchvision import transforms

from ml_src.core.allocator import keep_freed_memory
from ml_src.core.checkpoint import load_checkpoint, save_checkpoint
from ml_src.core.data.files import read_mask
from ml_src.core.data.sample import draw_sample
from ml_src.core.inference import jobs
from ml_src.core.inference.torch_member import TorchMember, fast_bfloat16, open_checkpoint

SIDE, CHANNELS, EPOCHS = 512, 32, 3
GOAL = 0.9
CPU = torch.device("cpu")
PRECISIONS = {"float32": "float32", "bfloat16": "auto"}  # the word of --precision
ENCODER = "resnet34"
Turns = list[list[Path]]


class Contender(NamedTuple):
    what: str
    precision: str
    is_main: bool  # takes all images; the others are there to compare with
    make: Callable[[Path, Turns], Epoch]  # of the folder for its masks and the images of each turn


def member_of(checkpoint: Path, precision: str) -> TorchMember:
    return open_checkpoint(checkpoint, "cpu", (), {}, PRECISIONS[precision], False)


def ours(checkpoint: Path, precision: str, compiled: bool, batch: int, output: Path, turns: Turns) -> Epoch:
    numbered = iter(enumerate(turns))

    def epoch() -> int:
        number, paths = next(numbered)
        request = jobs.Request(
            [checkpoint],
            output=output / str(number),
            device="cpu",
            precision=PRECISIONS[precision],
            compile=compiled,
            tile=SIDE,
            batch_size=batch,
        )
        return jobs.predict_files(request, [str(path) for path in paths], False, True, False).num_predicted

    return epoch


def bare(
    checkpoint: Path, precision: str, layout: torch.memory_format, compiled: bool, batch: int, _: Path, turns: Turns
) -> Epoch:
    keep_freed_memory()
    member = member_of(checkpoint, precision)
    network = member.network.to(memory_format=layout)
    network = torch.compile(network) if compiled else network
    pixels = np.stack([np.asarray(Image.open(path)) for path in turns[1][:batch]])  # (N, H, W, 3)
    images = member.data.normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2), CPU).contiguous(memory_format=layout)
    numbers = iter(len(paths) for paths in turns)

    @torch.inference_mode()
    def epoch() -> int:
        num_batches = max(1, next(numbers) // batch)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=member.amp_dtype is not None):
            for _ in range(num_batches):
                network(images)
        return num_batches * batch

    return epoch


class PlainDataset(torch.utils.data.Dataset):
    def __init__(self, paths: list[Path], mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.paths = paths
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        return self.transform(Image.open(self.paths[index]).convert("RGB")), self.paths[index].name


def plain(checkpoint: Path, is_smp: bool, batch: int, workers: int, output: Path, turns: Turns) -> Epoch:
    member = member_of(checkpoint, "float32")
    model = smp.Unet(ENCODER, encoder_weights=None, classes=member.config.data.num_classes)
    model = (model if is_smp else member.network).to(memory_format=torch.contiguous_format)
    output.mkdir(parents=True)
    remaining = iter(turns)

    def epoch() -> int:
        dataset = PlainDataset(next(remaining), member.intake.mean, member.intake.std)
        model.eval()
        with torch.no_grad():
            for images, names in torch.utils.data.DataLoader(dataset, batch, num_workers=workers):
                labels = model(images).argmax(dim=1).numpy().astype(np.uint8)
                for mask, name in zip(labels, names, strict=True):
                    Image.fromarray(mask).save(output / name)
        return len(dataset)

    return epoch


def contenders_of(checkpoint: Path, precisions: list[str], args: argparse.Namespace) -> list[Contender]:
    batch, found = args.batch, []
    for precision in precisions:
        given = checkpoint, precision
        last, first = torch.channels_last, torch.contiguous_format
        found += [
            Contender("bare network", precision, True, partial(bare, *given, last, False, batch)),
            Contender("bare network, contiguous", precision, False, partial(bare, *given, first, False, batch)),
            Contender("ml-inference", precision, True, partial(ours, *given, False, batch)),
            Contender("bare network, compiled", precision, False, partial(bare, *given, last, True, batch)),
            Contender("ml-inference --compile", precision, False, partial(ours, *given, True, batch)),
        ]
    loops = (("our network", False), (f"smp.Unet {ENCODER}", True)) if "float32" in precisions else ()
    for name, is_smp in loops:
        for size, workers in ((1, 0), (batch, 2)):
            what = f"plain loop, {name}, batch {size}, {workers} workers"
            found.append(Contender(what, "float32", False, partial(plain, checkpoint, is_smp, size, workers)))
    return [each for each in found if each.is_main or not any(word in each.what for word in args.without)]


def turns_of(paths: list[Path], rounds: int, batch: int) -> Turns:
    """The images of each turn: two batches to warm up, then all, an equal share each."""
    return [paths[: 2 * batch], *(paths[number::rounds] for number in range(rounds))]


def draw_images(folder: Path, number: int) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{index:04d}.png" for index in range(number)]
    for index, path in enumerate(paths):
        Image.fromarray(draw_sample(1, index, SIDE, SIDE)[0]).save(path)
    return paths


def for_mixed_precision(source: Path, target: Path) -> Path:
    """Copy a checkpoint as if it had been trained in bfloat16."""
    contents = load_checkpoint(source)
    contents["config"]["training"] |= {"trainer_type": "mixed_precision", "amp_dtype": "bfloat16"}
    save_checkpoint(target, contents)
    return target


def labels_in(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: read_mask(path) for path in sorted(folder.rglob("*.png"))}


def equal_percent(masks: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> float:
    both = masks.keys() & others.keys()
    return 100 * float(np.mean([np.mean(masks[name] == others[name]) for name in both]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--others", type=int, default=100, help="images of the contenders that are there to compare")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--without", nargs="+", default=[], help="leave out what has these words, such as compile")
    parser.add_argument("--checkpoint", type=Path, help="trained by ml-train without a resize, for another agreement")
    args = parser.parse_args()
    precisions = [word for word in args.precisions if word == "float32" or fast_bfloat16()] or ["float32"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = args.checkpoint or trained(folder, CHANNELS, "mixed_precision", EPOCHS)
        checkpoint = for_mixed_precision(checkpoint, folder / "best.pt")
        paths = draw_images(folder / "images", args.images)
        contenders = contenders_of(checkpoint, precisions, args)
        all_turns = {
            True: turns_of(paths, args.rounds, args.batch),
            False: turns_of(paths[: args.others], args.rounds, args.batch),
        }
        names = [f"{each.what}, {each.precision}" for each in contenders]
        made = {
            name: partial(each.make, folder / "masks" / str(number), all_turns[each.is_main])
            for number, (name, each) in enumerate(zip(names, contenders, strict=True))
        }
        speeds, memory = take_turns(made, args.rounds, args.threads)
        masks = {name: labels_in(folder / "masks" / str(number)) for number, name in enumerate(names)}
    reference = f"ml-inference, {precisions[0]}"
    rows: list[dict[str, Any]] = []
    for name, each in zip(names, contenders, strict=True):
        bare_speeds = speeds[f"bare network, {each.precision}"]
        ratios = [a / b for a, b in zip(speeds[name], bare_speeds, strict=True)]
        has_labels = masks[name] and "smp" not in name
        rows.append(
            {
                "what": each.what,
                "precision": each.precision,
                "images/s": statistics.median(speeds[name]),
                "x bare (median of pairs)": statistics.median(ratios),
                "min": min(ratios),
                "max": max(ratios),
                f"% labels as {precisions[0]}": equal_percent(masks[name], masks[reference]) if has_labels else "",
                "peak GiB": memory[name].peak,
            }
        )
    counts = np.bincount(np.concatenate([mask.ravel() for mask in masks[reference].values()]))
    settings = vars(args) | {
        "checkpoint": str(args.checkpoint or "trained for a moment"),
        "segmentation_models_pytorch": importlib.metadata.version("segmentation_models_pytorch"),
        "shares of the classes": [round(float(share), 4) for share in counts / counts.sum()],
    }
    report("inference", settings, rows)
    for row in rows:
        if row["what"] == "ml-inference":
            kept = row["x bare (median of pairs)"]
            print(f"{row['precision']}: {kept:.1%} of the bare network (goal: at least {GOAL:.0%})")


if __name__ == "__main__":
    main()
