"""The colours, against torchvision and step-by-step float arithmetic."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from ml_src.core import transform_specs as specs
from ml_src.core.errors import ConfigError
from ml_src.core.transforms import intensity
from ml_src.core.transforms.intensity import Pixels, mix, shift_hue


def random_image(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def by_torchvision(function, image, factor):
    return function(torch.from_numpy(image).permute(2, 0, 1), factor).permute(1, 2, 0).numpy()


def jitter(**changes):
    return intensity.ColorJitter(specs.ColorJitter(type="color_jitter", **changes))


def applied(transform, image, seed=0):
    pixels = Pixels(image)
    transform.apply(pixels, np.random.default_rng(seed))
    return pixels.image


def difference(image, other):
    return np.abs(image.astype(float) - other).max()


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.7])
def test_saturation_is_torchvisions(factor):
    image = random_image(40, 40, 3)
    assert difference(mix(image, factor, 1.0, 0.0), by_torchvision(functional.adjust_saturation, image, factor)) <= 2


@pytest.mark.parametrize("turns", [-0.5, -0.13, 0.0, 0.05, 0.31, 0.5])
def test_hue_is_torchvisions(turns):
    image = random_image(70, 33, 3)
    image[:8] = image[:8, :, :1]  # greys, which have no hue
    image[8, 0] = (255, 0, 0)
    image[9, 0] = (255, 0, 1)  # just below a full turn
    assert difference(shift_hue(image, turns), by_torchvision(functional.adjust_hue, image, turns)) <= 2


@pytest.mark.parametrize("seed", range(4))
def test_jittered_brightness_is_torchvisions(seed):
    """The draws are repeated here: first whether, then the factor."""
    image, rng = random_image(20, 20, 3), np.random.default_rng(seed)
    rng.random()
    expected = by_torchvision(functional.adjust_brightness, image, rng.uniform(0.5, 1.5))
    assert difference(applied(jitter(brightness=0.5), image, seed), expected) <= 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("channels", [1, 3])
def test_jittered_contrast_is_torchvisions(seed, channels):
    image, rng = random_image(20, 20, channels) // 2, np.random.default_rng(seed)
    rng.random()
    expected = by_torchvision(functional.adjust_contrast, image, rng.uniform(0.2, 1.8))
    assert difference(applied(jitter(contrast=0.8), image, seed), expected) <= 2


def test_jitter_is_brightness_contrast_saturation_hue_in_this_order():
    image = random_image(30, 30, 3) // 2 + 40
    rng = np.random.default_rng(5)
    rng.random()
    expected = image
    ranges = [(0.7, 1.3), (0.7, 1.3), (0.7, 1.3), (-0.1, 0.1)]
    for name, bounds in zip(("brightness", "contrast", "saturation", "hue"), ranges, strict=True):
        expected = by_torchvision(getattr(functional, f"adjust_{name}"), expected, rng.uniform(*bounds))
    jittered = applied(jitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1), image, 5)
    assert np.mean(np.abs(jittered.astype(int) - expected)) < 2  # torchvision rounds down at each of the four


def test_composed_tables_equal_the_steps_in_float():
    image = random_image(30, 30, 3)
    transforms = [
        jitter(brightness=0.4, contrast=0.6),
        intensity.RandomBrightnessContrast(specs.RandomBrightnessContrast(type="random_brightness_contrast", p=1.0)),
        jitter(contrast=0.6),
    ]
    pixels, rng = Pixels(image), np.random.default_rng(3)
    for transform in transforms:
        transform.apply(pixels, rng)

    def about_the_mean(values, ratio):
        mean = (values @ np.array([0.2989, 0.587, 0.114])).mean() / 0.9999
        return np.clip(mean + ratio * (values - mean), 0, 255)  # what brightness made too bright is not lost

    rng = np.random.default_rng(3)
    rng.random()
    expected = image * rng.uniform(0.6, 1.4)
    expected = about_the_mean(expected, rng.uniform(0.4, 1.6))
    rng.random()
    shift = 255 * rng.uniform(-0.2, 0.2)
    expected = np.clip((expected - 127.5) * rng.uniform(0.8, 1.2) + 127.5 + shift, 0, 255)
    rng.random()
    expected = about_the_mean(expected, rng.uniform(0.4, 1.6))
    assert difference(pixels.image, expected) <= 1


def test_the_mean_grey_sees_the_table_that_is_still_to_be_applied():
    pixels = Pixels(np.full((4, 4, 3), 100, np.uint8))
    pixels.adjust(lambda levels: levels * 1.5)
    assert pixels.mean_grey() == pytest.approx(150)


@pytest.mark.parametrize("channels", [1, 2, 5, 8, 130])
def test_the_mean_grey_of_other_images_is_that_of_all_channels(channels):
    image = random_image(6, 7, channels)
    assert Pixels(image).mean_grey() == pytest.approx(image.mean())


@pytest.mark.parametrize("change", [{"saturation": 0.2}, {"hue": 0.1}])
@pytest.mark.parametrize("channels", [1, 5])
def test_saturation_and_hue_of_other_images_are_refused(change, channels):
    with pytest.raises(ConfigError, match=f"RGB images only, but this image has {channels} channel"):
        applied(jitter(**change, p=0.0), random_image(4, 4, channels))


def test_jitter_of_strength_zero_changes_nothing():
    image = random_image(9, 9, 3)
    np.testing.assert_array_equal(applied(jitter(), image), image)


def test_noise_has_the_standard_deviation_that_was_drawn():
    image = np.full((128, 128, 3), 128, np.uint8)
    noise = intensity.GaussianNoise(specs.GaussianNoise(type="gaussian_noise", std=0.1, p=1.0))
    stds = np.array([applied(noise, image, seed).astype(float).std() for seed in range(40)])
    assert stds.min() < 0.02 * 255
    assert 0.08 * 255 < stds.max() < 0.101 * 255
    assert stds.mean() == pytest.approx(0.05 * 255, rel=0.2)


def test_noise_is_normal_without_bias_and_independent_between_channels_and_pixels():
    image = np.full((128, 128, 3), 128, np.uint8)
    noise = intensity.GaussianNoise(specs.GaussianNoise(type="gaussian_noise", std=0.2, p=1.0))
    values = applied(noise, image).astype(float) - 128
    values /= values.std()
    assert abs(values.mean()) < 0.02
    assert np.mean(np.abs(values) < 1) == pytest.approx(0.683, abs=0.02)
    assert abs(np.mean(values[:, :, 0] * values[:, :, 1])) < 0.03
    assert abs(np.mean(values[:, 1:] * values[:, :-1])) < 0.03


def noise_field(seed=0):
    """Noise of 25.5 levels on mid grey in (256, 256), which no clipping reaches often."""
    image = np.full((256, 256, 1), 128, np.uint8)
    return intensity.add_noise(image, 25.5, np.random.default_rng(seed))[:, :, 0].astype(float) - 128


def test_noise_has_no_pattern():
    """Values and their squares, of one image or of two, are uncorrelated at any distance, as far as chance allows."""
    fields = [noise_field(0), noise_field(1), noise_field(0) ** 2, noise_field(1) ** 2]
    spectra = [np.fft.fft2((field - field.mean()) / field.std()) for field in fields]
    for one, other in ((0, 0), (0, 1), (2, 2), (2, 3)):
        correlation = np.fft.ifft2(spectra[one] * spectra[other].conj()).real / 256**2
        if one == other:
            assert correlation[0, 0] == pytest.approx(1)
            correlation[0, 0] = 0
        assert np.abs(correlation).max() < 6 / 256  # standard deviations of the mean of 65 536 products


def test_noise_is_normal_into_its_tails():
    values = np.concatenate([noise_field(seed).ravel() for seed in range(8)]) / 25.5
    assert abs(values.mean()) < 4 / len(values) ** 0.5
    assert values.std() == pytest.approx(1, abs=0.005)
    half = 0.5 / 25.5  # levels are whole
    for sigmas, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        below = np.mean(np.abs(values) <= sigmas - half) / 2 + np.mean(np.abs(values) <= sigmas + half) / 2
        assert below == pytest.approx(share, abs=0.012 if sigmas == 1 else 0.004 / sigmas)


def test_noise_is_a_function_of_the_generator():
    np.testing.assert_array_equal(noise_field(3), noise_field(3))
    assert (noise_field(3) != noise_field(4)).mean() > 0.9


def test_noise_fits_every_size():
    for shape in ((1, 1, 1), (3, 5, 1), (7, 3, 5)):
        image = np.full(shape, 100, np.uint8)
        assert intensity.add_noise(image, 5.0, np.random.default_rng(0)).shape == shape


def test_noise_saturates_instead_of_wrapping():
    noise = intensity.GaussianNoise(specs.GaussianNoise(type="gaussian_noise", std=0.1, p=1.0))
    assert applied(noise, np.full((32, 32, 3), 255, np.uint8)).min() > 100
    assert applied(noise, np.full((32, 32, 3), 0, np.uint8)).max() < 155


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_blur_has_the_width_that_was_drawn(channels):
    """The second moment of a blurred point is the variance of the Gaussian."""
    point = np.zeros((33, 33, channels), np.uint8)
    point[15:18, 15:18] = 255  # 3 x 3, of variance 2/3 along each axis: one pixel would be rounded away
    rng = np.random.default_rng(1)
    rng.random()
    sigma = rng.uniform(0.1, 2.0)
    blur = intensity.GaussianBlur(specs.GaussianBlur(type="gaussian_blur", sigma=2.0, p=1.0))
    blurred = applied(blur, point, seed=1)
    assert blurred.shape == point.shape
    for channel in range(channels):
        profile = blurred[:, :, channel].sum(axis=0) / blurred[:, :, channel].sum()
        assert profile @ (np.arange(33) - 16.0) ** 2 - 2 / 3 == pytest.approx(sigma**2, rel=0.1)


@pytest.mark.parametrize("seed", range(4))
def test_gamma_is_torchvisions(seed):
    image, rng = random_image(20, 20, 3), np.random.default_rng(seed)
    rng.random()
    expected = by_torchvision(functional.adjust_gamma, image, rng.uniform(0.4, 2.5))
    gamma = intensity.RandomGamma(specs.RandomGamma(type="random_gamma", gamma=[0.4, 2.5], p=1.0))
    assert difference(applied(gamma, image, seed), expected) <= 1


def dropout(**changes):
    return intensity.CoarseDropout(specs.CoarseDropout(type="coarse_dropout", p=1.0, **changes))


def test_holes_are_rectangles_of_the_mean_or_of_mid_grey():
    image = random_image(40, 60, 3) // 4 + 180
    normalize = intensity.Normalize(specs.Normalize(type="normalize", mean=[0.1, 0.2, 0.3], std=[1.0]))
    for statistics, colour in ((normalize, (26, 51, 76)), (None, (128, 128, 128))):
        for seed in range(10):
            pixels = Pixels(image, statistics)
            dropout(num_holes=[1, 1], size=[0.1, 0.5]).apply(pixels, np.random.default_rng(seed))
            filled = (pixels.image == colour).all(axis=2)
            rows, columns = np.flatnonzero(filled.any(axis=1)), np.flatnonzero(filled.any(axis=0))
            assert filled[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            assert 4 <= len(rows) <= 20
            assert 6 <= len(columns) <= 30
            np.testing.assert_array_equal(pixels.image[~filled], image[~filled])


def test_holes_are_as_many_as_drawn_and_all_over_the_image():
    image = np.zeros((64, 64, 1), np.uint8)
    filled = np.array([applied(dropout(num_holes=[2, 4], size=[0.01, 0.01]), image, seed) > 0 for seed in range(600)])
    counts = filled.sum(axis=(1, 2, 3))
    assert set(counts) <= {1, 2, 3, 4}  # two of them may lie in one pixel
    assert counts.mean() == pytest.approx(3, abs=0.12)
    quarters = filled.reshape(600, 2, 32, 2, 32).sum(axis=(0, 2, 4))
    assert quarters.min() / quarters.mean() > 0.85


def test_the_given_image_is_never_written_to():
    image = random_image(8, 8, 3)
    before = image.copy()
    transforms = [
        jitter(brightness=0.4, contrast=0.6, saturation=0.3, hue=0.2),
        intensity.GaussianNoise(specs.GaussianNoise(type="gaussian_noise", p=1.0)),
        intensity.GaussianBlur(specs.GaussianBlur(type="gaussian_blur", p=1.0)),
        dropout(),
    ]
    for transform in transforms:
        assert (applied(transform, image) != before).any()
        np.testing.assert_array_equal(image, before)
