"""ml-inference on files and splits, as a user meets it: what lies in the folders, what is said, and the exit codes."""

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import known_networks
import numpy as np
import pytest
import tifffile
import torch
from known_networks import Blurred, ByBrightness, drawn_data, member_of, write_gray
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ml_src.cli import inference
from ml_src.core.checkpoint import CONTENTS, save_checkpoint
from ml_src.core.config_file import plain
from ml_src.core.inference import planes
from ml_src.core.inference.journal import Journal
from ml_src.core.inference.postprocess import save_chain
from ml_src.core.network import MODEL_REGISTRY
from ml_src.core.postprocess_specs import FillHoles, RemoveSmall

SIZES = [(40, 40), (17, 63), (70, 16), (40, 40)]
RUN = Path("runs/cells_fold_0")
BEST = RUN / "weights/best.pt"


class Constant(nn.Module):
    """Says the same everywhere: what its weights say."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[:, None, None].expand(len(images), -1, *images.shape[2:])


class Interrupted(ByBrightness):
    """Is stopped by Ctrl-C at its second batch."""

    batches = 0

    def forward(self, images: Tensor) -> Tensor:
        self.batches += 1
        if self.batches == 2:
            raise KeyboardInterrupt
        return super().forward(images)


@pytest.fixture(autouse=True)
def networks(registries_as_they_were: None) -> None:
    MODEL_REGISTRY["by_brightness"] = lambda **section: ByBrightness()
    MODEL_REGISTRY["blurred"] = lambda num_classes, **section: Blurred(num_classes)
    MODEL_REGISTRY["constant"] = lambda num_classes, **section: Constant(num_classes)
    MODEL_REGISTRY["interrupted"] = lambda **section: Interrupted()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images that by_brightness is right about, with their masks, in the folder where commands are started."""
    monkeypatch.chdir(tmp_path)
    drawn_data(Path("data"), SIZES)
    return Path("data")


def save(path: Path, network: str = "by_brightness", logits: list[float] | None = None, **overrides: Any) -> Path:
    """Write the checkpoint of a network, as training does."""
    config = member_of(nn.Identity(), "data", **{"model.custom_architecture": network, **overrides}).config
    weights = {} if logits is None else {"logits": torch.tensor(logits)}
    path.parent.mkdir(parents=True, exist_ok=True)
    empty = {key: kind() for key, kind in CONTENTS.items() if key != "format_version"}
    about = {"model_state_dict": weights, "config": plain(config), "class_names": config.class_names}
    save_checkpoint(path, {**empty, **about})
    return path


