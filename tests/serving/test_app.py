"""The endpoints as clients meet them: OpenAI's API, the filter, limits, reports, the page."""

import asyncio
import base64
import hashlib
import json
import os
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers import teacher_server
from helpers.commands import ROOT, assert_refused
from helpers.demo_server import (
    ENDLESS,
    TINY,
    ModerationService,
    ScriptedEngine,
    arguments,
    raw_request,
    running,
    tiny_engine,
    wait_until,
)

import selfinstruct
from alpaca.__main__ import load_verb
from alpaca.common.json_files import read_log
from alpaca.inference import watermark
from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams
from alpaca.serving import app, scheduler, serve
from alpaca.serving.moderation import Filter, FilterUnavailable, RuleFilter, make_filter
from alpaca.weights.loading import load_model
from templates import format_prompt
from tokenizer import load_tokenizer

openai = pytest.importorskip("openai", reason="the package openai is not installed")

FRUIT = "Name a fruit."
LONG = ("--max-new-tokens", 3000)
PATHS = ("/v1/completions", "/v1/chat/completions")


@pytest.fixture(scope="module")
def tiny():
    with running(tiny_engine()) as server:
        yield server


@pytest.fixture(scope="module")
def alone():
    """Greedy answers of the same model with the same watermark, one at a time."""
    engine = tiny_engine(1)

    def answer(text: str, tokens: int) -> str:
        ids = engine.tokenizer.encode(text, bos=True)
        return engine.generate([ids], SamplingParams(max_new_tokens=tokens))[0].text

    return answer


# ---------------------------------------------------------------- the openai package as client


@pytest.fixture(scope="module")
def client(tiny):
    with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0) as one:
        yield one


