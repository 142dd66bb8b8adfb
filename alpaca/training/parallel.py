"""One model over many ranks, and many ranks behaving like one program.

Nothing in model.py knows of any of this. A model is built on the meta device, where it takes no
memory; then these are applied, in this order, and only then does it get its weights:

    apply_activation_checkpointing    what the backward pass computes again instead of keeping
    apply_compile                     each block compiled, once for all blocks
    apply_fsdp                        each block's weights divided among the ranks
    fill                              every rank reads its own rows, so none holds the whole model

ZeRO: arXiv:1910.02054; FSDP: 2304.11277; activation checkpointing: 1604.06174.

Shown by tests/test_train.py: test_two_ranks_equal_one.
"""

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from alpaca.common.errors import UserError, describe_error
from model import Block, Llama, LlamaConfig

MATMULS = [torch.ops.aten.mm.default] + [
    getattr(namespace, name).default
    for namespace, name in (
        (torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"),
        (torch.ops.aten, "_scaled_dot_product_flash_attention"),
        (torch.ops.aten, "_scaled_dot_product_efficient_attention"),
        (torch.ops.torch_attn, "_varlen_attn"),
    )
    if hasattr(namespace, name)
]


def apply_activation_checkpointing(model: Llama, mode: str) -> None:
    """`full` keeps a block's input and computes the rest again in the backward pass; `selective`
    keeps the results of matrix products too, and computes again only what is cheap."""
    if mode == "none":
        return
    how = {"use_reentrant": False}
    if mode == "selective":
        how["context_fn"] = partial(create_selective_checkpoint_contexts, MATMULS)
    for block in model.model.layers:  # replacing `forward`, not wrapping, leaves names alone
        block.forward = checkpointed(block.forward, how)


def checkpointed(forward: Callable, how: dict[str, Any]) -> Callable:
    """A function of ours, which the compiler looks into: a `partial` of torch's own it leaves be,
    with all that is called from there."""
    return lambda *given: checkpoint(forward, *given, **how)


def apply_compile(model: Llama) -> None:
    # Short rows and long, learning and measuring, a first block that no gradient goes beyond: each
    # is a compilation of its own, and at the limit the compiler would give up without a word.
    torch._dynamo.config.recompile_limit = 32
    for block in model.model.layers:  # equal blocks share one compilation
        block.compile()


def apply_fsdp(model: Llama, mesh: DeviceMesh, dtype: torch.dtype, offload: bool) -> None:
    """Every block is gathered when its turn comes and given up after; embedding, last norm and
    head form the root group, which stays for the step."""
    how: dict[str, Any] = {"mesh": mesh}
    if dtype != torch.float32:
        how["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    if offload:
        how["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    if mesh["shard"].size() == 1 and not offload:  # frozen and whole already: not to be copied
        how["ignored_params"] = {own for own in model.parameters() if not own.requires_grad}
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    assert len(blocks) == model.config.num_hidden_layers
    for block in blocks:
        fully_shard(block, **how)
    fully_shard(model, **how, reshard_after_forward=False)


@torch.no_grad()
def fill(model: Llama, mesh: DeviceMesh, weight: Callable[[str, torch.Size], Tensor]) -> None:
    """Give every parameter this rank's rows of `weight(name, shape)`; no more of it is read. What
    is rounded to integers lies in buffers, whole on every rank."""
    rank, ranks = mesh["shard"].get_local_rank(), mesh["shard"].size()
    for name, parameter in model.named_parameters():
        rows = -(-len(parameter) // ranks)  # FSDP cuts as torch.chunk does
        mine = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        mine.copy_(weight(name, parameter.shape)[rank * rows : (rank + 1) * rows])
        assert mine.dtype == torch.float32 or not parameter.requires_grad
    for name, buffer in model.named_buffers():
        buffer.copy_(weight(name, buffer.shape))


def random_weight(config: LlamaConfig, seed: int, device: torch.device) -> Callable:
    """What `Llama.init_weights` does, a parameter at a time, the same for any number of ranks."""
    generator = torch.Generator(device).manual_seed(seed)

    def weight(name: str, shape: torch.Size) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        noise = torch.empty(shape, device=device)
        return noise.normal_(0.0, config.initializer_range, generator=generator)

    return weight


@contextmanager
def process_group(device_type: str, replicas: int) -> Iterator[tuple[DeviceMesh, torch.device]]:
    """torchrun's ranks, or without torchrun a single one, as a mesh of replicas × shards."""
    cuda = torch.cuda.is_available() if device_type == "auto" else device_type == "cuda"
    if cuda and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if cuda and here > torch.cuda.device_count():
        raise UserError(f"{here} ranks on this machine, and {torch.cuda.device_count()} GPUs")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % replicas:
        raise UserError(f"--replicas {replicas} does not divide the {world} ranks")
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    shape, names = (world,), ("shard",)
    if replicas > 1:
        shape, names = (replicas, world // replicas), ("replicate", "shard")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    try:
        yield mesh, device
    except ValueError:  # every rank's; after anything else the others may be gone: do not wait
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next tensor instead of returning it.

    By default every large tensor on the CPU is fresh memory from the system, which clears it page
    by page: for a small model a fifth of the time in fp32, two fifths in bf16."""
    with suppress(OSError, AttributeError):  # a C library without mallopt does what it does
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: no own mapping for a tensor below this
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: never shrink the heap


def together(work: Callable[[], Any]) -> Any:
    """Do something on every rank; if one meets a mistake, all raise it and none waits for it."""
    result, mistake = None, None
    try:
        result = work()
    except (ValueError, OSError) as met:
        mistake = describe_error(met)
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mistake)
    if mistakes := [text for text in told if text]:
        raise UserError(mistakes[0])
    return result


def lost_contact(mistake: str) -> bool:
    """Did a collective fail because another rank is gone?"""
    words = "Connection closed", "Connection reset", "Broken pipe", "remote process", "Timed out"
    return any(word.lower() in mistake.lower() for word in words)


class StopSignal:
    """Ctrl-C or SIGTERM, heard between two steps. A second Ctrl-C is not waited for; SIGTERM may
    come twice, from a scheduler that tells every process and from torchrun passing it on."""

    def __init__(self):
        self.number = 0  # none yet
        signals = signal.SIGINT, signal.SIGTERM
        self.usual = {number: signal.signal(number, self.hear) for number in signals}

    def hear(self, number: int, frame) -> None:
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        if not self.number:
            os.write(2, b"stopping after this step\n")  # print is not safe in here
        self.number = number

    def forget(self) -> None:
        for number, handler in self.usual.items():
            signal.signal(number, handler)
