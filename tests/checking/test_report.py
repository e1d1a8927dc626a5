"""The report of a data check: nothing is lost, nothing runs, the worst stands first."""

import base64
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.text import Text

from ml_src.core.checking import page as page_module
from ml_src.core.checking.grouping import groups_of, worst_files
from ml_src.core.checking.inspection import Look, look
from ml_src.core.checking.kinds import KINDS, SEVERITIES, Finding
from ml_src.core.checking.page import html_page
from ml_src.core.checking.report import print_report, report_data, write_report
from ml_src.core.errors import ConfigError
from ml_src.core.pictures import overlay, palette

VOID = {"meta", "img", "br", "link", "input", "hr"}
DATA = Path("data")


def finding(kind: str, severity: str, name: str | None, message: str = "", fix: str | None = None) -> Finding:
    path = None if name is None else DATA / name
    return Finding(kind, severity, path, message or f"{path} is odd: look at it", fix)


STRETCHED = [finding("stretched_mask", "error", f"masks/{i}.png", fix="ml-check DATA --fix") for i in range(3)]
MIXED = [
    finding("rare_class", "warning", None, "fibre is in 2 images only: collect more"),
    finding("palette_mask", "note", "masks/9.png"),
    *STRETCHED,
    finding("damaged_file", "error", "images/0.png", "data/images/0.png cannot be read: replace it"),
    finding("wrong_extension", "warning", "masks/1.png", "data/masks/1.png is a JPEG: rename it to 1.jpg"),
]
some_findings = st.lists(
    st.builds(finding, st.sampled_from(KINDS), st.sampled_from(SEVERITIES), st.sampled_from([None, *"abcde"])),
    max_size=30,
)


# The order


@given(some_findings)
def test_no_file_stands_below_one_with_fewer_errors_or_as_many_and_fewer_warnings(findings):
    worst = worst_files(findings)
    numbers = [[sum(one.severity == severity for one in found) for severity in SEVERITIES] for _, found in worst]
    assert numbers == sorted(numbers, reverse=True)
    assert Counter(one for _, found in worst for one in found) == Counter(one for one in findings if one.path)


@given(some_findings)
def test_groups_hold_every_finding_once_and_errors_stand_first(findings):
    groups = groups_of(findings)
    assert Counter(one for group in groups for one in group.findings) == Counter(findings)
    assert [group.severity for group in groups] == sorted((group.severity for group in groups), key=SEVERITIES.index)
    for group in groups:
        assert {(one.kind, one.severity) for one in group.findings} == {(group.kind, group.severity)}
        assert group.num_files == len({one.path for one in group.findings} - {None})


def test_remedies_that_differ_from_file_to_file_are_called_examples():
    renames = [finding("wrong_extension", "warning", name, fix=f"rename {name}") for name in ("a.png", "b.png")]
    assert groups_of(renames)[0].remedy == "for each file its own, such as: rename a.png"
    assert groups_of(STRETCHED)[0].remedy == "ml-check DATA --fix"


# The terminal


def test_a_pipe_gets_every_sentence_whole_on_one_line(capsys):
    long = f"{DATA}/{'deep/' * 100}a.png has [0, 255] in [red]brackets[/red] {'and more ' * 40}: mend it"
    print_report([finding("damaged_file", "error", "deep/a.png", long), *MIXED], 20)
    lines = capsys.readouterr().out.splitlines()
    assert any(long in line for line in lines)
    assert any(re.fullmatch(r"error +3 +stretched mask +ml-check DATA --fix", line.strip()) for line in lines)
    assert lines[-1] == "20 pairs: 5 errors, 2 warnings, 1 note"


