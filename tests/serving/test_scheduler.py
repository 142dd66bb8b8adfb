"""The engine's thread: sequences that join or leave change no other answer and delay none."""

import asyncio
import random
import time

import pytest
from helpers.demo_server import ENDLESS, ScriptedEngine, tiny_engine

from alpaca.common.errors import UserError
from alpaca.inference.sampling import SamplingParams
from alpaca.serving.scheduler import BusyError, EngineThread

LONG = SamplingParams(max_new_tokens=3000)
SHORT = SamplingParams(max_new_tokens=5)
IDS = [1, 5]


async def finish(worker: EngineThread, request) -> list[str]:
    while not request.ended:
        await request.updated()
    worker.cancel(request)
    return [sequence.text for sequence in request.sequences]


def with_worker(engine, work, max_sequences: int = 64):
    async def run():
        worker = EngineThread(engine, max_sequences)
        try:
            return await asyncio.wait_for(work(worker), 60)
        finally:
            await worker.close()

    return asyncio.run(run())


def test_answers_do_not_depend_on_what_joins_or_leaves():
    engine, rng = tiny_engine(5), random.Random(0)
    words = ["list", "fork", "Paris", "word", "of", "the", "animal", "says", "first", "last"]
    encode = engine.tokenizer.encode
    prompts = [encode(" ".join(rng.choices(words, k=9)), bos=True) for _ in range(18)]
    params = [SamplingParams(max_new_tokens=rng.randint(1, 30)) for _ in prompts]
    alone = tiny_engine(1)
    expected = [alone.generate([ids], p)[0].text for ids, p in zip(prompts, params, strict=True)]

    async def one(worker, ids, one_params, leaves):
        await asyncio.sleep(rng.uniform(0, 0.2))
        request = await worker.submit([ids], [one_params], rng.random() < 0.5)
        if leaves:
            await asyncio.sleep(rng.uniform(0, 0.05))
            return worker.cancel(request)
        return (await finish(worker, request))[0]

    async def work(worker):
        leaves = [i % 3 == 1 for i in range(len(prompts))]
        jobs = zip(prompts, params, leaves, strict=True)
        texts = await asyncio.gather(*(one(worker, *job) for job in jobs))
        stayed = [i for i, left in enumerate(leaves) if not left]
        assert [texts[i] for i in stayed] == [expected[i] for i in stayed]
        assert len(stayed) == 12 and worker.load == 0

    with_worker(engine, work)


def test_a_request_joins_while_others_are_decoded():
    engine = ScriptedEngine(lambda text: ENDLESS if "long" in text else "word " * 3, pace=0.002)
    encode = engine.tokenizer.encode

    async def work(worker):
        long = await worker.submit([encode("long", bos=True)], [LONG])
        short = await worker.submit([encode("brief", bos=True)], [LONG])
        assert await finish(worker, short) == ["word word word "]
        assert not long.ended
        worker.cancel(long)

    with_worker(engine, work)


def test_a_cancelled_request_leaves_at_the_next_token():
    engine = ScriptedEngine(ENDLESS, batch_size=1, pace=0.005)

    async def work(worker):
        first = await worker.submit([IDS], [LONG], stream=True)
        second = await worker.submit([IDS], [LONG], stream=True)  # waits for a slot
        while not first.sequences[0].ids:
            await first.updated()
        worker.cancel(first)
        tokens, steps = len(first.sequences[0].ids), engine.steps
        while not second.sequences[0].ids:
            await second.updated()
        assert len(first.sequences[0].ids) <= tokens + 1
        assert engine.steps <= steps + 12  # an update comes every 30 ms, a step takes 5
        for _ in range(10):  # those that wait leave too
            worker.cancel(await worker.submit([IDS], [LONG]))
        await asyncio.sleep(0.05)
        assert not second.ended and len(engine.waiting) == 0
        worker.cancel(second)
        await asyncio.sleep(0.05)
        steps = engine.steps
        await asyncio.sleep(0.05)
        assert engine.steps == steps  # no request is left: nothing is computed

    with_worker(engine, work)


