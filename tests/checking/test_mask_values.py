"""From values and colours to classes: what is done where nothing has to be guessed, and what is asked where it has."""

from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml_src.core.checking.mask_colours import ColourMap, colours_of, proposed_table, read_colours
from ml_src.core.checking.mask_values import ValueMap, plan_values
from ml_src.core.checking.tallies import Tally, tally_of
from ml_src.core.errors import DataError

NAN = float("nan")


def tally(counts: dict[float, int] | list[float], **more: object) -> Tally:
    """Pixels per value, which fill no regions; of a list a hundred each, which do."""
    pixels = counts if isinstance(counts, dict) else dict.fromkeys(counts, 100)
    kept = Counter({float(value): number for value, number in pixels.items()})
    compact = Counter() if isinstance(counts, dict) else Counter(kept)
    return Tally(kept, sum(kept.values()), **{"compact": compact} | more)  # type: ignore[arg-type]


def table(found: ValueMap) -> dict[float, int]:
    return dict(zip(found.values, found.classes, strict=True))


def disc(height: int = 200, width: int = 200) -> np.ndarray:
    """A mask of 0 and 255 with one large disc."""
    rows, columns = np.mgrid[:height, :width]
    return np.where((rows - height / 2) ** 2 + (columns - width / 2) ** 2 < (height / 3) ** 2, 255, 0).astype(np.uint8)


@pytest.mark.parametrize(
    "values",
    [[0, 255], [0, 7], [0, 65535], [0.0, 0.5], [10, 30], [0, 127, 255], [0, 128, 255], [0.0, 0.5, 1.0],
     [0, 32, 64, 96, 128, 159, 191, 223, 255], [0, 21845, 43690, 65535], [10, 30, 50, 70, 100], [1, 2, 3], [0, 1, 3]],
)  # fmt: skip
def test_two_values_stretched_ones_and_gaps_become_consecutive_classes(values):
    found = plan_values(tally(values))
    assert table(found) == {value: index for index, value in enumerate(values)}
    assert not found.blends and not found.unlabelled


@pytest.mark.parametrize("values", [[0], [3], [0, 1], [0, 1, 2, 255], list(range(151)), [*range(182), 255]])
def test_class_indices_stay_as_they_are_and_255_beside_them_is_unlabelled(values):
    found = plan_values(tally(values))
    assert found.identity
    assert found.unlabelled == ((255,) if 255 in values else ())


def test_a_rare_class_of_many_stretched_ones_is_no_blend():
    counts = dict.fromkeys([0, 32, 64, 96, 128, 159, 191, 255], 1000) | {223: 10}
    assert len(plan_values(tally(counts, compact=Counter(counts))).classes) == 9


@pytest.mark.parametrize(
    ("values", "num_classes", "expected"),
    [
        ([0, 1, 2, 4], 5, {0: 0, 1: 1, 2: 2, 4: 4}),  # class 3 has no pixel
        ([1, 2, 3], 4, {1: 1, 2: 2, 3: 3}),
        ([1, 2, 3], 3, {1: 0, 2: 1, 3: 2}),
        ([0, 255], 2, {0: 0, 255: 1}),
        ([10, 30, 255], 3, {10: 0, 30: 1, 255: 2}),
        ([10, 30, 255], 2, {10: 0, 30: 1}),  # and 255 is unlabelled
    ],
)
def test_the_number_of_classes_decides_what_values_leave_open(values, num_classes, expected):
    found = plan_values(tally(values), num_classes)
    assert table(found) == expected
    assert (255 in found.unlabelled) == (255 in values and 255 not in expected)


def test_the_number_of_classes_tells_rare_classes_from_blends():
    counts = {0: 9000, 127: 20, 255: 980}
    assert table(plan_values(tally(counts), 3)) == {0: 0, 127: 1, 255: 2}
    blended = plan_values(tally(counts), 2)
    assert table(blended) == {0: 0, 255: 1} and blended.blends


def test_minus_one_and_impossible_no_data_are_unlabelled():
    assert plan_values(tally([-1, 0, 1])).unlabelled == (-1,)
    assert plan_values(tally([-9999, 0, 1], nodata={-9999.0})).unlabelled == (-9999,)
    assert plan_values(tally([0, 1, 65535], nodata={65535.0})).unlabelled == (65535,)
    with_nan = plan_values(tally([0, 1], nodata={NAN}, num_not_finite=3))
    np.testing.assert_array_equal(with_nan.classes_of(np.array([0, NAN, 1])), [0, 255, 1])
    assert plan_values(tally([0, 1, 2], nodata={0.0})).unlabelled == (), "no data 0 is the background of many rasters"


