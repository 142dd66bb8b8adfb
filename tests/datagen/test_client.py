"""The client: what is asked again, what is not, how often, and that the key stays where it is."""

import asyncio
import time
from email.utils import formatdate

import pytest
from helpers.teacher_server import ODD, Server

from alpaca.datagen import client
from alpaca.datagen.client import (
    Client,
    Endpoint,
    RefusedError,
    RequestFailedError,
    Usage,
    retry_after,
)


def ask(server: Server, kind: str = "chat", model: str = "m", prompt: str = "hello", **how):
    """One question, with short waits."""
    how = {"retry_wait": 0.01, "timeout": 0.8, "max_retries": 3} | how

    async def once():
        async with Client(**how) as client:
            return await client.ask(Endpoint(model, server.url, kind), prompt, max_tokens=9)

    return asyncio.run(once())


class First(Server):
    """Faults in the order given, then none."""

    def __init__(self, *faults, **how):
        super().__init__(**how)
        self.order = list(faults)

    def fault(self) -> str:
        return self.order.pop(0) if self.order else ""


@pytest.mark.parametrize(
    "kind, path", [("chat", "chat/completions"), ("completions", "completions")]
)
def test_both_apis_are_spoken(kind, path):
    with Server() as server:
        reply = ask(server, kind)
        assert reply.text == server.answer("hello") and not reply.cut and reply.attempts == 1
        assert reply.usage == Usage(*server.spent) and reply.request_id.startswith("answer-")
        assert server.seen["POST " + path] == 1
        asked = {"prompt": "hello"}
        if kind == "chat":
            asked = {"messages": [{"role": "user", "content": "hello"}]}
        assert server.bodies == [{"model": "m", **asked, "max_tokens": 9}]


@pytest.mark.parametrize("fault", ["429", "500", "503", "reset", "stall", "half", *ODD])
def test_what_may_pass_is_asked_again_and_not_for_ever(fault):
    timeout = 0.3 if fault == "stall" else 5
    with First(fault, fault) as server:
        assert ask(server, timeout=timeout).attempts == 3 and len(server.bodies) == 3
    with Server({fault: 1.0}) as server:
        with pytest.raises(RequestFailedError, match="no answer in 4 attempts"):
            ask(server, timeout=timeout)
        assert len(server.bodies) == 4


def test_tokens_of_answers_that_were_no_use_count_too():
    with First("empty choices", "wrong types", "not JSON") as server:
        told = ask(server).usage
        assert told == Usage(1 + server.spent[0], 1 + server.spent[1], unmetered=2)


def test_waits_double_and_are_partly_random_and_bounded():
    client = Client(retry_wait=2)
    for attempt, longest in [(2, 2), (3, 4), (4, 8), (7, 60), (99, 60)]:
        waits = [client.wait_before(attempt) for _ in range(200)]
        assert longest / 2 <= min(waits) < 0.6 * longest and 0.9 * longest < max(waits) <= longest


def test_retry_after_holds_back_every_request_to_that_server():
    class Limited(First):
        starts: list[float] = []  # noqa: RUF012

        def fault(self):
            self.starts.append(time.monotonic())
            return super().fault()

    async def many(url):
        async with Client(retry_wait=0.01) as client:
            endpoint = Endpoint("m", url)
            await asyncio.gather(client.ask(endpoint, "first"), later(client, endpoint))

    async def later(client, endpoint):
        await asyncio.sleep(0.2)
        await asyncio.gather(*(client.ask(endpoint, f"{n}") for n in range(5)))

    with Limited("429") as server:
        server.retry_after = 0.7
        asyncio.run(many(server.url))
        first, *rest = server.starts
        assert len(rest) == 6 and min(rest) - first >= 0.69


@pytest.mark.parametrize(
    "said, seconds",
    [("3", 3), ("0.5", 0.5), ("", None), ("soon", None), ("-4", None), ("nan", None)],
)
def test_retry_after_in_seconds(said, seconds):
    assert retry_after({"retry-after": said}) == seconds


def test_retry_after_as_a_date():
    at = retry_after({"retry-after": formatdate(time.time() + 30, usegmt=True)})
    assert 28 < at <= 30
    assert retry_after({"retry-after": formatdate(time.time() - 99, usegmt=True)}) == 0


