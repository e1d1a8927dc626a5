"""Writes ONNX: the network by torch's exporter, what is before and after it node by node. Next to read: `graph.py`.

Only the bare network goes through torch's exporter, with sides that are multiples of what it needs: padding whose size
depends on the image's is more than the exporter can follow.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir
import torch
from numpy.typing import NDArray
from onnx import TensorProto, compose, helper, numpy_helper
from torch import nn
from torch.export import Dim

from ml_src.core.atomic import replacing
from ml_src.core.errors import ConfigError
from ml_src.core.export.graph import EXAMPLE_SIDE, Exportable, Padding

OPSETS = range(18, 24)  # from torch's exporter, and Pad with axes, to the last that torch 2.10 and later know
IR_VERSION = 10  # of the file's structure: what every runtime since ONNX Runtime 1.18 reads
LARGEST_FILE = 2**31 - 1  # bytes that one protobuf message can have
LARGEST_FLOAT16 = 65504.0
# sums over many values, and what is divided by them
FLOAT32_OPERATIONS = [
    "Softmax", "InstanceNormalization", "GroupNormalization", "LayerNormalization", "ReduceMean", "ReduceSum",
]  # fmt: skip
TOLERANCE = 0.005  # of a probability in float32: only a wrong graph is further off
WEIGHT = ".weight"
NORMALISED = "normalised"
CHATTERERS = ("torch", "onnxscript", "onnx_ir")


def export_onnx(
    exportable: Exportable,
    path: Path,
    metadata: Mapping[str, str],
    opset: int = 20,
    precision: Literal["fp32", "fp16"] = "fp32",
) -> None:
    """Write the graph as one ONNX file, whole or not at all.

    Args:
        exportable: what to write, its tensors on the CPU in float32.
        path: of the file.
        metadata: what the file says about itself.
        opset: version of ONNX's operators, one of OPSETS.
        precision: of the networks' weights and arithmetic; inputs, outputs and softmax stay as they are.
    Raises: ConfigError for another opset, a network that cannot be exported for any size, weights that do not fit into
        float16, and a file of 2 GB or more.
    """
    model = onnx_model(exportable, opset, precision)
    helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model)
    with replacing(path) as file:
        file.write(model.SerializeToString())


def onnx_model(exportable: Exportable, opset: int = 20, precision: Literal["fp32", "fp16"] = "fp32") -> onnx.ModelProto:
    """Return the graph as an ONNX model, seen to give what the module gives, for small and large images.

    Args and Raises: see `export_onnx`.
    """
    if opset not in OPSETS:
        raise ConfigError(f"--opset {opset} is not offered: give {OPSETS[0]} to {OPSETS[-1]}")
    if sum(4 * parameter.numel() for parameter in exportable.parameters()) > LARGEST_FILE:
        raise _too_large(exportable)
    networks = [_network_model(exportable, index, opset) for index in range(len(exportable.paddings))]
    model = _composed(exportable, networks, opset)
    if model.ByteSize() > LARGEST_FILE:
        raise _too_large(exportable)
    _check_sizes(exportable, model)  # in float32, where a wrong graph cannot hide behind rounding
    if precision == "fp16":
        model = _composed(exportable, [_in_float16(network) for network in networks], opset)
    return model


def _composed(exportable: Exportable, networks: list[onnx.ModelProto], opset: int) -> onnx.ModelProto:
    """Put what is before and after the members around them."""
    graph = _Graph()
    images = _normalised(graph, exportable)
    size = graph.add("Shape", images, start=2)  # (2,): height, width
    for padding in dict.fromkeys(exportable.paddings):
        _pad(graph, images, size, padding)
    logits = []
    for index, (network, padding) in enumerate(zip(networks, exportable.paddings, strict=True)):
        x = graph.embed(network, "network." if len(networks) == 1 else f"member{index}.")
        logits.append(x if padding == (1, 1) else _cropped(graph, x, size))
    _outputs(graph, exportable, logits)
    return helper.make_model(
        graph.finished(exportable),
        producer_name="ml_src",
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=IR_VERSION,
    )


class _Graph:
    """Nodes and constants in the making."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, operation: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Add a node and return the name of its output."""
        output = output or f"{operation.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operation, inputs, [output], name=output, **attributes))
        return output

    def constant(self, values: NDArray[Any]) -> str:
        """Add a constant and return its name."""
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def embed(self, network: onnx.ModelProto, prefix: str) -> str:
        """Add a network's graph, all names but that of its input behind a prefix; return the name of its output."""
        graph = compose.add_prefix(network, prefix, rename_inputs=False).graph
        taken: set[str] = set()
        for node in graph.node:
            node.name = _readable(node, taken)
            taken.add(node.name)
            del node.metadata_props[:]  # the exporter's notes name files of this machine
        self.nodes += graph.node
        self.constants += graph.initializer
        output: str = graph.output[0].name
        return output

    def finished(self, exportable: Exportable) -> onnx.GraphProto:
        """Return the graph with its input and outputs."""
        height, width = exportable.size or ("H", "W")
        channels, classes = exportable.channels, exportable.num_classes
        shape = ["N", height, width, channels] if exportable.channels_last else ["N", channels, height, width]
        label_type = TensorProto.UINT8 if exportable.label_type == torch.uint8 else TensorProto.UINT16
        image_type = TensorProto.DataType.Value(
            "FLOAT" if exportable.input_type == "float32" else exportable.input_type.upper()
        )
        return helper.make_graph(
            self.nodes,
            "segmentation",
            [helper.make_tensor_value_info("images", image_type, shape)],
            [
                helper.make_tensor_value_info("labels", label_type, ["N", height, width]),
                helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", classes, height, width]),
            ],
            self.constants,
        )


