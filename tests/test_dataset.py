"""Records, prompts, ids and labels, packing."""

import json
import random
import time

import numpy as np
import pytest
import torch
from helpers.commands import ROOT
from helpers.models import small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from alpaca.datagen.formats import load_mixture, load_records
from alpaca.datagen.train_tokenizer import train_tokenizer
from dataset import (
    IGNORE,
    PREAMBLE,
    chat_prompt,
    encode_all,
    encode_chat,
    encode_example,
    format_prompt,
    make_row,
    pack_rows,
    step_examples,
    total_steps,
)
from tokenizer import Tokenizer

TOKENIZER = Tokenizer(ROOT / "data/tokenizer.model")


@pytest.fixture(scope="module")
def merging(tmp_path_factory):
    """A tokenizer with pieces like `:(`, which reach from the template into an answer."""
    folder = tmp_path_factory.mktemp("merging")
    lines = ("(a) and so on (b)", '"a" b', ") c")
    (folder / "text.txt").write_text("".join(f"### Response:{line}\n" for line in lines) * 50)
    train_tokenizer([folder / "text.txt"], 310, folder / "tokenizer.model")
    merging = Tokenizer(folder / "tokenizer.model")
    assert all(merging.sentencepiece.piece_to_id(x) != merging.unk_id for x in (":(", ':"', ":)"))
    return merging


def record(output: str, instruction: str = "Do it.", input: str = "") -> dict:
    return {"instruction": instruction, "input": input, "output": output}


NASTY = [
    "plain words",
    "",
    " a space first",
    "  two spaces",
    "\ta tab",
    "\na newline first",
    "\n\n### Response:\nagain",
    "(in brackets)",
    ") and so on",
    "(((:(",
    ": colon",
    '"quoted"',
    ".",
    "中文回答",
    "🙂 and 👩‍👩‍👧‍👦",
    "a </s> b <s> c <unk>",
    "### Instruction:\nforget it\n\n### Response:",
    "line\r\nline",
    "trailing  \n ",
    "x" * 700,
]


# ---------------------------------------------------------------- the template


def test_the_prompts_are_alpacas_character_for_character():
    assert format_prompt("Add.", "2, 3") == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n2, 3\n\n### Response:"
    )
    assert format_prompt("Add.") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Response:"
    )


def assert_encoded(record: dict, tokenizer: Tokenizer) -> None:
    ids, labels = encode_example(record, tokenizer, 10**6)
    text = format_prompt(record["instruction"], record["input"])
    asked = tokenizer.encode(text, bos=True)
    assert ids[: len(asked)] == asked, "decoding would see another prompt"
    assert labels == [IGNORE] * len(asked) + ids[len(asked) :]
    assert ids[-1] == labels[-1] == tokenizer.eos_id and len(ids) > len(asked)
    whole = tokenizer.encode(text + record["output"], bos=True, eos=True)
    if whole[: len(asked)] == asked:
        assert ids == whole, "Alpaca tokenises prompt and answer in one"
    answer = [label for label in labels if label != IGNORE]
    assert tokenizer.decode(asked + answer) == text + record["output"]


@pytest.mark.parametrize("output", NASTY, ids=repr)
def test_labels_are_the_answer_and_eos_and_the_prompt_a_true_prefix(output, merging):
    for tokenizer in (TOKENIZER, merging):
        assert_encoded(record(output), tokenizer)
        assert_encoded(record(output, instruction=output or "?", input=output), tokenizer)


TEXTS = st.text(
    st.sampled_from(list(' \n\t\r():"#.a')) | st.characters(exclude_categories=["Cs"]), max_size=20
).map(lambda text: text.replace("\u2581", ""))  # the one character that does not come back


@settings(max_examples=80, deadline=None)
@given(output=TEXTS, instruction=TEXTS, input=TEXTS)
def test_any_record_is_encoded_so(output, instruction, input, merging):
    for tokenizer in (TOKENIZER, merging):
        assert_encoded(record(output, instruction, input), tokenizer)


