"""The networks that `model.custom_architecture` can name: SimpleUNet, and what a user registers.

An own network is a class with `__init__(self, in_channels, num_classes, **kwargs)` and `forward` from (N, C, H, W) to
(N, num_classes, H, W); `MODEL_REGISTRY['my_unet'] = MyUNet`, in a file that the config names under `plugins:`.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEVELS = 4


class SimpleUNet(nn.Module):
    """U-Net (Ronneberger, Fischer, Brox 2015) with batch normalisation, padded convolutions and any input size.

    Four levels down, four up, a skip connection at each, a 1x1 head. Level i has `base_channels * 2**i` channels.
    Dropout, where asked for, drops whole channels of each decoder level (Tompson et al. 2015).

    Shape: images (N, in_channels, H, W), normalised floats, any H, W >= 1; returns logits (N, num_classes, H, W).
    """

    size_multiple = 2**LEVELS  # both sides are halved at each level
    least_size = 2 * size_multiple  # so that more than one pixel is left at the bottom

    def __init__(
        self, in_channels: int = 3, num_classes: int = 2, base_channels: int = 64, dropout: float = 0.0, **_: object
    ) -> None:
        super().__init__()
        widths = [base_channels * 2**level for level in range(LEVELS + 1)]
        self.stem = DoubleConv(in_channels, widths[0])
        self.down = nn.ModuleList(DoubleConv(narrow, wide) for narrow, wide in pairwise(widths))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))  # wide to narrow, from the bottom up
        self.up = nn.ModuleList(nn.ConvTranspose2d(wide, narrow, kernel_size=2, stride=2) for wide, narrow in pairs)
        self.merge = nn.ModuleList(DoubleConv(2 * narrow, narrow) for _, narrow in pairs)
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(widths[0], num_classes, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        x = self.stem(pad_edges(images, self.size_multiple, self.least_size))
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(F.max_pool2d(x, 2))  # (N, 2C, H/2, W/2)
        for up, merge, skip in zip(self.up, self.merge, reversed(skips), strict=True):
            x = torch.cat([skip, up(x)], dim=1)  # (N, 2C, H, W)
            x = self.dropout(merge(x))
        logits: Tensor = self.head(x)
        return logits[..., :height, :width]


class DoubleConv(nn.Sequential):
    """Twice 3x3 convolution, batch normalisation, ReLU. Shape: (N, in, H, W) to (N, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


def pad_edges(images: Tensor, multiple: int, least: int) -> Tensor:
    """Repeat the last row and column until both sides are multiples of `multiple` and at least `least` pixels.

    Shape: (N, C, H, W) to (N, C, H', W'); the image itself where nothing is to be done.
    """
    height, width = images.shape[-2:]
    bottom = max(least, -(-height // multiple) * multiple) - height
    right = max(least, -(-width // multiple) * multiple) - width
    return F.pad(images, (0, right, 0, bottom), mode="replicate") if right or bottom else images


MODEL_REGISTRY: dict[str, type[nn.Module]] = {"simple_unet": SimpleUNet}
