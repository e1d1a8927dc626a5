"""Repair: every kind of bad mask becomes a good copy or a question, and the originals stay as they are."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from ml_src.core.checking import repair
from ml_src.core.checking.inspection import Look, inspect_all
from ml_src.core.checking.layouts import find_files
from ml_src.core.checking.repair import Outcome, fix, undo
from ml_src.core.data.checks import check_masks, scan
from ml_src.core.data.files import Pair, find_pairs, read_mask
from ml_src.core.data.headers import read_header
from ml_src.core.errors import DataError

EXIF_ORIENTATION = 274
TWO = np.kron([[0, 1, 1], [1, 0, 0]], np.ones((4, 4), int)).astype(np.uint8)  # (8, 12), two classes
FOUR = np.kron([[0, 1, 2], [3, 0, 2]], np.ones((4, 4), int)).astype(np.uint8)  # (8, 12), four classes


def save(path: Path, pixels: np.ndarray, **how: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, pixels, **how)
    else:
        Image.fromarray(pixels).save(path, **how)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set of two images of 12 x 8 pixels, a and b, without masks."""
    folder = tmp_path / "data"
    for number, stem in enumerate("ab"):
        save(
            folder / "images" / f"{stem}.png", np.full((8, 12, 3), 50 * number, np.uint8) + np.arange(3, dtype=np.uint8)
        )
    return folder


def looks_of(data: Path) -> list[Look]:
    return inspect_all(find_files(data))


def mended(data: Path, **how: object) -> Outcome:
    """Fix into DATA/masks_fixed; whatever happens, nothing else may have changed."""
    before = digests(data, but="masks_fixed")
    outcome = fix(looks_of(data), data, data / "masks_fixed", **how)
    assert digests(data, but="masks_fixed") == before
    return outcome


