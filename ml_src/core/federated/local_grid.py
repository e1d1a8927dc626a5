"""Flower's Grid in this process: a simulation's messages are real ones, without Ray and without sockets."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import ml_src.core.federated.flower  # noqa: F401  # before flwr
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

Answer = Callable[[Message], Message]


@dataclass
class LocalGrid(Grid):  # type: ignore[misc]
    """Nodes that answer in turn: the next one works when its reply is asked for.

    Two private details of Flower 1.41 are used: a Message wants a TaskIdentity, and its id is set in its metadata.
    """

    nodes: Mapping[int, Answer]
    waiting: dict[str, Message] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._numbers = itertools.count(1)
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = []
        for message in messages:
            key = f"message {next(self._numbers)}"
            message.metadata.__dict__["_message_id"] = key
            self.waiting[key] = message
            pushed.append(key)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        key = next((key for key in message_ids if key in self.waiting), None)
        if key is None:
            return []
        message = self.waiting.pop(key)
        return [self.nodes[message.metadata.dst_node_id](message)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return [reply for key in self.push_messages(messages) for reply in self.pull_messages([key])]

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def set_run(self, run: Run) -> None:
        raise NotImplementedError("a simulation has no run of Flower's")

    @property
    def run(self) -> Run:
        raise NotImplementedError("a simulation has no run of Flower's")
