"""A federation on this machine with an instant answer in place of a training, for tests and measurements."""

import json
import os
import socket
import subprocess
import sys
import threading
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
SECRET = "patient"  # in the name of each image
BYTECODE = Path(sys.prefix) / "bytecode"  # where none is kept beside the code: half of a start would be compiling


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
    from ml_src.core.federated.site_state import RUN, End

    def answer(message, context):
        if message.metadata.group_id == "impossible":
            raise ValueError("the file patient_17.png cannot be read")
        if message.metadata.group_id == "slow":
            (data_dir / "working").touch()
            while not (data_dir / "release").exists():
                time.sleep(0.02)
        if message.metadata.group_id == "over":
            (kit / RUN).mkdir()
            End(30, 27, "").write(kit / RUN)
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


def lead_by_link(grid, kit: Path) -> None:
    """Ask site b for its facts three times; KIT/came has what came of each letter: a sentence, or nothing."""
    from ml_src.core.federated.kits import read_server_kit
    from ml_src.core.federated.link import Link
    from ml_src.core.federated.processes.runtime import connected_sites
    from ml_src.core.federated.wire import Letter

    server = read_server_kit(kit)
    link = Link(grid, partial(connected_sites, grid, server))
    (kit / "begun").touch()  # from here on sites may connect
    while "b" not in link.nodes():
        time.sleep(0.05)
    letters = [Letter("facts", "now", number) for number in (1, 2, 3)]
    came = [answer for one in letters for answer in link.ask({"b": one}, {"facts": {}}, 30.0)]
    write_json(kit / "came", [answer.problem for answer in came])


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
    with suppress(FileNotFoundError, ProcessLookupError):  # it may end in this moment
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
    with suppress(FileNotFoundError, ProcessLookupError):  # it may end in this moment
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


def start(use: str, *arguments: str, function: str | None = None) -> subprocess.Popen[bytes]:
    """Start what the command `server` or `site` does, with a function of this file, in a process."""
    code = {
        "server": "from ml_src.core.federated.processes.server import serve as f; a = (Path(sys.argv[1]),)",
        "site": "from ml_src.core.federated.processes.site import take_part as f; a = tuple(map(Path, sys.argv[1:]))",
    }[use]
    ours = f"known_federation.{function or {'server': 'lead', 'site': 'answer_from_kit'}[use]}"
    program = (
        f"import sys; from pathlib import Path; {code}\n"
        f"from ml_src.cli._app import run; sys.exit(run(lambda words: f(*a, {ours!r}) or 0))"
    )
    return process_of(program, *arguments)


def start_command(*words: str) -> subprocess.Popen[bytes]:
    """Start `ml-federated` in a process."""
    return process_of("import sys; from ml_src.cli.federated import main; sys.exit(main(sys.argv[1:]))", *words)


def process_of(program: str, *arguments: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    if environment.pop("PYTHONDONTWRITEBYTECODE", None):
        environment["PYTHONPYCACHEPREFIX"] = str(BYTECODE)
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


# Trainings


def write_data(folder: Path, names: list[str]) -> dict[str, Path]:
    """Write a data set of 12 images or more for each site, with file names that nobody else may see."""
    from ml_src.cli import split
    from ml_src.core.data.sample import write_sample

    found = {}
    for index, name in enumerate(names):
        data = found[name] = folder / name
        write_sample(data, num_images=12 + 2 * index, height=64, width=64, seed=index)
        for path in [*data.glob("images/*.png"), *data.glob("masks/*.png")]:
            path.rename(path.with_name(f"{SECRET}_{name}_{path.name}"))
        folders = ["--raw_data", str(data / "images"), "--mask_data", str(data / "masks")]
        assert split.main([*folders, "--folds", "3", "--task", "segmentation"]) == 0
    return found


def lead_when_told(grid, kit: Path) -> None:
    """Lead a real training as soon as there is a file KIT/begin."""
    from ml_src.core.federated.from_kits import lead

    while not (kit / "begin").exists():
        time.sleep(0.02)
    lead(grid, kit)


def lead_and_repeat(grid, kit: Path) -> None:
    """Lead a real training over a grid that repeats itself."""
    from ml_src.core.federated.from_kits import lead

    lead(_Repeating(grid, kit), kit)


class _Repeating:
    """A grid that sends each train message twice, and that of round 1 to each site in round 2 again.

    KIT/heard has all that sites have answered, KIT/refusals what they said to the repeated messages.
    """

    def __init__(self, grid, kit: Path) -> None:
        self._grid, self._kit = grid, kit
        self._first: list = []
        self._extra: set[str] = set()
        self._one_at_a_time = threading.Lock()  # a reply that two threads ask for is lost to the second

    def __getattr__(self, name: str):
        return getattr(self._grid, name)

    def push_messages(self, messages):
        messages = list(messages)
        pushed = list(self._grid.push_messages(messages))
        train = [message for message in messages if message.metadata.message_type == "train"]
        if train:
            again = [_copied(message) for message in [*train, *self._first]]
            self._first = self._first or train
            self._extra |= set(self._grid.push_messages(again))
        return pushed

    def pull_messages(self, message_ids):
        with self._one_at_a_time:
            return self._pulled(list(message_ids))

    def _pulled(self, asked):
        replies = list(self._grid.pull_messages([*asked, *self._extra]))
        with (self._kit / "heard").open("ab") as heard, (self._kit / "refusals").open("a") as refusals:
            for reply in replies:
                heard.write(_bytes_of(reply))
                if reply.metadata.reply_to_message_id in self._extra:
                    self._extra.remove(reply.metadata.reply_to_message_id)
                    refusals.write(f"{reply.error.reason if reply.has_error() else 'answered'}\n")
        return [reply for reply in replies if reply.metadata.reply_to_message_id in asked]


def _copied(message):
    from flwr.app import Message

    told = message.metadata
    return Message(message.content, told.dst_node_id, told.message_type, ttl=told.ttl, group_id=told.group_id)


def _bytes_of(reply) -> bytes:
    if reply.has_error():
        return reply.error.reason.encode()
    plain = json.dumps({name: repr(dict(record)) for name, record in reply.content.config_records.items()})
    arrays = [array.data for record in reply.content.array_records.values() for array in record.values()]
    return b"".join([plain.encode(), *arrays])


def hold(kit: Path, data_dir: Path):
    """What a site answers with: in round 2 it keeps its trained weights until there is a file KIT/release."""

    def held(message, reply):
        if (message.metadata.message_type, message.metadata.group_id) == ("train", "2"):
            (kit / "working").touch()
            while not (kit / "release").exists():
                time.sleep(0.02)
        return reply

    return _after(held, kit, data_dir)


def spoil(kit: Path, data_dir: Path):
    """What a site answers with: its weights of round 1 have one value that is no number."""

    def spoiled(message, reply):
        is_first = (message.metadata.message_type, message.metadata.group_id) == ("train", "1")
        if is_first and not reply.has_error():
            values = reply.content["arrays"]["parameters"].numpy().copy()
            values[7] = np.nan
            reply.content["arrays"]["parameters"] = _array(values)
        return reply

    return _after(spoiled, kit, data_dir)


def _after(change: Callable, kit: Path, data_dir: Path):
    from ml_src.core.federated.from_kits import answerer

    answer = answerer(kit, data_dir)
    return lambda message, context: change(message, answer(message, context))
