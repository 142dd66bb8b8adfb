"""The HTTP server: what is malformed, slow, too large or from elsewhere holds nothing up."""

import asyncio
import json
import socket
import struct
import threading
import time

import pytest
from helpers.commands import assert_refused
from helpers.demo_server import Scripted, arguments, running

from alpaca.serving import app
from alpaca.serving.http import LOOPBACK, Limits, listening
from alpaca.serving.moderation import Filter

QUICK = Limits(connections=12, idle_s=0.8, read_s=0.6, write_s=0.6, body_bytes=4000)
HOST = b"Host: localhost\r\n"


@pytest.fixture(scope="module")
def server():
    with running(Scripted(lambda prompt: "fine"), limits=QUICK) as one:
        yield one


def raw(server, sent: bytes, patience: float = 5) -> bytes:
    """All that the server answers until it closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=patience) as one:
        one.sendall(sent)
        said = b""
        try:
            while more := one.recv(65536):
                said += more
        except ConnectionResetError:
            pass
        return said


def status(said: bytes) -> int:
    return int(said.split(b" ", 2)[1]) if said else 0


GET = b"GET /health HTTP/1.1\r\n" + HOST
POST = b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
BODY = b'{"prompt": "a"}'
MALFORMED = {
    "words": (b"hello, are you there?\r\n\r\n", 400),
    "another protocol": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "lower version": (b"GET / HTTP/0.9\r\n\r\n", 400),
    "higher version": (b"GET / HTTP/2.0\r\n" + HOST + b"\r\n", 400),
    "absolute target": (b"GET http://localhost/ HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "two spaces": (b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (GET + HOST + b"\r\n", 400),
    "space before the colon": (GET + b"Content-Length : 3\r\n\r\nabc", 400),
    "folded": (GET + b"X-A: 1\r\n 2\r\n\r\n", 400),
    "bare line feed": (GET + b"X-A: 1\nX-B: 2\r\n\r\n", 400),
    "nul": (GET + b"X-A: \x00\r\n\r\n", 400),
    "two lengths": (POST + b"Content-Length: 15\r\nContent-Length: 15\r\n\r\n" + BODY, 400),
    "signed length": (POST + b"Content-Length: +15\r\n\r\n" + BODY, 400),
    "negative length": (POST + b"Content-Length: -1\r\n\r\n" + BODY, 400),
    "chunked": (POST + b"Transfer-Encoding: chunked\r\n\r\nf\r\n" + BODY + b"\r\n0\r\n\r\n", 411),
    "smuggled": (POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
    "large head": (GET + b"X-A: " + b"a" * 20_000 + b"\r\n\r\n", 431),
    "endless head": (b"GET /" + b"a" * 100_000, 431),
    "large body": (POST + b"Content-Length: 4001\r\n\r\n" + b"a" * 4001, 413),
    "huge body announced": (POST + b"Content-Length: 99999999999999\r\n\r\n", 413),
    "no JSON": (POST + b"Content-Length: 3\r\nConnection: close\r\n\r\n{a}", 400),
    "deep JSON": (POST + b"Content-Length: 4000\r\nConnection: close\r\n\r\n" + b"[" * 4000, 400),
    "a form": (b"POST /v1/completions HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n", 415),
    "no such path": (b"GET /../demo.py HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n", 404),
    "encoded path": (b"GET /%2e%2e/ HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n", 404),
    "wrong method": (b"DELETE / HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n", 405),
    "preflight": (
        b"OPTIONS /v1/completions HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n",
        405,
    ),
    "two origins": (POST + b"Origin: http://localhost\r\nOrigin: null\r\n\r\n", 400),
    "two types": (POST + b"Content-Type: text/plain\r\n\r\n", 400),
    "a user in the host": (b"GET / HTTP/1.1\r\nHost: evil@localhost\r\n\r\n", 421),
    "a word for a port": (b"GET / HTTP/1.1\r\nHost: localhost:abc\r\n\r\n", 421),
    "foreign host": (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421),
    "foreign origin": (POST + b"Origin: https://evil.example\r\nContent-Length: 0\r\n\r\n", 403),
    "no origin's": (POST + b"Origin: null\r\nContent-Length: 0\r\n\r\n", 403),
    "another port's": (POST + b"Origin: http://localhost:1\r\nContent-Length: 0\r\n\r\n", 403),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_what_is_malformed_is_refused_and_named(server, kind):
    sent, expected = MALFORMED[kind]
    said = raw(server, sent)
    assert status(said) == expected, said
    head, _, body = said.partition(b"\r\n\r\n")
    assert json.loads(body)["error"]["message"] and b"Traceback" not in said
    assert b"access-control" not in head.lower()
    assert status(raw(server, GET + b"Connection: close\r\n\r\n")) == 200


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:7860", "127.0.0.1:1", "[::1]:7860", "127.0.0.1"]
)
def test_it_answers_to_its_own_names(server, host):
    asked = f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    assert status(raw(server, asked.encode())) == 200


def test_its_own_page_may_ask(server):
    own = f"localhost:{server.port}"
    asked = f"POST /v1/completions HTTP/1.1\r\nHost: {own}\r\nOrigin: http://{own}\r\n"
    asked += f"Content-Type: application/json\r\nConnection: close\r\nContent-Length: {len(BODY)}"
    assert status(raw(server, asked.encode() + b"\r\n\r\n" + BODY)) == 200


def test_a_name_that_was_allowed_is_answered_to_with_its_pages():
    engine = Scripted(lambda prompt: "fine")
    with running(engine, "--allow-host", "demo.example") as server:
        asked = POST.replace(b"localhost", b"127.0.0.1") + b"Connection: close\r\n"
        length = b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
        assert status(raw(server, asked + b"Origin: https://demo.example\r\n" + length)) == 200
        asked = b"GET /health HTTP/1.1\r\nConnection: close\r\nHost: "
        assert status(raw(server, asked + b"demo.example\r\n\r\n")) == 200
        assert status(raw(server, asked + b"evil.example\r\n\r\n")) == 421


def test_names_are_allowed_as_browsers_write_them(command):
    """In lower case, without the port."""
    names = ("--allow-host", "Demo.Example", "--allow-host", "a.example:8443")
    assert arguments(*names).allow_host == ["demo.example", "a.example"]
    for odd in ("https://a.example", "a/b", ""):
        assert_refused(command(app, "--allow-host", odd), "no name of a host")


@pytest.mark.parametrize("host", ["127.0.0.2", "LOCALHOST"])
def test_every_spelling_of_this_machine_answers_to_no_other_name(host, capsys):
    with running(Scripted(lambda prompt: "fine"), "--host", host) as server:
        assert None is not server.http.hosts >= LOOPBACK
        assert "others may ask" not in capsys.readouterr().err


def test_on_all_addresses_it_says_so_and_keeps_foreign_pages_out(capsys):
    with running(Scripted(lambda prompt: "fine"), "--host", "0.0.0.0") as server:
        assert "others may ask" in capsys.readouterr().err
        asked = POST.replace(b"localhost", b"demo.example") + b"Connection: close\r\n"
        length = b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
        assert status(raw(server, asked + b"Origin: https://demo.example\r\n" + length)) == 200
        assert status(raw(server, asked + b"Origin: https://evil.example\r\n" + length)) == 403
    names = ("--host", "0.0.0.0", "--allow-host", "demo.example")
    with running(Scripted(lambda prompt: "fine"), *names) as server:
        asked = b"GET /health HTTP/1.1\r\nConnection: close\r\nHost: "
        assert status(raw(server, asked + b"demo.example\r\n\r\n")) == 200
        assert status(raw(server, asked + b"evil.example\r\n\r\n")) == 421


def test_an_address_is_taken_by_one():
    with listening("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        with pytest.raises(ValueError, match=rf"127\.0\.0\.1, port {port}: .*in use"):
            listening("127.0.0.1", port)


def test_every_answer_forbids_guessing_keeping_and_embedding(server):
    for path in ("/", "/health", "/none"):
        headers = server.get(path).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


def test_one_other_machine_gets_no_more_than_its_connections(server, monkeypatch):
    monkeypatch.setattr("alpaca.serving.http.LOOPBACK", set())  # as if this one were another
    server.wait(lambda: not server.http.connections)
    monkeypatch.setattr(server.http, "limits", Limits(connections=12, per_address=2))
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
    server.wait(lambda: len(server.http.connections) == 2)
    assert status(raw(server, GET + b"\r\n")) == 503
    for one in held:
        one.close()
    server.wait(lambda: not server.http.connections)


@pytest.mark.parametrize("ahead", [0, 10_000, 40_000, 200_000])
def test_who_leaves_is_seen_to_also_behind_what_it_sent_ahead(ahead):
    engine = Scripted(lambda prompt: "word " * 3000, rows=1, pace=0.01)
    with running(engine, "--max-new-tokens", 3000) as server:
        sent = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as one:
            one.sendall(sent)
            server.wait(lambda: engine.steps > 2)
            one.sendall(b"a" * ahead)
        server.wait(lambda: server.demo.decoder.load == 0 and not server.http.connections, 2)
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as one:
            one.sendall(sent + b"a" * ahead)  # all at once
        server.wait(lambda: server.demo.decoder.load == 0 and not server.http.connections, 2)


def test_others_have_their_turn_between_two_requests_of_one(server, monkeypatch):
    turns, noted, app, done = [0], [], server.http.app, threading.Event()

    async def other():
        while not done.is_set():
            turns[0] += 1
            await asyncio.sleep(0)

    async def noting(request):
        noted.append(turns[0])
        return await app(request)

    monkeypatch.setattr(server.http, "app", noting)
    future = asyncio.run_coroutine_threadsafe(other(), server.loop)
    many = b"HEAD /health HTTP/1.1\r\n" + HOST + b"\r\n"
    raw(server, many * 200 + GET + b"Connection: close\r\n\r\n")
    done.set()
    future.result(5)
    assert len(noted) == len(set(noted)) == 201


def test_many_requests_on_one_connection_also_sent_ahead(server):
    last = GET + b"Connection: close\r\n\r\n"
    said = raw(server, (GET + b"\r\n") * 3 + last)
    assert said.count(b"HTTP/1.1 200 OK") == 4


def test_http_1_0_gets_its_stream_without_chunks(server):
    body = b'{"prompt": "a", "stream": true}'
    asked = (
        b"POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    )
    said = raw(server, asked + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    head, _, events = said.partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower() and events.startswith(b"data: {")
    assert events.endswith(b"data: [DONE]\n\n")


def test_head_has_no_body(server):
    said = raw(server, b"HEAD / HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n")
    assert status(said) == 200 and said.endswith(b"\r\n\r\n")


def test_a_large_body_may_be_asked_about_first(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as one:
        head = POST + b"Expect: 100-continue\r\nConnection: close\r\n"
        one.sendall(head + b"Content-Length: %d\r\n\r\n" % len(BODY))
        assert one.recv(100).startswith(b"HTTP/1.1 100 ")
        one.sendall(BODY)
        assert status(one.recv(100)) == 200


@pytest.mark.parametrize(
    "first", [b"", b"GET / HTTP/1.1\r\nX-Slow: ", POST + b"Content-Length: 500\r\n\r\n{"]
)
def test_slow_senders_are_cut_off(server, first):
    """A byte now and then: every time-out for a single read would begin anew."""
    start = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as one:
        one.sendall(first or b"G")
        one.settimeout(0.05)
        said = b""
        while time.monotonic() < start + 8:
            try:
                if not (more := one.recv(4096)):
                    break
                said += more
            except TimeoutError:
                one.sendall(b"a")
            except ConnectionError:
                break
    assert time.monotonic() - start < 4 and status(said) in (0, 408)
    server.wait(lambda: not server.http.connections)


def test_a_silent_connection_is_closed(server):
    start = time.monotonic()
    assert raw(server, b"") == b"" and time.monotonic() - start < 4


def test_connections_beyond_the_bound_are_told_at_once(server):
    server.wait(lambda: not server.http.connections)
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(12)]
    server.wait(lambda: len(server.http.connections) == 12)
    said = raw(server, GET + b"\r\n")
    assert status(said) == 503 and b"Retry-After: 1" in said
    for one in held:
        one.close()
    server.wait(lambda: not server.http.connections)
    assert status(raw(server, GET + b"Connection: close\r\n\r\n")) == 200


def test_a_client_that_does_not_read_is_cut_off():
    """Its answer would wait in memory, and the row be held."""
    engine = Scripted(lambda prompt: "a word " * 400, rows=2)
    with running(engine, "--max-new-tokens", 4000, limits=QUICK) as server:
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        one.connect(("127.0.0.1", server.port))
        body = b'{"prompt": "a", "stream": true, "n": 2}'
        one.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        server.wait(lambda: server.demo.decoder.load == 2)
        # what the kernel takes is a few megabytes: the transport's own bound is what counts here
        server.loop.call_soon_threadsafe(pause_writing, server)
        server.wait(lambda: server.demo.decoder.load == 0)
        server.wait(lambda: not server.http.connections)
        one.close()


def pause_writing(server) -> None:
    for task in server.http.connections:
        writer = task.get_coro().cr_frame.f_locals["writer"]
        writer.transport.get_protocol().pause_writing()


def test_an_error_inside_sends_no_trace(server, capsys):
    class Broken(Filter):
        async def check(self, text):
            raise RuntimeError("secret detail")

    engine = Scripted(lambda prompt: "fine")
    with running(engine, filter=Broken()) as broken:
        reply = broken.post("/v1/completions", {"prompt": "a"})
        said = reply.read()
        assert reply.status == 500 and b"secret" not in said and b"Traceback" not in said
        assert json.loads(said)["error"]["type"] == "server_error"
        assert broken.get("/health").status == 200 and broken.demo.decoder.load == 0
    assert "secret detail" in capsys.readouterr().err


def test_a_reset_connection_is_nothing_special(server, capsys):
    for _ in range(20):
        one = socket.create_connection(("127.0.0.1", server.port))
        one.sendall(GET + b"\r\n")
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.close()
    server.wait(lambda: not server.http.connections)
    assert capsys.readouterr().err == ""