def test_a_client_that_leaves_before_it_is_accepted_leaves_nothing(capsys):
    engine = ScriptedEngine(ENDLESS, batch_size=1, pace=0.02)

    async def work(worker):
        first = await worker.submit([IDS], [LONG])
        task = asyncio.create_task(worker.submit([IDS], [LONG]))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert worker.load == 1
        worker.cancel(first)
        await asyncio.sleep(0.1)
        assert not engine.busy

    with_worker(engine, work)
    assert not capsys.readouterr().err


def test_a_full_queue_refuses_at_once_and_estimates_the_wait():
    engine = ScriptedEngine(ENDLESS, batch_size=1, pace=0.002)

    async def work(worker):
        requests = [await worker.submit([IDS], [LONG]) for _ in range(3)]
        start = time.monotonic()
        with pytest.raises(BusyError) as refused:
            await worker.submit([IDS], [LONG])
        assert time.monotonic() - start < 0.1 and 0 < refused.value.wait <= 60
        worker.tokens_per_second = 100.0  # 3 answers of 1500 tokens: one ends every 15 s
        with pytest.raises(BusyError) as refused:
            await worker.submit([IDS], [LONG])
        assert refused.value.wait == pytest.approx(15, rel=0.2) and not refused.value.own
        worker.cancel(requests[0])
        worker.cancel(await worker.submit([IDS], [LONG]))

    with_worker(engine, work, max_sequences=3)


def test_a_client_has_no_more_than_its_share():
    async def work(worker):
        worker.max_per_client = 2
        await worker.submit([IDS] * 2, [LONG] * 2, client="one")
        with pytest.raises(BusyError) as refused:
            await worker.submit([IDS], [LONG], client="one")
        assert refused.value.own
        await worker.submit([IDS], [LONG], client="two")
        for request in list(worker.pending):
            worker.cancel(request)

    with_worker(ScriptedEngine(ENDLESS, batch_size=1, pace=0.002), work)


def test_a_prompt_that_the_engine_refuses_harms_no_other():
    engine = tiny_engine(2)

    async def work(worker):
        with pytest.raises(UserError, match="too many"):
            await worker.submit([IDS, [1] * 600], [SamplingParams(max_new_tokens=400)] * 2)
        assert worker.load == 0
        await finish(worker, await worker.submit([IDS], [SHORT]))
        assert not engine.busy

    with_worker(engine, work)


def test_a_failing_step_fails_its_sequences_and_no_others(capsys):
    engine = tiny_engine(2)
    decode = engine.decode

    async def work(worker):
        engine.decode = lambda: 1 / 0
        first = await worker.submit([IDS], [SHORT])
        await finish(worker, first)
        assert first.sequences[0].finish_reason == "failed"
        while worker.healthy:  # until the thread has set it
            await asyncio.sleep(0.01)
        engine.decode = decode
        second = await worker.submit([IDS], [SHORT])
        await finish(worker, second)
        assert second.sequences[0].finish_reason in ("length", "stop")
        while not worker.healthy:
            await asyncio.sleep(0.01)
        worker.inbox.put(None)
        await asyncio.to_thread(worker.thread.join)
        assert not worker.healthy
        with pytest.raises(RuntimeError):
            await worker.submit([IDS], [SHORT])  # at once, not never

    with_worker(engine, work)
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["add", "cancel"])
def test_a_request_that_cannot_join_or_leave_harms_no_other(name, capsys):
    engine = tiny_engine(2)
    original = getattr(engine, name)

    def failing(*args):
        setattr(engine, name, original)
        raise RuntimeError("out of memory")

    async def work(worker):
        setattr(engine, name, failing)
        if name == "add":
            with pytest.raises(RuntimeError, match="memory"):
                await asyncio.wait_for(worker.submit([IDS], [SHORT]), 5)
        else:
            await finish(worker, await worker.submit([IDS], [SHORT]))
        request = await asyncio.wait_for(worker.submit([IDS], [SHORT]), 5)
        await finish(worker, request)
        assert len(request.sequences[0].ids) == 5 and worker.healthy and worker.load == 0

    with_worker(engine, work)
    if name == "cancel":  # else `submit` has raised it
        assert "out of memory" in capsys.readouterr().err
