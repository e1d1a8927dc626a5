"""ml-split --federated as a user meets it: the folders of the sites, what is printed, and what a mistake leaves."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ml_src.cli.split import main
from ml_src.core.data.checks import scan
from ml_src.core.data.split_files import cache_path, read_split
from ml_src.core.federated_specs import FederatedConfig

FOUR = ("--federated", "--num_clients", "4")
PARTS = [
    f"{name}_{kind}.txt"
    for name in ("test", *(f"fold_{fold}_{part}" for fold in range(3) for part in ("train", "val")))
    for kind in ("images", "masks")
]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """48 pairs of 4x6 pixels of 24 patients; the later an image, the more pixels of class 1."""
    folder = tmp_path / "my data"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for index in range(48):
        mask = np.zeros((4, 6), np.uint8)
        mask.flat[: index // 2] = 1
        Image.fromarray(mask).save(folder / "masks" / f"p{index // 2:02}_{index:02}.png")
        Image.fromarray(mask * 9).save(folder / "images" / f"p{index // 2:02}_{index:02}.png")
    return folder


def split(data_dir: Path, *words: str) -> int:
    folders = ["--raw_data", str(data_dir / "images"), "--mask_data", str(data_dir / "masks")]
    return main([*folders, "--folds", "3", *words])


def tree(folder: Path) -> dict[str, bytes]:
    """The files that a user sees."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }


@pytest.mark.parametrize("words", [(), ("--partition_strategy", "dirichlet", "--alpha", "0.1")])
def test_the_index_files_of_the_sites_together_are_those_of_the_whole(data_dir, words):
    assert split(data_dir, *FOUR, *words) == 0
    files = tree(data_dir / "splits")
    sites = [f"site_{site}" for site in range(4)]
    assert files.keys() == {*PARTS, *(f"{site}/{name}" for site in sites for name in PARTS)}
    for name in PARTS:
        lines = [line for site in sites for line in files[f"{site}/{name}"].splitlines()]
        assert Counter(lines) == Counter(files[name].splitlines())
        assert all(files[f"{site}/{name}"] for site in sites)
    homes = [{line for name in PARTS for line in files[f"{site}/{name}"].splitlines()} for site in sites]
    assert sum(map(len, homes)) == len(set().union(*homes)) == 96


def test_the_files_of_a_site_are_read_like_those_of_any_split_and_its_masks_not_again(data_dir):
    """The facts are left beside the index files of each site, for the same files under the same paths."""
    assert split(data_dir, *FOUR) == 0
    folder = data_dir / "splits" / "site_2"
    pairs = [pair for name in ("test", "fold_1_train", "fold_1_val") for pair in read_split(folder, data_dir, name)]
    assert len(pairs) == 12
    assert all(pair.image.stem == pair.mask.stem for pair in pairs)
    before = pairs[0].mask.stat()
    pairs[0].mask.write_bytes(b"x" * before.st_size)
    os.utime(pairs[0].mask, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert scan(pairs[:1], cache_path(folder))[0].problem is None


def test_the_split_itself_is_the_same_with_and_without_sites(data_dir, tmp_path):
    assert split(data_dir, "--output", str(tmp_path / "plain")) == 0
    assert split(data_dir, "--output", str(tmp_path / "sites"), *FOUR) == 0
    plain, divided = tree(tmp_path / "plain"), tree(tmp_path / "sites")
    assert plain == {name: text for name, text in divided.items() if "/" not in name}


def test_the_table_has_a_line_a_site_and_the_last_lines_are_the_section_of_the_configuration(data_dir, capsys):
    assert split(data_dir, *FOUR, "--partition-strategy", "dirichlet", "--alpha", "0.1") == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith("site ")]
    assert [row[:2] for row in rows] == [["site", str(site)] for site in range(4)]
    assert sum(int(row[2]) for row in rows) == 48
    assert all(float(row[3]) + float(row[4]) == pytest.approx(100, abs=0.02) for row in rows)
    assert "% of a site's pixels would have to change their class" in out
    section = yaml.safe_load(out[out.index("federated:\n") :])["federated"]
    assert FederatedConfig.model_validate(section).sites == section["sites"]
    assert section["sites"] == [(data_dir / "splits" / f"site_{site}").as_posix() for site in range(4)]
    assert all(Path(folder, "fold_0_val_images.txt").is_file() for folder in section["sites"])


