"""The client: what it retries and how often, what it counts, and that the key stays secret."""

import asyncio
import time

import pytest
from helpers.teacher_server import ODD, Server

from alpaca.common.json_files import append_jsonl, read_log
from alpaca.datagen import client
from alpaca.datagen.client import Client, RefusedError, RequestFailedError, RetryableError
from alpaca.datagen.endpoints import Endpoint, Usage


def ask(url: str, kind: str = "chat", model: str = "m", may_retry=None, **settings):
    """One question, with short waits."""
    settings = {"retry_wait": 0.01, "timeout": 0.8, "max_retries": 3} | settings
    endpoint = Endpoint(model, url, kind)

    async def once():
        async with Client(**settings) as client:
            return await client.ask(endpoint, endpoint.body("hello", {"max_tokens": 9}), may_retry)

    return asyncio.run(once())


class FaultsFirst(Server):
    """Faults in the order given, then none."""

    def __init__(self, *faults):
        super().__init__()
        self.order = list(faults)

    def fault(self) -> str:
        return self.order.pop(0) if self.order else ""


class Response:
    headers: dict = {}  # noqa: RUF012

    def __init__(self, status_code: int):
        self.status_code = status_code


@pytest.mark.parametrize(
    "kind, path", [("chat", "chat/completions"), ("completions", "completions")]
)
def test_ask_uses_both_apis(kind, path):
    with Server() as server:
        reply = ask(server.url, kind)
        assert reply.text == server.answer("hello")
        assert not reply.truncated and reply.attempts == 1
        assert reply.usage == Usage(*server.spent) and reply.request_id.startswith("answer-")
        assert server.seen["POST " + path] == 1
        content = {"prompt": "hello"}
        if kind == "chat":
            content = {"messages": [{"role": "user", "content": "hello"}]}
        assert server.bodies == [{"model": "m", **content, "max_tokens": 9}]


@pytest.mark.parametrize("fault", ["429", "500", "503", "reset", "stall", "half", *ODD])
def test_retryable_faults_are_retried_up_to_the_limit(fault):
    timeout = 0.5 if fault == "stall" else 5  # a busy machine answers within it
    with FaultsFirst(fault, fault) as server:
        assert ask(server.url, timeout=timeout).attempts == 3 and len(server.bodies) == 3
    with Server({fault: 1.0}) as server:
        start = time.monotonic()
        with pytest.raises(RequestFailedError, match="no answer in 4 attempts"):
            ask(server.url, timeout=timeout)
        assert len(server.bodies) == 4 and time.monotonic() - start < 4 * timeout + 1


def test_usage_includes_failed_attempts():
    with FaultsFirst("empty choices", "wrong types", "not JSON") as server:
        tokens_in, tokens_out = ask(server.url).usage[:2]
        assert (tokens_in, tokens_out) == (1 + server.spent[0], 1 + server.spent[1])


@pytest.mark.parametrize("fault", ["half", "stall", "huge", "not JSON", "wrong types"])
def test_usage_counts_a_lost_response_as_unmetered(fault):
    with FaultsFirst(fault) as server:
        assert ask(server.url, timeout=0.3).usage == Usage(*server.spent, unmetered=1)


def test_backoff_doubles_with_jitter_up_to_a_bound():
    client = Client(retry_wait=2)
    assert client.backoff(0) == 0
    for failures, longest in [(1, 2), (2, 4), (3, 8), (6, 60), (98, 60)]:
        waits = [client.backoff(failures) for _ in range(200)]
        assert longest / 2 <= min(waits) < 0.6 * longest and 0.9 * longest < max(waits) <= longest


def test_retry_after_delays_every_request_to_the_server():
    starts = []

    class Limited(FaultsFirst):
        def fault(self):
            starts.append(time.monotonic())
            return super().fault()

    async def many(url):
        async with Client(retry_wait=0.01) as client:
            endpoint = Endpoint("m", url)
            first = asyncio.create_task(client.ask(endpoint, endpoint.body("first", {})))
            await asyncio.sleep(0.2)
            others = (client.ask(endpoint, endpoint.body(f"{n}", {})) for n in range(5))
            await asyncio.gather(first, *others)

    with Limited("429") as server:
        server.retry_after = 0.7
        asyncio.run(many(server.url))
    assert len(starts) == 7 and min(starts[1:]) - starts[0] >= 0.69


