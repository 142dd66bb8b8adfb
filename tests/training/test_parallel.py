"""Many ranks as one program, and the settings of the GPU that they use."""

import os

import pytest
import torch

from alpaca.training.parallel import process_group


def cuda_settings() -> tuple:
    enabled = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    return os.environ.get("CUBLAS_WORKSPACE_CONFIG"), enabled, filled


def test_kernels_are_deterministic_before_cuda_starts(monkeypatch):
    """And a CPU's are left alone: its results must not change."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    before = cuda_settings()
    with process_group("cpu", 1):
        assert cuda_settings() == before == ("", False, True)

    def start(device):
        raise RuntimeError(cuda_settings())

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", start)
    try:
        with pytest.raises(RuntimeError) as caught, process_group("cuda", 1):
            pass
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
    assert caught.value.args[0] == (":4096:8", True, False)
