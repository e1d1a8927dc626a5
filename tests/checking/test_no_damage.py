"""Repair never loses or invents labels: what can be read in two ways is a question, and nothing is written."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from ml_src.core.checking.inspection import inspect_all, look
from ml_src.core.checking.layouts import find_files
from ml_src.core.checking.mask_findings import mask_findings
from ml_src.core.checking.repair import Outcome, fix
from ml_src.core.checking.tallies import compact_pixels
from ml_src.core.data.files import read_mask

FEW = np.kron([[0, 1, 1], [1, 0, 0]], np.ones((20, 20), int)).astype(np.uint8)  # (40, 60), two classes


def disc(side: int, radius: float, value: int = 1) -> np.ndarray:
    rows, columns = np.mgrid[:side, :side]
    return ((rows - side / 2) ** 2 + (columns - side / 2) ** 2 < radius**2).astype(np.uint8) * np.uint8(value)


def halved(mask: np.ndarray, by: int = 2) -> np.ndarray:
    return cv2.resize(mask, (mask.shape[1] // by, mask.shape[0] // by), interpolation=cv2.INTER_AREA)


def blocks(values: Sequence[int], height: int = 6) -> np.ndarray:
    """A mask of one rectangle for each value, (height * number, 9)."""
    return np.kron(np.array(values)[:, None], np.ones((height, 9), int)).astype(np.uint8)


def data_set(folder: Path, masks: Sequence[np.ndarray], endings: str = ".png", names: str = "") -> Path:
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number, (mask, ending) in enumerate(zip(masks, (endings.split() * len(masks))[: len(masks)], strict=True)):
        Image.fromarray(np.full(mask.shape[:2], number, np.uint8)).save(folder / f"images/{number}.png")
        target = folder / f"masks/{number}{ending}"
        if ending == ".tif":
            tifffile.imwrite(target, mask)
        else:
            Image.fromarray(mask).save(target)
    if names:
        (folder / "classes.txt").write_text("\n".join(names))
    return folder


def mended(data: Path, colors: Path | None = None) -> Outcome:
    return fix(inspect_all(find_files(data)), data, data / "fixed", colors=colors)


def asked(data: Path, colors: Path | None = None) -> str:
    """Return the question; all masks are refused and nothing is written."""
    outcome = mended(data, colors)
    assert outcome.refused == len(list((data / "masks").iterdir())) and not (data / "fixed").exists()
    return outcome.lines[0]


def result(data: Path, stem: int = 0) -> np.ndarray:
    return read_mask(data / f"fixed/{stem}.png")


def test_compact_pixels_are_those_whose_eight_neighbours_are_alike():
    plane = np.random.default_rng(0).integers(0, 2, (30, 40)) * (disc(40, 12)[:30] == 0)
    brute = [
        plane[row, column]
        for row in range(1, 29)
        for column in range(1, 39)
        if len(np.unique(plane[row - 1 : row + 2, column - 1 : column + 2])) == 1
    ]
    assert brute and compact_pixels(plane).tolist() == brute
    for shape in ((1, 9), (2, 2), (9, 1)):
        assert compact_pixels(np.zeros(shape, np.uint8)).size == 0


@pytest.mark.parametrize(
    "mask",
    [
        halved(disc(80, 25, 255)),
        halved(disc(160, 50, 255), 4),
        cv2.GaussianBlur(disc(40, 12, 255), (3, 3), 0),
        halved(disc(80, 25, 200)),
    ],
    ids=["halved", "quartered", "smoothed", "no full scale"],
)
def test_smooth_borders_are_no_classes_however_evenly_their_values_lie(tmp_path, mask):
    assert len(np.unique(mask)) >= 5
    question = asked(data_set(tmp_path / "unknown", [mask] * 3))
    assert "between them: are these classes, or blends at the borders?" in question
    assert question.endswith("2 for blends")
    known = data_set(tmp_path / "known", [mask] * 3, names="ab")
    assert mended(known).refused == 0
    np.testing.assert_array_equal(result(known), mask > mask.max() / 2)


@pytest.mark.parametrize("values", [[0, 127, 255], [0, 32, 64, 96, 128, 159, 191, 223, 255], list(range(0, 252, 12))])
def test_stretched_classes_that_fill_regions_are_mended(tmp_path, values):
    data = data_set(tmp_path / "data", [blocks(values)] * 2)
    assert mended(data).refused == 0
    np.testing.assert_array_equal(result(data), blocks(range(len(values))))


def test_rare_classes_that_fill_regions_are_no_blends(tmp_path):
    values = list(range(0, 252, 12))
    mask = np.kron(np.array([[0, 240]], np.uint8), np.ones((200, 200), np.uint8))
    mask[2 : 2 + 4 * len(values), 100:105] = np.kron(np.array(values)[:, None], np.ones((4, 5))).astype(np.uint8)
    data = data_set(tmp_path / "data", [mask] * 2)
    assert mended(data).refused == 0
    np.testing.assert_array_equal(result(data), mask // 12)
    named = data_set(tmp_path / "named", [mask] * 2, names="ab")
    assert asked(named).startswith("the masks hold 21 values")


@pytest.mark.parametrize("ending", [".jpg .png", ".png"])
@pytest.mark.parametrize("names", ["", "ab"])
def test_a_small_object_of_class_1_is_no_shade_of_0(tmp_path, ending, names):
    large = disc(200, 60, 255)
    first = large if "jpg" in ending else cv2.GaussianBlur(large, (3, 3), 0)
    data = data_set(tmp_path / "data", [first, disc(200, 5)] * 2, ending, names)
    question = asked(data)
    if "jpg" in ending:
        assert question.startswith(f"{data / 'masks/1.png'} holds the values 0, 1, which would all become class 0")
    else:
        assert question.startswith("the masks hold") and "?" in question


def test_a_mask_that_is_all_class_1_is_no_shade_of_0(tmp_path):
    data = data_set(tmp_path / "data", [disc(200, 60, 255), np.ones((200, 200), np.uint8)] * 2, ".jpg .png")
    assert asked(data).startswith(f"{data / 'masks/1.png'} holds the value 1, which would all become class 0")


@pytest.mark.parametrize("names", ["", "ab"])
@pytest.mark.parametrize(
    ("other", "ending"),
    [(FEW.astype(np.float32), ".tif"), (FEW.astype(np.int32), ".tif"), (np.stack([FEW] * 3, 2), ".png"), (FEW, ".bmp")],
    ids=["float", "int32", "RGB", "BMP"],
)
def test_masks_of_0_and_255_beside_masks_of_0_and_1_are_a_question(tmp_path, other, ending, names):
    data = data_set(tmp_path / "data", [FEW * 255, other] * 2, f".png {ending}", names)
    question = asked(data)
    assert str(data / "masks/0.png") in question and str(data / f"masks/1{ending}") in question
    assert "no mask both: do they mean the same class?" in question


def test_255_inside_masks_of_two_classes_is_unlabelled(tmp_path):
    mask = FEW.astype(np.float32)
    mask[:2] = 255
    data = data_set(tmp_path / "data", [mask, FEW.astype(np.float32)], ".tif")
    assert mended(data).refused == 0
    np.testing.assert_array_equal(result(data), mask)


@pytest.mark.parametrize("names", ["", "abcd"])
def test_a_stray_value_is_never_numbered_as_a_class(tmp_path, names):
    stray = blocks([0, 1, 2])
    stray[0, :5] = 7
    data = data_set(tmp_path / "data", [blocks([0, 1, 2])] * 4 + [stray], names=names)
    question = asked(data)
    assert "7" in question and ("only 1 of the 5 masks hold 7" in question or "there are 4 classes" in question)


def test_many_classes_without_gaps_are_a_warning_that_asks_and_offers_no_repair(tmp_path):
    mask = np.kron(np.arange(300).reshape(15, 20), np.ones((3, 3), int)).astype(np.uint16)
    data = data_set(tmp_path / "data", [mask] * 2)
    masks = [one.masks[0] for one in inspect_all(find_files(data))]
    found = mask_findings(masks, None)
    assert {(finding.kind, finding.severity, finding.mended) for finding in found} == {("soft_mask", "warning", False)}
    assert "write one class name a line into classes.txt" in found[0].summary
    assert mask_findings(masks, 300) == []


def test_a_table_of_colours_may_not_exceed_the_classes(tmp_path):
    mask = np.array([(0, 0, 0), (255, 0, 0)], np.uint8)[FEW]
    data = data_set(tmp_path / "data", [mask] * 2, names="ab")
    table = tmp_path / "colors.csv"
    table.write_text("r,g,b,class\n0,0,0,0\n255,0,0,5\n")
    assert asked(data, table).startswith(f"{table} lists the classes 5 but there are 2")
    table.write_text("r,g,b,class\n0,0,0,0\n255,0,0,1\n9,9,9,255\n")
    assert mended(data, table).refused == 0


def test_infinite_values_are_counted_also_where_no_data_is_declared(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    mask = FEW.astype(np.float32)
    mask[0, :2], mask[1, :3] = np.inf, -9999
    path = tmp_path / "a.tif"
    place = rasterio.transform.from_origin(300_000, 5_800_000, 10, 10)
    how = {"driver": "GTiff", "height": 40, "width": 60, "count": 1, "crs": "EPSG:32633", "transform": place}
    with rasterio.open(path, "w", dtype="float32", nodata=-9999, **how) as file:
        file.write(mask[None])
    found = look(None, [path]).masks[0]
    assert found.num_not_finite == 2 and {0, 1} <= found.values.keys()