def test_merges_across_the_boundary_are_undone_and_counted(merging):
    records = [record("(a)"), record("b (a)"), record("(b)")]
    examples = encode_all(records, ["", "", ""], merging, 512)
    assert examples.report["merges undone"] == 2
    one = merging.encode(format_prompt("Do it.") + "(a)", bos=True)
    asked = merging.encode(format_prompt("Do it."), bos=True)
    assert one[: len(asked)] != asked, "this test would prove nothing"
    talk = {"messages": turns("Do it.", "(a)", "Again.", "(a)")}
    assert encode_all([talk, *records], [""] * 4, merging, 512).report["merges undone"] == 4
    assert encode_all(records, [""] * 3, TOKENIZER, 512).report["merges undone"] == 0


def test_nothing_else_is_counted_as_a_merge(merging):
    asked = merging.encode(format_prompt("Do it."), bos=True)
    for output in NASTY:
        whole = merging.encode(format_prompt("Do it.") + output, bos=True)
        report = encode_all([record(output)], [""], merging, 10**6).report
        assert report["merges undone"] == (whole[: len(asked)] != asked), output


def test_a_tokenizer_with_pieces_across_newlines_is_refused(merging):
    class Crossing(Tokenizer):
        def encode(self, text, bos=False, eos=False):
            return super().encode(text.replace("\n#", "x"), bos, eos)

    with pytest.raises(ValueError, match="across a newline"):
        encode_example(record("a"), Crossing(ROOT / "data/tokenizer.model"), 512)


# ---------------------------------------------------------------- truncation


def test_what_is_cut_is_counted_and_what_has_nothing_to_learn_dropped():
    asked = len(TOKENIZER.encode(format_prompt("Do it."), bos=True))
    short, long = record("yes"), record("word " * 100)
    late = record("yes", instruction="wait " * 100)
    examples = encode_all([short, long, late], ["a", "b", "c"], TOKENIZER, asked + 10)
    assert examples.report["kept"] == 2 and examples.origins == ["a", "b"]
    assert examples.report["truncated"] == 2 and examples.report["dropped"] == 1
    assert (examples.lengths <= asked + 10).all() and (examples.supervised > 0).all()
    first = slice(examples.starts[0], examples.starts[1])
    assert examples.ids[first][-1] == examples.labels[first][-1] == TOKENIZER.eos_id
    assert examples.ids[-1] != TOKENIZER.eos_id, "an answer that was cut does not end"
    exact = encode_all([short], ["a"], TOKENIZER, len(encode_example(short, TOKENIZER, 512)[0]))
    assert exact.report["truncated"] == 0 and exact.ids[-1] == TOKENIZER.eos_id


@pytest.mark.parametrize("length", range(1, 90, 4))
def test_a_cut_example_is_the_head_of_the_whole_one(length, merging):
    kinds = [record('"one" two three'), {"text": "once upon a time"}]
    kinds.append({"messages": turns("Hi", "(a)", "and", "b")})
    for tokenizer, kind in ((t, k) for t in (TOKENIZER, merging) for k in kinds):
        ids, labels = encode_example(kind, tokenizer, 10**6)
        assert encode_example(kind, tokenizer, length) == (ids[:length], labels[:length])
        if set(labels[:length]) == {IGNORE}:
            with pytest.raises(ValueError, match="raise --max-length"):
                encode_all([kind], ["a"], tokenizer, length)
            continue
        kept = encode_all([kind], ["a"], tokenizer, length)
        assert kept.ids.tolist() == ids[:length] and kept.labels.tolist() == labels[:length]
        assert kept.supervised.tolist() == [len(labels[:length]) - labels[:length].count(IGNORE)]
        assert kept.report["truncated"] == (len(ids) > length)
    if length == 1:
        whole = encode_chat(kinds[2]["messages"], TOKENIZER, 10**6)
        assert encode_chat(kinds[2]["messages"], TOKENIZER, 1) == (whole[0][:1], whole[1][:1])


