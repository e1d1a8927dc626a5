"""A list of the configuration as one pipeline: every transform alone, and all together."""

from typing import get_args

import numpy as np
import pytest
from pydantic import TypeAdapter

from ml_src.core import transform_specs as specs
from ml_src.core.config_file import parse_config
from ml_src.core.errors import ConfigError, DataError
from ml_src.core.transforms import TRANSFORM_REGISTRY, build_transforms

IGNORE = 255

GEOMETRY = {
    "resize": {"type": "resize", "size": [50, 44]},
    "random_horizontal_flip": {"type": "random_horizontal_flip", "p": 1.0},
    "random_vertical_flip": {"type": "random_vertical_flip", "p": 1.0},
    "random_rotation": {"type": "random_rotation", "degrees": 180},
    "random_resize_crop": {"type": "random_resize_crop", "sizes": [[32, 40], [48, 36], [40, 40]], "p": 1.0},
    "elastic": {"type": "elastic", "alpha": 3.0, "sigma": 6.0, "p": 1.0},
    "random_rotate90": {"type": "random_rotate90"},
    "random_transpose": {"type": "random_transpose", "p": 1.0},
    "random_scale": {"type": "random_scale", "p": 1.0},
    "random_shift": {"type": "random_shift", "p": 1.0},
    "random_shear": {"type": "random_shear", "p": 1.0},
    "random_perspective": {"type": "random_perspective", "distortion": 0.4, "p": 1.0},
    "grid_distortion": {"type": "grid_distortion", "num_cells": 3, "distortion": 0.8, "p": 1.0},
    "random_crop": {"type": "random_crop", "size": [38, 34], "classes": [1]},
}
INTENSITY = {
    "color_jitter": {"type": "color_jitter", "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.05},
    "random_brightness_contrast": {"type": "random_brightness_contrast", "p": 1.0},
    "random_gamma": {"type": "random_gamma", "p": 1.0},
    "gaussian_noise": {"type": "gaussian_noise", "p": 1.0},
    "gaussian_blur": {"type": "gaussian_blur", "p": 1.0},
    "coarse_dropout": {"type": "coarse_dropout", "num_holes": [1, 4], "size": [0.05, 0.1], "p": 1.0},
    "normalize": {"type": "normalize", "mean": [0.5], "std": [0.25]},
}
ALL = {**GEOMETRY, **INTENSITY}


def pipeline(*entries, ignore_index=IGNORE):
    return build_transforms(TypeAdapter(list[specs.TrainTransform]).validate_python(list(entries)), ignore_index)


def generator(*key):
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def call(transforms, image, mask, seed=0, batch=0):
    return transforms(image, mask, generator(1, seed), generator(2, batch))


def target(height=45, width=54):
    """Bright rectangles of odd places and sizes on dark ground: image (H, W, 3), and its mask."""
    mask = np.zeros((height, width), np.uint8)
    for top, left, rows, columns in ((4, 5, 9, 7), (6, 30, 5, 13), (22, 12, 11, 6), (20, 35, 14, 14), (38, 20, 5, 9)):
        mask[top : top + rows, left : left + columns] = 1
    return np.where(mask[:, :, None] == 1, (200, 180, 160), (40, 60, 50)).astype(np.uint8), mask


def test_the_registry_has_every_word_of_the_configuration():
    union = get_args(specs.TrainTransform)[0]
    words = {get_args(section.model_fields["type"].annotation)[0] for section in get_args(union)}
    assert set(TRANSFORM_REGISTRY) == words == set(ALL)


@pytest.mark.parametrize("word", ALL)
@pytest.mark.parametrize("seed", range(3))
def test_image_and_mask_stay_aligned(word, seed):
    """Moved by a pixel in any direction, the mask would fit the image worse."""
    image, mask = call(pipeline(ALL[word]), *target(), seed)
    assert image.shape[:2] == mask.shape
    valid = mask[1:-1, 1:-1] != IGNORE
    fits = {}
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            rows, columns = slice(1 + down, mask.shape[0] - 1 + down), slice(1 + right, mask.shape[1] - 1 + right)
            moved, grey = mask[rows, columns], image[1:-1, 1:-1].mean(axis=2)
            chosen = valid & (moved != IGNORE)
            fits[down, right] = np.corrcoef(moved[chosen], grey[chosen])[0, 1]
    assert max(fits, key=fits.get) == (0, 0)
    assert fits[0, 0] > 0.85


@pytest.mark.parametrize("entries", [[entry] for entry in GEOMETRY.values()] + [list(GEOMETRY.values())])
@pytest.mark.parametrize("seed", range(5))
def test_where_the_image_is_pure_the_mask_names_its_colour(entries, seed):
    """A pixel that shows exactly one of the two colours was mixed from that class alone."""
    image, mask = call(pipeline(*entries), *target(), seed)
    bright, dark = (image == (200, 180, 160)).all(axis=2), (image == (40, 60, 50)).all(axis=2)
    valid = mask != IGNORE
    assert bright.any()
    assert dark.any()
    assert (mask[bright & valid] == 1).all()
    assert (mask[dark & valid] == 0).all()


@pytest.mark.parametrize("word", INTENSITY)
def test_colours_leave_the_mask_alone(word):
    image, mask = target()
    _, after = call(pipeline(ALL[word]), image, mask)
    np.testing.assert_array_equal(after, mask)


def everything():
    return pipeline(*ALL.values())


def test_the_same_generators_give_the_same_bytes():
    first, second = (call(everything(), *target(), seed=7) for _ in range(2))
    other = call(everything(), *target(), seed=8)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert (first[0] != other[0]).any()


@pytest.mark.parametrize("word", [word for word in ALL if word not in ("resize", "random_crop", "normalize")])
def test_a_probability_of_zero_is_the_identity(word):
    entry = {**ALL[word], "p": 0.0} | ({"sizes": [[45, 54]]} if word == "random_resize_crop" else {})
    image, mask = target()
    after, labels = call(pipeline(entry), image, mask)
    np.testing.assert_array_equal(after, image)
    np.testing.assert_array_equal(labels, mask)


@pytest.mark.parametrize("entries", [[], [{"type": "resize", "size": [45, 54]}], [INTENSITY["normalize"]]])
def test_a_list_that_changes_nothing_is_exact(entries):
    image, mask = target()
    after, labels = call(pipeline(*entries), image, mask)
    np.testing.assert_array_equal(after, image)
    np.testing.assert_array_equal(labels, mask)


def test_flips_are_numpys():
    image, mask = target()
    after, labels = call(pipeline(GEOMETRY["random_horizontal_flip"], GEOMETRY["random_vertical_flip"]), image, mask)
    np.testing.assert_array_equal(after, image[::-1, ::-1])
    np.testing.assert_array_equal(labels, mask[::-1, ::-1])
    assert after.flags.c_contiguous
    assert labels.flags.c_contiguous


def test_flips_happen_as_often_as_p_says():
    image, mask = target()
    transforms = pipeline({"type": "random_horizontal_flip", "p": 0.3})
    flipped = [(call(transforms, image, mask, seed)[1] != mask).any() for seed in range(300)]
    assert np.mean(flipped) == pytest.approx(0.3, abs=0.08)


def test_samples_of_one_batch_have_one_size_and_batches_differ():
    transforms = pipeline({**GEOMETRY["random_resize_crop"], "p": 0.5}, GEOMETRY["random_rotation"])
    sizes = [{call(transforms, *target(), seed, batch)[0].shape for seed in range(6)} for batch in range(12)]
    assert all(len(of_batch) == 1 for of_batch in sizes)
    assert set.union(*sizes) == {(32, 40, 3), (48, 36, 3), (40, 40, 3)}


def test_only_the_crop_draws_from_the_generator_of_the_batch():
    transforms = pipeline(*(entry for word, entry in ALL.items() if word != "random_resize_crop"))
    step_rng = generator(0)
    transforms(*target(), generator(1), step_rng)
    assert step_rng.random() == generator(0).random()


def test_geometry_comes_before_colour_whatever_the_order():
    geometry, colour = list(GEOMETRY.values()), list(INTENSITY.values())
    first, second = (call(pipeline(*entries), *target()) for entries in (geometry + colour, colour + geometry))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


@pytest.mark.parametrize("channels", [1, 2, 5, 8])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (17, 5), (45, 54)])
def test_any_size_and_number_of_channels_passes_through_everything(channels, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, channels)).astype(np.uint8)
    jitter = {"type": "color_jitter", "brightness": 0.2, "contrast": 0.2}
    entries = [jitter if word == "color_jitter" else entry for word, entry in ALL.items()]
    after, labels = call(pipeline(*entries), image, np.zeros(shape, np.uint8))
    assert after.dtype == np.uint8
    assert after.shape == (*labels.shape, channels)
    assert after.flags.c_contiguous
    assert set(np.unique(labels)) <= {0, IGNORE}