def test_retry_after_is_in_seconds():
    values = {"3": 3, "0.5": 0.5, "": 0, "soon": 0, "-4": 0, "nan": 0}
    for value, seconds in (values | {"Fri, 31 Dec 1999 23:59:59 GMT": 0}).items():
        assert client.retry_after({"retry-after": value}) == seconds


def test_wrong_key_is_refused_at_once_and_not_printed(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-0")
    with Server(key="sk-other") as server:
        with pytest.raises(RefusedError, match=r"says 401: Incorrect API key.*\*\*\*") as error:
            ask(server.url)
        assert "sk-very-secret-0" not in str(error.value)
        assert server.seen["POST chat/completions"] == 1
        monkeypatch.delenv("OPENAI_API_KEY")
        with pytest.raises(RefusedError, match="OPENAI_API_KEY is not set"):
            ask(server.url)
        monkeypatch.setenv("OPENAI_API_KEY", " sk-other\n")
        assert ask(server.url).text


def test_unknown_model_is_refused_at_once():
    with Server() as server:
        with pytest.raises(RefusedError, match="says 404: The model `nobody` does not exist"):
            ask(server.url, model="nobody")
        assert len(server.bodies) == 1


def test_status_error_tells_refusals_from_failures():
    client, endpoint = Client(), Endpoint("m", "http://localhost:1/v1")
    quota = '{"error": {"message": "You exceeded it", "code": "insufficient_quota"}}'
    for status, body, kind in [
        (429, "slow down", RetryableError),
        (429, quota, RefusedError),
        (400, '{"error": "too long"}', RefusedError),
        (302, "", RefusedError),
    ]:
        assert type(client.status_error(endpoint, "x", Response(status), body)) is kind
    client.answered.add(endpoint)  # it takes other requests: the fault lies in this one
    error = client.status_error(endpoint, "x", Response(400), '{"error": "too long"}')
    assert type(error) is RequestFailedError and str(error).endswith("says 400: too long")


@pytest.mark.parametrize("max_retries, attempts", [(None, 3), (0, 1), (5, 6)])
def test_unreachable_server_is_refused_after_few_attempts(max_retries, attempts):
    words = rf"127\.0\.0\.1:9/v1: no answer in {attempts} attempts"
    with pytest.raises(RefusedError, match=words):
        ask("http://127.0.0.1:9/v1", max_retries=max_retries)


def test_may_retry_is_asked_before_another_attempt():
    with Server({"empty choices": 1.0}) as server:
        with pytest.raises(RequestFailedError) as error:
            ask(server.url, may_retry=lambda: False)
        assert len(server.bodies) == 1 and error.value.usage == Usage(1, 1)


def test_parse_reply_joins_parts_and_replaces_surrogates():
    part = '{"type": "text", "text": "%s"}'
    parts = f"[{part % 'one '}, {part % 'two'}]"
    body = '{"choices": [{"message": {"content": %s}, "finish_reason": "length"}]}'
    reply = client.parse_reply(body % parts)
    assert (reply.text, reply.truncated, reply.usage) == ("one two", True, Usage(unmetered=1))
    assert client.parse_reply(body % r'"half \ud83d of it"').text == "half ? of it"
    odd = r'{"id": "a\ud800", "choices": [{"text": "x"}]}'
    assert client.parse_reply(odd).request_id == "a?"
    refusal = '{"choices": [{"message": {"content": null, "refusal": "I will not"}}]}'
    assert client.parse_reply(refusal).text == "I will not"
    with pytest.raises(RetryableError, match="no choices.*: out of credits"):
        client.parse_reply('{"error": {"message": "out of credits"}}')
    assert client.error_message(r'{"error": {"message": "no \ud800"}}') == "no ?"
    assert client.error_message("<html>\n<b>Bad gateway</b>") == "Bad gateway"


def test_largest_response_fits_into_a_line_of_the_log(tmp_path):
    append_jsonl(tmp_path / "log.jsonl", entry := {"response": "\\" * client.MAX_RESPONSE})
    assert list(read_log(tmp_path / "log.jsonl")) == [entry]


def test_parse_usage_ignores_implausible_counts():
    assert client.parse_usage({"usage": {"prompt_tokens": 3, "total_tokens": 3}}) == Usage(3, 0)
    odd = [None, [], {"prompt_tokens": True, "completion_tokens": 1}, {"prompt_tokens": -1}]
    odd += [{"prompt_tokens": many, "completion_tokens": 1} for many in (10**400, 10**8)]
    for usage in odd:
        assert client.parse_usage({"usage": usage}) == Usage(unmetered=1)