def test_openai_client_chats(client, alone):
    messages = [{"role": "user", "content": FRUIT}]
    fields = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 20}
    expected = alone(format_prompt(FRUIT), 20)
    full = client.chat.completions.create(**fields)
    assert full.choices[0].message.content == expected and expected
    assert full.choices[0].finish_reason == "length" and full.usage.completion_tokens == 20
    chunks = list(client.chat.completions.create(**fields, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len({chunk.id for chunk in chunks}) == 1


def test_openai_client_completes(client, alone):
    fields = {"model": "tiny", "prompt": "The capital of", "temperature": 0, "max_tokens": 20}
    expected = alone("The capital of", 20)
    full = client.completions.create(**fields)
    assert full.choices[0].text == expected and full.usage.prompt_tokens > 3
    options = {"include_usage": True}
    chunks = list(client.completions.create(**fields, stream=True, stream_options=options))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == expected
    assert chunks[-1].usage.completion_tokens == 20 and chunks[-1].choices == []


def test_openai_client_sets_n_seed_and_stop(client):
    fields = {"model": "tiny", "prompt": "a list of words:", "max_tokens": 12, "temperature": 1.2}
    first, again = (client.completions.create(**fields, n=3, seed=5) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices] and len(set(texts)) == 3
    assert client.completions.create(**fields, seed=6).choices[0].text == texts[1]
    streamed = [""] * 3
    for chunk in client.completions.create(**fields, n=3, seed=5, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts
    stop = next(c for c in texts[0][3:] if c.isalpha())
    stopped = client.completions.create(**fields, seed=5, stop=[stop]).choices[0]
    assert stopped.text == texts[0][: texts[0].index(stop)] and stopped.finish_reason == "stop"


def test_openai_client_gets_logprobs(client):
    messages, fields = [{"role": "user", "content": FRUIT}], {"model": "tiny", "temperature": 0}
    fields |= {"max_tokens": 6}
    chat = client.chat.completions.create(
        **fields, messages=messages, logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == 6 and all(len(token.top_logprobs) == 3 for token in content)
    assert all(token.logprob <= token.top_logprobs[0].logprob <= 0 for token in content)
    characters = [token for token in content if not token.token.startswith("<0x")]
    assert characters and all(bytes(t.bytes).decode() == t.token for t in characters)
    plain = client.completions.create(**fields, prompt="a", logprobs=2).choices[0].logprobs
    assert len(plain.tokens) == len(plain.token_logprobs) == 6


def test_openai_client_sends_defaults_and_gets_refusals(client):
    chat, messages = client.chat.completions.create, [{"role": "user", "content": FRUIT}]
    fields = {"model": "tiny", "max_tokens": 2, "frequency_penalty": 0, "presence_penalty": 0}
    fields |= {"n": 1, "logit_bias": {}, "stop": None, "user": "me"}
    both = {"response_format": {"type": "text"}, "store": False, "parallel_tool_calls": True}
    both |= {"tools": [], "logprobs": False, "stream_options": None, "verbosity": "medium"}
    assert chat(messages=messages, **fields, **both).usage.completion_tokens == 2
    done = client.completions.create(prompt="a", best_of=1, echo=False, suffix=None, **fields)
    assert done.usage.completion_tokens == 2
    for changed in ({"response_format": {"type": "json_object"}}, {"store": True}):
        with pytest.raises(openai.BadRequestError, match="nothing else is supported") as refused:
            chat(messages=messages, **fields, **both | changed)
        assert refused.value.param in changed and refused.value.code == "unsupported_parameter"


def test_openai_client_lists_models_and_gets_errors(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    messages = [{"role": "user", "content": FRUIT}]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError, match="'tiny'"):
        client.chat.completions.create(model="gpt-4", messages=messages)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="tiny", messages=messages, temperature=3)
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="tiny", prompt="word " * 2000)
    assert refused.value.code == "context_length_exceeded" and refused.value.param == "prompt"


# ---------------------------------------------------------------- answers


def test_the_server_is_a_teacher_for_selfinstruct(command, tmp_path):
    engine = ScriptedEngine(teacher_server.answer, batch_size=8)
    with running(engine, *LONG) as server:
        code, _, err = command(
            selfinstruct, "generate", "--out", tmp_path / "run", "--num", 6, "--concurrency", 4,
            "--teacher", "tiny", "--base-url", f"{server.url}/v1", "--retry-wait", 0.05,
        )  # fmt: skip
    assert code == 0, err
    log = list(read_log(tmp_path / "run/responses.jsonl"))
    assert log and all(entry["usage"]["completion"] > 50 for entry in log)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slots_at_the_next_token(stream):
    engine = ScriptedEngine(ENDLESS, batch_size=1, pace=0.01)
    with running(engine, *LONG) as server:
        with server.connect() as one:
            one.sendall(raw_request(json.dumps({"prompt": "a", "stream": stream}).encode()))
            wait_until(lambda: engine.steps > 5)
        server.wait_until_idle(0.5)
        server.wait_until_left(0.5)


def test_answers_stream_while_they_are_decoded():
    with running(ScriptedEngine("word " * 20, pace=0.02)) as server:
        response = server.post("/v1/completions", {"instruction": "a", "stream": True})
        start, times = time.monotonic(), []
        while line := response.readline():
            times += [time.monotonic() - start] * line.startswith(b"data: {")
        assert times[-1] - times[0] > 0.2 and len(times) > 5


def test_an_answer_that_takes_too_long_is_an_error():
    engine = ScriptedEngine(ENDLESS, batch_size=1, pace=0.01)
    with running(engine, *LONG, "--timeout", 0.3) as server:
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(server.post, PATHS[0], {"prompt": "a"}) for _ in "ab"]
            statuses = sorted(future.result().status for future in futures)
        assert statuses == [503, 504]  # one of them did not begin
        events = server.post("/v1/completions", {"prompt": "a", "stream": True}).read()
        assert b'"type": "timeout"' in events and b"[DONE]" not in events
        server.wait_until_idle()


def test_a_failing_model_is_an_error_of_the_server(monkeypatch, capsys):
    with running(tiny_engine()) as server:
        monkeypatch.setattr(server.app.engine, "decode", lambda: 1 / 0)
        response = server.post("/v1/completions", {"prompt": "a"})
        assert response.status == 500 and b"the model failed" in response.read()
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_at_the_end_running_answers_have_only_so_long():
    start = time.monotonic()
    with running(ScriptedEngine(ENDLESS, pace=0.01), *LONG, "--drain", 0.3) as server:
        response = server.post("/v1/completions", {"prompt": "a", "stream": True})
        assert response.readline()
    assert 0.3 < time.monotonic() - start < 3


def many_words(server) -> str:
    """A text of some length, of which the tiny base model says little at a time."""
    fields = {"instruction": "Write words.", "temperature": 1.3, "max_tokens": 60, "n": 8}
    answers = [server.answer(**fields, seed=seed) for seed in (3, 23)]
    return "\n".join(choice["text"] for answer in answers for choice in answer["choices"])


def test_every_answer_is_watermarked_by_default(tiny):
    found = []
    with running(tiny_engine(mark=False), "--no-watermark") as plain:
        for server in (tiny, plain):
            response = server.post("/api/detect", {"text": many_words(server)})
            found.append(json.loads(response.read()))
            about = json.loads(server.get("/api/about").read())
            assert about["watermark"] is (server is tiny) and not about["turns"]
            assert about["weights"] == "1 million parameters of 16 bits" and not about["examples"]
    assert found[0]["z"] > 5 and found[0]["verdict"].startswith("watermarked")
    assert found[1]["z"] < 3.5 and not found[1]["verdict"].startswith("watermarked")


def test_detection_marks_the_tokens_that_it_scores(tiny):
    text = "The list of 中文 words, and the list 🎉"
    response = json.loads(tiny.post("/api/detect", {"text": text}).read())
    assert "".join(piece for piece, _ in response["tokens"]) == text
    green = [is_green for _, is_green in response["tokens"]]
    ids = tiny.app.tokenizer.encode(text)
    assert green == [None, *tiny.app.watermark.green_mask(ids)]
    assert tiny.post("/api/detect", {"text": "a" * 20_001}).status == 413
    for wrong in ("", "\ud800", 3):
        assert tiny.post("/api/detect", {"text": wrong}).status == 400


def test_no_more_green_lists_are_made_ahead_than_are_cached(monkeypatch):
    monkeypatch.setattr(watermark, "CACHE_BYTES", 3 * 128)
    serve.fill_green_lists(mark := watermark.Watermark(1024), threading.Event())
    assert mark.green_list.cache_info().misses == 3


# ---------------------------------------------------------------- filter

SECRET = "swordfish " * 30


class FailingFilter(Filter):
    """Passes `good` checks, then is down or flags everything."""

    min_part = 20

    def __init__(self, good: int, then: str = "down"):
        self.good, self.then = good, then

    async def check(self, text: str) -> str:
        self.good -= 1
        if self.good < 0 and self.then == "down":
            raise FilterUnavailable
        return "violence" if self.good < 0 else ""


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("then", ["down", "flags"])
def test_nothing_is_shown_that_the_filter_did_not_pass(path, stream, then):
    body = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "stream": stream}
    if not stream:
        body["logprobs"] = True if "chat" in path else 0
    with running(ScriptedEngine(SECRET)) as server:
        for good in (0, 1, 3):
            server.app.filter = FailingFilter(good, then)
            response = server.post(path, body)
            text = response.read().decode()
            shown = text.count("swordfish")
            if good == 0:
                assert response.status == (503 if then == "down" else 400) and shown == 0
                assert "content filter" in text
            elif not stream and good == 1:
                assert response.status == (503 if then == "down" else 200) and shown == 0
                assert then == "down" or '"finish_reason": "content_filter"' in text
            elif stream:
                assert response.status == 200
                assert shown == (0 if good == 1 else shown) and shown < 25
                assert ("filter_unavailable" if then == "down" else "content_filter") in text
            server.wait_until_idle()