@pytest.mark.parametrize("word", ALL)
@pytest.mark.parametrize("channels", [1, 6])
@pytest.mark.parametrize(("dtype", "scale"), [(np.uint16, 200), (np.int16, 50), (np.float32, 0.01)])
def test_images_of_other_numbers_pass_through_everything_and_stay_aligned(word, dtype, scale, channels):
    image, mask = target()
    image = (image[:, :, :1].repeat(channels, axis=2) * float(scale) - (dtype == np.int16) * 3000).astype(dtype)
    entry = ALL[word] | ({"saturation": 0, "hue": 0} if word == "color_jitter" else {})
    normalize = {"type": "normalize", "mean": [float(image.mean()) / (65535 if dtype == np.uint16 else 1)]}
    normalize |= {"std": [float(image.std()) / (65535 if dtype == np.uint16 else 1)]}
    after, labels = call(pipeline(entry, *([normalize] if word != "normalize" else [])), image, mask)
    assert after.dtype == dtype
    assert after.shape == (*labels.shape, channels)
    assert after.flags.c_contiguous
    valid = labels != IGNORE
    assert np.corrcoef(after.mean(axis=2)[valid], labels[valid])[0, 1] > 0.85


@pytest.mark.parametrize("word", GEOMETRY)
@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32])
def test_geometry_of_other_numbers_is_that_of_8_bits(word, dtype):
    """For some types OpenCV rounds coordinates to 1/32 pixel, which is up to 4 of the 160 levels at an edge."""
    image, mask = target()
    eight, labels = call(pipeline(GEOMETRY[word]), image, mask)
    other, other_labels = call(pipeline(GEOMETRY[word]), image.astype(dtype), mask)
    np.testing.assert_array_equal(labels, other_labels)
    assert np.abs(other.astype(float) - eight).max() <= (4 if dtype == np.int16 else 1)


