"""Flower's waiting and its log as we want them, in every process of a federation; follows flwr 1.41.0.

Both sides announce a message before its parts are there, so that the first attempt to fetch them often fails. Flower
waits a second then (`supercore/inflatable/inflatable_utils.py`), which would be most of a round.
"""

import logging
from pathlib import Path

FIRST_WAIT, LONGEST_WAIT = 0.02, 0.2  # seconds between two attempts, doubled each time
LONGEST_RETRY = 2  # seconds between two attempts to reach the server
LONGEST_FETCH = 120.0  # seconds for one message


def fetch_soon(longest: float = LONGEST_FETCH) -> None:
    """Shorten the waits for parts of messages, in this process, and wait `longest` (s) until all are there."""
    from flwr.supercore.inflatable import inflatable_utils

    waits = {
        "initial_backoff": FIRST_WAIT,
        "backoff_cap": LONGEST_WAIT,
        "max_tries_per_object": None,
        "max_time": longest,
    }
    for function in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        function.__kwdefaults__ |= waits


def reconnect_soon() -> None:
    """Let a site look for a server that has gone at short intervals, in this process; Flower's grow to 20 s."""
    from flwr.supercore.retry import http_retry

    http_retry.MAX_RETRY_DELAY = LONGEST_RETRY


def log_to(path: Path) -> None:
    """Let Flower log into a file only, in this process and to its very end: threads of its outlive the rounds."""
    import ml_src.core.federated.flower  # noqa: F401  # gives it the handler that is replaced here

    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s: %(message)s"))
    flower = logging.getLogger("flwr")
    flower.handlers, flower.propagate = [handler], False


def plain_log() -> None:
    """Let Flower log with times and without colours, for files."""
    from flwr.supercore.logger import update_console_handler

    update_console_handler(timestamps=True, colored=False)
