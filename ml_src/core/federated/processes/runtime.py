"""All that these processes use of Flower's inside; it follows flwr 1.41.0, and its version is fixed for that reason.

Starting runs: `cli/run/run.py`, `cli/supernode/register.py`. Waiting for the task of a run or of a message:
`supercore/superexec/run_superexec.py`. Doing it: `superlink/runtime/run_serverapp.py` at the server,
`supernode/runtime/run_clientapp.py` at a site. The difference: those install the app that comes with a run and start a
process to execute it. Here the app is empty, and a function of ours that is installed already takes its place, so that
nothing which crosses the network is ever executed.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import httpx

import ml_src.core.federated.flower  # noqa: F401  # before flwr
from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    StartRunRequest,
)
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType as TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message
from ml_src.core.federated.kits import Kit, ServerKit, public_pem
from ml_src.core.federated.processes.superlink import TOKEN_HEADER
from ml_src.core.federated.processes.tuning import fetch_soon

if TYPE_CHECKING:
    from flwr.serverapp import Grid
    from flwr.supercore.control import ControlHttpClient

fetch_soon()

_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_PROJECT = """\
[project]
name = "federation"
version = "1.0.0"
description = "Empty: what runs is installed at the server and at the sites."
license = "Apache-2.0"

[tool.flwr.app]
publisher = "federation"

[tool.flwr.app.components]
serverapp = "federation:server"
clientapp = "federation:client"

[tool.flwr.app.config]
"""


class _Token:
    """Adds the token of the server to every request, which its gate asks for."""

    def __init__(self, token: str) -> None:
        self._token = token

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> Any:
        context.request.headers[TOKEN_HEADER] = self._token
        return call_next(context)


@contextmanager
def control(kit: ServerKit) -> "Iterator[ControlHttpClient]":
    """Connect to the Control API of the kit's server, on this machine."""
    from flwr.supercore.control import ControlHttpClient

    client = ControlHttpClient.from_server_address(
        f"127.0.0.1:{kit.port}",
        insecure=False,
        root_certificates=kit.ca.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-cli"), _Token(kit.token.read_text("ascii"))],
    )
    with client:
        yield client


def register_sites(client: "ControlHttpClient", keys: Mapping[str, bytes]) -> None:
    """Make the sites' public keys (PEM) those that may connect."""
    for name, key in keys.items():
        client.RegisterNode(RegisterNodeRequest(public_key=key, name=name))


def connected(client: "ControlHttpClient", keys: Mapping[str, bytes]) -> dict[str, bool]:
    """Return which sites the server has heard of within the last minute."""
    nodes = client.ListNodes(ListNodesRequest()).nodes_info
    online = {node.public_key for node in nodes if node.status == "online"}
    return {name: key in online for name, key in keys.items()}


def start_run(client: "ControlHttpClient") -> int:
    """Start a run, and return its number."""
    from flwr.cli.build import build_fab_from_files  # here, as it would double what a worker imports
    from flwr.common.serde import fab_to_proto

    content, _ = build_fab_from_files({"pyproject.toml": _PROJECT.encode(), "federation.py": b"\n"})
    fab = Fab(sha256(content).hexdigest(), content, {})
    return int(client.StartRun(StartRunRequest(fab=fab_to_proto(fab))).run_id)


