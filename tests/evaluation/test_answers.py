"""Answers to a set: files that are read and written, models in folders, models on servers."""

import json
import shutil

import pytest
from helpers.annotations import read_outputs, write
from helpers.commands import ROOT, assert_refused
from helpers.models import expected
from helpers.teacher_server import Server

from alpaca.common.errors import UserError
from alpaca.common.json_files import read_log
from alpaca.evaluation.answers import describe_files
from alpaca.evaluation.outputs import pair_outputs, read_items
from alpaca.inference.engine import Engine
from alpaca.weights.loading import load_model
from templates import format_prompt
from tokenizer import load_tokenizer

TINY = ROOT / "data/tiny-llama"  # a base model, which seldom ends its answers
FRUIT = {
    "id": "user_oriented_task_0",
    "motivation_app": "Merriam-Webster",
    "instruction": "Name a fruit.",
    "instances": [{"input": "", "output": "Pear"}],
}
COUNT = {
    "id": "user_oriented_task_1",
    "motivation_app": "Grammarly",
    "instruction": "Count the words.",
    "instances": [{"input": "cat dog", "output": "two"}, {"input": "cat", "output": "one"}],
}
ASKED = [("Name a fruit.", ""), ("Count the words.", "cat dog"), ("Count the words.", "cat")]
QUESTIONS = ["Name a fruit.", "Count the words.\n\ncat dog", "Count the words.\n\ncat"]


@pytest.fixture(scope="module")
def engine():
    return Engine(load_model(TINY), load_tokenizer(TINY))


@pytest.fixture
def published(tmp_path):
    """A set in the format of Self-Instruct's user-oriented instructions."""
    file = tmp_path / "s.jsonl"
    file.write_text(f"{json.dumps(FRUIT)}\n{json.dumps(COUNT)}\n")
    return file


def answer(command, out, *more):
    flags = ("--model-dir", TINY, "--max-new-tokens", 6)
    return command("answers", "--out", out, *flags, *more)


def ask_server(command, out, server, file, *more):
    flags = ("--model", "m", "--base-url", server.url, "--retry-wait", 0.01, "--set", file)
    return command("answers", "--out", out, *flags, *more)


# ---------------------------------------------------------------- sets and files of answers


def test_read_items_reads_published_formats(published, tmp_path):
    items = read_items(published)
    assert [item.question for item in items] == QUESTIONS
    assert [item.output for item in items] == ["Pear", "two", "one"]
    assert items[0].dataset == items[0].generator == "s"
    fields = {"output": "A", "generator": "text_davinci_003", "dataset": "helpful_base"}
    file = write(tmp_path / "alpaca_eval.json", [{"instruction": "Why?\n\nSo.", **fields}])
    (item,) = read_items(file, answered=True)
    assert item == ("Why?\n\nSo.", "", "A", "text_davinci_003", "helpful_base")
    (item,) = read_items(write(tmp_path / "bare.json", [{"instruction": "Why?"}]))
    assert item == ("Why?", "", "", "bare", "bare")
    assert len(read_items(ROOT / "data/eval_instructions.jsonl")) == 150


def test_read_items_skips_repeats_and_refuses_two_answers(tmp_path, capsys):
    file = write(tmp_path / "s.json", [{"instruction": "a", "output": n} for n in "xxy"])
    assert len(read_items(file)) == 1 and "2 repeated instructions" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"s.json, record 3: a second answer to 'a'"):
        read_items(file, answered=True)
    mixed = [{"instruction": n, "output": n, "generator": n} for n in "ab"]
    with pytest.raises(UserError, match="answers of 'a' and of 'b'"):
        read_items(write(tmp_path / "m.json", mixed), answered=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"instruction": "a"}\n{"task": "b"}', "line 2: its fields"),
        ('{"instruction": "a", "dataset": 7}', "line 1: dataset is 7"),
        ('{"text": "once"}', "line 1: no instruction in it"),
        ("", "no instructions in it"),
    ],
)
def test_an_error_in_a_set_names_the_place(command, tmp_path, text, message):
    file = tmp_path / "set.jsonl"
    file.write_text(text)
    assert_refused(answer(command, tmp_path / "o", "--set", file), f"{file}", message)
    assert not (tmp_path / "o").exists()


