"""Training against a plain loop over Hugging Face's model."""

import json

import pytest
import torch
from helpers.checkpoints import read_tensors
from helpers.parity import apart
from helpers.training import TOKENIZER, flags, metrics, succeeded, train, write_base

from alpaca.datagen.formats import load_records
from dataset import IGNORE, encode_record, step_examples
from fsdp_train import learning_rate
from templates import format_prompt
from tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


def test_run_equals_a_plain_loop_over_hugging_faces_model(base, tmp_path):
    from transformers import AutoModelForCausalLM

    succeeded(train(flags(base, tmp_path / "run", epochs=4)))
    model = AutoModelForCausalLM.from_pretrained(base / "model", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    tokenizer, records = load_tokenizer(TOKENIZER), load_records(base / "records.json")
    examples = [[part[:128] for part in encode_record(r, tokenizer)[:2]] for r in records]
    for step, logged in enumerate(metrics(tmp_path / "run")):
        batch = [examples[i] for i in step_examples(40, 16, 4, 42, step)]
        targets = sum(label != IGNORE for _, labels in batch for label in labels)
        total = 0.0
        for ids, labels in batch:  # one at a time: nothing to pad, nothing to leak
            logits = model(torch.tensor([ids])).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(
                logits, torch.tensor(labels[1:]), ignore_index=IGNORE, reduction="sum"
            )
            (loss / targets).backward()
            total += loss.item() / targets
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = logged["lr"]
        optimizer.step()
        optimizer.zero_grad()
        apart("loss of a step, relative: transformers", abs(logged["loss"] / total - 1), 1e-5)
        assert logged["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert step == 9
    theirs = dict(model.named_parameters())
    for name, ours in read_tensors(tmp_path / "run" / "model").items():
        distance = (ours - theirs[name]).norm() / theirs[name].norm()
        apart("weights after ten steps, relative: transformers", distance.item(), 1e-5)


def test_learning_rate_equals_hugging_faces_after_the_warm_up():
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-5)
    schedule = get_cosine_schedule_with_warmup(optimizer, 37, 1219)
    for step in range(1219):
        if step >= 37:
            ours = learning_rate(step, 1219, 2e-5, 0.03)
            distance = abs(ours - optimizer.param_groups[0]["lr"]) / 2e-5
            apart("learning rate, of its peak: transformers", distance, 1e-9)
        optimizer.step()
        schedule.step()


def test_trained_model_answers_in_transformers(base, tmp_path):
    """An answer memorized here is given there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = {"instruction": "Name the fox's colour.", "output": "the old red fox"}
    (tmp_path / "one.jsonl").write_text(json.dumps(record) + "\n")
    out = tmp_path / "run"
    changes = {"data": tmp_path / "one.jsonl", "eval_data": tmp_path / "one.jsonl"}
    changes |= {"batch_size": 4, "epochs": 120, "learning_rate": 3e-3}
    _, shown, _ = succeeded(train(flags(base, out, **changes)))
    assert "as expected: 1 of 1" in shown and "→ the old red fox" in shown
    losses = [r["held_out_loss"] for r in metrics(out) if "held_out_loss" in r]
    assert len(losses) == 2 and losses[1] < 0.1 < losses[0]
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    ids = tokenizer(format_prompt(record["instruction"]), return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == "the old red fox"
