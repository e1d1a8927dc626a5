"""int8 files: what is in them, how close they come, which layers stay in float."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from ml_src.core.errors import ConfigError
from ml_src.core.export.graph import Exportable
from ml_src.core.export.metadata import Metadata
from ml_src.core.export.onnx import export_onnx
from ml_src.core.export.quantize import QuantizeReport, fewest, quantize_onnx, upsample_by_convolution
from ml_src.core.export.runtime import open_exported
from ml_src.core.network.custom import DoubleConv

pytestmark = pytest.mark.xdist_group("quantize")  # what they share is made once

METADATA = Metadata(
    class_names=["ground", "square", "disc"],
    colours=[[0, 0, 0], [255, 0, 0], [0, 0, 255]],
    channels=3,
    input_type="uint8",
    layout="NHWC",
    mean=[0.5],
    std=[0.25],
    resize=None,
    training_size=[64, 64],
    ignore_index=255,
    postprocess=[],
    mirror=True,
    metrics={"val_iou": 0.75},
    privacy=None,
    versions={"ml_src": "1"},
    checkpoints=[{"name": "best.pt", "sha256": "0" * 64, "weight": 1.0}],
    encoder_licence=None,
    precision="fp32",
    config={},
)


class SmallUNet(nn.Module):
    """What SimpleUNet consists of, with two levels: sides are padded to multiples of 4."""

    size_multiple = 4

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down, self.bottom = DoubleConv(3, 8), DoubleConv(8, 16), DoubleConv(16, 16)
        self.up = nn.ModuleList([nn.ConvTranspose2d(16, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)])
        self.merge = nn.ModuleList([DoubleConv(32, 16), DoubleConv(16, 8)])
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        high = self.stem(x)
        low = self.down(nn.functional.max_pool2d(high, 2))
        x = self.bottom(nn.functional.max_pool2d(low, 2))
        x = self.merge[0](torch.cat([low, self.up[0](x)], dim=1))
        x = self.merge[1](torch.cat([high, self.up[1](x)], dim=1))
        logits: torch.Tensor = self.head(x)
        return logits


def drawn(seed: int, side: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """A noisy image (1, side, side, 3) uint8 with a bright square and a dark disc, and its mask (1, side, side)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    mask = np.zeros((side, side), np.uint8)
    top, left = rng.integers(0, side // 2, 2)
    mask[top : top + side // 3, left : left + side // 3] = 1
    mask[(y - rng.integers(side)) ** 2 + (x - rng.integers(side)) ** 2 < (side // 5) ** 2] = 2
    shades = np.array([[120, 110, 90], [190, 160, 60], [50, 80, 150]])
    image = shades[mask] + rng.normal(0, 25, (side, side, 3))
    return np.clip(image, 0, 255).astype(np.uint8)[None], mask[None]


def trained(network: nn.Module, steps: int = 60) -> nn.Module:
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    pairs = [drawn(seed) for seed in range(4)]
    images = torch.from_numpy(np.concatenate([image for image, _ in pairs])).permute(0, 3, 1, 2)
    masks = torch.from_numpy(np.concatenate([mask for _, mask in pairs])).long()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network((images / 255 - 0.5) / 0.25), masks).backward()
        optimizer.step()
    return network.eval()


def written(network: nn.Module, path: Path, metadata: Metadata = METADATA) -> Path:
    exportable = Exportable([network], [1.0], 3, [0.5], [0.25], metadata.input_type, metadata.layout, 3)
    export_onnx(exportable, path, metadata.to_strings())
    return path


def mean_iou(path: Path) -> float:
    exported = open_exported(path, "cpu")
    scores = []
    pairs = [drawn(seed) for seed in range(100, 106)]
    found = np.concatenate([exported.labels(image) for image, _ in pairs])
    truth = np.concatenate([mask for _, mask in pairs])
    for kind in range(3):
        scores.append(((found == kind) & (truth == kind)).sum() / ((found == kind) | (truth == kind)).sum())
    return float(np.mean(scores))


def images() -> list[np.ndarray]:
    return [drawn(seed)[0] for seed in range(4)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return written(trained(SmallUNet()), tmp_path_factory.mktemp("float") / "best.onnx")


@pytest.fixture(scope="module")
def quantised(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QuantizeReport]:
    target = tmp_path_factory.mktemp("int8") / "best.onnx"
    return target, quantize_onnx(source, target, images(), mean_iou, mean_iou(source), bound=0.02)


def test_a_trained_network_keeps_its_labels_in_int8(source: Path, quantised: tuple[Path, QuantizeReport]) -> None:
    path, report = quantised
    assert report.reference > 0.6  # it has learnt something
    assert report.reached
    assert report.float_layers == []
    assert report.rounds == [(0, report.mean_iou)]
    assert report.mean_iou == mean_iou(path)
    image, _ = drawn(7, side=160)
    expected, found = open_exported(source, "cpu"), open_exported(path, "cpu")
    assert (found.labels(image) == expected.labels(image)).mean() > 0.98
    assert np.abs(found.probabilities(image) - expected.probabilities(image)).mean() < 0.02


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 33, 47), (5, 64, 17)])
def test_images_of_any_size_and_number_are_taken(
    source: Path, quantised: tuple[Path, QuantizeReport], shape: tuple[int, int, int]
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = open_exported(source, "cpu").probabilities(image)
    found = open_exported(quantised[0], "cpu").probabilities(image)
    assert np.abs(found - expected).mean() < 0.05


def test_all_of_the_metadata_survives_but_the_precision(quantised: tuple[Path, QuantizeReport]) -> None:
    assert open_exported(quantised[0], "cpu").metadata == dataclasses.replace(METADATA, precision="int8")


def test_every_convolution_but_the_last_has_weights_of_8_bits(
    source: Path, quantised: tuple[Path, QuantizeReport]
) -> None:
    float_layers = [
        node for node in onnx.load(source).graph.node if node.op_type in ("Conv", "ConvTranspose")
    ]  # in the order of the graph
    model = onnx.load(quantised[0])
    dequantised = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    layers = [node for node in model.graph.node if node.op_type == "Conv"]
    assert len(layers) == len(float_layers)
    assert [node.input[1] in dequantised for node in layers] == [True] * (len(layers) - 1) + [False]
    assert quantised[1].layers == len(layers) - 1


def test_two_products_of_weights_and_activations_fit_into_16_bits(quantised: tuple[Path, QuantizeReport]) -> None:
    """CPUs without VNNI add two products with saturation; there, larger weights would give other masks."""
    constants = onnx.load(quantised[0]).graph.initializer
    weights = [
        numpy_helper.to_array(one).astype(int)
        for one in constants
        if one.data_type == onnx.TensorProto.INT8 and len(one.dims) == 4
    ]
    assert weights
    assert max(2 * 255 * np.abs(one).max() for one in weights) <= 2**15 - 1


def test_onnx_runtime_goes_back_to_float_only_for_the_last_layer(
    quantised: tuple[Path, QuantizeReport], tmp_path: Path
) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(quantised[0], options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node]
    assert operators.count("QuantizeLinear") == 1
    assert operators.count("DequantizeLinear") == 1
    assert operators.count("QLinearConv") == quantised[1].layers


class Spiked(nn.Module):
    """A small network whose second layer is invisible to 8 bits: one channel of its input is a million times larger."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.spiked = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.third(self.spiked(self.first(x).relu()).relu()).relu()
        logits: torch.Tensor = self.head(x)
        return logits

    def spike(self) -> "Spiked":
        with torch.no_grad():
            self.spiked.weight[:, 0] = 0  # whatever channel 0 has, it is not used
            self.first.weight[0] *= 1e6
            self.first.bias[0] = 1e6
        return self


@pytest.fixture(scope="module")
def spiked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return written(trained(Spiked(), steps=80).spike(), tmp_path_factory.mktemp("spiked") / "best.onnx")


def test_layers_that_8_bits_ruin_are_found_and_kept_in_float(spiked: Path, tmp_path: Path) -> None:
    report = quantize_onnx(spiked, tmp_path / "int8.onnx", images(), mean_iou, mean_iou(spiked))
    assert report.rounds[0][1] < report.reference - 0.1  # with all quantised
    assert set(report.float_layers) == {"network.first", "network.spiked"}
    assert report.reached
    assert mean_iou(tmp_path / "int8.onnx") == report.mean_iou


def test_a_bound_that_no_file_holds_is_reported_and_the_best_file_kept(spiked: Path, tmp_path: Path) -> None:
    report = quantize_onnx(spiked, tmp_path / "int8.onnx", images(), mean_iou, reference=1.5)
    assert not report.reached
    assert report.mean_iou == max(score for _, score in report.rounds)
    assert (len(report.float_layers), report.mean_iou) in report.rounds
    assert report.rounds[-1][0] == report.layers  # it has tried all of them
    assert mean_iou(tmp_path / "int8.onnx") == report.mean_iou


def test_with_all_layers_in_float_the_file_computes_what_the_source_does(spiked: Path, tmp_path: Path) -> None:
    scores: list[np.ndarray] = []
    image, _ = drawn(3)

    def measure(path: Path) -> float:
        scores.append(open_exported(path, "cpu").probabilities(image))
        return 0.0

    quantize_onnx(spiked, tmp_path / "int8.onnx", images(), measure, reference=1.0)
    np.testing.assert_allclose(scores[-1], open_exported(spiked, "cpu").probabilities(image), atol=1e-6)


def test_where_measuring_fails_nothing_is_left(source: Path, tmp_path: Path) -> None:
    def measure(path: Path) -> float:
        raise RuntimeError("no room on the disk")

    target = tmp_path / "int8.onnx"
    target.write_bytes(b"an older file")
    with pytest.raises(RuntimeError, match="no room"):
        quantize_onnx(source, target, images(), measure, 0.9)
    assert [path.name for path in tmp_path.iterdir()] == ["int8.onnx"]
    assert target.read_bytes() == b"an older file"


def test_channels_first_images_and_large_ones_calibrate_too(tmp_path: Path) -> None:
    metadata = dataclasses.replace(METADATA, layout="NCHW")
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1)).eval()
    path = written(network, tmp_path / "float.onnx", metadata)
    large = np.random.default_rng(0).integers(0, 256, (1, 600, 530, 3), dtype=np.uint8)
    large[0, 599, 529] = 255  # the piece in the corner is the one with the largest value
    quantize_onnx(path, tmp_path / "int8.onnx", [large], lambda _: 1.0, 1.0)
    expected, found = open_exported(path, "cpu"), open_exported(tmp_path / "int8.onnx", "cpu")
    assert np.abs(found.probabilities(large) - expected.probabilities(large)).max() < 0.05


def test_a_network_without_layers_to_quantise_and_no_images_are_refused(source: Path, tmp_path: Path) -> None:
    one_layer = written(nn.Conv2d(3, 3, 1).eval(), tmp_path / "float.onnx")
    with pytest.raises(ConfigError, match="no convolutions before its last layer: use fp32"):
        quantize_onnx(one_layer, tmp_path / "int8.onnx", images(), mean_iou, 0.5)
    with pytest.raises(ConfigError, match="needs images"):
        quantize_onnx(source, tmp_path / "int8.onnx", [], mean_iou, 0.5)


def test_progress_rises_to_one_and_nothing_is_printed(
    spiked: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shares: list[float] = []
    handlers = logging.getLogger().handlers[:]
    quantize_onnx(spiked, tmp_path / "int8.onnx", images(), mean_iou, mean_iou(spiked), advance=shares.append)
    assert shares == sorted(shares)
    assert shares[0] > 0
    assert shares[-1] == 1
    assert "".join(capfd.readouterr()) == ""
    assert logging.getLogger().handlers == handlers


@pytest.mark.parametrize("most", [1, 2, 3, 7, 16])
def test_the_fewest_is_that_of_trying_one_by_one(most: int) -> None:
    for least in range(1, most + 2):
        asked: list[int] = []
        found = fewest(lambda number: asked.append(number) or number >= least, most)  # noqa: B023
        assert found == next((number for number in range(1, most + 1) if number >= least), None)
        assert len(asked) == len(set(asked)) <= 2 * most.bit_length()


def upsampling(kernel: tuple[int, int], bias: bool, **attributes: object) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    constants = [numpy_helper.from_array(rng.normal(size=(5, 4, *kernel)).astype(np.float32), "weight")]
    if bias:
        constants.append(numpy_helper.from_array(rng.normal(size=4).astype(np.float32), "bias"))
    node = helper.make_node("ConvTranspose", ["x", *(one.name for one in constants)], ["y"], "up", **attributes)
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", None, "H", "W"]) for name in "xy"]
    graph = helper.make_graph([node], "graph", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def computed(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [(2, 2), (3, 3), (2, 4)])
def test_upsampling_without_overlap_is_a_convolution_and_a_move_of_pixels(kernel: tuple[int, int], bias: bool) -> None:
    model = upsampling(kernel, bias, strides=list(kernel))
    x = np.random.default_rng(1).normal(size=(2, 5, 7, 3)).astype(np.float32)
    expected = computed(model, x)
    assert upsample_by_convolution(model) == 1
    assert "ConvTranspose" not in {node.op_type for node in model.graph.node}
    np.testing.assert_allclose(computed(model, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "attributes",
    [
        {"strides": [1, 1]},
        {"strides": [2, 2], "pads": [1, 1, 1, 1]},
        {"strides": [2, 2], "dilations": [2, 2]},
        {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
        {},
    ],
)
def test_other_transposed_convolutions_stay_as_they_are(attributes: dict[str, object]) -> None:
    model = upsampling((2, 2), True, **attributes)
    before = model.SerializeToString()
    assert upsample_by_convolution(model) == 0
    assert model.SerializeToString() == before
