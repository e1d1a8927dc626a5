"""The ways to predict an image that `ml-export --benchmark` times, cut into stages. Next to read: `benchmark.py`."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray

from ml_src.core.data.files import Pair, read_image
from ml_src.core.deployment.benchmark import (
    END_TO_END,
    NETWORK,
    Benchmark,
    Conditions,
    Contestant,
    Timing,
    cpu_name,
    in_fresh_process,
    measure,
    num_usable_cores,
)
from ml_src.core.deployment.evaluation import noise
from ml_src.core.errors import MLError
from ml_src.core.export.metadata import Metadata
from ml_src.core.export.runtime import usable_threads
from ml_src.core.inference.inputs import Input
from ml_src.core.inference.members import Intake, Member
from ml_src.core.inference.planes import Plane
from ml_src.core.inference.postprocess import apply_postprocessing
from ml_src.core.inference.predictor import Engine, Options, most_probable
from ml_src.core.inference.scene import Scene
from ml_src.core.inference.tiling import enlarged
from ml_src.core.inference.torch_member import TorchMember, open_checkpoint
from ml_src.core.postprocess_specs import steps_from_yaml
from ml_src.core.progress import progress_bar

log = logging.getLogger("ml_src")

SECONDS = 60.0  # about so long all rounds take together
LEAST_ROUNDS, MOST_ROUNDS = 10, 100
NUM_IMAGES = 8


class Entry(NamedTuple):
    """A contestant before it is cut into stages."""

    name: str
    members: Sequence[Member]
    threads: int
    command: Sequence[str] | None  # the words of ml-inference that start it; None where it has none


class Decoded(NamedTuple):
    """An image on its way: decoded, then as tiles of the network's size, then probabilities."""

    scene: Scene
    values: NDArray[Any]


def benchmark_members(entries: Sequence[Entry], metadata: Metadata, pairs: Sequence[Pair], folder: Path) -> Benchmark:
    """Time contestants on a tile of each of some images, of batches of one; where there are none, on noise.

    `folder` may be written to.
    """
    paths = [pair.image for pair in pairs[:NUM_IMAGES]] or [_noise_file(folder, entries[0].members[0], metadata)]
    intake = next(
        (one.members[0].intake for one in entries if one.members[0].intake.fixed), entries[0].members[0].intake
    )
    contestants = [Contestant(one.name, _stages(one.members, metadata, intake), one.threads) for one in entries]
    seconds = _seconds_of_a_round(contestants, paths)
    num_rounds = int(np.clip(SECONDS / max(seconds, 1e-9), LEAST_ROUNDS, MOST_ROUNDS))
    with progress_bar("benchmarking", (num_rounds + 1) * len(contestants), least=1) as advance:
        timings = measure(contestants, paths, num_rounds, 1, advance)
    for number, (entry, timing) in enumerate(zip(entries, timings, strict=True)):
        _start_afresh(entry, timing, paths[0], folder / f"fresh_{number}")
    scene = _opened(entries[0].members[0], paths[0]).scene
    window = Engine(entries[0].members, Options(), intake).grid(scene.canvas).window(0, 0)
    conditions = Conditions(
        image_size=(window.height, window.width),
        channels=metadata.channels,
        batch_size=1,
        versions=metadata.versions,
        cpu=cpu_name(),
        num_cores=num_usable_cores(),
    )
    return Benchmark(timings, conditions)


def _seconds_of_a_round(contestants: Sequence[Contestant], paths: Sequence[Path]) -> float:
    return sum(timing.seconds[END_TO_END][0] for timing in measure(contestants, paths, 1, 2))


def torch_entries(paths: Sequence[Path], members: Sequence[TorchMember], plugins: Sequence[str]) -> list[Entry]:
    """PyTorch in float32 and, where it is something else, as ml-inference would compute."""
    words = ["--checkpoint_path", str(paths[0])]
    if len(paths) > 1:
        weights = [str(member.weight) for member in members]
        words = ["--ensemble", *map(str, paths), "--ensemble_aggregation", "weighted", "--ensemble_weights", *weights]
    words += ["--plugin", *plugins] if plugins else []
    threads = torch.get_num_threads()
    entries = [Entry("PyTorch float32", members, threads, [*words, "--precision", "float32"])]
    usual = [open_checkpoint(member.path, "cpu", plugins, {}, "auto", False) for member in members]
    if any(one.precision != "float32" for one in usual):
        shared = [replace(one, weight=member.weight) for one, member in zip(usual, members, strict=True)]
        entries.append(Entry(f"PyTorch {usual[0].precision}, as configured", shared, threads, words))
    return entries


def exported_entry(name: str, member: Member, path: Path | None) -> Entry:
    """An exported file; `path` is None where ml-inference does not open it."""
    command = None if path is None else ["--checkpoint_path", str(path)]
    return Entry(name, [member], usable_threads(), command)


def _stages(members: Sequence[Member], metadata: Metadata, intake: Intake) -> Mapping[str, Callable[[Any], Any]]:
    engine = Engine(members, Options(batch_size=1), intake)
    steps = steps_from_yaml(metadata.postprocess)
    num_classes = metadata.num_classes

    def prepare(decoded: Decoded) -> Decoded:
        window = engine.grid(decoded.scene.canvas).window(0, 0)
        return Decoded(decoded.scene, decoded.scene.tile(window)[None])

    def network(prepared: Decoded) -> Decoded:
        return Decoded(prepared.scene, engine.values(prepared.values)[0])

    def finish(predicted: Decoded) -> NDArray[Any]:
        values, scene = predicted.values, predicted.scene
        if scene.canvas != scene.size:
            values = enlarged(values, scene.size, 0, scene.size[0])
        labels = most_probable(values, np.dtype(metadata.label_type))
        if not steps:
            return labels
        plane = Plane(labels.shape, labels.dtype)
        plane.put(0, labels)
        pixels = read_image(scene.item.path).pixels if scene.pixels is None else scene.pixels
        guide = partial(_rows, pixels[: labels.shape[0], : labels.shape[1]])
        return apply_postprocessing(plane, steps, num_classes, None, guide).whole()

    decode = partial(_opened, members[0])
    return {"decode": decode, "pre-processing": prepare, NETWORK: network, "post-processing": finish}


def _rows(pixels: NDArray[Any], top: int, bottom: int) -> NDArray[Any]:
    return pixels[top:bottom]


def _opened(member: Member, path: Path) -> Decoded:
    scene = Scene(Input(PurePosixPath(path.stem), path), member)
    scene.decode()
    return Decoded(scene, np.empty(0))


def _noise_file(folder: Path, member: Member, metadata: Metadata) -> Path:
    path = folder / "noise.tif"
    shape = (*(member.intake.size or member.intake.tile), member.intake.channels)
    tifffile.imwrite(path, noise(np.random.default_rng(0), shape, metadata.input_type), photometric="minisblack")
    return path


def _start_afresh(entry: Entry, timing: Timing, image: Path, output: Path) -> None:
    if entry.command is None:
        return
    words = [*entry.command, "--input", str(image), "--output", str(output), "--device", "cpu"]
    try:
        timing.fresh = in_fresh_process(["-m", "ml_src.cli.inference", *words])
    except MLError as error:  # the file itself is well
        log.warning("%s", error)
