"""The engine: whoever joins or leaves, every sequence gets what plain greedy decoding gives."""

import random

import pytest
import torch
from helpers.commands import ROOT
from helpers.models import hf_model, small_config
from helpers.parity import apart

from alpaca.inference.engine import PREFILL_TOKENS, Engine, Sequence, overlap
from alpaca.inference.sampling import GREEDY, SamplingParams
from alpaca.weights.kernels import optimize_layout
from alpaca.weights.loading import load_model
from model import Llama
from tokenizer import Tokenizer

TOKENIZER = Tokenizer(ROOT / "data/tokenizer.model")
NEVER = 10**6  # an EOS id that no model has: answers run to their length


def model_of(**changes) -> Llama:
    torch.manual_seed(0)
    return Llama(small_config(vocab_size=1024, **changes)).eval()


def prompts_of(*lengths: int) -> list[list[int]]:
    torch.manual_seed(7)
    return [[1, *torch.randint(3, 1024, (length - 1,)).tolist()] for length in lengths]


@torch.no_grad()
def plain_greedy(model: Llama, prompt: list[int], count: int) -> list[int]:
    """No cache: the whole text through the model for every token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] == TOKENIZER.eos_id:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("heads", [1, 2, 4], ids=["one key head", "grouped", "full"])
@pytest.mark.parametrize("laid_out", [False, True], ids=["plain", "in blocks"])
def test_a_batch_equals_plain_decoding_one_at_a_time(heads, laid_out):
    prompts = prompts_of(5, 1, 17, 9, 2, 30, 8)
    expected = [plain_greedy(model_of(num_key_value_heads=heads), p, 20) for p in prompts]
    model = model_of(num_key_value_heads=heads)
    engine = Engine(optimize_layout(model) if laid_out else model, TOKENIZER, max_batch_size=4)
    answers = engine.generate(prompts, SamplingParams(max_new_tokens=20))
    assert [a.ids for a in answers] == expected
    assert len({tuple(e) for e in expected}) == len(prompts), "one answer for all shows nothing"


def test_whoever_joins_and_leaves_at_random():
    """Sixty arrivals at random steps, lengths at random, some cancelled, three rows."""
    model, dice = model_of(), random.Random(3)
    engine = Engine(model, TOKENIZER, max_batch_size=3)
    arrivals = [
        (dice.randrange(120), p) for p in prompts_of(*(dice.randint(1, 25) for _ in range(60)))
    ]
    arrivals.sort(key=lambda pair: pair[0])
    sequences, cancelled, step = [], set(), 0
    while arrivals or engine.busy:
        while arrivals and arrivals[0][0] <= step:
            way = SamplingParams(max_new_tokens=dice.randint(1, 15))
            sequences.append(engine.add(arrivals.pop(0)[1], way))
        if dice.random() < 0.1 and engine.active:
            victim = dice.choice(engine.active)
            if victim.finish_reason is None:
                engine.cancel(victim)
                cancelled.add(id(victim))
        engine.step()
        assert len(engine.active) <= 3
        step += 1
    assert len(cancelled) > 2
    for s in sequences:
        expected = plain_greedy(model, s.prompt, s.params.max_new_tokens)
        if id(s) in cancelled:
            assert s.finish_reason == "cancelled" and s.ids == expected[: len(s.ids)]
        else:
            assert s.ids == expected and s.finish_reason in ("stop", "length")


def test_compiled_decoding_is_the_same():
    model = model_of(num_hidden_layers=1)
    prompts = prompts_of(5, 9)
    expected = [plain_greedy(model, p, 8) for p in prompts]
    engine = Engine(model, TOKENIZER, max_batch_size=2, max_length=20, compile=True)
    assert [a.ids for a in engine.generate(prompts, SamplingParams(max_new_tokens=8))] == expected


@pytest.mark.parity
def test_greedy_tokens_are_transformers_generate_s(tmp_path):
    config = small_config(vocab_size=1024)
    theirs = hf_model(config)
    theirs.save_pretrained(tmp_path)
    engine = Engine(load_model(tmp_path), TOKENIZER, max_batch_size=3)
    prompts = prompts_of(5, 12, 23)
    answers = engine.generate(prompts, SamplingParams(max_new_tokens=30))
    for prompt, answer in zip(prompts, answers, strict=True):
        out = theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=30,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
        )
        expected = out[0, len(prompt) :].tolist()
        assert len(answer.ids) == len(expected)
        other = sum(a != b for a, b in zip(answer.ids, expected, strict=True))
        apart("greedy tokens that differ: transformers' generate", other, 0)


def test_one_seed_one_text_alone_and_in_company():
    model = model_of(initializer_range=0.06)  # flatter: much to choose from
    prompts = prompts_of(4, 11, 7, 19)
    ways = [
        SamplingParams(temperature=0.9, seed=1, max_new_tokens=25),
        SamplingParams(temperature=1.3, top_p=0.9, seed=2, max_new_tokens=12),
        SamplingParams(max_new_tokens=25, repetition_penalty=1.5),
        SamplingParams(
            temperature=0.8, top_k=40, seed=4, max_new_tokens=18, repetition_penalty=1.2
        ),
    ]
    engine = Engine(model, TOKENIZER, max_batch_size=3)
    together = [engine.add(p, way) for p, way in zip(prompts, ways, strict=True)]
    while engine.busy:
        engine.step()
    for prompt, way, sequence in zip(prompts, ways, together, strict=True):
        (alone,) = Engine(model, TOKENIZER).generate([prompt], way)
        assert alone.ids == sequence.ids
    other = SamplingParams(temperature=0.9, seed=2, max_new_tokens=25)
    assert Engine(model, TOKENIZER).generate(prompts[:1], other)[0].ids != together[0].ids


def test_a_repetition_penalty_counts_prompt_and_answer():
    model = model_of(initializer_range=0.06)
    (prompt,) = prompts_of(6)
    (answer,) = Engine(model, TOKENIZER).generate(
        [prompt], SamplingParams(max_new_tokens=40, repetition_penalty=1e6)
    )
    assert len({*prompt, *answer.ids}) == len({*prompt}) + len(answer.ids)  # nothing came twice


def test_logprobs_are_the_models_own():
    model = model_of()
    (prompt,) = prompts_of(9)
    way = SamplingParams(temperature=2.0, seed=5, max_new_tokens=6, logprobs=3)
    (answer,) = Engine(model, TOKENIZER).generate([prompt], way)
    with torch.no_grad():
        logprobs = model(torch.tensor([prompt + answer.ids]))[0].log_softmax(-1)
    for at, (token, told, best) in enumerate(
        zip(answer.ids, answer.logprobs, answer.top_logprobs, strict=True), len(prompt) - 1
    ):
        assert told == pytest.approx(logprobs[at, token].item(), abs=1e-4)
        top = logprobs[at].topk(3)
        assert [token for token, _ in best] == top.indices.tolist()
        assert [p for _, p in best] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_extra_embedding_rows_are_never_chosen():
    model = model_of()
    wide = Llama(small_config(vocab_size=1030))
    state = model.state_dict()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        state[name] = torch.cat([state[name], 100 * torch.ones(6, 64)])
    wide.load_state_dict(state)
    prompts = prompts_of(5, 6)
    for way in (
        SamplingParams(max_new_tokens=10),
        SamplingParams(max_new_tokens=10, temperature=5.0),
    ):
        answers = Engine(wide, TOKENIZER, max_batch_size=2).generate(prompts, way)
        assert max(token for a in answers for token in a.ids) < 1024


def test_a_full_context_ends_the_answer():
    model = model_of(max_position_embeddings=24)
    (prompt,) = prompts_of(20)
    (answer,) = Engine(model, TOKENIZER).generate([prompt])
    assert len(answer.ids) == 4 and answer.finish_reason == "length"
    assert answer.ids == plain_greedy(model, prompt, 4)


def test_a_prompt_that_is_too_long_is_refused_with_the_count():
    engine = Engine(model_of(max_position_embeddings=24), TOKENIZER)
    with pytest.raises(ValueError, match="the prompt has 26 tokens, 3 too many"):
        engine.add(prompts_of(26)[0])
    with pytest.raises(ValueError, match="1 too many"):
        engine.add(prompts_of(24)[0])
    with pytest.raises(ValueError, match="empty"):
        engine.add([])
    assert not engine.busy


def test_eos_first_is_an_empty_answer():
    model = model_of()
    (prompt,) = prompts_of(5)
    with torch.no_grad():
        first = model(torch.tensor([prompt]))[0, -1].argmax().item()
        model.lm_head.weight[2] = 2 * model.lm_head.weight[first]
    (answer,) = Engine(model, TOKENIZER).generate([prompt])
    assert (answer.ids, answer.text, answer.finish_reason) == ([2], "", "stop")


def test_many_prompts_start_in_few_passes_but_not_without_limit():
    model = model_of(max_position_embeddings=1024)
    engine = Engine(model, TOKENIZER, max_batch_size=8)
    for prompt in prompts_of(900, 900, 900, 10):
        engine.add(prompt, SamplingParams(max_new_tokens=2))
    assert len(engine.step()) == 2 and 2 * 900 <= PREFILL_TOKENS < 3 * 900
    assert len(engine.step()) == 4


def test_prompts_of_all_lengths_start_in_passes_of_few(monkeypatch):
    """oneDNN keeps a kernel for each: those of 3,000 prompts took 700 MB instead of 200."""
    engine, seen = Engine(model_of(max_position_embeddings=500), TOKENIZER), set()
    real = engine.model.hidden_states

    def hidden(ids, *args):
        seen.add(ids.shape[1])
        return real(ids, *args)

    monkeypatch.setattr(engine.model, "hidden_states", hidden)
    for prompt in prompts_of(*range(1, 500, 3)):
        engine.generate([prompt], SamplingParams(max_new_tokens=1))
        assert engine.cache.lengths.tolist() == [len(prompt)]
    assert len(seen) == 32 and max(seen) == 500


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_of_nan_says_so(temperature):
    model = model_of()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not numbers"):
        Engine(model, TOKENIZER).generate(prompts_of(3), SamplingParams(temperature=temperature))


def test_a_broken_row_ends_alone():
    """One token's embedding is NaN: whoever has it in the prompt fails, the others go on."""
    model, way = model_of(), SamplingParams(max_new_tokens=9)
    good, bad = prompts_of(6, 7)
    expected = plain_greedy(model, good, 9)
    unused = next(i for i in range(3, 1024) if i not in (*good, *expected))
    model.model.embed_tokens.weight.data[unused] = float("nan")
    engine = Engine(model, TOKENIZER, max_batch_size=2)
    first, second = engine.add([*bad, unused], way), engine.add(good, way)
    while engine.busy:
        engine.step()
    assert first.finish_reason == "failed" and second.ids == expected


