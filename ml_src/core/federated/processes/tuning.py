"""Flower's waiting and its log as we want them, in every process of a federation; follows flwr 1.41.0.

Both sides announce a message before its parts are there, so that the first attempt to fetch them often fails. Flower
waits a second then (`supercore/inflatable/inflatable_utils.py`), which would be most of a round.
"""

FIRST_WAIT, LONGEST_WAIT = 0.02, 0.2  # seconds between two attempts, doubled each time
MAX_ATTEMPTS = 36000
LONGEST_FETCH = 120.0  # seconds for one message; meanwhile the server takes no other answer


def fetch_soon() -> None:
    """Shorten the waits for parts of messages, in this process."""
    from flwr.supercore.inflatable import inflatable_utils

    waits = {
        "initial_backoff": FIRST_WAIT,
        "backoff_cap": LONGEST_WAIT,
        "max_tries_per_object": MAX_ATTEMPTS,
        "max_time": LONGEST_FETCH,
    }
    for function in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        function.__kwdefaults__ |= waits


def plain_log() -> None:
    """Let Flower log with times and without colours, for files."""
    from flwr.supercore.logger import update_console_handler

    update_console_handler(timestamps=True, colored=False)