def predict(*words: object) -> int:
    return inference.main([str(word) for word in words])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one sentence that a command answers with."""
    capsys.readouterr()
    assert predict(*words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def read(path: Path) -> NDArray[Any]:
    return tifffile.imread(path) if path.suffix == ".tif" else np.array(Image.open(path))


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def predictions(out: Path) -> dict[str, dict[str, str]]:
    with (out / "predictions.csv").open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def require_right(out: Path, data: Path, names: list[str]) -> None:
    """All masks are there, no others, and by_brightness is right."""
    assert files_in(out / "masks") == [f"{name}.png" for name in names]
    for name in names:
        truth = read(data / "masks" / f"{name[-1]}.png")
        assert np.array_equal(read(out / f"masks/{name}.png"), truth)


# --- what is predicted, and where it lies


@pytest.mark.parametrize(
    ("word", "folder", "names"),
    [
        ("data/images/2.png", "2", ["2"]),
        ("data/images", "images", ["0", "1", "2", "3"]),
        ("data/images/[13].*", "images", ["1", "3"]),
        ("data/im*/[13].png", "data", ["images/1", "images/3"]),
    ],
)
def test_a_file_a_folder_and_a_glob_need_no_index_files(data: Path, word: str, folder: str, names: list[str]) -> None:
    save(BEST)
    shutil.rmtree(data / "splits")
    assert predict("--checkpoint_path", BEST, "--input", word) == 0
    out = RUN / "inference" / folder
    require_right(out, data, names)
    assert list(predictions(out)) == names


def test_a_list_of_words_is_predicted_into_one_folder_and_its_pixels_are_counted(data: Path) -> None:
    save(BEST)
    assert predict("--checkpoint_path", RUN, "--input", data / "images/3.png", data / "images/0.png",
                   "--output", "out", "--overlay") == 0  # fmt: skip
    require_right(Path("out"), data, ["0", "3"])
    assert files_in(Path("out/overlays")) == ["0.png", "3.png"]
    row = predictions(Path("out"))["3"]
    counts = np.bincount(read(data / "masks/3.png").ravel(), minlength=3)
    assert [int(row[f"pixels_{name}"]) for name in known_networks.NAMES] == counts.tolist()
    assert (row["path"], row["height"], row["width"], row["error"]) == ("data/images/3.png", "40", "40", "")


def test_folders_are_kept_with_recursive(data: Path) -> None:
    save(BEST)
    for name in ("deep/er/1", "deep/3", "0"):
        target = Path("scans", f"{name}.png")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(data / "images" / target.name, target)
    assert predict("--checkpoint_path", BEST, "--input", "scans", "--recursive", "--output", "out", "--overlay",
                   "--save_probs", "--uncertainty") == 0  # fmt: skip
    require_right(Path("out"), data, ["0", "deep/3", "deep/er/1"])
    assert files_in(Path("out/overlays")) == files_in(Path("out/masks"))
    assert files_in(Path("out/probabilities")) == ["0.tif", "deep/3.tif", "deep/er/1.tif"]
    assert predict("--checkpoint_path", BEST, "--input", "scans", "--output", "flat") == 0
    require_right(Path("flat"), data, ["0"])


def test_the_output_folder_inside_the_input_folder_is_not_predicted_again(data: Path) -> None:
    save(BEST)
    words = ("--checkpoint_path", BEST, "--input", data / "images", "--recursive", "--output", data / "images/out")
    assert predict(*words) == 0
    assert predict(*words) == 0
    require_right(data / "images/out", data, ["0", "1", "2", "3"])


def test_a_geotiff_gives_masks_and_polygons_on_the_same_ground(data: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    from rasterio.features import rasterize

    save(BEST)
    gray, truth = read(data / "images/1.png"), read(data / "masks/1.png")
    gray[:5, :9] = 77  # which is nodata
    place = {"crs": "EPSG:25833", "transform": rasterio.Affine(0.5, 0, 390_000, 0, -0.5, 5_820_000)}
    profile = {"driver": "GTiff", "height": 17, "width": 63, "count": 1, "dtype": "uint8", "nodata": 77, **place}
    with rasterio.open("scene.tif", "w", **profile) as raster:
        raster.write(gray, 1)
    assert predict("--checkpoint_path", BEST, "--input", "scene.tif", "--output", "out", "--polygons",
                   "--save_probs", "--uncertainty") == 0  # fmt: skip
    for kind, bands in (("masks", 1), ("probabilities", 3), ("uncertainty", 1)):
        with rasterio.open(f"out/{kind}/scene.tif") as raster:
            assert (raster.crs, raster.transform, raster.count) == (*place.values(), bands)
    with rasterio.open("out/masks/scene.tif") as raster:
        labels = raster.read(1)
        assert raster.nodata == 255 and len({raster.colormap(1)[label] for label in range(3)}) == 3
    assert (labels[:5, :9] == 255).all() and (labels == 255).sum() == 45
    known = labels != 255
    assert np.array_equal(labels[known], truth[known])
    features = json.loads(Path("out/polygons/scene.geojson").read_text())["features"]
    shapes = [(feature["geometry"], feature["properties"]["class"]) for feature in features]
    drawn = rasterize(shapes, labels.shape, transform=place["transform"], dtype="uint8")
    assert np.array_equal(drawn, np.where(known, labels, 0))
    row = predictions(Path("out"))["scene"]
    assert int(row["pixels_nodata"]) == 45 and float(row["area_cell"]) == int(row["pixels_cell"]) * 0.25


def test_more_than_256_classes_give_masks_of_16_bits(data: Path) -> None:
    save(BEST, "constant", [0.0] * 299 + [5.0], **{"data.num_classes": 300, "data.class_names": None})
    assert predict("--checkpoint_path", BEST, "--input", data / "images/0.png", "--output", "out") == 0
    mask = read(Path("out/masks/0.png"))
    assert (mask == 299).all() and mask.shape == (40, 40)


@pytest.mark.parametrize("how", ["tiff", "npz"])
def test_probabilities_sum_to_1_and_say_what_the_mask_says(data: Path, how: str) -> None:
    save(BEST, "blurred")
    words = ("--checkpoint_path", BEST, "--input", data / "images/1.png", "--output", "o")
    assert predict(*words, "--save_probs", how) == 0
    probs = np.load("o/probabilities/1.npz")["probs"] if how == "npz" else tifffile.imread("o/probabilities/1.tif")
    assert probs.dtype == np.float16 and probs.shape == (17, 63, 3)
    assert np.allclose(probs.sum(axis=2, dtype=np.float64), 1, atol=2e-3)
    assert np.array_equal(probs.argmax(axis=2), read(Path("o/masks/1.png")))


def test_uncertainty_is_entropy_and_for_ensembles_also_disagreement(data: Path) -> None:
    for name, logits in (("sure", [9.0, 0, 0]), ("other", [0, 9.0, 0]), ("unsure", [0.0, 0, 0])):
        save(Path(f"{name}.pt"), "constant", logits)
    words = ("--input", data / "images/0.png", "--uncertainty")
    assert predict("--checkpoint_path", "unsure.pt", *words, "--output", "one") == 0
    assert np.allclose(tifffile.imread("one/uncertainty/0.tif").squeeze(), 1, atol=1e-3)
    assert predict("--ensemble", "sure.pt", "other.pt", *words, "--output", "two") == 0
    both = tifffile.imread("two/uncertainty/0.tif")
    assert both.shape == (40, 40, 2)
    assert np.allclose(both, np.log(2) / np.log(3), atol=0.01)  # each is sure of something else
    assert Path("two/uncertainty/0.png").is_file()


# --- files that cannot be read, and work that is interrupted


def test_a_damaged_file_is_named_skipped_and_counted(
    data: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    save(BEST)
    whole = (data / "images/1.png").read_bytes()
    (data / "images/1.png").write_bytes(whole[:-40])
    words = ("--checkpoint_path", BEST, "--input", data / "images", "--output", "out")
    assert predict(*words) == 2
    require_right(Path("out"), data, ["0", "2", "3"])
    assert [record.message for record in caplog.records if "data/images/1.png" in record.message]
    out = capsys.readouterr().out
    assert "3 images predicted" in out and "1 could not be read" in out
    rows = predictions(Path("out"))
    assert "data/images/1.png" in rows["1"]["error"] and rows["1"]["pixels_cell"] == ""
    assert [rows[name]["error"] for name in "023"] == [""] * 3
    (data / "images/1.png").write_bytes(whole)
    assert predict(*words, "--resume") == 0
    require_right(Path("out"), data, ["0", "1", "2", "3"])
    assert "1 image predicted, 3 were there already" in capsys.readouterr().out
    assert predictions(Path("out"))["1"]["error"] == ""


def test_strict_stops_at_the_first_file_that_cannot_be_read(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(BEST)
    (data / "images/1.png").write_text("no picture")
    words = ("--checkpoint_path", BEST, "--input", data / "images", "--output", "out", "--strict")
    assert "data/images/1.png" in refused(capsys, *words)
    assert not Path("out/predictions.csv").exists()
    assert "3.png" not in files_in(Path("out/masks"))


def test_an_image_that_is_there_and_a_word_that_is_not_predict_nothing(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(BEST)
    assert "imagez" in refused(capsys, "--checkpoint_path", BEST, "--input", data / "images/0.png", "data/imagez")
    assert not (RUN / "inference").exists()


COUNTED = """
import os
from pathlib import Path

