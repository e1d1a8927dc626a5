"""What an exported file says about itself survives as strings, and what it cannot say is refused."""

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from known_exports import METADATA, metadata_of

from ml_src.core.errors import CheckpointError
from ml_src.core.export.metadata import CHECKS, Metadata

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
size = st.none() | st.lists(st.integers(1, 10**6), min_size=2, max_size=2)


@given(
    class_names=st.lists(st.text(), min_size=1, max_size=5),
    ignore_index=st.integers(-(10**6), 10**6),
    resize=size,
    training_size=size,
    metrics=st.dictionaries(st.text(), plain),
    privacy=st.none() | st.dictionaries(st.text(), plain),
    config=st.dictionaries(st.text(), plain),
    mirror=st.booleans(),
)
def test_any_metadata_come_back_from_their_strings(**values: Any) -> None:
    metadata = replace(METADATA, colours=[[1, 2, 3]] * len(values["class_names"]), **values)
    assert Metadata.from_strings(metadata.to_strings()) == metadata


def test_every_value_is_a_string_of_plain_ascii_so_that_every_format_can_hold_it() -> None:
    strings = replace(METADATA, class_names=["Straße", "建物", 'a "b"\n<c>']).to_strings()
    values = [value for key, value in strings.items() if key != "description"]
    assert all(value.isascii() and value.isprintable() for value in values)
    assert len(values) == len(fields(Metadata)) == len(CHECKS)


def test_the_description_names_the_classes_and_shapes_for_people() -> None:
    text = METADATA.to_strings()["description"]
    assert "1 cell" in text and "(N, H, W, C) uint8" in text and "(N, 3, H, W) float32" in text
    assert "(N, C, H, W) uint16" in replace(METADATA, layout="NCHW", input_type="uint16").description


@pytest.mark.parametrize(("num_classes", "expected"), [(2, "uint8"), (256, "uint8"), (257, "uint16")])
def test_labels_are_uint16_above_256_classes(num_classes: int, expected: str) -> None:
    assert metadata_of(num_classes).label_type == expected


def test_keys_of_other_programs_are_passed_over() -> None:
    assert Metadata.from_strings({**METADATA.to_strings(), "author": "someone", "ml_src.future": "{"}) == METADATA


def test_a_file_without_our_metadata_is_sent_to_ml_export() -> None:
    with pytest.raises(CheckpointError, match=r"other\.onnx .*give a file that ml-export wrote"):
        Metadata.from_strings({"author": "someone"}, "other.onnx")


def test_a_later_version_is_told_from_damage() -> None:
    strings = {**METADATA.to_strings(), "ml_src.format_version": "2", "ml_src.mean": '"otherwise"'}
    with pytest.raises(CheckpointError, match="later version of this program: update"):
        Metadata.from_strings(strings)


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_no_field_may_be_missing(name: str) -> None:
    strings = METADATA.to_strings()
    del strings[f"ml_src.{name}"]
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        Metadata.from_strings(strings)


WRONG = {
    "class_names": ["[]", "[1]", '"cell"', "null", '{"a": 1}'],
    "colours": ["[[0, 0, 0]]", "[[0, 0, 256], [0, 0, 0], [0, 0, 0]]", "[[0, 0], [0, 0], [0, 0]]", "[1, 2, 3]"],
    "channels": ["0", "-1", "2.0", "true", "null", "1" + "0" * 400],
    "input_type": ['"float64"', "3", "[]"],
    "layout": ['"HWC"', "null"],
    "mean": ["[]", "[0.1, 0.2, 0.3]", "[NaN, 0]", "[Infinity, 0]", '["0.5", 0]', f"[1{'0' * 400}, 0]"],
    "std": ["[0, 1]", "[-1, 1]", "[1, 1, 1]", "[NaN, 1]"],
    "resize": ["[0, 1]", "[1]", "64", "[1.5, 2]"],
    "training_size": ["[64, 64, 3]", "false"],
    "ignore_index": ["null", "255.0", "true"],
    "postprocess": ["[1]", "{}"],
    "mirror": ["1", "null"],
    "metrics": ["[]"],
    "privacy": ["[]", "1"],
    "versions": ['{"torch": 2}', "[]"],
    "checkpoints": ["[]", "[{}]", '[{"name": "a", "sha256": "b", "weight": "1"}]'],
    "encoder_licence": ["1"],
    "precision": ['"fp64"'],
    "config": ["null", "[]"],
    "format_version": ["0", '"1"', "1.5", "true"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in WRONG.items() for text in texts])
def test_a_field_of_another_kind_is_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(CheckpointError, match=r"^the metadata in best\.onnx is damaged \(.*with ml-export$") as refusal:
        Metadata.from_strings({**METADATA.to_strings(), f"ml_src.{name}": text}, "best.onnx")
    assert name in str(refusal.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "9" * 10_000, "\x00"])
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="config is not JSON"):
        Metadata.from_strings({**METADATA.to_strings(), "ml_src.config": text})


@given(plain, st.sampled_from(sorted(CHECKS)))
def test_any_json_in_any_field_is_taken_or_refused_and_nothing_else(value: Any, name: str) -> None:
    strings = {**METADATA.to_strings(), f"ml_src.{name}": json.dumps(value)}
    try:
        assert getattr(Metadata.from_strings(strings), name) == value
    except CheckpointError as refusal:
        assert name in str(refusal) or (name == "format_version" and "later version" in str(refusal))
