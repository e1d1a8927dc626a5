"""Contenders that take turns: each is a process of its own, so that its memory is its own; a few steps each a round."""

import multiprocessing
import resource
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ml_src.cli import split
from ml_src.core.data.sample import write_sample


class Memory(NamedTuple):
    """GiB of a process, or of its GPU."""

    peak: float
    of_steps: float  # what came on top after network and optimizer had been built


Epoch = Callable[[], int]  # runs some steps, returns the number of images


def take_turns(
    contenders: dict[str, Callable[[], Epoch]], rounds: int, threads: int, on_gpu: bool = False
) -> tuple[dict[str, list[float]], dict[str, Memory]]:
    """Return images/s of every round and the memory of each contender.

    A contender is a function that can be pickled (`functools.partial` of one in a module) and makes an Epoch.
    The first round is the warm-up; the order is turned round each time.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name, make in contenders.items():
        pipes[name], theirs = context.Pipe()
        context.Process(target=_contend, args=(make, threads, on_gpu, theirs)).start()
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    memory: dict[str, Memory] = {}
    for number in range(rounds + 1):
        for name in contenders if number % 2 else reversed(contenders):
            pipes[name].send(True)
            speed, memory[name] = pipes[name].recv()
            if number:
                speeds[name].append(speed)
    for pipe in pipes.values():
        pipe.send(False)
    return speeds, memory


def _contend(make: Callable[[], Epoch], threads: int, on_gpu: bool, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    epoch = make()
    start_memory = _memory(on_gpu)
    while pipe.recv():
        start = time.perf_counter()
        num_images = epoch()
        if on_gpu:
            torch.cuda.synchronize()
        speed = num_images / (time.perf_counter() - start)
        peak = _memory(on_gpu)
        pipe.send((speed, Memory(peak, peak - start_memory)))


def _memory(on_gpu: bool) -> float:
    if on_gpu:
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def sample_data(data: Path, num_train: int, size: int) -> Path:
    """Write a generated data set, so many training images in fold 0, and return its folder."""
    num_images = 2 * num_train + 2
    write_sample(data, num_images=num_images, height=size, width=size)
    paths = ["--raw_data", str(data / "images"), "--mask_data", str(data / "masks")]
    split.main([*paths, "--folds", "2", "--test_split", str(2 / num_images)])
    return data


def ours(raw: dict[str, Any], overrides: dict[str, Any]) -> Callable[[], Epoch]:
    """A contender that runs epochs of our loop, with progress but without validation and checkpoints."""
    return partial(_our_epoch, raw, overrides)


def _our_epoch(raw: dict[str, Any], overrides: dict[str, Any]) -> Epoch:
    from ml_src.core.allocator import keep_freed_memory
    from ml_src.core.callbacks import ProgressLines
    from ml_src.core.config_file import parse_config
    from ml_src.core.tasks import task_for
    from ml_src.core.trainers import build_training, choose_backend
    from ml_src.core.trainers.loop import train_epoch
    from ml_src.core.trainers.training import Progress

    keep_freed_memory()  # as `train` does, before anything large
    config = parse_config(raw, overrides)
    t = build_training(config, task_for(config), choose_backend(config), Path("run"))
    t.callbacks = [ProgressLines()]
    t.callbacks[0].on_start(t)

    def epoch() -> int:
        t.progress = Progress(epoch=t.progress.epoch + 1)
        train_epoch(t)
        return t.progress.num_samples

    return epoch
