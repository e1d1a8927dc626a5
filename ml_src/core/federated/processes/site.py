"""`ml-federated site`: Flower's SuperNode and a worker of ours, kept going until the federation has ended."""

import logging
import re
import secrets
import socket
import time
from pathlib import Path

from ml_src.core import atomic
from ml_src.core.errors import MLError, TrainingError
from ml_src.core.federated.kits import SiteKit, read_site_kit
from ml_src.core.federated.processes import checks
from ml_src.core.federated.processes.children import Child, ending, sigterm_as_interrupt
from ml_src.core.federated.processes.hello import UnreachableError, say_hello
from ml_src.core.federated.processes.server import logging_to, set_environment, write_private
from ml_src.core.federated.site_state import RUN, read_end

ANSWERER = "ml_src.core.federated.from_kits.answerer"
DIARY = "rounds.log"
FIRST_WAIT, LONGEST_WAIT = 0.5, 5.0  # seconds between two attempts to reach the server
STEADY = 60.0  # seconds after which an end is not a failure to start
FAREWELL = 10.0  # seconds for the answer to the word that all is over
_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")  # with which a line of the diary begins
log = logging.getLogger("ml_src")


def take_part(folder: Path, data_dir: Path, answerer: str = ANSWERER) -> None:
    """Run a site until its server says that the federation has ended. Without the server it waits for it.

    answerer: the dotted name of a function that is called with (kit's folder, data folder) and returns what answers a
    message: a function of (message, context).
    Raises: ConfigError and DataError where the kit, its data or the clock are not in order, or the server does not know
    this site; RefusedError where it is the wrong server; TrainingError where the worker ends.
    """
    kit = read_site_kit(folder)
    run_dir = kit.folder / RUN
    if (end := read_end(run_dir)) is not None:
        log.info(end.sentence(run_dir))
        return
    checks.require_kit(kit)
    checks.require_folder(data_dir)
    with (
        atomic.only_writer(kit.state, "this kit is in use here; end that command first"),
        logging_to(kit.state / "site.log"),
        sigterm_as_interrupt(),
    ):
        set_environment(kit.state)
        secret = kit.state / "superexec.secret"
        write_private(secret, secrets.token_hex(32))
        address = f"127.0.0.1:{_free_port()}"
        children: list[Child] = []
        with ending(children):
            worker = _worker(kit, data_dir, address, secret, answerer)
            children.append(worker)
            told = _tell(kit.state / DIARY, None)
            while _is_expected(kit, worker):
                node = Child("supernode", _supernode(kit, address, secret), kit.state / "supernode.log")
                children[1:] = [node]
                log.info("site %s takes part in the federation of %s", kit.name, kit.address)
                t0 = time.monotonic()
                while node.running and read_end(run_dir) is None:
                    _require_running(worker)
                    told = _tell(kit.state / DIARY, told)
                    time.sleep(0.1)
                if node.running:
                    _see_off(kit)
                    break
                log.info("the connection to the server has ended, and is made anew; %s says why", node.log)
                if time.monotonic() - t0 < STEADY:
                    time.sleep(FIRST_WAIT)
            _tell(kit.state / DIARY, told)
            end = read_end(run_dir)
            assert end is not None
            log.info(end.sentence(run_dir))


def _tell(diary: Path, told: int | None) -> int:
    """Say what the worker has noted from byte `told` on, None for its end; return where that ends now."""
    if not diary.exists():
        return 0
    if told is not None and diary.stat().st_size > told:
        with diary.open("rb") as file:
            file.seek(told)
            for line in file.read().decode("utf-8", errors="replace").splitlines():
                stamp = _TIME.match(line)  # the log has its own
                log.info(line[stamp.end() :] if stamp else line)
    return diary.stat().st_size


def _see_off(kit: SiteKit) -> None:
    """Wait until the server has ended, for then it has the answer of this site; not for ever."""
    end = time.monotonic() + FAREWELL
    while time.monotonic() < end:
        try:
            say_hello(kit)
        except MLError:
            return
        time.sleep(0.2)


def _is_expected(kit: SiteKit, worker: Child) -> bool:
    """Wait until the server is there and knows this site; False where the federation has ended in the meantime.

    Raises: RefusedError and ConfigError where that will never be.
    """
    wait = 0.0
    while read_end(kit.folder / RUN) is None:
        try:
            checks.require_welcome(kit, say_hello(kit, kit.name))
            return True
        except UnreachableError as error:
            if not wait:
                log.info("%s; trying again until it does", error)
            wait = min(2 * wait or FIRST_WAIT, LONGEST_WAIT)
            _require_running(worker)
            time.sleep(wait)
    return False


def _require_running(worker: Child) -> None:
    if not worker.running:
        lines = worker.said().strip().splitlines()
        raise TrainingError(f"the worker of this site has ended ({lines[-1] if lines else 'killed'}): see {worker.log}")


def _worker(kit: SiteKit, data_dir: Path, address: str, secret: Path, answerer: str) -> Child:
    arguments = [str(kit.folder), str(data_dir.resolve()), address, str(secret), answerer]
    return Child("worker", arguments, kit.state / "worker.log")


def _supernode(kit: SiteKit, address: str, secret: Path) -> list[str]:
    host, _, port = address.rpartition(":")
    return [
        *("--superlink", kit.address, "--root-certificates", str(kit.ca)),
        *("--auth-supernode-private-key", str(kit.key)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        *("--host", host, "--port", port),
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
