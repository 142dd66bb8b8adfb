"""The card beside a trained model: filled in, and true."""

import hashlib
import json
import re
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.commands import ROOT
from helpers.training import metrics, succeeded, train

from alpaca.training.config import TrainConfig
from alpaca.training.job import Job
from alpaca.training.model_card import describe_code, describe_data, describe_weights, fill_in_card
from alpaca.training.throughput import model_parameters
from alpaca.weights.lora import LoraConfig
from dataset import IGNORE, Examples
from model import LlamaConfig
from templates import ALPACA, format_prompt

MODEL = LlamaConfig(500, 64, 176, 3, 4, max_position_embeddings=512)
RECIPE = {"learning_rate": 2e-5, "batch_size": 2, "data": "elsewhere", "lora": None}


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


def card_of(base, data, held_out=(), lora=None) -> str:
    """Of a run on three examples of 7 tokens, of which 5, 1 and 3 are supervised."""
    labels = np.arange(21, dtype=np.int32)
    labels[[0, 1, *range(7, 13), 14, 15, 16, 17]] = IGNORE
    examples = Examples(labels, labels, np.array([0, 7, 14, 21]), [""] * 3, {})
    config = TrainConfig(
        out=Path("runs/mine"), model_dir=base, data=data, eval_data=held_out, lora=lora
    )
    tokenizer: Any = SimpleNamespace(template=ALPACA)
    job = Job(config, MODEL, tokenizer, examples, None, [], 2)
    return fill_in_card(job, RECIPE, "2 steps; loss 4.250 → 1.125")


def sha256(data: bytes) -> str:
    return f"SHA-256 `{hashlib.sha256(data).hexdigest()}`"


def test_card_has_base_data_recipe_and_losses(files):
    base, data = files
    digest = sha256(data.read_bytes())
    card = card_of(base, (f"{data}:0.5",), held_out=(str(data), f"{data}:2"))
    assert f"`some-base`\n\n- `model.safetensors`, {sha256(b'weights')}" in card
    assert f"- `data.json`: 2 records, taken 0.5 times, 1 by t-1; {digest}" in card
    assert "# mine\n" in card and "| learning_rate | 2e-05 |\n| batch_size | 2 |" in card
    assert "| data |" not in card and "| lora |" not in card
    assert "2 steps; loss 4.250 → 1.125.\n" in card
    total = f"{model_parameters(MODEL):,}"
    assert format_prompt("(the instruction)") in card and f"{total} of {total} parameters" in card
    assert "3 examples with 9 supervised tokens" in card and "than 512 tokens" in card
    assert f"Held-out data: `data.json`: 2 records, 1 by t-1; {digest}; `data.json`: 2 " in card
    assert re.search(r"commit [0-9a-f]{40}|a copy without version history", card)
    assert str(data.parent) not in card, "where files are is private"
    assert f"torch {version('torch')}" in card and time.strftime("%Y-%m-%d") in card
    assert re.search(r"^\| device \| \w", card, re.MULTILINE)
    assert "{" not in card and "`alpaca generate --model-dir FOLDER" in card


def test_card_of_an_adapter_from_an_unknown_base(files):
    card = card_of(files[0], (), lora=LoraConfig(4, 8, 0.0, ("q_proj",)))
    assert "`alpaca generate --model-dir BASE --adapter FOLDER " in card
    assert "`alpaca benchmark --model-dir BASE --adapter FOLDER --tasks data/" in card
    assert f"{3 * 4 * (64 + 64):,} of {model_parameters(MODEL):,} parameters" in card
    card = card_of(None, (str(files[1]),))
    assert "`alpaca benchmark --model-dir FOLDER --tasks data/safety_prompts.jsonl" in card
    assert "training started from random weights" in card and "Held-out data: none." in card


def test_files_of_any_format_are_described(files, tmp_path):
    (tmp_path / "chats.jsonl").write_text('{"messages": []}\n["odd"]\n')
    assert "2 records, of unknown authors" in describe_data(str(tmp_path / "chats.jsonl"))
    assert "not readable any more" in describe_data(str(tmp_path / "gone.jsonl"))
    (files[0] / "consolidated.00.pth").write_bytes(b"pickled")
    assert f"`consolidated.00.pth`, {sha256(b'pickled')}" in describe_weights(files[0])


def test_trainer_writes_the_card_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--max-steps", "2", "--sample-answers", "0", "--device", "cpu", "--out"]
    succeeded(train([*words, "run"]))
    card = (tmp_path / "run/model/README.md").read_text()
    assert sha256((ROOT / "data/tiny-llama/model.safetensors").read_bytes()) in card
    assert "| ranks | 1 |" in card and "| steps | 2 |" in card
    assert re.search(r"^\| ids \| \w{16} \|", card, re.MULTILINE), "the tokenized training set"
    losses = [record["loss"] for record in metrics(tmp_path / "run") if "loss" in record]
    assert f"training loss {losses[0]:.3f} → {losses[1]:.3f}; held out " in card
    assert "5,400 examples" in card and "1,066,112 of 1,066,112 parameters" in card
    monkeypatch.chdir(ROOT)  # the same settings, by other paths
    _, out, err = succeeded(train([*words, tmp_path / "run"]))
    assert "is finished" in err and f"wrote {tmp_path / 'run' / 'model'}" in out


def test_card_names_uncommitted_changes(tmp_path):
    def git(*words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True)

    git("init", "-q")
    assert describe_code(tmp_path) == "a copy without version history"
    (tmp_path / "model.py").write_text("one")
    git("add", ".")
    git("commit", "-qm", "one")
    (tmp_path / "runs").write_text("untracked")
    assert re.fullmatch(r"commit [0-9a-f]{40}", describe_code(tmp_path))
    (tmp_path / "model.py").write_text("two")
    changed = r"commit [0-9a-f]{40} with uncommitted changes"
    assert re.fullmatch(changed, describe_code(tmp_path))
    (tmp_path / "copy").mkdir()  # inside another project
    assert describe_code(tmp_path / "copy") == "a copy without version history"