def test_a_wrong_key_is_refused_at_once_and_never_repeated(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-0")
    with Server(key="sk-other") as server:
        with pytest.raises(RefusedError, match="says 401: Incorrect API key") as refused:
            ask(server)
        assert "sk-very-secret-0" not in str(refused.value) and "***" in str(refused.value)
        assert server.seen["POST chat/completions"] == 1
    monkeypatch.delenv("OPENAI_API_KEY")
    with (
        Server(key="sk-other") as server,
        pytest.raises(RefusedError, match="OPENAI_API_KEY is not set"),
    ):
        ask(server)


def test_the_key_goes_into_the_header_and_comes_from_the_variable_that_was_named(monkeypatch):
    monkeypatch.setenv("MINE", " sk-mine-123\n")
    with Server(key="sk-mine-123") as server:

        async def once():
            async with Client() as client:
                return await client.ask(Endpoint("m", server.url, key="MINE"), "hello")

        assert asyncio.run(once()).text
    monkeypatch.setenv("MINE", "sk-mine\n123")
    with pytest.raises(ValueError, match="MINE holds what no key has") as refused:
        Endpoint("m", "http://x/v1", key="MINE").secret()
    assert "sk-mine" not in str(refused.value)


def test_an_unknown_model_is_refused_at_once():
    with Server() as server:
        with pytest.raises(RefusedError, match="says 404: The model `nobody` does not exist"):
            ask(server, model="nobody")
        assert len(server.bodies) == 1


def test_no_money_left_is_no_rate_limit():
    with Server() as server:
        endpoint = Endpoint("m", server.url)

        class Response:
            status_code, headers = 429, {}

        text = '{"error": {"message": "You exceeded it", "code": "insufficient_quota"}}'
        with pytest.raises(RefusedError, match="You exceeded it"):
            Client()._raise(endpoint, "chat/completions", Response(), text)


def test_a_bad_request_is_refused_unless_others_like_it_were_answered():
    client, endpoint = Client(), Endpoint("m", "http://localhost:1/v1")

    class Response:
        status_code, headers = 400, {}

    with pytest.raises(RefusedError, match="says 400: too long"):
        client._raise(endpoint, "x", Response(), '{"error": "too long"}')
    client.answered.add(endpoint)
    with pytest.raises(RequestFailedError, match="says 400: too long"):
        client._raise(endpoint, "x", Response(), '{"error": "too long"}')


def test_where_nobody_listens_three_attempts_are_enough():
    async def once():
        async with Client(retry_wait=0.01, max_retries=49) as client:
            await client.ask(Endpoint("m", "http://127.0.0.1:9/v1"), "hello")

    with pytest.raises(
        RequestFailedError, match=r"127\.0\.0\.1:9/v1: no answer in 3 attempts"
    ) as gave_up:
        asyncio.run(once())
    assert gave_up.value.unreachable


def test_a_stalled_answer_takes_no_longer_than_the_time_out():
    with Server({"stall": 1.0}) as server:
        start = time.monotonic()
        with pytest.raises(RequestFailedError, match="no whole answer in 0.3 s|Timeout"):
            ask(server, timeout=0.3, max_retries=1)
        assert time.monotonic() - start < 1.5


@pytest.mark.parametrize(
    "url, word",
    [
        ("localhost:8000/v1", "is no server"),
        ("ftp://x/v1", "is no server"),
        ("http://", "is no server"),
        ("http://[", "is no server"),
        ("http://x:port/v1", "is no server"),
        ("http://x y/v1", "is no server"),
        ("", "is no server"),
        ("http://x\x01/v1", "is no server"),
        ("http://é..x/v1", "is no server"),
        ("https://me:sk-secret@x/v1", "keep keys out of the URL"),
        ("https://x/v1?api-key=sk-secret", "keep keys out of the URL"),
        ("me:sk-secret@x/v1", "is no server"),
    ],
)
def test_bad_urls_are_refused_and_their_secrets_not_repeated(url, word):
    with pytest.raises(ValueError, match=word) as refused:
        Endpoint("m", url)
    assert "sk-secret" not in str(refused.value)


def test_urls_are_understood_with_and_without_their_end():
    for url in ("http://x/v1", "http://x/v1/", "http://x/v1/chat/completions"):
        assert Endpoint("m", url).url == "http://x/v1"


def test_teachers_are_read_from_the_command_line():
    default = {"url": "http://x/v1", "price_in": 1.0}
    assert Endpoint.parsed("org/model:7b", default) == Endpoint("org/model:7b", **default)
    text = "model=a,url=http://y/v1,kind=completions,key=K,weight=2,price-out=4,licence=CC BY"
    assert Endpoint.parsed(text, default) == Endpoint(
        "a", "http://y/v1", "completions", "K", 2.0, 1.0, 4.0, "CC BY"
    )
    assert Endpoint.parsed("price-in=2,model=a", default).price_in == 2
    for twice in ("a,model=b", "model=a,price-in=1,price_in=2"):
        with pytest.raises(ValueError, match="every NAME once"):
            Endpoint.parsed(twice, default)
    for wrong in ("url=http://y/v1", "model=a,wieght=2", "model=a,weight=two", "model=a,weight=0"):
        with pytest.raises(ValueError, match="model|weight|float"):
            Endpoint.parsed(wrong, default)
    with pytest.raises(ValueError, match="NAME=VALUE"):
        Endpoint.parsed("model=a,licence=MIT, see terms", default)
    for text in ("model=a,key=sk-secret-9", "model=a,key=sk-secret-9,wieght=2"):
        with pytest.raises(ValueError) as refused:
            Endpoint.parsed(text, default)
        assert "sk-secret-9" not in str(refused.value)


def test_options_that_are_none_are_left_out():
    body = Endpoint("m", "http://x/v1").body("p", {"max_tokens": None, "seed": 0})
    assert body == {"model": "m", "messages": [{"role": "user", "content": "p"}], "seed": 0}


def test_answers_of_several_parts_and_odd_characters():
    part = '{"type": "text", "text": "%s"}'
    parts = f"[{part % 'one '}, {part % 'two'}]"
    said = '{"choices": [{"message": {"content": %s}, "finish_reason": "length"}]}'
    reply = client.parse_reply(said % parts)
    assert (reply.text, reply.cut, reply.usage) == ("one two", True, Usage(unmetered=1))
    assert client.parse_reply(said % r'"half \ud83d of it"').text == "half ? of it"


def test_a_key_is_found_however_json_spells_it_and_a_short_one_left_alone(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-abc/def+ghi==xyz")
    endpoint = Endpoint("m", "http://x/v1")
    spelt = r'{"a": "sk-abc/def+ghi==xyz", "b": "sk-abc\/def\u002Bghi\u003d\u003dxyz"}'
    assert client.mask_key(endpoint, spelt) == '{"a": "***", "b": "***"}'
    monkeypatch.setenv("OPENAI_API_KEY", "token")
    assert client.mask_key(endpoint, '{"prompt_tokens": 3}') == '{"prompt_tokens": 3}'


def test_numbers_and_names_that_nobody_can_mean_do_no_harm():
    for many in (10**400, 10**8):
        counted = {"usage": {"prompt_tokens": many, "completion_tokens": 1}}
        assert client.usage_of(counted) == Usage(unmetered=1)
    odd = r'{"id": "a\ud800", "choices": [{"text": "x"}]}'
    assert client.parse_reply(odd).request_id == "a?"
    assert retry_after({"retry-after": f"Fri, 31 Dec {'9' * 20} 23:59:59 GMT"}) is None
    assert client.error_message(r'{"error": {"message": "no \ud800"}}') == "no ?"
    refusal = '{"choices": [{"message": {"content": null, "refusal": "I will not"}}]}'
    assert client.parse_reply(refusal).text == "I will not"
    with pytest.raises(client.RetryableError, match="no choices.*: out of credits"):
        client.parse_reply('{"error": {"message": "out of credits"}}')


@pytest.mark.parametrize("fault", ["half", "stall", "huge", "not JSON"])
def test_answers_that_are_lost_on_the_way_are_counted(fault):
    with First(fault) as server:
        assert ask(server, timeout=0.3).usage == Usage(*server.spent, unmetered=1)


def test_another_attempt_is_made_only_if_there_is_money_for_it():
    async def once(url):
        async with Client(retry_wait=0.01) as client:
            await client.ask(Endpoint("m", url), "hello", again=lambda: False)

    with Server({"empty choices": 1.0}) as server:
        with pytest.raises(RequestFailedError) as gave_up:
            asyncio.run(once(server.url))
        assert len(server.bodies) == 1 and gave_up.value.usage == Usage(1, 1)


def test_usage_may_lack_completion_tokens():
    assert client.usage_of({"usage": {"prompt_tokens": 3, "total_tokens": 3}}) == Usage(3, 0)
    for odd in (None, [], {"prompt_tokens": True, "completion_tokens": 1}, {"prompt_tokens": -1}):
        assert client.usage_of({"usage": odd}) == Usage(unmetered=1)
