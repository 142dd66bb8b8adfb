"""`alpaca serve` in the tests' process, an engine that follows a script, a moderation service."""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

import torch

from alpaca.__main__ import load_verb
from alpaca.inference.engine import Engine
from alpaca.inference.watermark import Watermark
from alpaca.serving import serve
from alpaca.serving.http import Limits
from alpaca.serving.moderation import Filter
from alpaca.weights.loading import load_model
from helpers import teacher_server
from helpers.commands import ROOT
from helpers.models import small_config
from model import Llama
from tokenizer import load_tokenizer

TINY = ROOT / "data/tiny-llama"  # a base model: its answers seldom end by themselves
ENDLESS = "word " * 3000


class ScriptedEngine(Engine):
    """An engine whose answer is `text`, or text(prompt), and whose steps take `pace` seconds."""

    def __init__(self, text: str | Callable[[str], str], batch_size: int = 4, pace: float = 0.0):
        config = small_config(vocab_size=1024, max_position_embeddings=4096)
        super().__init__(Llama(config), load_tokenizer(TINY), batch_size)
        self.script = text if callable(text) else lambda prompt: text
        self.pace, self.steps = pace, 0

    def guess(self) -> list[int]:  # tests count steps
        return []

    def sample_and_append(self, logits: torch.Tensor) -> None:
        self.steps += 1
        time.sleep(self.pace)
        for s in self.active:
            if s.finish_reason is None:
                if not hasattr(s, "plan"):
                    text = self.script(self.tokenizer.decode(s.prompt))
                    s.plan = [*self.tokenizer.encode_after("", text)[0], self.tokenizer.eos_id]
                s.append(s.plan[len(s.ids)])


def tiny_engine(batch_size: int = 8, mark: bool = True) -> Engine:
    watermark = Watermark(1024) if mark else None
    return Engine(load_model(TINY), load_tokenizer(TINY), batch_size, watermark=watermark)


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def raw_request(body: bytes, path: str = "/v1/completions", headers: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


class RunningServer:
    """`http` and `app` are the product's objects; their `loop` runs in another thread."""

    def get(self, path: str, **headers) -> http.client.HTTPResponse:
        return self.send("GET", path, None, headers)

    def post(self, path: str, content, **headers) -> http.client.HTTPResponse:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return self.send("POST", path, body, {"Content-Type": "application/json", **headers})

    def send(self, method: str, path: str, body, headers) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        return connection.getresponse()

    def answer(self, instruction: str, **fields) -> dict:
        response = self.post("/v1/completions", {"instruction": instruction, **fields})
        content = json.loads(response.read())
        assert response.status == 200, content
        return content

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def wait_until_idle(self, seconds: float = 10) -> None:
        """No request is left, and nothing is decoded."""
        wait_until(lambda: self.app.worker.load == 0 and not self.app.engine.busy, seconds)

    def wait_until_left(self, seconds: float = 10) -> None:
        """No connection is left."""
        wait_until(lambda: not self.http.connections, seconds)


def arguments(*flags):
    _, parser = load_verb("serve")
    args = parser.parse_args(list(map(str, flags)))
    serve.check_arguments(args)
    return args


@contextmanager
def running(engine: Engine, *flags, filter: Filter | None = None, limits: Limits | None = None):
    """The server at a free port; its model is called "tiny"."""
    defaults = ("--model-dir", TINY, "--name", "tiny", "--port", 0, "--rate", 0, "--drain", 5)
    args = arguments(*defaults, *flags)
    bound, server = serve.bind_socket(args.host, 0), RunningServer()
    watermark = engine.watermark or Watermark(engine.model.config.vocab_size)
    ready, failed = threading.Event(), []

    async def run_until_end() -> None:
        parts = (args, bound, engine, filter or Filter(), watermark)
        async with serve.running_server(*parts) as (server.http, server.app):
            server.http.limits = limits or server.http.limits
            server.loop, server.end = asyncio.get_running_loop(), asyncio.Event()
            server.port = bound.getsockname()[1]
            server.url = f"http://127.0.0.1:{server.port}"
            ready.set()
            await server.end.wait()

    def run() -> None:
        try:
            asyncio.run(run_until_end())
        except BaseException as error:
            failed.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    try:
        assert not failed, failed
        yield server
    finally:
        if not failed:
            server.loop.call_soon_threadsafe(server.end.set)
        thread.join()
        bound.close()
    assert not failed, failed


class ModerationService(teacher_server.Server):
    """Answers every request with `status` and `content` after `latency` s, and notes it."""

    def __init__(self, content=None, status: int = 200, latency: float = 0.0):
        super().__init__(latency=latency)
        self.RequestHandlerClass, self.content, self.status = ModerationHandler, content, status
        self.statuses: list[int] = []  # of the first requests
        self.requests: list[tuple[str, dict, str | None]] = []  # path, body, Authorization


class ModerationHandler(teacher_server.Handler):
    def do_POST(self):
        service = self.server
        body = json.loads(self.content())
        service.requests.append((self.path, body, self.headers.get("Authorization")))
        time.sleep(service.latency)
        status = service.statuses.pop(0) if service.statuses else service.status
        self.reply(status, service.content)