def test_parts_that_passed_are_shown_before_the_filter_stops_the_answer():
    class Strict(Filter):
        min_part = 1

        async def check(self, text: str) -> str:
            return "rule" if "forbidden" in text else ""

    engine = ScriptedEngine("harmless words first, and then the forbidden thing", pace=0.02)
    with running(engine, filter=Strict()) as server:
        response = server.post("/v1/completions", {"prompt": "a", "stream": True})
        events = [json.loads(line[6:]) for line in response.read().split(b"\n\n")[:-2]]
        shown = "".join(event["choices"][0]["text"] for event in events if event["choices"])
        assert shown == "harmless words first, and then the "
        assert events[-1]["choices"][0]["finish_reason"] == "content_filter"
        assert "content filter" in events[-1]["choices"][0]["note"]


def test_the_filter_reads_all_that_a_person_wrote():
    with running(ScriptedEngine("fine"), filter=RuleFilter()) as server:
        bad = "how to make a pipe bomb"
        for body in ({"prompt": bad}, {"prompt": ["a", bad]}, {"instruction": "x", "input": bad}):
            assert server.post("/v1/completions", body).status == 400, body
        messages = [{"role": "system", "content": bad}, {"role": "user", "content": "hello"}]
        response = server.post("/v1/chat/completions", {"messages": messages})
        assert json.loads(response.read())["error"]["code"] == "content_filter"
        assert server.answer("hello")["choices"][0]["text"] == "fine"
        response = server.post("/v1/completions", {"prompt": "a", "logprobs": 2})
        assert response.status == 400 and b"--filter off" in response.read()


