"""The README says what is there."""

import importlib
import re
import shlex

import pytest
from helpers.commands import ROOT

from alpaca.__main__ import OLD_STYLE, VERBS, load_verb

README = (ROOT / "README.md").read_text()


def test_the_snippet_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(snippet.replace("runs/my-tiny", str(tmp_path / "my-tiny")), {})
    assert capsys.readouterr().out.strip()


def test_links_and_named_files_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_nothing_is_left_to_be_filled_in():
    for file in (*ROOT.glob("*.md"), *ROOT.glob("*/*.md")):
        left = re.findall(r"[A-Z]+_LINE|TODO|TBD|to be written", file.read_text())
        assert not left, f"{file.name}: {left}"


def commands() -> list[list[str]]:
    """Every `alpaca VERB …`, `python FILE …` and `torchrun … FILE …` of the README."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    spans = re.findall(r"`((?:alpaca|python|torchrun) [^`]+)`", README)
    found = []
    for line in [line for text in (*blocks, *spans) for line in text.splitlines()]:
        for part in re.split(r" && | & ", line.replace("…", "")):
            words = shlex.split(part, comments=True)
            if words[:1] == ["alpaca"] and words[2:]:  # a verb alone is a name
                found.append(words)
            if words[:1] in (["python"], ["torchrun"]) and "-m" not in words:
                start = next(i for i, word in enumerate(words) if word.endswith(".py"))
                found.append(words[start:])
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_parses(words, monkeypatch):
    """All of them by their parsers; tests/test_pipeline.py runs one of almost every kind."""
    monkeypatch.setattr("sys.argv", words)
    if words[0] == "alpaca":
        name, _ = VERBS[words[1]]
        if hasattr(importlib.import_module(name), "add_arguments"):
            assert load_verb(words[1])[1].parse_args(words[2:])
            return
        if words[1] not in OLD_STYLE:
            monkeypatch.setattr("sys.argv", words[1:])
    else:
        name = words[0].removesuffix(".py")
    if "--lora" in words and "--data" not in words:  # "and so on" in the table
        words += ["--data", "alpaca_data.json"]
    assert importlib.import_module(name).parse_args()


def test_commands_are_found():
    assert len({tuple(words[:2]) for words in commands()}) >= 10