def digests(folder: Path, but: str = "") -> dict[str, str]:
    """The digest of every file, and every folder, below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
        if but not in path.relative_to(folder).parts
    }


def result(data: Path, stem: str = "a") -> np.ndarray:
    return read_mask(next((data / "masks_fixed").glob(f"{stem}.*")))


def record(data: Path) -> dict:
    return json.loads((data / "masks_fixed" / "fixes.json").read_bytes())


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[EXIF_ORIENTATION] = orientation
    return tags


# What is repaired


def test_values_are_mapped_alike_in_all_masks_even_where_one_lacks_some(data):
    values = np.array([10, 30, 50, 100], np.uint8)
    save(data / "masks/a.png", values[FOUR])
    save(data / "masks/b.png", values[FOUR % 2 + 2])
    outcome = mended(data)
    assert outcome.refused == 0
    assert outcome.lines[1] == "  2 masks: values 10, 30, 50, 100 became 0, 1, 2, 3"
    np.testing.assert_array_equal(result(data, "a"), FOUR)
    np.testing.assert_array_equal(result(data, "b"), FOUR % 2 + 2)
    assert find_pairs(data / "images", data / "masks_fixed")[1] == Pair(
        data / "images/b.png", data / "masks_fixed/b.png"
    )


def test_the_record_says_what_was_done_to_each_file(data):
    for stem in "ab":
        save(data / f"masks/{stem}.png", TWO * 255)
    mended(data)
    found = record(data)
    assert (found["program"], found["version"], found["refused"]) == ("ml-check --fix", "0.1.0", [])
    source, target = data / "masks/a.png", data / "masks_fixed/a.png"
    assert found["masks"][0] == {
        "sources": [{"path": "masks/a.png", "sha256": hashlib.sha256(source.read_bytes()).hexdigest()}],
        "target": "a.png",
        "sha256": hashlib.sha256(target.read_bytes()).hexdigest(),
        "width": 12,
        "height": 8,
        "done": ["values 0, 255 became 0, 1"],
        "values": [[0, 0], [255, 1]],
    }


def test_many_classes_are_written_with_16_bits(tmp_path):
    data = tmp_path / "data"
    labels = np.arange(1, 301, dtype=np.uint32).reshape(15, 20)
    save(data / "images/a.png", np.zeros((15, 20), np.uint8))
    save(data / "masks/a.tif", labels - 1)
    assert mended(data).lines[1] == "  1 mask: 32-bit uint numbers became class indices"
    assert read_header(data / "masks_fixed/a.png").bits == 16
    np.testing.assert_array_equal(result(data), labels - 1)


@pytest.mark.parametrize(
    ("name", "pixels", "phrase"),
    [
        ("a.bmp", TWO * 255, "BMP became PNG"),
        ("a.webp", np.stack([TWO * 255] * 3, axis=2), "gray stored as RGB became one channel"),
        ("a.png", np.stack([TWO * 255] * 3, axis=2), "gray stored as RGB became one channel"),
        ("a.png", np.dstack([TWO * 255] * 3 + [np.full_like(TWO, 255)]), "opaque alpha was left out"),
        ("a.tif", TWO.astype(np.float32), "32-bit float numbers became class indices"),
        ("a.tif", TWO.astype(np.float64) / 2, "values 0, 0.5 became 0, 1"),
        ("a.tif", TWO.astype(np.int16), "16-bit signed numbers became class indices"),
        ("a.tif", TWO.astype(np.uint16) * 65535, "values 0, 65535 became 0, 1"),
    ],
)
def test_other_forms_become_one_channel_of_class_indices(data, name, pixels, phrase):
    how = {"lossless": True} if name.endswith("webp") else {}
    save(data / "masks" / name, pixels, **how)
    save(data / "masks/b.png", TWO * 255 if pixels.dtype == np.uint8 else TWO)
    if pixels.dtype != np.uint8 and set(np.unique(pixels)) != {0, 1}:
        shutil.rmtree(data / "masks")
        (data / "images/b.png").unlink()
        save(data / "masks" / name, pixels, **how)
    outcome = mended(data)
    assert outcome.refused == 0 and f"  1 mask: {phrase}" in outcome.lines
    np.testing.assert_array_equal(result(data), TWO)


def test_a_jpeg_of_two_classes_is_cut_in_the_middle_and_the_share_told(data):
    for stem in "ab":
        save(data / f"masks/{stem}.jpg", TWO * 255, quality=90)
    save(data / "masks/a.jpg", np.roll(TWO, 2, axis=1) * 255, quality=100)
    outcome = mended(data)
    assert outcome.lines[1:3] == [
        "  2 masks: values 0, 255 became 0, 1, those between them that of the nearest",
        "  2 masks: JPEG became PNG",
    ]
    assert outcome.lines[3].endswith(" % of all pixels lay between clean values and took the nearest")
    np.testing.assert_array_equal(result(data, "b"), TWO)
    counts = [entry.get("blended_pixels", 0) for entry in record(data)["masks"]]
    stored = [np.asarray(Image.open(data / f"masks/{stem}.jpg")) for stem in "ab"]
    assert counts == [int(((pixels != 0) & (pixels != 255)).sum()) for pixels in stored]


def test_minus_one_becomes_255_and_the_setting_is_named(data):
    for stem in "ab":
        save(data / f"masks/{stem}.tif", FOUR.astype(np.int16) - 1)
    outcome = mended(data)
    assert outcome.lines[1].endswith("values 0, 1, 2 became 0, 1, 2, -1 became 255 (unlabelled)")
    assert "255 marks unlabelled pixels: set data.ignore_index: 255" in outcome.lines
    np.testing.assert_array_equal(result(data), np.where(FOUR == 0, 255, FOUR - 1))


@pytest.mark.parametrize("pages", [True, False])
def test_one_channel_or_page_a_class_becomes_its_number(data, pages):
    one_hot = np.eye(4, dtype=np.uint8)[FOUR] * 255
    for stem in "ab":
        if pages:
            save(data / f"masks/{stem}.tif", np.moveaxis(one_hot, 2, 0), photometric="minisblack", metadata=None)
        else:
            save(data / f"masks/{stem}.tif", one_hot, photometric="minisblack", planarconfig="contig")
    what = "pages" if pages else "channels"
    assert mended(data).lines[1] == f"  2 masks: 4 {what}, of which each pixel has one, became classes 0 to 3"
    np.testing.assert_array_equal(result(data), FOUR)


def test_colours_become_classes_by_the_users_table(data):
    palette = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0), (9, 9, 9)], np.uint8)
    save(data / "masks/a.png", palette[FOUR])
    save(data / "masks/b.png", np.where(TWO, 9, 0).astype(np.uint8))  # a writer that saves gray as one channel
    table = data / "colors.csv"
    table.write_text("r,g,b,class\n0,0,0,0\n255,0,0,1\n0,255,0,2\n9,9,9,3\n")
    assert mended(data, colors=table).refused == 0
    np.testing.assert_array_equal(result(data, "a"), FOUR)
    np.testing.assert_array_equal(result(data, "b"), TWO * 3)


def test_masks_in_class_folders_are_merged_in_alphabetical_order(data):
    for stem in "ab":
        save(data / f"masks/wall/{stem}.png", (FOUR == 1) * np.uint8(255))
        save(data / f"masks/door/{stem}.png", (FOUR == 2) * np.uint8(1))
    (data / "masks/door/b.png").unlink()
    assert mended(data).lines[1] == (
        "  2 masks: one mask a class became one, by their folders: background 0, door 1, wall 2"
    )
    np.testing.assert_array_equal(result(data, "a"), np.array([0, 2, 1, 0])[FOUR])
    np.testing.assert_array_equal(result(data, "b"), np.array([0, 2, 0, 0])[FOUR])


def test_a_folder_of_the_background_is_class_0(data):
    for stem in "ab":
        for number, name in enumerate(("background", "cell")):
            save(data / f"masks/{name}/{stem}.png", (number == TWO) * np.uint8(255))
    mended(data)
    np.testing.assert_array_equal(result(data), TWO)


def test_a_union_is_1_where_any_mask_of_the_image_is_not_zero(data):
    for stem in "ab":
        for number in (1, 2):
            save(data / f"masks/{stem}/object{number}.png", (number == FOUR) * np.uint8(255))
    outcome = mended(data, merge="union")
    assert outcome.refused == 0 and len(record(data)["masks"][0]["sources"]) == 2
    np.testing.assert_array_equal(result(data), (FOUR == 1) | (FOUR == 2))


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_mask_is_turned_where_exif_turns_the_image_alone(data, orientation):
    """Pillow's own turning is the oracle."""
    for stem in "ab":
        image = Image.fromarray(np.stack([TWO * 255] * 3, axis=2))
        image.save(data / f"images/{stem}.png", exif=exif(orientation))
        save(data / f"masks/{stem}.png", FOUR)
    assert mended(data).lines[1] == "  2 masks: turned as the EXIF orientation of the image asks"
    tagged = Image.fromarray(FOUR)
    tagged.save(data / "oracle.png", exif=exif(orientation))
    from PIL import ImageOps

    with Image.open(data / "oracle.png") as stored:
        np.testing.assert_array_equal(result(data), np.asarray(ImageOps.exif_transpose(stored)))
    assert record(data)["masks"][0]["orientation"] == orientation


