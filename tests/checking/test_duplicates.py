"""Duplicates: the same picture is found however it is turned, saved or resized; different pictures are told apart."""

from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from ml_src.core.checking.duplicates import Duplicate, Fingerprint, fingerprint, near_duplicates

# What is done to an image of which words, written out with NumPy's own functions.
TURNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "the same way up": lambda image: image,
    "mirrored left to right": np.fliplr,
    "mirrored top to bottom": np.flipud,
    "turned by 180 degrees": lambda image: np.rot90(image, 2),
    "mirrored at the main diagonal": lambda image: np.swapaxes(image, 0, 1),
    "turned right by 90 degrees": lambda image: np.rot90(image, -1),
    "turned left by 90 degrees": np.rot90,
    "mirrored at the other diagonal": lambda image: np.swapaxes(np.rot90(image, 2), 0, 1),
}


def texture(seed: int, height: int = 120, width: int = 160, channels: int = 3) -> np.ndarray:
    """Draw smooth random spots around mid gray, uint8."""
    noise = np.random.default_rng(seed).normal(size=(height, width)).astype(np.float32)
    spots = cv2.GaussianBlur(noise, (0, 0), 5)
    shades = np.linspace(0.7, 1, channels)
    return as_bytes(128 + 30 * (spots / spots.std())[..., None] * shades)


def as_bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def as_jpeg(image: np.ndarray) -> np.ndarray:
    encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 75])[1]
    return cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED).reshape(image.shape)


def smaller(image: np.ndarray) -> np.ndarray:
    height, width, channels = image.shape
    return cv2.resize(image, (round(0.9 * width), round(0.9 * height))).reshape(round(0.9 * height), -1, channels)


def noisy(image: np.ndarray) -> np.ndarray:
    return as_bytes(image + np.random.default_rng(0).normal(0, 3, image.shape))


COPIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "saved as JPEG": as_jpeg,
    "a tenth smaller": smaller,
    "a tenth brighter": lambda image: as_bytes(1.1 * image),
    "noisy": noisy,
    "all together": lambda image: as_jpeg(noisy(as_bytes(1.1 * smaller(image)))),
}


def compared(images: Iterable[np.ndarray]) -> list[Duplicate]:
    return near_duplicates([fingerprint(image) for image in images])


def components(num_images: int, pairs: Iterable[tuple[int, int]]) -> set[frozenset[int]]:
    """Return what hangs together, directly or through others."""
    groups = {index: frozenset([index]) for index in range(num_images)}
    for i, j in pairs:
        for member in (joined := groups[i] | groups[j]):
            groups[member] = joined
    return set(groups.values())


# Exact


@pytest.mark.parametrize(("dtype", "channels"), [("u1", 1), ("u1", 3), ("u2", 4), ("i2", 12), ("f4", 5)])
@pytest.mark.parametrize("words", TURNS)
def test_a_turned_or_mirrored_copy_is_exact_in_every_type_of_pixel(words, dtype, channels):
    image = (texture(1, channels=channels).astype(np.float64) * 1.37).astype(dtype)
    assert compared([image, TURNS[words](image)]) == [Duplicate(0, 1, "exact", words)]


def test_digests_are_equal_exactly_for_orientations_of_one_image():
    images = [
        np.array(values, np.uint8).reshape(*shape, 1)
        for shape in ((2, 2), (2, 3), (3, 2), (3, 3))
        for values in product((0, 1), repeat=shape[0] * shape[1])
    ]
    by_digest: dict[str, set[int]] = {}
    by_content: dict[frozenset[tuple[object, ...]], set[int]] = {}
    for index, image in enumerate(images):
        orientations = [turn(image) for turn in TURNS.values()]
        by_digest.setdefault(fingerprint(image).digest, set()).add(index)
        by_content.setdefault(frozenset((each.shape, each.tobytes()) for each in orientations), set()).add(index)
    assert sorted(map(sorted, by_digest.values())) == sorted(map(sorted, by_content.values()))


def test_one_pixel_makes_an_image_another_but_it_stays_near():
    image = texture(2)
    other = image.copy()
    other[60, 80, 1] ^= 1
    assert compared([image, other]) == [Duplicate(0, 1, "near", "the same way up")]


def test_equal_bytes_of_another_type_or_shape_are_not_exact():
    image = np.arange(48, dtype=np.uint16).reshape(4, 6, 2)
    others = [image.view(np.int16), image.view(np.uint8), image.reshape(4, 4, 3), image.reshape(2, 12, 2)]
    assert len({fingerprint(each).digest for each in [image, *others]}) == 5


def test_the_order_of_bytes_in_memory_does_not_matter():
    image = texture(3).astype(np.uint16) * 100
    assert fingerprint(image.astype(">u2")) == fingerprint(image)


# Near


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("words", TURNS)
def test_a_copy_is_near_in_every_orientation(words, copy):
    image = texture(4)
    assert compared([image, TURNS[words](COPIES[copy](image))]) == [Duplicate(0, 1, "near", words)]


@pytest.mark.parametrize("dtype", ["u2", "i2", "f4"])
def test_types_of_more_bits_are_near_after_noise(dtype):
    image = texture(5).astype(np.float64) * 100 - 10_000
    image -= image.min() if dtype == "u2" else 0
    other = image + np.random.default_rng(0).normal(0, 200, image.shape)
    found = compared([image.astype(dtype), other.astype(dtype)])
    assert found == [Duplicate(0, 1, "near", "the same way up")]


def test_different_pictures_of_one_kind_are_not_near():
    assert compared(texture(seed) for seed in range(100)) == []


