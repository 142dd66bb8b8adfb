"""The card beside a trained model: filled in, true, and nowhere silent."""

import hashlib
import json
import re
from types import SimpleNamespace

import pytest
from conftest import ROOT

import fsdp_train
import modelcard
from dataset import prompt
from modelcard import TEMPLATE, dataset, model_card, weights

STEPS = [
    {"step": 0, "held_out_loss": 5.5},
    {"step": 1, "loss": 4.25, "tokens": 3600, "tokens_per_s": 2},
    {"step": 2, "loss": 1.125, "tokens": 7200, "tokens_per_s": 4},
    {"step": 2, "held_out_loss": 2.5},
]
NUMBERS = {
    "adapter": False,
    "parameters": 1234567,
    "learned": 7654,
    "positions": 512,
    "examples": 3,
    "supervised": 41,
}


@pytest.fixture
def files(tmp_path):
    base = tmp_path / "some-base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"weights")
    records = [
        {"instruction": "a", "input": "", "output": "b", "provenance": {"teacher": "t-1"}},
        {"instruction": "{c}", "input": "", "output": "d"},
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    return base, tmp_path / "data.json"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_it_tells_base_data_recipe_and_losses(files):
    base, data = files
    sealed = f"SHA-256 `{sha256(data.read_bytes())}`"
    card = model_card(
        "mine", base, [f"{data}:0.5"], str(data), {"lr": 2e-5, "steps": 2}, STEPS, **NUMBERS
    )
    assert f"`some-base`\n\n- `model.safetensors`, SHA-256 `{sha256(b'weights')}`" in card
    assert f"- `data.json`: 2 records, taken 0.5 times, 1 by t-1; {sealed}" in card
    assert "| lr | 2e-05 |" in card and "| steps | 2 |" in card
    assert "training loss 4.250 at the first step, 1.125 at the last" in card
    assert "held-out loss 5.500 before, 2.500 after" in card
    assert "10,800 tokens in 3,600 seconds" in card
    assert prompt("(the instruction)") in card and "7,654 of 1,234,567 parameters" in card
    assert "3 examples of 41 supervised tokens" in card and "than 512 tokens" in card
    assert f"The held-out file: `data.json`: 2 records, 1 by t-1; {sealed}." in card
    assert re.search(r"commit [0-9a-f]{40}|of a copy without its history", card)
    assert str(data.parent) not in card, "where files lay is nobody's business"
    assert "{" not in card


def test_random_weights_and_no_held_out_file_are_said(files):
    card = model_card("mine", None, [str(files[1])], None, {}, STEPS[1:3], **NUMBERS)
    assert "it began with random weights" in card and "- held-out loss" not in card


def test_every_fact_has_its_place():
    asked = set(re.findall(r"\{(\w+)\}", TEMPLATE.read_text()))
    assert asked | {"adapter"} == {
        *("name", "date", "code", "versions", "base", "base_files", "data_files", "device"),
        *("recipe", "results", "prompt", "how", "held_out_file", *NUMBERS),
    }


def test_conversations_and_lines_have_cards_too(tmp_path):
    (tmp_path / "chats.jsonl").write_text('{"messages": []}\n["odd"]\n')
    assert "2 records, they do not say who wrote them" in dataset(str(tmp_path / "chats.jsonl"))
    assert "no longer afterwards" in dataset(str(tmp_path / "gone.jsonl"))  # hours are not lost


def test_the_trainer_writes_it_beside_the_weights(tmp_path, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(fsdp_train, "keep_freed_memory", lambda: None)
    words = ("--out", tmp_path / "run", "--max-steps", 2, "--answers", 0, "--device", "cpu")
    code, _, err = command(fsdp_train, *words)
    assert code == 0, err
    card = (tmp_path / "run/model/README.md").read_text()
    weights = (ROOT / "data/tiny-llama/model.safetensors").read_bytes()
    assert sha256(weights) in card and "| ranks | 1 |" in card
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    first = next(record for line in lines if "loss" in (record := json.loads(line)))
    assert f"training loss {first['loss']:.3f} at the first step" in card
    assert "5,400 examples" in card and "1,066,112 of 1,066,112 parameters" in card


def test_an_adapters_card_says_how_an_adapter_is_asked(files):
    card = model_card("mine", *files[:1], [], None, {}, [], **{**NUMBERS, "adapter": True})
    assert "`python generate.py --model-dir BASE --adapter FOLDER`" in card
    assert "its log was lost" in card


def test_metas_weights_are_sealed_too_and_a_changed_tree_is_told(files, monkeypatch):
    base, _ = files
    (base / "consolidated.00.pth").write_bytes(b"pickled")
    assert f"`consolidated.00.pth`, SHA-256 `{sha256(b'pickled')}`" in weights(base)
    told = {"rev-parse --show-toplevel": str(ROOT), "rev-parse HEAD": "c" * 40}

    def run(words, **how):
        return SimpleNamespace(stdout=told.get(" ".join(words[1:]), "") + "\n")

    monkeypatch.setattr(modelcard.subprocess, "run", run)
    assert modelcard.code() == f"commit {'c' * 40}"
    told["status --porcelain -uno"] = " M model.py"
    assert modelcard.code() == f"commit {'c' * 40}, with changes that are in no commit"
    told["rev-parse --show-toplevel"] = "/somebody/elses"
    assert modelcard.code() == "of a copy without its history"
