"""The demo as its users meet it: page, API, filter, load, the end. (HTTP itself: test_web.py.)"""

import asyncio
import base64
import gc
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest
import torch
from helpers import teacher_server
from helpers.commands import ROOT, assert_refused
from helpers.demo_server import TINY, Scripted, arguments, running, tiny_engine

import selfinstruct
from alpaca.common.files import read_jsonl
from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams
from alpaca.serving import app, http
from alpaca.serving.moderation import Filter, Rules, Unavailable, chosen_filter
from alpaca.weights.adapter import save_adapter
from alpaca.weights.loading import load_model
from alpaca.weights.lora import LoraConfig, add_lora
from dataset import chat_prompt, format_prompt
from tokenizer import Tokenizer

FRUIT = "Name a fruit."


@pytest.fixture(scope="module")
def tiny():
    with running(tiny_engine()) as server:
        yield server


@pytest.fixture(scope="module")
def alone():
    """Greedy answers of the same model with the same watermark, one at a time."""
    engine = tiny_engine(rows=1)

    def answer(text: str, tokens: int) -> str:
        ids = engine.tokenizer.encode(text, bos=True)
        return engine.generate([ids], SamplingParams(max_new_tokens=tokens))[0].text

    return answer


@pytest.fixture(scope="module")
def client(tiny):
    with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0) as one:
        yield one


# ---------------------------------------------------------------- the openai package as client


def test_openai_chat(client, alone):
    messages = [{"role": "user", "content": FRUIT}]
    how = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 20}
    expected = alone(format_prompt(FRUIT), 20)
    whole = client.chat.completions.create(**how)
    assert whole.choices[0].message.content == expected and expected
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 20
    pieces = list(client.chat.completions.create(**how, stream=True))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == expected
    assert pieces[-1].choices[0].finish_reason == "length"
    assert len({piece.id for piece in pieces}) == 1


def test_openai_completions(client, alone):
    how = {"model": "tiny", "prompt": "The capital of", "temperature": 0, "max_tokens": 20}
    expected = alone("The capital of", 20)
    whole = client.completions.create(**how)
    assert whole.choices[0].text == expected and whole.usage.prompt_tokens > 3
    options = {"include_usage": True}
    pieces = list(client.completions.create(**how, stream=True, stream_options=options))
    assert "".join(c.text for piece in pieces for c in piece.choices) == expected
    assert pieces[-1].usage.completion_tokens == 20 and pieces[-1].choices == []


def test_openai_n_seed_and_stop(client):
    how = {"model": "tiny", "prompt": "a list of words:", "max_tokens": 12, "temperature": 1.2}
    first, again = (client.completions.create(**how, n=3, seed=5) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices] and len(set(texts)) == 3
    assert client.completions.create(**how, seed=6).choices[0].text == texts[1]
    streamed = [""] * 3
    for piece in client.completions.create(**how, n=3, seed=5, stream=True):
        for choice in piece.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts
    stop = next(c for c in texts[0][3:] if c.isalpha())
    stopped = client.completions.create(**how, seed=5, stop=[stop]).choices[0]
    assert stopped.text == texts[0][: texts[0].index(stop)] and stopped.finish_reason == "stop"


def test_openai_logprobs(client):
    messages = [{"role": "user", "content": FRUIT}]
    how = {"model": "tiny", "temperature": 0, "max_tokens": 6}
    told = client.chat.completions.create(**how, messages=messages, logprobs=True, top_logprobs=3)
    content = told.choices[0].logprobs.content
    assert len(content) == 6 and all(len(token.top_logprobs) == 3 for token in content)
    assert all(token.logprob <= token.top_logprobs[0].logprob <= 0 for token in content)
    spelled = [token for token in content if not token.token.startswith("<0x")]
    assert spelled and all(bytes(t.bytes).decode() == t.token for t in spelled)
    plain = client.completions.create(**how, prompt="a", logprobs=2).choices[0].logprobs
    assert len(plain.tokens) == len(plain.token_logprobs) == 6


def test_openai_models_and_errors(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    say = [{"role": "user", "content": FRUIT}]
    with pytest.raises(openai.NotFoundError, match="'tiny'"):
        client.chat.completions.create(model="gpt-4", messages=say)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="tiny", messages=say, temperature=3)
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="word " * 2000)
    assert refused.value.code == "context_length_exceeded" and refused.value.param == "prompt"
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_a_conversation_is_the_one_that_training_has(tiny):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    said += [{"role": "user", "content": "c"}]
    body = {"messages": said, "temperature": 0, "max_tokens": 15}
    reply = json.loads(tiny.post("/v1/chat/completions", body).read())
    engine = tiny_engine(rows=1)
    ids = chat_prompt(said, engine.tokenizer)
    expected = engine.generate([ids], SamplingParams(max_new_tokens=15))[0].text
    assert reply["choices"][0]["message"]["content"] == expected
    assert reply["usage"]["prompt_tokens"] == len(ids)


