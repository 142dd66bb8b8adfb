"""Published data formats, errors that name the record, and weighted mixtures of files."""

import gzip
import json

import pytest

from alpaca.common.errors import UserError
from alpaca.datagen.formats import Origin, group_by_source, load_mixture, load_records

ALPACA = '{"instruction": "Say hi.", "input": "", "output": "hi"}'
RECORD = json.loads(ALPACA)


def written(path, content) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def conversation(*turns) -> str:
    return json.dumps({"conversations": [{"from": role, "value": text} for role, text in turns]})


FILES = {
    "list": f"[{ALPACA},\n {ALPACA}]",
    "indented list": json.dumps([RECORD] * 2, indent=4),
    "lines": f"{ALPACA}\n\n{ALPACA}\n",
    "byte order mark and carriage returns": b"\xef\xbb\xbf\r\n" + f"{ALPACA}\r\n{ALPACA}".encode(),
    "more fields": ALPACA[:-1] + ', "family": 7, "text": "all of it"}\n' + ALPACA,
    "no input": '[{"instruction": "Say hi.", "output": "hi"}, '
    '{"instruction": "Say hi.", "input": null, "output": "hi"}]',
    "gzip": gzip.compress(f"{ALPACA}\n{ALPACA}".encode()),
    "Dolly": '{"instruction": "Say hi.", "context": "", "response": "hi", "category": "qa"}\n' * 2,
    "TRL": '[{"prompt": "Say hi.", "completion": "hi"}, {"prompt": "Say hi.", "completion": "hi"}]',
    "GSM8K": '{"question": "Say hi.", "answer": "hi"}\n' * 2,
    "HC3": '{"question": "Say hi.", "human_answers": ["hi"], "chatgpt_answers": ["hi"]}',
    "seeds": '{"id": "seed_0", "instruction": "Say hi.", "instances": '
    '[{"input": "", "output": "hi"}, {"output": "hi"}]}',
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES.keys())
def test_every_file_format_gives_the_same_records(tmp_path, content):
    assert load_records(written(tmp_path / "data", content)) == [RECORD] * 2


def test_conversations_with_every_name_of_a_role_and_plain_text(tmp_path):
    turns = [("system", "a"), ("user", "b"), ("assistant", "c"), ("human", "d"), ("chatgpt", "e")]
    lines = conversation(*turns, ("human", "f"), ("gpt", "g")) + '\n{"text": "Once"}\n'
    chat, text = load_records(written(tmp_path / "data.jsonl", lines))
    roles = ["system", *["user", "assistant"] * 3]
    assert [message["role"] for message in chat["messages"]] == roles
    assert [message["content"] for message in chat["messages"]] == list("abcdefg")
    assert text == {"text": "Once"}


def test_unicode_line_separators_do_not_end_a_line(tmp_path):
    odd = {**RECORD, "output": "one\u2028two\x85three\x0cfour"}
    lines = "\n".join(json.dumps(each, ensure_ascii=False) for each in (odd, odd))
    assert load_records(written(tmp_path / "data.jsonl", lines)) == [odd, odd]


