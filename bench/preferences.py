"""Learning from preferences: useful tokens a second and peak memory, against TRL's DPOTrainer.

    python -m bench.preferences [--runs 5] [--steps 9]

DPO on pairs of random tokens: a prompt and two answers, the examples of bench/train.py twice. The
model has 15.2M parameters and random weights; a step has 8 pairs, on the CPU, in the same dtype.

The time is that of a whole run of one epoch: the reference's log-probabilities, the steps with
their first ones, clipping, AdamW, logging. TRL is measured at its defaults (gradient checkpointing,
a second model for the reference) and at its best (no checkpointing, log-probabilities computed
before the first step); both pad. Padding does not count as tokens on either side.
"""

import copy
import tempfile
import time
from dataclasses import replace
from unittest import mock

import numpy as np
import torch

from bench.measure import ROOT
from bench.models import SMALL
from bench.train import as_examples, compare, examples, run_ours

PAIRS = 8  # in a step


def random_pairs(count: int) -> list[list[tuple[list[int], list[int]]]]:
    """(chosen, rejected), each as (ids, labels): the same prompt and answers of two lengths."""
    found = []
    for (ids, labels), (other, _) in zip(examples(count), examples(2 * count)[count:], strict=True):
        prompt, answer = ids[: len(ids) // 2], other[len(other) // 2 :]
        rejected = prompt + answer, [-100] * len(prompt) + answer
        found.append([(ids, labels), (rejected[0][:512], rejected[1][:512])])
    return found


def ours(dtype: str, steps: int) -> dict[str, float]:
    import fsdp_train

    plain = as_examples([answer for pair in random_pairs(PAIRS * steps) for answer in pair])
    data, started, make = replace(plain, p=np.ones(PAIRS * steps)), [], fsdp_train.make_objectives

    def make_objectives(*given):  # measures the reference
        started.append(time.perf_counter())
        return make(*given)

    with (
        mock.patch.object(fsdp_train, "make_objectives", make_objectives),
        mock.patch.object(fsdp_train, "save_result"),
    ):
        records = run_ours(dtype, steps, data, objective="dpo", learning_rate=1e-6)
    seconds = time.perf_counter() - started[0]
    return {"rate": sum(record["tokens"] for record in records) / seconds}


def trl(dtype: str, steps: int, best: bool) -> dict[str, float]:
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    pairs, started = random_pairs(PAIRS * steps), []
    prompts = [sum(label < 0 for label in labels) for (_, labels), _ in pairs]
    data = [
        {
            "prompt_ids": chosen[0][:n],
            "chosen_ids": chosen[0][n:],
            "rejected_ids": rejected[0][n:],
        }
        for n, (chosen, rejected) in zip(prompts, pairs, strict=True)
    ]

    class Tokenized(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

        def _precompute_ref_logps(self, *given):
            started.append(time.perf_counter())
            return super()._precompute_ref_logps(*given)

    torch.manual_seed(0)
    options: dict = {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny-llama")
        tokenizer.pad_token = tokenizer.eos_token
        model = LlamaForCausalLM(LlamaConfig(**SMALL))
        trainer = Tokenized(
            model,
            None if best else copy.deepcopy(model),
            args=DPOConfig(
                folder,
                per_device_train_batch_size=PAIRS,
                num_train_epochs=1,
                max_length=512,
                use_cpu=True,
                bf16=dtype == "bf16",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **(options if best else {}),
            ),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list(data),
        )
        started.append(time.perf_counter())
        trainer.train()
        seconds = time.perf_counter() - started[0]
    return {"rate": sum(len(ids) for pair in pairs for ids, _ in pair) / seconds}


if __name__ == "__main__":
    compare(
        "bench.preferences",
        __doc__,
        "DPO of 15M parameters",
        {
            "ours": ours,
            "TRL": lambda dtype, steps: trl(dtype, steps, False),
            "TRL, at its best": lambda dtype, steps: trl(dtype, steps, True),
        },
        ["torch", "trl", "transformers", "accelerate"],
        flops=8,  # the reference is computed, too
    )
