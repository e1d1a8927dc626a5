"""One file holds all that a model is: weights, configuration, class names, progress, random state.

It is a plain dict of tensors and plain data (`CONTENTS`), written to a temporary file, flushed to the disk and renamed,
so that a name always stands for a whole file. It is opened with torch's `weights_only=True` and nothing else: a file
from elsewhere can be refused, but it cannot run code.
"""

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ml_src.core.atomic import replacing
from ml_src.core.errors import CheckpointError

FORMAT_VERSION = 2
CONTENTS: dict[str, type] = {
    "format_version": int,
    "model_state_dict": dict,  # the weights that were measured
    "raw_state_dict": dict,  # those in training, where the measured ones are their average; else empty
    "optimizer_state_dict": dict,
    "scheduler_state_dict": dict,
    "config": dict,
    "class_names": list,
    "epoch": int,  # finished epochs
    "step": int,  # optimizer steps taken
    "epoch_step": int,  # of them, those of the epoch that is not finished
    "metrics": dict,  # of the last finished epoch
    # what a resume needs besides
    "backend_state_dict": dict,
    "callback_state_dicts": dict,
    "batch_size": int,  # smaller than the configuration's where it did not fit into memory
    "processes": list,  # of each process: random state, and what it has summed up in the unfinished epoch
    "num_threads": int,
    "seconds": float,
}


def save_checkpoint(path: Path, contents: dict[str, Any], keep_previous: bool = False) -> None:
    """Write a checkpoint, whole or not at all. `contents` has at least the keys of CONTENTS but format_version.

    With `keep_previous`, the file that it replaces stays as `previous_of(path)`.
    """
    contents = {"format_version": FORMAT_VERSION, **contents}
    with replacing(path, previous_of(path) if keep_previous else None) as file:
        try:
            torch.save(contents, file)
        except RuntimeError as error:  # torch, closing its archive, speaks over the reason
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def previous_of(path: Path) -> Path:
    """Return where the checkpoint before `path` is kept: last.pt -> last.previous.pt."""
    return path.with_suffix(f".previous{path.suffix}")


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Open a checkpoint; its tensors are put on `device`.

    Raises: CheckpointError where the file is missing, damaged, from elsewhere, or of a later version.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: give the checkpoint, such as {path / 'weights' / 'best.pt'}")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: a run keeps its checkpoints in runs/<name>/weights/")
    refusal = CheckpointError(
        f"{path} is not a checkpoint of this program, or it is damaged: give a best.pt or last.pt that ml-train wrote"
    )
    try:
        with warnings.catch_warnings(action="ignore"):  # of torch, about foreign files; the refusal says it all
            contents = torch.load(path, map_location=device, weights_only=True)
    except (PermissionError, MemoryError, torch.OutOfMemoryError):  # says nothing about the file
        raise
    except Exception as error:  # whatever else it is, the file is not opened in any other way
        raise refusal from error
    if not isinstance(contents, dict) or not isinstance(contents.get("format_version"), int):
        raise refusal
    if contents["format_version"] > FORMAT_VERSION:
        raise CheckpointError(f"{path} was written by a later version of this program: update it with pip")
    if not all(isinstance(contents.get(key), kind) for key, kind in CONTENTS.items()):
        raise refusal
    return contents


def load_weights(model: torch.nn.Module, state_dict: dict[str, Any], path: Path) -> None:
    """Put a checkpoint's weights into a network.

    Raises: CheckpointError where names or shapes differ.
    """
    try:
        model.load_state_dict(state_dict)
    except (RuntimeError, TypeError, AttributeError) as error:
        detail = str(error).splitlines()[-1].strip()
        raise CheckpointError(
            f"the weights in {path} do not fit the network of this configuration: {detail}"
        ) from error


def random_state() -> dict[str, Any]:
    """Return the state of torch's, NumPy's and Python's global generators as tensors and plain data."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on from `random_state`."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
