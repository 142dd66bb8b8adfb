"""Learning from preferences: the equations, and runs of them."""

import json
import math
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.checkpoints import read_tensors
from helpers.commands import ROOT, assert_refused
from helpers.lora import trained_adapter
from helpers.models import small_config
from helpers.training import (
    TOKENIZER,
    assert_identical,
    assert_same_run,
    finish,
    flags,
    launch,
    metrics,
    preference_examples,
    preference_row,
    reward_model,
    stop_in_step,
    succeeded,
    train,
    write_base,
    write_planted_preferences,
    write_preferences,
)

from alpaca.common.cli import Parser
from alpaca.common.errors import UserError
from alpaca.datagen.preferences import load_preferences
from alpaca.training.config import TrainConfig, add_arguments
from alpaca.training.objectives import PreferenceLoss, RewardLoss, evaluation
from alpaca.weights.loading import load_model
from alpaca.weights.lora import LoraConfig, add_lora, initial_weights
from alpaca.weights.quantize import WeightSource
from alpaca.weights.reward import label_ends, load_reward_model, rewards
from dataset import IGNORE, step_examples
from model import Llama
from tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


def preference_flags(base, out, objective="dpo", **changes):
    ours = {"objective": objective, "data": base / "preferences.json", "learning_rate": 1e-4}
    return flags(base, out, **{"batch_size": 8, "max_steps": 6, **ours, **changes})


def test_evaluation_has_no_dropout_and_training_has_it_again():
    model = Llama(small_config())
    add_lora(model, LoraConfig(dropout=0.5))
    with evaluation(model):
        assert not any(each.training for each in model.modules())
        assert not torch.is_grad_enabled()
    assert all(each.training for each in model.modules()) and torch.is_grad_enabled()


def assert_same(out, other):
    """A log-probability is a sum of some hundreds: its rounding is an absolute one."""
    assert_same_run(out, other, loss=1e-4, norm=1e-3, weight=1e-5)


@pytest.fixture(scope="module")
def reference(base, tmp_path_factory):
    """The plain run that others are compared with."""
    out = tmp_path_factory.mktemp("reference") / "run"
    succeeded(train(preference_flags(base, out)))
    return out


def log_prob(model, ids, labels):
    """Of the labels, by plain logits: (sum, number)."""
    logits = model(torch.tensor(ids)[None].long())[0, :-1]
    labels = torch.tensor(labels[1:]).long()
    total = -F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total, (labels != IGNORE).sum()


EQUATIONS = {  # of the chosen and the rejected answer's (log π / π_ref, tokens)
    "dpo": lambda c, r, beta: -F.logsigmoid(beta * (c[0] - r[0])),
    "ipo": lambda c, r, beta: (c[0] / c[1] - r[0] / r[1] - 1 / (2 * beta)) ** 2,
    "dpo-norm": lambda c, r, beta: -F.logsigmoid(beta * (c[0] / c[1] - r[0] / r[1])),
    "reward": lambda c, r, beta: -F.logsigmoid(c[0] - r[0]),  # of (reward, tokens)
}


