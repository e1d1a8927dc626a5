"""Test-time augmentation: every view is undone before it counts, and merging is what its word says."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.special import softmax
from torch import nn
from torchvision.transforms.v2 import functional as torchvision

from ml_src.core.config import Config
from ml_src.core.config_file import parse_config
from ml_src.core.errors import ConfigError
from ml_src.core.inference.views import Aggregation, Levels, Merger, View, default_views, parse_views
from ml_src.core.transform_specs import Normalize
from ml_src.core.transforms import intensity
from ml_src.core.transforms.intensity import full_range

Array = np.ndarray[Any, Any]
PERMUTATIONS = ["horizontal_flip", "vertical_flip", "rotate_90", "rotate_180", "rotate_270", "transpose"]
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
FLOAT = Levels(np.zeros(3, np.float32), MEAN)  # of floats that are shares of white


def view_of(word: str) -> View:
    return parse_views([word], mirror=True)[1]


def seen(word: str, picture: Array) -> Array:
    """A picture (H, W) as a view shows it."""
    return view_of(word).apply(picture[None, :, :, None], FLOAT)[0, :, :, 0]


def back(word: str, picture: Array, size: tuple[int, int]) -> Array:
    return view_of(word).invert(picture[None, None], size)[0, 0]


def merged(tables: list[Any], how: Aggregation, weights: list[float] | None = None) -> Array:
    merger = Merger(how)
    for table, weight in zip(tables, weights or [1.0] * len(tables), strict=True):
        merger.add(np.asarray(table, np.float32), weight)
    return merger.result()


def probabilities(network: nn.Module, pixels: Array) -> Array:
    """What a network says of pixels (N, H, W, 3)."""
    with torch.inference_mode():
        images = torch.from_numpy(np.ascontiguousarray((pixels - MEAN) / STD)).permute(0, 3, 1, 2)
        return network(images).softmax(dim=1).numpy()


def predict(network: nn.Module, words: list[str], pixels: Array, how: Aggregation = "mean") -> Array:
    """The class probabilities of pixels, merged over the original view and others."""
    merger, size = Merger(how), pixels.shape[1:3]
    for view in parse_views(words, mirror=True):
        merger.add(view.invert(probabilities(network, view.apply(pixels, FLOAT)), size))
    return merger.result()


def drawn(seed: int = 1) -> Array:
    """Pixels (2, 13, 22, 3)."""
    return np.float32(np.random.default_rng(seed).normal(0.45, 0.25, (2, 13, 22, 3)))


def pixels(*numbers: list[float]) -> Array:
    """Probabilities (1, C, 1, W), each list one pixel."""
    return np.array(numbers, np.float32).T[None, :, None]


# Views


@pytest.mark.parametrize("word", PERMUTATIONS)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 17), st.integers(1, 17), st.integers(1, 3)),
    dtype=st.sampled_from([np.uint8, np.uint16, np.float32]),
)
def test_what_is_turned_or_mirrored_comes_back_pixel_for_pixel(
    word: str, shape: tuple[int, int, int, int], dtype: type
) -> None:
    images = np.random.default_rng(sum(shape)).integers(0, 256, shape).astype(dtype)
    view = view_of(word)
    shown = view.apply(images, FLOAT)
    assert shown.dtype == dtype
    assert np.array_equal(view.invert(shown.transpose(0, 3, 1, 2), shape[1:3]), images.transpose(0, 3, 1, 2))


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
    assert np.array_equal(seen(word, picture), reference(picture))


@pytest.mark.parametrize("word", PERMUTATIONS)
def test_exactly_the_views_that_change_the_hand_of_a_picture_count_as_mirrored(word: str) -> None:
    """Read clockwise, the corners of a turned picture are the same ring."""
    (a, b), (c, d) = seen(word, np.array([[0, 1], [3, 2]])).tolist()
    ring = [a, b, d, c]
    start = ring.index(0)
    assert view_of(word).mirrors == (ring[start:] + ring[:start] != [0, 1, 2, 3])


@pytest.mark.parametrize(("word", "size"), [("scale_0.5", (20, 30)), ("scale_0.25", (10, 15)), ("scale_1.5", (60, 90))])
def test_a_scaled_view_is_resampled_as_pillow_does_it(word: str, size: tuple[int, int]) -> None:
    """Averaged over whole blocks where it shrinks, bilinear where it enlarges."""
    picture = np.random.default_rng(0).random((40, 60), np.float32)
    how = Image.Resampling.BOX if size[0] < 40 else Image.Resampling.BILINEAR
    expected = np.array(Image.fromarray(picture).resize(size[::-1], how))
    assert np.allclose(seen(word, picture), expected, atol=1e-5)


@given(factor=st.sampled_from([0.25, 0.5, 0.75, 1.25, 2, 4]), height=st.integers(1, 40), width=st.integers(1, 40))
def test_a_scaled_prediction_has_the_images_size_and_stays_a_probability(
    factor: float, height: int, width: int
) -> None:
    view = view_of(f"scale_{factor}")
    images = np.random.default_rng(height * width).random((1, height, width, 3), np.float32)
    scaled = view.apply(images, FLOAT).transpose(0, 3, 1, 2)
    probs = view.invert(scaled / scaled.sum(axis=1, keepdims=True), (height, width))
    assert probs.shape == (1, 3, height, width)
    assert np.allclose(probs.sum(axis=1), 1, atol=1e-5)
    assert probs.min() >= 0


@pytest.mark.parametrize("word", ["scale_0.5", "scale_0.75", "scale_1.25", "scale_2"])
def test_a_scaled_prediction_comes_back_to_where_its_pixels_are(word: str) -> None:
    """A wide wave is hardly changed by the way there and back; half a pixel to the side would change it by 0.05."""
    y, x = np.mgrid[:61, :83].astype(np.float32)
    wave = np.sin(x / 10) * np.cos(y / 10)
    again = back(word, seen(word, wave), (61, 83))
    assert float(np.abs(again - wave)[4:-4, 4:-4].max()) < 0.02


def test_images_of_many_channels_are_scaled_channel_by_channel() -> None:
    many = np.random.default_rng(0).integers(0, 65536, (1, 9, 7, 8)).astype(np.uint16)
    shown = view_of("scale_2").apply(many, Levels(np.zeros(8, np.float32), np.zeros(8, np.float32)))
    alone = view_of("scale_2").apply(many[..., 6:7], FLOAT)
    assert shown.dtype == np.uint16 and np.array_equal(shown[..., 6:7], alone)


@pytest.mark.parametrize(("word", "factor"), [("brightness", 1.1), ("brightness_0.8", 0.8), ("brightness_4", 4.0)])
def test_brightness_multiplies_the_values_of_the_pixels_as_torchvision_does_it(word: str, factor: float) -> None:
    """Its whole numbers are cut off where ours are rounded."""
    values = np.random.default_rng(0).integers(0, 256, (2, 7, 9, 3)).astype(np.uint8)
    shown = view_of(word).apply(values, Levels.of(values.dtype, MEAN.tolist(), STD.tolist()))
    expected = torchvision.adjust_brightness(torch.from_numpy(values).permute(0, 3, 1, 2), factor)
    assert shown.dtype == np.uint8
    assert np.abs(shown.transpose(0, 3, 1, 2).astype(int) - expected.numpy()).max() <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize(("word", "factor"), [("contrast", 1.1), ("contrast_0.8", 0.8)])
def test_contrast_multiplies_the_distance_to_the_mean_of_normalize(word: str, factor: float, dtype: type) -> None:
    scale = full_range(dtype)
    values = (scale * np.random.default_rng(0).uniform(0.1, 0.85, (2, 7, 9, 3))).astype(dtype)
    shown = view_of(word).apply(values, Levels.of(values.dtype, MEAN.tolist(), STD.tolist()))
    expected = scale * MEAN + factor * (values - scale * MEAN)
    assert shown.dtype == dtype
    assert np.abs(shown - expected).max() <= (0.5001 if dtype != np.float32 else 1e-6)


def test_black_of_images_that_are_not_8_bit_is_where_training_has_it() -> None:
    values = np.random.default_rng(0).normal(-40, 20, (6, 5, 1)).astype(np.float32)
    normalize = intensity.Normalize(Normalize(type="normalize", mean=[-40.0], std=[20.0]))
    training = intensity.pixels_of(values, normalize)
    training.adjust(lambda levels: 1.1 * levels)
    shown = view_of("brightness").apply(values[None], Levels.of(values.dtype, [-40.0], [20.0]))
    assert np.allclose(shown[0], training.image, atol=1e-3)


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
    images = drawn()
    plain = predict(network, [], images)
    augmented = predict(network, PERMUTATIONS, images, how)
    assert np.array_equal(augmented.argmax(axis=1), plain.argmax(axis=1))
    if how != "voting":
        assert np.allclose(augmented, plain, atol=1e-5)


def test_a_network_that_is_not_equivariant_is_changed_by_each_view() -> None:
    """So that the test above could fail."""
    network, images = convolutions(3), drawn()
    for word in [*PERMUTATIONS, "scale_0.75", "brightness", "contrast"]:
        assert not np.allclose(predict(network, [word], images), predict(network, [], images), atol=1e-3)


def test_on_an_even_image_no_scale_changes_a_pointwise_network() -> None:
    images = np.broadcast_to(np.float32([0.3, 0.7, 0.5]), (1, 13, 22, 3))
    network = convolutions(1)
    scaled = predict(network, ["scale_0.25", "scale_0.7", "scale_3"], images)
    assert np.allclose(scaled, predict(network, [], images), atol=1e-5)


def test_classes_that_are_left_and_right_are_lost_by_a_flip_which_mirror_false_forbids() -> None:
    """The network tells whether it is brighter to the right (class 1) or to the left: a flip takes back all it knew."""
    network = nn.Conv2d(3, 2, (1, 3), padding="same", padding_mode="replicate", bias=False)
    slope = torch.tensor([-1.0, 0, 1]).expand(3, 1, 3)
    network.weight.data = torch.stack([-slope, slope])
    levels = np.linspace(-2, 2, 16, dtype=np.float32)[None, None, :, None]
    images = np.broadcast_to(levels, (1, 4, 16, 3)) * STD + MEAN
    assert np.all(predict(network, [], images)[:, 1] > 0.6)
    assert np.allclose(predict(network, ["horizontal_flip"], images), 0.5, atol=1e-5)
    words = ["rotate_90", "rotate_180", "rotate_270", "scale_0.5", "contrast"]
    assert len(parse_views(words, mirror=False)) == 6
    with pytest.raises(ConfigError, match=r"data\.mirror is false .* leave out vertical_flip, transpose$"):
        parse_views(["vertical_flip", *words, "transpose"], mirror=False)


# Words


def test_the_original_view_comes_first_and_changes_nothing() -> None:
    views = parse_views(["scale_0.75", "brightness", "rotate_90"], mirror=True)
    assert [view.name for view in views] == ["original", "scale_0.75", "brightness_1.1", "rotate_90"]
    images = drawn()
    assert views[0].apply(images, FLOAT) is images and views[0].invert(images, (13, 22)) is images
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
    assert np.allclose(merged(tables, "mean"), pixels([0.5, 0.5]))
    assert np.allclose(merged(tables, "mean", [3, 1]), pixels([0.65, 0.35]))


def test_the_largest_of_each_class_are_made_to_sum_to_one() -> None:
    tables = [pixels([0.5, 0.3, 0.2], [1, 0, 0]), pixels([0.1, 0.8, 0.1], [1, 0, 0]), pixels([0, 0.3, 0.7], [1, 0, 0])]
    assert np.allclose(merged(tables, "max"), pixels([0.25, 0.4, 0.35], [1, 0, 0]))


def test_votes_are_counted_and_a_sure_minority_does_not_win() -> None:
    tables = [pixels([0.6, 0.4, 0.0]), pixels([0.6, 0.4, 0.0]), pixels([0.0, 1.0, 0.0])]
    assert np.allclose(merged(tables, "voting"), pixels([2 / 3, 1 / 3, 0]), atol=1e-3)
    assert merged(tables, "mean").argmax(axis=1).item() == 1
    assert np.allclose(merged(tables, "voting", [1, 1, 3]), pixels([2 / 5, 3 / 5, 0]), atol=1e-3)


def test_equal_votes_are_decided_by_the_mean_probability() -> None:
    tables = [pixels([0.6, 0.4], [0.9, 0.1]), pixels([0.1, 0.9], [0.4, 0.6])]
    votes = merged(tables, "voting")
    assert votes.argmax(axis=1).flatten().tolist() == [1, 0]
    assert np.allclose(votes[0, :, 0, 0], np.array([0.5 + 0.00035, 0.5 + 0.00065]) / 1.001, atol=1e-6)


eighths = st.lists(st.integers(0, 8), min_size=2, max_size=2).map(sorted).map(lambda cuts: np.diff([0, *cuts, 8]) / 8)


@given(st.lists(eighths, min_size=1, max_size=9))
def test_the_winner_of_a_vote_has_the_most_votes_and_among_those_the_highest_mean(rows: list[Any]) -> None:
    """Counted by hand; multiples of an eighth are exact in float32, and often equal."""
    result = merged([np.float32(row).reshape(1, 3, 1, 1) for row in rows], "voting").flatten()
    votes = [sum(int(np.argmax(row)) == label for row in rows) for label in range(3)]
    ranks = list(zip(votes, np.sum(rows, axis=0), strict=True))
    assert ranks[int(result.argmax())] == max(ranks)
    assert float(result.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("how", ["mean", "voting"])
def test_a_weight_of_two_is_to_be_there_twice_and_only_ratios_count(how: Aggregation) -> None:
    one, two, three = softmax(np.random.default_rng(0).random((3, 2, 4, 5, 6)), axis=2)
    weighted = merged([one, two, three], how, [1, 2, 1])
    assert np.allclose(weighted, merged([two, one, two, three], how), atol=1e-6)
    assert np.allclose(weighted, merged([one, two, three], how, [0.25, 0.5, 0.25]), atol=1e-6)
    assert np.allclose(weighted.sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("how", ["mean", "max", "voting"])
def test_what_is_merged_is_not_written_to_and_may_change_afterwards(how: Aggregation) -> None:
    probs = softmax(np.random.default_rng(0).random((1, 3, 4, 5), np.float32), axis=1)
    before, merger = probs.copy(), Merger(how)
    merger.add(probs)
    merger.add(1 - probs)
    first = merger.result()
    assert np.array_equal(probs, before)
    probs[:] = 0
    assert np.array_equal(merger.result(), first)