QUESTIONS = [
    (tally([0, 1], num_not_finite=3), None, "3 pixels are NaN or infinite: which value marks unlabelled pixels?"),
    (tally([-2, -1, 0, 1]), None, "the masks hold negative values (-2, -1): which value marks unlabelled pixels?"),
    (tally([-1, 1]), None, "the masks hold 1 and what usually marks unlabelled pixels (-1): are these two classes?"),
    (tally([-1]), None, "no pixel of the masks is labelled: where are the labels?"),
    (tally([255]), None, "the masks hold the values 255: is 255 a class, or does it mark unlabelled pixels?"),
    (tally([10, 30, 255]), None, "the masks hold the values 10, 30, 255: is 255 a class, or does it mark unlabelled"),
    (tally([1, 255]), None, "the masks hold the values 1, 255: is 255 a class, or does it mark unlabelled pixels?"),
    (tally([0, 255]), 1, "the masks hold 2 values (0, 255) but there are 1 classes: which value is which class?"),
    (tally([0, 255]), 3, "the masks hold 2 values (0, 255) but there are 3 classes: which value is which class?"),
    (tally([0, 1, 255]), 3, "the masks hold 3 values (0, 1, 255) but there are 3 classes: which value is which class?"),
    (tally([0, 127, 255]), 2, "the masks hold 3 values (0, 127, 255) but there are 2 classes: which value is which"),
    (tally([0, 1, 2, 3]), 2, "the masks hold 4 values (0, 1, 2, 3) but there are 2 classes: which value is which"),
    (tally({0: 9000, 127: 20, 255: 980}), None,
     "the masks hold 0, 255 and, in 0.2 % of the pixels, 127 between them: are these classes, or blends"),
    (tally(list(range(0, 65535, 300))), None,
     "the masks hold 219 different values from 0 to 65400, as probabilities do: at which threshold does a class"),
    (tally(list(range(256))), None, "the masks hold 256 different values from 0 to 255, as probabilities do"),
    (tally([0.0, 0.1, 0.7, 0.95]), None, "the masks hold 4 different values from 0 to 0.95, as probabilities do"),
    (tally([0, 1, 2, 3], lossy=True), None, "the masks hold 4 values, and JPEG compression has changed them: which"),
    (tally([0, 1], lossy=True), None, "the masks hold 2 values, and JPEG compression has changed them: which classes"),
    (tally([-1, *range(256)]), None, "the masks hold 256 different values from 0 to 255"),
    (tally([-1, *range(300)]), None, "the masks hold 300 classes and unlabelled pixels besides, and 255 is a class"),
]  # fmt: skip


@pytest.mark.parametrize(("found", "num_classes", "question"), QUESTIONS)
def test_what_would_be_a_guess_is_asked(found, num_classes, question):
    with pytest.raises(DataError) as error:
        plan_values(found, num_classes)
    assert str(error.value).startswith(question)


def test_a_smoothed_mask_takes_the_nearest_of_its_clean_values():
    smooth = cv2.GaussianBlur(disc(800, 800), (3, 3), 0)
    found = plan_values(tally_of(smooth))
    assert found.blends and table(found) == {0: 0, 255: 1}
    np.testing.assert_array_equal(found.classes_of(smooth), smooth > 127)
    assert found.num_blended(smooth) == ((smooth > 0) & (smooth < 255)).sum()


@pytest.mark.parametrize("quality", [50, 75, 95])
@pytest.mark.parametrize("lossy", [True, False])
def test_a_two_class_jpeg_is_cut_in_the_middle(quality, lossy):
    mask = disc()
    ok, data = cv2.imencode(".jpg", mask, [cv2.IMWRITE_JPEG_QUALITY, quality])
    pixels = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)
    assert ok and len(np.unique(pixels)) > 10
    classes = plan_values(tally_of(pixels, lossy=lossy)).classes_of(pixels)
    assert (classes == (mask > 0)).mean() > 0.999 and set(np.unique(classes)) == {0, 1}


def test_a_photograph_is_no_mask():
    photo = np.random.default_rng(0).normal(128, 40, (100, 100)).clip(0, 255).astype(np.uint8)
    for lossy in (False, True):
        with pytest.raises(DataError, match="the masks hold"):
            plan_values(tally_of(photo, lossy=lossy))


