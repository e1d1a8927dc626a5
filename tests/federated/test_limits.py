"""What one site sends without end does not fill the memory of the server, nor stand in the way of other sites."""

import asyncio
import hashlib
import json
import logging
import sys
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread

import httpx
import known_federation
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import HTTPException
from known_federation import descendants, order, running, start, wait_for
from known_sites import Configure, led

import ml_src.core.federated.flower  # noqa: F401  # before flwr
from flwr.app import ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest
from flwr.proto.task_pb2 import Task
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.supercore.retry import http_retry
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers
from flwr.supernode.fleet_http_connection import http_request_response
from ml_src.core.federated import from_kits
from ml_src.core.federated.kits import read_server_kit, read_site_kit
from ml_src.core.federated.link import Answer, Link
from ml_src.core.federated.processes import limits as module
from ml_src.core.federated.processes import superlink
from ml_src.core.federated.processes.limits import (
    LETTERS_PER_SITE,
    MOST_CHARACTERS,
    MOST_HEADER,
    MOST_LETTERS,
    MOST_LINES,
    MOST_OBJECTS,
    Limits,
    Part,
    ShortLog,
)
from ml_src.core.federated.processes.superlink import FLEET, HEARTBEAT, MOST_AT_ONCE, MOST_WAITING, Turns
from ml_src.core.federated.rounds import Federation
from ml_src.core.federated.site import Site
from ml_src.core.federated.site_state import read_end

pytestmark = pytest.mark.xdist_group("processes")
MAX_REQUEST = 10_000
LETTER = 20_000  # bytes
PIECE, NUM_PIECES = 900_000, 60  # bytes


def digest(text: object) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()


def content(num_bytes: int) -> RecordDict:
    """Records with at least as many bytes; the same ones for the same number."""
    return RecordDict({"sealed": ConfigRecord({}), "vector": ConfigRecord({"values": bytes(num_bytes)})})


def message(run: int, source: int, target: int, records: RecordDict, reply_to: str = "", ttl: float = 60.0) -> Message:
    metadata = Metadata(run, "", source, target, reply_to, "1", time.time(), ttl, "train")
    made = make_message(metadata, records)
    made.metadata.__dict__["_message_id"] = made.object_id
    return made


def header(site: int, *answers: Message, trees: list[ObjectTree] | None = None) -> PushMessagesRequest:
    """What a site sends of a message before its objects."""
    return PushMessagesRequest(
        node=Node(node_id=site),
        messages_list=[message_to_proto(remove_content_from_message(one)) for one in answers],
        message_object_trees=[get_object_tree(one) for one in answers] if trees is None else trees,
    )


