"""What training has achieved: figures and answers on records that are not trained on, and the
folder with the model and its card."""

import gc
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from alpaca.common.errors import notice
from alpaca.common.files import atomic_file
from alpaca.common.run_folder import RIGHT_ANSWERS
from alpaca.datagen.formats import group_by_source
from alpaca.inference.engine import Engine
from alpaca.inference.sampling import SamplingParams
from alpaca.training.config import BETAS, CLIP, EPS, TrainConfig
from alpaca.training.group import Sampler
from alpaca.training.job import Job
from alpaca.training.model_card import write_card
from alpaca.training.objectives import AnswerLoss, evaluation, packed_rows
from alpaca.training.parallel import full_tensor, trained_parameters
from alpaca.training.run_dir import RunDir
from alpaca.weights.adapter import save_adapter
from alpaca.weights.checkpoint import DTYPES
from alpaca.weights.loading import load_model, optimize_layout
from alpaca.weights.reward import RewardModel, reward_fields
from alpaca.weights.writer import save_model
from dataset import encode_prompt, template_in_jinja
from model import Llama
from tokenizer import with_ends

PRINTED, PRINTED_LENGTH = 12, 200  # answers and characters of a text; all are compared, whole


def log_held_out(
    model: Llama,
    objective: AnswerLoss | Sampler | None,
    config: TrainConfig,
    run: RunDir,
    device: torch.device,
    step: int,
) -> None:
    """The mean loss over all held-out examples and of each source; of a sampler the mean reward."""
    if isinstance(objective, Sampler) and objective.job.held_out:
        return run.log({"step": step, "held_out_reward": objective.greedy_reward(model)})
    if not isinstance(objective, AnswerLoss):
        return
    sources = {s: np.array(i) for s, i in group_by_source(objective.examples.origins).items()}
    names = [f"held_out_{name}" for name in objective.figures]
    totals = torch.zeros(len(sources), len(names), dtype=torch.float64, device=device)
    with evaluation(model):
        for total, which in zip(totals, sources.values(), strict=True):
            for row in packed_rows(objective, which, config, device):  # of one source
                total += objective(model, row)
    dist.all_reduce(totals)
    counts = [objective.count(which) for which in sources.values()]
    means = dict(zip(names, (totals.sum(0) / sum(counts)).tolist(), strict=True))
    for source, total, count in zip(sources, totals[:, 0].tolist(), counts, strict=True):
        if len(sources) > 1:
            means[f"held_out_loss/{source}"] = total / count
    run.log({"step": step, **means})


def gathered_tensors(model: Llama, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """What is trained, one whole tensor at a time. Before each, all ranks wait for the one that
    writes: NCCL ends a run in which a gather, queued on the others, waits for ten minutes."""
    group: Any = dist.new_group(backend="gloo")
    for name, parameter in trained_parameters(model).items():
        dist.barrier(group)
        yield name, full_tensor(parameter.detach()).to(dtype)


def save_result(model: Llama, job: Job) -> None:
    """Write model/ or adapter/, one tensor at a time: all ranks gather it, rank 0 writes it."""
    config = job.config
    dtype = torch.float32 if config.lora else DTYPES[config.save_dtype]
    tensors = gathered_tensors(model, dtype)
    jinja = template_in_jinja(job.tokenizer)
    if dist.get_rank() > 0:
        for _ in tensors:
            pass
    elif config.lora:
        save_adapter(tensors, config.lora, config.result, config.base, jinja)
    else:
        tokenizer = config.tokenizer or config.base
        model_config = with_ends(job.model_config, job.tokenizer)
        options: dict[str, Any] = {"chat_template": jinja}
        if config.objective == "reward":
            options |= {"kind": RewardModel, "fields": reward_fields(job.tokenizer, model_config)}
        save_model(tensors, model_config, config.result, dtype, tokenizer, **options)


def one_line(text: str) -> str:
    text = " ".join(text.split())
    return f"{text[:PRINTED_LENGTH]}…" if len(text) > PRINTED_LENGTH else text


def print_sample_answers(job: Job, device: torch.device) -> None:
    """Answer held-out instructions, print a dozen answers, and count those that equal `output`."""
    config = job.config
    half = config.max_length // 2  # for the prompt, and as much for the answer
    asked = []
    for record in (r for r in job.held_out_records if "output" in r):
        ids = encode_prompt(record["instruction"], record["input"], job.tokenizer)
        if len(ids) <= half and len(asked) < config.sample_answers:
            asked.append((record, ids))
    if not asked:
        return
    gc.collect()  # frees the trained model, which is in reference cycles: two may not fit
    if config.lora:
        dtype = DTYPES[config.dtype]
        model = load_model(config.base, config.result, config.bits, device, dtype)
        model = optimize_layout(model)
    else:
        model = load_model(config.result, device=device)
    engine = Engine(model, job.tokenizer, min(64, len(asked)), config.max_length)
    sequences = engine.generate([ids for _, ids in asked], SamplingParams(max_new_tokens=half))
    answered = [(record, s.text) for (record, _), s in zip(asked, sequences, strict=True)]
    for record, text in answered[:: len(answered) // PRINTED + 1]:  # evenly spread
        instruction = f"{record['instruction']} [{record['input']}]".removesuffix(" []")
        verdict = "right" if text == record["output"] else "wrong"
        print(f"  {verdict}  {one_line(instruction)} → {one_line(text)}")
    right = [record for record, text in answered if text == record["output"]]
    count = f"{len(right)} of {len(answered)}"
    share = f"{count} held-out instructions ({len(right) / len(answered):.1%})"
    print(f"answered exactly as expected: {share}")
    if right:
        with atomic_file(config.out / RIGHT_ANSWERS, "w") as file:
            json.dump(right[:: max(1, len(right) // 3)][:3], file, indent=2)


def report_result(job: Job, run: RunDir, ranks: int, device: torch.device) -> None:
    config, digest = job.config, job.train.digest()
    if not (config.result / "README.md").exists():
        optimizer = f"AdamW {BETAS}, eps {EPS}, no weight decay; norm clipped at {CLIP}"
        recipe = {"steps": job.steps, "optimizer": optimizer, "ranks": ranks, "ids": digest}
        write_card(job, config.settings(digest) | recipe, run.summary())
    print(run.summary())
    if (margins := run.series("margin")) and abs(margins[-1][1]) < 0.01:
        notice("the model tells chosen from rejected no better than before: raise --learning-rate")
    if (mixed := run.series("mixed_groups")) and not any(share for _, share in mixed):
        notice("all answers to an instruction had the same reward: there was nothing to learn from")
    if config.objective != "reward":
        print_sample_answers(job, device)
    print(f"wrote {config.result} and {run.chart}")