@pytest.mark.parametrize("entries", [[GEOMETRY["random_rotation"]], [GEOMETRY["elastic"]]])
def test_masks_of_16_bits_keep_their_values(entries):
    image, mask = target()
    _, labels = call(pipeline(*entries, ignore_index=65535), image, mask.astype(np.uint16) * 40000)
    assert labels.dtype == np.uint16
    assert set(np.unique(labels)) == {0, 40000, 65535}


@pytest.mark.parametrize("word", ["random_rotation", "elastic"])
def test_what_comes_from_outside_is_ignored(word):
    image, mask = target()
    _, labels = call(pipeline(GEOMETRY[word], ignore_index=77), image, np.ones_like(mask))
    assert set(np.unique(labels)) == {1, 77}


def test_a_prediction_needs_no_mask_and_gets_the_same_image():
    image, mask = target()
    after, labels = call(everything(), image, None)
    assert labels is None
    np.testing.assert_array_equal(after, call(everything(), image, mask)[0])


def test_the_arrays_given_are_never_written_to():
    image, mask = target()
    before = image.copy(), mask.copy()
    for entry in ALL.values():
        call(pipeline(entry), image, mask)
        np.testing.assert_array_equal(image, before[0])
        np.testing.assert_array_equal(mask, before[1])


def test_read_only_and_strided_arrays_are_welcome():
    """Files are often read into such arrays."""
    image, mask = target()
    turned, labels = image.transpose(1, 0, 2)[:, ::-1], mask.T[:, ::-1]
    for array in (image, mask):
        array.flags.writeable = False
    for entry in ALL.values():
        straight = call(pipeline(entry), np.ascontiguousarray(turned), np.ascontiguousarray(labels))
        strided = call(pipeline(entry), turned, labels)
        np.testing.assert_array_equal(straight[0], strided[0])
        np.testing.assert_array_equal(straight[1], strided[1])


