"""The engine: whatever joins or leaves, a sequence gets what plain greedy decoding gives."""

import mmap
import random
from unittest.mock import Mock

import pytest
import torch
from helpers.commands import ROOT
from helpers.decoding import TOKENIZER, new_model, plain_greedy, prompts_of
from helpers.models import small_config

from alpaca.common.errors import UserError
from alpaca.inference.engine import PREFILL_TOKENS, Engine
from alpaca.inference.prefix import new_cache
from alpaca.inference.sampling import SamplingParams
from alpaca.inference.sequence import Sequence, overlap
from alpaca.weights.kernels import optimize_layout
from dataset import encode_prompt
from model import Decoder, Llama
from tokenizer import load_tokenizer

# ---------------------------------------------------------------- batches


@pytest.mark.parametrize(("heads", "optimized"), [(1, False), (2, False), (2, True), (4, True)])
def test_batch_equals_plain_decoding(heads, optimized):
    prompts = prompts_of(5, 1, 17, 9, 2, 30, 8)
    expected = [plain_greedy(new_model(num_key_value_heads=heads), p, 20) for p in prompts]
    model = new_model(num_key_value_heads=heads)
    engine = Engine(optimize_layout(model) if optimized else model, TOKENIZER, max_batch_size=4)
    for _ in range(2):  # a used engine is as good as new
        answers = engine.generate(prompts, SamplingParams(max_new_tokens=20))
        assert [answer.ids for answer in answers] == expected
    assert len(set(map(tuple, expected))) == len(prompts), "or the test could not fail"


@pytest.mark.parametrize(("arrivals", "shared"), [(60, 0), (30, 75)])
def test_sequences_that_join_and_leave_at_random_equal_plain_decoding(arrivals, shared):
    """Arrivals at random steps, of random lengths, some cancelled, in three slots. Of those that
    share a prefix, the prefix tree can hold a few, and a step runs 32 tokens of prompts at most."""
    model, rng = new_model(max_position_embeddings=128), random.Random(3)
    options = {"prefix_memory": 6 * 32 * 2 * new_cache(model, 1, 1).k.nbytes, "max_stall": 1e-9}
    engine = Engine(model, TOKENIZER, 3, **(options if shared else {}))
    common, *prompts = prompts_of(shared or 1, *(rng.randint(1, 25) for _ in range(arrivals)))
    if shared:
        prompts = [common[: rng.choice((40, 75))] + prompt for prompt in prompts]
    arrivals = sorted(((rng.randrange(2 * arrivals), p) for p in prompts), key=lambda pair: pair[0])
    sequences, cancelled, step = [], [], 0
    while arrivals or engine.busy:
        while arrivals and arrivals[0][0] <= step:
            params = SamplingParams(max_new_tokens=rng.randint(1, 15))
            sequences.append(engine.add(arrivals.pop(0)[1], params))
        if rng.random() < 0.1 and engine.active:
            victim = rng.choice(engine.active)
            if victim.finish_reason is None:
                engine.cancel(victim)
                cancelled.append(victim)
        engine.step()
        assert len(engine.active) <= 3
        step += 1
    assert len(cancelled) > 2
    for s in sequences:
        expected = plain_greedy(model, s.prompt, s.params.max_new_tokens)
        if s in cancelled:
            assert s.finish_reason == "cancelled" and s.ids == expected[: len(s.ids)]
        else:
            assert s.ids == expected and s.finish_reason in ("stop", "length")


def test_seed_gives_the_same_text_alone_and_in_a_batch():
    model = new_model(initializer_range=0.06)  # flatter: much to choose from
    prompts = prompts_of(4, 11, 7, 19)
    params = [
        SamplingParams(temperature=0.9, seed=1, max_new_tokens=25),
        SamplingParams(temperature=1.3, top_p=0.9, seed=2, max_new_tokens=12),
        SamplingParams(max_new_tokens=25, repetition_penalty=1.5),
        SamplingParams(0.8, top_k=40, seed=4, max_new_tokens=18, repetition_penalty=1.2),
    ]
    engine = Engine(model, TOKENIZER, max_batch_size=3)
    batch = engine.finish([engine.add(p, one) for p, one in zip(prompts, params, strict=True)])
    for prompt, one, sequence in zip(prompts, params, batch, strict=True):
        (alone,) = Engine(model, TOKENIZER).generate([prompt], one)
        assert alone.ids == sequence.ids
    other = SamplingParams(temperature=0.9, seed=2, max_new_tokens=25)
    assert Engine(model, TOKENIZER).generate(prompts[:1], other)[0].ids != batch[0].ids


