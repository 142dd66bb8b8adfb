"""Answers printed after training."""

import json
from types import SimpleNamespace

import torch

from alpaca.training import result
from alpaca.training.config import TrainConfig


def test_answer_is_printed_on_one_line(monkeypatch, capsys, tmp_path):
    texts = ["ox\n\nfox", "word\n" * 500, "ox\n\nfox"]
    engine = SimpleNamespace(generate=lambda *_: [SimpleNamespace(text=text) for text in texts])
    monkeypatch.setattr(result, "load_model", lambda *_, **options: None)
    monkeypatch.setattr(result, "encode_prompt", lambda *_: [1])
    monkeypatch.setattr(result, "Engine", lambda *_: engine)
    record = {"instruction": "Name two", "input": "", "output": "ox\n\nfox"}
    config = TrainConfig(model_dir=None, sample_answers=3, out=tmp_path)
    result.print_sample_answers(config, [record] * 3, None, torch.device("cpu"))  # pyright: ignore
    first, long, _, last = capsys.readouterr().out.splitlines()
    assert first == "  right  Name two → ox fox"
    assert long.startswith("  wrong  Name two → word word") and long.endswith("…")
    assert len(long) < 230 and last.endswith("2 of 3 held-out instructions (66.7%)")
    assert json.loads((tmp_path / "right_answers.json").read_text()) == [record, record]
