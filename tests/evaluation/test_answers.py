"""Answers to a set, killed and resumed; and the leaderboard of annotation files."""

import json
import math
import re
import shutil
import signal
import time
from xml.etree import ElementTree

import pytest
from helpers.annotations import entry, write
from helpers.commands import ROOT, assert_refused, begin
from helpers.models import expected
from helpers.teacher_server import Server

from alpaca.common.files import read_log
from alpaca.evaluation.outputs import pair_outputs, read_items
from alpaca.inference.engine import Engine
from alpaca.weights.loading import load_model
from dataset import format_prompt
from tokenizer import Tokenizer

TINY = ROOT / "data/tiny-llama"  # a base: it goes on, and seldom ends
SET = [
    {
        "id": "user_oriented_task_0",
        "motivation_app": "Merriam-Webster",
        "instruction": "Name a fruit.",
        "instances": [{"input": "", "output": "Pear"}],
    },
    {
        "id": "user_oriented_task_1",
        "motivation_app": "Grammarly",
        "instruction": "Count the words.",
        "instances": [{"input": "cat dog", "output": "two"}, {"input": "cat", "output": "one"}],
    },
]


@pytest.fixture(scope="module")
def engine():
    return Engine(load_model(TINY), Tokenizer(TINY))


def answer(command, out, *more):
    flags = ("--model-dir", TINY, "--max-new-tokens", 12)
    return command("answers", "--out", out, *flags, *more)


def outputs(folder) -> list[dict]:
    return json.loads((folder / "model_outputs.json").read_text())


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# ---------------------------------------------------------------- sets and files of answers


def test_published_forms_load_as_they_are(tmp_path):
    one = write_lines(tmp_path / "user_oriented_instructions.jsonl", SET)
    items = read_items(one)
    assert [item.question for item in items] == [
        "Name a fruit.",
        "Count the words.\n\ncat dog",
        "Count the words.\n\ncat",
    ]
    assert [item.output for item in items] == ["Pear", "two", "one"]
    assert items[0].dataset == items[0].generator == "user_oriented_instructions"
    fields = {"output": "A", "generator": "text_davinci_003", "dataset": "helpful_base"}
    two = write(tmp_path / "alpaca_eval.json", [{"instruction": "Why?\n\nSo.", **fields}])
    (item,) = read_items(two, answered=True)
    assert item == ("Why?\n\nSo.", "", "A", "text_davinci_003", "helpful_base")
    (item,) = read_items(write(tmp_path / "bare.json", [{"instruction": "Why?"}]))
    assert item == ("Why?", "", "", "bare", "bare")
    assert len(read_items(ROOT / "data/eval_instructions.jsonl")) == 150


def test_what_comes_twice_counts_once_and_two_answers_are_refused(tmp_path, capsys):
    file = write(tmp_path / "s.json", [{"instruction": "a", "output": n} for n in "xxy"])
    assert len(read_items(file)) == 1 and "2 repeated instructions" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"s.json, record 3: a second answer to 'a'"):
        read_items(file, answered=True)
    mixed = [{"instruction": n, "output": n, "generator": n} for n in "ab"]
    with pytest.raises(ValueError, match="'b' among those of 'a'"):
        read_items(write(tmp_path / "m.json", mixed), answered=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"instruction": "a"}\n{"task": "b"}', "line 2: it has no instruction"),
        ('{"instruction": "a", "input": 7}', "line 1: input is 7"),
        ('{"instruction": "a", "dataset": 7}', "line 1: dataset is 7"),
        ('{"text": "once"}', "line 1: no instruction in it"),
        ("[1]", "record 1: an object"),
        ("{oops", "line 1: not JSON"),
        ("", "no instructions in it"),
    ],
)
def test_a_mistake_in_a_set_names_the_place(command, tmp_path, text, said):
    file = tmp_path / "set.jsonl"
    file.write_text(text)
    assert_refused(answer(command, tmp_path / "o", "--set", file), f"{file}", said)
    assert not (tmp_path / "o").exists()