def test_good_masks_among_bad_ones_are_copied_byte_for_byte(data):
    picture = Image.fromarray(TWO, "L").convert("P")
    picture.putdata(TWO.ravel().tolist())
    picture.putpalette([0, 0, 0, 255, 0, 0])
    (data / "masks").mkdir()
    picture.save(data / "masks/a.png")
    save(data / "masks/b.tif", TWO.astype(np.float32))
    outcome = mended(data)
    assert "  1 mask: copied as it is" in outcome.lines
    assert (data / "masks_fixed/a.png").read_bytes() == (data / "masks/a.png").read_bytes()


def test_a_wrong_ending_and_another_name_are_put_right(data):
    save(data / "masks/a_mask.png", TWO).rename(data / "masks/a_mask.jpg")
    save(data / "masks/b_mask.png", TWO)
    outcome = mended(data)
    assert outcome.lines[1:3] == ["  2 masks: named as its image", "  1 mask: named .png, as what it is"]
    assert sorted(path.name for path in (data / "masks_fixed").iterdir()) == ["a.png", "b.png", "fixes.json"]
    assert (data / "masks_fixed/a.png").read_bytes() == (data / "masks/a_mask.jpg").read_bytes()


def test_a_geotiff_keeps_its_place_and_no_data_is_unlabelled(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    data, place = tmp_path / "data", rasterio.transform.from_origin(300_000, 5_800_000, 10, 10)
    save(data / "images/a.png", np.zeros((8, 12), np.uint8))
    (data / "masks").mkdir()
    how = {"driver": "GTiff", "height": 8, "width": 12, "count": 1, "crs": "EPSG:32633", "transform": place}
    with rasterio.open(data / "masks/a.tif", "w", dtype="int16", nodata=-9999, **how) as file:
        file.write(np.array([10, 20, 30, -9999], np.int16)[FOUR][None])
    mended(data)
    with rasterio.open(data / "masks_fixed/a.tif") as file:
        assert file.crs.to_epsg() == 32633 and file.transform == place and file.dtypes == ("uint8",)
        np.testing.assert_array_equal(file.read(1), np.array([0, 1, 2, 255])[FOUR])


# What is refused, with the question


def test_colours_without_a_table_are_asked_for_with_a_table_to_correct(data):
    palette = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)], np.uint8)
    save(data / "masks/a.png", palette[FOUR])
    save(data / "masks/b.png", np.zeros((8, 12), np.uint8))
    outcome = mended(data)
    assert outcome.lines == [
        "the masks hold 4 colours: which class is each? Save this table as colors.csv, correct it, and add --colors "
        "colors.csv",
        "r,g,b,class",
        "0,0,0,0",
        "0,255,0,1",
        "0,0,255,2",
        "255,0,0,3",
    ]
    assert outcome.refused == 2 and not (data / "masks_fixed").exists()
    (data / "colors.csv").write_text("\n".join(outcome.lines[1:]))
    assert mended(data, colors=data / "colors.csv").refused == 0


