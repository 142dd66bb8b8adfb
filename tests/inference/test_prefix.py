"""Sequences that share a prefix have the logits of their whole texts.

A tiny model's logits of several units carry fp32 noise of 3e-6; where 1e-6 is asked against another
order of computing, `initializer_range` is 0.05: there noise is 4e-7, and a position too few 0.1."""

import resource
from pathlib import Path

import pytest
import torch
from helpers.models import random_ids, small_model

from alpaca.inference.prefix import extend, fork, new_cache, prefill
from model import KVCache, Llama

RESTS = (1, 7, 20, 3)


def rows_of(*lengths: int) -> list[list[int]]:
    torch.manual_seed(3)
    return [random_ids(length).tolist() for length in lengths]


def fill(model: Llama, cache: KVCache, prefix: list[int]) -> KVCache:
    source = new_cache(model, 1, len(prefix))
    prefill(model, source, [prefix])
    fork(source, cache)
    return cache


def forked(model: Llama, prefix: list[int], slots: int, left: int) -> KVCache:
    return fill(model, new_cache(model, slots, len(prefix) + left), prefix)


def distance_from_whole_texts(
    model: Llama, cache: KVCache, prefix: list[int], rests: list[list[int]]
) -> float:
    got = model.lm_head(extend(model, cache, rests))  # (B, V)
    whole = [model(torch.tensor([prefix + rest]))[0, -1] for rest in rests]
    return (got - torch.stack(whole)).abs().max().item()


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 30])
@pytest.mark.parametrize("static", [False, True])
def test_forked_prefix_moves_no_logit(kv_heads, length, static):
    for scale, allowed, wrong in ((0.05, 1e-6, 0.05), (0.2, 2e-5, 1.0)):
        model = small_model(num_key_value_heads=kv_heads, initializer_range=scale)
        prefix, *rests = rows_of(length, *RESTS)
        cache = forked(model, prefix, len(RESTS), max(RESTS))
        cache.static = static
        assert distance_from_whole_texts(model, cache, prefix, rests) <= allowed
        assert cache.lengths.tolist() == [length + rest for rest in RESTS]
        more = rows_of(2, 1, 5, 4, 9)[1:]  # the padding of the call before is overwritten
        cache.lengths.sub_(torch.tensor([0, 2, 15, 0]))
        shorter = [rest[:n] for rest, n in zip(rests, (1, 5, 5, 3), strict=True)]
        whole = [rest + new for rest, new in zip(shorter, more, strict=True)]
        got = model.lm_head(extend(model, cache, more))
        for logits, text in zip(got, whole, strict=True):
            expected = model(torch.tensor([prefix + text]))[0, -1]
            assert (logits - expected).abs().max() <= allowed
        fill(model, cache, prefix)
        cache.lengths.sub_(1) if length > 1 else cache.k.neg_()
        assert distance_from_whole_texts(model, cache, prefix, rests) > wrong, "cannot fail"


@torch.no_grad()
def test_fork_equals_a_prefill_of_each_slot_in_every_bit():
    model, (prefix, *rests) = small_model(), rows_of(32, *RESTS)
    cache = new_cache(model, len(RESTS), 52)
    prefill(model, cache, [prefix] * len(RESTS))
    expected = extend(model, cache, rests)
    assert torch.equal(extend(model, forked(model, prefix, 4, 20), rests), expected)


@torch.no_grad()
def test_rows_are_padded_to_a_multiple_where_the_cache_has_room(monkeypatch):
    model, prefix, widths = small_model(), rows_of(5)[0], []
    caches = [forked(model, prefix, 2, left) for left in (3, 10, 40)]
    real = model.model.forward

    def forward(ids, cache):
        widths.append(ids.shape[1])
        return real(ids, cache=cache)

    monkeypatch.setattr(model.model, "forward", forward)
    for cache in caches:
        extend(model, cache, rows_of(3, 1))
    assert widths == [3, 10, 16]


@torch.no_grad()
def test_fork_replaces_what_longer_sequences_left():
    model, (prefix, long, *rests) = small_model(), rows_of(6, 30, *RESTS)
    cache = forked(model, long, len(RESTS), 20)
    extend(model, cache, rests)
    fill(model, cache, prefix)
    assert distance_from_whole_texts(model, cache, prefix, rests) <= 2e-5


@torch.no_grad()
def test_a_cache_takes_memory_only_where_keys_are_stored():
    """What Linux says that this process holds: it is all that a long maximum costs."""
    pages = Path("/proc/self/statm")
    if not pages.is_file():
        pytest.skip("needs Linux")
    model, prompt = small_model(), rows_of(8)
    prefill(model, new_cache(model, 1, 8), prompt)  # the first pass loads libraries
    before = int(pages.read_text().split()[1])
    cache = new_cache(model, 64, 8192)
    prefill(model, cache[:1], prompt)
    taken = (int(pages.read_text().split()[1]) - before) * resource.getpagesize()
    assert cache.k.nbytes > 1e8 and taken < cache.k.nbytes / 8  # a page may have 2 MB
