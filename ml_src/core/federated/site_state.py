"""What a site remembers of its sessions and rounds, over all its restarts. Next to read: `site.py`."""

import json
from pathlib import Path
from typing import Any

from ml_src.core.atomic import write_json
from ml_src.core.errors import DataError

MOST_SESSIONS = 1000  # whose names are remembered


class SiteState:
    """What a site remembers of its sessions: a small JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sessions: list[str] = []
        self.answered = 0  # the last round of the session
        self.is_measured = False  # at the images' own size, in the session
        self.shared: dict[str, Any] | None = None
        self.summed: dict[str, list[str]] = {}  # who was in the sum of each round, over all sessions
        if path.exists():
            try:
                stored = json.loads(path.read_bytes())
                self.sessions, self.answered, self.shared = stored["sessions"], stored["answered"], stored["shared"]
                self.summed, self.is_measured = dict(stored["summed"]), stored["is_measured"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path} is damaged, or of another version: put it back, or train anew with --run_name"
                ) from error

    @property
    def session(self) -> str:
        """The one under way; empty before the first."""
        return self.sessions[-1] if self.sessions else ""

    def open(self, session: str) -> None:
        """Begin a session: the server has been started anew, and may ask for its last round again."""
        self.sessions = [*self.sessions, session][-MOST_SESSIONS:]
        self.answered, self.shared, self.is_measured = 0, None, False
        self._write()

    def settle(self, shared: dict[str, Any]) -> None:
        self.shared = shared
        self._write()

    def answer(self, number: int) -> None:
        self.answered = number
        self._write()

    def measure(self) -> None:
        self.is_measured = True
        self._write()

    def reveal(self, number: int, survivors: list[str]) -> None:
        """Remember who is in the sum of a round, before it can be known."""
        self.summed[str(number)] = survivors
        self._write()

    def _write(self) -> None:
        kept = ("sessions", "answered", "is_measured", "shared", "summed")
        write_json(self.path, {key: getattr(self, key) for key in kept})