def raising(problem: BaseException):
    def step(*args):
        raise problem

    return step


@pytest.mark.parametrize("place", ["decode", "prefill", "sample_and_append"])
@pytest.mark.parametrize("problem", [MemoryError(), KeyboardInterrupt()], ids=repr)
def test_after_an_error_in_the_middle_of_a_step_nothing_is_half_done(monkeypatch, place, problem):
    model, way = model_of(), SamplingParams(max_new_tokens=9)
    engine, prompts = Engine(model, TOKENIZER, max_batch_size=2), prompts_of(4, 6, 5)
    first = engine.add(prompts[0], way)
    engine.step()
    second, third = engine.add(prompts[1], way), engine.add(prompts[2], way)
    with monkeypatch.context() as patch, pytest.raises(type(problem)):
        patch.setattr(engine, place, raising(problem))
        engine.step()
    ended = "failed" if isinstance(problem, Exception) else "cancelled"
    assert [s.finish_reason for s in (first, second, third)] == [ended, ended, None]
    assert not engine.active and not engine.cache.lengths.any()
    assert engine.generate(prompts[:1], way)[0].ids == plain_greedy(model, prompts[0], 9)
    assert third.ids == plain_greedy(model, prompts[2], 9)
    with monkeypatch.context() as patch, pytest.raises(type(problem)):
        patch.setattr(engine, place, raising(problem))
        engine.generate(prompts, way)
    assert not engine.busy, "what was queued is cancelled"


