"""The plan against what is really allocated."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.commands import ROOT
from helpers.models import random_ids

from alpaca.training import memory_plan
from alpaca.training.parallel import apply_activation_checkpointing
from alpaca.weights.lora import ATTENTION, TARGETS, LoraConfig, add_lora
from model import Llama, LlamaConfig

DOCUMENTS = [100, 30, 200, 170, 12]


def cu_seqlens(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def kept_for_backward(
    config: LlamaConfig, dtype: torch.dtype, mode: str, lora: LoraConfig | None = None
) -> int:
    """Bytes that autograd holds after a forward pass, parameters apart."""
    model = Llama(config).to(dtype)
    if lora:
        add_lora(model, *lora)
        model.to(dtype)  # as FSDP gathers A and B
    apply_activation_checkpointing(model, mode)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:  # the tensor too, or its address would be used again
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    ids = random_ids(1, sum(DOCUMENTS), vocab_size=config.vocab_size)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(ids, cu_seqlens(DOCUMENTS), labels=ids)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
def test_activations_are_what_autograd_keeps(dtype, kv_heads):
    config = LlamaConfig(500, 256, 700, 6, 8, kv_heads)
    planned = memory_plan.kept(memory_plan.Run(config, 1, 1, sum(DOCUMENTS), 1.0, "none", dtype))
    assert planned == pytest.approx(kept_for_backward(config, dtype, "none"), rel=0.03)


@pytest.mark.parametrize(
    ("mode", "dtype"), [("none", torch.float32), ("none", torch.bfloat16), ("full", torch.bfloat16)]
)
@pytest.mark.parametrize("targets", [ATTENTION, TARGETS])
def test_activations_beside_a_frozen_base_are_what_autograd_keeps(dtype, mode, targets):
    config, lora = LlamaConfig(500, 256, 700, 12, 8), LoraConfig(8, 8, 0.0, targets)
    planned = memory_plan.kept(
        memory_plan.Run(config, 1, 1, sum(DOCUMENTS), 1.0, mode, dtype, lora=lora)
    )
    assert planned == pytest.approx(kept_for_backward(config, dtype, mode, lora), rel=0.05)


def test_full_checkpointing_keeps_the_inputs_of_blocks():
    config = LlamaConfig(500, 256, 700, 24, 8)
    run = memory_plan.Run(config, 1, 1, sum(DOCUMENTS), 1.0, "full", torch.float32)
    assert memory_plan.kept(run) == pytest.approx(
        kept_for_backward(config, torch.float32, "full"), rel=0.1
    )


STEP = """
import sys
import torch, torch.distributed as dist
from functools import partial
from types import SimpleNamespace
import fsdp_train, parallel, plan
from alpaca.weights.lora import LoraConfig
from alpaca.weights.checkpoint import parameter_shapes
from alpaca.weights.lora import build_lora_model
from bench.measure import PeakMemory
from model import Llama, LlamaConfig
from alpaca.weights.quantize import linear_class

