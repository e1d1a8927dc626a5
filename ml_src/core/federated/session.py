"""Who takes part: sites are asked for their facts, told the sums, and from then on counted in.

A session lasts from one start of the server to the next, or until a round failed for want of updates. Its id is in
every letter: what belongs to another session is refused.
"""

import logging
import secrets
import time
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from ml_src.core.config import Config
from ml_src.core.errors import DataError, MLError, TrainingError
from ml_src.core.federated import facts
from ml_src.core.federated.aggregation import least_sites
from ml_src.core.federated.journal import Journal
from ml_src.core.federated.link import Answer, Link
from ml_src.core.federated.secure_round import FEWEST
from ml_src.core.federated.wire import Expected, Letter

LATE = 10.0  # seconds that sites have to come back, where there are enough without them
AGAIN = 2.0  # seconds between two attempts
FAREWELL = 10.0  # seconds for a letter that changes nothing
MOST_PROGRAMS = 100  # of a site that are remembered
TWO = (
    "answers from two places: two programs take part with the key of {site}; end one of them, best the one that was "
    "started last; meanwhile its messages reach either, and rounds go on with the others where they are enough"
)
log = logging.getLogger("ml_src")


class Session:
    """The sites that take part since the server was started."""

    def __init__(self, config: Config, link: Link, journal: Journal, num_sites: int) -> None:
        assert config.federated is not None
        self.config, self.federated = config, config.federated
        self.link, self.journal, self.num_sites = link, journal, num_sites
        self.number = ""
        self.num_images: dict[str, int] = {}  # training images of each site that takes part
        self.left_out: dict[str, str] = {}  # who was told that it takes no part, and why
        self.silent: set[str] = set()  # connected, but a round went on without them: nobody waits for them again
        self.programs: dict[str, list[int]] = {}  # that have answered for each site, in this order

    @property
    def needed(self) -> int:
        """Sites without which a round cannot count."""
        fewest = FEWEST if self.federated.secure_aggregation else 1
        return max(self.federated.quorum, least_sites(self.federated), fewest)

    @property
    def shared(self) -> dict[str, Any]:
        """What all sites are told of all."""
        known = self.journal.fingerprint
        assert known is not None
        return {
            "mean": known.mean,
            "std": known.std,
            "class_counts": known.class_counts or None,
            "num_images": self.total_images,
        }

    @property
    def total_images(self) -> int:
        """Training images of all sites of the first session: what their shares in a sum refer to."""
        known = self.journal.fingerprint
        return 1 if known is None else sum(known.num_images.values())

    def here(self) -> list[str]:
        """Return the sites that take part and are connected at this moment."""
        return sorted(self.num_images.keys() & self.link.nodes().keys())

    def begin(self) -> None:
        """Begin anew, with nobody."""
        self.number, self.num_images, self.silent = secrets.token_hex(16), {}, set()

    def open(self, round: int) -> None:
        """Begin anew: let the sites check their data, sum up what they tell of it, and tell them the sums.

        Raises: TrainingError where too few can take part; DataError where their images do not go together.
        """
        self.begin()
        is_first = self.journal.fingerprint is None
        end = time.monotonic() + self.federated.round_timeout
        connected = self.wait(self.num_sites, self.federated.round_timeout if is_first else LATE)
        while self.join(connected, round) and len(self.num_images) < self.needed and time.monotonic() < end:
            time.sleep(AGAIN)
            connected = self.wait(self.needed)
        if len(self.num_images) < self.needed:
            raise TrainingError(
                f"{len(self.num_images)} of {self.num_sites} sites can take part, {self.needed} are needed: "
                "mend what the lines above say, then go on"
            )

    def wait(self, number: int, patience: float = 0.0) -> list[str]:
        """Return the connected sites: as soon as there are `number`, or after `patience` (s) enough for a round.

        Raises: TrainingError where these are not there after round_timeout.
        """
        started, said = time.monotonic(), False
        while True:
            connected, waited = sorted(self.link.nodes()), time.monotonic() - started
            enough = len(connected) >= self.needed
            if len(connected) >= number or (enough and waited >= patience):
                return connected
            if waited > self.federated.round_timeout:
                raise TrainingError(
                    f"{len(connected)} of {self.num_sites} sites are connected ({', '.join(connected) or 'none'}), "
                    f"{self.needed} are needed: start them, then go on"
                )
            if not said:
                log.info("Waiting for sites: %d of %d are connected", len(connected), number)
                said = True
            time.sleep(0.2)

    def present(self, round: int) -> list[str]:
        """Return the sites that are connected and take part; those that have come back are taken in."""
        connected = self.wait(self.needed)
        self.join(connected, round)
        return [site for site in connected if site in self.num_images]

    def join(self, sites: list[str], round: int) -> bool:
        """Take in sites that do not take part yet; return whether some may do so later, for a letter was lost.

        Raises: DataError where the sites of the first session do not go together; of later ones, who does not fit
            stays out.
        """
        new = [site for site in sites if site not in self.num_images]
        if not new:
            return False
        taking_part = [site for site in sites if site in self.num_images]
        lost: list[str] = []
        parsed: dict[str, facts.Facts] = {}
        ask = partial(self.ask, lost=lost, others=taking_part)
        for answer, letter in ask(dict.fromkeys(new, self.letter("facts", round)), {"facts": {}}):
            try:
                parsed[answer.site] = facts.parse(letter.values, answer.site)
            except MLError as error:
                self.trouble(answer.site, str(error))
        fitting = self._fitting(parsed, round)
        known = self.journal.fingerprint
        if known is None or not fitting:
            return bool(lost)
        settle = self.letter("settle", round, values=self.shared)
        for answer, _ in ask(dict.fromkeys(fitting, settle), {"settle": {}}):
            self.num_images[answer.site] = fitting[answer.site].num_images["train"]
        return bool(lost)

    def _fitting(self, parsed: dict[str, facts.Facts], round: int) -> dict[str, facts.Facts]:
        """Return the sites that train the same, on images that go with those of all others, as the first ones say.

        The others are told why they take no part: nobody there would know.
        """
        mine, fitting, why = facts.sections_of(self.config), {}, {}
        for site, own in parsed.items():
            other = sorted(name for name, digest in own.sections.items() if mine.get(name) != digest)
            try:
                if other:
                    names = ", ".join(other)[:200]
                    raise DataError(f"has another config.yaml than the server, in {names}: make it the same")
                if self.journal.fingerprint is not None:
                    facts.require_fitting(own, site, self.journal.fingerprint, self.journal.config)
                fitting[site] = own
            except MLError as error:
                self.trouble(site, str(error))
                why[site] = str(error) if other else _heading(error)
        self._leave_out(why, round)
        if self.journal.fingerprint is None and fitting:
            try:
                self.journal.begin(facts.merge(fitting, self.config))
            except MLError as error:
                self._leave_out(dict.fromkeys(fitting, _heading(error)), round)
                raise
        return fitting

    def _leave_out(self, why: Mapping[str, str], round: int) -> None:
        """Tell sites, once, why they take no part; what comes back is of no use."""
        new = {site: reason for site, reason in why.items() if self.left_out.get(site) != reason}
        self.left_out |= new
        letters = {site: self.letter("out", round, values={"why": reason}) for site, reason in new.items()}
        for _ in self.link.ask(letters, {"out": {}}, FAREWELL):
            pass

    def letter(self, kind: str, round: int, **parts: object) -> Letter:
        """Return a letter of this session."""
        return Letter(kind, self.number, round, **parts)  # type: ignore[arg-type]

    def ask(
        self,
        letters: Mapping[str, Letter],
        expected: Mapping[str, Mapping[str, Expected]],
        lost: list[str] | None = None,
        others: Collection[str] = (),
    ) -> list[tuple[Answer, Letter]]:
        """Return the answers that are letters, in the order of the sites' names; say what is wrong with the others.

        `lost` takes the names of those whose letter did not arrive. Nobody waits for silent sites where there are
        enough without them, among those that are asked and `others`.
        """
        found = []
        silent = self.silent if len((letters.keys() | set(others)) - self.silent) >= self.needed else set()
        for answer in self.link.ask(letters, expected, self.federated.round_timeout, silent):
            (self.silent.add if answer.is_silent else self.silent.discard)(answer.site)
            self._notice(answer)
            if answer.letter is not None:
                found.append((answer, answer.letter))
                continue
            self.trouble(answer.site, answer.problem)
            if lost is not None and answer.is_lost:
                lost.append(answer.site)
        return sorted(found, key=lambda pair: pair[0].site)

    def _notice(self, answer: Answer) -> None:
        """Say so where one program answers for a site, then another, then the first again: no restart does that."""
        seen = self.programs.setdefault(answer.site, [])
        if answer.program is None or seen[-1:] == [answer.program]:
            return
        if answer.program in seen:
            self.trouble(answer.site, TWO.format(site=answer.site))
            seen.clear()
        self.programs[answer.site] = [*seen, answer.program][-MOST_PROGRAMS:]

    def trouble(self, site: str, what: str) -> None:
        """Say and remember what went wrong at a site, in one line whatever it has sent."""
        what = " ".join(what.split())
        log.warning("%s %s", site, what)
        self.journal.trouble(site, what)


def _heading(error: MLError) -> str:
    """What is wrong, without what the other sites have."""
    return f"{str(error).partition(':')[0]}: ask who runs the server"