def test_pairs_are_of_the_same_instruction_whatever_the_order(tmp_path):
    ours = [{"instruction": n, "output": n + "1", "generator": "m"} for n in "abc"]
    ours = [one | {"dataset": "mine"} for one in ours]
    theirs = [{"instruction": n, "output": n + "2", "generator": "b"} for n in "cab"]
    a, b = write(tmp_path / "a.json", ours), write(tmp_path / "b.json", theirs)
    pairs = pair_outputs(a, b)
    assert (pairs.model, pairs.baseline) == ("m", "b")
    assert list(pairs.all) == [(n, n + "2", n + "1", "b") for n in "abc"], "b.json has no dataset"
    write(b, theirs[:2])
    with pytest.raises(
        ValueError, match=r"1 are in one of them only, such as 'b' in .*a.json; --common"
    ):
        pair_outputs(a, b)
    assert [pair.instruction for pair in pair_outputs(a, b, common=True).all] == ["a", "c"]
    write(b, [{"instruction": "z", "output": "z"}])
    with pytest.raises(ValueError, match="4 are in one of them"):
        pair_outputs(a, b, common=True)


# ---------------------------------------------------------------- answers of a model in a folder


def test_answers_are_generates_in_the_order_of_the_set(command, engine, tmp_path):
    file = write_lines(tmp_path / "s.jsonl", SET)
    code, out, err = answer(command, tmp_path / "o", "--set", file, "--max-batch-size", 2)
    assert code == 0, err
    asked = [("Name a fruit.", ""), ("Count the words.", "cat dog"), ("Count the words.", "cat")]
    assert outputs(tmp_path / "o") == [
        {
            "instruction": f"{instruction}\n\n{given}" if given else instruction,
            "output": expected(engine, instruction, given),
            "generator": "tiny-llama",
            "dataset": "s",
        }
        for instruction, given in asked
    ]
    assert "3 answers of tiny-llama" in out and "3 were cut at 12 tokens" in out


def test_each_answer_has_a_seed_of_its_own_whatever_is_beside_it(command, engine, tmp_path):
    tasks = [{"instruction": "Say " + "word " * n} for n in (1, 30, 2, 20)]
    file = write(tmp_path / "s.json", tasks)
    more = ("--temperature", 1.5, "--seed", 4, "--name", "warm", "--set", file)
    for rows in (1, 3):
        assert answer(command, tmp_path / f"{rows}", *more, "--max-batch-size", rows)[0] == 0
    found = outputs(tmp_path / "1")
    assert found == outputs(tmp_path / "3") and found[0]["generator"] == "warm"
    for n, (task, one) in enumerate(zip(tasks, found, strict=True)):
        assert one["output"] == expected(engine, **task, temperature=1.5, seed=4 + n)


def test_the_longest_come_first_and_what_is_too_long_is_left_out(command, tmp_path):
    tasks = [{"instruction": text} for text in ("a", "word " * 2000, "b " * 50, "c " * 9)]
    file = write(tmp_path / "s.json", tasks)
    code, out, err = answer(command, tmp_path / "o", "--set", file, "--max-batch-size", 1)
    assert code == 0 and "too many" in err
    assert "1 have no answer and are left out: their prompts are too long" in out
    assert [one["id"] for one in read_log(tmp_path / "o/answers.jsonl")] == ["2", "3", "0"]
    assert [one["instruction"] for one in outputs(tmp_path / "o")] == ["a", "b " * 50, "c " * 9]


def test_killed_at_several_points_it_ends_in_the_same_file(command, tmp_path):
    tasks = [{"instruction": f"Say {'word ' * (n % 7)}{n}."} for n in range(30)]
    file = write(tmp_path / "s.json", tasks)
    flags = ["--set", file, "--model-dir", TINY, "--max-new-tokens", 24, "--max-batch-size", 2]
    flags += ["--temperature", 1]
    assert command("answers", "--out", tmp_path / "quiet", *flags)[0] == 0
    log = tmp_path / "o/answers.jsonl"
    for more in (1, 8):
        before = sum(1 for _ in read_log(log))
        process = begin("answers", "--out", tmp_path / "o", *flags)
        while process.is_alive() and sum(1 for _ in read_log(log)) < before + more:
            time.sleep(0.005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / "o/model_outputs.json").exists()
    kept = log.read_bytes()
    with log.open("ab") as torn:  # and once more, in the middle of a line
        torn.write(b'{"id": "29", "outp')
    assert command("answers", "--out", tmp_path / "o", *flags)[0] == 0
    assert log.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    ids = [one["id"] for one in read_log(log)]
    assert sorted(ids, key=int) == [str(n) for n in range(30)]
    assert outputs(tmp_path / "o") == outputs(tmp_path / "quiet")


