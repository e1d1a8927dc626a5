"""Exported files, opened by other libraries, give what PyTorch gives: any size, number type, layout, ensemble."""

import logging
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from safetensors import safe_open
from torch import Tensor, nn

from ml_src.core.errors import ConfigError
from ml_src.core.export.graph import Exportable
from ml_src.core.export.onnx import export_onnx
from ml_src.core.export.openvino import export_openvino
from ml_src.core.export.openvino_file import import_openvino
from ml_src.core.export.safetensors import export_safetensors
from ml_src.core.export.torchscript import export_torchscript
from ml_src.core.network.custom import SimpleUNet

pytestmark = pytest.mark.xdist_group("formats")  # what they share is made once

STRINGS = {"ml_src.class_names": '["cell", "Gewebe \\u00e4"]', "description": 'two lines\n<and> "quotes" & é'}
Arrays = tuple[NDArray[np.integer], NDArray[np.float32]]


class Small(nn.Module):
    """One level of a U-Net, with batch normalisation; quick to export."""

    size_multiple, least_size = 2, 4

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.head = nn.Conv2d(16, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        return self.head(torch.cat([x, self.up(nn.functional.max_pool2d(x, 2))], dim=1))


class Pooled(nn.Module):
    """Pools to 2 x 2 whatever the size, as pyramid pooling does."""

    def forward(self, images: Tensor) -> Tensor:
        coarse = nn.functional.adaptive_avg_pool2d(images, 2)
        return images + nn.functional.interpolate(coarse, images.shape[-2:])


class Branching(nn.Module):
    """Decides by the pixels what it does."""

    def forward(self, images: Tensor) -> Tensor:
        return images * 2 if images.mean() > 0.5 else images


class Wide(nn.Module):
    """Does another thing with wide images."""

    def forward(self, images: Tensor) -> Tensor:
        return images if images.shape[-1] < 300 else -images


def as_trained(network: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.3, 3)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0, (1.5 / module.weight[0].numel()) ** 0.5)
    return network


def exportable_of(
    *networks: nn.Module, kind: str = "uint8", layout: str = "NHWC", channels: int = 3, num_classes: int = 2, **more
) -> Exportable:
    weights = more.pop("weights", [1.0] * len(networks))
    return Exportable(networks, weights, channels, [0.45], [0.25], kind, layout, num_classes, **more)


def by_torch(exportable: Exportable, images: Tensor) -> Arrays:
    with torch.inference_mode():
        labels, probabilities = exportable(images)
    return labels.numpy(), probabilities.numpy()


