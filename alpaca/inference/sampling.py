"""From logits to a token: temperature, top-k, top-p and the repetition penalty.

The next token is chosen from its logits l, one per token of the vocabulary, in five steps:

  1. Repetition penalty r (arXiv:1909.05858): for every token that prompt or answer already holds,
     l becomes l / r where positive and l · r where negative.
  2. Temperature t: p = softmax(l / t). With t = 0 the likeliest token is taken, without 3 to 5.
  3. Top-k: only the k likeliest tokens stay (arXiv:1805.04833).
  4. Top-p: of these, the likeliest whose probabilities first add up to p (arXiv:1904.09751).
  5. Inverse transform sampling: with u uniform in [0, 1), drawn from the sequence's own seed, the
     token at which the cumulative sum of the remaining probabilities exceeds u times its total.

Each sequence of a batch is sampled independently: its token does not depend on the others.

Shapes: B sequences, V vocabulary, M candidates; arguments with one number a sequence are (B, 1).
"""

import argparse
import random
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from alpaca.common.cli import positive
from alpaca.common.errors import UserError

CANDIDATES = 1024  # top-p rarely needs more: sorting 32,000 tokens is slow, their topk is not


def derive_seed(*numbers: int) -> int:
    """A seed of its own for each sequence of numbers."""
    return random.Random(" ".join(map(str, numbers))).getrandbits(63)


@dataclass(frozen=True)
class SamplingParams:
    """How one answer is generated."""

    temperature: float = 0.0  # 0: greedy, always the likeliest token
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()  # texts that end the answer and are not part of it
    logprobs: int | None = None  # record the log-probability of each token and of this many others

    def __post_init__(self):
        problems = {
            "temperature must be 0 or above": not 0 <= self.temperature < float("inf"),
            "top_k must be 0 (all) or above": self.top_k < 0,
            "top_p must be above 0 and at most 1": not 0 < self.top_p <= 1,
            "repetition_penalty must be above 0": not 0 < self.repetition_penalty < float("inf"),
            "seed must be 0 or above": self.seed < 0,
            "max_new_tokens must be above 0": self.max_new_tokens < 1,
            "stop must be a tuple of texts": isinstance(self.stop, str),
            "stop must not be empty: it would end every answer": "" in self.stop,
            "logprobs must be 0 or above": self.logprobs is not None and self.logprobs < 0,
        }
        for problem, found in problems.items():
            if found:
                raise UserError(problem)

    @property
    def filtered(self) -> bool:
        return self.top_k > 0 or self.top_p < 1


GREEDY = SamplingParams()


def add_sampling_arguments(parser: argparse.ArgumentParser, batched: bool = True) -> None:
    add, count = parser.add_argument, positive(int, 2**20)
    add("--temperature", type=float, default=0.0, help="0: always the likeliest token (default)")
    add("--top-k", type=int, default=0, help="sample from the k likeliest (default: 0, all)")
    add("--top-p", type=float, default=1.0, help="from the likeliest that sum to p (default: 1)")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: repeat less (default: 1)")
    add("--seed", type=int, default=0, help="same seed, same text (default: 0)")
    add("--stop", action="append", default=[], help="text that ends the answer; repeatable")
    add("--max-new-tokens", type=count, default=256, help="of an answer (default: 256)")
    if batched:
        add("--max-batch-size", type=count, default=8, help="answers decoded together (default: 8)")


def sampling_from_args(args: argparse.Namespace) -> SamplingParams:
    """Each flag has the name of the field that it sets."""
    names = [field.name for field in fields(SamplingParams) if field.name in args]
    given = {name: getattr(args, name) for name in names}
    given["stop"] = tuple(args.stop)
    return SamplingParams(**given)


def penalize_repetition(logits: Tensor, penalty: float, seen: Tensor) -> Tensor:
    """The logits (V) of one sequence, with those of the ids in `seen` lowered."""
    old = logits[seen]
    return logits.index_copy(0, seen, torch.where(old > 0, old / penalty, old * penalty))


def sample(logits: Tensor, params: list[SamplingParams], uniforms: list[float]) -> Tensor:
    """A token (B) for each sequence of logits (B, V), given a uniform random number each."""
    if logits.is_mps:  # a Mac's GPU has no fp64
        return sample(logits.cpu(), params, uniforms).to(logits.device)
    greedy = any(p.temperature == 0 for p in params)
    tokens = logits.argmax(-1) if greedy else torch.empty_like(logits[:, 0], dtype=torch.int64)
    for filtered in (False, True):  # separately, since only one of the two has to sort
        group = [i for i, p in enumerate(params) if p.temperature > 0 and p.filtered is filtered]
        if not group:
            continue
        temperature = as_column([params[i].temperature for i in group], logits)
        u = as_column([uniforms[i] for i in group], logits)
        p = logits[group].double()  # (B, V), and from here on in place
        p.sub_(p.amax(-1, keepdim=True))  # a small temperature must not overflow
        p.div_(temperature).exp_()  # a softmax but for its sum, which `draw` does not need
        if filtered:
            p.div_(p.sum(-1, keepdim=True))
            tokens[group] = draw_filtered(p, [params[i] for i in group], u)
        else:
            tokens[group] = draw(p, u)
    return tokens


def as_column(numbers: list[float], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=like.device)[:, None]  # (B, 1)


def draw(p: Tensor, u: Tensor) -> Tensor:
    """The index (B) at which the cumulative sum of p (B, M) exceeds u times its total."""
    cumulative = p.cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    index = torch.searchsorted(cumulative, u * total, right=True)
    last = torch.searchsorted(cumulative, total)  # u < 1, but u · total may round up to total
    return torch.minimum(index, last)[:, 0].clamp(max=p.shape[1] - 1)  # of NaN: any index


def draw_filtered(p: Tensor, params: list[SamplingParams], u: Tensor) -> Tensor:
    """Top-k and top-p. The likeliest candidates are enough for most sequences; the others are
    sorted in full, but only those, so that ties never depend on who else is in the batch."""
    V, M = p.shape[1], min(p.shape[1], CANDIDATES)
    k = torch.tensor([min(one.top_k or V, V) for one in params], device=p.device)[:, None]
    top_p = as_column([one.top_p for one in params], p)
    candidates, ids = p.topk(M)  # (B, M), descending
    nucleus_inside = (k == V) & (candidates.sum(-1, keepdim=True) >= top_p)
    enough = ((k <= M) | nucleus_inside)[:, 0]
    tokens = draw_sorted(candidates, ids, k, top_p, u)
    if not enough.all():
        rest = ~enough
        in_full, order = p[rest].sort(descending=True)
        tokens[rest] = draw_sorted(in_full, order, k[rest], top_p[rest], u[rest])
    return tokens


def draw_sorted(p: Tensor, ids: Tensor, k: Tensor, top_p: Tensor, u: Tensor) -> Tensor:
    """Filter the descending probabilities p (B, M) of the tokens `ids`, and draw one of those."""
    p = p.masked_fill(torch.arange(p.shape[1], device=p.device) >= k, 0)
    cumulative = p.cumsum(-1)
    # p may hold only the first M of V tokens; all V sum to 1
    total = torch.where(k > p.shape[1], 1.0, cumulative[:, -1:])
    sum_before = cumulative - p
    p = p.masked_fill(sum_before >= top_p * total, 0)
    return ids.gather(-1, draw(p, u)[:, None])[:, 0]
