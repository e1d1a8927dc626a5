"""Looks through an ONNX file before ONNX Runtime opens it: is it whole, is it ours, can it do harm?

ONNX is protobuf, and the few lines of that format that are needed are read here, from a memory map, so that nothing of
the file has been trusted before. The names of the parts are those of onnx.proto. Next: `runtime.py`.
"""

import math
import mmap
from collections import ChainMap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ml_src.core.errors import CheckpointError
from ml_src.core.export.metadata import Metadata

LIMIT_BYTES = 2**31 - 1  # what protobuf itself can hold
LIMIT_PARTS = 4_000_000  # some seconds of reading; five U-Nets of 5000 nodes have fewer than a million
LIMIT_TEXT = 2**16
LIMIT_METADATA = 2**23
LIMIT_DEPTH = 8  # of graphs in graphs
LIMIT_DIMENSIONS = 16
LIMIT_MADE = 2**26  # elements that a node may make of a constant shape; the network's own are some dozen

STANDARD = ("", "ai.onnx")
UNBOUNDED_OPERATORS = ("Loop", "Scan", "RandomNormal", "RandomUniform")
SIZE_INPUTS = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1, "Pad": 1, "OneHot": 1, "Resize": 3}
"""Which input of an operator says how large the result is."""

BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16, 21: 4, 22: 4}
"""Bits of an element of each of TensorProto's number types; text and complex numbers are not among them."""
INT64 = 7
DATA_FIELDS = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")
ELEMENT_TYPES = {"float32": 1, "uint8": 2, "uint16": 4}

Kind = Literal["whole", "float", "double", "bytes", "wholes", "floats", "doubles"]
WIRES: dict[Kind, tuple[int, ...]] = {
    "whole": (0,),
    "float": (5,),
    "double": (1,),
    "bytes": (2,),
    "wholes": (0, 2),  # one by one, or packed
    "floats": (5, 2),
    "doubles": (1, 2),
}


class Span(NamedTuple):
    """Where a part lies in the file."""

    start: int
    end: int


class Part(NamedTuple):
    """A field of a protobuf message."""

    name: str
    kind: Kind
    repeated: bool = False


Message = Mapping[int, Part]
"""Number -> field. A field that is not listed is refused: an engine might know it, and this reader would not."""