def test_pure_red_green_and_blue_are_colours_and_not_channels(data):
    for stem in "ab":
        save(data / f"masks/{stem}.png", np.eye(3, dtype=np.uint8)[FOUR % 3] * 255)
    assert mended(data).lines[0].startswith("the masks hold 3 colours: which class is each?")


def test_values_that_are_a_guess_are_asked_about_once_with_an_example(data):
    save(data / "masks/a.png", TWO)
    save(data / "masks/b.tif", np.linspace(0, 1, 96, dtype=np.float32).reshape(8, 12))
    outcome = mended(data)
    assert outcome.lines == [
        "the masks hold 96 different values from 0 to 1, as probabilities do: at which threshold does a class begin? "
        "Save class indices",
        f"for example {data / 'masks/b.tif'}",
    ]
    assert outcome.refused == 2 and not (data / "masks_fixed").exists()


@pytest.mark.parametrize("num_classes", [None, 2])
def test_classes_are_not_taken_for_shades_beside_one_smoothed_mask(data, num_classes):
    """Pooled with it, 0 and 1 would both be near 0, and the labels of all good masks would be gone."""
    labels = np.kron(TWO, np.ones((40, 40), np.uint8))  # (320, 480)
    smoothed = np.zeros((320, 480), np.uint8)
    smoothed[:40] = 255
    smoothed[40, :256] = np.arange(256)
    for stem, mask in (("a", labels), ("b", smoothed)):
        save(data / f"images/{stem}.png", np.full((320, 480, 3), 7, np.uint8))
        save(data / f"masks/{stem}.png", mask)
    outcome = mended(data, num_classes=num_classes)
    assert outcome.lines[0].startswith(f"{data / 'masks/a.png'} holds the values 0, 1, which would all become class 0")
    assert outcome.refused == 2 and not (data / "masks_fixed").exists()


def test_several_masks_of_an_image_are_a_question(data):
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        save(data / "masks" / name, TWO)
    outcome = mended(data)
    assert outcome.lines == [
        "several masks belong to one image in 1 of 2 cases (a has 2): how do they become one? Add --merge union where "
        "all show the same class, or put the masks of each class into a folder of its own, masks/CLASS/STEM.png"
    ]
    assert outcome.refused == 2


