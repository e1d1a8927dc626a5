"""The colours of images that are not 8-bit, against the formulas written out in float64."""

import cv2
import numpy as np
import pytest

from ml_src.core import transform_specs as specs
from ml_src.core.transforms import intensity
from ml_src.core.transforms.intensity import LUMA, Normalize, full_range, pixels_of

# number type, lowest and highest pixel of the test's images, mean and standard deviation in units of the full range
KINDS = [
    (np.uint16, 200, 9000, 0.07, 0.03),
    (np.int16, -900, 2500, 700.0, 500.0),
    (np.float32, -0.2, 1.9, 0.6, 0.3),
]


def image_of(kind, channels=3, seed=0):
    dtype, low, high, _, _ = kind
    return np.random.default_rng(seed).uniform(low, high, (24, 31, channels)).astype(dtype)


def normalize_of(kind, channels=3):
    """A mean and a standard deviation of its own for each channel."""
    mean, std = ([value * (1 + 0.1 * c) for c in range(channels)] for value in kind[3:])
    return Normalize(specs.Normalize(type="normalize", mean=mean, std=std))


def applied(transform, image, normalize, seed=0):
    pixels = pixels_of(image, normalize)
    transform.apply(pixels, np.random.default_rng(seed))
    return pixels.image


def levels_of(image, normalize):
    """The grey levels in float64, and the function back to units of the file, rounded and clipped."""
    unit = 65535 if image.dtype == np.uint16 else 1
    low, high = np.zeros(1), np.full(1, float(unit))
    if normalize is not None:
        mean, std = np.array(normalize.mean), np.array(normalize.std)
        low, high = (mean - 2 * std) * unit, (mean + 2 * std) * unit

    def to_file(levels):
        values = levels / 255 * (high - low) + low
        if image.dtype.kind == "f":
            return values
        return np.clip(np.rint(values), np.iinfo(image.dtype).min, np.iinfo(image.dtype).max)

    return 255 * (image.astype(np.float64) - low) / (high - low), to_file


def assert_near(actual, expected):
    assert actual.shape == expected.shape
    if actual.dtype.kind == "f":
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    else:
        assert np.abs(actual.astype(float) - expected).max() <= 1
        assert np.mean(actual == expected) > 0.99


def jitter(**changes):
    return intensity.ColorJitter(specs.ColorJitter(type="color_jitter", **changes))


@pytest.mark.parametrize(("dtype", "expected"), [(np.uint8, 255), (np.uint16, 65535), (np.int16, 1), (np.float32, 1)])
def test_the_full_range_is_that_of_unsigned_integers_and_one_of_what_has_units_of_its_own(dtype, expected):
    assert full_range(dtype) == full_range(np.dtype(dtype)) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalized", [True, False])
def test_brightness_and_contrast_of_jitter_equal_the_formulas(kind, normalized):
    image, normalize = image_of(kind), normalize_of(kind) if normalized else None
    rng = np.random.default_rng(3)
    rng.random()
    levels, to_file = levels_of(image, normalize)
    levels = levels * rng.uniform(0.6, 1.4)
    middle = float(levels.mean(axis=(0, 1)) @ LUMA / LUMA.sum())
    expected = middle + rng.uniform(0.5, 1.5) * (levels - middle)
    assert_near(applied(jitter(brightness=0.4, contrast=0.5), image, normalize, 3), to_file(expected))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 4, 7])
def test_brightness_contrast_equals_the_formula_for_any_number_of_channels(kind, channels):
    image, normalize = image_of(kind, channels), normalize_of(kind, channels)
    transform = intensity.RandomBrightnessContrast(
        specs.RandomBrightnessContrast(type="random_brightness_contrast", p=1.0)
    )
    rng = np.random.default_rng(5)
    rng.random()
    shift, ratio = 255 * rng.uniform(-0.2, 0.2), rng.uniform(0.8, 1.2)
    levels, to_file = levels_of(image, normalize)
    assert_near(applied(transform, image, normalize, 5), to_file(127.5 + ratio * (levels - 127.5) + shift))