MODEL: Message = {
    1: Part("ir_version", "whole"),
    2: Part("producer_name", "bytes"),
    3: Part("producer_version", "bytes"),
    4: Part("domain", "bytes"),
    5: Part("model_version", "whole"),
    6: Part("doc_string", "bytes"),
    7: Part("graph", "bytes"),
    8: Part("opset_import", "bytes", repeated=True),
    14: Part("metadata_props", "bytes", repeated=True),
    20: Part("training_info", "bytes", repeated=True),
    25: Part("functions", "bytes", repeated=True),
    26: Part("configuration", "bytes", repeated=True),
}
OPSET: Message = {1: Part("domain", "bytes"), 2: Part("version", "whole")}
ENTRY: Message = {1: Part("key", "bytes"), 2: Part("value", "bytes")}
GRAPH: Message = {
    1: Part("node", "bytes", repeated=True),
    2: Part("name", "bytes"),
    5: Part("initializer", "bytes", repeated=True),
    10: Part("doc_string", "bytes"),
    11: Part("input", "bytes", repeated=True),
    12: Part("output", "bytes", repeated=True),
    13: Part("value_info", "bytes", repeated=True),
    14: Part("quantization_annotation", "bytes", repeated=True),
    15: Part("sparse_initializer", "bytes", repeated=True),
    16: Part("metadata_props", "bytes", repeated=True),
}
NODE: Message = {
    1: Part("input", "bytes", repeated=True),
    2: Part("output", "bytes", repeated=True),
    3: Part("name", "bytes"),
    4: Part("op_type", "bytes"),
    5: Part("attribute", "bytes", repeated=True),
    6: Part("doc_string", "bytes"),
    7: Part("domain", "bytes"),
    8: Part("overload", "bytes"),
    9: Part("metadata_props", "bytes", repeated=True),
    10: Part("device_configurations", "bytes", repeated=True),
}
ATTRIBUTE: Message = {
    1: Part("name", "bytes"),
    2: Part("f", "float"),
    3: Part("i", "whole"),
    4: Part("s", "bytes"),
    5: Part("t", "bytes"),
    6: Part("g", "bytes"),
    7: Part("floats", "floats", repeated=True),
    8: Part("ints", "wholes", repeated=True),
    9: Part("strings", "bytes", repeated=True),
    10: Part("tensors", "bytes", repeated=True),
    11: Part("graphs", "bytes", repeated=True),
    13: Part("doc_string", "bytes"),
    14: Part("tp", "bytes"),
    15: Part("type_protos", "bytes", repeated=True),
    20: Part("type", "whole"),
    21: Part("ref_attr_name", "bytes"),
    22: Part("sparse_tensor", "bytes"),
    23: Part("sparse_tensors", "bytes", repeated=True),
}
TENSOR: Message = {
    1: Part("dims", "wholes", repeated=True),
    2: Part("data_type", "whole"),
    3: Part("segment", "bytes"),
    4: Part("float_data", "floats", repeated=True),
    5: Part("int32_data", "wholes", repeated=True),
    6: Part("string_data", "bytes", repeated=True),
    7: Part("int64_data", "wholes", repeated=True),
    8: Part("name", "bytes"),
    9: Part("raw_data", "bytes"),
    10: Part("double_data", "doubles", repeated=True),
    11: Part("uint64_data", "wholes", repeated=True),
    12: Part("doc_string", "bytes"),
    13: Part("external_data", "bytes", repeated=True),
    14: Part("data_location", "whole"),
    16: Part("metadata_props", "bytes", repeated=True),
}
VALUE_INFO: Message = {
    1: Part("name", "bytes"),
    2: Part("type", "bytes"),
    3: Part("doc_string", "bytes"),
    4: Part("metadata_props", "bytes", repeated=True),
}
TYPE: Message = {1: Part("tensor_type", "bytes"), 6: Part("denotation", "bytes")}
TENSOR_TYPE: Message = {1: Part("elem_type", "whole"), 2: Part("shape", "bytes")}
SHAPE: Message = {1: Part("dim", "bytes", repeated=True)}
DIMENSION: Message = {1: Part("dim_value", "whole"), 2: Part("dim_param", "bytes"), 3: Part("denotation", "bytes")}

Parts = dict[str, list[Any]]
"""Of a message: each field that is there, with its values: a whole number, or the span of anything else."""
Constants = ChainMap[str, list[int]]
"""Of a graph and those around it: the short vectors of whole numbers that are known before it runs, by name."""


def check_onnx(path: Path) -> Metadata:
    """Return an ONNX file's metadata, if the file is one of ml-export's and can be opened without harm.

    Refused are files that are damaged, larger than 2 GiB, or without our metadata; weights in other files, wherever;
    operators that are not ONNX's own; local functions, sparse and text tensors; tensors whose shape does not fit their
    data; graphs whose input and outputs are not those of ml-export; operators that may run without end or that make
    more than LIMIT_MADE elements from a constant shape; and every part that onnx.proto does not have.

    Not found are changed weights (there is no checksum), and tensors that become too large by computed shapes, by
    scales, or by many nodes one after another: an operator asks for memory as it runs, and only the system limits it.

    Raises: CheckpointError with the reason.
    """
    size = path.stat().st_size
    if size > LIMIT_BYTES:
        raise CheckpointError(f"{path} has {size:,} bytes, but an ONNX file has at most {LIMIT_BYTES:,}: it is not one")
    if not size:
        raise CheckpointError(f"{path} is empty: export the checkpoint again with ml-export")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _OnnxFile(path, data).check()


