"""ml-check as a user types it: on each kind of bad data the first line names the true cause."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from ml_src.cli import check, split

Make = Callable[[Path], object]
EXIF_ORIENTATION = 274


def picture(seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth random RGB picture, unlike that of any other seed."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3))
    smooth = cv2.GaussianBlur(noise, (0, 0), 3)
    return np.clip(128 + 45 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def labels(seed: int, num_classes: int = 2, height: int = 48, width: int = 64) -> np.ndarray:
    """A few boxes of each class on a background of 0."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    for index in [*range(1, num_classes)] * 2:
        top, left = rng.integers(0, height - 12), rng.integers(0, width - 12)
        mask[top : top + 12, left : left + 12] = index
    mask[:2, :num_classes] = range(num_classes)
    return mask


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def data_set(folder: Path, masks: list[np.ndarray], suffix: str = ".png", **options: object) -> list[Path]:
    """Write a picture for each mask, and the mask; returns the paths of the masks."""
    paths = []
    for index, mask in enumerate(masks):
        save(folder / "images" / f"{index}.png", picture(index, *mask.shape[:2]))
        path = folder / "masks" / f"{index}{suffix}"
        path.parent.mkdir(exist_ok=True)
        if suffix == ".tif":
            write_tiff(path, mask)
        else:
            save(path, mask, **options)
        paths.append(path)
    return paths


def write_tiff(path: Path, pixels: np.ndarray) -> None:
    planar = "contig" if pixels.ndim == 3 else None
    tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig=planar)


def good(folder: Path, num_classes: int = 2, number: int = 6) -> list[Path]:
    return data_set(folder, [labels(index, num_classes) for index in range(number)])


def each(change: Callable[[np.ndarray], np.ndarray], num_classes: int = 2, suffix: str = ".png") -> Make:
    """A data set whose masks have all been changed in one way."""
    return lambda folder: data_set(folder, [change(labels(index, num_classes)) for index in range(6)], suffix)


def one(change: Callable[[Path], object], which: int = 2) -> Make:
    """A good data set of which one mask file is spoilt."""
    return lambda folder: change(good(folder)[which])


def image_of(mask: Path) -> Path:
    return mask.parent.parent / "images" / mask.name


def one_image(change: Callable[[Path], object]) -> Make:
    return one(lambda mask: change(image_of(mask)))


def coloured(mask: np.ndarray) -> np.ndarray:
    return np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0)], np.uint8)[mask]


def enlarged(mask: np.ndarray) -> np.ndarray:
    return np.kron(mask, np.ones((6, 6), np.uint8))


