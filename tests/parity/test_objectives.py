"""Losses of preferences against TRL's DPOTrainer: losses and gradients, masks and EOS included."""

import numpy as np
import pytest
import torch
from helpers.models import small_config
from helpers.parity import apart
from helpers.training import TOKENIZER, preference_examples, preference_row, write_preferences

from alpaca.training.objectives import PREFERENCES, PreferenceLoss
from alpaca.weights.writer import save_model
from model import Llama

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl==1.16.0")
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


@pytest.mark.parametrize("name", PREFERENCES)
def test_loss_and_gradients_are_those_of_trl(name, models, tmp_path):
    from datasets import Dataset
    from transformers import AutoTokenizer

    (ours, theirs), (our_reference, their_reference) = models
    examples = preference_examples(write_preferences(tmp_path / "p.json", 6))
    objective = PreferenceLoss(examples, name, 0.3)
    row = preference_row(objective, np.arange(6))
    with torch.no_grad():
        objective.reference = objective.log_probs(our_reference, row).numpy()
    ours.zero_grad()
    loss, _ = objective(ours, preference_row(objective, np.arange(6)))
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
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    for each, parameter in ours.named_parameters():
        found = (parameter.grad - gradients[each]).norm() / gradients[each].norm()
        apart(f"gradient of {name}, relative: TRL", found.item(), 1e-5)
