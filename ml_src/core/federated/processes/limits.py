"""Bounds what one site can make the server keep; follows flwr 1.41.0.

Flower checks who asks, and that an object is what its name says. It does not ask how much a site sends, whether a
message is an answer at all, nor who has told it of an object. Here the objects of each site lie apart from all others,
and are counted. Flower's handlers: `superlink/servicer/fleet/fleet_handlers.py`; what they store in:
`server/superlink/linkstate/in_memory_linkstate.py` and `supercore/object_store/in_memory_object_store.py`.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable
from contextvars import ContextVar
from itertools import islice
from threading import Lock
from typing import Any, NoReturn

from fastapi import HTTPException

import ml_src.core.federated.flower  # noqa: F401  # before flwr
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import is_valid_sha256_hash, iterate_object_tree
from flwr.supercore.object_store import ObjectStore
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore

MOST_OBJECTS = 4096  # of a site; Flower cuts arrays into pieces of 5 MiB
MOST_HEADER = 1 << 16  # bytes of a message without its objects
MOST_LETTERS = 4  # from the server to one site, that have no answer
LETTERS_PER_SITE = 4  # an answer under masks has twice the bytes of a letter, and the one before may still be there
MOST_LINES, MOST_CHARACTERS = 1000, 500  # of one kind in the log; of one line

_sender: ContextVar[int] = ContextVar("sender", default=SUPERLINK_NODE_ID)
log = logging.getLogger("flwr")


class Part(InMemoryObjectStore):  # type: ignore[misc]
    """The objects of one sender."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all objects."""
        with self.lock_store:
            return sum(len(entry.content) for entry in self.store.values())

    @property
    def messages(self) -> list[str]:
        """The objects that are whole messages, the oldest first: no other refers to them."""
        with self.lock_store:
            return [key for key, entry in self.store.items() if entry.ref_count == 0]

    def size_of(self, message: str) -> int | None:
        """Return the bytes of a message with all its objects, or None where one is not there."""
        with self.lock_store:
            if message not in self.store:
                return None
            keys = {node.object_id for node in iterate_object_tree(self.get_object_tree(message))}
            entries = [self.store[key] for key in keys]
            return sum(len(entry.content) for entry in entries) if all(one.is_available for one in entries) else None

    def problem_of(self, tree: ObjectTree) -> str:
        """Say what is wrong with the objects of a message, if anything is.

        An object must have the same parts wherever it stands. Where it has not, one that contains the next one twice,
        and so on, would be told again as a tree of 2**90 objects.
        """
        nodes = list(islice(iterate_object_tree(tree), MOST_OBJECTS + 1))
        if len(nodes) > MOST_OBJECTS:
            return "a message of too many objects"
        told: dict[str, list[str]] = {}
        with self.lock_store:
            for node in nodes:
                if not is_valid_sha256_hash(node.object_id):
                    return "an object whose name is no digest"
                parts = [child.object_id for child in node.children]
                entry = self.store.get(node.object_id)
                if (told.setdefault(node.object_id, parts) if entry is None else entry.child_object_ids) != parts:
                    return "an object that has two kinds of parts"
        return ""


