"""Processes that need not import torch again: forks of one that has imported it, and is started once.

Each is a process of its own with its own memory, folder and end: it can be killed, and it exits as a command does.
Run as a program, this file imports what its words name and forks for each order that comes through its socket.
"""

import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any

HELD_BACK = ("torch", "torch._dynamo", "torch._inductor.config", "torch.utils.tensorboard", "ml_src.core.trainers")
"""What each training imports, some of it not before its first step."""


class Forks:
    """A process that is ready to be forked; ended with the block.

    Args:
        modules: what it imports besides what each training does.
        folders: where else than beside this file modules are looked for.
    """

    def __init__(self, *modules: str, folders: Sequence[Path] = ()) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), *HELD_BACK, *modules],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, folders))},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._socket.close()
        self._process.wait()

    def start(self, function: str, argument: Any, folder: Path) -> "Forked":
        """Call `module:function` with plain data in a fork, in a folder; it ends with what the function returns."""
        stderr, their_stderr = os.pipe()
        said, told = os.pipe()
        order = json.dumps({"function": function, "argument": argument, "folder": str(folder)}).encode()
        socket.send_fds(self._socket, [order], [their_stderr, told])
        os.close(their_stderr)
        os.close(told)
        return Forked(stderr, said)


class Forked:
    """One of the processes, with the methods of subprocess.Popen that the tests use; its stdout goes nowhere."""

    def __init__(self, stderr: int, said: int) -> None:
        self._stderr, self._said = stderr, os.fdopen(said, buffering=1)
        self.returncode: int | None = None
        self.pid = int(self._said.readline())

    def poll(self) -> int | None:
        """Return the exit code, minus the signal that ended it, or None while it runs."""
        if self.returncode is None and select.select([self._said], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        """Return the exit code when it has ended."""
        if self.returncode is None:
            self.returncode = int(self._said.readline())
            self._said.close()
        return self.returncode

    def kill(self) -> None:
        """Send signal 9."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def communicate(self, timeout: float) -> tuple[None, str]:
        """Return what was written to stderr when the process, and whoever else holds its stderr, has ended.

        Raises: TimeoutExpired after so many seconds.
        """
        pieces, end = [], time.monotonic() + timeout
        while True:
            if not select.select([self._stderr], [], [], max(0, end - time.monotonic()))[0]:
                raise subprocess.TimeoutExpired("fork", timeout)
            piece = os.read(self._stderr, 1 << 16)
            if not piece:
                break
            pieces.append(piece)
        os.close(self._stderr)
        self.wait()
        return None, b"".join(pieces).decode()


def serve(channel: socket.socket) -> None:
    """Do each order in a fork, until no more will come and all have ended."""
    while True:
        order, descriptors, _, _ = socket.recv_fds(channel, 1 << 20, 2)
        if not order:
            break
        if os.fork() == 0:
            channel.close()
            see_through(json.loads(order), *descriptors)
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
    with suppress(ChildProcessError):
        while os.wait():
            pass


def see_through(order: dict[str, Any], stderr: int, told: int) -> None:
    """Fork the process that does an order; tell its number, and when it has ended its exit code."""
    process = get_context("fork").Process(target=do, args=(order, stderr, told))
    process.start()
    os.close(stderr)
    os.write(told, f"{process.pid}\n".encode())
    process.join()
    os.write(told, f"{process.exitcode}\n".encode())


def do(order: dict[str, Any], stderr: int, told: int) -> None:
    """Do an order and exit."""
    os.close(told)
    os.dup2(stderr, 2)
    os.close(stderr)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.chdir(order["folder"])
    module, _, name = order["function"].partition(":")
    sys.exit(getattr(importlib.import_module(module), name)(order["argument"]))


def main(words: Sequence[str]) -> None:
    """Import, then serve."""
    channel = socket.socket(fileno=int(words[0]))
    for module in words[1:]:
        importlib.import_module(module)
    threads = Path("/proc/self/task")
    assert not threads.exists() or len(list(threads.iterdir())) == 1, "a fork has only the thread that forks"
    serve(channel)
    os._exit(0)  # as each of its forks: no need to take apart what it has imported


if __name__ == "__main__":
    main(sys.argv[1:])
