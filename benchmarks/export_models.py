"""Which networks can be exported to ONNX: for any size of image, for one size, or not? Prints a Markdown table.

Every network of MODEL_REGISTRY and every architecture of segmentation_models_pytorch, the latter without pretrained
weights but with statistics of batch normalisation that are not fresh. Takes several minutes.
"""

import argparse
from typing import Any

import onnxruntime
import segmentation_models_pytorch as smp
import torch
from torch import nn

from ml_src.core.errors import ConfigError
from ml_src.core.export.graph import Exportable
from ml_src.core.export.onnx import onnx_model
from ml_src.core.network import group_normalised
from ml_src.core.network.custom import MODEL_REGISTRY

FIXED = (224, 224)
CHANNELS, CLASSES = 3, 4
ENCODERS = {"DPT": "tu-vit_base_patch16_224.augreg_in21k"}
ARCHITECTURES = (
    "Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3", "DeepLabV3Plus", "UPerNet",
    "Segformer", "DPT",
)  # fmt: skip


def networks(encoder: str) -> dict[str, Any]:
    """Return what builds each network, by its name in the table."""
    ours: dict[str, Any] = {}
    for name, kind in MODEL_REGISTRY.items():
        for width in (8, 64):
            ours[f"{name}, {width} channels"] = lambda kind=kind, width=width: kind(
                in_channels=CHANNELS, num_classes=CLASSES, base_channels=width, dropout=0.2
            )
        ours[f"{name}, norm: group"] = lambda kind=kind: group_normalised(
            kind(in_channels=CHANNELS, num_classes=CLASSES, base_channels=8)
        )
    theirs = {
        f"smp {name}, {ENCODERS.get(name, encoder)}": lambda name=name: getattr(smp, name)(
            encoder_name=ENCODERS.get(name, encoder), encoder_weights=None, in_channels=CHANNELS, classes=CLASSES
        )
        for name in ARCHITECTURES
    }
    return {**ours, **theirs}


def as_trained(network: nn.Module) -> nn.Module:
    """Give batch normalisations statistics, weights and biases that are not 0 and 1."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return network


def attempt(network: nn.Module, size: tuple[int, int] | None) -> tuple[str, float]:
    """Return the padding and the largest difference of probabilities. Raises: ConfigError where it does not export."""
    exportable = Exportable([network], [1.0], CHANNELS, [0.5], [0.25], "uint8", "NHWC", CLASSES, size)
    contents = onnx_model(exportable).SerializeToString()
    session = onnxruntime.InferenceSession(contents, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch, (height, width) in ((1, size or (1, 1)), (2, size or (133, 70)), (1, size or (257, 311))):
        images = exportable.random_images(batch, height, width)
        with torch.inference_mode():
            expected = exportable(images)[1].numpy()
        found = session.run(["probabilities"], {"images": images.numpy()})[0]
        worst = max(worst, float(abs(found - expected).max()))
    padding = exportable.paddings[0]
    return f"{padding.multiple} (at least {padding.least})", worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--only", nargs="*", help="parts of names")
    args = parser.parse_args()
    print("| network | exports | sides are multiples of | largest difference | reason |")
    print("|---|---|---|---|---|")
    for name, build in networks(args.encoder).items():
        if args.only and not any(part in name for part in args.only):
            continue
        torch.manual_seed(0)
        network = as_trained(build())
        outcome, reasons = "no", []
        padding, worst = "", ""
        for size, words in ((None, "any size"), (FIXED, "one size (`--input_size`)")):
            try:
                padding, difference = attempt(network, size)
                outcome, worst = words, f"{difference:.0e}"
                break
            except ConfigError as error:
                reasons.append(" ".join(str(error).replace("|", "\\|").split()))
        print(f"| {name} | {outcome} | {padding} | {worst} | {'; '.join(reasons)} |", flush=True)


if __name__ == "__main__":
    main()