@pytest.mark.parametrize("channels", [1, 5])
def test_contrast_of_other_images_keeps_the_mean_of_all_channels(channels):
    kind = KINDS[2]
    image, normalize = image_of(kind, channels), normalize_of(kind, channels)
    rng = np.random.default_rng(1)
    rng.random()
    levels, to_file = levels_of(image, normalize)
    expected = levels.mean() + rng.uniform(0.2, 1.8) * (levels - levels.mean())
    assert_near(applied(jitter(contrast=0.8), image, normalize, 1), to_file(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_gamma_equals_the_formula_and_counts_levels_below_black_as_black(kind):
    image, normalize = image_of(kind), normalize_of(kind)
    gamma = intensity.RandomGamma(specs.RandomGamma(type="random_gamma", gamma=[0.5, 2], p=1.0))
    rng = np.random.default_rng(2)
    rng.random()
    levels, to_file = levels_of(image, normalize)
    assert (levels < 0).any()
    assert (levels > 255).any()
    expected = 255 * (np.maximum(levels, 0) / 255) ** rng.uniform(0.5, 2)
    assert_near(applied(gamma, image, normalize, 2), to_file(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_saturation_mixes_with_the_luma_of_the_levels(kind):
    image, normalize = image_of(kind), normalize_of(kind)
    rng = np.random.default_rng(4)
    rng.random()
    factor = rng.uniform(0.3, 1.7)
    levels, to_file = levels_of(image, normalize)
    expected = factor * levels + (1 - factor) * (levels @ LUMA)[:, :, None]
    assert_near(applied(jitter(saturation=0.7), image, normalize, 4), to_file(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_hue_turns_the_levels_clipped_at_black(kind):
    image, normalize = image_of(kind), normalize_of(kind)
    rng = np.random.default_rng(6)
    rng.random()
    turns = rng.uniform(-0.3, 0.3)
    levels, to_file = levels_of(image, normalize)
    hsv = cv2.cvtColor(np.maximum(levels, 0).astype(np.float32), cv2.COLOR_RGB2HSV)
    hsv[:, :, 0] = (hsv[:, :, 0] + 360 * turns) % 360
    expected = to_file(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))
    turned = applied(jitter(hue=0.3), image, normalize, 6)
    spread = 4 * kind[4] * full_range(image.dtype)
    assert np.abs(turned - expected).max() < 2e-3 * spread


@pytest.mark.parametrize("kind", KINDS)
def test_noise_has_the_drawn_share_of_four_standard_deviations(kind):
    image = np.full((128, 128, 3), (kind[1] + kind[2]) / 2).astype(kind[0])
    noise = intensity.GaussianNoise(specs.GaussianNoise(type="gaussian_noise", std=0.2, p=1.0))
    normalize = normalize_of(kind)
    noisy = applied(noise, image, normalize, 7).astype(float)
    rng = np.random.default_rng(7)
    rng.random()
    expected = rng.uniform(0, 0.2) * 4 * np.array(normalize.std) * full_range(kind[0])
    np.testing.assert_allclose(noisy.std(axis=(0, 1)), expected, rtol=0.03)
    np.testing.assert_allclose(noisy.mean(axis=(0, 1)), image[0, 0], atol=0.03 * expected.max())


@pytest.mark.parametrize("kind", KINDS)
def test_blur_is_that_of_the_file_values(kind):
    """A blur is linear and keeps constants, so that it does not matter in which units it is done."""
    image, normalize = image_of(kind, 5), normalize_of(kind, 5)
    blur = intensity.GaussianBlur(specs.GaussianBlur(type="gaussian_blur", sigma=2.0, p=1.0))
    rng = np.random.default_rng(8)
    rng.random()
    sigma = rng.uniform(0.1, 2.0)
    expected = np.dstack([cv2.GaussianBlur(image[:, :, c].astype(np.float64), (0, 0), sigma) for c in range(5)])
    assert np.abs(applied(blur, image, normalize, 8) - expected).max() < (1 if kind[0] != np.float32 else 1e-4)


def test_levels_beyond_black_and_white_are_not_clipped_but_integers_stay_in_their_type():
    transform = intensity.RandomBrightnessContrast(
        specs.RandomBrightnessContrast(type="random_brightness_contrast", brightness=1.0, contrast=0, p=1.0)
    )
    rng = np.random.default_rng(0)
    rng.random()
    shift = rng.uniform(-1, 1)
    for image, expected in (
        (np.array([[[-5.0], [9.0]]], np.float32), [-5 + shift, 9 + shift]),
        (np.array([[[0], [65535]]], np.uint16), np.clip([65535 * shift, 65535 + 65535 * shift], 0, 65535)),
    ):
        np.testing.assert_allclose(applied(transform, image, None).ravel(), np.float32(expected), rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_transform_changes_is_the_array_itself(kind):
    image = image_of(kind)
    assert applied(jitter(brightness=0.5, p=0.0), image, normalize_of(kind)) is image


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_going_to_levels_and_back_changes_no_integer(dtype):
    values = np.arange(np.iinfo(dtype).min, np.iinfo(dtype).max + 1, dtype=np.int64).astype(dtype)
    for kind in KINDS:
        if kind[0] == dtype:
            pixels = pixels_of(values.reshape(256, 256, 1), normalize_of(kind, 1))
            pixels.adjust(lambda levels: levels)
            np.testing.assert_array_equal(pixels.image.ravel(), values)


@pytest.mark.parametrize("kind", KINDS)
def test_the_array_given_is_never_written_to(kind):
    image, normalize = image_of(kind), normalize_of(kind)
    before = image.copy()
    transforms = [
        jitter(brightness=0.4, contrast=0.6, saturation=0.3, hue=0.2),
        intensity.RandomGamma(specs.RandomGamma(type="random_gamma", p=1.0)),
        intensity.GaussianNoise(specs.GaussianNoise(type="gaussian_noise", p=1.0)),
        intensity.GaussianBlur(specs.GaussianBlur(type="gaussian_blur", p=1.0)),
        intensity.CoarseDropout(specs.CoarseDropout(type="coarse_dropout", p=1.0)),
    ]
    for transform in transforms:
        assert (applied(transform, image, normalize) != before).any()
        np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalized", [True, False])
def test_dropped_rectangles_have_the_mean_of_normalize_in_units_of_the_file(kind, normalized):
    image = image_of(kind)
    dropout = intensity.CoarseDropout(
        specs.CoarseDropout(type="coarse_dropout", num_holes=(1, 1), size=(0.5, 0.5), p=1.0)
    )
    after = applied(dropout, image, normalize_of(kind) if normalized else None)
    filled = (after != image).any(axis=2)
    expected = np.array(normalize_of(kind).mean if normalized else [0.5]) * full_range(kind[0])
    if kind[0] != np.float32:
        expected = np.rint(expected)
    assert filled.sum() == pytest.approx(12 * 16, abs=3)
    np.testing.assert_allclose(after[filled], np.broadcast_to(expected, (filled.sum(), 3)), rtol=1e-6)
    np.testing.assert_array_equal(after[~filled], image[~filled])
