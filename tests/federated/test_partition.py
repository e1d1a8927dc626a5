"""Sites of a simulation: every image at one, none without images where that can be, and as uneven as was asked."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ml_src.core.config import Config
from ml_src.core.data.checks import MaskFacts
from ml_src.core.data.files import find_pairs
from ml_src.core.data.split_files import read_groups, read_split, write_splits
from ml_src.core.data.split_report import rows_of_sites, unevenness
from ml_src.core.data.splits import make_splits
from ml_src.core.errors import ConfigError, DataError
from ml_src.core.federated.partition import assign_sites, write_partition

STRATEGIES = ("iid", "dirichlet", "by_group")
Counts = list[dict[int, int]]


def assign(counts: Counts, parts: dict[str, list[int]] | None = None, **others: Any) -> list[int]:
    options = {"groups": None, "num_sites": 4, "strategy": "dirichlet", "alpha": 0.5, "seed": 42} | others
    return assign_sites(counts, parts or {"fold_0_train": list(range(len(counts)))}, **options)


def parts_of(counts: Counts, num_folds: int, groups: list[str] | None = None, seed: int = 42) -> dict[str, list[int]]:
    return make_splits(counts, groups, num_folds, 0.15, None, False, seed).parts


counts_of_images = st.lists(
    st.dictionaries(st.integers(0, 4), st.integers(1, 50), max_size=4), min_size=12, max_size=60
)  # fmt: skip


# Who gets what


@given(
    counts_of_images,
    st.integers(2, 4),
    st.integers(1, 6),
    st.sampled_from(["iid", "dirichlet"]),
    st.sampled_from([0.001, 0.1, 1.0, 100.0]),
    st.integers(0, 99),
)
def test_every_site_has_images_of_every_part_that_has_as_many_as_there_are_sites(
    counts, num_folds, num_sites, strategy, alpha, seed
):
    """Where training or validation has fewer, it is an error; test may be without."""
    parts = parts_of(counts, num_folds)
    options = {"num_sites": num_sites, "strategy": strategy, "alpha": alpha, "seed": seed}
    if any(len(indices) < num_sites for name, indices in parts.items() if name != "test"):
        with pytest.raises(DataError, match="would have none of them: give fewer sites"):
            assign(counts, parts, **options)
        return
    site_of = assign(counts, parts, **options)
    assert len(site_of) == len(counts)
    assert set(site_of) == set(range(num_sites))
    for name, indices in parts.items():
        if name != "test" or len(indices) >= num_sites:
            assert {site_of[index] for index in indices} == set(range(num_sites))


@given(counts_of_images, st.data(), st.integers(1, 4), st.integers(0, 99))
def test_groups_stay_whole_and_every_site_has_groups_of_every_part(counts, data, num_sites, seed):
    names = data.draw(st.lists(st.sampled_from("abcdefghijklmnop"), min_size=len(counts), max_size=len(counts)))
    assume(len(set(names)) > 2)
    parts = parts_of(counts, 2, names)
    options = {"groups": names, "num_sites": num_sites, "strategy": "by_group", "seed": seed}
    groups_in = {name: {names[index] for index in indices} for name, indices in parts.items()}
    if any(len(found) < num_sites for name, found in groups_in.items() if name != "test"):
        with pytest.raises(DataError, match="give fewer sites"):
            assign(counts, parts, **options)
        return
    site_of = assign(counts, parts, **options)
    assert len(set(zip(names, site_of, strict=True))) == len(set(names))
    for name, indices in parts.items():
        if name != "test":
            assert {site_of[index] for index in indices} == set(range(num_sites))


@pytest.mark.parametrize("strategy", ["iid", "dirichlet"])
def test_no_site_lacks_images_where_each_fold_draws_its_own_validation(strategy):
    counts = [{0: 9, index % 3: 1} for index in range(80)]
    for seed in range(10):
        parts = make_splits(counts, None, 4, 0.2, 0.15, False, seed).parts
        site_of = assign(counts, parts, num_sites=5, strategy=strategy, alpha=0.05, seed=seed)
        assert all({site_of[index] for index in indices} == set(range(5)) for indices in parts.values())


@given(counts_of_images, st.sampled_from(STRATEGIES), st.integers(0, 99))
def test_the_sites_are_a_function_of_the_seed(counts, strategy, seed):
    groups = [str(index // 2) for index in range(len(counts))]
    options = {"groups": groups, "num_sites": 3, "strategy": strategy, "seed": seed}
    assert assign(counts, **options) == assign(counts, **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_seed_gives_other_sites(strategy):
    counts = [{0: 1, 1: index} for index in range(40)]
    groups = [str(index // 2) for index in range(40)]
    found = {tuple(assign(counts, groups=groups, strategy=strategy, seed=seed)) for seed in range(20)}
    assert len(found) == 20


def test_too_few_images_or_groups_for_the_sites_is_said_with_both_numbers():
    with pytest.raises(DataError, match="3 images are too few for 4 sites: give fewer sites or more images"):
        assign([{0: 1}] * 3)
    with pytest.raises(DataError, match="2 groups are too few for 4 sites: give fewer sites or more groups"):
        assign([{0: 1}] * 8, groups=list("aaaabbbb"), strategy="by_group")
    with pytest.raises(DataError, match="the images have no groups: run ml-split again with --groups"):
        assign([{0: 1}] * 8, strategy="by_group")


def test_a_part_with_fewer_images_than_sites_is_named_with_the_sites_that_would_miss_it():
    parts = {"test": [0], "fold_0_train": [1, 2, 3, 4, 5], "fold_0_val": [6, 7]}
    with pytest.raises(
        DataError, match=r"^fold_0_val has 2 images, and site_\d, site_\d would have none of them: give"
    ):
        assign([{0: 1}] * 8, parts)


# How many


@given(st.integers(30, 90), st.integers(2, 5), st.integers(0, 99))
def test_iid_gives_every_site_as_many_images_of_test_and_of_each_validation(num_images, num_sites, seed):
    counts = [{0: 1}] * num_images
    parts = parts_of(counts, 5)
    site_of = assign(counts, parts, num_sites=num_sites, strategy="iid", seed=seed)
    for name, indices in parts.items():
        if not name.endswith("train"):
            sizes = [sum(site_of[index] == site for index in indices) for site in range(num_sites)]
            assert max(sizes) - min(sizes) <= 1


def test_under_iid_any_two_images_meet_at_a_site_as_often_as_chance_has_it():
    """Of 12 images at 3 sites, two given ones are together with probability 3/11: 400 draws, four standard errors."""
    together = sum(
        site_of[0] == site_of[1]
        for site_of in (assign([{0: 1}] * 12, num_sites=3, strategy="iid", seed=seed) for seed in range(400))
    )
    expected = 3 / 11
    assert abs(together / 400 - expected) < 4 * (expected * (1 - expected) / 400) ** 0.5


@given(st.lists(st.integers(1, 9), min_size=5, max_size=30), st.integers(2, 5), st.integers(0, 99))
def test_sites_of_whole_groups_differ_by_no_more_than_the_largest_group(sizes, num_sites, seed):
    """The law of giving the largest first, each to who has least (Graham 1969)."""
    groups = [str(number) for number, size in enumerate(sizes) for _ in range(size)]
    site_of = assign([{0: 1}] * len(groups), groups=groups, num_sites=num_sites, strategy="by_group", seed=seed)
    filled = [site_of.count(site) for site in range(num_sites)]
    assert max(filled) - min(filled) <= max(sizes)


# How uneven


def drawn_masks(num_images: int, num_classes: int) -> Counts:
    """Pixels per class of drawn masks of 32x32: a background, and discs of the other classes, more or less crowded."""
    rng = np.random.default_rng(7)
    row, column = np.mgrid[:32, :32]
    counts = []
    for _ in range(num_images):
        mask = np.zeros((32, 32), np.int64)
        crowding = rng.dirichlet([0.4] * num_classes)[1:] * 12
        for value, number in enumerate(rng.poisson(crowding), start=1):
            for top, left, radius in zip(*rng.uniform((0, 0, 2), (32, 32, 6), (number, 3)).T, strict=True):
                mask[(row - top) ** 2 + (column - left) ** 2 < radius**2] = value
        counts.append({value: int(pixels) for value, pixels in enumerate(np.bincount(mask.ravel())) if pixels})
    return counts


def measured(counts: Counts, **options: Any) -> tuple[float, float, float]:
    """Return the unevenness of the class shares, and the smallest and largest site over the mean; means of 6 seeds."""
    parts = parts_of(counts, 3)
    facts = [MaskFacts(0, 0, count, 0, 0) for count in counts]
    found = []
    for seed in range(6):
        site_of = assign(counts, parts, seed=seed, **options)
        rows = rows_of_sites(site_of, facts, sorted({value for count in counts for value in count}), None)
        sizes = [row.num_images / len(counts) * len(rows) for row in rows]
        found.append((unevenness(rows), min(sizes), max(sizes)))
    return tuple(np.mean(found, axis=0))


@pytest.mark.parametrize("num_classes", [2, 4])
def test_a_small_alpha_makes_class_shares_and_sizes_uneven_and_a_large_one_even(num_classes):
    counts = drawn_masks(200, num_classes)
    iid, *iid_sizes = measured(counts, strategy="iid")
    even, *even_sizes = measured(counts, alpha=100)
    between, *_ = measured(counts, alpha=5)
    uneven, *uneven_sizes = measured(counts, alpha=0.1)
    assert iid < 0.04 and iid_sizes == pytest.approx([1, 1], abs=0.05)
    assert even < 0.03 and even_sizes == pytest.approx([1, 1], abs=0.2)
    assert uneven > 2 * between > 2 * even
    assert uneven > 5 * iid and uneven > 0.12
    assert uneven_sizes[0] < 0.3 and uneven_sizes[1] > 2


@pytest.mark.parametrize("num_classes", [2, 4])
def test_as_alpha_grows_every_site_becomes_the_same(num_classes):
    uneven, smallest, largest = measured(drawn_masks(200, num_classes), alpha=1e6)
    assert uneven < 0.01
    assert (smallest, largest) == pytest.approx((1, 1), abs=0.04)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_of_images_of_one_class_each_the_share_at_a_site_has_the_moments_of_dirichlet(alpha):
    """At one of two sites: mean 1/2 and variance 1 / (4 (2 alpha + 1)), over 150 seeds and 2 classes."""
    counts = [{index % 2: 5} for index in range(60)]
    shares = []
    for seed in range(150):
        site_of = assign(counts, num_sites=2, alpha=alpha, seed=seed)
        shares += [sum(site == 0 for site in site_of[value::2]) / 30 for value in range(2)]
    variance = 1 / (4 * (2 * alpha + 1))
    assert np.mean(shares) == pytest.approx(0.5, abs=4 * (variance / len(shares)) ** 0.5)
    assert np.var(shares) == pytest.approx(variance, rel=0.3)


def test_a_class_with_few_pixels_is_divided_as_unevenly_as_a_common_one():
    """Half of the images have a pixel of class 1 in a thousand: at alpha 0.1 one site of four has most of them."""
    counts = [{0: 999, 1: 1} if index % 2 else {0: 1000} for index in range(80)]
    most = [max(Counter(assign(counts, alpha=0.1, seed=seed)[1::2]).values()) for seed in range(20)]
    assert np.mean(most) > 0.6 * 40


@given(counts_of_images, st.integers(2, 100), st.integers(0, 99))
def test_the_size_of_an_image_is_of_no_account(counts, factor, seed):
    larger = [
        {value: pixels * (factor + index) for value, pixels in count.items()} for index, count in enumerate(counts)
    ]
    assert assign(larger, num_sites=3, seed=seed) == assign(counts, num_sites=3, seed=seed)


def test_the_distance_of_two_sites_without_a_common_class_is_a_half_and_of_equal_ones_none():
    def rows(*counts: dict[int, int]) -> float:
        facts = [MaskFacts(0, 0, count, 0, 0) for count in counts]
        return unevenness(rows_of_sites(range(len(counts)), facts, [0, 1], None))

    assert rows({0: 8}, {1: 8}) == 0.5
    assert rows({0: 1, 1: 3}, {0: 10, 1: 30}) == 0
    assert rows({0: 8}, {1: 8}, {}) == 0.5
    assert rows({}, {}) == 0


# From a configuration


def simulation(small_config: dict[str, Any], **federated: Any) -> Config:
    small_config["training"]["trainer_type"] = "federated"
    return Config.model_validate(small_config | {"federated": {"num_sites": 2} | federated})


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*.txt")
    }


@pytest.mark.parametrize("strategy", ["iid", "dirichlet"])
def test_the_sites_of_a_configuration_divide_its_fold(small_config, sample_dir, tmp_path, strategy):
    small_config["data"]["fold"] = 1
    folders = write_partition(simulation(small_config, partition=strategy), tmp_path / "sites")
    assert folders == [tmp_path / "sites" / "site_0", tmp_path / "sites" / "site_1"]
    for name in ("test", "fold_1_train", "fold_1_val"):
        parts = [list(read_split(folder, sample_dir, name)) for folder in folders]
        whole = list(read_split(sample_dir / "splits", sample_dir, name))
        assert set(parts[0]) | set(parts[1]) == set(whole)
        assert len(parts[0]) + len(parts[1]) == len(whole)
        assert parts[0] and parts[1]
    names = {f"{name}_{kind}.txt" for name in ("test", "fold_1_train", "fold_1_val") for kind in ("images", "masks")}
    assert {path.name for path in folders[0].iterdir() if not path.name.startswith(".")} == names


def test_the_same_configuration_again_touches_nothing_and_another_leaves_no_site_over(small_config, tmp_path):
    write_partition(simulation(small_config, num_sites=4), tmp_path)
    before = tree(tmp_path)
    write_partition(simulation(small_config, num_sites=4, seed=42), tmp_path)  # 42 is the seed of the run
    assert tree(tmp_path) == before
    write_partition(simulation(small_config, num_sites=4, seed=1), tmp_path)
    assert tree(tmp_path).keys() == before.keys() and tree(tmp_path) != before
    write_partition(simulation(small_config, num_sites=3), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site_0", "site_1", "site_2"]


def test_a_fold_without_test_images_has_sites_without(small_config, sample_dir, tmp_path):
    pairs = find_pairs(sample_dir / "images", sample_dir / "masks")
    write_splits(make_splits([{}] * 16, None, 2, 0, None, False, 1), pairs, sample_dir, tmp_path / "splits", False)
    small_config["data"]["splits_dir"] = str(tmp_path / "splits")
    for folder in write_partition(simulation(small_config), tmp_path / "sites"):
        assert (folder / "test_images.txt").read_text() == ""


def test_groups_of_the_split_stay_whole_and_go_with_their_images(small_config, sample_dir, tmp_path):
    pairs = find_pairs(sample_dir / "images", sample_dir / "masks")
    groups = [str(index % 8) for index in range(16)]
    drawn = make_splits([{}] * 16, groups, 2, 0.25, None, False, 1)
    write_splits(drawn, pairs, sample_dir, tmp_path / "splits", False)
    small_config["data"]["splits_dir"] = str(tmp_path / "splits")
    found = []
    for folder in write_partition(simulation(small_config, partition="by_group"), tmp_path / "sites"):
        own = [pair for name in ("test", "fold_0_train", "fold_0_val") for pair in read_split(folder, sample_dir, name)]
        assert len((folder / "groups.csv").read_text().splitlines()) == 1 + len(own)
        found.append(set(read_groups(folder, own)))
    assert found[0] | found[1] == set(groups) and not found[0] & found[1]


def test_mistakes_of_a_configuration_are_said(small_config, tmp_path):
    with pytest.raises(DataError, match=r"groups\.csv does not exist: run ml-split again with --groups"):
        write_partition(simulation(small_config, partition="by_group"), tmp_path)
    with pytest.raises(DataError, match="too few for 40 sites"):
        write_partition(simulation(small_config, num_sites=40), tmp_path)
    with pytest.raises(ConfigError, match=r"federated\.num_sites is not given"):
        write_partition(Config.model_validate(small_config | {"federated": {"sites": ["a", "b"]}}), tmp_path)
    small_config["data"] |= {"num_classes": 2, "class_names": ["a", "b"]}
    with pytest.raises(DataError, match="num_classes is 2"):
        write_partition(simulation(small_config, partition="dirichlet"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_ml_split_divides_among_sites_where_neither_torch_nor_flower_is_installed(sample_dir, tmp_path):
    words = [
        "--raw_data", str(sample_dir / "images"), "--mask_data", str(sample_dir / "masks"), "--output", str(tmp_path),
        "--folds", "2", "--federated", "--num_clients", "2", "--partition_strategy", "dirichlet",
    ]  # fmt: skip
    program = (
        "import sys; sys.modules |= {'torch': None, 'flwr': None}\n"
        f"from ml_src.cli.split import main; sys.exit(main({words!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site_1" / "fold_1_val_images.txt").is_file()
