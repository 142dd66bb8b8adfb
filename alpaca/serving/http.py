"""HTTP/1.1 for many clients of which some are slow, broken or hostile.

    server = Server(app, Limits())         # app: a coroutine from Request to Response
    await server.start(listening("127.0.0.1", 7860))
    await server.drain(30)                 # no new requests; those under way may end

One thread and asyncio's streams: a client that waits costs a few kilobytes, not a worker.

  - Everything a client can hold is bounded: connections, the size of head and body, the seconds in
    which they have to be there, the seconds it may take to read what is sent to it.
  - A client that closes its connection (or its sending half) has left: the app's coroutine is
    cancelled where it waits, so that work for nobody ends. So has one that sends more than a
    head's length ahead of the answer: its leaving could not be seen behind that.
  - Of HTTP only what clients of an API send: no chunked bodies, no folded headers, no second
    Content-Length. What two parsers could read in two ways is refused (RFC 9112).
  - Between two requests of a connection others have their turn.
  - Who only listens on this machine answers only to its name there, or any web page could have
    its own name point here (DNS rebinding); and no page of another origin may send anything.
  - `Problem` becomes an error in OpenAI's form. Any other exception is a line on the server's
    stderr and a plain 500: no stack trace is sent.

Shown by tests/test_web.py: test_what_is_malformed_is_refused_and_named.
"""

import asyncio
import json
import re
import socket
import sys
import time
import traceback
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import NamedTuple

from alpaca.common.errors import UserError

MOST_CLIENTS = 10_000  # whose rates are remembered
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") (/[!-~]*) HTTP/1\.([01])")
HEADER_LINE = re.compile(rb"(" + TOKEN + rb"):[ \t]*([\t -~\x80-\xff]*)")
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?", re.IGNORECASE)
SINGLE = ("host", "origin", "content-type", "content-length", "transfer-encoding")
HEADERS = {
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
    per_address: int = 128  # connections of one other machine
    head_bytes: int = 16 << 10
    body_bytes: int = 128 << 10
    idle_s: float = 30  # between two requests
    read_s: float = 10  # for a whole head, and again for a whole body
    write_s: float = 20  # for a client to take what it was sent


class Problem(Exception):
    """What a client is told, and nothing else."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.error = {"message": message, "type": kind, "param": param, "code": code}


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes
    address: str
    newest: bool  # HTTP/1.1, not 1.0


@dataclass
class Response:
    body: bytes | AsyncGenerator[bytes, None]
    type: str = "application/json"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def as_json(content: dict, status: int = 200, headers: dict | None = None) -> Response:
    body = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")
    return Response(body, "application/json", status, headers or {})


def refusal(problem: Problem) -> Response:
    return as_json({"error": problem.error}, problem.status, problem.headers)


def listening(host: str, port: int) -> socket.socket:
    """The address is taken before anything slow begins; who connects waits until `start`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen()  # bound alone it could be taken by another, too
    except (OSError, OverflowError) as mistake:
        bound.close()
        why = getattr(mistake, "strerror", None) or mistake
        raise UserError(f"cannot listen at {host}, port {port}: {why}") from None
    return bound


# ---------------------------------------------------------------- bytes → a request


def parsed_head(head: bytes, address: str) -> Request:
    """The request without its body; `head` ends before the empty line."""
    first, *lines = head.split(b"\r\n")
    asked = REQUEST_LINE.fullmatch(first)
    if not asked:
        raise Problem(400, "the request line is not HTTP/1.1's")
    headers: dict[str, str] = {}
    for line in lines:
        said = HEADER_LINE.fullmatch(line)
        if not said:
            raise Problem(400, "a header line is malformed")
        name = said[1].decode().lower()
        if name in headers and name in SINGLE:
            raise Problem(400, f"two {name} headers")
        headers[name] = said[2].decode("latin-1").strip()
    if "host" not in headers and asked[3] == b"1":
        raise Problem(400, "no Host header")
    if "transfer-encoding" in headers:
        raise Problem(411, "send a Content-Length: chunked bodies are not read")
    path = asked[2].decode().partition("?")[0]
    return Request(asked[1].decode(), path, headers, b"", address, asked[3] == b"1")


def host_of(said: str) -> str:
    """Name or address of NAME[:PORT], in lower case; "" if it is not of that form."""
    found = HOST.fullmatch(said)
    return (found[1] or found[2]).lower() if found else ""


class Reader(asyncio.StreamReader):
    """Knows what to do when the client leaves."""

    leave: Callable[[], object] | None = None

    @property
    def ahead(self) -> bool:
        """Is more sent already than it looks at? Soon it would pause, and see no end."""
        return len(self._buffer) > self._limit

    def feed_data(self, data: bytes) -> None:
        super().feed_data(data)
        if self.leave and self.ahead:
            self.leave()

    def feed_eof(self) -> None:
        super().feed_eof()
        if self.leave:
            self.leave()

    def set_exception(self, problem: BaseException) -> None:
        super().set_exception(problem)
        if self.leave:
            self.leave()


class Allowance:
    """So many answers a minute for each client, a third of them at once."""

    def __init__(self, per_minute: float):
        self.per_second, self.burst = per_minute / 60, max(1.0, per_minute / 3)
        self.clients: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, client: str, cost: float = 1) -> float:
        """Seconds until it may ask; 0: it may now, and has."""
        if not self.per_second:
            return 0.0
        now = time.monotonic()
        left, then = self.clients.pop(client, (self.burst, now))
        left = min(self.burst, left + (now - then) * self.per_second)
        cost = min(cost, self.burst)
        self.clients[client] = (left - cost if left >= cost else left, now)
        if len(self.clients) > MOST_CLIENTS:
            self.clients.popitem(last=False)
        return 0.0 if left >= cost else (cost - left) / self.per_second