class Server:
    """Flower's state with two sites, and its handlers as the server and the sites reach them."""

    def __init__(self) -> None:
        from flwr.superlink.main import create_app

        self.limits = Limits(MAX_REQUEST)
        self.limits.install()
        self.state = create_app().state.linkstate_factory.state()
        self.a, self.b = (self.state.create_node("", "", name.encode(), 30.0, name=name) for name in "ab")
        for site in (self.a, self.b):
            self.state.activate_node(site, 30.0)
        self.run = self.state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, None, TaskType.SERVER_APP)
        self.task = Task(task_id=self.state.get_run_info()[0].primary_task_id, run_id=self.run)
        self.state.claim_task(self.task.task_id)
        self.state.activate_task(self.task.task_id)

    def announce(self, site: int, num_bytes: int = LETTER) -> tuple[Message, list[PushObjectRequest]]:
        """Let the server announce a letter to a site; returns it, and how it sends the objects of it."""
        letter = message(self.run, SUPERLINK_NODE_ID, site, content(num_bytes), ttl=600.0)
        request = PushAppMessagesRequest(
            messages_list=[message_to_proto(remove_content_from_message(letter))],
            message_object_trees=[get_object_tree(letter)],
        )
        taken = runtime_handlers.push_messages(request, self.state, self.task)
        node = Node(node_id=SUPERLINK_NODE_ID)
        return letter, [
            PushObjectRequest(
                node=node, run_id=self.run, object_id=key, object_content=one.deflate(), session_id=taken.session_id
            )
            for key, one in get_all_nested_objects(letter).items()
            if key in taken.objects_to_push
        ]

    def is_sent(self, requests: list[PushObjectRequest]) -> bool:
        """Let the server send objects."""
        return all(runtime_handlers.push_object(request, self.state, self.task).stored for request in requests)

    def send(self, site: int, num_bytes: int = LETTER) -> Message:
        """Let the server send a site a letter."""
        letter, requests = self.announce(site, num_bytes)
        assert self.is_sent(requests)
        return letter

    def confirm(self, site: int, letter: str) -> None:
        """Let a site say that it has a letter."""
        request = ConfirmMessageReceivedRequest(node=Node(node_id=site), run_id=self.run, message_object_id=letter)
        fleet_handlers.confirm_message_received(request=request, state=self.state, store=self.state.object_store)

    def fetch(self, site: int) -> dict[str, bytes]:
        """Let a site fetch a letter; returns the objects of it, b"" for those that are not there."""
        request = PullMessagesRequest(node=Node(node_id=site))
        pulled = fleet_handlers.pull_messages(request=request, state=self.state, store=self.state.object_store)
        (tree,), (letter,) = pulled.message_object_trees, pulled.messages_list
        found = {}
        for node in module.iterate_object_tree(tree):
            wanted = PullObjectRequest(node=Node(node_id=site), run_id=self.run, object_id=node.object_id)
            found[node.object_id] = fleet_handlers.pull_object(request=wanted, state=self.state).object_content
        self.confirm(site, letter.metadata.message_id)
        return found

    def asked(self, site: int) -> Message:
        """Send a letter and let the site fetch it."""
        letter = self.send(site)
        assert all(self.fetch(site).values())
        return letter

    def answer(self, site: int, letter: Message, num_bytes: int) -> Message:
        """Let a site answer, as Flower's client does."""
        made = message(self.run, site, SUPERLINK_NODE_ID, content(num_bytes), letter.metadata.message_id)
        taken = fleet_handlers.push_messages(request=header(site, made), state=self.state)
        for key, one in get_all_nested_objects(made).items():
            if key in taken.objects_to_push:
                assert self.push(site, key, one.deflate(), taken.session_id)
        return made

    def push(self, site: int, key: str, one: bytes, session: str) -> bool:
        request = PushObjectRequest(
            node=Node(node_id=site), run_id=self.run, object_id=key, object_content=one, session_id=session
        )
        return bool(fleet_handlers.push_object(request=request, state=self.state).stored)

    def received(self, letter: Message) -> dict[str, bytes]:
        """Let the server fetch the answer to a letter; returns its objects, b"" for those that are not there."""
        request = PullAppMessagesRequest(message_ids=[letter.metadata.message_id])
        pulled = runtime_handlers.pull_messages(request, self.state, self.task)
        found = {}
        server = Node(node_id=SUPERLINK_NODE_ID)
        for tree in pulled.message_object_trees:
            for node in module.iterate_object_tree(tree):
                wanted = PullObjectRequest(node=server, run_id=self.run, object_id=node.object_id)
                found[node.object_id] = runtime_handlers.pull_object(wanted, self.state, self.task).object_content
            confirmed = ConfirmMessageReceivedRequest(node=server, run_id=self.run, message_object_id=tree.object_id)
            runtime_handlers.confirm_message_received(confirmed, self.state, self.task)
        return found

    def kept(self) -> tuple[int, ...]:
        """How many there are of all that a site could make more of."""
        state = self.state
        counts = (state.message_ins_store, state.message_res_store, state._object_push_sessions, state.object_store)
        return tuple(map(len, counts))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    from flwr.server.superlink.linkstate import linkstate_factory
    from flwr.supercore.object_store import object_store_factory

    monkeypatch.setattr(object_store_factory, "InMemoryObjectStore", object_store_factory.InMemoryObjectStore)
    monkeypatch.setattr(linkstate_factory, "InMemoryLinkState", linkstate_factory.InMemoryLinkState)
    for handlers in (fleet_handlers, runtime_handlers):
        for name in ("push_messages", "push_object", "pull_messages", "pull_object", "confirm_message_received"):
            monkeypatch.setattr(handlers, name, getattr(handlers, name))
    yield Server()


