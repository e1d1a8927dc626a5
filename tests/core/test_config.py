"""The configuration: typed, complete in its complaints, and quick to answer."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ml_src.core.config import Config
from ml_src.core.config_file import load_config, parse_config, parse_set, plain, to_yaml
from ml_src.core.errors import ConfigError
from ml_src.core.transforms import TRANSFORM_REGISTRY
from ml_src.core.transforms.geometric import Canvas, Geometric
from ml_src.core.transforms.source import Arrays

MINIMAL: dict[str, Any] = {"data": {"data_dir": "data/x", "num_classes": 3}}


def message(raw: Any, **overrides: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw, overrides, source="a.yaml")
    return str(caught.value)


def test_exponents_that_yaml_reads_as_text_become_numbers() -> None:
    raw = {**MINIMAL, "optimizer": yaml.safe_load("{lr: 1e-5}")}
    assert raw["optimizer"]["lr"] == "1e-5"
    assert parse_config(raw).optimizer.lr == 1e-5


def test_every_mistake_of_a_file_is_reported_at_once() -> None:
    raw = {
        "data": {"data_dir": "x", "num_clases": 3},
        "training": {"batchsize": 2, "trainer_type": "standart", "callbacks": [{"type": "early_stoping"}]},
        "transforms": {"train": [{"type": "resize", "sise": [4, 4]}]},
    }
    text = message(raw)
    assert text.startswith("a.yaml has 7 mistakes:")
    assert "data.num_classes is missing" in text
    assert "data.num_clases: unknown key; did you mean 'num_classes'?" in text
    assert "training.batchsize: unknown key; did you mean 'batch_size'?" in text
    assert "training.trainer_type: unknown value 'standart'; did you mean 'standard'?" in text
    assert "training.callbacks.0.type: unknown name 'early_stoping'; did you mean 'early_stopping'?" in text
    assert "transforms.train.0.sise: unknown key; did you mean 'size'?" in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": {"num_classes": 2}}, "model.num_classes is 2 but data.num_classes is 3"),
        ({"loss": {"class_weights": [1.0]}}, "loss.class_weights has 1 values but data.num_classes is 3"),
        ({"loss": {"ignore_index": 4}}, "loss.ignore_index is 4 but data.ignore_index is None"),
        ({"optimizer": {"lr": -1}}, "optimizer.lr: "),
        ({"optimizer": {"type": "adam", "momentum": 0.9}}, "optimizer.momentum: unknown key"),
        ({"scheduler": {"type": "cosine", "gamma": 0.9}}, "scheduler.gamma: unknown key"),
        ({"transforms": {"val": [{"type": "random_rotation", "degrees": 3}]}}, "transforms.val.0.type: unknown name"),
        ({"transforms": {"train": [{"type": "normalize", "mean": [0, 0], "std": [1]}]}}, "normalize.mean has 2 values"),
        ({"transforms": {"train": [{"type": "normalize", "mean": [0], "std": [1]}], "val": []}}, "must be the same"),
        ({"model": {"in_channels": 1}, "transforms": {"train": [{"type": "color_jitter", "hue": 0.1}]}}, "need colour"),
        ({"loss": {"class_weights": [0, 0, 0]}}, "loss.class_weights are all 0"),
        ({"loss": {"class_weights": "balance"}}, "unknown value 'balance'; did you mean 'balanced'?"),
        ({"loss": {"dice_bce": {"dice_weight": 0, "bce_weight": 0}}}, "loss.dice_bce: both weights are 0"),
        ({"scheduler": {"type": "cosine", "eta_min": 1}}, "scheduler.eta_min 1 is above optimizer.lr 0.001"),
        ({"optimizer": {"lr": float("inf")}}, "optimizer.lr: "),
        ({"seed": 2**64}, "seed: "),
        ({"run_name": "../up"}, "run_name: "),
        ({"run_name": ""}, "run_name: "),
        ({"training": {"callbacks": [{"type": "lr_monitor"}] * 2}}, "training.callbacks has lr_monitor twice"),
        ({"data": MINIMAL["data"] | {"samples_per_image": 0}}, "data.samples_per_image: "),
        ({"transforms": {"train": [{"type": "normalize", "mean": [0]}]}}, "both mean and std, or neither"),
        (
            {"transforms": {"train": [{"type": "random_crop", "size": [8, 8], "classes": [1, 3]}]}},
            "random_crop.classes has 3 but num_classes is 3",
        ),
    ],
)
def test_values_that_cannot_be_are_refused(change: dict[str, Any], expected: str) -> None:
    assert expected in message({**MINIMAL, **change})


@pytest.mark.parametrize("names", [["a", "b", "a"], ["a", "", "b"]])
def test_class_names_are_told_apart(names: list[str]) -> None:
    assert "a name twice, or an empty one" in message(MINIMAL, **{"data.class_names": names})


def test_a_section_left_empty_is_left_out() -> None:
    assert parse_config({**MINIMAL, "loss": None, "plugins": None}) == parse_config(MINIMAL)


def test_class_names_must_be_as_many_as_classes() -> None:
    assert "data.class_names has 1 names but data.num_classes is 3" in message(MINIMAL, **{"data.class_names": ["a"]})


def test_loader_settings_may_stand_under_data_but_not_contradict() -> None:
    raw = {"data": {**MINIMAL["data"], "num_workers": 7, "pin_memory": False}}
    training = parse_config(raw).training
    assert (training.num_workers, training.pin_memory) == (7, False)
    assert "data.num_workers is 7 but training.num_workers is 2" in message({**raw, "training": {"num_workers": 2}})


def test_overrides_win_and_may_add_sections() -> None:
    config = parse_config(MINIMAL, {"training.batch_size": 3, "optimizer.lr": 0.5, "seed": 1})
    assert (config.training.batch_size, config.optimizer.lr, config.seed) == (3, 0.5, 1)


def test_an_override_inside_a_list_is_refused() -> None:
    raw = {**MINIMAL, "plugins": ["a.py"]}
    assert "plugins is a list, not a section" in message(raw, **{"plugins.0": "b.py"})


@pytest.mark.parametrize("text", ["optimizer.lr", "=3", "a=[1,"])
def test_a_malformed_set_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        parse_set(text)


def test_set_reads_yaml_values() -> None:
    assert parse_set("transforms.val=[{type: resize, size: [4, 5]}]")[1] == [{"type": "resize", "size": [4, 5]}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: {data_dir: x\n", "is not valid YAML"),
        ("seed: 1\nseed: 2\n", "key 'seed' stands twice"),
        ("- 1\n", "holds no configuration"),
        ("", "holds no configuration"),
        ("data: 3\n", "data: "),
        ("{{ name }}: 1\n", "is not valid YAML: a key is no word"),
    ],
)
def test_a_file_that_is_no_configuration_is_one_sentence(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_binary_file_and_a_missing_file_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(path)
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(path)


def test_a_configuration_survives_yaml_and_a_checkpoint() -> None:
    raw = {
        **MINIMAL,
        "scheduler": {"type": "one_cycle", "warmup_epochs": 2},
        "transforms": {"train": [{"type": "random_resize_crop", "sizes": [[8, 8], [16, 16]]}]},
    }
    config = parse_config(raw)
    assert parse_config(yaml.safe_load(to_yaml(config))) == config
    assert parse_config(plain(config)) == config


def test_validation_uses_what_is_not_random_in_the_training_list() -> None:
    train = [{"type": "resize", "size": [8, 8]}, {"type": "random_vertical_flip"}]
    config = parse_config({**MINIMAL, "transforms": {"train": train}})
    assert [spec.type for spec in config.val_transforms] == ["resize"]


def test_the_ignored_value_is_never_a_class_that_is_learned() -> None:
    assert parse_config(MINIMAL).ignore_index == 255
    assert parse_config({"data": {"data_dir": "x", "num_classes": 300}}).ignore_index == 65535
    assert parse_config({"data": {"data_dir": "x", "num_classes": 3, "ignore_index": 0}}).ignore_index == 0


@given(
    st.dictionaries(
        st.sampled_from(["data", "model", "loss", "training", "seed", "zzz"]),
        st.none() | st.integers() | st.text() | st.lists(st.none()),
    )
)
def test_no_junk_ends_in_anything_but_a_sentence(raw: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        parse_config(raw)


DP = {"trainer_type": "dp", "dp": {"noise_multiplier": 1.0, "public_statistics": True}}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"transforms": {"train": [{"type": "normalize"}]}}, "normalize: data reads the private images"),
        ({"model": {"in_channels": 5}}, "normalize: data reads the private images"),
        ({"data": MINIMAL["data"] | {"samples_per_image": 2}}, "data.samples_per_image must be 1"),
    ],
)
def test_what_would_spend_privacy_unseen_is_refused(change: dict[str, Any], expected: str) -> None:
    parse_config({**MINIMAL, "training": DP})
    assert expected in message({**MINIMAL, "training": DP, **change})


def test_statistics_left_to_the_data_become_numbers_in_both_lists() -> None:
    lists = {"train": [{"type": "random_rotation", "degrees": 3}, {"type": "normalize"}]}
    config = parse_config({**MINIMAL, "transforms": lists})
    assert config.needs_statistics
    settled = config.with_statistics([0.1, 0.2, 0.3], [1.0, 2.0, 3.0])
    assert not settled.needs_statistics
    assert settled.train_transforms[1] == settled.val_transforms[0]
    assert settled.val_transforms[0].mean == [0.1, 0.2, 0.3]
    assert parse_config(plain(settled)) == settled


@pytest.mark.parametrize(("in_channels", "left"), [(1, False), (3, False), (2, True), (224, True)])
def test_without_transforms_only_gray_and_rgb_have_known_statistics(in_channels: int, left: bool) -> None:
    assert parse_config({**MINIMAL, "model": {"in_channels": in_channels}}).needs_statistics is left


def test_without_mirroring_the_sentence_names_what_to_remove() -> None:
    words = ["random_vertical_flip", "random_rotate90", "random_transpose"]
    lists = {"train": [{"type": word} for word in words]}
    parse_config({**MINIMAL, "transforms": lists})
    text = message({**MINIMAL, "transforms": lists}, **{"data.mirror": False})
    assert text.endswith("data.mirror is false: remove random_vertical_flip, random_transpose")
    lists = {"train": [{"type": "random_horizontal_flip", "p": 0}]}  # never mirrors
    assert not parse_config({**MINIMAL, "transforms": lists}, {"data.mirror": False}).data.mirror


NEEDED = {"resize": {"size": [8, 8]}, "random_crop": {"size": [8, 8]}, "random_resize_crop": {"sizes": [[8, 8]]}}
NEEDED |= {"random_rotation": {"degrees": 180}}


@pytest.mark.parametrize("word", [word for word, each in TRANSFORM_REGISTRY.items() if issubclass(each, Geometric)])
def test_without_mirroring_exactly_the_transforms_that_swap_left_and_right_are_refused(word: str) -> None:
    """A map that swaps them has a negative determinant; what deforms besides it does so without folding."""
    raw = {**MINIMAL, "transforms": {"train": [{"type": word, **NEEDED.get(word, {})}]}}
    (spec,) = parse_config(raw).train_transforms
    transform, canvas = TRANSFORM_REGISTRY[word](spec), Canvas(Arrays(np.zeros((9, 12, 3), np.uint8)))
    rng = np.random.default_rng(0)
    determinants = [np.linalg.det(transform.draw(canvas, rng, rng).matrix) for _ in range(30)]
    if min(determinants) < 0:
        assert f"remove {word}" in message(raw, **{"data.mirror": False})
    else:
        parse_config(raw, {"data.mirror": False})


def test_the_schema_knows_every_section() -> None:
    schema = Config.model_json_schema()
    assert set(schema["properties"]) == set(Config.model_fields)
    assert "batch_size" in schema["$defs"]["TrainingConfig"]["properties"]
    assert schema["$defs"]["TrainingConfig"]["properties"]["batch_size"]["description"]


@pytest.mark.parametrize("module", ["split", "init_config", "train", "inference", "demo", "check"])
def test_help_answers_without_torch(module: str) -> None:
    code = (
        f"import sys; from ml_src.cli import {module}\n"
        f"try: {module}.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules and 'cv2' not in sys.modules, 'imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: ml-" in done.stdout


def test_a_mistake_in_the_yaml_is_answered_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("data: {data_dir: x}\n")
    code = (
        "import sys; from ml_src.cli import train\n"
        f"assert train.main(['--config', {str(path)!r}]) == 2\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr == f"error: {path}: data.num_classes is missing\n"
