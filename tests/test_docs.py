"""README, docs and docstrings: every command in them is accepted by its parser, links lead to
files, the Python snippet runs. tests/helpers/tour.py runs one command of almost every kind.
"""

import ast
import importlib
import re
import shlex

import pytest
from helpers.commands import FILES, ROOT

from alpaca.__main__ import VERBS, load_verb
from alpaca.common.cli import Parser

PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "data/README.md"]
README = (ROOT / "README.md").read_text()
ROOT_COMMANDS = {"fsdp_train.py", "selfinstruct.py", "weightdiff.py"}


def commands(text: str) -> list[list[str]]:
    """Every `alpaca VERB …`, `python FILE …` and `torchrun FILE …` in a text, from its name on."""
    found = []
    for line in text.replace("\\\n", " ").replace("…", "").splitlines():
        if not re.match(r"\s*([A-Z_]+=\S* )?(alpaca|python|torchrun) ", line):
            continue
        for part in re.split(r" && | &$| & |;", line.partition("   #")[0]):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # a variable set before it
                words.pop(0)
            if words[:1] == ["alpaca"] and words[1:] and words[1] in VERBS:
                found.append(words)
            elif words[:1] in (["python"], ["torchrun"]):
                start = [i for i, word in enumerate(words) if word in ROOT_COMMANDS]
                found += [words[i:] for i in start]
    return found


def shown() -> list[list[str]]:
    """The commands of all pages' code and of all docstrings' indented lines, each once."""
    texts = []
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # names what is no more
            continue
        text = page.read_text()
        texts += re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        texts += re.findall(r"`((?:alpaca|python|torchrun) [^`]+)`", text)
    for tree in (ast.parse(file.read_text()) for file in FILES.values()):
        lines = (ast.get_docstring(tree) or "").replace("\\\n", " ").splitlines()
        texts += [line for line in lines if line.startswith("    ")]
    unique = {tuple(words): words for text in texts for words in commands(text)}
    return list(unique.values())


@pytest.mark.parametrize("words", shown(), ids=" ".join)
def test_command_is_accepted_by_its_parser(words):
    if words[0] == "alpaca":
        _, parser = load_verb(words[1])
        words = words[1:]
    else:
        module = importlib.import_module(words[0].removesuffix(".py"))
        parser = Parser(description=module.__doc__)
        module.add_arguments(parser)
    assert parser.parse_args(words[1:])


def test_commands_of_every_verb_are_shown():
    shown_verbs = {words[1] for words in shown() if words[0] == "alpaca"}
    assert shown_verbs == set(VERBS)
    assert {words[0] for words in shown()} >= ROOT_COMMANDS


def test_readme_snippet_runs(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(snippet, {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_readme_map_names_every_root_module_and_chapter():
    for name in FILES.keys() - {"alpaca", "alpaca.__main__"}:
        top = name.removeprefix("alpaca.").split(".")[0]
        assert f"{top}.py" in README or f"{top}/" in README, name
