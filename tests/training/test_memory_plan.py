"""The plan against what is really allocated, and throughput figures against counted operations."""

import gc
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.commands import ROOT
from helpers.models import random_ids
from torch.utils.flop_counter import FlopCounterMode

import fsdp_train
from alpaca.training import memory_plan, throughput
from alpaca.training.config import TrainConfig
from alpaca.training.memory_plan import (
    Workload,
    measure,
    memory_by_phase,
    needed_bytes,
    peak_bytes,
    report_plan,
    resolve_defaults,
)
from alpaca.training.parallel import apply_activation_checkpointing
from alpaca.training.throughput import CHIPS, GIB, estimated_seconds, flops_per_token
from alpaca.weights.checkpoint import DTYPES
from alpaca.weights.lora import ATTENTION, TARGETS, LoraConfig, add_lora
from alpaca.weights.presets import preset
from bench.simulate import simulate
from dataset import Examples, pack_rows, step_examples, total_steps
from model import Llama, LlamaConfig

DOCUMENTS = [50, 15, 100, 85, 6]


def bytes_saved_for_backward(model_config: LlamaConfig, config: TrainConfig) -> int:
    """What autograd holds after a forward pass, parameters apart."""
    model = Llama(model_config).to(DTYPES[config.dtype])
    if config.lora:
        add_lora(model, config.lora)
        model.to(DTYPES[config.dtype])  # as FSDP gathers A and B
    apply_activation_checkpointing(model, config.checkpointing)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:  # the tensor too, or its address would be used again
            saved[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    ids = random_ids(1, sum(DOCUMENTS), vocab_size=model_config.vocab_size)
    ends = torch.tensor([0, *torch.tensor(DOCUMENTS).cumsum(0).tolist()], dtype=torch.int32)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(ids, ends, labels=ids)
    return sum(size for size, _ in saved.values())


def adapter(targets, rank: int = 8) -> LoraConfig:
    return LoraConfig(rank, rank, 0.0, targets)


CASES = [  # key/value heads, layers, settings, tolerance
    (8, 6, {"checkpointing": "none", "dtype": "fp32"}, 0.03),
    (2, 6, {"checkpointing": "none", "dtype": "bf16"}, 0.03),
    (1, 6, {"checkpointing": "none", "dtype": "fp32"}, 0.03),
    (8, 24, {"checkpointing": "full", "dtype": "fp32"}, 0.1),
    (8, 12, {"checkpointing": "none", "dtype": "fp32", "lora": adapter(ATTENTION)}, 0.05),
    (8, 12, {"checkpointing": "none", "dtype": "bf16", "lora": adapter(TARGETS)}, 0.05),
    (8, 12, {"checkpointing": "full", "dtype": "bf16", "lora": adapter(ATTENTION)}, 0.05),
]


@pytest.mark.parametrize(("kv_heads", "layers", "settings", "tolerance"), CASES)
def test_activations_are_what_autograd_saves(kv_heads, layers, settings, tolerance):
    config, model_config = TrainConfig(**settings), LlamaConfig(500, 256, 700, layers, 8, kv_heads)
    phases = memory_by_phase(Workload(config, model_config, sum(DOCUMENTS), 1.0))
    measured = bytes_saved_for_backward(model_config, config)
    assert phases["forward"]["activations"] == pytest.approx(measured, rel=tolerance)


STEP = """
import sys, torch, fsdp_train
from functools import partial
from types import SimpleNamespace
from alpaca.training import memory_plan, parallel
from alpaca.training.config import TrainConfig
from alpaca.training.objectives import AnswerLoss, PackedRow
from alpaca.weights.checkpoint import DTYPES, parameter_shapes
from alpaca.weights.lora import LoraConfig, build_lora_model
from alpaca.weights.quantize import linear_class
from bench.measure import PeakMemory
from model import Llama, LlamaConfig

device, mode, dtype, bits = *sys.argv[1:4], int(sys.argv[4])  # bits 0: all weights are trained
shape = (16000, 1024, 2816, 8, 8) if device == "cpu" else (32000, 2048, 5632, 22, 32, 4)
model_config, T = LlamaConfig(*shape, max_position_embeddings=512), 2048
lora = LoraConfig() if bits else None
config = TrainConfig(checkpointing=mode, dtype=dtype, lora=lora, bits=bits or 16)
with parallel.process_group(device, 1) as (mesh, where):
    with torch.device("meta"):
        model = Llama(model_config)
    if bits:
        shapes = parameter_shapes(model_config)
        linear = partial(linear_class, bits=bits, round_head=False)
        base = SimpleNamespace(config=model_config, shapes=shapes, linear_class=linear)
        model = build_lora_model(base, DTYPES[dtype], lora)
    parallel.apply_activation_checkpointing(model, mode)
    parallel.apply_fsdp(model, mesh, DTYPES[dtype], False)
    ids = torch.randint(16000, (1, T), device=where)
    labels = ids.masked_fill(torch.arange(T, device=where) % 2 == 0, -100)
    bounds = torch.arange(0, T + 1, 256, dtype=torch.int32, device=where)
    inputs = {"ids": ids, "labels": labels, "cu_seqlens": bounds}
    rows, objective = [PackedRow(inputs, {})], AnswerLoss(None)
    Llama(LlamaConfig(64, 64, 64, 1, 1)).to(where)(ids[:, :9] % 64).sum().backward()  # libraries
    with PeakMemory() as peak:
        model.to_empty(device=where)
        random = parallel.random_weights(model_config, 0, where)
        read = lambda *what: torch.tensor(8) if what[0].endswith(".q") else random(*what)
        parallel.load_sharded_weights(model, mesh, read)
        optimizer = fsdp_train.build_optimizer(model)
        for _ in range(2):
            no_signal = SimpleNamespace(number=0)
            fsdp_train.train_step(model, optimizer, objective, rows, T // 2, where, no_signal)
measured = torch.cuda.max_memory_allocated() if where.type == "cuda" else peak.anonymous
print(measured, int(memory_plan.peak_bytes(memory_plan.Workload(config, model_config, T, 0.5))))
"""


MODES = ("none", "selective", "full")
WHOLE = [(mode, "bf16", 0) for mode in MODES] + [("selective", "fp32", 0), ("full", "fp32", 0)]
ADAPTERS = [(mode, "bf16", bits) for mode in MODES for bits in (16, 8, 4)]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("device", [
    pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=[pytest.mark.gpu, CUDA])
])  # fmt: skip
@pytest.mark.parametrize(("mode", "dtype", "bits"), [*WHOLE, *ADAPTERS])
def test_real_step_takes_the_memory_planned(monkeypatch, capsys, device, mode, dtype, bits):
    """On a CPU in a process of its own that returns freed memory."""
    words, before = [device, mode, dtype, str(bits)], 0
    if device == "cuda":
        monkeypatch.setattr(sys, "argv", ["-c", *words])
        gc.collect()  # what earlier tests left on the GPU
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        exec(STEP, {})
        out = capsys.readouterr().out
    else:
        out = run_step(words)
    measured, planned = map(int, out.split())
    measured -= before
    print(f"{device} {mode} {dtype} {bits}: measured {measured / GIB:.2f}, {planned / GIB:.2f} GiB")
    assert planned == pytest.approx(measured, rel=0.1)


