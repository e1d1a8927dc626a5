"""Test-time augmentation: every view is undone before it counts, and merging is what its word says."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as torchvision

from ml_src.core.config import Config
from ml_src.core.config_file import parse_config
from ml_src.core.errors import ConfigError
from ml_src.core.inference.views import Aggregation, Merger, View, default_views, parse_views
from ml_src.core.transform_specs import Normalize
from ml_src.core.transforms import intensity

PERMUTATIONS = ["horizontal_flip", "vertical_flip", "rotate_90", "rotate_180", "rotate_270", "transpose"]
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def view_of(word: str) -> View:
    return parse_views([word], mirror=True)[1]


def seen(word: str, images: Tensor) -> Tensor:
    return view_of(word).apply(images, MEAN, STD)


def merged(tables: list[Any], how: Aggregation, weights: list[float] | None = None) -> Tensor:
    merger = Merger(how)
    for table, weight in zip(tables, weights or [1.0] * len(tables), strict=True):
        merger.add(torch.as_tensor(table), weight)
    return merger.result()


def predict(network: nn.Module, words: list[str], images: Tensor, how: Aggregation = "mean") -> Tensor:
    """The class probabilities of images, merged over the original view and others."""
    merger, size = Merger(how), (images.shape[2], images.shape[3])
    with torch.inference_mode():
        for view in parse_views(words, mirror=True):
            merger.add(view.invert(network(view.apply(images, MEAN, STD)).softmax(dim=1), size))
    return merger.result()


def pixels(*numbers: list[float]) -> Tensor:
    """Probabilities (1, C, 1, W), each list one pixel."""
    return torch.tensor(numbers).T[None, :, None]


# Views


@pytest.mark.parametrize("word", PERMUTATIONS)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 17), st.integers(1, 17)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_what_is_turned_or_mirrored_comes_back_pixel_for_pixel(
    word: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
    view = view_of(word)
    assert torch.equal(view.invert(view.apply(images, MEAN, STD), shape[2:]), images)


@pytest.mark.parametrize(
    ("word", "reference"),
    [
        ("horizontal_flip", np.fliplr),
        ("vertical_flip", np.flipud),
        ("rotate_90", np.rot90),
        ("rotate_180", lambda picture: np.rot90(picture, 2)),
        ("rotate_270", lambda picture: np.rot90(picture, 3)),
        ("transpose", np.transpose),
    ],
)
def test_a_view_shows_what_its_word_says(word: str, reference: Any) -> None:
    """Turns are counter-clockwise."""
    picture = np.arange(15.0).reshape(3, 5)
    assert np.array_equal(seen(word, torch.from_numpy(picture)[None, None])[0, 0], reference(picture))


@pytest.mark.parametrize("word", PERMUTATIONS)
def test_exactly_the_views_that_change_the_hand_of_a_picture_count_as_mirrored(word: str) -> None:
    """Read clockwise, the corners of a turned picture are the same ring."""
    (a, b), (c, d) = seen(word, torch.tensor([[[[0, 1], [3, 2]]]]))[0, 0].tolist()
    ring = [a, b, d, c]
    start = ring.index(0)
    assert view_of(word).mirrors == (ring[start:] + ring[:start] != [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("word", "size"), [("scale_0.75", (30, 45)), ("scale_0.25", (10, 15)), ("scale_1.5", (60, 90))]
)
def test_a_scaled_view_is_resampled_as_pillow_does_it(word: str, size: tuple[int, int]) -> None:
    """Pillow's bilinear filter widens where it shrinks, which is the antialiasing."""
    picture = np.random.default_rng(0).random((40, 60), np.float32)
    expected = np.array(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BILINEAR))
    assert np.allclose(seen(word, torch.from_numpy(picture)[None, None])[0, 0], expected, atol=1e-5)


@given(factor=st.sampled_from([0.25, 0.5, 0.75, 1.25, 2, 4]), height=st.integers(1, 40), width=st.integers(1, 40))
def test_a_scaled_prediction_has_the_images_size_and_stays_a_probability(
    factor: float, height: int, width: int
) -> None:
    view = view_of(f"scale_{factor}")
    generator = torch.Generator().manual_seed(height * width)
    scaled = view.apply(torch.rand((1, 3, height, width), generator=generator), MEAN, STD)
    probs = view.invert(scaled.softmax(dim=1), (height, width))
    assert probs.shape == (1, 3, height, width)
    assert torch.allclose(probs.sum(dim=1), torch.ones(1, height, width), atol=1e-5)
    assert probs.min() >= 0


