"""The worker of a site: waits for messages beside Flower's SuperNode, and answers them in this one process.

It imports torch once, not for each message. Run as a process by `site.py`.
"""

import importlib
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

POLL = 0.1  # seconds
DIARY = "rounds.log"
log = logging.getLogger("ml_src")


def main() -> None:
    """Arguments: the parent, the kit, the data folder, the SuperNode's address, the secret, what makes the answerer."""
    from ml_src.core.federated.processes.children import parent_of_child

    parent_of_child()
    kit_folder, data_dir, address, secret_file, maker = sys.argv[1:]
    logging.basicConfig(format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)

    import httpx

    from ml_src.core.errors import MLError
    from ml_src.core.federated.kits import read_site_kit
    from ml_src.core.federated.processes import runtime

    kit = read_site_kit(Path(kit_folder))
    try:
        answer = named(maker)(kit.folder, Path(data_dir))
    except MLError as error:
        sys.exit(str(error))
    client = runtime.task_client(address, Path(secret_file).read_bytes())
    log.info("ready")
    while True:
        try:
            token = runtime.acquire(client, runtime.TaskType.CLIENT_APP)
        except httpx.HTTPError:  # the SuperNode is being started
            token = None
        if token is None:
            time.sleep(POLL)
        else:
            _do(address, token, answer, kit.state / DIARY)


def named(name: str) -> Callable[..., Any]:
    """Return the function that `module.of.it.function` names."""
    module, _, function = name.rpartition(".")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def _do(address: str, token: str, answer: Callable[..., Any], diary: Path) -> None:
    """Do one task, and note in one line of the diary what it was."""
    import httpx

    from ml_src.core.federated.processes import runtime

    t0 = time.monotonic()
    try:
        message, reply = runtime.do_task(address, token, answer)
    except httpx.HTTPError as error:
        log.info("an answer could not be delivered: %s", error)
        note(diary, "not delivered: the connection to the server began anew in the meantime")
        return
    except Exception as error:  # the next message is none the worse for it
        log.exception("a message could not be answered")
        note(diary, f"failed: {type(error).__name__}: {error}")
        return
    what = f"round {message.metadata.group_id or '-'} {message.metadata.message_type}"
    outcome = f"refused: {reply.error.reason}" if reply.has_error() else f"answered in {time.monotonic() - t0:.2f} s"
    note(diary, f"{what}: {outcome}")


def note(diary: Path, line: str) -> None:
    """Add a line to what the people at the site are shown."""
    with diary.open("a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


if __name__ == "__main__":
    main()
