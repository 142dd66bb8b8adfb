"""A small OpenAI-compatible server for the tests: both APIs, and faults on demand.

An answer follows from the prompt alone, so equal requests get equal answers.
"""

import hashlib
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

VERBS = "Explain Compare Translate Summarise Classify Rewrite List Describe Suggest Calculate"
THINGS = (
    "river teapot violin glacier notebook lantern sparrow harbour compass blanket orchard engine "
    "carpet kettle meadow puzzle ladder statue candle basket tunnel window garden saddle bridge"
)


def tasks_for(prompt: str, count: int = 17, first: int = 4) -> str:
    """The answer of a completion model, which continues after "4. Instruction:"."""
    rng = random.Random(hashlib.sha256(prompt.encode()).hexdigest())
    parts = []
    for number in range(first, first + count):
        some = rng.sample(THINGS.split(), 6)
        verb = rng.choice(VERBS.split())
        named = f"{some[0]} {some[1]} {some[2]} with a {some[3]} {some[4]}"
        instruction = f"{verb} the {named} {rng.random():.6f}"
        if rng.random() < 0.1:
            instruction = f"Draw the {some[0]} and the {some[1]} for me"
        given = f"A {some[5]}." if rng.random() < 0.5 else "<noinput>"
        label = "" if number == first else f"###\n{number}. Instruction:"
        parts.append(
            f"{label} {instruction}\n{number}. Input:\n{given}\n{number}. Output:\n"
            f"{some[5]} it is\n"
        )
    return "".join(parts)


def instructions_for(prompt: str) -> str:
    rng = random.Random(prompt)
    lines = []
    for number in range(9, 16):
        some = " ".join(rng.sample(THINGS.split(), 5))
        lines.append(f"{number}. {rng.choice(VERBS.split())} the {some} {rng.random():.6f}")
    return lines[0].removeprefix("9.") + "\n" + "\n".join(lines[1:])


def answer(prompt: str) -> str:
    """Chosen by the end of the prompt."""
    if prompt.endswith("Classification:"):
        return " Yes" if "Classify" in prompt.rsplit("Task:", 1)[1] else " No"
    if prompt.endswith("Class label:"):
        return " good\nInput: it shines\nClass label: bad\nInput: it rains"
    if prompt.endswith("Input:"):
        return " three\nOutput: drei\n\nExample 2\nInput: four\nOutput: vier"
    if prompt.endswith("9."):
        return instructions_for(prompt)
    return tasks_for(prompt)


class Server(ThreadingHTTPServer):
    """`faults` maps a name to its share of the answers; `latency` is seconds per answer."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, faults=None, latency=0.0, key="", answer=answer, seed=0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.latency, self.key, self.answer = faults or {}, latency, key, answer
        self.rng, self.lock = random.Random(seed), threading.Lock()
        self.refuse = lambda body: False  # with a 400
        self.seen: Counter = Counter()  # requests by path, answers, faults by name
        self.prompts: Counter = Counter()
        self.spent = [0, 0]  # tokens in and out of the complete answers
        self.retry_after = 0.05
        self.bodies: list[dict] = []
        self.now = self.most = 0

    def __enter__(self):
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def fault(self) -> str:
        with self.lock:
            draw = self.rng.random()
            for name, share in self.faults.items():
                draw -= share
                if draw < 0:
                    self.seen[name] += 1
                    return name
        return ""

    def handle_error(self, request, client_address):
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *arguments):
        pass

    def reply(self, status: int, body, headers=None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def content(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        server, content = self.server, self.content()
        path = self.path.removeprefix("/v1/")
        server.seen["POST " + path] += 1
        with server.lock:
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                given = self.headers.get("Authorization", "none")
                self.reply(401, {"error": {"message": f"Incorrect API key provided: {given}"}})
            else:
                self.complete(path, json.loads(content))
        finally:
            with server.lock:
                server.now -= 1

    def complete(self, path: str, body: dict) -> None:
        server = self.server
        server.bodies.append(body)
        fault = server.fault()
        if server.latency:
            time.sleep(server.latency)
        if body["model"] == "nobody":
            return self.reply(404, {"error": {"message": "The model `nobody` does not exist"}})
        if server.refuse(body):
            return self.reply(400, {"error": {"message": "content_filter"}})
        if fault in ("429", "500", "503"):
            headers = {"Retry-After": str(server.retry_after)} if fault == "429" else None
            return self.reply(int(fault), {"error": {"message": "not now"}}, headers)
        if fault == "reset":
            return self.reset()
        if fault == "stall":
            time.sleep(3)
            return self.reset()
        if fault in ODD:
            return self.reply(200, ODD[fault])
        prompt = prompt_of(path, body)
        text = server.answer(prompt)
        data = json.dumps(response_body(path, body["model"], prompt, text, server)).encode()
        if fault == "half":
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return None
        with server.lock:
            server.prompts[prompt] += 1
            usage = json.loads(data)["usage"]
            server.spent[0] += usage["prompt_tokens"]
            server.spent[1] += usage["completion_tokens"]
        self.reply(200, data)

    def reset(self) -> None:
        linger = struct.pack("ii", 1, 0)  # closing sends RST
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.connection.close()


ODD = {
    "empty choices": {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}},
    "list": [1, 2, 3],
    "wrong types": {"choices": [{"message": {"content": 7}}], "usage": "many", "id": 3},
    "no message": {"choices": [None], "usage": None},
    "not JSON": b"<html>Bad gateway, but with a 200</html>",
    "huge": b'{"choices": [{"message": {"content": "x"}}], "more": "' + b"a" * 10_000_000 + b'"}',
    "deep": b"[" * 200_000,
}


def response_body(path: str, model: str, prompt: str, text: str | dict, server) -> dict:
    choice = {"text": text} if path == "completions" else {"message": {"content": text}}
    if isinstance(text, dict):  # a whole choice
        choice, text = text, ""
    with server.lock:
        server.seen["answers"] += 1
        number = server.seen["answers"]
    usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split())}
    return {
        "id": f"answer-{number}-{server.server_port}",
        "model": model,
        "choices": [{"finish_reason": "stop", **choice}],
        "usage": usage,
    }


def prompt_of(path: str, body: dict) -> str:
    return body["messages"][0]["content"] if path.endswith("chat/completions") else body["prompt"]