def test_folders_with_one_mask_an_image_may_be_classes_or_not(data):
    save(data / "masks/left/a.png", TWO * 255)
    save(data / "masks/right/b.png", TWO * 255)
    assert (
        mended(data)
        .lines[0]
        .startswith("the masks lie in the folders left, right and hold two values: is each folder a class?")
    )
    assert mended(data, merge="union").refused == 0


def test_one_hot_among_plain_masks_is_a_question(data):
    save(data / "masks/a.tif", np.eye(4, dtype=np.uint8)[FOUR], photometric="minisblack", planarconfig="contig")
    save(data / "masks/b.png", FOUR)
    assert mended(data).lines[0].startswith("the masks are of different kinds (1 with 4 channels of which each pixel")


def overlapping(path: Path) -> None:
    save(path.with_suffix(".tif"), np.ones((8, 12, 5), np.uint8), photometric="minisblack", planarconfig="contig")


def transparent(path: Path) -> None:
    pixels = np.dstack([TWO * 255] * 3 + [np.full_like(TWO, 255)])
    pixels[0, :3, 3] = 0
    save(path, pixels)


def smaller(path: Path) -> None:
    save(path, TWO[::2, ::2])


def cut_short(path: Path) -> None:
    save(path, np.random.default_rng(0).integers(0, 2, (8, 12)).astype(np.uint8))
    path.write_bytes(path.read_bytes()[:60])


def pointer(path: Path) -> None:
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (overlapping, "has 5 channels, of which 96 pixels have several and 0 none: which class do these pixels have?"),
        (transparent, "is transparent in 3 pixels: which class do they have?"),
        (smaller, "is 6x4 pixels (width x height) but {image} is 12x8: which size is right?"),
        (cut_short, "cannot be read ("),
        (pointer, "is a Git LFS pointer, not the picture itself: run git lfs pull"),
        (Path.touch, "is empty: restore the file or leave it out"),
    ],
)
def test_one_bad_file_is_named_and_left_out_and_the_others_are_written(data, spoil, reason):
    save(data / "masks/b.png", TWO * 255)
    spoil(data / "masks/a.png")
    bad = next((data / "masks").glob("a.*"))
    outcome = mended(data)
    assert outcome.refused == 1 and outcome.lines[-2] == "1 refused and left out:"
    assert outcome.lines[-1].startswith(f"  {bad} {reason.format(image=data / 'images/a.png')}")
    assert [entry["target"] for entry in record(data)["masks"]] == ["b.png"]
    assert record(data)["refused"][0] == {"source": f"masks/{bad.name}", "reason": outcome.lines[-1].strip()}


def test_a_colour_that_the_table_lacks_refuses_its_file(data):
    save(data / "masks/a.png", np.array([(0, 0, 0), (255, 0, 0)], np.uint8)[TWO])
    save(data / "masks/b.png", np.array([(0, 0, 0), (254, 0, 0)], np.uint8)[TWO])
    (data / "colors.csv").write_text("color,class\n000000,0\nff0000,1\n")
    outcome = mended(data, colors=data / "colors.csv")
    assert outcome.refused == 1
    assert outcome.lines[-1].startswith(f"  {data / 'masks/b.png'} has 48 pixels of colour 254,0,0, which ")


def test_overlapping_class_masks_refuse_their_image(data):
    for stem in "ab":
        save(data / f"masks/door/{stem}.png", TWO * 255)
        save(data / f"masks/wall/{stem}.png", (1 - TWO) * 255)
    save(data / "masks/wall/b.png", np.full_like(TWO, 255))
    outcome = mended(data)
    assert outcome.refused == 1
    assert outcome.lines[-1].startswith(
        f"  {data / 'masks/wall/b.png'} overlaps another mask of its image in 48 pixels: which class do these have?"
    )


def test_images_without_masks_and_masks_without_images_are_named(data):
    save(data / "masks/b.png", TWO * 255)
    save(data / "masks/zebra.png", TWO * 255)
    outcome = mended(data)
    assert outcome.refused == 2
    assert outcome.lines[-2:] == [
        f"  {data / 'images/a.png'} has no mask: add one of the same stem, or remove the image",
        f"  {data / 'masks/zebra.png'} belongs to no image: give both the same stem",
    ]


