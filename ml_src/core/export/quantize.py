"""Makes an int8 file of one that `onnx.py` wrote: static, QDQ, one scale for each output channel of the weights.

Layers are quantised only as long as the mean IoU stays close to the float network's. Normalisation, padding, the last
layer, softmax and labels stay in float. Next to read: `onnx.py`, the file that this starts from.
"""

import contextlib
import dataclasses
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ml_src.core.atomic import replacing
from ml_src.core.errors import ConfigError
from ml_src.core.export.metadata import Metadata
from ml_src.core.export.runtime import usable_threads

BOUND = 0.005
BETWEEN = ("Add", "Clip", "Concat", "MaxPool", "Relu", "Reshape", "Resize", "Transpose")
"""Operators without weights that compute with 8 bits where what they are given has 8 bits."""
MERGING = ("Add", "Concat")  # of the others, only the first input is an image
WINDOW = 512  # pixels: larger images are calibrated in pieces, which takes the memory of one piece
SAMPLES, SAMPLE_SIDE = 8, 256  # of images on which layers are compared
CALIBRATED, MEASURED, RANKED = 0.4, 0.6, 0.8  # shares of the work that are done then

Images = NDArray[Any]
Ranges = dict[str, tuple[np.float32, np.float32]]


@dataclass(frozen=True)
class QuantizeReport:
    """What came of it."""

    mean_iou: float
    """Of the file that was written."""
    reference: float
    """Mean IoU of the float network."""
    bound: float
    """How much may be lost."""
    layers: int
    """How many layers can be quantised."""
    float_layers: list[str]
    """Those that are kept in float, the most costly one first."""
    rounds: list[tuple[int, float]]
    """All that was measured: layers in float, mean IoU."""

    @property
    def reached(self) -> bool:
        """Whether the mean IoU is within the bound; if not, then it is not with all layers in float either."""
        return self.mean_iou >= self.reference - self.bound


def quantize_onnx(
    source: Path,
    target: Path,
    batches: Iterable[Images],
    measure: Callable[[Path], float],
    reference: float,
    bound: float = BOUND,
    advance: Callable[[float], None] = lambda share: None,
) -> QuantizeReport:
    """Write an int8 version of a float32 file, whole or not at all, with as few layers in float as the bound needs.

    The weights have 7 of the 8 bits: two products of theirs fit into 16 bits, which is where CPUs without VNNI or AMX
    add them up. So the masks are the same on all of them.

    Args:
        source: a file of `export_onnx`, fp32.
        target: where to write to. Where the bound cannot be held, the best that was measured is written.
        batches: images (N, H, W, C) of the number type of the file, whose values decide on the ranges.
        measure: from a file of the same kind to its mean IoU, 0..1; called up to a dozen times.
        reference: mean IoU of the source.
        bound: how much mean IoU may be lost.
        advance: called with the share of the work that is done, up to 1.
    Raises: ConfigError for a file without layers that can be quantised, no images, and values that are not finite.
    """
    model = onnx.load(source)
    metadata = Metadata.from_strings({one.key: one.value for one in model.metadata_props}, source)
    helper.set_model_props(model, dataclasses.replace(metadata, precision="int8").to_strings())
    network = _Network.of(model)
    if not network.layers:
        raise ConfigError(f"--precision int8: {source} has no convolutions before its last layer: use fp32")
    pieces = [np.ascontiguousarray(_in_layout(one, metadata)) for batch in batches for one in _windows(batch)]
    if not pieces:
        raise ConfigError("--precision int8 needs images to find the ranges of the values: give a data set with images")
    ranges = network.ranges(pieces, lambda share: advance(CALIBRATED * share))

    rounds: list[tuple[int, float]] = []
    order: list[str] = []
    with tempfile.TemporaryDirectory() as folder:

        def holds(number: int) -> bool:
            path = Path(folder) / f"{number}.onnx"
            path.write_bytes(network.quantised(ranges, set(network.layers) - set(order[:number])))
            rounds.append((number, measure(path)))
            advance(MEASURED if number == 0 else 1 - (1 - RANKED) / len(rounds))
            return rounds[-1][1] >= reference - bound

        if not holds(0):
            shares = (RANKED - MEASURED, MEASURED)
            samples = _samples(pieces, metadata)
            order = network.by_cost(ranges, samples, lambda share: advance(shares[0] * share + shares[1]))
            fewest(holds, len(order))
        good = [one for one in rounds if one[1] >= reference - bound]
        number, mean_iou = min(good) if good else max(rounds, key=lambda one: one[1])
        with replacing(target) as file:
            file.write((Path(folder) / f"{number}.onnx").read_bytes())
    advance(1.0)
    return QuantizeReport(mean_iou, reference, bound, len(network.layers), order[:number], rounds)