BROKEN = {
    "bad line": (f"{ALPACA}\n{{oops\n", "line 2: not JSON"),
    "bad list": (f"[{ALPACA},\n{ALPACA},\n{{oops]", "data.json: not JSON", "line 3"),
    "two on a line": (f"{ALPACA}\n\n{ALPACA} {ALPACA}", "line 3: not JSON"),
    "an object over several lines": ("{\n" + ALPACA[1:], "line 1: not JSON"),
    "text after the list": (f"[{ALPACA}]\n{ALPACA}", "not JSON", "line 2"),
    "list of lists": (f"[[{ALPACA}]]", "record 1: an object"),
    "endless nesting": ("[\n" + "[" * 10**5, "nested more than 64 deep"),
    "number": (f"[{ALPACA},\n\n 5]", "record 2: an object"),
    "no output": (f'{ALPACA}\n{{"instruction": "x"}}', "line 2: it has no output"),
    "no instruction": (
        '[{"output": "x"}]',
        "record 1: its fields ('output') fit no known",
    ),
    "a comparison": ('{"prompt": "x", "chosen": "y", "rejected": "z"}', "--objective dpo"),
    "two answers": ('{"instruction": "x", "output_1": "y"}', "line 1: it compares two answers"),
    "empty instruction": ('{"instruction": " ", "output": "x"}', "line 1: instruction is empty"),
    "output a number": ('[\n{"instruction": "x", "output": 5}]', "record 1: output is 5"),
    "input a list": ('{"instruction": "x", "input": ["a"], "output": "y"}', "input is"),
    "output null": ('{"instruction": "x", "output": null}', "output is missing"),
    "surrogate": ('{"instruction": "x", "output": "\\ud800"}', "half a surrogate pair"),
    "no instances": ('{"instruction": "x", "instances": []}', "instances must be a list"),
    "instance without output": ('{"instruction": "x", "instances": [{}]}', "it has no output"),
    "text a number": ('{"text": 5}', "line 1: text is 5"),
    "empty file": (" \n ", "no records"),
    "empty list": ("[]", "no records"),
    "not UTF-8 after a mark": (b"\xef\xbb\xbf" + ALPACA.encode() + b"\n\xff", "line 2: not UTF-8"),
    "UTF-16": (ALPACA.encode("utf-16"), "line 1: not UTF-8"),
    "robot": (conversation(("robot", "x")), "line 1: a turn is from 'robot'; 1 of 1"),
    "answer first": (conversation(("gpt", "x")), "line 1: no question has an answer"),
    "two questions": (conversation(("human", "x"), ("human", "y")), "no question has an answer"),
    "no answer": (conversation(("human", "x")), "no question has an answer"),
    "late system": (
        conversation(("human", "x"), ("system", "y")),
        "a system turn is not",
    ),
    "no turns": ('{"conversations": []}', "no question has an answer"),
    "no role": ('{"conversations": [{"value": "x"}]}', "a turn is from 'None'"),
    "value a number": (conversation(("human", 5)), "a turn has no text"),
    "empty turn": (conversation(("human", "x"), ("gpt", " ")), "a turn is empty"),
    "weight": (
        '{"messages": [{"role": "user", "content": "x"}, '
        '{"role": "assistant", "content": "y", "weight": 0}]}',
        "an answer has weight 0",
    ),
    "history": (ALPACA[:-1] + ', "history": [["a", "b"]]}', "a system message or a history"),
    "system": (ALPACA[:-1] + ', "system": "Be brief."}', "a system message or a history"),
    "a turn of text": ('{"conversations": ["x"]}', "a turn is not an object"),
    "turns not a list": ('{"conversations": "x"}', "the turns are not a list"),
    "replies a text": ('{"prompt": {"replies": "x"}}', "replies are not a list of objects"),
    "completion a text": ('{"prompt": [], "completion": "x"}', "completion is "),
    "answers a text": ('{"question": "x", "chatgpt_answers": "y"}', "chatgpt_answers is "),
    "damaged gzip": (gzip.compress(ALPACA.encode())[:-9], "data.json: damaged gzip"),
}


@pytest.mark.parametrize(("content", "words"), [(c, w) for c, *w in BROKEN.values()], ids=BROKEN)
def test_broken_file_error_names_the_record_and_the_fault(tmp_path, content, words):
    with pytest.raises(UserError) as error:
        load_records(written(tmp_path / "data.json", content))
    message = str(error.value)
    assert "data.json" in message and "\n" not in message and len(message) < 300
    assert all(word in message for word in words), message


# ---------------------------------------------------------------- mixtures


@pytest.fixture
def two_files(tmp_path):
    for name in "ab":
        records = [{**RECORD, "output": f"{name}{i}"} for i in range(10)]
        written(tmp_path / f"{name}.json", json.dumps(records))
    return f"{tmp_path}/a.json", f"{tmp_path}/b.json"