def check_plain_loop(base, out, name, model, start) -> None:
    """One answer at a time, whole logits, autograd, torch's AdamW."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), weight_decay=0.0)
    examples = preference_examples(base / "preferences.json")
    for step, logged in enumerate(metrics(out)):
        batch = step_examples(40, 8, 2, 42, step)
        total, scores = 0.0, []
        for pair in batch:
            found = []
            for document in (2 * pair, 2 * pair + 1):
                span = slice(*examples.starts[document : document + 2])
                answer = examples.ids[span].tolist(), examples.labels[span].tolist()
                if name == "reward":
                    hidden = model.model(torch.tensor(answer[0])[None])
                    found.append((hidden[0, -1] @ model.score.weight[0], len(answer[0])))
                    continue
                now, tokens = log_prob(model, *answer)
                found.append((now - log_prob(start, *answer)[0].detach(), tokens))
            scores.append([s.item() / (n if name in ("ipo", "dpo-norm") else 1) for s, n in found])
            loss = EQUATIONS[name](*found, 0.3) / len(batch)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.param_groups[0]["lr"] = logged["lr"]
        optimizer.step()
        optimizer.zero_grad()
        assert logged["loss"] == pytest.approx(total, rel=1e-4)
        chosen, rejected = np.array(scores).T
        figures = {"margin": (1 if name == "reward" else 0.3) * (chosen - rejected).mean()}
        figures |= {} if name == "reward" else {"kl": -(chosen + rejected).mean() / 2}
        figures |= {"accuracy": (chosen > rejected).mean()} if step else {}
        assert {each: logged[each] for each in figures} == pytest.approx(figures, 1e-3, 1e-4)
    assert step == 2
    saved = read_tensors(out / "model") if (out / "model").exists() else trained_adapter(out)
    saved = {each.removeprefix("base_model.model."): tensor for each, tensor in saved.items()}
    assert saved.keys() == trained.keys()
    for each, ours in saved.items():
        assert (ours - trained[each]).norm() < 1e-4 * trained[each].norm(), each


@pytest.mark.parametrize("name", EQUATIONS)
def test_run_equals_a_plain_loop(name, base, tmp_path):
    changes = {"max_steps": 3, **({} if name == "reward" else {"beta": 0.3})}
    succeeded(train(preference_flags(base, tmp_path / "run", name, **changes)))
    model, start = (load_model(base / "model") for _ in range(2))
    if name == "reward":
        model = reward_model(model.config, model.model)
    check_plain_loop(base, tmp_path / "run", name, model, start)


def test_adapters_run_equals_a_plain_loop(base, tmp_path):
    changes = {"beta": 0.3, "max_steps": 3, "lora": True, "lora_dropout": 0, "learning_rate": 1e-3}
    succeeded(train(preference_flags(base, tmp_path / "run", **changes)))
    model, start = (load_model(base / "model") for _ in range(2))
    add_lora(model, LoraConfig(dropout=0))
    first = initial_weights(WeightSource(base / "model"), 42)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(first(name, parameter.shape))
    check_plain_loop(base, tmp_path / "run", "dpo", model, start)
    first = metrics(tmp_path / "run")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_run_begins_at_the_reference(reference):
    first, *_, last = metrics(reference)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first["margin"]) < 1e-6 and abs(first["kl"]) < 1e-5
    assert last["loss"] < first["loss"] and last["margin"] > 0.01


def objective_and_model(name, file):
    """An objective and a random model, which is the reference, too; the first rewards are 0."""
    config = small_config(vocab_size=1024, max_position_embeddings=256)
    if name == "reward":
        return RewardLoss(label_ends(preference_examples(file))), reward_model(config)
    torch.manual_seed(0)
    objective, model = PreferenceLoss(preference_examples(file), name, 0.1), Llama(config)
    row = preference_row(objective, np.arange(len(objective.examples)))
    objective.reference = objective.scores(model, row).detach().numpy()
    return objective, model


@pytest.mark.parametrize("name", ["dpo", "dpo-norm", "reward"])
def test_swapped_answers_turn_the_gradient_around(name, tmp_path):
    gradients = []
    file = write_preferences(tmp_path / "p.json", 6)
    swapped = json.loads(file.read_text())
    for pair in swapped:
        pair["preference"] = 3 - pair["preference"]
    (tmp_path / "swapped.json").write_text(json.dumps(swapped))
    for each in (file, tmp_path / "swapped.json"):
        objective, model = objective_and_model(name, each)
        loss, margin, *_, last = objective(model, preference_row(objective, np.arange(6)))
        assert loss.item() == pytest.approx(6 * math.log(2)) and margin == last == 0
        loss.backward()
        gradients.append([*model.parameters()][-1].grad)  # the head's
    torch.testing.assert_close(gradients[0], -gradients[1])
    assert gradients[0].norm() > 0


@pytest.mark.parametrize("name", EQUATIONS)
def test_loss_with_probability_p_mixes_both_directions(name, tmp_path):
    file, losses = write_preferences(tmp_path / "p.json", 1), {}
    (pair,) = json.loads(file.read_text())
    for preference in (1, 1.25, 2):
        file.write_text(json.dumps([pair | {"preference": preference}]))
        objective, model = objective_and_model(name, file)
        torch.manual_seed(1)
        torch.nn.init.normal_([*model.parameters()][-1], std=0.2)  # another head
        losses[preference] = objective(model, preference_row(objective, np.arange(1)))[0].item()
    assert losses[1.25] == pytest.approx(0.75 * losses[1] + 0.25 * losses[2])
    assert losses[1] != pytest.approx(losses[2])


def test_rows_change_nothing(base, reference, tmp_path):
    succeeded(train(preference_flags(base, tmp_path / "run", row_tokens=256)))
    assert_same(tmp_path / "run", reference)


@pytest.mark.robust
@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_two_ranks_equal_one(name, base, tmp_path):
    held_out = write_preferences(tmp_path / "held_out.json", 7, seed=5)
    changes = {"eval_data": held_out, "max_steps": 2}
    succeeded(train(preference_flags(base, tmp_path / "1", name, **changes)))
    succeeded(finish(launch(preference_flags(base, tmp_path / "2", name, **changes), ranks=2)))
    assert_same(tmp_path / "2", tmp_path / "1")
    first, last = (r for r in metrics(tmp_path / "2") if "held_out_loss" in r)
    assert first["held_out_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert 0 <= last["held_out_accuracy"] <= 1 and last["held_out_margin"] != 0
    assert last.get("held_out_kl") != 0


@pytest.mark.robust
def test_one_rank_resumes_a_reward_model_of_two(base, tmp_path):
    """Its head has one row: the second rank has nothing of it to save."""
    one, two = tmp_path / "1", tmp_path / "2"
    changes = {"epochs": 4, "max_steps": None, "save_every": 1}
    succeeded(train(preference_flags(base, one, "reward", **changes)))
    process = launch(preference_flags(base, two, "reward", **changes), ranks=2)
    while not list(two.glob("checkpoints/step-*/index.json")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert "stopped after step" in finish(process)[2]
    _, _, err = succeeded(train(preference_flags(base, two, "reward", **changes)))
    assert "resuming after step" in err
    assert_same(two, one)


@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_resume_is_bit_identical(name, base, reference, tmp_path, monkeypatch):
    if name == "reward":
        reference = tmp_path / "reference"
        succeeded(train(preference_flags(base, reference, name)))
    stop_in_step(monkeypatch, 4)
    words = preference_flags(base, tmp_path / "run", name, save_every=2)
    assert train(words)[0] == 128 + signal.SIGTERM
    succeeded(train(words))
    assert_identical(tmp_path / "run", reference)
    other = [*words, "--objective", "dpo", "--beta", "0.2"]
    assert_refused(train(other), "another run", "beta 0.2")


def test_reference_is_loaded_for_its_own_examples_only(tmp_path):
    first, other = (
        PreferenceLoss(
            preference_examples(write_preferences(tmp_path / "p.json", 6, seed=seed)), "dpo", 0.1
        )
        for seed in (1, 2)
    )
    first.reference = np.arange(12.0)
    first.save(tmp_path)
    with pytest.raises(UserError, match="same --eval-data, or use another --out"):
        other.load(tmp_path)
    first.reference = None
    first.load(tmp_path)
    assert first.reference.tolist() == [*range(12)]
    (file,) = tmp_path.glob("reference-*.npy")
    for damaged in (file.read_bytes()[:-8], b""):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="reference-.*npy: .*use another --out"):
            first.load(tmp_path)


def test_run_that_learned_nothing_advises_a_higher_rate(base, tmp_path):
    changes = {"max_steps": 2, "learning_rate": 1e-7}
    _, _, err = succeeded(train(preference_flags(base, tmp_path / "run", **changes)))
    assert "raise --learning-rate" in err


def test_reward_model_learns_a_rule(base, tmp_path):
    data = write_planted_preferences(tmp_path / "train.json", 64)
    held_out = write_planted_preferences(tmp_path / "held_out.json", 40, seed=1)
    changes = {"data": data, "eval_data": held_out, "epochs": 1, "max_steps": None}
    changes |= {"model_dir": ROOT / "data/tiny-llama", "learning_rate": 3e-3}
    _, out, err = succeeded(train(preference_flags(base, tmp_path / "run", "reward", **changes)))
    assert "raise --learning-rate" not in err
    assert metrics(tmp_path / "run")[-1]["held_out_accuracy"] >= 0.95
    assert "; held-out accuracy 0.9" in out or "; held-out accuracy 1.0" in out
    card = (tmp_path / "run/model/README.md").read_text()
    assert "text-classification" in card and "the objective `reward`" in card
    records = load_preferences([held_out]).records
    model, tokenizer = load_reward_model(tmp_path / "run/model"), load_tokenizer(TOKENIZER)
    found = np.array(rewards(model, tokenizer, records)).reshape(-1, 2)  # chosen, rejected
    assert (found[:, 0] > found[:, 1]).mean() == metrics(tmp_path / "run")[-1]["held_out_accuracy"]


def test_reward_models_flags():
    parser = Parser()
    add_arguments(parser)

    def parse(*words):
        words = "--model-dir", "m", "--data", "d", "--objective", "reward", *words
        return TrainConfig.from_args(parser.parse_args(words))

    with pytest.raises(UserError, match="--objective reward trains all weights"):
        parse("--lora")
    with pytest.raises(UserError, match="--beta goes with"):
        parse("--beta", "0.2")
