"""What of a prediction is finished: after a kill at any moment, --resume ends with what an undisturbed run leaves."""

import csv
import json
import os
import signal
import tracemalloc
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from ml_src.core.atomic import replacing
from ml_src.core.errors import ConfigError, DataError
from ml_src.core.inference.inputs import Input, find_inputs
from ml_src.core.inference.journal import JOURNAL, PREDICTIONS, Done, Journal, Stamp, stamp_of

resource = pytest.importorskip("resource", reason="needs processes that can be killed")

JOB = {"checkpoints": ["ab12", "cd34"], "tta": ("horizontal_flip",), "tile": None}
CLASSES = ["background", "cell, dead"]


@pytest.fixture
def items(tmp_path: Path) -> list[Input]:
    """Five images, which are anything here: half of their bytes shall be class 0."""
    for number in range(5):
        path = tmp_path / "images" / f"deep_{number % 2}" / f"img_{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(10 + number))
    return find_inputs([str(tmp_path / "images")], True, None)


def write_output(out: Path, item: Input) -> Path:
    path = out / "masks" / f"{item.name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(item.path.read_bytes() * 2)
    return path


def done(item: Input, *files: Path, pixel_area: float | None = None) -> Done:
    stamp = stamp_of(item.path)
    return Done(stamp, 2, stamp.size, [stamp.size, stamp.size - 3], 3, 0.25, files, pixel_area)


def predict(
    items: list[Input], out: Path, resume: bool, before: Callable[[str, Input | None], object] = lambda *_: None
) -> int:
    """The shape of a real job: outputs, then the journal; return how many inputs it had to predict."""
    journal = Journal(out, JOB, resume)
    todo = [item for item in items if not journal.finished(item)]
    for item in todo:
        before("output", item)
        path = write_output(out, item)
        before("journal", item)
        journal.record(item, done(item, path))
    before("csv", None)
    journal.finish(CLASSES)
    return len(todo)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / PREDICTIONS).open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def lines_of(out: Path) -> list[Any]:
    return [json.loads(line) for line in (out / JOURNAL).read_text().splitlines()]


def in_killed_child(body: Callable[[], object]) -> None:
    """Run in a process of its own, which is to be ended by SIGKILL, or in the middle of a write by the system."""
    child = os.fork()
    if child == 0:
        try:
            body()
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXFSZ)


