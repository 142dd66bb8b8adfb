"""The card beside a trained model: filled in, true, and nowhere silent."""

import hashlib
import json
import re
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.commands import ROOT

import fsdp_train
from alpaca.training import memory_plan, model_card
from alpaca.training.model_card import dataset, weights
from alpaca.weights.lora import LoraConfig
from dataset import IGNORE, Examples, format_prompt
from model import LlamaConfig

CONFIG = LlamaConfig(500, 64, 176, 3, 4, max_position_embeddings=512)
RECIPE = {"lr": 2e-5, "batch_size": 2, "data": "elsewhere", "lora": None}


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


def card_of(base, data, held_out=None, lora=None) -> str:
    """Of a run on three examples of 7 tokens, of which 5, 1 and 3 are learned."""
    labels = np.arange(21, dtype=np.int32)
    labels[[0, 1, *range(7, 13), 14, 15, 16, 17]] = IGNORE
    train = Examples(labels, labels, np.array([0, 7, 14, 21]), [""] * 3, {})
    args = SimpleNamespace(
        out=Path("runs/mine"), model_dir=base, data=data, eval_data=held_out, lora=lora
    )
    return model_card.model_card(args, CONFIG, train, RECIPE, "2 steps; loss 4.250 → 1.125")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_it_tells_base_data_recipe_and_losses(files):
    base, data = files
    sealed = f"SHA-256 `{sha256(data.read_bytes())}`"
    card = card_of(base, [f"{data}:0.5"], held_out=data)
    assert f"`some-base`\n\n- `model.safetensors`, SHA-256 `{sha256(b'weights')}`" in card
    assert f"- `data.json`: 2 records, taken 0.5 times, 1 by t-1; {sealed}" in card
    assert "# mine\n" in card and "| lr | 2e-05 |" in card and "| batch_size | 2 |" in card
    assert "| data |" not in card and "| lora |" not in card
    assert "2 steps; loss 4.250 → 1.125.\n" in card
    whole = f"{memory_plan.parameters(CONFIG):,}"
    assert format_prompt("(the instruction)") in card and f"{whole} of {whole} parameters" in card
    assert "3 examples of 9 supervised tokens" in card and "than 512 tokens" in card
    assert f"The held-out file: `data.json`: 2 records, 1 by t-1; {sealed}." in card
    assert re.search(r"commit [0-9a-f]{40}|of a copy without its history", card)
    assert str(data.parent) not in card, "where files lay is nobody's business"
    assert f"torch {version('torch')}" in card and time.strftime("%Y-%m-%d") in card
    assert re.search(r"^\| device \| \w", card, re.MULTILINE)
    assert "{" not in card


def test_random_weights_and_no_held_out_file_are_said(files):
    card = card_of(None, [str(files[1])])
    assert "it began with random weights" in card and "The held-out file: none." in card


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
    assert sha256(weights) in card and "| ranks | 1 |" in card and "| steps | 2 |" in card
    assert re.search(r"^\| ids \| \w{16} \|", card, re.MULTILINE), "what was really learned from"
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert f"training loss {losses[0]:.3f} → {losses[1]:.3f}; held out " in card
    assert "5,400 examples" in card and "1,066,112 of 1,066,112 parameters" in card


def test_an_adapters_card_says_how_an_adapter_is_asked(files):
    card = card_of(files[0], [], lora=LoraConfig(4, 8, 0.0, ("q_proj",)))
    assert "`alpaca generate --model-dir BASE --adapter FOLDER`" in card
    assert f"{3 * 4 * (64 + 64):,} of {memory_plan.parameters(CONFIG):,} parameters" in card


def test_metas_weights_are_sealed_too(files):
    base, _ = files
    (base / "consolidated.00.pth").write_bytes(b"pickled")
    assert f"`consolidated.00.pth`, SHA-256 `{sha256(b'pickled')}`" in weights(base)


def test_a_changed_tree_is_told(tmp_path, monkeypatch):
    def git(*words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True)

    monkeypatch.setattr(model_card, "HERE", tmp_path)
    git("init", "-q")
    assert model_card.code() == "of a copy without its history"
    (tmp_path / "model.py").write_text("one")
    git("add", ".")
    git("commit", "-qm", "one")
    (tmp_path / "runs").write_text("no part of it")
    assert re.fullmatch(r"commit [0-9a-f]{40}", model_card.code())
    (tmp_path / "model.py").write_text("two")
    changed = r"commit [0-9a-f]{40}, with changes that are in no commit"
    assert re.fullmatch(changed, model_card.code())
    (tmp_path / "copy").mkdir()  # inside somebody else's project
    monkeypatch.setattr(model_card, "HERE", tmp_path / "copy")
    assert model_card.code() == "of a copy without its history"