# ---------------------------------------------------------------- server


class Server:
    """`hosts`: the names it answers to; None: any."""

    def __init__(
        self,
        app: Callable[[Request], Awaitable[Response]],
        limits: Limits,
        hosts: set[str] | None = LOOPBACK,
    ):
        self.app, self.limits, self.hosts = app, limits, hosts
        self.connections: dict[asyncio.Task, str] = {}  # and from where
        self.idle: set[asyncio.Task] = set()
        self.draining = False

    async def start(self, bound: socket.socket) -> None:
        loop, limit = asyncio.get_running_loop(), self.limits.head_bytes

        def connection() -> asyncio.StreamReaderProtocol:
            return asyncio.StreamReaderProtocol(Reader(limit, loop=loop), self.connected)

        self.listener = await loop.create_server(connection, sock=bound, backlog=256)

    async def drain(self, seconds: float) -> None:
        self.draining = True
        self.listener.close()
        for task in list(self.idle):
            task.cancel()
        if self.connections:
            await asyncio.wait(list(self.connections), timeout=seconds)
        for task in list(self.connections):
            task.cancel()
        await asyncio.gather(*self.connections, return_exceptions=True)

    async def connected(self, reader: Reader, writer: asyncio.StreamWriter) -> None:
        task, address = asyncio.current_task(), (writer.get_extra_info("peername") or ["?"])[0]
        crowd = Counter(self.connections.values())[address] >= self.limits.per_address
        if len(self.connections) >= self.limits.connections or (crowd and address not in LOOPBACK):
            refused = refusal(Problem(503, "too many connections", "overloaded", headers=soon(1)))
            writer.write(head_of(refused, False, False) + refused.body)
            return writer.close()  # what fits the socket's buffer goes out; nobody waits for it
        self.connections[task] = address
        try:
            while await self.exchange(reader, writer, address):
                await asyncio.sleep(0)
            await self.close(reader, writer)
        except (OSError, asyncio.CancelledError):  # it left, or was too slow
            pass
        finally:
            writer.transport.abort()  # nothing happens if it is closed already
            self.connections.pop(task, None)

    async def close(self, reader: Reader, writer: asyncio.StreamWriter) -> None:
        """Closing before all that was sent is read would be a reset, and take the answer along."""
        async with asyncio.timeout(self.limits.write_s):
            await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                left = 1 << 20
                while left > 0 and (read := await reader.read(1 << 16)):
                    left -= len(read)

    async def exchange(self, reader: Reader, writer: asyncio.StreamWriter, address: str) -> bool:
        """One request and its answer; may there be another?"""
        request, keep = None, False
        try:
            request = await self.request(reader, writer, address)
            if request is None:
                return False
            reader.leave = asyncio.current_task().cancel
            if reader.at_eof() or reader.ahead:
                return False
            keep = request.newest and "close" not in request.headers.get("connection", "").lower()
            response = await self.app(request)
        except Problem as problem:
            response = refusal(problem)
        except ConnectionError:
            raise
        except Exception:
            traceback.print_exc(file=sys.stderr)
            response = refusal(Problem(500, "an error in the server", "server_error"))
            keep = False
        keep = await self.send(writer, response, request, keep and not self.draining)
        reader.leave = None
        return keep and not self.draining

    async def request(
        self, reader: Reader, writer: asyncio.StreamWriter, address: str
    ) -> Request | None:
        """The next request; None if the client has left, or says nothing for long."""
        limits, task = self.limits, asyncio.current_task()
        self.idle.add(task)  # these have nothing to lose when the server ends
        try:
            async with asyncio.timeout(limits.idle_s):
                first = await reader.read(1)
        except TimeoutError:
            return None
        finally:
            self.idle.discard(task)
        if not first:
            return None
        try:
            async with asyncio.timeout(limits.read_s):
                head = first + await reader.readuntil(b"\r\n\r\n")
                request = parsed_head(head.lstrip(b"\r\n")[:-4], address)
                self.check_sender(request)
                size = self.size_of_body(request)
                if size and request.headers.get("expect", "").lower() == "100-continue":
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                return request._replace(body=await reader.readexactly(size))
        except asyncio.LimitOverrunError:
            raise Problem(431, f"the head is larger than {limits.head_bytes} bytes") from None
        except asyncio.IncompleteReadError:
            return None
        except TimeoutError:
            said = f"the request was not there within {limits.read_s:g} s"
            raise Problem(408, said) from None

    def size_of_body(self, request: Request) -> int:
        said = request.headers.get("content-length", "0")
        if not re.fullmatch(r"\d{1,18}", said, re.ASCII):
            raise Problem(400, "Content-Length is no number")
        if int(said) > self.limits.body_bytes:
            raise Problem(413, f"a body of {said} bytes: at most {self.limits.body_bytes}")
        return int(said)

    def check_sender(self, request: Request) -> None:
        host = host_of(request.headers.get("host", ""))
        if self.hosts is not None and host not in self.hosts:
            raise Problem(421, "this server does not answer to that Host (see --allow-host)")
        origin = request.headers.get("origin")
        if origin is not None:
            theirs = host_of(origin.partition("://")[2])
            own = origin.partition("://")[2] == request.headers.get("host", "")
            if not own and (self.hosts is None or theirs not in self.hosts - LOOPBACK):
                raise Problem(403, "pages of other origins may not ask this server")

    async def send(
        self, writer: asyncio.StreamWriter, response: Response, request: Request | None, keep: bool
    ) -> bool:
        """Send it; may the connection go on?"""
        whole = isinstance(response.body, bytes)
        chunked = not whole and request.newest
        keep = keep and (whole or chunked)  # without chunks only closing tells the end
        writer.write(head_of(response, keep, chunked))
        if whole:
            if request is None or request.method != "HEAD":
                writer.write(response.body)
        else:
            async with aclosing(response.body) as parts:
                async for part in parts:
                    writer.write(b"%x\r\n%b\r\n" % (len(part), part) if chunked else part)
                    async with asyncio.timeout(self.limits.write_s):
                        await writer.drain()
            if chunked:
                writer.write(b"0\r\n\r\n")
        async with asyncio.timeout(self.limits.write_s):
            await writer.drain()
        return keep


def soon(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, round(seconds)))}


def head_of(response: Response, keep: bool, chunked: bool) -> bytes:
    lines = [f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}"]
    headers = {**HEADERS, "Content-Type": response.type, **response.headers}
    if isinstance(response.body, bytes):
        headers["Content-Length"] = str(len(response.body))
    elif chunked:
        headers["Transfer-Encoding"] = "chunked"
    headers["Connection"] = "keep-alive" if keep else "close"
    lines += (f"{name}: {value}" for name, value in headers.items())
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