def test_every_whole_example_ends_in_an_eos_that_is_learned(merging):
    records = [record(output) for output in NASTY] + [{"text": output} for output in NASTY]
    records += [{"messages": turns("Hi", output, "Go on.", output)} for output in NASTY]
    for tokenizer in (TOKENIZER, merging):
        examples = encode_all(records, [""] * len(records), tokenizer, 10**6)
        assert len(examples) == len(records) == examples.report["kept"]
        last = examples.starts[1:] - 1
        assert (examples.ids[last] == tokenizer.eos_id).all()
        assert (examples.labels[last] == tokenizer.eos_id).all()
        assert (examples.labels[examples.starts[:-1]] == IGNORE).all(), "BOS is given, not learned"


def test_when_nothing_is_left_the_error_says_what_to_do():
    with pytest.raises(ValueError) as refused:
        encode_all([record("yes"), record("no")], ["a", "b"], TOKENIZER, 5)
    said = str(refused.value)
    for words in ("truncation to 5 tokens", "any of the 2 records", "raise --max-length"):
        assert words in said and "\n" not in said


def test_other_examples_have_another_digest():
    one, two = (encode_all([record(x)], ["a"], TOKENIZER, 512).digest() for x in ("yes", "no"))
    assert one != two and one == encode_all([record("yes")], ["b"], TOKENIZER, 512).digest()


# ---------------------------------------------------------------- conversations


def turns(*contents: str, system: str | None = None) -> list[dict]:
    roles = ["user", "assistant"] * len(contents)
    said = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}] * (system is not None) + said


def test_one_user_message_is_alpacas_prompt():
    ids = TOKENIZER.encode(format_prompt("Name a colour."), bos=True)
    assert chat_prompt(turns("Name a colour."), TOKENIZER) == ids
    alpaca = encode_example(record("Red", "Name a colour."), TOKENIZER, 512)
    assert encode_chat(turns("Name a colour.", "Red"), TOKENIZER, 512) == alpaca


@pytest.mark.parametrize("system", [None, "You are a sailor.", ""])
@pytest.mark.parametrize("nasty", NASTY, ids=repr)
def test_only_the_assistants_turns_are_learned(system, nasty, merging):
    messages = turns("Hello", nasty, nasty, "(fine)", system=system)
    for tokenizer in (TOKENIZER, merging):
        ids, labels = encode_chat(messages, tokenizer, 10**6)
        preamble = PREAMBLE[False] if system is None else system
        asked = "\n\n### Instruction:\n{}\n\n### Response:"
        text = preamble + asked.format("Hello") + nasty + asked.format(nasty) + "(fine)"
        assert tokenizer.decode(ids) == text
        assert ids.count(tokenizer.eos_id) == 2 and labels.count(tokenizer.eos_id) == 2
        for count in (1, 3):
            before = chat_prompt(messages[: count + (system is not None)], tokenizer)
            assert ids[: len(before)] == before
            assert labels[len(before) - 1] == IGNORE and labels[len(before)] != IGNORE
        learned = sum(label != IGNORE for label in labels)
        answers = len(ids) - len(before)
        first = ids.index(tokenizer.eos_id) + 1 - len(chat_prompt(messages[:-3], tokenizer))
        assert learned == answers + first


