"""Many ranks as one program, and the settings of the GPU that they use."""

import os

import pytest
import torch
from helpers.flash import flash_on_cpu
from helpers.models import small_config

from alpaca.training import parallel
from alpaca.training.parallel import apply_activation_checkpointing, process_group
from model import Llama


def cuda_settings() -> tuple:
    enabled = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    names = "CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC"
    return *map(os.environ.get, names), enabled, filled


def test_kernels_are_deterministic_before_cuda_starts(monkeypatch):
    """And a CPU's are left alone: its results must not change."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.setenv("TORCHINDUCTOR_DETERMINISTIC", "")
    before = cuda_settings()
    with process_group("cpu", 1):
        assert cuda_settings() == before == ("", "", False, True)

    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(cuda_settings()))
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(parallel.dist, name, lambda *_, **options: None)
    monkeypatch.setattr(parallel, "make_mesh", lambda *_: None)
    try:
        with process_group("cuda", 1):
            pass
        assert not torch.are_deterministic_algorithms_enabled(), "then sampling would be refused"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
    assert seen == [(":4096:8", "1", True, False)]


@pytest.mark.parametrize(("mode", "times"), [("full", 2), ("selective", 1), ("none", 1)])
def test_attention_is_recomputed_only_with_full_checkpointing(monkeypatch, mode, times):
    """A GPU's: its kernel once was not among the results that `selective` stores."""
    calls = flash_on_cpu(monkeypatch)
    model = Llama(small_config()).bfloat16()
    apply_activation_checkpointing(model, mode)
    ids, bounds = torch.arange(24)[None], torch.tensor([0, 10, 24], dtype=torch.int32)
    model(ids, bounds, labels=ids).backward()
    assert len(calls) == times * len(model.model.layers)
