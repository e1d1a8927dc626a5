"""`ml-federated status`: from the files of a kit, and from the server itself while it runs."""

import fcntl
from collections.abc import Iterator
from pathlib import Path

from ml_src.core.atomic import LOCK
from ml_src.core.errors import MLError
from ml_src.core.federated.kits import Kit, ServerKit, SiteKit, public_pem, read_kit
from ml_src.core.federated.processes.checks import require_welcome
from ml_src.core.federated.processes.hello import say_hello
from ml_src.core.federated.site_state import RUN, read_end

LAST_LINES = 5


def status(folder: Path) -> Iterator[str]:
    """Yield what there is to say of a kit, line by line.

    Raises: ConfigError where the folder is no kit.
    """
    kit = read_kit(folder)
    running = _is_running(kit)
    if isinstance(kit, ServerKit):
        yield f"server of {kit.address}: {'running' if running else 'not running'}"
        if (kit.folder / RUN / "metrics.json").exists():
            yield f"the federation has ended: see {kit.folder / RUN / 'summary.txt'}"
        if running:
            yield from _sites(kit)
        yield from _last(kit.state / "server.log")
    else:
        yield f"site {kit.name}: {'running' if running else 'not running'}"
        end = read_end(kit.folder / RUN)
        yield _server(kit) if end is None else end.sentence(kit.folder / RUN)
        yield from _last(kit.state / "site.log")
        yield from _last(kit.state / "rounds.log")


def _is_running(kit: Kit) -> bool:
    """Whether someone holds the lock of the kit's command."""
    try:
        with (kit.state / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _sites(kit: ServerKit) -> Iterator[str]:
    import httpx

    from ml_src.core.federated.processes import runtime
    from ml_src.core.federated.processes.server import set_environment

    set_environment(kit.state)
    try:
        with runtime.control(kit) as client:
            found = runtime.connected(client, {name: public_pem(key) for name, key in kit.public_keys.items()})
    except (httpx.HTTPError, OSError) as error:
        yield f"it does not answer ({error}): it may be starting"
        return
    for name, here in found.items():
        yield f"site {name}: {'connected' if here else 'not connected'}"


def _server(kit: SiteKit) -> str:
    try:
        require_welcome(kit, say_hello(kit, kit.name))
    except MLError as error:
        return str(error)
    return f"the server {kit.address} answers"


def _last(path: Path) -> Iterator[str]:
    if path.exists():
        yield f"{path}:"
        yield from (f"  {line}" for line in path.read_text(encoding="utf-8").splitlines()[-LAST_LINES:])
