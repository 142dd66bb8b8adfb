"""The server under load, and stopped by a signal."""

import asyncio
import gc
import json
import os
import random
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from contextlib import contextmanager, suppress

import pytest
from helpers.commands import ROOT
from helpers.demo_server import TINY, raw_request, running, tiny_engine

from alpaca.inference.sampling import SamplingParams
from alpaca.serving.moderation import RuleFilter
from templates import format_prompt


@pytest.fixture(scope="module")
def alone():
    """Greedy answers of the same model, one at a time."""
    engine = tiny_engine(1)

    def answer(instruction: str, tokens: int) -> str:
        ids = engine.tokenizer.encode(format_prompt(instruction), bos=True)
        return engine.generate([ids], SamplingParams(max_new_tokens=tokens))[0].text

    return answer


def ask_and_leave(server, body: dict) -> None:
    with server.connect() as one:
        one.sendall(raw_request(json.dumps(body).encode()))
        if body["stream"]:
            one.recv(10)


def memory_held() -> tuple[int, int]:
    """Anonymous memory in kB, which settles, and Python's objects, which must not grow at all."""
    gc.collect()
    with open("/proc/self/status") as status:
        memory = next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
    return memory, len(gc.get_objects())


class Client:
    """Does something good or bad at a time; returns the status, or below 0 where there is none."""

    KINDS = ("ask", "ask", "stream", "leave", "garbage", "large", "slow", "bad")

    def __init__(self, server, seed: int, expected: dict[str, tuple[int, str]]):
        self.server, self.rng, self.expected = server, random.Random(seed), expected

    def act(self) -> int:
        rng, kind = self.rng, self.rng.choice(self.KINDS)
        if kind in ("ask", "stream"):
            return self.ask(kind == "stream")
        if kind == "leave":
            body = {"instruction": "go on", "stream": rng.random() < 0.5, "max_tokens": 90}
            ask_and_leave(self.server, body)
            return -1
        if kind == "bad":
            body = rng.choice([b"{", b"[]", b'{"prompt": 3}', b'{"model": "x"}', b"\xff"])
            return self.server.post("/v1/completions", body).status
        with self.server.connect() as one:
            one.settimeout(30)
            if kind == "garbage":
                one.sendall(rng.randbytes(rng.randint(1, 3000)) + b"\r\n\r\n")
            elif kind == "large":
                one.sendall(raw_request(b"a" * 300_000)[:200_000])
            else:
                for byte in raw_request(b'{"prompt": "a"}')[: rng.randint(1, 80)]:
                    one.sendall(bytes([byte]))
                    time.sleep(0.01)
                return -1
            return int((one.makefile("rb").readline().split(b" ") + [b"0"] * 2)[1])

    def ask(self, stream: bool) -> int:
        instruction = self.rng.choice(list(self.expected))
        tokens, expected = self.expected[instruction]
        body = {"instruction": instruction, "temperature": 0, "max_tokens": tokens}
        response = self.server.post("/v1/completions", body | {"stream": stream})
        text = response.read().decode()
        if response.status != 200:
            assert json.loads(text)["error"]["message"] and response.headers["Retry-After"]
            return response.status
        if stream:
            assert text.endswith("data: [DONE]\n\n"), text
            events = [json.loads(event[6:]) for event in text.split("\n\n")[:-2]]
            answer = "".join(event["choices"][0]["text"] for event in events)
        else:
            answer = json.loads(text)["choices"][0]["text"]
        assert answer == expected, (instruction, answer)
        return 200


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_64_clients_of_all_kinds_at_once(seconds, alone):
    """Every response is a right answer or a clean refusal, memory stays flat, and afterwards the
    server answers as before."""
    expected = {
        f"Write the word {i}.": (4 + i, alone(f"Write the word {i}.", 4 + i)) for i in range(12)
    }
    counts, failures, lock = {}, [], threading.Lock()
    with running(tiny_engine(16), "--queue", 16, filter=RuleFilter()) as server:

        def work(client: Client, end: float) -> None:
            while time.monotonic() < end:
                try:
                    status = client.act()
                except ConnectionError:
                    status = -2  # reset after a refusal: allowed for what was malformed
                except Exception:
                    failures.append(traceback.format_exc())
                    return
                with lock:
                    counts[status] = counts.get(status, 0) + 1

        def storm(seconds: float) -> None:
            end = time.monotonic() + seconds
            clients = [Client(server, seed, expected) for seed in range(64)]
            threads = [threading.Thread(target=work, args=(client, end)) for client in clients]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            server.wait_until_idle(15)
            server.wait_until_left(40)

        storm(max(1, seconds / 3))  # what is allocated once
        before = memory_held()
        storm(seconds)
        assert not failures, failures[0]
        assert counts[200] > 5 * seconds
        assert counts.keys() <= {-2, -1, 0, 200, 400, 404, 408, 413, 431, 503}, counts
        memory, objects = (b - a for a, b in zip(before, memory_held(), strict=True))
        assert memory < 40_000 and objects < 1000, (memory, objects)
        assert len(asyncio.all_tasks(server.loop)) == 2  # the server's, and the listener
        for instruction, (tokens, text) in expected.items():
            answer = server.answer(instruction, temperature=0, max_tokens=tokens)
            assert answer["choices"][0]["text"] == text


# ---------------------------------------------------------------- a process and its signals