from known_networks import ByBrightness
from ml_src.core.network import MODEL_REGISTRY

SEEN = Path("seen.txt")


class Counted(ByBrightness):
    def forward(self, images):
        for image in images:
            with SEEN.open("a") as file:
                file.write(f"{round(255 * float(image[0, 0, 0]))}\\n")
            if len(SEEN.read_text().split()) == int(os.environ.get("DIE_AT", 0)):
                os.kill(os.getpid(), 9)
        return super().forward(images)


MODEL_REGISTRY["counted"] = lambda **section: Counted()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs processes that can be killed")
def test_killed_work_goes_on_where_it_stopped_and_ends_as_if_it_never_had(data: Path) -> None:
    """Every image's first pixel is its number, by which the network notes what it was shown."""
    Path("counted.py").write_text(COUNTED)
    sys.modules.pop("ml_plugin_counted", None)
    save(BEST, "counted", **{"plugins": ["counted.py"], "training.batch_size": 1})
    Path("scans/deep").mkdir(parents=True)
    for number in range(8):
        gray = write_gray(Path(f"scans/deep/{number}.png"), 40, 30, seed=number)
        gray[0, 0] = number
        Image.fromarray(gray).save(f"scans/deep/{number}.png")
    Path("scans/deep/00.png").write_text("no picture")
    words = ["--checkpoint_path", str(BEST), "--plugin", "counted.py", "--input", "scans", "--recursive",
             "--overlay", "--save_probs", "--uncertainty", "--output"]  # fmt: skip
    paths = os.pathsep.join([str(Path(known_networks.__file__).parent), *sys.path])
    killed = subprocess.run(
        [sys.executable, "-m", "ml_src.cli.inference", *words, "out"],
        env={**os.environ, "DIE_AT": "6", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -9 and "scans/deep/00.png" in killed.stderr
    assert not Path("out/predictions.csv").exists()
    lines = [json.loads(line) for line in Path("out/.journal.jsonl").read_text().splitlines()[1:]]
    finished = {line["name"][-1] for line in lines if "error" not in line}
    assert finished and "5" not in finished
    before = {path: path.stat().st_mtime_ns for name in finished for path in Path("out").rglob(f"{name}.*")}
    assert len(before) == 5 * len(finished)
    half = Path("out/masks/deep/7.png.4711.tmp")  # as a writer that was killed leaves it
    half.write_bytes(b"\x89PNG")

    Path("seen.txt").unlink()
    assert predict(*words, "out", "--resume") == 2  # for the one that is no picture
    shown = Path("seen.txt").read_text().split()
    assert sorted([*shown, *finished]) == [str(number) for number in range(8)]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert not list(Path("out").rglob("*.tmp"))
    assert predict(*words, "uninterrupted") == 2
    assert files_in(Path("out")) == files_in(Path("uninterrupted"))
    for name in files_in(Path("out")):
        if Path(name).parts[0] in ("masks", "overlays", "probabilities", "uncertainty"):
            assert Path("out", name).read_bytes() == Path("uninterrupted", name).read_bytes()
    rows, others = predictions(Path("out")), predictions(Path("uninterrupted"))
    for row in (*rows.values(), *others.values()):
        row.pop("seconds")
    assert rows == others and len(rows) == 9


def test_what_is_finished_and_unchanged_is_left_as_it_is(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(BEST)
    words = ("--checkpoint_path", BEST, "--input", data / "images", "--output", "out", "--resume")
    assert predict(*words) == 0
    shutil.copy(data / "images/0.png", data / "images/3.png")
    Path("out/masks/1.png").unlink()
    before = Path("out/masks/2.png").stat().st_mtime_ns
    capsys.readouterr()
    assert predict(*words) == 0
    assert "2 images predicted, 2 were there already" in capsys.readouterr().out
    assert Path("out/masks/2.png").stat().st_mtime_ns == before
    assert np.array_equal(read(Path("out/masks/3.png")), read(data / "masks/0.png"))


def test_work_that_begins_anew_with_other_images_leaves_no_outputs_of_the_old(data: Path) -> None:
    save(BEST)
    words = ("--checkpoint_path", BEST, "--output", "out", "--overlay", "--uncertainty", "--input")
    assert predict(*words, data / "images/0.png", data / "images/1.png") == 0
    assert predict(*words, data / "images/2.png") == 0
    outputs = [name for name in files_in(Path("out")) if "/" in name]
    assert outputs == ["masks/2.png", "overlays/2.png", "uncertainty/2.png", "uncertainty/2.tif"]
    assert list(predictions(Path("out"))) == ["2"]


def test_images_of_the_same_names_in_another_folder_are_predicted(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(BEST)
    for folder, source in (("one", "0"), ("two", "3")):
        Path(folder).mkdir()
        tifffile.imwrite(f"{folder}/a.tif", read(data / f"images/{source}.png"))
        os.utime(f"{folder}/a.tif", ns=(0, 0))
    assert Path("one/a.tif").stat().st_size == Path("two/a.tif").stat().st_size
    words = ("--checkpoint_path", BEST, "--output", "out", "--resume", "--input")
    assert predict(*words, "one") == 0
    assert predict(*words, "two") == 0
    assert np.array_equal(read(Path("out/masks/a.png")), read(data / "masks/3.png"))
    assert predict(*words, "two") == 0
    assert "0 images predicted, 1 w" in capsys.readouterr().out


def test_an_image_that_comes_while_others_are_predicted_is_predicted_again(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it was before it was read is not known."""

    class Arriving(ByBrightness):
        def forward(self, images: Tensor) -> Tensor:
            shutil.copy(data / "images/0.png", "late.tmp")
            Path("late.tmp").replace("late.png")  # whole, or not there
            return super().forward(images)

    MODEL_REGISTRY["arriving"] = lambda **section: Arriving()
    save(BEST, "arriving", **{"training.batch_size": 1})
    Path("scans").mkdir()
    for number in range(9):
        shutil.copy(data / "images/1.png", f"scans/{number}.png")
    Path("scans/9.png").symlink_to(Path("late.png").resolve())
    words = ("--checkpoint_path", BEST, "--input", "scans", "--output", "out", "--resume")
    assert predict(*words) == 0
    assert np.array_equal(read(Path("out/masks/9.png")), read(data / "masks/0.png"))
    capsys.readouterr()
    assert predict(*words) == 0
    assert "1 image predicted, 9 were there already" in capsys.readouterr().out


def test_what_a_kill_leaves_of_polygons_is_removed_and_what_is_not_ours_stays(data: Path) -> None:
    """Outlines of what is too large for the memory are drawn from files in a folder of their own."""
    pytest.importorskip("rasterio")
    Path("counted.py").write_text(DYING_IN_OUTLINES)
    save(BEST)
    words = ["--checkpoint_path", str(BEST), "--input", "data/images", "--polygons", "--output", "out"]
    paths = os.pathsep.join(sys.path)
    killed = subprocess.run(
        [sys.executable, "counted.py", *words], env={**os.environ, "PYTHONPATH": paths}, capture_output=True
    )
    assert killed.returncode == -9
    (left,) = (path.parent for path in Path("out").glob("*/labels.tif"))
    Path("out/tmpnotes").mkdir()
    assert predict(*words, "--resume") == 0
    assert not left.exists() and Path("out/tmpnotes").is_dir()


DYING_IN_OUTLINES = """
import os, sys
import known_networks
from ml_src.cli import inference
from ml_src.core.inference import planes, writers
from ml_src.core.network import MODEL_REGISTRY

MODEL_REGISTRY["by_brightness"] = lambda **section: known_networks.ByBrightness()
planes.IN_MEMORY = 0
writers.outlines = lambda *arrays: os.kill(os.getpid(), 9)
inference.main(sys.argv[1:])
"""


# --- --max_ram


@pytest.fixture
def strips(data: Path) -> list[Path]:
    """Images of more than one tile of 128 pixels, whose edges show in the labels."""
    save(BEST, "blurred", **{"training.batch_size": 1})
    Path("strips").mkdir()
    for number in range(2):
        write_gray(Path(f"strips/{number}.png"), 200, 700, seed=number)
    return sorted(Path("strips").iterdir())


def tile_of(out: str) -> int | None:
    tile: int | None = Journal.recorded_job(Path(out))["tile"]  # type: ignore[index]
    return tile


def test_work_with_max_ram_goes_on_with_the_tiles_with_which_it_began(
    strips: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--checkpoint_path", BEST, "--output", "out", "--max_ram", "100G", "--input")
    assert predict(*words, strips[0], "--tile", 128) == 0
    assert predict(*words, *strips, "--resume") == 0  # where larger ones would do
    assert "1 image predicted, 1 w" in capsys.readouterr().out
    assert tile_of("out") == 128
    assert predict("--checkpoint_path", BEST, "--output", "same", "--input", *strips, "--tile", 128) == 0
    assert Path("out/masks/1.png").read_bytes() == Path("same/masks/1.png").read_bytes()
    assert "other options (tile)" in refused(capsys, *words, *strips, "--resume", "--tile", 96)
    assert predict(*words, *strips) == 0  # anew, with those that the limit allows
    assert (tile_of("out") or 0) > 128


def test_work_without_max_ram_keeps_its_tiles_when_it_goes_on_with_it(
    strips: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--checkpoint_path", BEST, "--output", "out", "--input")
    assert predict(*words, strips[0]) == 0
    assert predict(*words, *strips, "--resume", "--max_ram", "100G") == 0
    assert "1 image predicted, 1 w" in capsys.readouterr().out
    assert tile_of("out") is None
    assert predict(*words, *strips, "--resume") == 0
    assert "other options (tile)" in refused(capsys, *words, *strips, "--resume", "--max_ram", "100G", "--tile", 512)


def test_a_limit_below_what_the_tiles_of_interrupted_work_take_is_refused(
    strips: list[Path], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = ("--checkpoint_path", BEST, "--input", *strips, "--output", "out")
    needed = refused(capsys, *words, "--max_ram", "1M")
    least = int(re.search(r"at least (\d+)M", needed)[1])  # type: ignore[index]
    assert predict(*words, "--tile", 4096) == 0
    before = Path("out/masks/0.png").stat().st_mtime_ns
    line = refused(capsys, *words, "--resume", "--max_ram", f"{least + 300}M")
    assert f"--max_ram {least + 300}M" in line and "4096" in line and "out" in line
    assert Path("out/masks/0.png").stat().st_mtime_ns == before and tile_of("out") == 4096


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_predictions_of_another_checkpoint_or_of_other_options_are_not_mixed_in(
    data: Path, capsys: pytest.CaptureFixture[str], resume: list[str]
) -> None:
    save(BEST)
    save(Path("other.pt"), "blurred")
    words = ("--input", data / "images", "--output", "out", *resume)
    assert predict("--checkpoint_path", BEST, *words) == 0
    assert "another checkpoint" in refused(capsys, "--checkpoint_path", "other.pt", *words)
    for option in (["--tile", "64"], ["--overlay"], ["--postprocess", "fill_holes"], ["--tta"]):
        assert "give another --output" in refused(capsys, "--checkpoint_path", BEST, *words, *option)
    assert predict("--checkpoint_path", BEST, *words, "--batch_size", 1) == 0  # on which nothing depends


# --- numbers and words


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--tile", "0"),
        ("--tile", "63"),
        ("--tile", "-64"),
        ("--overlap", "1"),
        ("--overlap", "0.95"),
        ("--overlap", "-0.1"),
        ("--overlap", "nan"),
        ("--batch_size", "0"),
        ("--tolerance", "0"),
        ("--tolerance", "nan"),
        ("--pixel_size", "-1"),
        ("--pixel_size", "inf"),
        ("--blend", "linear"),
        ("--tile", "many"),
        ("--save_probs", "png"),
        ("--device", "abacus"),
    ],
)
def test_a_value_that_cannot_be_is_one_sentence_that_names_it(
    data: Path, capsys: pytest.CaptureFixture[str], flag: str, value: str
) -> None:
    save(BEST)
    line = refused(capsys, "--checkpoint_path", BEST, "--input", data / "images", f"{flag}={value}")
    assert flag.strip("-") in line and value in line
    assert not (RUN / "inference").exists()


def test_tiles_are_rounded_up_to_multiples_of_32(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(BEST, "blurred")
    words = ("--checkpoint_path", BEST, "--input", data / "images", "--output", "out", "--resume")
    assert predict(*words, "--tile", 65, "--overlap", 0.9, "--blend", "cosine") == 0
    capsys.readouterr()
    assert predict(*words, "--tile", 96, "--overlap", 0.9, "--blend", "cosine") == 0
    assert "4 were there already" in capsys.readouterr().out


@pytest.mark.parametrize("how", [["--batch_size", "1"], ["--batch_size", "7"], ["--tta"], ["--tta", "--tta_aggregation",
                         "voting"], ["--tta_augmentations", "rotate_90", "transpose", "vertical_flip"]])  # fmt: skip
def test_what_must_change_nothing_changes_nothing(data: Path, how: list[str]) -> None:
    """The network sees 9 x 9 pixels, alike in all directions, so that no view differs from another."""
    save(BEST, "blurred")
    assert predict("--checkpoint_path", BEST, "--input", data / "images", "--output", "plain") == 0
    assert predict("--checkpoint_path", BEST, "--input", data / "images", "--output", "out", *how) == 0
    assert files_in(Path("out/masks")) == ["0.png", "1.png", "2.png", "3.png"]
    for name in files_in(Path("out/masks")):
        assert np.array_equal(read(Path("out/masks", name)), read(Path("plain/masks", name)))


def test_an_unknown_view_is_answered_with_the_nearest_one(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(BEST)
    words = ("--checkpoint_path", BEST, "--input", data / "images", "--tta_augmentations")
    assert "did you mean 'vertical_flip'?" in refused(capsys, *words, "verticalflip")
    assert "scale_9" in refused(capsys, *words, "scale_9")


def test_nothing_is_mirrored_where_left_and_right_are_classes(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(BEST, **{"data.mirror": False})
    words = ("--checkpoint_path", BEST, "--input", data / "images", "--output", "out")
    line = refused(capsys, *words, "--tta_augmentations", "rotate_180", "horizontal_flip", "scale_0.75")
    assert "data.mirror" in line and "horizontal_flip" in line and "scale_0.75" not in line
    assert "data.mirror" in refused(capsys, *words, "--tta")  # of which no view is left
    assert not Path("out").exists()
    assert predict(*words, "--tta_augmentations", "rotate_180") == 0


# --- ensembles


def test_an_ensemble_of_different_classes_is_refused_and_both_are_named(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(Path("a.pt"))
    save(Path("b.pt"), **{"data.class_names": ["background", "cell", "root"]})
    save(Path("c.pt"), **{"data.ignore_index": 7})
    line = refused(capsys, "--ensemble", "a.pt", "b.pt", "--input", data / "images")
    assert all(word in line for word in ("a.pt", "b.pt", "fibre", "root"))
    line = refused(capsys, "--ensemble", "a.pt", "c.pt", "--input", data / "images")
    assert all(word in line for word in ("a.pt", "c.pt", "ignore_index", "255", "7"))


@pytest.mark.parametrize(
    ("how", "winner"),
    [
        ([], 2),
        (["--ensemble_aggregation", "soft_voting"], 2),
        (["--ensemble_aggregation", "hard_voting"], 0),
        (["--ensemble_aggregation", "weighted", "--ensemble_weights", "1", "1", "0.1"], 0),
        (["--ensemble_aggregation", "weighted", "--ensemble_weights", "0", "1", "0"], 1),
    ],
)
def test_two_that_lean_and_one_that_is_sure_are_merged_as_asked(data: Path, how: list[str], winner: int) -> None:
    save(Path("a.pt"), "constant", [1.0, 0, 0])
    save(Path("b.pt"), "constant", [0.4, 0.5, 0] if "0" in how else [1.0, 0, 0])
    save(Path("c.pt"), "constant", [0.0, 0, 20])
    assert predict("--ensemble", "a.pt", "b.pt", "c.pt", *how, "--input", data / "images/0.png", "--output", "out") == 0
    assert (read(Path("out/masks/0.png")) == winner).all()


def test_the_folds_of_a_run_are_named_by_a_pattern_and_write_beside_them(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for fold in (0, 9, 10):
        save(Path(f"runs/cells_fold_{fold}/weights/best.pt"), **{"data.fold": fold})
    assert predict("--ensemble", "runs/cells_fold_*", "--input", data / "images") == 0
    require_right(Path("runs/cells_ensemble/inference/images"), data, ["0", "1", "2", "3"])
    assert predict("--ensemble", "runs/cells_fold_*", "--split", "test") == 0
    metrics = json.loads(Path("runs/cells_ensemble/inference/test/metrics.json").read_text())
    assert metrics["checkpoints"] == [f"runs/cells_fold_{fold}/weights/best.pt" for fold in (0, 9, 10)]
    assert metrics["iou"] == 1
    assert "Mean IoU: 1.0000" in capsys.readouterr().out


def test_an_ensemble_that_begins_with_the_run_in_which_one_stands_writes_beside_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fold in (0, 1):
        save(Path(f"runs/cells_fold_{fold}/weights/best.pt"))
    monkeypatch.chdir(RUN)
    other = tmp_path / "runs/cells_fold_1"
    assert predict("--ensemble", "weights/best.pt", other, "--input", tmp_path / "data/images/0.png") == 0
    assert files_in(tmp_path / "runs/cells_ensemble/inference/0/masks") == ["0.png"]


def test_loose_checkpoints_of_an_ensemble_write_beside_themselves(data: Path) -> None:
    save(Path("a.pt"))
    save(Path("b.pt"), "blurred")
    assert predict("--ensemble", "a.pt", "b.pt", "--input", data / "images/0.png") == 0
    assert files_in(Path("ensemble/inference/0/masks")) == ["0.png"]


@pytest.mark.parametrize(
    "how",
    [
        ["--ensemble_weights", "1", "2"],
        ["--ensemble_aggregation", "weighted"],
        ["--ensemble_aggregation", "weighted", "--ensemble_weights", "1"],
        ["--ensemble_aggregation", "weighted", "--ensemble_weights", "1", "-1"],
        ["--ensemble_aggregation", "weighted", "--ensemble_weights", "0", "0"],
        ["--ensemble_aggregation", "weighted", "--ensemble_weights", "1", "nan"],
        ["--ensemble_aggregation", "weighted", "--ensemble_weights", "inf", "1"],
    ],
)
def test_weights_go_with_weighted_and_are_one_number_a_checkpoint(
    data: Path, capsys: pytest.CaptureFixture[str], how: list[str]
) -> None:
    save(Path("a.pt"))
    save(Path("b.pt"), "blurred")
    line = refused(capsys, "--ensemble", "a.pt", "b.pt", *how, "--input", data / "images", "--output", "out")
    assert "--ensemble_weights" in line and not Path("out").exists()


def test_an_ensemble_of_folds_is_not_measured_on_what_one_of_them_has_learned(
    sample_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for fold in (0, 1):
        where = {"data.data_dir": str(sample_dir), "data.fold": fold}
        save(Path(f"runs/cells_fold_{fold}/weights/best.pt"), **where)
    for split in ("val", "train"):
        line = refused(capsys, "--ensemble", "runs/cells_fold_*", "--split", split, "--output", "out")
        assert "cells_fold_0" in line and "cells_fold_1" in line and "--split test" in line and "--cv" in line
    assert not Path("out").exists()
    assert predict("--ensemble", "runs/cells_fold_*", "--split", "test", "--output", "out") == 0


def test_networks_of_one_fold_are_measured_together_on_its_validation_images(data: Path) -> None:
    save(Path("a.pt"))
    save(Path("b.pt"))
    for split in ("val", "train"):
        assert predict("--ensemble", "a.pt", "b.pt", "--split", split, "--output", split) == 0
        assert json.loads(Path(split, "metrics.json").read_text())["iou"] == 1


# --- post-processing


@pytest.fixture
def speck(data: Path) -> Path:
    """An image of a cell with a hole of another class, and a speck of fibre outside of it."""
    gray = np.zeros((40, 40), np.uint8)
    gray[5:20, 5:20] = 128
    gray[10:12, 10:12] = 255  # the hole
    gray[30:33, 30:33] = 255  # the speck
    Image.fromarray(gray).save("speck.png")
    return Path("speck.png")


def hole_and_speck(*words: object) -> tuple[int, int]:
    """What becomes of the two: their classes."""
    shutil.rmtree("out", ignore_errors=True)
    assert predict(*words, "--output", "out") == 0
    mask = read(Path("out/masks/speck.png"))
    return int(mask[10, 10]), int(mask[31, 31])


def test_steps_of_the_command_line_are_done_in_order_and_none_stands_for_nothing(
    speck: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(BEST, **{"inference.postprocess": [{"type": "fill_holes"}]})
    words = ("--checkpoint_path", BEST, "--input", speck)
    assert hole_and_speck(*words) == (1, 2)  # the configuration's
    assert hole_and_speck(*words, "--postprocess", "none") == (2, 2)
    assert hole_and_speck(*words, "--postprocess", "remove_small,area=9") == (1, 2)
    assert hole_and_speck(*words, "--postprocess", "remove_small,area=10,classes=2") == (1, 0)
    assert hole_and_speck(*words, "--postprocess", "keep_largest", "fill_holes") == (1, 2)
    assert hole_and_speck(*words, "--postprocess", "opening,radius=2", "closing", "crf") == (1, 0)
    assert "did you mean 'fill_holes'?" in refused(capsys, *words, "--postprocess", "fil_holes")
    assert "class 3" in refused(capsys, *words, "--postprocess", "keep_largest,classes=3")


def test_the_tuned_chain_beside_a_checkpoint_is_used_from_then_on(
    speck: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(BEST, **{"inference.postprocess": [{"type": "fill_holes"}]})
    words = ("--checkpoint_path", BEST, "--input", speck)
    save_chain(BEST, [RemoveSmall(type="remove_small", area=10, classes=[2])], {})
    assert hole_and_speck(*words) == (1, 0)
    assert hole_and_speck(*words, "--postprocess", "none") == (2, 2)
    save_chain(BEST, [], {})  # tuning has found that nothing helps
    assert hole_and_speck(*words) == (2, 2)
    save_chain(BEST, [RemoveSmall(type="remove_small", area={7: 10})], {})
    assert "class 7" in refused(capsys, *words, "--output", "another")
    assert not Path("another").exists()


def test_members_with_different_chains_are_refused_until_one_is_given(
    speck: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for fold in (0, 1):
        save(Path(f"runs/cells_fold_{fold}/weights/best.pt"))
    words = ("--ensemble", "runs/cells_fold_*", "--input", speck)
    save_chain(BEST, [FillHoles(type="fill_holes")], {})
    assert "--postprocess" in refused(capsys, *words, "--output", "out")
    assert hole_and_speck(*words, "--postprocess", "fill_holes") == (1, 2)
    save_chain(Path("runs/cells_fold_1/weights/best.pt"), [FillHoles(type="fill_holes")], {})
    assert hole_and_speck(*words) == (1, 2)
    save(Path("a.pt"), **{"inference.postprocess": [{"type": "fill_holes"}]})
    save(Path("b.pt"))
    assert "--postprocess" in refused(capsys, "--ensemble", "a.pt", "b.pt", "--input", speck, "--output", "out2")


# --- a split


def test_a_split_is_measured_after_post_processing_and_the_report_says_how(data: Path) -> None:
    save(BEST)
    assert predict("--checkpoint_path", BEST, "--tile", 64, "--tta", "--save_probs", "--polygons",
                   "--pixel_size", 0.5, "--tolerance", 1) == 0  # fmt: skip
    out = RUN / "inference/test"
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["split"], metrics["num_images"], metrics["iou"]) == ("test", 4, 1)
    assert metrics["boundaries"]["tolerance"] == 1 and metrics["boundaries"]["pixel_size"] == 0.5
    assert metrics["how"]["tile"] == 64 and metrics["how"]["tta"] == ["horizontal_flip"]
    for kind, suffix in (("masks", "png"), ("overlays", "png"), ("probabilities", "tif"), ("polygons", "geojson")):
        assert files_in(out / kind) == [f"{number}.{suffix}" for number in range(4)]
    assert predict("--checkpoint_path", BEST, "--postprocess", "remove_small,area=100000", "--output", "worse") == 0
    assert json.loads(Path("worse/metrics.json").read_text())["iou"] < 1


def test_metrics_are_there_only_when_all_beside_them_is(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(BEST, **{"training.batch_size": 1})
    assert predict("--checkpoint_path", BEST, "--output", "out") == 0
    save(BEST, "interrupted", **{"training.batch_size": 1})
    assert predict("--checkpoint_path", BEST, "--output", "out") == 130
    assert not Path("out/metrics.json").exists()
    save(BEST)
    (data / "images/3.png").write_text("no picture")
    assert "data/images/3.png" in refused(capsys, "--checkpoint_path", BEST, "--output", "out")
    assert not Path("out/metrics.json").exists()


def test_the_report_names_the_weights_that_were_measured_and_planes_lie_beside_it(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those that training has saved meanwhile; and the system's temporary folder may be small."""

    class Replaced(ByBrightness):
        def forward(self, images: Tensor) -> Tensor:
            BEST.write_bytes(b"later weights")
            return super().forward(images)

    MODEL_REGISTRY["replaced"] = lambda **section: Replaced()
    weights = hashlib.sha256(save(BEST, "replaced").read_bytes()).hexdigest()
    monkeypatch.setattr(planes, "IN_MEMORY", 0)
    monkeypatch.setattr("tempfile.tempdir", "gone")
    assert predict("--checkpoint_path", BEST, "--output", "out") == 0
    assert json.loads(Path("out/metrics.json").read_text())["how"]["checkpoints"] == [weights]
    assert files_in(Path("out/masks")) == [f"{number}.tif" for number in range(4)]


def test_a_folder_holds_the_predictions_of_one_split_or_of_files(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(BEST)
    assert predict("--checkpoint_path", BEST, "--split", "val", "--output", "out") == 0
    assert "holds the predictions of val" in refused(capsys, "--checkpoint_path", BEST, "--output", "out")
    words = ("--checkpoint_path", BEST, "--input", data / "images/0.png", "--output")
    assert "--output" in refused(capsys, *words, "out")
    assert predict(*words, "files") == 0
    assert "--output" in refused(capsys, "--checkpoint_path", BEST, "--output", "files")


def test_what_a_killed_measurement_left_half_written_is_removed_by_the_next(data: Path) -> None:
    save(BEST)
    half = Path("out/masks/0.png.4711.tmp")
    half.parent.mkdir(parents=True)
    half.write_bytes(b"\x89PNG")
    assert predict("--checkpoint_path", BEST, "--output", "out") == 0
    assert not half.exists()


# --- flags that contradict each other


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--input", "data/images"], ["--checkpoint_path", "--ensemble", "--cv"]),
        ([], ["--checkpoint_path", "--ensemble", "--cv"]),
        (["--checkpoint_path", "a.pt", "--ensemble", "a.pt", "b.pt"], ["--checkpoint_path", "--ensemble"]),
        (["--checkpoint_path", "a.pt", "--input", "data/images", "--split", "val"], ["--input", "--split"]),
        (["--cv", "runs/*", "--input", "data/images"], ["--input", "--cv"]),
        (["--checkpoint_path", "a.pt", "--resume"], ["--resume", "--input"]),
        (["--checkpoint_path", "a.pt", "--strict"], ["--strict", "--input"]),
        (["--checkpoint_path", "a.pt", "--recursive", "--split", "test"], ["--recursive", "--input"]),
        (["--checkpoint_path", "a.pt", "--input"], ["--input"]),
        (["--checkpoint_path", "a.pt", "--inptu", "data/images"], ["--inptu", "--input"]),
        (["--checkpoint_path", "a.pt", "--input", "data/images", "--split", "all"], ["--split", "all"]),
    ],
)
def test_flags_that_contradict_each_other_are_one_sentence(
    data: Path, capsys: pytest.CaptureFixture[str], words: list[str], named: list[str]
) -> None:
    line = refused(capsys, *words)
    assert all(flag in line for flag in named)
    assert sorted(path.name for path in Path().iterdir()) == ["data"]


def test_what_is_no_checkpoint_is_one_sentence(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--input", data / "images")
    Path("text.pt").write_text("no checkpoint")
    Path("runs/empty_fold_0").mkdir(parents=True)
    assert "gone.pt does not exist" in refused(capsys, "--checkpoint_path", "gone.pt", *words)
    assert "text.pt is not a checkpoint" in refused(capsys, "--checkpoint_path", "text.pt", *words)
    assert "runs/empty_fold_0 has no" in refused(capsys, "--checkpoint_path", "runs/empty_fold_0", *words)
    assert "runs/x* fits no" in refused(capsys, "--ensemble", "runs/x*", *words)
