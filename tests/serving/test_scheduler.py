"""Decoding for many: who joins or leaves changes nobody's answer, and nobody waits for nobody."""

import asyncio
import random
import time

import pytest
from helpers.demo_server import Scripted, tiny_engine

from alpaca.inference.sampling import SamplingParams
from alpaca.serving.scheduler import Busy, Decoder


async def ended(decoder: Decoder, answers) -> list[str]:
    while not answers.ended:
        await answers.news()
    decoder.cancel(answers)
    return [sequence.text for sequence in answers.sequences]


def with_decoder(engine, work, most: int = 64):
    async def run():
        decoder = Decoder(engine, most)
        try:
            return await asyncio.wait_for(work(decoder), 60)
        finally:
            await decoder.close()

    return asyncio.run(run())


def test_answers_are_those_of_one_at_a_time_whatever_joins_or_leaves():
    engine, draw = tiny_engine(rows=5), random.Random(0)
    encode = engine.tokenizer.encode
    words = ["list", "fork", "Paris", "word", "of", "the", "animal", "says", "first", "last"]
    prompts = [encode(" ".join(draw.choices(words, k=9)), bos=True) for _ in range(24)]
    lengths = [draw.randint(1, 40) for _ in prompts]
    alone = tiny_engine(rows=1)
    expected = [
        alone.generate([ids], SamplingParams(max_new_tokens=n))[0].text
        for ids, n in zip(prompts, lengths, strict=True)
    ]

    async def one(decoder, ids, n, leaves):
        await asyncio.sleep(draw.uniform(0, 0.3))
        answers = await decoder.submit(
            [ids], [SamplingParams(max_new_tokens=n)], draw.random() < 0.5
        )
        if leaves:
            await asyncio.sleep(draw.uniform(0, 0.05))
            return decoder.cancel(answers)
        return (await ended(decoder, answers))[0]

    async def work(decoder):
        leaving = [i % 3 == 1 for i in range(len(prompts))]
        jobs = zip(prompts, lengths, leaving, strict=True)
        got = await asyncio.gather(*(one(decoder, *job) for job in jobs))
        stayed = [i for i, leaves in enumerate(leaving) if not leaves]
        assert [got[i] for i in stayed] == [expected[i] for i in stayed]
        assert len(stayed) == 16 and decoder.load == 0

    with_decoder(engine, work)


def test_a_request_joins_while_others_are_answered():
    engine = Scripted(lambda prompt: "word " * (500 if "long" in prompt else 3), pace=0.002)
    encode = engine.tokenizer.encode

    async def work(decoder):
        way = SamplingParams(max_new_tokens=3000)
        long = await decoder.submit([encode("long", bos=True)], [way])
        short = await decoder.submit([encode("brief", bos=True)], [way])
        assert await ended(decoder, short) == ["word word word "]
        assert not long.ended
        decoder.cancel(long)

    with_decoder(engine, work)


def test_a_cancelled_answer_leaves_at_the_next_token():
    engine = Scripted(lambda prompt: "word " * 3000, rows=1, pace=0.005)
    ids = engine.tokenizer.encode("a", bos=True)

    async def work(decoder):
        way = SamplingParams(max_new_tokens=3000)
        first = await decoder.submit([ids], [way], True)
        second = await decoder.submit([ids], [way], True)  # waits for the row
        while not first.sequences[0].ids:
            await first.news()
        decoder.cancel(first)
        made, steps = len(first.sequences[0].ids), engine.steps
        while not second.sequences[0].ids:
            await second.news()
        assert len(first.sequences[0].ids) <= made + 1
        assert engine.steps <= steps + 12  # news come every 30 ms, a step takes 5
        decoder.cancel(second)
        await asyncio.sleep(0.1)
        steps = engine.steps
        await asyncio.sleep(0.1)
        assert engine.steps == steps  # nobody asks: nothing is computed

    with_decoder(engine, work)


def test_beyond_the_bound_it_is_busy_at_once_and_then_not():
    engine = Scripted(lambda prompt: "word " * 3000, rows=1, pace=0.002)
    ids = engine.tokenizer.encode("a", bos=True)

    async def work(decoder):
        way = SamplingParams(max_new_tokens=3000)
        held = [await decoder.submit([ids], [way]) for _ in range(3)]
        start = time.monotonic()
        with pytest.raises(Busy) as refused:
            await decoder.submit([ids], [way])
        assert time.monotonic() - start < 0.1 and 0 < refused.value.wait <= 60
        decoder.pace = 100.0  # 3 answers of 1500 tokens: 45 s, and an answer ends every 15
        with pytest.raises(Busy) as refused:
            await decoder.submit([ids], [way])
        assert refused.value.wait == pytest.approx(15, rel=0.2)
        decoder.cancel(held[0])
        decoder.cancel(await decoder.submit([ids], [way]))

    with_decoder(engine, work, most=3)