class Parts(ObjectStore):  # type: ignore[misc]
    """Flower's store: one part for what the server sends, and one for the answers of each site.

    A site reads and takes away what the server sends, the server all. So no site can say anything of objects of others.
    Who asks is in `_sender`.
    """

    def __init__(self) -> None:
        self._parts: dict[int, Part] = {}
        self.largest_letter = 0  # bytes of the largest message of the server that has arrived at a site

    def of(self, sender: int) -> Part:
        """Return the part of a sender."""
        return self._parts.setdefault(sender, Part())

    @property
    def letters(self) -> Part:
        """What the server sends."""
        return self.of(SUPERLINK_NODE_ID)

    def _readable(self) -> list[Part]:
        return list(self._parts.values()) if _sender.get() == SUPERLINK_NODE_ID else [self.letters]

    def preregister(self, run_id: int, object_tree: ObjectTree) -> list[str]:
        return list(self.of(_sender.get()).preregister(run_id, object_tree))

    def put(self, object_id: str, object_content: bytes) -> None:
        self.of(_sender.get()).put(object_id, object_content)

    def get_object_tree(self, object_id: str) -> ObjectTree:
        part = next((part for part in self._readable() if object_id in part), self.letters)
        tree: ObjectTree = part.get_object_tree(object_id)
        return tree

    def get(self, object_id: str) -> bytes | None:
        found = [content for part in self._readable() if (content := part.get(object_id)) is not None]
        return max(found, key=len, default=None)  # all that are there have the same digest

    def delete(self, object_id: str) -> None:
        """Let a message go. A letter that the server is still sending stays: the server would fail."""
        parts = [self.of(_sender.get())]
        if _sender.get() == SUPERLINK_NODE_ID:
            parts = self._readable()
        elif (size := self.letters.size_of(object_id)) is not None:
            self.largest_letter = max(self.largest_letter, size)
            parts.append(self.letters)
        for part in parts:
            part.delete(object_id)

    def delete_objects_in_run(self, run_id: int) -> None:
        for part in list(self._parts.values()):
            part.delete_objects_in_run(run_id)

    def clear(self) -> None:
        for part in list(self._parts.values()):
            part.clear()

    def __contains__(self, object_id: str) -> bool:
        return any(object_id in part for part in self._readable())

    def __len__(self) -> int:
        return sum(len(part) for part in list(self._parts.values()))


class Limits:
    """Flower's handlers with bounds before them.

    max_request: bytes of a request, and of an answer to a small message.
    """

    def __init__(self, max_request: int) -> None:
        from flwr.superlink.servicer.fleet import fleet_handlers
        from flwr.superlink.servicer.runtime import runtime_handlers

        self.store, self.max_request = Parts(), max_request
        self._flower_push_messages = fleet_handlers.push_messages
        self._flower_push_object = fleet_handlers.push_object
        self._flower_push_letters = runtime_handlers.push_messages
        self._lock = Lock()  # between looking how much there is and storing more
        self._told: set[tuple[int, str]] = set()

    def install(self) -> None:
        """Let Flower's server, which is not yet made, use all this."""
        from flwr.server.superlink.linkstate import linkstate_factory
        from flwr.supercore.object_store import object_store_factory
        from flwr.superlink.servicer.fleet import fleet_handlers
        from flwr.superlink.servicer.runtime import runtime_handlers

        object_store_factory.InMemoryObjectStore = lambda: self.store
        linkstate_factory.InMemoryLinkState = _with_one_lock(linkstate_factory.InMemoryLinkState)
        fleet_handlers.push_messages = _of_site(self.push_messages)
        fleet_handlers.push_object = _of_site(self.push_object)
        for name in ("pull_messages", "pull_object", "confirm_message_received"):
            setattr(fleet_handlers, name, _of_site(getattr(fleet_handlers, name)))
        runtime_handlers.push_messages = self.push_letters

    @property
    def most_bytes(self) -> int:
        """What a site may have at the server."""
        return self.max_request + LETTERS_PER_SITE * self.store.largest_letter

    def push_messages(self, request: Any, state: Any) -> Any:
        """Take an answer's header, and the names of its objects."""
        node = request.node.node_id
        part = self.store.of(node)
        with self._lock:
            if problem := _problem_of_header(request) or part.problem_of(request.message_object_trees[0]):
                self._refuse(state, node, problem)
            tree = request.message_object_trees[0]
            num_objects = len({node.object_id for node in iterate_object_tree(tree)})
            self._make_room(state, part, lambda: len(part) + num_objects > MOST_OBJECTS, tree.object_id)
            response = self._flower_push_messages(request=request, state=state)
            if not response.objects_to_push:  # Flower would keep the session, even where it has not taken the message
                state._cleanup_push_session(response.session_id, cleanup_messages=False)
        return response

    def push_object(self, request: Any, state: Any) -> Any:
        """Take an object of an answer; where it is too much, all that the site has sent is let go."""
        node, num_new = request.node.node_id, len(request.object_content)
        part = self.store.of(node)
        with self._lock:
            if not request.session_id:  # Flower would look for another's
                self._refuse(state, node, "an object of no message")
            self._make_room(state, part, lambda: part.num_bytes + num_new > self.most_bytes, *part.messages[-1:])
            if part.num_bytes + num_new > self.most_bytes:
                self._make_room(state, part, lambda: True)
                self._refuse(state, node, "more bytes than an answer has", 413)
            return self._flower_push_object(request=request, state=state)

    def push_letters(self, request: Any, state: Any, task: Any) -> Any:
        """Take messages from the server; before, let go what no site can answer any more.

        Flower keeps a message that a site has not fetched until the run ends, with all the weights.
        """
        with state.lock:
            of_site: dict[int, list[str]] = defaultdict(list)
            for key, message in state.message_ins_store.items():
                of_site[message.metadata.dst_node_id].append(key)
            state.delete_messages({key for keys in of_site.values() for key in keys[: 1 - MOST_LETTERS]})
            gone = [key for key in self.store.letters.messages if key not in state.message_ins_store]
        for key in gone:
            self.store.letters.delete(key)
        return self._flower_push_letters(request, state, task)

    def _make_room(self, state: Any, part: Part, is_full: Callable[[], bool], *kept: str) -> None:
        """Let the oldest messages of a site go, except some, while there is too much."""
        for message in part.messages:
            if message not in kept and is_full():
                part.delete(message)
                session = state._object_push_session_by_root.get(message, "")
                state._cleanup_push_session(session, cleanup_messages=False)

    def _refuse(self, state: Any, node: int, what: str, status: int = 400) -> NoReturn:
        """End the request; the first one of a kind is logged."""
        if (node, what) not in self._told:
            self._told.add((node, what))
            names = [known.name for known in state.get_node_info(node_ids=[node])]
            log.warning("site %s sends %s: refused, and not logged again", *names or [node], what)
        raise HTTPException(status, f"refused: {what}")


