"""Processes that end with the one that started them, however that ends; their output goes into files."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

PATIENCE = 5.0  # seconds in which a child may end by itself
_PR_SET_PDEATHSIG = 1
_MAX_LOG = 10_000_000  # bytes, after which a log begins anew
_CHILD = "ml_src.core.federated.processes."


class Child:
    """One of our modules beside this one, as a process of its own session, so that Ctrl-C reaches only the parent.

    Start it in the main thread: Linux ends it when the thread that started it does.
    """

    def __init__(self, module: str, arguments: Sequence[str], log: Path) -> None:
        self.name, self.log = module, log
        if log.exists() and log.stat().st_size > _MAX_LOG:
            log.replace(log.with_name(f"{log.name}.old"))
        command = [sys.executable, "-m", _CHILD + module, str(os.getpid()), *arguments]
        with log.open("ab") as file:
            self.log_start = file.tell()
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def said(self) -> str:
        """Return what it has written since it was started."""
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            return file.read().decode("utf-8", errors="replace")

    def ask_to_end(self) -> None:
        """Send SIGTERM."""
        if self.running:
            self.process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """Make sure that it has ended."""
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def ending(children: list[Child]) -> Iterator[None]:
    """End all children that are in the list when the block ends."""
    try:
        yield
    finally:
        for child in children:
            child.ask_to_end()
        for child in children:
            child.end()


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt as Ctrl-C does, and Ctrl-C too where a shell has this process ignore it."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)


def end_with_parent(parent: int) -> None:
    """Have this process killed when its parent ends; call it first, in the child."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it has ended before it could be asked
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def parent_of_child() -> int:
    """Take the parent's number out of a child's arguments, and end with it."""
    parent = int(sys.argv.pop(1))
    end_with_parent(parent)
    return parent