def test_pair_outputs_matches_instructions_in_any_order(tmp_path):
    ours = [{"instruction": n, "output": n + "1", "generator": "m"} for n in "abc"]
    theirs = [{"instruction": n, "output": n + "2", "generator": "b"} for n in "cab"]
    a = write(tmp_path / "a.json", [one | {"dataset": "mine"} for one in ours])
    b = write(tmp_path / "b.json", theirs)
    pairs = pair_outputs(a, b)
    assert (pairs.model, pairs.baseline) == ("m", "b")
    assert list(pairs.all) == [(n, n + "2", n + "1", "b") for n in "abc"], "b.json has no dataset"
    write(b, theirs[:2])
    with pytest.raises(UserError, match=r"1 are in one .* as 'b' in .*a.json; --common"):
        pair_outputs(a, b)
    assert [pair.instruction for pair in pair_outputs(a, b, common=True).all] == ["a", "c"]
    write(b, [{"instruction": "z", "output": "z"}])
    with pytest.raises(UserError, match="4 are in one of them"):
        pair_outputs(a, b, common=True)


# ---------------------------------------------------------------- a model in a folder


def test_local_answers_are_those_of_generate_in_any_batch(command, engine, published, tmp_path):
    """Answer n has the seed --seed + n, whatever is decoded beside it."""
    params, names = {"temperature": 1.5, "max_new_tokens": 6}, {"generator": "warm", "dataset": "s"}
    outputs = [expected(engine, *asked, seed=4 + n, **params) for n, asked in enumerate(ASKED)]
    more = ("--temperature", 1.5, "--seed", 4, "--name", "warm", "--set", published)
    for size in (1, 2):
        out_folder = tmp_path / f"{size}"
        code, out, err = answer(command, out_folder, *more, "--max-batch-size", size)
        assert code == 0 and "3 answers of warm" in out and "3 were cut at 6 tokens" in out, err
        assert read_outputs(out_folder) == [
            {"instruction": question, "output": output} | names
            for question, output in zip(QUESTIONS, outputs, strict=True)
        ]


def test_longest_prompts_come_first_and_too_long_ones_are_left_out(command, tmp_path):
    tasks = [{"instruction": text} for text in ("a", "word " * 2000, "b " * 50, "c " * 9)]
    file = write(tmp_path / "s.json", tasks)
    code, out, err = answer(command, tmp_path / "o", "--set", file, "--max-batch-size", 1)
    assert code == 0 and "too many" in err and "3 answers of tiny-llama" in out
    assert "1 have no answer and are left out: their prompts are too long" in out
    assert [one["id"] for one in read_log(tmp_path / "o/answers.jsonl")] == ["2", "3", "0"]
    answered = [one["instruction"] for one in read_outputs(tmp_path / "o")]
    assert answered == ["a", "b " * 50, "c " * 9]


def test_a_run_resumes_only_with_the_same_model_and_set(command, tmp_path, monkeypatch):
    model = shutil.copytree(TINY, tmp_path / "mine/model")
    file = write(tmp_path / "s.json", [{"instruction": "Name a fruit."}])
    flags = ("--set", file, "--model-dir", model)
    assert answer(command, tmp_path / "o", *flags)[0] == 0
    assert read_outputs(tmp_path / "o")[0]["generator"] == "mine"
    log = tmp_path / "o/answers.jsonl"
    before = log.stat().st_mtime_ns
    assert answer(command, tmp_path / "o", *flags, "--max-batch-size", 3)[0] == 0
    assert log.stat().st_mtime_ns == before, "nothing is asked twice"
    warm = answer(command, tmp_path / "o", *flags, "--temperature", 1)
    assert_refused(warm, "another run", "temperature", "--out")
    (model / "config.json").touch()
    changed = answer(command, tmp_path / "o", *flags)
    assert_refused(changed, "another run", "model's files was")
    shutil.copytree(TINY, model, dirs_exist_ok=True, copy_function=shutil.copy2)
    monkeypatch.chdir(tmp_path)
    relative = ("--set", file, "--model-dir", "mine/model")
    assert answer(command, tmp_path / "o", *relative)[0] == 0
    for _ in range(2):  # a run inside the model's folder is not part of the model
        assert answer(command, model / "answers", *flags)[0] == 0
    write(file, [{"instruction": "Name a tree."}])
    assert_refused(answer(command, tmp_path / "o", *flags), "another run", "set")


