"""Training on a GPU: a CPU's losses in every mode, and the same bits after a kill."""

import filecmp
import os
import signal
import time

import pytest
import torch
from helpers.training import (
    TOKENIZER,
    figures,
    finish,
    flags,
    launch,
    metrics,
    succeeded,
    train,
    write_model,
    write_records,
)

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ADAPTER = {"lora": True, "lora_dropout": 0}  # the devices draw other random numbers
BASES = [{}, ADAPTER, {**ADAPTER, "bits": 8}, {**ADAPTER, "bits": 4}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    write_model(folder / "model", num_hidden_layers=3, intermediate_size=192)
    write_records(folder / "records.json", 40)
    return folder


@pytest.fixture(scope="module")
def on_cpu(base, tmp_path_factory):
    """The metrics of a run in fp32 on the CPU, one run for each set of flags."""
    runs = {}

    def run(changes: dict) -> list[dict]:
        key = str(changes)
        if key not in runs:
            out = tmp_path_factory.mktemp("cpu") / "run"
            succeeded(train(flags(base, out, **changes)))
            runs[key] = metrics(out)
        return runs[key]

    return run


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("changes", BASES, ids=str)
def test_losses_on_a_gpu_are_a_cpus(base, on_cpu, tmp_path, changes, mode):
    gpu = {"device": DEVICE, "dtype": "bf16", "checkpointing": mode, "no_compile": True}
    check_losses(train(flags(base, tmp_path / "run", **changes, **gpu)), tmp_path, on_cpu(changes))


@pytest.mark.parametrize(
    ("changes", "mode"), [(BASES[0], "none"), (BASES[0], "selective"), (BASES[3], "full")], ids=str
)
def test_compiled_blocks_on_a_gpu_give_a_cpus_losses(base, on_cpu, tmp_path, changes, mode):
    gpu = {"device": DEVICE, "dtype": "bf16", "checkpointing": mode, "compile": True}
    check_losses(train(flags(base, tmp_path / "run", **changes, **gpu)), tmp_path, on_cpu(changes))


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "fp32"}, {"offload": True}, {"no_reshard": True}, {"row_tokens": 200}],
    ids=str,
)
def test_other_settings_on_a_gpu_give_a_cpus_losses(base, on_cpu, tmp_path, changes):
    gpu = {"device": DEVICE, "dtype": "bf16", "no_compile": True, **changes}
    check_losses(train(flags(base, tmp_path / "run", **gpu)), tmp_path, on_cpu({}))


def check_losses(result, tmp_path, expected: list[dict]) -> None:
    succeeded(result)
    found = metrics(tmp_path / "run")
    assert len(found) == len(expected) == 5
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2)


LARGE = {"model_dir": None, "preset": "llama-3.2-1b", "tokenizer": TOKENIZER}
LARGE |= {"save_total_limit": 1, "row_tokens": None}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"checkpointing": "selective"}, id="compiled"),
        pytest.param({"lora": True, "bits": 4, "no_compile": True}, id="lora int4"),
        pytest.param(LARGE, id="1.2B: snapshots of 15 GB", marks=pytest.mark.slow),
    ],
)
def test_resume_on_a_gpu_after_a_kill_is_bit_identical(base, tmp_path, changes):
    changes = {"device": DEVICE, "dtype": "bf16", **changes}
    words, out = flags(base, tmp_path / "killed", **changes), tmp_path / "killed"
    process = launch([*words, "--save-every", "2"])
    while not [*out.glob("checkpoints/step-??????")] and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    _, _, log = succeeded(finish(launch([*words, "--save-every", "2"]), 300))
    assert "resuming after step" in log
    whole = tmp_path / "whole"
    succeeded(finish(launch(flags(base, whole, **changes)), 300))
    assert figures(out) == figures(whole)
    written = [[*run.glob("*/*.safetensors")] for run in (out, whole)]
    assert len(written[0]) == 1 and filecmp.cmp(written[0][0], written[1][0], shallow=False)
