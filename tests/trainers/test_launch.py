"""Small real programs in two real processes: where they find themselves, and how they end together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ml_src.core.errors import ConfigError, TrainingError
from ml_src.core.trainers import launch

KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS")
PRELUDE = """
import os, pathlib, signal, sys, time
rank, folder = int(os.environ["RANK"]), pathlib.Path(sys.argv[1])
def here(name):  # whole or not there
    (folder / f"{name}{rank}.tmp").write_text(str(os.getpid()))
    (folder / f"{name}{rank}.tmp").rename(folder / f"{name}{rank}")
def wait_for(name):
    while not (folder / name).exists():
        time.sleep(0.01)
"""


@pytest.fixture(autouse=True)
def _not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)


def program(folder: Path, body: str) -> list[str]:
    """The words after `python` for a program whose processes know `rank` and share `folder`."""
    path = folder / "program.py"
    path.write_text(PRELUDE + body)
    return [str(path), str(folder)]


def alive(pid: int) -> bool:
    """Whether it runs; a zombie that nobody has fetched does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def pid_in(path: Path) -> int:
    """Wait for a process to say that it has come so far; 60 s is much more than it takes."""
    for _ in range(6000):
        if path.exists():
            return int(path.read_text())
        time.sleep(0.01)
    raise AssertionError(f"{path} was never written")


def gone(pid: int) -> bool:
    """Whether it ends soon."""
    for _ in range(2000):
        if not alive(pid):
            return True
        time.sleep(0.01)
    return False


def test_a_process_that_nobody_launched_is_the_only_one() -> None:
    assert not launch.launched()
    assert launch.world() == (0, 1)
    assert launch.local_rank() == 0


@pytest.mark.parametrize("key", ["RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"])
def test_torchrun_and_accelerate_launch_are_recognised(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(key, "1")
    assert launch.launched()


def test_the_place_on_a_second_machine_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(key, value)
    assert launch.world() == (5, 8)
    assert launch.local_rank() == 1


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("a", "2"), ("1", None)])
def test_an_environment_that_contradicts_itself_is_refused(
    rank: str, size: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ConfigError, match=f"RANK={rank} and WORLD_SIZE={size or 1}: start with torchrun"):
        launch.world()


def test_another_number_of_processes_than_asked_for_is_refused_with_the_command() -> None:
    launch.require_num_processes(None, 3)
    launch.require_num_processes(2, 2)
    with pytest.raises(ConfigError, match=r"num_processes is 2 but 1 was started: .*--nproc_per_node 2 .*starts one"):
        launch.require_num_processes(2, 1)


def test_processes_meet_over_gloo_and_share_the_cores(tmp_path: Path) -> None:
    body = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
(folder / f"out{rank}").write_text(" ".join([str(total.item()), *(os.environ[key] for key in keys)]))
dist.destroy_process_group()
"""
    assert launch.relaunch(2, program(tmp_path, body), "") == 0
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert (tmp_path / "out0").read_text() == f"3.0 0 2 0 2 127.0.0.1 {threads}"
    assert (tmp_path / "out1").read_text() == f"3.0 1 2 1 2 127.0.0.1 {threads}"


def test_only_the_first_process_has_the_screen(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = "print('out', rank); print('log', rank, file=sys.stderr)"
    assert launch.relaunch(2, program(tmp_path, body), "") == 0
    assert capfd.readouterr() == ("out 0\n", "log 0\n")


@pytest.mark.parametrize("culprit", [0, 1])
def test_the_sentence_of_an_error_is_shown_once_although_the_other_process_fails_too(
    culprit: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The other one is in the middle of a sum over both, and fails because its partner has gone."""
    body = f"""
import torch, torch.distributed as dist
def fail(sentence, code):
    pathlib.Path(os.environ["{launch.ERROR_FILE}"]).write_text(sentence)
    os._exit(code)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # else it may be ended before it has seen anything
dist.init_process_group("gloo")
try:
    dist.barrier()
    if rank == {culprit}:
        fail("error: masks/img7.png has values [0, 255]\\n", 2)
    dist.all_reduce(torch.zeros(1))
except RuntimeError as error:
    here("saw")
    fail(f"unexpected error: {{error}}\\n", 1)
"""
    assert launch.relaunch(2, program(tmp_path, body), "") == 2
    assert (tmp_path / f"saw{1 - culprit}").exists()
    assert capfd.readouterr().err == "error: masks/img7.png has values [0, 255]\n"


