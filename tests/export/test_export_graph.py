"""The module that is exported: normalised as in training, padded as the network does it, labels of the largest."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ml_src.core.config_file import parse_config
from ml_src.core.errors import ConfigError
from ml_src.core.export.graph import Exportable, Padding, find_padding
from ml_src.core.network.custom import SimpleUNet, pad_edges
from ml_src.core.tasks.segmentation import Segmentation

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.25]


class Halving(nn.Module):
    """Needs sides that are even `levels` times, and says nothing about it."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, images: Tensor) -> Tensor:
        x = nn.functional.avg_pool2d(images, 2**self.levels)
        return images[:, :2] + nn.functional.interpolate(x, scale_factor=2**self.levels)[:, :2]


class Bottom(nn.Module):
    """Takes 224 x 224 pixels and nothing else."""

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :2] + torch.zeros(224, 224)


class Values(nn.Module):
    """Its logits are the first channels of the images, which it gets to see."""

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images
        return images[:, :2]


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_images_are_normalised_to_the_bit_as_the_task_does_it(kind: str) -> None:
    normalize = {"type": "normalize", "mean": MEAN, "std": STD}
    config = {"data": {"data_dir": "x", "num_classes": 2}, "transforms": {"train": [normalize]}}
    network = Values()
    exportable = Exportable([network], [1.0], 3, MEAN, STD, kind, "NCHW", 2)
    images = exportable.random_images(2, 9, 11)
    exportable(images)
    assert torch.equal(network.seen, Segmentation(parse_config(config)).normalize(images, torch.device("cpu")))


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (17, 31), (64, 48)])
def test_simple_unet_gets_the_padding_that_it_would_make_itself(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = SimpleUNet(3, 4, base_channels=2).eval()
    exportable = Exportable([network], [1.0], 3, [0.0], [1.0], "float32", "NCHW", 4)
    images = exportable.random_images(2, *size)
    with torch.inference_mode():
        assert torch.equal(exportable(images)[1], network(images).softmax(dim=1))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (15, 16), (33, 64)])
def test_padding_repeats_the_last_row_and_column_as_numpy_does(height: int, width: int) -> None:
    images = torch.rand(2, 3, height, width)
    padded = pad_edges(images, 16, 32).numpy()
    bottom, right = padded.shape[2] - height, padded.shape[3] - width
    assert padded.shape[2:] == Padding(16, 32).apply(height, width)
    assert np.array_equal(padded, np.pad(images.numpy(), ((0, 0), (0, 0), (0, bottom), (0, right)), mode="edge"))


def test_both_layouts_give_the_same() -> None:
    torch.manual_seed(0)
    network = SimpleUNet(3, 4, base_channels=2)
    last, first = (Exportable([network], [1.0], 3, MEAN, STD, "uint8", layout, 4) for layout in ("NHWC", "NCHW"))
    images = last.random_images(2, 20, 33)
    for one, other in zip(last(images), first(images.permute(0, 3, 1, 2)), strict=True):
        assert torch.equal(one, other)


def test_several_members_give_the_weighted_mean_of_their_probabilities() -> None:
    torch.manual_seed(0)
    networks = [nn.Conv2d(3, 4, 1) for _ in range(3)]
    exportable = Exportable(networks, [1.0, 2.0, 5.0], 3, [0.0], [1.0], "float32", "NCHW", 4)
    images = exportable.random_images(2, 7, 5)
    labels, probabilities = exportable(images)
    shares = [network(images).softmax(dim=1).detach().numpy() for network in networks]
    expected = np.average(shares, axis=0, weights=[1, 2, 5])
    assert np.allclose(probabilities.detach().numpy(), expected, atol=1e-6)
    assert np.array_equal(labels.numpy(), expected.argmax(axis=1))


@pytest.mark.parametrize(("num_classes", "kind"), [(256, torch.uint8), (257, torch.uint16)])
def test_labels_are_uint8_as_long_as_that_can_hold_them(num_classes: int, kind: torch.dtype) -> None:
    exportable = Exportable([nn.Conv2d(1, num_classes, 1)], [1.0], 1, [0.0], [1.0], "uint8", "NHWC", num_classes)
    assert exportable(exportable.random_images(1, 3, 3))[0].dtype == kind


def test_images_of_another_number_type_are_refused() -> None:
    exportable = Exportable([nn.Conv2d(1, 2, 1)], [1.0], 1, [0.0], [1.0], "uint8", "NHWC", 2)
    with pytest.raises(TypeError, match="another number type"):
        exportable(torch.zeros(1, 4, 4, 1))


@pytest.mark.parametrize(
    ("network", "padding"),
    [
        (nn.Conv2d(3, 2, 3, padding=1), Padding(1, 1)),
        (nn.Sequential(nn.ReflectionPad2d(20), nn.Conv2d(3, 2, 41)), Padding(1, 32)),
        (Halving(1), Padding(32, 32)),
        (Halving(5), Padding(32, 32)),
        (nn.Sequential(nn.ReflectionPad2d(100), Halving(3), nn.ZeroPad2d(-100)), Padding(32, 128)),
        (SimpleUNet(3, 2, base_channels=2), Padding(16, 32)),
    ],
)
def test_what_a_network_needs_is_found_by_trying_where_it_does_not_say(network: nn.Module, padding: Padding) -> None:
    assert find_padding(network.eval(), 3, 2) == padding


def test_a_least_size_that_is_no_multiple_becomes_one() -> None:
    network = Halving(4)
    network.size_multiple, network.least_size = 16, 40
    assert find_padding(network, 3, 2) == Padding(16, 48)


def test_a_network_for_one_size_only_needs_to_be_told_that_size() -> None:
    with pytest.raises(ConfigError, match=r"Bottom does not take images of any size.*--input_size H,W"):
        find_padding(Bottom(), 3, 2)
    with pytest.raises(ConfigError, match="Bottom does not take images of 100 x 224"):
        find_padding(Bottom(), 3, 2, size=(100, 224))
    assert find_padding(Bottom(), 3, 2, size=(224, 224)) == Padding(1, 1)
    assert find_padding(Bottom(), 3, 2, size=(200, 221)) == Padding(32, 32)
