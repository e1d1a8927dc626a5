"""From members to a file of each format, and back to a member that predicts with the file. Next to read: `jobs.py`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from ml_src.core.checkpoint import load_weights
from ml_src.core.data.files import Pair
from ml_src.core.deployment.int8 import quantised
from ml_src.core.export.graph import Exportable
from ml_src.core.export.metadata import Metadata
from ml_src.core.export.onnx import export_onnx
from ml_src.core.export.openvino import export_openvino
from ml_src.core.export.runtime import Exported
from ml_src.core.export.safetensors import export_safetensors
from ml_src.core.export.torchscript import export_torchscript
from ml_src.core.inference.exported_member import ExportedMember
from ml_src.core.inference.members import Member, open_member
from ml_src.core.inference.torch_member import TorchMember, placed
from ml_src.core.network import build_model

Format = Literal["onnx", "openvino", "torchscript", "safetensors"]
SUFFIXES: dict[Format, str] = {
    "onnx": ".onnx",
    "openvino": ".xml",
    "torchscript": ".torchscript",
    "safetensors": ".safetensors",
}


def exportable_of(members: Sequence[TorchMember], metadata: Metadata, size: tuple[int, int] | None) -> Exportable:
    """Return the graph of members, as every format writes it."""
    return Exportable(
        [member.network for member in members],
        [member.weight for member in members],
        metadata.channels,
        metadata.mean,
        metadata.std,
        metadata.input_type,
        metadata.layout,
        metadata.num_classes,
        size,
    )


def write(
    path: Path,
    format: Format,
    members: Sequence[TorchMember],
    metadata: Metadata,
    opset: int,
    size: tuple[int, int] | None,
    pairs: Sequence[Pair],
) -> list[str]:
    """Write members as a file of a format; return what there is to say of it, as blocks.

    Args:
        path: of the file, whose folder may be written to.
        format: what it is.
        members: of one intake.
        metadata: what the file says about itself.
        opset: of ONNX.
        size: height and width, where the graph is to take no other.
        pairs: validation images and their masks, which int8 is calibrated and measured on.

    Raises: MLError for a network that cannot be written so.
    """
    exportable = exportable_of(members, metadata, size)
    strings = metadata.to_strings()
    if format == "torchscript":
        export_torchscript(exportable, path, strings)
        return []
    if format == "safetensors":
        export_safetensors(exportable, path, strings, "fp16" if metadata.precision == "fp16" else "fp32")
        return []
    return _write_graph(path, format, members, metadata, exportable, opset, pairs)


def _write_graph(
    path: Path,
    format: Format,
    members: Sequence[TorchMember],
    metadata: Metadata,
    exportable: Exportable,
    opset: int,
    pairs: Sequence[Pair],
) -> list[str]:
    """ONNX, and what is made from it."""
    plain = path if format == "onnx" and metadata.precision != "int8" else path.with_name(f"graph-of-{path.stem}.onnx")
    in_file: Literal["fp32", "fp16"] = "fp16" if metadata.precision == "fp16" and format == "onnx" else "fp32"
    export_onnx(exportable, plain, replace(metadata, precision=in_file).to_strings(), opset, in_file)
    blocks = []
    if metadata.precision == "int8":
        target = path if format == "onnx" else plain.with_name(f"int8-of-{path.stem}.onnx")
        blocks.append(quantised(plain, target, members, pairs))
        plain.unlink()
        plain = target
    if format == "openvino":
        export_openvino(plain, path, metadata.to_strings(), metadata.precision)
        plain.unlink()
    return blocks


def open_written(
    path: Path, format: Format, members: Sequence[TorchMember], metadata: Metadata, size: tuple[int, int] | None
) -> Member:
    """Open a file that `write` wrote, as what predicts with it."""
    first = members[0]
    if format == "torchscript":
        exported = Exported(path, metadata, _TorchScript(path, size))
        return ExportedMember(path=path, config=first.config, exported=exported)
    if format == "safetensors":
        network = build_model(first.config.model)
        stored = load_file(path)
        load_weights(
            network, {name: one.float() if one.is_floating_point() else one for name, one in stored.items()}, path
        )
        return replace(first, path=path, network=placed(network, first.device), weight=1.0)
    return open_member(path)


class _TorchScript:
    """TorchScript as an engine. Files from elsewhere are not opened with it: they are programs."""

    def __init__(self, path: Path, size: tuple[int, int] | None) -> None:
        self.name = f"TorchScript of torch {torch.__version__}"
        self.sides: tuple[int | None, int | None] = size or (None, None)
        self._module = torch.jit.load(str(path))  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def run(self, images: NDArray[Any], output: str) -> NDArray[Any]:
        labels, probabilities = self._module(torch.from_numpy(images))
        return np.asarray((labels if output == "labels" else probabilities).numpy())
