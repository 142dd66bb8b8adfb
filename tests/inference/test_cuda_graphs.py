"""CUDA graphs give the same tokens: on a GPU, and on a CPU with graphs that run the step again."""

from contextlib import contextmanager, nullcontext
from unittest.mock import MagicMock

import pytest
import torch
from helpers.decoding import TOKENIZER, new_model, plain_greedy, prompts_of
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
)

from alpaca.inference.cuda_graphs import CudaGraphs
from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams


def test_engine_replays_a_graph_for_each_batch_size_and_reach(monkeypatch):
    """Simulated: a recorded call is repeated on the tensors that it had."""
    engine = Engine(new_model(max_position_embeddings=600), TOKENIZER, max_batch_size=3)
    engine.cache.static = True
    calls, replayed, decode_slots = [], set(), engine.decode_slots

    def step(ids, reach):
        engine.cache.v[:, :, :, reach:] = torch.nan  # spoils the logits if it is read
        calls.append((ids, reach, decode_slots(ids, reach)))
        engine.cache.v[:, :, :, reach:] = 0
        return calls[-1][2]

    class Graph(MagicMock):
        def replay(self):
            ids, reach, logits = self.recorded
            assert self.memory is engine.cache.k, "recorded with the tensor from before it grew"
            logits.copy_(step(ids, reach))
            replayed.add((len(ids), reach))

    @contextmanager
    def graph(recording, pool):
        lengths = engine.cache.lengths.clone()
        yield
        recording.recorded, recording.memory = calls[-1], engine.cache.k
        engine.cache.lengths.copy_(lengths)  # a real recording computes nothing

    fakes = {"CUDAGraph": Graph, "graph": graph, "Stream": MagicMock, "current_stream": MagicMock}
    for name, fake in {**fakes, "stream": lambda _: nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    engine.decode_slots = step
    engine.graphs = CudaGraphs(step, engine.cache.lengths)
    prompts, params = prompts_of(5, 1, 17, 509, 247), SamplingParams(max_new_tokens=20)
    answers = engine.generate(prompts[:4], params) + engine.generate(prompts[3:], params)
    expected = [plain_greedy(engine.model, prompt, 20) for prompt in (*prompts[:4], *prompts[3:])]
    assert [answer.ids for answer in answers] == expected
    assert replayed == {(3, 256), (1, 512), (1, 600), (2, 512), (2, 600)}
    assert engine.graphs.graphs.keys() < replayed  # those from before it grew are gone


def test_greedy_step_waits_for_the_gpu_once(monkeypatch):
    """Fake tensors refuse what depends on their numbers; a graph could not record it either."""
    waits, prompts = [], prompts_of(3, 4)
    monkeypatch.setattr("alpaca.inference.prefix.zeros_when_used", torch.zeros)
    monkeypatch.setattr(FakeTensor, "tolist", lambda x: waits.append(len(x)) or [5] * len(x))
    with FakeTensorMode():
        engine = Engine(new_model(), TOKENIZER, max_batch_size=2)
        engine.active = [engine.add(prompt) for prompt in prompts]
        engine.waiting.clear()
        for sequence in engine.active:
            sequence.append(5)
        engine.cache.static = True
        assert [s.ids for s in engine.step()] == [[5, 5], [5, 5]] and waits == [2]
        engine.cache.static = False
        with pytest.raises(DataDependentOutputException):
            engine.step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_on_a_gpu_give_the_same_tokens():
    model, prompts = new_model(), prompts_of(5, 1, 17, 9, 2)
    expected = [plain_greedy(model, prompt, 20) for prompt in prompts]
    for compiled in (False, True):
        engine = Engine(model.cuda(), TOKENIZER, max_batch_size=3, compile=compiled)
        answers = engine.generate(prompts, SamplingParams(max_new_tokens=20))
        assert [answer.ids for answer in answers] == expected