quiet = type("NoSignal", (), {"number": 0})
device, mode, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
bits = int(sys.argv[4])  # of the base beside an adapter; 0: everything is learned
shape = (16000, 1024, 2816, 8, 8) if device == "cpu" else (32000, 2048, 5632, 22, 32, 4)
config, T = LlamaConfig(*shape, max_position_embeddings=512), 2048
lora = LoraConfig() if bits else None
run = memory_plan.Run(config, 1, 1, T, 0.5, mode, dtype, lora=lora, bits=bits)
with parallel.process_group(device, 1) as (mesh, where):
    with torch.device("meta"):
        model = Llama(config)
        if bits:
            shapes = parameter_shapes(config)
            linear = partial(linear_class, bits=bits, round_head=False)
            base = SimpleNamespace(config=config, shapes=shapes, linear_class=linear)
            model = build_lora_model(base, dtype, LoraConfig())
    parallel.apply_activation_checkpointing(model, mode)
    parallel.apply_fsdp(model, mesh, dtype, False)
    ids = torch.randint(16000, (1, T), device=where)
    labels = ids.masked_fill(torch.arange(T, device=where) % 2 == 0, -100)
    bounds = torch.arange(0, T + 1, 256, dtype=torch.int32, device=where)
    row = {"ids": ids, "labels": labels, "cu_seqlens": bounds}
    Llama(LlamaConfig(64, 64, 64, 1, 1)).to(where)(ids[:, :9] % 64).sum().backward()  # libraries
    with PeakMemory() as peak:
        model.to_empty(device=where)
        random = parallel.random_weight(config, 0, where)
        filled = lambda *what: torch.tensor(8) if what[0].endswith(".q") else random(*what)
        parallel.fill(model, mesh, filled)
        optimizer = fsdp_train.adamw(model)
        for _ in range(2):
            fsdp_train.train_step(model, optimizer, [row], T // 2, where, quiet)
found = torch.cuda.max_memory_allocated() if where.type == "cuda" else peak.anonymous
print(found, int(memory_plan.peak(run)))
"""


def assert_planned(device: str, mode: str, dtype: str, bits: int = 0) -> None:
    """One real training step in a process of its own, its memory returned when it is freed."""
    given = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    given |= {"MALLOC_ARENA_MAX": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", STEP, device, mode, dtype, str(bits)],
        env={**os.environ, **given},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    measured, planned = map(int, done.stdout.split())
    figures = f"measured {measured / 1e9:.3f}, planned {planned / 1e9:.3f}"
    print(f"{device} {mode} {dtype} {bits}: {figures}")
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("none", "bfloat16"),
        ("selective", "bfloat16"),
        ("selective", "float32"),
        ("full", "float32"),
    ],
)
def test_a_real_step_takes_the_memory_planned(mode, dtype):
    assert_planned("cpu", mode, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_real_step_beside_a_frozen_base_takes_the_memory_planned(mode, bits):
    assert_planned("cpu", mode, "bfloat16", bits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [0, 16, 4])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_real_step_takes_the_memory_planned_on_cuda(mode, bits):
    assert_planned("cuda", mode, "bfloat16", bits)


# ---------------------------------------------------------------- the rest of the arithmetic


def seven(**changes) -> memory_plan.Run:
    """Alpaca's 7B on eight A100."""
    config = LlamaConfig.preset("7B")
    given = {"world": 8, "replicas": 1, "row_tokens": 4096, "supervised": 0.5}
    given |= {"checkpointing": "selective", "compute": torch.bfloat16}
    return memory_plan.Run(config, **{**given, **changes})


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 2}])
def test_parameters_are_counted(changes):
    config = LlamaConfig(500, 64, 176, 3, 4, **changes)
    assert memory_plan.parameters(config) == sum(p.numel() for p in Llama(config).parameters())


def test_operations_are_those_of_the_matrix_products():
    """Counted by torch itself, on a document whose attention is full instead of causal."""
    from torch.utils.flop_counter import FlopCounterMode

    config, T = LlamaConfig(500, 64, 176, 3, 4, 2), 48
    ids = random_ids(1, T, vocab_size=500)
    with FlopCounterMode(display=False) as counter:
        Llama(config)(ids, labels=ids).backward()
    counted = {str(k): v for k, v in counter.get_flop_counts()["Global"].items()}
    matmul = sum(flops for name, flops in counted.items() if name in ("aten.mm", "aten.addmm"))
    linear = memory_plan.flops_per_token(config, 0) * T
    assert linear == pytest.approx(matmul, rel=0.01)
    causal = 3 * config.num_hidden_layers * 2 * 2 * T * T * 64 / 2  # q kᵀ and its product with v
    assert memory_plan.flops_per_token(config, T) * T - linear == pytest.approx(causal)


def test_ranks_divide_what_is_sharded_and_replicas_do_not():
    one, eight = memory_plan.tides(seven(world=1)), memory_plan.tides(seven())
    copies = memory_plan.tides(seven(replicas=2))
    for part in ("weights", "optimizer"):
        assert one["reduce"][part] == 8 * eight["reduce"][part] == 4 * copies["reduce"][part]
    assert one["forward"]["activations"] == eight["forward"]["activations"]


@pytest.mark.parametrize(
    ("name", "chip"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla T4", None),
    ],
)
def test_chips_are_known_by_their_names(name, chip):
    assert memory_plan.find_chip(name) == (memory_plan.CHIPS[chip] if chip else None)


