"""Files from elsewhere are looked through before an engine opens them: what could do harm is refused in a sentence."""

import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_exports import METADATA, model_of, random_images, write_onnx, write_openvino
from onnx import TensorProto, helper, numpy_helper

from ml_src.core.errors import CheckpointError
from ml_src.core.export import onnx_file
from ml_src.core.export.onnx_file import check_onnx
from ml_src.core.export.openvino_file import check_openvino
from ml_src.core.export.runtime import open_exported

Change = Callable[[onnx.ModelProto], None]
FUZZ = 300
IMAGES = random_images((1, 3, 4, 2))


def refusal_of(path: Path) -> str:
    """The sentence with which a file is refused before its engine sees it."""
    check = check_onnx if path.suffix == ".onnx" else check_openvino
    with pytest.raises(CheckpointError) as refusal:
        check(path)
    sentence = str(refusal.value)
    assert str(path.with_suffix("")) in sentence and "\n" not in sentence and len(sentence) < 600
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        open_exported(path)
    return sentence


def point_elsewhere(tensor: onnx.TensorProto, location: str) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


def branches(depth: int, inside: list[onnx.NodeProto]) -> onnx.NodeProto:
    """An `If` in whose first branch is an `If`, and so on; in the innermost one are the given nodes."""
    nodes = inside if depth == 1 else [branches(depth - 1, inside)]
    zeros = of_tensor(numpy_helper.from_array(np.zeros(2, np.float32)))
    first, second = (
        helper.make_graph(
            each, "branch", [], [helper.make_tensor_value_info(each[-1].output[0], TensorProto.FLOAT, None)]
        )
        for each in (nodes, [zeros])
    )
    return helper.make_node("If", ["condition"], [f"chosen{depth}"], then_branch=first, else_branch=second)


def add_branches(model: onnx.ModelProto, depth: int, *inside: onnx.NodeProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "condition"))
    model.graph.node.append(branches(depth, list(inside)))


def of_tensor(tensor: onnx.TensorProto) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["made"], value=tensor)


def elsewhere() -> onnx.TensorProto:
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "secret")
    point_elsewhere(tensor, "/etc/passwd")
    return tensor


