"""Policy gradient with verifiable rewards: --objective group."""

import json
import re
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.commands import assert_refused
from helpers.training import (
    LINE,
    TOKENIZER,
    assert_identical,
    assert_same_run,
    finish,
    flags,
    launch,
    metrics,
    stop_in_step,
    succeeded,
    train,
    write_model,
)

import fsdp_train
from alpaca.datagen.formats import load_records
from alpaca.inference.engine import Engine
from alpaca.training import group, objectives
from alpaca.training.config import TrainConfig
from alpaca.training.memory_plan import Workload, peak_bytes, sampler_bytes
from alpaca.training.parallel import full_tensor, trained_parameters
from alpaca.weights.loading import load_model
from alpaca.weights.lora import LoraConfig, add_lora, initial_weights
from alpaca.weights.quantize import WeightSource
from dataset import question_ids
from tokenizer import load_tokenizer

CHECKERS = """
def has_k(record, answer):
    return "k" in answer

def text(record, answer):
    return "yes" if record["instruction"] == "dog" else 0

def never(record, answer):
    return 0

def long(record, answer):
    return len(answer)

def broken(record, answer):
    return 1 / (record["instruction"] != "dog")

calls = []

def first_only(record, answer):
    calls.append(answer)
    return len(calls) % 2 if len(calls) <= 8 else 0.1
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_model(folder / "model")
    (folder / "checkers.py").write_text(CHECKERS)
    records = [{"instruction": word, "input": "", "output": "k"} for word in LINE.split()[:9]]
    records.append({"instruction": LINE, "input": LINE, "output": "no room for it"})
    (folder / "records.json").write_text(json.dumps(records))
    return folder


def group_flags(base, out, check="has_k", **changes):
    ours = {"objective": "group", "samples": 4}
    ours |= {"check": f"{base}/checkers.py:{check}" if f"def {check}(" in CHECKERS else check}
    ours |= {"epochs": 10, "batch_size": 4, "max_steps": 3, "max_length": 44, "learning_rate": 1e-2}
    return flags(base, out, **{**ours, "sample_answers": 0, **changes})


def note(monkeypatch, where, name, found: list) -> None:
    """Append what a function returns at each call."""
    function = getattr(where, name)

    def noted(*args, **options):
        found.append(function(*args, **options))
        return found[-1]

    monkeypatch.setattr(where, name, noted)


def reinforce(model, groups, temperature) -> None:
    """One answer at a time, whole logits, autograd; groups of equal rewards, too."""
    count = sum(len(answer) for each in groups for answer in each.answers)
    for each in groups:
        baseline = sum(each.rewards) / len(each.rewards)
        for answer, reward in zip(each.answers, each.rewards, strict=True):
            logits = model(torch.tensor([each.prompt + answer]))[0] / temperature
            log_p = logits.log_softmax(-1)[len(each.prompt) - 1 : -1]
            log_prob = log_p.gather(1, torch.tensor(answer)[:, None]).sum()
            (-(reward - baseline) * log_prob / count).backward()


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_equals_a_plain_reinforce_loop(lora, base, tmp_path, monkeypatch):
    groups, gradients, rows = [], [], []
    norm = fsdp_train.squared_gradient_norm

    def noted(model):
        weights = trained_parameters(model).items()
        gradients.append({name: full_tensor(p.grad).clone() for name, p in weights})
        return norm(model)

    monkeypatch.setattr(fsdp_train, "squared_gradient_norm", noted)
    note(monkeypatch, group.Sampler, "answer", groups)
    note(monkeypatch, objectives, "make_row", rows)
    changes = {"lora": True, "lora_dropout": 0} if lora else {}
    words = group_flags(base, tmp_path / "run", max_steps=1, samples=3, temperature=0.7, **changes)
    succeeded(train(words))
    model = load_model(base / "model")
    if lora:
        add_lora(model, LoraConfig(dropout=0))
        first = initial_weights(WeightSource(base / "model"), 42)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(first(name, parameter.shape))
    reinforce(model, groups[0], 0.7)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            distance = (gradients[0][name] - parameter.grad).norm()
            assert distance <= 1e-5 * parameter.grad.norm(), name
    assert model.lm_head.weight.grad is None if lora else model.lm_head.weight.grad.norm() > 0.01
    mixed = [each for each in groups[0] if len(set(each.rewards)) > 1]
    tokens = sum(len(each.prompt + answer) for each in mixed for answer in each.answers)
    assert sum(row.ids.shape[1] for row in rows) == tokens and 0 < len(mixed) < 4
    (logged,) = metrics(tmp_path / "run")
    assert logged["mixed_groups"] == len(mixed) / 4
    rewards = [reward for each in groups[0] for reward in each.rewards]
    assert logged["reward"] == pytest.approx(sum(rewards) / 12)


def test_model_learns_what_is_rewarded(base, tmp_path):
    changes = {"max_steps": 8, "samples": 8, "learning_rate": 2e-2}
    words = group_flags(base, tmp_path / "run", **changes)
    assert "training reward" in succeeded(train(words))[1]
    rewards = [record["reward"] for record in metrics(tmp_path / "run")]
    assert np.mean(rewards[:2]) < 0.5 and np.mean(rewards[-2:]) > 0.9
    assert (tmp_path / "run/reward.svg").exists()


def greedy_length(base, folder, adapter=None) -> float:
    """What `long` gives, on average, to the greedy answers of a model on disk."""
    tokenizer = load_tokenizer(TOKENIZER)
    prompts = [question_ids(r, tokenizer) for r in load_records(base / "records.json")[:-1]]
    engine = Engine(load_model(folder, adapter), tokenizer, max_length=44)
    return np.mean([len(sequence.text) for sequence in engine.generate(prompts)])


@pytest.mark.parametrize("lora", [False, True])
def test_answers_are_those_of_the_model_as_it_is_trained(lora, base, tmp_path):
    """The held-out rewards are those of the base and of the result."""
    changes = {"lora": True, "learning_rate": 0.1} if lora else {}
    changes |= {"eval_data": base / "records.json", "max_steps": 2}
    out = succeeded(train(group_flags(base, tmp_path / "run", "long", **changes)))[1]
    logged = [r["held_out_reward"] for r in metrics(tmp_path / "run") if "held_out_reward" in r]
    assert f"held out {logged[0]:.3f} → {logged[1]:.3f}" in out
    result = (base / "model", tmp_path / "run/adapter") if lora else (tmp_path / "run/model",)
    first, last = greedy_length(base, base / "model"), greedy_length(base, *result)
    assert logged == pytest.approx([first, last]) and first != last


def test_equal_rewards_change_no_weight(base, tmp_path, monkeypatch):
    """Even if Adam's momentum is not 0 after a step that had something to learn."""
    weights, step = [], fsdp_train.train_step

    def noted(model, *args):
        result = step(model, *args)
        weights.append(full_tensor(model.lm_head.weight.detach()).clone())
        return result

    monkeypatch.setattr(fsdp_train, "train_step", noted)
    note(monkeypatch, group, "derive_seed", seeds := [])
    _, _, err = succeeded(train(group_flags(base, tmp_path / "run", "first_only", samples=2)))
    assert "nothing to learn from" not in err
    assert len(seeds) == len({*seeds}) == 3 * 4 * 2
    first, second, third = metrics(tmp_path / "run")
    assert first["grad_norm"] > 0 and first["mixed_groups"] == 1
    for record in (second, third):
        assert record["loss"] == record["grad_norm"] == record["mixed_groups"] == record["lr"] == 0
    assert second["reward"] == pytest.approx(0.1) and second["tokens"] > 0
    start = load_model(base / "model").lm_head.weight
    assert not weights[0].equal(start)
    assert weights[1].equal(weights[0]) and weights[2].equal(weights[0])


