"""Greedy decoding of a batch of prompts through the key/value cache.

All prompts of a batch are packed one behind the other and start their cache rows in one forward
pass, without padding; from then on every pass gives each row one more token. A row that has ended
goes on unheard until the last one has.
"""

from itertools import accumulate

import torch

from model import KVCache, Llama
from tokenizer import Tokenizer


@torch.no_grad()
def greedy(
    model: Llama, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int
) -> list[str]:
    """The likeliest continuation of each prompt, up to EOS, as text.

    A prompt that leaves no room in the positions the model knows gets as many tokens as fit."""
    room = model.config.max_position_embeddings - max(len(ids) for ids in prompts)
    if room < 1:
        raise ValueError(f"a prompt fills all {model.config.max_position_embeddings} positions")
    device, steps = next(model.parameters()).device, min(max_new_tokens, room)
    bounds = torch.tensor([0, *accumulate(len(ids) for ids in prompts)], device=device)
    ids = torch.tensor([token for ids in prompts for token in ids], device=device)
    longest = max(len(ids) for ids in prompts) + steps
    dtype = next(model.parameters()).dtype
    cache = KVCache(model.config, len(prompts), longest, device, dtype)
    hidden = model.hidden(ids[None], bounds.int(), cache)[0, bounds[1:] - 1]  # (rows, C)
    chosen = []
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for step in range(steps):
        if step:
            hidden = model.hidden(chosen[-1][:, None], cache=cache)[:, 0]
        logits = model.lm_head(hidden)[:, : tokenizer.vocab_size]  # extra rows have no piece
        chosen.append(logits.argmax(-1))
        ended |= chosen[-1] == tokenizer.eos_id
        if ended.all():
            break
    answers = torch.stack(chosen, dim=1).tolist()
    return [continuation(tokenizer, p, a) for p, a in zip(prompts, answers, strict=True)]


def continuation(tokenizer: Tokenizer, prompt: list[int], answer: list[int]) -> str:
    if tokenizer.eos_id in answer:
        answer = answer[: answer.index(tokenizer.eos_id)]
    stream = tokenizer.stream(after=prompt)
    return "".join(map(stream.push, answer)) + stream.flush()
