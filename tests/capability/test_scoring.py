"""Questions → scores: the ids that are asked about, and what their likelihoods mean."""

import math

import pytest
from helpers.commands import ROOT

from alpaca.capability.scoring import (
    common_prefix,
    encode_options,
    judge_choice,
    judge_number,
    make_batch,
)
from alpaca.capability.tasks import ExamQuestion
from alpaca.common.errors import UserError
from dataset import encode_prompt
from tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(ROOT / "data/tiny-llama")
LIMIT = 512


def question(*options, right=(0,), task="arc", **more) -> ExamQuestion:
    return ExamQuestion(task, list(options), list(right), place="x.jsonl, line 1", **more)


# ---------------------------------------------------------------- ids


def test_a_text_is_divided_where_its_prompt_would_end():
    asked = question(("Answer: ", "the sky"), ("Answer: ", "rust"), before="Read.\n\n")
    found = list(encode_options(asked, TOKENIZER, in_template=False))
    for (context, ids), text in zip(found, ("the sky", "rust"), strict=True):
        assert context == TOKENIZER.encode("Read.\n\nAnswer:", bos=True)
        assert context + ids == TOKENIZER.encode(f"Read.\n\nAnswer:  {text}", bos=True)


def test_in_a_template_the_prompt_is_the_instruction():
    asked = question(("Which?", "the sky"), before="Read.\n\n")
    ((context, ids),) = encode_options(asked, TOKENIZER, in_template=True)
    assert context == encode_prompt("Read.\n\nWhich?", "", TOKENIZER)
    assert ids == TOKENIZER.encode_after("### Response:", "the sky")[0]


def test_options_share_a_request_where_they_share_a_prompt():
    gap = question(("As Ann", "is tall."), ("As Bea", "is tall."))
    batch = make_batch({4: question(("A", "b"), ("A", "c")), 7: gap}, TOKENIZER, False, LIMIT)
    assert batch.owners == [(4, [0, 1]), (7, [0]), (7, [1])]
    assert [len(request.continuations) for request in batch.requests] == [2, 1, 1]
    assert batch.prefix == TOKENIZER.encode("", bos=True)


def test_common_prefix_is_what_all_begin_with():
    assert common_prefix([[1, 2, 3, 9], [1, 2, 4], [1, 2, 3, 7, 5]]) == [1, 2]
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 0]]) == [1, 2]
    assert common_prefix([[1], [2]]) == common_prefix([]) == []


def test_prompts_that_are_too_long_lose_their_beginning():
    asked = {0: question(("one two three", "four five"), ("one two three", "four"))}
    whole = list(encode_options(asked[0], TOKENIZER, False))
    limit = len(whole[0][0]) + len(whole[1][1]) - 1  # the second option just fits
    batch = make_batch(asked, TOKENIZER, False, limit)
    missing = len(whole[0][1]) - len(whole[1][1])
    assert [len(request.context) for request in batch.requests] == [
        len(whole[0][0]) - missing,
        len(whole[0][0]),
    ]
    assert batch.requests[0].context == whole[0][0][missing:] and batch.cut == {0}
    assert batch.prefix == whole[0][0]


def test_an_answer_without_tokens_is_refused():
    for answer, in_template, limit in (("", True, LIMIT), ("four five six", False, 2)):
        asked = {0: question(("A", "b"), ("A", answer))}
        with pytest.raises(UserError, match=r"x.jsonl, line 1: answer 2 has \d tokens, where 1 to"):
            make_batch(asked, TOKENIZER, in_template, limit)


# ---------------------------------------------------------------- scores


def test_choices_are_judged_by_sum_by_character_and_by_token():
    asked = question(("?", "abcd"), ("?", "ab"), ("?", ""), right=[1])
    scores = judge_choice(asked, [-4.0, -3.0, -9.0], [2, 1, 9])
    assert scores["characters"] == [4, 2, 0]
    names = ("", "_per_character", "_per_token")
    assert [scores[f"prediction{name}"] for name in names] == [1, 0, 2]
    assert [scores[f"right{name}"] for name in names] == [True, False, False]


def test_ties_go_to_the_first_and_none_to_an_empty_answer_by_length():
    asked = question(("Q:", ""), ("Q:", "a"), ("Q:", "b"))
    scores = judge_choice(asked, [-1.0, -2.0, -2.0], [1, 1, 1])
    assert [scores[name] for name in ("prediction", "prediction_per_character")] == [0, 1]


def test_mc2_is_the_share_of_the_true_answers():
    asked = question(("?", "a"), ("?", "b"), ("?", "c"), right=[0, 2], task="truthfulqa_mc2")
    for shift in (0, -2000):  # the probabilities of long answers are below the least float
        sums = [shift + math.log(p) for p in (0.1, 0.3, 0.2)]
        assert judge_choice(asked, sums, [1, 1, 1])["right"] == pytest.approx(0.5)


def test_numbers_are_compared_with_the_reference():
    asked_of = question(("?", "So.\n#### 1,234"), task="gsm8k")
    for text, number in (("$1234.00", "1234.00"), ("12", "12"), ("twelve", None)):
        found = judge_number(asked_of, text)
        assert found == {"number": number, "right": number == "1234.00"}
