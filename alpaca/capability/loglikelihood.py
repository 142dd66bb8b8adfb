"""How likely a model finds each of several continuations of a text.

    requests = [Choices(context=ids, continuations=[ids_of_a, ids_of_b]), …]
    for index, scores in log_likelihoods(model, requests, prefix):
        best = scores.index(max(scores))

The score of a continuation y after a context x is Σ log p(y_i | x, y_1 … y_(i-1)). Only the hidden
states that predict a token of a continuation become logits: of a question with four answers of one
token, a single one, that after the context. What is computed once:

  - The prefix, with which all contexts begin: the examples in front of each question. Its keys and
    values are in every slot of the cache from the start (alpaca/inference/prefix.py).
  - A context, whose continuations are branches in its slot.

A slot holds prefix, context and all continuations but their last tokens, which predict nothing.
Five examples of 130 tokens and a question of 100 with four endings of 26 make 850 tokens, of which
200 are computed; whole texts would be 4 × 775. The longest requests come first: if memory is too
small, that shows at once.
"""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch

from alpaca.inference.prefix import Branches, fork, new_cache, pad, padded_length, prefill
from model import LOGITS_CHUNK, KVCache, Llama

MAX_BATCH_TOKENS = 8192  # tokens in the cache: 0.4 GB for SmolLM2-135M in fp32, 4 for 7B in 16 bits


class Choices(NamedTuple):
    context: list[int]  # ids, at least one
    continuations: list[list[int]]  # ids of each, at least one


class Tree(NamedTuple):
    """The tokens of a request behind the prefix, as they lie in a slot, and what they predict."""

    request: int
    ids: list[int]
    positions: list[int]
    branches: list[int]
    predicting: list[int]  # indices into ids
    targets: list[int]
    sizes: list[int]  # targets of each continuation


def make_tree(index: int, request: Choices, start: int) -> Tree:
    context = request.context[start:]
    n = len(context)
    tree = Tree(index, context, [*range(n)], [0] * n, [], [], [])
    for branch, continuation in enumerate(request.continuations, 1):
        inner = len(continuation) - 1  # tokens that predict the one behind them
        tree.predicting.extend([n - 1, *range(len(tree.ids), len(tree.ids) + inner)])
        tree.targets.extend(continuation)
        tree.sizes.append(len(continuation))
        tree.ids.extend(continuation[:-1])
        tree.positions.extend(range(n, n + inner))
        tree.branches.extend([branch] * inner)
    return tree


@torch.inference_mode()
def score(model: Llama, cache: KVCache, start: int, trees: list[Tree]) -> list[list[float]]:
    """The log-likelihood of each continuation of each tree, whose slot holds `start` tokens."""
    device = cache.lengths.device
    T = padded_length(max(len(tree.ids) for tree in trees), cache.k.shape[3] - start)
    ids = pad([tree.ids for tree in trees], T, device)  # (B, T)
    positions = pad([tree.positions for tree in trees], T, device)
    branches = pad([tree.branches for tree in trees], T, device)
    slots = Branches(cache, start, positions, branches)
    hidden = model.model(ids, cache=slots).flatten(0, 1)  # (B · T, C)
    at = [row * T + i for row, tree in enumerate(trees) for i in tree.predicting]
    predicting = torch.tensor(at, device=device)
    targets = torch.tensor([t for tree in trees for t in tree.targets], device=device)
    chunk, found = max(1, LOGITS_CHUNK // model.config.vocab_size), []
    for at, target in zip(predicting.split(chunk), targets.split(chunk), strict=True):
        states, which = at.unique(return_inverse=True)  # of answers of one token, the same state
        log_p = model.lm_head(hidden[states]).log_softmax(-1, dtype=torch.float32)
        found.append(log_p[which, target])
    sizes = [size for tree in trees for size in tree.sizes]
    sums = iter([part.sum().item() for part in torch.cat(found).cpu().split(sizes)])
    return [list(islice(sums, len(tree.sizes))) for tree in trees]


def score_all(
    model: Llama, trees: list[Tree], prefix: list[int], max_batch_tokens: int
) -> Iterator[tuple[int, list[float]]]:
    trees = sorted(trees, key=lambda tree: len(tree.ids), reverse=True)
    longest = len(prefix) + len(trees[0].ids)
    cache = new_cache(model, min(max(1, max_batch_tokens // longest), len(trees)), longest)
    if prefix:
        first = new_cache(model, 1, len(prefix))
        with torch.inference_mode():
            prefill(model, first, [prefix])
        fork(first, cache)
    slots = len(cache.lengths)
    for batch in (trees[i : i + slots] for i in range(0, len(trees), slots)):
        scores = score(model, cache[: len(batch)], len(prefix), batch)
        yield from zip((tree.request for tree in batch), scores, strict=True)


def log_likelihoods(
    model: Llama,
    requests: list[Choices],
    prefix: list[int],
    max_batch_tokens: int = MAX_BATCH_TOKENS,
) -> Iterator[tuple[int, list[float]]]:
    """(index of the request, Σ log p of each continuation), a batch at a time, longest first.

    Contexts that begin with `prefix` and are longer share it; the others are computed whole."""
    limit = model.config.max_position_embeddings
    groups: dict[int, list[Tree]] = {len(prefix): [], 0: []}  # by the tokens that they share
    for i, (context, continuations) in enumerate(requests):
        size = len(context) + max(map(len, continuations)) - 1
        assert size <= limit, f"request {i} has {size} tokens, and the model {limit} positions"
        shares = len(context) > len(prefix) and context[: len(prefix)] == prefix
        start = len(prefix) if shares else 0
        groups[start].append(make_tree(i, requests[i], start))
    for start, trees in groups.items():
        if trees:
            yield from score_all(model, trees, prefix[:start], max_batch_tokens)