def test_prompts_are_prefilled_together_up_to_a_limit():
    engine = Engine(new_model(max_position_embeddings=1024), TOKENIZER, max_batch_size=8)
    for prompt in prompts_of(900, 900, 900, 10):
        engine.add(prompt, SamplingParams(max_new_tokens=2))
    assert len(engine.step()) == 2 and 2 * 900 <= PREFILL_TOKENS < 3 * 900
    assert len(engine.step()) == 4


def test_repeated_prompt_is_computed_once(monkeypatch):
    """Several answers to a prompt, some of which join later than others, in every order."""
    model, (a, b, c) = new_model(), prompts_of(21, 9, 14)
    prompts = [a, a, a, b, c, c, a, a, b, b, b, b]
    params = [SamplingParams(1, seed=i, max_new_tokens=3 + 5 * i % 7) for i in range(len(prompts))]
    asked = list(zip(prompts, params, strict=True))
    alone = [Engine(model, TOKENIZER).generate([p], each)[0] for p, each in asked]
    assert len({tuple(one.ids) for one in alone}) > 6
    prefilled, forward = [], Decoder.forward

    def spy(self, ids, cu_seqlens=None, *rest, **named):
        prefilled.append(0 if cu_seqlens is None else len(cu_seqlens) - 1)
        return forward(self, ids, cu_seqlens, *rest, **named)

    monkeypatch.setattr(Decoder, "forward", spy)
    for slots, computed in ((12, 5), (1, 12)):
        prefilled.clear()
        engine = Engine(model, TOKENIZER, slots)
        together = engine.finish([engine.add(p, each) for p, each in asked])
        assert [one.ids for one in together] == [one.ids for one in alone]
        assert sum(prefilled) == computed


def test_prompts_are_padded_to_few_lengths(monkeypatch):
    """oneDNN stores a kernel per length: those of 3,000 prompts took 700 MB instead of 200."""
    engine, lengths = Engine(new_model(max_position_embeddings=100), TOKENIZER), set()
    real = engine.model.model.forward

    def hidden_states(ids, *args):
        lengths.add(ids.shape[1])
        return real(ids, *args)

    monkeypatch.setattr(engine.model.model, "forward", hidden_states)
    for prompt in prompts_of(*range(1, 100, 3)):
        engine.generate([prompt], SamplingParams(max_new_tokens=1))
        assert engine.cache.lengths.tolist() == [len(prompt)]
    assert len(lengths) == 7 and max(lengths) == 100


# ---------------------------------------------------------------- tokens


def test_repetition_penalty_counts_prompt_and_answer():
    (prompt,) = prompts_of(6)
    params = SamplingParams(max_new_tokens=40, repetition_penalty=1e6)
    (answer,) = Engine(new_model(initializer_range=0.06), TOKENIZER).generate([prompt], params)
    assert len({*prompt, *answer.ids}) == len({*prompt}) + len(answer.ids), "a token was repeated"


def test_logprobs_are_the_models_own():
    model, (prompt,) = new_model(), prompts_of(9)
    params = SamplingParams(temperature=2.0, seed=5, max_new_tokens=6, logprobs=3)
    (answer,) = Engine(model, TOKENIZER).generate([prompt], params)
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + answer.ids]))[0, len(prompt) - 1 :].log_softmax(-1)
    for i, token in enumerate(answer.ids):
        assert answer.logprobs[i] == pytest.approx(logprobs[i, token].item(), abs=1e-4)
        ids, values = zip(*answer.top_logprobs[i], strict=True)
        top = logprobs[i].topk(3)
        assert list(ids) == top.indices.tolist()
        assert values == pytest.approx(top.values.tolist(), abs=1e-4)


