"""Writes OpenVINO's two files from an ONNX file, so that there is one graph. Never imports torch."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from ml_src.core.errors import ConfigError
from ml_src.core.export.openvino_file import import_openvino, weights_of


def export_openvino(
    source: Path, path: Path, metadata: Mapping[str, str], precision: Literal["fp32", "fp16", "int8"] = "fp32"
) -> None:
    """Write `path` (.xml) and the weights beside it (.bin), each whole or not at all.

    Args:
        source: an ONNX file that ml-export wrote, in float32, or in int8 (QDQ) for int8.
        path: ends with .xml.
        metadata: goes into the file's rt_info.
        precision: of the stored weights; fp16 is enlarged or not by OpenVINO as the processor likes it.
    Raises: ConfigError where OpenVINO is not installed, or `path` has another suffix.
    """
    if path.suffix != ".xml":
        raise ConfigError(f"{path} is no name for an OpenVINO model: give one that ends with .xml")
    openvino = import_openvino()
    model = openvino.convert_model(source)
    for key, text in metadata.items():
        model.set_rt_info(text, [key])
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder, path.name)
        openvino.save_model(model, temporary, compress_to_fp16=precision == "fp16")
        _move(weights_of(temporary), weights_of(path))  # first: an .xml is never without its weights
        _move(temporary, path)


def _move(written: Path, path: Path) -> None:
    with written.open("rb") as file:
        os.fsync(file.fileno())
    written.replace(path)
