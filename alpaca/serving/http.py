"""HTTP/1.1 on asyncio, for many clients of which some are slow, broken or hostile.

    server = Server(app, Limits(), LOOPBACK)     # async def app(request: Request) -> Response
    server.start(listening_socket)
    await server.drain(30)                 # no new requests; running ones have 30 s to finish

h11 parses and writes the protocol (RFC 9112) and knows each connection's state. This file adds:

  - A bound on everything a client can occupy: connections, bytes of a request's head and body,
    seconds to send a request, seconds to read the response. Where there are too many connections,
    the one that has waited longest for its client goes, and never one that is being answered.
  - Behind a trusted proxy a client is who X-Forwarded-For says: limits of a client are its own.
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
import math
import re
import socket
import time
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Any

import h11

ACCEPTED_AT_ONCE = 64  # or a visitor would wait for others, one turn of the loop for each
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
    per_address: int = 128  # of a client on another machine
    head_bytes: int = 16 << 10  # request line and headers
    body_bytes: int = 128 << 10
    idle_s: float = 30  # between two requests
    head_s: float = 5  # for a head, from its first byte or, on a new connection, from its start
    body_s: float = 10
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
    address: str  # of the client, also behind a trusted proxy


@dataclass
class Response:
    body: bytes | AsyncGenerator[bytes, None]
    type: str = "application/json"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def json_response(content: dict, status: int = 200, headers: dict | None = None) -> Response:
    body = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")
    return Response(body, status=status, headers=headers or {})


def too_many() -> HTTPError:
    return HTTPError(503, "too many connections", "overloaded", retry_after=1)


def parse_host(host: str) -> str:
    """Name or address of NAME[:PORT], in lower case; "" if it has another form."""
    match = HOST_PORT.fullmatch(host)
    return (match[1] or match[2]).lower() if match else ""


def parse_address(text: str) -> str:
    """An IP address in its one usual form, without a port; "" if it is none."""
    text = text.strip()
    try:
        address = ip_address(parse_host(text) or text)
    except ValueError:
        return ""
    return str(getattr(address, "ipv4_mapped", None) or address)


class Connection:
    """One client's connection. A request is answered before the next one is read."""

    def __init__(self, server: "Server", reader, writer: asyncio.StreamWriter):
        self.server, self.reader, self.writer = server, reader, writer
        self.limits = server.limits
        self.peer = parse_address((writer.get_extra_info("peername") or ["0.0.0.0"])[0])
        self.protocol = h11.Connection(h11.SERVER, self.limits.head_bytes)
        self.method = b""  # of the newest request
        self.idle = False  # waits for a request, so that it can be closed at any time
        self.task: asyncio.Task = asyncio.current_task()  # type: ignore
        self.wait_for_request()

    def wait_for_request(self) -> None:
        self.address = self.peer  # until a proxy names the client
        self.waiting_since = time.monotonic()  # for its client; math.inf: it is being answered

    async def exchange(self) -> bool:
        """One request and its response; True if another request may follow."""
        try:
            if not (request := await self.read_request()):
                return False
        except HTTPError as error:
            await self.send(error.response, close=True)
            return False
        self.waiting_since = math.inf
        watcher = asyncio.create_task(self.cancel_if_client_leaves())
        try:
            await self.send(await self.run_app(request), close=self.server.draining)
        finally:
            self.wait_for_request()
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
        loop, limits, first = asyncio.get_running_loop(), self.limits, not self.method
        started = self.protocol.trailing_data[0]  # sent ahead
        try:
            async with asyncio.timeout(limits.head_s if first else limits.idle_s) as deadline:
                self.idle = True
                started = started or await self.read()
                self.idle = False
                if not started:
                    return None
                if not first:
                    deadline.reschedule(loop.time() + limits.head_s)
                head = await self.next_event()
                self.method = head.method
                headers = self.check_head(head)
                deadline.reschedule(loop.time() + limits.body_s)
                if self.protocol.they_are_waiting_for_100_continue:
                    self.write(h11.InformationalResponse(status_code=100, headers=[]))
                body = bytearray()
                while isinstance(event := await self.next_event(), h11.Data):
                    body += event.data
        except TimeoutError:
            if self.idle:
                return None
            raise HTTPError(408, "the request did not arrive in time") from None
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
        headers: dict[str, str] = {}
        for raw_name, raw_value in head.headers:
            name, value = raw_name.decode(), raw_value.decode("latin-1")
            if name in headers and name in ("origin", "content-type"):
                raise HTTPError(400, f"two {name} headers")  # h11 looks at Host, Content-Length
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        if "transfer-encoding" in headers:
            raise HTTPError(411, "send a Content-Length: chunked bodies are not read")
        if int(headers.get("content-length", 0)) > self.limits.body_bytes:
            raise HTTPError(413, f"the body is larger than {self.limits.body_bytes} bytes")
        self.server.check_sender(headers)
        self.address = self.server.client_address(self.peer, headers.get("x-forwarded-for", ""))
        if not self.server.make_room(self):
            raise too_many()
        return headers

    def write(self, event: h11.Event) -> None:
        self.writer.write(self.protocol.send(event) or b"")

    async def flush(self) -> None:
        answered, self.waiting_since = self.waiting_since, time.monotonic()  # until it has read
        async with asyncio.timeout(self.limits.write_s):
            await self.writer.drain()
        self.waiting_since = answered

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
        self,
        app: Callable[[Request], Awaitable[Response]],
        limits: Limits,
        hosts: set[str] | None,
        proxies: Iterable[IPv4Network | IPv6Network] = (),
    ):
        self.app, self.limits = app, limits
        self.hosts = hosts  # names that it answers to; None: any
        self.proxies = proxies  # whose X-Forwarded-For is believed
        self.connections: set[Connection] = set()
        self.draining = False

    def start(self, bound: socket.socket) -> None:
        bound.setblocking(False)
        bound.listen(1024)
        self.listener = asyncio.create_task(self.accept(bound))

    async def accept(self, bound: socket.socket) -> None:
        loop = asyncio.get_running_loop()

        def protocol() -> asyncio.StreamReaderProtocol:
            return asyncio.StreamReaderProtocol(asyncio.StreamReader(), self.handle_connection)

        with bound:
            while True:
                try:
                    clients = [(await loop.sock_accept(bound))[0]]
                    with suppress(OSError):  # until none is left
                        while len(clients) < ACCEPTED_AT_ONCE:
                            clients.append(bound.accept()[0])
                    connect = loop.connect_accepted_socket
                    await asyncio.gather(*(connect(protocol, client) for client in clients))
                except OSError:  # most likely this process may open no more files
                    closed = self.close_longest_waiting(self.connections)
                    await asyncio.sleep(0.001 if closed else 0.1)

    async def drain(self, seconds: float) -> None:
        """Accept no more; give running requests this long."""
        self.draining = True
        self.listener.cancel()
        tasks = [connection.task for connection in self.connections]
        for connection in self.connections:
            if connection.idle:
                connection.task.cancel()
        await asyncio.wait([self.listener, *tasks], timeout=seconds)
        for task in tasks:
            task.cancel()
        await asyncio.wait([self.listener, *tasks])

    async def handle_connection(self, reader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(self, reader, writer)
        try:
            if not self.make_room(connection):
                return await connection.send(too_many().response, close=True)
            self.connections.add(connection)
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

    def make_room(self, new: Connection) -> bool:
        """Close another connection if there are too many; False if all are being answered."""
        others = self.connections - {new}
        if new.address not in LOOPBACK and not self.is_proxy(new.address):
            own = [other for other in others if other.address == new.address]
            if len(own) >= self.limits.per_address:
                return self.close_longest_waiting(own)
        return len(others) < self.limits.connections or self.close_longest_waiting(others)

    def close_longest_waiting(self, connections: Iterable[Connection]) -> bool:
        """Close the one that has waited longest for its client; False if none waits."""
        waiting = [one for one in connections if one.waiting_since < math.inf]
        if waiting:
            oldest = min(waiting, key=lambda one: one.waiting_since)
            self.connections.discard(oldest)
            oldest.task.cancel()
        return bool(waiting)

    def is_proxy(self, address: str) -> bool:
        return any(ip_address(address) in network for network in self.proxies)

    def client_address(self, peer: str, forwarded: str) -> str:
        """Every proxy appends to X-Forwarded-For who sent it the request: the client is the last
        address that is no trusted proxy. What stands before it, the client may have invented."""
        address = peer
        for name in reversed(forwarded.split(",")):
            if not self.is_proxy(address) or not (named := parse_address(name)):
                break
            address = named
        return address

    def check_sender(self, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if self.hosts is not None and parse_host(host) not in self.hosts:
            raise HTTPError(421, "this server does not answer to that Host (see --allow-host)")
        if "origin" in headers:  # SCHEME://HOST[:PORT] of the page that sends this
            sender = headers["origin"].partition("://")[2]
            if sender != host and parse_host(sender) not in (self.hosts or set()) - LOOPBACK:
                raise HTTPError(403, "pages of other origins may not use this server")