def huge(operator: str, *before: str) -> Change:
    """An operator that is to make 2^40 elements, its size an initializer."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array([2**20, 2**20]), "size"))
        model.graph.node.append(helper.make_node(operator, [*before, "size"], ["made"]))

    return change


def huge_from_node(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["size"], value_ints=[2**20, 2**20]))
    model.graph.node.append(helper.make_node("ConstantOfShape", ["size"], ["made"]))


def add_function(model: onnx.ModelProto) -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    model.functions.append(helper.make_function("own", "Trick", ["x"], ["y"], [node], [helper.make_opsetid("", 20)]))


def add_sparse(model: onnx.ModelProto) -> None:
    values, indices = (numpy_helper.from_array(np.array([1]), name) for name in ("values", "indices"))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2**40]))


def with_raw(dims: list[int], kind: int = TensorProto.FLOAT, size: int = 16) -> Change:
    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(onnx.TensorProto(name="odd", dims=dims, data_type=kind, raw_data=bytes(size)))

    return change


def add_node(operator: str, domain: str = "") -> Change:
    return lambda model: model.graph.node.append(helper.make_node(operator, ["images"], ["made"], domain=domain))


def add_text(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(helper.make_tensor("words", TensorProto.STRING, [1], [b"word"]))


HOSTILE: dict[str, tuple[Change, str]] = {
    "weights beside it": (
        lambda m: point_elsewhere(m.graph.initializer[0], "weights.bin"),
        "'mean' is kept in another",
    ),
    "weights above it": (lambda m: point_elsewhere(m.graph.initializer[0], "../../etc/passwd"), "kept in another file"),
    "weights anywhere": (lambda m: point_elsewhere(m.graph.initializer[0], "/etc/passwd"), "kept in another file"),
    "weights in memory": (lambda m: point_elsewhere(m.graph.initializer[0], "*/_ORT_MEM_ADDR_/*"), "in another file"),
    "a path and no location": (lambda m: m.graph.initializer[0].external_data.add(key="location"), "in another file"),
    "weights elsewhere in a node": (lambda m: m.graph.node.append(of_tensor(elsewhere())), "kept in another file"),
    "weights elsewhere in a branch": (lambda m: add_branches(m, 2, of_tensor(elsewhere())), "kept in another file"),
    "an own operator": (add_node("Relu", "my.operators"), "'my.operators', which are not ONNX's own"),
    "an own operator in a branch": (
        lambda m: add_branches(m, 1, helper.make_node("Own", [], ["made"], domain="own")),
        "operators of 'own'",
    ),
    "own operators announced": (lambda m: m.opset_import.append(helper.make_opsetid("own", 1)), "operators of 'own'"),
    "Microsoft's operators": (add_node("EPContext", "com.microsoft"), "operators of 'com.microsoft'"),
    "a local function": (add_function, "it has functions"),
    "training": (lambda m: m.training_info.add(), "it has training_info"),
    "a sparse tensor": (add_sparse, "sparse tensors"),
    "a text": (add_text, "'words' is of a kind"),
    "a number type of the future": (with_raw([4], kind=99), "'odd' is of a kind"),
    "a loop": (add_node("Loop"), "operator Loop could run without end"),
    "graphs without end": (lambda m: add_branches(m, 10, of_tensor(numpy_helper.from_array(np.zeros(1)))), "8 deep"),
    "billions of elements": (with_raw([10**9, 10**9]), "'odd' of shape [1000000000, 1000000000] has more or less"),
    "too few elements": (with_raw([2]), "'odd' of shape [2] has more or less data"),
    "elements that overflow to few": (with_raw([2**32, 2**32, 4], size=0), "has more or less data"),
    "less than no elements": (with_raw([-1]), "has the shape [-1]"),
    "many dimensions": (with_raw([1] * 17, size=4), "more than 16 dimensions|has the shape"),
    "a huge constant": (huge("ConstantOfShape"), "ConstantOfShape in it makes a tensor of [1048576, 1048576]"),
    "a huge constant, its size from a node": (huge_from_node, "ConstantOfShape in it makes a tensor"),
    "a huge copy": (huge("Expand", "mean"), "Expand in it makes a tensor"),
    "a huge tile": (huge("Tile", "mean"), "Tile in it makes a tensor"),
    "a huge enlargement": (huge("Resize", "mean", "", ""), "Resize in it makes a tensor"),
    "no graph": (lambda m: m.ClearField("graph"), "it has no graph"),
    "another input": (lambda m: setattr(m.graph.input[0], "name", "x"), "its inputs are ['x'] instead of ['images']"),
    "two inputs": (lambda m: m.graph.input.append(m.graph.output[0]), "its inputs are ['images', 'labels']"),
    "one output": (lambda m: m.graph.output.pop(), "its outputs are ['labels'] instead of"),
    "another number type": (
        lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", TensorProto.FLOAT),
        "number type of images is not what",
    ),
    "another number of classes": (
        lambda m: setattr(m.graph.output[1].type.tensor_type.shape.dim[1], "dim_value", 4),
        "shape or number type of probabilities",
    ),
    "a shape too short": (lambda m: m.graph.output[0].type.tensor_type.shape.dim.pop(), "number type of labels"),
    "no shape": (lambda m: m.graph.output[0].ClearField("type"), "number type of labels"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_graph_is_refused_before_it_is_opened(what: str, tmp_path: Path) -> None:
    change, reason = HOSTILE[what]
    model = model_of(METADATA)
    change(model)
    path = tmp_path / "best.onnx"
    path.write_bytes(model.SerializeToString())
    assert any(each in refusal_of(path) for each in reason.split("|"))


def test_a_constant_of_ordinary_size_and_a_branch_are_opened(tmp_path: Path) -> None:
    model = model_of(METADATA)
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 3]), "size"))
    model.graph.node.append(helper.make_node("ConstantOfShape", ["size"], ["zeros"]))
    add_branches(model, 3, of_tensor(numpy_helper.from_array(np.zeros(2, np.float32))))
    (tmp_path / "best.onnx").write_bytes(model.SerializeToString())
    assert open_exported(tmp_path / "best.onnx").labels(IMAGES).shape == IMAGES.shape[:3]


def test_a_file_of_another_program_is_sent_to_ml_export(tmp_path: Path) -> None:
    model = model_of(METADATA)
    del model.metadata_props[:]
    (tmp_path / "best.onnx").write_bytes(model.SerializeToString())
    assert (
        onnxruntime.InferenceSession(tmp_path / "best.onnx").get_inputs()[0].name == "images"
    )  # nothing else is wrong
    assert "give a file that ml-export wrote" in refusal_of(tmp_path / "best.onnx")


def varint(value: int) -> bytes:
    """A whole number as protobuf writes it."""
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def field(number: int, contents: bytes | int) -> bytes:
    """A field as protobuf writes it."""
    if isinstance(contents, int):
        return varint(number << 3) + varint(contents)
    return varint(number << 3 | 2) + varint(len(contents)) + contents


GOOD = model_of(METADATA).SerializeToString()
ELSEWHERE = field(8, b"odd") + field(2, 1) + field(1, 4) + field(9, bytes(16))
DAMAGED = {
    "nothing": (b"", "is empty"),
    "text": (b"This is no model.\n", "is no ONNX file, or it is damaged"),
    "a zip file": (b"PK\x03\x04" + bytes(60), "is no ONNX file"),
    "zeros": (bytes(1000), "begins a part that ONNX does not have"),
    "an unknown field": (GOOD + field(99, b"x"), "begins a part that ONNX does not have"),
    "a group": (GOOD + varint(7 << 3 | 3), "begins a part that ONNX does not have"),
    "a graph for a number": (GOOD + field(1, b"x"), "begins a part that ONNX does not have"),
    "a number without end": (GOOD + varint(5 << 3) + b"\xff" * 30, "a number that is too long"),
    "a length beyond the end": (GOOD + varint(6 << 3 | 2) + varint(2**40) + b"x", "it is cut off"),
    "a second graph, which others would join to the first": (
        GOOD + field(7, field(1, field(4, b"Own") + field(7, b"own"))),
        "graph is there twice",
    ),
    "a location that is external in its lower bits": (
        field(8, field(2, 20)) + GOOD + field(7, field(5, ELSEWHERE + field(14, 2**32 + 1))),
        "graph is there twice",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_bytes_that_are_no_onnx_are_refused(what: str, tmp_path: Path) -> None:
    contents, reason = DAMAGED[what]
    (tmp_path / "best.onnx").write_bytes(contents)
    assert reason in refusal_of(tmp_path / "best.onnx")


def test_a_number_whose_lower_bits_mean_external_is_refused(tmp_path: Path) -> None:
    model = model_of(METADATA)
    graph = model.graph.SerializeToString() + field(5, ELSEWHERE + field(14, 2**32 + 1))
    model.ClearField("graph")
    (tmp_path / "best.onnx").write_bytes(model.SerializeToString() + field(7, graph))
    assert "data_location is 4294967297" in refusal_of(tmp_path / "best.onnx")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_file_that_is_cut_off_is_refused(share: float, tmp_path: Path) -> None:
    (tmp_path / "best.onnx").write_bytes(GOOD[: int(len(GOOD) * share)])
    assert "best.onnx" in refusal_of(tmp_path / "best.onnx")


def test_onnx_runtimes_own_format_is_refused_under_any_name(tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "best.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(write_onnx(tmp_path / "plain.onnx"), options)
    (tmp_path / "best.ort").rename(tmp_path / "best.onnx")
    assert "is no ONNX file" in refusal_of(tmp_path / "best.onnx")


def test_a_file_beyond_what_onnx_can_hold_is_refused_unread(tmp_path: Path) -> None:
    write_onnx(tmp_path / "best.onnx")
    os.truncate(tmp_path / "best.onnx", 2**31)  # zeros that take no space on the disk
    assert "has 2,147,483,648 bytes" in refusal_of(tmp_path / "best.onnx")


def test_a_file_of_too_many_parts_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "LIMIT_PARTS", 10_000)
    (tmp_path / "best.onnx").write_bytes(GOOD + field(8, b"") * 10_000)
    assert "it has more than 10,000 parts" in refusal_of(tmp_path / "best.onnx")


@given(st.integers(0, 2**64 - 1))
def test_whole_numbers_are_read_as_protobuf_writes_them(value: int) -> None:
    model = onnx.ModelProto(model_version=value - 2**64 if value >= 2**63 else value).SerializeToString()
    reader = onnx_file._OnnxFile(Path("best.onnx"), model)
    assert reader._read(onnx_file.MODEL, onnx_file.Span(0, len(model))) == {"model_version": [value]}


@settings(max_examples=100)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=16), st.booleans())
def test_short_vectors_are_read_as_onnx_writes_them(values: list[int], raw: bool) -> None:
    tensor = helper.make_tensor("v", TensorProto.INT64, [len(values)], values)
    if raw:
        tensor = numpy_helper.from_array(np.array(values, np.int64), "v")
    contents = tensor.SerializeToString()
    reader = onnx_file._OnnxFile(Path("best.onnx"), contents)
    assert reader._check_tensor(onnx_file.Span(0, len(contents))) == ("v", values)


def test_the_fields_are_those_of_onnx() -> None:
    messages = {
        onnx.ModelProto: onnx_file.MODEL, onnx.GraphProto: onnx_file.GRAPH, onnx.NodeProto: onnx_file.NODE,
        onnx.AttributeProto: onnx_file.ATTRIBUTE, onnx.TensorProto: onnx_file.TENSOR, onnx.TypeProto.Tensor:
        onnx_file.TENSOR_TYPE, onnx.TensorShapeProto: onnx_file.SHAPE, onnx.ValueInfoProto: onnx_file.VALUE_INFO,
        onnx.TensorShapeProto.Dimension: onnx_file.DIMENSION, onnx.OperatorSetIdProto: onnx_file.OPSET,
        onnx.StringStringEntryProto: onnx_file.ENTRY,
    }  # fmt: skip
    for message, ours in messages.items():
        theirs = {(one.number, one.name) for one in message.DESCRIPTOR.fields}
        assert {(number, part.name) for number, part in ours.items()} == theirs, message


def mutated(contents: bytes, seed: int) -> bytes:
    """Contents with some bytes flipped, replaced, removed, inserted, repeated, or all after one cut off."""
    draw, changed = random.Random(seed), bytearray(contents)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        at = draw.randrange(len(changed))
        match draw.choice(["replace", "replace", "replace", "flip", "remove", "insert", "repeat", "cut"]):
            case "replace":
                changed[at] = draw.randrange(256)
            case "flip":
                changed[at] ^= 1 << draw.randrange(8)
            case "remove":
                del changed[at : at + draw.randrange(1, 9)]
            case "insert":
                changed[at:at] = draw.randbytes(draw.randrange(1, 5))
            case "repeat":
                start = draw.randrange(len(changed))
                changed[at:at] = changed[start : start + draw.randrange(1, 60)]
            case "cut":
                del changed[at:]
        changed = changed or bytearray(1)
    return bytes(changed)


def survives(path: Path) -> bool:
    """Whether a file is opened; where it is, it predicts, or says that it cannot."""
    try:
        exported = open_exported(path, "cpu", threads=1)
    except CheckpointError:
        return False
    try:
        assert exported.labels(IMAGES).shape == IMAGES.shape[:3]
    except CheckpointError as refusal:
        assert str(path) in str(refusal)
    return True


def test_damaged_onnx_files_are_refused_or_work_and_nothing_else_happens(tmp_path: Path) -> None:
    end = GOOD.index(b"description")  # behind it are the metadata
    opened = 0
    for seed in range(FUZZ):
        (tmp_path / "best.onnx").write_bytes(mutated(GOOD[:end], seed) + GOOD[end:])
        opened += survives(tmp_path / "best.onnx")
    assert 0 < opened < FUZZ


def test_damaged_openvino_files_are_refused_or_work_and_nothing_else_happens(tmp_path: Path) -> None:
    contents = write_openvino(tmp_path / "best.xml").read_bytes()
    opened = 0
    for seed in range(FUZZ):
        (tmp_path / "best.xml").write_bytes(mutated(contents, seed))
        opened += survives(tmp_path / "best.xml")
    assert 0 < opened < FUZZ


def edited(path: Path, *pairs: tuple[str, str]) -> None:
    """Replace the first of each text in a file."""
    text = path.read_text()
    for old, new in pairs:
        assert re.search(old, text)
        text = re.sub(old, new, text, count=1)
    path.write_text(text)


TAG = r"<net name"
ENTITIES = '<!DOCTYPE net [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>\n<net name'
HOSTILE_XML = {
    "a document type": ([(TAG, ENTITIES)], "declares a document type"),
    "another file as entity": (
        [(TAG, '<!DOCTYPE net [<!ENTITY x SYSTEM "file:///etc/passwd">]>\n<net name')],
        "declares a document type",
    ),
    "another encoding": ([(r'<\?xml version="1.0"', '<?xml version="1.0" encoding="utf-7"')], "utf-7|damaged"),
    "a layer of an extension": ([(r'version="opset\d+"', 'version="extension"')], "of 'extension' is not one of"),
    "a layer of experimental": ([(r'version="opset\d+"', 'version="experimental"')], "is not one of OpenVINO's own"),
    "a layer of no one": ([(r'version="opset\d+"', "")], "is not one of OpenVINO's own"),
    "a loop": ([(r'type="\w+" version="opset\d+"', 'type="Loop" version="opset5"')], "Loop could run without end"),
    "a constant behind the end": ([(r'offset="\d+"', 'offset="4096"')], "does not lie within best.bin"),
    "a constant before the start": ([(r'offset="\d+"', 'offset="-8"')], "does not lie within best.bin"),
    "a constant that is too long": ([(r'size="\d+"', 'size="99999"')], "does not lie within best.bin"),
    "a constant without data": ([(r'size="\d+"', "")], "does not lie within best.bin"),
    "a constant of texts": ([(r'element_type="f32"', 'element_type="string"')], "or is of an unknown type"),
    "a constant of billions": ([(r'(Const.*\s+<data .*shape=")[^"]*', r"\g<1>99999999, 99999999")], "has more or less"),
    "a constant of a dynamic shape": ([(r'(Const.*\s+<data .*shape=")[^"]*', r"\g<1>?")], "has more or less"),
    "another version": ([(r'version="11"', 'version="10"')], "no OpenVINO model of version 11"),
    "other XML": ([(r"<net ", "<svg "), (r"</net>", "</svg>")], "no OpenVINO model of version 11"),
    "elements without end": ([(r"<layers>", "<a>" * 70 + "</a>" * 70 + "<layers>")], "more than 64 deep"),
    "half of it": ([(r"(?s)<edges>.*", "")], "is no OpenVINO model, or it is damaged"),
    "no metadata": (
        [(r'(?s)<info name="OpenVINO Runtime".*</rt_info>', "</rt_info>")],
        "give a file that ml-export wrote",
    ),
}


@pytest.mark.parametrize("what", HOSTILE_XML)
def test_a_hostile_openvino_model_is_refused_before_it_is_opened(what: str, tmp_path: Path) -> None:
    pairs, reason = HOSTILE_XML[what]
    edited(write_openvino(tmp_path / "best.xml"), *pairs)
    assert any(each in refusal_of(tmp_path / "best.xml") for each in reason.split("|"))


def test_constants_that_overlap_are_refused(tmp_path: Path) -> None:
    path = write_openvino(tmp_path / "best.xml")
    layer = '<layer id="{0}" name="c{0}" type="Const" version="opset1">{1}</layer>'
    data = '<data element_type="u8" shape="{1}" offset="{0}" size="{1}"/>'
    size = path.with_suffix(".bin").stat().st_size
    layers = [layer.format(at, data.format(at, size - at)) for at in range(9)]
    edited(path, ("</layers>", "".join(layers) + "</layers>"))
    assert "overlap" in refusal_of(path)


def test_an_openvino_model_whose_ends_are_others_is_refused(tmp_path: Path) -> None:
    path = write_openvino(tmp_path / "best.xml")
    edited(path, ('names="images"', 'names="pictures"'))
    with pytest.raises(CheckpointError, match="other inputs and outputs than the files of ml-export"):
        open_exported(path)


def test_an_openvino_model_without_its_weights_says_which_file_is_missing(tmp_path: Path) -> None:
    path = write_openvino(tmp_path / "best.xml")
    path.with_suffix(".bin").unlink()
    with pytest.raises(CheckpointError, match=r"best\.bin is not there, .*copy both files"):
        open_exported(path)


def test_text_of_another_kind_is_no_openvino_model(tmp_path: Path) -> None:
    path = write_openvino(tmp_path / "best.xml")
    for contents in (b"", b"hello", b"\xff\xfe\x00", b'{"a": 1}'):
        path.write_bytes(contents)
        assert "is no OpenVINO model, or it is damaged" in refusal_of(path)