def test_the_inside_of_flower_that_is_bounded_is_still_there(server: Server) -> None:
    """That the handlers are those that Flower's routes call, the running server shows below."""
    assert server.state.object_store is server.limits.store
    assert server.kept() == (0, 0, 0, 0)
    tree = ObjectTree(object_id=digest(1), children=[ObjectTree(object_id=digest(2))])
    part = Part()
    part.preregister(1, tree)
    entry = part.store[digest(1)]
    assert (entry.content, entry.child_object_ids, entry.ref_count) == (b"", [digest(2)], 0)
    assert part.store[digest(2)].ref_count == 1
    session = server.state.start_session(server.run)
    server.state.preregister_object_tree(tree, session)
    assert server.state._object_push_session_by_root == {digest(1): session}
    server.state._cleanup_push_session(session, cleanup_messages=False)
    assert server.state._object_push_session_by_root == server.state._object_push_sessions == {}


def test_answers_under_masks_arrive_whole_and_nothing_is_left(server: Server) -> None:
    """They have twice the bytes of the weights that came."""
    for _ in range(10):
        letters = [server.asked(site) for site in (server.a, server.b)]
        answers = [
            server.answer(site, letter, 2 * LETTER) for site, letter in zip((server.a, server.b), letters, strict=True)
        ]
        assert server.limits.store.of(server.a).num_bytes < server.limits.most_bytes / 2
        for letter, answered in zip(letters, answers, strict=True):
            found = server.received(letter)
            assert all(found.values())
            assert found.keys() == get_all_nested_objects(answered).keys()
    assert server.kept() == (0, 0, 0, 0)


@pytest.mark.parametrize(
    "wrong, why",
    [
        ("nothing", "no message, or several at once"),
        ("two", "no message, or several at once"),
        ("order", "no answer of its own"),
        ("another's name", "no answer of its own"),
        ("other objects", "objects of another"),
        ("long", "too long a header"),
        ("many", "too many objects"),
        ("no digest", "no digest"),
        ("doubling", "two kinds of parts"),
        ("repeated", "two kinds of parts"),
    ],
)
def test_what_is_no_answer_is_refused_and_leaves_nothing(server: Server, wrong: str, why: str) -> None:
    letter = server.asked(server.b)
    sound = message(server.run, server.b, SUPERLINK_NODE_ID, content(10), letter.metadata.message_id)
    key = sound.object_id
    match wrong:
        case "nothing":
            request = header(server.b)
        case "two":
            request = header(server.b, sound, sound)
        case "order":  # to itself, as if from the server
            request = header(server.b, message(server.run, SUPERLINK_NODE_ID, server.b, content(10)))
        case "another's name":
            request = header(
                server.b, message(server.run, server.a, SUPERLINK_NODE_ID, content(10), letter.metadata.message_id)
            )
        case "other objects":
            request = header(server.b, sound, trees=[ObjectTree(object_id=digest(0))])
        case "long":
            request = header(server.b, sound)
            request.messages_list[0].metadata.group_id = "x" * MOST_HEADER
        case "many":
            leaves = [ObjectTree(object_id=digest(number)) for number in range(MOST_OBJECTS)]
            request = header(server.b, sound, trees=[ObjectTree(object_id=key, children=leaves)])
        case "no digest":
            bad = ObjectTree(object_id="x" * 64)
            request = header(server.b, sound, trees=[ObjectTree(object_id=key, children=[bad])])
        case "doubling":
            tree = ObjectTree(object_id=digest(0))
            for depth in range(1, 60):
                again = ObjectTree(object_id=tree.object_id)
                tree = ObjectTree(object_id=digest(depth), children=[tree, again])
            request = header(server.b, sound, trees=[ObjectTree(object_id=key, children=[tree])])
        case "repeated":  # a message that was announced before has other objects now
            taken = fleet_handlers.push_messages(request=header(server.b, sound), state=server.state)
            assert key in taken.objects_to_push
            more = [*get_object_tree(sound).children, ObjectTree(object_id=digest(9))]
            request = header(server.b, sound, trees=[ObjectTree(object_id=key, children=more)])
    before = server.kept()
    with pytest.raises(HTTPException, match=why):
        fleet_handlers.push_messages(request=request, state=server.state)
    assert server.kept() == before


def test_answers_to_what_was_never_asked_leave_nothing(server: Server) -> None:
    before = server.kept()
    for number in range(20):
        made = message(server.run, server.b, SUPERLINK_NODE_ID, content(10), digest(number))
        taken = fleet_handlers.push_messages(request=header(server.b, made), state=server.state)
        assert list(taken.objects_to_push) == []
    assert server.kept() == before