def test_extra_embeddings_are_never_sampled():
    wide, state = Llama(small_config(vocab_size=1030)), new_model().state_dict()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        state[name] = torch.cat([state[name], 100 * torch.ones(6, 64)])
    wide.load_state_dict(state)
    for temperature in (0.0, 5.0):
        params = SamplingParams(temperature, max_new_tokens=10)
        answers = Engine(wide, TOKENIZER, max_batch_size=2).generate(prompts_of(5, 6), params)
        assert max(token for answer in answers for token in answer.ids) < 1024


def test_watermark_gets_the_last_token_of_each_sequence():
    class Recorder:
        def __init__(self):
            self.calls = []

        def bias(self, logits, ids):
            self.calls.append((tuple(logits.shape), ids[:, -1].tolist()))
            return logits.index_fill(1, torch.tensor([77]), 1e4)

    recorder, prompts = Recorder(), prompts_of(4, 6)
    engine = Engine(new_model(), TOKENIZER, max_batch_size=2, watermark=recorder)
    answers = engine.generate(prompts, SamplingParams(max_new_tokens=2))
    assert [answer.ids for answer in answers] == [[77, 77]] * 2
    assert recorder.calls == [((2, 1024), [p[-1] for p in prompts]), ((2, 1024), [77, 77])]


# ---------------------------------------------------------------- ends and errors


def test_full_context_ends_the_answer():
    model, (prompt,) = new_model(max_position_embeddings=24), prompts_of(20)
    (answer,) = Engine(model, TOKENIZER).generate([prompt])
    assert answer.finish_reason == "length" and answer.ids == plain_greedy(model, prompt, 4)


def test_eos_first_is_an_empty_answer():
    model, (prompt,) = new_model(), prompts_of(5)
    with torch.no_grad():
        first = model(torch.tensor([prompt]))[0, -1].argmax().item()
        model.lm_head.weight[2] = 2 * model.lm_head.weight[first]
    (answer,) = Engine(model, TOKENIZER).generate([prompt])
    assert (answer.ids, answer.text, answer.finish_reason) == ([2], "", "stop")


def test_prompt_that_cannot_be_answered_is_refused():
    engine = Engine(new_model(max_position_embeddings=24), TOKENIZER)
    for prompt, message in (
        (prompts_of(26)[0], "the prompt has 26 tokens, 3 too many"),
        (prompts_of(24)[0], "1 too many"),
        ([], "empty"),
        ([1, 1024], "no embedding"),
        ([1, -1], "no embedding"),
    ):
        with pytest.raises(UserError, match=message):
            engine.add(prompt)
    assert not engine.busy
    with pytest.raises(UserError, match="24 positions"):
        Engine(engine.model, TOKENIZER, max_length=25)
    endless = Engine(new_model(max_position_embeddings=1 << 24), TOKENIZER, max_batch_size=1 << 10)
    with pytest.raises(UserError, match="no memory .* of 1024 sequences of 16777216 tokens"):
        endless.reserve(1 << 24)


def test_cache_grows_with_the_longest_sequence(monkeypatch):
    """The text is that of a cache of full size, for which long contexts have no memory."""
    model, params = new_model(max_position_embeddings=90), SamplingParams(max_new_tokens=40)
    prompts = prompts_of(5, 30, 9, 33, 49)
    whole = Engine(model, TOKENIZER, max_batch_size=2)
    assert whole.cache.k.shape[3] == 90
    expected = [answer.ids for answer in whole.generate(prompts, params)]
    monkeypatch.setattr("alpaca.inference.engine.FIRST_LENGTH", 10)
    engine, lengths = Engine(model, TOKENIZER, max_batch_size=2), [10]
    sequences = [engine.add(prompt, params) for prompt in prompts]
    while engine.busy:
        engine.step()
        if (length := engine.cache.k.shape[3]) != lengths[-1]:
            lengths.append(length)
    assert [s.ids for s in sequences] == expected and max(map(len, expected)) == 40
    assert lengths == [10, 46, 90]  # a prompt of 30 and its padding; both doubled


