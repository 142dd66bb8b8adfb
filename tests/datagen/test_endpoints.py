"""Endpoints: URLs, keys, flags, and the JSON file of several teachers."""

import argparse
import json
import re

import pytest

from alpaca.common.errors import UserError
from alpaca.datagen.endpoints import (
    Endpoint,
    add_server_arguments,
    endpoint_from_args,
    read_teachers,
)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-tests-0123")


def flags(*given) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_server_arguments(parser)
    return parser.parse_args([str(value) for value in given])


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000/v1", "ftp://x/v1", "http://", "http://[", "http://x:port/v1", "",
        "http://x y/v1", "http://x\x01/v1", "http://é..x/v1", "me:sk-secret@x/v1",
        "https://me:sk-secret@x/v1", "https://x/v1?api-key=sk-secret", "http://x/v1#sk-secret",
    ],
)  # fmt: skip
def test_bad_url_is_refused_and_not_repeated(url):
    with pytest.raises(UserError, match="--base-url is http") as error:
        Endpoint("m", url)
    assert "sk-secret" not in str(error.value)


def test_url_may_end_in_the_path():
    for url in ("http://x/v1", "http://x/v1/", "http://x/v1/chat/completions", "http://[::1]:8/v1"):
        assert Endpoint("m", url).base_url in ("http://x/v1", "http://[::1]:8/v1")


def test_body_leaves_out_none():
    body = Endpoint("m", "http://x/v1").body("p", {"max_tokens": None, "seed": 0})
    assert body == {"model": "m", "messages": [{"role": "user", "content": "p"}], "seed": 0}
    body = Endpoint("m", "http://x/v1", "completions").body("p", {})
    assert body == {"model": "m", "prompt": "p"}


def test_max_cost_is_bytes_in_and_the_limit_out():
    endpoint = Endpoint("m", "http://x/v1", price_in=1e6, price_out=2e6)
    body = endpoint.body("é" * 50, {"max_tokens": None, "max_completion_tokens": 7})
    length = len(json.dumps(body, ensure_ascii=False).encode())
    assert endpoint.max_cost(body) == length + 14 and length > 100


def test_mask_key_knows_the_spellings_of_json(monkeypatch):
    monkeypatch.setenv("MINE", "sk-abc/def+ghi==xyz")
    endpoint = Endpoint("m", "http://x/v1", key_env="MINE")
    text = r'{"a": "sk-abc/def+ghi==xyz", "b": "sk-abc\/def\u002Bghi\u003d\u003dxyz"}'
    assert endpoint.mask_key(text) == '{"a": "***", "b": "***"}'
    monkeypatch.setenv("MINE", "token")  # too short to be a secret
    assert endpoint.mask_key('{"prompt_tokens": 3}') == '{"prompt_tokens": 3}'
    monkeypatch.setenv("MINE", "sk-mine\n123")
    with pytest.raises(UserError, match="MINE holds a space") as error:
        endpoint.api_key()
    assert "sk-mine" not in str(error.value)


@pytest.mark.parametrize(
    "given, message",
    [
        (["--request", '{"max_tokens": null}', "--budget", 5], "--budget needs a limit"),
        (["--request", '{"max_tokens": -5}'], "integers above 0"),
        (["--request", '{"max_tokens": true}'], "integers above 0"),
        (["--request", '{"max_completion_tokens": "3072"}'], "integers above 0"),
        (["--request", '{"n": 5, "stream": true}'], "--request cannot set n, stream"),
        (["--price-in", 0, "--budget", 5], "--budget needs the prices of m"),
        (["--key-env", "sk-secret-9"], "environment variable, not a key"),
        (["--key-env", "gsk_sk_secret_9"], "environment variable, not a key"),
        (["--key-env", "AKIA9SECRET9"], "environment variable, not a key"),
        (["--key-env", ""], "environment variable, not a key"),
        (["--price-in", "nan"], "price_in nan makes no sense"),
    ],
)
def test_flags_that_would_upset_the_accounts_are_refused(given, message):
    with pytest.raises(UserError, match=message) as error:
        endpoint_from_args(flags("--price-in", 1, "--price-out", 1, *given), "m")
    assert not re.search("sk.secret", str(error.value))


def test_missing_key_is_refused_where_one_is_needed(monkeypatch):
    own = ("--base-url", "http://localhost/v1")
    for unset in (lambda: monkeypatch.setenv("OPENAI_API_KEY", " "),
                  lambda: monkeypatch.delenv("OPENAI_API_KEY")):  # fmt: skip
        unset()
        for url in ("https://API.openai.com/v1", "https://eu.api.openai.com/v1"):
            with pytest.raises(
                UserError, match=r"\$OPENAI_API_KEY is not set.*(?i:api.openai.com)"
            ):
                endpoint_from_args(flags("--base-url", url), "m")
        assert endpoint_from_args(flags(*own), "m").headers() == {}
    monkeypatch.setenv("MY_KEY2", " ")
    with pytest.raises(UserError, match=r"\$MY_KEY2 is not set.*http://localhost/v1"):
        endpoint_from_args(flags(*own, "--key-env", "MY_KEY2"), "m")
    for name in ("MY_KEY2", "my_key"):
        monkeypatch.setenv(name, "x")
        endpoint = endpoint_from_args(flags("--key-env", name), "m")
        assert endpoint.headers() == {"Authorization": "Bearer x"}


def test_teachers_file_overrides_the_flags(tmp_path, monkeypatch):
    monkeypatch.setenv("K", "x")
    file, args = tmp_path / "t.json", flags("--base-url", "http://x/v1", "--price-in", 1)
    second = {"model": "b", "base_url": "http://y/v1", "kind": "completions", "key_env": "K"}
    second |= {"weight": 2, "price_in": 0.5, "price_out": 4, "licence": "CC BY"}
    file.write_text(json.dumps([{"model": "org/a:7b"}, second]))
    assert read_teachers(file, args, licence="MIT") == [
        Endpoint("org/a:7b", "http://x/v1", price_in=1.0, licence="MIT"),
        Endpoint("b", "http://y/v1", "completions", "K", 2.0, 0.5, 4.0, "CC BY"),
    ]


@pytest.mark.parametrize(
    "text, message",
    [
        ("[{", "not JSON"),
        ("[]", "no teachers"),
        ('{"model": "a"}\n"b"\n', "line 2: an object with model"),
        ('[{"weight": 2}]', "record 1: an object with model, base_url"),
        ('[{"model": ""}]', "record 1: the model has no name"),
        ('[{"model": "a"}, {"model": "a", "wieght": 2}]', "record 2: an object with"),
        ('[{"model": "a", "weight": "two"}]', "record 1: "),
        ('[{"model": "a", "weight": 0}]', "record 1: a: weight 0 makes no sense"),
        ('[{"model": "a", "kind": "voice"}]', "'voice' is no kind of endpoint"),
        ('[{"model": "a", "key_env": "sk-secret-9"}]', "variable, not a key"),
        ('[{"model": "a", "key_env": ["sk-secret-9"]}]', "record 1: key_env is not a plain text"),
        ('[{"model": "a", "key_env": "MY_KEY2"}]', "record 1: --key-env takes the name"),
        ('[{"model": "a", "key": "sk-secret-9"}]', "record 1: an object with"),
    ],
)
def test_bad_teachers_file_names_the_record(tmp_path, text, message):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_teachers(tmp_path / "t.json", flags())
    assert "t.json" in str(error.value) and "sk-secret" not in str(error.value)