@pytest.mark.parametrize("word", ["scale_0.5", "scale_0.75", "scale_1.25", "scale_2"])
def test_a_scaled_prediction_comes_back_to_where_its_pixels_are(word: str) -> None:
    """A wide wave is hardly changed by the way there and back; half a pixel to the side would change it by 0.05."""
    y, x = torch.meshgrid(torch.arange(61.0), torch.arange(83.0), indexing="ij")
    wave = (torch.sin(x / 10) * torch.cos(y / 10))[None, None]
    back = view_of(word).invert(seen(word, wave), (61, 83))
    assert float((back - wave)[..., 4:-4, 4:-4].abs().max()) < 0.02


def test_brightness_multiplies_the_values_of_the_pixels() -> None:
    values = torch.rand((2, 3, 7, 9), generator=torch.Generator().manual_seed(0)) * 0.9  # no factor of 1.1 clips these
    images = (values - MEAN) / STD
    for word, factor in (("brightness", 1.1), ("brightness_0.8", 0.8)):
        expected = (torchvision.adjust_brightness(values, factor) - MEAN) / STD
        assert torch.allclose(seen(word, images), expected, atol=1e-5)


def test_contrast_multiplies_the_distance_to_the_mean_of_normalize() -> None:
    values = torch.rand((2, 3, 7, 9), generator=torch.Generator().manual_seed(0))
    for word, factor in (("contrast", 1.1), ("contrast_0.8", 0.8)):
        expected = (MEAN + factor * (values - MEAN) - MEAN) / STD
        assert torch.allclose(seen(word, (values - MEAN) / STD), expected, atol=1e-5)


def test_black_of_images_that_are_not_8_bit_is_where_training_has_it() -> None:
    values = np.random.default_rng(0).normal(-40, 20, (6, 5, 1)).astype(np.float32)
    normalize = intensity.Normalize(Normalize(type="normalize", mean=[-40.0], std=[20.0]))
    training = intensity.pixels_of(values, normalize)
    training.adjust(lambda levels: 1.1 * levels)
    images = torch.from_numpy((values + 40) / 20).permute(2, 0, 1)[None]
    shown = view_of("brightness").apply(images, torch.tensor(2.0), torch.tensor(1.0))
    assert np.allclose(shown[0, 0], (training.image[:, :, 0] + 40) / 20, atol=1e-5)


# TTA as a whole


def symmetric_kernels(network: nn.Sequential) -> nn.Sequential:
    """Give each convolution the mean of its kernels under all flips and quarter turns."""
    for layer in network:
        if isinstance(layer, nn.Conv2d):
            kernels = layer.weight.data
            turned = [kernels.rot90(turns, (2, 3)) for turns in range(4)]
            layer.weight.data = torch.stack([*turned, *(kernel.mT for kernel in turned)]).mean(dim=0)
    return network