def test_an_error_that_every_process_has_is_shown_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = f"pathlib.Path(os.environ['{launch.ERROR_FILE}']).write_text('error: no such file\\n'); sys.exit(2)"
    assert launch.relaunch(2, program(tmp_path, body), "") == 2
    assert capfd.readouterr().err == "error: no such file\n"


def test_a_traceback_of_a_process_without_the_screen_is_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = "time.sleep(600) if rank == 0 else 1 / 0"
    assert launch.relaunch(2, program(tmp_path, body), "") == 1
    assert capfd.readouterr().err.rstrip().endswith("ZeroDivisionError: division by zero")


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_process_that_is_killed_ends_the_other_and_is_named(
    culprit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one hangs and will not hear of SIGTERM."""
    monkeypatch.setattr(launch, "GRACE", 0.1)
    body = f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
here("ready")
wait_for(f"ready{{1 - rank}}")
os.kill(os.getpid(), signal.SIGKILL) if rank == {culprit} else time.sleep(600)
"""
    sentence = rf"^process {culprit} of 2 was ended by SIGKILL .*: go on with ml-train --resume runs/x$"
    with pytest.raises(TrainingError, match=sentence):
        launch.relaunch(2, program(tmp_path, body), "ml-train --resume runs/x")
    assert not alive(int((tmp_path / f"ready{1 - culprit}").read_text()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_each_process_once_and_leaves_it_time_to_save(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Saving takes longer here than the time that a process is given after an error."""
    monkeypatch.setattr(launch, "GRACE", 0.1)
    body = f"""
received = []
signal.signal({number}, lambda number, frame: received.append(number))
here("ready")
wait_for(f"ready{{1 - rank}}")
if rank == 0:
    os.kill(os.getppid(), {number})
while not received:
    time.sleep(0.01)
time.sleep(0.5)
(folder / f"saved{{rank}}").write_text(str(received))
sys.exit(130)
"""
    assert launch.relaunch(2, program(tmp_path, body), "") == 130
    assert [(tmp_path / f"saved{rank}").read_text() for rank in range(2)] == [f"[{int(number)}]"] * 2
    assert capfd.readouterr() == ("", "")


def test_a_second_signal_ends_processes_that_do_not_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.1)
    body = """
signal.signal(signal.SIGINT, lambda number, frame: here("heard"))
here("ready")
wait_for(f"ready{1 - rank}")
if rank == 0:
    os.kill(os.getppid(), signal.SIGINT)
    wait_for("heard0")
    wait_for("heard1")
    os.kill(os.getppid(), signal.SIGINT)
time.sleep(600)
"""
    assert launch.relaunch(2, program(tmp_path, body), "") == 130
    assert not any(alive(pid_in(tmp_path / f"ready{rank}")) for rank in range(2))


def test_a_signal_before_the_program_listens_ends_it_as_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One dies of the signal, the other would wait for it for ever."""
    monkeypatch.setattr(launch, "GRACE", 0.1)
    body = """
if rank == 0:
    signal.signal(signal.SIGTERM, lambda number, frame: None)
here("ready")
wait_for(f"ready{1 - rank}")
if rank == 0:
    os.kill(os.getppid(), signal.SIGTERM)
time.sleep(600)
"""
    assert launch.relaunch(2, program(tmp_path, body), "") == 130
    assert capfd.readouterr() == ("", "")


def test_the_handlers_of_this_process_are_back_afterwards(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in launch.SIGNALS]
    launch.relaunch(2, program(tmp_path, ""), "")
    assert [signal.getsignal(number) for number in launch.SIGNALS] == before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_processes_do_not_outlive_a_launcher_that_is_killed(tmp_path: Path) -> None:
    words = program(tmp_path, "here('ready'); time.sleep(600)")
    code = f"from ml_src.core.trainers.launch import relaunch; relaunch(2, {words!r}, '')"
    with subprocess.Popen([sys.executable, "-c", code]) as launcher:
        pids = [pid_in(tmp_path / f"ready{rank}") for rank in range(2)]
        launcher.kill()
    assert all(gone(pid) for pid in pids)
