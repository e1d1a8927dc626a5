"""Whatever a site answers, and whenever, is a matter of that site: the others, and the server, go on."""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import known_federation
import pytest
from known_federation import running, start, wait_for
from known_sites import Configure, prepared

import ml_src.core.federated.flower  # noqa: F401  # before flwr
from flwr.app import ConfigRecord, Error, Message, Metadata
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.run import RunNotRunningException
from flwr.supernode.fleet_http_connection import http_request_response
from ml_src.core.federated.kits import read_site_kit
from ml_src.core.federated.link import Answer, Link
from ml_src.core.federated.local_grid import LocalGrid
from ml_src.core.federated.processes.tuning import fetch_soon
from ml_src.core.federated.rounds import Federation
from ml_src.core.federated.wire import Letter, from_record, to_record

NODES = {"a": 1, "b": 2, "c": 3}
LONG = 30.0  # seconds; nothing here takes as long


def echo(message: Message) -> Message:
    return Message(to_record(from_record(message.content, {"facts": {}}).answer()), reply_to=message)


def to_another(message: Message) -> Message:
    reply = echo(message)
    reply.metadata.__dict__["_reply_to_message_id"] = "another"
    return reply


def incomplete(code: int) -> Callable[[Message], Message]:
    return lambda message: Message(Error(code, "a sentence\nof Flower's"), reply_to=message)


def failing(error: BaseException) -> Callable[[Message], Message]:
    """What Flower does when it puts the reply together."""

    def fail(message: Message) -> Message:
        raise error

    return fail


def asked(link: Link, number: int = 1, timeout: float = LONG, silent: Iterable[str] = ()) -> dict[str, Answer]:
    """What came of letters to all."""
    letters = dict.fromkeys(NODES, Letter("facts", "now", number))
    return {answer.site: answer for answer in link.ask(letters, {"facts": {}}, timeout, set(silent))}


# What cannot be used


@pytest.mark.parametrize(
    ("node", "problem", "is_lost"),
    [
        (failing(AttributeError("metadata")), "sent an answer that cannot be read (AttributeError)", False),
        (failing(KeyError("child")), "sent an answer that cannot be read (KeyError)", False),
        (failing(ValueError("head")), "sent an answer that cannot be read (ValueError)", False),
        (to_another, "sent an answer that is to another message", False),
        (incomplete(ErrorCode.MESSAGE_UNAVAILABLE), "has begun to answer, and not all of it arrived", True),
        (incomplete(ErrorCode.REPLY_MESSAGE_UNAVAILABLE), "has begun to answer, and not all of it arrived", True),
    ],
)
def test_what_one_site_sends_is_held_against_this_site_only(
    node: Callable[[Message], Message], problem: str, is_lost: bool
) -> None:
    found = asked(Link(LocalGrid({1: echo, 2: node, 3: echo}), lambda: NODES))
    assert found["a"].letter
    assert found["c"].letter
    assert (found["b"].letter, found["b"].problem, found["b"].is_lost) == (None, problem, is_lost)


@pytest.mark.parametrize("error", [RunNotRunningException(), httpx.ConnectError("certificate verify failed")])
def test_where_the_run_has_ended_or_the_server_is_away_that_is_raised(error: BaseException) -> None:
    with pytest.raises(type(error)):
        asked(Link(LocalGrid({1: echo, 2: failing(error), 3: echo}), lambda: NODES))


@pytest.fixture
def fetching() -> Iterator[Callable[[float], None]]:
    functions = inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree
    before = [dict(function.__kwdefaults__) for function in functions]
    yield fetch_soon
    for function, values in zip(functions, before, strict=True):
        function.__kwdefaults__ = values


@pytest.mark.parametrize("longest", [0.01, LONG])
def test_a_message_is_fetched_for_as_long_as_was_said(fetching: Callable[[float], None], longest: float) -> None:
    """Its second part comes with the sixth attempt, each 0.016 s or more after the one before."""
    fetching(longest)
    attempts: list[str] = []

    def part(key: str) -> bytes:
        attempts.append(key)
        if key == "second" and attempts.count(key) < 6:
            raise inflatable_utils.ObjectUnavailableError(key)
        return key.encode()

    if longest == LONG:
        assert inflatable_utils.pull_objects(["first", "second"], part).keys() == {"first", "second"}
    else:
        with pytest.raises(inflatable_utils.ObjectPullError):
            inflatable_utils.pull_objects(["first", "second"], part)


