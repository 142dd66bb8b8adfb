"""`alpaca compare`: win rates, accuracies and answers of the same models on one page."""

import json
import math
import random
from pathlib import Path
from xml.etree import ElementTree

import pytest
from helpers.annotations import entry, write, write_outputs
from helpers.benchmarks import hub_records, write_jsonl
from helpers.bpe import write_bpe_model
from helpers.commands import assert_refused

from alpaca.capability.compare import describe_answers, mean_interval
from alpaca.evaluation.annotations import make_annotation
from alpaca.evaluation.outputs import pair_outputs
from alpaca.evaluation.win_rate import leaderboard

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def compare(command):
    return lambda *words: command("compare", *words)


def benchmark(folder: Path, name: str, shots: int = 0, **tasks: tuple) -> Path:
    """A folder with results.json as `alpaca benchmark` writes it, from (low, accuracy, high)."""
    folder.mkdir()
    bounds = ("accuracy_low", "accuracy", "accuracy_high")
    rows = [
        {"task": task, "subject": subject, "n": 100} | dict(zip(bounds, interval, strict=True))
        for task, interval in tasks.items()
        for subject in ("", "a subject")
    ]
    content = {"generator": name, "shots": shots, "results": rows}
    (folder / "results.json").write_text(json.dumps(content, indent=2))
    return folder


def judged(path: Path, wins: int, **names) -> Path:
    return write(path, [entry(n, 1 + (n < wins), **names) for n in range(100)])


def cells(out: str) -> dict[str, str]:
    """The table's lines, by what they measure."""
    lines = [line.split("  ", 1) for line in out.splitlines()[1:]]
    return {name: " ".join(rest[0].split()) if rest else "" for name, *rest in lines}


def points(page: str) -> dict[str, tuple[str, str]]:
    """Name in the picture → where its dot is."""
    svg = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    dots = [(dot.get("cx"), dot.get("cy")) for dot in svg.iter(f"{SVG}circle")]
    names = [text.text or "" for text in svg.iter(f"{SVG}text")]
    return dict(zip([n.split("  ")[1] for n in names if "  " in n], dots, strict=True))


def test_results_of_every_kind_meet_by_the_models_name(compare, tmp_path):
    tuned = write_outputs(tmp_path / "answers", "tuned", {"q": "a b c d a b c d"})
    write(tuned / "annotations.json", [entry(n, 1 + (n < 64)) for n in range(100)])
    base = benchmark(tmp_path / "base", "base", mmlu=(25.0, 30.0, 35.0))
    known = benchmark(tmp_path / "known", "tuned", mmlu=(24.0, 29.0, 34.0), arc=(40.0, 50.0, 60.0))
    code, out, err = compare(tuned, base, known)
    assert (code, err) == (0, "") and out.splitlines()[0].split() == ["tuned", "base"]
    (row,) = leaderboard([tuned / "annotations.json"])
    low, high = row["win_rate_low"], row["win_rate_high"]
    assert cells(out) == {
        "win rate against base (judge)": f"64.0 ({low:.1f}–{high:.1f}) baseline",
        "mmlu, 0 shots, 100 questions": "29.0 (24.0–34.0) 30.0 (25.0–35.0)",
        "arc, 0 shots, 100 questions": "50.0 (40.0–60.0)",
        "answers": "1",
        "mean length in characters": "15.0",
        "distinct-1 in %": "50.0",
        "distinct-2 in %": f"{100 * 4 / 7:.1f}",
        "answers with 4 words twice, in %": "100.0",
    }
    lines = [json.dumps(one) for one in json.loads((tuned / "annotations.json").read_text())]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    files = tmp_path / "lines.jsonl", tuned / "model_outputs.json", base / "results.json", known
    assert compare(*files)[1] == out, "files instead of folders, JSONL instead of a list"


