"""A federation on this machine with an instant answer in place of a training, for tests and measurements."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np

from ml_src.core.atomic import write_json
from ml_src.core.errors import DataError

CONFIG = """\
data: {data_dir: DATA, num_classes: 2}
training: {trainer_type: federated}
federated: {num_sites: 3, rounds: 2, min_sites: 1}
"""
TESTS = Path(__file__).parent
BYTECODE = tempfile.TemporaryDirectory()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kits(folder: Path, sites: list[str]) -> Path:
    """Write a configuration and the kits of a federation on a free port; returns the folder of the kits."""
    from ml_src.core.federated.kits import write_kits

    config = folder / "config.yaml"
    config.write_text(CONFIG)
    write_kits(config, sites, f"127.0.0.1:{free_port()}", folder / "kits")
    return folder / "kits"


def answer_from_kit(kit: Path, data_dir: Path):
    """What a site answers with here: the numbers, one more each."""
    from flwr.app import ArrayRecord, Message, RecordDict

    if not data_dir.is_dir():
        raise DataError(f"{data_dir} does not exist: give the folder of the data")

    def answer(message, context):
        if message.metadata.group_id == "impossible":
            raise ValueError("the file patient_17.png cannot be read")
        if message.metadata.group_id == "slow":
            (data_dir / "working").touch()
            while not (data_dir / "release").exists():
                time.sleep(0.02)
        arrays = message.content["arrays"]
        more = {name: arrays[name].numpy() + 1 for name in arrays}
        return Message(RecordDict({"arrays": ArrayRecord({k: _array(v) for k, v in more.items()})}), reply_to=message)

    return answer


def _array(values):
    from flwr.app import Array

    return Array(values)


def lead(grid, kit: Path) -> None:
    """Do the orders that appear in KIT/orders, and write beside each what came of it."""
    from ml_src.core.federated.kits import read_server_kit
    from ml_src.core.federated.processes.runtime import connected_since, connected_sites

    server = read_server_kit(kit)
    while True:
        for path in sorted((kit / "orders").glob("*.json")):
            order = json.loads(path.read_text())
            if order == "end":
                return
            while not set(order["sites"]) <= set(connected_sites(grid, server)):
                time.sleep(0.05)
            t0 = time.monotonic()
            nodes = {site: node for site, node in connected_sites(grid, server).items() if site in order["sites"]}
            since = partial(connected_since, grid, server)
            came = dict(ask(grid, nodes, order["group"], order["floats"], since))
            path.replace(path.with_suffix(".done"))
            write_json(path.with_suffix(".came"), {"sites": came, "seconds": time.monotonic() - t0})
        time.sleep(0.02)


def ask(grid, nodes, group: str, floats: int, since: Callable[[], dict[str, str]]) -> Iterator[tuple[str, float | str]]:
    """Send zeros to sites; yields (site, the number that came back, or the reason why none will)."""
    from flwr.app import ArrayRecord, Message, RecordDict

    content = RecordDict({"arrays": ArrayRecord({"flat": _array(np.zeros(floats, np.float32))})})
    messages = [Message(content, node, "train", ttl=60.0, group_id=group) for node in nodes.values()]
    before = since()
    waiting = dict(zip(grid.push_messages(messages), nodes, strict=True))
    while waiting:
        anew = {site for site, moment in since().items() if moment != before.get(site)}
        for message, site in list(waiting.items()):
            if site in anew:
                yield waiting.pop(message), "lost"
        for reply in grid.pull_messages(list(waiting)):
            site = waiting.pop(reply.metadata.reply_to_message_id)
            yield site, reply.error.reason if reply.has_error() else float(reply.content["arrays"]["flat"].numpy()[0])
        time.sleep(0.05)


def order(server: Path, name: str, contents: object) -> Path:
    """Leave an order for the leader of a running server; returns where its outcome will be."""
    (server / "orders").mkdir(exist_ok=True)
    write_json(server / "orders" / f"{name}.json", contents)
    return server / "orders" / f"{name}.came"


def wait_for(what: str, found: Callable[[], object], *processes: subprocess.Popen[bytes]) -> None:
    """Return when something is found; fail where it is not within a minute, or when one of the processes has ended."""
    end = time.monotonic() + 60
    while not found():
        for process in processes:
            if process.poll() is not None:
                raise AssertionError(f"ended before {what}: {process.communicate()[0].decode()}")
        assert time.monotonic() < end, f"a minute without {what}"
        time.sleep(0.05)


def descendants(pid: int) -> set[int]:
    """Return the processes that a process has started, and they in turn."""
    children = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        children |= {int(child) for child in (task / "children").read_text().split()}
    return children.union(*(descendants(child) for child in children))


def alive(pids: set[int]) -> set[int]:
    """Return those that have not ended; what has ended and was not asked for its code by its parent has."""
    found = set()
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.add(pid)
    return found


def ends_of_sockets(pid: int) -> set[str]:
    """Return the addresses of both ends of all TCP sockets of a process, as hexadecimal text of /proc/net."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            target = str(link.readlink())
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    ends = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[9] in inodes:
                ends |= {words[1].partition(":")[0], words[2].partition(":")[0]}
    return ends


def start(use: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Start what the command does, with the functions of this file, in a process."""
    code = {
        "server": "from ml_src.core.federated.processes.server import serve as f; a = (Path(sys.argv[1]),)",
        "site": "from ml_src.core.federated.processes.site import take_part as f; a = tuple(map(Path, sys.argv[1:]))",
    }[use]
    ours = {"server": "known_federation.lead", "site": "known_federation.answer_from_kit"}[use]
    program = (
        f"import sys; from pathlib import Path; {code}\n"
        f"from ml_src.cli._app import run; sys.exit(run(lambda words: f(*a, {ours!r}) or 0))"
    )
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    # Where bytecode is not kept, half of a process's start is compiling.
    environment["PYTHONPYCACHEPREFIX"] = BYTECODE.name
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@contextmanager
def running(*processes: subprocess.Popen[bytes]) -> Iterator[None]:
    """Stop processes at the end of a block."""
    try:
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(30)