def test_a_tally_keeps_the_commonest_of_a_million_values():
    noise = np.random.default_rng(0).random((1000, 1000)).astype(np.float32)
    noise[:990] = 0
    noise[:400] = 1
    found = tally_of(noise)
    assert len(found.counts) <= 1 << 16 and found.num_pixels == 1_000_000
    assert found.counts[0.0] == 590_000 and found.counts[1.0] == 400_000
    assert table(plan_values(found)) == {0: 0, 1: 1}


@given(st.sets(st.integers(0, 65535), min_size=2, max_size=40), st.integers(0, 2**32 - 1))
def test_whatever_is_mapped_keeps_which_pixels_are_alike_and_their_order(values, seed):
    pixels = np.random.default_rng(seed).choice(sorted(values), (10, 20)).astype(np.uint16)
    pixels = np.kron(pixels, np.ones((3, 3), np.uint16))
    try:
        found = plan_values(tally_of(pixels))
    except DataError:
        return
    if found.blends:
        return
    classes = found.classes_of(pixels)
    labelled = ~np.isin(pixels, found.unlabelled)
    rank = np.unique(pixels[labelled], return_inverse=True)[1]
    np.testing.assert_array_equal(np.unique(classes[labelled], return_inverse=True)[1], rank)
    np.testing.assert_array_equal(classes[~labelled], 255)
    np.testing.assert_array_equal(found.classes_of(pixels.astype(np.float64)), classes)


# Colours


def test_colours_become_the_classes_of_the_table():
    rng = np.random.default_rng(0)
    colours = [(0, 0, 0), (255, 0, 0), (0, 65535, 1), (12, 200, 3)]
    classes = rng.integers(0, 4, (9, 7))
    pixels = np.array(colours, np.uint16)[classes]
    found = ColourMap({colour: index for index, colour in enumerate(colours)}, Path("t.csv"))
    np.testing.assert_array_equal(found.classes_of(pixels, Path("a.png")), classes)
    assert colours_of(pixels) == Counter(map(tuple, pixels.reshape(-1, 3).tolist()))


def test_an_unknown_colour_is_named_with_its_pixels():
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0, :3], pixels[1, 0] = (9, 8, 7), (1, 1, 1)
    with pytest.raises(DataError) as error:
        ColourMap({(0, 0, 0): 0}, Path("t.csv")).classes_of(pixels, Path("a.png"))
    assert str(error.value) == (
        "a.png has 3 pixels of colour 9,8,7 and of others, 4 in all, which t.csv does not list: "
        "which class is it? Add it to the table"
    )


def test_the_proposed_table_begins_with_black_and_can_be_read_back(tmp_path):
    colours = Counter({(255, 0, 0): 50, (0, 0, 0): 1, (0, 0, 255): 10})
    lines = proposed_table(colours)
    assert lines == ["r,g,b,class", "0,0,0,0", "255,0,0,1", "0,0,255,2"]
    path = tmp_path / "colors.csv"
    path.write_text("\n".join(lines))
    assert read_colours(path).classes == {(0, 0, 0): 0, (255, 0, 0): 1, (0, 0, 255): 2}


def test_a_table_may_name_classes_and_write_colours_in_hexadecimal(tmp_path):
    path = tmp_path / "colors.csv"
    path.write_text("\ufeffClass, Color, name\n1, #FF8000, road\n0, 000000, rest\n", encoding="utf-8")
    assert read_colours(path).classes == {(255, 128, 0): 1, (0, 0, 0): 0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", " must begin with the line r,g,b,class or color,class"),
        ("r,g,class\n0,0,0\n", " must begin with the line r,g,b,class or color,class"),
        ("r,g,b,class\n", " lists no colour: write one a line, as r,g,b,class"),
        ("r,g,b,class\n0,0,0,0\n0,0,-1,1\n", " line 3 needs a colour (three numbers from 0 up, or #ff0000)"),
        ("r,g,b,class\n0,0,0,car\n", " line 2 needs a colour (three numbers from 0 up, or #ff0000) and a class from"),
        ("color,class\nred,0\n", " line 2 needs a colour (three numbers from 0 up, or #ff0000) and a class from 0 up"),
        ("r,g,b,class\n0,0,0,0\n0,0,0,1\n", " line 3 gives a colour a second class"),
    ],
)
def test_a_faulty_table_is_refused_by_line(tmp_path, text, message):
    path = tmp_path / "colors.csv"
    path.write_text(text)
    with pytest.raises(DataError) as error:
        read_colours(path)
    assert str(error.value).startswith(f"{path}{message}")


def test_a_table_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read \(No such file or directory\): give a CSV file"):
        read_colours(tmp_path / "colors.csv")