def test_what_the_commands_write_is_what_compare_reads(command, compare, tmp_path):
    """`answers` and `benchmark` write; annotations are as `judge` and `blind` make them."""
    model = write_bpe_model(tmp_path / "model")
    task = write_jsonl(tmp_path / "arc.jsonl", hub_records("arc", 4))
    tasks = write_jsonl(tmp_path / "set.jsonl", [{"instruction": f"Task {n}"} for n in range(3)])
    sampling = ("--model-dir", model, "--name", "tuned", "--out")
    assert command("benchmark", "--tasks", task, *sampling, tmp_path / "known")[0] == 0
    words = ("answers", "--set", tasks, "--max-new-tokens", 4, *sampling, tmp_path / "answers")
    assert command(*words)[0] == 0
    answers = tmp_path / "answers/model_outputs.json"
    base = write_outputs(tmp_path / "base", "base", {f"Task {n}": "x" for n in range(3)})
    pairs = pair_outputs(answers, base / "model_outputs.json")
    write(tmp_path / "a.json", [make_annotation(pairs, pair, "ann", 1.5) for pair in pairs.all])
    code, out, err = compare(tmp_path / "known", tmp_path / "answers", tmp_path / "a.json")
    assert (code, err) == (0, "") and out.split("\n")[0].split() == ["tuned"]
    found, (row,) = cells(out), json.loads((tmp_path / "known/results.json").read_text())["results"]
    bounds = f"({row['accuracy_low']:.1f}–{row['accuracy_high']:.1f})"
    assert found["arc, 0 shots, 4 questions"] == f"{row['accuracy']:.1f} {bounds}"
    assert found["win rate against base (ann)"] == "50.0 (12.5–87.5)" and found["answers"] == "3"


def test_raters_of_one_file_are_averaged_by_instruction(compare, tmp_path):
    ann = [entry(0, 2, annotator="ann"), entry(1, 1, annotator="ann"), entry(2, 2, annotator="ann")]
    ben = [entry(0, 1, annotator="ben"), entry(1, None, annotator="ben")]
    eve = [entry(n, None, annotator="eve") for n in range(3)]
    out = compare(write(tmp_path / "annotations.json", [*ann, *ben, *eve]))[1]
    assert cells(out)["win rate against base (ann, ben)"].startswith("50.0 (")  # (1/2 + 0 + 1) / 3


def test_describe_answers_by_hand():
    found = describe_answers(
        ["The cat. The DOG!", "a cat", "", "one two three four, one two three"]
    )
    assert found["distinct-1 in %"] == pytest.approx(100 * 8 / 13)
    assert found["distinct-2 in %"] == pytest.approx(100 * 8 / 10)
    assert found["answers with 4 words twice, in %"] == 0
    assert found["mean length in characters"] == pytest.approx((17 + 5 + 0 + 33) / 4)
    longer = describe_answers(["one two three four. One two three four"])
    assert longer["answers with 4 words twice, in %"] == 100
    assert describe_answers(["", ""])["distinct-2 in %"] == 0


def test_mean_interval_covers_the_mean_of_independent_figures():
    assert mean_interval([(20.0, 30.0, 45.0)]) == (20, 30, 45)
    low, middle, high = mean_interval([(20.0, 30.0, 40.0), (47.0, 50.0, 53.0), (10.0, 10.0, 10.0)])
    assert middle == 30 and high - 30 == 30 - low == pytest.approx(math.sqrt(109) / 3)
    rng = random.Random(0)
    means = sorted((rng.gauss(30, 10 / 2) + rng.gauss(50, 3 / 2) + 10) / 3 for _ in range(20_000))
    assert (means[-500] - means[500]) / 2 == pytest.approx(high - 30, rel=0.05)  # 95 % of them


