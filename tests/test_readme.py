"""The README says what is there."""

import ast
import importlib
import re
import shlex

import pytest
from conftest import ROOT, our_modules

README = (ROOT / "README.md").read_text()


def test_the_file_table_is_true():
    listed = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.MULTILINE))
    counted = {file.name: len(file.read_text().splitlines()) for file in our_modules()}
    assert listed.keys() == counted.keys()
    for name, lines in counted.items():
        assert abs(int(listed[name]) - lines) <= 10, f"{name} has {lines} lines"


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


def test_it_is_short_and_starts_with_a_command():
    lines = README.splitlines()
    assert len(lines) <= 200 and "make test" in "\n".join(lines[:30])


def test_every_module_names_the_test_that_shows_it():
    for file in our_modules():
        said = ast.get_docstring(ast.parse(file.read_text()))
        found = re.search(r"Shown by tests/(test_\w+\.py):\s(test_\w+)\.", said)
        assert found, f"{file.name} does not say which test shows what it teaches"
        assert f"def {found[2]}(" in (ROOT / "tests" / found[1]).read_text(), found[0]


def commands() -> list[list[str]]:
    """Every `python FILE …` and `torchrun … FILE …` of the README, from FILE on."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    spans = re.findall(r"`((?:python|torchrun) [^`]+)`", README)
    found = []
    for line in [line for text in (*blocks, *spans) for line in text.splitlines()]:
        for part in re.split(r" && | & ", line.replace("…", "")):
            words = shlex.split(part, comments=True)
            if words[:1] in (["python"], ["torchrun"]) and "-m" not in words:
                start = next(i for i, word in enumerate(words) if word.endswith(".py"))
                found.append(words[start:])
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_is_understood(words, monkeypatch):
    """All of them by their parsers; tests/test_pipeline.py runs one of almost every kind."""
    monkeypatch.setattr("sys.argv", words)
    module = importlib.import_module(words[0].removesuffix(".py"))
    if "--lora" in words and "--data" not in words:  # "and so on" in the table
        words += ["--data", "alpaca_data.json"]
    assert module.parse_args()


def test_commands_are_found():
    files = {words[0] for words in commands()}
    assert len(files) >= 10 and {"fsdp_train.py", "demo.py", "evaluate.py"} <= files
