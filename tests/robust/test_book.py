"""The book, docs/: every chapter's experiment prints what the chapter shows, and every picture is
what docs/pictures.py draws."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import ROOT

from docs.pictures import PICTURES

ORDER = ["model", "tokens", "records", "training", "adapters", "decoding", "selfinstruct"]
ORDER += ["judging", "publishing"]
EXPERIMENT = re.compile(r"^```(python|sh)\n(.*?)^```\n\s*^```text\n(.*?)^```$", re.M | re.S)
FLOAT = re.compile(r"-?\d+\.\d+")


def read_chapter(name: str) -> str:
    return (ROOT / f"docs/{name}.md").read_text()


def section(text: str, title: str) -> str:
    (found,) = re.findall(rf"^## {title}$(.*?)(?=^## |\Z)", text, re.M | re.S)
    return found


def assert_same(shown: str, actual: str) -> None:
    """Words and integers are equal; numbers with a decimal point differ by one in the last digit
    at most."""
    assert FLOAT.sub("#", actual).split() == FLOAT.sub("#", shown).split()
    for a, b in zip(FLOAT.findall(actual), FLOAT.findall(shown), strict=True):
        last = 10 ** -len(b.partition(".")[2])
        assert abs(float(a) - float(b)) < 1.01 * last, f"{a}, not {b}, in:\n{actual}"


@pytest.mark.parametrize("name", ORDER)
def test_experiment_prints_what_the_chapter_shows(name, tmp_path):
    ((language, code, shown),) = EXPERIMENT.findall(section(read_chapter(name), "Experiment"))
    command = [sys.executable, "-"] if language == "python" else ["bash", "-e"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        command, input=code, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert_same(shown, done.stdout)


@pytest.mark.parametrize("name", ORDER)
def test_chapter_has_the_parts_of_a_chapter(name):
    text, number = read_chapter(name), ORDER.index(name) + 1
    assert text.startswith(f"# {number}. ") and text.count("\n") < 150
    assert len(re.findall(r"!\[[^]]{20,}\]\(pictures/\w+\.svg\)", text)) == 1
    assert len(re.findall(r"^```(?:python|sh)$", section(text, "Experiment"), re.M)) == 1
    assert section(text, "Exercises").count("<details><summary>Answer</summary>") == 2
    neighbours = {n for i, n in enumerate(ORDER, 1) if abs(i - number) == 1}
    assert set(re.findall(r"\((\w+)\.md\)", text.splitlines()[-1])) == neighbours


def test_pictures_are_drawn_and_stored():
    files = {file.stem: file for file in ROOT.glob("docs/pictures/*.svg")}
    assert files.keys() == PICTURES.keys()
    shown = "".join([*map(read_chapter, ORDER), (ROOT / "README.md").read_text()])
    for name, draw in PICTURES.items():
        assert_same(files[name].read_text(), draw())
        assert f"pictures/{name}.svg)" in shown, f"no page shows {name}.svg"
