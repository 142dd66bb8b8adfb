"""Learning an adapter: useful tokens a second and peak memory, against PEFT under HF's Trainer.

    python bench/lora.py [--runs 3] [--steps 13]

Model, examples, batches and what counts are bench/train.py's. Adapters of rank 16 on q, k, v and o,
dropout 0.05, beside a frozen base that both sides hold in the dtype they compute in. On a GPU there
follow shapes of 7B with random weights, over a base of bf16 and one of int4, without a peer: rows
of 4096 tokens in documents of 128, half of them supervised, four rows a step.
"""

import gc
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench.train import compare, ours, trainer  # noqa: E402

ROW, DOCUMENT, STEPS, WARM_UP = 4096, 128, 12, 4


def with_peft(dtype: str, steps: int, grouped: bool) -> list[float]:
    import torch
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    chosen = LoraConfig(r=16, lora_alpha=16, lora_dropout=0.05, target_modules=targets)
    held = torch.bfloat16 if dtype == "bf16" else torch.float32
    return trainer(dtype, steps, grouped, lambda model: get_peft_model(model.to(held), chosen))


def on_gpu(bits: int, mode: str) -> dict[str, float]:
    """A step of the trainer's, on one device: tokens a second and peak GiB."""
    import torch

    import fsdp_train
    import parallel
    from checkpoint import parameter_shapes
    from lora import Lora, skeleton
    from model import LlamaConfig
    from quantize import Recipe

    base = type("Shapes", (), {})()  # what `skeleton` asks a checkpoint for
    base.config, base.recipe = LlamaConfig.preset("7B"), Recipe(bits)
    base.shapes = parameter_shapes(base.config)
    quiet = type("NoSignal", (), {"number": 0})
    torch.compiler.reset()  # and with it goes the model before
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    with parallel.process_group("cuda", 1) as (mesh, device):
        model = skeleton(base, torch.bfloat16, Lora())
        parallel.apply_activation_checkpointing(model, mode)
        parallel.apply_compile(model)
        parallel.apply_fsdp(model, mesh, torch.bfloat16, False)
        model.to_empty(device=device)
        with torch.no_grad():
            for own in [*model.parameters(), *model.buffers()]:
                own = own.to_local() if hasattr(own, "to_local") else own
                own.normal_(0, 0.02) if own.is_floating_point() else own.random_(0, 127)
        optimizer = fsdp_train.adamw(model)
        ids = torch.randint(3, 32000, (1, ROW), device=device)
        labels = ids.masked_fill(torch.arange(ROW, device=device) % DOCUMENT < DOCUMENT // 2, -100)
        bounds = torch.arange(0, ROW + 1, DOCUMENT, dtype=torch.int32, device=device)
        row = {"ids": ids, "labels": labels, "cu_seqlens": bounds}
        for step in range(STEPS):
            if step == WARM_UP:
                torch.cuda.synchronize()
                start = time.perf_counter()
            fsdp_train.train_step(model, optimizer, [row] * 4, 2 * ROW, device, quiet)
        torch.cuda.synchronize()
        rate = 4 * ROW * (STEPS - WARM_UP) / (time.perf_counter() - start)
        return {"rate": rate, "GiB": torch.cuda.max_memory_allocated() / 2**30}


def gpu_table() -> str:
    import torch

    lines = ["### Learn an adapter of 7B shapes on one GPU", ""]
    if not torch.cuda.is_available():
        return "\n".join([*lines, "not yet measured: there is no GPU here", ""])
    lines += [f"{torch.cuda.get_device_name()}, torch {torch.__version__}", ""]
    lines += ["| base | checkpointing | tokens/s | peak GiB |", "|---|---|---|---|"]
    for bits, mode in ((16, "none"), (16, "full"), (4, "full")):
        found = on_gpu(bits, mode)
        base = "bf16" if bits == 16 else f"int{bits}"
        lines.append(f"| {base} | {mode} | {found['rate']:,.0f} | {found['GiB']:.1f} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    one_side = "--side" in sys.argv
    compare(
        __file__,
        __doc__,
        "Learn an adapter of 15M parameters",
        {
            "ours": lambda dtype, steps: ours(dtype, steps, lora=True),
            "Trainer": lambda dtype, steps: with_peft(dtype, steps, False),
            "Trainer, grouped": lambda dtype, steps: with_peft(dtype, steps, True),
        },
        ["torch", "peft", "transformers", "accelerate"],
    )
    if not one_side:
        print(gpu_table())
