"""Runs one training step in which no tensor has data, to see the memory that a rank needs.

    python fsdp_train.py --preset 65B --tokenizer data/tokenizer.model --data alpaca_data.json \
        --plan --gpus 1024 --replicas 16 --chip H100 --simulate

The model, the sharding, checkpointing, clipping and AdamW are those of a real run; the tensors are
fake: they have a shape and a dtype, and FSDP sends them to ranks that do not exist. So 65B on 1,024
ranks takes a minute on a laptop. A tracker adds up the storages that are alive.

Where the simulation differs from a GPU: blocks are not compiled, and nothing is copied from host
memory with --offload. What CUDA, NCCL and the allocator take comes on top, see memory_plan.py.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
from torch.nn.attention.varlen import varlen_attn
from torch.testing._internal.distributed.fake_pg import FakeStore

from alpaca.training.memory_plan import IN_HOST_MEMORY, Workload
from alpaca.training.parallel import apply_activation_checkpointing, apply_fsdp, make_mesh
from alpaca.weights.checkpoint import DTYPES, parameter_shapes
from alpaca.weights.lora import build_lora_model
from alpaca.weights.quantize import linear_class
from dataset import IGNORE, Examples, make_row
from model import Llama

aten = torch.ops.aten
CATEGORIES = {  # the tracker's → the plan's; all else is an activation
    "Sharded Param": "weights",
    "Buffer": "weights",
    "OptState": "moments",
    "Sharded Grad": "gradients",
    "Unsharded Param": "gathered",
    "All Gather": "gathered",
    "Reduce Scatter": "reduced",
}


class PeakTracker(FSDPMemTracker):
    """Notes the bytes on the device by category, at the moment when they are most."""

    def __init__(self, model: Any, optimizer: Any, supervised: int, ignored: tuple[str, ...]):
        super().__init__(model, optimizer)
        self.supervised, self.ignored, self.peak = supervised, ignored, Counter()
        for tensor in (*model.parameters(), *model.buffers()):
            self._update_and_maybe_create_winfos(tensor, _FSDPRefType.SHARDED_PARAM)

    def _update_peak_stats(self, peak_state: Any) -> None:
        for sizes in self._curr_mem_snap.values():
            now = Counter()
            for kind, size in sizes.items():
                now[CATEGORIES.get(kind, "activations")] += size * (kind != "Total")
            for name in self.ignored:
                del now[name]
            self.peak = max(now, self.peak, key=Counter.total)

    def __torch_dispatch__(self, func, types, args: Any = (), kwargs=None):
        if func is aten._local_scalar_dense.default:  # `item` and its like
            return 1.0
        if func is aten.empty_strided.default:  # DTensor asks for shapes with whole fake tensors
            return func(*args, **kwargs or {})
        if func is aten.index.Tensor and args[1][0].dtype == torch.bool:
            args = args[0], [torch.empty(self.supervised, dtype=torch.long)] * args[1][0].ndim
        return super().__torch_dispatch__(func, types, args, kwargs or {})


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """What packed_attention does on a GPU."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    bounds = (cu_seqlens, cu_seqlens, longest, longest)
    return varlen_attn(q[0], k[0], v[0], *bounds, window_size=(-1, 0))[None]  # type: ignore


def dropout(x: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
    return torch.native_dropout(x, p, training)[0]  # a GPU's: the mask is bool


def simulate(work: Workload, build_optimizer: Callable, train_step: Callable) -> dict[str, float]:
    """The bytes of a rank by category at the peak of one step."""
    config, shape, device = work.config, work.model, torch.device("cpu")
    documents = np.arange(0, work.row_tokens + 1, work.row_tokens)
    labels = np.where(np.arange(work.row_tokens) % 100 < 100 * work.supervised, 0, IGNORE)
    row = make_row(Examples(labels * 0, labels, documents, [], {}), np.arange(1))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.gpus)
    with ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        if config.lora:
            quantized = partial(linear_class, bits=config.bits, round_head=False)
            shapes: Any = parameter_shapes(shape)
            base: Any = SimpleNamespace(config=shape, shapes=shapes, linear_class=quantized)
            model = build_lora_model(base, DTYPES[config.dtype], config.lora)
        else:
            with torch.device("meta"):
                model = Llama(shape)
        apply_activation_checkpointing(model, config.checkpointing)
        mesh = make_mesh("cpu", config.gpus, config.replicas)
        reshard = config.reshard is not False
        apply_fsdp(model, mesh, DTYPES[config.dtype], config.offload, reshard)
        fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(mock.patch("model.packed_attention", varlen_attention))
        stack.enter_context(mock.patch.object(F, "dropout", dropout))
        model.to_empty(device=device)
        optimizer = build_optimizer(model)
        rows = [{n: fake.from_tensor(t) for n, t in row._asdict().items()}] * work.rows
        ignored = IN_HOST_MEMORY if config.offload else ()
        tracker = PeakTracker(model, optimizer, int((labels[1:] != IGNORE).sum()), ignored)
        with tracker:
            each = (tracker.reset_mod_stats() or row for row in rows)
            train_step(model, optimizer, each, 1, device, SimpleNamespace(number=0))
    return dict(tracker.peak)