@settings(max_examples=40, deadline=None)
@given(said=st.lists(TEXTS, min_size=2, max_size=6), system=st.none() | TEXTS)
def test_any_conversation_reads_as_it_was_said(said, system, merging):
    messages = turns(*said[: len(said) // 2 * 2], system=system)
    for tokenizer in (TOKENIZER, merging):
        ids, labels = encode_chat(messages, tokenizer, 10**6)
        assert ids.count(tokenizer.bos_id) == 1 and ids[0] == tokenizer.bos_id
        at = 0
        for number, message in enumerate(messages, 1):
            if message["role"] != "assistant":
                continue
            asked, answered = (
                len(chat_prompt(messages[:upto], tokenizer)) for upto in (number - 1, number)
            )
            assert ids[:answered] == chat_prompt(messages[:number], tokenizer)
            assert set(labels[at:asked]) == {IGNORE}
            assert labels[asked:answered] == ids[asked:answered]
            assert ids[answered - 1] == tokenizer.eos_id
            before = tokenizer.decode(ids[:asked])
            assert tokenizer.decode(ids[:answered]) == before + message["content"]
            at = answered
        assert at == len(ids) == len(labels)


# ---------------------------------------------------------------- files


def written(path, content) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


ALPACA = '{"instruction": "Say hi.", "input": "", "output": "hi"}'
FORMS = {
    "list": f"[{ALPACA},\n {ALPACA}]",
    "lines": f"{ALPACA}\n\n{ALPACA}\n",
    "lines with carriage returns": f"{ALPACA}\r\n{ALPACA}\r\n",
    "byte order mark": b"\xef\xbb\xbf" + f"[{ALPACA}, {ALPACA}]".encode(),
    "more fields": ALPACA[:-1] + ', "family": 7}\n' + ALPACA,
    "text beside an instruction": ALPACA[:-1] + ', "text": "all of it"}\n' + ALPACA,
    "text with mark and carriage returns": b"\xef\xbb\xbf\r\n" + f"{ALPACA}\r\n{ALPACA}".encode(),
    "pretty": json.dumps([json.loads(ALPACA)] * 2, indent=4),
    "no input": '[{"instruction": "Say hi.", "output": "hi"}, '
    '{"instruction": "Say hi.", "input": null, "output": "hi"}]',
    "seeds": '{"id": "seed_0", "instruction": "Say hi.", "instances": '
    '[{"input": "", "output": "hi"}, {"input": "", "output": "hi"}]}',
}


@pytest.mark.parametrize("content", FORMS.values(), ids=FORMS.keys())
def test_every_form_of_file_gives_the_same_records(tmp_path, content):
    assert load_records(written(tmp_path / "data", content)) == [record("hi", "Say hi.")] * 2


def test_conversations_and_plain_text(tmp_path):
    said = [("system", "Be kind."), ("human", "Hi"), ("gpt", "Hello")]
    turns = [{"from": who, "value": what} for who, what in said]
    lines = f'{json.dumps({"conversations": turns})}\n{{"text": "Once"}}\n'
    chat, text = load_records(written(tmp_path / "data.jsonl", lines))
    assert [message["role"] for message in chat["messages"]] == ["system", "user", "assistant"]
    ids, labels = encode_example(text, TOKENIZER, 512)
    assert ids == TOKENIZER.encode("Once", bos=True, eos=True)
    assert labels == [IGNORE, *ids[1:]]


def conversation(*turns) -> str:
    return json.dumps({"conversations": [{"from": who, "value": what} for who, what in turns]})


def test_every_name_of_a_speaker_is_understood(tmp_path):
    said = [("system", "a"), ("user", "b"), ("assistant", "c"), ("human", "d"), ("chatgpt", "e")]
    file = written(tmp_path / "data.jsonl", conversation(*said, ("human", "f"), ("gpt", "g")))
    [talk] = load_records(file)
    roles = ["system", "user", "assistant", "user", "assistant", "user", "assistant"]
    assert talk["messages"] == [
        {"role": role, "content": content} for role, content in zip(roles, "abcdefg", strict=True)
    ]


def test_a_line_separator_in_a_text_ends_no_line(tmp_path):
    odd = record("one\u2028two\x85three\x0cfour")
    lines = "\n".join(json.dumps(each, ensure_ascii=False) for each in (odd, odd))
    assert load_records(written(tmp_path / "data.jsonl", lines)) == [odd, odd]


def test_seeds_with_several_instances_become_as_many_records(tmp_path):
    seed = {"instruction": "Add.", "instances": [{"input": "1", "output": "2"}, {"output": "3"}]}
    file = written(tmp_path / "seeds.jsonl", json.dumps(seed))
    assert load_records(file) == [record("2", "Add.", "1"), record("3", "Add.")]


BROKEN = {
    "bad line": (f"{ALPACA}\n{{oops\n", "line 2", "not JSON"),
    "bad list": (f"[{ALPACA},\n{ALPACA},\n{{oops]", "not JSON", "line 3"),
    "no comma": (f"[{ALPACA}\n{ALPACA}]", "not JSON", "line 2"),
    "unfinished list": (f"[{ALPACA},\n{ALPACA}\n", "not JSON", "line 3"),
    "list that ends in a comma": (f"[{ALPACA},\n", "not JSON", "line 2"),
    "bracket astray": (f"{ALPACA}\n]", "line 2", "not JSON"),
    "two on a line": (f"{ALPACA}\n\n{ALPACA} {ALPACA}", "line 3", "not JSON"),
    "an object over several lines": ("{\n" + ALPACA[1:], "line 1", "not JSON"),
    "more after it": (f"[{ALPACA}]\n{ALPACA}", "not JSON", "line 2"),
    "list of lists": (f"[[{ALPACA}]]", "record 1", "object"),
    "endless nesting": ("[\n" + "[" * 10**5, "not JSON"),
    "number": (f"[{ALPACA},\n\n 5]", "record 2", "object"),
    "no output": (f'{ALPACA}\n{{"instruction": "x"}}', "line 2", "no output"),
    "no instruction": ('[{"output": "x"}]', "record 1", "no instruction"),
    "empty instruction": ('{"instruction": " ", "output": "x"}', "line 1", "empty"),
    "output a number": ('[\n{"instruction": "x", "output": 5}]', "record 1", "output is 5"),
    "input a list": ('{"instruction": "x", "input": ["a"], "output": "y"}', "input is"),
    "output null": ('{"instruction": "x", "output": null}', "output is null"),
    "surrogate": ('{"instruction": "x", "output": "\\ud800"}', "output", "surrogate"),
    "no instances": ('{"instruction": "x", "instances": []}', "instances"),
    "empty file": ("", "no records"),
    "empty list": ("[]", "no records"),
    "only space": (" \n ", "no records"),
    "instance without output": (
        '{"instruction": "x", "instances": [{"input": "y"}]}',
        "no output",
    ),
    "text a number": ('{"text": 5}', "line 1", "text is 5"),
    "not UTF-8 behind a mark": (b"\xef\xbb\xbf" + ALPACA.encode() + b"\n\xff", "line 2", "UTF-8"),
    "UTF-16": (ALPACA.encode("utf-16"), "line 1", "UTF-8"),
    "not UTF-8": (ALPACA.encode() + b"\n\xff", "line 2", "UTF-8"),
    "robot": (conversation(("robot", "x")), "turn 1", "robot", "one of human, user"),
    "answer first": (conversation(("gpt", "x")), "turn 1", "user"),
    "system in the middle": (conversation(("human", "x"), ("system", "y")), "turn 2", "system"),
    "two answers": (conversation(("human", "x"), ("gpt", "y"), ("gpt", "z")), "turn 3", "user"),
    "only a system": (conversation(("system", "x")), "does not end with an answer"),
    "nobody speaks": ('{"conversations": [{"value": "x"}]}', "no from"),
    "nothing said": ('{"conversations": [{"from": "human"}]}', "no value"),
    "a number said": (conversation(("human", 5)), "value is 5", "string"),
    "a turn of text": ('{"conversations": ["x"]}', "conversations must be a list of objects"),
    "two questions": (conversation(("human", "x"), ("human", "y")), "turn 2", "assistant"),
    "no answer": (conversation(("human", "x")), "does not end with an answer"),
    "no turns": ('{"conversations": []}', "does not end with an answer"),
    "turns not a list": ('{"conversations": "x"}', "conversations"),
}


@pytest.mark.parametrize("content_and_words", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_is_named_with_line_and_fault(tmp_path, content_and_words):
    content, *words = content_and_words
    with pytest.raises(ValueError) as refused:
        load_records(written(tmp_path / "data.json", content))
    said = str(refused.value)
    assert "data.json" in said and "\n" not in said and len(said) < 300
    for word in words:
        assert word in said


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        load_records(tmp_path / "absent.json")


def test_long_files_are_read_in_one_pass(tmp_path):
    file = written(tmp_path / "data.json", json.dumps([record("x")] * 50_000, indent=1))
    start = time.perf_counter()
    assert len(load_records(file)) == 50_000
    assert time.perf_counter() - start < 5


# ---------------------------------------------------------------- mixtures


@pytest.fixture
def two_files(tmp_path):
    for name in "ab":
        records = [record(f"{name}{i}") for i in range(10)]
        written(tmp_path / f"{name}.json", json.dumps(records))
    return f"{tmp_path}/a.json", f"{tmp_path}/b.json"


def test_weights_repeat_or_sample_a_file_reproducibly(two_files):
    a, b = two_files

    def outputs(*specs, seed=1):
        return [r["output"] for r in load_mixture(specs, seed)[0]]

    assert outputs(a, b) == [f"a{i}" for i in range(10)] + [f"b{i}" for i in range(10)]
    half = outputs(a, f"{b}:0.5")
    assert len(half) == 15 and len({x for x in half if x[0] == "b"}) == 5
    assert half == outputs(a, f"{b}:0.5")
    assert len({tuple(outputs(f"{b}:0.5", seed=seed)) for seed in range(5)}) > 1
    more = outputs(f"{a}:2.5")
    assert len(more) == 25 and all(more.count(f"a{i}") in (2, 3) for i in range(10))


def test_records_know_where_they_come_from(two_files):
    _, origins = load_mixture(two_files, 0)
    assert origins[12] == f"{two_files[1]} record 3"

    records, origins = load_mixture([f"{two_files[0]}:1.5", f"{two_files[1]}:0.3"], 0)
    assert len(records) == len(origins) == 18
    for found, origin in zip(records, origins, strict=True):
        file, number = origin.split(" record ")
        assert found == load_records(file)[int(number) - 1]
    assert load_mixture([f"{two_files[0]}:2"], 0)[1].count(f"{two_files[0]} record 1") == 2


def test_a_colon_in_a_file_name_is_no_weight(tmp_path):
    written(tmp_path / "at:2", ALPACA)
    assert len(load_mixture([str(tmp_path / "at:2")], 0)[0]) == 1
    records, origins = load_mixture([f"{tmp_path}/at:2:3"], 0)
    assert len(records) == 3 and origins == [f"{tmp_path}/at:2 record 1"] * 3
    written(tmp_path / "a:b.json", ALPACA)
    assert len(load_mixture([tmp_path / "a:b.json", f"{tmp_path}/a:b.json:2"], 0)[0]) == 3
    with pytest.raises(FileNotFoundError, match="c:d"):
        load_mixture([f"{tmp_path}/c:d"], 0)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "1000"])
def test_a_weight_must_be_above_0(two_files, weight):
    with pytest.raises(ValueError, match=rf"a\.json:{weight}: .*above 0 and below 1000"):
        load_mixture([f"{two_files[0]}:{weight}"], 0)
    with pytest.raises(ValueError, match="no record"):
        load_mixture([f"{two_files[0]}:0.01"], 0)


# ---------------------------------------------------------------- shuffle and packing


@pytest.mark.parametrize(("examples", "batch", "epochs"), [(40, 16, 3), (7, 16, 2.5), (64, 8, 1)])
def test_every_example_comes_once_an_epoch_in_one_shuffle_after_another(examples, batch, epochs):
    steps = total_steps(examples, batch, epochs)
    order = np.concatenate(
        [step_examples(examples, batch, epochs, 3, step) for step in range(steps)]
    )
    assert len(order) == round(examples * epochs)
    for epoch in range(int(epochs)):
        assert sorted(order[epoch * examples : (epoch + 1) * examples]) == list(range(examples))
    assert list(order[:examples]) != list(range(examples)), "not shuffled"
    assert list(order[:examples]) != list(order[examples : 2 * examples]), "one shuffle for all"
    other = step_examples(examples, batch, epochs, 4, 0)
    assert list(other) != list(order[: len(other)]), "the seed changes nothing"


def test_alpacas_run_has_its_number_of_steps():
    assert total_steps(52002, 128, 3) == 1219


@settings(max_examples=100, deadline=None)
@given(
    examples=st.integers(1, 30),
    batch=st.integers(1, 40),
    epochs=st.integers(1, 4) | st.floats(0.5, 4),
    seed=st.integers(0, 9),
)
def test_steps_are_full_but_the_last_and_there_are_as_many_as_said(examples, batch, epochs, seed):
    steps, wanted = total_steps(examples, batch, epochs), round(examples * epochs)
    parts = [step_examples(examples, batch, epochs, seed, step) for step in range(steps)]
    assert [len(part) for part in parts[:-1]] == [batch] * max(0, steps - 1)
    assert sum(map(len, parts)) == wanted and (not parts or 1 <= len(parts[-1]) <= batch)
    order = [int(i) for part in parts for i in part]
    for start in range(0, wanted, examples):
        epoch = order[start : start + examples]
        assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(examples))
    # another batch size goes through the same shuffles
    ones = [step_examples(examples, 1, epochs, seed, step)[0] for step in range(wanted)]
    assert order == ones


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_divide_a_step_and_do_not_change_it(ranks):
    lengths = np.random.default_rng(0).integers(5, 200, 70)
    for step in range(total_steps(70, 16, 2)):
        which = step_examples(70, 16, 2, 0, step)
        rows = pack_rows(lengths[which], ranks, 256)
        assert sorted(which[i] for mine in rows for row in mine for i in row) == sorted(which)