def test_a_gguf_file_that_was_replaced_is_another_model(tmp_path):
    (file := tmp_path / "m.gguf").write_bytes(b"GGUF")
    before = describe_files(file, tmp_path / "o")
    file.write_bytes(b"GGUF's")
    assert ", 4 bytes, " in before and ", 6 bytes, " in describe_files(file, tmp_path / "o")


def test_answers_errors_are_one_line_and_write_nothing(command, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-tests-0123")
    out = tmp_path / "o"

    def refuse(words, *flags):
        assert_refused(command("answers", "--out", out, *flags), words)

    refuse("--model-dir is for a model in a folder", "--model", "m", "--model-dir", TINY)
    refuse("--bits is for", "--model", "m", "--bits", 4)
    refuse("--seed is for", "--model", "m", "--seed", 3)
    refuse("the model has no name", "--model", "")
    refuse("--key-env takes the name of", "--model", "m", "--key-env", "MY_KEY2")
    refuse("--price-in", "--model", "m", "--budget", 3)
    for more in (["--base-url", "http://x/v1"], ["--budget", 1], ["--request", '{"a": 1}']):
        refuse(f"{more[0]} is for a server", *more)
    refuse("no such folder", "--model-dir", tmp_path / "x")
    refuse("--model-dir", "--adapter", TINY)
    refuse("none", "--set", tmp_path / "none")
    refuse("top_p", "--top-p", 3)
    assert_refused(command("answers"), "--out")
    assert not out.exists()


# ---------------------------------------------------------------- a model on a server


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_a_server_gets_the_instruction_or_alpacas_prompt(command, published, tmp_path, kind):
    asked = QUESTIONS if kind == "chat" else [format_prompt(*one) for one in ASKED]
    more = ("--kind", kind, "--max-new-tokens", 7, "--stop", "#", "--top-p", 0.5)
    with Server(answer=lambda text: text.upper()) as server:
        code, _, err = ask_server(command, tmp_path / "o", server, published, *more)
        assert code == 0, err
        assert set(server.prompts) == set(asked)
        body = server.bodies[0]
        options = ("model", "max_tokens", "stop", "temperature", "top_p")
        assert [body[name] for name in options] == ["m", 7, ["#"], 0, 0.5]
        assert read_outputs(tmp_path / "o") == [
            {"instruction": q, "output": a.upper(), "generator": "m", "dataset": "s"}
            for q, a in zip(QUESTIONS, asked, strict=True)
        ]
        assert ask_server(command, tmp_path / "o", server, published, *more)[0] == 0
        assert server.seen["answers"] == 3, "nothing is asked twice"


def test_unanswered_instructions_are_left_out_and_asked_again(command, tmp_path):
    file = write(tmp_path / "s.json", [{"instruction": f"Task {n}."} for n in range(8)])
    with Server(answer=lambda text: "" if "7" in text else text) as server:
        server.refuse = lambda body: "Task 5" in body["messages"][0]["content"]
        more = ("--concurrency", 1, "--price-in", 1, "--price-out", 2)
        code, out, err = ask_server(command, tmp_path / "o", server, file, *more)
        assert code == 0 and "1 are empty" in out and "$" in err
        assert "1 have no answer and are left out: run again to retry" in out
        found = [one["instruction"] for one in read_outputs(tmp_path / "o")]
        assert found == [f"Task {n}." for n in range(8) if n != 5]
        server.refuse = lambda body: False
        assert ask_server(command, tmp_path / "o", server, file, *more)[0] == 0
        assert set(server.prompts.values()) == {1} and len(read_outputs(tmp_path / "o")) == 8


def test_settings_may_change_until_there_is_an_answer(command, tmp_path):
    file = write(tmp_path / "s.json", [{"instruction": "Name a fruit."}])
    with Server() as server:
        typo = ask_server(command, tmp_path / "o", server, file, "--model", "nobody")
        assert typo[0] == 2 and "does not exist" in typo[2]
        assert ask_server(command, tmp_path / "o", server, file)[0] == 0
        other = ask_server(command, tmp_path / "o", server, file, "--temperature", 1)
        assert_refused(other, "another run", "temperature")
        money = ("--price-in", 1e6, "--price-out", 1e6, "--budget", 1)
        poor = ask_server(command, tmp_path / "p", server, file, *money)
        assert poor[0] == 2 and "budget of $1" in poor[2] and "none of the 1" in poor[2]
        assert not (tmp_path / "p/model_outputs.json").exists()