def session_of(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def assert_same(found: Arrays, expected: Arrays, tolerance: float = 1e-5) -> None:
    """Probabilities within the tolerance; labels equal, but where the two largest are closer than that."""
    assert [one.dtype for one in found] == [one.dtype for one in expected]
    assert [one.shape for one in found] == [one.shape for one in expected]
    assert np.abs(found[1] - expected[1]).max() <= tolerance
    largest = np.sort(expected[1], axis=1)[:, -2:]
    clear = largest[:, 1] - largest[:, 0] > 2 * tolerance
    assert np.array_equal(found[0][clear], expected[0][clear])
    assert clear.mean() > 0.5


@pytest.fixture(scope="module")
def unet() -> Exportable:
    return exportable_of(as_trained(SimpleUNet(3, 2, base_channels=4)).to(memory_format=torch.channels_last))


@pytest.fixture(scope="module")
def unet_file(unet: Exportable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unet") / "best.onnx"
    export_onnx(unet, path, STRINGS)
    return path


@pytest.fixture(scope="module")
def small() -> Exportable:
    return exportable_of(as_trained(Small(3, 12)), num_classes=12)


@pytest.fixture(scope="module")
def small_file(small: Exportable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.onnx"
    export_onnx(small, path, STRINGS)
    return path


@pytest.mark.parametrize(
    ("batch", "height", "width"),
    [(1, 1, 1), (5, 1, 17), (4, 31, 33), (3, 64, 48), (2, 100, 257), (1, 1031, 777)],
)
def test_one_onnx_file_takes_every_size_and_batch(
    unet: Exportable, unet_file: Path, batch: int, height: int, width: int
) -> None:
    images = unet.random_images(batch, height, width)
    assert_same(tuple(session_of(unet_file).run(None, {"images": images.numpy()})), by_torch(unet, images))


@pytest.mark.parametrize(
    ("kind", "layout", "channels", "num_classes", "opset"),
    [("uint8", "NCHW", 1, 2, 18), ("uint16", "NHWC", 8, 300, 20), ("float32", "NHWC", 3, 12, 23)],
)
def test_number_types_layouts_channels_classes_and_the_first_and_last_opset(
    tmp_path: Path, kind: str, layout: str, channels: int, num_classes: int, opset: int
) -> None:
    network = as_trained(Small(channels, num_classes))
    exportable = exportable_of(network, kind=kind, layout=layout, channels=channels, num_classes=num_classes)
    export_onnx(exportable, tmp_path / "x.onnx", {}, opset)
    assert [one.version for one in onnx.load(tmp_path / "x.onnx").opset_import] == [opset]
    for size in ((1, 1), (19, 8)):
        images = exportable.random_images(2, *size)
        found = session_of(tmp_path / "x.onnx").run(None, {"images": images.numpy()})
        assert_same(tuple(found), by_torch(exportable, images))


def test_an_ensemble_is_one_graph_also_where_its_members_are_padded_differently(tmp_path: Path) -> None:
    networks = [as_trained(Small(3, 4)), nn.Conv2d(3, 4, 3, padding=1), as_trained(Small(3, 4))]
    exportable = exportable_of(*networks, weights=[3.0, 1.0, 1.0], num_classes=4)
    export_onnx(exportable, tmp_path / "x.onnx", {})
    images = exportable.random_images(2, 21, 11)
    found = session_of(tmp_path / "x.onnx").run(None, {"images": images.numpy()})
    assert_same(tuple(found), by_torch(exportable, images))


def test_other_opsets_are_refused(tmp_path: Path, small: Exportable) -> None:
    with pytest.raises(ConfigError, match="--opset 17 is not offered: give 18 to 23"):
        export_onnx(small, tmp_path / "x.onnx", {}, opset=17)


def test_equal_logits_give_the_first_class(tmp_path: Path) -> None:
    network = nn.Conv2d(3, 4, 1)
    nn.init.zeros_(network.weight)
    network.bias.data = torch.tensor([0.0, 1.0, 1.0, 0.0])
    exportable = exportable_of(network, num_classes=4)
    export_onnx(exportable, tmp_path / "x.onnx", {})
    images = exportable.random_images(1, 3, 3)
    labels = session_of(tmp_path / "x.onnx").run(["labels"], {"images": images.numpy()})[0]
    assert (labels == 1).all()
    assert np.array_equal(labels, by_torch(exportable, images)[0])


def test_the_onnx_file_is_one_valid_file_that_says_what_it_is_and_nothing_of_our_machine(unet_file: Path) -> None:
    model = onnx.load(unet_file, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert [path.name for path in unet_file.parent.iterdir()] == [unet_file.name]
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert {one.key: one.value for one in model.metadata_props} == STRINGS
    assert session_of(unet_file).get_modelmeta().custom_metadata_map == STRINGS
    assert str(Path(torch.__file__).parent).encode() not in unet_file.read_bytes()
    assert {node.domain for node in model.graph.node} == {""}


def test_layers_are_named_as_in_the_network_and_batch_normalisation_is_folded(unet_file: Path) -> None:
    nodes = onnx.load(unet_file).graph.node
    names = [node.name for node in nodes]
    assert len(set(names)) == len(names)
    assert {"network.stem.0", "network.down.3.3", "network.up.0", "network.head"} <= set(names)
    assert "BatchNormalization" not in {node.op_type for node in nodes}


def test_nothing_is_printed_logged_or_warned(
    tmp_path: Path, small: Exportable, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_onnx(small, tmp_path / "x.onnx", {})
        export_torchscript(small, tmp_path / "x.pt", {})
        export_openvino(tmp_path / "x.onnx", tmp_path / "x.xml", {})
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_fp16_computes_in_float16_between_the_same_input_and_outputs(tmp_path: Path, small: Exportable) -> None:
    path = tmp_path / "x.onnx"
    export_onnx(small, path, {}, precision="fp16")
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert kinds["network.head.weight"] == TensorProto.FLOAT16
    images = small.random_images(2, 301, 200)
    found, expected = session_of(path).run(None, {"images": images.numpy()}), by_torch(small, images)
    assert found[1].dtype == np.float32
    assert 0 < np.abs(found[1] - expected[1]).max() < 5e-3
    clear = np.diff(np.sort(expected[1], axis=1)[:, -2:], axis=1)[:, 0] > 5e-3
    assert np.array_equal(found[0][clear], expected[0][clear])


def test_weights_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    network = Small(3, 2)
    nn.init.constant_(network.stem[1].bias[:1], -100)  # a channel that is 0 behind the ReLU, whatever was drawn,
    nn.init.constant_(network.head.weight[:, :1], 1e5)  # so that this is too large for float16 and adds no rounding
    exportable = exportable_of(network)
    for export in (export_onnx, export_safetensors):
        with pytest.raises(ConfigError, match=r"fp16 cannot hold .*head\.weight, whose values go beyond 65504"):
            export(exportable, tmp_path / "x", {}, precision="fp16")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_is_exported_wrongly_for_other_sizes_needs_a_size(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(b"before")
    with pytest.raises(ConfigError, match=r"Pooled cannot be exported to ONNX for images of any size .*--input_size"):
        export_onnx(exportable_of(Pooled(), num_classes=3), path, {})
    assert path.read_bytes() == b"before"
    exportable = exportable_of(Pooled(), num_classes=3, size=(30, 45))
    export_onnx(exportable, path, {})
    session = session_of(path)
    assert session.get_inputs()[0].shape == ["N", 30, 45, 3]
    for batch in (1, 3):
        images = exportable.random_images(batch, 30, 45)
        assert_same(tuple(session.run(None, {"images": images.numpy()})), by_torch(exportable, images))


def test_a_network_that_decides_by_the_pixels_cannot_be_exported(tmp_path: Path) -> None:
    for size in (None, (32, 32)):
        with pytest.raises(ConfigError, match="Branching cannot be exported to ONNX"):
            export_onnx(exportable_of(Branching(), num_classes=3, size=size), tmp_path / "x.onnx", {})
    assert list(tmp_path.iterdir()) == []


def test_two_gigabytes_are_refused_before_the_work(tmp_path: Path) -> None:
    class Huge(nn.Module):
        size_multiple = 1

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(2**29, device="meta"))

    with pytest.raises(ConfigError, match="Huge gives a file of 2 GB or more"):
        export_onnx(exportable_of(Huge()), tmp_path / "x.onnx", {})


def test_torchscript_gives_the_same_to_the_bit(tmp_path: Path, unet: Exportable) -> None:
    exportable = exportable_of(unet.networks[0], Small(3, 2), weights=[1.0, 2.0], kind="uint16", layout="NCHW")
    export_torchscript(exportable, tmp_path / "x.pt", STRINGS)
    strings = dict.fromkeys(STRINGS, "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = torch.jit.load(tmp_path / "x.pt", _extra_files=strings)
    assert {key: text.decode() for key, text in strings.items()} == STRINGS
    for batch, height, width in ((1, 1, 1), (3, 33, 150)):
        images = exportable.random_images(batch, height, width)
        with torch.inference_mode():
            assert all(torch.equal(*pair) for pair in zip(loaded(images), exportable(images), strict=True))


def test_torchscript_refuses_a_network_whose_trace_fits_one_size_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Wide cannot be exported to TorchScript for images of any size"):
        export_torchscript(exportable_of(Wide(), num_classes=3), tmp_path / "x.pt", {})
    export_torchscript(exportable_of(Wide(), num_classes=3, size=(40, 50)), tmp_path / "x.pt", {})


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("fp16", 1e-3)])
def test_openvino_gives_the_same_and_reports_to_nobody(
    tmp_path: Path, small: Exportable, small_file: Path, precision: str, tolerance: float
) -> None:
    path = tmp_path / "x.xml"
    export_openvino(small_file, path, STRINGS, precision)
    openvino = import_openvino()
    assert sys.modules["openvino_telemetry"] is None
    assert sorted(each.name for each in tmp_path.iterdir()) == ["x.bin", "x.xml"]
    core = openvino.Core()
    model = core.read_model(path)
    assert {key: model.get_rt_info([key]).astype(str) for key in STRINGS} == STRINGS
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})  # bfloat16 on some processors
    for batch, height, width in ((1, 1, 1), (3, 33, 50)):
        images = small.random_images(batch, height, width)
        found = compiled(images.numpy())
        assert_same((found["labels"], found["probabilities"]), by_torch(small, images), tolerance)


def test_openvino_stores_half_the_bytes_in_fp16(tmp_path: Path, unet_file: Path) -> None:
    for precision in ("fp32", "fp16"):
        export_openvino(unet_file, tmp_path / f"{precision}.xml", {}, precision)
    whole, half = ((tmp_path / f"{precision}.bin").stat().st_size for precision in ("fp32", "fp16"))
    assert half == pytest.approx(whole / 2, rel=0.01)


def test_openvino_files_end_with_xml(tmp_path: Path, small_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends with \.xml"):
        export_openvino(small_file, tmp_path / "x.bin", {})


def test_safetensors_hold_what_a_network_can_load(tmp_path: Path, unet: Exportable) -> None:
    export_safetensors(unet, tmp_path / "x.safetensors", STRINGS)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == STRINGS
    network = SimpleUNet(3, 2, base_channels=4)
    network.load_state_dict(safetensors.torch.load_file(tmp_path / "x.safetensors"))
    expected = unet.networks[0].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())


def test_safetensors_of_an_ensemble_number_the_members_and_fp16_leaves_counters_alone(tmp_path: Path) -> None:
    first, second = as_trained(Small(3, 2)), as_trained(Small(3, 2))
    second.head.weight = first.head.weight  # shared memory is what the format refuses
    export_safetensors(exportable_of(first, second), tmp_path / "x.safetensors", {}, "fp16")
    tensors = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert set(tensors) == {f"{index}.{name}" for index in (0, 1) for name in first.state_dict()}
    assert tensors["1.stem.1.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(tensors["1.head.weight"], first.head.weight.detach().half())


@pytest.mark.skipif(not os.environ.get("ML_SRC_EVERY_MODEL"), reason="takes minutes: set ML_SRC_EVERY_MODEL=1")
@pytest.mark.parametrize(
    ("architecture", "any_size"),
    [
        ("Unet", True), ("UnetPlusPlus", True), ("MAnet", True), ("Linknet", True), ("FPN", True), ("PAN", True),
        ("DeepLabV3", True), ("DeepLabV3Plus", True), ("Segformer", True), ("PSPNet", False), ("UPerNet", False),
        ("DPT", False),
    ],
)  # fmt: skip
def test_architectures_of_smp(tmp_path: Path, architecture: str, any_size: bool) -> None:
    """As the documentation lists them: for any size, or for one. Small networks above have the same two outcomes."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    encoder = "tu-vit_base_patch16_224.augreg_in21k" if architecture == "DPT" else "resnet18"
    build = getattr(smp, architecture)
    torch.manual_seed(0)
    network = build(encoder_name=encoder, encoder_weights=None, in_channels=3, classes=4).eval()
    exportable = exportable_of(network, num_classes=4, size=None if any_size else (224, 224))
    export_onnx(exportable, tmp_path / "x.onnx", {})
    images = exportable.random_images(1, *(exportable.size or (45, 70)))
    found = session_of(tmp_path / "x.onnx").run(None, {"images": images.numpy()})
    assert_same(tuple(found), by_torch(exportable, images), 2e-4)
    if not any_size:
        with pytest.raises(ConfigError, match="--input_size"):
            export_onnx(exportable_of(network, num_classes=4), tmp_path / "x.onnx", {})