def test_it_is_a_teacher_for_selfinstruct(command, tmp_path):
    engine = Scripted(teacher_server.answer, rows=8)
    with running(engine, "--max-new-tokens", 3000) as server:
        code, _, err = command(
            selfinstruct, "generate", "--out", tmp_path / "run", "--num", 12, "--concurrency", 4,
            "--teacher", "tiny", "--base-url", f"{server.url}/v1", "--retry-wait", 0.05,
        )  # fmt: skip
    assert code == 0, err
    log = list(read_jsonl(tmp_path / "run/responses.jsonl"))
    assert log and all(entry["usage"]["completion"] > 50 for entry in log)
    code, _, err = command(
        selfinstruct, "export", tmp_path / "run", "--out", tmp_path / "records.json"
    )
    assert code == 0 and len(json.loads((tmp_path / "records.json").read_text())) >= 12, err


# ---------------------------------------------------------------- answers


def test_batched_answers_are_those_of_one_at_a_time(tiny, alone):
    draw = random.Random(1)
    asked = [f"Write the {i} words of list {i * 7}." for i in range(20)]
    lengths = [draw.randint(3, 50) for _ in asked]

    def ask(i: int) -> str:
        time.sleep(draw.uniform(0, 0.3))
        if i % 4 == 3:  # one that leaves
            leave(tiny, {"instruction": asked[i], "stream": True, "max_tokens": 50})
        how = {"temperature": 0, "max_tokens": lengths[i]}
        return tiny.answer(asked[i], **how)["choices"][0]["text"]

    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(ask, range(20)))
    assert texts == [alone(format_prompt(a), n) for a, n in zip(asked, lengths, strict=True)]
    tiny.wait(lambda: tiny.demo.decoder.load == 0)


def leave(server, body: dict) -> None:
    """Ask, read a little, and go away."""
    sent = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as one:
        one.sendall(request(sent))
        if body["stream"]:
            one.recv(10)


def request(body: bytes, path: str = "/v1/completions") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_row_at_the_next_token(stream):
    engine = Scripted(lambda prompt: "word " * 3000, rows=1, pace=0.01)
    with running(engine, "--max-new-tokens", 3000) as server:
        body = json.dumps({"instruction": "a", "stream": stream, "n": 1}).encode()
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as one:
            one.sendall(request(body))
            server.wait(lambda: engine.steps > 5)
        server.wait(lambda: server.demo.decoder.load == 0, 0.5)
        server.wait(lambda: not engine.busy, 0.5)
        server.wait(lambda: not server.http.connections, 0.5)


def test_answers_stream_while_they_are_made():
    engine = Scripted(lambda prompt: "word " * 20, pace=0.02)
    with running(engine) as server:
        reply = server.post("/v1/completions", {"instruction": "a", "stream": True})
        start, times = time.monotonic(), []
        while line := reply.readline():
            times += [time.monotonic() - start] * line.startswith(b"data: {")
        assert times[-1] - times[0] > 0.2 and len(times) > 5


def test_an_answer_that_takes_too_long_is_an_honest_error():
    engine = Scripted(lambda prompt: "word " * 3000, rows=1, pace=0.01)
    with running(engine, "--max-new-tokens", 3000, "--timeout", 0.3) as server:
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(server.post, "/v1/completions", {"prompt": "a"}) for _ in "ab"]
            replies = [future.result() for future in asked]
        assert sorted(reply.status for reply in replies) == [503, 504]  # one never began
        reply = server.post("/v1/completions", {"prompt": "a", "stream": True})
        events = reply.read()
        assert b'"type": "timeout"' in events and b"[DONE]" not in events
        server.wait(lambda: server.demo.decoder.load == 0 and not engine.busy)


def many_words(server) -> str:
    """The tiny base says little at a time."""
    how = {"instruction": "Write down words.", "temperature": 1.3, "max_tokens": 60, "n": 8}
    answers = [server.answer(**how, seed=seed) for seed in (3, 23)]
    return "\n".join(choice["text"] for answer in answers for choice in answer["choices"])


def test_every_answer_bears_the_watermark_unless_told_otherwise(tiny):
    found = []
    with running(tiny_engine(mark=False), "--no-watermark") as plain:
        for server in (tiny, plain):
            reply = server.post("/api/detect", {"text": many_words(server)})
            found.append(json.loads(reply.read()))
            told = json.loads(server.get("/api/about").read())
            assert told["watermark"] is (server is tiny) and "1 million" in told["notice"]
    assert found[0]["z"] > 6 and found[0]["verdict"].startswith("watermarked")
    assert found[1]["z"] < 3.5 and not found[1]["verdict"].startswith("watermarked")


def test_the_watermark_of_the_command_line(monkeypatch):
    here = ("--model-dir", TINY, "--rows", 1, "--watermark-key", 12345)
    engine, marks = app.made(arguments(*here))
    assert engine.watermark is marks and (marks.key, marks.vocab_size) == (12345, 1024)
    monkeypatch.setenv("ALPACA_WATERMARK_KEY", "777")
    assert arguments(*here[:4]).watermark_key == 777
    assert arguments(*here).watermark_key == 12345
    engine, marks = app.made(arguments(*here, "--no-watermark"))
    assert engine.watermark is None and marks.key == 12345


