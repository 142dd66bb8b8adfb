"""Fine-tune a LLaMA on instructions: fully sharded data parallel, under torchrun.

    torchrun fsdp_train.py                                  # the tiny model in data/
    torchrun --nproc-per-node 8 fsdp_train.py --model-dir llama-7b --data alpaca_data.json
    torchrun fsdp_train.py --lora --bits 4 --model-dir llama-7b --data alpaca_data.json
    python fsdp_train.py --model-dir llama-7b --data alpaca_data.json --plan --gpus 8 --chip H100

The second line is Alpaca's run; the third trains an adapter on a GPU with 12 GiB. The same command
resumes a run that was interrupted.

  - Weights, gradients and Adam's moments are fp32 and divided among the ranks. A block's weights
    are gathered in bf16 while it computes; gradients are reduced in fp32 (FSDP2, `fully_shard`).
  - The loss is the cross-entropy summed over the answers' tokens and divided by their number in
    the whole step: how the step is divided into ranks and rows changes nothing. `--objective dpo`
    learns from preferences instead, `group` from rewards, and `reward` trains a model that judges
    (alpaca/training/objectives.py).
  - `--out` holds settings.json, metrics.jsonl, loss.svg, checkpoints/ (until the end), and in the
    end model/, a Hugging Face folder with its card, or with --lora adapter/, PEFT's files.
  - Ctrl-C and SIGTERM save after the current step. torchrun allows 30 seconds for that; for a big
    model on a slow disk use its `--shutdown-timeout 300`.

FSDP: arXiv:2304.11277; AdamW: 1711.05101.
"""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from alpaca.common.cli import Parser
from alpaca.common.errors import UserError, is_rank_0, join_names, notice
from alpaca.common.system import check_compiler, keep_freed_memory
from alpaca.training.config import BETAS, CLIP, EPS, TrainConfig, add_arguments
from alpaca.training.group import Sampler
from alpaca.training.job import Job, prepare
from alpaca.training.memory_plan import measure, report_plan, stored_bytes
from alpaca.training.objectives import (
    AnswerLoss,
    PackedRow,
    PreferenceLoss,
    evaluation,
    make_objective,
    packed_rows,
)
from alpaca.training.parallel import (
    build_model,
    local_ranks,
    process_group,
    run_on_all_ranks,
    squared_gradient_norm,
    trained_parameters,
)
from alpaca.training.process import StopSignal, run_rank
from alpaca.training.result import log_held_out, report_result, save_result
from alpaca.training.run_dir import RunDir, check_space
from alpaca.training.snapshots import Snapshots, remove_snapshots
from alpaca.training.throughput import Throughput
from dataset import step_examples
from model import Llama


def train(job: Job, run: RunDir, mesh: DeviceMesh, device: torch.device, stop: StopSignal) -> None:
    """The recipe: AdamW on the mean loss of a step's answer tokens, for a few epochs of shuffled
    examples; the learning rate warms up linearly and decays along a cosine; gradients are clipped.
    """
    config = job.config
    model = run_on_all_ranks(lambda: build_model(config, job.model_config, mesh))
    optimizer = build_optimizer(model)
    snapshots = Snapshots(config.snapshots, config.save_total_limit, model, optimizer)
    done = snapshots.load()  # steps
    objective, held_out = make_objectives(job, model, done, device)
    group = config.objective == "group"
    sampler = run_on_all_ranks(lambda: Sampler(job, device)) if group else None
    run.start_log(done, job.steps)
    throughput = Throughput(job.model_config, config.lora, device)
    for step in range(done, job.steps):
        if step % (config.eval_every or job.steps) == 0:
            log_held_out(model, sampler or held_out, config, run, device, step)
            throughput.restart()
        # an adapter's dropout: the same after a resume, different on every rank
        torch.manual_seed(hash((config.seed, step, dist.get_rank())))
        batch = step_examples(len(job.train), config.batch_size, config.epochs, config.seed, step)
        learned, drawn = batch, {}
        if sampler:  # the step's examples are answers that the model gives now
            objective, learned, drawn = sampler.draw(model, step, batch)
            batch = np.arange(len(objective.examples))
        rows = packed_rows(objective, learned, config, device)
        count = objective.count(batch)
        lr = learning_rate(step, job.steps, config.learning_rate, config.warmup_ratio)
        lr *= len(learned) > 0  # all rewards may be equal: Adam's momentum must not move weights
        optimizer.param_groups[0]["lr"] = lr
        means, norm, stopping, overdue = train_step(
            model, optimizer, objective, rows, count, device, stop, snapshots.overdue()
        )
        examples = objective.examples
        if not math.isfinite(means["loss"] + norm):
            snapshots.finish()
            raise divergence(step + 1, means["loss"], norm, [examples.origins[i] for i in batch])
        speed = throughput.step(examples.lengths[batch], int(examples.supervised[batch].sum()))
        epoch = min((step + 1) * config.batch_size / len(job.train), config.epochs)
        figures = {**means, **drawn, "lr": lr, "grad_norm": norm, **speed}
        run.log_step({"step": step + 1, "epoch": epoch, **figures})
        if stopping or config.saves_after(step + 1, job.steps, overdue):
            snapshots.save(step + 1)
        if stopping and step + 1 < job.steps:
            exit_to_resume(step + 1, snapshots, run, stop)
    log_held_out(model, sampler or held_out, config, run, device, step=job.steps)
    run.end_log()
    try:
        save_result(model, job)
    finally:  # if the result cannot be written, no training is lost
        snapshots.close()
    remove_snapshots(config.snapshots)


# ---------------------------------------------------------------- one step