class _OnnxFile:
    """The bytes of a file that may be anything, and what is asked of them."""

    def __init__(self, path: Path, data: mmap.mmap | bytes) -> None:
        self.path, self.data = path, data
        self.parts_left = LIMIT_PARTS

    def check(self) -> Metadata:
        """Look at everything; return the metadata."""
        model = self._read(MODEL, Span(0, len(self.data)))
        if "graph" not in model or "ir_version" not in model:
            raise self._damaged("it has no graph")
        metadata = Metadata.from_strings(self._properties(model), self.path)
        for span in model.get("opset_import", []):
            self._require_standard(self._text(self._read(OPSET, span), "domain"))
        for name in ("functions", "training_info"):
            if name in model:
                raise self._unsafe(f"it has {name}, which the files of ml-export do not have")
        graph = self._read(GRAPH, model["graph"][0])
        self._check_graph(graph, ChainMap(), depth=1)
        self._check_ends(graph, metadata)
        return metadata

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is no ONNX file, or it is damaged ({reason}): export the checkpoint again with ml-export"
        )

    def _unsafe(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is not opened, because {reason}: give a file that ml-export wrote")

    # the wire format

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        """Return a whole number in 0..2^64 - 1 and where it ends."""
        value = 0
        for shift in range(0, 70, 7):
            if position >= end:
                raise self._damaged("it is cut off")
            byte = self.data[position]
            position += 1
            value |= (byte & 127) << shift
            if byte < 128:
                if value >= 2**64:
                    break
                return value, position
        raise self._damaged("it has a number that is too long")

    def _read(self, message: Message, span: Span) -> Parts:
        """Return the parts of a message, each of which lies within it. Parts that may stand once, do."""
        found: Parts = {}
        position, end = span
        while position < end:
            self.parts_left -= 1
            if self.parts_left < 0:
                raise self._unsafe(f"it has more than {LIMIT_PARTS:,} parts")
            tag, position = self._varint(position, end)
            part = message.get(tag >> 3)
            if part is None or tag & 7 not in WIRES[part.kind]:
                raise self._damaged(f"byte {position:,} begins a part that ONNX does not have")
            if part.name in found and not part.repeated:  # others would join the two, or take the last one
                raise self._damaged(f"{part.name} is there twice")
            value, position = self._value(tag & 7, position, end)
            found.setdefault(part.name, []).append(value)
        return found

    def _value(self, wire: int, position: int, end: int) -> tuple[int | Span, int]:
        """Return a whole number, or the span of anything else, and where it ends."""
        if wire == 0:
            return self._varint(position, end)
        length = {1: 8, 5: 4}.get(wire)
        if length is None:
            length, position = self._varint(position, end)
        if length > end - position:
            raise self._damaged("it is cut off")
        return Span(position, position + length), position + length

    def _text(self, parts: Parts, name: str, limit: int = LIMIT_TEXT) -> str:
        """Return a text; empty where it is not there."""
        return self._decoded(parts[name][0], limit) if name in parts else ""

    def _decoded(self, span: Span, limit: int = LIMIT_TEXT) -> str:
        if span.end - span.start > limit:
            raise self._unsafe(f"it has a text of {span.end - span.start:,} bytes where a name is expected")
        try:
            return self.data[span.start : span.end].decode()
        except UnicodeDecodeError:
            raise self._damaged("a name in it is not text") from None

    def _number(self, parts: Parts, name: str) -> int:
        """Return what protobuf keeps as int32, where all that ONNX writes is small."""
        value: int = parts.get(name, [0])[0]
        if value >= 2**31:  # engines cut off the upper bits
            raise self._damaged(f"{name} is {value}")
        return value

    def _numbers(self, values: list[Any]) -> Iterator[int]:
        """Yield signed whole numbers that stand one by one or packed."""
        for value in values:
            position, end = value if isinstance(value, Span) else (0, 0)
            packed = [] if isinstance(value, Span) else [value]
            while position < end:
                number, position = self._varint(position, end)
                packed.append(number)
            yield from (number - 2**64 if number >= 2**63 else number for number in packed)

    # what it means

    def _properties(self, model: Parts) -> dict[str, str]:
        """Return the strings of metadata_props."""
        strings = {}
        for span in model.get("metadata_props", []):
            entry = self._read(ENTRY, span)
            strings[self._text(entry, "key")] = self._text(entry, "value", LIMIT_METADATA)
        return strings

    def _require_standard(self, domain: str) -> None:
        if domain not in STANDARD:
            raise self._unsafe(f"it asks for operators of {_shown(domain)}, which are not ONNX's own")

    def _check_graph(self, graph: Parts, constants: Constants, depth: int) -> None:
        """Check tensors and nodes, and the graphs in them; `constants` are those around it, and get its own."""
        if depth > LIMIT_DEPTH:
            raise self._unsafe(f"it has graphs in graphs, more than {LIMIT_DEPTH} deep")
        if "sparse_initializer" in graph:
            raise self._unsafe("it has sparse tensors, which the files of ml-export do not have")
        for initializer in graph.get("initializer", []):
            name, values = self._check_tensor(initializer)
            if values is not None:
                constants[name] = values
        for node in graph.get("node", []):
            self._check_node(self._read(NODE, node), constants, depth)

    def _check_node(self, node: Parts, constants: Constants, depth: int) -> None:
        """Check an operator and what it is given; a short constant is added to `constants`."""
        operator = self._text(node, "op_type")
        self._require_standard(self._text(node, "domain"))
        if operator in UNBOUNDED_OPERATORS:
            raise self._unsafe(f"the operator {operator} could run without end or fill the memory")
        for span in node.get("attribute", []):
            values = self._check_attribute(self._read(ATTRIBUTE, span), constants, depth)
            if operator == "Constant" and values is not None and "output" in node:
                constants[self._decoded(node["output"][0])] = values
        self._check_result(operator, node.get("input", []), constants)

    def _check_result(self, operator: str, inputs: list[Span], constants: Constants) -> None:
        """Refuse a node that a constant tells to make something huge."""
        which = SIZE_INPUTS.get(operator, len(inputs))
        if which >= len(inputs):
            return
        sizes = constants.get(self._decoded(inputs[which]), [])
        if math.prod(max(1, abs(size)) for size in sizes) > LIMIT_MADE:
            raise self._unsafe(f"the operator {operator} in it makes a tensor of {_shown(sizes)}")

    def _check_attribute(self, attribute: Parts, constants: Constants, depth: int) -> list[int] | None:
        """Check tensors and graphs in an attribute; return its whole numbers, where it is a short vector of them."""
        if "sparse_tensor" in attribute or "sparse_tensors" in attribute:
            raise self._unsafe("it has sparse tensors, which the files of ml-export do not have")
        for span in (*attribute.get("g", []), *attribute.get("graphs", [])):
            self._check_graph(self._read(GRAPH, span), constants.new_child(), depth + 1)
        found = [self._check_tensor(span)[1] for span in (*attribute.get("t", []), *attribute.get("tensors", []))]
        if "ints" in attribute and _length(attribute["ints"]) <= LIMIT_TEXT:
            found.append(list(self._numbers(attribute["ints"])))
        if "i" in attribute:
            found.append(list(self._numbers(attribute["i"])))
        return found[0] if len(found) == 1 else None

    def _check_tensor(self, span: Span) -> tuple[str, list[int] | None]:
        """Check that a tensor has all its data, here; return its name and, of a short int64 vector, the values."""
        tensor = self._read(TENSOR, span)
        name, type_ = self._text(tensor, "name"), self._number(tensor, "data_type")
        if self._number(tensor, "data_location") != 0 or "external_data" in tensor:
            raise self._unsafe(f"the tensor {_shown(name)} is kept in another file")
        if type_ not in BITS or "string_data" in tensor or "segment" in tensor:
            raise self._unsafe(f"the tensor {_shown(name)} is of a kind that ml-export does not write")
        dims = tensor.get("dims", [])
        if _length(dims) > 10 * LIMIT_DIMENSIONS:  # bytes of that many numbers, packed
            raise self._unsafe(f"the tensor {_shown(name)} has more than {LIMIT_DIMENSIONS} dimensions")
        shape = list(self._numbers(dims))
        if len(shape) > LIMIT_DIMENSIONS or any(side < 0 for side in shape):
            raise self._unsafe(f"the tensor {_shown(name)} has the shape {_shown(shape)}")
        if not _fits(math.prod(shape), BITS[type_], tensor):
            raise self._damaged(f"the tensor {_shown(name)} of shape {_shown(shape)} has more or less data than that")
        return name, self._short_vector(tensor) if type_ == INT64 and math.prod(shape) <= LIMIT_DIMENSIONS else None

    def _short_vector(self, tensor: Parts) -> list[int]:
        """Return the values of an int64 tensor."""
        if "raw_data" not in tensor:
            return list(self._numbers(tensor.get("int64_data", [])))
        start, end = tensor["raw_data"][0]
        raw = self.data[start:end]
        return [int.from_bytes(raw[at : at + 8], "little", signed=True) for at in range(0, len(raw), 8)]

    def _check_ends(self, graph: Parts, metadata: Metadata) -> None:
        """Check that images go in, and labels and probabilities come out, as the metadata says."""
        channels, classes = metadata.channels, metadata.num_classes
        images = (None, None, None, channels) if metadata.layout == "NHWC" else (None, channels, None, None)
        inputs = {"images": (ELEMENT_TYPES[metadata.input_type], images)}
        outputs = {
            "labels": (ELEMENT_TYPES[metadata.label_type], (None, None, None)),
            "probabilities": (ELEMENT_TYPES["float32"], (None, classes, None, None)),
        }
        for end, expected in (("input", inputs), ("output", outputs)):
            infos = [self._read(VALUE_INFO, span) for span in graph.get(end, [])[: len(expected) + 1]]
            names = [self._text(info, "name") for info in infos]
            if sorted(names) != sorted(expected):
                raise self._unsafe(f"its {end}s are {_shown(names)} instead of {_shown(list(expected))}")
            for name, info in zip(names, infos, strict=True):
                if not self._agrees(info, *expected[name]):
                    raise self._unsafe(f"the shape or number type of {name} is not what its metadata say")

    def _agrees(self, info: Parts, element_type: int, shape: tuple[int | None, ...]) -> bool:
        """Whether a value has the number type and as many dimensions; those that it fixes have to be right."""
        for name, message in (("type", TYPE), ("tensor_type", TENSOR_TYPE)):
            if name not in info:
                return False
            info = self._read(message, info[name][0])
        if self._number(info, "elem_type") != element_type or "shape" not in info:
            return False
        spans = self._read(SHAPE, info["shape"][0]).get("dim", [])
        if len(spans) != len(shape):
            return False
        sides = [self._read(DIMENSION, span).get("dim_value", [None])[0] for span in spans]
        return all(None in (side, wanted) or side == wanted for side, wanted in zip(sides, shape, strict=True))


def _shown(value: object) -> str:
    """Return a value from the file as short text."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _length(values: list[Any]) -> int:
    """Return the bytes, at least, of numbers that stand one by one or packed."""
    return sum(value.end - value.start if isinstance(value, Span) else 1 for value in values)


def _fits(count: int, bits: int, tensor: Parts) -> bool:
    """Whether `count` elements can be what a tensor has as data: exactly so if raw, else it has enough bytes."""
    present = [name for name in DATA_FIELDS if name in tensor]
    if len(present) > 1:
        return False
    length = sum(_length(tensor[name]) for name in present)
    if present == ["raw_data"]:
        return length == -(-count * bits // 8)
    return count <= 2 * length and length <= 10 * count  # two of 4 bits share a number, which has 10 bytes at most