def convolutions(size: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, size, padding=size // 2), nn.ReLU(), nn.Conv2d(8, 4, size, padding=size // 2))


@pytest.mark.parametrize("how", ["mean", "max", "voting"])
@pytest.mark.parametrize(
    "network", [convolutions(1), symmetric_kernels(convolutions(3))], ids=["pointwise", "symmetric"]
)
def test_an_equivariant_network_is_not_changed_by_turns_and_flips(network: nn.Sequential, how: Aggregation) -> None:
    """All views say the same then: merging gives it back, or every vote to one class."""
    images = torch.randn((2, 3, 13, 22), generator=torch.Generator().manual_seed(1))
    plain = predict(network, [], images)
    augmented = predict(network, PERMUTATIONS, images, how)
    assert torch.equal(augmented.argmax(dim=1), plain.argmax(dim=1))
    if how != "voting":
        assert torch.allclose(augmented, plain, atol=1e-5)


def test_a_network_that_is_not_equivariant_is_changed_by_each_view() -> None:
    """So that the test above could fail."""
    network, images = convolutions(3), torch.randn((1, 3, 13, 22), generator=torch.Generator().manual_seed(1))
    for word in [*PERMUTATIONS, "scale_0.75", "brightness", "contrast"]:
        assert not torch.allclose(predict(network, [word], images), predict(network, [], images), atol=1e-3)


def test_on_an_even_image_no_scale_changes_a_pointwise_network() -> None:
    images = torch.tensor([0.3, -1.0, 2.0]).view(1, 3, 1, 1).expand(1, 3, 13, 22)
    network = convolutions(1)
    scaled = predict(network, ["scale_0.25", "scale_0.7", "scale_3"], images)
    assert torch.allclose(scaled, predict(network, [], images), atol=1e-5)


def test_classes_that_are_left_and_right_are_lost_by_a_flip_which_mirror_false_forbids() -> None:
    """The network tells whether it is brighter to the right (class 1) or to the left: a flip takes back all it knew."""
    network = nn.Conv2d(3, 2, (1, 3), padding="same", padding_mode="replicate", bias=False)
    slope = torch.tensor([-1.0, 0, 1]).expand(3, 1, 3)
    network.weight.data = torch.stack([-slope, slope])
    images = torch.linspace(-2, 2, 16).expand(1, 3, 4, 16)
    assert torch.all(predict(network, [], images)[:, 1] > 0.6)
    assert torch.allclose(predict(network, ["horizontal_flip"], images), torch.tensor(0.5), atol=1e-5)
    words = ["rotate_90", "rotate_180", "rotate_270", "scale_0.5", "contrast"]
    assert len(parse_views(words, mirror=False)) == 6
    with pytest.raises(ConfigError, match=r"data\.mirror is false .* leave out vertical_flip, transpose$"):
        parse_views(["vertical_flip", *words, "transpose"], mirror=False)


# Words


def test_the_original_view_comes_first_and_changes_nothing() -> None:
    views = parse_views(["scale_0.75", "brightness", "rotate_90"], mirror=True)
    assert [view.name for view in views] == ["original", "scale_0.75", "brightness_1.1", "rotate_90"]
    images = torch.rand(1, 3, 4, 5)
    assert views[0].apply(images, MEAN, STD) is images and views[0].invert(images, (4, 5)) is images
    assert [view.name for view in parse_views([], mirror=False)] == ["original"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["horizontalflip"], "unknown name 'horizontalflip'; did you mean 'horizontal_flip'?"),
        (["rotate-90"], "did you mean 'rotate_90'?"),
        (["scale"], "did you mean 'scale_0.75'?"),
        (["rotate_45"], "unknown name 'rotate_45'"),
        (["scale_nan"], "unknown name 'scale_nan'"),
        (["brightness_-1"], "unknown name 'brightness_-1'"),
        (["original"], "unknown name 'original'; known: "),
        ([""], "unknown name ''"),
        (["scale_0.2"], "the factor of scale_0.2 must be 0.25 to 4, and not 1"),
        (["contrast_4.01"], "the factor of contrast_4.01 must be"),
        (["scale_1.0"], "the factor of scale_1.0 must be"),
        (["rotate_90", "rotate_90"], "rotate_90 is there already"),
        (["brightness_1.10", "brightness"], "brightness is there already"),
    ],
)
def test_words_that_are_no_views_are_one_sentence(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_views(words, mirror=True)
    assert str(caught.value).startswith("--tta_augmentations") and expected in str(caught.value)
    assert "\n" not in str(caught.value)


def config_with(*train: str | dict[str, Any], mirror: bool = True) -> Config:
    specs = [{"type": each} if isinstance(each, str) else each for each in train]
    data = {"data_dir": "x", "num_classes": 2, "mirror": mirror}
    return parse_config({"data": data, "transforms": {"train": specs}})


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        (["random_horizontal_flip"], ["horizontal_flip"]),
        (["random_vertical_flip"], ["vertical_flip"]),
        (["random_vertical_flip", "random_horizontal_flip"], ["horizontal_flip", "vertical_flip", "rotate_180"]),
        (["random_rotate90"], ["rotate_90", "rotate_180", "rotate_270"]),
        (["random_transpose", "random_horizontal_flip"], ["horizontal_flip", "transpose"]),
        (["random_vertical_flip", {"type": "random_horizontal_flip", "p": 0}], ["vertical_flip"]),
        (["random_horizontal_flip", "random_vertical_flip", "random_rotate90", "random_transpose"], PERMUTATIONS),
        ([{"type": "random_rotation", "degrees": 90}], ["horizontal_flip"]),
        ([], ["horizontal_flip"]),
    ],
)
def test_tta_alone_means_the_flips_and_turns_of_training(train: list[Any], expected: list[str]) -> None:
    words = default_views(config_with(*train))
    assert words == expected
    assert len(parse_views(words, mirror=True)) == 1 + len(expected)


