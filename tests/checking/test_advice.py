"""What ml-check advises is right, and what it advises to run works, on real files of odd kinds."""

import errno
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from ml_src.cli import check
from ml_src.core.checking.findings import find, headline
from ml_src.core.checking.inspection import ImageLook, Look, MaskLook, inspect_all
from ml_src.core.checking.kinds import Finding
from ml_src.core.checking.layouts import find_files
from ml_src.core.checking.mask_colours import ColourMap, proposed_table
from ml_src.core.errors import DataError

HEIGHT, WIDTH = 32, 48
BOXES = np.kron([[0, 1, 2], [2, 0, 1]], np.ones((16, 16), int)).astype(np.uint8)  # (32, 48), three classes
COLOURS = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0)], np.uint8)


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def save(path: Path, pixels: np.ndarray, **how: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, pixels, photometric="minisblack")
    else:
        Image.fromarray(pixels).save(path, **how)
    return path


def data_set(folder: Path, masks: Sequence[np.ndarray], suffix: str = ".png", **how: object) -> Path:
    """Write an image of noise for each mask, and the mask."""
    for index, mask in enumerate(masks):
        save(folder / "images" / f"{index}.png", noise(index))
        save(folder / "masks" / f"{index}{suffix}", mask, **how)
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, list[str]]:
    code = check.main([str(word) for word in words])
    return code, capsys.readouterr().out.splitlines()


def found_in(data: Path, names: Sequence[str] | None = None) -> list[Finding]:
    return find(inspect_all(find_files(data)), data, names)


# Names


