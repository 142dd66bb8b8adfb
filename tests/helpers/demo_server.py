"""The demo's server inside the tests' process, and models that say what they are told to."""

import asyncio
import http.client
import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from unittest.mock import patch

import torch

from alpaca.inference.engine import Engine
from alpaca.inference.watermark import Watermark
from alpaca.serving import app
from alpaca.serving.http import Limits, listening
from alpaca.serving.moderation import Filter
from alpaca.weights.loading import load_model
from dataset import encode_after_newline
from helpers.commands import ROOT
from helpers.models import small_config
from model import Llama
from tokenizer import Tokenizer

TINY = ROOT / "data/tiny-llama"  # a base: it goes on, and seldom ends


class Scripted(Engine):
    """Steps as an engine does, and answers with `say(prompt)`; `pace` is seconds a token."""

    def __init__(self, say: Callable[[str], str], rows: int = 4, pace: float = 0.0):
        config = small_config(vocab_size=1024, max_position_embeddings=4096)
        super().__init__(Llama(config), Tokenizer(TINY), rows)
        self.say, self.pace, self.steps = say, pace, 0

    def sample_and_append(self, logits: torch.Tensor) -> None:
        self.steps += 1
        time.sleep(self.pace)
        for s in self.active:
            if s.finish_reason is None:
                if not hasattr(s, "plan"):
                    text = self.say(self.tokenizer.decode(s.prompt))
                    s.plan = [*encode_after_newline(text, self.tokenizer), self.tokenizer.eos_id]
                s.append(s.plan[len(s.ids)])


def tiny_engine(rows: int = 8, mark: bool = True) -> Engine:
    watermark = Watermark(1024) if mark else None
    return Engine(load_model(TINY), Tokenizer(TINY), rows, watermark=watermark)


class Running:
    """What a test may look at; `loop` runs in another thread."""

    def get(self, path: str, **headers) -> http.client.HTTPResponse:
        return self.send("GET", path, None, headers)

    def post(self, path: str, content, **headers) -> http.client.HTTPResponse:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Type": "application/json", **headers}
        return self.send("POST", path, body, headers)

    def send(self, method: str, path: str, body, headers) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        return connection.getresponse()

    def answer(self, instruction: str, **how) -> dict:
        reply = self.post("/v1/completions", {"instruction": instruction, **how})
        content = json.loads(reply.read())
        assert reply.status == 200, content
        return content

    def wait(self, true: Callable[[], bool], seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "it never came"
            time.sleep(0.005)


def arguments(*flags):
    with patch.object(sys, "argv", ["demo.py", *map(str, flags)]):
        return app.parse_args()


@contextmanager
def running(engine: Engine, *flags, filter: Filter | None = None, limits: Limits | None = None):
    """The server at a free port; the model's name is "tiny"."""
    args = arguments("--port", 0, "--rate", 0, "--drain", 5, "--name", "tiny", *flags)
    bound, server = listening(args.host, 0), Running()
    marks = engine.watermark or Watermark(engine.model.config.vocab_size)
    ready, failed = threading.Event(), []

    async def serve() -> None:
        parts = (args, bound, engine, filter or Filter(), marks)
        async with app.running(*parts) as (server.http, server.demo):
            if limits:
                server.http.limits = limits
            server.loop, server.end = asyncio.get_running_loop(), asyncio.Event()
            server.port = bound.getsockname()[1]
            server.url = f"http://127.0.0.1:{server.port}"
            ready.set()
            await server.end.wait()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as problem:
            failed.append(problem)
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
