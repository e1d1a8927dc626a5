"""From the words after --input to images and the names of their outputs."""

import os
from glob import glob
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml_src.core.data.files import is_image_name
from ml_src.core.errors import DataError
from ml_src.core.inference.inputs import Input, find_inputs


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names_of(*words: Any, recursive: bool = False, output_dir: Path | None = None) -> list[str]:
    return [str(found.name) for found in find_inputs([str(word) for word in words], recursive, output_dir)]


def refusal(*words: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        names_of(*words, **options)
    return str(caught.value)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_gives_its_image_files_sorted_by_name_without_their_endings(here: Path) -> None:
    touch(
        here / "data", "b.PNG", "a.tif", "scene.v1.tif", ".hidden.png", "notes.txt", "deeper/c.png", "folder.png/d.png"
    )
    assert find_inputs(["data"], False, None) == [
        Input(PurePosixPath("a"), Path("data/a.tif")),
        Input(PurePosixPath("b"), Path("data/b.PNG")),
        Input(PurePosixPath("scene.v1"), Path("data/scene.v1.tif")),
    ]


def test_recursion_keeps_the_sub_folders_and_passes_over_hidden_ones_and_links(here: Path) -> None:
    touch(here / "data", "a.png", "one/a.png", "one/two/a.png", ".cache/a.png", "one/.thumbs/b.png")
    touch(here / "elsewhere", "z.png")
    (here / "data/linked").symlink_to(here / "elsewhere")
    (here / "data/one/loop").symlink_to(here / "data")
    assert names_of("data", recursive=True) == ["a", "one/a", "one/two/a"]


def test_a_folder_that_is_itself_a_link_is_followed(here: Path) -> None:
    touch(here / "elsewhere", "z.png")
    (here / "data").symlink_to(here / "elsewhere")
    assert names_of("data") == ["z"]


def test_a_link_to_a_file_that_has_gone_is_left_to_the_reader_to_name(here: Path) -> None:
    touch(here / "data", "a.png")
    (here / "data/gone.png").symlink_to(here / "nowhere.png")
    (here / "data/itself.png").symlink_to(here / "data/itself.png")
    assert names_of("data") == ["a", "gone", "itself"]


def test_the_output_folder_is_passed_over_however_it_is_written(here: Path) -> None:
    touch(here / "data", "a.png", "out/masks/a.png", "other/b.png")
    for output_dir in (Path("data/out"), here / "data/out", Path("data/other/../out")):
        assert names_of("data", recursive=True, output_dir=output_dir) == ["a", "other/b"]
        assert names_of("data/**/*.png", output_dir=output_dir) == ["a", "other/b"]
        assert names_of("data/*/*.png", output_dir=output_dir) == ["other/b"]


def test_recursion_through_the_output_folder_itself_is_refused(here: Path) -> None:
    touch(here / "data", "a.png", "masks/a.png")
    for options in ({"recursive": True}, {}):
        word = "data" if options else "data/**"
        assert refusal(word, output_dir=here / "data", **options) == (
            "data is also the output folder, whose masks would be read: give another --output"
        )
    assert names_of("data", output_dir=here / "data") == ["a"]


def test_a_file_is_taken_whatever_its_ending_and_named_by_its_stem(here: Path) -> None:
    touch(here, "deep/scan.dat", "deep/plain", "deep/scene.v1.tif")
    assert names_of("deep/scan.dat", "deep/plain", "deep/scene.v1.tif") == ["plain", "scan", "scene.v1"]


def test_a_file_that_is_named_twice_counts_once_by_the_first_name(here: Path) -> None:
    touch(here / "data", "sub/a.png", "sub/b.png")
    (here / "link").symlink_to(here / "data")
    words = ["data/sub/a.png", "./data/sub/a.png", here / "data/sub", "data/**/*.png", "link/sub"]
    assert names_of(*words, recursive=True) == ["a", "b"]
    assert names_of("data", "data/sub/a.png", recursive=True) == ["sub/a", "sub/b"]


def test_a_glob_names_from_its_first_wildcard_on(here: Path) -> None:
    touch(here / "data", "site_1/x.png", "site_2/x.png", "site_2/deep/x.png", "other/x.png", "site_1/x.txt")
    assert names_of("data/site_*/x.*") == ["site_1/x", "site_2/x"]
    assert names_of(here / "data/site_[2]/*.png") == ["site_2/x"]
    assert names_of("*/site_2/**") == ["data/site_2/deep/x", "data/site_2/x"]


def test_a_glob_follows_links_that_it_matches_but_not_those_below_two_stars(here: Path) -> None:
    touch(here / "elsewhere", "z.png")
    touch(here / "data", "real/a.png")
    (here / "data/linked").symlink_to(here / "elsewhere")
    assert names_of("data/*/*.png") == ["linked/z", "real/a"]
    assert names_of("data/**/*.png") == ["real/a"]


def test_files_and_folders_with_brackets_in_their_names_are_no_globs(here: Path) -> None:
    touch(here, "scan [2]/img[1].png", "scan [2]/img[2].png", "scan 2/b.png")
    assert names_of("scan [2]") == ["img[1]", "img[2]"]
    assert names_of("scan [2]/img[1].png") == ["img[1]"]
    assert names_of("scan [2]/*.png") == ["img[1]", "img[2]"]
    assert names_of("scan [[]2]/*.png") == ["scan [2]/img[1]", "scan [2]/img[2]"]


def test_a_quoted_tilde_is_the_home_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    touch(here / "data", "a.png")
    assert find_inputs(["~/data/*.png"], False, None) == [Input(PurePosixPath("a"), here / "data/a.png")]


def test_a_name_that_is_no_utf_8_is_kept(here: Path) -> None:
    name = b"caf\xe9".decode(errors="surrogateescape")
    touch(here / "data", f"{name}.png")
    assert names_of("data") == [name]


PARTS = st.sampled_from(["a", "b", "ab", ".h"])
FILES = st.sets(st.builds("/".join, st.lists(PARTS, max_size=3).map(lambda parts: [*parts, "a.png"])), min_size=1)
PATTERNS = st.lists(st.sampled_from(["*", "**", "a", "a*", "?", "[!a]", ".h", ".*"]), min_size=1, max_size=4)


@given(files=FILES, parts=PATTERNS, last=st.sampled_from(["*", "*.png", "a.*", "**", "?.png"]))
def test_a_glob_finds_what_pythons_own_finds(
    tmp_path_factory: pytest.TempPathFactory, files: set[str], parts: list[str], last: str
) -> None:
    """But for hidden folders, into which `.*` and `.h` lead here as there, and `**` nowhere."""
    folder = tmp_path_factory.mktemp("tree")
    touch(folder, *files, "always/z.png")
    pattern = "/".join([*parts, last])
    matches = [Path(path) for path in glob(pattern, root_dir=folder, recursive=True)]  # noqa: PTH207
    expected = {path for path in matches if is_image_name(path.name) and (folder / path).is_file()}
    if not expected:
        refusal(folder / pattern)
        return
    literal = 0
    while literal < len(parts) and (folder / Path(*parts[: literal + 1])).exists():
        literal += 1
    base = folder / Path(*parts[:literal])
    found = find_inputs([str(folder / pattern)], False, None)
    assert {entry.path for entry in found} == {folder / path for path in expected}
    assert all(base / f"{entry.name}.png" == entry.path for entry in found)


def test_inputs_of_one_name_are_refused_and_both_are_named(here: Path) -> None:
    touch(here / "data", "a.png", "a.jpg", "b.png", "b.tif")
    touch(here / "more", "a.png")
    sentence = refusal("data")
    assert "data/a.png" in sentence and "data/a.jpg" in sentence
    assert sentence.endswith("would have outputs of the same name (1 more such pairs): rename one of them")
    assert refusal("data/a.png", "more") == (
        "data/a.png and more/a.png would have outputs of the same name: give the folder that holds both with "
        "--recursive, or predict them into different --output folders"
    )


def test_a_word_that_is_not_there_is_refused_with_the_nearest_name(here: Path) -> None:
    touch(here / "data/images", "img_0001.png")
    assert refusal("data/images/img_0001.pgn") == (
        "data/images/img_0001.pgn does not exist: did you mean data/images/img_0001.png?"
    )
    assert refusal("data/Image/img_0001.png") == "data/Image does not exist: did you mean data/images?"
    assert refusal("dat/images/*.png") == "dat does not exist: did you mean data?"
    assert refusal("elsewhere") == "elsewhere does not exist: give a file, a folder or a quoted glob"
    assert refusal("data/images/img_0001.png/*.png") == (
        "data/images/img_0001.png is neither a file nor a folder, or a link to what is gone: "
        "give a file, a folder or a glob"
    )
    assert refusal("") == "--input has an empty word: give a file, a folder or a quoted glob"


def test_a_word_without_images_is_refused_even_beside_one_with_some(here: Path) -> None:
    touch(here / "data", "a.png")
    touch(here / "text", "a.txt", "deeper/b.txt")
    touch(here / "above", "deep/er/a.png")
    endings = ".png, .jpg, .jpeg, .tif, .tiff, .bmp, .webp"
    assert refusal("data", "text") == f"text holds no image files ({endings}): give a folder that does"
    assert refusal("above") == f"above holds no image files ({endings}), but its sub-folders do: add --recursive"
    assert refusal("text", recursive=True) == (
        f"text and its sub-folders hold no image files ({endings}): give a folder that does"
    )
    assert refusal("text/*") == f"text/* matches no image files ({endings}): give a glob of files, such as text/*.png"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is forbidden to this user")
def test_a_folder_that_may_not_be_read_is_named(here: Path) -> None:
    touch(here / "data", "a.png", "closed/b.png")
    (here / "data/closed").chmod(0)
    assert "data/closed cannot be read (Permission denied)" in refusal("data", recursive=True)
    (here / "data/closed").chmod(0o700)
