"""One model on many ranks, and many ranks behaving like one program.

model.py contains none of this. `build_model` makes a model on the meta device, where it takes no
memory; checkpointing, compilation and FSDP are applied to it; then each rank reads its own rows.

ZeRO: arXiv:1910.02054; FSDP: 2304.11277; activation checkpointing: 1604.06174.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from alpaca.common.errors import UserError, describe_error
from alpaca.training.config import TrainConfig
from alpaca.training.objectives import model_class
from alpaca.weights import lora
from alpaca.weights.checkpoint import DTYPES, is_finite, stored_tensors
from alpaca.weights.reward import SCORE
from model import Block, Llama, LlamaConfig

SAVED = {  # by name, since one of these operations exists only after an import of seconds
    "aten::mm",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "torch_attn::_varlen_attn",
}
# In the message of a collective that failed because another rank ended.
PEER_FAILURES = "connection closed", "connection reset", "broken pipe", "remote process"
PEER_FAILURES += ("timed out",)


# ---------------------------------------------------------------- one model on many ranks


def blocks_of(model: Llama) -> list[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]


def apply_activation_checkpointing(model: Llama, mode: str) -> None:
    """`full` stores a block's input and recomputes the rest in the backward pass; `selective` also
    stores the results of matrix products, and recomputes only what is cheap."""
    if mode == "none":
        return

    def save_products(context: Any, operation: Any, *args, **kwargs) -> CheckpointPolicy:
        saved = operation.name() in SAVED
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, save_products)
    for block in blocks_of(model):  # replacing `forward` instead of wrapping keeps names
        block.forward = checkpointed(block.forward, options)


def checkpointed(forward: Callable, options: dict[str, Any]) -> Callable:
    """A function of our own, because the compiler does not look into a `partial` of torch's."""
    return lambda *args: checkpoint(forward, *args, **options)


def apply_compile(model: Llama) -> None:
    # Short and long rows, training and evaluation, and the first block, whose input has no
    # gradient, are compiled separately; at its limit the compiler would silently give up.
    torch._dynamo.config.recompile_limit = 32
    for block in blocks_of(model):  # equal blocks share one compilation
        block.compile()


def apply_fsdp(
    model: Llama, mesh: DeviceMesh, dtype: torch.dtype, offload: bool, reshard: bool = True
) -> None:
    """Each block is gathered for its computation and freed after it, or with `reshard` false after
    its backward pass. Embedding, last norm and head form the root group, which stays gathered for
    the step."""
    options: dict[str, Any] = {"mesh": mesh}
    if dtype != torch.float32:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    if mesh["shard"].size() == 1 and not offload:  # frozen and whole already: no copy
        options["ignored_params"] = {p for p in model.parameters() if not p.requires_grad}
    for block in blocks_of(model):
        fully_shard(block, **options, reshard_after_forward=reshard)
    fully_shard(model, **options, reshard_after_forward=False)


