"""Does a run that is killed again and again end with the bits of one that was left alone?

Real ml-train processes on a small generated data set get SIGKILL while they start, at a step, and while they write a
checkpoint; some find last.pt damaged when they go on, some a full disk. `make crash` does it at length for every
trainer (about a minute each), `test_crash.py` in short. Next to read: `survive`.
"""

import argparse
import contextlib
import hashlib
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import yaml

from ml_src.cli import split
from ml_src.core.checkpoint import load_checkpoint, previous_of
from ml_src.core.data.sample import write_sample
from ml_src.core.errors import CheckpointError

# What is set for each trainer.
TRAINERS: dict[str, list[str]] = {
    "standard": [],
    "mixed_precision": ["training.trainer_type=mixed_precision"],
    "accelerate, 1 process": ["training.trainer_type=accelerate", "training.num_processes=1"],
    "accelerate, 2 processes": ["training.trainer_type=accelerate", "training.num_processes=2"],
    "dp": ["training.trainer_type=dp", "training.dp.noise_multiplier=1.0", "deterministic=true"],
}

CONFIG: dict[str, Any] = {
    "data": {"data_dir": "sample", "num_classes": 3},
    "model": {"base_channels": 8, "dropout": 0.3},  # a checkpoint of 8 MB: its write can be hit
    "loss": {"type": "dice_bce_loss"},
    "training": {"device": "cpu", "batch_size": 2, "num_workers": 0, "ema": 0.9, "checkpoint_every": "1steps"},
    "transforms": {
        "train": [
            {"type": "random_horizontal_flip"},
            {"type": "random_rotation", "degrees": 20},
            {"type": "normalize", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
        ],
    },
}

PATIENCE = 300.0  # seconds for anything that a process is waited for
POLL = 0.0005  # seconds: a write takes some hundredths


@dataclass(frozen=True)
class Crash:
    """How a process ends, and what its last.pt suffers then: `cut` in half, or left between the two renames."""

    how: Literal["start", "step", "write", "full disk"]
    then: Literal["", "cut", "between renames"] = ""


LONG = (
    Crash("start"),
    Crash("step"),
    Crash("step", then="cut"),
    Crash("step", then="between renames"),
    Crash("write"),
    Crash("write"),
    Crash("write"),
    Crash("full disk"),
)


@dataclass
class Result:
    """What a run went through; `equal` is `yes`, or names what differs."""

    trainer: str
    kills: int = 0
    in_a_write: int = 0
    full_disks: int = 0
    damaged: int = 0
    resumes: int = 0
    left_over: int = 0  # temporary files
    equal: str = ""
    seconds: float = 0.0


class Process(Protocol):
    """What is needed of an ml-train process; subprocess.Popen has it."""

    returncode: int | None

    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def communicate(self, *, timeout: float) -> tuple[Any, str]: ...


Start = Callable[[list[str], Path], Process]


def started(words: list[str], folder: Path) -> Process:
    """Start `ml-train *words` in a folder, as a user does."""
    return subprocess.Popen(
        [sys.executable, "-m", "ml_src.cli.train", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # sums are rounded as the threads share them
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def survive(
    trainer: str, crashes: Sequence[Crash], folder: Path, num_epochs: int, seed: int = 0, start: Start = started
) -> Result:
    """Run once in peace and once through the crashes, in an empty folder; compare what the last checkpoints hold.

    Args:
        start: starts `ml-train` with those words in that folder.

    Raises: AssertionError where a process does not behave.
    """
    t0, rng, result = time.monotonic(), random.Random(f"{seed} {trainer}"), Result(trainer)
    prepare(folder)
    new = ["--config", "small.yaml", "--num_epochs", str(num_epochs)]
    new += ["--set", *TRAINERS[trainer]] if TRAINERS[trainer] else []
    whole, run_dir = folder / "runs/whole_fold_0", folder / "runs/crashed_fold_0"
    pace = leave_alone(start, folder, [*new, "--run_name", "whole"], whole)
    num_steps = load_checkpoint(whole / "weights/last.pt")["step"]

    def begin() -> tuple["Observed", int]:
        """Start the run or go on with it; return also at which step."""
        source = resumable(run_dir)
        if source is None:  # it was killed before its first checkpoint
            return Observed(start, folder, [*new, "--run_name", "crashed"], run_dir / "weights"), 0
        result.resumes += 1
        words, falls_back = ["--resume", str(run_dir)], source.name != "last.pt"
        run = Observed(start, folder, words, run_dir / "weights", falls_back)
        return run, load_checkpoint(source)["step"]

    left = list(crashes)
    while left:
        crash, (run, step) = left[0], begin()
        share = (num_steps - step) // len(left)
        num_saves = rng.randint(1, max(1, share - 2))  # no crash takes more than two besides
        hit = run.crash(crash.how, num_saves + (step == 0), pace, rng)  # a new run saves before its first step
        result.kills += crash.how != "full disk"
        result.full_disks += crash.how == "full disk"
        result.in_a_write += hit and crash.how == "write"
        last = run_dir / "weights/last.pt"
        if not hit or (crash.then and not last.exists()):  # the write was just over, or just between its renames
            continue  # once more
        if crash.then:
            damage(last, crash.then)
            result.damaged += 1
        left.pop(0)
    run, _ = begin()
    errors = run.wait()
    assert run.process.returncode == 0, errors
    expected, found = hashes(whole), hashes(run_dir)
    differing = [key for key in expected if found[key] != expected[key]]
    result.equal = f"NO: {', '.join(differing)}" if differing else "yes"
    result.left_over = len(list(run_dir.rglob("*.tmp")))
    result.seconds = time.monotonic() - t0
    return result


def prepare(folder: Path) -> None:
    """Write a data set of 16 images of 64x64 (9 of them to train on) and the configuration."""
    data = folder / "sample"
    write_sample(data, num_images=16, height=64, width=64)
    paths = ["--raw_data", str(data / "images"), "--mask_data", str(data / "masks")]
    with contextlib.redirect_stdout(io.StringIO()):
        assert split.main([*paths, "--folds", "3", "--task", "segmentation"]) == 0
    (folder / "small.yaml").write_text(yaml.safe_dump(CONFIG))


@dataclass(frozen=True)
class Pace:
    """How long an undisturbed run takes, in seconds."""

    start: float
    step: float


def leave_alone(start: Start, folder: Path, words: list[str], run_dir: Path) -> Pace:
    """Run to the end."""
    t0 = time.monotonic()
    run = Observed(start, folder, words, run_dir / "weights")
    saved: list[float] = []
    while run.process.poll() is None and time.monotonic() - t0 < PATIENCE:
        if run.look() > len(saved):
            saved.append(time.monotonic())
        time.sleep(POLL)
    errors = run.wait()
    assert run.process.returncode == 0, errors
    return Pace(start=saved[0] - t0, step=(saved[-1] - saved[0]) / (len(saved) - 1))


@dataclass
class Observed:
    """An ml-train process, and what can be seen of it from outside: its weights folder."""

    start: Start
    folder: Path
    words: list[str]
    weights: Path
    falls_back: bool = False  # to last.previous.pt, and must say so
    num_saves: int = 0
    process: Process = field(init=False)

    def __post_init__(self) -> None:
        self._seen, self._old = identity(self.weights / "last.pt"), set(self.weights.glob("*.tmp"))
        self.process = self.start(self.words, self.folder)

    def look(self) -> int:
        """Return how often this process has replaced last.pt, as far as one has looked."""
        now = identity(self.weights / "last.pt")
        if now is not None and now != self._seen:
            self._seen = now
            self.num_saves += 1
        return self.num_saves

    def crash(self, how: str, num_saves: int, pace: Pace, rng: random.Random) -> bool:
        """End the process after so many saves; return whether it was where it should be."""
        if how == "start":
            deadline = time.monotonic() + rng.random() * pace.start
            self._until(lambda: time.monotonic() > deadline or self.look())  # a start may be quicker than the first
            self.process.kill()
            self.wait()
            return True
        self._until(lambda: self.look() >= num_saves)
        if how == "step":
            time.sleep(rng.random() * pace.step)
            assert self.process.poll() is None, "the run was over before it could be killed"
            self.process.kill()
            self.wait()
            return True
        if how == "write":
            return self._kill_in_a_write(rng.random() * 0.9)
        self._fill_the_disk()
        return True

    def wait(self) -> str:
        """Return what the process has written to stderr when it, and whoever holds its stderr, has ended."""
        try:
            errors = self.process.communicate(timeout=PATIENCE)[1]
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"it did not end within {PATIENCE:g} seconds") from None
        assert "Traceback" not in errors, errors
        if self.falls_back and self.num_saves:
            assert "going on from the one before it, last.previous.pt" in errors, errors
        return errors

    def _kill_in_a_write(self, share: float) -> bool:
        """Kill whoever writes a checkpoint once that share of it is written; return whether it was still at it."""
        size = share * (self.weights / "last.pt").stat().st_size
        temporary, _ = self._until(lambda: next((w for w in self._writes() if w[1] >= size), None))
        os.kill(writer(temporary), signal.SIGKILL)
        self.wait()
        return temporary.exists()

    def _fill_the_disk(self) -> None:
        """From now on no file can become as large as a checkpoint; the process must end by itself, in good order."""
        temporary, _ = self._until(lambda: next(self._writes(), None))
        self._until(lambda: not temporary.exists())
        limit = (self.weights / "last.pt").stat().st_size // 2
        resource.prlimit(writer(temporary), resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        errors = self.wait()
        assert self.process.returncode == 2, f"exit code {self.process.returncode}: {errors}"
        sentence = errors.splitlines()[-1]
        assert sentence.startswith("error: ") and "weights/" in sentence and "File too large" in sentence, errors
        assert set(self.weights.glob("*.tmp")) <= self._old
        load_checkpoint(self.weights / "last.pt")

    def _writes(self) -> Iterator[tuple[Path, int]]:
        """Each file that is being written by this run: its path and size in bytes."""
        for path in self.weights.glob("*.tmp"):
            if path not in self._old:
                try:
                    yield path, path.stat().st_size
                except FileNotFoundError:
                    continue

    def _until(self, happened: Callable[[], Any]) -> Any:
        """Look again and again until there is an answer, and return it."""
        deadline = time.monotonic() + PATIENCE
        while not (answer := happened()):
            assert self.process.poll() is None, f"it ended too early: {self.wait()}"
            if time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"nothing happened for {PATIENCE:g} seconds")
            time.sleep(POLL)
        return answer


def identity(path: Path) -> tuple[int, int] | None:
    """What changes when another file takes the name."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def writer(temporary: Path) -> int:
    """Return the process that `last.pt.<pid>.tmp` names."""
    return int(temporary.name.split(".")[-2])


def damage(last: Path, how: str) -> None:
    """Do to last.pt what a failing disk, or a kill between two renames, does."""
    if how == "cut":
        os.truncate(last, last.stat().st_size // 2)
    else:
        last.replace(previous_of(last))


def resumable(run_dir: Path) -> Path | None:
    """Return the checkpoint from which a run can go on: last.pt, else the one before it, else None."""
    last = run_dir / "weights/last.pt"
    for path in (last, previous_of(last)):
        with contextlib.suppress(CheckpointError):
            load_checkpoint(path)
            return path
    return None


def hashes(run_dir: Path) -> dict[str, str]:
    """Return a hash of each thing that must not depend on crashes."""
    last, best = (load_checkpoint(run_dir / "weights" / name) for name in ("last.pt", "best.pt"))
    return {
        "weights": sha256(last["raw_state_dict"]),
        "average": sha256(last["model_state_dict"]),
        "optimizer": sha256(last["optimizer_state_dict"]),
        "best": sha256(best["model_state_dict"]),
        "metrics": sha256({key: value for key, value in last["metrics"].items() if key.startswith(("train", "val"))}),
    }


def sha256(state: Any) -> str:
    """Hash names, types, shapes and bytes of the tensors in nested containers, sorted by name, and all other values."""
    digest = hashlib.sha256()
    for name, value in sorted(leaves(state)):
        digest.update(f"{name}\n".encode() + value)
    return digest.hexdigest()


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, bytes]]:
    if isinstance(value, dict):
        for key in value:
            yield from leaves(value[key], f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, element in enumerate(value):
            yield from leaves(element, f"{name}.{index}")
    elif isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        yield f"{name} {value.dtype} {tuple(value.shape)}", raw
    else:
        yield name, repr(value).encode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, default=list(TRAINERS), metavar="NAME")
    parser.add_argument("--num_epochs", type=int, default=10, help="of 3 to 5 steps each")
    parser.add_argument("--seed", type=int, default=0, help="of when and in which order the crashes come")
    args = parser.parse_args()
    results = []
    folder = Path(tempfile.mkdtemp(prefix="crash_"))
    for trainer in args.trainers:
        crashes = list(LONG)
        random.Random(f"{args.seed} {trainer}").shuffle(crashes)
        print(f"{trainer}: {', '.join(f'{c.how} {c.then}'.strip() for c in crashes)} ...", file=sys.stderr, flush=True)
        (folder / trainer).mkdir()
        try:
            results.append(survive(trainer, crashes, folder / trainer, args.num_epochs, args.seed))
        except Exception as error:  # whatever it is, the other trainers have their turn
            print(f"{error!r}", file=sys.stderr)
            results.append(Result(trainer, equal="NO: it did not get there, see above"))
    print(table(results))
    if all(result.equal == "yes" for result in results):
        shutil.rmtree(folder)
        return 0
    print(f"The runs are kept in {folder}.")
    return 1


def table(results: Sequence[Result]) -> str:
    rows = [{key.replace("_", " "): str(value) for key, value in asdict(result).items()} for result in results]
    for row, result in zip(rows, results, strict=True):
        row["seconds"] = f"{result.seconds:.0f}"
    rows = [{key: key for key in rows[0]}, *rows]
    widths = {key: max(len(row[key]) for row in rows) for key in rows[0]}
    return "\n".join("  ".join(row[key].ljust(width) for key, width in widths.items()).rstrip() for row in rows)


if __name__ == "__main__":
    raise SystemExit(main())
