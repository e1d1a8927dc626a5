"""The processes of one training: who started them, how `relaunch` starts several here, and how they end together.

Not by torchrun: killed, it leaves its processes behind; stopped, it gives them 30 seconds to save; and the sentence of
an error drowns in its report. Next to read: `accelerate.py`.
"""

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ml_src.core.errors import ERROR_FILE, ConfigError, TrainingError

GRACE = 5.0  # seconds from being told to end until being killed, where nothing is worth waiting for
POLL = 0.05  # seconds
STOPPED = 130  # exit code after Ctrl-C
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def launched() -> bool:
    """Whether torchrun, `accelerate launch` or `relaunch` started this process: it must not start others itself."""
    # `accelerate launch` of one process sets neither RANK nor WORLD_SIZE
    return any(key in os.environ for key in ("RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"))


def world() -> tuple[int, int]:
    """Return (rank of this process, number of processes); (0, 1) where none of the launchers said otherwise.

    Raises: ConfigError if the environment contradicts itself.
    """
    return _place("RANK", "WORLD_SIZE")


def local_rank() -> int:
    """Return the rank among the processes of this machine: the index of this process's GPU."""
    return _place("LOCAL_RANK", "LOCAL_WORLD_SIZE")[0] if "LOCAL_WORLD_SIZE" in os.environ else world()[0]


def _place(rank_key: str, size_key: str) -> tuple[int, int]:
    words = os.environ.get(rank_key, "0"), os.environ.get(size_key, "1")
    try:
        rank, size = (int(word) for word in words)
    except ValueError:
        rank = size = 0
    if not 0 <= rank < size:
        raise ConfigError(
            f"the environment has {rank_key}={words[0]} and {size_key}={words[1]}: start with torchrun, or unset both"
        )
    return rank, size


def require_num_processes(asked: int | None, actual: int) -> None:
    """Check that as many processes run as `training.num_processes` asks for; None takes what there is.

    Raises: ConfigError with the command that starts them.
    """
    if asked is not None and asked != actual:
        torchrun = f"torchrun --standalone --local-addr 127.0.0.1 --nproc_per_node {asked} -m ml_src.cli.train --"
        raise ConfigError(
            f"training.num_processes is {asked} but {actual} {'was' if actual == 1 else 'were'} started: start plain "
            f"ml-train, or `{torchrun} ARGUMENTS` (`accelerate launch --cpu` starts one), or leave the key out"
        )


def relaunch(num_processes: int, program: Sequence[str], resume: str) -> int:
    """Run `python *program` as so many processes on this machine and return the exit code that stands for all of them.

    Each finds its place in the environment as under torchrun, a store on the loopback to meet at, and its share of the
    cores. The first one keeps the screen. Ctrl-C and SIGTERM reach each of them once, with all the time they need to
    save; a second one gives them five seconds. If one fails, the others are ended; if this process is killed, all are
    (on Linux).

    Args:
        num_processes: 2 or more.
        program: what follows `python` on the command line, such as -m ml_src.cli.train --config c.yaml.
        resume: the command that goes on with the run, for the sentence on a process that died.

    Returns: 0; 130 after Ctrl-C; or the exit code of the process that failed first, after its error has been shown.
    Raises: TrainingError for a process that a signal ended.
    """
    # bound here and handed over, so that nobody else can take the port and nobody outside can reach it
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    workers: list[_Worker] = []
    with tempfile.TemporaryDirectory(prefix="ml_src_") as folder, _collected(SIGNALS) as received:
        try:
            for rank in range(num_processes):
                workers.append(_start(rank, num_processes, store.port, program, Path(folder)))
            failed = _see_through(workers, received)
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.wait()
        if received and failed is not None and -failed.process.returncode in SIGNALS:
            failed = None  # it was stopped before it had set up its own handler
        if failed is not None:
            return _report(failed, num_processes, resume)
    return STOPPED if any(worker.code for worker in workers) else 0


@dataclass(frozen=True)
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    error_path: Path  # the line of an error of ours, where it had one
    stderr_path: Path  # everything else it said, but for rank 0

    @property
    def code(self) -> int | None:
        """The exit code, minus the signal that ended it, or None while it runs."""
        return self.process.poll()


def _start(rank: int, num_processes: int, port: int, program: Sequence[str], folder: Path) -> _Worker:
    error_path, stderr_path = folder / f"error_{rank}", folder / f"stderr_{rank}"
    environment = _environment(rank, num_processes, port) | {ERROR_FILE: str(error_path)}
    with stderr_path.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, *program],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=None if rank == 0 else subprocess.DEVNULL,
            stderr=None if rank == 0 else stderr,
            start_new_session=True,  # else a Ctrl-C would come from the terminal and from here
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    return _Worker(rank, process, error_path, stderr_path)


def _environment(rank: int, num_processes: int, port: int) -> dict[str, str]:
    """What torchrun would set, on top of what is set."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    ours = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here, not in rank 0
    }
    defaults = {"OMP_NUM_THREADS": str(max(1, cores // num_processes))}
    if loopback is not None:  # gloo would listen on the address of the machine's name
        defaults["GLOO_SOCKET_IFNAME"] = loopback
    return defaults | dict(os.environ) | ours


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with_parent() -> None:
    """Orphans would go on writing into the run's folder while its resume does too."""
    pr_set_pdeathsig = 1
    assert _LIBC is not None
    _LIBC.prctl(pr_set_pdeathsig, signal.SIGKILL)


@contextmanager
def _collected(numbers: Sequence[signal.Signals]) -> Iterator[list[int]]:
    """Collect the signals that come during the block, instead of dying of them."""
    received: list[int] = []

    def collect(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = [signal.signal(number, collect) for number in numbers]
    try:
        yield received
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _see_through(workers: Sequence[_Worker], received: Sequence[int]) -> _Worker | None:
    """Wait until all have ended, passing on the signals `received`; return the one whose failure ended the others."""
    failed, deadline, num_passed_on = None, math.inf, 0
    while running := [worker.process for worker in workers if worker.code is None]:
        for number in received[num_passed_on:]:
            num_passed_on += 1
            if num_passed_on == 2:
                deadline = time.monotonic() + GRACE
            for process in running:
                process.send_signal(number)
        if failed is None and (failed := _first_failure(workers)) is not None:
            deadline = time.monotonic() + GRACE
            for process in running:
                process.terminate()
        if time.monotonic() > deadline:
            return failed
        time.sleep(POLL)
    return failed or _first_failure(workers)


def _first_failure(workers: Sequence[_Worker]) -> _Worker | None:
    """Return the cause among the processes that failed, None if none did.

    The end of one makes the others fail too: with an error that is written later than its own, or by an abort.
    """

    def order(worker: _Worker) -> tuple[int, float]:
        if worker.process.returncode < 0:
            return (2 if worker.process.returncode == -signal.SIGABRT else 0), 0.0
        return 1, worker.error_path.stat().st_mtime if worker.error_path.exists() else math.inf

    return min((worker for worker in workers if worker.code not in (None, 0, STOPPED)), key=order, default=None)


def _report(failed: _Worker, num_processes: int, resume: str) -> int:
    """Show the error of the process that failed and return its exit code."""
    code = failed.process.returncode
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (as when memory runs out)" if -code == signal.SIGKILL else ""
        raise TrainingError(
            f"process {failed.rank} of {num_processes} was ended by {name}{hint}, so the others were stopped: "
            f"go on with {resume}"
        )
    path = failed.error_path if failed.error_path.exists() else failed.stderr_path
    sys.stderr.write(path.read_text(encoding="utf-8", errors="replace"))
    return code
