"""OpenAI's API from the server's side: what is understood, and what is refused by name."""

import json
import math

import pytest
from helpers.commands import ROOT

from alpaca.inference.engine import Sequence
from alpaca.inference.sampling import SamplingParams
from alpaca.serving import openai_schema as api
from alpaca.serving.http import Problem
from dataset import chat_prompt, format_prompt
from tokenizer import Tokenizer

TOKENIZER = Tokenizer(ROOT / "data/tokenizer.model")
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Name a fruit."}]


def understood(path: str = CHAT, **body) -> api.Asked:
    if path == CHAT:
        body = {"messages": USER, **body}
    return api.understood(body, path, "tiny", TOKENIZER, 100)


def encoded(text: str) -> list[int]:
    return TOKENIZER.encode(text, bos=True)


def test_one_template_for_chat_completion_and_training():
    expected = [encoded(format_prompt("Name a fruit."))]
    assert understood().prompts == expected
    assert understood(PLAIN, instruction="Name a fruit.").prompts == expected
    assert understood(PLAIN, prompt=format_prompt("Name a fruit.")).prompts == expected
    with_input = understood(PLAIN, instruction="Sum.", input="1 2")
    assert with_input.prompts == [encoded(format_prompt("Sum.", "1 2"))]
    assert "Sum." in with_input.text and "1 2" in with_input.text  # both are filtered


def test_a_conversation_with_a_system_message_and_parts():
    parts = [{"type": "text", "text": "Name "}, {"type": "text", "text": "two."}]
    said = [{"role": "developer", "content": "Be brief."}, *USER]
    said += [{"role": "assistant", "content": "A pear."}, {"role": "user", "content": parts}]
    same = [{"role": "system", "content": "Be brief."}, *USER]
    same += [{"role": "assistant", "content": "A pear."}, {"role": "user", "content": "Name two."}]
    asked = understood(messages=said)
    assert asked.prompts == [chat_prompt(same, TOKENIZER)]
    assert asked.text == "Be brief.\nName a fruit.\nA pear.\nName two."


def test_options_arrive():
    asked = understood(
        temperature=0.5, top_p=0.9, top_k=7, repetition_penalty=1.2, seed=11, n=3, stop="x",
        max_completion_tokens=9, logprobs=True, top_logprobs=2, user="me", metadata={},
    )  # fmt: skip
    way = SamplingParams(0.5, 7, 0.9, 1.2, 11, 9, ("x",), 2)
    assert asked.ways[0] == way and [w.seed for w in asked.ways] == [11, 12, 13]
    assert understood(PLAIN, prompt="a", logprobs=0).ways[0].logprobs == 0


def test_what_is_left_out_is_as_in_openais_api():
    way = understood().ways[0]
    assert (way.temperature, way.top_p, way.stop, way.logprobs) == (1.0, 1.0, (), None)
    assert way.max_new_tokens == 100 and understood(max_tokens=5000).ways[0].max_new_tokens == 100
    assert understood().ways[0].seed != understood().ways[0].seed
    assert understood(temperature=None, n=None, stop=None, seed=None).ways[0].temperature == 1.0


def test_several_prompts_and_several_answers_each():
    asked = understood(PLAIN, prompt=["a", "b"], n=2, seed=5)
    prompts, ways = asked.each
    assert prompts == [encoded("a")] * 2 + [encoded("b")] * 2
    assert [way.seed for way in ways] == [5, 6, 5, 6]


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
    "stream_options": ["a", [1]],
    "top_logprobs": [21, -1],
    "model": ["gpt-4", 3, ""],
    "tools": [[{}]],
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
def test_what_makes_no_sense_is_refused_by_its_name(field):
    for value in REFUSED[field]:
        body = {field: value}
        if field == "top_logprobs":
            body["logprobs"] = True
        with pytest.raises(Problem) as refused:
            understood(**body)
        problem = refused.value
        assert problem.status == (404 if field == "model" else 400), value
        assert field.split("_options")[0] in str(problem.error).lower(), (value, problem.error)


def test_prompts_that_are_none():
    for body in ({}, {"prompt": []}, {"prompt": [1, 2]}, {"prompt": ["a"] * 9}, {"prompt": 1}):
        with pytest.raises(Problem):
            understood(PLAIN, **body)
    for body in ({"instruction": " "}, {"instruction": None}, {"instruction": "a", "input": 3}):
        with pytest.raises(Problem):
            understood(PLAIN, **body)
    with pytest.raises(Problem):
        understood(PLAIN, prompt=["a"] * 5, n=2)


def test_what_means_nothing_is_let_pass():
    understood(frequency_penalty=0, presence_penalty=0.0, logit_bias={}, tools=[], tool_choice=None)
    understood(tool_choice="auto")
    assert 0 < understood(top_p=0).ways[0].top_p < 0.001


def test_top_logprobs_without_logprobs_are_refused():
    with pytest.raises(Problem, match="top_logprobs"):
        understood(top_logprobs=2)


def test_a_chats_last_piece_adds_no_text():
    last = json.loads(api.piece(understood(), 0, "", "stop")[6:])["choices"][0]
    assert last["delta"] == {} and last["finish_reason"] == "stop"


def test_a_prompt_is_counted_once():
    asked = understood(PLAIN, prompt=["a", "b c"], n=2)
    sequences = [finished("x", asked.ways[0]) for _ in range(4)]
    read = len(encoded("a")) + len(encoded("b c"))
    assert api.usage(asked, sequences)["prompt_tokens"] == read


@pytest.mark.parametrize("path", [CHAT, PLAIN])
def test_what_a_stop_cut_off_is_not_told_by_its_tokens(path):
    how = {"logprobs": True} if path == CHAT else {"logprobs": 0, "prompt": "a"}
    asked = understood(path, stop=["se"], **how)
    s = finished("A pear is no secret", asked.ways[0])
    assert s.text == "A pear is no " and s.finish_reason == "stop"
    told = api.whole(asked, [s], [s.text], ["stop"])["choices"][0]["logprobs"]
    tokens = told["tokens"] if path == PLAIN else [one["token"] for one in told["content"]]
    assert "pear" in "".join(tokens) and "A pear is no secret".startswith("".join(tokens).strip())
    assert "s" not in "".join(tokens).replace("is", "")


def finished(text: str, way: SamplingParams) -> Sequence:
    s = Sequence(encoded("a\n"), way, TOKENIZER, 100)
    for token in [*TOKENIZER.encode("\n" + text)[len(TOKENIZER.newline_ids) :], TOKENIZER.eos_id]:
        s.logprobs.append(-math.inf)
        s.top_logprobs.append([(token, -0.5)])
        s.append(token)
        if s.finish_reason:
            break
    return s


def test_logprobs_are_json_and_their_offsets_point_into_the_text():
    asked = understood(PLAIN, prompt="a\n", logprobs=1)
    s = finished("Ä pear 中", asked.ways[0])
    choice = api.whole(asked, [s], [s.text], ["stop"])["choices"][0]
    told = choice["logprobs"]
    assert choice["text"] == "Ä pear 中" and min(told["token_logprobs"]) == api.NEVER
    assert len(told["tokens"]) == len(told["text_offset"]) == len(s.ids)
    for token, at in zip(told["tokens"], told["text_offset"], strict=True):
        if not token.startswith("<"):
            assert choice["text"][at:].startswith(token), (token, at)


def test_a_filtered_answers_tokens_are_not_told():
    asked = understood(logprobs=True)
    s = finished("secret", asked.ways[0])
    whole = api.whole(asked, [s], [""], ["content_filter"])
    assert "secret" not in str(whole) and whole["choices"][0]["logprobs"] is None
