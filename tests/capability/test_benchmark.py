"""`alpaca benchmark`: what is asked of the model, the accuracies, and resuming."""

import json
import shutil

import pytest
import torch
from helpers.benchmarks import hub_records, write_jsonl
from helpers.bpe import write_bpe_model
from helpers.commands import assert_refused

from alpaca.capability import benchmark
from alpaca.capability.benchmark import result_rows
from alpaca.capability.scoring import GENERATED, encode_options
from alpaca.capability.tasks import read_tasks
from alpaca.common.json_files import read_log
from alpaca.datagen.checkers import stated_number
from alpaca.evaluation.win_rate import wilson
from alpaca.weights.loading import load_model
from tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model."""
    return write_bpe_model(tmp_path_factory.mktemp("random") / "model")


@pytest.fixture
def benchmark_on(command, folder, tmp_path):
    """What `alpaca benchmark` prints, its lines in the order of the questions, and its results."""

    def invoke(*flags) -> tuple[str, list[dict], dict]:
        out = tmp_path / "out"
        code, printed, err = command("benchmark", "--model-dir", folder, "--out", out, *flags)
        assert code == 0, err
        lines = sorted(read_log(out / "scores.jsonl"), key=lambda line: line["question"])
        return printed, lines, json.loads((out / "results.json").read_text())

    return invoke


def write_task(folder, task: str, count: int):
    return write_jsonl(folder / f"{task}.jsonl", hub_records(task, count))


def test_log_likelihoods_are_those_of_a_plain_loop(folder, benchmark_on, tmp_path):
    tasks = [write_task(tmp_path, task, 3) for task in ("arc", "winogrande", "mmlu")]
    _, lines, _ = benchmark_on("--tasks", *tasks)
    questions = read_tasks(tasks)
    assert [line["place"] for line in lines] == [each.place for each in questions]
    model, tokenizer = load_model(folder).eval(), load_tokenizer(folder)
    for line, asked in zip(lines, questions, strict=True):
        options = encode_options(asked, tokenizer, in_template=False)
        for (context, ids), found, size in zip(
            options, line["log_likelihoods"], line["tokens"], strict=True
        ):
            with torch.inference_mode():
                logits = model(torch.tensor([context + ids[:-1]]))[0, -len(ids) :]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item()
            assert found == pytest.approx(expected, abs=1e-4) and size == len(ids)


def test_generated_answers_prompt_loses_only_its_beginning(folder, benchmark_on, tmp_path, asked):
    records = [{"question": question, "answer": "#### 1"} for question in ("1?", "one " * 40)]
    file = write_jsonl(tmp_path / "test.jsonl", records)
    whole = load_tokenizer(folder).encode(f"Question: {'one ' * 40}\nAnswer:", bos=True)
    positions = load_model(folder).config.max_position_embeddings
    new = positions - len(whole) + 2
    _, lines, _ = benchmark_on("--tasks", file, "--max-new-tokens", new)
    assert asked[1] == whole[2:] and [line["cut"] for line in lines] == [False, True]


def test_generated_answers_are_judged_and_end_at_a_stop_text(
    folder, benchmark_on, tmp_path, asked, monkeypatch
):
    records = [{"question": f"{n}?", "answer": f"So.\n#### {n}"} for n in range(3)]
    file = write_jsonl(tmp_path / "test.jsonl", records)
    flags = ("--tasks", file, "--max-new-tokens", 8, "--shots", 1)
    lines = benchmark_on(*flags)[1]
    texts = [f"Question: 0?\nAnswer: So.\n#### 0\n\nQuestion: {n}?\nAnswer:" for n in (1, 2)]
    assert asked == [load_tokenizer(folder).encode(text, bos=True) for text in texts]
    for line, n in zip(lines, (1, 2), strict=True):
        assert line["right"] is (stated_number(line["output"]) == n) and line["unfinished"]

    assert GENERATED["gsm8k"].stop == ("Question:",)
    output = lines[0]["output"]
    stopped = GENERATED["gsm8k"]._replace(stop=(output[2:5],))
    monkeypatch.setitem(GENERATED, "gsm8k", stopped)
    shutil.rmtree(tmp_path / "out")
    line = benchmark_on(*flags)[1][0]
    assert line["output"] == output[:2] and not line["unfinished"]


def test_rows_are_of_tasks_and_their_subjects():
    lines = [
        {"task": "mmlu", "subject": subject, "right": right, "right_per_token": 1}
        for subject, right in (("law", 1), ("art", 0), ("law", 1), ("law", 0))
    ]
    rows = result_rows([*lines, {"task": "gsm8k", "subject": "", "right": 1}])
    names = [("mmlu", ""), ("mmlu", "art"), ("mmlu", "law"), ("gsm8k", "")]
    assert [(row["task"], row["subject"]) for row in rows] == names
    assert [row["accuracy"] for row in rows] == pytest.approx([50, 0, 200 / 3, 100])
    assert [row["n"] for row in rows] == [4, 1, 3, 1]
    low, high = wilson(2, 4)
    assert (rows[0]["accuracy_low"], rows[0]["accuracy_high"]) == (100 * low, 100 * high)
    assert rows[0]["accuracy_per_token"] == 100 and "accuracy_per_token" not in rows[3]


def test_the_table_and_the_results_agree(benchmark_on, tmp_path):
    tasks = [write_task(tmp_path, task, 4) for task in ("mmlu", "truthfulqa", "boolq")]
    flags = ("--tasks", *tasks, "--name", "mine", "--shots", 1, "--limit", 2)
    printed, lines, results = benchmark_on(*flags)
    assert results["generator"] == "mine" and results["shots"] == 1
    rows = results["results"]
    assert [(row["task"], row["n"]) for row in rows] == [
        ("mmlu", 2),
        ("mmlu", 2),
        ("truthfulqa_mc1", 2),
        ("truthfulqa_mc2", 2),
        ("boolq", 2),
    ]
    assert len(lines) == 8 and len(printed.splitlines()) == 6
    assert f"{rows[2]['accuracy']:.2f}" in printed


def test_a_stopped_benchmark_resumes_and_asks_nothing_twice(command, folder, tmp_path, monkeypatch):
    tasks = [write_task(tmp_path, task, 6) for task in ("winogrande", "arc", "gsm8k")]
    flags = ("benchmark", "--model-dir", folder, "--tasks", *tasks, "--max-new-tokens", 4)
    assert command(*flags, "--out", tmp_path / "whole")[0] == 0
    whole = (tmp_path / "whole/results.json").read_text()

    answered, append = [], benchmark.append_jsonl

    def stop_after(count: int) -> None:
        def append_and_stop(path, line, **options):
            append(path, line, **options)
            answered.append(line["question"])
            if len(answered) == count:
                raise KeyboardInterrupt

        monkeypatch.setattr(benchmark, "append_jsonl", append_and_stop)

    for count in (2, 9, 14):
        stop_after(count)
        assert command(*flags, "--out", tmp_path / "out")[0] == 130
    stop_after(99)
    assert command(*flags, "--out", tmp_path / "out")[0] == 0
    assert sorted(answered) == list(range(18))
    assert (tmp_path / "out/results.json").read_text() == whole
    monkeypatch.setattr(benchmark, "load_from_args", lambda args: pytest.fail("asked again"))
    assert command(*flags, "--out", tmp_path / "out")[0] == 0
    other = command(*flags, "--out", tmp_path / "out", "--shots", 1)
    assert_refused(other, "another run", "what --tasks, --shots and --limit ask", "--out")


def test_the_primer_and_the_template_change_what_is_asked(benchmark_on, tmp_path):
    task = write_task(tmp_path, "truthfulqa", 2)
    (tmp_path / "primer.txt").write_text("Q: Is it?\nA: Yes.\n")
    found = []
    for flags in ((), ("--primer", tmp_path / "primer.txt"), ("--apply-chat-template",)):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        found.append(benchmark_on("--tasks", task, *flags)[1])
    first, *others = ([line["log_likelihoods"] for line in lines] for lines in found)
    assert all(a != b for other in others for a, b in zip(first, other, strict=True))


def test_errors_are_one_line_and_write_nothing(command, tmp_path):
    task = write_task(tmp_path, "boolq", 2)
    cases = (
        (("--shots", 3), "--shots 3: there are only 2 records of boolq"),
        (("--shots", 2), "no record of boolq is left to ask about"),
        (("--shots-from", task), "--shots-from needs --shots"),
        (("--primer", tmp_path / "none"), "none"),
        (("--model-dir", tmp_path / "x"), "no such folder"),
    )
    for flags, words in cases:
        command_line = ("--model-dir", folder, "--out", tmp_path / "o", "--tasks", task, *flags)
        assert_refused(command("benchmark", *command_line), words)
    assert not (tmp_path / "o").exists()