def test_cache_without_memory_to_grow_can_still_be_used(monkeypatch):
    monkeypatch.setattr("alpaca.inference.engine.FIRST_LENGTH", 16)
    model, (long, short) = new_model(), prompts_of(30, 3)
    engine = Engine(model, TOKENIZER, max_batch_size=2)
    memory = [mmap.mmap(-1, 46 * engine.cache.k[:, :, :, 0].nbytes), OSError("no memory for v")]
    with monkeypatch.context() as patch, pytest.raises(UserError, match="no memory"):
        patch.setattr("mmap.mmap", Mock(side_effect=memory))
        engine.generate([long])
    for prompt in (short, long):
        (answer,) = engine.generate([prompt], SamplingParams(max_new_tokens=20))
        assert answer.ids == plain_greedy(model, prompt, 20)


@pytest.mark.parametrize("sampling", [(0.0,), (1.0,), (1.0, 5), (1.0, 0, 0.9)])
def test_sequence_with_nan_fails_alone(sampling):
    """One token's embedding is NaN: only the sequence with it in the prompt fails."""
    model, params = new_model(), SamplingParams(max_new_tokens=9)
    good, bad = prompts_of(6, 7)
    expected = plain_greedy(model, good, 9)
    unused = next(i for i in range(3, 1024) if i not in (*good, *expected))
    model.model.embed_tokens.weight.data[unused] = float("nan")
    engine = Engine(model, TOKENIZER, max_batch_size=2)
    first = engine.add([*bad, unused], SamplingParams(*sampling))
    second = engine.add(good, params)
    while engine.busy:
        engine.step()
    assert first.finish_reason == "failed" and second.ids == expected


@pytest.mark.parametrize("place", ["decode", "prefill", "sample_and_append"])
@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()], ids=repr)
def test_error_in_a_step_leaves_nothing_half_done(monkeypatch, place, error):
    def failing(*args):
        raise error

    model, params = new_model(), SamplingParams(max_new_tokens=9)
    engine, prompts = Engine(model, TOKENIZER, max_batch_size=2), prompts_of(4, 6, 5)
    first = engine.add(prompts[0], params)
    engine.step()
    second, third = engine.add(prompts[1], params), engine.add(prompts[2], params)
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(engine, place, failing)
        engine.step()
    ended = "failed" if isinstance(error, Exception) else "cancelled"
    assert [s.finish_reason for s in (first, second, third)] == [ended, ended, None]
    assert not engine.active and not engine.cache.lengths.any()
    assert engine.generate(prompts[:1], params)[0].ids == plain_greedy(model, prompts[0], 9)
    assert third.ids == plain_greedy(model, prompts[2], 9)
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(engine, place, failing)
        engine.generate(prompts, params)
    assert not engine.busy, "the queue was not cancelled"


def test_cancelled_sequence_gets_no_further_token():
    engine = Engine(new_model(), TOKENIZER)
    sequence = engine.add(prompts_of(5)[0], SamplingParams(max_new_tokens=9))
    engine.step()
    text, ids, real = sequence.text, list(sequence.ids), engine.decode_step

    def cancelling(*args):
        engine.cancel(sequence)
        return real(*args)

    engine.decode_step = cancelling
    engine.step()
    assert (sequence.ids, sequence.finish_reason) == (ids, "cancelled")
    assert sequence.text.startswith(text)


# ---------------------------------------------------------------- text


def test_streamed_text_is_the_answers_text():
    model, params, prompts = new_model(), SamplingParams(max_new_tokens=30), prompts_of(6, 9)
    expected = [answer.text for answer in Engine(model, TOKENIZER).generate(prompts, params)]
    engine = Engine(model, TOKENIZER, max_batch_size=2)
    streams, texts = [engine.stream(prompt, params) for prompt in prompts], ["", ""]
    while any(streams):  # two streams of one engine take turns
        for i, stream in enumerate(streams):
            new = next(stream, None) if stream else None
            texts[i] += new or ""
            streams[i] = stream if new is not None else None
    assert texts == expected and all(expected)
    half = engine.stream(prompts[0], params)
    next(half)
    half.close()
    engine.step()
    assert not engine.busy and not engine.cache.lengths.any()


