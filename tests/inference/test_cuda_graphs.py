"""CUDA graphs give the same tokens: on a GPU, and on a CPU with graphs that run the step again."""

from contextlib import contextmanager, nullcontext
from unittest.mock import MagicMock

import pytest
import torch
from helpers.decoding import TOKENIZER, new_model, plain_greedy, prompts_of
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from alpaca.inference.cuda_graphs import CudaGraphs
from alpaca.inference.engine import Engine, decode_step
from alpaca.inference.sampling import SamplingParams
from model import KVCache


def test_engine_replays_a_graph_for_each_batch_size(monkeypatch):
    """Simulated: a recorded call is repeated on the tensors that it had."""
    engine = Engine(new_model(), TOKENIZER, max_batch_size=3)
    engine.cache.static = True
    calls, replayed = [], []

    def step(ids):
        calls.append((ids, engine.decode_slots(ids)))
        return calls[-1][1]

    class Graph(MagicMock):
        def replay(self):
            ids, logits = self.recorded
            logits.copy_(engine.decode_slots(ids))
            replayed.append(len(ids))

    @contextmanager
    def graph(recording, pool):
        yield
        recording.recorded = calls[-1]

    fakes = {"CUDAGraph": Graph, "graph": graph, "Stream": MagicMock, "current_stream": MagicMock}
    for name, fake in {**fakes, "stream": lambda _: nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    engine.graphs = CudaGraphs(step, engine.batch_sizes, engine.device)
    assert engine.batch_sizes == [1, 2, 3] and len(calls) == 12
    assert not engine.cache.lengths.any(), "recording filled a slot"
    prompts, params = prompts_of(5, 1, 17, 9, 2), SamplingParams(max_new_tokens=20)
    answers = engine.generate(prompts[:4], params) + engine.generate(prompts[3:], params)
    expected = [plain_greedy(engine.model, prompt, 20) for prompt in (*prompts[:4], *prompts[3:])]
    assert [answer.ids for answer in answers] == expected and set(replayed) == {1, 2, 3}


@torch.inference_mode()
def test_decoding_step_does_not_wait_for_the_gpu():
    """Fake tensors refuse what depends on their numbers; a graph could not record it either."""
    with FakeTensorMode():
        model = new_model()
        cache = KVCache(model.config, slots=2, max_length=16)
        cache.static = True
        assert decode_step(model, torch.ones(2, dtype=torch.int64), cache).shape[0] == 2
        cache.static = False
        with pytest.raises(DataDependentOutputException):
            decode_step(model, torch.ones(2, dtype=torch.int64), cache)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_on_a_gpu_give_the_same_tokens():
    model, prompts = new_model(), prompts_of(5, 1, 17, 9, 2)
    expected = [plain_greedy(model, prompt, 20) for prompt in prompts]
    for compiled in (False, True):
        engine = Engine(model.cuda(), TOKENIZER, max_batch_size=3, compile=compiled)
        answers = engine.generate(prompts, SamplingParams(max_new_tokens=20))
        assert [answer.ids for answer in answers] == expected
