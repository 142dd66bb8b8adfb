"""What the benchmarks share, that README quotes no ratio that some day did not reach, and that
`make real` types commands that exist."""

import re
import time
from subprocess import CompletedProcess

import pytest
from helpers.commands import ROOT

from alpaca.__main__ import load_verb
from bench import measure, real

SERVER = "Web server, 15.2M parameters, fp32, CPU, filter and watermark on"
DECODE = "Decode one sequence, 1.1B parameters, CPU"
POOL = "ROUGE-L against a pool, one core, words as frequent as in real instructions"
CHOICE = "Multiple choice after five solved questions, SmolLM2-135M in fp32: questions/s"
BPE = "Byte-level BPE, vocabulary of 2,398: 50,000 records, tokens/s"
DIFF = "Weight diff of 1.1B parameters"
TRAINER = "useful tokens/s, Trainer"
QUOTED = {  # the beginning of a line in README → the tables and lines that its ratios are from
    "training, useful": [(f"Train 15M parameters in {x}", TRAINER) for x in ("fp32", "bf16")],
    "the same in fp32": [
        ("Train 15M parameters in fp32", f"useful tokens/s, {peer}")
        for peer in ("Trainer, grouped", "TRL, packed")
    ],
    "training an adapter": [
        (f"Train an adapter of a 15M-parameter model in {x}", TRAINER) for x in ("fp32", "bf16")
    ],
    "1.1B, tokens/s": [(DECODE, "16 bits, tok/s; transformers")],
    "the same without": [
        (DECODE, f"{bits} bits, decode tok/s; llama.cpp {kind}")
        for bits, kind in ((16, "BF16"), (8, "Q8_0"), (4, "Q4_0"))
    ],
    "16 requests": [
        (SERVER, f"16 at once, tok/s; {peer}") for peer in ("one by one", "continuous batching")
    ],
    "ROUGE-L": [(POOL, "a candidate against 52,000, ms")],
    "multiple choice": [
        (CHOICE, "answers of one token, like MMLU's"),
        (CHOICE, "endings, like HellaSwag's"),
    ],
    "byte-level BPE": [(BPE, "distinct records"), (BPE, "seen before")],
    "weight diff": [(DIFF, "make, s"), (DIFF, "recover, s")],
    "loading": [("Load 2.20 GB of bf16", "load, s")],
}


def test_readme_quotes_at_most_the_lowest_median_of_all_days():
    section = (ROOT / "README.md").read_text().partition("## Results")[2].partition("\n## ")[0]
    lines = re.findall(r"(?m)^\| (?!what |---)(.+?) \| .+ \| (.+) \|$", section)
    lowest, unused = measure.lowest(), dict(QUOTED)
    for what, cell in lines:
        (name,) = [name for name in unused if what.startswith(name)]
        quoted = [float(ratio.replace(",", "")) for ratio in re.findall(r"([\d.,]+)×", cell)]
        for ratio, key in zip(quoted, unused.pop(name), strict=True):
            assert ratio <= lowest[key][0], f"{what}: {ratio}, but {lowest[key]} is recorded"
    assert lines and not unused


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results, and a function that measures with ratios as given, on a day."""
    monkeypatch.setattr(measure, "stamp", lambda packages: "stamp")
    monkeypatch.setattr(measure.store, "__defaults__", (tmp_path,))

    def run(day: str, title: str, *ratios: float) -> None:
        monkeypatch.setattr(time, "strftime", lambda form: day)
        ones = [1.0] * len(ratios)
        measure.report(title, "peer", [("tok/s", [*ratios], ones, True)], [], "note")

    return tmp_path, run


def test_later_run_of_a_day_replaces_its_own_table_only(results):
    folder, run = results
    run("monday", "a", 1, 2, 3, 4, 5)
    run("monday", "b", 5, 6, 7, 8, 9)
    run("monday", "a", 2, 3, 4, 5, 6)
    (file,) = folder.iterdir()
    text = file.read_text()
    assert text.count("### ") == 2 and text.count("note") == 2
    assert "| tok/s | 4 | 1 | **4.00×** | 2.00 to 6.00 |" in text and "**7.00×**" in text


def test_lowest_median_is_that_of_any_day(results):
    folder, run = results
    run("monday", "a", 1, 2, 30, 400, 5000)
    run("tuesday", "a", 1, 2, 20, 400, 5000)
    run("wednesday", "a", 1, 2, 40, 400, 5000)
    assert measure.lowest(folder) == {("a", "tok/s"): (20.0, "tuesday")}


def test_few_turns_are_printed_but_not_stored(results, capsys):
    folder, run = results
    run("monday", "a", 1, 2, 3, 4)
    assert "range of 4 turns" in capsys.readouterr().out and not [*folder.iterdir()]


def test_limits_are_work_by_the_fastest_time(monkeypatch):
    monkeypatch.setattr(measure, "fastest", lambda work, device: work() is None or 0.5)
    assert measure.memory_rate(count=1000) == pytest.approx(4000 / 0.5 / 1e9)
    assert measure.matmul_rate("fp32") == pytest.approx(2 * 1024**3 / 0.5 / 1e9)


def test_real_asks_with_a_command_that_exists(tmp_path, monkeypatch):
    def run_here(typed, **_):
        module, parser = load_verb(typed[3])  # after python -m alpaca
        module.run(parser.parse_args(typed[4:]))
        return CompletedProcess(typed, 0, "")

    monkeypatch.setattr(real.subprocess, "run", run_here)
    records = [{"instruction": "Say it.", "input": word, "output": word} for word in ("a", "b")]
    answers = real.ask(ROOT / "data/tiny-llama", records, tmp_path, "before", stop="\n")
    assert len(answers) == 2
