"""Texts that begin alike, one after the other and at once, with memory for all and for few."""

import random

import pytest
import torch
from helpers.decoding import TOKENIZER, new_model, plain_greedy, prompts_of

from alpaca.inference.engine import Engine
from alpaca.inference.prefix import new_cache, prefill
from alpaca.inference.prefix_tree import NODE_TOKENS, PrefixTree
from alpaca.inference.sampling import SamplingParams
from model import Decoder

GREEDY, ONE = SamplingParams(max_new_tokens=6), SamplingParams(max_new_tokens=1)
LONG = {"max_position_embeddings": 1024}


@pytest.fixture
def widths(monkeypatch) -> list[int]:
    """The width of every call of a model: 1 for a decoding step."""
    found, forward = [], Decoder.forward

    def spy(self, ids, *rest, **named):
        found.append(ids.shape[1])
        return forward(self, ids, *rest, **named)

    monkeypatch.setattr(Decoder, "forward", spy)
    return found


def bytes_of(model, tokens: int) -> int:
    return 2 * new_cache(model, 1, tokens).k.nbytes


def filled(model, ids: list[int]):
    cache = new_cache(model, 1, len(ids))
    prefill(model, cache, [ids])
    return cache


@torch.no_grad()
def test_load_returns_the_bits_that_were_stored():
    model, (ids,) = new_model(**LONG), prompts_of(100)
    source, target = filled(model, ids), new_cache(model, 1, 100)
    tree = PrefixTree(source, 1 << 26)
    tree.store(ids, source)
    assert tree.known(ids) == tree.load(ids, target) == int(target.lengths) == 96
    for ours, theirs in ((source.k, target.k), (source.v, target.v)):
        assert torch.equal(ours[..., :96, :], theirs[..., :96, :]) and not theirs[..., 96:, :].any()
    assert tree.load(ids[:96], target) == 64, "the last token is run: its logits are wanted"
    assert tree.load([*ids[:40], *ids[:40]], target) == 32
    assert tree.load([*ids[32:64], *ids[:32]], target) == 0, "the same tokens at another position"
    assert int(target.lengths) == 0


