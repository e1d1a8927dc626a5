"""What is said of a data set, judged over all of its files together."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ml_src.core.checking.findings import find, headline
from ml_src.core.checking.inspection import ImageLook, Look, MaskLook, inspect_all
from ml_src.core.checking.kinds import FIX, Finding
from ml_src.core.checking.layouts import find_files
from ml_src.core.checking.repair import fix
from ml_src.core.data.headers import Header

DATA = Path("data")


def header_of(height: int = 100, width: int = 100, **changes: object) -> Header:
    plain = {"format": "PNG", "orientation": 1, "pages": 1, "samples": 1, "alphas": (), "bits": 8, "number": "uint"}
    return Header(height=height, width=width, **(plain | changes))


def looks_of(masks: Sequence[dict[float, int]], **changes: object) -> list[Look]:
    """Pairs of a plain image and a mask with these pixels per value."""
    return [
        Look(
            ImageLook(DATA / "images" / f"{index}.png", header_of(samples=3)),
            (
                MaskLook(
                    DATA / "masks" / f"{index}.png",
                    header_of(**changes),
                    None,
                    values,
                    {},
                    len(values),
                    compact=regions(values),
                ),
            ),
        )
        for index, values in enumerate(masks)
    ]


def regions(values: dict[float, int]) -> dict[float, int]:
    """What is rare is taken for borders."""
    return {value: pixels for value, pixels in values.items() if 100 * pixels >= sum(values.values())}


def even(*values: float) -> dict[float, int]:
    """A mask in which each value has a thousand pixels."""
    return dict.fromkeys(values, 1000)


def judged(masks: Sequence[dict[float, int]], num_classes: int | None = None, **changes: object) -> list[Finding]:
    return find(looks_of(masks, **changes), DATA, None, num_classes)


BLENDED = {0: 50_000, 255: 40_000} | dict.fromkeys(range(1, 255), 2)


# Values


@pytest.mark.parametrize(
    ("masks", "num_classes", "kind", "severity", "mended"),
    [
        ([even(0, 255)] * 6, None, "stretched_mask", "error", True),
        ([even(0, 255)] * 6, 2, "stretched_mask", "error", True),
        ([even(0, 255)] * 6, 3, "stretched_mask", "error", None),
        ([even(0), even(0, 255)] * 3, None, "stretched_mask", "error", True),
        ([even(0, 128, 255)] * 6, None, "stretched_mask", "error", True),
        ([even(0, 85, 170, 255)] * 6, 4, "stretched_mask", "error", True),
        ([even(0, 255)] * 9 + [even(0, 127, 255)], 3, "stretched_mask", "error", True),
        ([even(0, 10, 20)] * 6, None, "stretched_mask", "error", True),
        ([even(0, 1)] * 5 + [even(0, 255)], None, "stretched_mask", "error", False),
        ([even(0, 1)] * 5 + [even(0, 255)], 2, "stretched_mask", "error", False),
        ([even(0, 1)] * 5 + [even(0, 128)], 2, "stretched_mask", "error", False),
        ([even(0, 1, 2)] * 5 + [even(0, 127, 255)], None, "stretched_mask", "error", False),
        ([even(10, 30, 50, 70, 100)] * 6, None, "value_gaps", "error", True),
        ([even(10, 30, 50, 70, 100)] * 6, 5, "value_gaps", "error", True),
        ([even(0, 1, 3)] * 6, None, "value_gaps", "warning", True),
        ([even(0, 1)] * 5 + [even(0, 1, 3)], None, "value_gaps", "warning", False),
        ([even(1, 2, 3)] * 6, None, "value_gaps", "warning", True),
        ([even(0, 50, 100, 255)] * 6, None, "value_gaps", "error", False),
        ([even(0, 1)] * 5 + [even(0, 200)], None, "stretched_mask", "error", False),
        ([even(0, 1, 2)] * 5 + [even(0, 2, 200)], None, "value_gaps", "error", False),
        ([even(0, 1, 2)] * 6, 2, "values_too_high", "error", False),
        ([even(0, 1, 2)] * 5 + [even(0, 2, 7)], 3, "values_too_high", "error", False),
        ([BLENDED] * 6, None, "blended_mask", "error", True),
        ([even(255)] * 6, None, "value_gaps", "error", False),
        ([even(*range(150))] * 5 + [BLENDED], 150, "values_too_high", "error", False),
        ([BLENDED] * 6, 2, "blended_mask", "error", True),
        ([even(0, 1)] * 5 + [BLENDED], None, "blended_mask", "error", False),
        ([even(0, 1)] * 5 + [BLENDED], 2, "blended_mask", "error", False),
        ([even(*range(256))] * 6, None, "blended_mask", "error", False),
        ([{0: 90_000, 255: 8_000, 128: 40, 90: 30}] * 6, None, "blended_mask", "error", None),
    ],
)
def test_values_have_one_cause(
    masks: list[dict[float, int]], num_classes: int | None, kind: str, severity: str, mended: bool | None
) -> None:
    found = [finding for finding in judged(masks, num_classes) if finding.path is not None]
    assert {(finding.kind, finding.severity) for finding in found} == {(kind, severity)}
    if mended is not None:
        assert {finding.mended for finding in found} == {mended}


@pytest.mark.parametrize(
    ("masks", "num_classes"),
    [
        ([even(0, 1)] * 6, None),
        ([even(0, 1, 255)] * 6, None),
        ([even(0, 1, 255)] * 6, 2),
        ([even(0, 1)] * 5 + [even(0, 1, 255)] * 5 + [even(0, 255)], None),
        ([even(0)] * 5 + [even(0, 1)] * 5, 2),
        ([even(*range(150))] * 6, None),
        ([even(*range(150))] * 6, 150),
        ([even(*range(256))] * 6, 256),
        ([even(0, 2)] * 3 + [even(0, 1)] * 5, 3),
        ([{0: 99_000, 1: 10, 2: 990}] * 6, None),
    ],
)
def test_class_indices_are_left_alone(masks: list[dict[float, int]], num_classes: int | None) -> None:
    assert [finding for finding in judged(masks, num_classes) if finding.severity == "error"] == []


@given(
    num_classes=st.integers(2, 12),
    chosen=st.lists(st.sets(st.integers(0, 11), min_size=1), min_size=1, max_size=8),
    unlabelled=st.booleans(),
    known=st.booleans(),
)
def test_no_set_of_class_indices_is_called_wrong(
    num_classes: int, chosen: list[set[int]], unlabelled: bool, known: bool
) -> None:
    everything = set(range(num_classes)) | ({255} if unlabelled else set())
    masks = [even(*sorted(values & everything)) for values in chosen if values & everything] + [even(*everything)]
    assert [one for one in judged(masks, num_classes if known else None) if one.severity == "error"] == []


@given(num_classes=st.integers(2, 20), step=st.integers(4, 12), known=st.booleans())
def test_stretching_is_recognised_whatever_the_step(num_classes: int, step: int, known: bool) -> None:
    found = judged([even(*range(0, num_classes * step, step))] * 3, num_classes if known else None)
    assert {finding.kind for finding in found} == {"stretched_mask"}


@pytest.mark.parametrize(
    ("values", "what"),
    [(range(0, 65536, 500), "as probabilities have"), (range(3000), "as numbers of objects have")],
)
def test_many_values_of_16_bits_are_no_classes(values: range, what: str) -> None:
    found = judged([even(*values)] * 3, None, bits=16)
    assert {finding.kind for finding in found} == {"soft_mask"}
    assert what in found[0].summary


# Files, sizes and the set


def test_a_finding_names_its_file_and_the_summary_counts_them() -> None:
    found = judged([even(0, 255)] * 3)
    assert [finding.path for finding in found] == [DATA / "masks" / f"{index}.png" for index in range(3)]
    assert all(str(finding.path) in finding.message for finding in found)
    assert {finding.summary.split(" have ")[0] for finding in found} == {"3 masks"}


@pytest.mark.parametrize(
    ("image", "mask", "kind"),
    [
        (header_of(100, 80, orientation=6), header_of(80, 100), "exif_not_applied"),
        (header_of(100, 80, orientation=6), header_of(100, 80), None),
        (header_of(100, 80, orientation=6), header_of(40, 50), "size_differs"),
        (header_of(100, 80), header_of(80, 100), "size_differs"),
        (header_of(100, 80, orientation=3), header_of(100, 80), "exif_doubtful"),
        (header_of(100, 80, orientation=3), header_of(100, 80, orientation=3), None),
        (header_of(80, 80, orientation=6), header_of(80, 80), "exif_doubtful"),
        (header_of(80, 80), header_of(80, 80), None),
    ],
)
def test_sizes_are_compared_as_the_pictures_are_shown(image: Header, mask: Header, kind: str | None) -> None:
    looks = [
        Look(ImageLook(DATA / "images/a.png", image), (MaskLook(DATA / "masks/a.png", mask, values={0: 1, 1: 1}),))
    ]
    assert [finding.kind for finding in find(looks, DATA)] == ([] if kind is None else [kind])


def test_errors_come_before_warnings_and_what_concerns_more_files_comes_first() -> None:
    looks = looks_of([even(0, 255)] * 4)
    looks.append(Look(ImageLook(DATA / "images" / "9.jpg", header_of(samples=3), constant=True), ()))
    found = find(looks, DATA)
    assert [finding.kind for finding in found] == [
        *["stretched_mask"] * 4,
        "missing_mask",
        "constant_image",
        "wrong_extension",
    ]


@pytest.mark.parametrize(
    ("masks", "names", "said"),
    [
        ([even(0, 1)] * 6, ["a", "b", "c"], ["1 class has no pixel in any mask, class 2 (c)"]),
        ([even(0)] * 6, ["a", "b", "void"], ["1 class has no pixel in any mask, class 1 (b)"]),
        (
            [even(0, 1)] * 3 + [even(0)] * 3,
            ["a", "b"],
            ["1 class is in fewer images than there are folds (5), class 1"],
        ),
        ([even(0, 1)] * 3, ["a", "b"], []),
        ([even(0, 1)] * 6, ["a", "b", "unlabelled"], []),
    ],
)
def test_classes_that_are_absent_or_rare_are_named(
    masks: list[dict[float, int]], names: list[str], said: list[str]
) -> None:
    messages = [finding.message for finding in find(looks_of(masks), DATA, names)]
    assert [message.startswith(start) for message, start in zip(messages, said, strict=True)] == [True] * len(said)


def test_the_headline_of_good_data_counts_it() -> None:
    looks = looks_of([even(0, 1, 2)] * 4)
    assert headline([], looks, None) == "all is well with 4 pairs of image and mask, values 0 to 2"
    assert headline([], looks, ["a", "b", "c"]) == "all is well with 4 pairs of image and mask, 3 classes"


def test_what_fix_is_said_to_mend_is_mended_by_it(tmp_path: Path) -> None:
    """The command that is named is the one that works: its masks have no error left."""
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for index in range(4):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / "images" / f"{index}.png")
        values = np.array([10, 30, 50], np.uint8)
        Image.fromarray(rng.choice(values, (20, 30))).save(tmp_path / "masks" / f"{index}.png")
    looks = inspect_all(find_files(tmp_path))
    assert {finding.fix for finding in find(looks, tmp_path)} == {FIX}
    fix(looks, tmp_path, tmp_path / "masks_fixed")
    assert find(inspect_all(find_files(tmp_path, tmp_path / "masks_fixed")), tmp_path) == []
