"""`alpaca score`: the table, the picture, and files that do not belong together."""

import json
import math
import re
from xml.etree import ElementTree

import pytest
from helpers.annotations import entry, write
from helpers.commands import assert_refused

from alpaca.common.charts import COLOURS


@pytest.fixture
def score(command):
    return lambda *words: command("score", *words)


def test_rows_follow_the_files_and_the_table_is_sorted(score, tmp_path):
    files = []
    for name, wins in (("poor", 10), ("good", 90), ("fair", 50)):
        entries = [entry(n, 1 + (n < wins), generator_2=name) for n in range(100)]
        files.append(write(tmp_path / f"{name}.json", entries))
    picture = tmp_path / "board.svg"
    code, out, _ = score(*files, "--json", "--plot", picture)
    rows = json.loads(out)
    assert code == 0 and [row["model"] for row in rows] == ["poor", "good", "fair"]
    assert [row["win_rate"] for row in rows] == [10, 90, 50]
    (tmp_path / "poor").mkdir()
    files[0] = files[0].rename(tmp_path / "poor/annotations.json").parent
    lines = score(*files)[1].splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["good", "fair", "poor"]
    assert lines[1].endswith("better") and lines[3].endswith("worse")
    assert lines[2].endswith("too few to tell") and "50.00 ± 5.03" in lines[2]
    assert "40.4–59.6" in lines[2] and "50–50–0" in lines[2]
    assert lines[4] == "against base, judged by judge, length control: joint"
    svg = ElementTree.parse(picture).getroot()
    texts = ["".join(node.itertext()) for node in svg.iter() if node.tag.endswith("text")]
    places = [texts.index(name) for name in ("good", "fair", "poor")]
    assert places == sorted(places)
    dots = [node.get("d") for node in svg.iter() if node.get("fill") == COLOURS[0]]
    across = [240 + share * (720 - 240 - 16) for share in (0.9, 0.5, 0.1)]
    places = [float(re.match(r"M([\d.]+)", dot)[1]) for dot in dots[1:]]  # behind the legend's
    assert places == pytest.approx(across, abs=0.06)


def test_the_table_is_sorted_by_the_length_controlled_rate(score, tmp_path):
    """One model wins where its answers are long, and has the better raw rate because of it."""
    files = []
    for name, long in (("wordy", 80), ("able", 0)):
        won = [n % 8 > 0 if n < long else n % 10 < (2 if long else 6) for n in range(100)]
        texts = ["w" * (300 if n < long else 8) for n in range(100)]
        some = [entry(n, 1 + won[n], generator_2=name, output_2=texts[n]) for n in range(100)]
        files.append(write(tmp_path / f"{name}.json", some))
    rows = json.loads(score(*files, "--json")[1])
    raw, controlled = ([r[k] for r in rows] for k in ("win_rate", "length_controlled_win_rate"))
    assert raw[0] > raw[1] and controlled[0] < controlled[1]
    lines = score(*files)[1].splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["able", "wordy"]


def test_differing_judges_and_baselines_have_columns(score, tmp_path):
    one = [entry(n, 1 + n % 2) for n in range(10)]
    one += [entry(n, 2 - n % 2, generator_2="another") for n in range(10)]
    other = [entry(n, 2, annotator="human", generator_1="gpt") for n in range(10)]
    picture = tmp_path / "p.svg"
    _, out, _ = score(write(tmp_path / "a.json", one + other), "--plot", picture)
    assert out.splitlines()[0].split()[:3] == ["model", "baseline", "judge"]
    assert "against" not in out and "human" in out and "gpt" in out
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["tuned", "tuned", "another"]
    assert out.splitlines()[-1].startswith("no length-controlled rate for one model alone")
    assert "tuned, gpt, human" in picture.read_text()


def test_bars_are_95_percent_and_missing_where_unknown(score, tmp_path):
    entries = [entry(n, 1 + n % 2, generator_2=name) for n in range(100) for name in "ab"]
    file = write(tmp_path / "a.json", entries)
    picture = tmp_path / "p.svg"
    row, _ = json.loads(score(file, "--plot", picture, "--json")[1])
    bars = re.findall(r'd="M([\d.]+) [\d.]+H([\d.]+)"[^>]* stroke="#d55e00"', picture.read_text())
    reach = 1.959964 * row["length_controlled_standard_error"]
    ends = [240 + (50 + side * reach) / 100 * (720 - 240 - 16) for side in (-1, 1)]
    assert [float(end) for end in bars[0]] == pytest.approx(ends, abs=0.06)
    write(file, [entry(0, 2), entry(0, 2, generator_2="b")])
    assert score(file, "--plot", picture)[0] == 0
    assert 'stroke="#d55e00"' not in picture.read_text() and "nan" not in picture.read_text()
    assert 'fill="#d55e00"' in picture.read_text()
    write(file, [entry(0, 2)])
    assert score(file, "--plot", picture)[0] == 0
    assert 'fill="#d55e00"' not in picture.read_text(), "one model has no length-controlled rate"


def test_names_from_files_are_escaped(score, tmp_path):
    file = write(tmp_path / "a.json", [entry(n, 2, generator_2="<script>\x1b[2J") for n in "abc"])
    assert_refused(score(file, "--plot", file), "is an input of this command")
    code, out, _ = score(file, "--plot", tmp_path / "p.svg")
    assert code == 0 and "\x1b" not in out and "\\x1b" in out
    svg = (tmp_path / "p.svg").read_text()
    assert "<script>" not in svg and "&lt;script&gt;" in svg and "\x1b" not in svg


def test_files_that_do_not_belong_together_are_refused(score, tmp_path):
    five = [entry(n, 2) for n in range(5)]
    a = write(tmp_path / "a.json", five)
    b = write(tmp_path / "b.json", [entry(n, 2, generator_2="new") for n in range(1, 6)])
    assert_refused(score(a, a), f"{a}: tuned against base is already in {a}")
    code, out, err = score(a, b, "--json")
    assert code == 0 and [row["n"] for row in json.loads(out)] == [4, 4]
    assert "2 instructions that are not in all of the files are left out" in err
    assert "4 are scored" in err and err.count("\n") == 1
    far = write(tmp_path / "far.json", [entry(9, 2, generator_2="far")])
    assert_refused(score(a, far), "no instruction is in all")
    silent = write(tmp_path / "silent.json", [entry(n, math.nan) for n in range(5)])
    assert_refused(score(silent), f"{silent}: no preference in it")
    assert_refused(score(write(tmp_path / "empty.json", [])), "no annotations in it")
    bad = write(tmp_path / "bad.json", [entry(0, 2), entry(1, "A")])
    assert_refused(score(bad, "--plot", tmp_path / "p.svg"), f"{bad}, record 2: preference 'A'")
    assert not (tmp_path / "p.svg").exists()
    assert_refused(score(tmp_path / "none.json"), "none.json")
    assert_refused(score(), "files")