@pytest.mark.parametrize("width", [30, 60, 120])
def test_a_terminal_of_any_width_shows_all_words_within_its_width(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    print_report(MIXED, 20)
    lines = [Text.from_ansi(line).plain for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= width
    words = set(" ".join(lines).split())
    for said in ("stretched mask ml-check DATA --fix", "cannot be read: replace it", "rename it to 1.jpg"):
        assert set(said.split()) <= words


def test_only_the_ten_worst_files_are_named(capsys):
    findings = [finding("damaged_file", "error", f"images/{i:02d}.png") for i in range(30)]
    findings += [finding("wrong_extension", "warning", "images/17.png")]
    print_report(findings, 30)
    out = capsys.readouterr().out
    assert out.count("is odd") == 10
    assert "the worst 10 of 30 files:\n- data/images/17.png is odd: look at it (and 1 warning)\n" in out


def test_files_with_notes_alone_are_not_called_bad(capsys):
    print_report([finding("palette_mask", "note", "masks/9.png", "data/masks/9.png has a palette: fine")], 1)
    out = capsys.readouterr().out
    assert "palette mask" in out and "worst" not in out
    assert out.endswith("1 pair: 1 note\n")


def test_a_clean_data_set_is_one_line(capsys):
    print_report([], 60)
    assert capsys.readouterr().out == "60 pairs: nothing found\n"


def test_names_that_would_command_the_terminal_are_spelled_out(capsys):
    evil = finding("not_an_image", "error", "a\x1b[2J\udcff.png")
    print_report([evil], 1)
    assert r"a\x1b[2J\udcff.png" in capsys.readouterr().out


def test_a_proposed_table_is_printed_line_by_line(capsys):
    lines = ("colour,class", '"255,0,0",1')
    print_report([Finding("colour_mask", "error", DATA / "m.png", "m.png has colours: say which", details=lines)], 1)
    assert '\n  colour,class\n  "255,0,0",1\n' in capsys.readouterr().out


# JSON


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Look]:
    """A data folder with a picture of 40 x 30 pixels and its mask, and a look at both."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    smooth = np.add.outer(np.arange(30) * 5, np.arange(40) * 2).astype(np.uint8)
    mask = np.zeros((30, 40), np.uint8)
    mask[5:25, 10:20], mask[10:20, 25:35] = 1, 2
    Image.fromarray(np.stack([smooth, smooth // 2, smooth[::-1]], axis=2)).save(tmp_path / "images" / "a.png")
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    return tmp_path, look(tmp_path / "images" / "a.png", [tmp_path / "masks" / "a.png"])


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def test_json_has_each_finding_and_the_facts_of_each_pair(pair, tmp_path):
    data, seen = pair
    found = Finding("stretched_mask", "error", data / "masks" / "a.png", "odd: mend it", "do it", details=("x",))
    alone = Look(None, (seen.masks[0],))
    write_report(tmp_path / "r.JSON", [found, MIXED[0]], [seen, alone], data)
    report = strict((tmp_path / "r.JSON").read_text())
    assert report["version"] == 1 and report["data_dir"] == str(data)
    assert report["counts"] == {"pairs": 1, "images": 1, "masks": 2, "errors": 1, "warnings": 1, "notes": 0}
    assert report["findings"][0] == {
        "kind": "stretched_mask",
        "severity": "error",
        "path": "masks/a.png",
        "message": "odd: mend it",
        "fix": "do it",
        "details": ["x"],
    }
    assert report["findings"][1]["path"] is None
    image, (mask,) = report["pairs"][0]["image"], report["pairs"][0]["masks"]
    assert image == {"path": "images/a.png", "problem": None, "size": [30, 40], "channels": 3, "dtype": "uint8"}
    assert mask["values"] == {"0": 900, "1": 200, "2": 100} and mask["num_distinct"] == 3
    assert report["pairs"][1]["image"] is None


def test_json_says_what_is_stored_in_float_masks_colour_masks_and_broken_files(tmp_path):
    import tifffile

    tifffile.imwrite(tmp_path / "float.tif", np.array([[0.5, np.nan], [0.5, -1]], np.float64))
    Image.new("RGB", (4, 2), (255, 0, 7)).save(tmp_path / "colour.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    paths = [tmp_path / name for name in ("float.tif", "colour.png", "broken.png")]
    data = report_data([], [look(None, paths)], tmp_path)
    of_floats, of_colours, broken = data["pairs"][0]["masks"]
    assert (of_floats["dtype"], of_floats["values"], of_floats["num_not_finite"]) == ("float64", {"-1": 1, "0.5": 2}, 1)
    assert (of_colours["channels"], of_colours["colours"]) == (3, {"255,0,7": 8})
    assert broken["size"] is None and "broken.png" in broken["problem"]
    strict(json.dumps(data))


# HTML


class Page(HTMLParser):
    """Reads a page strictly: every tag that is opened is closed, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    @property
    def pictures(self) -> list[Image.Image]:
        sources = [str(attributes["src"]) for tag, attributes in self.tags if tag == "img"]
        return [Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))) for source in sources]