def test_a_run_goes_on_with_the_same_model_and_set_only(command, tmp_path, monkeypatch):
    model = shutil.copytree(TINY, tmp_path / "mine/model")
    file = write(tmp_path / "s.json", [{"instruction": "Name a fruit."}])
    flags = ("--set", file, "--model-dir", model)
    assert answer(command, tmp_path / "o", *flags)[0] == 0
    assert outputs(tmp_path / "o")[0]["generator"] == "mine"
    before = (tmp_path / "o/answers.jsonl").stat().st_mtime_ns
    assert answer(command, tmp_path / "o", *flags, "--max-batch-size", 3)[0] == 0
    assert (tmp_path / "o/answers.jsonl").stat().st_mtime_ns == before, "nothing is asked twice"
    warm = answer(command, tmp_path / "o", *flags, "--temperature", 1)
    assert_refused(warm, "another run", "temperature", "--out")
    (model / "config.json").touch()
    changed = answer(command, tmp_path / "o", *flags)
    assert_refused(changed, "another run", "model's files was", f"now it is ['{model}, ")
    shutil.copytree(TINY, model, dirs_exist_ok=True, copy_function=shutil.copy2)
    monkeypatch.chdir(tmp_path)
    near = ("--set", file, "--model-dir", "mine/model")
    assert answer(command, tmp_path / "o", *near)[0] == 0, "the same place by another name"
    for _ in range(2):
        assert answer(command, model / "answers", *flags)[0] == 0, "its own files are no model's"
    write(file, [{"instruction": "Name a tree."}])
    assert_refused(answer(command, tmp_path / "o", *flags), "another run", "set")


def test_mistakes_are_one_line_and_write_nothing(command, tmp_path, monkeypatch):
    out = tmp_path / "o"
    assert_refused(answer(command, out, "--model", "m", "--bits", 4), "--model-dir", "--model")
    assert_refused(command("answers", "--out", out, "--model", "m", "--bits", 4), "--bits")
    assert_refused(answer(command, out, "--set", tmp_path / "none"), "none")
    assert_refused(command("answers"), "--out")
    assert_refused(command("blind"), "STEP")
    nowhere = command("answers", "--out", out, "--model-dir", tmp_path / "x")
    assert_refused(nowhere, "no such folder")
    for more in (["--base-url", "http://x/v1"], ["--budget", 1], ["--request", '{"a": 1}']):
        assert_refused(command("answers", "--out", out, *more), more[0], "--model")
    served = ("answers", "--out", out, "--model")
    assert_refused(command(*served, ""), "--model ''")
    for name in ("model=m", "m,n"):
        assert_refused(command(*served, name), f"--model {name!r} is no name of a model")
    assert_refused(command(*served, "m", "--seed", 3), "--seed")
    assert_refused(command(*served, "m", "--budget", 3), "--price-in")
    assert_refused(command("answers", "--out", out, "--adapter", TINY), "--model-dir")
    assert_refused(answer(command, out, "--top-p", 3), "top_p")
    assert not out.exists()


def test_what_has_no_answer_yet_may_be_begun_otherwise(command, tmp_path):
    file = write(tmp_path / "s.json", [{"instruction": "Name a fruit."}])
    with Server() as server:
        typo = served(command, tmp_path / "o", server, file, "--model", "nobody")
        assert typo[0] == 2 and "does not exist" in typo[2]
        assert served(command, tmp_path / "o", server, file)[0] == 0
        other = served(command, tmp_path / "o", server, file, "--temperature", 1)
        assert_refused(other, "another run", "temperature")
    assert answer(command, tmp_path / "p", "--set", file)[0] == 0


# ---------------------------------------------------------------- answers of a server


def served(command, out, server, file, *more):
    flags = ("--model", "m", "--base-url", server.url, "--retry-wait", 0.01, "--set", file)
    return command("answers", "--out", out, *flags, *more)