@torch.no_grad()
def test_memory_is_bounded_and_the_oldest_ends_go_first():
    model, texts = new_model(**LONG), prompts_of(97, 65, 65, 200)
    texts[1][:NODE_TOKENS] = texts[0][
        :NODE_TOKENS
    ]  # two texts with the same beginning, and two others
    caches = [filled(model, ids) for ids in texts]
    tree = PrefixTree(caches[0], bytes_of(model, 5 * NODE_TOKENS) + 100)

    def known() -> list[int]:
        return [tree.known(ids) // NODE_TOKENS for ids in texts]

    tree.store(texts[0], caches[0])
    tree.store(texts[1], caches[1])
    assert known() == [3, 2, 0, 0] and len(tree.nodes) == 4
    tree.store(texts[2], caches[2])
    assert known() == [2, 2, 2, 0] and len(tree.nodes) == 5
    tree.load(texts[0], caches[0])
    tree.store(texts[0], filled(model, texts[0]))
    assert known() == [3, 1, 2, 0]
    tree.store(texts[3], caches[3])  # longer than the memory: its beginning
    assert known() == [0, 0, 0, 5] and len(tree.nodes) == 5
    for _, node in tree.nodes.items():
        assert node.k.untyped_storage().nbytes() == node.k.nbytes, "a view would keep all of it"


@torch.no_grad()
def test_every_node_can_be_reached_after_any_evictions():
    model, rng = new_model(num_hidden_layers=1, **LONG), random.Random(0)
    ids = prompts_of(300)[0]
    tree = PrefixTree(cache := filled(model, ids), bytes_of(model, 12 * NODE_TOKENS))
    for _ in range(300):
        text = [token + rng.randrange(2) * (i % 50 == 0) for i, token in enumerate(ids)]
        text = text[: rng.randrange(300)]
        cache.lengths.fill_(len(text))
        tree.store(text, cache) if rng.random() < 0.7 else tree.load(text, cache)
        numbers = {0} | {node.number for node in tree.nodes.values()}
        assert {parent for parent, _ in tree.nodes} <= numbers and len(tree.nodes) <= 12


@pytest.mark.parametrize("slots", [1, 2, 9])
@pytest.mark.parametrize("blocks", [3, 100])
def test_answers_are_those_without_the_tree(slots, blocks):
    """Greedy and sampled, prompts that share one block, two or none; twice."""
    model, (one, two, *rests) = new_model(**LONG), prompts_of(32, 40, 2, 13, 5, 50)
    prompts = [one + rest[1:] for rest in rests] + [one + two + rest[1:] for rest in rests]
    prompts += [rests[3], one, [*one, 9], prompts[0], prompts[0]]
    params = [SamplingParams(i % 2, seed=i, max_new_tokens=3 + i % 5) for i in range(len(prompts))]
    pairs = [*zip(prompts, params, strict=True)]
    expected = [Engine(model, TOKENIZER).generate([p], each)[0].ids for p, each in pairs]
    memory = bytes_of(model, blocks * NODE_TOKENS)
    engine = Engine(model, TOKENIZER, slots, prefix_memory=memory)
    for _ in range(2):
        answers = engine.finish([engine.add(*pair) for pair in pairs])
        assert [answer.ids for answer in answers] == expected
        engine.cancel(engine.add(prompts[2]))
    with torch.inference_mode():
        for node in engine.tree.nodes.values():
            node.v.neg_()
    wrong = engine.finish([engine.add(*pair) for pair in pairs])
    assert [answer.ids for answer in wrong] != expected, "nothing came from the tree"


def test_turn_of_a_conversation_runs_only_what_is_new(widths):
    model, turns = new_model(**LONG), prompts_of(*[40] * 10)
    engine, conversation, computed = Engine(model, TOKENIZER, prefix_memory=1 << 26), [], []
    for turn in turns:
        conversation += turn
        widths.clear()
        (answer,) = engine.generate([conversation], GREEDY)
        assert answer.ids == plain_greedy(model, conversation, 6)
        computed.append(widths[0])
        conversation += answer.ids
    assert len(conversation) > 450 and max(computed) <= 80, computed


def test_long_prompt_is_run_in_parts_while_others_are_decoded(widths):
    model, (short, long) = new_model(**LONG), prompts_of(5, 700)
    params = SamplingParams(max_new_tokens=40)
    expected = [answer.ids for answer in Engine(model, TOKENIZER).generate([short, long], params)]
    widths.clear()
    engine = Engine(model, TOKENIZER, 2, prefix_memory=1 << 26, max_stall=0.01)
    engine.prefill_rate = 6400.0  # 64 tokens a step; later what this machine does
    first = engine.add(short, params)
    engine.step()
    second = engine.add(long, params)
    widths.clear()
    engine.step()
    assert widths == [1, 64] and len(first.ids) == 2 and not second.ids
    assert engine.cache.lengths[1] == 0, "the slot is free"
    while not second.ids:
        engine.prefill_rate = 6400.0
        engine.step()
    assert widths == [1, 64] * 10 + [1, 64] and len(first.ids) == 12  # 60 tokens are left, padded
    engine.finish([first, second])
    assert [first.ids, second.ids] == expected
    alone = Engine(model, TOKENIZER, 2, prefix_memory=1 << 26, max_stall=0.01)
    widths.clear()
    alone.generate([long], params)
    assert widths[0] == 704, "nobody waits for it"


def test_long_prompt_runs_whole_where_the_tree_cannot_hold_it(widths):
    model, (short, long) = new_model(**LONG), prompts_of(5, 700)
    for memory in (0, bytes_of(model, 690)):
        engine = Engine(model, TOKENIZER, 2, prefix_memory=memory, max_stall=1e-9)
        engine.add(short)
        engine.step()
        engine.add(long)
        engine.step()
        assert widths[-1] == 704


def test_prompt_that_is_run_in_parts_can_be_cancelled():
    model, (short, long, last) = new_model(**LONG), prompts_of(5, 300, 6)
    engine = Engine(model, TOKENIZER, 2, prefix_memory=1 << 26, max_stall=1e-9)
    running = engine.add(short, SamplingParams(max_new_tokens=60))
    engine.step()
    waiting = engine.add(long)
    engine.step()
    engine.cancel(waiting)
    assert not engine.waiting
    answer = engine.add(last, GREEDY)
    engine.finish([running, answer])
    assert answer.ids == plain_greedy(model, last, 6)
    assert running.ids == plain_greedy(model, short, 60) and not waiting.ids


def finish_reasons(engine: Engine, *prompts: list[int]) -> list[str | None]:
    sequences = [engine.add(prompt, ONE) for prompt in prompts]
    while engine.busy:
        engine.step()
    return [sequence.finish_reason for sequence in sequences]


def test_prompts_do_not_fail_after_one_with_nan():
    """Its values stay in the slot: 0 · NaN in `extend`, and from there for ever in the tree."""
    model = new_model(max_position_embeddings=300)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.nan
    prompts = [[6 if token == 5 else token for token in p] for p in prompts_of(104, 168, 150)]
    one, two, bad = prompts
    bad[120] = 5
    engine = Engine(model, TOKENIZER, 2, prefix_memory=1 << 26)
    finish_reasons(engine, one[:65])
    finish_reasons(engine, two[:129])
    assert finish_reasons(engine, bad) == ["failed"]
    together = finish_reasons(engine, one, two)
    assert finish_reasons(engine, [*one, 9]) == ["length"], "the tree has NaN of a prompt without"
    assert together == ["length"] * 2


def test_answers_end_when_the_tree_has_no_memory(monkeypatch):
    model, (one, two) = new_model(max_position_embeddings=300), prompts_of(40, 50)
    engine = Engine(model, TOKENIZER, 2, prefix_memory=1 << 26)
    first, second = engine.add(one, SamplingParams(max_new_tokens=2)), engine.add(two)
    engine.step()
    engine.step()

    def no_memory(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(PrefixTree, "store", no_memory)
    for _ in range(400):
        try:
            engine.step()
        except torch.OutOfMemoryError:
            continue
    assert first.finish_reason == "length" and second.finish_reason, "its client waits for ever"


@torch.no_grad()
def test_memory_is_bounded_while_a_text_is_stored():
    model, texts = new_model(max_position_embeddings=600), prompts_of(330, 330)
    caches = [new_cache(model, 1, 330) for _ in texts]
    for ids, cache in zip(texts, caches, strict=True):
        prefill(model, cache, [ids])
    tree = PrefixTree(caches[0], 10 * 4 * caches[0].k[:, :, :, :NODE_TOKENS].nbytes // 2)
    most, insert = 0, type(tree.nodes)

    class Watched(insert):
        def __setitem__(self, key, value):
            nonlocal most
            super().__setitem__(key, value)
            most = max(most, len(self))

    tree.nodes = Watched()
    for ids, cache in zip(texts, caches, strict=True):
        tree.store(ids, cache)
    assert len(tree.nodes) == 10 and most <= 11, most


def test_repeats_are_computed_once_while_others_are_decoded(widths):
    """As `serve --prefix-memory 0` asks for n answers."""
    model, (short, long) = new_model(max_position_embeddings=300), prompts_of(5, 100)
    engine = Engine(model, TOKENIZER, 5, max_stall=0.01)
    engine.add(short, SamplingParams(max_new_tokens=50))
    engine.step()
    engine.prefill_rate = 6400.0  # a budget of 64
    widths.clear()
    finish_reasons(engine, *[long] * 4)
    assert [width for width in widths if width > 1] == [112]


def test_beginning_is_run_once_of_prompts_that_join_together(monkeypatch):
    """As the examples before an exam's questions, which `Engine(prefix=…)` ran once."""
    common, *rests = prompts_of(400, *[20] * 5)
    engine = Engine(new_model(max_position_embeddings=600), TOKENIZER, 5, prefix_memory=1 << 26)
    tokens, forward = [], Decoder.forward

    def spy(self, ids, *rest, **named):
        tokens.append(ids.numel())
        return forward(self, ids, *rest, **named)

    monkeypatch.setattr(Decoder, "forward", spy)
    finish_reasons(engine, *(common + rest for rest in rests))
    assert sum(tokens) < 900, tokens


def test_part_with_nan_harms_nobody_after_it_is_cancelled():
    """A longer sequence beside it makes a step read what the part left in the slot."""
    model, (long, bad, one) = new_model(**LONG), prompts_of(300, 400, 40)
    expected = plain_greedy(model, one, 6)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.nan
    long, one = ([6 if token == 5 else token for token in ids] for ids in (long, one))
    bad[20] = 5
    engine = Engine(model, TOKENIZER, 2, prefix_memory=1 << 26, max_stall=0.01)
    engine.add(long, SamplingParams(max_new_tokens=60))
    engine.step()
    engine.prefill_rate = 25600.0  # a part of 256 tokens
    waiting = engine.add(bad)
    engine.step()
    assert engine.tree.known(bad) == 256, "a part has been run"
    engine.cancel(waiting)
    (answer,) = engine.generate([one], GREEDY)
    assert answer.ids == expected