def append_text(text: str, *stop: str, extra: list[int] = ()) -> tuple[str, list[str], str | None]:
    """A text appended token by token: its final form, its form after each token, the reason."""
    params, seen = SamplingParams(stop=stop, max_new_tokens=10**6), []
    sequence = Sequence([1], params, TOKENIZER, 10**6)
    for token in [*TOKENIZER.encode(text), *extra]:
        if sequence.finish_reason is None:
            sequence.append(token)
            seen.append(sequence.text)
    return sequence.text, seen, sequence.finish_reason


def test_stop_text_ends_the_answer_and_is_not_part_of_it():
    text, seen, reason = append_text("one two three four", "three")
    assert (text, reason) == ("one two ", "stop")
    text, seen, reason = append_text("a b\n\n### Instruction: go", "###", "\n\n##")
    assert (text, reason) == ("a b", "stop")
    assert all("a b".startswith(shown) for shown in seen), "part of a stop text was shown"
    assert append_text("aaab", "aab")[0] == "a"
    assert append_text("nothing here", "absent")[2] is None
    assert overlap("abab", "babc") == 3 and overlap("abc", "x") == 0 and overlap("ab", "ab") == 0


def test_pending_text_is_shown_when_the_answer_ends():
    text, _, reason = append_text("so ##", "###", extra=[2])
    assert (text, reason) == ("so ##", "stop")


def test_any_of_several_end_tokens_ends_the_answer():
    model, prompt = new_model(), TOKENIZER.encode("one", bos=True)
    engine, params = Engine(model, TOKENIZER), SamplingParams(max_new_tokens=12)
    (whole,) = engine.generate([prompt], params)
    end = next(token for i, token in enumerate(whole.ids) if i and token not in whole.ids[:i])
    before = whole.ids[: whole.ids.index(end)]
    model.config.eos_token_id = [end, TOKENIZER.eos_id]
    (cut,) = engine.generate([prompt], params)
    assert cut.ids == [*before, end] and cut.finish_reason == "stop"
    assert cut.text == TOKENIZER.decode(prompt + before).removeprefix("one")
    model.config.eos_token_id = [end, end + 1]  # without the tokenizer's EOS: they are wrong
    (again,) = engine.generate([prompt], params)
    assert again.ids == whole.ids


def test_space_before_an_answer_of_vicuna_is_not_shown():
    tokenizer = load_tokenizer(ROOT / "data", template="vicuna")
    answer = tokenizer.encode_after("", " a pear")[0]
    for prompt, expected in (("Hi", "a pear"), (None, " a pear")):
        ids = encode_prompt("Hi", "", tokenizer) if prompt else tokenizer.encode("ASS", bos=True)
        sequence = Sequence(ids, SamplingParams(max_new_tokens=99), tokenizer, 99)
        for token in [*answer, *answer, tokenizer.eos_id]:
            sequence.append(token)
        assert sequence.text == expected + " a pear"
        assert sequence.skipped == len(" a pear") - len(expected)


def test_first_finish_reason_stays():
    sequence = Sequence([1], SamplingParams(stop=("two",)), TOKENIZER, 99)
    for token in TOKENIZER.encode("one two"):
        sequence.append(token)
    ended = sequence.text, sequence.finish_reason
    sequence.end("failed")
    assert (sequence.text, sequence.finish_reason) == ended == ("one ", "stop")


def test_text_grows_by_whole_characters():
    expected = "Grüße, 中文 and 👩‍👩‍👧 🎉 done"
    text, seen, _ = append_text(expected, "never", extra=[2])
    assert text == expected and all(expected.startswith(shown) for shown in seen)
    cut = TOKENIZER.encode("🎉")[:-1]  # three of four bytes, then the end
    assert append_text("", extra=[*cut, 2])[0].endswith("\ufffd")