def test_an_adapter_is_put_on(tmp_path):
    model, how = load_model(TINY, dtype=torch.float32), SamplingParams(max_new_tokens=12)
    engine = Engine(model, Tokenizer(TINY))
    ids = engine.tokenizer.encode(format_prompt(FRUIT), bos=True)
    base = engine.generate([ids], how)[0].ids
    add_lora(model, 4, 8, 0.0)
    for name, own in model.named_parameters():
        if "lora_B" in name:  # or it would change nothing
            own.data.normal_(0, 0.1)
    save_adapter(model, LoraConfig(4, 8, 0.0), tmp_path / "adapter", TINY)
    here = ("--model-dir", TINY, "--adapter", tmp_path / "adapter", "--rows", 1, "--dtype", "fp32")
    said = app.made(arguments(*here, "--no-watermark"))[0].generate([ids], how)[0].ids
    assert said == engine.generate([ids], how)[0].ids != base


def test_tokens_are_coloured_as_they_are_scored(tiny):
    text = "The list of 中文 words, and the list 🎉"
    told = json.loads(tiny.post("/api/detect", {"text": text}).read())
    assert "".join(piece for piece, _ in told["tokens"]) == text
    marks = [green for _, green in told["tokens"]]
    assert marks[0] is None and all(isinstance(mark, bool) for mark in marks[1:])
    watermark, ids = tiny.demo.watermark, tiny.demo.tokenizer.encode(text)
    assert marks[1:] == watermark.green_mask(ids)
    assert tiny.post("/api/detect", {"text": "a" * 20_001}).status == 413
    for odd in ("", "\ud800", 3):
        assert tiny.post("/api/detect", {"text": odd}).status == 400


# ---------------------------------------------------------------- filter


SECRET = "swordfish " * 30


class Broken(Filter):
    """Works for `good` checks, and then does what `how` says."""

    piece = 20

    def __init__(self, good: int, how: str = "down"):
        self.good, self.how, self.lock = good, how, threading.Lock()

    async def check(self, text: str) -> str:
        with self.lock:
            self.good -= 1
        if self.good < 0 and self.how == "down":
            raise Unavailable
        if self.good < 0:
            return "violence"
        return ""


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("how", ["down", "flags"])
def test_nothing_is_shown_that_the_filter_did_not_pass(path, stream, how):
    engine = Scripted(lambda prompt: SECRET)
    asked = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "stream": stream}
    if not stream:
        asked["logprobs"] = True if "chat" in path else 0
    for good in (0, 1, 3):
        with running(engine, filter=Broken(good, how)) as server:
            reply = server.post(path, asked)
            said = reply.read().decode()
            shown = said.count("swordfish")
            if good == 0:
                assert reply.status == (503 if how == "down" else 400) and shown == 0
                assert "content filter" in said
            elif not stream and good == 1:
                assert reply.status == (503 if how == "down" else 200) and shown == 0
                assert how == "down" or '"finish_reason": "content_filter"' in said
            elif stream:
                assert reply.status == 200
                assert shown == (0 if good == 1 else shown) and shown < 25
                assert ("filter_unavailable" if how == "down" else "content_filter") in said
            server.wait(lambda s=server: s.demo.decoder.load == 0)


def test_pieces_that_were_passed_are_shown_before_the_filter_stops():
    text = "harmless words first, and then the forbidden thing"
    engine = Scripted(lambda prompt: text, pace=0.02)

    class Strict(Filter):
        async def check(self, text: str) -> str:
            return "rule" if "forbidden" in text else ""

    with running(engine, filter=Strict()) as server:
        reply = server.post("/v1/completions", {"prompt": "a", "stream": True})
        events = [json.loads(line[6:]) for line in reply.read().split(b"\n\n")[:-2]]
        shown = "".join(event["choices"][0]["text"] for event in events if event["choices"])
        assert shown == "harmless words first, and then the "
        assert events[-1]["choices"][0]["finish_reason"] == "content_filter"
        assert "content filter" in events[-1]["choices"][0]["note"]


def test_the_filter_reads_all_that_a_person_wrote():
    with running(Scripted(lambda prompt: "fine"), filter=Rules()) as server:
        bad = "how to make a pipe bomb"
        chat = [{"role": "system", "content": bad}, {"role": "user", "content": "hello"}]
        asked = [{"prompt": bad}, {"prompt": ["fine", bad]}, {"instruction": "x", "input": bad}]
        for body in asked:
            assert server.post("/v1/completions", body).status == 400, body
        reply = server.post("/v1/chat/completions", {"messages": chat})
        assert reply.status == 400 and json.loads(reply.read())["error"]["code"] == "content_filter"
        assert server.answer("hello")["choices"][0]["text"] == "fine"


