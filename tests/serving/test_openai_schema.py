"""OpenAI's schema on the server's side: what a request means, and what is refused by its name."""

import json
import math
import re

import pytest
from helpers.commands import ROOT

from alpaca.inference.sampling import SamplingParams
from alpaca.inference.sequence import Sequence
from alpaca.serving import openai_schema as api
from alpaca.serving.http import HTTPError
from dataset import chat_prompt, encode_prompt
from templates import format_prompt
from tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(ROOT / "data/tokenizer.model")
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Name a fruit."}]


def parse(path: str = CHAT, **body) -> api.CompletionRequest:
    if path == CHAT:
        body = {"messages": USER, **body}
    return api.parse_request(body, path, "tiny", TOKENIZER, 100)


def encoded(text: str) -> list[int]:
    return TOKENIZER.encode(text, bos=True)


def test_prompts_have_the_one_template():
    expected = [encoded(format_prompt("Name a fruit."))]
    assert parse().prompts == expected
    assert parse(PLAIN, instruction="Name a fruit.").prompts == expected
    assert parse(PLAIN, prompt=format_prompt("Name a fruit.")).prompts == expected
    with_input = parse(PLAIN, instruction="Sum.", input="1 2")
    assert with_input.prompts == [encoded(format_prompt("Sum.", "1 2"))]
    assert "Sum." in with_input.text and "1 2" in with_input.text  # both are filtered


def test_messages_with_a_system_message_and_parts():
    parts = [{"type": "text", "text": "Name"}, {"type": "text", "text": "two."}]
    answer = {"role": "assistant", "content": "A pear."}
    sent = [{"role": "developer", "content": "Be brief."}, *USER, answer]
    same = [{"role": "system", "content": "Be brief."}, *USER, answer]
    request = parse(messages=[*sent, {"role": "user", "content": parts}])
    expected = chat_prompt([*same, {"role": "user", "content": "Name\ntwo."}], TOKENIZER)
    assert request.prompts == [expected]
    assert request.text == "Be brief.\nName a fruit.\nA pear.\nName\ntwo."


def test_sampling_fields_arrive():
    request = parse(
        temperature=0.5, top_p=0.9, top_k=7, repetition_penalty=1.2, seed=11, n=3, stop="x",
        max_completion_tokens=9, logprobs=True, top_logprobs=2, user="me", metadata={},
    )  # fmt: skip
    assert request.params[0] == SamplingParams(0.5, 7, 0.9, 1.2, 11, 9, ("x",), 2)
    assert [params.seed for params in request.params] == [11, 12, 13]
    assert parse(PLAIN, prompt="a", logprobs=0).params[0].logprobs == 0
    assert 0 < parse(top_p=0).params[0].top_p < 0.001


def test_defaults_are_openais():
    params = parse().params[0]
    assert (params.temperature, params.top_p, params.stop, params.logprobs) == (1.0, 1.0, (), None)
    assert params.max_new_tokens == 100 and params.seed != parse().params[0].seed
    assert parse(max_tokens=5000).params[0].max_new_tokens == 100
    assert parse(temperature=None, n=None, stop=None, seed=None).params[0].temperature == 1.0


def test_several_prompts_with_several_answers_each():
    request = parse(PLAIN, prompt=["a", "b c"], n=2, seed=5)
    prompts, params = request.sequences
    assert prompts == [encoded("a")] * 2 + [encoded("b c")] * 2
    assert [one.seed for one in params] == [5, 6, 5, 6]
    tokens = api.usage(request, [finished("x", one) for one in params])  # a prompt counts once
    assert tokens["prompt_tokens"] == len(encoded("a")) + len(encoded("b c"))