def test_where_no_mask_needs_a_repair_nothing_is_written(data):
    for stem in "ab":
        save(data / f"masks/{stem}.png", FOUR)
    assert mended(data) == Outcome(["2 masks need no repair; nothing was written"], 0)
    assert not (data / "masks_fixed").exists()


def test_class_names_keep_a_class_without_pixels_in_its_place(data):
    for stem in "ab":
        save(data / f"masks/{stem}.png", np.array([0, 1, 3, 4], np.uint8)[FOUR])
    (data / "classes.txt").write_text("sky\nroad\ncar\ntree\nwall\n")
    assert mended(data).lines == ["2 masks need no repair; nothing was written"]
    (data / "classes.txt").unlink()
    assert "  2 masks: values 0, 1, 3, 4 became 0, 1, 2, 3" in mended(data).lines


# Where it is written, and how it is removed again


@pytest.fixture
def fixed(data: Path) -> Path:
    for stem in "ab":
        save(data / f"masks/{stem}.png", TWO * 255)
    assert mended(data).refused == 0
    return data


def test_a_second_run_writes_the_same(fixed):
    before = digests(fixed)
    mended(fixed)
    assert digests(fixed) == before


def test_a_second_run_replaces_its_own_files_and_keeps_others(fixed):
    (fixed / "masks_fixed/notes.txt").write_text("mine")
    (fixed / "images/b.png").unlink()
    (fixed / "masks/b.png").unlink()
    mended(fixed)
    assert sorted(path.name for path in (fixed / "masks_fixed").iterdir()) == ["a.png", "fixes.json", "notes.txt"]
    assert sorted(path.name for path in fixed.iterdir()) == ["images", "masks", "masks_fixed"]


def test_undo_removes_all_that_was_written(fixed):
    lines = undo(fixed / "masks_fixed")
    assert lines == [f"removed 2 masks and fixes.json from {fixed / 'masks_fixed'}"]
    assert not (fixed / "masks_fixed").exists()


def test_undo_keeps_what_was_changed_since_and_what_it_did_not_write(fixed):
    save(fixed / "masks_fixed/b.png", 1 - TWO)
    (fixed / "masks_fixed/notes.txt").write_text("mine")
    assert undo(fixed / "masks_fixed")[1:] == ["kept what was changed since: b.png"]
    assert sorted(path.name for path in (fixed / "masks_fixed").iterdir()) == ["b.png", "notes.txt"]


def test_a_changed_file_is_never_replaced(fixed):
    save(fixed / "masks_fixed/b.png", 1 - TWO)
    before = digests(fixed)
    with pytest.raises(DataError, match=r"holds files that were changed since they were written \(b\.png\)"):
        fix(looks_of(fixed), fixed, fixed / "masks_fixed")
    assert digests(fixed) == before


def test_a_folder_with_other_files_is_refused(data):
    save(data / "masks/a.png", TWO * 255)
    (data / "other").mkdir()
    (data / "other/notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"other holds files but no fixes\.json of ours"):
        fix(looks_of(data), data, data / "other")
    (data / "other/fixes.json").write_text('{"masks": []}')
    for action in (lambda: fix(looks_of(data), data, data / "other"), lambda: undo(data / "other")):
        with pytest.raises(DataError, match=r"fixes\.json is no record of ml-check --fix"):
            action()


def test_the_masks_own_folder_is_refused(data):
    save(data / "masks/a.png", TWO * 255)
    with pytest.raises(DataError, match=r"masks holds masks to repair \(a\.png\): give another folder"):
        fix(looks_of(data), data, data / "masks")


def test_a_record_that_points_elsewhere_removes_nothing(fixed):
    path = fixed / "masks_fixed/fixes.json"
    forged = json.loads(path.read_bytes())
    forged["masks"][0]["target"] = "../masks/a.png"
    forged["masks"][0]["sha256"] = forged["masks"][0]["sources"][0]["sha256"]
    path.write_text(json.dumps(forged))
    with pytest.raises(DataError, match="is no record of"):
        undo(fixed / "masks_fixed")
    assert (fixed / "masks/a.png").exists()


def test_undo_where_nothing_was_fixed_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match=r"fixes\.json cannot be read \(No such file or directory\): give the folder"):
        undo(tmp_path)