@pytest.mark.xdist_group("processes")
def test_objects_that_are_no_answer_do_not_end_the_server(tmp_path: Path) -> None:
    """A site sends, with its key and Flower's own client: no message, and one that is to another message."""
    kits = known_federation.kits(tmp_path, ["a", "b"])
    server = start("server", str(kits / "server"), function="lead_by_link")
    kit, came = read_site_kit(kits / "b"), kits / "server" / "came"
    key = kit.signing_key()
    with running(server):
        wait_for("the server", (kits / "server" / "begun").exists, server)
        with http_request_response(kit.address, False, kit.ca.read_bytes(), (key, key.public_key()), 0) as client:
            site, receive, send, *_, push, confirm = client
            for number in (1, 2, 3):
                letters: list[Message] = []
                wait_for("a letter", lambda got=letters: got.append(receive()) or got[-1], server)
                letter = letters[-1][0].metadata
                confirm(letter.run_id, letter.message_id)

                def answer(reply_to: str, letter: Metadata = letter) -> Message:
                    told = Metadata(
                        letter.run_id, "", site, SUPERLINK_NODE_ID, reply_to, "1", time.time(), 5.0, "query.facts"
                    )
                    return make_message(told, to_record(Letter("facts", "now", int(letter.group_id))))

                header = answer(letter.message_id)
                sent = {1: ConfigRecord({"x": 1}), 2: answer("f" * 64), 3: header}[number]
                header.metadata.__dict__["_message_id"] = sent.object_id
                tree = ObjectTree(object_id=sent.object_id) if number == 1 else get_object_tree(sent)
                pieces = {one: each.deflate() for one, each in get_all_nested_objects(sent).items()}
                with no_object_id_recompute():
                    _, session = send(remove_content_from_message(header), tree, 0.0)
                for one, piece in pieces.items():
                    push(letter.run_id, session, one, piece)
            wait_for("the answers", came.exists)
    assert json.loads(came.read_text()) == [
        "sent an answer that cannot be read (AttributeError)",
        "sent an answer that is to another message",
        "",
    ]


# What comes late


@dataclass
class Held(LocalGrid):
    """A grid on which the answers of some nodes are held back."""

    held: set[int] = field(default_factory=set)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return super().pull_messages([key for key in message_ids if self._is_free(key)])

    def _is_free(self, key: str) -> bool:
        return key in self.waiting and self.waiting[key].metadata.dst_node_id not in self.held

    def letters_of(self, node: int) -> list[str]:
        """Rounds of the letters that a node has not answered."""
        return [one.metadata.group_id for one in self.waiting.values() if one.metadata.dst_node_id == node]


def held_grid() -> Held:
    return Held(dict.fromkeys(NODES.values(), echo), held={3})


def answered(found: dict[str, Answer]) -> list[str]:
    return sorted(site for site, answer in found.items() if answer.letter is not None)


def test_who_answers_late_is_waited_for_in_the_next_round() -> None:
    grid = held_grid()
    link = Link(grid, lambda: NODES)
    found = asked(link, 1, LONG, silent="c")
    assert (found["c"].problem, found["c"].is_silent) == ("is still silent", True)
    grid.held.clear()
    for number in range(2, 10):
        found = asked(link, number, LONG, silent="c")
        if found["c"].letter:
            break
        assert found["c"].problem == "is still at work on an earlier message"
        assert grid.letters_of(3) in (["1"], [])  # no letter is added
    assert answered(found) == ["a", "b", "c"]
    assert found["c"].letter
    assert found["c"].letter.round == number > 2  # and what came late is not taken for it


def test_a_site_that_begins_anew_gets_letters_again_and_is_waited_for() -> None:
    grid, since = held_grid(), {"a": "1", "b": "1", "c": "1"}
    link = Link(grid, lambda: NODES, lambda: dict(since))
    asked(link, 1, LONG, silent="c")
    since["c"] = "2"
    grid.held.clear()
    assert answered(asked(link, 2, LONG, silent="c")) == ["a", "b", "c"]


def test_a_site_that_has_lost_its_letter_gets_another_when_the_time_for_the_first_is_over() -> None:
    grid = held_grid()
    link = Link(grid, lambda: NODES)
    assert asked(link, 1, 0.2)["c"].problem == "has not answered within 0.2 s"
    grid.waiting.clear()
    assert asked(link, 2, LONG, silent="c")["c"].problem == "is still silent"
    assert grid.letters_of(3) == ["2"]


def test_where_a_silent_site_is_needed_it_gets_its_letter_and_is_waited_for() -> None:
    grid = held_grid()
    link = Link(grid, lambda: NODES)
    asked(link, 1, LONG, silent="c")
    grid.held.clear()
    assert answered(asked(link, 2)) == ["a", "b", "c"]


def test_a_newcomer_that_says_nothing_makes_no_round_longer(configure: Configure) -> None:
    federation = waiting_for(configure, min_sites=2, timeout=1.0)
    federation.session.open(0)  # here it is waited for
    assert (list(federation.session.num_images), federation.session.silent) == (["site_0", "site_1"], {"site_2"})
    federation.session.federated = federation.session.federated.model_copy(update={"round_timeout": 3600.0})
    is_over = threading.Event()

    def train() -> None:
        for number in (1, 2):
            federation.train_round(number)
        is_over.set()

    threading.Thread(target=train, daemon=True).start()
    assert is_over.wait(LONG)  # not an hour
    federation.journal.close()
    assert [sorted(entry["sites"]) for entry in federation.journal.rounds] == [["site_0", "site_1"]] * 2


def waiting_for(configure: Configure, min_sites: int, timeout: float) -> Federation:
    """A federation with a clock, the third site of which is mute."""
    federation, _ = prepared(configure(min_sites=min_sites, round_timeout=timeout))
    link = federation.session.link
    assert isinstance(link.grid, LocalGrid)
    link.grid, link.is_patient = Held(link.grid.nodes, held={link.nodes()["site_2"]}), False
    return federation