DEFAULTS = {  # of OpenAI's parameters, where that is not null
    "frequency_penalty": [0, 0.0], "presence_penalty": [0], "logit_bias": [{}], "n": [1],
    "temperature": [1], "top_p": [1], "logprobs": [False], "top_logprobs": [0], "stream": [False],
    "stream_options": [{}, {"include_usage": False}, {"include_obfuscation": True}],
    "tools": [[]], "tool_choice": ["none", "auto"], "parallel_tool_calls": [True, False],
    "functions": [[]], "function_call": ["none", "auto"], "modalities": [["text"]],
    "response_format": [{"type": "text"}], "reasoning_effort": ["none", "medium"],
    "verbosity": ["medium"], "service_tier": ["auto", "default"], "store": [False],
    "best_of": [1], "echo": [False], "suffix": [""], "stop": [[]], "metadata": [{}],
}  # fmt: skip
LABELS = {"user", "metadata", "safety_identifier"}  # they change no answer, whatever they are
LABELS |= {"prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"}


def openai_parameters(path: str) -> set[str]:
    """The optional ones, by the package openai."""
    types = pytest.importorskip("openai", reason="the package openai is not installed").types
    module = types.chat if path == CHAT else types
    base = module.completion_create_params.CompletionCreateParamsBase
    return {*base.__annotations__, "stream"} - {"messages", "prompt", "model"}


@pytest.mark.parametrize("path", [CHAT, PLAIN])
def test_openai_parameters_are_accepted_at_their_defaults(path):
    for name in openai_parameters(path):
        values = [] if (path, name) == (PLAIN, "logprobs") else DEFAULTS.get(name, [])
        for value in (None, *values):
            parse(path, prompt="a", **{name: value})


@pytest.mark.parametrize("path", [CHAT, PLAIN])
def test_openai_parameters_are_never_ignored(path):
    for name in openai_parameters(path) - LABELS:
        with pytest.raises(HTTPError) as refused:
            parse(path, prompt="a", **{name: {"other": 1}})
        error = refused.value
        assert error.status == 400 and error.error["param"] == name, name
        assert re.search(rf"{name} (must|needs)", error.error["message"])


def test_refusals_say_what_is_supported():
    for name, value, supported in (
        ("n", 9, "an integer from 1 to 8"),
        ("presence_penalty", 1, "must be 0 or null"),
        ("response_format", {"type": "json_object"}, 'must be {"type": "text"} or null'),
        ("service_tier", "flex", 'must be "auto" or "default" or null'),
    ):
        with pytest.raises(HTTPError) as refused:
            parse(**{name: value})
        assert supported in refused.value.error["message"]


