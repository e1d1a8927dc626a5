"""The folder of --fix: where it may lie, what killed runs leave, and how --undo and other flags treat it."""

import io
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ml_src.cli import check
from ml_src.core.checking.inspection import Look, inspect_all
from ml_src.core.checking.layouts import find_files
from ml_src.core.checking.repair import fix, undo
from ml_src.core.errors import DataError

TWO = np.kron([[0, 1, 1], [1, 0, 0]], np.ones((4, 4), int)).astype(np.uint8)  # (8, 12), two classes


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data set of two pairs, a and b, whose masks hold 0 and 255."""
    folder = tmp_path / "data"
    for number, stem in enumerate("ab"):
        save(folder / "images" / f"{stem}.png", np.full((8, 12, 3), 50 * number, np.uint8))
        save(folder / "masks" / f"{stem}.png", TWO * 255)
    return folder


def looks_of(data: Path, mask_dir: Path | None = None) -> list[Look]:
    return inspect_all(find_files(data, mask_dir))


def fixed(data: Path) -> list[str]:
    return fix(looks_of(data), data, data / "masks_fixed").lines


def files(folder: Path) -> dict[str, bytes | None]:
    """The bytes of every file, and None for every folder, below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# Where it may lie


@pytest.mark.parametrize("inside", ["masks/fixed", "masks/deep/er", "images/fixed", "images/../masks/fixed"])
def test_a_folder_among_the_originals_is_refused_and_nothing_is_written(data, inside):
    before = files(data)
    with pytest.raises(DataError, match=r"lies in .*(masks|images), where the copies would be taken for originals"):
        fix(looks_of(data), data, data / inside)
    assert files(data) == before


def test_a_folder_among_originals_that_lie_elsewhere_is_refused(data):
    labels = data / "labels"
    (data / "masks").rename(labels)
    with pytest.raises(DataError, match="labels, where the copies would be taken"):
        fix(looks_of(data, labels), data, labels / "fixed", mask_dir=labels)
    assert fix(looks_of(data, labels), data, data / "masks", mask_dir=labels).refused == 0
    np.testing.assert_array_equal(np.asarray(Image.open(data / "masks/a.png")), TWO)


def test_a_link_into_the_originals_is_followed_and_refused(data, tmp_path):
    (data / "masks/fixed").mkdir()
    (tmp_path / "link").symlink_to(data / "masks/fixed")
    with pytest.raises(DataError, match="lies in"):
        fix(looks_of(data), data, tmp_path / "link")


# What earlier runs have left


def test_a_result_that_no_longer_belongs_to_the_masks_is_named_with_the_way_to_remove_it(data, capsys):
    fixed(data)
    for stem in "ab":
        save(data / f"masks/{stem}.png", 1 - TWO)  # mended by hand, with other labels
    before = files(data)
    assert fixed(data) == [
        "2 masks need no repair; nothing was written",
        f"{data / 'masks_fixed'} is of an earlier run: ml-check {data} --undo removes it",
    ]
    assert files(data) == before
    assert check.main([str(data), "--undo"]) == 0
    assert fixed(data) == ["2 masks need no repair; nothing was written"]


def test_an_earlier_result_is_named_too_where_a_question_is_open(data):
    fixed(data)
    save(data / "masks/a.png", np.dstack([TWO * 255, TWO * 0, TWO * 90]))
    lines = fixed(data)
    assert "which class is each?" in lines[0]
    assert lines[-1] == f"{data / 'masks_fixed'} is of an earlier run: ml-check {data} --undo removes it"


def killed(data: Path, num_renames: int) -> int:
    """Fix in a process of its own that is killed before it renames once more than so often; return its number."""
    looks = looks_of(data)
    child = os.fork()
    if child == 0:
        try:
            rename, done = Path.rename, []

            def counted(path: Path, target: Path) -> Path:
                if len(done) == num_renames:
                    os.kill(os.getpid(), signal.SIGKILL)
                done.append(target)
                return rename(path, target)

            Path.rename = counted
            fix(looks, data, data / "masks_fixed")
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    return child


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be killed")


@needs_fork
@pytest.mark.parametrize("num_renames", [0, 1, 2, 3])
def test_after_a_run_that_was_killed_at_any_step_the_next_leaves_what_an_undisturbed_one_would(data, num_renames):
    fixed(data)
    for name in ("notes.txt", "plan.txt"):
        (data / "masks_fixed" / name).write_text("mine")
    expected = files(data)
    child = killed(data, num_renames)
    assert (data / f"masks_fixed.{child}.tmp").exists() or (data / f"masks_fixed.{child}.old").exists()
    lines = fixed(data)
    assert files(data) == expected
    said = {1: f"{data / 'masks_fixed'} is back", 2: "after a run that was killed: notes.txt, plan.txt"}
    assert said.get(num_renames, "wrote" if num_renames == 0 else "after a run that was killed: ") in lines[0]