def test_two_streams_of_one_engine_lose_nothing():
    model, way = model_of(), SamplingParams(max_new_tokens=30)
    prompts = prompts_of(6, 9)
    expected = [a.text for a in Engine(model, TOKENIZER).generate(prompts, way)]
    engine = Engine(model, TOKENIZER, max_batch_size=2)
    streams, told = [engine.stream(p, way) for p in prompts], ["", ""]
    while any(streams):
        for i, stream in enumerate(streams):
            new = next(stream, None) if stream else None
            told[i] += new or ""
            streams[i] = stream if new is not None else None
    assert told == expected


def test_what_is_cancelled_or_stopped_says_no_more():
    engine = Engine(model_of(), TOKENIZER)
    sequence = engine.add(prompts_of(5)[0], SamplingParams(max_new_tokens=9))
    engine.step()
    text, ids = sequence.text, list(sequence.ids)

    def cancelling(*args):
        engine.cancel(sequence)
        return real(*args)

    real, engine.decode_step = engine.decode_step, cancelling
    engine.step()
    assert (sequence.ids, sequence.finish_reason) == (
        ids,
        "cancelled",
    ) and sequence.text.startswith(text)
    assert spoken("one two", "two", extra=[2]) == ("one ", spoken("one two", "two")[1], "stop")