def test_mixture_repeats_or_samples_files_reproducibly(two_files):
    a, b = two_files

    def outputs(*specs, seed=1):
        return [record["output"] for record in load_mixture(specs, seed)[0]]

    assert outputs(a, b) == [f"a{i}" for i in range(10)] + [f"b{i}" for i in range(10)]
    half = outputs(a, f"{b}:0.5")
    assert len(half) == 15 and len({text for text in half if text[0] == "b"}) == 5
    assert half == outputs(a, f"{b}:0.5")
    assert len({tuple(outputs(f"{b}:0.5", seed=seed)) for seed in range(5)}) > 1
    more = outputs(f"{a}:2.5")
    assert len(more) == 25 and all(more.count(f"a{i}") in (2, 3) for i in range(10))


def test_mixture_origins_name_file_and_record(two_files):
    records, origins = load_mixture([f"{two_files[0]}:1.5", f"{two_files[1]}:0.3"], 0)
    assert len(records) == len(origins) == 18 and origins[2].place == f"{two_files[0]}, record 3"
    for record, origin in zip(records, origins, strict=True):
        file, number = origin.place.split(", record ")
        assert record == load_records(file)[int(number) - 1]


def test_mixture_origin_is_the_records_place_in_its_file(tmp_path):
    hc3 = {"question": "Why?", "human_answers": ["a", "b"], "chatgpt_answers": ["c"]}
    file = written(tmp_path / "a.jsonl", f"{json.dumps(hc3)}\n\n{ALPACA}\n")
    places = [origin.place for origin in load_mixture([file], 0)[1]]
    assert places == [f"{file}, line 1"] * 3 + [f"{file}, line 3"]


def test_mixture_takes_a_colon_in_a_file_name(tmp_path):
    written(tmp_path / "at:2", ALPACA)
    written(tmp_path / "a:b.json", ALPACA)
    assert len(load_mixture([tmp_path / "at:2"], 0)[0]) == 1
    origin = Origin(f"{tmp_path}/at:2, line 1", "at:2", "")
    assert load_mixture([f"{tmp_path}/at:2:3"], 0)[1] == [origin] * 3
    assert len(load_mixture([tmp_path / "a:b.json", f"{tmp_path}/a:b.json:2"], 0)[0]) == 3
    with pytest.raises(FileNotFoundError, match="c:d"):
        load_mixture([f"{tmp_path}/c:d"], 0)


def test_source_is_a_records_own_or_its_files_name(tmp_path):
    """Two files of one name differ by their folder; control characters are escaped."""
    tree = '{"source": "oasst", "prompt": {"text": "a", "role": "prompter", "lang": "de", '
    tree += '"replies": [{"text": "b", "role": "assistant", "lang": "en"}]}}'
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        own = [RECORD | {"source": source} for source in ("a\x1b[2J\n", " ", 5)]
        lines = [tree, *map(json.dumps, own), json.dumps(RECORD | {"lang": "fr"})]
        written(tmp_path / name / "data.jsonl", "\n".join(lines))
    file = f"{tmp_path}/one/data.jsonl"

    def about(*files):
        return [(origin.source, origin.language) for origin in load_mixture(files, 0)[1]]

    given = [("oasst", "de"), ("a\\x1b[2J", "")]
    name = "data.jsonl"
    assert about(file, file) == [*given, (name, ""), (name, ""), (name, "fr")] * 2
    two = about(file, f"{tmp_path}/two/data.jsonl")
    assert two[:3] == [*given, ("one/data.jsonl", "")] and two[-1] == ("two/data.jsonl", "fr")


def test_sources_are_grouped_by_size_and_the_smallest_join():
    origins = [Origin("", source, "") for source in "abbca"]
    assert list(group_by_source(origins).items()) == [("a", [0, 4]), ("b", [1, 2]), ("c", [3])]
    groups = group_by_source([Origin("", f"{i % 40}", "") for i in range(60)])
    assert len(groups) == 20 and groups["(21 smaller sources)"] == [*range(19, 40), 59]
    assert len(groups["0"]) == 2 and sum(map(len, groups.values())) == 60


def test_mixture_refuses_weights_out_of_range_or_too_small(two_files):
    for weight in ("0", "-1", "nan", "inf", "1000"):
        with pytest.raises(UserError, match=rf"a\.json:{weight}: .*above 0 and below 1000"):
            load_mixture([f"{two_files[0]}:{weight}"], 0)
    with pytest.raises(UserError, match="no record"):
        load_mixture([f"{two_files[0]}:0.01"], 0)