def _normalised(graph: _Graph, exportable: Exportable) -> str:
    """From the input to (N, C, H, W) float32, normalised."""
    x = "images"
    if exportable.channels_last:  # while pixels are small
        x = graph.add("Transpose", x, perm=[0, 3, 1, 2])
    if exportable.input_type != "float32":
        x = graph.add("Cast", x, to=TensorProto.FLOAT)
    x = graph.add("Sub", x, graph.constant(exportable.mean.numpy()))
    return graph.add("Div", x, graph.constant(exportable.std.numpy()), output=NORMALISED)


def _padded(padding: Padding) -> str:
    """Return the name of the images that a member with this padding is given."""
    return NORMALISED if padding == (1, 1) else f"padded_{padding.multiple}_{padding.least}"


def _pad(graph: _Graph, images: str, size: str, padding: Padding) -> None:
    """Repeat the last row and column; see `pad_edges`, whose arithmetic this is."""
    if padding == (1, 1):
        return
    multiple = graph.constant(np.array([padding.multiple]))
    rounded_up = graph.add("Add", size, graph.constant(np.array([padding.multiple - 1])))
    rounded_up = graph.add("Mul", graph.add("Div", rounded_up, multiple), multiple)
    enlarged = graph.add("Max", rounded_up, graph.constant(np.array([padding.least])))
    before = graph.constant(np.zeros(6, np.int64))  # of all axes, and behind images and channels
    amounts = graph.add("Concat", before, graph.add("Sub", enlarged, size), axis=0)
    graph.add("Pad", images, amounts, mode="edge", output=_padded(padding))


def _cropped(graph: _Graph, logits: str, size: str) -> str:
    zeros, axes = graph.constant(np.array([0, 0])), graph.constant(np.array([2, 3]))
    return graph.add("Slice", logits, zeros, size, axes)


def _outputs(graph: _Graph, exportable: Exportable, logits: list[str]) -> None:
    """From the members' logits (N, num_classes, H, W) to the two outputs."""
    if len(logits) == 1:
        scores = logits[0]  # not the probabilities: who asks for labels alone is spared the softmax
        _softmax(graph, scores, output="probabilities")
    else:
        shares = []
        for one, weight in zip(logits, exportable.weights, strict=True):
            shares.append(graph.add("Mul", _softmax(graph, one), graph.constant(np.array(weight, np.float32))))
        scores = graph.add("Sum", *shares, output="probabilities")
    labels = graph.add("ArgMax", scores, axis=1, keepdims=0)
    label_type = TensorProto.UINT8 if exportable.label_type == torch.uint8 else TensorProto.UINT16
    graph.add("Cast", labels, to=label_type, output="labels")


def _softmax(graph: _Graph, logits: str, output: str = "") -> str:
    """The softmax over the classes, step by step: ONNX Runtime's own takes up to ten times as long along this axis."""
    classes = graph.constant(np.array([1], np.int64))
    powers = graph.add("Exp", graph.add("Sub", logits, graph.add("ReduceMax", logits, classes)))
    return graph.add("Div", powers, graph.add("ReduceSum", powers, classes), output=output)


