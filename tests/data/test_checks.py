"""The mask rules over many masks at once, and the file that remembers what was read."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ml_src.core.data.checks import MaskFacts, check_files, check_images, check_masks, class_counts, scan
from ml_src.core.data.files import Pair, find_pairs
from ml_src.core.errors import DataError


def write_pair(folder: Path, stem: str, mask: np.ndarray, image: np.ndarray | None = None) -> Pair:
    pair = Pair(folder / "images" / f"{stem}.png", folder / "masks" / f"{stem}.png")
    for path, pixels in (
        (pair.image, np.zeros(mask.shape[:2], np.uint8) if image is None else image),
        (pair.mask, mask),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return pair


def mask_of(*values: int) -> np.ndarray:
    return np.array([values], np.uint8)


def replace_unseen(path: Path) -> None:
    """Fill a file with rubbish of the same size and time, so that only reading it shows the change."""
    before = path.stat()
    path.write_bytes(b"x" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# Facts


def test_facts_are_sizes_and_pixels_per_value_in_the_order_of_the_pairs(tmp_path):
    pairs = [
        write_pair(tmp_path, "a", np.array([[0, 1, 1], [2, 2, 255]], np.uint8)),
        write_pair(tmp_path, "b", np.full((4, 5), 40_000, np.uint16)),
    ]
    assert scan(pairs, None) == [
        MaskFacts(2, 3, {0: 1, 1: 2, 2: 2, 255: 1}, 2, 3, 1, "uint8"),
        MaskFacts(4, 5, {40_000: 20}, 4, 5, 1, "uint8"),
    ]


def test_a_file_that_breaks_the_format_rules_becomes_a_problem_not_an_exception(tmp_path):
    pairs = [
        write_pair(tmp_path, "rgb", np.zeros((2, 3, 3), np.uint8)),
        write_pair(tmp_path, "deep", mask_of(0, 1), np.zeros((1, 2), np.uint16)),
        write_pair(tmp_path, "fine", mask_of(0, 1)),
    ]
    pairs[1].image.write_bytes(pairs[1].image.read_bytes()[:20])
    facts = scan(pairs, None)
    assert "masks/rgb.png has 3 channels" in facts[0].problem
    assert "images/deep.png cannot be read" in facts[1].problem
    assert facts[2].problem is None


def test_progress_counts_up_to_all_pairs(tmp_path):
    pairs = [write_pair(tmp_path, str(index), mask_of(0)) for index in range(5)]
    seen: list[int] = []
    scan(pairs, None, seen.append)
    assert seen == [0, 1, 2, 3, 4, 5]


# The cache


def test_a_second_scan_reads_no_mask(tmp_path):
    pairs = [write_pair(tmp_path, str(index), mask_of(0, index)) for index in range(3)]
    first = scan(pairs, tmp_path / "facts.json")
    for pair in pairs:
        replace_unseen(pair.mask)
        replace_unseen(pair.image)
    assert scan(pairs, tmp_path / "facts.json") == first


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_a_change_of_time_or_size_of_either_file_is_seen(tmp_path, kind):
    pair = write_pair(tmp_path, "a", mask_of(0, 1))
    scan([pair], tmp_path / "facts.json")
    path = getattr(pair, kind)
    later = path.stat().st_mtime_ns + 1
    path.write_bytes(b"x" * path.stat().st_size)
    os.utime(path, ns=(later, later))
    assert scan([pair], tmp_path / "facts.json")[0].problem is not None


def test_entries_of_other_files_are_kept(tmp_path):
    one, other = write_pair(tmp_path, "one", mask_of(0)), write_pair(tmp_path, "other", mask_of(1))
    first = scan([one], tmp_path / "facts.json") + scan([other], tmp_path / "facts.json")
    replace_unseen(one.mask)
    assert scan([one, other], tmp_path / "facts.json") == first


def test_a_problem_is_not_remembered(tmp_path):
    pair = write_pair(tmp_path, "a", mask_of(0, 1))
    good = pair.mask.read_bytes()
    time = pair.mask.stat().st_mtime_ns
    replace_unseen(pair.mask)
    assert scan([pair], tmp_path / "facts.json")[0].problem is not None
    pair.mask.write_bytes(good)
    os.utime(pair.mask, ns=(time, time))
    assert scan([pair], tmp_path / "facts.json")[0].problem is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 0}', '{"version": 1}', '{"version": 1, "masks": 3}', "\xff"]
)
def test_a_broken_cache_is_replaced_by_a_good_one(tmp_path, text):
    pair = write_pair(tmp_path, "a", mask_of(0, 1))
    (tmp_path / "facts.json").write_text(text)
    first = scan([pair], tmp_path / "facts.json")
    assert first == [MaskFacts(1, 2, {0: 1, 1: 1}, 1, 2, 1, "uint8")]
    replace_unseen(pair.mask)
    assert scan([pair], tmp_path / "facts.json") == first


def test_a_broken_entry_is_read_anew(tmp_path):
    pair = write_pair(tmp_path, "a", mask_of(0, 1))
    first = scan([pair], tmp_path / "facts.json")
    stored = json.loads((tmp_path / "facts.json").read_text())
    for entry in ([], [1, 2, 3, 4, 5], "text", None):
        stored["masks"] = dict.fromkeys(stored["masks"], entry)
        (tmp_path / "facts.json").write_text(json.dumps(stored))
        assert scan([pair], tmp_path / "facts.json") == first


def test_a_cache_that_cannot_be_written_is_no_error_and_no_folder_is_made(tmp_path):
    pair = write_pair(tmp_path, "a", mask_of(0))
    assert scan([pair], tmp_path / "nowhere" / "facts.json")[0].problem is None
    assert not (tmp_path / "nowhere").exists()


def test_no_draft_of_the_cache_is_left(tmp_path):
    pair = write_pair(tmp_path, "a", mask_of(0))
    (tmp_path / "cache").mkdir()
    scan([pair], tmp_path / "cache" / "facts.json")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["facts.json"]


# The rules


def test_masks_that_keep_the_rules_pass(tmp_path):
    pairs = [write_pair(tmp_path, "a", mask_of(0, 1, 2)), write_pair(tmp_path, "b", mask_of(0, 255, 0))]
    check_masks(pairs, scan(pairs, None), num_classes=3, ignore_index=255)


def test_a_single_mistake_is_one_sentence(tmp_path):
    pairs = [write_pair(tmp_path, "img6", mask_of(0, 1)), write_pair(tmp_path, "img7", mask_of(0, 3))]
    with pytest.raises(DataError) as error:
        check_masks(pairs, scan(pairs, None), num_classes=2, ignore_index=None)
    assert str(error.value) == f"{pairs[1].mask} has values [0, 3] but num_classes is 2: run ml-check DATA --fix"


def test_a_lone_255_may_also_mean_unlabelled(tmp_path):
    pairs = [write_pair(tmp_path, "a", mask_of(0, 255))]
    with pytest.raises(DataError, match=r"has values \[0, 255\] .*--fix, or set data.ignore_index: 255"):
        check_masks(pairs, scan(pairs, None), num_classes=2, ignore_index=None)


def test_the_ignored_value_is_ignored_but_no_other(tmp_path):
    pairs = [write_pair(tmp_path, "a", mask_of(0, 9))]
    check_masks(pairs, scan(pairs, None), num_classes=2, ignore_index=9)
    with pytest.raises(DataError, match="num_classes is 2"):
        check_masks(pairs, scan(pairs, None), num_classes=2, ignore_index=255)


@pytest.mark.parametrize("check", [check_files, lambda pairs, facts: check_masks(pairs, facts, 2, None)])
def test_a_mask_of_another_size_names_both_sizes(tmp_path, check):
    pairs = [write_pair(tmp_path, "a", np.zeros((4, 6), np.uint8), np.zeros((5, 6), np.uint8))]
    with pytest.raises(DataError, match=r"a\.png is 6x4 pixels \(width x height\) but .*a\.png is 6x5"):
        check(pairs, scan(pairs, None))


def test_an_image_turned_by_exif_has_the_size_that_a_viewer_shows(tmp_path):
    tags = Image.Exif()
    tags[274] = 6
    write_pair(tmp_path, "a", np.zeros((6, 4), np.uint8))
    (tmp_path / "images" / "a.png").unlink()
    Image.new("L", (6, 4)).save(tmp_path / "images" / "a.jpg", exif=tags)
    pairs = find_pairs(tmp_path / "images", tmp_path / "masks")
    check_masks(pairs, scan(pairs, None), num_classes=2, ignore_index=None)


def test_of_many_mistakes_the_first_line_counts_the_kinds_and_ten_are_named(tmp_path):
    pairs = [write_pair(tmp_path, f"{index:02}", mask_of(0, 7)) for index in range(11)]
    pairs.append(write_pair(tmp_path, "rgb", np.zeros((1, 2, 3), np.uint8)))
    pairs.append(write_pair(tmp_path, "small", mask_of(0), np.zeros((9, 9), np.uint8)))
    pairs.append(write_pair(tmp_path, "zz_fine", mask_of(0, 1)))
    with pytest.raises(DataError) as error:
        check_masks(pairs, scan(pairs, None), num_classes=2, ignore_index=None)
    lines = str(error.value).split("\n")
    assert lines[0] == (
        "of 14 pairs of image and mask 11 have values outside 0..1; 1 cannot be read as image and mask; "
        "1 differ in size between image and mask:"
    )
    assert [Path(line.split()[0]).name for line in lines[1:11]] == [f"{index:02}.png" for index in range(10)]
    assert lines[11:] == ["  and 3 more"]


def test_class_counts_are_summed_over_masks_without_ignored_and_foreign_pixels():
    facts = [MaskFacts(1, 6, {0: 3, 1: 2, 255: 1}, 1, 6), MaskFacts(1, 4, {1: 1, 7: 3}, 1, 4)]
    assert class_counts(facts, 3, 255) == [3, 3, 0]
    assert class_counts(facts, 3, 1) == [3, 0, 0]


# Images


def test_images_of_another_number_of_channels_are_named_with_what_to_set(tmp_path):
    pairs = [Pair(Path("a.tif"), Path("a.png")), Pair(Path("b.tif"), Path("b.png"))]
    facts = [MaskFacts(1, 1, {0: 1}, 1, 1, 4, "uint8"), MaskFacts(1, 1, {0: 1}, 1, 1, 4, "uint8")]
    check_images(pairs, facts, 4)
    with pytest.raises(DataError, match=r"of 2 pairs .* 2 have another number of channels:\n  a\.tif has 4 channels"):
        check_images(pairs, facts, 3)


@pytest.mark.parametrize(("found", "in_channels"), [(1, 3), (3, 1), (3, 3), (1, 1)])
def test_gray_and_rgb_become_each_other(found, in_channels):
    check_images([Pair(Path("a.png"), Path("a.png"))], [MaskFacts(1, 1, {0: 1}, 1, 1, found, "uint8")], in_channels)


def test_an_image_of_another_number_type_is_named():
    pairs = [Pair(Path(f"{name}.tif"), Path(f"{name}.png")) for name in "abc"]
    facts = [MaskFacts(1, 1, {0: 1}, 1, 1, 1, dtype) for dtype in ("uint16", "uint8", "uint16")]
    with pytest.raises(DataError, match=r"^b\.tif has uint8 pixels but most have uint16"):
        check_images(pairs, facts, 1)
