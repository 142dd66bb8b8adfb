"""Decoding on a GPU: the log-probabilities of a CPU, at 16, 8 and 4 bits."""

import pytest
import torch
from helpers.decoding import TOKENIZER, prompts_of
from helpers.models import small_config

from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams
from alpaca.weights.loading import load_model, optimize_layout
from alpaca.weights.writer import save_model
from model import Llama

DEVICE = "cuda"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("sequences", "compiled"), [(1, False), (5, False), (1, True)])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_log_probabilities_on_a_gpu_are_a_cpus(tmp_path, bits, sequences, compiled):
    """The GPU's tokens, given to the same integers dequantized in fp32, and without a cache. The
    beginning of the first prompt comes from the prefix tree."""
    config = small_config(vocab_size=1024, hidden_size=256, intermediate_size=512)
    save_model(Llama(config), config, tmp_path / "model", torch.bfloat16)
    exact = load_model(tmp_path / "model", bits=bits, dtype=torch.float32)
    model = load_model(tmp_path / "model", bits=bits, device=DEVICE)
    model = optimize_layout(model, compiled)
    prompts = prompts_of(50, 1, 17, 9, 2)[:sequences]
    options = {"compile": compiled, "prefix_memory": 1 << 26}
    engine = Engine(model, TOKENIZER, max_batch_size=sequences, **options)
    engine.generate(prompts[:1], SamplingParams(max_new_tokens=1))
    for answer in engine.generate(prompts, SamplingParams(max_new_tokens=20, logprobs=0)):
        ids = torch.tensor([answer.prompt + answer.ids])
        with torch.no_grad():
            expected = exact(ids)[0, len(answer.prompt) - 1 : -1].log_softmax(-1)
        found = torch.tensor(answer.logprobs)
        for theirs in (expected.gather(1, ids[0, -len(found) :, None])[:, 0], expected.amax(1)):
            assert (found - theirs).abs().mean() < 0.1  # a mean of bf16's roundings
