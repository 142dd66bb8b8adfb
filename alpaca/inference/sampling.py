"""From logits to a token: what temperature, top-k, top-p and the repetition penalty do.

The logits l of the next token, one for each piece of the vocabulary V, become a choice, in order:

  1. Repetition penalty r (arXiv:1909.05858): of every token that prompt or answer holds already,
     l becomes l / r where positive, l · r where negative.
  2. Temperature t: p = softmax(l / t). t = 0 is the likeliest token, and the rest does not matter.
  3. top-k: only the k likeliest tokens are kept (arXiv:1805.04833).
  4. top-p: of these, only the likeliest whose probabilities first add up to p (arXiv:1904.09751).
  5. One number u, even in [0, 1), from the answer's own seed: the token where the running sum of
     what is kept passes u times its total.

Rows are independent: what is drawn for one does not depend on which others are decoded with it.

Shown by tests/test_sampling.py: test_draws_follow_the_definition.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from alpaca.common.errors import UserError

CANDIDATES = 1024  # sorting a whole vocabulary is seldom needed


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is to be made."""

    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0  # 0 or above
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()  # texts that end the answer, and are not part of it
    logprobs: int | None = None  # tell the chosen tokens' and those of so many likeliest

    def __post_init__(self):
        problems = {
            "temperature must be 0 or above": not 0 <= self.temperature < float("inf"),
            "top_k must be 0 (all) or above": self.top_k < 0,
            "top_p must be above 0 and at most 1": not 0 < self.top_p <= 1,
            "repetition_penalty must be above 0": not 0 < self.repetition_penalty < float("inf"),
            "seed must be 0 or above": self.seed < 0,
            "max_new_tokens must be above 0": self.max_new_tokens < 1,
            "stop is a tuple of texts": isinstance(self.stop, str),
            "an empty stop text would end every answer": "" in self.stop,
            "logprobs must be 0 or above": self.logprobs is not None and self.logprobs < 0,
        }
        if wrong := [text for text, is_so in problems.items() if is_so]:
            raise UserError(wrong[0])

    @property
    def filtered(self) -> bool:
        return self.top_k > 0 or self.top_p < 1


GREEDY = SamplingParams()


def penalize_repetition(logits: Tensor, penalty: float, seen: Tensor) -> Tensor:
    """One row's logits (V), those of the `seen` ids made less likely."""
    those = logits[seen]
    return logits.index_copy(0, seen, torch.where(those > 0, those / penalty, those * penalty))


def sample(logits: Tensor, ways: list[SamplingParams], numbers: list[float]) -> Tensor:
    """A token for each row of logits (B, V): rows of one kind together, since they cost alike."""
    chosen = logits.argmax(-1)  # (B)
    for filtered in (False, True):
        rows = [i for i, w in enumerate(ways) if w.temperature > 0 and w.filtered is filtered]
        if rows:
            heat = as_column([ways[i].temperature for i in rows], logits)
            # less the highest first, or a small temperature overflows
            wide = logits[rows].double()
            p = torch.softmax((wide - wide.amax(-1, keepdim=True)) / heat, dim=-1)
            u = as_column([numbers[i] for i in rows], logits)
            some = [ways[i] for i in rows]
            chosen[rows] = draw_filtered(p, some, u) if filtered else draw(p, u)
    return chosen


def as_column(numbers: list[float], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=like.device)[:, None]  # (R, 1)


def draw(p: Tensor, u: Tensor) -> Tensor:
    """Where the running sum of p (R, V) passes u (R, 1) times its total."""
    running = p.cumsum(-1)
    total = running[:, -1:].contiguous()
    place = torch.searchsorted(running, u * total, right=True)
    last = torch.searchsorted(running, total)  # u < 1, but the product may round up
    return torch.minimum(place, last)[:, 0]


def draw_filtered(p: Tensor, ways: list[SamplingParams], u: Tensor) -> Tensor:
    """Most rows are settled among the likeliest; only those that are not are sorted whole, so that
    a row's order, also of equal numbers, never depends on its neighbours."""
    V, count = p.shape[1], min(p.shape[1], CANDIDATES)
    k = torch.tensor([min(way.top_k or V, V) for way in ways], device=p.device)[:, None]
    top_p = as_column([way.top_p for way in ways], p)
    likeliest, ids = p.topk(count)  # (R, count), falling
    inside = (k == V) & (likeliest.sum(-1, keepdim=True) >= top_p)
    enough = ((k <= count) | inside)[:, 0]
    chosen = draw_sorted(likeliest, ids, k, top_p, u)
    if not enough.all():
        some = ~enough
        sorted_p, order = p[some].sort(descending=True)
        chosen[some] = draw_sorted(sorted_p, order, k[some], top_p[some], u[some])
    return chosen


def draw_sorted(p: Tensor, ids: Tensor, k: Tensor, top_p: Tensor, u: Tensor) -> Tensor:
    """Top-k and top-p of falling p (R, M), then the draw; k, top_p and u are (R, 1)."""
    kept = p.masked_fill(torch.arange(p.shape[1], device=p.device) >= k, 0)
    running = kept.cumsum(-1)
    # Of all V tokens the sum is 1, of which p may hold a part.
    total = torch.where(k > p.shape[1], 1.0, running[:, -1:])
    before = running - kept  # what the likelier ones add up to
    kept = kept.masked_fill(before >= top_p * total, 0)
    return ids.gather(-1, draw(kept, u)[:, None])[:, 0]
