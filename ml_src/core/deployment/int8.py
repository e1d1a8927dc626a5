"""int8 by the validation images: which of them calibrate, and how much the masks may suffer. Next: `quantize.py`."""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml_src.core.data.files import Pair
from ml_src.core.data.segmentation import read_truth
from ml_src.core.deployment.calibration import choose_images
from ml_src.core.deployment.evaluation import mean_iou
from ml_src.core.errors import ConfigError
from ml_src.core.export.quantize import QuantizeReport, quantize_onnx
from ml_src.core.export.runtime import open_exported
from ml_src.core.inference.inputs import Input
from ml_src.core.inference.members import Member, open_member
from ml_src.core.inference.predictor import Engine, Options
from ml_src.core.inference.scene import Scene
from ml_src.core.progress import progress_bar

MOST_MEASURED = 64  # images on which each attempt is measured, spread evenly over the split
MOST_TILES = 4  # of each image that calibrates
OPTIONS = Options(batch_size=1)


def quantised(source: Path, target: Path, members: Sequence[Member], pairs: Sequence[Pair]) -> str:
    """Write the int8 version of a float32 file; return in words what it cost.

    Raises: ConfigError where there are no validation images, or no pixel of their masks is labelled.
    """
    data_dir = members[0].config.data.data_dir
    if not pairs:
        raise ConfigError(f"--precision int8 needs the validation images of {data_dir}: give --data_dir")
    chosen = [pairs[index] for index in choose_images(_class_counts(members[0], pairs))]
    judged = [pairs[index] for index in np.unique(np.linspace(0, len(pairs) - 1, MOST_MEASURED).astype(int))]
    reference = mean_iou(open_member(source), judged, OPTIONS)
    if np.isnan(reference):
        raise ConfigError(
            f"--precision int8 needs labelled validation images, but no mask in {data_dir} labels a pixel"
        )
    with progress_bar("quantising", 100, least=1) as advance:
        report = quantize_onnx(
            source,
            target,
            _tiles(members, chosen, source),
            lambda path: mean_iou(open_member(path), judged, OPTIONS),
            reference,
            advance=lambda share: advance(100 * share),
        )
    return in_words(report, len(chosen), len(judged))


def _class_counts(member: Member, pairs: Sequence[Pair]) -> NDArray[np.int64]:
    """Pixels of each class in each mask, (N, C)."""
    num_classes, ignore_index = member.config.data.num_classes, member.config.ignore_index
    rows = []
    for pair in pairs:
        counts = np.bincount(read_truth(pair, ignore_index).ravel(), minlength=num_classes)[:num_classes]
        if ignore_index < num_classes:
            counts[ignore_index] = 0
        rows.append(counts)
    return np.stack(rows)


def _tiles(members: Sequence[Member], pairs: Sequence[Pair], source: Path) -> Iterator[NDArray[Any]]:
    """Some tiles of each image, (1, h, w, channels), of the number type of the file, spread evenly."""
    file = open_exported(source, "cpu")
    engine = Engine(members, OPTIONS)
    for pair in pairs:
        scene = Scene(Input(PurePosixPath(pair.image.stem), pair.image), members[0])
        grid = engine.grid(scene.canvas)
        for number in np.unique(np.linspace(0, len(grid) - 1, MOST_TILES).astype(int)).tolist():
            yield file.typed(scene.tile(grid.window(*divmod(number, len(grid.columns.parts))))[None])


def in_words(report: QuantizeReport, num_calibrating: int, num_measured: int) -> str:
    """Return a report as the block that is printed."""
    lines = [
        f"int8: {report.layers - len(report.float_layers)} of {report.layers} layers, calibrated on {num_calibrating} "
        f"validation images; mean IoU {report.mean_iou:.4f} (float {report.reference:.4f}) on {num_measured} of them",
    ]
    if report.float_layers:
        lines.append(f"  Kept in float, the most costly first: {', '.join(report.float_layers)}")
    if not report.reached:
        lines.append(f"  That is more than the {100 * report.bound:g} points which may be lost: take fp16 or fp32.")
    return "\n".join(lines)
