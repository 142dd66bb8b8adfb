"""bench/farm.py on the scale of a minute: few records, few steps, all methods."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.commands import ROOT

from bench import farm
from dataset import encode_record
from model import IGNORE
from tokenizer import load_tokenizer

TINY = ROOT / "data/tiny-llama"


def run_module(*words) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_log_probs_equal_a_plain_loop():
    records = json.loads((ROOT / "data/sample_train.json").read_text())[:5]
    model, tokenizer = farm.load_model(TINY, dtype=torch.float32), load_tokenizer(TINY)
    for record, found in zip(records, farm.log_probs(TINY, records), strict=True):
        ids, labels, _ = encode_record(record, tokenizer)
        with torch.no_grad():
            logits = model.lm_head(model.model(torch.tensor([ids]))[0]).log_softmax(-1)  # (T, V)
        at = [i for i, label in enumerate(labels) if label != IGNORE]
        expected = sum(logits[i - 1, ids[i]].item() for i in at)
        assert found.item() == pytest.approx(expected, abs=1e-3) and expected < -1


def test_start_prints_its_command_at_once(monkeypatch):
    parts, done = [], subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(farm.subprocess, "run", lambda *_, **options: done)
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=parts.append))
    farm.start("alpaca", "best-of", ROOT / "x", check="exact")
    assert parts == [f"$ python -m alpaca best-of {os.path.relpath(ROOT / 'x')} --check exact\n"]


@pytest.mark.slow
def test_farm_measures_every_method_and_resumes(tmp_path):
    tiny, out = tmp_path / "tiny", tmp_path / "farm"
    run_module("fsdp_train.py", "--max-steps", 120, "--sample-answers", 1, "--out", tiny)
    flags = ("--records", 100, "--fresh", 40, "--max-steps", 2, "--too-far")
    command = ("-m", "bench.farm", "--out", out, "--model-dir", tiny / "model", *flags)
    text = run_module(*command)
    table = (out / "table.md").read_text()
    assert table in text and text.count("fsdp_train.py") == len(farm.METHODS)
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines()[2:]}
    assert rows.keys() == {"before", *farm.METHODS}
    assert rows["before"].endswith("| 0.000 ± 0.000 |")
    for name, chart in (("accuracy", "wording"), ("reward-kl", "IPO")):
        assert f">{chart}" in (out / f"{name}.svg").read_text().replace("● ", "")

    def questions(name):
        return {(r["instruction"], r["input"]) for r in json.loads((out / name).read_text())}

    pairs, shipped = questions("pairs.json"), questions("shipped.json")
    assert pairs and pairs <= questions("train.json")
    assert len(questions("fresh.json")) == 40 and len(shipped) == 240
    assert not questions("fresh.json") & (questions("train.json") | shipped)
    (out / "DPO/fresh.json").unlink()  # as if a run had been killed
    text = run_module(*command)
    assert table in text and "fsdp_train.py" not in text and "samples" not in text