def _network_model(exportable: Exportable, index: int, opset: int) -> onnx.ModelProto:
    """Return a bare member as torch exports it: images (N, C, h, w) to logits; batch normalisation is folded."""
    network: nn.Module = exportable.networks[index]
    padding = exportable.paddings[index]
    sides: dict[int, Any] = {}
    if exportable.size is None:
        multiple, fewest = padding.multiple, padding.apply(EXAMPLE_SIDE, EXAMPLE_SIDE)[0] // padding.multiple
        sides = {2: multiple * Dim("height", min=fewest), 3: multiple * Dim("width", min=fewest)}
    with _quiet(), torch.no_grad():
        try:
            example = exportable.example(index)
            program = torch.export.export(network, (example,), dynamic_shapes=({0: Dim("batch"), **sides},))
            exported = torch.onnx.export(
                program, (), opset_version=opset, input_names=[_padded(padding)], verbose=False
            )
            assert exported is not None
            return exported.model_proto
        except Exception as error:  # of many kinds, and none of them documented
            raise _not_exportable(network, exportable.size, error) from error


def _in_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a network that computes in float16, its input and output still float32."""
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    for tensor in model.graph.initializer:
        if (
            tensor.data_type == TensorProto.FLOAT
            and np.abs(numpy_helper.to_array(tensor)).max(initial=0) > LARGEST_FLOAT16
        ):
            raise ConfigError(
                f"--precision fp16 cannot hold {tensor.name}, whose values go beyond {LARGEST_FLOAT16:.0f}: use fp32"
            )
    blocked = [*DEFAULT_OP_BLOCK_LIST, *FLOAT32_OPERATIONS]
    with _quiet():
        halved = onnx_ir.from_proto(convert_float_to_float16(model, keep_io_types=True, op_block_list=blocked))
    halved.graph.sort()  # the converter appends its casts at the end
    model = onnx_ir.to_proto(halved)
    return model


def _readable(node: onnx.NodeProto, taken: set[str]) -> str:
    """Return a name that no other node has: of a layer with weights, that of the layer in the network."""
    weights = [name for name in node.input[1:] if name.endswith(WEIGHT)]
    name: str = weights[0].removesuffix(WEIGHT) if weights else node.output[0]
    return node.output[0] if name in taken else name


def _check_sizes(exportable: Exportable, model: onnx.ModelProto) -> None:
    """Raise ConfigError where the model does not do as the module does: some layers are exported for one size only."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails becomes our sentence
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    sizes = [exportable.size] if exportable.size else [(1, 1), (3, 5), (EXAMPLE_SIDE + 1, 3 * EXAMPLE_SIDE - 7)]
    for batch, (height, width) in enumerate(sizes, start=1):
        images = exportable.random_images(batch, height, width)
        with torch.inference_mode():
            expected = exportable(images)[1].numpy()
        try:
            found = session.run(["probabilities"], {"images": images.numpy()})[0]
        except Exception as error:  # onnxruntime has no class of its own for it
            reason = ValueError(f"ONNX Runtime cannot run the result with {height} x {width} pixels")
            raise _not_exportable(exportable.networks[0], exportable.size, reason) from error
        if not np.abs(found - expected).max() <= TOLERANCE:  # nor NaN
            reason = ValueError(f"ONNX Runtime has other results for {height} x {width} pixels")
            raise _not_exportable(exportable.networks[0], exportable.size, reason)


def _too_large(exportable: Exportable) -> ConfigError:
    names = ", ".join(sorted({type(network).__name__ for network in exportable.networks}))
    return ConfigError(
        f"{names} gives a file of 2 GB or more, which ONNX cannot hold: export fewer members, or safetensors"
    )


def _not_exportable(network: nn.Module, size: tuple[int, int] | None, error: Exception) -> ConfigError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    hint = "give --input_size H,W" if size is None else "torch's exporter has no way for it"
    of_any = "for images of any size" if size is None else f"for images of {size[0]} x {size[1]}"
    return ConfigError(f"{type(network).__name__} cannot be exported to ONNX {of_any} ({reason}): {hint}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's prints, warnings and log lines from the user, who can do nothing about them."""
    loggers = [logging.getLogger(name) for name in CHATTERERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