def test_nothing_in_a_name_or_sentence_becomes_markup(pair):
    data, seen = pair
    evil = "<script>alert(1)</script><img src=http://x onerror='alert(2)'>\"&amp;"
    findings = [
        Finding("damaged_file", "error", data / "images" / evil, f"{evil} cannot be read: {evil}", evil, evil, (evil,)),
        Finding("stretched_mask", "error", seen.masks[0].path, evil),
    ]
    (data / "classes.txt").write_text(f"{evil}\nb\nc\n")
    page = Page(html_page(findings, [seen], data / evil / ".."))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "a"})
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert f"{evil} cannot be read: {evil}" in page.words


def test_the_page_needs_nothing_from_elsewhere(pair):
    data, seen = pair
    page = html_page([Finding("stretched_mask", "error", seen.masks[0].path, "odd: mend it")], [seen], data)
    assert re.findall(r"https?:|url\(|@import|//", re.sub(r'base64,[^"]*', "", page)) == []
    sources = [attributes["src"] for tag, attributes in Page(page).tags if tag == "img"]
    assert len(sources) == 1 and str(sources[0]).startswith("data:image/jpeg;base64,")
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_the_page_says_the_verdict_and_every_finding(pair):
    data, seen = pair
    words = Page(html_page(MIXED, [seen], data)).words
    assert "Training would fail on this data. 4 errors, 2 warnings, 1 note." in words
    for one in MIXED:
        assert one.message in words
    assert "Training can start" in Page(html_page(MIXED[:2], [seen], data)).words
    assert "Nothing stands in the way of training. Nothing found." in Page(html_page([], [seen], data)).words


def test_a_thumbnail_is_the_image_with_its_mask_drawn_over(pair):
    data, seen = pair
    (picture,) = Page(html_page([Finding("value_gaps", "error", seen.masks[0].path, "odd")], [seen], data)).pictures
    image, mask = (np.asarray(Image.open(data / name / "a.png")) for name in ("images", "masks"))
    assert picture.size == (40, 30)
    apart, change = (np.abs(other - overlay(image, mask)).mean() for other in (np.asarray(picture, float), image * 1.0))
    assert apart < change / 2  # JPEG is not exact


def test_a_mask_that_cannot_be_drawn_over_is_shown_by_itself(pair):
    data, _ = pair
    Image.new("RGB", (40, 30), (255, 0, 0)).save(data / "masks" / "a.png")  # colours
    seen = look(data / "images" / "a.png", [data / "masks" / "a.png"])
    (picture,) = Page(html_page([Finding("colour_mask", "error", seen.masks[0].path, "odd")], [seen], data)).pictures
    assert np.abs(np.asarray(picture, int) - [255, 0, 0]).max() < 8
    Image.new("L", (20, 60), 1).save(data / "masks" / "a.png")  # another size
    seen = look(data / "images" / "a.png", [data / "masks" / "a.png"])
    (picture,) = Page(html_page([Finding("size_differs", "error", seen.masks[0].path, "odd")], [seen], data)).pictures
    assert picture.size == (20, 60)
    assert np.abs(np.asarray(picture, int) - palette()[1]).max() < 8


