"""Flower's SuperLink behind a gate of ours; run as a process by `server.py`.

Flower 1.41 serves three APIs on one port: Fleet, for sites; Control, which starts runs of any code and asks nobody who
they are; Runtime, for the code of the run. The gate lets other machines reach the Fleet API only, and only with the key
of a site and a request of honest size. All else is answered to this machine only, and to who knows the token.
"""

import asyncio
import gc
import hmac
import ipaddress
import json
import logging
import sys
import time
from base64 import b64decode
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

FLEET = "/v1/fleet/"
HEARTBEAT = FLEET + "send-node-heartbeat"
HELLO = "/federation/hello"
TOKEN_HEADER = "x-federation-token"
MOST_AT_ONCE = 8  # requests of a site; an honest one has four at most
MOST_WAITING = 32  # requests of a site that wait for these; more are told to come again
LONGEST_REQUEST, LONGEST_HEARTBEAT = 300.0, 10.0  # seconds
MOST_GARBAGE = 1 << 24  # bytes of requests


class Gate:
    """An ASGI application around Flower's.

    keys: the sites' public keys as PEM, which a Fleet request names. max_bytes: of the body of one.
    """

    def __init__(self, app: App, token: str, keys: frozenset[bytes], max_bytes: int) -> None:
        self.app, self.token, self.keys, self.max_bytes = app, token, keys, max_bytes
        self.digests = {sha256(key).hexdigest() for key in keys}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await _refuse(send, 403, "nothing but HTTP is answered")
        elif scope["path"] == HELLO:
            await self._hello(scope, send)
        elif scope["path"].startswith(FLEET):
            await self._fleet(scope, receive, send)
        elif not _from_this_machine(scope):
            await _refuse(send, 403, "only the server's own machine may ask for this")
        elif not hmac.compare_digest(_header(scope, TOKEN_HEADER), self.token.encode("ascii")):
            await _refuse(send, 403, "the token of this server is missing: only its own command may ask for this")
        else:
            await self.app(scope, receive, send)

    async def _hello(self, scope: Message, send: Send) -> None:
        """Say the time, and whether the key with the digest in the query is one of a site."""
        digest = scope["query_string"].decode("ascii", errors="replace")
        await _answer(send, 200, {"time": time.time(), "known": digest in self.digests})

    async def _fleet(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass on what a registered site sends, up to max_bytes; Flower then checks the signature."""
        if _key(scope) not in self.keys:
            await _refuse(send, 401, "this key is not registered")
            return
        length = _header(scope, "content-length")
        if length and (not length.isdigit() or int(length) > self.max_bytes):
            await self._too_large(send)
            return
        body = _Counted(receive, send, self.max_bytes)
        try:
            await self.app(scope, body.receive, body.send)
        except Exception:
            if not body.exceeded:
                raise
        if body.exceeded:
            await self._too_large(send)

    async def _too_large(self, send: Send) -> None:
        await _refuse(send, 413, f"a request may have {self.max_bytes} bytes")


class _Counted:
    """Reads a body until it is too large; then the application sees a client that has gone, and answers nobody."""

    def __init__(self, receive: Receive, send: Send, max_bytes: int) -> None:
        self._receive, self._send, self._left = receive, send, max_bytes

    @property
    def exceeded(self) -> bool:
        return self._left < 0

    async def receive(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        return {"type": "http.disconnect"} if self.exceeded else message

    async def send(self, message: Message) -> None:
        if not self.exceeded:
            await self._send(message)


class Turns:
    """An ASGI application between the gate and Flower's: each site has a few requests at once, the others wait unread.

    So that a site cannot fill the memory with requests of honest size. Too many that wait are told to come again, as
    Flower's client does by itself. Whose request it is says the signature, which Flower checks again, with its age,
    after it has read all.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self._lines: dict[tuple[bytes, bool], _Line] = {}
        self._num_read = 0  # bytes since garbage was collected

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(FLEET):
            await self.app(scope, receive, send)
            return
        if not _signed(scope):
            await _refuse(send, 401, "this request is not signed with its key")
            return
        line = self._line(_key(scope), scope["path"] == HEARTBEAT)
        if line.is_full:
            await _refuse(send, 503, "too many requests at once: come again")
            return
        async with line.turn():
            await self._within(line.longest, scope, receive, send)
        if self._num_read > MOST_GARBAGE:
            self._num_read = 0
            gc.collect()  # what is left of a request refers to itself, and Python counts objects, not their bytes

    def _line(self, key: bytes, is_heartbeat: bool) -> "_Line":
        """Return where a request waits; a sign of life does not wait for uploads."""
        made = _Line(1, LONGEST_HEARTBEAT) if is_heartbeat else _Line(MOST_AT_ONCE, LONGEST_REQUEST)
        return self._lines.setdefault((key, is_heartbeat), made)

    async def _within(self, longest: float, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, for so many seconds: a connection that broke may look as if it were there."""
        is_answered = False

        async def noted(message: Message) -> None:
            nonlocal is_answered
            is_answered = True
            await send(message)

        try:
            async with asyncio.timeout(longest):
                await self.app(scope, partial(self._counted, receive), noted)
        except TimeoutError:
            if not is_answered:
                await _refuse(send, 503, f"not all of this request was here after {longest:g} s: send it again")

    async def _counted(self, receive: Receive) -> Message:
        message = await receive()
        self._num_read += len(message.get("body", b""))
        return message


class _Line:
    """Requests of one site: some at once, so many seconds each, and some that wait."""

    def __init__(self, most: int, longest: float) -> None:
        self.most, self.longest = most, longest
        self._num = 0
        self._turns = asyncio.Semaphore(most)

    @property
    def is_full(self) -> bool:
        return self._num >= self.most + MOST_WAITING

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn, and have it."""
        self._num += 1
        try:
            async with self._turns:
                yield
        finally:
            self._num -= 1


def _from_this_machine(scope: Message) -> bool:
    """Judge by the other end of the socket, whatever headers say."""
    try:
        return ipaddress.ip_address((scope.get("client") or ("",))[0]).is_loopback
    except ValueError:
        return False


def _header(scope: Message, name: str) -> bytes:
    return next((bytes(value) for key, value in scope["headers"] if key == name.encode("ascii")), b"")


def _key(scope: Message) -> bytes:
    """Return the public key that a request names, as PEM."""
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

    return _decoded(_header(scope, FLEET_HTTP_PUBLIC_KEY_HEADER.lower()))


def _signed(scope: Message) -> bool:
    """Whether the time in the headers of a request is signed with its key."""
    from flwr.common.constant import TIMESTAMP_HEADER
    from flwr.supercore.constant import FLEET_HTTP_SIGNATURE_HEADER
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

    signature = _decoded(_header(scope, FLEET_HTTP_SIGNATURE_HEADER.lower()))
    key, moment = bytes_to_public_key(_key(scope)), _header(scope, TIMESTAMP_HEADER.lower())
    return bool(verify_signature(key, moment, signature))


def _decoded(value: bytes) -> bytes:
    try:
        return b64decode(value, validate=True)
    except ValueError:
        return b""


async def _refuse(send: Send, status: int, sentence: str) -> None:
    await _answer(send, status, {"detail": sentence}, close=True)


async def _answer(send: Send, status: int, contents: Any, close: bool = False) -> None:
    headers = [(b"content-type", b"application/json")] + [(b"connection", b"close")] * close
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(contents).encode("utf-8")})


