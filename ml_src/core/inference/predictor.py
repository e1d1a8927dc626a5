"""A checkpoint and a split in; scores, masks and overlays out. Next to read: `writers.py`."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from ml_src.core.atomic import write_json
from ml_src.core.checkpoint import load_checkpoint, load_weights
from ml_src.core.config import Config
from ml_src.core.config_file import parse_config
from ml_src.core.data.files import read_image
from ml_src.core.device import choose_device
from ml_src.core.errors import ConfigError
from ml_src.core.inference.writers import write_mask, write_overlay
from ml_src.core.network import build_model
from ml_src.core.plugins import check_plugins, import_plugins
from ml_src.core.tasks import Task, task_for


@dataclass(frozen=True)
class Measured:
    """What a split came to, and where it was written."""

    block: str
    output_dir: Path


def open_model(
    path: Path, device: torch.device, plugins: Sequence[str] = (), data_dir: Path | None = None
) -> tuple[Config, Task, nn.Module]:
    """Return configuration, task and network of a checkpoint, ready to predict.

    Raises: CheckpointError for a file that is none; ConfigError where it needs plugins that were not given.
    """
    contents = load_checkpoint(path, device)
    overrides = {} if data_dir is None else {"data.data_dir": str(data_dir), "data.splits_dir": None}
    config = parse_config(contents["config"], overrides, source=str(path))
    check_plugins(config.plugins, plugins, path)
    import_plugins(plugins)
    if not Path(config.data.data_dir).is_dir():
        raise ConfigError(
            f"{config.data.data_dir} is not here: start in the folder where you trained, or give --data_dir"
        )
    model = build_model(config.model)
    load_weights(model, contents["model_state_dict"], path)
    model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    return config, task_for(config), model


def measure_split(
    path: Path,
    split: str = "test",
    output_dir: Path | None = None,
    data_dir: Path | None = None,
    device: str = "auto",
    plugins: Sequence[str] = (),
) -> Measured:
    """Predict and measure `train`, `val` or `test` of the fold that a checkpoint was trained on.

    Writes masks/<stem>.png (the size of the image), overlays/<stem>.png and, when all is done, metrics.json into
    `output_dir` (default: inference/<split> in the run's folder).
    """
    target = choose_device(device)
    config, task, model = open_model(path, target, plugins, data_dir)
    if output_dir is None:
        home = path.parent.parent if path.parent.name == "weights" else path.parent
        output_dir = home / "inference" / split
    _require_own(output_dir, split)
    for name in ("masks", "overlays"):
        (output_dir / name).mkdir(parents=True, exist_ok=True)
    (output_dir / "metrics.json").unlink(missing_ok=True)  # its presence says that what lies beside it is complete

    def written() -> Iterator[Any]:
        for prediction in task.predict(model, split, target):
            name = prediction.pair.image.stem + ".png"
            write_mask(output_dir / "masks" / name, prediction.labels, config.data.num_classes)
            image = read_image(prediction.pair.image, config.model.in_channels).to_show
            write_overlay(output_dir / "overlays" / name, image, prediction.labels)
            yield prediction

    progress = track(
        written(),
        total=task.num_images(split),
        description=f"Predicting {split}",
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )
    report = task.measure(progress)
    write_json(output_dir / "metrics.json", {"checkpoint": str(path), "split": split, **report})
    return Measured(task.results(split, report), output_dir)


def _require_own(output_dir: Path, split: str) -> None:
    """Refuse a folder that holds another split's predictions: the two would lie in one heap."""
    path = output_dir / "metrics.json"
    if path.is_file():
        with suppress(ValueError, AttributeError):
            other = json.loads(path.read_text(encoding="utf-8")).get("split")
            if other not in (None, split):
                raise ConfigError(f"{output_dir} holds the predictions of {other}: give another --output")