REFUSED = {
    "messages": [None, [], "hi", [1], [{"role": "user"}], [{"role": "user", "content": 3}],
        [{"role": "assistant", "content": "a"}], USER * 2, [{"role": "tool", "content": "a"}],
        [{"role": "user", "content": " \n"}], [*USER, {"role": "assistant", "content": "a"}],
        [{"role": "user", "content": "\ud800"}], [*USER, {"role": "system", "content": "a"}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": [{"type": "text", "text": ["x"]}]}],
        [{"role": "system", "content": ""}]],
    "temperature": ["1", -0.1, 2.1, math.nan, math.inf, True, []],
    "top_p": [-0.1, 1.1, "a"],
    "top_k": [-1, 1.5],
    "repetition_penalty": [0, 100],
    "n": [0, 9, 1.0, "2", True],
    "seed": [-1, 1.5, 1 << 70],
    "max_tokens": [0, -1, 1.5, "9"],
    "stop": [3, [""], "", [1], ["a"] * 17, "a" * 201, {}],
    "stream": ["yes", 1],
    "stream_options": ["a", [1], {"other": 1}],
    "top_logprobs": [21, -1],
    "model": ["gpt-4", 3, ""],
    "tools": [[{}]],
    "tool_choice": ["required"],
    "store": [True],
    "logit_bias": [{"1": 2}],
    "frequency_penalty": [0.5],
    "response_format": [{"type": "json_object"}],
    "best_of": [2],
    "echo": [True],
    "reasoning_effort": ["high"],
    "verbosity": ["low"],
    "web_search_options": [{}],
}  # fmt: skip


@pytest.mark.parametrize("field", REFUSED)
def test_an_invalid_field_is_refused_by_its_name(field):
    for value in REFUSED[field]:
        body = {field: value} | ({"logprobs": True} if field == "top_logprobs" else {})
        with pytest.raises(HTTPError) as refused:
            parse(**body)
        error = refused.value
        assert error.status == (404 if field == "model" else 400), value
        assert field.split("_options")[0] in str(error.error).lower(), (value, error.error)


def test_invalid_combinations_are_refused():
    bodies = [{}, {"prompt": []}, {"prompt": [1, 2]}, {"prompt": ["a"] * 9}, {"prompt": 1}]
    bodies += [{"instruction": " "}, {"instruction": None}, {"instruction": "a", "input": 3}]
    bodies += [{"prompt": ["a"] * 5, "n": 2}, {"prompt": "a", "logprobs": 1, "stream": True}]
    for body in bodies:
        with pytest.raises(HTTPError):
            parse(PLAIN, **body)
    with pytest.raises(HTTPError, match="top_logprobs"):
        parse(top_logprobs=2)


# ---------------------------------------------------------------- responses


def finished(text: str, params: SamplingParams) -> Sequence:
    """A sequence with the tokens of `text`, or up to a stop string."""
    s = Sequence(encoded("a\n"), params, TOKENIZER, 100)
    for token in [*TOKENIZER.encode_after("", text)[0], TOKENIZER.eos_id]:
        s.logprobs.append(-math.inf)
        s.top_logprobs.append([(token, -0.5)])
        s.append(token)
        if s.finish_reason:
            break
    return s


def test_last_chunk_of_a_chat_adds_no_text():
    last = json.loads(api.chunk(parse(), 0, "", "stop")[6:])["choices"][0]
    assert last["delta"] == {} and last["finish_reason"] == "stop"


def test_logprobs_without_the_space_before_an_answer_of_vicuna():
    tokenizer = load_tokenizer(ROOT / "data", template="vicuna")
    s = Sequence(encode_prompt("Hi", "", tokenizer), SamplingParams(logprobs=0), tokenizer, 100)
    for token in [*tokenizer.encode_after("", " A pear")[0], tokenizer.eos_id]:
        s.logprobs.append(-1.0)
        s.top_logprobs.append([])
        s.append(token)
    found = api.completion_logprobs(s, s.text)
    assert s.text == "A pear" and len(found["tokens"]) == len(s.ids)
    assert found["text_offset"][0] == 0 and found["text_offset"][-1] == len(s.text)


@pytest.mark.parametrize("path", [CHAT, PLAIN])
def test_logprobs_end_before_a_stop_string(path):
    fields = {"logprobs": True} if path == CHAT else {"logprobs": 0, "prompt": "a"}
    request = parse(path, stop=["se"], **fields)
    s = finished("A pear is no secret", request.params[0])
    assert s.text == "A pear is no " and s.finish_reason == "stop"
    logprobs = api.full_response(request, [s], [s.text], ["stop"])["choices"][0]["logprobs"]
    json.dumps(logprobs, allow_nan=False)
    if path == PLAIN:
        tokens = "".join(logprobs["tokens"])
    else:
        tokens = "".join(entry["token"] for entry in logprobs["content"])
    assert "pear" in tokens and "A pear is no secret".startswith(tokens.strip())
    assert "s" not in tokens.replace("is", "")


def test_logprobs_are_json_and_offsets_point_into_the_text():
    request = parse(PLAIN, prompt="a\n", logprobs=1)
    s = finished("Ä pear 中", request.params[0])
    choice = api.full_response(request, [s], [s.text], ["stop"])["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == "Ä pear 中" and min(logprobs["token_logprobs"]) == api.MIN_LOGPROB
    assert len(logprobs["tokens"]) == len(logprobs["text_offset"]) == len(s.ids)
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith("<"):
            assert choice["text"][offset:].startswith(token), (token, offset)


def test_a_filtered_answer_has_no_logprobs():
    request = parse(logprobs=True)
    s = finished("secret", request.params[0])
    response = api.full_response(request, [s], [""], ["content_filter"])
    assert "secret" not in str(response) and response["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("depth", [70, 900, 100_000])
def test_a_deep_body_is_refused(depth):
    for body in ("[" * depth, f'{{"tools": {"[" * depth}{"]" * depth}}}'):
        with pytest.raises(HTTPError) as refused:
            api.parse_body(body.encode())
        assert refused.value.status == 400 and len(str(refused.value)) < 200