def run_step(words: list[str]) -> str:
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    environment = os.environ | malloc | {"MALLOC_ARENA_MAX": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STEP, *words]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------- the plan against a simulation


def simulated(work: Workload) -> dict[str, float]:
    return simulate(work, fsdp_train.build_optimizer, fsdp_train.train_step)


def shallow(name: str, tokens: int, layers: int = 3, rows: int = 1, **settings) -> Workload:
    model, supervised = replace(preset(name), num_hidden_layers=layers), 0.5
    if settings.get("objective") == "reward":  # as job.py prepares it: the last tokens, no head
        model, supervised = replace(model, tie_word_embeddings=True), 0.005
    return Workload(TrainConfig(chip="H100", **settings), model, tokens, supervised, rows)


def test_simulation_finds_what_the_plan_says():
    work = shallow("7B", 2048, layers=2, gpus=8)
    found, planned = simulated(work), memory_by_phase(work)["forward"]
    assert sum(found.values()) == pytest.approx(peak_bytes(work), rel=0.03)
    assert found["moments"] == pytest.approx(planned["moments"], rel=0.001)
    assert found["weights"] == pytest.approx(planned["weights"], rel=0.001)
    assert not torch.distributed.is_initialized()


SHALLOW = [
    ("7B", 4096, {"gpus": 8, "checkpointing": "full"}),
    ("7B", 4096, {"gpus": 8, "checkpointing": "selective"}),
    ("7B", 4096, {"gpus": 8, "checkpointing": "none"}),
    ("7B", 16384, {"gpus": 1, "checkpointing": "full"}),
    ("7B", 2048, {"gpus": 16, "replicas": 2, "rows": 2}),
    ("7B", 4096, {"gpus": 8, "offload": True}),
    ("7B", 2048, {"gpus": 8, "reshard": False}),
    ("7B", 2048, {"gpus": 1, "checkpointing": "full", "lora": LoraConfig()}),
    ("7B", 4096, {"gpus": 8, "checkpointing": "full", "lora": LoraConfig(), "bits": 8}),
    ("7B", 4096, {"gpus": 1, "checkpointing": "full", "lora": LoraConfig(), "bits": 4}),
    ("13B", 1, {"gpus": 1024, "checkpointing": "full"}),
    ("65B", 2048, {"gpus": 1024, "replicas": 16, "checkpointing": "full"}),
    ("llama-3.1-8b", 4096, {"gpus": 8, "checkpointing": "none"}),
    ("llama-3.1-8b", 2048, {"gpus": 8, "checkpointing": "full", "lora": LoraConfig()}),
    ("llama-3.2-1b", 2048, {"gpus": 8, "checkpointing": "full", "lora": LoraConfig(), "bits": 4}),
    ("7B", 2048, {"gpus": 8, "reshard": False, "lora": LoraConfig()}),
    ("7B", 2048, {"gpus": 8, "checkpointing": "full", "objective": "dpo"}),
    ("llama-3.2-1b", 2048, {"gpus": 1, "objective": "ipo", "lora": LoraConfig()}),
    ("7B", 2048, {"gpus": 8, "checkpointing": "full", "objective": "reward"}),
    ("7B", 2048, {"gpus": 8, "checkpointing": "full", "objective": "group"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tokens", "settings"), SHALLOW)
def test_plan_agrees_with_a_simulation(name, tokens, settings):
    """On few blocks, where a share of an error is larger than on many."""
    work = shallow(name, tokens, **settings)
    assert peak_bytes(work) == pytest.approx(sum(simulated(work).values()), rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "gpus"), [(4096, 8), (16384, 1)])
def test_plan_of_7b_agrees_with_a_simulation(tokens, gpus):
    """Late in the backward pass, nearly all gradients are there: more than activations were."""
    work = shallow("7B", tokens, layers=32, gpus=gpus, checkpointing="full")
    assert peak_bytes(work) == pytest.approx(sum(simulated(work).values()), rel=0.03)


# ---------------------------------------------------------------- parameters and operations


def test_parameters_are_counted():
    for changes in ({}, {"tie_word_embeddings": True}, {"num_key_value_heads": 2}):
        config = LlamaConfig(500, 64, 176, 3, 4, **changes)
        model = Llama(config)
        assert throughput.model_parameters(config) == sum(p.numel() for p in model.parameters())
    for targets in (ATTENTION, TARGETS, ("k_proj", "down_proj")):
        model = Llama(config)
        add_lora(model, adapter(targets, 5))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert throughput.adapter_parameters(config, adapter(targets, 5)) == trained


@pytest.mark.parametrize(("lora", "tolerance"), [(None, 0.01), (adapter(TARGETS), 0.03)])
def test_operations_are_those_of_the_matrix_products(lora, tolerance):
    """Counted by torch itself, on a document whose attention is full instead of causal."""
    config, T = LlamaConfig(500, 64, 176, 24, 4, 2), 48
    model, ids = Llama(config), random_ids(1, T, vocab_size=500)
    if lora:
        add_lora(model, lora)  # the first block's input needs no gradient: hence 24 blocks
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).backward()
    counted = {str(k): v for k, v in counter.get_flop_counts()["Global"].items()}
    matmul = sum(flops for name, flops in counted.items() if name in ("aten.mm", "aten.addmm"))
    linear = flops_per_token(config, 0, lora=lora) * T
    assert linear == pytest.approx(matmul, rel=tolerance)
    causal = 3 * config.num_hidden_layers * 2 * 2 * T * T * 64 / 2  # q kᵀ and its product with v
    assert flops_per_token(config, T, lora=lora) * T - linear == pytest.approx(causal)


def test_chip_is_found_by_device_name(monkeypatch):
    names = {"A100-SXM4-80GB": "A100 80GB", "A100-PCIE-40GB": "A100 40GB", "H100 80GB HBM3": "H100"}
    names |= {"H100 PCIe": "H100 PCIe", "GeForce RTX 4090": "RTX 4090", "Tesla T4": None}
    for name, chip in names.items():
        assert throughput.find_chip(f"NVIDIA {name}") == chip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("Tesla T4", "NVIDIA H100 80GB HBM3"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        own = SimpleNamespace(total_memory=16 * GIB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, own=own: own)
        assert " of 16 GiB" in (report := report_plan(seven(chip=None))), "its own memory"
        assert ("8 x H100" in report) == ("H100" in name)


# ---------------------------------------------------------------- a run's rows and tokens


def random_examples(count: int, last: int = 30) -> Examples:
    lengths = np.random.default_rng(0).integers(2, 60, count)
    lengths[-1] = last
    tokens = np.ones(lengths.sum(), np.int32)
    return Examples(tokens, tokens, np.array([0, *lengths.cumsum()]), [], {})


@pytest.mark.parametrize(
    ("gpus", "batch", "epochs", "most"),
    [(1, 7, 2.4, 10**9), (3, 1, 3, 10**9), (50, 16, 0.6, 10**9), (2, 500, 7, 10**9), (4, 5, 3, 9)],
)
def test_plan_equals_packing_every_step(gpus, batch, epochs, most):
    examples = random_examples(40)
    config = TrainConfig(gpus=gpus, batch_size=batch, epochs=epochs, row_tokens=130)
    steps = min(most, total_steps(40, batch, epochs))
    batches = [step_examples(40, batch, epochs, config.seed, step) for step in range(steps)]
    lengths = [examples.lengths[batch] for batch in batches]
    packed = [pack_rows(each, gpus, 130) for each in lengths]
    rows = [
        each[row].sum()
        for each, ranks in zip(lengths, packed, strict=True)
        for own in ranks
        for row in own
    ]
    work = measure(config, preset("tiny"), examples, steps)
    assert (work.row_tokens, work.steps) == (max(rows), steps)
    assert work.tokens == sum(each.sum() for each in lengths)
    assert work.rows == max(len(ranks[0]) for ranks in packed)


def test_plan_packs_a_bounded_number_of_examples(monkeypatch):
    packed = []

    def watched(lengths, ranks, row_tokens):
        packed.append((len(lengths), ranks, max(lengths)))
        return pack_rows(lengths, ranks, row_tokens)

    monkeypatch.setattr(memory_plan, "pack_rows", watched)
    monkeypatch.setattr(memory_plan, "PACKED", 2**19)
    examples = random_examples(4000, last=70)
    config = TrainConfig(gpus=2**20, batch_size=2, epochs=10_000, row_tokens=100)
    work = measure(config, preset("tiny"), examples, total_steps(4000, 2, 10_000))
    counts, ranks, longest = zip(*packed, strict=True)
    assert sum(counts) < 1000 and max(ranks) == 2 and max(longest) < 70
    assert work.steps == 20_000_000 and work.tokens == 10_000 * examples.lengths.sum()
    assert work.row_tokens == examples.lengths.max() == 70, "every epoch has it"


# ---------------------------------------------------------------- the report


def seven(work: dict | None = None, **settings) -> Workload:
    """Alpaca's 7B, by default on eight GPUs."""
    config = TrainConfig(**{"gpus": 8, "chip": "A100 80GB", **settings})
    values = {"row_tokens": 4096, "supervised": 0.5, "steps": 100, "tokens": 10**6, "length": 120}
    return Workload(config, preset("7B"), **{**values, **(work or {})})


def test_lora_base_is_sharded_and_an_integer_base_is_not():
    def parts(gpus: int, bits: int) -> dict[str, float]:
        work = seven(gpus=gpus, checkpointing="full", lora=LoraConfig(), bits=bits)
        return memory_by_phase(work)["forward"]

    alone, shared = parts(1, 16), parts(8, 16)
    for name in ("weights", "moments", "gradients"):
        assert shared[name] == pytest.approx(alone[name] / 8)
    assert shared["gathered"] > alone["gathered"] + 2 * 32000 * 4096  # the root's, and blocks'
    alone, shared = parts(1, 4), parts(8, 4)
    integers = 32 * (4 * 4096**2 + 3 * 4096 * 11008) * 0.625
    assert shared["weights"] - alone["weights"] / 8 == pytest.approx(integers * 7 / 8)


def test_report_shows_categories_in_gib():
    report = report_plan(seven())
    assert f"weights     {6738415616 * 4 / 8 / GIB:8.2f} GiB a rank" in report
    assert f"peak        {peak_bytes(seven()) / GIB:8.2f} GiB a rank" in report
    assert f"total       {peak_bytes(seven()) * 1.04 / GIB + 1.5:8.2f} GiB, of 80 GiB" in report
    for name in ("moments", "activations", "gathered", "reduced", "temporary", "margin"):
        assert f"\n{name}" in report
    assert "GB " not in report.split("\n", 1)[1] and "It fits." in report
    flops = flops_per_token(preset("7B"), 120, 0.5) * 10**6
    minutes = 100 * estimated_seconds(seven(), CHIPS["A100 80GB"]) / 60
    assert f"100 steps of 10,000 tokens, {flops:.2e} operations in all: {minutes:.2g} min" in report
    assert " hours at an MFU of " in report_plan(seven({"steps": 99_999}))
    snapshots = 3 * 12 * 6738415616 + 2 * 6738415616
    assert f"disk        {snapshots / GIB:8.2f} GiB" in report, "if steps take minutes"
    two = (2 * 12 + 2) * 6738415616
    assert f"disk        {two / GIB:8.2f} GiB" in report_plan(seven({"steps": 2}))
    one, copies = (memory_by_phase(seven(**how))["root"] for how in ({"gpus": 1}, {"replicas": 2}))
    assert one["moments"] == 4 * copies["moments"], "replicas divide nothing"
    offloaded = report_plan(seven(offload=True))
    host = 6738415616 * (16 + 12) / 8 / GIB  # a snapshot's copy included
    assert f"host memory {host:8.2f} GiB a rank" in offloaded and "\nweights" not in offloaded


def test_suggestion_fits():
    tight = seven({"row_tokens": 8192}, checkpointing="none", chip="A100 40GB")
    report = report_plan(tight)
    assert "It does not fit. It would fit with --checkpointing full" in report
    alone = replace(tight, config=replace(tight.config, gpus=1))
    gpus = int(report_plan(alone).split(" GPUs")[0].split("--checkpointing full on ")[1])
    enough, half = (
        needed_bytes(seven({"row_tokens": 8192}, gpus=n, checkpointing="full"))
        for n in (gpus, gpus // 2)
    )
    assert enough <= CHIPS["A100 40GB"].memory < half
    assert "Choose a smaller model" in report_plan(seven({"row_tokens": 10**6}, gpus=128))


def test_suggestion_gathers_again_what_does_not_fit():
    work = seven(gpus=64, chip="RTX 4070", reshard=False)
    assert "fit with --checkpointing full --reshard." in report_plan(work)


def test_report_hides_zeros_and_names_replicas_and_idle_ranks():
    report = report_plan(seven(gpus=1024, replicas=16))
    assert " 0.00 GiB a rank" not in report and " MFU of 0%" not in report
    assert "1024 x A100 80GB in 16 replicas" in report
    assert "896 ranks have no example: raise --batch-size." in report
    whole = report_plan(seven())
    assert "have no example" not in whole and "replicas" not in whole


@pytest.mark.parametrize(("chip", "bits"), [("RTX 4090", 16), ("RTX 4070", 16), ("RTX 4070", 8)])
def test_adapter_of_7b_fits_on_small_gpus(chip, bits):
    work = seven(gpus=1, checkpointing="full", lora=LoraConfig(), bits=bits, chip=chip)
    report = report_plan(work)
    assert "an adapter of 16.8M parameters" in report
    assert ("--bits 4" if (chip, bits) == ("RTX 4070", 16) else "It fits") in report


@pytest.mark.parametrize(
    ("chip", "gpus", "rows", "low", "high"),
    [
        ("A100 80GB", 8, 1, 0.44, 0.48),
        ("H100", 8, 1, 0.27, 0.30),
        ("H200", 1, 4, 0.42, 0.44),
        ("H200", 1, 2, 0.47, 0.49),
    ],
)
def test_hours_depend_on_chip_ranks_and_rows(chip, gpus, rows, low, high):
    """Alpaca's steps of 13,800 tokens: what one GPU computes for long hides the traffic of many."""
    work = seven({"tokens": 1_380_000, "rows": rows}, gpus=gpus, reshard=True)
    flops = flops_per_token(preset("7B"), 120, 0.5) * 13_800
    share = flops / gpus / CHIPS[chip].flops / estimated_seconds(work, CHIPS[chip])
    assert low < share < high
    kept = replace(work, config=replace(work.config, reshard=False))
    assert estimated_seconds(kept, CHIPS[chip]) < estimated_seconds(work, CHIPS[chip])


def test_row_tokens_are_the_most_that_fit(monkeypatch):
    examples = random_examples(400)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = resolve_defaults(TrainConfig(gpus=8), preset("7B"), examples, 10)
    assert (here.row_tokens, here.reshard) == (4096, True), "without a GPU"
    settled = [
        resolve_defaults(TrainConfig(chip=chip, gpus=gpus), preset("7B"), examples, 10)
        for chip, gpus in (("H100", 8), ("H200", 1), ("RTX 4070", 8))
    ]
    big, alone, small = (each.row_tokens for each in settled)
    assert big >= 16 * 512 and alone > 9_000 and small == 512
    assert [each.reshard for each in settled] == [False, False, True]
    share = float(examples.supervised.sum() / examples.lengths.sum())
    work = Workload(settled[1], preset("7B"), alone, share, rows=2)
    longer = replace(work, row_tokens=alone + 128)
    limit = CHIPS["H200"].memory
    again = {"config": replace(work.config, reshard=True)}
    assert needed_bytes(replace(work, **again)) <= limit < needed_bytes(replace(longer, **again))
    given = TrainConfig(chip="H100", gpus=8, row_tokens=900, reshard=True)
    assert resolve_defaults(given, preset("7B"), examples, 10) == given
