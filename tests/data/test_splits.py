"""Splits: every image once, no group divided, rare classes everywhere, and files that are written all or none."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml_src.core.data.files import Pair
from ml_src.core.data.split_files import cache_path, read_split, write_splits
from ml_src.core.data.splits import Splits, groups_from_csv, groups_from_regex, make_splits
from ml_src.core.errors import ConfigError, DataError


def draw(num_images: int, num_folds: int = 5, test_split: float = 0.15, seed: int = 42, **others) -> Splits:
    counts = others.pop("counts", [{0: 1}] * num_images)
    options = {"groups": None, "val_split": None, "stratified": False} | others
    return make_splits(counts, num_folds=num_folds, test_split=test_split, seed=seed, **options)


def parts(splits: Splits) -> list[list[int]]:
    """Return what is measured on: test and the val of each fold."""
    return [splits.test, *(val for _, val in splits.folds)]


counts_of_images = st.lists(
    st.dictionaries(st.integers(0, 4), st.integers(1, 50), max_size=4), min_size=8, max_size=40
)  # fmt: skip


# The laws


@given(counts_of_images, st.integers(2, 6), st.sampled_from([0.0, 0.1, 0.3]), st.booleans(), st.integers(0, 9))
def test_test_and_vals_are_a_partition_and_train_is_the_rest(counts, num_folds, test_split, stratified, seed):
    splits = draw(len(counts), num_folds, test_split, seed, counts=counts, stratified=stratified)
    assert sorted(index for part in parts(splits) for index in part) == list(range(len(counts)))
    for train, val in splits.folds:
        assert sorted(train + val + splits.test) == list(range(len(counts)))
        assert train == sorted(train)
        assert val == sorted(val)


@given(counts_of_images, st.integers(2, 6), st.booleans(), st.integers(0, 9))
def test_sizes_are_exact_also_when_stratified(counts, num_folds, stratified, seed):
    splits = draw(len(counts), num_folds, 0.2, seed, counts=counts, stratified=stratified)
    assert len(splits.test) == max(1, min(round(0.2 * len(counts)), len(counts) - num_folds))
    sizes = [len(val) for _, val in splits.folds]
    assert max(sizes) - min(sizes) <= 1


@given(counts_of_images, st.data(), st.sampled_from([None, 0.3]), st.booleans(), st.integers(0, 9))
def test_a_group_is_never_divided_and_no_part_is_empty(counts, data, val_split, stratified, seed):
    names = [*"abcd", *data.draw(st.lists(st.sampled_from("abcdefg"), min_size=len(counts), max_size=len(counts)))]
    groups = names[: len(counts)]
    splits = draw(len(counts), 3, 0.2, seed, counts=counts, groups=groups, val_split=val_split, stratified=stratified)
    for train, val in splits.folds:
        shares = [{groups[index] for index in part} for part in (train, val, splits.test)]
        assert all(shares)
        assert sum(map(len, shares)) == len(set(groups))


@given(st.integers(8, 60), st.floats(0.05, 0.5), st.integers(0, 9))
def test_val_split_draws_that_share_of_what_is_not_test_for_each_fold(num_images, val_split, seed):
    splits = draw(num_images, 3, 0.25, seed, val_split=val_split)
    rest = num_images - len(splits.test)
    for train, val in splits.folds:
        assert len(val) == max(1, round(val_split * rest))
        assert sorted(train + val + splits.test) == list(range(num_images))


def test_with_val_split_the_folds_differ_and_one_more_leaves_the_others_as_they_are():
    three, four = draw(40, 3, val_split=0.2), draw(40, 4, val_split=0.2)
    assert len({tuple(val) for _, val in four.folds}) == 4
    assert four.folds[:3] == three.folds


def test_the_split_is_a_function_of_the_seed():
    counts = [{0: 5, index % 3 + 1: index + 1} for index in range(30)]
    for stratified in (False, True):
        one, again, other = (draw(30, seed=seed, counts=counts, stratified=stratified) for seed in (1, 1, 2))
        assert one == again
        assert one != other


def test_every_image_is_for_testing_under_some_seed():
    """The draw is not partial to a place in the list."""
    drawn = Counter(index for seed in range(200) for index in draw(20, seed=seed).test)
    assert len(drawn) == 20
    assert max(drawn.values()) < 3 * min(drawn.values())


# Groups


def test_groups_are_balanced_by_their_size():
    groups = [
        name for name, size in zip("abcdefghij", [9, 8, 7, 6, 5, 4, 3, 2, 1, 3], strict=True) for _ in range(size)
    ]
    splits = draw(len(groups), 4, 0.0, groups=groups)
    sizes = [len(val) for _, val in splits.folds]
    assert max(sizes) - min(sizes) <= 2


def test_a_giant_group_is_not_for_testing():
    groups = ["giant"] * 100 + ["a", "b", "c"] * 5
    for seed in range(20):
        splits = draw(115, 2, 0.1, seed, groups=groups)
        assert 0 < len(splits.test) <= 10


def test_where_every_group_is_too_large_the_smallest_is_for_testing():
    groups = ["a"] * 30 + ["b"] * 20 + ["c"] * 40
    assert draw(90, 2, 0.05, groups=groups).test == list(range(30, 50))


# Stratification


def rare_classes(num_images: int, seed: int) -> list[dict[int, int]]:
    """Class 0 everywhere, class 1 in half of the images, classes 2 and 3 in six each."""
    rng = np.random.default_rng(seed)
    counts = [{0: int(rng.integers(50, 100))} for _ in range(num_images)]
    for label, number in ((1, num_images // 2), (2, 6), (3, 6)):
        for index in rng.choice(num_images, number, replace=False):
            counts[index][label] = int(rng.integers(1, 30))
    return counts


@pytest.mark.parametrize("seed", range(10))
def test_a_rare_class_is_in_test_and_in_every_fold(seed):
    counts = rare_classes(60, seed)
    splits = draw(60, counts=counts, stratified=True, seed=seed)
    for label in (2, 3):
        assert [sum(label in counts[index] for index in part) for part in parts(splits)] == [1] * 6


@given(st.integers(0, 10_000), st.integers(6, 12))
def test_one_rare_class_reaches_every_part_as_soon_as_there_is_one_image_a_part(seed, number):
    """Also with a test split so small or so large that rounding alone would leave a part without."""
    rng = np.random.default_rng(seed)
    rare = set(rng.choice(40, number, replace=False).tolist())
    counts = [{0: 100, 1: int(rng.integers(1, 1000))} if index in rare else {0: 100} for index in range(40)]
    for test_split in (0.03, 0.4):
        splits = draw(40, 5, test_split, seed, counts=counts, stratified=True)
        assert all(rare & set(part) for part in parts(splits))


def test_a_class_of_a_single_image_is_trained_on_not_tested():
    counts = [{0: 9}] * 19 + [{0: 9, 1: 9}]
    for seed in range(20):
        assert 19 not in draw(20, 4, counts=counts, stratified=True, seed=seed).test


def test_a_class_with_two_images_is_in_train_and_val():
    counts = [{0: 9}] * 18 + [{0: 9, 1: 9}] * 2
    for seed in range(10):
        ((train, val),) = draw(20, 1, 0.0, seed, counts=counts, stratified=True, val_split=0.1).folds
        assert {18, 19} & set(train)
        assert {18, 19} & set(val)


def test_stratified_shares_of_pixels_are_nearer_to_the_whole_than_random_ones():
    """Three classes in 100, 50 and 25 of 100 images, with very unequal numbers of pixels."""

    def error(stratified: bool) -> float:
        errors = []
        for seed in range(5):
            rng = np.random.default_rng(seed)
            pixels = rng.integers(1, 100, (100, 3)) * (rng.random((100, 3)) < [1, 0.5, 0.25])
            counts = [{label: int(number) for label, number in enumerate(row) if number} for row in pixels]
            whole = pixels.sum(axis=0) / pixels.sum()
            for part in parts(draw(100, counts=counts, stratified=stratified, seed=seed)):
                share = pixels[part].sum(axis=0) / pixels[part].sum()
                errors.append(np.abs(share / whole - 1).mean())
        return float(np.mean(errors))

    assert error(stratified=True) < 0.5 * error(stratified=False)


def test_a_rare_class_reaches_every_fold_with_groups_too():
    groups = [f"patient_{index // 4}" for index in range(80)]
    counts = [{0: 10, 1: 5} if index // 4 < 6 and index % 4 == 0 else {0: 10} for index in range(80)]
    splits = draw(80, counts=counts, groups=groups, stratified=True)
    assert all(any(1 in counts[index] for index in part) for part in parts(splits))


# What cannot be drawn


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_folds": 1}, "--folds is 1: give at least 2, or 1 together with --val_split"),
        ({"num_folds": 0, "val_split": 0.2}, "--folds is 0"),
        ({"test_split": 1.0}, r"--test_split is 1\.0"),
        ({"test_split": -0.1}, r"--test_split is -0\.1"),
        ({"test_split": float("nan")}, "--test_split is nan"),
        ({"val_split": 0.0}, r"--val_split is 0\.0"),
        ({"val_split": 1.0}, r"--val_split is 1\.0"),
    ],
)
def test_a_number_out_of_range_names_its_flag(options, message):
    with pytest.raises(ConfigError, match=message):
        draw(20, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_folds": 10}, "10 images are too few for 10 folds and a test split"),
        ({"num_folds": 11, "test_split": 0.0}, "10 images are too few for 11 folds:"),
        ({"num_folds": 3, "groups": ["a", "b", "c"] * 3 + ["a"]}, "3 groups are too few for 3 folds and a test split"),
        (
            {"num_folds": 9, "val_split": 0.5, "groups": ["a", "b"] * 5},
            "2 groups are too few for training and validation",
        ),
    ],
)
def test_too_few_images_or_groups_are_counted(options, message):
    with pytest.raises(DataError, match=message):
        draw(10, **options)


def test_as_many_images_as_parts_are_enough():
    assert [len(part) for part in parts(draw(6, 5))] == [1] * 6


# Groups from a file or a pattern


def pairs_of(data_dir: Path, *names: str) -> list[Pair]:
    """Name pairs and make their (empty) files."""
    pairs = [Pair(data_dir / "images" / name, data_dir / "masks" / f"{Path(name).stem}.png") for name in names]
    for pair in pairs:
        for path in (pair.image, pair.mask):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return pairs


def test_groups_are_read_by_name_or_stem_from_what_excel_saves(tmp_path):
    pairs = pairs_of(tmp_path, "a.1.jpg", "b.png", "c ä.png")
    (tmp_path / "g.csv").write_bytes(
        "image,age,group\r\na.1.jpg,3,P1\r\nb, 4, P2 \r\nc ä,,P1\r\nx,,P9\r\n".encode("utf-8-sig")
    )
    assert groups_from_csv(pairs, tmp_path / "g.csv") == ["P1", "P2", "P1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,group\na,1\n", r"gives no group for 2 of 3 images: b\.png, c\.png$"),
        ("image,group\na,1\nb,\nc\n", r"gives no group for 2 of 3 images: b\.png, c\.png$"),
        ("image,group\na,1\nb,2\nc,3\nb.png,2\nb,4\n", r"gives more than one group for b\.png$"),
        ("file;group\na;1\n", r"has the columns \[file;group\] but needs image and group"),
        ("", r"has the columns \[\] but needs image and group"),
    ],
)
def test_a_table_of_groups_with_gaps_names_them(tmp_path, text, message):
    pairs = pairs_of(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "g.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        groups_from_csv(pairs, tmp_path / "g.csv")


def test_a_table_of_groups_that_cannot_be_read_is_named(tmp_path):
    pairs = pairs_of(tmp_path, "a.png")
    with pytest.raises(DataError, match=r"none\.csv cannot be read"):
        groups_from_csv(pairs, tmp_path / "none.csv")
    (tmp_path / "g.csv").write_bytes(b"image,group\nstra\xdfe,1\n")
    with pytest.raises(DataError, match=r"g\.csv cannot be read .* UTF-8"):
        groups_from_csv(pairs, tmp_path / "g.csv")


@pytest.mark.parametrize(("pattern", "expected"), [(r"^(p\d+)_", ["p1", "p1", "p22"]), (r"p\d", ["p1", "p1", "p2"])])
def test_a_pattern_gives_its_first_group_or_all_that_it_finds(tmp_path, pattern, expected):
    assert groups_from_regex(pairs_of(tmp_path, "p1_a.png", "p1_b.png", "p22_a.png"), pattern) == expected


def test_a_pattern_that_finds_nothing_names_the_images_and_a_faulty_one_itself(tmp_path):
    pairs = pairs_of(tmp_path, "p1_a.png", "x.png", "z.png")
    for pattern in (r"p\d+", r"p\d+|(q)?[xz]", r"(p)|x|z"):
        with pytest.raises(DataError, match=r"finds no group in the stems of \d of 3 images: .*x\.png, z\.png$"):
            groups_from_regex(pairs, pattern)
    with pytest.raises(ConfigError, match="--group_regex '\\(' is no regular expression"):
        groups_from_regex(pairs, "(")


# Files

TWO_FOLDS = Splits(test=[2], folds=[([1], [0]), ([0], [1])])
NAMES = ["a.jpg", "b ü.png", "c.PNG"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def test_the_files_have_the_names_and_lines_of_the_guide(tmp_path):
    pairs = pairs_of(tmp_path, *NAMES)
    write_splits(TWO_FOLDS, pairs, tmp_path, tmp_path / "splits", force=False)
    assert {name: text.decode() for name, text in files_of(tmp_path / "splits").items()} == {
        "test_images.txt": "images/c.PNG\n",
        "test_masks.txt": "masks/c.png\n",
        "fold_0_train_images.txt": "images/b ü.png\n",
        "fold_0_train_masks.txt": "masks/b ü.png\n",
        "fold_0_val_images.txt": "images/a.jpg\n",
        "fold_0_val_masks.txt": "masks/a.png\n",
        "fold_1_train_images.txt": "images/a.jpg\n",
        "fold_1_train_masks.txt": "masks/a.png\n",
        "fold_1_val_images.txt": "images/b ü.png\n",
        "fold_1_val_masks.txt": "masks/b ü.png\n",
    }


def test_what_is_written_is_read(tmp_path):
    pairs = pairs_of(tmp_path, *NAMES)
    write_splits(TWO_FOLDS, pairs, tmp_path, tmp_path / "elsewhere" / "splits", force=False)
    for name, indices in (("test", [2]), ("fold_0_train", [1]), ("fold_1_val", [1])):
        assert list(read_split(tmp_path / "elsewhere" / "splits", tmp_path, name)) == [
            pairs[index] for index in indices
        ]


def test_masks_may_lie_outside_the_data_folder(tmp_path):
    (pair,) = pairs_of(tmp_path / "other", "a.png")
    data_dir = tmp_path / "data"
    (image,) = pairs_of(data_dir, "a.png")
    write_splits(Splits([0], []), [Pair(image.image, pair.mask)], data_dir, data_dir / "splits", force=False)
    (read,) = read_split(data_dir / "splits", data_dir, "test")
    assert read.mask.samefile(pair.mask)


def test_the_same_split_again_touches_nothing(tmp_path):
    pairs = pairs_of(tmp_path, *NAMES)
    write_splits(TWO_FOLDS, pairs, tmp_path, tmp_path / "splits", force=False)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "splits").iterdir()}
    write_splits(TWO_FOLDS, pairs, tmp_path, tmp_path / "splits", force=False)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "splits").iterdir()} == before


def test_another_split_is_refused_and_replaced_only_by_force(tmp_path):
    pairs = pairs_of(tmp_path, *NAMES)
    splits_dir = tmp_path / "splits"
    write_splits(TWO_FOLDS, pairs, tmp_path, splits_dir, force=False)
    (splits_dir / "train.txt").write_text("mine")
    before = files_of(splits_dir)
    one_fold = Splits(test=[0], folds=[([1], [2])])
    with pytest.raises(DataError, match="splits holds another split: give --force"):
        write_splits(one_fold, pairs, tmp_path, splits_dir, force=False)
    assert files_of(splits_dir) == before

    write_splits(one_fold, pairs, tmp_path, splits_dir, force=True)
    assert sorted(files_of(splits_dir)) == [
        *(f"fold_0_{part}_{kind}.txt" for part in ("train", "val") for kind in ("images", "masks")),
        "test_images.txt",
        "test_masks.txt",
        "train.txt",
    ]
    assert list(read_split(splits_dir, tmp_path, "test")) == [pairs[0]]


def test_a_failure_halfway_leaves_the_old_files(tmp_path):
    """A folder stands where the last file of the new split should go."""
    pairs = pairs_of(tmp_path, *NAMES)
    splits_dir = tmp_path / "splits"
    write_splits(TWO_FOLDS, pairs, tmp_path, splits_dir, force=False)
    before = files_of(splits_dir)
    (splits_dir / "fold_2_val_masks.txt" / "in the way").mkdir(parents=True)
    three_folds = Splits([], [([0, 1], [2]), ([0, 2], [1]), ([1, 2], [0])])
    with pytest.raises(DataError, match="splits cannot be written"):
        write_splits(three_folds, pairs, tmp_path, splits_dir, force=True)
    (splits_dir / "fold_2_val_masks.txt" / "in the way").rmdir()
    (splits_dir / "fold_2_val_masks.txt").rmdir()
    assert files_of(splits_dir) == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    pairs = pairs_of(tmp_path, *NAMES)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file.splits cannot be written .* give --output"):
        write_splits(TWO_FOLDS, pairs, tmp_path, tmp_path / "file" / "splits", force=True)


def test_the_facts_of_the_masks_lie_beside_the_splits():
    assert cache_path(Path("data/splits")) == Path("data/splits/.mask_facts.json")


# Reading what has been tampered with


@pytest.fixture
def split_dir(tmp_path: Path) -> Path:
    pairs = pairs_of(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    write_splits(Splits([], [([2, 3], [0, 1]), ([0, 1], [2, 3])]), pairs, tmp_path, tmp_path / "splits", force=False)
    return tmp_path / "splits"


def test_windows_line_ends_and_a_bom_are_read(split_dir):
    path = split_dir / "fold_0_val_images.txt"
    path.write_bytes(b"\xef\xbb\xbfimages/a.jpg\r\nimages/b.jpg\r\n\r\n")
    assert [pair.image.name for pair in read_split(split_dir, split_dir.parent, "fold_0_val")] == ["a.jpg", "b.jpg"]


def test_a_missing_split_asks_for_ml_split_and_a_fold_too_high_for_another(split_dir, tmp_path):
    with pytest.raises(DataError, match=r"nowhere.test_images\.txt does not exist: run ml-split"):
        read_split(tmp_path / "nowhere", tmp_path, "test")
    with pytest.raises(DataError, match=r"fold_7_train_images\.txt does not exist: choose a fold from 0 to 1"):
        read_split(split_dir, tmp_path, "fold_7_train")
    (split_dir / "fold_0_val_masks.txt").unlink()
    with pytest.raises(DataError, match=r"fold_0_val_masks\.txt does not exist: run ml-split"):
        read_split(split_dir, tmp_path, "fold_0_val")


def test_an_empty_test_split_says_so(split_dir):
    with pytest.raises(DataError, match="the split has no test images"):
        read_split(split_dir, split_dir.parent, "test")


def test_lists_of_unequal_length_are_refused(split_dir):
    (split_dir / "fold_0_val_masks.txt").write_text("masks/a.png\n")
    with pytest.raises(DataError, match=r"fold_0_val_images\.txt has 2 lines but fold_0_val_masks\.txt has 1"):
        read_split(split_dir, split_dir.parent, "fold_0_val")


def test_lines_that_do_not_pair_are_refused(split_dir):
    (split_dir / "fold_0_val_masks.txt").write_text("masks/a.png\nmasks/c.png\n")
    with pytest.raises(DataError, match=r"line 2 pairs b\.jpg in .* with c\.png"):
        read_split(split_dir, split_dir.parent, "fold_0_val")


def test_listed_files_that_are_gone_are_named(split_dir):
    (split_dir.parent / "images" / "b.jpg").unlink()
    with pytest.raises(DataError, match=r"name files that do not exist: \S*images/b\.jpg;"):
        read_split(split_dir, split_dir.parent, "fold_0_val")
