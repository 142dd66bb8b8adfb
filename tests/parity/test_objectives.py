"""Losses of preferences against TRL's DPOTrainer and RewardTrainer: losses and gradients, masks and
EOS included; and a reward model's folder against transformers."""

import numpy as np
import pytest
import torch
from helpers.models import small_config
from helpers.parity import apart
from helpers.training import (
    TOKENIZER,
    preference_examples,
    preference_row,
    reward_model,
    write_preferences,
)

from alpaca.datagen.preferences import load_preferences
from alpaca.training.objectives import PREFERENCES, PreferenceLoss, RewardLoss
from alpaca.weights.reward import (
    RewardModel,
    label_ends,
    load_reward_model,
    reward_fields,
    rewards,
)
from alpaca.weights.writer import save_model
from model import Llama
from tokenizer import load_tokenizer

THEIRS = {"dpo": "sigmoid", "ipo": "ipo", "dpo-norm": "sigmoid_norm"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(ours, Hugging Face's) twice: the model to train and the reference."""
    from transformers import AutoModelForCausalLM

    found = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("models") / "m"
        torch.manual_seed(seed)
        config = small_config(vocab_size=1024, max_position_embeddings=256, initializer_range=0.2)
        model = Llama(config)
        save_model(model, config, folder, tokenizer=TOKENIZER)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        found.append((model, theirs))
    return found


def padded(examples):
    """TRL's batch: all chosen answers, then all rejected ones."""
    order = [*range(0, 2 * len(examples), 2), *range(1, 2 * len(examples), 2)]
    spans = [slice(*examples.starts[i : i + 2]) for i in order]
    longest = max(span.stop - span.start for span in spans)

    def pad(rows):
        return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])

    return {
        "input_ids": pad([examples.ids[span].tolist() for span in spans]),
        "attention_mask": pad([[1] * (span.stop - span.start) for span in spans]),
        "completion_mask": pad([(examples.labels[span] >= 0).astype(int) for span in spans]),
    }


def import_trl():
    return pytest.importorskip("trl", reason="TRL is not installed: pip install trl==1.16.0")


def assert_same_gradients(ours, theirs, what):
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    for each, parameter in ours.named_parameters():
        found = (parameter.grad - gradients[each]).norm() / gradients[each].norm()
        apart(f"gradient of {what}, relative: TRL", found.item(), 1e-5)


@pytest.mark.parametrize("name", PREFERENCES)
def test_loss_and_gradients_are_those_of_trl(name, models, tmp_path):
    trl = import_trl()
    from datasets import Dataset
    from transformers import AutoTokenizer

    (ours, theirs), (our_reference, their_reference) = models
    examples = preference_examples(write_preferences(tmp_path / "p.json", 6))
    objective = PreferenceLoss(examples, name, 0.3)
    row = preference_row(objective, np.arange(6))
    with torch.no_grad():
        objective.reference = objective.scores(our_reference, row).numpy()
    ours.zero_grad()
    loss, *_ = objective(ours, preference_row(objective, np.arange(6)))
    (loss / 6).backward()

    folder = tmp_path / "m"
    save_model(ours, ours.config, folder, tokenizer=TOKENIZER)
    options = {"loss_type": THEIRS[name], "beta": 0.3, "output_dir": str(tmp_path), "use_cpu": True}
    dummy = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}
    trainer = trl.DPOTrainer(
        theirs,
        their_reference,
        args=trl.DPOConfig(bf16=False, gradient_checkpointing=False, report_to=[], **options),
        processing_class=AutoTokenizer.from_pretrained(folder),
        train_dataset=Dataset.from_dict(dummy),
    )
    theirs.zero_grad()
    expected = trainer.compute_loss(trainer.model, padded(examples))
    expected.backward()
    apart(f"loss of {name}, relative: TRL", abs(loss.item() / 6 / expected.item() - 1), 1e-6)
    assert_same_gradients(ours, theirs, name)


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory):
    """(ours, Hugging Face's, the folder that both are in)."""
    from transformers import AutoModelForSequenceClassification

    folder, tokenizer = tmp_path_factory.mktemp("reward") / "m", load_tokenizer(TOKENIZER)
    config = small_config(vocab_size=1024, max_position_embeddings=256, initializer_range=0.2)
    model = reward_model(config, std=0.2)
    options = {"kind": RewardModel, "fields": reward_fields(tokenizer, config)}
    save_model(model, config, folder, tokenizer=TOKENIZER, **options)
    return model, AutoModelForSequenceClassification.from_pretrained(folder), folder


def test_reward_loss_and_gradients_are_those_of_trl(reward_models, tmp_path):
    trl = import_trl()
    from datasets import Dataset
    from transformers import AutoTokenizer

    ours, theirs, folder = reward_models
    examples = label_ends(preference_examples(write_preferences(tmp_path / "p.json", 6)))
    objective = RewardLoss(examples)
    loss, *_ = objective(ours, preference_row(objective, np.arange(6)))
    (loss / 6).backward()

    options = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": []}
    dummy = {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token_id = theirs.config.pad_token_id
    trainer = trl.RewardTrainer(
        theirs,
        args=trl.RewardConfig(gradient_checkpointing=False, **options),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict(dummy),
    )
    batch = padded(examples)
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()
    apart("loss of reward, relative: TRL", abs(loss.item() / 6 / expected.item() - 1), 1e-6)
    assert_same_gradients(ours, theirs, "reward")


def test_saved_reward_model_gives_transformers_the_same_rewards(reward_models, tmp_path):
    _, theirs, folder = reward_models
    assert type(theirs).__name__ == "LlamaForSequenceClassification"
    data = write_preferences(tmp_path / "p.json", 6)
    records, batch = load_preferences([data]).records, padded(preference_examples(data))
    model, tokenizer = load_reward_model(folder), load_tokenizer(folder)
    found = torch.tensor(rewards(model, tokenizer, records[::2] + records[1::2]))
    with torch.no_grad():
        expected = theirs(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
        cut = theirs(batch["input_ids"][:, :-1], attention_mask=batch["attention_mask"][:, :-1])
    apart("reward: transformers, padded", (found - expected).abs().max().item(), 1e-5)
    assert (found - cut.logits[:, 0]).abs().max() > 0.1  # of the longest answer, without EOS