def test_whole_patients_are_at_one_site(data_dir, capsys):
    assert split(data_dir, *FOUR, "--partition_strategy", "group", "--group_regex", "^p[0-9]+") == 0
    patients = []
    for site in range(4):
        table = (data_dir / "splits" / f"site_{site}" / "groups.csv").read_text().splitlines()
        assert table[0] == "image,group"
        patients.append({line.split(",")[1] for line in table[1:]})
        assert len(table) - 1 == 2 * len(patients[-1])
    assert sum(map(len, patients)) == len(set().union(*patients)) == 24
    assert "groups" in capsys.readouterr().out


def test_running_twice_changes_nothing_and_another_seed_needs_force(data_dir, capsys):
    assert split(data_dir, *FOUR) == 0
    before = {path: path.stat().st_mtime_ns for path in (data_dir / "splits").rglob("*.txt")}
    assert split(data_dir, *FOUR) == 0
    assert "(unchanged)" in capsys.readouterr().out
    assert split(data_dir, *FOUR, "--partition_strategy", "dirichlet") == 2
    assert "holds another split: give --force" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (data_dir / "splits").rglob("*.txt")} == before


def test_sites_can_be_added_to_a_split_that_is_there(data_dir):
    assert split(data_dir) == 0
    plain = tree(data_dir / "splits")
    assert split(data_dir, *FOUR) == 0
    assert plain.items() < tree(data_dir / "splits").items()


def test_of_more_sites_than_now_nothing_is_left_over(data_dir):
    assert split(data_dir, *FOUR) == 0
    (data_dir / "splits" / "site_3" / "notes.md").write_text("mine")
    (data_dir / "splits" / "site_2" / ".statistics.json").write_text("{}")
    assert split(data_dir, "--federated", "--num_clients", "2", "--force") == 0
    files = tree(data_dir / "splits")
    assert files.keys() == {
        *PARTS,
        *(f"site_{site}/{name}" for site in range(2) for name in PARTS),
        "site_3/notes.md",
    }
    assert not (data_dir / "splits" / "site_2").exists()


def test_sites_stay_with_the_split_that_they_divide_and_leave_with_it(data_dir, capsys):
    assert split(data_dir, *FOUR) == 0
    before = tree(data_dir / "splits")
    assert split(data_dir) == 0
    assert "(unchanged)" in capsys.readouterr().out
    assert tree(data_dir / "splits") == before
    assert split(data_dir, "--seed", "1", "--force") == 0
    assert tree(data_dir / "splits").keys() == set(PARTS)


def test_a_failure_halfway_leaves_the_old_files_and_no_new_folder(data_dir, capsys):
    """A folder stands where a file of the last site should go."""
    assert split(data_dir, "--federated", "--num_clients", "2") == 0
    obstacle = data_dir / "splits" / "site_3" / "fold_2_val_masks.txt"
    (obstacle / "in the way").mkdir(parents=True)
    before = tree(data_dir)
    assert split(data_dir, *FOUR, "--force") == 2
    assert "splits cannot be written" in capsys.readouterr().err
    assert tree(data_dir) == before
    assert sorted(path.name for path in (data_dir / "splits").iterdir() if path.is_dir()) == [
        "site_0",
        "site_1",
        "site_3",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_clients", "4"], "--federated is missing, and --num_clients would do nothing without"),
        (["--partition_strategy", "iid", "--alpha", "1"], "--partition_strategy and --alpha would do nothing"),
        (["--federated"], "--federated needs the number of sites: give --num_clients"),
        (["--federated", "--num_clients", "0"], "--num_clients is 0: give 1 or more"),
        (["--federated", "--num_clients", "49"], "48 images are too few for 49 sites: give fewer sites"),
        (["--federated", "--num_clients", "20"], "_val has 1"),
        ([*FOUR, "--partition_strategy", "group"], "group keeps groups whole: give --groups or --group_regex"),
        ([*FOUR, "--partition_strategy", "by_class"], "argument --partition_strategy: invalid choice: 'by_class'"),
        ([*FOUR, "--alpha", "0.5"], "--alpha belongs to --partition_strategy dirichlet"),
        ([*FOUR, "--partition_strategy", "dirichlet", "--alpha", "0"], "--alpha is 0.0: give a number above 0"),
        ([*FOUR, "--partition_strategy", "dirichlet", "--alpha", "nan"], "--alpha is nan: give a number above 0"),
        ([*FOUR, "--partition_strategy", "group", "--group_regex", "[0-9]_"], "fold_0_val has 2 groups, and site_0"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_flag_is_one_line_and_nothing_is_written(data_dir, capsys, words, message):
    before = tree(data_dir)
    assert split(data_dir, *words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""
    assert tree(data_dir) == before


def test_one_site_has_all(data_dir):
    assert split(data_dir, "--federated", "--num_clients", "1") == 0
    files = tree(data_dir / "splits")
    assert all(files[f"site_0/{name}"] == files[name] for name in PARTS)
