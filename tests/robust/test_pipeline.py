"""`make tour` with shorter trainings, in one process."""

import importlib
import re
from html import escape
from pathlib import Path

import pytest
import torch
from helpers.commands import ROOT
from helpers.tour import EXPECTED, Tour, take


@pytest.fixture
def in_process(command, monkeypatch):
    """Commands in this process: importing torch a dozen times would take most of the time."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OPENAI_API_KEY", "")
    monkeypatch.setattr("fsdp_train.keep_freed_memory", lambda: None)
    threads = torch.get_num_threads()

    def run(words: list[str]) -> str:
        if words[0] == "alpaca":
            code, out, err = command(*words[1:])
        else:
            code, out, err = command(importlib.import_module(Path(words[1]).stem), *words[2:])
        assert code == 0, f"{words}\n{out}\n{err}"
        return out

    yield run
    torch.set_num_threads(threads)


def test_pipeline_end_to_end(tmp_path, in_process):
    seen = take(Tour(tmp_path, short=True, show=lambda line: None, runner=in_process))
    assert len(seen["instructions"]) >= 40 and seen["instructions"][0]["instruction"]
    first, last = map(float, re.search(r"held out ([\d.]+) → ([\d.]+)", seen["trained"]).groups())
    assert last < 0.5 * first
    first, last = map(float, re.search(r"held out ([\d.]+) → ([\d.]+)", seen["adapted"]).groups())
    assert last < first
    assert seen["alpaca"] == seen["recovered"]
    marks = {n: float(re.search(r"z +(\S+)", seen[n])[1]) for n in ("demo", "other")}
    assert marks["demo"] > 5 and abs(marks["other"]) < 4, marks
    (row,) = re.findall(r"^tuned .*", seen["score"], re.MULTILINE)
    assert f" {len(EXPECTED) // 5} " in row, row
    page = (tmp_path / "index.html").read_text()
    links = re.findall(r'(?:href|src)="([^"]+)"', page)
    assert len(links) > 9 and all((tmp_path / link).exists() for link in links), links
    assert "<script" not in page and str(tmp_path) not in page
    for record in seen["instructions"][:3]:
        assert escape(record["instruction"]) in page