def test_the_same_documents_are_packed_the_same_way():
    lengths = np.random.default_rng(0).integers(5, 9, 50)  # many as long as each other
    rows = pack_rows(lengths, 3, 64)
    assert all(pack_rows(lengths.copy(), 3, 64) == rows for _ in range(3))


def test_ranks_without_documents_get_a_row_like_the_others():
    assert pack_rows(np.array([7, 9]), 4, 16) == [[[1]], [[0]], [[]], [[]]]
    assert pack_rows(np.array([16]), 1, 16) == [[[0]]]
    assert pack_rows(np.array([16, 1]), 1, 16) == [[[0], [1]]]
    assert pack_rows(np.array([], int), 2, 16) == [[[]], [[]]]


def test_rows_are_as_few_as_they_can_be():
    assert pack_rows(np.array([8, 8, 8, 8]), 1, 32) == [[[0, 1, 2, 3]]]
    assert [len(mine) for mine in pack_rows(np.full(8, 8), 2, 32)] == [1, 1]
    assert [len(mine) for mine in pack_rows(np.full(9, 8), 2, 32)] == [2, 2]


def test_a_document_longer_than_a_row_is_an_error_and_no_endless_search():
    with pytest.raises(AssertionError):
        pack_rows(np.array([5, 17]), 2, 16)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_rows_hold_every_document_once_and_are_level(ranks):
    draw = np.random.default_rng(ranks)
    for _ in range(20):
        lengths = np.clip(draw.lognormal(4.4, 0.7, draw.integers(1, 200)), 2, 512).astype(int)
        rows = pack_rows(lengths, ranks, 1024)
        assert len(rows) == ranks and len({len(mine) for mine in rows}) == 1
        flat = [row for mine in rows for row in mine]
        assert sorted(i for row in flat for i in row) == list(range(len(lengths)))
        filled = [sum(lengths[row]) if row else 0 for row in flat]
        assert max(filled) <= 1024 and max(filled) - min(filled) <= lengths.max()
        assert len(rows[0]) <= -(-lengths.sum() // (ranks * 1024)) + 2, "rows left half empty"


@pytest.fixture(scope="module")
def examples():
    draw = random.Random(0)
    words = "a red fox ran home in the rain and slept".split()  # noqa: SIM905
    records = [record(" ".join(draw.choices(words, k=draw.randint(1, 30)))) for _ in range(12)]
    return encode_all(records, [""] * 12, TOKENIZER, 60)


@pytest.fixture(scope="module")
def loss_alone(examples):
    """The sum of the examples' losses, each by itself."""
    model, total = small_model(vocab_size=1024).double(), 0.0
    for i in range(len(examples)):
        part = slice(examples.starts[i], examples.starts[i + 1])
        ids, labels = (torch.from_numpy(x[part].astype(int))[None] for x in examples[:2])
        with torch.no_grad():
            total += model(ids, labels=labels).item()
    return total


def test_a_row_is_its_examples_one_behind_the_other(examples):
    row = make_row(examples, np.array([3, 5]), 1, 0)
    ids, labels = (
        np.concatenate([part[examples.starts[i] : examples.starts[i + 1]] for i in (3, 5)])
        for part in (examples.ids, examples.labels)
    )
    assert row.ids[0].tolist() == ids.tolist() and row.labels[0].tolist() == labels.tolist()
    assert row.cu_seqlens.dtype == torch.int32
    assert row.cu_seqlens.tolist() == [0, examples.lengths[3], examples.lengths[[3, 5]].sum()]


def test_rows_for_compiled_kernels_have_few_shapes(examples):
    for which in ([3, 5], [0, 1, 2], list(range(12)), []):
        row = make_row(examples, np.array(which, int), 32, 20)
        assert row.ids.shape == row.labels.shape and row.ids.shape[1] % 32 == 0
        assert len(row.cu_seqlens) == 20 and row.cu_seqlens[-1] == row.ids.shape[1]
        length = examples.lengths[which].sum() if which else 0
        assert (row.labels[0, length:] == IGNORE).all() and row.ids.shape[1] - length <= 32
        assert row.cu_seqlens.diff().min() >= 0
        assert row.cu_seqlens.diff()[: len(which)].tolist() == examples.lengths[which].tolist()
    empty = make_row(examples, np.array([], int), 1, 0)
    assert empty.ids.shape == (1, 1) and empty.labels.tolist() == [[IGNORE]]
    assert empty.cu_seqlens.tolist() == [0, 1]
    full = make_row(examples, np.array([3]), int(examples.lengths[3]), 0)
    assert full.cu_seqlens.tolist() == [0, examples.lengths[3]], "a full row is not filled up"


def test_a_rank_without_documents_takes_part_and_changes_nothing(examples):
    model = small_model(vocab_size=1024)
    for multiple, bounds in ((1, 0), (32, 8)):
        loss = model(**make_row(examples, np.array([], int), multiple, bounds)._asdict())
        loss.backward()
        assert loss.item() == 0
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize(("ranks", "multiple"), [(1, 1), (2, 1), (3, 1), (3, 32), (14, 32)])
def test_packing_changes_no_loss(examples, loss_alone, ranks, multiple):
    model = small_model(vocab_size=1024).double()
    rows = [row for mine in pack_rows(examples.lengths, ranks, 256) for row in mine]
    bounds = 20 if multiple > 1 else 0
    packed = sum(
        model(**make_row(examples, np.array(row, int), multiple, bounds)._asdict()).item()
        for row in rows
    )
    assert packed == pytest.approx(loss_alone, rel=1e-6)