def end_in_a_write_beyond(size: int) -> None:
    """From here on the system ends this process as soon as a file has so many bytes: the rest is never written."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("moment", ["in an output", "before its line", "in its line", "in predictions.csv"])
def test_a_job_that_was_killed_and_resumed_leaves_what_an_undisturbed_one_does(
    moment: str, items: list[Input], tmp_path: Path
) -> None:
    predict(items, tmp_path / "expected", False)
    out = tmp_path / "out"

    def ends(step: str, item: Input | None) -> None:
        match moment, step, item == items[2]:
            case "in an output", "output", True:
                end_in_a_write_beyond(11)
            case "before its line", "journal", True:
                os.kill(os.getpid(), signal.SIGKILL)
            case "in its line", "journal", True:
                end_in_a_write_beyond((out / JOURNAL).stat().st_size + 40)
            case "in predictions.csv", "csv", _:
                end_in_a_write_beyond(70)

    in_killed_child(lambda: predict(items, out, False, ends))
    assert not (out / PREDICTIONS).exists()
    journal = Journal(out, JOB, True)
    num_finished = 5 if moment == "in predictions.csv" else 2
    assert [journal.finished(item) for item in items] == [True] * num_finished + [False] * (5 - num_finished)
    assert predict(items, out, True) == 5 - num_finished
    left = {name: data for name, data in files_in(out).items() if not name.endswith(".tmp")}
    assert left == files_in(tmp_path / "expected")


def test_a_journal_cut_at_any_byte_knows_the_inputs_whose_lines_are_whole(items: list[Input], tmp_path: Path) -> None:
    items = items[:2]
    predict(items, tmp_path, False)
    whole = (tmp_path / JOURNAL).read_bytes()
    for end in range(whole.index(b"\n") + 1, len(whole) + 1):
        (tmp_path / JOURNAL).write_bytes(whole[:end])
        num_finished = whole[:end].count(b"\n") - 1
        journal = Journal(tmp_path, JOB, True)
        assert [journal.finished(item) for item in items] == [True] * num_finished + [False] * (2 - num_finished)
        assert (tmp_path / JOURNAL).read_bytes() == whole[: whole.rfind(b"\n", 0, end) + 1]


def test_a_damaged_line_costs_its_input_only(items: list[Input], tmp_path: Path) -> None:
    """A loss of power leaves zeros in the middle of a file."""
    predict(items, tmp_path, False)
    lines = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)
    lines[2] = bytes(len(lines[2]) - 1) + b"\n"
    (tmp_path / JOURNAL).write_bytes(b"".join(lines))
    journal = Journal(tmp_path, JOB, True)
    assert [journal.finished(item) for item in items] == [True, False, True, True, True]


def test_an_input_is_finished_while_it_and_its_outputs_are_as_they_were(items: list[Input], tmp_path: Path) -> None:
    predict(items, tmp_path, False)
    longer, touched, lost, gone, same = items
    longer.path.write_bytes(longer.path.read_bytes() + b"x")
    os.utime(longer.path, ns=(0, 0))
    os.utime(touched.path, ns=(0, stamp_of(touched.path).mtime + 1000))
    (tmp_path / "masks" / f"{lost.name}.png").unlink()
    gone.path.unlink()
    journal = Journal(tmp_path, JOB, True)
    assert [journal.finished(item) for item in (longer, touched, lost, gone, same)] == [False] * 4 + [True]
    assert not journal.finished(Input(PurePosixPath("other"), same.path))
    with pytest.raises(DataError, match="cannot be read"):
        stamp_of(gone.path)


def test_another_file_of_the_same_name_size_and_time_is_not_finished(items: list[Input], tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict(items, out, False)
    (tmp_path / "images").rename(tmp_path / "others")
    others = find_inputs([str(tmp_path / "others")], True, None)
    assert [item.name for item in others] == [item.name for item in items]
    assert not any(Journal(out, JOB, True).finished(item) for item in others)
    (tmp_path / "images").symlink_to(tmp_path / "others")
    predict(others, out, True)
    assert all(Journal(out, JOB, True).finished(item) for item in items)  # the same files by another name


def test_the_same_name_may_stand_for_another_file_from_another_folder(
    items: list[Input], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "0.png").write_bytes(bytes(10))
        os.utime(tmp_path / place / "0.png", ns=(0, 7))
    monkeypatch.chdir(tmp_path / "one")
    predict([Input(PurePosixPath("0"), Path("0.png"))], tmp_path / "out", False)
    for place, finished in (("one", True), ("two", False)):
        monkeypatch.chdir(tmp_path / place)
        assert Journal(tmp_path / "out", JOB, True).finished(Input(PurePosixPath("0"), Path("0.png"))) == finished


def test_the_output_folder_may_be_moved(items: list[Input], tmp_path: Path) -> None:
    predict(items, tmp_path / "out", False)
    (tmp_path / "out").rename(tmp_path / "moved")
    assert predict(items, tmp_path / "moved", True) == 0


def test_an_input_that_changed_is_predicted_again_and_has_one_row(items: list[Input], tmp_path: Path) -> None:
    predict(items, tmp_path, False)
    items[1].path.write_bytes(bytes(77))
    assert predict(items, tmp_path, True) == 1
    widths = [row["width"] for row in rows_of(tmp_path)]
    assert len(widths) == 5 and widths[1] == "77"
    assert predict(items, tmp_path, True) == 0


def test_the_same_job_without_resume_begins_anew(items: list[Input], tmp_path: Path) -> None:
    predict(items, tmp_path, False)
    journal = Journal(tmp_path, JOB, False)
    assert not any(journal.finished(item) for item in items)
    assert not (tmp_path / PREDICTIONS).exists() and len(lines_of(tmp_path)) == 1
    assert predict(items, tmp_path, True) == 5


def test_what_begins_anew_leaves_no_output_of_what_was_before_and_all_else(items: list[Input], tmp_path: Path) -> None:
    predict(items[:3], tmp_path, False)
    predict(items[1:4], tmp_path, True)
    (tmp_path / "masks/deep_0/notes.txt").write_text("mine")
    predict(items[4:], tmp_path, False)
    masks = {name for name in files_in(tmp_path) if name.startswith("masks")}
    assert masks == {f"masks/{items[4].name}.png", "masks/deep_0/notes.txt"}


def test_nothing_outside_the_output_folder_is_removed(items: list[Input], tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict(items[:1], out, False)
    (out / "elsewhere").symlink_to(tmp_path / "images")
    inputs = {str(path.relative_to(tmp_path / "images")) for path in (tmp_path / "images").rglob("*.png")}
    names = ["", "..", "masks", *(f"{where}/{name}" for name in inputs for where in ("../images", "elsewhere"))]
    with (out / JOURNAL).open("a") as file:
        file.write(json.dumps({"name": "a", "files": [*names, str(items[0].path)]}) + "\n")
    Journal(out, JOB, False)
    assert files_in(tmp_path / "images").keys() == inputs and len(inputs) == 5
    assert not list((out / "masks").rglob("*.png"))


def test_an_output_that_an_input_no_longer_has_goes(items: list[Input], tmp_path: Path) -> None:
    """What was a map, and had a TIFF, became a picture, and then damaged."""
    journal = Journal(tmp_path, JOB, False)
    old = tmp_path / "masks/0.tif"
    old.parent.mkdir()
    old.touch()
    journal.record(items[0], done(items[0], old, write_output(tmp_path, items[0])))
    journal.record(items[0], done(items[0], write_output(tmp_path, items[0])))
    assert [name for name in files_in(tmp_path) if "masks" in name] == [f"masks/{items[0].name}.png"]
    journal.record_error(items[0], "damaged")
    assert [name for name in files_in(tmp_path) if "masks" in name] == []


def test_what_was_chosen_may_differ_in_what_begins_anew_but_not_in_what_goes_on(
    items: list[Input], tmp_path: Path
) -> None:
    assert Journal.recorded_job(tmp_path) is None
    predict(items, tmp_path, False)
    with pytest.raises(ConfigError, match=r"other options \(tile\)"):
        Journal(tmp_path, JOB | {"tile": 96}, True, ("tile",))
    with pytest.raises(ConfigError, match=r"other options \(overlap\)"):
        Journal(tmp_path, JOB | {"tile": 96, "overlap": 0.5}, False, ("tile",))
    assert Journal.recorded_job(tmp_path) == json.loads(json.dumps(JOB))
    Journal(tmp_path, JOB | {"tile": 96}, False, ("tile",))
    assert Journal.recorded_job(tmp_path) == json.loads(json.dumps(JOB | {"tile": 96}))
    (tmp_path / JOURNAL).write_text("notes\n")
    assert Journal.recorded_job(tmp_path) is None


def test_a_finished_job_is_no_longer_finished_while_it_is_resumed(items: list[Input], tmp_path: Path) -> None:
    predict(items, tmp_path, False)
    before = (tmp_path / PREDICTIONS).read_bytes()
    journal = Journal(tmp_path, JOB, True)
    assert not (tmp_path / PREDICTIONS).exists()
    journal.finish(CLASSES)
    assert (tmp_path / PREDICTIONS).read_bytes() == before


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"tta": ("vertical_flip",)}, "tta"),
        ({"tile": 256, "checkpoints": ["ab12"]}, "checkpoints"),
        ({"overlap": 0.5}, "overlap"),
    ],
)
def test_predictions_of_another_job_are_refused_and_stay(
    resume: bool, change: dict[str, Any], key: str, items: list[Input], tmp_path: Path
) -> None:
    predict(items, tmp_path, False)
    before = files_in(tmp_path)
    with pytest.raises(ConfigError) as caught:
        Journal(tmp_path, JOB | change, resume)
    assert str(caught.value) == (
        f"{tmp_path} holds the predictions of another checkpoint or other options ({key}): "
        "give another --output or remove it"
    )
    assert files_in(tmp_path) == before


def test_an_option_that_is_not_given_is_the_same_as_one_that_was_not_known(items: list[Input], tmp_path: Path) -> None:
    predict(items, tmp_path, False)
    assert Journal(tmp_path, JOB | {"later": None}, True).finished(items[0])
    assert Journal(tmp_path, {key: JOB[key] for key in ("tta", "checkpoints")}, True).finished(items[0])


@pytest.mark.parametrize("contents", [b"", b"notes\n", b"[1]\n", b'{"job": 3}\n', b'{"name": "a"}\n'])
def test_a_journal_that_is_none_of_ours_is_refused_and_stays(contents: bytes, tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_bytes(contents)
    with pytest.raises(ConfigError, match="is no journal of ml-inference: give another --output or remove it"):
        Journal(tmp_path, JOB, True)
    assert (tmp_path / JOURNAL).read_bytes() == contents


def test_a_file_in_the_place_of_the_output_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(ConfigError, match="out is a file: give a folder with --output"):
        Journal(tmp_path / "out", JOB, False)


def test_a_failed_input_has_its_sentence_and_is_tried_again(items: list[Input], tmp_path: Path) -> None:
    journal = Journal(tmp_path, JOB, False)
    for item in items[1:]:
        journal.record(item, done(item, write_output(tmp_path, item)))
    journal.record_error(items[0], 'img_0.png cannot be read, "cut off": replace it')
    journal.finish(CLASSES)
    first, second = rows_of(tmp_path)[:2]
    assert first == dict.fromkeys(first, "") | {
        "name": str(items[0].name),
        "path": str(items[0].path),
        "error": 'img_0.png cannot be read, "cut off": replace it',
    }
    assert second["error"] == ""
    assert predict(items, tmp_path, True) == 1
    assert [row["error"] for row in rows_of(tmp_path)] == [""] * 5


def test_predictions_csv_has_a_line_for_each_input_sorted_by_name(items: list[Input], tmp_path: Path) -> None:
    journal = Journal(tmp_path, JOB, False)
    for item in reversed(items):
        journal.record(item, done(item))
    journal.finish(CLASSES)
    columns = ["name", "path", "height", "width", "pixels_nodata", "pixels_background", "pixels_cell, dead"]
    values = []
    for item in items:
        size = item.path.stat().st_size
        values.append([str(item.name), str(item.path), "2", str(size), "3", str(size), str(size - 3), "0.25", ""])
    rows = rows_of(tmp_path)
    assert [list(row) for row in rows] == [[*columns, "seconds", "error"]] * 5
    assert [list(row.values()) for row in rows] == values == sorted(values)


def test_inputs_with_coordinates_have_areas_and_the_others_none(items: list[Input], tmp_path: Path) -> None:
    journal = Journal(tmp_path, JOB, False)
    for item, area in zip(items[:3], (None, 0.09, 1e-9), strict=True):
        journal.record(item, done(item, pixel_area=area))
    journal.record_error(items[3], "damaged")
    journal.finish(CLASSES)
    areas = [row["area_background"] for row in rows_of(tmp_path)]
    assert areas == ["", "1.08", "1.4e-08", ""]  # of 12 and 14 pixels
    assert list(rows_of(tmp_path)[0])[-4:] == ["area_background", "area_cell, dead", "seconds", "error"]


def test_a_name_that_is_no_utf_8_comes_back(tmp_path: Path) -> None:
    name = b"caf\xe9".decode(errors="surrogateescape")
    (tmp_path / f"{name}.png").touch()
    (item,) = find_inputs([str(tmp_path)], False, None)
    out = tmp_path / "out"
    journal = Journal(out, JOB, False)
    journal.record(item, Done(stamp_of(item.path), 1, 1, [1, 0], 0, 0.0, [write_output(out, item)]))
    journal = Journal(out, JOB, True)
    assert journal.finished(item)
    journal.finish(CLASSES)
    assert rows_of(out)[0]["name"] == name


def test_of_each_finished_input_little_more_than_its_name_is_held_in_memory(tmp_path: Path) -> None:
    Journal(tmp_path, JOB, False)
    entry = {"path": "p" * 200, "size": 1, "mtime": 2, "files": {"f" * 200: 1}, "pixels": [1] * 50}
    with (tmp_path / JOURNAL).open("a") as file:
        file.writelines(json.dumps({"name": f"folder/img_{number:06d}", **entry}) + "\n" for number in range(10_000))
    tracemalloc.start()
    try:
        journal = Journal(tmp_path, JOB, True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 250 * 10_000 < (tmp_path / JOURNAL).stat().st_size / 2
    assert not journal.finished(Input(PurePosixPath("folder/img_009999"), tmp_path / "gone.png"))


def test_a_stamp_is_of_the_file_before_it_was_read(items: list[Input], tmp_path: Path) -> None:
    """What changes while it is predicted is not finished."""
    journal = Journal(tmp_path, JOB, False)
    before = done(items[0], write_output(tmp_path, items[0]))
    items[0].path.write_bytes(bytes(99))
    journal.record(items[0], before)
    assert not journal.finished(items[0])
    assert before.stamp is not None and before.stamp == Stamp(10, before.stamp.mtime)


def test_an_input_that_came_after_stamps_were_taken_is_predicted_again(items: list[Input], tmp_path: Path) -> None:
    journal = Journal(tmp_path, JOB, False)
    journal.record(items[0], done(items[0], write_output(tmp_path, items[0]))._replace(stamp=None))
    journal.finish(CLASSES)
    assert rows_of(tmp_path)[0]["error"] == "" and not Journal(tmp_path, JOB, True).finished(items[0])


def test_an_output_that_was_cut_off_is_not_finished(tmp_path: Path) -> None:
    item = Input(PurePosixPath("a"), tmp_path / "a.png")
    item.path.write_bytes(b"image")
    mask = tmp_path / "out" / "a.png"
    journal = Journal(tmp_path / "out", JOB, False)
    mask.write_bytes(b"a whole mask")
    journal.record(item, Done(stamp_of(item.path), 1, 1, [1], 0, 0.1, [mask]))
    assert Journal(tmp_path / "out", JOB, True).finished(item)
    mask.write_bytes(b"a wh")
    assert not Journal(tmp_path / "out", JOB, True).finished(item)
