"""Looks through an OpenVINO model, a .xml with its .bin, before OpenVINO opens it; imports it without telemetry.

The counterpart of `onnx_file.py`. Next: `runtime.py`.
"""

import math
import re
import sys
from pathlib import Path
from typing import Any
from xml.parsers import expat

from ml_src.core.errors import CheckpointError, ConfigError
from ml_src.core.export.metadata import Metadata

LIMIT_XML = 2**26
LIMIT_WEIGHTS = 2**31 - 1  # as for ONNX
LIMIT_DEPTH = 64
LIMIT_SIDE_DIGITS = 18

OPSET = re.compile(r"opset[1-9]\d?")
UNBOUNDED_LAYERS = ("Loop", "TensorIterator", "RandomUniform")
BITS = {
    "f64": 64, "f32": 32, "f16": 16, "bf16": 16, "i64": 64, "i32": 32, "i16": 16, "i8": 8, "i4": 4,
    "u64": 64, "u32": 32, "u16": 16, "u8": 8, "u4": 4, "boolean": 8,
}  # fmt: skip
"""Bits of an element of each number type that a constant may have; text is not among them."""


def weights_of(path: Path) -> Path:
    """Return the .bin of a .xml."""
    return path.with_suffix(".bin")


def import_openvino() -> Any:
    """Return the library, which from then on finds no program to send its statistics with.

    Raises: ConfigError where it is not installed.
    """
    # it reports even its own import, by this package or else by a stub; opting out would write into the user's home
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise ConfigError(
            f"OpenVINO models need OpenVINO, which cannot be imported ({error}): pip install 'ml-src[openvino]'"
        ) from error
    return openvino


def check_openvino(path: Path) -> Metadata:
    """Return the metadata of a .xml, if the file is one of ml-export's and can be opened with its .bin without harm.

    Refused are a missing .bin; files that are too large; XML that is not well-formed, has a document type (and with it
    entities) or another encoding than UTF-8; layers that are not OpenVINO's own, or may run without end; constants
    that do not lie in the .bin, overlap there, or whose shape does not fit their size.

    Not found are changed weights (there is no checksum), and tensors that become too large as the network runs.

    Raises: CheckpointError with the reason.
    """
    weights = weights_of(path)
    if not weights.is_file():
        raise CheckpointError(f"{weights} is not there, but {path} has its weights in it: copy both files")
    for one, limit in ((path, LIMIT_XML), (weights, LIMIT_WEIGHTS)):
        if one.stat().st_size > limit:
            raise CheckpointError(f"{one} has more than {limit:,} bytes: give a file that ml-export wrote")
    file = _OpenVinoFile(path, weights.stat().st_size)
    file.read()
    return Metadata.from_strings(file.strings, path)


class _OpenVinoFile:
    """What an XML parser meets, looked at as it comes; no tree is built of it."""

    def __init__(self, path: Path, weights_size: int) -> None:
        self.path, self.weights_size = path, weights_size
        self.strings: dict[str, str] = {}
        self.blobs: set[tuple[int, int]] = set()  # offset and size of the constants so far
        self.tags: list[str] = []  # from the root to where the parser is
        self.layer: dict[str, str] = {}

    def read(self) -> None:
        """Look at everything; `strings` are the metadata then."""
        parser = expat.ParserCreate()
        parser.XmlDeclHandler = self._declare
        parser.StartDoctypeDeclHandler = self._refuse_document_type
        parser.StartElementHandler = self._begin
        parser.EndElementHandler = self._end
        try:
            text = self.path.read_bytes().decode()
            parser.Parse(text, True)
        except (expat.ExpatError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"{self.path} is no OpenVINO model, or it is damaged ({error}): "
                "export the checkpoint again with ml-export"
            ) from None
        if sum(size for _, size in self.blobs) > self.weights_size:
            raise self._refusal("its constants overlap in the .bin")

    def _refusal(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is not opened, because {reason}: give a file that ml-export wrote")

    def _declare(self, version: str, encoding: str | None, standalone: int) -> None:
        if encoding is not None and encoding.lower() != "utf-8":
            raise self._refusal(f"it is written in {encoding} instead of UTF-8")

    def _refuse_document_type(self, *_: object) -> None:
        raise self._refusal("it declares a document type, with which XML can be made to read other files")

    def _begin(self, tag: str, attributes: dict[str, str]) -> None:
        if not self.tags and (tag != "net" or attributes.get("version") != "11"):
            raise self._refusal("it is no OpenVINO model of version 11")
        if len(self.tags) >= LIMIT_DEPTH:
            raise self._refusal(f"its elements are more than {LIMIT_DEPTH} deep")
        parent = self.tags[-1] if self.tags else ""
        if tag == "layer":
            self._check_layer(attributes)
        elif tag == "data" and parent == "layer" and self.layer.get("type") == "Const":
            self._check_constant(attributes)
        elif self.tags == ["net", "rt_info"]:
            self.strings[attributes.get("name", tag)] = attributes.get("value", "")
        self.tags.append(tag)

    def _end(self, _: str) -> None:
        self.tags.pop()

    def _check_layer(self, layer: dict[str, str]) -> None:
        """Refuse layers that OpenVINO does not bring along, and those without end."""
        type_, version = layer.get("type", ""), layer.get("version", "")
        if not OPSET.fullmatch(version):
            raise self._refusal(f"the layer {type_[:80]!r} of {version[:80]!r} is not one of OpenVINO's own")
        if type_ in UNBOUNDED_LAYERS:
            raise self._refusal(f"a layer {type_} could run without end or fill the memory")
        self.layer = layer

    def _check_constant(self, data: dict[str, str]) -> None:
        """Check that a constant lies within the .bin and is as large as its shape says."""
        name = f"the constant {self.layer.get('name', '')[:80]!r}"
        offset, size = _whole(data.get("offset")), _whole(data.get("size"))
        shape = [_whole(side) for side in data.get("shape", "").split(",") if side.strip()]
        bits = BITS.get(data.get("element_type", ""))
        if offset is None or size is None or bits is None or offset + size > self.weights_size:
            raise self._refusal(f"{name} does not lie within {weights_of(self.path).name}, or is of an unknown type")
        sides = [side for side in shape if side is not None]
        if len(sides) < len(shape) or -(-math.prod(sides) * bits // 8) != size:
            raise self._refusal(f"{name} of shape ({data.get('shape', '')[:80]}) has more or less data than that")
        self.blobs.add((offset, size))


def _whole(text: str | None) -> int | None:
    """Return the whole number, 0 or more, that a text says, or None."""
    text = (text or "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= LIMIT_SIDE_DIGITS else None
