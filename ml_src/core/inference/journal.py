"""What of a prediction is finished: a line for each input, from which --resume goes on and predictions.csv is made.

OUT/.journal.jsonl begins with the job and grows by a line when all outputs of an input lie in their places. While
OUT/predictions.csv is there, all that lies beside it is whole. Next to read: `writers.py`.
"""

import codecs
import csv
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, NamedTuple

from ml_src.core.atomic import remove_leftovers, replacing, write_text
from ml_src.core.errors import ConfigError, DataError
from ml_src.core.inference.inputs import Input

JOURNAL = ".journal.jsonl"
PREDICTIONS = "predictions.csv"

Entry = dict[str, Any]  # a line of the journal


class Stamp(NamedTuple):
    """What changes when a file is written anew."""

    size: int  # bytes
    mtime: int  # nanoseconds


class Done(NamedTuple):
    """What is to be remembered of an input whose outputs are in their places."""

    stamp: Stamp | None  # taken before the input was read; None where it was not there yet
    height: int
    width: int
    pixels: Sequence[int]  # of each class, class 0 first
    pixels_nodata: int
    seconds: float
    files: Sequence[Path]  # its outputs, below the output folder
    pixel_area: float | None = None  # square units of its coordinates, where it has some


def stamp_of(path: Path) -> Stamp:
    """Return the stamp of a file.

    Raises: DataError where it is not there.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): replace the file or leave it out") from error
    return Stamp(status.st_size, status.st_mtime_ns)


def _size(path: Path) -> int | None:
    """Bytes of a file; None where it is not there."""
    return path.stat().st_size if path.is_file() else None


class Journal:
    """The finished inputs of a job, on the disk; of each only its name is held in memory.

    Args:
        output_dir: where the predictions go; made if it is not there.
        job: what the outputs depend on, as plain data: hashes of checkpoints, options. Not what they do not depend on,
            such as the batch size.
        resume: keep what is finished; otherwise the same job begins anew, and what the journal lists is removed.
            Without a journal both are the same.
        chosen: keys of the job that nobody asked for: what begins anew may differ in them.

    Raises: ConfigError where the folder holds predictions of another job.
    """

    def __init__(self, output_dir: Path, job: Mapping[str, Any], resume: bool, chosen: Collection[str] = ()) -> None:
        if output_dir.exists() and not output_dir.is_dir():
            raise ConfigError(f"{output_dir} is a file: give a folder with --output")
        output_dir.mkdir(parents=True, exist_ok=True)
        self.output_dir, self._path = output_dir, output_dir / JOURNAL
        self._lines: dict[str, int] = {}  # name of an input -> where its last line begins
        self._lock = Lock()  # those that are read and those that cannot be are recorded by different threads
        first = json.dumps({"job": job})
        known = self._path.exists()
        if known:
            self._require_same(json.loads(first)["job"], () if resume else chosen)
        remove_leftovers(output_dir)
        (output_dir / PREDICTIONS).unlink(missing_ok=True)
        if known and resume:
            self._lines, end = _read(self._path)
            os.truncate(self._path, end)
            return
        if known:  # and stays until all that it lists is gone, also after a kill
            with self._path.open("rb") as file:
                for line in file:
                    self._remove((_entry(line) or {}).get("files", ()))
        write_text(self._path, first + "\n")

    @staticmethod
    def recorded_job(output_dir: Path) -> Entry | None:
        """Return the job of the journal in a folder; None where there is no journal of ml-inference."""
        try:
            with (output_dir / JOURNAL).open("rb") as file:
                job = (_entry(file.readline()) or {}).get("job")
        except (FileNotFoundError, NotADirectoryError):
            return None
        return job if isinstance(job, dict) else None

    def _require_same(self, job: Entry, chosen: Collection[str]) -> None:
        before = self.recorded_job(self.output_dir)
        if before is None:
            raise ConfigError(f"{self._path} is no journal of ml-inference: give another --output or remove it")
        if key := _difference(before, job, chosen):
            raise ConfigError(
                f"{self.output_dir} holds the predictions of another checkpoint or other options ({key}): "
                "give another --output or remove it"
            )

    def finished(self, item: Input) -> bool:
        """Whether an input was predicted, has not changed since, and its outputs are still there."""
        if str(item.name) not in self._lines:
            return False
        entry = self._entry_of(str(item.name))
        if "error" in entry or any(_size(self.output_dir / name) != size for name, size in entry["files"].items()):
            return False
        try:
            same = stamp_of(item.path) == (entry["size"], entry["mtime"])
        except DataError:  # it has gone, which is for whoever reads it to say
            return False
        return same and str(item.path.resolve()) == entry.get("real")

    def record(self, item: Input, done: Done) -> None:
        """Remember a finished input. Its outputs are in their places, or a kill would leave it finished without."""
        self._append(
            {
                "name": str(item.name),
                "path": str(item.path),
                "real": str(item.path.resolve()),  # `path` may name another file from another folder
                "size": done.stamp and done.stamp.size,
                "mtime": done.stamp and done.stamp.mtime,
                "height": done.height,
                "width": done.width,
                "pixels": [int(count) for count in done.pixels],
                "pixels_nodata": int(done.pixels_nodata),
                "pixel_area": done.pixel_area,
                "seconds": round(done.seconds, 3),
                "files": {path.relative_to(self.output_dir).as_posix(): _size(path) for path in done.files},
            }
        )

    def record_error(self, item: Input, sentence: str) -> None:
        """Remember why an input could not be predicted; --resume tries again."""
        self._append({"name": str(item.name), "path": str(item.path), "error": sentence})

    def _append(self, entry: Entry) -> None:
        with self._lock, self._path.open("ab") as file:
            if entry["name"] in self._lines:
                self._remove(set(self._entry_of(entry["name"]).get("files", ())) - set(entry.get("files", ())))
            start = file.tell()
            file.write(json.dumps(entry).encode() + b"\n")
            self._lines[entry["name"]] = start

    def _entry_of(self, name: str) -> Entry:
        with self._path.open("rb") as file:
            return _entry_at(file, self._lines[name])

    def _remove(self, names: Iterable[str]) -> None:
        """Remove outputs of an earlier prediction, and nothing that is not below the output folder."""
        home = self.output_dir.resolve()
        for path in (self.output_dir / name for name in names):
            if path.is_file() and path.parent.resolve().is_relative_to(home):
                path.unlink()

    def finish(self, class_names: Sequence[str]) -> None:
        """Write predictions.csv: a line for each input in the journal, sorted by name.

        Columns: name, path, height, width, pixels_nodata, pixels_<class>; area_<class>, in square units of the input's
        coordinates, where an input has some; seconds, error. What an input does not have is empty.
        """
        columns = ["name", "path", "height", "width", "pixels_nodata", *(f"pixels_{name}" for name in class_names)]
        if any(entry.get("pixel_area") is not None for entry in self._entries()):
            columns += [f"area_{name}" for name in class_names]
        with replacing(self.output_dir / PREDICTIONS) as file:
            text = codecs.getwriter("utf-8")(file, "surrogateescape")  # a name need not be UTF-8
            writer = csv.DictWriter(text, [*columns, "seconds", "error"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(_row(entry, class_names) for entry in self._entries())

    def _entries(self) -> Iterator[Entry]:
        """Yield the last line of each input, sorted by name."""
        with self._path.open("rb") as file:
            for name in sorted(self._lines):
                yield _entry_at(file, self._lines[name])


def _difference(one: Mapping[str, Any], other: Mapping[str, Any], but: Collection[str]) -> str | None:
    """Return the first key whose values differ, but for some that may."""
    return next((key for key in {**other, **one} if key not in but and one.get(key) != other.get(key)), None)


def _read(path: Path) -> tuple[dict[str, int], int]:
    """Return where the last line of each input begins, and where the last whole line of the file ends."""
    lines: dict[str, int] = {}
    end = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):  # whoever wrote it was killed
                break
            name = (_entry(line) or {}).get("name")
            if name is not None:
                lines[name] = end
            end += len(line)
    return lines, end


def _entry(line: bytes) -> Entry | None:
    """Return what a line says; None for what no journal has, such as the zeros that a loss of power leaves."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _entry_at(file: BinaryIO, start: int) -> Entry:
    file.seek(start)
    entry: Entry = json.loads(file.readline())
    return entry


def _row(entry: Entry, class_names: Sequence[str]) -> Entry:
    """Return an input's line of predictions.csv, by column."""
    if "error" in entry:
        return entry
    row = {key: entry[key] for key in ("name", "path", "height", "width", "pixels_nodata", "seconds")}
    counts = dict(zip(class_names, entry["pixels"], strict=True))
    row |= {f"pixels_{name}": count for name, count in counts.items()}
    if (area := entry["pixel_area"]) is not None:
        row |= {f"area_{name}": format(count * area, ".12g") for name, count in counts.items()}
    return row
