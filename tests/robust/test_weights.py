"""Weights and adapters: kills, memory, compiled layers, and training runs that must agree."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.checkpoints import TOKENIZER, same_tensors, shards_of
from helpers.commands import ROOT, assert_refused
from helpers.lora import (
    WEIGHTS,
    adapters_differ,
    assert_same_adapter_run,
    dequantize_layers,
    lora_flags,
    write_lora_base,
)
from helpers.models import random_ids, small_config, small_model
from helpers.training import figures, finish, flags, launch, stop_in_step, succeeded, train
from safetensors.torch import load_file

from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams
from alpaca.training import parallel
from alpaca.weights.checkpoint import parameter_shapes
from alpaca.weights.loading import load_model, optimize_layout
from alpaca.weights.lora import LoraConfig, build_lora_model
from alpaca.weights.quantize import WeightSource, linear_class, save_quantized
from alpaca.weights.writer import save_model
from model import Llama, LlamaConfig
from tokenizer import load_tokenizer


def write_model(folder, dies_at: int | None = None) -> Llama:
    """Save a model in ten shards, in a process that dies before tensor number `dies_at`."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(256, 128, 352, 8, 4))

    def pairs():
        for number, pair in enumerate(model.named_parameters()):
            if number == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield pair

    with shards_of(700_000):
        save_model(pairs(), model.config, folder, tokenizer=TOKENIZER)
    return model