def test_a_prompt_the_engine_does_not_take_is_the_askers_mistake():
    engine = tiny_engine(rows=2)

    async def work(decoder):
        with pytest.raises(ValueError, match="too many"):
            await decoder.submit([[1, 5], [1] * 600], [SamplingParams(max_new_tokens=400)] * 2)
        assert decoder.load == 0
        answers = await decoder.submit([[1, 5]], [SamplingParams(max_new_tokens=3)])
        await ended(decoder, answers)
        assert not engine.busy

    with_decoder(engine, work)


def test_a_failing_step_fails_those_in_it_and_no_others(capsys):
    engine = tiny_engine(rows=2)
    whole, failures = engine.decode, []

    def failing():
        if len(failures) < 1:
            failures.append(1)
            raise RuntimeError("out of memory")
        return whole()

    engine.decode = failing

    async def work(decoder):
        first = await decoder.submit([[1, 5]], [SamplingParams(max_new_tokens=5)])
        await ended(decoder, first)
        assert first.sequences[0].finish_reason == "failed"
        second = await decoder.submit([[1, 5]], [SamplingParams(max_new_tokens=5)])
        await ended(decoder, second)
        assert second.sequences[0].finish_reason in ("length", "stop")

    with_decoder(engine, work)
    assert "out of memory" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["add", "cancel"])
def test_a_request_that_fails_to_join_or_leave_harms_no_other(name, capsys):
    engine = tiny_engine(rows=2)
    whole = getattr(engine, name)

    def failing(*args):
        setattr(engine, name, whole)
        raise RuntimeError("out of memory")

    async def work(decoder):
        way = SamplingParams(max_new_tokens=5)
        setattr(engine, name, failing)
        if name == "add":
            with pytest.raises(RuntimeError, match="memory"):
                await asyncio.wait_for(decoder.submit([[1, 5]], [way]), 5)
        else:
            await ended(decoder, await decoder.submit([[1, 5]], [way]))
        answers = await asyncio.wait_for(decoder.submit([[1, 5]], [way]), 5)
        await ended(decoder, answers)
        assert len(answers.sequences[0].ids) == 5 and decoder.well and decoder.load == 0

    with_decoder(engine, work)
    assert "out of memory" in capsys.readouterr().err


def test_it_tells_whether_it_is_well(capsys):
    engine = tiny_engine(rows=2)
    whole = engine.decode

    async def work(decoder):
        way = SamplingParams(max_new_tokens=5)
        engine.decode = lambda: 1 / 0
        await ended(decoder, await decoder.submit([[1, 5]], [way]))
        while decoder.well:  # as soon as the thread knows
            await asyncio.sleep(0.01)
        engine.decode = whole
        await ended(decoder, await decoder.submit([[1, 5]], [way]))
        while not decoder.well:
            await asyncio.sleep(0.01)
        decoder.inbox.put(None)
        await asyncio.to_thread(decoder.thread.join)
        assert not decoder.well
        with pytest.raises(RuntimeError):
            await decoder.submit([[1, 5]], [way])  # at once, not never

    with_decoder(engine, work)
    capsys.readouterr()


def test_nobody_has_more_than_a_share():
    engine = Scripted(lambda prompt: "word " * 3000, rows=1, pace=0.002)
    ids = engine.tokenizer.encode("a", bos=True)

    async def work(decoder):
        decoder.share = 2
        ways = [SamplingParams(max_new_tokens=3000)] * 2
        held = [await decoder.submit([ids] * 2, ways, False, "one")]
        with pytest.raises(Busy) as refused:
            await decoder.submit([ids], ways[:1], False, "one")
        assert refused.value.own
        held.append(await decoder.submit([ids], ways[:1], False, "two"))
        for answers in held:
            decoder.cancel(answers)

    with_decoder(engine, work)


def test_who_left_the_queue_is_kept_nowhere():
    engine = Scripted(lambda prompt: "word " * 3000, rows=1, pace=0.005)
    ids = engine.tokenizer.encode("a", bos=True)

    async def work(decoder):
        way = SamplingParams(max_new_tokens=3000)
        first = await decoder.submit([ids], [way])
        for _ in range(10):
            decoder.cancel(await decoder.submit([ids], [way]))
        await asyncio.sleep(0.1)
        assert not first.ended and len(engine.waiting) == 0
        decoder.cancel(first)

    with_decoder(engine, work)


def test_an_asker_who_leaves_while_it_is_queued_leaves_nothing():
    engine = Scripted(lambda prompt: "word " * 3000, rows=1, pace=0.02)
    ids = engine.tokenizer.encode("a", bos=True)

    async def work(decoder):
        way = SamplingParams(max_new_tokens=3000)
        first = await decoder.submit([ids], [way])
        task = asyncio.create_task(decoder.submit([ids], [way]))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert decoder.load == 1
        decoder.cancel(first)
        await asyncio.sleep(0.2)
        assert not engine.busy

    with_decoder(engine, work)
