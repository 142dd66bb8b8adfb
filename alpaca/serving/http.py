"""HTTP/1.1 on asyncio, for many clients of which some are slow, broken or hostile.

    server = Server(app, Limits(), LOOPBACK)     # async def app(request: Request) -> Response
    await server.start(listening_socket)
    await server.drain(30)                 # no new requests; running ones have 30 s to finish

h11 parses and writes the protocol (RFC 9112) and knows each connection's state. This file adds:

  - A bound on everything a client can occupy: connections, bytes of a request's head and body,
    seconds to send a request, seconds to read the response.
  - A client that closes its connection, or its sending half, cancels the app's coroutine. To
    notice it, the server keeps reading while the app works, and disconnects a client that sends
    more than `head_bytes` ahead of its response.
  - The Host header must name this server, or any web page could point a name of its own at this
    machine and read the answers (DNS rebinding). Pages of another Origin may send nothing.
  - `HTTPError` becomes an error in OpenAI's format. Any other exception is a traceback on the
    server's stderr and a bare 500 for the client.
"""

import asyncio
import json
import re
import socket
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import h11

READ_BYTES = 4096  # in one read; a head may exceed its limit by so much
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
HOST_PORT = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?", re.IGNORECASE)
SECURITY_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Limits:
    connections: int = 512
    per_address: int = 128  # connections from one address of another machine
    head_bytes: int = 16 << 10  # request line and headers
    body_bytes: int = 128 << 10
    idle_s: float = 30  # between two requests
    read_s: float = 10  # for a whole request, from its first byte
    write_s: float = 20  # for the client to read what was sent


class HTTPError(Exception):
    """An error response. The message is all that the client gets to see."""

    def __init__(
        self, status: int, message: str, type="invalid_request_error", param=None, code=None,
        retry_after: float | None = None, headers: dict | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, round(retry_after)))
        self.error = {"message": message, "type": type, "param": param, "code": code}

    @property
    def response(self) -> "Response":
        return json_response({"error": self.error}, self.status, self.headers)


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # without the query
    headers: dict[str, str]  # names in lower case
    body: bytes
    address: str


@dataclass
class Response:
    body: bytes | AsyncGenerator[bytes, None]
    type: str = "application/json"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def json_response(content: dict, status: int = 200, headers: dict | None = None) -> Response:
    body = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")
    return Response(body, status=status, headers=headers or {})


def parse_host(host: str) -> str:
    """Name or address of NAME[:PORT], in lower case; "" if it has another form."""
    match = HOST_PORT.fullmatch(host)
    return (match[1] or match[2]).lower() if match else ""