def test_objects_without_end_are_refused_and_let_go_and_the_other_site_is_not_disturbed(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    letters = {site: server.asked(site) for site in (server.a, server.b)}
    answered = server.answer(server.a, letters[server.a], LETTER)
    records = RecordDict({str(number): ConfigRecord({"x": bytes([number]) * 5000}) for number in range(100)})
    made = message(server.run, server.b, SUPERLINK_NODE_ID, records, letters[server.b].metadata.message_id)
    taken = fleet_handlers.push_messages(request=header(server.b, made), state=server.state)
    part, most, kept = server.limits.store.of(server.b), server.limits.most_bytes, []
    assert MAX_REQUEST + LETTERS_PER_SITE * LETTER < most < 2 * (MAX_REQUEST + LETTERS_PER_SITE * LETTER)
    statuses: Counter[int] = Counter()
    with caplog.at_level(logging.WARNING, logger="flwr"):
        for _ in range(3):
            for key, one in get_all_nested_objects(made).items():
                try:
                    statuses[server.push(server.b, key, one.deflate(), taken.session_id)] += 1
                except HTTPException as error:
                    statuses[error.status_code] += 1
                kept.append(part.num_bytes)
            with suppress(HTTPException):
                taken = fleet_handlers.push_messages(request=header(server.b, made), state=server.state)
    assert statuses[413] == 3
    assert most / 2 < max(kept) <= most
    assert caplog.text.count("site b sends more bytes than an answer has: refused") == 1
    found = server.received(letters[server.a])
    assert found.keys() == get_all_nested_objects(answered).keys()
    assert all(found.values())


def test_a_site_that_says_too_early_that_it_has_a_letter_does_not_end_the_server(server: Server) -> None:
    """The server could not send the rest of it, and takes that for an error of its own."""
    letter, requests = server.announce(server.b)
    server.confirm(server.b, letter.metadata.message_id)
    assert server.is_sent(requests)
    assert all(server.fetch(server.b).values())
    assert len(server.limits.store) == 0


def test_an_object_of_no_session_is_refused(server: Server) -> None:
    """Flower would take it as one that another site is about to send, and refuse it from that one."""
    letter = server.asked(server.a)
    made = message(server.run, server.a, SUPERLINK_NODE_ID, content(10), letter.metadata.message_id)
    taken = fleet_handlers.push_messages(request=header(server.a, made), state=server.state)
    shared, one = next(iter(get_all_nested_objects(made).items()))
    with pytest.raises(HTTPException, match="no message"):
        server.push(server.b, shared, one.deflate(), "")
    assert server.push(server.a, shared, one.deflate(), taken.session_id)


def test_what_a_site_says_of_an_object_is_not_believed_for_others(server: Server) -> None:
    """The empty records of each letter have a known digest: told first with a part that never comes, all would wait."""
    letter = server.asked(server.b)
    made = message(server.run, server.b, SUPERLINK_NODE_ID, content(10), letter.metadata.message_id)
    empty = ConfigRecord({}).object_id
    lie = ObjectTree(object_id=empty, children=[ObjectTree(object_id=digest("never"))])
    tree = ObjectTree(object_id=made.object_id, children=[lie])
    assert empty in get_all_nested_objects(letter)
    taken = fleet_handlers.push_messages(request=header(server.b, made, trees=[tree]), state=server.state)
    assert digest("never") in taken.objects_to_push
    asked = server.asked(server.a)  # all of it is there
    server.answer(server.a, asked, LETTER)
    assert all(server.received(asked).values())


def test_answers_that_nobody_fetches_make_room_for_the_next(server: Server) -> None:
    """A site that is slow in each round is not shut out by what it was too late with."""
    for _ in range(30):
        letter = server.asked(server.b)
        server.answer(server.b, letter, LETTER)
        assert server.limits.store.of(server.b).num_bytes <= server.limits.most_bytes
    assert all(server.received(letter).values())


def test_objects_that_are_only_announced_are_bounded_too(server: Server) -> None:
    for number in range(6):
        letter = server.asked(server.b)
        made = message(server.run, server.b, SUPERLINK_NODE_ID, content(10), letter.metadata.message_id)
        leaves = [ObjectTree(object_id=digest((number, leaf))) for leaf in range(MOST_OBJECTS // 2)]
        tree = ObjectTree(object_id=made.object_id, children=leaves)
        fleet_handlers.push_messages(request=header(server.b, made, trees=[tree]), state=server.state)
    assert len(server.limits.store.of(server.b)) <= MOST_OBJECTS
    assert server.kept()[2] == 1  # sessions


@pytest.mark.parametrize("is_fetched", [False, True])
def test_letters_that_a_site_does_not_answer_are_let_go(server: Server, is_fetched: bool) -> None:
    """Whether it fetches them or not; each has the weights of another round."""
    for number in range(20):
        letter = server.send(server.b, LETTER + number)
        if is_fetched:
            server.state.get_message_ins(server.b, 1)
    assert len(server.state.message_ins_store) == MOST_LETTERS
    assert server.limits.store.letters.num_bytes < (MOST_LETTERS + 1) * LETTER
    assert letter.metadata.message_id in server.state.message_ins_store


def test_a_site_reads_what_the_server_sends_and_no_answer(server: Server) -> None:
    letter = server.asked(server.a)
    answered = server.answer(server.a, letter, 10)
    for site in (server.a, server.b):
        wanted = PullObjectRequest(node=Node(node_id=site), run_id=server.run, object_id=answered.object_id)
        assert not fleet_handlers.pull_object(request=wanted, state=server.state).object_found


@pytest.mark.parametrize("what", ["a site pushes", "a site asks for", "the server pushes", "the server asks for"])
def test_an_object_that_is_too_late_does_not_wait_for_a_message_that_waits_for_it(server: Server, what: str) -> None:
    """The server announces a letter just when all that was to be pushed with an object is given up."""
    state = server.state
    sender = server.b if what in ("a site pushes", "the server asks for") else SUPERLINK_NODE_ID
    asked, (pushed, *_) = server.announce(server.b)
    if sender == server.b:
        assert server.is_sent([pushed, *_])
        made = message(server.run, server.b, SUPERLINK_NODE_ID, content(10), asked.metadata.message_id)
        taken = fleet_handlers.push_messages(request=header(server.b, made), state=state)
        pushed = PushObjectRequest(run_id=server.run, object_id=made.object_id, session_id=taken.session_id)
    pushed.node.node_id = sender
    session = state._object_push_sessions[pushed.session_id]
    session.expires_at -= timedelta(seconds=3600)
    wanted = PullObjectRequest(run_id=server.run, object_id=pushed.object_id)
    wanted.node.node_id = server.b if what == "a site asks for" else SUPERLINK_NODE_ID
    announced, giving_up, storing = Event(), Event(), Event()
    announce, store, give_up = (
        state.store_message_and_object_tree,
        state.store_message_ins,
        state._on_push_session_expired,
    )

    def announce_meanwhile(*arguments: object) -> tuple[bool, list[str]]:
        announced.set()
        assert giving_up.wait(30)
        return announce(*arguments)

    def store_meanwhile(letter: Message) -> str:
        storing.set()
        return store(letter)

    def give_up_meanwhile(keys: set[str]) -> None:
        giving_up.set()
        storing.wait(0.2)  # in vain where that waits for this
        give_up(keys)

    state.store_message_and_object_tree, state.store_message_ins = announce_meanwhile, store_meanwhile
    state._on_push_session_expired = give_up_meanwhile
    late = {
        "a site pushes": lambda: fleet_handlers.push_object(request=pushed, state=state),
        "a site asks for": lambda: fleet_handlers.pull_object(request=wanted, state=state),
        "the server pushes": lambda: runtime_handlers.push_object(pushed, state, server.task),
        "the server asks for": lambda: runtime_handlers.pull_object(wanted, state, server.task),
    }[what]
    threads = [Thread(target=do, daemon=True) for do in (lambda: server.announce(server.a), late)]
    threads[0].start()
    assert announced.wait(30)
    threads[1].start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    assert storing.is_set()
    assert pushed.session_id not in state._object_push_sessions


def test_the_log_has_a_bounded_number_of_bounded_lines() -> None:
    short, lines = ShortLog(), []

    def say(line: int, text: str) -> None:
        record = logging.LogRecord("flwr", logging.INFO, "handlers.py", line, "from %s", (text,), None)
        if short.filter(record):
            lines.append(record.getMessage())

    for number in range(2 * MOST_LINES):
        say(1, f"{number} {'x' * 10_000}")
    say(2, "another place")
    assert len(lines) == MOST_LINES + 1
    assert max(map(len, lines)) < MOST_CHARACTERS + 50
    assert "left out" in lines[-2]
    assert lines[-1] == "from another place"


# Requests at once


def headers_of(key: ec.EllipticCurvePrivateKey, moment: bytes = b"now") -> list[tuple[bytes, bytes]]:
    signature = sign_message(key, moment)
    return [
        (b"flwr-public-key", b64encode(public_key_to_bytes(key.public_key()))),
        (b"flwr-timestamp", b"now"),
        (b"flwr-signature", b64encode(signature)),
    ]


def request(key: ec.EllipticCurvePrivateKey, path: str = FLEET + "x", moment: bytes = b"now") -> dict[str, object]:
    return {"type": "http", "path": path, "headers": headers_of(key, moment)}


def test_a_site_has_few_requests_at_once_and_another_need_not_wait_for_it() -> None:
    """One that waits is not read; too many are sent away; one that only names the key of another site is refused."""
    greedy, other = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    counts: Counter[bytes] = Counter()
    statuses: Counter[int] = Counter()
    most = MOST_AT_ONCE + MOST_WAITING

    async def requests() -> None:
        release = asyncio.Event()

        async def app(scope, receive, send) -> None:
            counts[scope["path"], scope["headers"][0][1]] += 1
            await release.wait()
            await send({"type": "http.response.start", "status": 200})

        async def send(sent) -> None:
            if sent["type"] == "http.response.start":
                statuses[sent["status"]] += 1

        turns = Turns(app)
        asked = [request(greedy)] * (most + 5) + [request(greedy, HEARTBEAT), request(other)]
        tasks = [asyncio.create_task(turns(one, None, send)) for one in asked]
        await turns(request(greedy, moment=b"another time"), None, send)
        while not counts[FLEET + "x", request(other)["headers"][0][1]]:
            await asyncio.sleep(0)
        assert sorted(counts.values()) == [1, 1, MOST_AT_ONCE]
        assert statuses == {401: 1, 503: 5}
        release.set()
        await asyncio.gather(*tasks)
        await turns(request(greedy), None, send)

    asyncio.run(requests())
    assert statuses == {401: 1, 503: 5, 200: most + 3}
    assert 503 in http_retry._RETRYABLE_STATUS_CODES  # an honest site would come again


@pytest.mark.parametrize("is_begun", [False, True])
def test_a_request_that_lasts_too_long_is_told_so_where_it_has_no_answer_yet(
    monkeypatch: pytest.MonkeyPatch, is_begun: bool
) -> None:
    monkeypatch.setattr(superlink, "LONGEST_REQUEST", 0.01)
    sent = []

    async def app(scope, receive, send) -> None:
        if is_begun:
            await send({"type": "http.response.start", "status": 200})
        await asyncio.Event().wait()

    async def send(message) -> None:
        sent.append(message)

    asyncio.run(Turns(app)(request(ec.generate_private_key(ec.SECP384R1())), None, send))
    assert [one.get("status") for one in sent] == ([200] if is_begun else [503, None])


# The end, told to who was away


@pytest.fixture
def ended(configure: Configure) -> tuple[Federation, dict[str, Site]]:
    """A training that is over, at sites that were not told so."""
    return led(configure(rounds=1))


def test_a_site_whose_letter_is_lost_is_told_the_end_all_the_same(
    ended: tuple[Federation, dict[str, Site]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each site loses another one of the letters."""
    federation, sites = ended
    grid = federation.session.link.grid
    lost = set(zip(grid.get_node_ids(), ("query.facts", "query.settle", "query.end"), strict=True))
    push = grid.push_messages

    def lose(messages: Iterable[Message]) -> Iterator[str | None]:
        for one in messages:
            way = (one.metadata.dst_node_id, one.metadata.message_type)
            yield None if way in lost else push([one])[0]
            lost.discard(way)

    monkeypatch.setattr(grid, "push_messages", lose)
    monkeypatch.setattr(from_kits, "LOOK", 0.0)
    from_kits._tell_those_who_come(federation, set(sites))
    assert not lost
    assert all(read_end(site.folder) for site in sites.values())


class WithMute(Link):
    """A link to sites of which the first never answers, and the others come while it is waited for."""

    def __init__(self, link: Link) -> None:
        super().__init__(link.grid, self.come, is_patient=True)
        self.all = link.nodes()
        self.mute = min(self.all)
        self.waits: list[float] = []

    def come(self) -> dict[str, int]:
        return dict(self.all) if self.waits else {self.mute: self.all[self.mute]}

    def ask(self, letters, expected, timeout, silent=()) -> Iterator[Answer]:
        if self.mute in letters:
            self.waits.append(timeout)
            yield Answer(self.mute, None, "has not answered", is_lost=True, is_silent=True)
        yield from super().ask({site: letters[site] for site in letters if site != self.mute}, expected, timeout)


def test_a_silent_site_does_not_keep_the_end_from_those_who_come_meanwhile(
    ended: tuple[Federation, dict[str, Site]], monkeypatch: pytest.MonkeyPatch
) -> None:
    federation, sites = ended
    link = federation.session.link = WithMute(federation.session.link)
    monkeypatch.setattr(from_kits, "LOOK", 0.0)
    monkeypatch.setattr(from_kits, "AWAY", 0.0)
    from_kits._tell_those_who_come(federation, set(sites))
    assert link.waits == [from_kits.PATIENCE]
    assert {name for name, site in sites.items() if read_end(site.folder)} == sites.keys() - {link.mute}


# The running server


def resident(pid: int) -> int:
    """Bytes of memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024


def test_a_site_that_pushes_without_end_does_not_fill_the_running_server_and_the_other_gets_through(
    tmp_path: Path,
) -> None:
    """It has its key, and sends with Flower's own client; 1 MiB is a request, and all that it may have kept."""
    if sys.platform != "linux":
        pytest.skip("looks into /proc")
    kits = known_federation.kits(tmp_path, ["a", "b"])
    settings = kits / "server" / "server.yaml"
    settings.write_text(settings.read_text().replace("max_request_mb: 32", "max_request_mb: 1"))
    assert read_server_kit(kits / "server").max_request_mb == 1
    data = tmp_path / "data"
    data.mkdir()
    processes = start("server", str(kits / "server")), start("site", str(kits / "a"), str(data))
    with running(*processes):
        first = order(kits / "server", "0", {"sites": ["a"], "group": "0", "floats": 1000})
        wait_for("the first round", first.exists, *processes)
        (pid,) = descendants(processes[0].pid)
        kit = read_site_kit(kits / "b")
        key = kit.signing_key()
        with http_request_response(kit.address, False, kit.ca.read_bytes(), (key, key.public_key()), 0) as client:
            site, receive, send, *_, push, confirm = client
            came = order(kits / "server", "1", {"sites": ["a", "b"], "group": "1", "floats": 1000})
            letters = []
            wait_for("a letter", lambda: letters.append(receive()) or letters[-1], *processes)
            letter, _ = letters[-1]
            run = letter.metadata.run_id
            confirm(run, letter.metadata.message_id)
            before = resident(pid)

            with no_object_id_recompute():
                records = RecordDict(
                    {str(number): ConfigRecord({"x": bytes([number]) * PIECE}) for number in range(NUM_PIECES)}
                )
                made = message(run, site, SUPERLINK_NODE_ID, records, letter.metadata.message_id, ttl=30.0)
                pieces = {one: each.deflate() for one, each in get_all_nested_objects(made).items()}
                _, session = send(remove_content_from_message(made), get_object_tree(made), 0.0)
            num_taken = sum(is_taken(push, run, session, one, piece) for one, piece in pieces.items())
            growth = resident(pid) - before
            order_of_its_own = message(run, SUPERLINK_NODE_ID, site, content(10))
            for _ in range(50):
                with pytest.raises(httpx.HTTPStatusError, match="400"):
                    send(order_of_its_own, get_object_tree(order_of_its_own), 0.0)
            wait_for("the round", came.exists, *processes)
            again = order(kits / "server", "2", {"sites": ["a"], "group": "2", "floats": 100_000})
            wait_for("the next round", again.exists, *processes)
    assert growth < NUM_PIECES * PIECE / 2
    assert num_taken * PIECE < 2**20
    answers = json.loads(came.read_text())["sites"]
    assert answers["a"] == 1.0
    assert isinstance(answers["b"], str)  # why there is none
    assert json.loads(again.read_text())["sites"] == {"a": 1.0}
    log = (kits / "server" / "state" / "superlink.log").read_text()
    assert log.count("site b sends more bytes than an answer has: refused") == 1
    assert log.count("site b sends a message that is no answer of its own: refused") == 1


def is_taken(push: Callable[..., None], run: int, session: str, key: str, piece: bytes) -> bool:
    try:
        push(run, session, key, piece)
    except (httpx.HTTPStatusError, ObjectPushError):
        return False
    return True