def test_different_pictures_within_the_same_round_frame_are_not_near():
    y, x = np.mgrid[-1:1:120j, -1:1:160j]
    inside = (x**2 + y**2 < 0.9)[..., None]
    faint = [100 + (texture(seed) / 255 - 0.5) * 50 for seed in range(30)]
    assert compared(as_bytes(np.where(inside, each, 0)) for each in faint) == []


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((40, 50, 3), np.uint8),
        np.full((40, 50, 1), 30_000, np.uint16),
        np.full((300, 400, 5), 0.1, np.float32),
        np.full((40, 50, 2), np.nan, np.float32),
        np.full((1, 1, 3), 7, np.uint8),
        np.indices((64, 64)).sum(axis=0)[..., None].astype(np.uint8) // 2 % 2 * 255,
    ],
    ids=["black", "16 bits", "float", "no data", "one pixel", "finer than the sketch"],
)
def test_what_has_no_structure_to_compare_has_no_sketch(image):
    assert fingerprint(image).sketch is None


def test_constant_images_are_not_near_each_other():
    assert compared(np.full((32, 32, 3), value, np.uint8) for value in (0, 1, 128, 255)) == []


def test_missing_data_weighs_no_more_than_its_place():
    image = texture(6).astype(np.float32)
    other = image.copy()
    other[:8, :8] = np.nan
    assert compared([image, other]) == [Duplicate(0, 1, "near", "the same way up")]


# Many


def test_many_frames_of_one_picture_are_joined_by_as_few_links_as_do():
    image = texture(7).astype(np.float64)
    draw = np.random.default_rng(0)
    frames = [as_bytes(image + draw.normal(0, 2, image.shape)) for _ in range(40)]
    found = compared(frames)
    assert len(found) == 39
    assert components(40, [(each.first, each.second) for each in found]) == {frozenset(range(40))}


def test_copies_of_copies_hang_on_the_first():
    image, other = texture(8), texture(9)
    found = compared([image, other, image[::-1], as_jpeg(image), image, as_jpeg(image)])
    assert [(each.first, each.second, each.kind) for each in found] == [
        (0, 2, "exact"),
        (0, 3, "near"),
        (0, 4, "exact"),
        (3, 5, "exact"),
    ]


def test_nothing_to_compare_gives_nothing():
    assert near_duplicates([]) == []
    assert compared([texture(10)]) == []


def turned_sketch(values: np.ndarray, turn: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Turn the picture that a sketch stands for, by way of its pixels."""
    positions = (np.arange(16) + 0.5) / 16
    cosines = np.cos(np.pi * np.outer(np.arange(16), positions)) * np.sqrt(2 / 16)
    cosines[0] /= np.sqrt(2)
    return cosines @ turn(cosines.T @ values @ cosines) @ cosines.T


def test_the_search_finds_what_comparing_all_pairs_in_all_orientations_finds():
    # 1200 sketches, more than are compared at once, around 150 centres, turned, with differences around the limit
    draw = np.random.default_rng(0)
    turns = list(TURNS.values())
    centres = draw.normal(0, 30, (150, 16, 16))
    centres[:, 0, 0] = 0
    sketches = []
    for number in range(1200):
        away = draw.normal(0, draw.uniform(0, 15), (16, 16))
        away[0, 0] = 0
        turned = turned_sketch(centres[number // 8] + away, turns[draw.integers(8)])
        sketches.append(np.clip(np.rint(turned), -127, 127).astype(np.int8))
    units = np.stack([each / np.linalg.norm(each.astype(float)) for each in sketches])
    flat = units.reshape(1200, -1)
    best = np.max(
        [flat @ np.stack([turned_sketch(each, turn) for each in units]).reshape(1200, -1).T for turn in turns], axis=0
    )
    expected = np.argwhere(np.triu(best >= 0.95, 1)).tolist()
    found = near_duplicates([Fingerprint(str(i), each.tobytes()) for i, each in enumerate(sketches)])
    grouped = components(1200, [(each.first, each.second) for each in found])
    assert grouped == components(1200, expected)
    assert 150 < len(grouped) < 1100  # neither all nor nothing
    assert len(found) == 1200 - len(grouped)
    assert all(best[each.first, each.second] >= 0.9499 for each in found)


# Real pictures


def read(folder: Path) -> tuple[list[str], list[np.ndarray]]:
    paths = sorted(folder.iterdir())
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(np.atleast_3d(np.array(image if image.mode == "L" else image.convert("RGB"))))
    return [path.name for path in paths], images


# The one pair of camvid: the car waits at a red light, only people move. The tiles were taken at several exposures.
@pytest.mark.parametrize(
    ("name", "num_links"), [("camvid", 1), ("dsb2018_nuclei", 0), ("isbi2012_em", 0), ("magnetic_tile_defects", 180)]
)
def test_real_pictures_are_told_apart_and_their_copies_are_found(real_data, name, num_links):
    names, images = read(real_data / name / "images")
    prints = [fingerprint(image) for image in images]
    found = near_duplicates(prints)
    assert {each.kind for each in found} <= {"near"}
    assert len(found) == pytest.approx(num_links, abs=num_links // 20)
    for each in found:  # frames and exposures are numbered in the order in which they were taken
        one, other = (int("".join(filter(str.isdigit, Path(names[i]).stem[-6:]))) for i in (each.first, each.second))
        assert abs(one - other) < 3000

    draw = np.random.default_rng(0)
    words = list(TURNS)
    for number in draw.permutation(len(images))[:12]:
        for make_copy in COPIES.values():
            word = words[draw.integers(8)]
            copy = fingerprint(TURNS[word](make_copy(images[number])))
            assert near_duplicates([prints[number], copy]) == [Duplicate(0, 1, "near", word)]