@contextmanager
def grid_of_run(kit: ServerKit, superexec_secret: bytes) -> "Iterator[Grid]":
    """Take the task of the run that was started, and return the grid of it; its end is the end of the run."""
    from flwr.common.serde import context_from_proto, run_from_proto
    from flwr.superlink.grid import HttpGrid

    token = _Token(kit.token.read_text("ascii"))
    where: dict[str, Any] = {
        "server_address": f"127.0.0.1:{kit.port}",
        "insecure": False,
        "root_certificates": kit.ca.read_bytes(),
    }
    with RuntimeHttpClient.from_server_address(**where, interceptors=[*_acquiring(superexec_secret), token]) as client:
        while (task_token := acquire(client, TaskType.SERVER_APP)) is None:
            time.sleep(0.05)
    grid = HttpGrid(where["server_address"], False, where["root_certificates"], token=task_token)
    # HttpGrid makes its client itself when it is first used, without the header that the gate asks for.
    grid._client = RuntimeHttpClient.from_server_address(
        **where, interceptors=[*_of_task(task_token), token], retry_invoker=grid._retry_invoker
    )
    client = grid._client
    task_input = client.PullTaskInput(PullTaskInputRequest())
    TaskIdentity.task_id = task_input.task_id  # Flower reads who sends a message from here
    TaskIdentity.run_id = task_input.run.run_id
    TaskIdentity.node_id = context_from_proto(task_input.context).node_id
    grid.set_run(run_from_proto(task_input.run))
    with client, heartbeats(client):
        yield grid
        client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED, details=""))


def connected_sites(grid: "Grid", kit: Kit) -> dict[str, int]:
    """Return the sites that are connected, as name -> node; the name is that of the key with which a node signs."""
    return {name: int(node.node_id) for name, node in _nodes(grid, kit)}


def connected_since(grid: "Grid", kit: Kit) -> dict[str, str]:
    """Return since when each connected site is. Where that changes, the site began anew, and its messages are lost."""
    return {name: str(node.last_activated_at) for name, node in _nodes(grid, kit)}


def _nodes(grid: "Grid", kit: Kit) -> list[tuple[str, Any]]:
    names = {public_pem(key): name for name, key in kit.public_keys.items()}
    return [(names[node.public_key], node) for node in grid.get_nodes() if node.public_key in names]


def task_client(address: str, superexec_secret: bytes) -> RuntimeHttpClient:
    """Return a client that asks the SuperNode of this machine for tasks."""
    return RuntimeHttpClient.from_server_address(
        address, insecure=True, root_certificates=None, interceptors=_acquiring(superexec_secret)
    )


def acquire(client: RuntimeHttpClient, task_type: str) -> str | None:
    """Return the token of the next task, if there is one."""
    response = client.AcquireTask(AcquireTaskRequest(supported_task_types=[task_type]))
    return str(response.token) if response.HasField("task") and response.token else None


def do_task(address: str, token: str, answer: Callable[[Message, Context], Message]) -> tuple[Message, Message]:
    """Do the task of one message at a site: fetch it, answer it, hand the answer in. Returns both.

    What `answer` raises becomes an error message without a text, as texts may name files of the site.
    """
    client = RuntimeHttpClient.from_server_address(
        address, insecure=True, root_certificates=None, interceptors=_of_task(token)
    )
    with client, heartbeats(client):
        message, context, _, _ = pull_task_input(client)
        status = SubStatus.COMPLETED
        failure: Exception | None = None
        try:
            reply = answer(message, context)
        except Exception as error:
            failure, status = error, SubStatus.FAILED
            reason = f"the site failed, and its log says why ({type(error).__name__})"
            reply = Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason), reply_to=message)
        push_message(client, reply, context)
        client.PushTaskOutput(PushTaskOutputRequest(context=None, sub_status=status, details=""))
    if failure is not None:
        raise failure
    return message, reply


@contextmanager
def heartbeats(client: RuntimeHttpClient) -> Iterator[None]:
    """Tell the other side that the task is worked on, as long as the block."""

    def beat() -> bool:
        try:
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.HTTPError:
            return False
        return True

    sender = HeartbeatSender(beat)
    sender.start()
    try:
        yield
    finally:
        sender.stop()


def _acquiring(superexec_secret: bytes) -> list[Any]:
    authentication = SuperExecAuthHttpInterceptor(master_secret=superexec_secret, protected_methods={_ACQUIRE})
    return [RuntimeVersionHttpInterceptor(component_name="SuperExec"), authentication]


def _of_task(token: str) -> list[Any]:
    return [RuntimeVersionHttpInterceptor(component_name="flwr-serverapp"), RuntimeTokenHttpInterceptor(token)]
