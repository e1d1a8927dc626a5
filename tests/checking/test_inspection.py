"""One look at each file: which files belong together, and the facts that are counted of them."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from ml_src.core.checking import inspection
from ml_src.core.checking.duplicates import near_duplicates
from ml_src.core.checking.inspection import MOST_VALUES, inspect_all, look
from ml_src.core.checking.layouts import Files, find_files
from ml_src.core.data import headers
from ml_src.core.errors import DataError


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def mask_look(path: Path) -> inspection.MaskLook:
    return look(None, [path]).masks[0]


def random_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


# Which files belong together


def matched(folder: Path, images: list[str], masks: list[str]) -> list[tuple[str | None, list[str]]]:
    touch(folder, *(f"images/{name}" for name in images), *(f"masks/{name}" for name in masks))
    return [
        (found.image and found.image.name, [path.relative_to(folder / "masks").as_posix() for path in found.masks])
        for found in find_files(folder)
    ]


@pytest.mark.parametrize(
    ("images", "masks", "expected"),
    [
        pytest.param(["a.jpg", "b.jpg"], ["b.png", "a.png"], [("a.jpg", ["a.png"]), ("b.jpg", ["b.png"])], id="stems"),
        pytest.param(["a.jpg"], ["a_mask.png"], [("a.jpg", ["a_mask.png"])], id="the image's stem goes first"),
        pytest.param(
            ["1.png", "1_2.png"],
            ["1_mask.png", "1_2_mask.png"],
            [("1.png", ["1_mask.png"]), ("1_2.png", ["1_2_mask.png"])],
            id="the longest stem wins",
        ),
        pytest.param(["1.png", "11.png"], ["11-a.png"], [("1.png", []), ("11.png", ["11-a.png"])], id="a sign follows"),
        pytest.param(
            ["001_image.png", "002_image.png"],
            ["001_annotation.png", "002_annotation.png"],
            [("001_image.png", ["001_annotation.png"]), ("002_image.png", ["002_annotation.png"])],
            id="a word for image and a word for mask",
        ),
        pytest.param(
            ["202309_patchN_1.tif", "202309_patchN_2.tif"],
            ["202309_mask_2.tif", "202309_mask_1.tif"],
            [("202309_patchN_1.tif", ["202309_mask_1.tif"]), ("202309_patchN_2.tif", ["202309_mask_2.tif"])],
            id="two numbers",
        ),
        pytest.param(
            ["00.tif", "01.tif"],
            ["labels00000000.png", "labels00000001.png"],
            [("00.tif", ["labels00000000.png"]), ("01.tif", ["labels00000001.png"])],
            id="leading zeros",
        ),
        pytest.param(
            ["img_cat.png", "img_dog.png"],
            ["gt_dog.png", "gt_cat.png"],
            [("img_cat.png", ["gt_cat.png"]), ("img_dog.png", ["gt_dog.png"])],
            id="words",
        ),
        pytest.param(["IMG_1.PNG"], ["img_1.png"], [("IMG_1.PNG", ["img_1.png"])], id="capital letters"),
        pytest.param(
            ["1.png", "2.png"], ["3.png"], [("1.png", []), ("2.png", []), (None, ["3.png"])], id="nothing alike"
        ),
        pytest.param(["cat.png"], ["dog.png"], [("cat.png", []), (None, ["dog.png"])], id="only signs"),
        pytest.param(
            ["a_1.png", "a_2.png"],
            ["a_1.png", "b_2.png"],
            [("a_1.png", ["a_1.png"]), ("a_2.png", []), (None, ["b_2.png"])],
            id="a word that some masks share is no sign",
        ),
        pytest.param(
            ["1_a.png", "1_b.png"],
            ["x1.png"],
            [("1_a.png", []), ("1_b.png", []), (None, ["x1.png"])],
            id="ambiguous numbers",
        ),
        pytest.param(
            ["a.png", "b.png"],
            ["crack/a.png", "road/a.png", "crack/b.png"],
            [("a.png", ["crack/a.png", "road/a.png"]), ("b.png", ["crack/b.png"])],
            id="a folder a class",
        ),
        pytest.param(["a.png"], ["a/1.png", "a/2.png"], [("a.png", ["a/1.png", "a/2.png"])], id="a folder an image"),
        pytest.param(["a.png", "a.jpg"], ["a.png"], [("a.jpg", ["a.png"]), ("a.png", [])], id="the first of one stem"),
    ],
)
def test_masks_are_matched_with_images(
    images: list[str], masks: list[str], expected: list[tuple[str | None, list[str]]], tmp_path: Path
) -> None:
    assert matched(tmp_path, images, masks) == expected


@given(
    stems=st.lists(st.from_regex(r"[a-z]{1,3}_?[0-9]{1,4}", fullmatch=True), min_size=1, max_size=6, unique=True),
    image_sign=st.sampled_from(["", "_image", "img_"]),
    mask_sign=st.sampled_from(["", "_mask", "gt_"]),
)
def test_no_file_is_lost_and_none_is_used_twice(
    stems: list[str], image_sign: str, mask_sign: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def named(stem: str, sign: str) -> str:
        return (sign + stem if sign.endswith("_") else stem + sign) + ".png"

    folder = tmp_path_factory.mktemp("set")
    images, masks = {named(stem, image_sign) for stem in stems}, {named(stem, mask_sign) for stem in stems}
    found = matched(folder, sorted(images), sorted(masks))
    assert Counter(image for image, _ in found if image) == Counter(images)
    assert Counter(mask for _, own in found for mask in own) == Counter(masks)


def test_one_folder_an_image_is_understood(tmp_path: Path) -> None:
    touch(tmp_path, "x/images/x.png", "x/masks/1.png", "x/masks/2.png", "y/images/y.png", "y/masks/1.png")
    assert find_files(tmp_path) == [
        Files(tmp_path / "x/images/x.png", (tmp_path / "x/masks/1.png", tmp_path / "x/masks/2.png")),
        Files(tmp_path / "y/images/y.png", (tmp_path / "y/masks/1.png",)),
    ]
    touch(tmp_path, "fixed/x.png", "fixed/y.png")
    assert find_files(tmp_path, tmp_path / "fixed") == [
        Files(tmp_path / "x/images/x.png", (tmp_path / "fixed/x.png",)),
        Files(tmp_path / "y/images/y.png", (tmp_path / "fixed/y.png",)),
    ]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "has no folder images: put the images there, and the masks in a folder masks beside it"),
        (["images/a.npy", "images/train/a.png"], "but files with .npy and the folders train"),
        (["images/a.png"], "masks does not exist: put the masks there"),
        (["images/a.png", "masks/a.gif"], "but files with .gif"),
        (["one/images/a.png", "one/images/b.png", "one/masks/a.png"], "give one of its folders that has, one"),
    ],
)
def test_what_is_no_data_set_is_refused_with_what_is_there(names: list[str], reason: str, tmp_path: Path) -> None:
    touch(tmp_path, *names)
    with pytest.raises(DataError) as error:
        find_files(tmp_path)
    assert reason in str(error.value)


# Facts of masks


@given(
    pixels=arrays(
        st.sampled_from([np.uint8, np.uint16, np.int16, np.float32]),
        st.tuples(st.integers(1, 6), st.integers(1, 6)),
        elements=st.integers(0, 3),
    )
)
def test_values_are_counted_as_they_are_stored(pixels: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("values") / "mask.tif"
    tifffile.imwrite(path, pixels, photometric="minisblack")
    found = mask_look(path)
    assert found.values == Counter(pixels.ravel().tolist())
    assert (found.num_distinct, found.colours, found.problem) == (len(np.unique(pixels)), {}, None)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_colours_are_counted_as_they_are_stored(dtype: type, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 3, (20, 30, 3)).astype(dtype) * (np.iinfo(dtype).max // 2)
    path = tmp_path / "mask.tif"
    tifffile.imwrite(path, pixels, photometric="rgb")
    found = mask_look(path)
    assert found.colours == Counter(map(tuple, pixels.reshape(-1, 3).tolist()))
    assert (found.num_distinct, found.values) == (27, {})


def test_of_very_many_values_the_commonest_are_kept_and_all_counted(tmp_path: Path) -> None:
    pixels = np.concatenate([np.arange(10_000), np.repeat(np.arange(MOST_VALUES), 2)]).astype(np.uint16)
    found = mask_look(save(tmp_path / "mask.png", pixels[None]))
    assert (found.num_distinct, found.values) == (10_000, dict.fromkeys(range(MOST_VALUES), 3))


def test_palette_indices_and_single_bits_are_kept(tmp_path: Path) -> None:
    picture = Image.fromarray(np.array([[0, 1, 5]], np.uint8))
    picture.putpalette([200, 0, 0] * 256)
    picture.save(tmp_path / "palette.png")
    assert mask_look(tmp_path / "palette.png").values == {0: 1, 1: 1, 5: 1}
    assert mask_look(save(tmp_path / "bits.png", np.array([[True, False, True]]))).values == {0: 1, 1: 2}


def test_what_is_not_finite_is_counted_apart(tmp_path: Path) -> None:
    path = tmp_path / "mask.tif"
    tifffile.imwrite(path, np.array([[0, np.nan, 1], [np.inf, 1, -2]], np.float32))
    found = mask_look(path)
    assert (found.values, found.num_not_finite) == ({0: 1, 1: 2, -2: 1}, 2)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_large_tiff_is_counted_in_bands_like_a_small_one(channels: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 4, (1100, 1000, channels), np.uint8)[:, :, : channels or None]
    pixels[700:] = 9
    path = tmp_path / "mask.tif"
    tifffile.imwrite(path, pixels.squeeze(), tile=(256, 256), photometric="rgb" if channels == 3 else "minisblack")
    assert headers.read_header(path).windowed
    found = mask_look(path)
    rows, counts = np.unique(pixels.reshape(-1, channels), axis=0, return_counts=True)
    expected = dict(zip(map(tuple, rows.tolist()), counts.tolist(), strict=True))
    assert (found.colours or {(value,): number for value, number in found.values.items()}) == expected


# Facts of images


@pytest.mark.parametrize("tile", [None, (256, 256)])
def test_an_image_is_constant_where_every_channel_is(tile: tuple[int, int] | None, tmp_path: Path) -> None:
    pixels = np.zeros((1100, 1000, 3), np.uint8) + np.array([1, 2, 3], np.uint8)
    tifffile.imwrite(tmp_path / "constant.tif", pixels, tile=tile)
    pixels[1099, 999, 1] = 0
    tifffile.imwrite(tmp_path / "other.tif", pixels, tile=tile)
    assert [look(tmp_path / name, []).image.constant for name in ("constant.tif", "other.tif")] == [True, False]


def test_an_image_read_in_bands_has_nearly_the_fingerprint_of_the_same_image_read_whole(tmp_path: Path) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (11, 13, 3), np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((1300, 1100), Image.Resampling.BICUBIC))
    tifffile.imwrite(tmp_path / "tiled.tif", pixels, tile=(256, 256))
    save(tmp_path / "whole.png", pixels[::-1])
    found = [look(tmp_path / name, []).image.fingerprint for name in ("tiled.tif", "whole.png")]
    assert [duplicate.symmetry for duplicate in near_duplicates(found)] == ["mirrored top to bottom"]


# Files that cannot be read


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "empty_file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "lfs_pointer"),
        (b"<html>", "not_an_image"),
        (b"\x89PNG\r\n\x1a\n", "damaged_file"),
        (b"II*\0\x08\0\0\0", "damaged_file"),
    ],
)
def test_the_cause_is_read_from_the_start_of_a_file(content: bytes, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    found = look(path, [path])
    assert (found.image.cause, found.masks[0].cause) == (cause, cause)
    assert str(path) in found.image.problem


def test_a_file_that_promises_too_many_pixels_is_never_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png", random_pixels(40, 50, 3))
    path.write_bytes(path.read_bytes()[:60])  # which decoding would find damaged
    monkeypatch.setattr(headers, "MAX_DECODED", 40 * 50 * 3 - 1)
    found = look(path, [path])
    assert (found.image.cause, found.masks[0].cause) == ("too_large", "too_large")


def test_all_files_are_looked_at_in_order_and_counted(tmp_path: Path) -> None:
    for index in range(20):
        save(tmp_path / "images" / f"{index:02}.png", random_pixels(4, 5, 3))
        save(tmp_path / "masks" / f"{index:02}.png", np.full((4, 5), index, np.uint8))
    (tmp_path / "masks" / "07.png").write_bytes(b"")
    done: list[int] = []
    looks = inspect_all(find_files(tmp_path), done.append)
    assert done == list(range(1, 21))
    assert [list(one.masks[0].values) for one in looks] == [[] if n == 7 else [n] for n in range(20)]
