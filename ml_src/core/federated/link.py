"""The server's way to its sites: letters out, answers back as they come, over any Grid of Flower's."""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import httpx

import ml_src.core.federated.flower  # noqa: F401  # before flwr
from flwr.app import Message, MessageType
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from ml_src.core.errors import MLError
from ml_src.core.federated.wire import PROGRAM, REFUSED, Expected, Letter, WireError, from_record, to_record

FIRST_NAP, LONGEST_NAP = 0.05, 0.25  # seconds between two looks for answers
MOST_WORDS = 500  # characters of a site's sentence
LOOK = 1.0  # seconds between two looks for who is connected
UPLOAD_BROKE = ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE


class Answer(NamedTuple):
    """What came of a letter: a letter back, or a sentence why there is none."""

    site: str
    letter: Letter | None
    problem: str = ""
    num_bytes: int = 0
    seconds: float = 0.0
    is_lost: bool = False  # did not arrive: asking again may help
    is_silent: bool = False  # it is connected, and nothing whole came
    program: int | None = None  # which one at the site it was, where that is told


class _Unanswered(NamedTuple):
    """The last letter to a site that nobody waits for any more."""

    key: str
    since: str | None  # when the site had connected
    until: float  # moment after which Flower takes no answer to it


class Link:
    """The sites that are connected, by name.

    nodes: name -> Flower's number of the node. since: name -> when it connected; a site that has connected anew in the
    meantime has lost its letter.

    A site that was silent gets no further letter before it has answered the last one, so that none pile up at it. What
    it answers then is dropped, as that round is over, and the next time it is waited for again.
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
        self._unanswered: dict[str, _Unanswered] = {}
        self._back: set[str] = set()  # were silent, and have answered since, or begun anew

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
        nodes, since = self.nodes(), self.since()
        self._let_go(since)
        unwaited = set(silent) - self._back
        busy = letters.keys() & nodes.keys() & unwaited & self._unanswered.keys()
        for site in busy:
            yield Answer(site, None, "is still at work on an earlier message", is_lost=True, is_silent=True)
        sites = [site for site in letters if site in nodes and site not in busy]
        for site in letters.keys() - busy - set(sites):
            yield Answer(site, None, "is not connected", is_lost=True)
        waiting = self._sent(sites, letters, nodes, timeout)
        for site in set(sites) - set(waiting.values()):
            yield Answer(site, None, "could not be sent its message", is_lost=True)
        for site in waiting.values():
            self._unanswered.pop(site, None)
            self._back.discard(site)
        nap = FIRST_NAP
        while set(waiting.values()) - unwaited and (self.is_patient or time.monotonic() - started < timeout):
            replies = self._pulled([*waiting, *(one.key for one in self._unanswered.values())])
            for key in [key for key in replies if key in waiting]:
                site = waiting.pop(key)
                yield _answer(site, letters[site], key, replies[key], expected, time.monotonic() - started)
            for site in [site for site, one in self._unanswered.items() if one.key in replies]:
                del self._unanswered[site]
                self._back.add(site)
            nap = FIRST_NAP if replies else min(nap * 1.1, LONGEST_NAP)
            if not replies:
                time.sleep(nap)
            if time.monotonic() - looked > LOOK:
                looked, now = time.monotonic(), self.since()
                for key in [key for key, site in waiting.items() if now.get(site) != since.get(site)]:
                    site = waiting.pop(key)
                    why = "was started anew" if site in now else "is no longer connected"
                    yield Answer(site, None, f"{why}, and has lost its message", is_lost=True)
        for key, site in waiting.items():
            self._unanswered[site] = _Unanswered(key, since.get(site), started + timeout)
            why = "is still silent" if site in unwaited else f"has not answered within {timeout:g} s"
            yield Answer(site, None, why, is_lost=True, is_silent=True)

    def _let_go(self, since: Mapping[str, str]) -> None:
        """Forget letters that no answer can come to any more."""
        for site, one in list(self._unanswered.items()):
            is_anew = site in since and since[site] != one.since
            if is_anew:
                self._back.add(site)
            if is_anew or time.monotonic() > one.until:
                del self._unanswered[site]
        keys = {one.key for one in self._unanswered.values()}
        self._pulls = {key: pull for key, pull in self._pulls.items() if key in keys}

    def _sent(
        self, sites: list[str], letters: Mapping[str, Letter], nodes: Mapping[str, int], timeout: float
    ) -> dict[str, str]:
        """Send letters; returns Flower's key of each that was sent -> the site."""
        records = {id(letters[site]): to_record(letters[site]) for site in sites}  # most have the same
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
        return {key: site for key, site in zip(pushed, sites, strict=True) if key is not None}

    def _pulled(self, keys: list[str]) -> "dict[str, Message | Exception]":
        """Return the replies that are there, without waiting for one that is still on its way.

        Returns: the key of a letter -> the reply to it, or why that cannot be read.
        """
        if self.is_patient:
            return dict(zip(keys[:1], self.grid.pull_messages(keys[:1]), strict=False))
        for key in set(keys) - self._pulls.keys():
            self._pulls[key] = _Pull(self.grid, key)
            self._pulls[key].start()
        found: dict[str, Message | Exception] = {}
        for key in [key for key, pull in self._pulls.items() if not pull.is_alive()]:
            pull = self._pulls.pop(key)
            if pull.failure is not None:
                raise pull.failure
            found |= zip([key], pull.replies, strict=False)  # there may be none yet
        return found


class _Pull(threading.Thread):
    """Fetches one reply: Flower waits in there until all of it has arrived, and who sends it may have died.

    replies: the reply, or what Flower raises while it puts that together from what a site has sent. failure: what says
    nothing of a reply: that the run has ended, or that the server cannot be reached.
    """

    def __init__(self, grid: Grid, key: str) -> None:
        super().__init__(daemon=True)
        self.grid, self.key = grid, key
        self.replies: list[Message | Exception] = []
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self.replies = list(self.grid.pull_messages([self.key]))
        except Exception as error:
            if isinstance(error, httpx.TransportError):
                self.failure = error
            else:
                self.replies = [error]
        except BaseException as error:  # as Flower has it where the run is over
            self.failure = error


def _type_of(letter: Letter) -> str:
    """Return Flower's type of a message; the kind is in it for the logs of the site."""
    return MessageType.TRAIN if letter.kind == MessageType.TRAIN else f"{MessageType.QUERY}.{letter.kind}"


def _answer(
    site: str,
    letter: Letter,
    key: str,
    reply: "Message | Exception",
    expected: Mapping[str, Mapping[str, Expected]],
    seconds: float,
) -> Answer:
    """Judge the reply to the letter with Flower's `key`."""
    if isinstance(reply, Exception):
        return Answer(site, None, f"sent an answer that cannot be read ({type(reply).__name__})", 0, seconds)
    if reply.metadata.reply_to_message_id != key:
        return Answer(site, None, "sent an answer that is to another message", 0, seconds)
    if reply.has_error() and reply.error.code in UPLOAD_BROKE:
        why = "has begun to answer, and not all of it arrived"
        return Answer(site, None, why, 0, seconds, is_lost=True, is_silent=True)
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