@pytest.mark.parametrize(("image", "mask"), [("s_1", "s_1_2"), ("img", "img_2"), ("01", "1"), ("a5", "mask5")])
def test_a_lone_mask_is_not_given_to_a_lone_image_where_other_names_match(
    image: str, mask: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_set(tmp_path, [BOXES] * 4)
    for index in range(4):
        for folder in ("images", "masks"):
            (tmp_path / folder / f"{index}.png").rename(tmp_path / folder / f"same{index + 20}.png")
    save(tmp_path / "images" / f"{image}.png", noise(9))
    save(tmp_path / "masks" / f"{mask}.png", BOXES)
    code, lines = run(capsys, tmp_path)
    assert (code, f"images/{image}.png has no mask" in lines[0]) == (1, True)
    assert {finding.kind for finding in found_in(tmp_path)} == {"missing_mask", "missing_image"}


def test_names_are_compared_loosely_where_hardly_any_is_the_same(tmp_path: Path) -> None:
    data_set(tmp_path, [BOXES] * 12)
    for index in range(1, 12):
        (tmp_path / "masks" / f"{index}.png").rename(tmp_path / "masks" / f"{index}_mask.png")
    assert all(found.image and len(found.masks) == 1 for found in find_files(tmp_path))


# Classes


@pytest.mark.parametrize("names", [None, "cell"])
def test_masks_of_one_class_only_are_an_error(
    names: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_set(tmp_path, [np.zeros_like(BOXES)] * 3)
    if names:
        (tmp_path / "classes.txt").write_text(names)
    code, lines = run(capsys, tmp_path)
    assert (code, lines[0].startswith("error: the masks know one class only, 0, but")) == (1, True)


def test_that_a_second_class_is_absent_is_a_warning_where_it_has_a_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_set(tmp_path, [np.zeros_like(BOXES)] * 3)
    (tmp_path / "classes.txt").write_text("background\ncell")
    code, lines = run(capsys, tmp_path)
    assert (code, lines[0].startswith("warning: 1 class has no pixel in any mask, class 1 (cell)")) == (0, True)


def test_masks_of_class_1_only_lack_class_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_set(tmp_path, [np.ones_like(BOXES)] * 3)
    code, lines = run(capsys, tmp_path)
    assert (code, lines[0].startswith("warning: 1 class has no pixel in any mask, class 0: ")) == (0, True)


@pytest.mark.parametrize(
    ("names", "values", "said"),
    [
        (None, [0, 1, 2, 255], "values 0 to 2, 255 is unlabelled"),
        (None, [0, 1, 2], "values 0 to 2"),
        (["a", "b", "c"], [0, 1, 2, 255], "3 classes, 255 is unlabelled"),
        (None, [*range(256)], "values 0 to 255"),
    ],
)
def test_the_headline_tells_255_from_the_classes(names: list[str] | None, values: list[int], said: str) -> None:
    mask = MaskLook(Path("masks/0.png"), values=dict.fromkeys(values, 1))
    line = headline([], [Look(ImageLook(Path("images/0.png")), (mask,))], names)
    assert line == f"all is well with 1 pair of image and mask, {said}"


# Colours


def test_photos_in_the_place_of_masks_are_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_set(tmp_path, [noise(index + 100) for index in range(3)])
    code, lines = run(capsys, tmp_path)
    assert (code, "of which none is common, as photos have and masks have not: put the masks" in lines[0]) == (1, True)


def test_colours_that_jpeg_changed_are_to_be_exported_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_set(tmp_path, [COLOURS[np.roll(BOXES, shift)] for shift in range(3)], ".jpg", quality=70)
    code, lines = run(capsys, tmp_path)
    again = "export the masks again as PNG, from the source"
    assert (code, lines[0].startswith("error: 3 masks are JPEGs"), lines[0].endswith(again)) == (1, True, True)
    assert {finding.fix for finding in found_in(tmp_path)} == {again}


def test_a_table_of_colours_is_not_stretched_over_what_jpeg_made_of_them(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", COLOURS[BOXES], quality=70)
    pixels = np.asarray(Image.open(path))
    table = ColourMap({tuple(map(int, colour)): index for index, colour in enumerate(COLOURS)}, Path("t.csv"))
    with pytest.raises(DataError, match="compression has changed them: export the masks again as PNG"):
        table.classes_of(pixels, path)
    exact = {tuple(map(int, colour)): 1 for colour in np.unique(pixels.reshape(-1, 3), axis=0)}
    assert (ColourMap(exact, Path("t.csv")).classes_of(pixels, path) == 1).all()


def test_of_many_colours_only_common_ones_that_are_well_apart_are_proposed() -> None:
    rng = np.random.default_rng(0)
    shades = (COLOURS[BOXES].astype(int) + rng.integers(-9, 10, (HEIGHT, WIDTH, 3))).clip(0, 255).reshape(-1, 3)
    colours = Counter(map(tuple, shades.tolist()))
    colours.update({tuple(map(int, colour)): 4000 for colour in COLOURS})
    lines = [tuple(map(int, line.split(","))) for line in proposed_table(colours)[1:]]
    assert {line[:3] for line in lines} == {tuple(colour) for colour in COLOURS.tolist()}
    assert all(
        max(abs(a - b) for a, b in zip(one[:3], two[:3], strict=True)) > 31 for one, two in combinations(lines, 2)
    )
    assert sorted(line[3] for line in lines) == [0, 1, 2]


def test_few_colours_are_all_proposed_however_near() -> None:
    near = Counter({(0, 0, 0): 1, (1, 0, 0): 2, (0, 0, 2): 10_000})
    assert proposed_table(near) == ["r,g,b,class", "0,0,0,0", "0,0,2,1", "1,0,0,2"]


@pytest.mark.parametrize("colour", [True, False])
def test_transparent_masks_are_asked_for_their_class(
    colour: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alpha = np.where(BOXES == 0, 0, 255).astype(np.uint8)
    data_set(tmp_path, [np.dstack([COLOURS[BOXES] if colour else BOXES, alpha])] * 3)
    code, lines = run(capsys, tmp_path)
    assert (code, lines[0].startswith("error: 3 masks are transparent in some pixels, which then have")) == (1, True)
    assert {finding.kind for finding in found_in(tmp_path)} == {"transparent_mask"}
    assert f"in {(BOXES == 0).sum()} pixels" in found_in(tmp_path)[0].message
    assert run(capsys, tmp_path, "--fix")[0] == 1


def test_an_alpha_channel_that_hides_nothing_is_no_transparency(tmp_path: Path) -> None:
    data_set(tmp_path, [np.dstack([COLOURS[BOXES], np.full_like(BOXES, 255)])] * 3)
    assert {finding.kind for finding in found_in(tmp_path)} == {"colour_mask"}


# Pages


def one_hot(mask: np.ndarray) -> np.ndarray:
    return (mask == np.arange(3)[:, None, None]).astype(np.uint8) * 255


def test_pages_of_a_class_each_are_mended_by_the_command_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_set(tmp_path, [one_hot(np.roll(BOXES, shift)) for shift in range(3)], ".tif")
    code, lines = run(capsys, tmp_path)
    assert (code, lines[0].endswith("but a mask is one: ml-check DATA --fix makes one of them")) == (1, True)
    assert run(capsys, tmp_path, "--fix")[0] == 0
    assert run(capsys, tmp_path, "--mask_dir", tmp_path / "masks_fixed")[0] == 0


def test_pages_that_overlap_are_not_promised_to_be_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = one_hot(BOXES)
    pages[:, :4] = 255
    data_set(tmp_path, [pages] * 3, ".tif")
    code, lines = run(capsys, tmp_path)
    assert (code, lines[0].endswith("save class indices, as one page")) == (1, True)
    assert f"of which {4 * WIDTH} pixels have several" in found_in(tmp_path)[0].message
    assert run(capsys, tmp_path, "--fix")[0] == 1


# Files that the system does not give


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_a_link_to_itself_is_a_finding(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_set(tmp_path, [BOXES] * 3)
    link = tmp_path / folder / "1.png"
    link.unlink()
    link.symlink_to(link.name)
    code, lines = run(capsys, tmp_path)
    assert (code, lines[0]) == (1, f"error: {link} is a link that leads to itself: replace it, or remove the pair")


def test_a_file_without_permission_is_not_called_damaged() -> None:
    path = Path("data/masks/0.png")
    problem = f"{path} cannot be read ({os.strerror(errno.EACCES)}): replace the file or leave it out"
    looks = [Look(ImageLook(Path("data/images/0.png")), (MaskLook(path, None, problem, cause="damaged_file"),))]
    (finding,) = find(looks, Path("data"))
    assert finding.kind == "no_permission"
    assert finding.message == f"{path} cannot be read for want of permission: give it, as by chmod u+r"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("folder", ["images", "masks"])
def test_a_file_that_may_not_be_read_is_a_finding(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = data_set(tmp_path, [BOXES] * 3) / folder / "1.png"
    path.chmod(0)
    code, lines = run(capsys, tmp_path)
    assert (code, lines[0].startswith(f"error: {path} cannot be read for want of permission")) == (1, True)


# A folder an image


def apart(masks: Callable[[int], dict[str, np.ndarray]]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for index in range(3):
            save(folder / f"p{index}" / "images" / f"{index}.png", noise(index))
            for name, mask in masks(index).items():
                save(folder / f"p{index}" / "masks" / f"{name}.png", mask)
        return folder

    return make


@pytest.mark.parametrize(
    "make",
    [
        apart(lambda index: {str(index): BOXES}),
        apart(lambda index: {"mask": BOXES}),
        apart(lambda index: {f"part{part}": (part < BOXES).astype(np.uint8) * 255 for part in range(2)}),
    ],
    ids=["the same name", "another name", "several masks"],
)
def test_the_commands_that_bring_images_into_one_folder_work(
    make: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Running all that is advised leaves a data set that is well."""
    data = make(tmp_path / "my data")
    (layout,) = (finding for finding in found_in(data) if finding.kind == "layout")
    commands = (layout.fix or "").removeprefix("run ").split(", then ")
    for words in commands:
        if words.startswith("ml-check"):
            check.main([str(data), *words.partition("' ")[2].split()])
        else:
            subprocess.run(words, shell=True, check=True)
    capsys.readouterr()
    fixed = ["--mask_dir", data / "masks_fixed"] if len(commands) > 1 else []
    code, lines = run(capsys, data, *fixed)
    assert (code, lines[0].startswith("all is well with 3 pairs")) == (0, True)


def test_after_masks_are_merged_the_layout_says_what_is_left_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = apart(lambda index: {"a": (BOXES == 1) * np.uint8(255), "b": (BOXES == 2) * np.uint8(255)})(tmp_path)
    run(capsys, data, "--fix", "--merge", "union")
    code, lines = run(capsys, data, "--mask_dir", data / "masks_fixed")
    command = f"mkdir {data}/images && cp {data}/*/images/* {data}/images"
    said = f"error: 3 images lie each in a folder of its own: put them into one: run {command}"
    assert (code, lines[0]) == (1, said)


def test_images_of_one_name_are_to_be_renamed_before_they_share_a_folder(tmp_path: Path) -> None:
    for index in range(3):
        save(tmp_path / f"p{index}" / "images" / "image.png", noise(index))
        save(tmp_path / f"p{index}" / "masks" / "image.png", BOXES)
    (layout,) = (finding for finding in found_in(tmp_path) if finding.kind == "layout")
    assert "each under a name of its own" in layout.message