def test_how_an_answer_ended_does_not_change():
    sequence = Sequence([1], SamplingParams(stop=("two",)), TOKENIZER, 99)
    for token in TOKENIZER.encode("one two"):
        sequence.append(token)
    ended = sequence.text, sequence.finish_reason
    sequence.end("failed")
    assert (sequence.text, sequence.finish_reason) == ended == ("one ", "stop")


def test_ids_without_an_embedding_are_refused():
    for wrong in (1024, -1):
        with pytest.raises(ValueError, match="no embedding"):
            Engine(model_of(), TOKENIZER).add([1, wrong])


# ---------------------------------------------------------------- text


def spoken(text: str, *stop: str, extra: list[int] = ()) -> tuple[str, list[str], str | None]:
    """A text given token by token: what is shown in the end, and after each token."""
    ids = [*TOKENIZER.encode(text), *extra]
    sequence, seen = (
        Sequence([1], SamplingParams(stop=stop, max_new_tokens=10**6), TOKENIZER, 10**6),
        [],
    )
    for token in ids:
        if sequence.finish_reason is None:
            sequence.append(token)
            seen.append(sequence.text)
    return sequence.text, seen, sequence.finish_reason


def test_stop_texts_end_the_answer_and_are_not_part_of_it():
    assert spoken("one two three four", "three") == (
        "one two ",
        spoken("one two three four", "three")[1],
        "stop",
    )
    text, seen, reason = spoken("a b\n\n### Instruction: go", "###", "\n\n##")
    assert (text, reason) == ("a b", "stop")
    assert all("a b".startswith(shown) for shown in seen), "what may be a stop text was shown"
    assert spoken("aaab", "aab")[0] == "a"
    assert spoken("nothing here", "absent")[2] is None


def test_what_is_held_back_comes_when_the_answer_ends():
    text, _, reason = spoken("so ##", "###", extra=[2])
    assert (text, reason) == ("so ##", "stop")
    assert overlap("abab", "babc") == 3 and overlap("abc", "x") == 0 and overlap("ab", "ab") == 0


def test_the_stream_is_whole_characters_and_only_grows():
    said = "Grüße, 中文 and 👩‍👩‍👧 🎉 done"
    text, seen, _ = spoken(said, "never", extra=[2])
    assert text == said
    assert all(said.startswith(shown) for shown in seen)
    cut = TOKENIZER.encode("🎉")[:-1]  # three of four bytes, then the end
    assert spoken("", extra=[*cut, 2])[0].endswith("\ufffd")


def test_streamed_text_is_the_answers_text():
    model = model_of()
    (prompt,) = prompts_of(6)
    way = SamplingParams(max_new_tokens=30)
    (answer,) = Engine(model, TOKENIZER).generate([prompt], way)
    engine = Engine(model, TOKENIZER)
    assert "".join(engine.stream(prompt, way)) == answer.text != ""
    half = engine.stream(prompt, way)
    next(half)
    half.close()
    engine.step()
    assert not engine.busy and not engine.cache.lengths.any()


def test_the_engine_is_as_good_as_new_after_its_work():
    model = model_of()
    engine = Engine(model, TOKENIZER, max_batch_size=2)
    for _ in range(3):
        answers = engine.generate(prompts_of(7, 3, 5), SamplingParams(max_new_tokens=9))
        fresh = [plain_greedy(model, p, 9) for p in prompts_of(7, 3, 5)]
        assert [a.ids for a in answers] == fresh


def test_a_watermark_is_asked_with_every_rows_last_token():
    class Recorder:
        def __init__(self):
            self.asked = []

        def bias(self, logits, ids):
            self.asked.append((tuple(logits.shape), ids[:, -1].tolist()))
            return logits.index_fill(1, torch.tensor([77]), 1e4)

    recorder, prompts = Recorder(), prompts_of(4, 6)
    engine = Engine(model_of(), TOKENIZER, max_batch_size=2, watermark=recorder)
    answers = engine.generate(prompts, SamplingParams(max_new_tokens=2))
    assert [a.ids for a in answers] == [[77, 77]] * 2
    assert recorder.asked == [((2, 1024), [p[-1] for p in prompts]), ((2, 1024), [77, 77])]
    assert GREEDY.temperature == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_give_the_same_tokens():
    model = model_of()
    prompts = prompts_of(5, 1, 17, 9, 2)
    expected = [plain_greedy(model, p, 20) for p in prompts]
    for compiled in (False, True):
        engine = Engine(model.cuda(), TOKENIZER, max_batch_size=3, compile=compiled)
        answers = engine.generate(prompts, SamplingParams(max_new_tokens=20))
        assert [a.ids for a in answers] == expected
