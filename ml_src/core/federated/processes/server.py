"""`ml-federated server`: starts Flower's SuperLink, leads the rounds in this process, and ends both together.

The SuperLink keeps its state in memory, which makes a round twice as fast as its database does. What has to outlive it
is in the journal of the rounds; sites that the next one does not know connect anew by themselves.
"""

import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ml_src.core import atomic
from ml_src.core.errors import ConfigError, TrainingError
from ml_src.core.federated.kits import ServerKit, public_pem, read_server_kit
from ml_src.core.federated.processes.checks import require_kit
from ml_src.core.federated.processes.children import Child, ending, sigterm_as_interrupt
from ml_src.core.federated.processes.hello import UnreachableError, say_hello
from ml_src.core.federated.processes.tuning import log_to
from ml_src.core.federated.processes.worker import named

LEAD = "ml_src.core.federated.from_kits.lead"
START_TIMEOUT = 60.0  # seconds
log = logging.getLogger("ml_src")


def serve(folder: Path, lead: str = LEAD) -> None:
    """Run the server of a kit until the training has ended; it goes on where its journal stands.

    lead: the dotted name of a function that is called with (grid, kit's folder) and leads the rounds.
    Raises: ConfigError where the folder is no server kit or is in use, TrainingError where the SuperLink ends.
    """
    kit = read_server_kit(folder)
    require_kit(kit)
    with (
        atomic.only_writer(kit.state, "this kit is in use here; end that command first"),
        logging_to(kit.state / "server.log"),
        sigterm_as_interrupt(),
    ):
        set_environment(kit.state)
        secret = _write_secrets(kit)
        children: list[Child] = []
        with ending(children):
            children.append(Child("superlink", _superlink(kit), kit.state / "superlink.log"))
            log_to(children[0].log)
            function = named(lead)  # what it imports takes as long as the SuperLink's start
            _wait_until_up(kit, children[0])
            log.info("the server listens on %s:%d for %s", kit.listen, kit.port, ", ".join(kit.public_keys))
            with _interrupting_when_ended(children[0]):
                _lead(kit, secret, function)
        log.info("the server has ended")


def _lead(kit: ServerKit, secret: bytes, lead: Callable[..., object]) -> None:
    from ml_src.core.federated.processes import runtime

    with runtime.control(kit) as client:
        runtime.register_sites(client, {name: public_pem(key) for name, key in kit.public_keys.items()})
        runtime.start_run(client)
    with runtime.grid_of_run(kit, secret) as grid:
        lead(grid, kit.folder)


def _superlink(kit: ServerKit) -> list[str]:
    return [
        str(kit.folder),
        *("--ssl-ca-certfile", str(kit.ca), "--ssl-certfile", str(kit.certificate), "--ssl-keyfile", str(kit.key)),
        *("--host", kit.listen, "--port", str(kit.port)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(_secret_path(kit))),
        *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
    ]


def _secret_path(kit: ServerKit) -> Path:
    return kit.state / "superexec.secret"


def _write_secrets(kit: ServerKit) -> bytes:
    """Write fresh ones, for this start of the server only."""
    write_private(kit.token, secrets.token_hex(32))
    secret = secrets.token_hex(32)
    write_private(_secret_path(kit), secret)
    return secret.encode("ascii")


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read."""
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_text(text, encoding="ascii")


def _wait_until_up(kit: ServerKit, superlink: Child) -> None:
    end = time.monotonic() + START_TIMEOUT
    while time.monotonic() < end:
        if not superlink.running:
            if "address already in use" in superlink.said():
                raise ConfigError(f"port {kit.port} is in use: end the program that has it, or make kits with another")
            break
        try:
            say_hello(kit, host="127.0.0.1")
            if superlink.running:  # else something else has answered
                return
        except UnreachableError:
            time.sleep(0.1)
    raise TrainingError(f"Flower's SuperLink does not start: {superlink.log} says why")


@contextmanager
def _interrupting_when_ended(superlink: Child) -> Iterator[None]:
    """End the block with an error when the SuperLink ends; without this, requests would be tried again for ever."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            if not superlink.running:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except KeyboardInterrupt:
        if superlink.running:
            raise
        raise TrainingError(
            f"Flower's SuperLink has ended: {superlink.log} says why; then give the command again, and it goes on"
        ) from None
    finally:
        over.set()
        watcher.join()


def set_environment(state: Path) -> None:
    """Tell Flower, here and in all children, to keep to itself and to its folder; before it is imported."""
    os.environ |= {
        "FLWR_HOME": str(state / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "NO_PROXY": "*",  # a proxy would be asked for 127.0.0.1 too
        "no_proxy": "*",
        "PYTHONUNBUFFERED": "1",
    }


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Write what is logged into a file too."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    except Exception as error:
        handler.handle(log.makeRecord(log.name, logging.ERROR, __file__, 0, "error: %s", (error,), None))
        raise
    finally:
        log.removeHandler(handler)
        handler.close()
