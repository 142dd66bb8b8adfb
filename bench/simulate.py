"""Runs one training step in which no tensor has data, to see the memory that a rank needs.

    sizes = simulate(work, fsdp_train.build_optimizer, fsdp_train.train_step)    # see bench/plan.py

The model, the sharding, checkpointing, clipping and AdamW are those of a real run; the tensors are
fake: they have a shape and a dtype, and FSDP sends them to ranks that do not exist. So 65B on 1,024
ranks takes a minute on a laptop. A tracker adds up the storages that are alive.

On a GPU, blocks are compiled, parts of the head's gradient are not stored, and --offload copies.
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
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
from torch.testing._internal.distributed.fake_pg import FakeStore

from alpaca.training.memory_plan import IN_HOST_MEMORY, Workload, sampler_bytes
from alpaca.training.objectives import PackedRow, make_objective, model_class
from alpaca.training.parallel import apply_activation_checkpointing, apply_fsdp, make_mesh
from alpaca.weights.checkpoint import DTYPES, parameter_shapes
from alpaca.weights.lora import build_lora_model
from alpaca.weights.quantize import linear_class
from alpaca.weights.reward import label_ends
from dataset import IGNORE, Examples, make_row

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

    def __init__(self, work: Workload, model: Any, optimizer: torch.optim.Optimizer):
        super().__init__(model, optimizer)
        self.row_tokens, self.peak = work.row_tokens, Counter()
        self.ignored = IN_HOST_MEMORY if work.config.offload else ()
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
        if func is aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].is_floating_point() else self.row_tokens  # loss, norm; a length
        if func is aten.empty_strided.default:  # DTensor asks for shapes with whole fake tensors
            return func(*args, **kwargs or {})
        return super().__torch_dispatch__(func, types, args, kwargs or {})


def dropout(x: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
    return torch.native_dropout(x, p, training)[0]  # a GPU's: the mask is bool


def simulate(work: Workload, build_optimizer: Callable, train_step: Callable) -> dict[str, float]:
    """The bytes of a rank by category at the peak of one step."""
    config, shape, device = work.config, work.model, torch.device("cpu")
    p = None if config.documents == 1 else np.ones(1)
    documents = np.array([0, work.row_tokens] if p is None else [0, 1, work.row_tokens])
    labels = np.where(np.arange(work.row_tokens) % 100 < 100 * work.supervised, 0, IGNORE)
    labels[0] = IGNORE if p is None else 0  # the first of a document has none
    examples = Examples(labels * 0, labels, documents, [], {}, p)
    examples = label_ends(examples) if config.objective == "reward" else examples
    objective = make_objective(examples, config)
    row = make_row(objective.examples, which := np.arange(1))
    columns = objective.columns(which)
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
                model = model_class(config)(shape)
        apply_activation_checkpointing(model, config.checkpointing)
        mesh = make_mesh("cpu", config.gpus, config.replicas)
        reshard = not config.stays_gathered
        apply_fsdp(model, mesh, DTYPES[config.dtype], config.offload, reshard)
        fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(mock.patch("model.FLASH", "cpu"))  # as on a GPU
        stack.enter_context(mock.patch("model.LOGITS_CHUNK", work.logits_chunk))
        stack.enter_context(mock.patch.object(F, "dropout", dropout))
        model.to_empty(device=device)
        optimizer = build_optimizer(model)
        inputs = {n: fake.from_tensor(t) for n, t in row._asdict().items()}
        numbers = {n: fake.from_tensor(torch.from_numpy(x)) for n, x in columns.items()}
        rows = [PackedRow(inputs, numbers)] * work.rows
        tracker = PeakTracker(work, model, optimizer)
        with tracker:
            each = (tracker.reset_mod_stats() or row for row in rows)
            train_step(model, optimizer, objective, each, 1, device, SimpleNamespace(number=0))
    return {**tracker.peak, "sampler": sampler_bytes(work)}  # which is the same in every phase
