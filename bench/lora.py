"""Training an adapter: useful tokens a second and peak memory, against PEFT under HF's Trainer.

    python -m bench.lora [--runs 5] [--steps 9]

Model, examples, batches and figures are those of bench/train.py. The adapter has rank 16 on q, k, v
and o and dropout 0.05; both sides hold the frozen base in the dtype they compute in.
bench/gpu_train.py does this with a 7B on a GPU.
"""

from bench.train import compare, ours, trainer


def with_adapter(dtype: str, steps: int) -> dict[str, float]:
    from alpaca.weights.lora import LoraConfig

    return ours(dtype, steps, lora=LoraConfig())


def with_peft(dtype: str, steps: int, how: str) -> dict[str, float]:
    import torch
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = LoraConfig(r=16, lora_alpha=16, lora_dropout=0.05, target_modules=targets)
    base_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    return trainer(dtype, steps, how, lambda model: get_peft_model(model.to(base_dtype), lora))


if __name__ == "__main__":
    compare(
        "bench.lora",
        __doc__,
        "Train an adapter of a 15M-parameter model",
        {
            "ours": with_adapter,
            "Trainer": lambda dtype, steps: with_peft(dtype, steps, "padded"),
            "Trainer, grouped": lambda dtype, steps: with_peft(dtype, steps, "grouped"),
            "Trainer, packed": lambda dtype, steps: with_peft(dtype, steps, "packed"),
        },
        ["torch", "peft", "transformers", "accelerate"],
        flops=4,  # a frozen weight has no gradient
    )