def main() -> None:
    """Arguments: the parent, the server's kit, then those of flower-superlink."""
    from ml_src.core.federated.processes.children import parent_of_child

    parent_of_child()
    kit_folder = Path(sys.argv.pop(1))

    import uvicorn

    from flwr.superlink import main as flower
    from flwr.superlink.cli import flower_superlink
    from ml_src.core.federated import kits
    from ml_src.core.federated.processes.limits import Limits
    from ml_src.core.federated.processes.tuning import plain_log

    kit = kits.read_server_kit(kit_folder)
    keys = frozenset(kits.public_pem(key) for key in kit.public_keys.values())
    max_bytes = kit.max_request_mb * 2**20
    create_app = flower.create_app

    def guarded(*arguments: Any, **options: Any) -> Gate:
        return Gate(Turns(create_app(*arguments, **options)), kit.token.read_text("ascii"), keys, max_bytes)

    plain_log()
    _shorten_log()
    _let_sites_come_back()
    Limits(max_bytes).install()
    flower.create_app = guarded
    # Forwarded headers would replace the address of the other end; a line for each poll would fill the disk.
    uvicorn.run = partial(_run, uvicorn.run)
    flower_superlink()


def _shorten_log() -> None:
    from flwr.supercore.logger import FLOWER_LOGGER
    from ml_src.core.federated.processes.limits import ShortLog

    short = ShortLog()
    for handler in FLOWER_LOGGER.handlers:
        handler.addFilter(short)
    logging.getLogger("uvicorn.error").addFilter(short)


def _let_sites_come_back() -> None:
    """Let a site that was killed connect again at once: Flower refuses it for a minute, until the old one is missed.

    It has proved by its signature that it has the key of the site.
    """
    from flwr.superlink.servicer.fleet import fleet_handlers

    activate = fleet_handlers.activate_node

    def activate_anew(request: Any, state: Any) -> Any:
        node_id = state.get_node_id_by_public_key(request.public_key)
        if node_id is not None:
            state.deactivate_node(node_id)
        return activate(request=request, state=state)

    fleet_handlers.activate_node = activate_anew


def _run(run: Callable[..., None], **options: Any) -> None:
    """Run the application, which is made: what there is by now need not be looked at for garbage each time."""
    gc.collect()
    gc.freeze()
    run(**options | {"proxy_headers": False, "access_log": False, "server_header": False, "timeout_keep_alive": 75})


if __name__ == "__main__":
    main()