def test_a_chat_is_asked_as_a_user_asks_and_a_base_with_alpacas_prompt(command, tmp_path):
    file = write_lines(tmp_path / "s.jsonl", SET)
    questions = ["Name a fruit.", "Count the words.\n\ncat dog", "Count the words.\n\ncat"]
    prompts = [format_prompt("Name a fruit."), format_prompt("Count the words.", "cat dog")]
    prompts.append(format_prompt("Count the words.", "cat"))
    for kind, asked in (("chat", questions), ("completions", prompts)):
        with Server(answer=lambda text: text.upper()) as server:
            more = ("--kind", kind, "--max-new-tokens", 7, "--stop", "#", "--top-p", 0.5)
            code, _, err = served(command, tmp_path / kind, server, file, *more)
            assert code == 0, err
            assert set(server.prompts) == set(asked)
            body = server.bodies[0]
            assert (body["max_tokens"], body["stop"], body["temperature"]) == (7, ["#"], 0)
            assert body["top_p"] == 0.5 and body["model"] == "m"
            assert outputs(tmp_path / kind) == [
                {"instruction": q, "output": a.upper(), "generator": "m", "dataset": "s"}
                for q, a in zip(questions, asked, strict=True)
            ]
            assert served(command, tmp_path / kind, server, file, *more)[0] == 0
            assert server.seen["answers"] == 3, "nothing is asked twice"


def test_what_a_server_does_not_answer_is_left_out_and_asked_again(command, tmp_path):
    tasks = [{"instruction": f"Task {n}."} for n in range(8)]
    file = write(tmp_path / "s.json", tasks)
    with Server(answer=lambda text: "" if "7" in text else text) as server:
        server.refuse = lambda body: "Task 5" in body["messages"][0]["content"]
        more = ("--concurrency", 1, "--price-in", 1, "--price-out", 2)
        code, out, err = served(command, tmp_path / "o", server, file, *more)
        assert code == 0 and "1 are empty" in out and "$" in err
        assert "1 have no answer and are left out: run again to retry" in out
        assert [one["instruction"] for one in outputs(tmp_path / "o")] == [
            f"Task {n}." for n in range(8) if n != 5
        ]
        server.refuse = lambda body: False
        assert served(command, tmp_path / "o", server, file, *more)[0] == 0
        assert set(server.prompts.values()) == {1} and len(outputs(tmp_path / "o")) == 8
    with Server({"500": 1}) as server:
        code, _, err = served(command, tmp_path / "p", server, file, "--max-retries", 0)
        assert code == 2 and not (tmp_path / "p/model_outputs.json").exists()


# ---------------------------------------------------------------- score


def score(command, *more):
    return command("score", *more)


def test_a_leaderboard_in_the_order_of_the_files_and_sorted_for_people(command, tmp_path):
    files = []
    for name, wins in (("poor", 10), ("good", 90), ("fair", 50)):
        entries = [entry(n, 1 + (n < wins), generator_2=name) for n in range(100)]
        files.append(write(tmp_path / f"{name}.json", entries))
    picture = tmp_path / "board.svg"
    code, out, _ = score(command, *files, "--json", "--plot", picture)
    rows = json.loads(out)
    assert code == 0 and [row["model"] for row in rows] == ["poor", "good", "fair"]
    assert [row["win_rate"] for row in rows] == [10, 90, 50]
    code, out, _ = score(command, *files)
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["good", "fair", "poor"]
    assert lines[1].endswith("better") and lines[3].endswith("worse")
    assert lines[2].endswith("too few to tell") and "50.00 ± 5.03" in lines[2]
    assert "40.4–59.6" in lines[2] and "50–50–0" in lines[2]
    assert lines[4] == "against base, judged by judge"
    svg = ElementTree.parse(picture).getroot()
    texts = ["".join(node.itertext()) for node in svg.iter() if node.tag.endswith("text")]
    places = [texts.index(name) for name in ("good", "fair", "poor")]
    assert places == sorted(places)
    circles = [float(node.get("cx")) for node in svg.iter() if node.tag.endswith("circle")]
    across = [240 + share * (720 - 240 - 16) for share in (0.9, 0.5, 0.1)]
    assert circles[::2] == pytest.approx(across, abs=0.06)