def test_killed_write_leaves_no_folder_that_looks_complete(tmp_path):
    for tensors_written in (1, 30, 74):
        if not (child := os.fork()):
            try:
                write_model(tmp_path / "out", tensors_written)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    model = write_model(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert same_tensors(load_model(tmp_path / "out").named_parameters(), model.named_parameters())


MEASURED = """
import json, os, sys, torch
from bench.measure import PeakMemory
from alpaca.weights.checkpoint import read_config, stored_tensors
from alpaca.weights.loading import load_model
from alpaca.weights.presets import preset
from alpaca.weights.writer import save_model
from model import Llama
with torch.device("meta"):
    Llama(preset("tiny"))  # loads what torch needs on first use
for work, *folders, dtype in json.loads(sys.argv[1]):
    if not (child := os.fork()):
        code = 1
        try:
            with PeakMemory() as peak:
                if work == "load":
                    model = load_model(*folders, dtype=getattr(torch, dtype))
                else:
                    source, target = folders
                    pairs = ((name, t.read()) for name, t in stored_tensors(source).items())
                    save_model(pairs, read_config(source), target, getattr(torch, dtype))
            print(peak.anonymous, flush=True)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
"""


def peak_memory(*works) -> list[int]:
    command = [sys.executable, "-c", MEASURED, json.dumps(works, default=str)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.parametrize("size", ["small", pytest.param("1.1B", marks=pytest.mark.slow)])
def test_loading_and_writing_stay_within_their_memory(tmp_path, size):
    shape = (4096, 512, 1536, 12, 8) if size == "small" else (32000, 2048, 5632, 22, 32, 4)
    torch.set_default_dtype(torch.bfloat16)
    model = Llama(LlamaConfig(*shape))
    in_bf16 = sum(p.numel() * 2 for p in model.parameters())
    largest = max(p.numel() * 2 for p in model.parameters())
    save_model(model, model.config, tmp_path / "m")
    (tmp_path / "pickled").mkdir()
    shutil.copy(tmp_path / "m" / "config.json", tmp_path / "pickled")
    table = {name: tensor.detach() for name, tensor in model.named_parameters()}
    torch.save(table, tmp_path / "pickled" / "pytorch_model.bin")
    del model, table
    slack = 24 << 20  # allocator and thread pools
    mapped, *converted, writing = peak_memory(
        ("load", tmp_path / "m", "bfloat16"),
        ("load", tmp_path / "m", "float16"),
        ("load", tmp_path / "pickled", "float16"),
        ("write", tmp_path / "m", tmp_path / "out", "float16"),
    )
    assert mapped <= slack  # used where it lies
    for peak in converted:
        assert 0.9 * in_bf16 <= peak <= 1.15 * in_bf16 + slack
    assert writing <= 2 * largest + slack


@pytest.mark.slow
def test_compiled_int8_model_generates_the_same(tmp_path):
    model = small_model(vocab_size=1024, num_hidden_layers=1)
    save_model(model, model.config, tmp_path / "m")
    # in fp32, where no two tokens are equally likely
    model = optimize_layout(load_model(tmp_path / "m", bits=8), compiled=True)
    prompt, params = list(range(3, 9)), SamplingParams(max_new_tokens=5)
    engine = Engine(model, load_tokenizer(TOKENIZER), max_length=12, compile=True)
    (plain,) = Engine(model, load_tokenizer(TOKENIZER)).generate([prompt], params)
    assert engine.generate([prompt], params)[0].ids == plain.ids


# ---------------------------------------------------------------- training an adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_lora_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def reference(base, tmp_path_factory):
    """Runs on one rank without dropout, by the bits of the base."""
    runs = {number: tmp_path_factory.mktemp("reference") / "run" for number in (16, 4)}
    for number, out in runs.items():
        succeeded(train(lora_flags(base, out, bits=number, lora_dropout=0)))
    return runs


@pytest.mark.parametrize("number", [pytest.param(16, marks=pytest.mark.slow), 4])
def test_two_ranks_equal_one(base, reference, tmp_path, number):
    words = lora_flags(base, tmp_path / "run", bits=number, lora_dropout=0)
    succeeded(finish(launch(words, ranks=2)))
    assert_same_adapter_run(tmp_path / "run", reference[number])
    assert adapters_differ(reference[16], reference[4]), "this can tell"


@pytest.mark.parametrize("number", [16, 4])
def test_recomputed_or_offloaded_blocks_drop_the_same(base, tmp_path, number):
    modes = {"plain": {}, "full": {"checkpointing": "full"}}
    modes["selective"] = {"checkpointing": "selective"}
    modes |= {"offload": {"offload": True}} if number == 16 else {}
    for mode, changes in modes.items():
        words = lora_flags(base, tmp_path / mode, bits=number, lora_dropout=0.3, **changes)
        succeeded(train(words))
        assert_same_adapter_run(tmp_path / mode, tmp_path / "plain")


def test_resumed_run_is_bit_identical(base, tmp_path, monkeypatch):
    changes = {"lora_dropout": 0.3, "epochs": 4}
    succeeded(train(lora_flags(base, tmp_path / "whole", **changes)))
    for out in ("run", "other"):
        stop_in_step(monkeypatch, 4)
        code, _, err = train(lora_flags(base, tmp_path / out, **changes))
        assert code == 128 + signal.SIGTERM and "stopped after step 4" in err
        (snapshot,) = (tmp_path / out / "checkpoints").glob("step-??????")
        stored = load_file(snapshot / "rank-00000.safetensors")
        assert len(stored) == 3 * 16 and all(".lora_" in name for name in stored)
        if out == "other":  # the dropout of a step must depend on its number
            monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
        succeeded(train(lora_flags(base, tmp_path / out, **changes)))
    run, whole = ((tmp_path / n / "adapter" / WEIGHTS).read_bytes() for n in ("run", "whole"))
    assert run == whole and figures(tmp_path / "run") == figures(tmp_path / "whole")
    assert adapters_differ(tmp_path / "other", tmp_path / "whole"), "this can tell"


def test_quantized_folder_is_a_base(base, tmp_path):
    int4, plain, out = tmp_path / "int4", tmp_path / "plain", tmp_path / "run"
    save_quantized(WeightSource(base / "model", 4), int4, base / "model")
    model, source = load_model(base / "model"), WeightSource(int4)
    dequantize_layers(model, source)
    save_model(model, source.config, plain, tokenizer=TOKENIZER)
    succeeded(train(lora_flags(base, out, model_dir=int4, lora_dropout=0)))
    succeeded(train(lora_flags(base, tmp_path / "same", model_dir=plain, lora_dropout=0)))
    assert_same_adapter_run(out, tmp_path / "same")
    refused = train(flags(base, tmp_path / "no run", model_dir=int4))
    assert_refused(refused, "quantization_config")
    # with the bits it has, it is the same base, and settings, card and plan report these bits
    again = lora_flags(base, tmp_path / "again", model_dir=int4, bits=4, max_steps=1)
    succeeded(train(again))
    settings = json.loads((tmp_path / "again/settings.json").read_text())
    assert settings["lora"].endswith("base of 4 bits")
    assert "base of 4 bits" in (tmp_path / "again/adapter/README.md").read_text()
    _, plan, _ = succeeded(train([*lora_flags(base, out, model_dir=int4), "--plan"]))
    assert "int4" in plan
    other = lora_flags(base, tmp_path / "no run", model_dir=int4, bits=8)
    assert_refused(train(other), "quantized already")


def test_adapter_learns_a_record_and_answers(base, command, tmp_path):
    record = {"instruction": "Name the fox's colour.", "output": "the old red fox"}
    (tmp_path / "one.jsonl").write_text(json.dumps(record) + "\n")
    out = tmp_path / "run"
    changes = {"batch_size": 4, "epochs": 160, "learning_rate": 3e-2, "sample_answers": 5}
    data = tmp_path / "one.jsonl"
    words = lora_flags(base, out, data=data, eval_data=data, bits=8, **changes)
    _, shown, _ = succeeded(train(words))
    assert "as expected: 1 of 1" in shown and "→ the old red fox" in shown
    assert f"wrote {out / 'adapter'}" in shown
    ask = "--model-dir", base / "model", "--adapter", out / "adapter", record["instruction"]
    assert command("generate", *ask)[1].strip() == "the old red fox"
    _, again, err = succeeded(train(words))
    assert "is finished" in err and "as expected: 1 of 1" in again
    merge = "--base", base / "model", "--adapter", out / "adapter", "--out", tmp_path / "merged"
    assert command("merge", *merge)[0] == 0
    ask = "--model-dir", tmp_path / "merged", record["instruction"]
    assert command("generate", *ask)[1].strip() == "the old red fox"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "mode"), [(16, "full"), (4, "selective")])
def test_blocks_compile_once_and_compute_the_same(number, mode):
    config = small_config(num_hidden_layers=4, intermediate_size=192)
    linear = partial(linear_class, bits=number, round_head=False)
    shapes = SimpleNamespace(config=config, shapes=parameter_shapes(config), linear_class=linear)
    ids, gradients = random_ids(1, 24), []
    for compiled in (False, True):
        torch.manual_seed(4)
        model = build_lora_model(shapes, torch.float32, LoraConfig(4, 8, 0.0))
        parallel.apply_activation_checkpointing(model, mode)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.normal_(0, 0.1) if tensor.is_floating_point() else tensor.random_(0, 15)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for block in model.model.layers:
            if compiled:
                block.compile(backend="aot_eager", fullgraph=True)
        model(ids, labels=ids).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    # one for the first block, whose input needs no gradient, and one for the others
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [16, 4])
def test_compiled_run_equals_a_plain_one(base, reference, tmp_path, number):
    torch._dynamo.reset()
    changes = {"bits": number, "lora_dropout": 0, "compile": True, "checkpointing": "full"}
    succeeded(train(lora_flags(base, tmp_path / "run", **changes)))
    assert_same_adapter_run(tmp_path / "run", reference[number], near=1e-4)