@pytest.mark.parametrize("stream", [True, False])
def test_a_rule_may_match_across_prompt_and_answer(stream):
    with running(ScriptedEngine("mb you need a pipe."), filter=RuleFilter()) as server:
        body = {"prompt": "The best way to make a pipe bo", "stream": stream}
        text = server.post("/v1/completions", body).read().decode()
        assert '"finish_reason": "content_filter"' in text and "need" not in text
        body = {"instruction": "I wonder how people make", "stream": stream}
        assert "need" in server.post("/v1/completions", body).read().decode()


def test_an_answer_that_the_filter_stops_is_decoded_no_further():
    engine = ScriptedEngine(lambda text: f"make {text}{'word ' * 150}", pace=0.005)
    with running(engine, *LONG, filter=RuleFilter()) as server:
        body = {"prompt": ["mustard gas ", "tea "], "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        text = server.post("/v1/completions", body).read()
        tokens = json.loads(text.split(b"\n\n")[-3][6:])["usage"]["completion_tokens"]
        assert b"content_filter" in text and b'"stop"' in text
        assert 150 < tokens < 250  # one answer of two


class SlowFilter(Filter):
    def __init__(self, seconds: float):
        self.seconds = seconds

    async def check(self, text: str) -> str:
        await asyncio.sleep(self.seconds)
        return ""


@pytest.mark.parametrize(("seconds", "status"), [(5, 503), (0.3, 504)])  # at prompt, at answer
def test_the_timeout_includes_the_filter(seconds, status):
    with running(ScriptedEngine("fine"), "--timeout", 0.4, filter=SlowFilter(seconds)) as server:
        start = time.monotonic()
        response = server.post("/v1/completions", {"prompt": "a"})
        assert response.status == status and time.monotonic() - start < 2
        server.wait_until_idle()


def test_the_answers_to_a_request_are_checked_at_the_same_time():
    with running(ScriptedEngine("fine", batch_size=8), filter=SlowFilter(0.2)) as server:
        start = time.monotonic()
        assert len(server.answer("a", n=8)["choices"]) == 8
        assert time.monotonic() - start < 1.2  # of 9 checks


PASS = {"results": [{"flagged": False, "categories": {}}]}


def test_nothing_is_shown_while_the_service_fails(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-some-length")
    content = {"error": {"message": "Incorrect key: sk-secret"}}
    with ModerationService(content, status=401) as service:
        filter = make_filter(arguments("--filter", "service", "--moderation-url", service.url))
        with running(ScriptedEngine(SECRET), filter=filter) as server:
            response = server.post("/v1/completions", {"prompt": "a", "stream": True})
            text = response.read().decode()
            assert response.status == 503 and "content filter cannot be reached" in text
            assert response.headers["Retry-After"] and "swordfish" not in text
            assert "sk-" not in text and service.url not in text


def test_the_service_checks_prompt_and_answer(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-some-length")
    with ModerationService(PASS) as service:
        filter = make_filter(arguments("--moderation-url", service.url))
        with running(ScriptedEngine(SECRET, pace=0.003), filter=filter) as server:
            body = {"instruction": "hello", "input": "there", "stream": True}
            text = server.post("/v1/completions", body).read().decode()
            assert text.count("swordfish") == 30
        checked = [body["input"] for _, body, _ in service.requests]
        assert checked[0] == "hello\nthere" and len(checked) > 2
        for number, text in enumerate(checked[1:], 1):  # after the prompt, and what was shown
            assert re.search(r"hello\s.*there\s.*?(swordfish ?)+$", text, re.DOTALL), text
            assert text.count("swordfish") > 8 * number


# ---------------------------------------------------------------- limits


def test_beyond_the_queue_the_response_is_503_at_once():
    engine = ScriptedEngine(ENDLESS, batch_size=1, pace=0.01)
    with running(engine, "--queue", 2, *LONG) as server:
        held = [server.connect() for _ in range(3)]
        for one in held:
            one.sendall(raw_request(b'{"prompt": "a"}'))
        wait_until(lambda: server.app.worker.load == 3)
        start = time.monotonic()
        response = server.post("/v1/completions", {"prompt": "a"})
        assert time.monotonic() - start < 0.5
        assert response.status == 503 and 1 <= int(response.headers["Retry-After"]) <= 60
        assert json.loads(response.read())["error"]["type"] == "overloaded"
        health = json.loads(server.get("/health").read())
        assert health == {"status": "ok", "answers": 3, "at_once": 1}
        for one in held:
            one.close()
        server.wait_until_idle()


def test_each_client_has_its_own_rate():
    flags = ("--rate", 6, "--trusted-proxy", "127.0.0.1")
    with running(ScriptedEngine("fine"), *flags) as server:

        def ask(client: str):
            return server.post("/v1/completions", {"prompt": "a"}, X_Forwarded_For=client)

        assert [ask("1.2.3.4").status for _ in range(3)] == [200, 200, 429]
        assert ask("9.9.9.9, 5.6.7.8").status == 200  # what the client itself sent comes first
        assert ask("5.6.7.8").status == 200 and ask("8.8.8.8, 5.6.7.8").status == 429
        refused = ask("1.2.3.4")
        assert 8 <= int(refused.headers["Retry-After"]) <= 10
        assert json.loads(refused.read())["error"]["type"] == "rate_limit_error"
        assert server.get("/health", X_Forwarded_For="1.2.3.4").status == 200
    with running(ScriptedEngine("fine"), "--rate", 6) as server:  # anybody may invent a header
        assert [ask(f"1.2.3.{i}").status for i in range(3)] == [200, 200, 429]


def test_a_rate_recovers_and_the_memory_of_clients_is_bounded(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(scheduler.time, "monotonic", lambda: now[0])
    rates = scheduler.RateLimiter(60)
    assert [rates.wait("a") for _ in range(21)] == [0.0] * 20 + [1.0]
    now[0] = 1.0
    assert rates.wait("a") == 0.0 and rates.wait("a") == 1.0
    for number in range(scheduler.MAX_CLIENTS + 5):
        rates.wait(str(number))
    assert len(rates.clients) == scheduler.MAX_CLIENTS
    assert "a" not in rates.clients and str(scheduler.MAX_CLIENTS + 4) in rates.clients
    now[0] = 1000.0
    assert [rates.wait("b", cost) for cost in (8, 12, 3)] == [0.0, 0.0, 3.0]
    assert rates.wait("c", 50) == 0.0 and rates.wait("c") == 1.0  # as much as there can be


def test_a_request_is_charged_for_its_answers_and_gets_a_share_of_the_queue():
    with running(ScriptedEngine("fine"), "--rate", 24) as server:
        statuses = [server.post("/v1/completions", {"prompt": "a", "n": 8}).status for _ in "ab"]
        assert statuses == [200, 429]
    engine = ScriptedEngine(ENDLESS, batch_size=1, pace=0.01)
    with running(engine, "--rate", 600, *LONG) as server:
        with server.connect() as one:
            one.sendall(raw_request(b'{"prompt": "a", "n": 8}'))
            wait_until(lambda: server.app.worker.load == 8)
            response = server.post("/v1/completions", {"prompt": "a", "n": 8})  # 12 of 49 at most
            assert response.status == 429 and b"one client" in response.read()
        server.wait_until_idle()


def test_health_fails_when_nothing_is_decoded_any_more():
    with running(ScriptedEngine("fine")) as server:
        assert server.get("/health").status == 200
        server.app.worker.inbox.put(None)
        wait_until(lambda: not server.app.worker.thread.is_alive())
        assert server.get("/health").status == 503
        assert server.post("/v1/completions", {"prompt": "a"}).status == 500  # at once


# ---------------------------------------------------------------- reports and page


def test_reports_are_appended_to_a_private_file(tmp_path):
    file = tmp_path / "new/reports.jsonl"
    with running(ScriptedEngine("fine"), "--reports", file) as server:
        first = {"earlier": "[]", "instruction": "a", "input": "", "output": "<b>", "why": "rude"}
        first["top_p"] = 0.9
        assert server.post("/api/flag", first).status == 201
        assert server.post("/api/flag", {"output": "x\n中"}).status == 201
        for bad in ({}, {"output": 3}, {"output": "\ud800"}, {"output": "a", "top_p": "b"}):
            assert server.post("/api/flag", bad).status == 400
        assert server.post("/api/flag", {"output": "a" * 150_000}).status == 413
    assert file.stat().st_mode & 0o777 == 0o600
    reports = list(read_log(file))
    assert [report["output"] for report in reports] == ["<b>", "x\n中"]
    assert first.items() <= reports[0].items() and reports[0]["model"] == "tiny"


def test_a_full_file_of_reports_makes_room_for_later_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "MAX_REPORTS_SIZE", 1000)
    file, before = tmp_path / "reports.jsonl", tmp_path / "reports.1.jsonl"
    with running(ScriptedEngine("fine"), "--reports", file) as server:
        for number in range(30):
            assert server.post("/api/flag", {"output": "a" * 100, "why": str(number)}).status == 201
            if number == 12:  # as if a kill came between the two files
                os.replace(file, before)
    numbers = [int(report["why"]) for one in (before, file) for report in read_log(one)]
    assert numbers == list(range(numbers[0], 30)) and len(numbers) > 3
    assert {one.name for one in tmp_path.iterdir()} == {file.name, before.name}
    for one in (before, file):
        assert one.stat().st_mode & 0o777 == 0o600 and 200 < one.stat().st_size < 1400


def test_the_page_names_the_bits_of_the_weights():
    engine = Engine(load_model(TINY, bits=4), load_tokenizer(TINY), 1)  # but 8 in the head
    about = app.describe(arguments("--model-dir", TINY), engine, Filter())
    assert about["weights"] == "1 million parameters of 4 bits"


def test_the_page_shows_examples_that_training_found(tmp_path):
    records = [{"instruction": f"Do {i}", "input": "", "output": "a"} for i in range(3)]
    (tmp_path / "right_answers.json").write_text(json.dumps(records))
    for flags in (("--model-dir", tmp_path / "model"), ("--adapter", tmp_path / "adapter")):
        examples = app.page_examples(arguments("--model-dir", TINY, *flags))
        assert [example["instruction"] for example in examples] == ["Do 0", "Do 1", "Do 2"]
    assert app.page_examples(arguments("--model-dir", TINY)) == []


def test_the_page_is_self_contained_and_its_policy_allows_nothing_else(tiny):
    response = tiny.get("/")
    html = response.read().decode()
    assert not re.findall(r"""(?:src|href)=(?!["']?data:)""", html)
    assert not re.findall(r"innerHTML|insertAdjacentHTML|document\.write|eval\(|\son\w+=", html)
    parts = response.headers["Content-Security-Policy"].split("; ")
    policy = dict(part.split(" ", 1) for part in parts)
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    textareas = re.findall(r"<textarea[^>]*>(.*?)</textarea>", html, re.DOTALL)
    assert len(textareas) == 4 and not any(textareas)  # empty by default


# ---------------------------------------------------------------- command line


def test_the_watermark_key_comes_from_flag_or_environment(monkeypatch):
    flags = ("--model-dir", TINY, "--max-batch-size", 1)
    engine, watermark = serve.make_engine(arguments(*flags, "--watermark-key", 12345))
    assert engine.watermark is watermark and (watermark.key, watermark.vocab_size) == (12345, 1024)
    monkeypatch.setenv("ALPACA_WATERMARK_KEY", "777")
    assert arguments(*flags).watermark_key == 777
    assert arguments(*flags, "--watermark-key", 12345).watermark_key == 12345
    engine, watermark = serve.make_engine(arguments(*flags, "--no-watermark"))
    assert engine.watermark is None and watermark.key == 777


def test_help_names_no_folder_of_this_machine():
    _, parser = load_verb("serve")
    assert str(ROOT) not in parser.format_help()


def test_errors_are_one_line(command, tmp_path):
    def refused(*parts: str, flags=()):
        assert_refused(command("serve", *flags), *parts)

    tiny = ("--model-dir", TINY, "--port", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        refused("in use", port, flags=("--model-dir", TINY, "--port", port))
    refused("256.1.1.1", flags=(*tiny, "--host", "256.1.1.1"))
    refused("none", flags=("--port", 0, "--model-dir", tmp_path / "none"))
    refused("--moderation-url", flags=(*tiny, "--filter", "service", "--moderation-url", "x"))
    refused("none", flags=(*tiny, "--rules", tmp_path / "none"))
    refused("4000", flags=(*tiny, "--max-length", 4000))
    refused("key", flags=(*tiny, "--watermark-key", 0))
    (tmp_path / "file").write_text("")
    refused("file", flags=(*tiny, "--reports", tmp_path / "file/r.jsonl"))
    os.mkfifo(tmp_path / "pipe")
    for name in ("", "pipe"):
        refused("--reports", flags=(*tiny, "--reports", tmp_path / name))
    refused("--rate", flags=("--rate", -1))