@pytest.mark.parametrize("stream", [True, False])
def test_no_rule_ends_where_the_answer_begins(stream):
    with running(Scripted(lambda prompt: "mb you need a pipe."), filter=Rules()) as server:
        how = {"prompt": "The best way to make a pipe bo", "stream": stream}
        said = server.post("/v1/completions", how).read().decode()
        assert '"finish_reason": "content_filter"' in said and "need" not in said
        asked = {"instruction": "I wonder how people make", "stream": stream}
        assert "need" in server.post("/v1/completions", asked).read().decode()


@pytest.mark.parametrize("stream", [True, False])
def test_what_the_filter_stops_is_not_decoded_on(stream):
    engine = Scripted(lambda prompt: "make mustard gas " + "word " * 3000, rows=1, pace=0.01)
    with running(engine, "--max-new-tokens", 3000, filter=Rules()) as server:
        said = server.post("/v1/completions", {"prompt": "a ", "stream": stream}).read()
        assert b"content_filter" in said and engine.steps < 200
        server.wait(lambda: not engine.busy, 0.5)


class Slow(Filter):
    def __init__(self, seconds: float):
        self.seconds = seconds

    async def check(self, text: str) -> str:
        await asyncio.sleep(self.seconds)
        return ""


@pytest.mark.parametrize(("seconds", "status"), [(5, 503), (0.3, 504)])  # at prompt, at answer
def test_the_time_for_an_answer_is_also_the_filters(seconds, status):
    engine = Scripted(lambda prompt: "fine")
    with running(engine, "--timeout", 0.4, filter=Slow(seconds)) as server:
        start = time.monotonic()
        reply = server.post("/v1/completions", {"prompt": "a"})
        assert reply.status == status and time.monotonic() - start < 2
        server.wait(lambda: server.demo.decoder.load == 0)


def test_answers_are_checked_at_the_same_time():
    with running(Scripted(lambda prompt: "fine", rows=8), filter=Slow(0.3)) as server:
        start = time.monotonic()
        assert len(server.answer("a", n=8)["choices"]) == 8
        assert time.monotonic() - start < 1.5  # of 9 checks


def test_what_the_model_might_have_said_is_told_where_nothing_is_filtered():
    with running(Scripted(lambda prompt: "fine"), filter=Rules()) as server:
        reply = server.post("/v1/completions", {"prompt": "a", "logprobs": 2})
        assert reply.status == 400 and b"--filter off" in reply.read()


@contextmanager
def moderator(**how):
    """A moderation service for `--filter service`."""
    with teacher_server.Server() as server:
        base = server.RequestHandlerClass

        class Moderating(base):
            def do_POST(self):
                server.bodies.append(json.loads(self.content()))
                time.sleep(how.get("latency", 0))
                self.reply(how.get("status", 200), how["said"])

        server.RequestHandlerClass = Moderating
        yield server


GOOD = {"results": [{"flagged": False, "categories": {}}]}
DOWN = {
    "error 500": {"status": 500, "said": {"error": {"message": "no"}}},
    "wrong key": {"status": 401, "said": {"error": {"message": "Incorrect API key: sk-secret"}}},
    "nonsense": {"said": {"results": "fine"}},
    "slow": {"latency": 3, "said": GOOD},
}