@needs_fork
def test_undo_finds_what_a_run_that_was_killed_had_set_aside(data):
    before = files(data)
    fixed(data)
    killed(data, 1)
    assert not (data / "masks_fixed").exists()
    assert len(undo(data / "masks_fixed")) == 2
    assert files(data) == before


@needs_fork
def test_a_file_of_the_user_that_has_no_place_to_go_back_to_is_kept_and_named(data):
    fixed(data)
    (data / "masks_fixed/notes.txt").write_text("mine")
    previous = data / f"masks_fixed.{killed(data, 2)}.old"
    (data / "masks_fixed/notes.txt").write_text("newer")
    for _ in range(2):
        sentence = f"{previous} holds notes.txt, left there by a run that was killed: move it elsewhere"
        assert fixed(data)[0] == sentence
    assert (previous / "notes.txt").read_text() == "mine"
    assert (data / "masks_fixed/notes.txt").read_text() == "newer"
    (previous / "notes.txt").unlink()
    fixed(data)
    assert not previous.exists()


def test_what_only_looks_like_a_leftover_stays(data):
    alive = data / f"masks_fixed.{os.getppid()}.tmp"  # of a process that runs
    foreign = data / "masks_fixed.123456789.old"  # of nobody, without a record
    other = data / "masks_fixed.mine.tmp"
    for folder in (alive, foreign, other):
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    before = files(data)
    fixed(data)
    undo(data / "masks_fixed")
    assert files(data) == before


def test_undo_follows_a_link_and_removes_what_was_written_through_it(data, tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    fix(looks_of(data), data, link)
    assert (tmp_path / "real/a.png").exists()
    assert undo(link) == [f"removed 2 masks and fixes.json from {tmp_path / 'real'}"]
    assert not (tmp_path / "real").exists()


# What is said


def test_where_all_masks_are_refused_nothing_is_said_to_be_fine(data):
    for stem in "ab":
        save(data / f"masks/{stem}.png", TWO[:4])
    outcome = fix(looks_of(data), data, data / "masks_fixed")
    assert outcome.refused == 2
    assert outcome.lines[-1] == "none of the masks could be mended; nothing was written"


def test_a_new_name_is_said_whatever_else_was_done(data):
    for stem in "ab":
        (data / f"masks/{stem}.png").rename(data / f"masks/{stem}_mask.png")
    lines = fixed(data)
    assert "  2 masks: values 0, 255 became 0, 1" in lines and "  2 masks: named as its image" in lines


def test_a_name_too_long_for_a_copy_refuses_its_mask_with_advice(data):
    stem = "x" * 250
    for name in ("images", "masks"):
        (data / name / "a.png").rename(data / name / f"{stem}.png")
    outcome = fix(looks_of(data), data, data / "masks_fixed")
    assert outcome.refused == 1
    assert outcome.lines[-1].startswith(f"  {data / 'masks' / stem}.png cannot be written under the name of its image")
    assert outcome.lines[-1].endswith("which is too long: give both a shorter name")
    assert (data / "masks_fixed/b.png").exists()


def test_a_name_that_is_no_text_is_spelled_out_on_a_strict_output(data, monkeypatch):
    for name in ("images", "masks"):
        try:
            (data / name / "a.png").rename(data / name / os.fsdecode(b"caf\xe9.png"))
        except OSError:
            pytest.skip("the file system takes only UTF-8")
    save(data / "masks" / os.fsdecode(b"caf\xe9.png"), TWO[:4] * 255)  # refused, and so named
    output = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", output)
    assert check.main([str(data), "--fix"]) == 1
    output.flush()
    text = output.buffer.getvalue().decode()
    headline, repaired = text.split("\n", 1)[0], text.rpartition("refused and left out:")[2]
    assert headline.startswith("error: ") and r"caf\udce9.png" in repaired


# Wrong use


@pytest.mark.parametrize(
    ("flags", "both"),
    [
        (["--fix", "--undo"], "--fix and --undo"),
        (["--undo", "--preview", "c.yaml"], "--undo and --preview"),
        (["--fix", "--preview", "c.yaml"], "--fix and --preview"),
    ],
)
def test_flags_that_contradict_each_other_do_nothing(data, flags, both, capsys):
    fixed(data)
    before = files(data)
    assert check.main([str(data), *flags]) == 2
    assert capsys.readouterr().err == f"error: {both} do not go together: give one of them\n"
    assert files(data) == before


@pytest.mark.parametrize("flags", [[], ["--fix"], ["--undo"], ["--preview", "c.yaml"]])
def test_a_file_in_the_place_of_the_data_is_one_sentence(data, flags, capsys):
    path = data / "images/a.png"
    assert check.main([str(path), *flags]) == 2
    assert capsys.readouterr().err == f"error: {path} is a file: give the folder that holds images/ and masks/\n"