@contextmanager
def serve_process(*flags, files: int | None = None):
    """`alpaca serve`, which may have so many open files."""

    def limit_files() -> None:
        if files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files // 2, files))

    command = [sys.executable, "-m", "alpaca", "serve", "--model-dir", TINY, "--port", "0", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENAI_API_KEY": ""}
    process = subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
        preexec_fn=limit_files,
    )  # fmt: skip
    try:
        line = process.stderr.readline()
        url = re.search(r"http://\S+", line)
        assert url, line + process.stderr.read()
        yield process, int(url[0].rpartition(":")[2])
    finally:
        process.kill()
        process.wait()


def listening_addresses(process: subprocess.Popen, port: int) -> list[str]:
    """As the kernel writes them."""
    lines = []
    for name in ("tcp", "tcp6"):
        with open(f"/proc/{process.pid}/net/{name}") as table:
            lines += [line.split() for line in table]
    return [line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{port:04X}")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_answers_finish_and_then_ends_the_server(number):
    with serve_process() as (process, port):
        assert listening_addresses(process, port) == [f"0100007F:{port:04X}"]  # this machine only
        body = {"instruction": "go on", "stream": True, "temperature": 2.0, "seed": 1}
        body |= {"n": 8, "max_tokens": 200}
        with socket.create_connection(("127.0.0.1", port), timeout=30) as one:
            one.sendall(raw_request(json.dumps(body).encode()))
            response = one.recv(4000)
            idle = socket.create_connection(("127.0.0.1", port))
            process.send_signal(number)
            while more := one.recv(65536):
                response += more
        assert b"data: [DONE]" in response
        assert process.wait(10) == 0
        assert idle.recv(10) == b""
        idle.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        assert "Traceback" not in process.stderr.read()


# ---------------------------------------------------------------- idle connections


@pytest.fixture(scope="module")
def demo():
    """Its port; 127.0.0.1 is a proxy, 127.0.0.2 a client like those of other machines."""
    with serve_process("--trusted-proxy", "127.0.0.1") as (process, port):
        yield port
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0 and "Traceback" not in process.stderr.read()


def connect(port: int, address: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 10, (address, 0))


def hold_connections(port: int, address: str, sent: bytes, count: int) -> list[socket.socket]:
    held = []
    for _ in range(count):
        held.append(connect(port, address))
        held[-1].sendall(sent)
    return held


def send_to_all(held: list[socket.socket], data: bytes) -> None:
    for one in held:
        with suppress(OSError):  # it was closed for another
            one.sendall(data)


def seconds_to_be_answered(port: int, address: str, client: str) -> float:
    start = time.monotonic()
    body, headers = b'{"instruction": "hello", "max_tokens": 4}', f"X-Forwarded-For: {client}\r\n"
    with connect(port, address) as one:
        one.sendall(raw_request(body, headers=headers))
        assert one.recv(4096).startswith(b"HTTP/1.1 200 ")
    return time.monotonic() - start


HEAD = b"HEAD /health HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: 1.2.3.4\r\n"
IDLE = {
    "silent": b"",
    "a byte a second": HEAD + b"X-Slow: ",
    "kept after a request": HEAD + b"\r\n",
    "half a body": raw_request(b"{" * 500, headers="X-Forwarded-For: 1.2.3.4\r\n")[:-9],
}


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2"])
@pytest.mark.parametrize("kind", IDLE)
def test_a_visitor_is_answered_beside_1000_idle_connections(demo, kind, address):
    held = hold_connections(demo, address, IDLE[kind], 1000)
    for visitor in (("127.0.0.2", ""), ("127.0.0.1", "5.6.7.8"), ("127.0.0.3", "")):
        send_to_all(held, b"a" if kind == "a byte a second" else b"")
        assert seconds_to_be_answered(demo, *visitor) < 5
    for one in held:
        one.close()


@pytest.mark.parametrize("kind", ["silent", "a byte a second"])
def test_a_connection_without_a_request_is_closed_within_seconds(demo, kind):
    held = hold_connections(demo, "127.0.0.2", IDLE[kind], 10)
    end = time.monotonic() + 12
    while held and time.monotonic() < end:
        send_to_all(held, b"a" if kind == "a byte a second" else b"")
        time.sleep(1)
        readable, _, _ = select.select(held, [], [], 0)
        held = [one for one in held if one not in readable]
    assert not held


def test_a_visitor_is_answered_by_a_process_without_files_to_open():
    with serve_process("--trusted-proxy", "127.0.0.1", files=300) as (process, port):
        held = hold_connections(port, "127.0.0.1", b"", 600)  # 150 may be open
        assert seconds_to_be_answered(port, "127.0.0.1", "5.6.7.8") < 5
        files = len(os.listdir(f"/proc/{process.pid}/fd"))
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (files, files))
        held += hold_connections(port, "127.0.0.1", b"", 600)
        assert seconds_to_be_answered(port, "127.0.0.1", "5.6.7.8") < 5
        send_to_all(held, b"a")
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (10, files))  # none at all
        with connect(port, "127.0.0.1"):
            before = cpu_seconds(process)
            time.sleep(2)
            assert cpu_seconds(process) - before < 0.5
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (files, files))
        assert seconds_to_be_answered(port, "127.0.0.1", "5.6.7.8") < 5
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0 and "Traceback" not in process.stderr.read()


def cpu_seconds(process: subprocess.Popen) -> float:
    with open(f"/proc/{process.pid}/stat") as file:
        user, system = file.read().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