def _with_one_lock(make: Callable[..., Any]) -> Callable[..., Any]:
    """Let messages and what is being pushed have one lock.

    Flower takes the first and then the second where a message comes, and the other way round where an object comes too
    late, and where one is asked for that does: then each request waits for the other's lock, and all for both.
    """

    def made(*arguments: Any) -> Any:
        state = make(*arguments)
        state._lock_object_push_sessions = state.lock  # both may be taken twice by who has them
        return state

    return made


def _of_site(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Let the store know which site a request is from; Flower has checked that it is."""

    def handled(request: Any, **options: Any) -> Any:
        token = _sender.set(request.node.node_id)
        try:
            return handler(request=request, **options)
        finally:
            _sender.reset(token)

    return handled


def _problem_of_header(request: Any) -> str:
    """Say what is wrong with the first part of an answer; its objects come apart."""
    if (len(request.messages_list), len(request.message_object_trees)) != (1, 1):
        return "no message, or several at once"
    (message,), (tree,) = request.messages_list, request.message_object_trees
    if message.ByteSize() > MOST_HEADER:
        return "a message with too long a header"
    if not message.metadata.reply_to_message_id or message.metadata.src_node_id != request.node.node_id:
        return "a message that is no answer of its own"
    return "" if message.metadata.message_id == tree.object_id else "a message with objects of another"


class ShortLog(logging.Filter):
    """Keeps the log from filling the disk: what a site sends is in many lines of Flower's, again and again."""

    def __init__(self) -> None:
        super().__init__()
        self._count: Counter[tuple[str, int]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Pass the first lines from each place of the program, and not all of a long one."""
        place = (record.pathname, record.lineno)
        self._count[place] += 1
        record.msg, record.args = record.getMessage()[:MOST_CHARACTERS], ()
        if self._count[place] == MOST_LINES:
            record.msg += " (more such lines are left out)"
        return self._count[place] <= MOST_LINES