def test_without_mirroring_tta_alone_means_turns_or_asks_for_words() -> None:
    assert default_views(config_with("random_rotate90", mirror=False)) == ["rotate_90", "rotate_180", "rotate_270"]
    with pytest.raises(ConfigError, match=r"--tta: data\.mirror is false .* name some") as caught:
        default_views(config_with(mirror=False))
    suggested = str(caught.value).partition("--tta_augmentations ")[2].split()
    assert len(parse_views(suggested, mirror=False)) == 3


# Merging. In each table a list is one pixel, and its numbers are the classes.


def test_the_mean_is_weighted() -> None:
    tables = [pixels([0.8, 0.2]), pixels([0.2, 0.8])]
    assert torch.allclose(merged(tables, "mean"), pixels([0.5, 0.5]))
    assert torch.allclose(merged(tables, "mean", [3, 1]), pixels([0.65, 0.35]))


def test_the_largest_of_each_class_are_made_to_sum_to_one() -> None:
    tables = [pixels([0.5, 0.3, 0.2], [1, 0, 0]), pixels([0.1, 0.8, 0.1], [1, 0, 0]), pixels([0, 0.3, 0.7], [1, 0, 0])]
    assert torch.allclose(merged(tables, "max"), pixels([0.25, 0.4, 0.35], [1, 0, 0]))


def test_votes_are_counted_and_a_sure_minority_does_not_win() -> None:
    tables = [pixels([0.6, 0.4, 0.0]), pixels([0.6, 0.4, 0.0]), pixels([0.0, 1.0, 0.0])]
    assert torch.allclose(merged(tables, "voting"), pixels([2 / 3, 1 / 3, 0]), atol=1e-3)
    assert merged(tables, "mean").argmax(dim=1).item() == 1
    assert torch.allclose(merged(tables, "voting", [1, 1, 3]), pixels([2 / 5, 3 / 5, 0]), atol=1e-3)


def test_equal_votes_are_decided_by_the_mean_probability() -> None:
    tables = [pixels([0.6, 0.4], [0.9, 0.1]), pixels([0.1, 0.9], [0.4, 0.6])]
    votes = merged(tables, "voting")
    assert votes.argmax(dim=1).flatten().tolist() == [1, 0]
    assert torch.allclose(votes[0, :, 0, 0], torch.tensor([0.5 + 0.00035, 0.5 + 0.00065]) / 1.001, atol=1e-6)


eighths = st.lists(st.integers(0, 8), min_size=2, max_size=2).map(sorted).map(lambda cuts: np.diff([0, *cuts, 8]) / 8)


@given(st.lists(eighths, min_size=1, max_size=9))
def test_the_winner_of_a_vote_has_the_most_votes_and_among_those_the_highest_mean(rows: list[Any]) -> None:
    """Counted by hand; multiples of an eighth are exact in float32, and often equal."""
    result = merged([torch.tensor(row, dtype=torch.float32).view(1, 3, 1, 1) for row in rows], "voting").flatten()
    votes = [sum(int(np.argmax(row)) == label for row in rows) for label in range(3)]
    ranks = list(zip(votes, np.sum(rows, axis=0), strict=True))
    assert ranks[int(result.argmax())] == max(ranks)
    assert float(result.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("how", ["mean", "voting"])
def test_a_weight_of_two_is_to_be_there_twice_and_only_ratios_count(how: Aggregation) -> None:
    one, two, three = torch.rand((3, 2, 4, 5, 6), generator=torch.Generator().manual_seed(0)).softmax(dim=2)
    weighted = merged([one, two, three], how, [1, 2, 1])
    assert torch.allclose(weighted, merged([two, one, two, three], how), atol=1e-6)
    assert torch.allclose(weighted, merged([one, two, three], how, [0.25, 0.5, 0.25]), atol=1e-6)
    assert torch.allclose(weighted.sum(dim=1), torch.ones(2, 5, 6), atol=1e-5)


@pytest.mark.parametrize("how", ["mean", "max", "voting"])
def test_what_is_merged_is_not_written_to_and_may_change_afterwards(how: Aggregation) -> None:
    probs = torch.rand((1, 3, 4, 5), generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    before, merger = probs.clone(), Merger(how)
    merger.add(probs)
    merger.add(1 - probs)
    first = merger.result()
    assert torch.equal(probs, before)
    probs.zero_()
    assert torch.equal(merger.result(), first)