def test_normalize_is_handed_on_and_not_applied():
    image, mask = target()
    transforms = pipeline({"type": "normalize", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]})
    assert (transforms.mean, transforms.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    np.testing.assert_array_equal(call(transforms, image, mask)[0], image)


def test_without_normalize_the_statistics_change_nothing():
    assert (pipeline().mean, pipeline().std) == ((0.0,), (1.0,))


@pytest.mark.parametrize("given", [{}, {"mean": [0.5]}, {"std": [0.5]}, {"mean": "data", "std": "data"}])
def test_statistics_that_are_still_to_be_computed_are_refused(given):
    with pytest.raises(ConfigError, match="normalize says data for mean or std"):
        pipeline({"type": "normalize", **given})


def test_two_normalizes_are_refused():
    with pytest.raises(ConfigError, match="2 normalize entries"):
        pipeline(INTENSITY["normalize"], INTENSITY["normalize"])


def test_a_mask_of_another_size_is_refused():
    image, mask = target()
    with pytest.raises(DataError, match="54 x 45 pixels has a mask of shape"):
        call(pipeline(), image, mask.T)


def test_an_ignore_index_that_the_mask_cannot_hold_is_refused():
    with pytest.raises(DataError, match="65535, more than a mask of uint8"):
        call(pipeline(ignore_index=65535), *target())


def complaint(entry):
    with pytest.raises(ConfigError) as caught:
        parse_config({"data": {"data_dir": "x", "num_classes": 2}, "transforms": {"train": [entry], "val": []}})
    return str(caught.value)


@pytest.mark.parametrize("word", ALL)
def test_an_unknown_parameter_is_refused_with_a_suggestion(word):
    known = next((key for key in ALL[word] if key != "type"), "p")
    wrong = known + known[-1]
    assert f"transforms.train.0.{wrong}: unknown key; did you mean '{known}'?" in complaint({**ALL[word], wrong: 1})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"type": "random_scale", "scale": [0, 1]}, "scale.0: "),
        ({"type": "random_scale", "scale": [2, 1]}, "scale: must be [smallest, largest], not [2.0, 1.0]"),
        ({"type": "random_shift", "x": 1.1}, "x: "),
        ({"type": "random_shift", "y": -0.1}, "y: "),
        ({"type": "random_shear", "degrees": 61}, "degrees: "),
        ({"type": "random_perspective", "distortion": 0.6}, "distortion: "),
        ({"type": "grid_distortion", "distortion": 1.0}, "distortion: "),
        ({"type": "grid_distortion", "num_cells": 1}, "num_cells: "),
        ({"type": "random_rotate90", "p": 2}, "p: "),
        ({"type": "random_transpose", "p": -1}, "p: "),
        ({"type": "random_crop", "size": [0, 8]}, "size.0: "),
        ({"type": "random_crop"}, "size is missing"),
        ({"type": "random_crop", "size": [8, 8], "classes": []}, "classes: "),
        ({"type": "random_crop", "size": [8, 8], "classes": [-1]}, "classes.0: "),
        ({"type": "random_crop", "size": [8, 8], "classes": [1, 1]}, "classes has a value twice"),
        ({"type": "random_crop", "size": [8, 8], "class_probability": 0.9}, "is for random_crop with classes"),
        ({"type": "random_resize_crop", "sizes": [[8, 8]], "scale": [0.5, 0.2]}, "scale: must be [smallest, largest]"),
        ({"type": "coarse_dropout", "num_holes": [0, 2]}, "num_holes.0: "),
        ({"type": "coarse_dropout", "num_holes": [3, 2]}, "num_holes: must be [smallest, largest], not [3, 2]"),
        ({"type": "coarse_dropout", "size": [0.1, 1.5]}, "size.1: "),
        ({"type": "random_gamma", "gamma": [0, 1]}, "gamma.0: "),
        ({"type": "normalize", "mean": "date"}, "unknown value 'date'; did you mean 'data'?"),
        ({"type": "normalize", "std": [0.0]}, "std.0: "),
    ],
)
def test_what_is_out_of_range_is_refused(change, expected):
    assert expected in complaint(change)
