"""The network that is exported: from images as files hold them to labels. Next to read: `onnx.py`."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ml_src.core.errors import ConfigError
from ml_src.core.network.custom import pad_edges
from ml_src.core.transforms.intensity import full_range

InputType = Literal["uint8", "uint16", "float32"]
Layout = Literal["NHWC", "NCHW"]
EXAMPLE_SIDE = 64  # pixels: a network is traced with images that leave more than one pixel after five halvings


class Padding(NamedTuple):
    """Images are enlarged until both sides are multiples of `multiple`, and at least `least`, itself a multiple."""

    multiple: int
    least: int

    def apply(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width that the network is given."""
        enlarged = [max(self.least, -(-side // self.multiple) * self.multiple) for side in (height, width)]
        return enlarged[0], enlarged[1]


TRIED = [Padding(1, 1), Padding(1, 32), Padding(32, 32), Padding(32, 128)]  # of a network that does not say


class Exportable(nn.Module):
    """Normalisation, padding, network, crop, softmax, weighted mean of the members, labels: all as one module.

    Shape: images (N, H, W, C) for layout NHWC, (N, C, H, W) for NCHW, of `input_type`, not normalised; returns labels
    (N, H, W), uint8 up to 256 classes, else uint16, and probabilities (N, num_classes, H, W) float32, 1 over the
    classes. Labels are the first class of the largest logit (several members: of the largest mean probability).

    Args:
        networks: the members, each from normalised (N, C, H, W) to logits (N, num_classes, H, W), on the CPU, float32;
            they are set to evaluation.
        weights: the share of each member; they need not add up to 1.
        channels: of the images.
        mean: per channel, or one for all, as a share of the full range of the number type; std likewise.
        std: see mean.
        input_type: the number type of the images.
        layout: the order of their axes.
        num_classes: channels of the logits.
        size: the one height and width of all images; None for any.
    Raises: ConfigError where a network takes images of no size that was tried.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        networks: Sequence[nn.Module],
        weights: Sequence[float],
        channels: int,
        mean: Sequence[float],
        std: Sequence[float],
        input_type: InputType,
        layout: Layout,
        num_classes: int,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks).eval()
        self.weights = [weight / sum(weights) for weight in weights]
        self.channels, self.num_classes, self.size = channels, num_classes, size
        self.layout, self.channels_last = layout, layout == "NHWC"
        self.input_type, self.image_type = input_type, getattr(torch, input_type)
        self.label_type = torch.uint8 if num_classes <= 256 else torch.uint16
        scale = full_range(input_type)
        # float32 before it is scaled, as the task normalises
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1) * scale)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1) * scale)
        self.paddings = [find_padding(network, channels, num_classes, size) for network in self.networks]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.dtype != self.image_type:
            raise TypeError("images have another number type than the one that this network was exported for")
        if self.channels_last:
            images = images.permute(0, 3, 1, 2)
        height, width = images.shape[-2:]
        x = (images.float() - self.mean) / self.std
        logits, probabilities = x, torch.zeros(1, device=x.device)
        for index, network in enumerate(self.networks):
            multiple, least = self.paddings[index]
            logits = network(pad_edges(x, multiple, least))[..., :height, :width].float()
            probabilities = probabilities + self.weights[index] * logits.softmax(dim=1)
        scores = logits if len(self.networks) == 1 else probabilities
        return scores.argmax(dim=1).to(self.label_type), probabilities

    def example(self, index: int) -> Tensor:
        """Return an image batch (2, C, h, w), float32, with which member `index` can be traced."""
        padding = self.paddings[index]
        side, _ = padding.apply(EXAMPLE_SIDE, EXAMPLE_SIDE)
        height, width = 2 * side, 3 * side  # unequal, so that no tracer takes one for the other
        if self.size is not None:
            height, width = padding.apply(*self.size)
        return torch.rand(2, self.channels, height, width, generator=_same_noise())

    def random_images(self, batch: int, height: int, width: int) -> Tensor:
        """Return noise on a slope, as images of the file's number type and order of axes.

        Of noise alone, a mean over any part is the same, and a network that takes the wrong part is not found out.
        """
        noise = torch.rand(batch, self.channels, height, width, generator=_same_noise())
        slope = torch.linspace(0, 1, height).view(-1, 1) * torch.linspace(1, 0, width)  # (H, W)
        shares = (noise + slope) / 2
        if self.channels_last:
            shares = shares.permute(0, 2, 3, 1).contiguous()
        return (shares * full_range(self.input_type)).to(self.image_type)


def find_padding(network: nn.Module, channels: int, num_classes: int, size: tuple[int, int] | None = None) -> Padding:
    """Return what a network says by `size_multiple` and `least_size`; of one that does not, what it is seen to take.

    Args:
        network: in evaluation mode, from (N, channels, H, W) to (N, num_classes, H, W).
        channels: of the images.
        num_classes: channels of the logits.
        size: height and width that it has to take; None for any, of which a few are tried.
    Raises: ConfigError where it takes none.
    """
    multiple = getattr(network, "size_multiple", None)
    if isinstance(multiple, int):
        least: int = getattr(network, "least_size", multiple)
        return Padding(multiple, -(-least // multiple) * multiple)
    for padding in TRIED:
        least, step = padding.least, padding.multiple
        some = [(least, least), (least + step, least + 3 * step), (least + 6 * step, least + 5 * step)]
        sizes = some if size is None else [padding.apply(*size)]
        if all(_takes(network, channels, num_classes, each) for each in sizes):
            return padding
    asked = (
        "images of any size, not even enlarged to multiples of 32"
        if size is None
        else "images of {} x {}".format(*size)
    )
    raise ConfigError(
        f"the network {type(network).__name__} does not take {asked}: give --input_size H,W with a size that it takes"
    )


@torch.no_grad()
def _takes(network: nn.Module, channels: int, num_classes: int, size: tuple[int, int]) -> bool:
    try:
        logits = network(torch.rand(1, channels, *size, generator=_same_noise()))
    except Exception:  # whatever a network of someone else raises, it says no
        return False
    return tuple(logits.shape) == (1, num_classes, *size)


def _same_noise() -> torch.Generator:
    return torch.Generator().manual_seed(0)