def test_several_judges_and_baselines_are_named(command, tmp_path):
    one = [entry(n, 1 + n % 2) for n in range(10)]
    other = [entry(n, 2, annotator="human", generator_1="gpt") for n in range(10)]
    _, out, _ = score(command, write(tmp_path / "a.json", one + other))
    assert out.splitlines()[0].split()[:3] == ["model", "baseline", "judge"]
    assert "against" not in out and "human" in out and "gpt" in out


def test_a_picture_s_bars_are_95_per_cent_and_missing_where_nobody_knows(command, tmp_path):
    file = write(tmp_path / "a.json", [entry(n, 1 + n % 2) for n in range(100)])
    picture = tmp_path / "p.svg"
    (row,) = json.loads(score(command, file, "--plot", picture, "--json")[1])
    bars = re.findall(r'd="M([\d.]+) [\d.]+H([\d.]+)" stroke="#d1570a"', picture.read_text())
    reach = 1.959964 * row["length_controlled_standard_error"]
    ends = [240 + (50 + side * reach) / 100 * (720 - 240 - 16) for side in (-1, 1)]
    assert [float(end) for end in bars[0]] == pytest.approx(ends, abs=0.06)
    write(file, [entry(0, 2)])
    assert score(command, file, "--plot", picture)[0] == 0
    assert 'stroke="#d1570a"' not in picture.read_text() and "nan" not in picture.read_text()


def test_the_table_is_sorted_by_the_controlled_rate(command, tmp_path):
    """One wins where it is long, and has the better raw rate by it."""
    files = []
    for name, long in (("wordy", 80), ("able", 0)):
        won = [n % 8 > 0 if n < long else n % 10 < (2 if long else 6) for n in range(100)]
        texts = ["w" * (300 if n < long else 8) for n in range(100)]
        some = [entry(n, 1 + won[n], generator_2=name, output_2=texts[n]) for n in range(100)]
        files.append(write(tmp_path / f"{name}.json", some))
    rows = json.loads(score(command, *files, "--json")[1])
    raw, controlled = ([r[k] for r in rows] for k in ("win_rate", "length_controlled_win_rate"))
    assert raw[0] > raw[1] and controlled[0] < controlled[1]
    lines = score(command, *files)[1].splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["able", "wordy"]


def test_names_from_files_steer_no_terminal_and_no_picture(command, tmp_path):
    odd = "<script>\x1b[2J"
    file = write(tmp_path / "a.json", [entry(n, 2, generator_2=odd) for n in range(7)])
    code, out, _ = score(command, file, "--plot", tmp_path / "p.svg")
    assert code == 0 and "\x1b" not in out and "\\x1b" in out
    svg = (tmp_path / "p.svg").read_text()
    assert "<script>" not in svg and "&lt;script&gt;" in svg and "\x1b" not in svg


def test_a_mistake_in_an_annotation_is_one_line_and_no_picture(command, tmp_path):
    file = write(tmp_path / "a.json", [entry(0, 2), entry(1, "A")])
    refused = score(command, file, "--plot", tmp_path / "p.svg")
    assert_refused(refused, f"{file}, record 2: preference 'A'")
    assert not (tmp_path / "p.svg").exists()


def test_files_that_do_not_belong_together_are_one_line(command, tmp_path):
    a = write(tmp_path / "a.json", [entry(n, 2) for n in range(5)])
    b = write(tmp_path / "b.json", [entry(n, 2, generator_2="new") for n in range(1, 6)])
    told = (f"{b}: new against base", "2 are in one of them only", "'instruction 0'")
    assert_refused(score(command, a, b), *told)
    assert_refused(score(command, a, a), "already")
    code, said, err = score(command, a, b, "--common", "--json")
    assert code == 0 and [row["n"] for row in json.loads(said)] == [4, 4]
    assert "2 instructions that are not in all" in err
    c = write(tmp_path / "d.json", [entry(9, 2, generator_2="far")])
    assert_refused(score(command, a, c, "--common"), "no instruction is in all")
    silent = write(tmp_path / "c.json", [entry(n, math.nan) for n in range(5)])
    assert_refused(score(command, silent), "no preference")
    assert_refused(score(command, tmp_path / "none.json"), "none.json")
    assert_refused(score(command), "files")