def test_where_nothing_can_be_written_nothing_is(data):
    save(data / "masks/a.png", TWO * 255)
    before = digests(data)
    for output in (data / "masks/a.png", data / "masks/a.png/below"):
        with pytest.raises((DataError, OSError)):
            fix(looks_of(data), data, output)
    assert digests(data) == before


def test_a_disk_that_fails_in_the_middle_leaves_the_earlier_result(fixed, monkeypatch):
    """The second mask cannot be written; the real writer writes the first."""
    save(fixed / "masks/a.png", (1 - TWO) * 255)
    before = digests(fixed)
    replacing = repair.replacing

    def full(path: Path) -> object:
        if path.name == "b.png":
            raise OSError(28, "No space left on device", str(path))
        return replacing(path)

    monkeypatch.setattr(repair, "replacing", full)
    with pytest.raises(OSError, match="No space left"):
        fix(looks_of(fixed), fixed, fixed / "masks_fixed")
    assert digests(fixed) == before


def test_a_mask_that_vanishes_after_the_look_is_refused(data):
    for stem in "ab":
        save(data / f"masks/{stem}.png", TWO * 255)
    looks = looks_of(data)
    (data / "masks/b.png").unlink()
    outcome = fix(looks, data, data / "masks_fixed")
    assert outcome.refused == 1 and outcome.lines[-1] == f"  {data / 'masks/b.png'} does not exist"


# Real data


@pytest.mark.parametrize(
    ("name", "how", "num_classes"),
    [
        ("mask_values_0_255", {}, 2),
        ("nonconsecutive_label_values/vnc_em", {}, 9),
        ("nonconsecutive_label_values/sentinel2", {}, 5),
        ("rgb_coded_masks_png", {"colors": "colors.csv"}, 3),
        ("many_masks_per_image/dsb2018", {"merge": "union"}, 2),
    ],
)
def test_real_bad_masks_pass_the_rules_afterwards(real_data, tmp_path, name, how, num_classes):
    source = real_data / "dirty" / name
    if not source.is_dir():
        pytest.skip(f"no {source}")
    if name.endswith("sentinel2"):
        pytest.importorskip("rasterio")
    data = tmp_path / "data"
    shutil.copytree(source, data)
    if "colors" in how:
        how = {"colors": data / "colors.csv"}
        how["colors"].write_text("r,g,b,class\n0,0,0,0\n0,255,0,1\n255,0,0,2\n")
    looks = looks_of(data)
    outcome = mended(data, **how)
    assert outcome.refused == 0
    images = {look.image.path.stem: look.image.path for look in looks if look.image}
    masks = [path for path in (data / "masks_fixed").iterdir() if path.name != "fixes.json"]
    pairs = [Pair(images[path.stem], path) for path in sorted(masks)]
    assert len(pairs) == len(looks)
    facts = scan(pairs, None)
    check_masks(pairs, facts, num_classes, None)
    assert {value for fact in facts for value in fact.counts} == set(range(num_classes))
    undo(data / "masks_fixed")
    assert not (data / "masks_fixed").exists()


def test_real_pairs_that_lack_a_half_are_named(real_data, tmp_path):
    source = real_data / "dirty" / "missing_pairs"
    if not source.is_dir():
        pytest.skip(f"no {source}")
    data = tmp_path / "data"
    shutil.copytree(source, data)
    outcome = mended(data)
    assert outcome.refused == 9 and not (data / "masks_fixed").exists()
    assert outcome.lines[-1] == "6 masks need no repair; nothing was written"


def test_colours_that_compression_has_changed_are_to_be_exported_again(data):
    for stem in "ab":
        save(
            data / f"masks/{stem}.jpg",
            np.array([[200, 30, 30], [20, 180, 40], [10, 10, 220], [0, 0, 0]], np.uint8)[FOUR],
        )
    outcome = mended(data)
    assert outcome.lines[0].startswith("compression has changed the colours of the masks")
    assert "export the masks again as PNG" in outcome.lines[0] and not (data / "masks_fixed").exists()