def test_run_says_if_all_rewards_were_equal(base, tmp_path):
    flags = group_flags(base, tmp_path / "run", "never", samples=2, max_steps=1)
    assert "there was nothing to learn from" in succeeded(train(flags))[2]


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ("broken", "records.json, record 7: checker '.*py:broken' raised ZeroDivisionError"),
        ("text", "records.json, record 7: checker '.*py:text' returned 'yes'"),
    ],
)
def test_checker_that_fails_is_named_with_its_record(check, message, base, tmp_path):
    code, _, err = train(group_flags(base, tmp_path / "run", check))
    assert code == 2 and re.search(message, err) and err.count("error: ") == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"check": None}, "--objective group needs --check"),
        ({"check": "equal"}, "checker 'equal'"),
        ({"samples": 1}, "--samples 1"),
        ({"objective": None}, "--check goes with --objective group"),
        ({"objective": "dpo", "check": None}, "--samples goes with --objective group"),
        ({"beta": 1}, "--beta goes with"),
        ({"max_length": 8}, "raise --max-length"),
    ],
)
def test_flags_that_lack_or_contradict_something_are_refused(changes, message, base, tmp_path):
    words = group_flags(base, tmp_path / "run", **{"check": "exact", **changes})
    assert_refused(train(words), message)
    assert not (tmp_path / "run").exists()


