"""Learning an adapter: useful tokens a second and peak memory, against PEFT under HF's Trainer.

    python bench/lora.py [--runs 3] [--steps 9]

Model, examples, batches and what counts are bench/train.py's. Adapters of rank 16 on q, k, v and o,
dropout 0.05, beside a frozen base that both sides hold in the dtype they compute in. A 7B on a GPU
is bench/gpu_train.py's.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench.train import compare, ours, trainer  # noqa: E402


def with_peft(dtype: str, steps: int, grouped: bool) -> list[float]:
    import torch
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    chosen = LoraConfig(r=16, lora_alpha=16, lora_dropout=0.05, target_modules=targets)
    held = torch.bfloat16 if dtype == "bf16" else torch.float32
    return trainer(dtype, steps, grouped, lambda model: get_peft_model(model.to(held), chosen))


if __name__ == "__main__":
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
