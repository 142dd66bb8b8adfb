"""A reward model: a LLaMA that says with one number how good an answer is.

    torchrun fsdp_train.py --objective reward --model-dir alpaca-7b --data runs/pairs.json \
        --out runs/reward
    alpaca best-of runs/samples.jsonl --reward-model runs/reward/model --out runs/best.json

The head is one row, `score` (1, C), instead of one for each token of the vocabulary. It reads the
hidden state of a text's last token, the only one that has seen the whole answer: EOS, or what the
template puts behind EOS (chatml a newline).

By the model of Bradley and Terry, an answer with reward r is better than one with reward s with
probability σ(r - s). Rewards are to be compared within a question; one alone means nothing.

A folder is what transformers opens with AutoModelForSequenceClassification, which needs a
pad_token_id that ends no text. Reward models: arXiv:1909.08593, 2009.01325, 2203.02155.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alpaca.common.progress import Progress
from alpaca.weights.checkpoint import as_dtype, open_checkpoint
from dataset import IGNORE, Examples, encode_record, make_row, pack_rows
from model import Llama, LlamaConfig
from tokenizer import Tokenizer, end_ids

SCORE = "score.weight"
REWARD_ROW = 4096  # tokens in a row, unless a single text has more


class RewardModel(Llama):
    """The same decoder with `score` in place of `lm_head`."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        del self.lm_head
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.score.weight)  # all rewards are equal: the loss starts at log 2

    def tie_weights(self) -> None:
        """Only the embedding is left."""

    def forward(self, ids, cu_seqlens, labels, supervised, longest=None) -> Tensor:  # type: ignore
        """The rewards (N), in fp32, at the tokens with labels, which `label_ends` chooses."""
        hidden = self.model(ids, cu_seqlens, longest=longest)[0, supervised]  # (N, C)
        return hidden.float() @ self.score.weight[0].float()


def label_ends(examples: Examples) -> Examples:
    """The same texts with a label at the last token of each only, where its reward is read."""
    labels, ends = np.full_like(examples.labels, IGNORE), examples.starts[1:] - 1
    labels[ends] = examples.ids[ends]
    return replace(examples, labels=labels)


def reward_fields(tokenizer: Tokenizer, config: LlamaConfig) -> dict[str, Any]:
    """What config.json says of a reward model. No text ends with an unknown token, or with BOS."""
    candidates, ends = (tokenizer.unk_id, tokenizer.bos_id, 0, 1), end_ids(tokenizer, config)
    pad = next(each for each in candidates if each is not None and each not in ends)
    names = ["LlamaForSequenceClassification"]
    return {"architectures": names, "num_labels": 1, "pad_token_id": pad}


def load_reward_model(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> RewardModel:
    """The reward model in a folder; `dtype` None keeps the one that each weight is stored in."""
    config, stored = open_checkpoint(folder, RewardModel)
    with torch.device("meta"):
        model = RewardModel(config)
    weights = {n: as_dtype(t.read(), dtype or t.dtype, n).to(device) for n, t in stored.items()}
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


@torch.no_grad()
def rewards(model: RewardModel, tokenizer: Tokenizer, records: list[dict]) -> list[float]:
    """The reward of each record's last answer, cut to the model's positions if it is too long."""
    limit, device = model.config.max_position_embeddings, model.score.weight.device
    texts = [encode_record(record, tokenizer)[0][:limit] for record in records]
    ids, starts = np.concatenate(texts).astype(np.int32), np.cumsum([0, *map(len, texts)])
    examples = label_ends(Examples(ids, ids, starts, records, {}))
    found, longest = torch.empty(len(texts)), int(examples.lengths.max())
    rows = pack_rows(examples.lengths, 1, max(REWARD_ROW, longest))[0]
    progress = Progress(len(rows), "rows of answers")
    for row in progress.count(rows):
        inputs = make_row(examples, np.array(row, int))._asdict().items()
        found[row] = model(**{name: x.to(device) for name, x in inputs}).cpu()
    progress.close()
    return found.tolist()