def fewest(holds: Callable[[int], bool], most: int) -> int | None:
    """Return the least number of 1..most that holds, if all above one that holds do so too; None where none does.

    It doubles the number until it holds, then halves the distance: 2 log2(number) calls, and few of large numbers.
    """
    fails, number = 0, 1
    while not holds(number):
        if number == most:
            return None
        fails, number = number, min(2 * number, most)
    while number - fails > 1:
        middle = (fails + number) // 2
        if holds(middle):
            number = middle
        else:
            fails = middle
    return number


def upsample_by_convolution(model: onnx.ModelProto) -> int:
    """Replace transposed convolutions that do not overlap by a 1x1 convolution and a move of pixels; return how many.

    Where stride and kernel are the same, each output pixel is one product of one input pixel, so that both compute the
    same. ONNX Runtime has no int8 kernel for transposed convolutions, and no blocked one for float32.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    replaced = 0
    for node in model.graph.node:
        if _is_upsampling(node, constants):
            nodes.extend(_as_convolution(node, constants, model.graph))
            replaced += 1
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return replaced


def _is_upsampling(node: onnx.NodeProto, constants: dict[str, TensorProto]) -> bool:
    if node.op_type != "ConvTranspose" or any(name not in constants for name in node.input[1:]):
        return False
    given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    kernel = list(constants[node.input[1]].dims[2:])
    return (
        len(kernel) == 2
        and list(given.get("strides", [])) == kernel
        and not any(given.get("pads", [])) and not any(given.get("output_padding", []))
        and all(one == 1 for one in given.get("dilations", []))
        and given.get("group", 1) == 1
        and "output_shape" not in given
        and given.get("auto_pad", b"NOTSET") == b"NOTSET"
    )  # fmt: skip


def _as_convolution(
    node: onnx.NodeProto, constants: dict[str, TensorProto], graph: onnx.GraphProto
) -> list[onnx.NodeProto]:
    """Return nodes that do the same: pixels are moved with channels last, where int8 convolutions leave them."""
    x, output, name = node.input[0], node.output[0], node.name
    weight = numpy_helper.to_array(constants[node.input[1]])  # (C, D, kh, kw)
    channels, (kh, kw) = weight.shape[1], weight.shape[2:]
    bias = [numpy_helper.to_array(constants[one]) for one in node.input[2:]]

    def constant(values: NDArray[Any], what: str) -> str:
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), f"{name}.{what}"))
        return f"{name}.{what}"

    weights = [constant(weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0], 1, 1), "weight_1x1")]
    weights += [constant(np.tile(one, kh * kw), "bias_1x1") for one in bias]
    split = constant(np.array([0, 0, 0, kh, kw * channels]), "split")  # 0: as it is
    two, four = constant(np.array([2]), "two"), constant(np.array([4]), "four")
    size = [constant(np.array([0]), "batch"), f"{name}.sides", constant(np.array([channels]), "channels")]
    factor = constant(np.array([kh, kw]), "factor")
    steps: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Conv", [x, *weights], "products", {"kernel_shape": [1, 1]}),  # (N, kh * kw * D, H, W)
        ("Transpose", [f"{name}.products"], "last", {"perm": [0, 2, 3, 1]}),
        ("Reshape", [f"{name}.last", split], "rows", {}),  # (N, H, W, kh, kw * D)
        ("Transpose", [f"{name}.rows"], "moved", {"perm": [0, 1, 3, 2, 4]}),  # (N, H, kh, W, kw * D)
        ("Shape", [x], "shape", {}),
        ("Slice", [f"{name}.shape", two, four], "sides_before", {}),
        ("Mul", [f"{name}.sides_before", factor], "sides", {}),
        ("Concat", size, "size", {"axis": 0}),
        ("Reshape", [f"{name}.moved", f"{name}.size"], "joined", {}),  # (N, kh * H, kw * W, D)
        ("Transpose", [f"{name}.joined"], "", {"perm": [0, 3, 1, 2]}),
    ]
    nodes = [
        helper.make_node(operator, inputs, [f"{name}.{what}" if what else output], f"{name}.{what}", **attributes)
        for operator, inputs, what, attributes in steps
    ]
    nodes[0].name = name
    return nodes


class _Network:
    """A float model, prepared, of which parts are quantised."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self._constants = {tensor.name for tensor in model.graph.initializer}
        self.layers = self._layers()

    @classmethod
    def of(cls, model: onnx.ModelProto) -> "_Network":
        """Rewrite what has no 8 bit form, and note the types of all values."""
        upsample_by_convolution(model)
        return cls(onnx.shape_inference.infer_shapes(model))

    def _layers(self) -> list[str]:
        """Return the convolutions that another one follows: the last one's 256 steps would make probabilities coarse.

        They are in the order of the graph.
        """
        before: set[str] = set()  # values on which a convolution depends
        layers = []
        for node in reversed(self.model.graph.node):
            is_layer = node.op_type == "Conv" and node.input[1] in self._constants
            if is_layer and any(output in before for output in node.output):
                layers.append(node.name)
            if is_layer or any(output in before for output in node.output):
                before.update(node.input)
        return layers[::-1]

    def _in_8_bits(self, layers: set[str]) -> list[onnx.NodeProto]:
        """Return these layers and what between layers can do with 8 bits; between float layers all stays in float."""
        values: set[str] = set()
        nodes = []
        for node in self.model.graph.node:
            images = [one for one in node.input if one not in self._constants]
            if node.op_type not in MERGING:
                images = images[:1]
            is_between = node.op_type in BETWEEN and bool(images) and all(one in values for one in images)
            if node.name in layers or is_between:
                nodes.append(node)
                values.update(node.output)
        return nodes

    def ranges(self, pieces: Sequence[Images], advance: Callable[[float], None]) -> Ranges:
        """Return the least and the greatest value of all that could be quantised, over all images.

        Piece by piece, and reduced in the graph: the memory does not grow with their number.
        """
        nodes = self._in_8_bits(set(self.layers))
        integers = {TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL}
        types = {one.name: one.type.tensor_type.elem_type for one in self.model.graph.value_info}
        names = {name: None for node in nodes for name in (*node.input, *node.output)}  # a set in order
        values = [name for name in names if name in types and types[name] not in integers]
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        outputs = []
        for name in values:
            for operator in ("ReduceMin", "ReduceMax"):
                outputs.append(f"{name}.{operator}")
                model.graph.node.append(helper.make_node(operator, [name], outputs[-1:], keepdims=0))
                model.graph.output.append(helper.make_tensor_value_info(outputs[-1], TensorProto.FLOAT, []))
        session = _session(model.SerializeToString())
        found = []
        for index, piece in enumerate(pieces, start=1):
            found.append(_run(session, outputs, piece))
            advance(index / len(pieces))
        table = np.array(found, np.float32).reshape(len(pieces), len(values), 2)
        least, greatest = table[:, :, 0].min(axis=0), table[:, :, 1].max(axis=0)
        if not (np.isfinite(least).all() and np.isfinite(greatest).all()):
            raise ConfigError("--precision int8: the network computes values that are not finite: use fp32")
        return {name: (least[index], greatest[index]) for index, name in enumerate(values)}

    def quantised(self, ranges: Ranges, layers: set[str]) -> bytes:
        """Return a file in which these layers are quantised, and what lies between them."""
        from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, TensorsData

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        nodes = self._in_8_bits(layers)
        if nodes:
            with _quiet():
                quantizer = QDQQuantizer(
                    model,
                    per_channel=True,
                    reduce_range=True,
                    weight_qType=QuantType.QInt8,
                    activation_qType=QuantType.QUInt8,  # of the two the one that x86 multiplies with int8
                    tensors_range=TensorsData(CalibrationMethod.MinMax, dict(ranges)),
                    nodes_to_quantize=[node.name for node in nodes],
                    nodes_to_exclude=[],
                    op_types_to_quantize=sorted({node.op_type for node in nodes}),
                    extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
                )
                quantizer.quantize_model()
                quantizer.model.topological_sort()
            model = quantizer.model.model
            _shapes_of_integers(model)
        standard = [one for one in model.opset_import if one.domain in ("", "ai.onnx")]
        del model.opset_import[:]
        model.opset_import.extend(standard)
        onnx.checker.check_model(model)
        contents: bytes = model.SerializeToString()
        return contents

    def by_cost(self, ranges: Ranges, samples: Sequence[Images], advance: Callable[[float], None]) -> list[str]:
        """Return the layers, first the one that, quantised alone, changes the probabilities most.

        Alone: next to a bad layer, all others would look harmless.
        """
        expected = self._probabilities(self.model.SerializeToString(), samples)
        costs = {}
        for index, layer in enumerate(self.layers, start=1):
            found = self._probabilities(self.quantised(ranges, {layer}), samples)
            costs[layer] = sum(float(np.abs(a - b).mean()) for a, b in zip(found, expected, strict=True))
            advance(index / len(self.layers))
        return sorted(self.layers, key=lambda layer: -costs[layer])

    @staticmethod
    def _probabilities(contents: bytes, samples: Sequence[Images]) -> list[NDArray[Any]]:
        session = _session(contents)
        return [_run(session, ["probabilities"], sample)[0] for sample in samples]


