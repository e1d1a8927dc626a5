"""What a site remembers of its sessions, its rounds and their end, over all its restarts. Next to read: `site.py`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ml_src.core.atomic import write_json
from ml_src.core.errors import DataError

RUN = "run"  # the run folder in a kit, as of any training
BEST = "best.pt"
PERSONAL = "personal.pt"  # FedBN: the best weights of all with the batch normalisation that this site had beside them
ENDED = "ended.json"  # in the run folder, written after the networks: where it is, there is nothing left to do
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


@dataclass(frozen=True)
class End:
    """What a site was told of the end of its federation."""

    num_rounds: int
    best_round: int
    stop: str  # why it did not go on to its last round; empty where it did

    def write(self, run_dir: Path) -> None:
        """Remember it in a run folder."""
        write_json(run_dir / ENDED, asdict(self))

    def sentence(self, run_dir: Path) -> str:
        """Return what there is to say of it, with the networks of the run folder."""
        number = f"{self.num_rounds} round{'s' * (self.num_rounds != 1)}"
        early = f", stopped early: {self.stop}" if self.stop else ""
        own = run_dir / "weights" / PERSONAL
        also = f", that with this site's own batch normalisation {own}" if own.exists() else ""
        return (
            f"the federation has ended after {number} (best: round {self.best_round}{early}); "
            f"the network is {run_dir / 'weights' / BEST}{also}"
        )


def read_end(run_dir: Path) -> End | None:
    """Return how the federation of a run folder has ended, None where it has not.

    Raises: DataError where the file that says so is damaged.
    """
    path = run_dir / ENDED
    try:
        stored = json.loads(path.read_bytes())
        return End(int(stored["num_rounds"]), int(stored["best_round"]), str(stored["stop"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: remove it, and start this site and the server again") from error
