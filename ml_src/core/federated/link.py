"""The server's way to its sites: letters out, answers back as they come, over any Grid of Flower's."""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import ml_src.core.federated.flower  # noqa: F401  # before flwr
from flwr.app import Message, MessageType
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from ml_src.core.errors import MLError
from ml_src.core.federated.wire import PROGRAM, REFUSED, Expected, Letter, WireError, from_record, to_record

FIRST_NAP, LONGEST_NAP = 0.05, 0.25  # seconds between two looks for answers
MOST_WORDS = 500  # characters of a site's sentence
LOOK = 1.0  # seconds between two looks for who is connected


class Answer(NamedTuple):
    """What came of a letter: a letter back, or a sentence why there is none."""

    site: str
    letter: Letter | None
    problem: str = ""
    num_bytes: int = 0
    seconds: float = 0.0
    is_lost: bool = False  # did not arrive: asking again may help
    is_silent: bool = False  # it is connected, and nothing came
    program: int | None = None  # which one at the site it was, where that is told


class Link:
    """The sites that are connected, by name.

    nodes: name -> Flower's number of the node. since: name -> when it connected; a site that has connected anew in the
    meantime has lost its letter.
    """

    def __init__(
        self,
        grid: Grid,
        nodes: Callable[[], Mapping[str, int]],
        since: Callable[[], Mapping[str, str]] = dict,
        is_patient: bool = False,
    ) -> None:
        self.grid, self.nodes, self.since, self.is_patient = grid, nodes, since, is_patient
        self._pulls: dict[str, _Pull] = {}

    def ask(
        self,
        letters: Mapping[str, Letter],
        expected: Mapping[str, Mapping[str, Expected]],
        timeout: float,
        silent: Collection[str] = (),
    ) -> Iterator[Answer]:
        """Send each site its letter and yield one answer for each, as they come; the silent ones after `timeout` (s).

        An answer is checked against `expected` and must be to this very letter. Nobody waits for the sites in `silent`
        alone: they have not answered before.
        """
        started = looked = time.monotonic()
        self._pulls = {}  # what still waits for answers to earlier letters is let go
        nodes, since = self.nodes(), self.since()
        records = {id(letter): to_record(letter) for letter in letters.values()}  # most have the same
        sites = [site for site in letters if site in nodes]
        for site in letters.keys() - set(sites):
            yield Answer(site, None, "is not connected", is_lost=True)
        messages = [
            Message(
                records[id(letters[site])],
                nodes[site],
                _type_of(letters[site]),
                group_id=str(letters[site].round),
                ttl=timeout,
            )
            for site in sites
        ]
        pushed: list[str | None] = list(self.grid.push_messages(messages))
        pushed += [None] * (len(sites) - len(pushed))  # Flower returns none at all where it was refused
        waiting = {key: site for key, site in zip(pushed, sites, strict=True) if key is not None}
        for site in set(sites) - set(waiting.values()):
            yield Answer(site, None, "could not be sent its message", is_lost=True)
        nap = FIRST_NAP
        while set(waiting.values()) - set(silent) and (self.is_patient or time.monotonic() - started < timeout):
            replies = self._pulled(list(waiting))
            for reply in replies:
                key = reply.metadata.reply_to_message_id
                if key in waiting:
                    site = waiting.pop(key)
                    yield _answer(site, letters[site], reply, expected, time.monotonic() - started)
            nap = FIRST_NAP if replies else min(nap * 1.1, LONGEST_NAP)
            if not replies:
                time.sleep(nap)
            if time.monotonic() - looked > LOOK:
                looked, now = time.monotonic(), self.since()
                for key in [key for key, site in waiting.items() if now.get(site) != since.get(site)]:
                    site = waiting.pop(key)
                    why = "was started anew" if site in now else "is no longer connected"
                    yield Answer(site, None, f"{why}, and has lost its message", is_lost=True)
        for site in waiting.values():
            why = "is still silent" if site in silent else f"has not answered within {timeout:g} s"
            yield Answer(site, None, why, is_lost=True, is_silent=True)

    def _pulled(self, keys: list[str]) -> list[Message]:
        """Return the replies that are there, without waiting for one that is still on its way."""
        if self.is_patient:
            return list(self.grid.pull_messages(keys))
        for key in set(keys) - self._pulls.keys():
            self._pulls[key] = _Pull(self.grid, key)
            self._pulls[key].start()
        found: list[Message] = []
        for key in [key for key, pull in self._pulls.items() if not pull.is_alive()]:
            pull = self._pulls.pop(key)
            if pull.error is not None:
                raise pull.error
            found += pull.replies
        return found


class _Pull(threading.Thread):
    """Fetches one reply: Flower waits in there until all of it has arrived, and who sends it may have died."""

    def __init__(self, grid: Grid, key: str) -> None:
        super().__init__(daemon=True)
        self.grid, self.key = grid, key
        self.replies: list[Message] = []
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.replies = list(self.grid.pull_messages([self.key]))
        except Exception as error:  # raised again by who looks for the reply
            self.error = error


def _type_of(letter: Letter) -> str:
    """Return Flower's type of a message; the kind is in it for the logs of the site."""
    return MessageType.TRAIN if letter.kind == MessageType.TRAIN else f"{MessageType.QUERY}.{letter.kind}"


def _answer(
    site: str, letter: Letter, reply: Message, expected: Mapping[str, Mapping[str, Expected]], seconds: float
) -> Answer:
    if reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE:
        return Answer(site, None, "is no longer connected, and has lost its message", 0, seconds, is_lost=True)
    if reply.has_error():
        problem = f"refused: {' '.join(str(reply.error.reason).split())[:MOST_WORDS]}"
        return Answer(site, None, problem, 0, seconds, program=_program(reply.error.code - REFUSED))
    try:
        found = from_record(reply.content, expected)
        if (found.kind, found.session, found.round) != (letter.kind, letter.session, letter.round):
            raise WireError("the answer is to another message: refused as replayed")
    except MLError as error:
        return Answer(site, None, f"sent an answer that cannot be used: {error}", 0, seconds)
    program = found.values.pop(PROGRAM, None)
    return Answer(site, found, "", found.num_bytes, seconds, program=_program(program))


def _program(number: Any) -> int | None:
    return number if type(number) is int and number > 0 else None
