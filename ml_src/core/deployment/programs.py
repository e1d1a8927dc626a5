"""The few lines of Python that predict with an exported file, for each format: what a model card shows."""

from typing import Any

from ml_src.core.export.metadata import Metadata


def python_lines(metadata: Metadata, kind: str, name: str) -> list[str]:
    """Return a program that predicts `labels` (H, W) of one image with little more than the format's own library."""
    if kind == "safetensors":
        return _weights_in_python(name)
    imports, opened, output = _engine_in_python(kind, name)
    reads, libraries = _reading_in_python(metadata)
    resized = metadata.resize is not None
    libraries |= {"import cv2", "import numpy as np"} if resized else set()
    lines = [*sorted({*libraries, imports}), "", *opened, *reads]
    shape = "[None]" if metadata.layout == "NHWC" else ".transpose(2, 0, 1)[None]"
    if not resized:
        return [*lines, f"labels = {output('labels', f'image{shape}')}[0]"]
    assert metadata.resize is not None
    height, width = metadata.resize
    return [
        *lines,
        "height, width = image.shape[:2]",
        f"image = cv2.resize(image, ({width}, {height})).reshape({height}, {width}, {metadata.channels})",
        f"probabilities = {output('probabilities', f'image{shape}')}[0]  # (classes, {height}, {width})",
        "labels = np.stack([cv2.resize(one, (width, height)) for one in probabilities]).argmax(0)",
    ]


def _reading_in_python(metadata: Metadata) -> tuple[list[str], set[str]]:
    """Lines that read `image` (H, W, channels), and what they import."""
    channels, dtype = metadata.channels, metadata.input_type
    if dtype == "float32" or channels not in (1, 3):
        scale = "; 8-bit values divided by 255, 16-bit values by 65535" if dtype == "float32" else ""
        return [f'image = np.load("image.npy")  # (H, W, {channels}) {dtype}{scale}'], {"import numpy as np"}
    depth = " | cv2.IMREAD_ANYDEPTH" if dtype == "uint16" else ""
    if channels == 1:
        lines = [f'image = cv2.imread("image.png", cv2.IMREAD_GRAYSCALE{depth})[..., None]  # (H, W, 1) {dtype}']
    else:
        lines = [
            f'image = cv2.imread("image.png", cv2.IMREAD_COLOR{depth})',
            f"image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)  # (H, W, 3) {dtype}",
        ]
    return lines, {"import cv2"}


def _engine_in_python(kind: str, name: str) -> tuple[str, list[str], Any]:
    """The import, the lines that open the file, and from output and input to the expression that computes it."""
    quoted = repr(name)
    if kind == "ONNX":
        opened = [f'session = onnxruntime.InferenceSession({quoted}, providers=["CPUExecutionProvider"])']
        return "import onnxruntime", opened, lambda out, given: f'session.run(["{out}"], {{"images": {given}}})[0]'
    if kind == "OpenVINO":
        opened = [f'model = openvino.Core().compile_model({quoted}, "CPU")']
        return "import openvino", opened, lambda out, given: f'model({{"images": {given}}})["{out}"]'
    opened = [f"network = torch.jit.load({quoted})"]
    places = {"labels": 0, "probabilities": 1}

    def called(out: str, given: str) -> str:
        return f"network(torch.from_numpy({given}))[{places[out]}].numpy()"

    return "import torch", opened, called


def _weights_in_python(name: str) -> list[str]:
    quoted = repr(name)
    return [
        "import json",
        "from safetensors import safe_open",
        "from safetensors.torch import load_file",
        "from ml_src.core.config_file import parse_config",
        "from ml_src.core.network import build_model",
        "",
        f'with safe_open({quoted}, "pt") as file:',
        '    config = parse_config(json.loads(file.metadata()["ml_src.config"]))',
        "network = build_model(config.model).eval()",
        f"network.load_state_dict(load_file({quoted}))",
        "# logits = network(images): images (N, C, H, W) float32, normalised as below; logits (N, classes, H, W)",
    ]
