"""Log-likelihoods with a shared prefix and branches are those of each whole text by itself."""

import pytest
import torch
from helpers.models import random_ids, small_model

import alpaca.capability.loglikelihood as loglikelihood
from alpaca.capability.loglikelihood import Choices, log_likelihoods
from alpaca.inference.prefix import Branches
from alpaca.weights.kernels import optimize_layout
from alpaca.weights.quantize import linear_class
from model import Llama


@torch.no_grad()
def plain(model: Llama, request: Choices) -> list[float]:
    """Each text through the model, alone."""
    sums = []
    for continuation in request.continuations:
        logits = model(torch.tensor([request.context + continuation[:-1]]))[0]  # (T, V)
        log_p = logits[len(request.context) - 1 :].float().log_softmax(-1)
        sums.append(log_p.gather(1, torch.tensor(continuation)[:, None]).sum().item())
    return sums


def ids(*lengths: int) -> list[list[int]]:
    return [random_ids(length).tolist() for length in lengths]


def requests_with(prefix: list[int]) -> list[Choices]:
    """Contexts of one token behind the prefix and of many; some that do not begin with it."""
    torch.manual_seed(5)
    sizes = [(1, 1, 1, 1), (3, 9), (5,), (1, 7, 1), (2, 2), (4, 6)]
    rests = zip(ids(1, 12, 3, 8, 20, 1), sizes, strict=True)
    requests = [Choices(prefix + rest, ids(*each)) for rest, each in rests]
    (other,) = ids(9)
    requests.append(Choices(other, ids(2, 5)))
    if prefix:
        requests.append(Choices(prefix, ids(1, 3)))  # nothing behind it
        requests.append(Choices(prefix[:-1] + other, ids(1, 1)))
    return requests


def distance(model: Llama, requests: list[Choices], prefix: list[int], **options) -> float:
    got = dict(log_likelihoods(model, requests, prefix, **options))
    assert sorted(got) == [*range(len(requests))]
    expected = [plain(model, request) for request in requests]
    assert all(len(got[i]) == len(each) for i, each in enumerate(expected))
    pairs = [(a, b) for i, each in enumerate(expected) for a, b in zip(got[i], each, strict=True)]
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [0, 1, 17])
def test_log_likelihoods_equal_those_of_whole_texts(kv_heads, length):
    model, (prefix,) = small_model(num_key_value_heads=kv_heads), ids(length)
    requests = requests_with(prefix)
    assert distance(model, requests, prefix) <= 1e-5
    for tokens in (1, 100):  # a request at a time, and a few
        assert distance(model, requests, prefix, max_batch_tokens=tokens) <= 1e-5


def test_continuations_do_not_see_each_other(monkeypatch):
    """What must be right in a slot with branches; each fault moves a log-likelihood."""
    model, (prefix,) = small_model(), ids(17)
    requests, real = requests_with(prefix), Branches.__init__

    def faulty(fault):
        def init(self, cache, start, positions, branches):
            real(self, cache, *fault(start, positions, branches))

        monkeypatch.setattr(Branches, "__init__", init)
        return distance(model, requests, prefix)

    assert faulty(lambda *right: right) <= 1e-5
    assert faulty(lambda start, at, branches: (start, at, 0 * branches)) > 0.01
    assert faulty(lambda start, at, branches: (start, at + 1, branches)) > 0.01
    assert faulty(lambda start, at, branches: (start and start - 1, at, branches)) > 0.01
    stored = torch.arange(64)
    assert faulty(lambda start, at, of: (start, stored[: at.shape[1]] + 0 * at, of)) > 0.01


def test_few_logits_are_in_memory_and_none_twice(monkeypatch):
    model, (prefix,) = small_model(), ids(6)
    requests, sizes = requests_with(prefix), []
    monkeypatch.setattr(loglikelihood, "LOGITS_CHUNK", 3 * 128)
    model.lm_head.register_forward_hook(lambda _, given, out: sizes.append(out.numel() // 128))
    got = dict(log_likelihoods(model, requests, prefix))
    assert max(sizes) <= 3
    one_token = Choices([*prefix, 5], [[7], [8], [9]])
    sizes.clear()
    (scores,) = (scores for _, scores in log_likelihoods(model, [one_token], prefix))
    assert sizes == [1] and len(scores) == 3
    monkeypatch.undo()
    for i, scores in log_likelihoods(model, requests, prefix):
        assert scores == pytest.approx(got[i], abs=1e-5, rel=1e-6)


def test_a_slot_may_hold_more_tokens_than_the_model_has_positions():
    model, (prefix,) = small_model(max_position_embeddings=32), ids(10)
    request = Choices(prefix + [3] * 8, ids(15, 15, 15))
    assert distance(model, [request], prefix) <= 1e-5
    with pytest.raises(AssertionError, match="request 0 has 33 tokens, and the model 32 positions"):
        next(log_likelihoods(model, [Choices(prefix, ids(24))], prefix))
    assert not list(log_likelihoods(model, [], prefix))


@pytest.mark.parametrize(("bits", "distance"), [(32, 1e-4), (16, 0.2), (8, 5e-3), (4, 0.2)])
def test_other_weights_give_their_own_log_likelihoods(bits, distance):
    """Products round differently for other shapes: in bf16 and int4 by 0.1, in int8 by 1e-3, on a
    CPU of one kind or another."""
    model, (prefix,) = small_model(intermediate_size=192), ids(17)
    requests = requests_with(prefix)
    if bits == 16:
        model = model.bfloat16()
    for path, module in list(model.named_modules()):
        kind = linear_class(f"{path}.weight", bits, True) if bits < 16 else None
        if kind:
            model.set_submodule(path, kind(**kind.quantize(module.weight.detach())))
    expected = [plain(model, request) for request in requests]
    for lay_out in (lambda model: model, optimize_layout):
        for i, scores in log_likelihoods(lay_out(model), requests, prefix):
            assert scores == pytest.approx(expected[i], abs=distance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_log_likelihoods_on_a_gpu_are_a_cpus():
    model, (prefix,) = small_model(), ids(17)
    requests = requests_with(prefix)
    expected = [plain(model, request) for request in requests]
    for i, scores in log_likelihoods(model.cuda(), requests, prefix):
        assert scores == pytest.approx(expected[i], abs=1e-3)
