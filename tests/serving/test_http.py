"""The HTTP server: malformed, slow, oversized and foreign requests hold nothing up."""

import asyncio
import json
import socket
import struct
import threading
import time

import pytest
from helpers.commands import assert_refused
from helpers.demo_server import ENDLESS, ScriptedEngine, arguments, raw_request, running, wait_until

from alpaca.common.errors import UserError
from alpaca.serving import serve
from alpaca.serving.http import LOOPBACK, HTTPError, Limits, Server
from alpaca.serving.moderation import Filter
from alpaca.serving.serve import bind_socket

QUICK = Limits(
    connections=12, idle_s=0.5, head_s=0.4, body_s=0.4, write_s=0.5, body_bytes=4000
)  # fmt: skip
HOST, CLOSE = b"Host: localhost\r\n", b"Connection: close\r\n\r\n"
GET = b"GET /health HTTP/1.1\r\n" + HOST
POST = b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
BODY = b'{"prompt": "a"}'
LENGTH = b"Content-Length: %d\r\n" % len(BODY)


@pytest.fixture(scope="module")
def server():
    with running(ScriptedEngine("fine"), limits=QUICK) as one:
        yield one


def send(server, data: bytes) -> bytes:
    """All that the server answers until it closes."""
    with server.connect() as one:
        one.sendall(data)
        response = b""
        try:
            while more := one.recv(65536):
                response += more
        except ConnectionResetError:
            pass
        return response


def status(response: bytes) -> int:
    return int(response.split(b" ", 2)[1]) if response else 0


