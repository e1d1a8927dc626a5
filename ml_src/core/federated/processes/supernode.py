"""Flower's SuperNode with shorter naps; run as a process by `site.py`.

Follows flwr 1.41 `supernode/start_client_internal.py`: it sleeps 3 s where the server had no message, and 0.5 s where
its worker has no reply yet, or where a part of it is still to come.
"""

import time

LOCAL_NAP = 0.05
FIRST_NAP = 0.1
LONGEST_NAP = 0.5
GROWTH = 1.1
_ASKS_THE_SERVER = 1.0  # naps of this length and more come after the server was asked


class Naps:
    """Takes the place of the module `time` there: short naps after work, longer ones the longer nothing comes."""

    def __init__(self) -> None:
        self._next = FIRST_NAP

    def sleep(self, seconds: float) -> None:
        """Sleep for less than was asked for."""
        time.sleep(self.length(seconds))

    def length(self, seconds: float) -> float:
        """Return how long the nap is that Flower wants to be `seconds` long."""
        if seconds < _ASKS_THE_SERVER:
            self._next = FIRST_NAP
            return LOCAL_NAP
        length, self._next = self._next, min(self._next * GROWTH, LONGEST_NAP)
        return length


def main() -> None:
    """Arguments: the parent, then those of flower-supernode."""
    from ml_src.core.federated.processes.children import parent_of_child

    parent_of_child()

    from flwr.supernode import start_client_internal
    from flwr.supernode.cli import flower_supernode
    from ml_src.core.federated.processes.tuning import fetch_soon, plain_log, reconnect_soon

    fetch_soon()
    reconnect_soon()
    plain_log()
    start_client_internal.time = Naps()
    flower_supernode()


if __name__ == "__main__":
    main()