def _shapes_of_integers(model: onnx.ModelProto) -> None:
    """Take the shape of the 8 bit value instead of the float one, which then need not be computed."""
    sources = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for node in model.graph.node:
        if node.op_type == "Shape":
            node.input[0] = sources.get(node.input[0], node.input[0])


def _windows(images: Images) -> Iterator[Images]:
    """Cut images (N, H, W, C) into pieces (1, h, w, C) of at most WINDOW pixels a side."""
    for image in images:
        for top in range(0, image.shape[0], WINDOW):
            for left in range(0, image.shape[1], WINDOW):
                yield image[None, top : top + WINDOW, left : left + WINDOW]


def _in_layout(images: Images, metadata: Metadata) -> Images:
    return images if metadata.layout == "NHWC" else images.transpose(0, 3, 1, 2)


def _samples(pieces: Sequence[Images], metadata: Metadata) -> list[Images]:
    """Return the middle of some pieces, evenly spread."""
    chosen = [pieces[index] for index in np.linspace(0, len(pieces) - 1, min(SAMPLES, len(pieces))).astype(int)]
    first = 1 if metadata.layout == "NHWC" else 2
    samples = []
    for piece in chosen:
        cut = [slice(None)] * 4
        for axis in (first, first + 1):
            start = max(0, (piece.shape[axis] - SAMPLE_SIDE) // 2)
            cut[axis] = slice(start, start + SAMPLE_SIDE)
        samples.append(np.ascontiguousarray(piece[tuple(cut)]))
    return samples


def _session(contents: bytes) -> Any:
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)  # of what it wants to say, the exceptions are enough
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = usable_threads()
    return onnxruntime.InferenceSession(contents, options, providers=["CPUExecutionProvider"])


def _run(session: Any, outputs: list[str], images: Images) -> list[NDArray[Any]]:
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.only_execute_path_to_fetches = True
    results: list[NDArray[Any]] = session.run(outputs, {"images": images}, options)
    return results


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantiser's warnings and log lines from the user, who can do nothing about them."""
    root = logging.getLogger()  # it speaks by this one, and without a handler that would set up its own
    handler, disabled = logging.NullHandler(), root.disabled
    root.addHandler(handler)
    root.disabled = True
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        root.disabled = disabled
        root.removeHandler(handler)