def test_the_report_says_what_to_change_and_the_change_helps():
    chip = memory_plan.CHIPS["A100 40GB"]
    told = memory_plan.report(seven(checkpointing="none", row_tokens=8192), 10**6, 100, 120, chip)
    assert "It does not fit" in told and "--checkpointing" in told
    assert "It fits" in memory_plan.report(seven(checkpointing="full"), 10**6, 100, 120, chip)
    alone = memory_plan.report(seven(world=1, row_tokens=8192), 10**6, 100, 120, chip)
    gpus = int(alone.split(" GPUs")[0].split("--checkpointing full on ")[1])
    enough, half = (
        memory_plan.peak(seven(world=world, checkpointing="full", row_tokens=8192))
        for world in (gpus, gpus // 2)
    )
    assert enough <= 0.95 * chip.memory < half
    assert "It fits" in memory_plan.report(
        seven(world=1), 10**6, 100, 120, memory_plan.CHIPS["H200"]
    )


def test_memory_is_told_as_chips_are_called():
    """A GPU of 80 GB has 80 GiB: told in units of 10^9 bytes it had 86."""
    told = memory_plan.report(seven(), 10**6, 100, 120, memory_plan.CHIPS["A100 80GB"])
    held = 6738415616 * 4 / 8 / 2**30
    assert re.search(rf"^weights +{held:.2f} ", told, re.MULTILINE) and "GiB a rank" in told
    highest = memory_plan.peak(seven()) / 2**30
    assert f"at most {highest:.1f} GiB of 80 GiB" in told and "GB " not in told.split("\n", 1)[1]
    for name, chip in memory_plan.CHIPS.items():
        if size := re.search(r"(\d+)GB", name):
            assert chip.memory == int(size[1]) * 2**30


def test_a_gpu_that_is_not_in_the_table_has_the_memory_it_says(monkeypatch):
    known = SimpleNamespace(total_memory=16 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: known)
    assert " of 16 GiB" in memory_plan.report(seven(), 10**6, 100, 120, None)


@pytest.mark.parametrize(
    ("chip", "bits", "fits"),
    [
        ("RTX 4090", 16, True),
        ("RTX 4070", 16, False),
        ("RTX 4070", 8, True),
        ("RTX 4070", 4, True),
    ],
)
def test_an_adapter_of_7b_fits_where_it_is_said_to(chip, bits, fits):
    run = seven(world=1, checkpointing="full", lora=LoraConfig(), bits=bits)
    told = memory_plan.report(run, 10**6, 100, 120, memory_plan.CHIPS[chip])
    assert ("It fits" in told) == fits
    assert "an adapter of 16.8M parameters" in told
    assert fits or "--bits 4" in told


def test_beside_an_adapter_plain_matrices_are_divided_and_rounded_ones_are_not():
    def parts(world: int, bits: int) -> dict[str, float]:
        run = seven(world=world, checkpointing="full", lora=LoraConfig(), bits=bits)
        return memory_plan.tides(run)["forward"]

    alone, shared = parts(1, 16), parts(8, 16)
    for part in ("weights", "optimizer", "gradients"):
        assert shared[part] == pytest.approx(alone[part] / 8)
    assert shared["gathered"] > alone["gathered"] + 2 * 32000 * 4096  # the root's, and blocks'
    alone, shared = parts(1, 4), parts(8, 4)
    integers = 32 * (4 * 4096**2 + 3 * 4096 * 11008) * 0.625
    assert shared["weights"] - alone["weights"] / 8 == pytest.approx(integers * 7 / 8)


def test_a_base_of_8_bits_is_told_of_4():
    run = seven(world=1, checkpointing="full", lora=LoraConfig(), bits=8)
    changes = memory_plan.remedies(run, 9.5e9)
    assert any("--bits 4" in change for change in changes)
    assert not any("--offload" in change for change in changes), "integers stay where they are"


@pytest.mark.parametrize("targets", [ATTENTION, TARGETS, ("k_proj", "down_proj")])
def test_an_adapter_is_counted(targets):
    config = LlamaConfig(500, 64, 176, 3, 4, 2)
    model = Llama(config)
    add_lora(model, 5, 5, 0.0, targets)
    learned = sum(own.numel() for own in model.parameters() if own.requires_grad)
    assert memory_plan.adapter_parameters(config, LoraConfig(5, 5, 0.0, targets)) == learned


def test_operations_beside_a_frozen_base_are_those_of_the_matrix_products():
    from torch.utils.flop_counter import FlopCounterMode

    config, T, lora = LlamaConfig(500, 64, 176, 24, 4, 2), 48, LoraConfig(8, 8, 0.0, TARGETS)
    model, ids = Llama(config), random_ids(1, T, vocab_size=500)
    add_lora(model, *lora)
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).backward()
    counted = {str(k): v for k, v in counter.get_flop_counts()["Global"].items()}
    matmul = sum(flops for name, flops in counted.items() if name in ("aten.mm", "aten.addmm"))
    # the first block has nothing before it that a gradient would go to
    assert memory_plan.flops_per_token(config, 0, lora=lora) * T == pytest.approx(matmul, rel=0.03)


def test_hours_follow_from_operations():
    flops = memory_plan.flops_per_token(LlamaConfig.preset("7B"), 120) * 18.7e6
    assert memory_plan.hours(flops, memory_plan.CHIPS["H200"], 1) == pytest.approx(0.48, rel=0.05)
    assert memory_plan.hours(flops, memory_plan.CHIPS["H200"], 2) == pytest.approx(0.24, rel=0.05)