def smoothed(mask: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(enlarged(mask) * 255, (0, 0), 0.6)


def one_smoothed(folder: Path) -> None:
    masks = [enlarged(labels(index)) for index in range(6)]
    data_set(folder, [*masks[:2], smoothed(labels(2)), *masks[3:]])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def as_jpeg(path: Path) -> None:
    Image.fromarray(labels(1) * 255).save(path, format="JPEG")


def bomb(path: Path) -> None:
    """A PNG of a few bytes whose header promises 40 000 x 40 000 pixels in colour."""
    content = bytearray(save(path, picture(1)).read_bytes())
    content[16:24] = (40_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    path.write_bytes(content)


def turned(orientation: int, mask_turned: bool, square: bool = False) -> Make:
    """Images that lie on their side and say so by EXIF; their masks as stored, or as shown."""

    def make(folder: Path) -> None:
        tags = Image.Exif()
        tags[EXIF_ORIENTATION] = orientation
        for index in range(3):
            mask = labels(index, width=48 if square else 64)
            save(folder / "images" / f"{index}.jpg", picture(index, *mask.shape), exif=tags)
            save(folder / "masks" / f"{index}.png", np.rot90(mask, -1) if mask_turned else mask)

    return make


def several(folder: Path, name: str) -> None:
    for index in range(3):
        save(folder / "images" / f"{index}.png", picture(index))
        for part in "ab":
            save(folder / "masks" / name.format(stem=index, part=part), labels(index) * 255)


def one_folder_an_image(folder: Path) -> None:
    for index in range(3):
        save(folder / f"{index}" / "images" / f"{index}.png", picture(index))
        for part in range(index + 1):
            save(folder / f"{index}" / "masks" / f"{part}.png", labels(index) * 255)


def renamed(image: str, mask: str) -> Make:
    def make(folder: Path) -> None:
        for index, path in enumerate(good(folder), start=1):
            image_of(path).rename(folder / "images" / image.format(index))
            path.rename(folder / "masks" / mask.format(index))

    return make


def with_classes(make: Make, names: str) -> Make:
    def both(folder: Path) -> None:
        make(folder)
        (folder / "classes.txt").write_text("\n".join(names.split()))

    return both


def soft(mask: np.ndarray) -> np.ndarray:
    return (cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 3) * 65535).astype(np.uint16)


def with_stray(value: int, num_classes: int = 2) -> Make:
    def make(folder: Path) -> None:
        mask = labels(2, num_classes)
        mask[mask == 1] = value
        save(good(folder, num_classes)[2], mask)

    return make


def rewrite(path: Path, **options: object) -> None:
    save(path, np.asarray(Image.open(path)), **options)


KINDS: dict[str, tuple[Make, str, int]] = {
    # files
    "LFS pointer": (
        one(lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")),
        "masks/2.png is a Git LFS pointer, not the picture itself: run git lfs pull",
        1,
    ),
    "empty mask": (one(lambda path: path.write_bytes(b"")), "masks/2.png is empty: restore", 1),
    "empty image": (one_image(lambda path: path.write_bytes(b"")), "images/2.png is empty: restore", 1),
    "truncated mask": (one(truncate), "masks/2.png is damaged or cut off", 1),
    "truncated image": (one_image(truncate), "images/2.png is damaged or cut off", 1),
    "no image": (one_image(lambda path: path.write_text("<html>404</html>")), "images/2.png is no image", 1),
    "bomb": (
        one_image(bomb),
        "images/2.png is 40000x40000 pixels, 4.5 GiB once decoded, where 2 are the limit: save it as a tiled",
        1,
    ),
    "CMYK": (
        one_image(lambda path: Image.new("CMYK", (64, 48)).save(path, format="JPEG")),
        "images/2.png has colours that are not gray, RGB or bands (mode CMYK): convert",
        1,
    ),
    "multi-page mask": (
        one(lambda path: tifffile.imwrite(path, np.zeros((3, 48, 64), np.uint8), photometric="minisblack")),
        "masks/2.png has 3 pages, of which 0 pixels have several and 3072 none: which class do these pixels have?",
        1,
    ),
    "wrong extension": (
        one_image(lambda path: Image.open(path).convert("RGB").save(path, format="BMP")),
        "warning: {data}/images/2.png holds a BMP: rename it",
        0,
    ),
    # pairs
    "no mask": (one(Path.unlink), "images/2.png has no mask: add one of the same name", 1),
    "no image of a mask": (one_image(Path.unlink), "masks/2.png belongs to no image: add the image", 1),
    "two images of one stem": (
        one_image(lambda path: save(path.with_suffix(".bmp"), picture(9))),
        "2 files share their stem with another, '2': which belong together is told by the stem",
        1,
    ),
    "other names": (
        renamed("{:03}_image.png", "{:03}_annotation.png"),
        "6 masks have other names than the images to which they seem to belong, 001_image.png with 001_annotation.png",
        1,
    ),
    "other numbers": (renamed("{:02}.png", "labels{:08}.png"), "01.png with labels00000001.png: rename them", 1),
    "masks numbered after the stem": (
        lambda folder: several(folder, "{stem}_{part}.png"),
        "3 images have several masks each (2), but one is needed: ml-check DATA --fix --merge union",
        1,
    ),
    "a folder of masks an image": (
        lambda folder: several(folder, "{stem}/{part}.png"),
        "3 images have several masks each (2), but one is needed: ml-check DATA --fix --merge union",
        1,
    ),
    "a folder of masks a class": (
        lambda folder: several(folder, "{part}/{stem}.png"),
        "3 images have several masks each (2), in a folder a class (a, b): ml-check DATA --fix makes them one",
        1,
    ),
    "a folder an image": (
        one_folder_an_image,
        "2 images have several masks each (2 to 3), but one is needed: ml-check DATA --fix --merge union",
        1,
    ),
    # sizes
    "other size": (
        one(lambda path: save(path, labels(2, height=24, width=32))),
        "masks/2.png is 32x24 pixels (width x height) but {data}/images/2.png is 64x48, 0.5 times that size",
        1,
    ),
    "swapped sides": (
        one(lambda path: save(path, labels(2).T)),
        "is 48x64 pixels (width x height) but {data}/images/2.png is 64x48, with width and height swapped",
        1,
    ),
    "EXIF turns the image only": (
        turned(6, mask_turned=False),
        "3 masks lie as their images are stored, not as the EXIF tag of these turns them: ml-check DATA --fix turns",
        1,
    ),
    "EXIF turns the image, the mask is turned": (turned(6, mask_turned=True), "all is well with 3 pairs", 0),
    "EXIF turns a square image": (
        turned(8, mask_turned=False, square=True),
        "warning: 3 masks have no EXIF tag but their images are turned by one",
        0,
    ),
    # formats of masks
    "colours": (
        each(coloured, 3),
        "6 masks hold colours instead of class indices, 0,0,0 (",
        1,
    ),
    "smoothed colours": (
        each(lambda mask: cv2.GaussianBlur(coloured(enlarged(mask)), (0, 0), 0.7), 3),
        " colours, a few common ones, 0,0,0 (80 %), 255,0,0 (8 %), 0,255,0 (7.8 %), and blends of them: export",
        1,
    ),
    "gray as RGB": (
        each(lambda mask: np.repeat(mask[:, :, None] * 255, 3, axis=2)),
        "6 masks have 3 channels where one is enough (the values 0 and 255): ml-check DATA --fix keeps one",
        1,
    ),
    "gray with alpha": (
        each(lambda mask: np.stack([mask, np.full_like(mask, 255)], axis=2)),
        "6 masks have 2 channels where one is enough (the values 0 and 1)",
        1,
    ),
    "several channels": (
        lambda folder: data_set(folder, [np.zeros((48, 64, 5), np.uint8)] * 2, ".tif"),
        "2 masks have 5 channels but a mask has one",
        1,
    ),
    "JPEG": (
        lambda folder: data_set(folder, [labels(index) * 255 for index in range(6)], ".jpg"),
        "6 masks are JPEGs, whose compression has changed the class indices (up to",
        1,
    ),
    "JPEG named PNG": (one(as_jpeg), "masks/2.png is a JPEG, whose compression has changed the class indices", 1),
    "BMP": (lambda folder: data_set(folder, [labels(0), labels(1)], ".bmp"), "2 masks are BMP files: save masks as", 1),
    "whole floats": (
        each(lambda mask: mask.astype(np.float32), 3, ".tif"),
        "6 masks store class indices as float numbers, the values 0, 1 and 2: ml-check DATA --fix writes whole",
        1,
    ),
    "probabilities": (
        each(lambda mask: cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 2), 2, ".tif"),
        "6 masks store fractions as float numbers, ",
        1,
    ),
    "negative": (
        each(lambda mask: mask.astype(np.int16) - 1, 3, ".tif"),
        "6 masks have negative values, -1, in ",
        1,
    ),
    "NaN": (
        each(lambda mask: np.where(mask == 1, np.float32(np.nan), mask), 3, ".tif"),
        "6 masks are NaN or infinite in ",
        1,
    ),
    "32 bits": (
        each(lambda mask: mask.astype(np.int32), 3, ".tif"),
        "6 masks have signed numbers, or more than 16 bits, where 8 or 16 unsigned bits are needed: ml-check",
        1,
    ),
    "soft": (each(soft), "16-bit values from 0 to ", 1),
    "one bit": (
        each(lambda mask: mask.astype(bool)),
        "all is well with 6 pairs of image and mask, values 0 to 1; note: 6 masks have one bit a pixel, which is fine",
        0,
    ),
    "palette": (
        lambda folder: [Image.open(path).convert("L").quantize(2).save(path) for path in good(folder, 2, 3)],
        "note: 3 masks have a palette, which is fine: its indices are the classes",
        0,
    ),
    # values of masks
    "0/255": (
        each(lambda mask: mask * 255),
        "error: 6 masks have the values 0 and 255, binary masks stored as 0/255 instead of 0/1: ml-check DATA --fix",
        1,
    ),
    "0/255 with names": (
        with_classes(each(lambda mask: mask * 255), "background cell"),
        "error: 6 masks have the values 0 and 255, binary masks stored as 0/255",
        1,
    ),
    "0/65535": (
        each(lambda mask: mask.astype(np.uint16) * 65535),
        "6 masks have the values 0 and 65535, binary masks stored as 0/65535",
        1,
    ),
    "0/127/255": (
        each(lambda mask: mask * 127 + mask // 2, 3),
        "6 masks have the values 0, 127 and 255, 3 classes stored as 0/127/255 instead of 0..2",
        1,
    ),
    "one mask of 0/255": (
        with_stray(255),
        "masks/2.png has the values 0 and 255, but the other masks the values 0 and 1",
        1,
    ),
    "smoothed": (
        each(smoothed),
        "6 masks have 11 different values, 0 and 255 and, in 2.1 % of the pixels, blends of these as smoothing",
        1,
    ),
    "one smoothed mask": (
        one_smoothed,
        "masks/2.png has 11 different values, 0 and 255 and, in 2.2 % of the pixels, blends of these as smoothing",
        1,
    ),
    "probabilities of 8 bits": (
        each(lambda mask: (soft(mask) // 256).astype(np.uint8)),
        "too many for classes: blends from smoothing or resizing, or probabilities? Save class indices",
        1,
    ),
    "too high": (
        with_classes(each(lambda mask: mask, 4), "background cell"),
        "error: 6 masks have the values 2 and 3, but there are 2 classes, 0 to 1: correct the masks, or the number",
        1,
    ),
    "one too high": (
        with_classes(with_stray(7, 3), "background cell nucleus"),
        "masks/2.png has the value 7, but there are 3 classes",
        1,
    ),
    "wide gaps": (
        each(lambda mask: np.array([10, 30, 50, 70, 100], np.uint8)[mask], 5),
        "error: 6 masks have the values 10, 30, 50, 70 and 100, but classes are counted 0, 1, 2, ...: ml-check DATA",
        1,
    ),
    "a small gap": (
        each(lambda mask: np.array([0, 1, 3], np.uint8)[mask], 3),
        "warning: 6 masks have the values 0, 1 and 3, which leaves out 2: ml-check DATA --fix numbers them 0 to 2",
        0,
    ),
    # the set
    "constant image": (
        one_image(lambda path: save(path, np.full((48, 64, 3), 7, np.uint8))),
        "warning: {data}/images/2.png has one value in all pixels",
        0,
    ),
    "absent class": (
        with_classes(good, "background cell nucleus"),
        "warning: 1 class has no pixel in any mask, class 2 (nucleus)",
        0,
    ),
    "rare class": (
        with_stray(2),
        "warning: 1 class is in fewer images than there are folds (5), class 2 in 1: some folds",
        0,
    ),
    "bands among RGB": (
        one_image(lambda path: write_tiff(path, np.tile(picture(2), (1, 1, 3))[:, :, :7])),
        "images/2.png has 7 channels but 5 other images have 3",
        1,
    ),
    "number types": (
        one_image(lambda path: tifffile.imwrite(path, picture(2).astype(np.uint16), photometric="rgb")),
        "images/2.png has uint16 numbers but 5 other images have uint8",
        1,
    ),
    "gray among RGB": (
        one_image(lambda path: save(path, picture(2)[:, :, 0])),
        "all is well with 6 pairs of image and mask, values 0 to 1; note: images are of two kinds, 5 RGB and 1 gray",
        0,
    ),
    "alpha": (
        one_image(lambda path: save(path, np.dstack([picture(2), np.full((48, 64), 255, np.uint8)]))),
        "note: 1 image has an alpha channel, which is dropped",
        0,
    ),
    "equal images": (
        one_image(lambda path: save(path, picture(4))),
        "warning: {data}/images/4.png is the same picture as {data}/images/2.png",
        0,
    ),
    "a turned copy": (
        one_image(lambda path: save(path, np.rot90(picture(4), 2))),
        "warning: {data}/images/4.png is the same picture as {data}/images/2.png turned by 180 degrees",
        0,
    ),
    "a brighter copy": (
        one_image(lambda path: save(path, (picture(4) * 0.9 + 20).astype(np.uint8))),
        "warning: {data}/images/4.png shows nearly the same as {data}/images/2.png",
        0,
    ),
}


def run(capsys: pytest.CaptureFixture[str], data: Path, *words: object) -> tuple[int, list[str]]:
    code = check.main([str(data), *map(str, words)])
    return code, capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_line_names_the_true_cause(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, cause, expected = KINDS[kind]
    make(tmp_path)
    code, lines = run(capsys, tmp_path)
    assert cause.replace("{data}", str(tmp_path)) in lines[0]
    assert code == expected


# Splits


def index_files(folder: Path, folds: list[dict[str, list[int]]], test: list[int], suffix: str = ".png") -> None:
    """Write what ml-split would have written for images of these numbers."""
    parts = {"test": test}
    for fold, both in enumerate(folds):
        parts |= {f"fold_{fold}_{part}": numbers for part, numbers in both.items()}
    (folder / "splits").mkdir()
    for name, numbers in parts.items():
        for kind, ending in (("images", suffix), ("masks", ".png")):
            lines = "".join(f"{kind}/{number}{ending}\n" for number in numbers)
            (folder / "splits" / f"{name}_{kind}.txt").write_text(lines)


TWO_FOLDS = [{"train": [0, 1], "val": [2, 3]}, {"train": [2, 3], "val": [0, 1]}]


@pytest.mark.parametrize(
    ("first", "second", "where"),
    [(0, 3, "train and val of fold 0"), (1, 5, "train and test of fold 0"), (4, 5, None), (0, 1, None)],
)
def test_the_same_picture_in_two_parts_of_a_split_is_an_error(
    first: int, second: int, where: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good(tmp_path)
    index_files(tmp_path, TWO_FOLDS, [4, 5])
    save(tmp_path / "images" / f"{second}.png", np.rot90(picture(first), 2))
    code, lines = run(capsys, tmp_path)
    assert f"images/{second}.png is the same picture as {tmp_path}/images/{first}.png turned by 180" in lines[0]
    assert (code, f"but they are in {where}" in lines[0]) == ((0, False) if where is None else (1, True))


def test_an_image_that_is_listed_in_two_parts_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good(tmp_path)
    index_files(tmp_path, [{"train": [0, 1, 4], "val": [2, 3]}], [4, 5])
    code, lines = run(capsys, tmp_path)
    assert (code, f"{tmp_path}/images/4.png is in test and train of fold 0 at once" in lines[0]) == (1, True)


def test_a_resized_copy_in_two_parts_of_a_split_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good(tmp_path)
    index_files(tmp_path, TWO_FOLDS, [4, 5])
    save(tmp_path / "images" / "4.png", cv2.resize(picture(0)[:, ::-1], (96, 72)))
    save(tmp_path / "masks" / "4.png", labels(4, height=72, width=96))
    code, lines = run(capsys, tmp_path)
    assert f"images/4.png shows nearly the same as {tmp_path}/images/0.png mirrored left to right but they" in lines[0]
    assert code == 1


def test_groups_in_two_parts_of_a_split_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good(tmp_path)
    index_files(tmp_path, TWO_FOLDS, [4, 5])
    rows = ["image,group", "0.png,anna", "1.png,anna", "2.png,bert", "3.png,carl", "4.png,dora", "5.png,bert"]
    (tmp_path / "splits" / "groups.csv").write_text("\n".join(rows))
    code, lines = run(capsys, tmp_path)
    assert lines[0].startswith(
        "error: 1 group is in two parts of the split at once, 'bert' (val and test of fold 0): scores would be"
    )
    assert code == 1


def test_an_image_that_the_groups_do_not_name_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good(tmp_path)
    index_files(tmp_path, TWO_FOLDS, [4, 5])
    (tmp_path / "splits" / "groups.csv").write_text("image,group\n0.png,anna\n")
    code, lines = run(capsys, tmp_path)
    assert "groups.csv gives no group for 5 of 6 images: 1.png, 2.png" in lines[0]
    assert code == 1


def test_files_that_are_listed_but_gone_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in good(tmp_path)[3:4]:
        index_files(tmp_path, TWO_FOLDS, [4, 5])
        path.unlink()
        image_of(path).unlink()
    code, lines = run(capsys, tmp_path)
    assert "4 index files name 2 files that are not there: restore them, or run ml-split again" in lines[0]
    assert code == 1


def tiles(folder: Path, lefts: list[float]) -> None:
    rasterio = pytest.importorskip("rasterio")
    for index, left in enumerate(lefts):
        save(folder / "masks" / f"{index}.png", labels(index))
        (folder / "images").mkdir(exist_ok=True)
        pixels = picture(index).transpose(2, 0, 1)
        place = rasterio.Affine(1, 0, left, 0, -1, 100)
        profile = {"driver": "GTiff", "height": 48, "width": 64, "count": 3, "dtype": "uint8", "crs": "EPSG:32633"}
        with rasterio.open(folder / "images" / f"{index}.tif", "w", transform=place, **profile) as raster:
            raster.write(pixels)


def test_tiles_that_overlap_across_a_split_are_an_error_and_else_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiles(tmp_path, [0, 64, 128, 176, 1000, 2000])  # 2 and 3 share 16 of 64 columns
    code, lines = run(capsys, tmp_path)
    overlap = f"{tmp_path}/images/3.tif covers 25 % of the same ground as {tmp_path}/images/2.tif"
    assert (code, lines[0]) == (0, f"warning: {overlap}: keep them in one part by ml-split --groups")
    index_files(tmp_path, [{"train": [0, 1, 2], "val": [3]}], [4, 5], ".tif")
    code, lines = run(capsys, tmp_path)
    assert (code, lines[0].startswith(f"error: {overlap} but they are in train and val of fold 0")) == (1, True)


# What follows from another finding is left out


@pytest.mark.parametrize(
    ("kind", "kinds"),
    [
        ("0/255 with names", {"stretched_mask"}),
        ("JPEG", {"jpeg_mask"}),
        ("colours", {"colour_mask"}),
        ("probabilities", {"float_mask"}),
        ("EXIF turns the image only", {"exif_not_applied"}),
        ("too high", {"values_too_high"}),
        ("bomb", {"too_large"}),
        ("no mask", {"missing_mask"}),
        ("two images of one stem", {"same_stem"}),
    ],
)
def test_a_cause_is_not_followed_by_its_consequences(
    kind: str, kinds: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, report = tmp_path / "data", tmp_path / "report.json"
    KINDS[kind][0](data)
    run(capsys, data, "--report", report)
    assert {finding["kind"] for finding in json.loads(report.read_text())["findings"]} == kinds


def test_of_two_causes_that_of_more_files_is_named_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = data_set(tmp_path, [labels(index) * 255 for index in range(6)])
    truncate(masks[0])
    _, lines = run(capsys, tmp_path)
    assert lines[0].startswith("error: 5 masks have the values 0 and 255")
    assert any("masks/0.png is damaged or cut off" in line for line in lines)


# The flags


def test_a_good_data_set_is_told_so_with_its_size(sample_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = run(capsys, sample_dir)
    assert (code, lines[0]) == (0, "all is well with 16 pairs of image and mask, 3 classes")


def test_what_ml_split_writes_is_found_and_clean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good(tmp_path, number=9)
    (tmp_path / "groups.csv").write_text("image,group\n" + "".join(f"{n}.png,{n // 2}\n" for n in range(9)))
    words = ["--raw_data", str(tmp_path / "images"), "--mask_data", str(tmp_path / "masks"), "--folds", "3"]
    assert split.main([*words, "--task", "segmentation", "--groups", str(tmp_path / "groups.csv")]) == 0
    capsys.readouterr()
    code, lines = run(capsys, tmp_path)
    assert (code, lines[0]) == (0, "all is well with 9 pairs of image and mask, values 0 to 1")


def test_fix_writes_masks_that_the_command_then_finds_well_and_undo_removes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masks = data_set(tmp_path, [labels(index, 3) * 127 + labels(index, 3) // 2 for index in range(6)])
    before = [path.read_bytes() for path in masks]
    code, lines = run(capsys, tmp_path, "--fix")
    assert (code, "3 classes stored as 0/127/255" in lines[0]) == (0, True)
    code, lines = run(capsys, tmp_path, "--mask_dir", tmp_path / "masks_fixed")
    assert (code, lines[0]) == (0, "all is well with 6 pairs of image and mask, values 0 to 2")
    for index in range(6):
        fixed = np.asarray(Image.open(tmp_path / "masks_fixed" / f"{index}.png"))
        np.testing.assert_array_equal(fixed, labels(index, 3))
    assert [path.read_bytes() for path in masks] == before
    assert run(capsys, tmp_path, "--undo")[0] == 0
    assert not (tmp_path / "masks_fixed").exists()


def test_the_proposed_table_of_colours_is_one_that_fix_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    KINDS["colours"][0](tmp_path)
    code, lines = run(capsys, tmp_path, "--fix")
    assert code == 1
    table = [line.strip() for line in lines if line.count(",") == 3 and " " not in line.strip()]
    colors, output = tmp_path / "colors.csv", tmp_path / "other"
    colors.write_text("\n".join(table[: len(set(table))]))
    code, _ = run(capsys, tmp_path, "--fix", "--colors", colors, "--output", output)
    assert (code, len(list(output.glob("*.png")))) == (0, 6)


def test_several_masks_become_one_by_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    several(tmp_path, "{stem}_{part}.png")
    assert run(capsys, tmp_path, "--fix")[0] == 1
    assert run(capsys, tmp_path, "--fix", "--merge", "union")[0] == 0
    assert run(capsys, tmp_path, "--mask_dir", tmp_path / "masks_fixed")[0] == 0


@pytest.mark.parametrize("name", ["report.html", "report.json"])
def test_a_report_is_written_by_its_ending(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    KINDS["0/255"][0](tmp_path / "data")
    code, lines = run(capsys, tmp_path / "data", "--report", tmp_path / name)
    assert (code, lines[-1]) == (1, f"report in {tmp_path / name}")
    assert "stretched" in (tmp_path / name).read_text()


def test_the_number_of_classes_can_be_said_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good(tmp_path, num_classes=4)
    assert run(capsys, tmp_path)[0] == 0
    code, lines = run(capsys, tmp_path, "--num_classes", "3")
    assert (code, "have the value 3, but there are 3 classes, 0 to 2" in lines[0]) == (1, True)


def test_a_preview_is_written(
    small_config: dict[str, object], sample_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(small_config))
    code, lines = run(capsys, sample_dir, "--preview", config, "--output", tmp_path / "sheet.png")
    assert (code, lines[0].endswith("sheet.png")) == (0, True)
    assert Image.open(tmp_path / "sheet.png").format == "PNG"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nowhere"], "nowhere does not exist: give the folder that holds images/ and masks/"),
        (["{data}/images"], "images has no folder images: give the folder above, {data}"),
        (["{data}", "--colors", "colors.csv"], "--colors says how to mend masks: add --fix"),
        (["{data}", "--report", "report.pdf"], "give a name that ends in .html or .json"),
        (["{data}", "--num_classes", "1"], "--num_classes is 1: give a number from 2 up"),
        (["{data}", "--splits_dir", "nowhere"], "--splits_dir nowhere does not exist"),
        (["{data}", "--mask_dir", "nowhere"], "nowhere does not exist: put the masks there"),
        (["{data}", "--reprot", "a.html"], "unknown argument '--reprot'; did you mean '--report'"),
        (["{data}", "--undo"], "fixes.json"),
    ],
)
def test_wrong_use_is_one_sentence_and_exit_code_2(
    words: list[str], reason: str, sample_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main([word.replace("{data}", str(sample_dir)) for word in words]) == 2
    assert reason.replace("{data}", str(sample_dir)) in capsys.readouterr().err


def test_a_folder_of_data_sets_is_answered_with_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good(tmp_path / "one")
    good(tmp_path / "two")
    assert check.main([str(tmp_path)]) == 2
    assert f"{tmp_path} has no folder images: give one of its folders that has, one, two" in capsys.readouterr().err


# Real data


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("many_masks_per_image/dsb2018", "6 images have several masks each (7 to 86), but one is needed"),
        ("mask_values_0_255", "8 masks have the values 0 and 255, binary masks stored as 0/255 instead of 0/1"),
        ("missing_pairs", "8 images have no mask: add masks of the same name, or remove the images; and 1 mask has no"),
        ("nonconsecutive_label_values/sentinel2", "5 masks have the values 10, 30, 50, 70 and 100, but classes are"),
        ("nonconsecutive_label_values/vnc_em", "9 classes stored as evenly stretched values 0..255 instead of 0..8"),
        (
            "rgb_coded_masks_png",
            "5 masks hold colours instead of class indices, 0,0,0 (91 %), 255,0,0 (7.6 %), 0,255,0",
        ),
    ],
)
def test_the_true_cause_of_real_dirty_data(
    name: str, cause: str, real_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, lines = run(capsys, real_data / "dirty" / name)
    assert (code, cause in lines[0]) == (1, True), lines[0]


@pytest.mark.parametrize("name", ["crackforest", "isbi2012_em", "enmap_potsdam_geotiff", "fair_aerial_scenes_geotiff"])
def test_real_clean_data_has_no_error(name: str, real_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = run(capsys, real_data / name)
    assert (code, lines[0].startswith("error")) == (0, False)
