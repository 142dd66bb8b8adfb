"""The GPU benchmarks, with a tiny model on the CPU."""

import importlib
import json

import pytest

from bench import gpu_decode, gpu_train, measure

TRAIN = ("--batch-size", "8", "--steps", "4", "--peer-steps", "4")


@pytest.mark.parametrize(
    ("bench", "part", "flags", "peers"),
    [
        pytest.param(gpu_train, "full", TRAIN, True, marks=pytest.mark.slow),
        (gpu_train, "lora-int4", TRAIN, False),
        pytest.param(gpu_decode, "4", (), True, marks=pytest.mark.slow),
        (gpu_decode, "16", (), False),
    ],
)
def test_gpu_bench_runs_on_a_cpu(command, monkeypatch, bench, part, flags, peers):
    def run_here(module, timeout, **flags):
        pairs = (f"--{name.replace('_', '-')}={value}" for name, value in flags.items())
        code, out, err = command(importlib.import_module(module), *pairs)
        assert code == 0, err
        return json.loads(out.splitlines()[-1])

    monkeypatch.setattr(measure, "run_in_process", run_here)
    monkeypatch.setattr(gpu_decode, "RUNS", 1)
    if not peers:
        monkeypatch.setattr(bench, "find_spec", lambda name: None)
    small = ("--device", "cpu", "--preset", "tiny")
    code, text, _ = command(bench, *small, "--only", part, *flags)
    assert code == 0 and "not measured" not in text and "| ours |" in text
    assert ("Trainer, packed |" in text or "| transformers |" in text) == peers