class Connection:
    """One client's connection. A request is answered before the next one is read."""

    def __init__(self, server: "Server", reader, writer: asyncio.StreamWriter):
        self.server, self.reader, self.writer = server, reader, writer
        self.limits = server.limits
        self.address = (writer.get_extra_info("peername") or ["?"])[0]
        self.protocol = h11.Connection(h11.SERVER, self.limits.head_bytes)
        self.method = b""  # of the newest request
        self.idle = False  # waits for a request, so that it can be closed at any time
        self.task: asyncio.Task = asyncio.current_task()  # type: ignore

    async def exchange(self) -> bool:
        """One request and its response; True if another request may follow."""
        try:
            if not (request := await self.read_request()):
                return False
        except HTTPError as error:
            await self.send(error.response, close=True)
            return False
        watcher = asyncio.create_task(self.cancel_if_client_leaves())
        try:
            await self.send(await self.run_app(request), close=self.server.draining)
        finally:
            watcher.cancel()
            await asyncio.wait([watcher])  # meanwhile other connections get their turn
        if self.server.draining or self.protocol.our_state is not h11.DONE:
            return False
        self.protocol.start_next_cycle()
        return True

    async def run_app(self, request: Request) -> Response:
        try:
            return await self.server.app(request)
        except HTTPError as error:
            return error.response
        except Exception:
            traceback.print_exc()
            return HTTPError(500, "an error in the server", "server_error").response

    async def cancel_if_client_leaves(self) -> None:
        with suppress(OSError):
            while len(self.protocol.trailing_data[0]) <= self.limits.head_bytes:
                if not await self.read():
                    break
        self.task.cancel()

    async def read(self) -> bytes:
        data = await self.reader.read(READ_BYTES)
        self.protocol.receive_data(data)
        return data

    async def next_event(self) -> Any:
        while (event := self.protocol.next_event()) is h11.NEED_DATA:
            await self.read()
        return event

    async def read_request(self) -> Request | None:
        """The next request, or None if the client left or was silent for too long."""
        started = self.protocol.trailing_data[0]  # sent ahead
        with suppress(TimeoutError):
            self.idle = True
            async with asyncio.timeout(self.limits.idle_s):
                started = started or await self.read()
        self.idle = False
        if not started:
            return None
        try:
            async with asyncio.timeout(self.limits.read_s):
                head = await self.next_event()
                self.method = head.method
                headers = self.check_head(head)
                if self.protocol.they_are_waiting_for_100_continue:
                    self.write(h11.InformationalResponse(status_code=100, headers=[]))
                body = bytearray()
                while isinstance(event := await self.next_event(), h11.Data):
                    body += event.data
        except TimeoutError:
            raise HTTPError(408, f"no whole request in {self.limits.read_s:g} s") from None
        except h11.RemoteProtocolError as error:
            message = f"not an HTTP/1.1 request ({str(error).partition(':')[0]})"
            if error.error_status_hint == 431:
                message = f"the head is larger than {self.limits.head_bytes} bytes"
            raise HTTPError(error.error_status_hint, message) from None
        path = head.target.decode().partition("?")[0]
        return Request(head.method.decode(), path, headers, bytes(body), self.address)

    def check_head(self, head: h11.Request) -> dict[str, str]:
        """The headers; an HTTPError if this server does not answer such a request."""
        if head.http_version not in (b"1.0", b"1.1") or not head.target.startswith(b"/"):
            raise HTTPError(400, "the request line is not METHOD /PATH HTTP/1.1")
        names = [name.decode() for name, _ in head.headers]
        for name in ("origin", "content-type"):  # h11 looks at Host and Content-Length
            if names.count(name) > 1:
                raise HTTPError(400, f"two {name} headers")
        headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
        if "transfer-encoding" in headers:
            raise HTTPError(411, "send a Content-Length: chunked bodies are not read")
        if int(headers.get("content-length", 0)) > self.limits.body_bytes:
            raise HTTPError(413, f"the body is larger than {self.limits.body_bytes} bytes")
        self.server.check_sender(headers)
        return headers

    def write(self, event: h11.Event) -> None:
        self.writer.write(self.protocol.send(event) or b"")

    async def flush(self) -> None:
        async with asyncio.timeout(self.limits.write_s):
            await self.writer.drain()

    async def send(self, response: Response, close: bool) -> None:
        """h11 sends a stream in chunks or, to a client of HTTP/1.0, until the connection closes."""
        body, status = response.body, response.status
        headers = {**SECURITY_HEADERS, "Content-Type": response.type, **response.headers}
        headers |= {"Content-Length": str(len(body))} if isinstance(body, bytes) else {}
        headers |= {"Connection": "close"} if close else {}
        pairs, reason = list(headers.items()), HTTPStatus(status).phrase
        self.write(h11.Response(status_code=status, headers=pairs, reason=reason))
        if not isinstance(body, bytes):
            async with aclosing(body) as parts:
                async for part in parts:
                    self.write(h11.Data(data=part))
                    await self.flush()
        elif self.method != b"HEAD":
            self.write(h11.Data(data=body))
        self.write(h11.EndOfMessage())
        await self.flush()

    async def close(self) -> None:
        """Closing before everything was read would be a reset, which can destroy the response."""
        self.writer.write_eof()
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                for _ in range(256):
                    if not await self.reader.read(READ_BYTES):
                        return


class Server:
    def __init__(
        self, app: Callable[[Request], Awaitable[Response]], limits: Limits, hosts: set[str] | None
    ):
        self.app, self.limits = app, limits
        self.hosts = hosts  # names that it answers to; None: any
        self.connections: set[Connection] = set()
        self.draining = False

    async def start(self, bound: socket.socket) -> None:
        self.listener = await asyncio.start_server(self.handle_connection, sock=bound, backlog=256)

    async def drain(self, seconds: float) -> None:
        """Accept no more; give running requests this long."""
        self.draining = True
        self.listener.close()
        tasks = [connection.task for connection in self.connections]
        for connection in self.connections:
            if connection.idle:
                connection.task.cancel()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.wait(tasks)

    async def handle_connection(self, reader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(self, reader, writer)
        full = self.is_full(connection.address)
        self.connections.add(connection)
        try:
            if full:
                busy = HTTPError(503, "too many connections", "overloaded", retry_after=1)
                return await connection.send(busy.response, close=True)
            while await connection.exchange():
                pass
            await connection.close()
        except (OSError, asyncio.CancelledError):  # the client left, or was too slow
            pass
        except Exception:
            traceback.print_exc()
        finally:
            writer.transport.abort()  # does nothing if it is closed already
            self.connections.discard(connection)

    def is_full(self, address: str) -> bool:
        same = [other for other in self.connections if other.address == address]
        too_many = len(same) >= self.limits.per_address and address not in LOOPBACK
        return too_many or len(self.connections) >= self.limits.connections

    def check_sender(self, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if self.hosts is not None and parse_host(host) not in self.hosts:
            raise HTTPError(421, "this server does not answer to that Host (see --allow-host)")
        if "origin" in headers:  # SCHEME://HOST[:PORT] of the page that sends this
            sender = headers["origin"].partition("://")[2]
            if sender != host and parse_host(sender) not in (self.hosts or set()) - LOOPBACK:
                raise HTTPError(403, "pages of other origins may not use this server")