def test_the_picture_shows_models_that_have_both(compare, tmp_path):
    """On the benchmarks that all of them have; the baseline is at 50 %."""
    page = tmp_path / "page.html"
    results = [
        judged(tmp_path / "a.json", 70, generator_2="a"),
        judged(tmp_path / "b.json", 30, generator_2="b"),
        judged(tmp_path / "c.json", 30, generator_2="c"),  # has no accuracies
        judged(tmp_path / "other.json", 10, generator_2="a", annotator="another judge"),
        benchmark(tmp_path / "A", "a", mmlu=(30.0, 40.0, 50.0), arc=(50.0, 60.0, 70.0)),
        benchmark(tmp_path / "A5", "a", 5, mmlu=(90.0, 95.0, 100.0)),
        benchmark(tmp_path / "B", "b", mmlu=(30.0, 40.0, 50.0), arc=(50.0, 70.0, 80.0)),
        benchmark(tmp_path / "base", "base", mmlu=(30.0, 40.0, 50.0), arc=(50.0, 60.0, 70.0)),
        benchmark(tmp_path / "D", "d", mmlu=(30.0, 40.0, 50.0)),  # has no win rate
    ]
    assert compare(*results, "--out", page)[0] == 0
    text = page.read_text()
    dots = points(text)
    assert list(dots) == ["a", "b", "base"] and "mean accuracy on mmlu, arc<" in text
    assert dots["a"][0] == dots["base"][0] < dots["b"][0]
    heights = [float(dots[name][1]) for name in ("a", "base", "b")]
    assert heights == sorted(heights) and heights[1] == pytest.approx(sum(heights) / 3, abs=0.1)
    assert compare(*results[:4], "--out", page)[0] == 0
    assert "No picture: " in page.read_text() and "<svg" not in page.read_text()


def test_the_page_escapes_names_and_has_no_scripts(compare, tmp_path):
    name = "<script>alert(1)</script>\x1b[2J{0}"
    one = judged(tmp_path / "a.json", 70, generator_2=name, annotator=name, generator_1="<b>")
    known = benchmark(tmp_path / "A", name, **{"<i>": (30.0, 40.0, 50.0)})
    code, out, _ = compare(one, known, "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert code == 0 and "\x1b" not in out + text
    assert all(tag not in text for tag in ("<script", "<b>", "<i>")) and "&lt;script&gt;" in text
    page = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    assert [row.tag for row in page.iter("tr")] == ["tr"] * 3
    assert "default-src 'none'" in text and "{0}" in text


def test_different_instructions_are_compared_with_a_notice(compare, tmp_path):
    a = write_outputs(tmp_path / "a", "a", {"p": "x", "q": "y"})
    b = write_outputs(tmp_path / "b", "b", {"q": "x", "r": "y"})
    one, two = (judged(tmp_path / f"{n}.json", 50, generator_2=n) for n in "ab")
    write(two, json.loads(two.read_text())[:-3])
    code, _, err = compare(a, b, one, two)
    first, second = err.splitlines()
    assert (
        code == 0 and f"{b / 'model_outputs.json'} and {a / 'model_outputs.json'}: 2 inst" in first
    )
    assert "3 instructions are in one only (win rate against base (judge))" in second


def test_results_that_cannot_be_compared_are_refused(compare, tmp_path):
    a = benchmark(tmp_path / "a", "m", mmlu=(30.0, 40.0, 50.0))
    again = benchmark(tmp_path / "again", "m", mmlu=(30.0, 40.0, 50.0))
    words = f"{again / 'results.json'}: mmlu, 0 shots, 100 questions of m a second time"
    assert_refused(compare(a, again), words)
    (tmp_path / "empty").mkdir()
    assert_refused(compare(tmp_path / "empty"), f"{tmp_path / 'empty'}: none of annotations.json")
    for text in ("[]", "", '[{"instruction": "x"}]', "3"):
        (file := tmp_path / "file.json").write_text(text)
        assert_refused(compare(file), f"{file}: neither annotations, nor results of a benchmark")
    (tmp_path / "file.json").write_text("{]")
    assert_refused(compare(tmp_path / "file.json"), "file.json, line 1: not JSON")
    for n, wrong in enumerate((1e9, -1.0)):  # a chart's axis would have 10⁸ marks
        huge = benchmark(tmp_path / f"wrong {n}", "m", mmlu=(30.0, wrong, 50.0))
        words = f"{huge / 'results.json'}: accuracy is {wrong:g}, 0 to 100 was expected"
        assert_refused(compare(huge), words)
    (a / "results.json").write_text('{"results": [{"task": "mmlu", "subject": ""}]}')
    assert_refused(compare(a), f"{a / 'results.json'}: generator is missing, a string")
    assert_refused(compare(tmp_path / "missing.json"), "missing.json")
    silent = write(tmp_path / "silent.json", [entry(0, None)])
    assert_refused(compare(silent), f"{silent}: no preference in it is a number")
