"""Answers printed after training."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alpaca.training import result
from alpaca.training.config import TrainConfig


@pytest.fixture
def print_answers(monkeypatch, tmp_path):
    """Prints the answers of a model that gives these texts; returns which records are kept."""

    def run(texts: list[str], records: list[dict]) -> list[dict]:
        engine = SimpleNamespace(generate=lambda *_: [SimpleNamespace(text=text) for text in texts])
        monkeypatch.setattr(result, "load_model", lambda *_, **options: None)
        monkeypatch.setattr(result, "encode_prompt", lambda *_: [1])
        monkeypatch.setattr(result, "Engine", lambda *_: engine)
        config = TrainConfig(model_dir=None, sample_answers=len(texts), out=tmp_path)
        job: Any = SimpleNamespace(config=config, held_out_records=records, tokenizer=None)
        result.print_sample_answers(job, torch.device("cpu"))
        return json.loads((tmp_path / "right_answers.json").read_text())

    return run


def test_answer_is_printed_on_one_line(print_answers, capsys):
    record = {"instruction": "Name\ntwo", "input": "", "output": "ox\n\nfox"}
    kept = print_answers(["ox\n\nfox", "word\n" * 500, "ox\n\nfox"], [record] * 3)
    first, long, _, last = capsys.readouterr().out.splitlines()
    assert first == "  right  Name two → ox fox"
    assert long.startswith("  wrong  Name two → word word") and long.endswith("…")
    assert len(long) < 230 and last.endswith("2 of 3 held-out instructions (66.7%)")
    assert kept == [record, record]


@pytest.mark.parametrize(
    ("count", "kept"), [(1, "0"), (2, "01"), (3, "012"), (4, "012"), (8, "024")]
)
def test_three_right_answers_are_kept_if_there_are(print_answers, count, kept):
    texts = [*map(str, range(count))]
    records = [{"instruction": "a", "input": "", "output": text} for text in texts]
    assert "".join(record["output"] for record in print_answers(texts, records)) == kept