def full_tensor(tensor: Tensor) -> Tensor:
    """All rows of a tensor that is divided among the ranks; every rank must call it."""
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def trained_parameters(model: Llama) -> dict[str, nn.Parameter]:
    """All parameters, or with LoRA the adapter's: those with gradients and moments."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def first_row(tensor: Tensor, mesh: DeviceMesh) -> int:
    """The number of this rank's first row in the whole tensor: FSDP divides as torch.chunk does."""
    return mesh["shard"].get_local_rank() * -(-len(tensor) // mesh["shard"].size())


def squared_gradient_norm(model: Llama) -> Tensor:
    """This rank's part of Σ g² over all gradients; the parts of all ranks add up to it.

    Summed in fp32, millions of squares are off by a thousandth, and differently for another number
    of ranks. A row is short enough for fp32, and whole on one rank: its norm is the same however
    many there are, and the squares of these norms are summed in fp64."""
    norms, copies = [], 1
    for parameter in trained_parameters(model).values():
        gradient = parameter.grad
        assert isinstance(gradient, DTensor)
        rows = gradient.to_local()[..., None].flatten(1)  # a vector has rows of one number
        norms.append(torch.linalg.vector_norm(rows, dim=1))
        copies = gradient.device_mesh.size() // gradient.device_mesh["shard"].size()
    return torch.cat(norms).double().square().sum() / copies  # each replica has all rows


@torch.no_grad()
def load_sharded_weights(
    model: Llama, mesh: DeviceMesh, read: Callable[[str, torch.Size], Tensor]
) -> None:
    """Give every parameter this rank's rows of `read(name, shape)`; mapped files are read no
    further. Buffers, which hold quantized matrices, are whole on every rank."""
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local.copy_(read(name, parameter.shape)[first_row(parameter, mesh) :][: len(local)])
        assert local.dtype == torch.float32 or not parameter.requires_grad
        if not is_finite(local):
            raise UserError(f"the base's {name} holds NaN or infinity as {local.dtype}")
    for name, buffer in model.named_buffers():
        buffer.copy_(read(name, buffer.shape))


def random_weights(config: LlamaConfig, seed: int, device: torch.device) -> Callable:
    """As `Llama.init_weights`, one parameter at a time, the same for any number of ranks."""
    generator = torch.Generator(device).manual_seed(seed)

    def read(name: str, shape: torch.Size) -> Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        noise = torch.empty(shape, device=device)
        return noise.normal_(0.0, config.initializer_range, generator=generator)

    return read


def open_model(
    config: TrainConfig, model_config: LlamaConfig, device: torch.device
) -> tuple[Llama, Callable[[str, torch.Size], Tensor]]:
    """The model on the meta device, and a function that reads a tensor to start from."""
    if config.lora:
        base = lora.open_base(config.base, config.bits)
        model = lora.build_lora_model(base, DTYPES[config.dtype], config.lora)
        return model, lora.initial_weights(base, config.seed)
    with torch.device("meta"):
        model = model_class(config)(model_config)
    if config.preset:
        return model, random_weights(model_config, config.seed, device)
    stored = stored_tensors(config.base)
    # a reward model's head is not in it (reward.py)
    return model, lambda name, shape: torch.zeros(shape) if name == SCORE else stored[name].read()


def build_model(config: TrainConfig, model_config: LlamaConfig, mesh: DeviceMesh) -> Llama:
    """The model, sharded; no rank ever holds all of it."""
    device, dtype = torch.device(mesh.device_type), DTYPES[config.dtype]
    model, read = open_model(config, model_config, device)
    apply_activation_checkpointing(model, config.checkpointing)
    if config.compiles(device):
        apply_compile(model)
    apply_fsdp(model, mesh, dtype, config.offload, not config.stays_gathered)
    model.to_empty(device="cpu" if config.offload else device)
    load_sharded_weights(model, mesh, read)
    return model


# ---------------------------------------------------------------- many ranks, one program


def local_ranks() -> int:
    """The number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def make_mesh(device_type: str, world: int, replicas: int) -> DeviceMesh:
    """All ranks as replicas × shards."""
    if replicas == 1:
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    shape, names = (replicas, world // replicas), ("replicate", "shard")
    return init_device_mesh(device_type, shape, mesh_dim_names=names)


def use_deterministic_kernels() -> None:
    """Have a GPU compute the same bits each time, so that a resumed run is the run it continues:
    by default kernels add numbers in the order in which threads happen to finish. To be called
    before CUDA starts and the compiler is imported, because they read their settings then."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"  # the compiler times no sums to choose one
    torch.use_deterministic_algorithms(True)
    # by default this also fills new memory before it is written, which takes time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore


@contextmanager
def process_group(device_type: str, replicas: int) -> Iterator[tuple[DeviceMesh, torch.device]]:
    """torchrun's ranks, or without torchrun a single one, as a mesh of replicas × shards."""
    cuda = torch.cuda.is_available() if device_type == "auto" else device_type == "cuda"
    if cuda and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here")
    if cuda and (ranks := local_ranks()) > (gpus := torch.cuda.device_count()):
        raise UserError(f"{ranks} ranks on this machine, but {gpus} GPUs")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % replicas:
        raise UserError(f"{world} ranks are not a multiple of --replicas {replicas}")
    device = torch.device("cpu")
    if cuda:
        use_deterministic_kernels()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield make_mesh(device.type, world, replicas), device
    except UserError:  # raised on every rank; after other errors ranks may be gone: do not wait
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()
    if cuda:  # decoding does not need it
        torch.use_deterministic_algorithms(False)


def run_on_all_ranks(work: Callable[[], Any], group: Any = None) -> Any:
    """Call `work` on every rank. If one rank fails, all raise, so that none waits for it: a
    UserError for a user's error, and for a bug its traceback on the rank that has it."""
    result, user_error, bug = None, None, None
    try:
        result = work()
    except (UserError, OSError) as error:
        user_error = describe_error(error)
    except Exception as error:
        bug = error
    errors: list = [None] * dist.get_world_size()
    dist.all_gather_object(errors, (user_error, bug and describe_error(bug)), group)
    if bug:
        raise bug
    for rank, (user_error, bug_text) in enumerate(errors):
        if bug_text is not None:
            raise RuntimeError(f"rank {rank} failed: {bug_text}")
        if user_error is not None:
            raise UserError(user_error)
    return result


def is_peer_failure(message: str) -> bool:
    """Is this the error of a collective that failed because another rank ended?"""
    return any(phrase in message.lower() for phrase in PEER_FAILURES)