HOSTILE = {
    "words": (b"hello, are you there?\r\n\r\n", 400),
    "another protocol": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "lower version": (b"GET / HTTP/0.9\r\n\r\n", 400),
    "higher version": (b"GET / HTTP/2.0\r\n" + HOST + b"\r\n", 400),
    "absolute target": (b"GET http://localhost/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "tunnel": (b"CONNECT localhost:80 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "two spaces": (b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "empty line first": (b"\r\n" + GET + b"\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (GET + HOST + b"\r\n", 400),
    "space before the colon": (GET + b"Content-Length : 3\r\n\r\nabc", 400),
    "nul": (GET + b"X-A: \x00\r\n\r\n", 400),
    "two lengths": (POST + b"Content-Length: 15\r\nContent-Length: 16\r\n\r\n" + BODY, 400),
    "signed length": (POST + b"Content-Length: +15\r\n\r\n" + BODY, 400),
    "negative length": (POST + b"Content-Length: -1\r\n\r\n" + BODY, 400),
    "chunked": (POST + b"Transfer-Encoding: chunked\r\n\r\nf\r\n" + BODY + b"\r\n0\r\n\r\n", 411),
    "smuggled": (POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
    "compressed": (POST + b"Content-Length: 4\r\nTransfer-Encoding: gzip\r\n\r\nabcd", 501),
    "large head": (GET + b"X-A: " + b"a" * 30_000 + b"\r\n\r\n", 431),
    "endless head": (b"GET /" + b"a" * 100_000, 431),
    "large body": (POST + b"Content-Length: 4001\r\n\r\n" + b"a" * 4001, 413),
    "huge body announced": (POST + b"Content-Length: 99999999999999\r\n\r\n", 413),
    "no JSON": (POST + b"Content-Length: 3\r\n" + CLOSE + b"{a}", 400),
    "deep JSON": (POST + b"Content-Length: 4000\r\n" + CLOSE + b"[" * 4000, 400),
    "a form": (b"POST /v1/completions HTTP/1.1\r\n" + HOST + CLOSE, 415),
    "no such path": (b"GET /../serve.py HTTP/1.1\r\n" + HOST + CLOSE, 404),
    "encoded path": (b"GET /%2e%2e/ HTTP/1.1\r\n" + HOST + CLOSE, 404),
    "wrong method": (b"DELETE / HTTP/1.1\r\n" + HOST + CLOSE, 405),
    "preflight": (b"OPTIONS /v1/completions HTTP/1.1\r\n" + HOST + CLOSE, 405),
    "two origins": (POST + b"Origin: http://localhost\r\nOrigin: null\r\n\r\n", 400),
    "two types": (POST + b"Content-Type: text/plain\r\n\r\n", 400),
    "a user in the host": (b"GET / HTTP/1.1\r\nHost: evil@localhost\r\n\r\n", 421),
    "a word for a port": (b"GET / HTTP/1.1\r\nHost: localhost:abc\r\n\r\n", 421),
    "foreign host": (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421),
    "foreign origin": (POST + b"Origin: https://evil.example\r\nContent-Length: 0\r\n\r\n", 403),
    "no origin": (POST + b"Origin: null\r\nContent-Length: 0\r\n\r\n", 403),
    "another port": (POST + b"Origin: http://localhost:1\r\nContent-Length: 0\r\n\r\n", 403),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_request_gets_a_json_error(server, kind):
    data, expected = HOSTILE[kind]
    response = send(server, data)
    assert status(response) == expected, response
    head, _, body = response.partition(b"\r\n\r\n")
    assert json.loads(body)["error"]["message"] and b"Traceback" not in response
    assert (b"larger than" in body) == (expected in (413, 431))
    assert b"access-control" not in head.lower()
    assert status(send(server, GET + CLOSE)) == 200


PUBLIC = LOOPBACK | {"demo.example"}  # --allow-host demo.example
SENDERS = [  # names of the server, Host, Origin, status
    (LOOPBACK, "localhost", None, 200),
    (LOOPBACK, "LOCALHOST:7860", None, 200),
    (LOOPBACK, "127.0.0.1:1", None, 200),
    (LOOPBACK, "[::1]:7860", None, 200),
    (LOOPBACK, "localhost:80", "http://localhost:80", 200),
    (LOOPBACK, "localhost:80", "http://localhost:81", 403),
    (LOOPBACK, "demo.example", None, 421),
    (PUBLIC, "demo.example", "https://demo.example", 200),
    (PUBLIC, "127.0.0.1", "https://demo.example", 200),  # behind a proxy
    (PUBLIC, "evil.example", None, 421),
    (PUBLIC, "demo.example", "http://localhost", 403),
    (None, "any.example", "https://any.example", 200),
    (None, "any.example", "https://evil.example", 403),
]


@pytest.mark.parametrize(("hosts", "host", "origin", "status"), SENDERS)
def test_senders_are_checked_by_host_and_origin(hosts, host, origin, status):
    server, headers = Server(None, Limits(), hosts), {"host": host}
    headers |= {"origin": origin} if origin else {}
    if status == 200:
        return server.check_sender(headers)
    with pytest.raises(HTTPError) as refused:
        server.check_sender(headers)
    assert refused.value.status == status


@pytest.mark.parametrize(
    ("flags", "hosts"),
    [
        ("--host 127.0.0.2", LOOPBACK | {"127.0.0.2"}),
        ("--host LOCALHOST --allow-host demo.example", PUBLIC),
        ("--host 0.0.0.0", None),
        ("--host 0.0.0.0 --allow-host demo.example", PUBLIC | {"0.0.0.0"}),
    ],
)
def test_names_of_the_server_follow_from_the_flags(flags, hosts, capsys):
    with running(ScriptedEngine("fine"), *flags.split()) as server:
        assert server.http.hosts == hosts
    assert ("other machines" in capsys.readouterr().err) == ("0.0.0.0" in flags)


def test_allowed_hosts_are_normalized(command):
    names = ("--allow-host", "Demo.Example", "--allow-host", "a.example:8443")
    assert arguments(*names).allow_host == ["demo.example", "a.example"]
    for wrong in ("localhost", "10.0.0.1/8", "127.0.0.1:80", ""):
        assert_refused(command("serve", "--trusted-proxy", wrong), "not an address or a network")
    for wrong in ("https://a.example", "a/b", ""):
        assert_refused(command("serve", "--allow-host", wrong), "not a host name")


def test_an_address_in_use_is_refused():
    with bind_socket("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        with pytest.raises(UserError, match=rf"127\.0\.0\.1, port {port}: .*in use"):
            bind_socket("127.0.0.1", port)


def test_every_response_has_the_security_headers(server):
    for path in ("/", "/health", "/none"):
        headers = server.get(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


# ---------------------------------------------------------------- one connection


def test_pipelined_requests_are_answered_in_order(server):
    response = send(server, (GET + b"\r\n" + raw_request(BODY)) * 2 + GET + CLOSE)
    assert response.count(b"HTTP/1.1 200 OK") == 5
    order = [b"text_completion" in part for part in response.split(b"HTTP/1.1 200 OK")[1:]]
    assert order == [False, True, False, True, False]


def test_a_response_does_not_wait_for_an_acknowledgement(server):
    with server.connect() as one:
        one.sendall(GET + b"\r\n")
        one.recv(100)
        (connection,) = server.http.connections
        sock = connection.writer.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    server.wait_until_left()


def test_other_connections_get_a_turn_between_pipelined_requests(server, monkeypatch):
    turns, seen, app, done = [0], [], server.http.app, threading.Event()

    async def other():
        while not done.is_set():
            turns[0] += 1
            await asyncio.sleep(0)

    async def counting(request):
        seen.append(turns[0])
        return await app(request)

    monkeypatch.setattr(server.http, "app", counting)
    future = asyncio.run_coroutine_threadsafe(other(), server.loop)
    send(server, (b"HEAD /health HTTP/1.1\r\n" + HOST + b"\r\n") * 100 + GET + CLOSE)
    done.set()
    future.result(5)
    assert len(seen) == len(set(seen)) == 101


def test_a_visitor_takes_the_place_of_one_that_sends_ahead(server, monkeypatch):
    app, seen = server.http.app, []

    async def visited(request):
        seen.append(request)
        if len(seen) == 3:
            seen.append(server.connect())
            seen[3].sendall(GET + CLOSE)
        return await app(request)

    monkeypatch.setattr(server.http, "app", visited)
    monkeypatch.setattr(server.http, "limits", Limits(connections=1))
    send(server, (b"HEAD /health HTTP/1.1\r\n" + HOST + b"\r\n") * 100)
    assert status(seen[3].recv(4096)) == 200
    seen[3].close()
    server.wait_until_left()


def test_connections_are_accepted_together(server):
    async def turns() -> int:
        count, held = 0, [server.connect() for _ in range(10)]
        while len(server.http.connections) < len(held):
            await asyncio.sleep(0)
            count += 1
        for one in held:
            one.close()
        return count

    server.wait_until_left()
    assert asyncio.run_coroutine_threadsafe(turns(), server.loop).result(5) < 10
    server.wait_until_left()


def test_http_1_0_gets_a_stream_without_chunks(server):
    body = b'{"prompt": "a", "stream": true}'
    response = send(server, raw_request(body).replace(b"HTTP/1.1", b"HTTP/1.0"))
    head, _, events = response.partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower() and events.startswith(b"data: {")
    assert events.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(("host", "expected"), [(b"localhost", 200), (b"evil.example", 421)])
def test_a_response_to_head_has_no_body(server, host, expected, capsys):
    response = send(server, b"HEAD / HTTP/1.1\r\nHost: %b\r\n" % host + CLOSE)
    assert status(response) == expected and response.endswith(b"\r\n\r\n")
    assert b"Content-Length: 0" not in response and capsys.readouterr().err == ""


def test_expect_100_continue_is_answered(server):
    with server.connect() as one:
        one.sendall(POST + b"Expect: 100-continue\r\n" + LENGTH + CLOSE)
        assert one.recv(100).startswith(b"HTTP/1.1 100 ")
        one.sendall(BODY)
        assert status(one.recv(100)) == 200


@pytest.mark.parametrize("ahead", [0, 10_000, 40_000, 200_000])
def test_a_client_that_leaves_is_noticed_behind_what_it_sent_ahead(ahead):
    engine = ScriptedEngine(ENDLESS, batch_size=1, pace=0.01)
    with running(engine, "--max-new-tokens", 3000) as server:
        with server.connect() as one:
            one.sendall(raw_request(BODY))
            wait_until(lambda: engine.steps > 2)
            one.sendall(b"a" * ahead)
        server.wait_until_idle(2)
        with server.connect() as one:
            one.sendall(raw_request(BODY) + b"a" * ahead)  # all at once
            wait_until(lambda: ahead > 16_000 or engine.steps > 10)
            if ahead > 16_000:  # it need not even leave
                server.wait_until_left(2)
        server.wait_until_idle(2)
        server.wait_until_left(2)


def test_an_error_in_the_app_sends_no_traceback(capsys):
    class Broken(Filter):
        async def check(self, text):
            raise RuntimeError("secret detail")

    with running(ScriptedEngine("fine"), filter=Broken()) as server:
        response = server.post("/v1/completions", {"prompt": "a"})
        body = response.read()
        assert response.status == 500 and b"secret" not in body and b"Traceback" not in body
        assert json.loads(body)["error"]["type"] == "server_error"
        assert server.get("/health").status == 200 and server.app.worker.load == 0
    assert "secret detail" in capsys.readouterr().err


def test_an_error_in_a_stream_ends_the_connection(server, monkeypatch, capsys):
    async def broken(*args):
        yield b"data: {}\n\n"
        raise RuntimeError("secret detail")

    monkeypatch.setattr(server.app, "events", broken)
    response = send(server, raw_request(b'{"prompt": "a", "stream": true}'))
    assert status(response) == 200 and not response.endswith(b"0\r\n\r\n")
    assert b"secret" not in response
    server.wait_until_left()
    assert "secret detail" in capsys.readouterr().err
    for request in list(server.app.worker.pending):
        server.loop.call_soon_threadsafe(server.app.worker.cancel, request)


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(
    "first", [b"G", b"GET / HTTP/1.1\r\nX-Slow: ", POST + b"Content-Length: 500\r\n\r\n{"]
)
def test_a_slow_sender_is_cut_off(server, first):
    """A byte now and then, so that no single read times out."""
    start, response = time.monotonic(), b""
    with server.connect() as one:
        one.sendall(first)
        one.settimeout(0.05)
        while time.monotonic() < start + 8:
            try:
                if not (more := one.recv(4096)):
                    break
                response += more
            except TimeoutError:
                one.sendall(b"a")
            except ConnectionError:
                break
    assert time.monotonic() - start < 4 and status(response) in (0, 408)
    server.wait_until_left()


def test_a_silent_connection_is_closed(server):
    start = time.monotonic()
    assert send(server, b"") == b"" and time.monotonic() - start < 4


def connect_from(address: str, server) -> socket.socket:
    """Not from 127.0.0.1, which has no limit of its own."""
    return socket.create_connection(("127.0.0.1", server.port), 10, (address, 0))


def is_open(one: socket.socket) -> bool:
    one.sendall(b"HEAD /health HTTP/1.1\r\n" + HOST + b"\r\n")
    try:
        return status(one.recv(4096)) == 200
    except ConnectionResetError:
        return False


@pytest.mark.parametrize("limits", [Limits(connections=5), Limits(per_address=5)])
def test_when_full_the_connection_that_waited_longest_is_closed(server, limits, monkeypatch):
    monkeypatch.setattr(server.http, "limits", limits)
    server.wait_until_left()
    held = [connect_from("127.0.0.2", server) for _ in range(5)]
    wait_until(lambda: len(server.http.connections) == 5)
    assert is_open(held[0])
    held[1].sendall(b"GET /")  # no request yet
    visitor = connect_from("127.0.0.2", server)
    assert is_open(visitor)
    assert [is_open(one) for one in held] == [True, False, True, True, True]
    for one in (visitor, *held):
        one.close()
    server.wait_until_left()


@pytest.mark.parametrize(
    ("limits", "share", "others"),
    [(Limits(connections=3), 503, 503), (Limits(per_address=3), 503, 200)],
)
def test_a_request_that_is_answered_is_not_closed_for_another(limits, share, others):
    flags = ("--trusted-proxy", "127.0.0.1")
    engine = ScriptedEngine(ENDLESS, batch_size=1, pace=0.005)
    body = b'{"prompt": "a", "stream": true}'
    headers = "X-Forwarded-For: 1.2.3.4\r\nX-Forwarded-For: 127.0.0.1\r\n"  # by two proxies
    with running(engine, *flags, "--max-new-tokens", 3000, limits=limits) as server:
        held = [server.connect() for _ in range(3)]
        for one in held:
            one.sendall(raw_request(body, headers=headers))
        wait_until(lambda: server.app.worker.load == 3)
        refused = server.get("/health", X_Forwarded_For="1.2.3.4")
        assert refused.status == share and refused.headers["Retry-After"] == "1"
        assert server.get("/health", X_Forwarded_For="1.2.3.5").status == others
        assert status(held[0].recv(4096)) == 200 and held[0].recv(4096)
        for one in held:
            one.close()


PROXIES = ("10.0.0.0/8", "127.0.0.1", "fd00::1")
FORWARDED = [  # peer, X-Forwarded-For, client
    ("127.0.0.1", "1.2.3.4", "1.2.3.4"),
    ("127.0.0.1", "9.9.9.9, 1.2.3.4", "1.2.3.4"),  # what the client itself sent comes first
    ("127.0.0.1", "9.9.9.9, 1.2.3.4, 10.1.2.3", "1.2.3.4"),
    ("127.0.0.1", "10.0.0.7,10.1.2.3", "10.0.0.7"),
    ("127.0.0.1", "9.9.9.9, 127.0.0.1", "9.9.9.9"),
    ("127.0.0.1", " 1.2.3.4:5678", "1.2.3.4"),
    ("127.0.0.1", "[2001:DB8::1]:443", "2001:db8::1"),
    ("127.0.0.1", "2001:db8:0::1", "2001:db8::1"),
    ("fd00::1", "::ffff:1.2.3.4", "1.2.3.4"),
    ("10.9.9.9", "1.2.3.4", "1.2.3.4"),
    ("1.2.3.4", "5.6.7.8", "1.2.3.4"),  # no proxy of ours
    ("127.0.0.1", "", "127.0.0.1"),
    ("127.0.0.1", "unknown", "127.0.0.1"),
    ("127.0.0.1", "1.2.3.4, \xff;<script>", "127.0.0.1"),
    ("127.0.0.1", "1.2.3.4, , 10.0.0.1", "10.0.0.1"),
    ("127.0.0.1", "," * 9000, "127.0.0.1"),
]


@pytest.mark.parametrize(("peer", "forwarded", "client"), FORWARDED)
def test_a_client_is_who_the_last_trusted_proxy_names(peer, forwarded, client):
    flags = [flag for proxy in PROXIES for flag in ("--trusted-proxy", proxy)]
    server = Server(None, Limits(), None, arguments(*flags).trusted_proxy)
    assert server.client_address(peer, forwarded) == client


@pytest.mark.parametrize(("files", "connections"), [(100, 50), (1024, 512), (4096, 512)])
def test_connections_are_at_most_half_of_the_files(monkeypatch, files, connections):
    monkeypatch.setattr(serve, "max_open_files", lambda wanted: files)
    with running(ScriptedEngine("a")) as server:
        assert server.http.limits.connections == connections


def stop_reading(server) -> None:
    """As if no client read any more: the kernel's buffers would take megabytes."""

    def fill() -> None:
        for connection in server.http.connections:
            connection.writer.transport.get_protocol().pause_writing()

    server.loop.call_soon_threadsafe(fill)


def test_a_client_that_does_not_read_goes_for_another():
    engine, body = ScriptedEngine(ENDLESS, batch_size=2), b'{"prompt": "a", "stream": true}'
    limits = Limits(connections=2)
    with running(engine, "--max-new-tokens", 4000, limits=limits) as server:
        held = [server.connect() for _ in range(2)]
        for one in held:
            one.sendall(raw_request(body))
        wait_until(lambda: server.app.worker.load == 2)
        assert server.get("/health").status == 503
        stop_reading(server)
        wait_until(lambda: server.get("/health").status == 200)
        for one in held:
            one.close()


def test_a_client_that_does_not_read_is_cut_off():
    """Or its answer would wait in memory, and its slots stay occupied."""
    engine = ScriptedEngine(ENDLESS, batch_size=2)
    flags = ("--max-new-tokens", 4000)
    with running(engine, *flags, limits=QUICK) as server, server.connect() as one:
        one.sendall(raw_request(b'{"prompt": "a", "stream": true, "n": 2}'))
        wait_until(lambda: server.app.worker.load == 2)
        stop_reading(server)
        server.wait_until_idle()
        server.wait_until_left()


def test_a_reset_connection_is_no_error(server, capsys):
    for _ in range(20):
        one = server.connect()
        one.sendall(GET + b"\r\n")
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.close()
    server.wait_until_left()
    assert capsys.readouterr().err == ""