def test_a_file_without_pixels_has_a_line_instead_of_a_picture(pair):
    data, _ = pair
    (data / "images" / "a.png").write_bytes(b"")
    seen = look(data / "images" / "a.png", [data / "masks" / "a.png"])
    page = Page(html_page([Finding("empty_file", "error", data / "images" / "a.png", "empty")], [seen], data))
    assert page.pictures == [] and "no picture can be shown images/a.png empty file" in page.words


def test_what_has_no_data_does_not_take_the_contrast_from_a_thumbnail(tmp_path):
    import tifffile

    pixels = np.tile(np.linspace(0, 1, 60, dtype=np.float32), (60, 1))
    pixels[:30] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    seen = look(tmp_path / "a.tif", [])
    page = Page(html_page([Finding("missing_mask", "error", tmp_path / "a.tif", "odd")], [seen], tmp_path))
    below = np.asarray(page.pictures[0], int)[40, :, 0]
    assert below[0] < 20 and below[-1] > 235


def test_shares_of_the_classes_are_bars_in_the_colours_of_the_masks(pair):
    data, seen = pair
    (data / "classes.txt").write_text("ground\ncell\nfibre\n")
    page = Page(html_page([], [seen], data))
    bars = [str(attributes["style"]) for tag, attributes in page.tags if tag == "span" and "style" in attributes]
    colours = [" ".join(map(str, colour)) for colour in palette()[:3].tolist()]
    shares = (75, 16.67, 8.33)
    assert bars == [f"width:{share:.2f}%;background:rgb({one})" for share, one in zip(shares, colours, strict=True)]
    assert "0 (ground) 75.00 %" in page.words and "2 (fibre) 8.33 %" in page.words


def test_a_page_of_a_large_and_very_bad_data_set_stays_small(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(30):
        Image.fromarray(rng.integers(0, 256, (300, 200, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
    looks = [look(tmp_path / f"{index}.png", []) for index in range(30)]
    findings = [
        Finding(kind, "error", tmp_path / f"{index}.png", f"{'a long path/' * 20}{index}.png is odd: mend it")
        for kind in KINDS
        for index in range(1000)
    ]
    text = html_page(findings, looks, tmp_path)
    page = Page(text)
    assert len(text) < 2_000_000
    assert 0 < len(page.pictures) <= 24 and all(max(picture.size) == 160 for picture in page.pictures)
    assert page.words.count("and 950 more") == len(KINDS)


def test_of_a_scene_too_large_for_a_thumbnail_the_middle_is_shown(tmp_path, monkeypatch):
    import tifffile

    monkeypatch.setattr(page_module, "MOST_PIXELS", 1 << 20)
    monkeypatch.setattr(page_module, "MIDDLE_SIDE", 100)
    pixels = np.zeros((1200, 1300, 3), np.uint8)
    pixels[550:650, 600:700] = 200
    tifffile.imwrite(tmp_path / "tiled.tif", pixels, tile=(64, 64), photometric="rgb")
    Image.fromarray(pixels).save(tmp_path / "whole.png")
    looks = [look(tmp_path / name, []) for name in ("tiled.tif", "whole.png")]
    findings = [Finding("missing_mask", "error", one.image.path, "odd") for one in looks]
    page = Page(html_page(findings, looks, tmp_path))
    (picture,) = page.pictures
    assert picture.size == (100, 100) and np.abs(np.asarray(picture, int) - 200).max() < 8
    assert "no picture can be shown whole.png" in page.words


def test_another_ending_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"report\.pdf.*\.html or \.json"):
        write_report(tmp_path / "report.pdf", [], [], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_report_takes_the_place_of_an_older_one(pair):
    data, seen = pair
    path = data / "report.html"
    path.write_text("old")
    write_report(path, MIXED, [seen], data)
    assert path.read_text(encoding="utf-8") == html_page(MIXED, [seen], data)
    assert sorted(one.name for one in data.iterdir()) == ["images", "masks", "report.html"]
