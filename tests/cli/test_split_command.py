"""ml-split as a user meets it: the files it writes, what it prints, and that a mistake writes nothing."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ml_src.cli.split import main
from ml_src.core.data.checks import scan
from ml_src.core.data.files import Pair
from ml_src.core.data.split_files import cache_path, read_split


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """20 pairs of 4x6 pixels: 0 everywhere, 1 in all, 2 in the six images of patients 0 to 2 that end in 0 or 1."""
    folder = tmp_path / "my data"
    for index in range(20):
        mask = np.zeros((4, 6), np.uint8)
        mask[1] = 1
        if index % 10 < 2 or index in (5, 15):
            mask[2, :3] = 2
        save(folder / "images" / f"p{index // 4}_é {index:02}.JPG", np.full((4, 6, 3), index, np.uint8))
        save(folder / "masks" / f"p{index // 4}_é {index:02}.PNG", mask)
    return folder


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def split(data_dir: Path, *words: str) -> int:
    return main(["--raw_data", str(data_dir / "images"), "--mask_data", str(data_dir / "masks"), *words])


def measured(data_dir: Path, num_folds: int) -> list[list[Pair]]:
    return [read_split(data_dir / "splits", data_dir, name) for name in names_of(num_folds)]


def names_of(num_folds: int) -> list[str]:
    return ["test", *(f"fold_{fold}_val" for fold in range(num_folds))]


def tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_guides_command_writes_the_guides_files(data_dir, capsys):
    assert split(data_dir, "--folds", "5", "--task", "segmentation") == 0
    written = {path.name for path in (data_dir / "splits").iterdir() if not path.name.startswith(".")}
    assert written == {
        f"{name}_{kind}.txt"
        for kind in ("images", "masks")
        for name in ["test", *(f"fold_{fold}_{part}" for fold in range(5) for part in ("train", "val"))]
    }
    pairs = [pair for part in measured(data_dir, 5) for pair in part]
    assert sorted(pair.image.name for pair in pairs) == sorted(path.name for path in (data_dir / "images").iterdir())
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"next: ml-init-config '{data_dir}' --task segmentation"


def test_the_table_shows_images_groups_and_the_share_of_each_named_class(data_dir, capsys):
    (data_dir / "classes.txt").write_bytes("\ufeffback ground\r\n[cell]\r\nnever\r\n".encode())
    for path in (data_dir / "masks").iterdir():
        mask = np.array(Image.open(path))
        mask[mask == 2] = 255
        save(path, mask)
    assert split(data_dir, "--folds", "2", "--test_split", "0.2", "--group-regex", "^p[0-9]") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split("  ")[-6:] == ["images", "groups", "back ground %", "[cell] %", "never %", "255 (ignored) %"]
    assert [line.split("  ")[0].strip() for line in out[1:6]] == [
        "test", "fold 0 train", "fold 0 val", "fold 1 train", "fold 1 val"
    ]  # fmt: skip
    test = out[1].split()
    assert test[:3] == ["test", "4", "1"]
    ignored = float(test[-1]) / 100
    assert float(test[4]) == pytest.approx(100 * 0.25 / (1 - ignored), abs=0.01)
    assert float(test[3]) + float(test[4]) == pytest.approx(100, abs=0.02)
    assert test[5] == "0"
    assert any(line.startswith("warning: no pixel of never in any test or val part") for line in out)


def test_running_twice_changes_nothing_and_says_so(data_dir, capsys):
    assert split(data_dir) == 0
    before = tree(data_dir)
    assert split(data_dir) == 0
    assert tree(data_dir) == before
    assert "(unchanged)" in capsys.readouterr().out


def test_another_split_needs_force(data_dir, capsys):
    assert split(data_dir, "--folds", "5") == 0
    before = tree(data_dir)
    assert split(data_dir, "--folds", "3") == 2
    assert "give --force to replace it" in capsys.readouterr().err
    assert tree(data_dir) == before
    assert split(data_dir, "--folds", "3", "--force") == 0
    assert not (data_dir / "splits" / "fold_3_val_images.txt").exists()


def test_stratified_puts_a_rare_class_into_test_and_every_fold(data_dir, capsys):
    assert split(data_dir, "--folds", "5", "--stratified") == 0
    for part in measured(data_dir, 5):
        assert any(2 in np.array(Image.open(pair.mask)) for pair in part)
    assert "warning" not in capsys.readouterr().out


def test_a_class_that_a_part_lacks_is_a_warning(data_dir, capsys):
    for path in sorted((data_dir / "masks").iterdir())[2:]:
        save(path, np.zeros((4, 6), np.uint8))
    assert split(data_dir, "--folds", "5", "--stratified") == 0
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert "of 2 in " in warning
    assert "(too few images have it)" in warning


def test_groups_from_a_file_stay_together(data_dir, tmp_path):
    stems = sorted(path.stem for path in (data_dir / "images").iterdir())
    groups = {stem: f"g{index % 6}" for index, stem in enumerate(stems)}
    (tmp_path / "groups.csv").write_text("image,group\n" + "".join(f"{stem},{g}\n" for stem, g in groups.items()))
    assert split(data_dir, "--folds", "3", "--groups", str(tmp_path / "groups.csv")) == 0
    parts = [{groups[pair.image.stem] for pair in part} for part in measured(data_dir, 3)]
    assert sum(map(len, parts)) == 6


def test_output_and_val_split_and_no_test_images(data_dir, tmp_path, capsys):
    words = ["--folds", "1", "--val-split=0.25", "--test_split", "0", "--output", str(tmp_path / "a" / "b")]
    assert split(data_dir, *words) == 0
    assert len(read_split(tmp_path / "a" / "b", data_dir, "fold_0_val")) == 5
    assert (tmp_path / "a" / "b" / "test_images.txt").read_text() == ""
    assert not (data_dir / "splits").exists()


def test_the_masks_are_not_read_again_by_the_next_command(data_dir):
    """The facts are left beside the splits, for the same files under the same paths."""
    assert split(data_dir) == 0
    pairs = read_split(data_dir / "splits", data_dir, "test")
    before = pairs[0].mask.stat()
    pairs[0].mask.write_bytes(b"x" * before.st_size)
    os.utime(pairs[0].mask, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert scan(pairs, cache_path(data_dir / "splits"))[0].problem is None


def test_it_can_be_started_inside_the_image_folder(data_dir, monkeypatch):
    monkeypatch.chdir(data_dir / "images")
    assert main(["--raw_data", ".", "--mask_data", "../masks"]) == 0
    assert (data_dir / "splits" / "test_images.txt").read_text().startswith("images/p")


@pytest.mark.parametrize(
    ("name", "pixels", "message"),
    [
        ("masks/lonely.png", np.zeros((4, 6), np.uint8), "1 mask has no image of the same stem: lonely.png"),
        ("images/lonely.png", np.zeros((4, 6), np.uint8), "1 image has no mask of the same stem: lonely.png"),
        ("images/p0_é 00.png", np.zeros((4, 6), np.uint8), "more than one file of the stem 'p0_é 00'"),
        ("masks/p0_é 00.PNG", np.zeros((4, 6, 3), np.uint8), "masks/p0_é 00.PNG has 3 channels"),
        ("masks/p0_é 00.PNG", np.zeros((4, 5), np.uint8), "masks/p0_é 00.PNG is 5x4 pixels"),
    ],
)
def test_a_mistake_in_the_data_is_one_line_and_nothing_is_written(data_dir, capsys, name, pixels, message):
    save(data_dir / name, pixels)
    before = tree(data_dir)
    assert split(data_dir) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert tree(data_dir) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "segmentatoin"], "unknown task 'segmentatoin'; did you mean 'segmentation'?"),
        (["--folds", "1"], "--folds is 1"),
        (["--folds", "20"], "20 images are too few for 20 folds and a test split"),
        (["--folds", "five"], "--folds: invalid int value: 'five'"),
        (["--test_split", "1"], "--test_split is 1.0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--groups", "none.csv"], "none.csv cannot be read"),
        (["--group_regex", "x9"], "finds no group in the stems of 20 of 20 images"),
        (["--groups", "none.csv", "--group_regex", "x"], "not allowed with argument"),
        (["--stratifed"], "unknown argument '--stratifed'; did you mean '--stratified'?"),
    ],
)
def test_a_mistake_in_a_flag_is_one_line_and_nothing_is_written(data_dir, capsys, words, message):
    before = tree(data_dir)
    assert split(data_dir, *words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert tree(data_dir) == before


def test_the_folders_are_required(capsys):
    assert main([]) == 2
    assert "--raw_data, --mask_data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        ((0, 255), None, "the masks have the values 0 and 255 only, but class 1 has the value 1"),
        ((10, 30), None, "the masks have values [10, 30], but classes are counted 0, 1, 2, ..."),
        ((0, 5), "a\nb\n", "the masks have values [5] but classes.txt names 2 classes"),
    ],
)
def test_values_that_are_no_class_indices_are_a_warning_with_the_tool_that_mends_them(
    data_dir, capsys, values, names, message
):
    for path in (data_dir / "masks").iterdir():
        save(path, np.tile(np.array(values, np.uint8), (4, 3)))
    if names:
        (data_dir / "classes.txt").write_text(names)
    assert split(data_dir) == 0
    assert f"warning: {message}: run ml-check DATA --fix" in capsys.readouterr().out
