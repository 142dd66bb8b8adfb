"""Decoding without a cache or a batch: what the engine is compared with."""

import torch

from helpers.commands import ROOT
from helpers.models import small_config
from model import Llama
from tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(ROOT / "data/tokenizer.model")


def new_model(**changes) -> Llama:
    torch.manual_seed(0)
    return Llama(small_config(vocab_size=1024, **changes)).eval()


def prompts_of(*lengths: int) -> list[list[int]]:
    torch.manual_seed(7)
    return [[1, *torch.randint(3, 1024, (length - 1,)).tolist()] for length in lengths]


@torch.no_grad()
def plain_greedy(model: Llama, prompt: list[int], count: int) -> list[int]:
    """Without a cache: the whole text through the model for every token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] == TOKENIZER.eos_id:
            break
    return ids[len(prompt) :]