@pytest.mark.robust
def test_two_ranks_equal_one(base, tmp_path):
    """With 3 instructions in a step, one rank has two of them."""
    changes = {"batch_size": 3, "eval_data": base / "records.json", "learning_rate": 1e-3}
    succeeded(train(group_flags(base, tmp_path / "1", **changes)))
    succeeded(finish(launch(group_flags(base, tmp_path / "2", **changes), ranks=2)))
    assert_same_run(tmp_path / "2", tmp_path / "1", loss=1e-4, norm=1e-4)
    first, second = (
        [record.get("reward", record.get("held_out_reward")) for record in metrics(tmp_path / out)]
        for out in "12"
    )
    assert first == second and len({*first}) > 2


def test_resume_is_bit_identical(base, tmp_path, monkeypatch):
    words = {"max_steps": 4, "save_every": 2}
    succeeded(train(group_flags(base, tmp_path / "whole", **words)))
    stop_in_step(monkeypatch, 3)
    words = group_flags(base, tmp_path / "run", **words)
    assert train(words)[0] == 128 + signal.SIGTERM
    succeeded(train(words))
    assert_identical(tmp_path / "run", tmp_path / "whole")
    rewards = [[r["reward"] for r in metrics(tmp_path / out)] for out in ("run", "whole")]
    assert rewards[0] == rewards[1] and len({*rewards[0]}) > 2
    for flag, value in (("--samples", "3"), ("--temperature", "2"), ("--check", "exact")):
        assert_refused(train([*words, flag, value]), "another run", value)


@pytest.mark.parametrize("lora", [None, LoraConfig()])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_plan_counts_the_copy_and_its_cache(lora, dtype, base, monkeypatch):
    config = TrainConfig(base / "model", data=("x",), objective="group", check="exact", lora=lora)
    config = replace(config, dtype=dtype, max_length=44, device="cpu")
    shape = load_model(base / "model").config
    job = SimpleNamespace(config=config, model_config=shape, tokenizer=load_tokenizer(TOKENIZER))
    sampler = group.Sampler(job, "cpu")
    tensors = [*sampler.copy.parameters(), *sampler.copy.buffers()]
    tensors += [sampler.engine.cache.k, sampler.engine.cache.v]
    counted = sampler_bytes(Workload(config, shape, 512, 0.5))
    assert counted == sum(tensor.nbytes for tensor in tensors)
    without = replace(config, objective="sft")
    work = Workload(config, shape, 512, 0.5)
    assert peak_bytes(work) - peak_bytes(replace(work, config=without)) == pytest.approx(counted)