def learning_rate(step: int, steps: int, max_lr: float, warmup_ratio: float) -> float:
    """Linear warm-up that does not start at 0, then a half cosine to 0. Steps count from 0."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return max_lr * (step + 1) / (warmup + 1)
    return max_lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train_step(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    objective: AnswerLoss,
    rows: Iterable[PackedRow],
    count: int,
    device: torch.device,
    stop: StopSignal,
    overdue: bool = False,
) -> tuple[dict[str, float], float, bool, bool]:
    """One step; returns the means of the objective's figures over all ranks, the gradient norm
    before clipping, and whether any rank got a signal to stop, or has a snapshot overdue. A loss or
    norm that is not finite changes no weights. The host waits for a GPU once, for these numbers.

    `count` is what the loss of the whole step is divided by: its supervised tokens, or its pairs.
    FSDP averages gradients over ranks; the factor world size makes them a sum."""
    # ranks that stop, ranks with a snapshot overdue, squared norm, loss and other figures
    totals = torch.zeros(3 + len(objective.figures), dtype=torch.float64, device=device)
    for row in rows:
        sums = objective(model, row)
        (sums[0] * (dist.get_world_size() / count)).backward()
        totals[3:] += sums.detach()
    totals[0] = stop.number
    totals[1] = overdue
    totals[2] = squared_gradient_norm(model)
    dist.all_reduce(totals)
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), CLIP, totals[2].sqrt().float())
    stopping, any_overdue, squared_norm, *sums = totals.tolist()
    means = {name: each / count for name, each in zip(objective.figures, sums, strict=True)}
    norm = math.sqrt(squared_norm)
    if math.isfinite(means["loss"] + norm):
        optimizer.step()
    optimizer.zero_grad()
    return means, norm, stopping > 0, any_overdue > 0


def divergence(step: int, loss: float, norm: float, origins: list) -> UserError:
    places = join_names(dict.fromkeys(origin.place for origin in origins), 16)
    return UserError(
        f"step {step}: the loss is {loss}, the gradient norm {norm}. This step changed no weights "
        f"and nothing is saved. Its examples: {places}"
    )


def exit_to_resume(step: int, snapshots: Snapshots, run: RunDir, stop: StopSignal) -> None:
    snapshots.finish()
    run.end_log()
    notice(f"stopped after step {step}: the same command resumes from there")
    sys.exit(128 + (stop.number or signal.SIGTERM))


# ---------------------------------------------------------------- before and after the steps


def make_objectives(
    job: Job, model: Llama, done: int, device: torch.device
) -> tuple[AnswerLoss, AnswerLoss | None]:
    """What training minimizes, and the same for the held-out examples."""
    config = job.config
    found = [make_objective(each, config) for each in (job.train, job.held_out) if each]
    for each in found:
        if isinstance(each, PreferenceLoss) and done:
            run_on_all_ranks(partial(each.load, config.out))
        elif isinstance(each, PreferenceLoss):
            every = np.arange(len(each.examples))
            notice(f"log-probabilities of the reference: {len(every)} pairs")
            parts = (every[i : i + 4096] for i in range(0, len(every), 4096))  # quickly packed
            rows = (row for part in parts for row in packed_rows(each, part, config, device))
            with evaluation(model):
                each.measure_reference(model, rows, device)
            run_on_all_ranks(lambda each=each: dist.get_rank() > 0 or each.save(config.out))
    return found[0], found[1] if len(found) > 1 else None


def build_optimizer(model: Llama) -> torch.optim.AdamW:
    """AdamW without weight decay, with its moments in place to load a snapshot into."""
    parameters = trained_parameters(model).values()
    optimizer = torch.optim.AdamW(parameters, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


# ---------------------------------------------------------------- the command


def main() -> None:
    parser = Parser(description=__doc__)
    add_arguments(parser)
    config = TrainConfig.from_args(parser.parse_args())
    if config.plan:
        if not is_rank_0():
            return None
        job = prepare(config)
        work = measure(job.config, job.model_config, job.train, job.steps)
        return print(report_plan(work))
    keep_freed_memory()
    with ExitStack() as lock:
        with process_group(config.device, config.replicas) as (mesh, device):
            config = replace(config, gpus=mesh.size())
            if config.compiles(device):
                run_on_all_ranks(lambda: check_compiler(device.type, "give --no-compile"))
            job = run_on_all_ranks(lambda: prepare(config))
            choice = [job.config.row_tokens, job.config.reshard]
            dist.broadcast_object_list(choice)  # rank 0's: elsewhere GPUs may have other memory
            config = replace(job.config, row_tokens=choice[0], reshard=choice[1])
            job, settings = job._replace(config=config), config.settings(job.train.digest())
            disk, memory = stored_bytes(config, job.model_config, job.steps)
            if not config.result.exists():
                run_on_all_ranks(lambda: check_space(config.out, disk, memory * local_ranks()))
            other = dist.get_rank() > 0
            run = lock.enter_context(run_on_all_ranks(lambda: RunDir(config.out, settings, other)))
            if run_on_all_ranks(run.finished):
                notice(f"{config.out} is finished; remove it to train again")
                run.start_log(job.steps + 1, job.steps)
                remove_snapshots(config.snapshots)  # if the last run was killed at its very end
            else:
                counts = ", ".join(f"{number} {what}" for what, number in job.train.report.items())
                notice(f"examples: {counts}")
                with StopSignal() as stop:
                    train(job, run, mesh, device, stop)
        if not other:
            report_result(job, run, mesh.size(), device)


if __name__ == "__main__":
    run_rank(main)