@pytest.mark.parametrize("kind", DOWN)
def test_a_service_that_is_down_slow_or_odd_lets_nothing_pass(kind, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-some-length")
    with moderator(**DOWN[kind]) as judge:
        args = arguments("--filter", "service", "--moderation-url", judge.url)
        service = chosen_filter(args)
        service.timeout = 0.8
        with running(Scripted(lambda prompt: SECRET), filter=service) as server:
            start = time.monotonic()
            reply = server.post("/v1/completions", {"prompt": "a", "stream": True})
            said = reply.read().decode()
            assert reply.status == 503 and "content filter cannot be reached" in said
            assert reply.headers["Retry-After"] and time.monotonic() - start < 2.5
            assert "swordfish" not in said and "sk-" not in said and judge.url not in said


def test_the_service_is_asked_about_prompt_and_answer(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-some-length")
    with moderator(said=GOOD) as judge:
        service = chosen_filter(arguments("--moderation-url", judge.url))
        with running(Scripted(lambda prompt: SECRET, pace=0.003), filter=service) as server:
            how = {"instruction": "hello", "input": "there", "stream": True}
            said = server.post("/v1/completions", how).read().decode()
            assert said.count("swordfish") == 30
        asked = [body["input"] for body in judge.bodies]
        assert asked[0] == "hello\nthere" and len(asked) > 2
        for number, text in enumerate(asked[1:], 1):  # after its prompt, and what is shown already
            assert re.search(r"hello\s.*there\s.*?(swordfish ?)+$", text, re.DOTALL), text
            assert text.count("swordfish") > 8 * number


def test_which_filter_is_used(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert chosen_filter(arguments()).name == "rules"
    assert chosen_filter(arguments("--filter", "off")).name == "off"
    own = ("--moderation-url", "http://localhost:1/v1")
    assert chosen_filter(arguments(*own)).name == own[1]  # without a key, too
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        chosen_filter(arguments("--filter", "service"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-some-length")
    assert chosen_filter(arguments()).name == "https://api.openai.com/v1"
    assert chosen_filter(arguments("--filter", "rules")).name == "rules"


# ---------------------------------------------------------------- load


def test_beyond_the_queue_it_is_503_at_once():
    engine = Scripted(lambda prompt: "word " * 3000, rows=1, pace=0.01)
    with running(engine, "--queue", 2, "--max-new-tokens", 3000) as server:
        body = request(json.dumps({"prompt": "a"}).encode())
        held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
        for one in held:
            one.sendall(body)
        server.wait(lambda: server.demo.decoder.load == 3)
        start = time.monotonic()
        reply = server.post("/v1/completions", {"prompt": "a"})
        assert time.monotonic() - start < 0.5
        assert reply.status == 503 and 1 <= int(reply.headers["Retry-After"]) <= 60
        assert json.loads(reply.read())["error"]["type"] == "overloaded"
        told = json.loads(server.get("/health").read())
        assert told == {"status": "ok", "answers": 3, "at_once": 1}
        for one in held:
            one.close()
        server.wait(lambda: server.demo.decoder.load == 0)


def test_each_client_has_its_own_rate():
    engine = Scripted(lambda prompt: "fine")
    with running(engine, "--rate", 6, "--client-header", "X-Forwarded-For") as server:
        send = {"Content_Type": "application/json"}

        def ask(who: str):
            return server.post("/v1/completions", {"prompt": "a"}, X_Forwarded_For=who, **send)

        assert [ask("1.2.3.4").status for _ in range(3)] == [200, 200, 429]
        assert ask("9.9.9.9, 5.6.7.8").status == 200  # what the client itself says comes first
        assert ask("5.6.7.8").status == 200 and ask("8.8.8.8, 5.6.7.8").status == 429
        refused = ask("1.2.3.4")
        assert 8 <= int(refused.headers["Retry-After"]) <= 10
        assert json.loads(refused.read())["error"]["type"] == "rate_limit_error"
        assert server.get("/health", X_Forwarded_For="1.2.3.4").status == 200


def test_a_rate_comes_back_and_remembers_no_more_than_it_should(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(http.time, "monotonic", lambda: now[0])
    allowance = http.Allowance(60)
    assert [allowance.wait("a") for _ in range(21)] == [0.0] * 20 + [1.0]
    now[0] = 1.0
    assert allowance.wait("a") == 0.0 and allowance.wait("a") == 1.0
    for number in range(http.MOST_CLIENTS + 5):
        allowance.wait(str(number))
    assert len(allowance.clients) == http.MOST_CLIENTS
    assert "a" not in allowance.clients and str(http.MOST_CLIENTS + 4) in allowance.clients
    now[0] = 1000.0
    assert (
        allowance.wait("b", 8) == allowance.wait("b", 12) == 0.0 and allowance.wait("b", 3) == 3.0
    )
    assert allowance.wait("c", 50) == 0.0 and allowance.wait("c") == 1.0  # as much as there can be


def test_a_request_costs_what_it_asks_for():
    with running(Scripted(lambda prompt: "fine"), "--rate", 24) as server:
        statuses = [server.post("/v1/completions", {"prompt": "a", "n": 8}).status for _ in "ab"]
        assert statuses == [200, 429]


def test_one_client_gets_a_share_of_the_queue():
    engine = Scripted(lambda prompt: "word " * 3000, rows=1, pace=0.01)
    with running(engine, "--rate", 600, "--max-new-tokens", 3000) as server:
        body = request(b'{"prompt": "a", "n": 8}')
        with socket.create_connection(("127.0.0.1", server.port)) as one:
            one.sendall(body)
            server.wait(lambda: server.demo.decoder.load == 8)
            reply = server.post("/v1/completions", {"prompt": "a", "n": 8})  # 12 of 49 are its own
            assert reply.status == 429 and b"one client" in reply.read()
        server.wait(lambda: server.demo.decoder.load == 0)


def test_health_tells_when_nothing_is_decoded_any_more():
    with running(Scripted(lambda prompt: "fine")) as server:
        assert server.get("/health").status == 200
        server.demo.decoder.inbox.put(None)
        server.wait(lambda: not server.demo.decoder.thread.is_alive())
        assert server.get("/health").status == 503
        assert server.post("/v1/completions", {"prompt": "a"}).status == 500  # at once


def held() -> tuple[int, int]:
    """Memory in kB, which settles, and Python's objects, which must not grow at all."""
    gc.collect()
    with open("/proc/self/status") as status:
        memory = next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
    return memory, len(gc.get_objects())


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_64_clients_of_all_kinds_at_once(seconds, alone):
    """Answers, disconnects, garbage, oversize, slow senders: every response an answer that is right
    or a clean refusal, memory flat, and then it serves as before."""
    asked = {f"Write the word {i}.": 4 + i for i in range(12)}
    expected = {text: alone(format_prompt(text), tokens) for text, tokens in asked.items()}
    counts, wrong, lock = {}, [], threading.Lock()
    with running(tiny_engine(rows=16), "--queue", 16, filter=Rules()) as server:

        def ask(draw: random.Random, stream: bool) -> int:
            text = draw.choice(list(asked))
            body = {"instruction": text, "temperature": 0, "max_tokens": asked[text]}
            reply = server.post("/v1/completions", body | {"stream": stream})
            said = reply.read().decode()
            if reply.status == 200 and stream:
                events = [json.loads(e[6:]) for e in said.split("\n\n")[:-2]]
                got = "".join(e["choices"][0]["text"] for e in events)
                assert said.endswith("data: [DONE]\n\n"), said
            elif reply.status == 200:
                got = json.loads(said)["choices"][0]["text"]
            else:
                assert json.loads(said)["error"]["message"] and reply.headers["Retry-After"]
                return reply.status
            assert got == expected[text], (text, got)
            return 200

        def one(draw: random.Random) -> int:
            kind = draw.choice(["ask", "ask", "stream", "leave", "garbage", "large", "slow", "bad"])
            if kind in ("ask", "stream"):
                return ask(draw, kind == "stream")
            if kind == "leave":
                leave(
                    server,
                    {"instruction": "go on", "stream": draw.random() < 0.5, "max_tokens": 90},
                )
                return -1
            if kind == "bad":
                odd = draw.choice([b"{", b"[]", b'{"prompt": 3}', b'{"model": "x"}', b"\xff"])
                return server.post("/v1/completions", odd).status
            with socket.create_connection(("127.0.0.1", server.port), timeout=30) as one:
                if kind == "garbage":
                    one.sendall(draw.randbytes(draw.randint(1, 3000)) + b"\r\n\r\n")
                elif kind == "large":
                    one.sendall(request(b"a" * 300_000)[:200_000])
                else:
                    for byte in request(b'{"prompt": "a"}')[: draw.randint(1, 80)]:
                        one.sendall(bytes([byte]))
                        time.sleep(0.01)
                    return -1
                return int((one.makefile("rb").readline().split(b" ") + [b"0"] * 2)[1])

        def client(number: int, end: float) -> None:
            draw = random.Random(number)
            while time.monotonic() < end:
                try:
                    status = one(draw)
                except ConnectionError:
                    status = -2  # reset after it was refused: allowed for what was malformed
                except Exception:
                    wrong.append(traceback.format_exc())
                    return
                with lock:
                    counts[status] = counts.get(status, 0) + 1

        def clients(seconds: float) -> None:
            end = time.monotonic() + seconds
            threads = [threading.Thread(target=client, args=(i, end)) for i in range(64)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            server.wait(lambda: server.demo.decoder.load == 0, 15)

        clients(max(1, seconds / 3))  # what is allocated once
        server.wait(lambda: not server.http.connections, 40)
        before = held()
        clients(seconds)
        server.wait(lambda: not server.http.connections, 40)
        assert not wrong, wrong[0]
        assert counts[200] > 5 * seconds and counts.keys() <= {-2, -1, 0, 200, 400, 404, 413, 503}
        memory, objects = (b - a for a, b in zip(before, held(), strict=True))
        assert memory < 40_000 and objects < 1000, (memory, objects)
        assert not server.demo.engine.busy and len(asyncio.all_tasks(server.loop)) == 1
        for text in asked:
            how = {"temperature": 0, "max_tokens": asked[text]}
            assert server.answer(text, **how)["choices"][0]["text"] == expected[text]


# ---------------------------------------------------------------- reports


def test_reports_are_appended(tmp_path):
    file = tmp_path / "new/reports.jsonl"
    with running(Scripted(lambda prompt: "fine"), "--reports", file) as server:
        first = {"instruction": "a", "input": "", "output": "<b>", "why": "rude", "top_p": 0.9}
        assert server.post("/api/flag", first).status == 201
        assert server.post("/api/flag", {"output": "x\n中"}).status == 201
        for bad in ({}, {"output": 3}, {"output": "\ud800"}, {"output": "a", "top_p": "b"}):
            assert server.post("/api/flag", bad).status == 400
        assert server.post("/api/flag", {"output": "a" * 150_000}).status == 413
    assert file.stat().st_mode & 0o777 == 0o600
    reports = list(read_jsonl(file))
    assert [report["output"] for report in reports] == ["<b>", "x\n中"]
    assert first.items() <= reports[0].items() and reports[0]["model"] == "tiny"


def test_reports_do_not_fill_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "MOST_REPORTS", 100)
    with running(Scripted(lambda prompt: ""), "--reports", tmp_path / "r.jsonl") as server:
        statuses = [server.post("/api/flag", {"output": "a" * 60}).status for _ in range(2)]
        assert statuses == [201, 503]


# ---------------------------------------------------------------- page


def test_the_page_brings_all_it_needs_and_its_policy_lets_only_that_run(tiny):
    reply = tiny.get("/")
    html = reply.read().decode()
    assert not re.findall(r"""(?:src|href)=(?!["']?data:)""", html)
    assert not re.findall(r"innerHTML|insertAdjacentHTML|document\.write|eval\(|\son\w+=", html)
    parts = reply.headers["Content-Security-Policy"].split("; ")
    policy = dict(part.split(" ", 1) for part in parts)
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    for tag in ("script", "style"):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    textareas = re.findall(r"<textarea[^>]*>(.*?)</textarea>", html, re.DOTALL)
    assert len(textareas) == 4 and not any(textareas)  # empty by default


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EVIL = "<script>document.title='evil'</script><img src=x onerror=\"document.title='evil'\"> &<b>"


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no Chromium is installed (apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        one = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield one
        one.close()


@contextmanager
def opened(browser, server, **how):
    """The page, and whatever it complained about."""
    context = browser.new_context(**how)
    page, said = context.new_page(), []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda message: said.append(message.text))
    page.on("request", lambda asked: said.append(asked.url) if server.url not in asked.url else 0)
    page.goto(server.url)
    page.locator("#examples button").first.wait_for()
    yield page
    context.close()
    assert [line for line in said if not line.startswith("data:")] == []


def in_page(page, pattern: str, place: str = "#status") -> None:
    from playwright.sync_api import expect

    expect(page.locator(place)).to_have_text(re.compile(pattern))


def test_page_type_watch_stop_flag_copy_and_check(browser, tmp_path):
    engine, file = Scripted(lambda prompt: "word " * 400, pace=0.01), tmp_path / "reports.jsonl"
    flags = ("--reports", file, "--notice", "For research only.")
    with running(engine, *flags) as server, opened(browser, server) as page:
        assert page.input_value("#instruction") == "" and page.title() == "Ask tiny"
        assert page.inner_text("#notice") == "For research only."
        footer = "Nothing is filtered. Every answer bears a watermark."
        assert page.inner_text("footer p:last-child") == footer
        page.locator("#examples button").first.click()
        assert page.input_value("#instruction")
        page.fill("#instruction", "Say words.")
        page.fill("#input", "many")
        page.keyboard.press("Control+Enter")
        lengths = []
        for _ in range(3):
            page.wait_for_timeout(150)
            lengths.append(len(page.inner_text("#answer")))
        assert 0 < lengths[0] < lengths[1] < lengths[2]
        assert page.get_attribute("#answer", "aria-busy") == "true"
        page.click("#stop")
        in_page(page, "Stopped")
        server.wait(lambda: server.demo.decoder.load == 0, 1)
        shown = page.text_content("#answer")
        assert 0 < len(shown) < 1500 and page.get_attribute("#answer", "aria-busy") == "false"
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.click("#copy")
        in_page(page, "Copied")
        page.click("#flag")
        page.fill("#why", "dull")
        page.get_by_role("button", name="Send").click()
        in_page(page, "Reported")
        page.click("#check-answer")
        page.locator("#found").wait_for()
        assert page.text_content("#tokens") == shown
        assert page.get_attribute("#tab-check", "aria-selected") == "true"
        assert page.locator("#tokens .is-plain").count() > 0
    (report,) = read_jsonl(file)
    assert (report["instruction"], report["input"], report["why"]) == ("Say words.", "many", "dull")
    assert report["output"] == shown and report["temperature"] == 0.7


def test_page_detects_a_watermark(browser, tiny):
    with opened(browser, tiny) as page:
        page.keyboard.press("Tab")
        page.keyboard.press("ArrowRight")  # by keyboard alone
        page.keyboard.press("Tab")
        page.keyboard.insert_text(many_words(tiny))
        page.keyboard.press("Control+Enter")
        page.locator("#found").wait_for()
        assert page.inner_text("#verdict").startswith("Watermarked")
        assert page.locator("#tokens .is-green").count() > 60
        said = page.locator("#tokens [role=img][aria-label$=', green']")  # to who does not see it
        assert said.count() == page.locator("#tokens .is-green").count()


def test_page_by_keyboard(browser, tmp_path):
    """Nothing is lost on the way: neither the focus, nor a report, nor an answer."""
    focus = "document.activeElement.id"
    engine, file = Scripted(lambda prompt: "word " * 400, pace=0.01), tmp_path / "reports.jsonl"
    with running(engine, "--reports", file) as server, opened(browser, server) as page:
        page.fill("#instruction", "Say words.")
        page.focus("#send")
        page.keyboard.press("Enter")
        page.wait_for_timeout(100)
        assert page.evaluate(focus) == "stop"
        page.click("#tab-check")
        page.keyboard.press("Escape")  # is not for the other tab
        page.keyboard.press("Home")
        assert page.evaluate(focus) == "tab-ask"
        page.keyboard.press("End")
        assert page.evaluate(focus) == "tab-check"
        page.keyboard.press("Home")
        assert page.get_attribute("#answer", "aria-busy") == "true"
        page.focus("#stop")
        page.keyboard.press("Escape")
        in_page(page, "Stopped")
        assert page.evaluate(focus) == "send"
        page.click("#flag")
        page.fill("#why", "dull")
        page.keyboard.press("Control+Enter")
        in_page(page, "Reported")
    (report,) = read_jsonl(file)
    assert report["why"] == "dull"


def test_page_tells_whom_the_filter_stopped_where_help_is(browser):
    engine = Scripted(lambda prompt: "I want to die")
    with running(engine, filter=Rules()) as server, opened(browser, server) as page:
        page.fill("#instruction", "Say it.")
        page.click("#send")
        in_page(page, "findahelpline.com")
        assert "die" not in page.text_content("#answer")
        assert page.get_attribute("#answer", "aria-live") == "polite"


def test_page_shows_html_as_text(browser):
    with running(Scripted(lambda prompt: EVIL)) as server, opened(browser, server) as page:
        page.fill("#instruction", EVIL)
        page.click("#send")
        in_page(page, "Done")
        assert page.text_content("#answer") == EVIL
        assert page.locator("#answer *").count() == 0
        page.click("#check-answer")
        page.locator("#found").wait_for()
        assert page.text_content("#tokens") == EVIL
        assert page.locator("#tokens :not(span)").count() == 0 and page.title() == "Ask tiny"


def test_page_fits_a_phone_and_both_colour_schemes(browser, tiny):
    paper = set()
    for scheme in ("light", "dark"):
        how = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme}
        with opened(browser, tiny, **how) as page:
            page.click("summary")
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width == 360
            paper.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            for control in page.locator("button:visible, textarea:visible").all():
                assert control.bounding_box()["height"] >= 35
    assert len(paper) == 2


def test_page_tells_what_went_wrong(browser):
    page = browser.new_page()  # whose console tells of it too

    def ask() -> None:
        page.goto(server.url)
        page.fill("#instruction", "a")
        page.click("#send")

    for good in (0, 1):  # at the prompt, at the answer
        with running(Scripted(lambda prompt: SECRET), filter=Broken(good)) as server:
            ask()
            in_page(page, "filter cannot be reached")
            assert page.text_content("#answer") == ""
    with running(Scripted(lambda prompt: "word " * 400, pace=0.01)) as server:
        ask()
        in_page(page, "word word", "#answer")
        for task in list(server.http.connections):
            server.loop.call_soon_threadsafe(task.cancel)
        in_page(page, "connection was lost")
    page.click("#send")
    in_page(page, "server cannot be reached")
    page.close()


# ---------------------------------------------------------------- command


@contextmanager
def command_line(*flags, **environment):
    command = [sys.executable, "-m", "alpaca", "serve", "--model-dir", TINY, "--port", "0", *flags]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "OPENAI_API_KEY": "", **environment}
    process = subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, env=variables, cwd=ROOT
    )
    try:
        said = process.stderr.readline()
        url = re.search(r"http://\S+", said)
        assert url, said + process.stderr.read()
        yield process, int(url[0].rpartition(":")[2])
    finally:
        process.kill()
        process.wait()


def listening_at(process: subprocess.Popen, port: int) -> list[str]:
    """Addresses, as the kernel writes them."""
    lines = []
    for name in ("tcp", "tcp6"):
        with open(f"/proc/{process.pid}/net/{name}") as table:
            lines += [line.split() for line in table]
    return [line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{port:04X}")]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_lets_answers_end_and_then_it_exits(number):
    with command_line() as (process, port):
        assert listening_at(process, port) == [f"0100007F:{port:04X}"]  # this machine alone
        body = {"instruction": "go on", "stream": True, "temperature": 2.0, "seed": 1}
        body |= {"n": 8, "max_tokens": 200}
        with socket.create_connection(("127.0.0.1", port), timeout=30) as one:
            one.sendall(request(json.dumps(body).encode()))
            said = one.recv(4000)
            idle = socket.create_connection(("127.0.0.1", port))
            process.send_signal(number)
            while more := one.recv(65536):
                said += more
        assert b"data: [DONE]" in said
        assert process.wait(10) == 0
        assert idle.recv(10) == b""
        idle.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        assert "Traceback" not in process.stderr.read()


def test_without_a_model_it_says_how_to_make_one(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(command(app, "--port", 0), "make train")


def test_mistakes_are_one_line(command, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_refused(command(app, "--model-dir", TINY, "--port", port), "in use", str(port))
    here = ("--model-dir", TINY, "--port", 0)
    assert_refused(command(app, *here, "--host", "256.1.1.1"), "256.1.1.1")
    assert_refused(command(app, "--port", 0, "--model-dir", tmp_path / "none"), "none")
    assert_refused(command(app, *here, "--filter", "service", "--moderation-url", "x"), "server")
    assert_refused(command(app, *here, "--rules", tmp_path / "none"), "none")
    assert_refused(command(app, *here, "--max-length", 4000), "4000")
    assert_refused(command(app, *here, "--watermark-key", 0), "key")
    (tmp_path / "file").write_text("")
    assert_refused(command(app, *here, "--reports", tmp_path / "file/r.jsonl"), "file")
    assert_refused(command(app, "--rate", -1), "--rate")
