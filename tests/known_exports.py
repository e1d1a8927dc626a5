"""Exported files made by hand, with the answers worked out in NumPy: a 1x1 convolution as the network."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ml_src.core.export.metadata import Metadata
from ml_src.core.export.openvino_file import import_openvino

FULL = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}
METADATA = Metadata(
    class_names=["background", "cell", "fibre"],
    colours=[[0, 0, 0], [68, 119, 170], [238, 102, 119]],
    channels=2,
    input_type="uint8",
    layout="NHWC",
    mean=[0.5, 0.25],
    std=[0.25, 0.125],
    resize=None,
    training_size=[64, 64],
    ignore_index=255,
    postprocess=[],
    mirror=False,
    metrics={},
    privacy=None,
    versions={"ml_src": "0.1.0"},
    checkpoints=[{"name": "best.pt", "sha256": "00", "weight": 1.0}],
    encoder_licence=None,
    precision="fp32",
    config={},
)


def metadata_of(num_classes: int = 3, channels: int = 2, **changes: Any) -> Metadata:
    """Metadata of a file with that many classes and channels."""
    names = [f"class {index}" for index in range(num_classes)]
    colours = [[index % 256, 0, 0] for index in range(num_classes)]
    mean, std = [0.5, 0.25][:channels], [0.25, 0.125][:channels]
    several = {"class_names": names, "colours": colours, "channels": channels, "mean": mean, "std": std}
    return replace(METADATA, **{**several, **changes})


def weights_of_classes(metadata: Metadata) -> NDArray[np.float32]:
    """(classes, channels, 1, 1)."""
    shape = (metadata.num_classes, metadata.channels, 1, 1)
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def model_of(metadata: Metadata, size: tuple[int, int] | None = None) -> onnx.ModelProto:
    """The ONNX model: normalise, convolve, softmax, labels."""
    kinds = {"uint8": TensorProto.UINT8, "uint16": TensorProto.UINT16, "float32": TensorProto.FLOAT}
    height, width = size or ("H", "W")
    channels_last = metadata.layout == "NHWC"
    sides = ["N", height, width, metadata.channels] if channels_last else ["N", metadata.channels, height, width]
    full = FULL[metadata.input_type]
    constants = {
        "mean": (np.array(metadata.mean, np.float32) * full).reshape(1, -1, 1, 1),
        "std": (np.array(metadata.std, np.float32) * full).reshape(1, -1, 1, 1),
        "weights": weights_of_classes(metadata),
    }
    nodes = [
        helper.make_node("Transpose", ["images"], ["turned"], perm=[0, 3, 1, 2] if channels_last else [0, 1, 2, 3]),
        helper.make_node("Cast", ["turned"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["floats", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["normalised"]),
        helper.make_node("Conv", ["normalised", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["logits"], ["indices"], axis=1, keepdims=0),
        helper.make_node("Cast", ["indices"], ["labels"], to=kinds[metadata.label_type]),
    ]
    graph = helper.make_graph(
        nodes,
        "segmentation",
        [helper.make_tensor_value_info("images", kinds[metadata.input_type], sides)],
        [
            helper.make_tensor_value_info("labels", kinds[metadata.label_type], ["N", height, width]),
            helper.make_tensor_value_info(
                "probabilities", TensorProto.FLOAT, ["N", metadata.num_classes, height, width]
            ),
        ],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, metadata.to_strings())
    return model


def write_onnx(path: Path, metadata: Metadata = METADATA, size: tuple[int, int] | None = None) -> Path:
    """Write the model as ONNX."""
    path.write_bytes(model_of(metadata, size).SerializeToString())
    return path


def write_openvino(path: Path, metadata: Metadata = METADATA, size: tuple[int, int] | None = None) -> Path:
    """Write the model as OpenVINO's .xml and .bin."""
    openvino = import_openvino()
    model = openvino.convert_model(write_onnx(path.with_suffix(".onnx"), metadata, size))
    for key, value in metadata.to_strings().items():
        model.set_rt_info(value, key)
    openvino.save_model(model, path, compress_to_fp16=False)
    return path


def expected_probabilities(images: NDArray[Any], metadata: Metadata) -> NDArray[np.float64]:
    """(N, classes, H, W) of images (N, H, W, C), in float64."""
    mean, std = np.array(metadata.mean), np.array(metadata.std)
    normalised = (images / FULL[images.dtype.name] - mean) / std
    weights = weights_of_classes(metadata)[:, :, 0, 0].astype(np.float64)
    logits = np.einsum("nhwc,kc->nkhw", normalised, weights)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def random_images(shape: tuple[int, ...], kind: str = "uint8", seed: int = 0) -> NDArray[Any]:
    """Noise over the full range of the number type."""
    shares = np.random.default_rng(seed).random(shape)
    return (shares * FULL[kind]).astype(kind)
